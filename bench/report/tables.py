"""The tables of the report: summary, timings, checks and the others, each under its heading; and the README's.

Measured and predicted numbers never share a column. What is missing is said, losses are listed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from statistics import geometric_mean

from bench.report.results import ARMS, Case, Results, Timing, Tuning
from bench.report.rows import BASELINES, OURS, Row, groups, label, rows
from persistrnn.profiling.page import MIB, NOTHING, Line, Part, known, number, numbers, printable, table, times, words

README_ROWS = 10
EMPTY_ROWS = 3  # of a table without a number


def provenance(runs: Sequence[Results]) -> Part:
    """Of every run, the latest last."""

    def cell(name: str, value: object) -> str:
        if name.startswith("clocks"):
            return f"{value} MHz" if value else "unknown"
        return ("yes" if value else "no") if isinstance(value, bool) else str(value)

    names = {"dirty": "uncommitted changes", "clocks_before": "clock before", "clocks_after": "clock after"}
    names["rehearsal"] = "rehearsal, without a GPU"
    every = [asdict(run.provenance) for run in runs]
    lines = [Line((names.get(name, name), *(cell(name, one[name]) for one in every))) for name in every[0]]
    columns = words("", *(f"run {n}" + " (this report)" * (n == len(runs)) for n in range(1, len(runs) + 1)))
    return Part("Provenance", tables=[table("Where the numbers come from", columns, lines, False)])


def summary(found: Sequence[Row]) -> Part:
    """Speed-ups over each arm: over torch's always, over others where one is known; and every loss."""
    part = Part("Summary")
    lost: list[tuple[float, Row, str]] = []
    lines, compared = [], 0
    for (suite, dtype, mode), members in groups(found).items():
        for over in BASELINES:
            speedups = [(value, row) for row in members if (value := row.speedup(over)) is not None]
            speedups.sort(key=lambda pair: pair[0])
            if not speedups and over not in ("torch", "torch-best"):
                continue
            losses = [(value, row, over) for value, row in speedups if value < 1]
            mean = geometric_mean(value for value, _ in speedups) if speedups else None
            worst = f"{times(speedups[0][0])}: {label(speedups[0][1].case)}" if speedups else NOTHING
            cells = [suite, dtype, mode, over, f"{len(speedups)} of {len(members)}", times(mean), worst]
            lines.append(Line([*cells, f"{len(losses)} of {len(speedups)}"], (mean or 1) < 1))
            lost, compared = lost + losses, compared + len(speedups)
    part.sentences.append(
        f"persistrnn loses {len(lost)} of {compared} comparisons{', all listed below, the worst first' * bool(lost)}."
        if compared
        else "No speed-up is known: no case has a measured time of both persistrnn and another arm."
    )
    columns = words("suite", "dtype", "mode", "persistrnn over") + numbers("cases with both", "geometric mean")
    columns += words("worst case") + numbers("losses")
    part.tables.append(table("Speed-up of persistrnn, by suite, dtype and mode", columns, lines, False))
    lines = [
        Line((label(row.case), row.case.suite, row.case.dtype, row.case.mode, over, times(value)), True)
        for value, row, over in sorted(lost, key=lambda loss: loss[0])
    ]
    columns = [*words("case", "suite", "dtype", "mode", "slower than"), *numbers("speed-up")]
    part.tables.append(table("Losses", columns, lines, False))
    return part


def timings(found: Sequence[Row]) -> Part:
    part = Part("Timings")
    part.sentences.append(
        "A time is a whole call, with the product of the input where I is given; predicted times and the floor are the "
        "plan's, without that product. A speed-up is how many times faster persistrnn is than the arm of the row."
        if any(row.measured(arm) for row in found for arm in ARMS)
        else "Nothing is timed in this run."
    )
    measured = "measured"
    columns = [*words("case", "arm"), *words("ran in", band=measured)]
    columns += numbers("us per call", "quartiles", "rounds", "us per step", "TFLOP/s", "peak MiB", band=measured)
    columns += numbers("persistrnn's speed-up", "measured over floor", band="ratios")
    columns += numbers("us per step", "floor, us per step", band="predicted")
    columns += words("plan", "path", band="persistrnn's")
    for (suite, dtype, mode), members in groups(found).items():
        lines = [
            _timing(row, row.arms[arm])
            for row in members
            for arm in ARMS
            if arm in row.arms and (row.measured(arm) or (arm == OURS and row.floor))
        ]
        part.tables.append(table(f"{suite}, {dtype}, {mode}", columns, lines))
    return part


