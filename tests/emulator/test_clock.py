"""The clock's cycles on traces written by hand, and its table."""

import re
from dataclasses import replace
from types import SimpleNamespace

import clock_table
import numpy as np
import pytest
import torch

import persistrnn
from emulator import EmulatorError, clock, latencies, order
from emulator.ptx import Kernel
from emulator.trace import Event, Trace, transactions
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import hardware, plan
from persistrnn.kernels.planner.choices import choices
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.planner.tiling import Choice

# Cycles are nanoseconds; an exchange takes 1000, a barrier 50; L2 gives a sector of 32 bytes a clock.
HARDWARE = SimpleNamespace(clock=1.0, exchange=1.0, barrier=0.05, l2_rate=32.0)
HEAD = """.visible .entry tiny(
)
.reqntid 32
{
.reg .b32 %r<20>;
.reg .b16 %rs<20>;
.reg .b64 %rd<20>;
.reg .pred %p<5>;
.loc 1 1 0
"""
FILES = '.file 1 "/somewhere/cells.py"\n.file 2 "/triton/language/standard.py"\n'


def kernel(body: str) -> Kernel:
    """Of PTX with a line of our source per instruction, from 1 on, unless it has its own."""
    lines = body.strip().splitlines()
    if ".loc" not in body:
        lines = [f".loc 1 {n} 0\n{line}" for n, line in enumerate(lines, 1)]
    return Kernel(HEAD + "\n".join(lines) + "\nret;\n}\n" + FILES, 1024)


def events(made: Kernel) -> list[Event]:
    return [Event(i) for i in made.code if i.name != "ret"]


def times(made: Kernel, warps: list[list[Event]], arch: str = "sm_90") -> list[list[float]]:
    issued = clock.Scoreboard(made, warps, arch, HARDWARE).run()
    return [[one.time for one in warp] for warp in issued]


CHAIN = "\n".join(f"add.f32 %r{n + 1}, %r{n}, %r{n};" for n in range(4))
APART = "\n".join(f"add.f32 %r{n + 10}, %r{n}, %r{n};" for n in range(4))


@pytest.mark.parametrize(
    ("body", "arch", "expected"),
    [
        (CHAIN, "sm_90", [0, 4, 8, 12]),  # the latency each time
        (APART, "sm_80", [0, 2, 4, 6]),  # their pipe
        (APART, "sm_90", [0, 1, 2, 3]),
        # A pipe of a scheduler is kept.
        ("ex2.approx.f32 %r1, %r0;\nex2.approx.f32 %r2, %r0;\nadd.f32 %r3, %r1, %r2;", "sm_90", [0, 8, 26]),
        # Moves between registers cost nothing.
        ("add.f32 %r1, %r0, %r0;\nmov.b32 %r2, %r1;\nadd.f32 %r3, %r2, %r2;", "sm_90", [0, 4]),
        # An access without an active lane takes a slot only.
        ("@%p1 ld.global.b32 %r1, [%rd0];\nadd.f32 %r5, %r1, %r1;", "sm_90", [0, 1]),
    ],
)
def test_one_warp(body, arch, expected):
    made = kernel(body)
    assert times(made, [events(made)], arch) == [expected]


def test_two_warps_of_one_scheduler_share_it():
    chain, apart = kernel(CHAIN), kernel(APART)
    five = [events(chain), [], [], [], events(chain)]  # warps 0 and 4
    assert times(chain, five) == [[0, 4, 8, 12], [], [], [], [1, 5, 9, 13]]
    five = [events(apart), [], [], [], events(apart)]
    assert times(apart, five) == [[0, 1, 2, 3], [], [], [], [4, 5, 6, 7]]
    assert times(apart, [events(apart), events(apart)]) == [[0, 1, 2, 3], [0, 1, 2, 3]]  # of two schedulers
    both = kernel(f"{APART}\nadd.s32 %r18, %r0, %r0;")  # of two pipes
    some = events(both)
    assert times(both, [some[:4], [], [], [], some[4:]]) == [[0, 1, 2, 3], [], [], [], [4]]
    wide = kernel(f"{CHAIN}\nadd.s64 %rd1, %rd0, %rd0;\nadd.s64 %rd2, %rd1, %rd1;")  # two slots each
    some = events(wide)
    assert times(wide, [some[:3], [], [], [], some[4:]]) == [[0, 4, 9], [], [], [], [1, 7]]


