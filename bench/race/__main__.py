"""The race on a GPU: every arm on every case of the suites, checked against float64 before it is timed.

    python -m bench.race --output FILE [--suite deepbench] [--dtype bf16] [--minutes 8]      what `make gpu` starts

Every entry is in the file at once, and what is in it is not repeated. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench import UsageError
from bench.race import suites
from bench.race.engine import Race
from bench.report import provenance
from bench.report.results import ARMS, DTYPES, Case, Check, Results


def add_choices(p: argparse.ArgumentParser) -> None:
    p.add_argument("--suite", nargs="+", choices=list(suites.SUITES), default=list(suites.SUITES))
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp16", "tf32", "fp32"])
    p.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))


def run(
    results: Results, path: Path, cases: Iterable[Case], arms: Sequence[str], device: torch.device, until: float
) -> bool:
    """Every arm on every case that is not in the results; whether nothing was wrong."""
    green, running = True, path.with_suffix(".running")
    for case in cases:
        left = [arm for arm in arms if results.timing(case, arm) is None]
        if left and time.monotonic() >= until:
            print("out of time; the next run with the same --output goes on here")
            break
        race: Race | None = None
        for arm in left:
            running.write_text(f"race: {case.key}, {arm}")  # for whoever has to kill this process
            message = "skipped"
            try:
                race = race or Race(case, device)  # the truth of a case is computed once
                for entry in race.entries(arm):
                    results.add(entry)
                    results.save(path)
                    message = entry.message if isinstance(entry, Check) else entry.skipped or f"{entry.per_step:.3f} us"
                    green &= not isinstance(entry, Check) or entry.ok
            except Exception as error:  # the other arms and cases still have their turn
                message, green = f"{type(error).__name__}: {error}"[:500], False
            print(f"{case.key}, {arm}: {message}")
    running.unlink(missing_ok=True)
    return green


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.race", description=__doc__.split("\n")[0])
    p.add_argument("--output", type=Path, required=True, help="the results file; what is in it is not repeated")
    p.add_argument("--minutes", type=float, default=60.0, help="begin no case after so many (default: 60)")
    p.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, in small, without speeds")
    add_choices(p)
    given = p.parse_args(argv)
    if given.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        p.error("--rehearse runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not given.rehearse and not torch.cuda.is_available():
        p.error("torch sees no CUDA device; run this on a machine with one, or --rehearse with TRITON_INTERPRET=1")
    device = torch.device("cpu") if given.rehearse else torch.device("cuda", torch.cuda.current_device())
    try:
        results = provenance.opened(given.output, provenance.provenance(device))
    except (UsageError, ValueError, OSError) as error:
        p.error(f"argument --output: {error}")
    cases = suites.cases(given.suite, given.dtype)
    cases = suites.miniatures(cases) if given.rehearse else cases
    return 0 if run(results, given.output, cases, given.arm, device, time.monotonic() + 60 * given.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
