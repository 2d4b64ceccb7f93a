"""What a call would launch on an H200, counted without one: plans are that device's, the project's kernels do nothing
but count, and every operation of torch that would start a kernel there counts one."""

from collections import Counter

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from persistrnn import decide
from persistrnn.kernels import launch, marks
from persistrnn.kernels.planner import hardware

PRODUCTS = {"addmm", "addmm_", "mm", "bmm", "baddbmm", "linear", "matmul"}
# Of what is no view: memory, and what only Python sees.
NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "alias"}
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}  # the host, for the device


class Launched(TorchDispatchMode):
    """found: how often each operation, and each kernel, was launched. waits: for what the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "persistrnn":  # an operator of ours is what it does
            with self:
                return OPDEFS[f"{namespace}::{name}"]._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if name in WAITS:
            self.waits[name] += 1
        elif name.startswith("_foreach"):
            self.found[name] += 1 if in_one_launch(*args) else len(args[0])
        elif name not in NOTHING and not is_view(function, result, args):
            self.found[name] += 1
        return result

    @property
    def products(self) -> int:
        return sum(n for name, n in self.found.items() if name in PRODUCTS)

    @property
    def others(self) -> int:
        return self.found.total() - self.products


def is_view(function, result, args) -> bool:
    """Of its first argument; ``contiguous`` and the like only where they copy nothing."""
    if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
        return False
    return not isinstance(result, torch.Tensor) or places(result) == places(args[0])


def places(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def in_one_launch(*lists) -> bool:
    """What ATen asks for: everything in one dtype, dense, and of the same strides in both lists."""
    tensors = [t for of in lists for t in of]
    same = all(a.shape == b.shape for a, b in zip(lists[0], lists[-1], strict=True))
    return same and all(t.dtype == tensors[0].dtype and t.is_contiguous() for t in tensors)


class _Stub:
    """In a kernel's place."""

    def __init__(self, name: str, mode: Launched) -> None:
        self.__name__, self.mode = name, mode

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.mode.found[self.__name__] += 1

        return run


def stubbed(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A counter; from here on nothing of this project's is computed."""
    mode = Launched()
    for module, names in (
        (launch, ("scan_forward", "scan_backward", "activate")),
        (marks, ("make_marks", "gather_before")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _Stub(name, mode))
    monkeypatch.setattr(launch, "hardware", lambda device: hardware.named("h200"))
    monkeypatch.setattr(decide, "unsupported", lambda call: None)
    return mode
