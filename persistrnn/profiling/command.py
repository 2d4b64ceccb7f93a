"""``persistrnn profile``: where the time and the memory of training on long sequences go, as a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..options import BACKENDS, SAVES
from . import drawing, progress, report, tables
from .advice import advice
from .measure import OPTIMIZERS
from .run import COMPARISONS, profile
from .subject import DTYPES, LAYERS, Sizes, SubjectError, load, working_folder

NAMES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}  # torch's
# Of a layer; a model of the user's has its own.
OF_SIZES = ("hidden", "input", "layers", "bidirectional", "dtype", "batch", "save", "save_budget", "backend")


def _steps(given: str) -> list[int]:
    parts = given.split(",")
    # isascii: int() takes digits of any script.
    counts = [int(part) if part.isascii() and part.strip().isdigit() else 0 for part in parts]
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(
            f"{given!r} given, allowed: integers of at least 1, none twice, such as 512,2048"
        )
    return counts


def _least(least: float, kind: type) -> Callable[[str], Any]:
    def check(given: str) -> Any:
        try:
            number = kind(given)
        except ValueError:
            number = least - 1
        if not least <= number < 2**31:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{given!r} given, allowed: {what} of at least {least}")
        return number

    return check


def _dtype(given: str) -> str:
    name = given.lower().removeprefix("torch.")
    return NAMES.get(name, name)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="persistrnn profile",
        description="Train a recurrent layer, or a model of yours, for a few iterations at several lengths of the "
        "sequence, and report where time and memory go: a page with plots, tables, numbers as JSON and a Chrome trace.",
        allow_abbrev=False,
    )
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--cell", type=str.lower, choices=list(LAYERS), help="or --model for a model of yours")
    what.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="a callable of yours: make(steps) returns (module, batch) for module(batch), or (module, args, kwargs)",
    )
    result.add_argument("--steps", type=_steps, required=True, metavar="T,T,...", help="lengths of the sequence")
    sizes = result.add_argument_group("with --cell")
    sizes.add_argument("--hidden", type=_least(1, int), metavar="H", help="hidden_size")
    sizes.add_argument("--input", type=_least(1, int), metavar="I", help="input_size (default: H)")
    sizes.add_argument("--layers", type=_least(1, int), metavar="L", help="num_layers (default: 1)")
    sizes.add_argument("--bidirectional", action="store_const", const=True, help="both directions")
    sizes.add_argument("--batch", type=_least(1, int), metavar="B", help="sequences side by side (default: 16)")
    sizes.add_argument("--dtype", type=_dtype, choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    sizes.add_argument("--save", type=str.lower, choices=SAVES, help="what the layer keeps (default: gates)")
    sizes.add_argument(
        "--save-budget", type=_least(1, int), metavar="BYTES", help="with --save auto: what a call may keep"
    )
    sizes.add_argument("--backend", type=str.lower, choices=BACKENDS, help="default: auto")
    text = "torch: the same with torch.nn's layers; persistrnn: a --model of torch.nn's with ours"
    result.add_argument("--compare", type=str.lower, choices=COMPARISONS, help=text)
    result.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    result.add_argument(
        "--device-model",
        metavar="NAME",
        help="plan for this device, such as h200 (default: the GPU at hand, else h200)",
    )
    result.add_argument("--optimizer", type=str.lower, choices=list(OPTIMIZERS), default="adam", help="default: adam")
    result.add_argument(
        "--iterations", type=_least(1, int), metavar="N", help="timed at each T (default: 10 on a GPU, 3 on a CPU)"
    )
    result.add_argument(
        "--warmup",
        type=_least(1, int),
        metavar="N",
        help="before them; from the second T on one of them is the profiled one, unless N is 1 (default: 3 on a GPU, "
        "1 on a CPU)",
    )
    result.add_argument(
        "--seconds", type=_least(0, float), default=20.0, metavar="S",
        help="begin no further iteration after so many at one T, but for two (default: 20)",
    )  # fmt: skip
    result.add_argument(
        "--output", default="persistrnn-profile", metavar="DIR", help="the folder to write into (default: %(default)s)"
    )
    return result


def _subject(options: argparse.ArgumentParser, given: argparse.Namespace) -> Any:
    if given.model is not None:
        told = [name for name in OF_SIZES if getattr(given, name) is not None]
        if told:
            name = told[0].replace("_", "-")
            options.error(f"argument --{name}: given with --model, allowed with --cell; the model has its own")
        try:
            return load(given.model)
        except SubjectError as error:
            options.error(f"argument --model: {error}")
    if given.hidden is None:
        options.error("argument --hidden: not given, allowed with --cell: an integer of at least 1, such as 512")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    return Sizes(
        given.cell, given.input or given.hidden, given.hidden, given.layers or 1, bool(given.bidirectional),
        given.batch or 16, dtype, device, given.backend or "auto", given.save or "gates", given.save_budget,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    subject = _subject(options, given)
    names = ("compare", "output", "device", "device_model", "optimizer", "iterations", "warmup", "seconds")
    try:
        with working_folder():  # a model may import its neighbours when it is made, or called
            found = profile(
                subject, given.steps, title=given.model or "", **{name: getattr(given, name) for name in names}
            )
    except SubjectError as error:
        print(f"persistrnn profile: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, drawing.MissingMatplotlib, progress.MissingTqdm) as error:
        options.error(str(error))
    print(tables.report(found, advice(found)))
    print(f"\nwrote {', '.join(map(str, report.files(found, given.output)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
