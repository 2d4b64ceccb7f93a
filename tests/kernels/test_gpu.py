"""On a real GPU: the bound of accuracy.py at real sizes, and what only real concurrency can break.

`make gpu` runs it, with the machine's own torch, Triton and pytest (no plugins are needed).
"""

import itertools
from dataclasses import replace

import accuracy
import pytest
import torch
from gpu import (
    DEVICE,
    REPEATS,
    SEEDS,
    check_bound,
    compiled_kernels,
    count_differences,
    many_slices,
    needs_plan,
    no_waits,
    one_slice,
    operands,
    outputs_and_gradients,
    planned,
    recurrent,
    streams,
    synchronize,
    two_dimensions,
)
from pairs import CELLS, make_layer

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner.plan import BATCH_CLASSES

pytestmark = pytest.mark.gpu

PROTOCOLS = ("counter", "flags")

# (hidden, batch, steps, layers, bidirectional, bias, state)
TINY = [(1, 3, 33, 1, False, True, True), (2, 17, 2, 2, True, True, True), (7, 1, 1, 1, True, False, False)]
SMALL = [
    (16, 1, 100, 2, True, True, True),
    (64, 64, 33, 1, True, False, True),
    (100, 17, 33, 2, False, True, False),
    (128, 3, 2, 1, False, True, True),
]
SLICED = [
    (130, 17, 33, 1, True, True, True),
    (200, 3, 100, 2, True, True, True),
    (256, 64, 33, 1, False, False, True),
    (333, 1, 33, 2, False, True, False),
    (512, 17, 100, 1, True, True, True),
]
LARGE = [
    (640, 64, 33, 1, True, True, True),
    (768, 3, 100, 1, True, True, True),
    (1150, 3, 33, 1, True, True, True),  # rows of W_hh that are no multiple of 16 bytes
    (1840, 17, 33, 1, False, True, True),
]
# The planner splits the backward, at least, of these over two dimensions; 1000 units leave the last block not full.
TWO_DIMENSIONS = [(1000, 3, 33, 1, False, True, True), (1024, 17, 33, 1, True, True, True)]
# Larger than any device's registers and shared memory: (cell, shape).
STREAMED = [
    ("lstm", (2816, 2, 12, 1, False, True, True)),
    ("lstm", (4096, 1, 6, 1, False, True, True)),
    ("gru", (2816, 3, 12, 1, True, True, True)),
]
BATCHES = (1, 8, 16, 32, 64, 128)

