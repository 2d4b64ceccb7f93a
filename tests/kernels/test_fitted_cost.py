"""The cost model against the clock, over what bench/results/clock-sample.csv has: cycles of compiled kernels that
tests/emulator/clock.py executed. Neither a GPU nor Triton is needed to compare."""

import dataclasses

import clock_sample
import fit_cost
import numpy as np
import pytest

from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.cells.graph import OPERATIONS
from persistrnn.kernels.planner import cost
from persistrnn.kernels.planner.cost import FITTED
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem

SAMPLE = fit_cost.clocked()


def median(some):
    return np.median([abs(one.error()) for one in some])


def test_the_sample_has_many_kernels_of_every_kind():
    kernels = [one.kernel for one in SAMPLE]
    assert len(kernels) >= 200
    assert {k.dtype for k in kernels} >= {"bf16", "fp16", "tf32"}
    assert {k.cell for k in kernels} >= {"lstm", "gru", "rnn_tanh", "mgu", "slstm"}
    choices = [k.choice for k in kernels]
    for field, least in (("units", 4), ("k_parts", 4), ("batch_tile", 3), ("subtiles", 3), ("splits", 4)):
        assert len({getattr(choice, field) for choice in choices}) >= least, field


def test_the_median_error_is_below_ten_percent():
    assert median(SAMPLE) < 0.05
    assert np.quantile([abs(one.error()) for one in SAMPLE], 0.9) < 0.15


@pytest.mark.parametrize("field", ["way", "device", "dtype", "cell"])
def test_and_so_it_is_of_every_part(field):
    values = {getattr(one.kernel, field) for one in SAMPLE}
    for value in values:
        some = [one for one in SAMPLE if getattr(one.kernel, field) == value]
        assert len(some) < 8 or median(some) < 0.1, value


def test_each_number_matters_and_none_can_be_far_from_what_it_is():
    """Of the fit: with any number half as large again the errors are larger, or as they are."""
    now = np.mean([abs(one.error()) for one in SAMPLE])
    for name, value in dataclasses.asdict(FITTED).items():
        other = dataclasses.replace(FITTED, **{name: 1.5 * value})
        assert np.mean([abs(one.error(other)) for one in SAMPLE]) >= now - 1e-3, name


def test_a_cell_costs_its_own_operations():
    """relu(x + r): an addition and what Triton makes of a relu; tanh: an addition and a tanh."""
    assert CELLS["rnn_relu"].chain[0] == CELLS["rnn_relu"].work[0] == 4 + OPERATIONS["relu"].cycles
    assert CELLS["rnn_tanh"].chain[0] == 4 + OPERATIONS["tanh"].cycles
    assert CELLS["lstm"].chain[0] < CELLS["lstm"].work[0], "four gates side by side"
    chains = []
    for cell in ("rnn_relu", "rnn_tanh", "lstm", "slstm"):
        problem = Problem(CELLS[cell], 512, 16, 1, "bf16", DEVICES["h200"])
        choice = plan_layer(problem).forward.choice
        chains.append(cost.step(problem, choice, cost.Work(8, 512, 0, 0, 64, 64), backward=False).pointwise)
    assert chains == sorted(set(chains))


def test_what_the_source_says_of_the_fit_is_so():
    source = fit_cost.SOURCE.read_text()
    assert fit_cost.put(source, FITTED, SAMPLE) == source, "run tests/helpers/fit_cost.py --write"


def test_kernels_of_the_sample_are_clocked_anew():
    rows = clock_sample.read()
    small = [k for k in rows if k.hidden <= 256 and k.dtype != "fp32" and k.choice.subtiles == 1]
    for kernel in (small[0], small[len(small) // 2]):
        fresh = clock_sample.clocked(kernel)
        assert {name: str(value) for name, value in fresh.items()} == rows[kernel], (
            "the kernels or the clock have changed: run tests/helpers/clock_sample.py --again, then fit_cost.py --write"
        )
