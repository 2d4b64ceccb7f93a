"""A layer pipeline: right in the concurrent grid under adversarial schedules, its mutants caught, its plan sound, its
kernels proven from compiled code."""

import dataclasses
import threading

import accuracy
import pytest
import torch
from asked import asked
from forced import tilings
from grid import Delays, concurrent_grid
from pairs import CELLS

import persistrnn
from persistrnn import autograd, decide
from persistrnn.kernels import launch
from persistrnn.kernels.device import exchanged_product, scan
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.planner import pipeline
from persistrnn.kernels.planner.hardware import DEVICES, INTERPRETER
from persistrnn.kernels.planner.problem import BYTES, Problem

H200 = DEVICES["h200"]
SHAPES = CELLS


# H: the last slice and the last tile of K are seldom full; batch tiles full, not full, empty; jobs in turn.
CASES = [
    # cell, dtype, protocol, hidden, batch, layers, bias, state, chosen
    ("lstm", "fp16", "counter", 13, 3, 2, True, True, {}),
    ("gru", "fp32", "flags", 13, 3, 3, True, True, {"splits": 2}),
    ("lstm", "bf16", "flags", 14, 3, 4, False, False, {"homes": "shared"}),
    ("gru", "bf16", "counter", 29, 2, 3, True, False, {"homes": "registers and shared", "units": 16}),
    ("gru", "fp16", "flags", 22, 11, 2, False, True, {"subtiles": 2, "batch_tile": 8, "homes": "shared"}),
    ("lstm", "fp32", "flags", 16, 17, 2, True, True, {"groups": 1, "homes": "registers and shared"}),
    # The backward in two dimensions: a part of K not full, without units, several batch tiles, all cells.
    ("lstm", "fp32", "counter", 29, 3, 3, True, True, {"k_parts": 2}),
    ("gru", "bf16", "flags", 62, 2, 2, True, False, {"k_parts": 2, "units": 16, "homes": "registers and shared"}),
    ("lstm", "bf16", "counter", 17, 3, 2, True, True, {"k_parts": 4, "homes": "shared"}),
    ("gru", "fp32", "counter", 29, 11, 2, True, True, {"k_parts": 2, "subtiles": 2, "batch_tile": 8}),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(str(x) for x in CASES[i][:6]))
def test_pipelines_keep_the_bound(pipelines, index):
    cell, dtype, protocol, hidden, batch, layers, bias, state, chosen = CASES[index]
    pipelines(protocol, **chosen)
    case = accuracy.Case(cell, dtype, hidden, batch, 4, layers, False, bias, state)
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(("put", "arrive", "wait", "get")[index % 4], slow=index % 2)):
        assert accuracy.failures(case, seed=index) == []
    rounds = 1 if "groups" not in chosen else -(-batch // 16)
    assert launch.LAUNCHES - before == {"scan_forward": rounds, "scan_backward": rounds}, "one launch for all layers"


@pytest.mark.interpreter
def test_without_gradients_only_the_ends_are_kept(pipelines):
    """The same bits, from a c of which only the edges are in memory."""
    pipelines(homes="shared")
    torch.manual_seed(0)
    layer = persistrnn.LSTM(5, 13, 3, backend="persistent")
    x = torch.randn(4, 3, 5)
    with concurrent_grid():
        expected = layer(x)
        with torch.no_grad():
            found = layer(x)
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b.detach())


@pytest.mark.interpreter
def test_one_step(pipelines):
    pipelines()
    with concurrent_grid():
        assert accuracy.failures(accuracy.Case("gru", "fp32", 13, 2, 1, 3, False, True, True)) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("protocol", "operation"), [("counter", "put"), ("flags", "arrive"), ("counter", "wait"), ("flags", "get")]
)
def test_every_schedule_passes_without_a_mutant(pipelines, protocol, operation):
    pipelines(protocol)
    assert wrong("gru", operation) == []


def wrong(cell, operation="arrive", seconds=0.01):
    case = accuracy.Case(cell, "fp32", 13, 3, 4, 2, False, True, True)
    with concurrent_grid(Delays(operation, slow=0, seconds=seconds)):
        return accuracy.failures(case, seed=3)


