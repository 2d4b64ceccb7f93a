"""The one GPU command: each step in a process of its own, all into one results file.

    make gpu ARGS=first                          before all else: what eight minutes can tell
    make gpu                                     every part, each within eight minutes
    make gpu ARGS="race --dtype bf16"            one part; what the file already has is not repeated
    make rehearse                                no GPU: every path but the launch, predictions, no speeds

A part that ends early, or is killed, goes on where it stopped when it is called again with the same file. The exit
status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import UsageError
from bench.gpu.steps import FIRST, PARTS, ROOT, TESTS
from bench.gpu.supervisor import Run, printed, say
from bench.race import suites
from bench.report import provenance, results
from bench.report.results import ARMS
from persistrnn.kernels import launch
from persistrnn.kernels.planner.hardware import DEVICES

__all__ = ["TESTS", "main"]
GROUPS = {step.name: [step] for step in (*FIRST, *PARTS)} | {"first": list(FIRST)}


def _part(text: str) -> str:
    if text not in GROUPS:  # argparse's own choices would refuse none at all
        raise argparse.ArgumentTypeError(f"{text!r} given, allowed: {', '.join(GROUPS)}")
    return text


def _minutes(text: str) -> float:
    if not 0 < float(text) <= 60:
        raise argparse.ArgumentTypeError(f"{text} given, allowed: above 0 and at most 60")
    return float(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parts = ", ".join(step.name for step in PARTS)
    p.add_argument(
        "parts", nargs="*", metavar="PART", type=_part,
        help=f"of {parts} (default: all); or first, or steps of it: {', '.join(step.name for step in FIRST)}",
    )  # fmt: skip
    p.add_argument("--output", type=Path, help="the file (default: bench/results/DEVICE-COMMIT.json)")
    p.add_argument("--minutes", type=_minutes, default=8.0, help="per part, of first in all (default: 8)")
    p.add_argument("--suite", nargs="+", choices=list(suites.SUITES), default=list(suites.SUITES))
    p.add_argument("--dtype", nargs="+", choices=list(suites.IN_ORDER), default=list(suites.IN_ORDER))
    p.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    p.add_argument("--commit", default="", help="what is checked out, where git cannot say")
    p.add_argument("--rehearse", choices=sorted(DEVICES), help="no GPU: predict for this one")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    argv = sys.argv[1:] if argv is None else argv
    given = p.parse_args(argv)
    if given.rehearse is None and not torch.cuda.is_available():
        p.error("torch sees no CUDA device; run this on a machine with one, or --rehearse h200 without")
    if given.rehearse is not None and not launch.INTERPRETED:
        p.error("--rehearse runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1 (make rehearse does)")
    device = torch.device("cpu") if given.rehearse else torch.device("cuda", torch.cuda.current_device())
    now = provenance.provenance(device, ["python", "-m", "bench.gpu", *argv], given.commit)
    name = f"rehearsal-{given.rehearse}" if given.rehearse else now.device
    path = given.output or ROOT / "bench" / "results" / f"{'-'.join(name.lower().split())}-{now.commit[:8]}.json"
    try:
        found = results.load(path) if path.exists() else results.Results(now)
        provenance.refuse_another(path, found.provenance, now)
        run = Run(path, found, given)
    except (UsageError, ValueError, OSError) as error:
        p.error(str(error))
    say(f"{now.device}, results in {path}")
    if "first" in given.parts:
        say(f"the plan of the first run:\n{printed(FIRST, given.minutes)}")
    return 0 if run.all([GROUPS[name] for name in given.parts or [step.name for step in PARTS]]) else 1
