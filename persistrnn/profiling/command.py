"""``persistrnn profile``: where the time and the memory of training on long sequences go, as a report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels.cells import CELLS
from ..options import BACKENDS, SAVES
from . import report, tables
from .advice import advice
from .measure import OPTIMIZERS, precision
from .run import COMPARISONS, profile
from .subject import DTYPES, Sizes, SubjectError, load

NAMES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}  # torch's
# Of a layer; a model of the user's has its own.
OF_SIZES = ("hidden", "input", "layers", "bidirectional", "dtype", "batch", "save", "save_budget", "backend", "heads")


def _steps(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given!r} given, allowed: integers, such as 512,2048") from error


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
    what.add_argument("--cell", type=str.lower, choices=list(CELLS), help="or --model for a model of yours")
    what.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="a callable of yours: make(steps) returns (module, batch) for module(batch), or (module, args, kwargs)",
    )
    result.add_argument("--steps", type=_steps, required=True, metavar="T,T,...", help="lengths of the sequence")
    sizes = result.add_argument_group("with --cell")
    sizes.add_argument("--hidden", type=int, metavar="H", help="hidden_size")
    sizes.add_argument("--input", type=int, metavar="I", help="input_size (default: H)")
    sizes.add_argument("--layers", type=int, metavar="L", help="num_layers (default: 1)")
    text = "blocks of a block-diagonal W_hh, a divisor of H (default: 1, it is whole)"
    sizes.add_argument("--heads", type=int, metavar="N", help=text)
    sizes.add_argument("--bidirectional", action="store_const", const=True, help="both directions")
    sizes.add_argument("--batch", type=int, metavar="B", help="sequences side by side (default: 16)")
    sizes.add_argument("--dtype", type=_dtype, choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    sizes.add_argument("--save", type=str.lower, choices=SAVES, help="what the layer keeps (default: gates)")
    sizes.add_argument("--save-budget", type=int, metavar="BYTES", help="with --save auto: what a call may keep")
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
    text = "timed at each T (default: 10 on a GPU, 3 on a CPU)"
    result.add_argument("--iterations", type=int, metavar="N", help=text)
    text = "before them; from the second T on one is the profiled one, unless N is 1 (default: 3 on a GPU, 1 on a CPU)"
    result.add_argument("--warmup", type=int, metavar="N", help=text)
    text = "begin no further iteration after so many at one T, but for two (default: 20)"
    result.add_argument("--seconds", type=float, default=20.0, metavar="S", help=text)
    text = "the folder to write into (default: %(default)s)"
    result.add_argument("--output", default="persistrnn-profile", metavar="DIR", help=text)
    return result


def _subject(options: argparse.ArgumentParser, given: argparse.Namespace) -> Callable[..., Any]:
    named = {name: value for name in OF_SIZES if (value := getattr(given, name)) is not None}
    if given.model is not None:
        if named:
            name = next(iter(named)).replace("_", "-")
            options.error(f"argument --{name}: given with --model, allowed with --cell; the model has its own")
        try:
            return load(given.model)
        except SubjectError as error:
            options.error(f"argument --model: {error}")
    if given.hidden is None:
        options.error("argument --hidden: not given, allowed with --cell: an integer of at least 1, such as 512")
    on_gpu = (given.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if given.dtype == "tf32" and not on_gpu:
        options.error("argument --dtype: 'tf32' given, allowed on a CPU: fp16, bf16, fp32; a CPU has no tf32 products")
    try:
        return Sizes(given.cell, **{"input": given.hidden, "dtype": "bf16" if on_gpu else "fp32"} | named)
    except (TypeError, ValueError) as error:
        options.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(arguments)
    sys.path.insert(0, os.getcwd())  # a model may import its neighbours: now, when it is made, or when it is called
    subject = _subject(options, given)
    names = ("compare", "output", "device", "device_model", "optimizer", "iterations", "warmup", "seconds")
    try:
        with precision(subject.dtype if isinstance(subject, Sizes) else ""):
            found = profile(
                subject, given.steps, title=given.model or "", **{name: getattr(given, name) for name in names}
            )
    except SubjectError as error:
        print(f"persistrnn profile: {error}", file=sys.stderr)
        return 1
    except (ValueError, ImportError, OSError) as error:
        options.error(str(error))
    print(tables.report(found, advice(found)))
    print(f"\nwrote {Path(given.output) / report.PAGE}; the tables, the numbers and the traces are beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