@pytest.mark.interpreter
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_that_does_not_wait_for_its_neighbour_is_caught(pipelines, monkeypatch, cell, backward):
    pipelines()
    accumulate, program = scan.accumulate, threading.local()

    def hasty(weights, ahead, accs, pointer, rows, j, who, steps_needed, sync, spin_limit, tiling, how):
        # Of the two products of a step the neighbour's comes first; the backward forms its first one before the loop.
        turn = program.__dict__.setdefault("turn", 0)
        program.turn = turn + 1
        if tiling.backward == backward and (turn == 0 or turn % 2 == backward):
            steps_needed = steps_needed * 0
        return accumulate(weights, ahead, accs, pointer, rows, j, who, steps_needed, sync, spin_limit, tiling, how)

    for module in (scan, exchanged_product):
        monkeypatch.setattr(module, "accumulate", hasty)
    # A loaded machine may run the programs one after the other: the slow one is then slowed further.
    assert any(wrong(cell, seconds=seconds) for seconds in (0.01, 0.1, 1.0))


# Two unit groups by two parts of K, in which program 0 is late with, or at adding, the partial products.
SUMS = ("get", "announce", "await_count", "read")


def wrong_in_two_dimensions(operation, seconds=0.3):
    case = accuracy.Case("lstm", "fp32", 29, 3, 4, 2, False, True, True)
    with concurrent_grid(Delays(operation, slow=0, seconds=seconds, every=4)):
        return accuracy.failures(case, seed=3)


@pytest.mark.interpreter
@pytest.mark.parametrize("operation", SUMS)
def test_every_schedule_of_the_sums_passes_without_a_mutant(pipelines, operation):
    pipelines(k_parts=2)
    assert wrong_in_two_dimensions(operation) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "turn_of", [lambda turn: turn - (turn > 0), lambda turn: turn - 1], ids=["all but the first", "all"]
)
def test_sums_that_forget_the_one_before_the_loop_are_caught(pipelines, monkeypatch, turn_of):
    """Counted, and put, as if the loop's first exchange of partial products were the first of all."""
    pipelines(k_parts=2)
    sum_parts = scan.sum_parts

    def early(tiles, j, program, turn, *others):
        number = turn.handle.data.item() if hasattr(turn, "handle") else int(turn)
        return sum_parts(tiles, j, program, turn_of(number), *others)

    for module in (scan, exchanged_product):
        monkeypatch.setattr(module, "sum_parts", early)
    # A loaded machine may run the programs one after the other: the slow one is then slowed further.
    assert any(wrong_in_two_dimensions(operation, seconds) for seconds in (0.3, 3.0) for operation in SUMS)


@pytest.mark.interpreter
def test_equal_inputs_give_equal_bits_under_any_schedule(pipelines):
    pipelines(k_parts=2, homes="registers and shared")
    case, results = accuracy.Case("gru", "bf16", 29, 3, 3, 3, False, True, True), []
    for slow, operation in enumerate(("put", "read", "wait")):
        with concurrent_grid(Delays(operation, slow)):
            results.append(accuracy.run(case, seed=0)[0])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


def test_only_a_backward_is_split_in_two_dimensions():
    (_, forward), (_, backward) = tilings("lstm", 64, k_parts=2)
    assert dataclasses.replace(backward, layers=2).sums == 2 * backward.sums
    with pytest.raises(ValueError, match="the forward of a pipeline of 2 layers has 2 parts of K"):
        dataclasses.replace(forward, layers=2)


@pytest.mark.interpreter
def test_a_gradient_told_before_it_is_stored_is_caught(pipelines, monkeypatch):
    """The GRU's dx is told together with dr: stored after the announcement it is too late for the layer below."""
    pipelines()
    put_tiles, arrive, accumulate, program = scan.put_tiles, scan.arrive, scan.accumulate, threading.local()
    read = threading.Event()

    def held(pointer, offsets, mask, stride, tiles, tiling, how):
        if tiling.backward and "dx" not in program.__dict__:
            program.dx = pointer, offsets, mask, stride, tiles, tiling, how
        else:
            put_tiles(pointer, offsets, mask, stride, tiles, tiling, how)

    def announced(counter, how):
        arrive(counter, how)
        if "dx" in program.__dict__:
            # Whatever the machine's load, a program of the layer below has read by now what was told, and is not there.
            assert read.wait(60)
            put_tiles(*program.dx)
            del program.dx

    def reading(*given):
        found = accumulate(*given)
        steps_needed, tiling = given[7], given[-2]
        if tiling.backward and steps_needed.handle.data.item() > 0:
            read.set()
        return found

    monkeypatch.setattr(scan, "put_tiles", held)
    monkeypatch.setattr(scan, "arrive", announced)
    for module in (scan, exchanged_product):
        monkeypatch.setattr(module, "accumulate", reading)
    assert wrong("gru")


