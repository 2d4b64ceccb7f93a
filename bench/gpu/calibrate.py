"""What a GPU run measured, as the data file that corrects the plan's record of that device.

    python -m bench.gpu.calibrate RESULTS.json       writes kernels/measured/<record>.json and says what changes

Constants come from the microbenchmarks, steps of one layer from the race. The input's product is inside such a step,
and a backward is a training step less a forward, so what training saves in its forward counts there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Literal

from bench import UsageError
from bench.gpu import micro
from bench.report.results import Provenance, Results, Timing, named
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import hardware
from persistrnn.kernels.planner import measurements as measurements_file
from persistrnn.kernels.planner.hardware import DEVICES, Hardware
from persistrnn.kernels.planner.measurements import MEASURABLE, MEASURED, Measurements, Step, measurements
from persistrnn.kernels.planner.typed_json import read
from persistrnn.profiling import page
from persistrnn.profiling.page import Line, table, words

PATHS: dict[str, Literal["persistent", "torch"]] = {"persistrnn": "persistent", "torch": "torch"}  # of each arm


def record_of(where: Provenance, named: str | None = None) -> Hardware:
    """The record of the device that was measured, without what was measured before.

    Raises:
        UsageError: it has none, or is not the one that is named.
    """
    record = hardware._recorded(where.device, where.arch)
    known = record if record and record.multiprocessors == where.multiprocessors else None
    found = DEVICES[named] if named else known
    given = f"{where.device!r} ({where.arch}, {where.multiprocessors} multiprocessors)"
    if found is None:
        raise UsageError(
            f"the results are of {given}, which is no known record; allowed: {', '.join(DEVICES)}; name one of the "
            "same chip with --device, or add a record to kernels/planner/hardware.py"
        )
    alike = (found.arch, found.multiprocessors) == (where.arch, where.multiprocessors)
    if known not in (None, found) or not alike:
        raise UsageError(
            f"--device {named} given, and the results are of {given}; allowed: a record of the same chip with as many "
            "multiprocessors; leave --device out for a device that has its own"
        )
    return found


def counted(timing: Timing) -> bool:
    """One layer with the input's product inside and no marks, in the case's own dtype, by an arm that is a path."""
    case = timing.case
    ours = timing.arm in PATHS and not timing.skipped and timing.dtype == case.dtype
    return ours and case.layers == 1 and case.input > 0 and not case.marks and case.cell in CELLS


def steps(results: Results) -> list[Step]:
    """One per cell, shape, dtype, pass and path: of the longest T, then of the narrowest input."""
    calls = {(timing.arm, timing.case.key): timing for timing in results.timings if counted(timing)}
    best: dict[Step, tuple[tuple[int, int], float]] = {}
    for (arm, _), timing in calls.items():
        case, microseconds = timing.case, timing.per_step
        if case.mode == "training":
            forward = calls.get((arm, replace(case, mode="forward").key))
            microseconds -= forward.per_step if forward else math.inf
        if microseconds <= 0:
            continue
        directions: Literal[1, 2] = 2 if case.bidirectional else 1
        backward = case.mode == "training"
        step = Step(case.cell, case.hidden, case.batch, directions, case.dtype, backward, PATHS[arm], 0.0)
        rank = case.steps, -case.input
        if step not in best or rank > best[step][0]:
            best[step] = rank, microseconds
    return sorted((replace(step, microseconds=found) for step, (_, found) in best.items()), key=astuple)


def check(results: Results, allow_dirty: bool) -> None:
    """Raises UsageError where numbers of these results are no measurements of a known state of the code."""
    where = results.provenance
    if where.rehearsal:
        raise UsageError(
            f"the results are a rehearsal on {where.device!r}; allowed: a run on a GPU; make one with `make gpu`"
        )
    if where.dirty and not allow_dirty:
        raise UsageError(
            f"the results were measured with uncommitted changes on top of {where.commit!r}; allowed: a clean "
            "checkout; commit and run `make gpu` again, or say --allow-dirty"
        )
    used = {timing.arm for timing in results.timings if counted(timing)}
    red = [one for one in results.checks if one.arm in used and not one.ok]
    if red:
        raise UsageError(
            f"{len(red)} checks of {', '.join(sorted({one.arm for one in red}))} are red, the first is "
            f"{red[0].case.key!r}: {red[0].message}; allowed: none; mend that and run `make gpu` into a new file"
        )


def measured(results: Results) -> Measurements:
    """The content of the data file.

    Raises:
        UsageError: there would be nothing in it.
    """
    constants = {name: value for name, value in micro.constants(results.micro).items() if name in MEASURABLE}
    found = steps(results)
    if not constants and not found:
        raise UsageError(
            f"the results have {len(results.micro)} microbenchmarks and {len(results.timings)} timings, none of them "
            "of a constant or of one layer; allowed: one at least; run `make gpu ARGS='micro race'`"
        )
    of = {field.name: getattr(results.provenance, field.name) for field in fields(measurements_file.Provenance)}
    return Measurements(measurements_file.Provenance(**of), constants, found)


def write(found: Measurements, output: Path) -> Measurements:
    """Write the file, whole and readable or not at all; what reading it gives.

    Raises:
        ValueError: a reader would refuse it.
        OSError: it cannot be written.
    """
    read(Measurements, asdict(found), str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    page.write(output, json.dumps(asdict(found), indent=1, allow_nan=False) + "\n")
    measurements.cache_clear()
    return found


def changes(record: Hardware, found: Measurements) -> str:
    """Each measured constant against the record's own."""
    pairs = [(name, getattr(record, name), new) for name, new in found.constants.items()]
    lines = [Line((name, f"{old:.4g}", "->", f"{new:.4g}", f"{new / old:.2f}")) for name, old, new in pairs]
    return str(table("", words("constant", "old", "", "new", "new/old"), lines))


def main(argv: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    p = argparse.ArgumentParser(prog="python -m bench.gpu.calibrate", description=about, allow_abbrev=False)
    p.add_argument("results", type=Path, metavar="RESULTS.json", help="what `make gpu` wrote")
    p.add_argument("--device", type=str.lower, choices=sorted(DEVICES), help="the record (default: the measured one's)")
    p.add_argument("--output", type=Path, metavar="FILE.json", help="default: kernels/measured/<record>.json")
    p.add_argument("--allow-dirty", action="store_true", help="take results of a checkout with uncommitted changes")
    p.add_argument("--force", action="store_true", help="replace the file that is there")
    arguments = p.parse_args(argv)
    results = named(arguments.results, p)
    try:
        check(results, arguments.allow_dirty)
        record = record_of(results.provenance, arguments.device)
        output = arguments.output or MEASURED / f"{record.name}.json"
        if output.suffix != ".json":
            raise UsageError(f"--output {str(output)!r} given, allowed: a name that ends in .json, as its reader wants")
        if output.exists() and not arguments.force:
            raise UsageError(f"{str(output)!r} is there; allowed: a new file; name another --output, or say --force")
        found = write(measured(results), output)
    except (UsageError, ValueError, OSError) as error:
        p.error(str(error))
    if found.constants:
        print(f"{record.name}: the record's own constants, and the measured ones\n\n{changes(record, found)}\n")
    print(f"wrote {output}: {len(found.constants)} constants, {len(found.steps)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
