"""``python -m bench.cells``: the language model with every cell at equal parameters, as a table, a drawing, a page."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import UsageError
from bench.cells import page, training
from bench.cells.results import RESULTS, Comparison, Protocol, read
from bench.cells.training import Which
from bench.report.provenance import provenance, refuse_another
from bench.train import checkpoint
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.options import absolute, number
from persistrnn.kernels.cells import BUILT_IN
from persistrnn.profiling import drawing
from persistrnn.profiling.page import folder, needs, write

EVERY = [Which(cell) for cell in BUILT_IN] + [Which("slstm", 4)]
# Of the language model's settings, those that are options here.
OWN = ("steps", "batch", "sequence", "layers", "embedding", "learning_rate", "seed")


def which(given: str) -> Which:
    """An argparse type: a cell, with ":" and its heads if it has some."""
    cell, _, heads = given.partition(":")
    if cell not in BUILT_IN:
        raise argparse.ArgumentTypeError(
            f"{given!r} given, allowed are {', '.join(BUILT_IN)}, or with heads as slstm:4"
        )
    return Which(cell, number(int, 1)(heads or "1"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.cells",
        description="Train the language model with every cell, each with as many parameters as the others, on a CPU, "
        "and write a table, a drawing and a page. Given again, the command goes on where it stopped.",
        allow_abbrev=False,
    )
    count, rate = number(int, 1), number(float, 0, above=True)
    add = made.add_argument
    text = "such as lstm slstm:4, which has 4 heads (default: every built-in one, and slstm:4)"
    add("--cells", type=which, nargs="+", default=EVERY, metavar="CELL[:HEADS]", help=text)
    add("--parameters", type=count, default=200_000, metavar="N", help="of each model (default %(default)s)")
    add("--steps", type=count, default=300, metavar="N", help="optimizer steps (default %(default)s)")
    add("--batch", type=count, default=32, metavar="N", help="streams side by side (default %(default)s)")
    add("--sequence", type=count, default=128, metavar="N", help="bytes of a step (default %(default)s)")
    add("--layers", type=count, default=1, metavar="N", help="recurrent layers (default %(default)s)")
    add("--embedding", type=count, default=64, metavar="N", help="width of a byte's embedding (default %(default)s)")
    add("--learning-rate", type=rate, default=4e-3, metavar="X", help="at its highest (default %(default)s)")
    add("--seed", type=number(int, 0, 2**62), default=0, metavar="N", help="of the weights (default %(default)s)")
    add("--text", type=absolute, metavar="DIR", help="folder of .py files to learn (default: the standard library)")
    text = "the folder to write into (default %(default)s)"
    add("--output", type=Path, default=Path("runs/cells"), metavar="DIR", help=text)
    add("--overwrite", action="store_true", help="begin anew what is in --output")
    text = "time between two checkpoints (default %(default)s)"
    add("--save-seconds", type=number(float, 0), default=20.0, metavar="S", help=text)
    return made


def begun(given: argparse.Namespace, chosen: dict[str, Any], typed: Sequence[str]) -> Comparison:
    """The comparison as far as it is in --output, or a new one.

    Raises:
        UsageError: that one was made with other options, versions, text or commit
    """
    data = LanguageModeling(TextSettings.complete(chosen))
    own = {name: chosen[name] for name in OWN}
    sides = {"trained": len(data.train), "held_out": len(data.held_out)}
    wanted = Protocol(given.parameters, **own, text=data.fingerprint, **sides)
    new = Comparison(provenance(torch.device("cpu"), ["python", "-m", "bench.cells", *typed]), wanted)
    path = given.output / RESULTS
    if given.overwrite or not path.exists():
        return new
    try:
        before = read(path)
    except ValueError as error:
        raise UsageError(f"{error}; begin anew with --overwrite or another --output") from error
    refuse_another(path, before.provenance, new.provenance)
    for name, value in vars(wanted).items():
        if value != (was := getattr(before.protocol, name)):
            raise UsageError(
                f"{path} was made with {name} {was}, now it is {value}: give the same, or begin anew with --overwrite "
                "or another --output"
            )
    return before


def run(given: argparse.Namespace, typed: Sequence[str]) -> Comparison:
    chosen = {"device": "cpu", **{name: getattr(given, name) for name in OWN}}
    chosen |= {"text": given.text} if given.text else {}
    found = begun(given, chosen, typed)
    found.save(given.output / RESULTS)
    done = [Which(row.cell, row.heads) for row in found.rows]
    rest = [each for each in dict.fromkeys(given.cells) if each not in done]
    for row in training.rows(rest, chosen, given.parameters, given.output, given.overwrite, given.save_seconds):
        found = replace(found, rows=[*found.rows, row])
        found.save(given.output / RESULTS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    given = made.parse_args(arguments)
    try:
        needs("matplotlib", "the drawing")
        folder(given.output, page.PAGE, page.TABLE, page.DRAWING)
        with checkpoint.held(given.output):
            found = run(given, sys.argv[1:] if arguments is None else arguments)
        with drawing.style():
            drawn = page.draw(found)
        write(given.output / page.TABLE, f"{page.markdown(found)}\n\n{page.protocol(found)} {page.NO_SPEED}\n")
        write(given.output / page.DRAWING, page.alone(drawn))
        write(given.output / page.PAGE, page.html(found, drawn))
    except (UsageError, OSError, ImportError) as error:
        made.error(str(error))
    except KeyboardInterrupt as stop:  # without a number where Ctrl-C stops at once
        stopped = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        print(f"{stopped.name}: every step taken is saved; the same command goes on.", flush=True)
        return 128 + stopped
    print(f"\n{page.summary(found)}\n\nwrote {given.output / page.PAGE}, the table and the drawing beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
