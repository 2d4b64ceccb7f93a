"""What the race is meant to show on an H200, beside what it has shown.

    python -m bench.report.targets [RESULTS.json]       a Markdown table; without a file, of the newest in bench/results

Times are medians of one run. torch is torch.nn in the same dtype, with the input's product inside in both arms. Where
all measured rows meet a target, but not all rows of the race are measured, it is met "so far".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TypeAlias

from bench import UsageError
from bench.race import suites
from bench.report.results import Case, Results, load, named
from bench.report.rows import Row, rows
from persistrnn.profiling.page import NOTHING

DEVICE = "H200"
FOLDER = Path(__file__).parents[1] / "results"
FIRST, FIRST_CALL = "first call in a process, compiling included: under 10 s", "first call"  # a microbenchmark
# Targets that are tests of their own, by what is in the names of their outcomes.
TESTED = {
    "a new B or T compiles nothing, but for a new class of batches": "test_only_a_new_class_of_batches_compiles",
    "T = 65,536, B = 32, H = 1024, two layers, bf16 train with save='checkpoint' in a quarter of cuDNN's peak memory":
        "test_long_training_takes_a_quarter_of_cudnns_memory",
    "save='state' at most 25% slower than save='gates' (LSTM bf16 H=1024 B=32 T=8192)":
        "test_state_is_at_most_a_quarter_slower",
    "resets within a sequence cost at most 5%": "test_resets_cost_at_most_five_percent",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One line of the table. met: "yes", "no", "so far" or NOTHING."""

    text: str
    measured: str = NOTHING
    met: str = NOTHING


Find: TypeAlias = Callable[[Case], Row]  # the row of a run with that work, whichever suite it was measured in


def finder(results: Results | None) -> Find:
    found = {row.case.key: row for row in rows(results)} if results else {}
    return lambda case: found.get(case.key, Row(case))


def speedup(find: Find, case: Case) -> float | None:
    return find(case).speedup("torch")


def per_step(find: Find, case: Case) -> float | None:
    return find(case).per_step


def over_floor(find: Find, case: Case) -> float | None:
    return find(case).over_floor


def against(**less: object) -> Callable[[Find, Case], float | None]:
    """The time over that of the case with these fields instead."""

    def ratio(find: Find, case: Case) -> float | None:
        more, base = find(case).per_step, find(replace(case, **less)).per_step  # type: ignore[arg-type]
        return more / base if more and base else None

    return ratio


@dataclass(frozen=True)
class Goal:
    """A target over rows of the race.

    rows: which ones. value: of a row, None where it is not measured. over: all values -> the number that counts, which
    is at least ``least``, at most ``most`` and below ``below``.
    """

    text: str
    rows: Callable[[Case], bool]
    value: Callable[[Find, Case], float | None]
    over: Callable[[Iterable[float]], float]
    least: float = 0.0
    most: float = math.inf
    below: float = math.inf
    unit: str = ""

    def target(self, find: Find, cases: Sequence[Case], origin: str) -> Target:
        wanted = [case for case in cases if self.rows(case)]
        found = [(value, case) for case in wanted if (value := self.value(find, case)) is not None]
        if not found:
            return Target(self.text)
        values = [value for value, _ in found]
        number = self.over(values)
        words = [f"{_short(min(values))} to {_short(max(values))} in {len(found)} of {len(wanted)} rows"]
        if len(wanted) == 1 and (only := find(wanted[0]).measured("persistrnn")):
            low, high = (_short(x / only.case.steps) for x in (only.low, only.high))
            words = [f"quartiles {low} and {high} of {only.rounds} rounds"]
        elif self.over in (min, max):
            words.append(next(case.key for value, case in found if value == number))
        ok = self.least <= number <= self.most and number < self.below
        met = "no" if not ok else "yes" if len(found) == len(wanted) else "so far"
        return Target(self.text, f"{_short(number)}{self.unit} ({'; '.join([*words, origin])})", met)


def _short(number: float) -> str:
    return f"{number:#.4g}"


def raced(case: Case) -> bool:
    """torch.nn runs it too."""
    return case.input > 0


def persistent_dtypes(results: Results | None) -> tuple[str, ...]:
    """Those that cuDNN's persistent kernels take: fp16, and bf16 from cuDNN 9.13 on (assumed without results)."""
    version = "91300" if results is None else results.provenance.cudnn
    return ("fp16", "bf16") if version.isdigit() and int(version) >= 91300 else ("fp16",)


def window(case: Case, dtypes: Sequence[str]) -> bool:
    """cuDNN has a persistent kernel for it."""
    plain = case.cell == "lstm" and case.dtype in dtypes and case.layers == 1 and not case.bidirectional
    sizes = case.hidden <= 1024 and case.hidden % 128 == 0 and case.input % 128 == 0
    return raced(case) and plain and sizes and case.batch <= 128 and case.batch % 8 == 0


def published(mode: str) -> Callable[[Case], bool]:
    """The row of which times on an H100 are published."""
    wanted = ("lstm", "fp16", 768, 768, 16, 1024, 1, False, mode)
    return lambda c: wanted == (c.cell, c.dtype, c.input, c.hidden, c.batch, c.steps, c.layers, c.bidirectional, c.mode)


def latency(hidden: int) -> Callable[[Case], bool]:
    return lambda case: case.suite == "inference" and case.batch == 1 and case.hidden == hidden


