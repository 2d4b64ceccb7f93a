"""The compiled kernels of steps of several stages: run on a CPU, without a race, and read: every tile of W_hh, those of
a second product too, is where the plan says."""

import pytest
from accuracy import DTYPES
from emulated import precise, scans
from emulator import Schedule
from recurrences import broken, given

from persistrnn.kernels.cells import CELLS, STAGED
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem


@pytest.mark.emulator
@pytest.mark.parametrize(("arch", "name", "dtype", "protocol", "chosen"), [
    ("sm_90", "layer_norm_gru", "bf16", "counter", {"homes": "shared"}),
    ("sm_80", "gru_reset_before", "fp16", "flags", {"homes": "registers and shared"}),
])  # fmt: skip
def test_compiled_kernels_keep_the_bound(emulated, forced, monkeypatch, arch, name, dtype, protocol, chosen):
    precise(monkeypatch, "ieee")
    session = emulated(arch, units="warps", schedule=Schedule(seed=1, slow=((1, None, None),)))
    forced(protocol, **chosen)
    assert broken(CELLS[name], DTYPES[dtype], given(CELLS[name], 1, DTYPES[dtype], 14, steps=2, marked=True)) == []
    assert scans(session) == ["staged_forward", "staged_backward"]


@pytest.mark.audit
@pytest.mark.parametrize(("name", "backward", "dtype", "hidden", "arch"), [
    ("layer_norm_lstm", True, "bf16", 100, "sm_90"),
    ("gru_reset_before", False, "tf32", 300, "sm_80"),
    ("gru_reset_before", True, "bf16", 1024, "sm_90"),
])  # fmt: skip
def test_the_weights_are_where_the_plan_says(name, backward, dtype, hidden, arch):
    row = audit.audit(audit.Case(name, backward, dtype, hidden, arch, marks=True))
    assert (row.failures, row.refused) == ("", "")


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("hidden", [1, 10, 64, 100, 777, 1536, 5000])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_plans_have_a_home_for_all_of_the_weights(name, hidden, dtype):
    problem = Problem(CELLS[name], hidden, 16, 2, dtype, DEVICES["h200"])
    plan = plan_layer(problem)
    for part in (plan.forward, plan.backward):
        t, shares = part.tiling, part.shares
        assert shares.registers + shares.shared + shares.streamed == problem.weight_bytes
        assert [sum(p.packs) for p in t.each] == ([1] * len(t.each) if t.backward else split(problem.cell))
        for p, gates in zip(t.each, split(problem.cell), strict=True):
            assert (p.units, p.slices, p.batch_tile, p.subtiles, p.k_parts) == (t.units, t.slices, t.batch_tile, 1, 1)
            assert p.segments * p.depth == hidden * (gates if t.backward else 1)
            indices = [range(k.segment * hidden + k.start, k.segment * hidden + k.start + k.length) for k in p.k_blocks]
            kept = sorted(i for block in indices for i in block)
            assert kept == list(range(len(kept)))
            assert len(kept) == p.stream_start * p.segments
            assert (p.streamed > 0) == (p.stream_start < p.depth)


def split(cell):
    """Gates of each product."""
    return [cell.gates_of_h, *[1] * cell.products]