def test_the_interpreter_has_no_pipelines():
    assert launch.choose_stack(CELLS["lstm"], 64, 2, 8, torch.float32, "ieee", torch.device("cpu")) is None
    assert launch.hardware(torch.device("cpu")) is INTERPRETER


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("device", ["h200", "a100", "b200", "rtx4090"])
@pytest.mark.parametrize("cell", SHAPES)
def test_plans_are_sound(cell, device, dtype):
    """All layers of a job are there at the same time, all weights have a home, and every job is done."""
    hardware, found = DEVICES[device], 0
    for hidden in (20, 64, 130, 256, 384, 512, 600):
        for layers in (2, 3, 4, 8):
            for batch in (1, 16, 64, 200):
                together = pipeline.plan_pipeline(Problem(SHAPES[cell], hidden, batch, 1, dtype, hardware), layers)
                if together is None:
                    continue
                found += 1
                for part in (together.forward, together.backward):
                    t = part.tiling
                    assert t.layers == layers
                    assert t.slices > 1
                    assert t.k_parts == 1 or part is together.backward
                    assert t.streamed == 0
                    assert t.slices * t.units >= hidden
                    assert t.slices * layers * part.groups <= hardware.multiprocessors
                    assert part.groups * part.rounds >= t.jobs(batch) > part.groups * (part.rounds - 1)
                    assert part.shared <= hardware.shared
                    assert part.in_registers + part.in_shared >= 2 * t.m * t.segments * t.depth * BYTES[dtype]
    assert found > 10


def test_a_pipeline_is_taken_where_it_is_predicted_to_win():
    found = pipeline.plan_pipeline(Problem(SHAPES["lstm"], 512, 16, 1, "bf16", H200), 4)
    assert found.forward.predicted < found.layered[0]
    assert found.backward.predicted < found.layered[1] / 2, "in two dimensions"
    assert found.backward.tiling.k_parts > 1
    assert found.faster(256, backward=True)
    assert not found.faster(1, backward=True), "three steps more than one"
    assert pipeline.plan_pipeline(Problem(SHAPES["lstm"], 1024, 16, 1, "bf16", H200), 4) is None, (
        "16 matrices of 2 MiB and more"
    )


def test_what_fits_with_16_rows_fits_with_any():
    """torch.compile asks once for all batch sizes."""
    for cell in SHAPES:
        for hidden in range(16, 640, 24):
            for layers in (2, 3, 5):
                if pipeline.plan_pipeline(Problem(SHAPES[cell], hidden, 16, 1, "bf16", H200), layers) is not None:
                    for batch in (1, 8, 9, 33, 64, 100, 500, 5000):
                        assert (
                            pipeline.plan_pipeline(Problem(SHAPES[cell], hidden, batch, 1, "bf16", H200), layers)
                            is not None
                        )


@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
def test_a_pipeline_has_two_layers_of_one_direction(layers, directions):
    with pytest.raises(
        ValueError, match=rf"at least 2 layers, one direction and one head, got {layers}, {directions} and 1"
    ):
        pipeline.plan_pipeline(Problem(SHAPES["gru"], 64, 8, directions, "bf16", H200), layers)


@pytest.mark.audit
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("cell", "dtype", "hidden", "layers", "batch", "arch"),
    [
        ("lstm", "bf16", 512, 4, 16, "sm_90"),
        ("lstm", "bf16", 512, 4, 16, "sm_100"),  # in registers, K of 4096 bytes spills
        ("gru", "bf16", 512, 4, 16, "sm_90"),
        ("gru", "tf32", 256, 4, 16, "sm_80"),
        ("lstm", "fp16", 508, 3, 4, "sm_100"),
    ],
)
def test_both_matrices_stay_where_the_plan_says(cell, dtype, hidden, layers, batch, arch, backward):
    row = audit.audit(audit.Case(cell, backward, dtype, hidden, arch, batch, 1, layers))
    assert row.failures == "", row
    assert row.streamed == 0
    assert row.in_registers + row.in_shared > 0


