"""The clock's cycles on traces written by hand, and its table."""

import re
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
    made = kernel("wgmma.wait_group.sync.aligned 0;")
    with pytest.raises(EmulatorError, match=r"cells\.py:1.*wgmma.*does not know"):
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