FLOOR = "per step at most 1.5 times the plan's floor, worst row (T >= 64, no product of the input where measured)"


def goals(dtypes: Sequence[str]) -> tuple[Goal, ...]:
    """Of those with the same text the first that is measured counts. dtypes: of cuDNN's persistent kernels."""

    def inside(case: Case) -> bool:
        return window(case, dtypes)

    def others(case: Case) -> bool:
        return raced(case) and not inside(case) and case.mode == "training"

    return (
        Goal("outside cuDNN's persistent window, training: geometric mean of torch / persistrnn at least 4",
             others, speedup, geometric_mean, least=4),
        Goal("the same rows: none below 1.5", others, speedup, min, least=1.5),
        Goal("inside that window (LSTM in fp16, from cuDNN 9.13 on in bf16; one layer and direction, H <= 1024): "
             "no row below 1.0",
             inside, speedup, min, least=1),
        Goal("inside that window: geometric mean at least 1.15", inside, speedup, geometric_mean, least=1.15),
        Goal("LSTM fp16 H=768 B=16 T=1024, forward: under 2.0 us per step",
             published("forward"), per_step, max, below=2, unit=" us"),
        Goal("LSTM fp16 H=768 B=16 T=1024, forward and backward: under 5.0 us per step",
             published("training"), per_step, max, below=5, unit=" us"),
        Goal(FLOOR, lambda c: c.input == 0 and c.steps >= 64, over_floor, max, most=1.5),
        Goal(FLOOR, lambda c: raced(c) and c.steps >= 64, over_floor, max, most=1.5),
        *(Goal(f"B = 1 inference, H = {hidden}: at most 1.3 us per step, worst row",
               latency(hidden), per_step, max, most=1.3, unit=" us") for hidden in (256, 512, 1024)),
        Goal("T = 1: not slower than torch.nn", lambda c: raced(c) and c.steps == 1, speedup, min, least=1),
        Goal("two directions at most 1.15 times one, worst row",
             lambda c: c.suite == "directions" and c.bidirectional, against(bidirectional=False), max, most=1.15),
        Goal("DeepBench's largest rows (LSTM, H = 4096): not slower than torch.nn",
             lambda c: raced(c) and c.cell == "lstm" and c.hidden == 4096, speedup, min, least=1),
        Goal("a stack of 4 layers of H = 512 at most 1.4 times one layer, worst row",
             lambda c: c.suite == "stacked" and (c.layers, c.hidden) == (4, 512), against(layers=1), max, most=1.4),
    )  # fmt: skip


def targets(results: Results | None, origin: str = "") -> list[Target]:
    """All targets; ``origin`` names the results in the table.

    Raises:
        UsageError: the results are of another device, or of none.
    """
    if results is not None:
        check_device(results)
    find, cases = finder(results), suites.cases()
    found: dict[str, Target] = {}
    for goal in goals(persistent_dtypes(results)):
        if found.get(goal.text, Target("")).met == NOTHING:
            found[goal.text] = goal.target(find, cases, origin)
    first = [one for one in results.micro if one.name == FIRST_CALL] if results else []
    found[FIRST] = Target(FIRST)
    for one in first[:1]:
        seconds = f"{_short(one.value)} s ({one.rounds} {'process' if one.rounds == 1 else 'processes'}; {origin})"
        found[FIRST] = Target(FIRST, seconds, "yes" if one.value < 10 else "no")
    for text, name in TESTED.items():
        oks = [one.ok for one in results.stress if name in one.name] if results else []
        green = f"{sum(oks)} of {len(oks)} tests green ({origin})"
        found[text] = Target(text, green, "yes" if all(oks) else "no") if oks else Target(text)
    return list(found.values())


def suitable(results: Results) -> bool:
    """Measured on the device of the targets; its name ends in more words where it is a part of one, or a variant."""
    return not results.provenance.rehearsal and results.provenance.device.split()[-1:] == [DEVICE]


def check_device(results: Results) -> None:
    """Raises UsageError for results of another device, or of none."""
    if not suitable(results):
        where = results.provenance
        kind = "a rehearsal on" if where.rehearsal else "of"
        raise UsageError(
            f"the results are {kind} {where.device!r}; allowed: a run on a whole {DEVICE}, for which the predictions "
            "and the targets are; make one with `make gpu`"
        )


def markdown(found: Sequence[Target]) -> str:
    """The table, without a line break at its end."""
    lines = ["| target | measured | met? |", "|---|---|---|"]
    return "\n".join(lines + [f"| {one.text} | {one.measured} | {one.met} |" for one in found])


def newest(folder: Path = FOLDER) -> tuple[Results | None, str]:
    """The latest results of the targets' device, and their file's name; rehearsals do not count.

    Raises:
        ValueError: a file there is no results file, or has no date.
    """
    newest: tuple[Results | None, str] = None, ""
    for path in sorted(folder.glob("*.json")):
        found = load(path)
        try:
            when = found.provenance.when
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if suitable(found) and (newest[0] is None or when > newest[0].provenance.when):
            newest = found, path.name
    return newest


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.report.targets", description=__doc__.split("\n")[0])
    p.add_argument("results", type=Path, nargs="?", metavar="RESULTS.json", help="default: the newest in bench/results")
    path = p.parse_args(argv).results
    try:
        print(markdown(targets(*(newest() if path is None else (named(path, p), path.name)))))
    except (UsageError, ValueError) as error:
        p.error(f"argument RESULTS.json: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