PRECISION = [("fp16", "ieee"), ("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]


@pytest.fixture(autouse=True)
def a_gpu():
    """`-m gpu` asks for a GPU: without one the tests fail, for a green run must have run."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device, torch sees none; run them on a machine that has one")
    launch.check()
    yield
    synchronize()
    launch.check()  # no wait ran out unnoticed


@pytest.fixture
def precision(monkeypatch):
    """precision("tf32" or "ieee"): of float32 products in every RNN, torch's and ours."""
    return lambda value: monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", value)


@pytest.fixture
def exchange(monkeypatch):
    """exchange(protocol=..., ...): how slices of launches from now on talk."""

    def choose(**options):
        chosen = Exchange(**options)
        monkeypatch.setattr(launch, "exchange_for", lambda device: chosen)

    return choose


@pytest.fixture
def choices(monkeypatch):
    """choices(plan): launches from now on take the plan's choices, whatever their batch and directions."""

    def keep(plan):
        def choose(cell, hidden, batch, directions, dtype, precision, device, heads=1, weight_dtype=""):
            parts = []
            for part in (plan.forward, plan.backward):
                t = replace(part.tiling, directions=directions)
                jobs, places = t.jobs(batch), plan.hardware.multiprocessors * part.choice.blocks // t.slices
                groups = jobs if t.slices == 1 else min(jobs, places)
                parts.append(replace(part, tiling=t, groups=groups, rounds=-(-jobs // groups)))
            return replace(plan, batch=batch, directions=directions, forward=parts[0], backward=parts[1])

        monkeypatch.setattr(launch, "choose", choose)

    return keep


# Name: (shapes, of what kind the plans are, whether the bound is pooled, seeds). Case by case where a ratio of two
# rounding errors of a few numbers says little, and where each class of batch sizes has a plan of its own.
BOUNDS = {
    "tiny": (TINY, one_slice, False, SEEDS),
    "small": (SMALL, None, True, SEEDS),
    **{f"large {shape[0]}": ([shape], many_slices, True, SEEDS) for shape in LARGE},
    "batches": ([(1024, batch, 12, 1, False, True, True) for batch in BATCHES], many_slices, False, 1),
    "long": ([(1024, 2, 2048, 1, False, True, True)], many_slices, True, SEEDS),
}
OF_PROTOCOLS = {"sliced": (SLICED, many_slices), "two dimensions": (TWO_DIMENSIONS, two_dimensions)}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize(("dtype", "asked"), PRECISION)
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_keep_the_bound(cell, dtype, asked, name, precision):
    precision(asked)
    shapes, expected, pooled, seeds = BOUNDS[name]
    needs_plan(cell, max(shape[0] for shape in shapes), accuracy.DTYPES[dtype])
    check_bound(cell, dtype, asked, shapes, expected, pooled, seeds)


@pytest.mark.parametrize("name", OF_PROTOCOLS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("dtype", "asked"), PRECISION)
@pytest.mark.parametrize("cell", CELLS)
def test_protocols_keep_the_bound(cell, dtype, asked, protocol, name, precision, exchange):
    precision(asked)
    exchange(protocol=protocol)
    shapes, expected = OF_PROTOCOLS[name]
    needs_plan(cell, max(shape[0] for shape in shapes), accuracy.DTYPES[dtype])
    check_bound(cell, dtype, asked, shapes, expected)


@pytest.mark.parametrize(("cell", "shape"), STREAMED, ids=lambda x: x if isinstance(x, str) else f"{x[0]}")
@pytest.mark.parametrize(("dtype", "asked"), PRECISION)
def test_streamed_sizes_keep_the_bound(cell, dtype, asked, shape, precision):
    precision(asked)
    needs_plan(cell, shape[0], accuracy.DTYPES[dtype])
    check_bound(cell, dtype, asked, [shape], streams)


REPEATED = [
    ("lstm", 64, 17, torch.bfloat16),
    ("gru", 512, 64, torch.float16),
    ("lstm", 256, 3, torch.float32),
    ("gru", 1024, 17, torch.bfloat16),
    ("lstm", 1024, 40, torch.bfloat16),
    ("gru", 1150, 3, torch.float32),
    ("lstm", 2816, 2, torch.float16),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("cell", "hidden", "batch", "dtype"), REPEATED)
def test_results_do_not_change_between_runs(cell, hidden, batch, dtype, protocol, exchange):
    """Bitwise, forward and backward: a stale or half-written tile would show."""
    needs_plan(cell, hidden, dtype)
    exchange(protocol=protocol)
    made, cotangents = operands(cell, hidden, batch, 50, 2, dtype)
    expected = outputs_and_gradients(cell, made, cotangents)
    assert all(t.isfinite().all() for t in expected)
    different = [count_differences(outputs_and_gradients(cell, made, cotangents), expected) for _ in range(REPEATS)]
    assert different == [0] * REPEATS


@pytest.mark.parametrize(("cell", "hidden", "batch", "dtype"), REPEATED)
def test_protocols_agree_bitwise(cell, hidden, batch, dtype, exchange):
    needs_plan(cell, hidden, dtype)
    made, cotangents = operands(cell, hidden, batch, 50, 2, dtype)
    found = []
    for protocol in PROTOCOLS:
        exchange(protocol=protocol)
        found.append(outputs_and_gradients(cell, made, cotangents))
    assert count_differences(*found) == 0


@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 64), ("gru", 256), ("lstm", 512), ("gru", 1024)])
def test_batch_tiles_and_directions_do_not_touch_each_other(cell, hidden, choices):
    """All rows and both directions at once, against one tile of rows in one direction at a time, bit for bit."""
    batch = 100
    plan = planned(cell, hidden, batch, 2, torch.bfloat16)
    choices(plan)  # another batch may mean another order of sums
    made, _ = operands(cell, hidden, batch, 20, 2, torch.bfloat16)
    y, *_ = recurrent(cell, *made.values())
    tile = plan.forward.tiling.batch_tile
    for direction, first in itertools.product(range(2), range(0, batch, tile)):
        rows, one = slice(first, first + tile), slice(direction, direction + 1)
        x_gates, _, _, *states = made.values()
        x_gates, states = x_gates[:, rows, one], [s[one, rows] for s in states]
        if direction == 1:
            x_gates = x_gates.flip(0)
        part, *_ = recurrent(cell, x_gates, made["weight_hh"][one], made["bias_hh"][one], *states)
        part = part.flip(0) if direction == 1 else part
        assert torch.equal(y[:, rows, direction * hidden : (direction + 1) * hidden], part), (direction, first)


@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 512), ("gru", 1024)])
def test_more_jobs_than_fit_run_in_rounds(cell, hidden, choices):
    """Not a hang and not an error: later batch tiles wait for a launch of their own, with the same result."""
    needs_plan(cell, hidden, torch.bfloat16)
    plans = [planned(cell, hidden, batch, 2, torch.bfloat16) for batch in (300, 600, 1200, 2400, 4800)]
    plan = next(p for p in plans if p.forward.rounds > 1 and p.backward.rounds > 1)
    choices(plan)
    batch = plan.batch
    made, cotangents = operands(cell, hidden, batch, 5, 2, torch.bfloat16)
    before = launch.LAUNCHES.copy()
    found = outputs_and_gradients(cell, made, cotangents)
    assert launch.LAUNCHES - before == {"scan_forward": plan.forward.rounds, "scan_backward": plan.backward.rounds}
    half = batch // 2
    parts = []
    for rows in (slice(0, half), slice(half, batch)):
        some = {
            n: t if t is None or n.startswith(("weight", "bias")) else t[:, rows].detach().requires_grad_()
            for n, t in made.items()
        }
        parts.append(outputs_and_gradients(cell, some, [c[:, rows] for c in cotangents]))
    names = ["y", "h_n", "c_n"][: len(cotangents)] + [n for n, t in made.items() if t is not None]
    for name, whole, first, second in zip(names, found, *parts, strict=True):
        if name.startswith(("weight", "bias")):
            continue  # sums over the batch, in another order
        # Tiles may start at other rows: each row's numbers do not depend on its tile.
        assert torch.equal(whole, torch.cat([first, second], dim=1)), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("cell", "hidden"), [("lstm", 64), ("lstm", 256), ("gru", 512)])