def _timing(row: Row, timing: Timing) -> Line:
    ours = timing.arm == OURS
    speedup, over = (None, row.over_floor) if ours else (row.speedup(timing.arm), None)
    cells = [label(row.case), timing.arm, timing.dtype]
    if timing.skipped:
        cells += [NOTHING, "", "", "", "", ""]
    else:
        cells += [number(timing.microseconds), f"{number(timing.low)} to {number(timing.high)}", str(timing.rounds)]
        cells += [number(timing.per_step), number(timing.tflops), number(timing.peak / MIB)]
    cells += [times(speedup) if speedup else "", times(over) if over else ""]
    cells += [known(timing.predicted), known(timing.floor), timing.plan, timing.path] if ours else [""] * 4
    return Line(cells, bool(speedup and speedup < 1))


def skipped(found: Sequence[Row]) -> Part:
    part = Part("Skipped")
    reasons: dict[tuple[str, str], list[Case]] = {}
    for timing in (row.arms[arm] for arm in ARMS for row in found if arm in row.arms):
        if timing.skipped:
            reasons.setdefault((timing.arm, timing.skipped), []).append(timing.case)
    if not reasons:
        part.sentences.append("Nothing was skipped." if found else "Nothing was to be timed.")
    lines = [
        Line((arm, reason, str(len(own)), "\n".join(f"{label(c)}, {c.suite}, {c.dtype}, {c.mode}" for c in own)))
        for (arm, reason), own in reasons.items()
    ]
    columns = [*words("arm", "reason"), *numbers("how many"), *words("cases")]
    part.tables.append(table("Arms that were skipped, and why", columns, lines, False))
    return part


def checks(results: Results) -> Part:
    part = Part("Checks")
    red = sum(not check.ok for check in results.checks)
    part.sentences.append(
        f"{len(results.checks) - red} of {len(results.checks)} checks are green, {red} red. The error is the largest "
        "relative RMS error against float64, of outputs and gradients, over the error that is allowed."
        if results.checks
        else "Nothing was checked in this run."
    )
    columns = [*words("case", "dtype", "mode", "arm", "result"), *numbers("error over allowed"), *words("message")]
    lines = []
    for c in results.checks:
        cells = [
            label(c.case),
            c.case.dtype,
            c.case.mode,
            c.arm,
            "green" if c.ok else "RED",
            number(c.error),
            c.message,
        ]
        lines.append(Line(cells, not c.ok))
    part.tables.append(table("Red checks", columns, [line for line in lines if line.bad], False))
    part.tables.append(table("Green checks", columns, [line for line in lines if not line.bad]))
    return part


def micro(results: Results) -> Part:
    lines = []
    for one in results.micro:
        cells = [one.name, f"{one.programs:,}", f"{one.payload:,}", number(one.value)]
        lines.append(Line([*cells, f"{number(one.low)} to {number(one.high)}", one.unit, str(one.rounds)]))
    columns = words("what") + numbers("programs", "bytes each", "median", "quartiles")
    columns += words("unit") + numbers("rounds")
    absent = [] if lines else ["There are no microbenchmarks in this run."]
    return Part("Microbenchmarks", absent, tables=[table("Microbenchmarks, measured", columns, lines)])


def stress(results: Results) -> Part:
    lines = [
        Line((one.name, "held" if one.ok else "RED", number(one.seconds), one.message), not one.ok)
        for one in sorted(results.stress, key=lambda one: one.ok)
    ]
    columns = words("what must hold", "result") + numbers("seconds") + words("seen")
    absent = [] if lines else ["There are no stress tests in this run."]
    return Part("Stress", absent, tables=[table("Stress tests", columns, lines, False)])


