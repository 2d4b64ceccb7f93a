"""Every built-in cell and what recipes make of them, on the scan kernels: the bound of ``helpers/accuracy``, in every
dtype, both directions, with rows that end and begin anew, over short and over long sequences. (The short ones of LSTM
and GRU are in test_scan.py and test_lengths_and_resets.py.)"""

import numpy as np
import pytest
from accuracy import DTYPES, Bound
from grid import Delays, concurrent_grid
from own_cells import VARIANTS, cell_of
from recurrences import broken, compare, given

from persistrnn.kernels import launch
from persistrnn.kernels.cells import BUILT_IN, CELLS

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes in NumPy, which warns of what a cell makes of the zeros where there is no unit."""
    with np.errstate(all="ignore"):
        yield


# What recipes make of them in float32 is in test_recipe.py.
SHORT = [(name, dtype) for name in BUILT_IN[2:] for dtype in DTYPES]
SHORT += [(name, dtype) for name in VARIANTS for dtype in ("fp16", "bf16")]


@pytest.mark.parametrize(("name", "dtype"), [*SHORT, ("lstm", "bf16"), ("gru", "bf16")])
def test_the_bound_is_kept(name, dtype):
    # directions, hidden, batch, steps, marked: units past H, and a bfloat16 sequence in which an outcome computed again
    # from rounded tiles was 54% of sLSTM's gradient
    shapes = [(2, 18, 3, 6, True)] if (name, dtype) in SHORT else []
    shapes += [(1, 16, 2, 48, False)] if dtype == "bf16" and name in BUILT_IN else []
    cell, dtype = cell_of(name), DTYPES[dtype]
    before = launch.LAUNCHES["scan_backward"]
    for directions, *shape in shapes:
        # Seed 1: of these numbers no h is so near 0 that rounding puts it on the other side of a kink.
        failures = broken(cell, dtype, given(cell, directions, dtype, *shape, seed=1))
        assert not failures, "\n".join(failures)
    assert launch.LAUNCHES["scan_backward"] == before + len(shapes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["peephole", "slstm"])
def test_the_pooled_bound_is_kept(name, dtype):
    """Over eight cases, without what a single one is allowed besides."""
    cell, bound = CELLS[name], Bound(DTYPES[dtype])
    for seed in range(2):
        for directions, *shape in [
            (2, 18, 3, 6, True),
            (1, 10, 1, 2, False),
            (1, 25, 17, 7, True),
            (2, 2, 3, 7, False),
        ]:
            compare(bound, cell, given(cell, directions, bound.dtype, *shape, seed=seed))
    bound.check()


# One of each cell; which is late, and in what, has nothing to do with the cell (test_exchange.py).
SLICED = [
    # cell, dtype, protocol, chosen, what the second program is late in
    ("rnn_tanh", "fp16", "counter", {"homes": "shared", "k_parts": 2}, "put"),
    ("rnn_relu", "fp32", "flags", {"homes": "stream"}, "get"),
    ("peephole", "bf16", "flags", {"homes": "registers and shared"}, "put"),
    ("coupled", "fp16", "flags", {"k_parts": 2}, "wait"),
    ("mgu", "bf16", "counter", {"homes": "shared and stream", "splits": 2}, "get"),
    ("janet", "fp32", "counter", {"homes": "all three"}, "put"),
    ("slstm", "fp32", "counter", {"k_parts": 2}, "wait"),
    ("slstm", "fp16", "flags", {"homes": "shared", "splits": 2}, "get"),
    ("lstm_noise", "bf16", "counter", {"homes": "registers and stream"}, "wait"),
]


@pytest.mark.parametrize(("name", "dtype", "protocol", "chosen", "operation"), SLICED, ids=str)
def test_many_slices_keep_the_bound(forced, name, dtype, protocol, chosen, operation):
    """In the concurrent grid, whose second program is late."""
    cell, dtype = cell_of(name), DTYPES[dtype]
    forced(protocol, **chosen)
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(operation, slow=1)):
        failures = broken(cell, dtype, given(cell, 1, dtype, 22, marked=True))
    assert not failures, "\n".join(failures)
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}


def test_no_cell_is_left_out():
    assert {name for name, *_ in SLICED} == {*BUILT_IN[2:], "lstm_noise"}
