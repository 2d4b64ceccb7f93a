"""Many slices in the concurrent grid: every split, home and protocol right under adversarial schedules, and mutants
caught."""

import accuracy
import mutants
import pytest
import torch
import triton
import triton.language as tl
from forced import HOMES, poll, tilings
from grid import EXCHANGE, Delays, concurrent_grid

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.device import exchange, exchanged_product, scan

pytestmark = pytest.mark.interpreter

UNITS = 8


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    """What nobody has written is NaN, and not by chance the right number of an earlier launch."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


RING = {"batch_tile": 64, "ring": 3}

# One batch tile of 16 rows in each job, one dimension, unless said otherwise. H: the last slice, the last tile of K and
# the last part of K are seldom full, and rows of W_hh are seldom multiples of 16 bytes.
CASES = [
    # cell, dtype, protocol, hidden, batch, layers, bidirectional, chosen
    ("lstm", "fp32", "counter", 13, 3, 2, True, {"homes": "registers and shared"}),
    ("gru", "fp32", "flags", 13, 3, 2, True, {"homes": "shared", "splits": 2}),
    ("lstm", "bf16", "flags", 22, 17, 1, False, {"homes": "all three"}),
    ("gru", "fp16", "counter", 21, 3, 1, True, {"homes": "registers and stream"}),
    ("gru", "bf16", "counter", 29, 1, 2, False, {"homes": "shared and stream", "splits": 2}),
    ("lstm", "fp32", "flags", 32, 3, 1, False, {"homes": "stream", "splits": 2}),  # no mask anywhere
    ("gru", "fp32", "counter", 61, 3, 1, False, {"homes": "all three", "units": 16, "burst": 16}),
    ("gru", "fp16", "flags", 62, 1, 1, False, {"homes": "registers", "splits": 2}),
    ("gru", "fp32", "counter", 45, 3, 1, False, {"homes": "registers and shared", "splits": 8}),
    # Two dimensions.
    ("lstm", "fp32", "counter", 29, 3, 1, False, {"k_parts": 2}),
    ("gru", "bf16", "flags", 98, 3, 1, False, {"k_parts": 2, "units": 32, "homes": "all three"}),
    ("lstm", "fp16", "counter", 61, 2, 1, False, {"k_parts": 2, "units": 16, "homes": "registers and stream"}),
    ("gru", "fp32", "counter", 61, 17, 1, False, {"k_parts": 4, "units": 16, "homes": "stream"}),
    ("lstm", "bf16", "flags", 98, 3, 1, False, {"k_parts": 4, "units": 32, "homes": "shared and stream"}),
    ("lstm", "bf16", "flags", 18, 3, 1, True, {"k_parts": 4, "homes": "shared"}),  # a part of K without units
    ("gru", "fp16", "counter", 41, 3, 1, False, {"k_parts": 2, "homes": "registers and shared"}),
    ("lstm", "fp32", "flags", 64, 2, 1, False, {"k_parts": 2, "units": 16, "homes": "stream"}),  # no mask anywhere
    ("gru", "fp32", "counter", 57, 1, 1, False, {"k_parts": 8, "splits": 2}),
    # Several batch tiles in each program: the last not full, empty, the only one and not full.
    ("gru", "fp32", "flags", 27, 25, 1, False, {"subtiles": 4, "batch_tile": 8}),
    ("lstm", "fp16", "flags", 14, 3, 1, True, {"subtiles": 4, "batch_tile": 8, "homes": "shared"}),
    # Streamed through a ring, for a wide batch tile, not full.
    ("lstm", "bf16", "counter", 61, 35, 1, False, {"units": 16, "homes": "shared and stream", **RING}),
    ("gru", "fp16", "flags", 62, 35, 1, False, {"units": 16, "k_parts": 2, "homes": "stream", **RING}),
    # All together.
    ("lstm", "bf16", "counter", 61, 9, 1, False,
     {"k_parts": 4, "units": 16, "subtiles": 2, "batch_tile": 8, "homes": "stream"}),
]  # fmt: skip


def choice_of(chosen):
    return {name: value for name, value in chosen.items() if name != "groups"}


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: "-".join(str(x) for x in (i, *CASES[i][:4])))
@pytest.mark.timeout(240)
def test_many_slices_keep_the_bound(forced, index):
    cell, dtype, protocol, hidden, batch, layers, bidirectional, chosen = CASES[index]
    forced(protocol, **chosen)
    case = accuracy.Case(cell, dtype, hidden, batch, 3, layers, bidirectional, True, True)
    (_, forward), (_, backward) = tilings(cell, hidden, 2 if bidirectional else 1, **choice_of(chosen))
    rounds = [-(-t.jobs(batch) // chosen.get("groups", t.jobs(batch))) for t in (forward, backward)]
    before = launch.LAUNCHES.copy()
    with concurrent_grid(Delays(tuple(EXCHANGE)[index % len(EXCHANGE)], slow=index % forward.slices)):
        assert accuracy.failures(case) == []
    assert launch.LAUNCHES - before == {"scan_forward": layers * rounds[0], "scan_backward": layers * rounds[1]}


def features(backward):
    """What of the kernels each case runs: (split, protocol), (split, a home), and what is special."""
    found = set()
    for cell, dtype, protocol, hidden, batch, _, bidirectional, chosen in CASES:
        t = tilings(cell, hidden, 2 if bidirectional else 1, dtype, **choice_of(chosen))[backward][1]
        split = min(t.k_parts, 2)
        found |= {(split, cell), (split, dtype), (split, protocol), (t.subtiles, protocol), f"{t.k_parts} parts"}
        found |= {(split, cell, "registers")} if t.in_registers else set()
        found |= {(split, cell, "shared")} if t.in_registers < len(t.k_blocks) else set()
        found |= {(split, cell, "stream")} if t.streamed else set()
        rest = (t.depth - t.stream_start) % t.streamed_k_block
        special = {
            "padded rows": t.stride > t.hidden,
            "whole rows": t.stride == t.hidden,
            "last slice not full": hidden % t.units != 0,
            "part of K not full": t.ragged,
            "part of K empty": t.k_parts > 1 and (t.k_parts - 1) * t.units_per_part >= hidden,
            "stream not full": t.streamed and rest,
            "stream full, no mask": t.streamed and not rest and not t.ragged and hidden % t.units == 0,
            "a stream of several tiles": t.streamed > t.segments,
            "a stream in several segments": t.streamed and t.segments > 1,
            "several bursts": len(t.bursts) > 1,
            "splits": t.splits > 1,
            "chains": t.chains > 1,
            "batch tile empty": t.subtiles > 1 and 0 < batch % (t.batch_tile * t.subtiles) <= t.batch_tile,
            "subtiles of two dimensions": t.subtiles > 1 and t.k_parts > 1,
            "a stream through a ring": t.streamed > 0 and t.ring > 0,
            "streamed subtiles": t.subtiles > 1 and t.streamed,
            "one row": batch == 1,
        }
        found |= {name for name, holds in special.items() if holds}
    return found, special


@pytest.mark.parametrize("backward", [False, True])
def test_cases_cover_what_the_kernels_can_do(backward):
    found, special = features(backward)
    for split in (1, 2):
        for cell in ("lstm", "gru"):
            assert {(split, cell), *((split, cell, home) for home in ("registers", "shared", "stream"))} <= found
        assert {(split, what) for what in ("fp32", "fp16", "bf16", "counter", "flags")} <= found
    assert {(n, protocol) for n in (1, 2, 4) for protocol in ("counter", "flags")} <= found | {(4, "counter")}
    assert {f"{n} parts" for n in (1, 2, 4, 8)} <= found
    expected = set(special) - (set() if backward else {"a stream in several segments"})
    assert expected <= found, expected - found
    assert {chosen.get("homes", "registers") for *_, chosen in CASES} == set(HOMES)


@pytest.mark.parametrize(
    ("cell", "groups", "rounds", "chosen"),
    [
        ("lstm", 2, 3, {"homes": "all three"}),
        ("gru", 2, 3, {"homes": "registers and shared"}),
        ("gru", 1, 2, {"k_parts": 2, "subtiles": 2, "batch_tile": 32}),
    ],
)
def test_jobs_that_do_not_fit_follow_in_turn(forced, cell, groups, rounds, chosen):
    """Fewer groups than jobs: several launches, with other weights for the other direction."""
    forced(groups=groups, **chosen)
    case = accuracy.Case(cell, "fp32", 13, 35, 3, 1, True, True, True)
    before = launch.LAUNCHES.copy()
    with concurrent_grid():
        assert accuracy.failures(case, seed=1) == []
    assert launch.LAUNCHES - before == {"scan_forward": rounds, "scan_backward": rounds}


@pytest.mark.parametrize("batch", [3, 40])
def test_partial_products_take_the_memory_of_one_launch(forced, monkeypatch, batch):
    """Jobs that follow in turn use the same memory again: a large batch would else take hundreds of megabytes."""
    forced(groups=1, k_parts=2)
    parts = []

    class Spy:
        __name__ = "scan_forward"

        def __getitem__(self, grid):
            return lambda **arguments: parts.append((arguments["tiling"], arguments["sync"][2].numel()))

    monkeypatch.setattr(launch, "scan_forward", Spy())
    persistrnn.LSTM(3, 29, backend="persistent")(torch.ones(2, batch, 3))
    assert len(parts) == -(-batch // 16)
    assert {numel for t, numel in parts} == {2 * t.slices * 4 * t.k_parts * t.units * t.batch_tile for t, _ in parts}


# ---- mutants ------------------------------------------------------------------------------------------------------

# (operation to delay, the slow program)
FIRST = (("put", 1), ("arrive", 1), ("wait", 1), ("get", 1))
# Two unit groups by two parts of K. Late partial products of program 0; program 0 late at adding those of program 1,
# which alone can be a step ahead of it; and h of program 1 late for program 2, which needs it and is of another group.
SECOND = (("get", 0), ("announce", 0), ("await_count", 0), ("read", 0), ("put", 1))

# Name -> (protocol, cell, H, B, choice, schedules, (seconds, every) of ``Delays``).
SCENARIOS = {
    "counter": ("counter", "lstm", 3 * UNITS, 2, {}, FIRST, (0.004, 1)),
    "flags": ("flags", "lstm", 3 * UNITS, 2, {}, FIRST, (0.004, 1)),
    "stream": ("counter", "gru", 3 * UNITS, 2, {"homes": "registers and stream"}, FIRST[:1], (0.004, 1)),
    "two dimensions": ("counter", "gru", 4 * UNITS, 2, {"k_parts": 2}, SECOND, (0.3, 4)),
    "batch tiles": ("counter", "gru", 2 * UNITS, 12, {"subtiles": 2, "batch_tile": 8}, FIRST, (0.004, 1)),
    "both": ("counter", "gru", 4 * UNITS, 12, {"k_parts": 2, "subtiles": 2, "batch_tile": 8}, SECOND[3:4], (0.3, 8)),
}


def is_wrong(forced, scenario, operation, slow, spin_limit, stretch=1):
    """Whether the result under one schedule, ``stretch`` times as long, is wrong, or there is none."""
    protocol, cell, hidden, batch, chosen, _, (seconds, every) = SCENARIOS[scenario]
    forced(protocol, spin_limit=spin_limit * stretch, **chosen)
    case = accuracy.Case(cell, "fp32", hidden, batch, 3, 1, False, True, True)
    try:
        with concurrent_grid(Delays(operation, slow, seconds * stretch, every)):
            return accuracy.failures(case) != []
    except RuntimeError as error:
        if "gave up waiting" not in str(error):
            raise
        return True


@pytest.mark.parametrize(
    ("scenario", "operation", "slow"), [(name, *schedule) for name in SCENARIOS for schedule in SCENARIOS[name][5]]
)
def test_every_schedule_passes_without_a_mutant(forced, scenario, operation, slow):
    assert not is_wrong(forced, scenario, operation, slow, spin_limit=1 << 23)


@pytest.mark.parametrize(
    ("mutant", "scenario", "first"),
    [
        (mutants.wait_removed, "counter", "put"),
        (mutants.counter_off_by_one, "counter", "put"),
        (mutants.store_after_release, "counter", "put"),
        (mutants.flag_reset_forgotten, "flags", "put"),
        (mutants.wait_removed, "two dimensions", "get"),
        (mutants.counter_off_by_one, "two dimensions", "get"),
        (mutants.counted_for_the_wrong_part, "two dimensions", "put"),
        (mutants.sum_without_wait, "two dimensions", "get"),
        (mutants.sum_off_by_one, "two dimensions", "get"),
        (mutants.sum_without_parity_in_the_forward, "two dimensions", "read"),
        (mutants.sum_without_parity_in_the_backward, "two dimensions", "read"),
        (mutants.sum_without_one_block, "two dimensions", "get"),
        (mutants.prefetch_not_advanced, "stream", "put"),
        (mutants.batch_tiles_share_a_counter, "batch tiles", "put"),
        (mutants.batch_tiles_share_partial_products, "both", "read"),
    ],
)
@pytest.mark.timeout(240)
def test_mutant_is_caught(forced, monkeypatch, mutant, scenario, first):
    """By the schedule that delays ``first``, as a rule, else by another."""
    mutant(monkeypatch)
    schedules = sorted(SCENARIOS[scenario][5], key=lambda schedule: schedule[0] != first)
    # A loaded machine may happen to run the programs in the right order: the slow one is then slowed further.
    assert any(is_wrong(forced, scenario, *at, spin_limit=20_000, stretch=n) for n in (1, 10, 100) for at in schedules)


# ---- what flows through, and what does not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "k_parts", "mute"), [("counter", 1, "put"), ("flags", 1, "put"), ("counter", 2, "sum")]
)
def test_wait_that_runs_out_ends_in_an_exception(forced, monkeypatch, protocol, k_parts, mute):
    """A program that says nothing: its group ends, and the call raises."""
    forced(protocol, spin_limit=50, k_parts=k_parts)
    module, name = (scan, "publish") if mute == "put" else (exchanged_product, "announce")
    original = getattr(module, name)

    def silent(*arguments):
        if scan.tl.program_id(0).handle.data.item() != 1:
            original(*arguments)

    monkeypatch.setattr(module, name, silent)
    layer = persistrnn.LSTM(4, 2 * k_parts * UNITS, backend="persistent")
    with concurrent_grid(), pytest.raises(RuntimeError, match="gave up waiting for another program"):
        layer(torch.randn(5, 2, 4))
    persistrnn.check()  # raised once, then clean


@pytest.mark.parametrize("protocol", ["counter", "flags"])
@pytest.mark.timeout(60)
def test_program_that_fails_ends_its_launch(forced, monkeypatch, protocol):
    """The others do not poll to their limit for it, and its error is the one that is raised."""
    forced(protocol)
    original = scan.publish

    def failing(*arguments):
        if scan.tl.program_id(0).handle.data.item() == 1:
            raise ValueError("as asked")
        original(*arguments)

    monkeypatch.setattr(scan, "publish", failing)
    layer = persistrnn.LSTM(4, 2 * UNITS, backend="persistent")
    with concurrent_grid(), pytest.raises(Exception, match="as asked"):
        layer(torch.randn(5, 2, 4))


@pytest.mark.parametrize("k_parts", [1, 2])
def test_nan_in_the_data_is_not_the_reserved_one(forced, k_parts):
    """A NaN input reaches the output, and no reader waits for it."""
    forced("flags", spin_limit=2000, k_parts=k_parts)
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


@triton.jit
def put_rows(source, buffer, how: tl.constexpr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    exchange.put(buffer + at, tl.load(source + at), at < 28, how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_word_that_is_put_is_never_all_ones(dtype):
    """Whatever NaN a cell makes, they are NaN in memory; what is beside them in a word, and what is masked, stays."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    given = torch.randn(4, 8).to(dtype)
    given.view(integer)[:2] = -1
    given.view(integer)[2, ::2] = -1
    buffer = torch.full((4, 8), -1, dtype=integer).view(dtype)
    put_rows[(1,)](given, buffer, exchange.Exchange("flags", poll()))
    assert buffer.view(torch.int32).flatten()[: 14 * given.element_size() // 2].ne(-1).all()
    assert buffer.view(integer).flatten()[28:].eq(-1).all()
    torch.testing.assert_close(buffer.flatten()[:28], given.flatten()[:28], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("chosen", [{}, {"k_parts": 2, "subtiles": 2, "batch_tile": 8, "homes": "all three"}])
def test_equal_inputs_give_equal_bits_under_any_schedule(forced, chosen):
    forced(**chosen)
    case = accuracy.Case("gru", "bf16", 2 * UNITS, 9, 3, 1, False, True, True)
    results = []
    for slow, operation in enumerate(("put", "get", "wait")):
        with concurrent_grid(Delays(operation, slow % 2)):
            results.append(accuracy.run(case, seed=0)[0])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name
