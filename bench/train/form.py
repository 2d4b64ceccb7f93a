"""Whether what was read has the form of what a run writes: kinds, keys, lengths and shapes, not values."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any

from torch import Tensor

from bench import UsageError
from bench.train.options import ANEW

# Of a checkpoint, as `Run.write` makes it.
RUN = {
    "workload": str,
    "settings": dict,
    "data": str,
    "model": dict,
    "optimizer": {"state": dict, "param_groups": list},
    "scaler": dict,
    "ranks": list,
    "losses": list,
    "count": int,
    "quality": list | NoneType,
    "cost": {"speed": float, "memory": float},
}


def check(found: Any, like: Any, where: str = "") -> None:
    """Compares with `like`: a type, a tensor of the right shape, a dict, list or tuple of these, or any other value of
    the right type.

    Raises:
        UsageError: the forms differ; says where and how
    """
    kind = like if isinstance(like, (type, UnionType)) else Tensor if isinstance(like, Tensor) else type(like)
    same = isinstance(found, kind)
    given, wanted = type(found).__name__, getattr(kind, "__name__", str(kind))
    if same and isinstance(like, Tensor):
        same = found.shape == like.shape
        given, wanted = (f"a tensor of {tuple(tensor.shape)}" for tensor in (found, like))
    elif same and isinstance(like, dict):
        same = found.keys() == like.keys()
        sides = (("without", like.keys() - found.keys()), ("with", found.keys() - like.keys()))
        given = " and ".join(f"{word} {', '.join(sorted(map(str, keys)))}" for word, keys in sides if keys)
        wanted = "what this program writes"
    elif same and isinstance(like, (list, tuple)):
        same = len(found) == len(like)
        given, wanted = f"of length {len(found)}", str(len(like))
    if not same:
        raise UsageError(f"the checkpoint's {where or 'content'} is {given}, allowed is {wanted}: {ANEW}")
    if isinstance(like, dict):
        for key in like:
            check(found[key], like[key], f"{where}[{key!r}]" if where else str(key))
    elif isinstance(like, (list, tuple)):
        for index, pair in enumerate(zip(found, like, strict=True)):
            check(*pair, f"{where}[{index}]")
