"""A layer pipeline on a real GPU: the bound at real sizes, equal bits from run to run, and nothing that hangs."""

import accuracy
import pytest
import torch
from gpu import check_bound, check_same_bits, planned_pipeline
from pairs import CELLS
from test_gpu import PRECISION, PROTOCOLS, a_gpu, exchange, precision

import persistrnn
from persistrnn import decide
from persistrnn.kernels import launch

pytestmark = pytest.mark.gpu

__all__ = ["a_gpu", "exchange", "precision"]  # fixtures

# (hidden, batch, steps, layers, bidirectional, bias, state)
STACKS = [
    (64, 16, 33, 2, False, True, True),
    (100, 3, 64, 4, False, False, True),
    (256, 16, 100, 4, False, True, True),
    (200, 40, 33, 3, False, True, False),
]


@pytest.fixture
def always(monkeypatch):
    """Every stack that fits runs as one, whatever the model predicts."""
    monkeypatch.setattr("persistrnn.kernels.planner.pipeline.Pipeline.faster", lambda self, steps, backward: True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("dtype", "asked"), PRECISION)
@pytest.mark.parametrize("cell", CELLS)
def test_stacks_keep_the_bound(cell, dtype, asked, protocol, precision, exchange, always):
    precision(asked)
    exchange(protocol=protocol)
    fits = [s for s in STACKS if planned_pipeline(cell, s[0], s[3], s[1], accuracy.DTYPES[dtype]) is not None]
    assert len(fits) >= 2, "this device holds hardly a stack; the test means little"
    check_bound(cell, dtype, asked, fits)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_pipeline_and_its_layers_one_by_one_agree(cell, protocol, exchange, always, monkeypatch):
    """The same stack on the other path of ours, to the dtype's rounding."""
    exchange(protocol=protocol)
    torch.manual_seed(0)
    layer = getattr(persistrnn, cell.upper())(96, 512, 4, device="cuda", dtype=torch.bfloat16, backend="persistent")
    x = torch.randn(200, 16, 96, device="cuda", dtype=torch.bfloat16)
    before = launch.LAUNCHES.copy()
    with torch.no_grad():
        together, _ = layer(x)
        assert launch.LAUNCHES - before == {"scan_forward": 1}
        monkeypatch.setattr(decide, "runs_as_pipeline", lambda call: False)
        layered, _ = layer(x)
    difference = (together.float() - layered.float()).square().mean().sqrt() / layered.float().square().mean().sqrt()
    assert difference < 0.02


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_change_between_runs(cell, protocol, exchange, always):
    exchange(protocol=protocol)
    torch.manual_seed(1)
    layer = getattr(persistrnn, cell.upper())(64, 256, 4, device="cuda", dtype=torch.float16, backend="persistent")
    x = torch.randn(50, 24, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    check_same_bits(layer, x)
