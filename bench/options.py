"""The main job's command line: what a run is made of, checked at the door."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench import UsageError
from bench.text import standard_library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers. It is kept in the checkpoint; resuming cannot change it."""

    device: str
    dtype: str  # of the products; parameters and optimizer stay float32
    text: str
    cell: str = "lstm"
    hidden: int = 256
    layers: int = 2
    embedding: int = 64
    dropout: float = 0.0
    backend: str = "auto"
    batch: int = 8
    sequence: int = 512
    steps: int = 1500
    learning_rate: float = 4e-3
    clip: float = 1.0
    seed: int = 0

    @classmethod
    def complete(cls, given: dict[str, Any]) -> Settings:
        """The given options and, for the rest, the defaults that suit this machine."""
        device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
        dtype = "float32" if device == "cpu" else "bfloat16"
        settings = cls(**{"device": device, "dtype": dtype, "text": str(standard_library()), **given})
        if settings.dropout and settings.layers == 1:
            raise UsageError(
                f"--dropout {settings.dropout} acts between layers and --layers is 1: "
                "allowed is --dropout 0, or --layers 2 or more"
            )
        return settings

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> Settings:
        """The saved settings; an option given again must agree with them."""
        for name, value in given.items():
            if value != saved[name]:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {value} given, but the checkpoint was made with {option} {saved[name]}: "
                    f"leave {option} out to resume it, or start a new run with --overwrite or another --out"
                )
        try:
            device_name(saved["device"])  # the machine may have changed since
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"the checkpoint was made with --device {saved['device']}: {error}") from error
        return cls(**saved)


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
    """An argparse type: "cpu", "cuda" or "cuda:N", present on this machine."""
    count = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if text not in allowed:
        remedy = "" if count else " (this torch sees no GPU: check the driver and that torch is built for it)"
        raise argparse.ArgumentTypeError(f"{text!r} given, allowed here: {', '.join(allowed)}{remedy}")
    return text


def source_folder(text: str) -> str:
    """An argparse type: a folder, made absolute."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder; allowed is any folder that holds .py files")
    return str(Path(text).resolve())


def parser() -> argparse.ArgumentParser:
    """Options of `Settings` are absent from the result unless given; the others have their defaults."""
    made = argparse.ArgumentParser(
        prog="make train",
        usage='make train ARGS="OPTION ..."  (ARGS=--help lists them)',
        description="Trains a byte language model on the source of Python's own standard library.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = {field.name: field.default for field in fields(Settings)}

    def add(name: str, help: str, **kwargs: Any) -> None:
        default = defaults[name.replace("-", "_")]
        known = f" (default {default})" if isinstance(default, int | float | str) else ""
        model.add_argument(f"--{name}", help=help + known, **kwargs)

    model = made.add_argument_group("the model and its training (kept in the checkpoint)")
    add("cell", "recurrent cell", choices=["lstm", "gru"])
    add("hidden", "hidden units a layer", type=number(int, 1), metavar="N")
    add("layers", "recurrent layers", type=number(int, 1), metavar="N")
    add("embedding", "width of a byte's embedding", type=number(int, 1), metavar="N")
    add("dropout", "share of units dropped between layers", type=number(float, 0, 1), metavar="P")
    add("dtype", "of the matrix products (default float32 on a CPU, else bfloat16)", choices=list(DTYPES))
    add("device", "cpu, cuda, cuda:1, ... (default: a GPU if there is one)", type=device_name)
    add(
        "backend",
        "the path through persistrnn, or torch.nn's own layer for a baseline",
        choices=["auto", "persistent", "torch", "torch.nn"],
    )
    add("batch", "streams of text read side by side", type=number(int, 1), metavar="N")
    add("sequence", "bytes a step back-propagates through", type=number(int, 1), metavar="N")
    add("steps", "optimizer steps", type=number(int, 1), metavar="N")
    add("learning-rate", "of AdamW, at its highest", type=number(float, 0, above=True), metavar="X")
    add("clip", "largest norm of the gradient", type=number(float, 0, above=True), metavar="X")
    add("seed", "of the initial weights and of dropout", type=number(int, 0, 2**63 - 1), metavar="N")
    add("text", "folder of .py files to learn (default: the standard library)", type=source_folder)

    job = made.add_argument_group("this command")
    flag: dict[str, Any] = {"action": "store_true", "default": False}
    job.add_argument("--resume", help="continue the run in --out", **flag)
    job.add_argument("--overwrite", help="set an unfinished run in --out aside and begin anew", **flag)
    job.add_argument("--compare", choices=["torch"], default=None, help="also train torch.nn, same weights")
    job.add_argument("--out", type=Path, default=Path("runs/language_model"), help="default %(default)s")
    job.add_argument(
        "--save-seconds",
        type=number(float, 0),
        default=20.0,
        metavar="S",
        help="time between two checkpoints (default %(default)s)",
    )
    job.add_argument(
        "--sample-bytes",
        type=number(int, 0),
        default=1500,
        metavar="N",
        help="length of the text written at the end (default %(default)s)",
    )
    job.add_argument(
        "--temperature",
        type=number(float, 0, above=True),
        default=0.7,
        metavar="X",
        help="of the sample: lower is more likely text (default %(default)s)",
    )
    return made


def split(arguments: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any]]:
    """This command's options, and those of `Settings` that were given."""
    names = {field.name for field in fields(Settings)}
    values = vars(arguments)
    job = argparse.Namespace(**{name: value for name, value in values.items() if name not in names})
    return job, {name: value for name, value in values.items() if name in names}
