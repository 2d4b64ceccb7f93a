"""Cells whose step has several stages, on kernels of their own: the bound of ``helpers/accuracy`` in every dtype, one
slice and many, both orders of derivatives, and mutants of their exchanges caught."""

import numpy as np
import pytest
import torch
from accuracy import DTYPES
from grid import Delays, concurrent_grid
from recurrences import broken, given, in_dtype, results

from persistrnn import autograd, reference, step_marks
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS, STAGED
from persistrnn.kernels.device import exchanged_product, means, staged_scan

pytestmark = pytest.mark.interpreter

ONE_LAUNCH = {"staged_forward": 1, "staged_backward": 1}


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    """What nobody has written is NaN. The interpreter computes in NumPy, which warns of what comes of it."""
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STAGED)
def test_the_bound_is_kept(name, dtype):
    """One slice: with units past H, in both directions, with rows that end and begin anew, over a longer sequence."""
    cell = CELLS[name]
    shapes = {"fp32": (2, 10, 3, 3, True), "fp16": (1, 10, 3, 2, False), "bf16": (1, 16, 2, 16, True)}
    (directions, *shape), dtype = shapes[dtype], DTYPES[dtype]
    before = launch.LAUNCHES.copy()
    failures = broken(cell, dtype, given(cell, directions, dtype, *shape, seed=1))
    assert not failures, "\n".join(failures)
    assert launch.LAUNCHES - before == ONE_LAUNCH


@pytest.mark.parametrize("name", STAGED)
def test_both_orders_of_derivatives_are_those_of_the_step(name):
    cell = CELLS[name]
    arguments = given(cell, steps=3, marked=True, seed=1)
    assert {1, 2} <= set(arguments["marks"].unique().tolist())
    found = results(autograd.recurrent, cell, arguments, 2, precision="ieee", return_c=True)
    truth = results(reference.recurrent, cell, in_dtype(arguments, torch.float64), 2)
    assert set(found) == set(truth)
    for what, exact in truth.items():
        assert (found[what] - exact).norm() <= 2e-6 * exact.norm() + 1e-9, what


def test_heads_of_a_second_product_are_recurrences_of_their_own():
    cell = CELLS["gru_reset_before"]
    arguments = given(cell, directions=2)
    found = results(autograd.recurrent, cell, arguments, precision="ieee", heads=2)
    one = {"x_gates": arguments["x_gates"][:, :, 1:], "initial": [s[1:] for s in arguments["initial"]]}
    one |= {name: arguments[name][1:] for name in ("weight_hh", "bias_hh")}
    truth = reference.recurrent(cell.name, **in_dtype(one, torch.float64))
    torch.testing.assert_close(found["y"][:, :, 12:], truth.y, rtol=1e-5, atol=1e-6)
    assert found["d weight_hh"].flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["layer_norm_gru", "gru_reset_before"])
def test_a_nan_in_a_skipped_step_reaches_no_gradient(name):
    cell = CELLS[name]
    arguments = given(cell, marked=True, seed=1)
    skipped = (arguments["marks"] == step_marks.SKIPPED).unsqueeze(-1)
    assert skipped.any()
    found = []
    for value in (0.0, float("nan")):
        x_gates = torch.where(skipped, value, arguments["x_gates"].detach()).requires_grad_()
        found.append(results(autograd.recurrent, cell, arguments | {"x_gates": x_gates}, precision="ieee"))
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


# Slices of 8 units, the last one not full. The second program is late at the operation.
@pytest.mark.parametrize(("name", "dtype", "protocol", "operation", "chosen"), [
    ("layer_norm_lstm", "fp32", "counter", "announce", {"homes": "all three"}),
    ("layer_norm_gru", "bf16", "flags", "read", {"homes": "stream", "splits": 2}),
    ("gru_reset_before", "fp32", "counter", "put", {"homes": "registers and shared"}),
    ("gru_reset_before", "fp16", "flags", "get", {"homes": "all three"}),
    ("gru_reset_before", "bf16", "counter", "wait", {"homes": "shared and stream", "splits": 2}),
])  # fmt: skip
def test_many_slices_keep_the_bound(forced, name, dtype, protocol, operation, chosen):
    cell, dtype = CELLS[name], DTYPES[dtype]
    forced(protocol, **chosen)
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(operation, slow=1)):
        failures = broken(cell, dtype, given(cell, 1, dtype, 22, steps=2, marked=True, seed=1))
    assert not failures, "\n".join(failures)
    assert launch.LAUNCHES - before == ONE_LAUNCH


def test_equal_inputs_give_equal_bits_under_any_schedule(forced):
    forced()
    cell, found = CELLS["layer_norm_gru"], []
    for slow, operation in enumerate(("announce", "get")):
        with concurrent_grid(Delays(operation, slow)):
            arguments = given(cell, hidden=13, dtype=torch.bfloat16, steps=2)
            found.append(results(autograd.recurrent, cell, arguments, precision="ieee"))
    for what, value in found[0].items():
        assert torch.equal(value, found[1][what]), what


# ---- mutants --------------------------------------------------------------------------------------------------------


def no_wait_for_sums(monkeypatch):
    monkeypatch.setattr(means, "await_count", lambda counter, target, spin_limit, *_: spin_limit)


def sums_of_all_means_in_one_place(monkeypatch):
    original = means.mean_over_units

    def mean(tile, number, program, sync, spin_limit, tiling, exchange):
        there = sync.partial_sums - number % 2 * (tiling.slices * tiling.batch_tile)
        return original(tile, number, program, sync._replace(partial_sums=there), spin_limit, tiling, exchange)

    monkeypatch.setattr(staged_scan, "mean_over_units", mean)


def no_wait_for_the_operand(monkeypatch):
    def wait(weights, ahead, accs, pointer, rows, j, program, step, needed, sync, spin_limit, tiling, exchange):
        needed = needed - (tiling.row_tiles > 0)
        return exchanged_product.multiply(
            weights, ahead, accs, pointer, rows, j, program, step, needed, sync, spin_limit, tiling, exchange
        )

    monkeypatch.setattr(staged_scan, "multiply", wait)


def operand_counted_with_the_state(monkeypatch):
    monkeypatch.setattr(staged_scan, "stages_sync", lambda own, exchange: own)


def units_past_the_end_in_the_mean(monkeypatch):
    original = means.mean_over_units

    def mean(tile, number, program, *others):
        everywhere = program._replace(unit_mask=program.unit_mask | True)
        return original(tile, number, everywhere, *others)

    monkeypatch.setattr(staged_scan, "mean_over_units", mean)


MUTANTS = [
    (no_wait_for_sums, "layer_norm_gru", "announce"),
    (sums_of_all_means_in_one_place, "layer_norm_gru", "read"),
    (units_past_the_end_in_the_mean, "layer_norm_gru", "announce"),
    (no_wait_for_the_operand, "gru_reset_before", "put"),
    (operand_counted_with_the_state, "gru_reset_before", "put"),
]


@pytest.mark.parametrize(("mutant", "name", "operation"), MUTANTS, ids=lambda m: getattr(m, "__name__", m))
def test_mutants_are_caught(forced, monkeypatch, mutant, name, operation):
    mutant(monkeypatch)
    forced(spin_limit=2000)
    with concurrent_grid(Delays(operation, slow=1, seconds=0.05)):
        try:
            failures = broken(CELLS[name], torch.float32, given(CELLS[name], hidden=13, steps=2))
        except RuntimeError as error:
            failures = [str(error)] if "gave up waiting" in str(error) else []
    assert failures != []
