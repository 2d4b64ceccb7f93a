"""The settings of a training program: a frozen dataclass whose every field is an option of its command line."""

import argparse
import math
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch

from bench import UsageError
from bench.train import ranks
from bench.train.checkpoint import ANEW
from persistrnn.kernels.cells import BUILT_IN

Backend: TypeAlias = Literal["auto", "persistent", "torch", "torch.nn"]
Save: TypeAlias = Literal["gates", "state", "checkpoint"]
METAVARS = {int: "N", float: "X"}

SettingsT = TypeVar("SettingsT", bound="Settings")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: an int or a float from `low` (or above it) to `high`."""
    noun = "whole number" if kind is int else "number"
    allowed = f"a {noun} {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} given, allowed is {allowed}")
        return value

    return convert


def absolute(text: str) -> str:
    """An argparse type: a path, absolute, so that --resume may be given in another folder."""
    return str(Path(text).resolve())


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of a Settings dataclass and its option: `--name` with `how` as for argparse's add_argument."""
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers. It is kept in the checkpoint; resuming cannot change it.

    A training program adds its own fields by subclassing; a field given here again is another default for its option.
    """

    device: str = option(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)", metavar="NAME")
    # Of the products; parameters and optimizer stay float32.
    dtype: str = option(
        None,
        "of the matrix products (default float32 on a CPU, else bfloat16)",
        choices=["float32", "bfloat16", "float16"],
    )
    cell: str = option("lstm", "recurrent cell", choices=list(BUILT_IN))
    hidden: int = option(256, "hidden units a layer", type=number(int, 1))
    heads: int = option(1, "blocks of a block-diagonal W_hh, a divisor of --hidden", type=number(int, 1))
    layers: int = option(1, "recurrent layers", type=number(int, 1))
    dropout: float = option(0.0, "share of units dropped between layers", type=number(float, 0, 1))
    backend: Backend = option(
        "auto",
        "the path through persistrnn, or torch.nn's own layer for a baseline",
        choices=get_args(Backend),
    )
    save: Save = option(
        "gates",
        "what persistrnn's layers keep for the backward: all gates (fastest), the states only, or a state now and then",
        choices=get_args(Save),
    )
    batch: int = option(8, "sequences side by side, over all processes", type=number(int, 1))
    truncate: int = option(0, "time steps a gradient flows back through; 0: all of the sequence", type=number(int, 0))
    steps: int = option(1000, "optimizer steps", type=number(int, 1))
    learning_rate: float = option(4e-3, "of AdamW, at its highest", type=number(float, 0, above=True))
    schedule: str = option(
        "cosine", "learning rate after the warm-up: falls to 0, or stays", choices=["cosine", "constant"]
    )
    warmup: int = option(0, "steps over which the learning rate rises", type=number(int, 0))
    weight_decay: float = option(0.01, "of AdamW", type=number(float, 0))
    clip: float = option(1.0, "largest norm of the gradient", type=number(float, 0, above=True))
    seed: int = option(0, "of the initial weights, of dropout and of the data's order", type=number(int, 0, 2**62))

    @property
    def whole(self) -> bool:
        """Whether a row's gradient flows through all of it: then there is no --truncate."""
        return False

    def __post_init__(self) -> None:
        """Raises UsageError where options contradict each other or this machine. Subclasses extend it."""
        there, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
        numbered = [f"cuda:{index}" for index in range(there)] if ranks.world() == 1 else []
        allowed = ["cpu", *(["cuda"] if processes <= there else []), *numbered]
        if self.device not in allowed:
            raise UsageError(
                f"--device {self.device} given to {processes} process(es) where torch sees {there} GPU(s): allowed "
                f"here: {', '.join(allowed)}; torchrun gives each process a GPU of its own"
            )
        if self.hidden % self.heads:
            divisors = ", ".join(str(n) for n in range(1, self.hidden + 1) if self.hidden % n == 0)
            raise UsageError(
                f"--heads {self.heads} given, which does not divide --hidden {self.hidden}: allowed with it are "
                f"{divisors}; or give another --hidden"
            )
        if self.truncate and self.whole:
            raise UsageError(
                f"--truncate {self.truncate} given: the gradient flows through all of a row; allowed is --truncate 0"
            )
        if self.save != "gates" and self.backend == "torch.nn":
            raise UsageError(
                f"--save {self.save} given with --backend torch.nn, whose layers have no such choice: "
                "leave --save out, or take another --backend"
            )
        if self.batch < ranks.world():
            raise UsageError(
                f"--batch {self.batch} given to {ranks.world()} processes: each needs a row; allowed is "
                f"{ranks.world()} or more"
            )

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on this machine or on other options."""
        device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        return {"device": device, "dtype": "float32" if device == "cpu" else "bfloat16"}

    @classmethod
    def complete(cls: type[SettingsT], given: dict[str, Any]) -> SettingsT:
        """The given options and, for the rest, the defaults that suit this machine."""
        return cls(**{**cls.defaults(given), **given})

    @classmethod
    def check_saved(cls, saved: Any) -> None:
        """Raises UsageError for what no run of this program has saved."""
        own = {each.name: each for each in fields(cls)}
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            others = ", ".join(sorted(map(str, set(saved) ^ own.keys()))) if isinstance(saved, dict) else "none"
            raise UsageError(
                f"the checkpoint was made by another version of this program, which had other options ({others}): "
                f"{ANEW}"
            )
        for name, value in saved.items():
            if value != own[name].default and not _may_be(value, own[name].type, **how(own[name])):
                raise UsageError(f"the checkpoint was made with {flag(name)} {value!r}, which is not allowed: {ANEW}")

    @classmethod
    def resumed(cls: type[SettingsT], saved: dict[str, Any], given: dict[str, Any]) -> SettingsT:
        """The saved settings, checked; an option given again must agree with them."""
        for name, value in given.items():
            if value != saved[name]:
                raise UsageError(
                    f"{flag(name)} {value} given, but the checkpoint was made with {flag(name)} {saved[name]}: "
                    f"leave {flag(name)} out to resume it, or {ANEW}"
                )
        return cls(**saved)


def flag(name: str) -> str:
    """A field's option: learning_rate -> --learning-rate."""
    return f"--{name.replace('_', '-')}"