def tuning(results: Results) -> Part:
    passes: dict[tuple[str, bool], list[Tuning]] = {}
    for one in sorted(results.tuning, key=lambda one: one.microseconds):
        passes.setdefault((one.case.key, one.backward), []).append(one)
    lines, planned, right = [], 0, 0
    for own in passes.values():
        fastest = own[0].microseconds
        choices = [one for one in own if one.planned]
        planned, right = planned + len(choices), right + sum(one.microseconds <= fastest for one in choices)
        for one in own:
            cells = [label(one.case), one.case.dtype, "backward" if one.backward else "forward", one.choice]
            cells += ["planned" if one.planned else "", number(one.microseconds)]
            lines.append(Line([*cells, times(one.microseconds / fastest) if fastest else "", known(one.predicted)]))
    sentence = f"The planned choice is the fastest of those that were run in {right} of {planned} passes."
    if not planned:
        sentence = "No choice of the planner's was run against others in this run."
    columns = words("case", "dtype", "pass", "choice", "plan")
    columns += numbers("us per step", "over the fastest", band="measured") + numbers("us per step", band="predicted")
    shown = table("Choices for one pass of one layer, the fastest first", columns, lines)
    return Part("Tuning", [sentence], tables=[shown])


def history(runs: Sequence[Results]) -> Part:
    """Of the runs on the last one's device."""
    part, main = Part("History"), runs[-1].provenance
    own = [r for r in runs if (r.provenance.device, r.provenance.rehearsal) == (main.device, main.rehearsal)]
    if len(own) < len(runs):
        part.sentences.append(f"{len(runs) - len(own)} of {len(runs)} runs are of other devices and not compared.")
    if len(own) == 1:
        part.sentences.append("There is no other run of this device to compare with.")
        return part
    cases = {timing.case.key: timing.case for run in own for timing in run.timings if timing.arm == OURS}
    lines = []
    for case in cases.values():
        found = [None if (t := run.timing(case, OURS)) is None or t.skipped else t for run in own]
        before, last = found[-2:]
        ratio = times(last.per_step / before.per_step) if before and last else ""
        each = [number(t.per_step if t else None) for t in found]
        slower = bool(before and last and last.low > before.high)
        lines.append(Line((label(case), case.dtype, case.mode, *each, ratio, "slower" * slower), slower))
    when = [f"{run.provenance.date[:16]} {run.provenance.commit[:10]}" for run in own]
    columns = words("case", "dtype", "mode") + numbers(*when, band="us per step of persistrnn, measured")
    columns += numbers("latest over the one before") + words("")
    part.sentences.append("Slower: the latest run's lower quartile is above the upper quartile of the one before.")
    part.tables.append(table("Time per step over the runs", columns, lines))
    return part


def markdown(results: Results) -> str:
    """The README's table: at most README_ROWS rows (EMPTY_ROWS before anything is measured), chosen by the rule that
    stands below them; without a line break at the end."""
    of = results.provenance
    suites: dict[str, list[Row]] = {}
    for row in rows(results):
        suites.setdefault(row.case.suite, []).append(row)
    measured = not of.rehearsal and any(not timing.skipped for timing in results.timings)
    most = README_ROWS if measured else EMPTY_ROWS
    each = max(1, min(3, most // max(1, len(suites))))
    which = {1: "the median", 2: "the lowest and the highest", 3: "the lowest, the median and the highest"}[each]
    lines = [f"| case | {OURS} us/step | torch us/step | speed-up | floor us/step |", "|---|---|---|---|---|"]
    for members in list(suites.values())[:most]:
        fast = [] if of.rehearsal else [row for row in members if row.speedup("torch") is not None]
        order = sorted(fast, key=lambda row: row.speedup("torch") or 0)
        order = order or sorted(members, key=lambda row: row.case.hidden)
        places = {1: [len(order) // 2], 2: [0, -1], 3: [0, len(order) // 2, -1]}[each]
        for row in dict.fromkeys(order[place] for place in places):
            ours, theirs = (None if of.rehearsal else row.measured(arm) for arm in (OURS, "torch"))
            cells = [f"{label(row.case)}, {row.case.dtype}, {row.case.mode}"]
            cells += [number(timing.per_step if timing else None) for timing in (ours, theirs)]
            cells += [times(row.speedup("torch") if ours else None), known(row.floor)]
            lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    where = f"measured on {of.device}, {of.date[:10]}, commit {of.commit[:10]}"
    origin = printable(where, 100) if measured else NOTHING
    suite = "each suite" if len(suites) <= most else f"the first {most} suites"
    note = f"Of {suite}, {which} by speed-up over torch (by hidden size where none is known); {origin}. "
    note += "The floor is predicted."
    return "\n".join([*lines, "", textwrap.fill(_plain(note), 120, break_on_hyphens=False)])


def _plain(text: str) -> str:
    """Words that Markdown leaves alone in a table."""
    return escape(" ".join(text.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")
