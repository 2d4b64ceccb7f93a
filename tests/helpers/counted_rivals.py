"""W_hh that a step reads and launches that a sequence takes: ours beside other scans in Triton, in the same emulator.

`persistrnn audit --run` runs this after counted.py, and `PYTHONPATH=.:tests python tests/helpers/counted_rivals.py` by
itself: what is importable gets new rows in bench/results/rivals.csv, what is not keeps its rows.
"""

import contextlib
import importlib.util
import re
from dataclasses import asdict, dataclass
from importlib import metadata

import counted
import pytest
import torch
import triton
from emulator import EmulatorError, emulate
from triton.runtime.autotuner import Autotuner, OutOfResources

from bench.race import arms
from bench.report.results import Case
from persistrnn.kernels.cells import CELLS

RESULTS = counted.RESULTS.with_name("rivals.csv")
ARCH = "sm_90"
LENGTHS = 2, 3  # time steps: what the longer run has more is a step's


@dataclass(frozen=True)
class Row:
    """weight: bytes of W_hh. read: bytes of it that all programs read in one more time step. launches: Triton's in a
    sequence. skipped: why nothing was executed."""

    library: str
    version: str
    cell: str
    dtype: str
    H: int
    B: int
    arch: str
    triton: str
    weight: int
    forward_read: int | str = ""
    forward_launches: str = ""
    backward_read: int | str = ""
    backward_launches: str = ""
    skipped: str = ""


def xma(case, parameters, device):
    """The GRU of XMA with one head. It resets h before the product, so it does not race; its bytes can be counted."""
    if case.cell != "gru":
        raise arms.Skip("XMA has no LSTM")
    from xma.layers.gru import gru

    weights = [parameters["weight_hh_l0"][None, : case.hidden].clone().requires_grad_() for _ in range(3)]
    return lambda x: gru(*(t for w in weights for t in (x.transpose(0, 1)[:, :, None].contiguous(), w)))[0]


def flag_gems(case, parameters, device):
    raise arms.Skip("FlagGems has no LSTM and no GRU")


FORWARDS = {
    "persistrnn": lambda *of: arms.persistent(*of).forward,
    "torchrl": lambda *of: arms.torchrl(*of).forward,
    "xma": xma,
    "flag_gems": flag_gems,
}
SHAPES = [(cell, "bf16", hidden, 16) for cell in ("lstm", "gru") for hidden in (256, 512)]
CASES = [(library, *shape) for library in ("persistrnn", "torchrl") for shape in SHAPES]
# XMA's 16-bit arithmetic (mul.bf16x2) is not modelled.
CASES += [("xma", "gru", "tf32", 128, 16), ("xma", "gru", "tf32", 256, 16), ("flag_gems", "lstm", "bf16", 256, 16)]


def largest_tile(tuner, *_, config, **__):
    """What autotuning takes for a time: the more rows a program has, the less is read; then the longest block of k."""
    sizes = config.kwargs.items()
    return tuple(-max([v for n, v in sizes if re.fullmatch(rf"BLOCK\w*_{axis}", n)], default=0) for axis in "BK")


def without_what_counts_nothing(ptx):
    """Subnormals are not flushed, and lanes of a warp, which run in lockstep, do not wait for each other."""
    return re.sub(r"bar\.warp\.sync[^;]*;|\.ftz\b", "", ptx)


def passes(reports, forward, x):
    """(bytes of weights read, launches) of the forward and of the backward."""
    reports.clear()
    y = forward(x)
    parts = [list(reports)]
    y.float().sum().backward()
    parts.append(reports[len(parts[0]) :])
    weights = [[n for r in part for (_, name), n in r.bytes.items() if name.lower().startswith("w")] for part in parts]
    return [(sum(some), len(part)) for some, part in zip(weights, parts, strict=True)]


def count(library: str, cell: str, dtype: str, hidden: int, batch: int) -> Row:
    weight = CELLS[cell].gates * hidden**2 * arms.DTYPES[dtype].itemsize
    identity = cell, dtype, hidden, batch, ARCH, triton.__version__, weight
    if importlib.util.find_spec(library) is None:
        return Row(library, "", *identity, skipped=f"{library} is not installed")
    try:
        version = metadata.version(library)
    except metadata.PackageNotFoundError:
        version = "not packaged"
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        session = emulate(patch, ARCH, units="rows", tolerate=True, mutate=without_what_counts_nothing)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(Autotuner, "_bench", largest_tile)
        try:
            for steps in LENGTHS:
                case = Case("counts", library, cell, hidden, hidden, 1, False, batch, steps, dtype, "training")
                forward = FORWARDS[library](case, arms.source(case), torch.device("cpu"))
                x = torch.randn(arms.input_shape(case), dtype=arms.DTYPES[dtype])
                runs.append(passes(session.reports, forward, x))
        except (arms.Skip, EmulatorError, OutOfResources) as error:
            return Row(library, version, *identity, skipped=str(error))
    found = []
    for short, long in zip(*runs, strict=True):
        found += [long[0] - short[0], f"{long[1] - short[1]} per step" if long[1] > short[1] else str(long[1])]
    return Row(library, version, *identity, *found)


def main() -> None:
    kept = {tuple(row[name] for name in ("library", "cell", "dtype", "H", "B")): row for row in counted.read(RESULTS)}
    for case in CASES:
        row, key = count(*case), tuple(map(str, case))
        if row.version or key not in kept:
            kept[key] = asdict(row)
    counted.write(list(kept.values()), RESULTS)
    print(counted.table(counted.read(RESULTS)))


if __name__ == "__main__":
    main()
