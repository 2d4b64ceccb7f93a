"""Cells with parameters, extras, states after the step and wider inputs, on every path that the kernels have."""

import numpy as np
import own_cells
import pytest
import torch
from emulated import scans
from grid import concurrent_grid
from recurrences import B, H, T, broken, given, in_dtype, leaves_of, results

from persistrnn import autograd, reference, step_marks, time_chunks
from persistrnn.kernels import launch
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.planner import pipeline
from persistrnn.kernels.planner.hardware import DEVICES
from persistrnn.kernels.planner.problem import Problem

NAMES = list(own_cells.DECLARED)


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes in NumPy, which warns of what a cell makes of the zeros where there is no unit."""
    with np.errstate(all="ignore"):
        yield


def assert_true(found, truth, within=2e-6):
    assert set(found) == set(truth)
    for name, exact in truth.items():
        assert (found[name] - exact).norm() <= within * exact.norm() + 1e-9, name


@pytest.mark.interpreter
@pytest.mark.parametrize(("directions", "marked"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_derivatives_are_those_of_the_step(name, directions, marked):
    """In one slice, with units past H; both orders of derivatives, every c among the outputs."""
    cell = own_cells.cell_of(name)
    arguments = given(cell, directions, marked=marked)
    before = launch.LAUNCHES.copy()
    found = results(autograd.recurrent, cell, arguments, 2, precision="ieee", return_c=True)
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}
    assert_true(found, results(reference.recurrent, cell, in_dtype(arguments, torch.float64), 2))


@pytest.mark.interpreter
def test_a_nan_in_a_skipped_step_reaches_no_gradient():
    cell = own_cells.cell_of("everything")
    arguments = given(cell, 2, marked=True)
    skipped = (arguments["marks"] == step_marks.SKIPPED).unsqueeze(-1)
    assert skipped.any()
    found = []
    for value in (0.0, float("nan")):
        x_gates = torch.where(skipped, value, arguments["x_gates"].detach()).requires_grad_()
        found.append(results(autograd.recurrent, cell, arguments | {"x_gates": x_gates}, precision="ieee"))
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


# ---- every dtype, split and home ------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "dtype", "chosen"), [
    ("everything", torch.bfloat16, {"units": 16}),  # one slice, with units past H
    ("rnn", torch.bfloat16, {"homes": "registers and shared"}),
    ("slstm", torch.float16, {"homes": "registers and shared", "k_parts": 2}),
    ("peephole", torch.float32, {"homes": "shared and stream"}),
    ("highway", torch.bfloat16, {"homes": "stream", "k_parts": 2}),
    ("zoneout", torch.float16, {"homes": "registers", "subtiles": 2, "batch_tile": 8}),
    ("everything", torch.float32, {"homes": "registers", "subtiles": 2, "batch_tile": 8, "protocol": "flags"}),
])  # fmt: skip
def test_any_split_keeps_the_bound(forced, name, dtype, chosen):
    cell = own_cells.cell_of(name)
    forced(**chosen)
    arguments = in_dtype(given(cell, directions=2, batch=11, marked=True, hidden=14), dtype)
    before = launch.LAUNCHES.copy()
    with concurrent_grid():
        failures = broken(cell, dtype, arguments)
    assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}
    assert not failures, "\n".join(failures)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_a_long_sequence_in_bfloat16_keeps_the_bound(name):
    """Outcomes of comparisons that were formed again from rounded tiles would show after some dozen steps."""
    cell = own_cells.cell_of(name)
    failures = broken(cell, torch.bfloat16, in_dtype(given(cell, steps=48), torch.bfloat16))
    assert not failures, "\n".join(failures)


# ---- chunks of time, stacks, transforms -----------------------------------------------------------------------------


CHUNKED = [
    ("rnn", "state"), ("peephole", "state"), ("slstm", "state"), ("highway", "gates"), ("zoneout", "checkpoint"),
    ("everything", "gates"), ("everything", "state"), ("everything", "checkpoint"),
]  # fmt: skip


def whole(cell, x, weights, initial, marks, reset, extras):
    """The same layers by the reference."""
    layers, y, finals = time_chunks.layers_of(cell, weights), x, []
    states, anew = (time_chunks.by_layer(s, len(layers)) for s in (initial, reset))
    for i, layer in enumerate(layers):
        y = step_marks.without_skipped(y, marks)
        x_gates = time_chunks.gates_of([y] * layer.weight_ih.size(0), layer)
        beside = {"params": layer.params, "extras": None if extras is None else extras[i : i + 1]}
        found = reference.recurrent(cell, x_gates, *layer[2:4], states[i], marks, anew[i], **beside)
        y = found.y
        finals.append(found.finals)
    return y, found.c, [torch.cat(s) for s in zip(*finals, strict=True)]


def chunked_arguments(cell, layers, directions, marked):
    arguments = [given(cell, directions, marked=marked, seed=i) for i in range(layers)]
    generator, weights = torch.Generator().manual_seed(3), []
    for one in arguments:
        shape = directions, cell.inputs * H
        of_input = [torch.randn(*shape, H, generator=generator) / H**0.5, torch.randn(shape, generator=generator)]
        weights += [*(t.requires_grad_() for t in of_input), one["weight_hh"], one["bias_hh"]]
        weights += [one["params"]] if cell.params else []
    x = torch.randn(T, B, H, generator=generator).requires_grad_()
    states = [torch.cat(s).detach().requires_grad_() for s in zip(*(one["initial"] for one in arguments), strict=True)]
    reset = [torch.cat(s).detach().requires_grad_() for s in zip(*(a.get("reset", []) for a in arguments), strict=True)]
    extras = torch.cat([one["extras"] for one in arguments]) if cell.extras else None
    return x, weights, states, arguments[0].get("marks"), reset, extras


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "save"), CHUNKED)
def test_in_chunks_of_time(name, save):
    """All modes of what is kept, with marks; of the cell that has everything both orders of derivatives."""
    cell, (layers, directions) = own_cells.cell_of(name), (2, 1) if save == "checkpoint" else (1, 2)
    x, weights, states, marks, reset, extras = chunked_arguments(cell, layers, directions, True)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *states, *reset)]
        given_weights, rest = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        initial, anew = rest[: cell.states], rest[cell.states :]
        if dtype == torch.float32:
            how = save, "ieee", 2, marks, anew, False, None, extras
            y, _, finals = time_chunks.recurrent(cell.name, leaves[0], given_weights, initial, *how)
        else:
            y, _, finals = whole(cell.name, leaves[0], given_weights, initial, marks, anew, extras)
        loss = y.sin().sum() + sum((i + 1) * s.square().sum() for i, s in enumerate(finals))
        twice = name == "everything"
        first = torch.autograd.grad(loss, leaves, create_graph=twice)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves) if twice else ()
        found.append({str(i): t.detach().double() for i, t in enumerate((y, *finals, *first, *second))})
    assert_true(*found, within=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("peephole", {}),
        ("zoneout", {}),
        ("slstm", {}),
        ("gated", {}),
        ("peephole", {"k_parts": 2}),
        ("rnn_tanh", {"k_parts": 2}),
        ("mgu", {"k_parts": 2}),
    ],
)
def test_a_stack_in_one_launch(pipelines, name, chosen):
    """Parameters and extras of each layer."""
    pipelines(**chosen)
    cell = own_cells.cell_of(name)
    x, weights, states, marks, reset, extras = chunked_arguments(cell, 2, 1, True)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights, *states, *reset)]
        given_weights, rest = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        initial, anew = rest[: cell.states], rest[cell.states :]
        if dtype == torch.float32:
            layers = time_chunks.layers_of(cell.name, given_weights)
            x_gates = time_chunks.gates_of([leaves[0]], layers[0])
            stacked = [torch.cat(t) for t in zip(*(layer[2 : 4 + bool(cell.params)] for layer in layers), strict=True)]
            before = launch.LAUNCHES.copy()
            with concurrent_grid():
                y, _, finals = autograd.recurrent(
                    cell.name, x_gates, *stacked[:2], initial, "ieee", marks, anew, weight_ih=layers[1].weight_ih,
                    bias_ih=layers[1].bias_ih, params=stacked[2] if cell.params else None, extras=extras,
                )  # fmt: skip
                loss = y.sin().sum() + sum((i + 1) * s.square().sum() for i, s in enumerate(finals))
                first = torch.autograd.grad(loss, leaves)
            assert launch.LAUNCHES - before == {"scan_forward": 1, "scan_backward": 1}
        else:
            y, _, finals = whole(cell.name, leaves[0], given_weights, initial, marks, anew, extras)
            loss = y.sin().sum() + sum((i + 1) * s.square().sum() for i, s in enumerate(finals))
            first = torch.autograd.grad(loss, leaves)
        found.append({str(i): t.detach().double() for i, t in enumerate((y, *finals, *first))})
    assert_true(*found, within=5e-6)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, {"units": 16}), (torch.bfloat16, {"homes": "shared"})])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_kernels_keep_the_bound(emulated, forced, monkeypatch, arch, dtype, chosen):
    """In one slice, whose units past H have gradients that are no numbers, and in two."""
    cell = own_cells.cell_of("everything")
    session = emulated(arch)
    forced(**chosen)
    failures = broken(cell, dtype, in_dtype(given(cell, hidden=13, marked=True), dtype))
    assert not failures, "\n".join(failures)
    assert {*scans(session)} == {"scan_forward", "scan_backward"}


@pytest.mark.audit
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_do_not_spill(name, backward):
    cell = own_cells.cell_of(name)
    row = audit.audit(audit.Case(cell.name, backward, "bf16", 1024, "sm_90"))
    assert row.failures == "", row
    assert row.registers <= audit.planned(audit.Case(cell.name, backward, "bf16", 1024, "sm_90")).registers


# ---- torch.func, torch.compile, what is refused ---------------------------------------------------------------------


@pytest.mark.interpreter
def test_gradients_per_sample():
    """vmap of grad equals grad one by one."""
    cell = own_cells.cell_of("everything")
    many = [given(cell, 2, marked=True, seed=i) for i in range(2)]
    names = [n for n in many[0] if n not in ("weight_hh", "bias_hh", "params")]
    shared = {n: many[0][n].detach() for n in ("weight_hh", "bias_hh", "params")}

    def loss(params, one):
        y, _, finals = autograd.recurrent(cell.name, **(shared | {"params": params} | one), precision="ieee")
        return y.square().sum() + sum(s.sum() for s in finals)

    each = [{n: one[n] for n in names} for one in many]
    together = torch.utils._pytree.tree_map(lambda *t: torch.stack(t).detach(), *each)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(shared["params"], together)
    for i, one in enumerate(each):
        alone = torch.func.grad(loss)(shared["params"], torch.utils._pytree.tree_map(torch.Tensor.detach, one))
        torch.testing.assert_close(found[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["everything", "rnn"])
def test_operators_keep_the_contract_of_torch_library(name):
    cell = own_cells.cell_of(name)
    a = in_dtype(given(cell, 2, marked=True), torch.float32, leaves=False)
    weights = [a["weight_hh"], a["bias_hh"], None, None, a.get("params")]
    beside = a["marks"], a.get("extras")
    forward = cell.name, "ieee", True, False, None, 1, a["x_gates"], weights, *beside, a["initial"], a["reset"]
    torch.library.opcheck(torch.ops.persistrnn.scan_forward.default, forward)
    kept = torch.ops.persistrnn.scan_forward(*forward)
    d_final = [torch.randn_like(s) for s in a["initial"]]
    backward = (
        cell.name,
        "ieee",
        True,
        1,
        weights[0],
        None,
        weights[4],
        *beside,
        kept,
        d_final,
        [torch.randn(T, B, 2, H)],
    )
    torch.library.opcheck(torch.ops.persistrnn.scan_backward.default, backward)


@pytest.mark.interpreter
def test_compiles_into_one_graph():
    cell = own_cells.cell_of("everything")
    arguments = given(cell)

    def run(arguments):
        y, c, finals = autograd.recurrent(cell.name, **arguments, precision="ieee", return_c=True)
        return y.sum() + c.sin().sum() + sum(s.square().sum() for s in finals)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(arguments), list(leaves_of(arguments).values())) for f in (run, compiled))
    torch.testing.assert_close(found, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("missing", ["params", "extras"])
def test_what_a_cell_takes_must_be_given(missing):
    cell = own_cells.cell_of("everything")
    arguments = given(cell)
    del arguments[missing]
    with pytest.raises(ValueError, match=f"everything.* takes {missing} .*got 0"):
        autograd.recurrent(cell.name, **arguments, precision="ieee")


def test_a_stack_of_a_cell_with_wider_input_is_refused_one_launch():
    for name in ("highway", "everything"):
        cell = own_cells.cell_of(name)
        problem = Problem(cell, 256, 16, 1, "bf16", DEVICES["h200"])
        assert pipeline.plan_pipeline(problem, 2) is None
        assert "tiles of input" in pipeline.obstacle(cell)
        with pytest.raises(ValueError, match=r"cannot run in one launch.*one after the other"):
            launch.plan_of(cell, 8, 2, 2, 1, torch.zeros(1), "ieee")
    assert pipeline.plan_pipeline(Problem(own_cells.cell_of("peephole"), 256, 16, 1, "bf16", DEVICES["h200"]), 2)