def test_a_barrier_waits_for_the_last_warp():
    made = kernel(f"{CHAIN}\nbar.sync 0;\nadd.f32 %r9, %r8, %r8;")
    late = events(made)
    early = late[4:5] + late[5:6]
    early = [Event(event.instruction) for event in early]
    assert times(made, [early, late]) == [[0, 63], [0, 4, 8, 12, 13, 63]]
    with pytest.raises(EmulatorError, match="stands still"):
        times(made, [events(made), events(made)[:4]])


def test_shared_memory_moves_128_bytes_a_clock():
    made = kernel("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0];\nadd.f32 %r5, %r1, %r1;")
    warps = [events(made), events(made)]
    for load, _ in warps:
        load.amount = 4
    # 23 cycles, and 2 more for each further transaction; the second warp's begin when the first's have gone.
    assert times(made, warps) == [[0, 29], [0, 33]]


def test_l2_gives_what_the_record_says():
    made = kernel(
        "ld.global.cg.b32 %r1, [%rd0];\nld.global.b32 %r2, [%rd0];\nadd.f32 %r5, %r1, %r1;\nadd.f32 %r6, %r2, %r2;"
    )
    warp = events(made)
    for load in warp[:2]:
        load.amount, load.first = 16, True
    # The one past L1 is what others wrote, in L2; the other comes from memory, and is listed first.
    assert times(made, [warp]) == [[0, 1, 16 + 263, 478.8]]
    warp[1].first = False
    assert times(made, [warp]) == [[0, 1, 263, 16 + 263]]


# ---- groups of copies and of products -----------------------------------------------------------------------------

COPY = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd0 + 0 ], 16;"
COMMIT = "cp.async.commit_group;"


def copying(body: str, sectors: int = 16, stored: int = 4) -> tuple[Kernel, list[Event]]:
    made = kernel(body)
    some = events(made)
    for event in some:
        if event.instruction.op == "cp.async.cg.shared.global":
            event.amount, event.stored = sectors, stored
    return made, some


def ends(made: Kernel, warps: list[list[Event]]) -> list[float]:
    """When each warp issues its last instruction."""
    return [times_of[-1] for times_of in times(made, warps)]


def test_a_warp_waits_for_its_groups_of_copies():
    groups = f"{COPY}\n{COMMIT}\n{COPY}\n{COMMIT}\n"
    made, some = copying(f"{groups}cp.async.wait_group 1;\ncp.async.wait_group 0;\nadd.f32 %r5, %r6, %r6;")
    # Each has a trip through L2, the second 16 cycles after the first.
    assert times(made, [some]) == [[0, 1, 2, 3, 263, 16 + 263, 16 + 264]]
    made, some = copying(f"{groups}cp.async.wait_group 2;")
    assert ends(made, [some]) == [4]
    # Not for those that it has not committed, nor for another warp's.
    made, some = copying(f"{COPY}\ncp.async.wait_group 0;")
    assert times(made, [some, some[1:]]) == [[0, 1], [0]]


def test_copies_overlap_until_l2_gives_no_more():
    one, many = (copying("\n".join([*[f"{COPY}\n{COMMIT}"] * n, "cp.async.wait_group 0;"])) for n in (1, 40))
    assert ends(one[0], [one[1]]) == [263]
    assert ends(many[0], [many[1]]) == [39 * 16 + 263], "their sectors, and one trip"
    # One after the other they are as many trips.
    after, some = copying("\n".join([f"{COPY}\n{COMMIT}\ncp.async.wait_group 0;"] * 40))
    assert ends(after, [some]) == [40 * 264 - 1]


def test_copies_are_stored_in_shared_memory():
    made, some = copying(
        f"{COPY}\n{COMMIT}\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r6];\nadd.f32 %r7, %r5, %r5;", stored=400
    )
    some[3].amount = 1
    assert times(made, [some]) == [[0, 1, 400, 401, 401 + 23]]
    ((_, *_, last),) = clock.Scoreboard(made, [some[:3]], "sm_90", HARDWARE).run()
    assert clock.critical(last, 0.0) == {"cells.py:1": 400}, "the line of the copy"


