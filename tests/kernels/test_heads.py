"""A block-diagonal W_hh: each head is a recurrence of its own, and one that fits a slice exchanges nothing."""

import own_cells
import pytest
import recurrences
import torch
from grid import concurrent_grid
from recurrences import in_dtype, leaves_of

from persistrnn import autograd, reference, step_marks
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.plan import plan_layer
from persistrnn.kernels.planner.problem import Problem

T, B, D, HEADS, H = 3, 3, 2, 3, 10  # H of a head


def given(cell, marked):
    """Arguments of ``autograd.recurrent`` with heads, by name, in float64."""
    found = recurrences.given(cell, D * HEADS, torch.float64, H, B, T)
    if marked:
        active, begins = torch.rand(2, T, B, generator=torch.Generator().manual_seed(0)) < 0.7
        found["marks"] = step_marks.marks(active, begins, D)
        found["reset"] = [(s.detach() * 0.5).requires_grad_() for s in found["initial"]]
    return found


def side_by_side(t, at):
    """[.., D * heads, .., H] as one head has it, [.., D, .., heads * H]: heads at dimension ``at``."""
    t = t.unflatten(at, (D, HEADS)).movedim(at + 1, -2)
    return t.flatten(-2)


def as_one(cell, a):
    """The same recurrence with one W_hh, whose blocks outside the diagonal are zeros."""
    gates = a["weight_hh"].unflatten(1, (cell.gates, H)).unflatten(0, (D, HEADS))
    blocks = torch.stack([torch.stack([torch.block_diag(*d[:, g]) for g in range(cell.gates)]) for d in gates])
    found = {
        "x_gates": side_by_side(a["x_gates"].unflatten(-1, (-1, H)), 2).flatten(3),
        "weight_hh": blocks.flatten(1, 2),
        "bias_hh": side_by_side(a["bias_hh"].unflatten(1, (-1, H)), 0).flatten(1),
        "initial": [side_by_side(s, 0) for s in a["initial"]],
        "marks": a.get("marks"),
        "reset": [side_by_side(s, 0) for s in a.get("reset", [])],
    }
    if "params" in a:
        found["params"] = side_by_side(a["params"], 0)
    if "extras" in a:
        found["extras"] = side_by_side(a["extras"], 3)
    return found


def derivatives(outputs, leaves):
    first = torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves, create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first), leaves, allow_unused=True, materialize_grads=True
    )
    return [*outputs, *first, *second]


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "marked", "chosen"), [
    ("lstm", True, {"units": 16}), ("gru", False, {"homes": "registers and shared"}),
    ("everything", True, {"units": 16}),
])  # fmt: skip
def test_heads_are_the_blocks_of_one_matrix(forced, name, marked, chosen):
    """In one slice and in two; both directions, with marks, both orders of derivatives."""
    cell = CELLS[name] if name in CELLS else own_cells.cell_of(name)
    forced(**chosen)
    exact = given(cell, marked)
    one = as_one(cell, exact)
    y, c, finals = reference.recurrent(cell.name, **one)
    truth = derivatives([y, *([] if c is None else [c]), *finals], [*leaves_of(exact).values()])
    arguments = in_dtype(exact, torch.float32)
    before = launch.LAUNCHES.copy()
    with concurrent_grid():
        y, c, finals = autograd.recurrent(cell.name, **arguments, precision="ieee", return_c=True, heads=HEADS)
        outputs = [y, *([] if c is None else [c]), *(side_by_side(s, 0) for s in finals)]
        found = derivatives(outputs, [*leaves_of(arguments).values()])
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}
    for ours, true in zip(found, truth, strict=True):
        assert (ours - true).norm() <= 5e-6 * true.norm()


def test_a_head_is_planned_as_a_layer_of_its_size():
    hardware = DEVICES["h200"]
    tiny = plan_layer(Problem(CELLS["gru"], 8, 16, 1, "bf16", hardware, 8))
    assert "H=64 in 8 heads" in str(tiny)
    assert str(tiny).count("no exchange") == 2
    found = plan_layer(Problem(CELLS["gru"], 64, 16, 1, "bf16", hardware, 8))
    whole = plan_layer(Problem(CELLS["gru"], 512, 16, 1, "bf16", hardware))
    for name in ("forward", "backward"):
        head, one, all_of_it = (getattr(part, name) for part in (tiny, found, whole))
        assert head.tiling.slices == 1
        for part in (head, one):
            assert part.tiling.jobs(16) == 8 * 16 // part.tiling.batch_tile
        assert head.cost.state == 0
        assert one.predicted < all_of_it.predicted
    wide = plan_layer(Problem(CELLS["lstm"], 512, 16, 2, "bf16", hardware, 2))
    assert wide.forward.tiling.slices > 1, "a head that does not fit"
    assert wide.forward.tiling.jobs(16) == 4


def test_a_stack_of_heads_is_refused_one_launch():
    with pytest.raises(ValueError, match="2 layers of 4 heads cannot run in one launch; run them one after the other"):
        launch.plan_of(CELLS["lstm"], 8, 2, 2, 4, torch.zeros(1), "ieee", 4)
