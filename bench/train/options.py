"""A training program's command line: settings, each field of which is an option, checked at the validate."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch

from bench import UsageError
from bench.train import ranks

SHARED = {"resume", "overwrite", "compare", "out", "save_seconds"}  # what every program has beside its settings
OUT = "--output"  # of the folder of a run
ANEW = f"start anew with --overwrite or another {OUT}"
SAVE_SECONDS = 20.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Options: TypeAlias = "argparse._ArgumentGroup"
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


def device_name(text: str) -> str:
    """An argparse type: "cpu", "cuda" or "cuda:N", present on this machine; under torchrun "cpu" or "cuda"."""
    count = torch.cuda.device_count()
    one_each = ranks.world() > 1
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count) if not one_each)]
    if text not in allowed:
        remedy = "" if count else " (this torch sees no GPU: check the driver and that torch is built for it)"
        remedy += " (each of torchrun's processes takes a GPU of its own)" if count and one_each else ""
        raise argparse.ArgumentTypeError(f"{text!r} given, allowed here: {', '.join(allowed)}{remedy}")
    return text


def check_gpus(device: str) -> None:
    """Raises UsageError where torchrun has started more processes than there are GPUs for them."""
    there = torch.cuda.device_count()
    if device == "cuda" and ranks.world() > 1 and ranks.neighbours() > there:
        raise UsageError(
            f"--device cuda given to {ranks.neighbours()} processes on this machine, each of which takes a GPU of its "
            f"own, and it has {there}: allowed is torchrun --nproc-per-node {there} or less, or --device cpu"
        )


def option(default: Any, help: str, **how: Any) -> Any:
    """A field of a Settings dataclass and its option: `--name` with `how` as for argparse's add_argument."""
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers. It is kept in the checkpoint; resuming cannot change it.

    A training program adds its own fields by subclassing; a field given here again is another default for its option.
    """

    device: str = option(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)", type=device_name)
    # Of the products; parameters and optimizer stay float32.
    dtype: str = option(None, "of the matrix products (default float32 on a CPU, else bfloat16)", choices=list(DTYPES))
    cell: str = option("lstm", "recurrent cell", choices=["lstm", "gru"])
    hidden: int = option(256, "hidden units a layer", type=number(int, 1), metavar="N")
    layers: int = option(1, "recurrent layers", type=number(int, 1), metavar="N")
    dropout: float = option(0.0, "share of units dropped between layers", type=number(float, 0, 1), metavar="P")
    backend: str = option(
        "auto",
        "the path through persistrnn, or torch.nn's own layer for a baseline",
        choices=["auto", "persistent", "torch", "torch.nn"],
    )
    save: str = option(
        "gates",
        "what persistrnn's layers keep for the backward: all gates (fastest), the states only, or a state now and then",
        choices=["gates", "state", "checkpoint"],
    )
    batch: int = option(8, "sequences side by side, over all processes", type=number(int, 1), metavar="N")
    truncate: int = option(
        0, "time steps a gradient flows back through; 0: all of the sequence", type=number(int, 0), metavar="N"
    )
    steps: int = option(1000, "optimizer steps", type=number(int, 1), metavar="N")
    learning_rate: float = option(4e-3, "of AdamW, at its highest", type=number(float, 0, above=True), metavar="X")
    schedule: str = option(
        "cosine", "learning rate after the warm-up: falls to 0, or stays", choices=["cosine", "constant"]
    )
    warmup: int = option(0, "steps over which the learning rate rises", type=number(int, 0), metavar="N")
    weight_decay: float = option(0.01, "of AdamW", type=number(float, 0), metavar="X")
    clip: float = option(1.0, "largest norm of the gradient", type=number(float, 0, above=True), metavar="X")
    seed: int = option(
        0, "of the initial weights, of dropout and of the data's order", type=number(int, 0, 2**62), metavar="N"
    )

    def check(self) -> None:
        """Raises UsageError where options contradict each other. Subclasses extend it."""
        if self.dropout and self.layers == 1:
            raise UsageError(
                f"--dropout {self.dropout} acts between layers and --layers is 1: "
                "allowed is --dropout 0, or --layers 2 or more"
            )
        if self.warmup >= self.steps and self.warmup:
            raise UsageError(
                f"--warmup {self.warmup} given with --steps {self.steps}: the warm-up must end before the training; "
                f"allowed is 0 to {self.steps - 1}"
            )
        if self.save != "gates" and self.backend == "torch.nn":
            raise UsageError(
                f"--save {self.save} given with --backend torch.nn, whose layers have no such choice: "
                "leave --save out, or take another --backend"
            )
        check_gpus(self.device)
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
        settings = cls(**{**cls.defaults(given), **given})
        settings.check()
        return settings

    @classmethod
    def resumed(cls: type[SettingsT], saved: dict[str, Any], given: dict[str, Any]) -> SettingsT:
        """The saved settings; an option given again must agree with them."""
        if saved.keys() != (known := {each.name for each in fields(cls)}):
            raise UsageError(
                f"the checkpoint was made by another version of this program, which had other options "
                f"({', '.join(sorted(map(str, saved.keys() ^ known)))}): {ANEW}"
            )
        for name, value in given.items():
            if value != saved[name]:
                option = flag(name)
                raise UsageError(
                    f"{option} {value} given, but the checkpoint was made with {option} {saved[name]}: "
                    f"leave {option} out to resume it, or {ANEW}"
                )
        for name, how in declared(cls).items():
            if (wrong := refusal(saved[name], how)) is not None:  # device: the machine may have changed since
                raise UsageError(f"the checkpoint was made with {flag(name)} {saved[name]}: {wrong}; {ANEW}")
        settings = cls(**saved)
        settings.check()
        return settings


def declared(settings: type[Settings]) -> dict[str, Any]:
    """Name of a field -> how its option is declared; a subclass that only changes a default does not declare it."""
    found: dict[str, Any] = {}
    for cls in reversed(settings.__mro__):
        found |= {each.name: each.metadata for each in (fields(cls) if is_dataclass(cls) else ()) if each.metadata}
    return found


def refusal(value: Any, how: Mapping[str, Any]) -> str | None:
    """Why no command line could have given this value to an option; None if one could."""
    if "action" in how:
        return None if isinstance(value, bool) else f"{value!r} given, allowed is True or False"
    if "choices" in how:
        return None if value in how["choices"] else f"{value!r} given, allowed: {', '.join(how['choices'])}"
    try:
        same = how.get("type", str)(str(value))
    except argparse.ArgumentTypeError as error:
        return str(error)
    if isinstance(value, str) is not isinstance(same, str):
        return f"{value!r} given, allowed is a {type(same).__name__}"
    return None


def flag(name: str) -> str:
    """A field's option: learning_rate -> --learning-rate."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """Of torchrun's processes, one prints the error."""

    def error(self, message: str) -> NoReturn:
        if ranks.rank() == 0:
            super().error(message)
        raise SystemExit(2)


def parser(settings: type[Settings], command: str, description: str, out: Path) -> tuple[Parser, Options]:
    """The parser, and its group for options that are no settings.

    Options of the settings are absent from the result unless given; the others need a default of their own.
    """
    made = Parser(
        prog=command.partition("{options}")[0].strip(' "').removesuffix(" ARGS="),
        usage=command.format(options="OPTION ...") + ("  (ARGS=--help lists them)" if "ARGS=" in command else ""),
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    kept = made.add_argument_group("the model and its training (kept in the checkpoint)")
    known = declared(settings)
    for each in fields(settings):
        how = dict(known[each.name])
        shown = isinstance(each.default, int | float | str) and not isinstance(each.default, bool)
        help = how.pop("help") + (f" (default {each.default})" if shown else "")
        kept.add_argument(flag(each.name), help=help.replace("%", "%%"), **how)

    job = made.add_argument_group("this command")
    once: dict[str, Any] = {"action": "store_true", "default": False}
    either = job.add_mutually_exclusive_group()
    either.add_argument("--resume", help=f"continue the run in {OUT}", **once)
    either.add_argument("--overwrite", help=f"set the run in {OUT} aside and begin anew", **once)
    job.add_argument(
        "--compare",
        choices=["torch", "interpreted"],
        default=None,
        help="also train torch.nn from the same weights; interpreted: small, our kernels in Triton's interpreter",
    )
    job.add_argument(OUT, dest="out", type=Path, default=out, metavar="DIR", help="default %(default)s")
    job.add_argument(
        "--save-seconds",
        type=number(float, 0),
        default=SAVE_SECONDS,
        metavar="S",
        help="time between two checkpoints (default %(default)s)",
    )
    return made, job


def given_own(made: Parser, job: Namespace) -> dict[str, Any]:
    """The options of this one program that are no settings and were given other than their defaults."""
    own = {name: value for name, value in vars(job).items() if name not in SHARED}
    return {name: value for name, value in own.items() if value != made.get_default(name)}


def split(settings: type[Settings], arguments: Namespace) -> tuple[Namespace, dict[str, Any]]:
    """This command's options, and those of the settings that were given."""
    names = {each.name for each in fields(settings)}
    values = vars(arguments)
    job = Namespace(**{name: value for name, value in values.items() if name not in names})
    return job, {name: value for name, value in values.items() if name in names}