def test_nothing_passes_a_copy_that_is_waited_for():
    body = f"add.f32 %r2, %r3, %r3;\n{COPY}\n{COMMIT}\ncp.async.wait_group 0;\nld.shared.b32 %r5, [%r6];"
    assert "".join(in_order(f"{body}\nex2.approx.f32 %r3, %r5;")) == "213456", "first, it takes longest"
    assert "".join(in_order(f"ld.shared.b32 %r5, [%r6];\n{COPY}")) == "12", "it may overwrite what was loaded"


def product(columns: int, a: str = "%rd0", d: str = "%r4") -> str:
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    return f"{name} {{{d}}}, {a}, %rd1, %p0, 1, 1, 0, 0;"


MULTIPLIED = "wgmma.commit_group.sync.aligned;"
AWAITED = "wgmma.wait_group.sync.aligned 0;"
DEPTH = latencies.COSTS[clock.GROUP][1].cycles


@pytest.mark.parametrize(
    ("columns", "a", "each"),
    [
        (256, "%rd0", 128),  # the dense rate: 2,048 products of a multiprocessor a clock
        (64, "%rd0", 32),
        (64, "{%r0,%r1}", 32),
        (16, "%rd0", 20),  # 64 rows of A and 16 of B, of 32 bytes, from shared memory
        (16, "{%r0,%r1}", 8),
    ],
)
@pytest.mark.parametrize("several", [1, 30])
def test_a_warp_group_multiplies_at_the_rate_of_its_pipes(columns, a, each, several):
    body = [*[product(columns, a)] * several, MULTIPLIED, AWAITED]
    made = kernel("\n".join(body))
    found = ends(made, [events(made) for _ in range(4)])
    # The latency once, though each adds to what the one before has left.
    assert max(found) - DEPTH == pytest.approx(several * each, abs=4)
    if columns >= 64:  # two groups share the tensor cores
        found = ends(made, [events(made) for _ in range(8)])
        assert max(found) - DEPTH == pytest.approx(2 * several * each, abs=4)


def test_a_warp_waits_for_its_groups_of_products():
    chain = f"{product(64)}\n{MULTIPLIED}\n" * 2
    made = kernel(f"{chain}{AWAITED.replace('0', '1')}\nadd.s32 %r9, %r8, %r8;\n{AWAITED}")
    (found,) = times(made, [events(made)])
    assert found == [0, 1, 2, 3, 32 + DEPTH, 33 + DEPTH, 64 + DEPTH]
    # Products overlap with what does not wait for them; what they add to must be there.
    made = kernel(f"ex2.approx.f32 %r4, %r0;\n{product(64)}\n{MULTIPLIED}\nadd.f32 %r9, %r8, %r8;")
    assert times(made, [events(made)]) == [[0, 18, 19, 20]]
    # Nothing passes them.
    body = f"add.f32 %r2, %r3, %r3;\n{product(64)}\nld.shared.b32 %r5, [%r6];\n{MULTIPLIED}"
    assert "".join(in_order(f"{body}\n{AWAITED}\nex2.approx.f32 %r7, %r5;")) == "123456"


def test_a_poll_sees_others_an_exchange_after_the_own_announcement():
    made = kernel(
        """red.release.gpu.global.add.u32 [%rd0], 1;
ld.acquire.gpu.global.u32 %r1, [%rd0];
setp.ge.s32 %p1, %r1, 5;"""
    )
    warp = events(made)
    for event in warp[:2]:
        event.amount = 1
    warp[1].release = warp[0]
    (issued,) = clock.Scoreboard(made, [warp], "sm_90", HARDWARE).run()
    assert [one.time for one in issued] == [0, 1, 1000 - 263]
    assert clock.critical(issued[-1], 0.0) == {clock.EXCHANGE: 737}


def test_a_poll_comes_after_the_announcement_that_it_sees():
    made = kernel(
        "add.f32 %r1, %r0, %r0;\nred.release.gpu.global.add.u32 [%rd0], 1;\nld.acquire.gpu.global.u32 %r2, [%rd0];"
    )
    add, announce, poll = events(made)
    announce.amount = poll.amount = 1
    poll.release = announce
    assert times(made, [[add, announce], [poll]]) == [[0, 1], [1]]


