"""Many slices in the concurrent grid: both protocols right under adversarial schedules, and mutants caught."""

import threading
import time

import accuracy
import pytest
import torch
from grid import Delays, concurrent_grid
from persistrnn.kernels import exchange, launch, plan, scan
from persistrnn.kernels.exchange import Exchange

import persistrnn

pytestmark = pytest.mark.interpreter

UNITS = 8


@pytest.fixture
def forced(monkeypatch):
    """forced(protocol, ...): every layer is cut into slices of 8 units, K into parts and chunks."""

    def force(protocol="counter", splits=2, batch_tile=16, groups=None, patience=1 << 23):
        def choose(cell, hidden, batch, directions, dtype, precision, device):
            passes = []
            for backward in (False, True):
                tiling = plan.tiling(
                    launch.shape_of(cell), hidden, directions, backward=backward, units=UNITS, batch_tile=batch_tile,
                    splits=splits, largest_chunk=32, precision="ieee", interpreted=True,
                )  # fmt: skip
                jobs = -(-batch // batch_tile) * directions
                passes.append(plan.Pass(tiling, 4, groups or jobs, 1, 0, 0))
            return plan.Plan(cell.name, hidden, batch, directions, "fp32", plan.INTERPRETER, *passes)

        monkeypatch.setattr(launch, "choose", choose)
        chosen = Exchange(protocol=protocol, poll="atomic", patience=patience)
        monkeypatch.setattr(launch, "exchange_for", lambda device: chosen)

    return force


CASES = [
    # cell, dtype, slices, protocol, batch, layers, bidirectional
    ("lstm", "fp32", 2, "counter", 3, 2, True),
    ("gru", "fp32", 2, "flags", 3, 2, True),
    ("lstm", "bf16", 3, "flags", 17, 1, True),
    ("gru", "fp16", 3, "counter", 17, 1, True),
    ("lstm", "fp16", 4, "counter", 1, 1, False),
    ("gru", "bf16", 4, "counter", 1, 2, False),
    ("lstm", "fp32", 4, "flags", 3, 1, False),
    ("gru", "fp32", 8, "counter", 3, 1, False),
    ("lstm", "bf16", 8, "counter", 3, 1, False),
    ("gru", "fp16", 8, "flags", 1, 1, False),
    ("lstm", "fp16", 8, "flags", 1, 1, False),
]


@pytest.mark.parametrize(("cell", "dtype", "slices", "protocol", "batch", "layers", "bidirectional"), CASES)
@pytest.mark.timeout(240)
def test_many_slices_keep_the_bound(forced, cell, dtype, slices, protocol, batch, layers, bidirectional):
    forced(protocol)
    hidden = slices * UNITS - 3  # the last slice is not full
    case = accuracy.Case(cell, dtype, hidden, batch, 4, layers, bidirectional, True, True)
    bound = accuracy.Bound(accuracy.DTYPES[dtype])
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(seed=slices, programs=slices)):
        bound.add(case, *accuracy.run(case, seed=0))
    assert launch.LAUNCHES - before == {"scan_forward": layers, "scan_backward": layers}
    # The pooled bound is for pools: with a single case, the bound of single cases.
    assert not bound.failures, "\n".join(bound.failures)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_jobs_that_do_not_fit_follow_in_turn(forced, cell):
    """Fewer groups than batch tiles and directions: several launches, with other weights for the other direction."""
    forced(groups=2)
    case = accuracy.Case(cell, "fp32", 13, 35, 3, 1, True, True, True)
    bound = accuracy.Bound(torch.float32)
    before = launch.LAUNCHES.copy()
    with concurrent_grid():
        bound.add(case, *accuracy.run(case, seed=1))
    assert launch.LAUNCHES - before == {"scan_forward": 3, "scan_backward": 3}
    assert not bound.failures, "\n".join(bound.failures)


