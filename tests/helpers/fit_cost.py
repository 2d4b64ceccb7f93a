"""Fits the cost model to the clock, and says how far it is from it.

PYTHONPATH=.:tests python tests/helpers/fit_cost.py [--write]

prints the model's error over bench/results/clock-sample.csv (``clock_sample.py`` makes that file), by pass, cell and
dtype, and the worst kernels; --write fits ``cost.FITTED`` anew before, and puts it into kernels/planner/cost.py.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import clock_sample
import numpy as np
from clock_sample import Kernel

from persistrnn.kernels.planner import cost
from persistrnn.kernels.planner.cost import FITTED, Fitted
from persistrnn.kernels.planner.tiling import make_tiling

SOURCE = clock_sample.clock_table.ROOT / "kernels" / "planner" / "cost.py"
NAMES = tuple(f.name for f in fields(Fitted))
# No product is faster than at the dense rate.
LEAST = np.array([1.0 if name in ("product", "full") else 0.0 for name in NAMES])
# An error counts by its size, one below this by its square.
SMALL = 0.03


@dataclass(frozen=True)
class Clocked:
    """A kernel and what the clock said. Alone on its multiprocessor, in a group that is alone on the device."""

    kernel: Kernel
    cycles: float

    @cached_property
    def asked(self) -> tuple[object, ...]:
        problem, backward = self.kernel.problem, self.kernel.way == "backward"
        tiling = make_tiling(problem, self.kernel.choice, backward=backward)
        work = replace(cost.work_of(tiling, 1), programs=1)
        return problem, replace(self.kernel.choice, blocks=1), work, backward

    def predicted(self, fitted: Fitted = FITTED) -> float:
        return cost.step(*self.asked, fitted).total * 1e3 * self.asked[0].hardware.clock

    def error(self, fitted: Fitted = FITTED) -> float:
        """Model over clock, less 1."""
        return self.predicted(fitted) / self.cycles - 1


def clocked(file: Path = clock_sample.RESULTS) -> list[Clocked]:
    return [Clocked(kernel, float(row["cycles"])) for kernel, row in clock_sample.read(file).items()]


def fit(sample: list[Clocked], fitted: Fitted = FITTED, most: int = 60) -> Fitted:
    """The numbers, none below zero, with the least sum of errors: Levenberg and Marquardt's way, with weights."""

    def errors(x: np.ndarray) -> np.ndarray:
        return np.array([math.log1p(one.error(Fitted(*x))) for one in sample])

    x, damping = np.maximum(LEAST, astuple(fitted)), 1e-2
    now = errors(x)
    for _ in range(most):
        steps = np.maximum(0.02 * x, 0.01 * np.array(astuple(fitted), float) + 1e-3)
        slopes = np.stack([(errors(x + d) - now) / d.sum() for d in np.diag(steps)], 1)
        weighted = slopes.T / np.maximum(np.abs(now), SMALL)
        normal, gradient = weighted @ slopes, weighted @ now
        scale = np.diag(normal.diagonal() + 1e-12)
        for _ in range(8):
            tried = np.maximum(LEAST, x - np.linalg.solve(normal + damping * scale, gradient))
            found = errors(tried)
            if np.abs(found).sum() < np.abs(now).sum():
                break
            damping *= 4
        else:
            break
        if np.abs(now).sum() - np.abs(found).sum() < 1e-5 * len(now):
            x = tried
            break
        x, now, damping = tried, found, damping / 3
    return Fitted(*(float(f"{value:.3g}") for value in x))


def text(fitted: Fitted, sample: list[Clocked]) -> str:
    """As it stands in ``cost.py``."""
    median = np.median([abs(one.error(fitted)) for one in sample])
    lines, line = [], "   "
    for name, value in zip(NAMES, astuple(fitted), strict=True):
        item = f" {name}={value:g},"
        if len(line + item) > 120:
            lines, line = [*lines, line], "   "
        line += item
    head = f"# Fitted to the clock over {len(sample)} kernels; median error {median:.1%}."
    return "\n".join([head, "FITTED = Fitted(", *lines, line, ")  # fmt: skip"])


BEGIN, END = "# <fitted: made by tests/helpers/fit_cost.py --write>\n", "\n# </fitted>"


def put(source: str, fitted: Fitted, sample: list[Clocked]) -> str:
    before, _, rest = source.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN.strip()} ... {END.strip()}")
    return before + BEGIN + text(fitted, sample) + END + after


def summary(errors: Iterable[float]) -> str:
    found = np.array(list(errors))
    off = np.abs(found)
    return (
        f"{len(found):4d} kernels, median {np.median(off):.1%}, mean {off.mean():.1%}, 90% below "
        f"{np.quantile(off, 0.9):.1%}, largest {off.max():.1%}, middle {np.median(found):+.1%}"
    )


def told(sample: list[Clocked], fitted: Fitted = FITTED, worst: int = 10) -> str:
    errors = [one.error(fitted) for one in sample]
    lines = [f"{'all':18}{summary(errors)}"]
    for name in ("way", "cell", "dtype", "device", "tiles", "parts of K", "splits", "homes"):
        groups = defaultdict(list)
        for one, error in zip(sample, errors, strict=True):
            c, work = one.kernel.choice, one.asked[2]
            key = {
                "tiles": f"{c.subtiles} x {c.batch_tile}",
                "parts of K": c.k_parts,
                "splits": c.splits if work.slices > 1 else "one slice",
                "homes": "streamed" if work.streamed else "shared" if work.in_shared else "registers",
            }
            groups[str(key.get(name) or getattr(one.kernel, name))].append(error)
        lines += [f"{f'{name} {value}':18}{summary(found)}" for value, found in sorted(groups.items())]
    for error, one in sorted(zip(errors, sample, strict=True), key=lambda pair: -abs(pair[0]))[:worst]:
        k, c = one.kernel, one.kernel.choice
        what = " ".join(f"{f.name}={getattr(c, f.name)}" for f in fields(c) if f.name not in ("warps", "blocks"))
        kernel = f"{k.cell} {k.hidden}, B={k.batch}, {k.way}, {k.dtype}, {k.device}"
        lines.append(f"{error:+.0%} of {one.cycles:.0f}: {kernel}: {what}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fit, and put the numbers into the cost model")
    parser.add_argument("--sample", type=Path, default=clock_sample.RESULTS)
    asked = parser.parse_args()
    sample, fitted = clocked(asked.sample), FITTED
    if asked.write:
        fitted = fit(sample)
        SOURCE.write_text(put(SOURCE.read_text(), fitted, sample))
        print(text(fitted, sample))
    print(told(sample, fitted))


if __name__ == "__main__":
    main()