def test_the_critical_path_says_who_made_whom_wait():
    made = kernel(
        "ex2.approx.f32 %r1, %r0;\nadd.f32 %r2, %r1, %r1;\nadd.f32 %r3, %r2, %r2;\nbar.sync 0;\nadd.f32 %r4, %r8, %r8;"
    )
    late = events(made)
    early = [Event(event.instruction) for event in late[3:]]
    issued = clock.Scoreboard(made, [early, late], "sm_90", HARDWARE).run()
    last = issued[0][-1]
    path = clock.critical(last, 0.0)
    assert path == {"cells.py:1": 18, "cells.py:2": 4, "cells.py:3": 1, "cells.py:4": 50}
    assert sum(path.values()) == last.time
    assert clock.critical(last, 20.0) == {"cells.py:2": 2, "cells.py:3": 1, "cells.py:4": 50}


# ---- order --------------------------------------------------------------------------------------------------------


def in_order(body: str) -> list[str]:
    made = kernel(body)
    latency = clock.Scoreboard(made, [], "sm_90", HARDWARE).latency
    some = events(made)
    for event in some:
        event.amount = 1
    return [event.instruction.source.split(":")[1] for event in order.ordered(some, made, latency)]


TWO_LOADS = "".join(f"ld.global.b16 %rs{n}, [%rd{n}];\ncvt.f32.bf16 %r{n}, %rs{n};\n" for n in (1, 2))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (TWO_LOADS, "1324"),  # loads go before the uses of others
        # What need not wait does not.
        ("ex2.approx.f32 %r1, %r0;\nadd.f32 %r2, %r1, %r1;\nex2.approx.f32 %r3, %r2;\nadd.f32 %r5, %r4, %r4;", "1423"),
        # A register is not written before it was read.
        (
            "add.f32 %r1, %r0, %r0;\nadd.f32 %r2, %r1, %r1;\nld.global.b32 %r1, [%rd1];\nex2.approx.f32 %r3, %r1;",
            "1234",
        ),
    ],
)
def test_order(body, expected):
    assert "".join(in_order(body)) == expected


@pytest.mark.parametrize(
    "between",
    ["bar.sync 0;", "st.global.b32 [%rd5], %r7;", "ld.acquire.gpu.global.u32 %r7, [%rd5];", "add.s64 %rd1, %rd1, 8;"],
)
def test_nothing_passes_what_keeps_it_back(between):
    # The chain of the load is the longest.
    body = f"add.f32 %r1, %r0, %r0;\n{between}\nld.global.b32 %r2, [%rd1];\nex2.approx.f32 %r3, %r2;"
    found = in_order(body)
    assert found.index("2") < found.index("3") < found.index("4")


# ---- trace and costs ----------------------------------------------------------------------------------------------