def error_under(seed: int, slices: int = 3) -> bool:
    """Whether one seeded schedule gives a wrong result (or none)."""
    case = accuracy.Case("lstm", "fp32", slices * UNITS, 2, 6, 1, False, True, True)
    bound = accuracy.Bound(torch.float32)
    try:
        with concurrent_grid(Delays(seed, slices)):
            bound.add(case, *accuracy.run(case, seed))
    except RuntimeError as error:
        if "gave up waiting" not in str(error):
            raise
        return True
    return bool(bound.failures)


SEEDS = range(4)  # one for each operation that a schedule delays


@pytest.mark.parametrize("protocol", ["counter", "flags"])
def test_every_schedule_passes_without_a_mutant(forced, protocol):
    forced(protocol)
    assert not any(error_under(seed) for seed in SEEDS)


def wait_removed(monkeypatch):
    monkeypatch.setattr(scan, "wait", lambda counter, target, patience, *_: patience)


def counter_off_by_one(monkeypatch):
    def wait(counter, target, *others):
        return exchange.wait(counter, target - 1, *others)

    monkeypatch.setattr(scan, "wait", wait)


def store_after_release(monkeypatch):
    late = threading.local()

    def put(*arguments):
        late.__dict__.setdefault("stores", []).append(arguments)

    def arrive(counter, how):
        exchange.arrive(counter, how)
        time.sleep(0.002)
        for arguments in late.stores:
            exchange.put(*arguments)
        late.stores.clear()

    monkeypatch.setattr(scan, "put", put)
    monkeypatch.setattr(scan, "arrive", arrive)


def flag_reset_forgotten(monkeypatch):
    def leave(buffer, part, how):
        buffer.fill_(0.25)

    monkeypatch.setattr(launch, "_flag", leave)


@pytest.mark.parametrize(
    ("mutant", "protocol"),
    [
        (wait_removed, "counter"),
        (counter_off_by_one, "counter"),
        (store_after_release, "counter"),
        (flag_reset_forgotten, "flags"),
    ],
)
@pytest.mark.timeout(240)
def test_mutant_is_caught(forced, monkeypatch, mutant, protocol):
    forced(protocol, patience=20_000)
    mutant(monkeypatch)
    assert any(error_under(seed) for seed in SEEDS)


@pytest.mark.parametrize("protocol", ["counter", "flags"])
def test_wait_that_runs_out_ends_in_an_exception(forced, monkeypatch, protocol):
    """A program that never stores: its group ends, and the call raises."""
    forced(protocol, patience=50)

    def silent(pointer, offsets, mask, stride, tiles, counter, tiling, how):
        if scan.tl.program_id(0).handle.data.item() != 1:
            original(pointer, offsets, mask, stride, tiles, counter, tiling, how)

    original = scan.publish
    monkeypatch.setattr(scan, "publish", silent)
    layer = persistrnn.LSTM(4, 2 * UNITS, backend="persistent")
    with concurrent_grid(), pytest.raises(RuntimeError, match="gave up waiting for another program"):
        layer(torch.randn(5, 2, 4))
    persistrnn.check()  # raised once, then clean


def test_nan_in_the_data_is_not_the_reserved_one(forced):
    """A NaN input reaches the output, and no reader waits for it."""
    forced("flags", patience=2000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = persistrnn.GRU(4, 2 * UNITS, backend="persistent", dtype=dtype)
        x = torch.randn(3, 2, 4, dtype=dtype)
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        x[1, 0] = torch.full((4,), -1, dtype=integer).view(dtype)  # the very pattern
        h0 = torch.zeros(1, 2, 2 * UNITS, dtype=dtype)
        h0[0, 0, 3] = x[1, 0, 0]
        with concurrent_grid(), torch.no_grad():
            y = layer(x)[0]
            assert layer(x, h0)[0][:, 0].isnan().all()
        assert y[1:, 0].isnan().all()
        assert not y[:, 1].isnan().any()


def test_equal_inputs_give_equal_bits_under_any_schedule(forced):
    forced()
    case = accuracy.Case("gru", "bf16", 3 * UNITS, 2, 4, 1, False, True, True)
    results = []
    for seed in range(3):
        with concurrent_grid(Delays(seed, 3)):
            results.append(accuracy.run(case, seed=0)[0])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name
