"""The predicted bytes of what a cell takes beside its gates: masks of a recipe, and extras of a cell's own."""

from functools import partial

import pytest
import torch
from asked import asked
from test_memory_modes import MODES, no_kernels, short, trained_peak

import persistrnn
from persistrnn import Recipe
from persistrnn.kernels import masks
from persistrnn.kernels.planner import memory
from persistrnn.recipe import cell_of, hides

pytestmark = pytest.mark.interpreter

__all__ = ["no_kernels", "short"]  # fixtures

H, BATCH, STEPS = 64, 8, 2048


@persistrnn.cell(gates=("h",), extras=("keep",))
def kept_where(x, r, state, e):
    return torch.where(e.keep > 0.5, state.h, torch.tanh(x.h + r.h))


def undrawn(keys, steps, batch, units):
    return torch.empty(keys.size(0), steps, batch, *keys.shape[1:3], units, dtype=torch.uint8)


@pytest.mark.parametrize("save", MODES)
@pytest.mark.parametrize(
    ("cell", "dtype", "layers", "directions", "recipe"),
    [
        ("lstm", torch.bfloat16, 2, 1, Recipe(zoneout=(0.3, 0.2))),
        ("gru", torch.float32, 1, 1, Recipe(zoneout=0.3, recurrent_dropout=0.3)),
        ("own", torch.bfloat16, 1, 2, Recipe()),
    ],
)
def test_predicted_bytes_are_those_that_are_allocated(
    short, no_kernels, monkeypatch, cell, dtype, layers, directions, recipe, save
):
    """Masks are there for one chunk; extras of a cell's own, and h that is given out in place of y, for all steps."""
    monkeypatch.setattr(masks, "drawn", undrawn)
    name = kept_where.cell if cell == "own" else cell
    options = {"bidirectional": directions == 2, "backend": "persistent", "dtype": dtype, "save": save}
    layer = persistrnn.Recurrent(name, H, H, layers, recipe=recipe, **options)
    extras = {"keep": torch.zeros(layers * directions, STEPS, BATCH, H, dtype=dtype)} if cell == "own" else {}
    run = partial(layer, **extras)
    run.parameters = layer.parameters
    x = torch.zeros(STEPS, BATCH, H, dtype=dtype)
    given = {"num_layers": layers, "directions": directions, "dtype": dtype, "hides": hides(recipe, True)}
    of = asked(cell_of(name, recipe, True), H, **given).layers

    def peaks(chunk):
        short(chunk)
        return trained_peak(run, x), memory.peak(save, of, BATCH, STEPS, chunk, False)

    (low, predicted_low), (high, predicted_high) = peaks(256), peaks(1024)
    assert (low, high) == pytest.approx((predicted_low, predicted_high), rel=0.05)
    assert high - low == pytest.approx(predicted_high - predicted_low, rel=0.01)