def test_transactions_of_shared_memory():
    lanes = np.arange(32)
    addresses = [4 * lanes, 0 * lanes, 8 * lanes, 2 * lanes, 128 * lanes, 16 * lanes, 1024 * lanes]
    addresses.append(1024 * (lanes % 8) + 16 * (lanes // 8))  # eight lanes at a time
    widths = [4, 4, 4, 2, 4, 16, 16, 16]
    assert [transactions(*each) for each in zip(addresses, widths, strict=True)] == [1, 1, 2, 1, 32, 4, 32, 32]


def test_lines_of_our_source():
    made = kernel(
        """.loc 2 7 1, function_name $L__info_string0, inlined_at 1 5 3
add.f32 %r1, %r0, %r0;
// begin inline asm
.loc 1 6 3
add.f32 %r2, %r0, %r0;
// end inline asm
.loc 1 8 3
add.f32 %r3, %r0, %r0;"""
    )
    assert [i.source for i in made.code[:3]] == ["cells.py:5", "cells.py:5", "cells.py:8"]


def test_every_cost_says_where_it_comes_from():
    for name, costs in latencies.COSTS.items():
        assert len(costs) == len(latencies.ARCHITECTURES), name
        for cost in costs:
            assert re.search(r"(Abdelkhalik|Sun|Luo) et al\., table|assumed: |the device's record", cost.source), name


def test_an_unknown_instruction_is_an_error_that_names_it():
    made = kernel("tcgen05.wait::ld.sync.aligned;")
    with pytest.raises(EmulatorError, match=r"cells\.py:1.*tcgen05.*does not know"):
        times(made, [events(made)])


@pytest.mark.emulator
@pytest.mark.parametrize("arch", latencies.ARCHITECTURES)
@pytest.mark.parametrize("k_parts", [1, 2])
def test_a_step_of_a_small_kernel(emulated, forced, arch, k_parts):
    session = emulated(arch, units="rows", trace=Trace(1))
    forced("counter", k_parts=k_parts, units=8, splits=2)
    layer = persistrnn.LSTM(5, 29, dtype=torch.bfloat16, backend="persistent")
    with torch.no_grad():
        layer(torch.randn(4, 3, 5, dtype=torch.bfloat16))

    def step(**changed):
        hardware = SimpleNamespace(**(vars(HARDWARE) | changed))
        return clock.second_step(session.options["trace"], 4, arch, hardware)

    # An exchange of 10,000 cycles hides all that a program does meanwhile; the two-dimensional split has two per step.
    slow, slower = step(exchange=10.0), step(exchange=11.0)
    assert sum(cycles for _, cycles in slow.shares) == pytest.approx(slow.cycles)
    assert slower.cycles - slow.cycles == pytest.approx(1000 * k_parts)
    assert slow.shares[0][0] == clock.EXCHANGE
    assert slow.cycles < 12_000 * k_parts
    # Without one, what a program does itself; barriers hide behind loads here and there, but never cost more.
    fast, faster = step(exchange=0.0), step(exchange=0.0, barrier=0.0)
    assert clock.EXCHANGE not in dict(fast.shares)
    assert 0.3 * 50 * fast.barriers < fast.cycles - faster.cycles <= 50 * fast.barriers


@pytest.mark.parametrize("device", ["h200", "a100"])
def test_a_step_that_streams_through_a_ring(device):
    """A backward whose program has 64 rows of weights and 512 of K, 64 of them in shared memory."""

    def step(ring, **changed):
        problem = Problem(CELLS["lstm"], 128, 32, 1, "bf16", replace(hardware.named(device), **changed))
        part = plan.finish(problem, True, Choice(64, 1, 32, 1, 8, 1, 1, 64, 64, 0, 64, 64, ring))
        return part, clock_table.clocked(problem, part, True).cycles

    # At a byte a clock L2 alone counts: what is streamed, and the operand.
    part, cycles = step(3, l2_rate=1.0)
    moved = part.streamed + 2 * 32 * 512
    assert part.streamed == 2 * 64 * (512 - 64)
    assert moved < cycles < 1.5 * moved, "and some of its own units"
    # Without that limit a trip overlaps with the products of as many tiles as are there.
    (_, ahead), (_, in_turn) = (step(ring, l2_rate=1e6) for ring in (3, 2))
    assert in_turn - ahead > 75 * 7, "the tiles that are streamed"


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_flagged_data(emulated, forced, dtype):
    session = emulated("sm_90", units="rows", trace=Trace(1))
    forced("flags", units=8, splits=2)
    layer = persistrnn.LSTM(5, 30, dtype=dtype, backend="persistent")
    with torch.no_grad():
        layer(torch.randn(4, 3, 5, dtype=dtype))

    def step(exchange):
        return clock.second_step(
            session.options["trace"], 4, "sm_90", SimpleNamespace(**(vars(HARDWARE) | {"exchange": exchange}))
        )

    slow, slower = step(10.0), step(11.0)
    assert slower.cycles - slow.cycles == pytest.approx(500), "half of an exchange"
    assert slow.shares[0][0] == clock.EXCHANGE


# ---- the table ----------------------------------------------------------------------------------------------------


def without_lines(row: dict[str, str]) -> dict[str, str]:
    """Lines move when something is written above them."""
    return {name: re.sub(r"(\.py):\d+", r"\1", value) for name, value in row.items()}


def test_two_rows_of_the_table_are_those_of_a_fresh_run():
    rows = {clock_table.key_of(row): row for row in clock_table.read()}
    for one in (("h200", "lstm", 256, 1, "forward"), ("a100", "gru", 256, 1, "backward")):
        row = clock_table.Row(*one)
        (fresh,) = clock_table.rows([row])
        assert without_lines(rows[row.key]) == without_lines(fresh), (
            "the kernels or the clock have changed: run tests/helpers/clock_table.py, then with --write"
        )


def test_two_rows_of_flags_are_those_of_a_fresh_run():
    fresh = [clock_table.rows([clock_table.Row("h200", "gru", 256, 1, way, "flags")]) for way in clock_table.WAYS]
    assert all(row in clock_table.read(clock_table.EXCHANGE_RESULTS) for (row,) in fresh), (
        "the kernels or the clock have changed: run tests/helpers/clock_table.py --exchanges, then with --write"
    )


def test_the_notebook_has_the_tables():
    notes = clock_table.NOTES.read_text()
    assert clock_table.written(notes) == notes, "run tests/helpers/clock_table.py --write"
    clocked = clock_table.read()
    assert [clock_table.key_of(row) for row in clocked] == [row.key for row in clock_table.ROWS]
    assert [clock_table.key_of(row) for row in clock_table.read(clock_table.BEFORE)] == [
        row.key for row in clock_table.ROWS
    ]
    # The usual exchange is in both files.
    of_clock = {clock_table.key_of(row): row["clock_cycles"] for row in clocked}
    exchanges = clock_table.read(clock_table.EXCHANGE_RESULTS)
    assert [clock_table.key_of(row) for row in exchanges] == [row.key for row in clock_table.EXCHANGE_ROWS]
    for row in exchanges:
        if row["exchange"] == "counter, all poll":
            assert of_clock[(*clock_table.key_of(row)[:4], "h200")] == row["clock_cycles"]


def before(cycles: str, **of: str) -> dict[str, str]:
    row = {"device": "h200", "cell": "lstm", "hidden": "8", "batch": "1", "pass": "forward", "barriers": "9"}
    return row | {"cycles": cycles} | of


def test_rows_that_are_slower_or_have_many_barriers_are_named():
    gone = "not clocked: warp groups"
    older = [before(c, cell=cell, device=d) for d in ("h200", "a100") for cell, c in (("lstm", "400"), ("gru", "200"))]
    clocked = [{"clock_cycles": cycles, "barriers": "2"} for cycles in ("100", "204", "90", gone)]
    newer = [row | now for row, now in zip(older, clocked, strict=True)]
    made = clock_table.before_table(older, newer).splitlines()
    assert made[0].startswith("**h200:** geometric mean 1.98 of the 2 rows")
    assert made[0].endswith(
        "0.98 (GRU 8, B=1, forward); more than 2% slower: none; more than 6 forward or 8 backward barriers now: none."
    )
    assert made[1].startswith("**a100:** geometric mean 4.44 of the 1 rows")
    assert made[-2:] == [
        "| LSTM 8, B=1 | forward | 400, 100 | 4.00 | 9, 2 | 400, 90 | 4.44 | 9, 2 |",
        f"| GRU 8, B=1 | forward | 200, 204 | 0.98 | 9, 2 | 200, {gone} |  | 9, 2 |",
    ]
    newer[1] |= {"clock_cycles": "205", "barriers": "7"}
    made = clock_table.before_table(older, newer)
    assert "more than 2% slower: GRU 8, B=1, forward (0.976);" in made
    assert "barriers now: GRU 8, B=1, forward (7)." in made


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_one_slice_waits_for_no_load(cell, backward):
    """All that a step reads of its own is there, and in the threads that need it: one slice is as fast as several."""
    problem = Problem(CELLS[cell], 32, 8, 1, "bf16", hardware.named("a100"))
    alone = [choice for choice in choices(problem, backward) if choice.blocks == 1]
    every = [part for choice in alone if (part := plan.finish(problem, backward, choice))]
    fastest = [min((p for p in every if (p.tiling.slices > 1) is n), key=lambda p: p.predicted) for n in (False, True)]
    one, several = (clock_table.clocked(problem, part, backward) for part in fastest)
    assert one.barriers <= 2 * (problem.cell.gates if backward else 1), "the operand's alone"
    assert one.cycles <= 1.05 * several.cycles