def how(field: Field[Any]) -> dict[str, Any]:
    """A field's option, as for argparse's add_argument. A subclass that only changes a default does not declare it
    again."""
    return dict(field.metadata or next(each.metadata for each in fields(Settings) if each.name == field.name))


def _may_be(value: Any, kind: Any, type: Callable[[str], Any] = str, choices: Any = None, **_: Any) -> bool:
    """Whether the option with this type and these choices could have given the value."""
    if kind is bool:
        return isinstance(value, bool)
    try:
        return value == type(str(value)) and (choices is None or value in choices)
    except argparse.ArgumentTypeError:
        return False


def parser(settings: type[Settings], name: str, description: str) -> argparse.ArgumentParser:
    """The options of a program's settings, absent from the result unless given, and those that every program has."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.train.{name}",
        usage="%(prog)s [OPTION ...]   (--help lists them)",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    kept = made.add_argument_group("the model and its training (kept in the checkpoint)")
    for each in fields(settings):
        given = how(each)
        if each.type is bool:
            given["action"] = "store_true"
        elif each.default is not None:
            given["help"] += f" (default {each.default})"
        if each.type in METAVARS:
            given["metavar"] = METAVARS[each.type]
        kept.add_argument(flag(each.name), **given)

    job = made.add_argument_group("this command")
    either = job.add_mutually_exclusive_group()
    once: dict[str, Any] = {"action": "store_true", "default": False}
    either.add_argument("--resume", help="continue the run in --output", **once)
    either.add_argument("--overwrite", help="set the run in --output aside and begin anew", **once)
    job.add_argument("--compare", choices=["torch"], default=None, help="also train torch.nn from the same weights")
    job.add_argument("--output", type=Path, default=Path("runs") / name, metavar="DIR", help="default %(default)s")
    seconds = "time between two checkpoints (default %(default)s)"
    job.add_argument("--save-seconds", type=number(float, 0), default=20.0, metavar="S", help=seconds)
    return made


def split(settings: type[Settings], arguments: Namespace) -> tuple[Namespace, dict[str, Any]]:
    """This command's options, and those of the settings that were given."""
    given = {name: value for name, value in vars(arguments).items() if name in {f.name for f in fields(settings)}}
    return Namespace(**{name: value for name, value in vars(arguments).items() if name not in given}), given