@pytest.mark.interpreter
def test_operators_are_sound(pipelines):
    """Fakes have the shapes, dtypes and strides of the real ones, and nothing aliases."""
    pipelines()
    cell = "lstm"  # whose c has the axis of layers, too
    x_gates, *weights = arguments(cell)
    weights, initial = weights[:4], weights[4:]
    given = cell, "ieee", True, False, None, 1, x_gates, weights, None, None, initial, []
    with concurrent_grid():
        torch.library.opcheck(torch.ops.persistrnn.scan_forward.default, given)
        kept = torch.ops.persistrnn.scan_forward(*given)
        d_final = [torch.randn(2, 3, 13) for _ in initial]
        d_outputs = [torch.randn(2, 3, 1, 13)]
        given = cell, "ieee", False, 1, weights[0], weights[2], *(None,) * 3, kept, d_final, d_outputs
        torch.library.opcheck(torch.ops.persistrnn.scan_backward.default, given)


def arguments(cell, rows=()):
    """x_gates, weight_hh, bias_hh, weight_ih, bias_ih and the states of a stack: T=2, B=3, H=13, L=2."""
    torch.manual_seed(0)
    gates = CELLS[cell].gates * 13
    shapes = [(2, 3, 1, gates), (2, gates, 13), (2, gates), (1, gates, 13), (1, gates)]
    shapes += [(2, 3, 13)] * CELLS[cell].states
    return [torch.randn(*rows, *shape) / 4 for shape in shapes]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("cell", "mapped"), [("lstm", (0, None, None, None, None, 0, 0)), ("gru", (None, 0, 0, None, None, None))]
)
def test_gradients_per_sample(pipelines, cell, mapped):
    """vmap of grad equals grad one by one, with the weights shared (one launch) and with weights of each sample."""
    pipelines()
    many, one = arguments(cell, rows=(2,)), arguments(cell)
    given = [a if m == 0 else b for a, b, m in zip(many, one, mapped, strict=True)]
    numbers = tuple(range(len(one)))

    def loss(x_gates, weight_hh, bias_hh, weight_ih, bias_ih, *initial):
        more = {"weight_ih": weight_ih, "bias_ih": bias_ih}
        y, _, finals = autograd.recurrent(cell, x_gates, weight_hh, bias_hh, initial, "ieee", **more)
        return y.square().sum() + sum(s.sin().sum() for s in finals)

    with concurrent_grid():
        found = torch.func.vmap(torch.func.grad(loss, argnums=numbers), in_dims=mapped)(*given)
        for i in range(2):
            sample = [t if m is None else t[i] for t, m in zip(given, mapped, strict=True)]
            expected = torch.func.grad(loss, argnums=numbers)(*sample)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-6)


@pytest.mark.interpreter
def test_compiles_as_one_graph(pipelines):
    """For every T and B."""
    pipelines()
    layer = persistrnn.LSTM(5, 13, 2, backend="persistent")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with concurrent_grid():
        for steps, batch in ((3, 2), (4, 5)):
            x = torch.randn(steps, batch, 5)
            expected, found = layer(x)[0], compiled(x)[0]
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (found, expected)]
            torch.testing.assert_close(*gradients)


def test_stacks_that_are_no_pipelines(monkeypatch):
    """One layer, two directions, dropout between, or float32 products of two precisions: layer after layer."""
    monkeypatch.setattr(decide, "matmul_precision", lambda: "ieee")
    two = asked(hidden=16, num_layers=2, dtype=torch.bfloat16, precision="tf32")
    may = decide.may_be_pipeline
    assert may(two)
    assert not may(two._replace(num_layers=1))
    assert not may(two._replace(directions=2))
    assert not may(two._replace(dropout=0.1))
    assert not may(two._replace(proj_size=4))
    assert not may(two._replace(save="state")), "a pipeline keeps all gates"
    full = two._replace(dtype=torch.float32)
    assert not may(full)
    monkeypatch.setattr(decide, "matmul_precision", lambda: "tf32")
    assert may(full)
    assert not decide.runs_as_pipeline(two), "on a CPU"


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_precision_of_products_outside(setting):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert decide.matmul_precision() == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.interpreter
def test_dropout_between_layers_runs_layer_after_layer(pipelines):
    pipelines()
    layer = persistrnn.LSTM(5, 13, 2, dropout=0.5, backend="persistent")
    x = torch.randn(2, 3, 5)
    before = launch.LAUNCHES.copy()
    with torch.no_grad():
        layer(x)  # layer after layer, each one slice in the interpreter
    assert launch.LAUNCHES - before == {"scan_forward": 2}
    with concurrent_grid(), torch.no_grad():
        layer.eval()(x)
    assert launch.LAUNCHES - before == {"scan_forward": 3}