def test_nan_and_inf_flow_through(cell, hidden, protocol, value, exchange):
    """They reach what they reach in float64, stay in their row, and stop no wait."""
    exchange(protocol=protocol)
    made, cotangents = operands(cell, hidden, 3, 12, 1, torch.float16)
    clean = outputs_and_gradients(cell, made, cotangents)
    with torch.no_grad():
        made["x_gates"][4, 1, 0, 7] = value
    found = outputs_and_gradients(cell, made, cotangents)
    synchronize()
    persistrnn.check()

    others = [0, 2]
    per_row = [0, 1, *([2] if cell == "lstm" else []), len(cotangents)]  # outputs and dx: the batch is axis 1
    for i in per_row:
        assert torch.equal(found[i][:, others], clean[i][:, others])
    assert torch.equal(found[0][:4], clean[0][:4]), "nothing flows back in time"
    x_gates, weight, bias, *states = (t.detach().to("cpu", torch.float64) for t in made.values())
    y, _, finals = persistrnn.reference.recurrent(cell, x_gates, weight, bias, states)
    for ours, true in zip(found, (y, *finals), strict=False):
        assert torch.equal(ours.isnan().cpu(), true.isnan())
    assert found[0].isnan().any() == (value != value) or cell == "gru"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_initial_state_of_any_nan_is_no_hang(protocol, exchange):
    """All bits one is the pattern that the flags protocol reserves; here the caller gives it."""
    exchange(protocol=protocol, spin_limit=1 << 18)
    made, cotangents = operands("gru", 512, 3, 4, 1, torch.float16)
    with torch.no_grad():
        made["h0"].view(torch.int16)[0, 1, 5] = -1
    found = outputs_and_gradients("gru", made, cotangents)
    synchronize()
    persistrnn.check()
    assert found[0][:, 1].isnan().all()
    assert found[0][:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wait_that_runs_out_is_an_error_and_not_a_hang(protocol, exchange):
    made, _ = operands("lstm", 512, 64, 200, 1, torch.bfloat16)
    arguments = [t.detach() for t in made.values()]
    expected, *_ = recurrent("lstm", *arguments)
    exchange(protocol=protocol, spin_limit=1)
    recurrent("lstm", *arguments)
    synchronize()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        persistrnn.check()
    exchange(protocol=protocol)
    found, *_ = recurrent("lstm", *arguments)
    assert torch.equal(found, expected), "the next call is not touched by it"


def test_two_streams():
    """Launches of two streams may wait for room on the device, never for each other."""
    sizes = [("lstm", 512, 64, torch.bfloat16), ("gru", 640, 17, torch.float16)]
    work = [(cell, *operands(cell, hidden, batch, 100, 1, dtype)) for cell, hidden, batch, dtype in sizes]
    expected = [outputs_and_gradients(*item) for item in work]
    streams = [torch.cuda.Stream() for _ in work]
    synchronize()
    different = 0
    for _ in range(20):
        found = []
        for stream, item in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                found.append(outputs_and_gradients(*item))
        synchronize()
        different += sum(count_differences(a, b) for a, b in zip(found, expected, strict=True))
    assert different == 0


def test_a_busy_device_delays_and_does_not_break():
    """Products on another stream hold multiprocessors while the groups want to be resident."""
    made, cotangents = operands("lstm", 512, 128, 100, 2, torch.bfloat16)
    expected = outputs_and_gradients("lstm", made, cotangents)
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    noise = torch.cuda.Stream()
    synchronize()
    for _ in range(5):
        with torch.cuda.stream(noise):
            for _ in range(50):
                torch.mm(a, a, out=b)
        found = outputs_and_gradients("lstm", made, cotangents)
        synchronize()
        assert count_differences(found, expected) == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_never_waits(cell, hidden):
    module = make_layer(cell, 32, hidden, 2, bidirectional=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(20, 17, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step():
        y, _ = module(x)
        assert module.last_path == "persistent", "'auto' takes the kernels on a GPU"
        y.sum().backward()
        with torch.no_grad():
            module(x)

    step()
    synchronize()
    with no_waits():
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()  # the trap is armed
        step()


@pytest.mark.parametrize("hidden", [100, 512, 1024])
@pytest.mark.parametrize("cell", CELLS)
def test_only_a_new_class_of_batches_compiles(cell, hidden):
    """A new length never does, nor does a new batch of a known class or one that is planned like a known one."""
    needs_plan(cell, hidden, torch.float16)
    known = set()

    def step(batch, steps):
        """How many kernels this compiled, and how many it may: forward with and without saving, backward."""
        before = compiled_kernels()
        made, cotangents = operands(cell, hidden, batch, steps, 1, torch.float16)
        outputs_and_gradients(cell, made, cotangents)
        with torch.no_grad():
            recurrent(cell, *made.values())
        plan = planned(cell, hidden, batch, 1, torch.float16)
        passes = {(n, part.tiling, part.choice) for n, part in ((2, plan.forward), (1, plan.backward))}
        allowed = sum(n for n, *_ in passes - known)
        known.update(passes)
        return compiled_kernels() - before, allowed

    first = 1
    for last in BATCH_CLASSES[:3]:
        compiled, allowed = step(last, 7)
        assert compiled <= allowed, f"B={last}"
        for batch, steps in ((first, 1), (first, 16), ((first + last) // 2, 33), (last, 2)):
            assert step(batch, steps) == (0, 0), f"B={batch}, T={steps} compiled a kernel"
        first = last + 1
    step(BATCH_CLASSES[-1], 2)
    assert step(BATCH_CLASSES[-1] + 100, 3) == (0, 0), "larger batches are of the last class"
    assert compiled_kernels() >= 3


def test_precision_of_float32_products_is_torchs_setting(precision):
    made, _ = operands("lstm", 256, 16, 20, 1, torch.float32)
    arguments = [t.detach() for t in made.values()]
    x_gates, weight, bias, *states = (t.double() for t in arguments)
    truth = persistrnn.reference.recurrent("lstm", x_gates, weight, bias, states).y
    errors = {}
    for asked in ("ieee", "tf32"):
        precision(asked)
        y, *_ = recurrent("lstm", *arguments, precision=persistrnn.calls.precision())
        errors[asked] = ((y - truth).norm() / truth.norm()).item()
    assert errors["ieee"] < 1e-6
    assert 1e-5 < errors["tf32"] < 1e-2


@pytest.mark.parametrize("cell", CELLS)
def test_offsets_past_31_bits(cell):
    """More than 2**31 gates: the whole sequence against its two halves, bit for bit, forward and backward."""
    hidden, batch = 1024, 8
    needs_plan(cell, hidden, torch.float16)
    gates = CELLS[cell].gates
    steps = 2 * (2**30 // (batch * gates * hidden) + 5_000)
    elements = steps * batch * gates * hidden
    assert elements > 2**31
    needed = 12 * 2 * elements
    if (free := torch.cuda.mem_get_info()[0]) < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, {free >> 30} are free")
    made, cotangents = operands(cell, hidden, batch, steps, 1, torch.float16)
    whole = outputs_and_gradients(cell, made, cotangents)
    half = steps // 2
    dy, *d_final = cotangents
    x_gates, weight, bias, *initial = made.values()
    with torch.no_grad():
        _, *middle = recurrent(cell, x_gates[:half], weight, bias, *initial)
    halves, names = [], list(made)
    for part in (1, 0):  # the second half first: its gradients of the state are the first half's
        start = middle if part else initial
        some = dict(zip(names, (x_gates[half:] if part else x_gates[:half], weight, bias, *start), strict=True))
        some = {n: t.detach().requires_grad_() for n, t in some.items()}
        result = outputs_and_gradients(cell, some, [dy[half:] if part else dy[:half], *d_final])
        d_final = result[len(cotangents) + 3 :]
        halves.insert(0, result)
    n = len(cotangents)
    assert torch.equal(whole[0], torch.cat([halves[0][0], halves[1][0]])), "y"
    assert torch.equal(whole[1], halves[1][1]), "h_n"
    assert torch.equal(whole[n][half:], halves[1][n]), "dx_gates of the second half"
    assert whole[n].isfinite().all()
    # The halves hand the gradient of the state over in float16, the whole keeps it in float32.
    torch.testing.assert_close(whole[n][:half], halves[0][n], rtol=2e-2, atol=2e-3)
