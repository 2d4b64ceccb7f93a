"""The microbenchmarks: kernels compute what they claim, loops hold what is timed, and the arithmetic is right.

Times are for a GPU to tell; all else is rehearsed here."""

import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
import pytest
import torch
import triton
from grid import Delays, concurrent_grid

from bench.gpu import compile_first, micro, micro_kernels
from bench.gpu.compile_first import Compiler, Driver, JITFunction, compiling
from bench.gpu.micro import REHEARSAL, Item, Machine, Scale
from bench.report.results import Micro
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.inspect.audit import Homes
from persistrnn.kernels.planner import hardware, measurements

CPU = torch.device("cpu")
PROTOCOLS = ("counter", "flags")
DRIVERS = itertools.count(1000)


def quick(**changed: Any) -> Machine:
    """Of the interpreter, with a spin limit that a test can outlast."""
    scale = {"exchanges": 4, "lines": 4, "steps": 2, "spin_limit": 20_000, "read": 64 * 1024} | changed
    return Machine(CPU, Scale(**scale))


# ---- in the interpreter -------------------------------------------------------------------------------------------


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch):
    """delayed(operation, slow): the concurrent grid, with that program late at that operation of the exchange."""
    monkeypatch.setattr(grid, "EXCHANGE", dict.fromkeys(("put", "arrive", "wait", "get"), (micro_kernels,)))

    def start(operation: str, slow: int):
        return concurrent_grid(Delays(operation, slow, seconds=0.02))

    return start


@pytest.mark.interpreter
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("programs", "payload", "operation"),
    [(2, 0, "wait"), (2, 400, "put"), (3, 100, "get"), (3, 0, "put"), (5, 16, "arrive"), (8, 128, "put")],
)
def test_every_program_gets_what_all_have_put(delayed, programs, payload, protocol, operation):
    """In one tile and in several, full and not: no sum is wrong, whoever is late."""
    once = micro._exchange(quick(), protocol, programs, payload)
    with delayed(operation, programs - 1):
        once()


def wait_removed(monkeypatch):
    monkeypatch.setattr(micro_kernels, "wait", lambda counter, target, spin_limit, *_: spin_limit)


def get_does_not_look(monkeypatch):
    monkeypatch.setattr(micro_kernels, "settle", lambda tiles, _pointers, _masks, spin_limit, *_: (tiles, spin_limit))


def put_another(monkeypatch):
    put = micro_kernels.put
    monkeypatch.setattr(micro_kernels, "put", lambda pointers, tile, *others: put(pointers, tile + 1, *others))


def never_put(monkeypatch):
    monkeypatch.setattr(micro_kernels, "put", lambda *_: None)


def never_announced(monkeypatch):
    monkeypatch.setattr(micro_kernels, "arrive", lambda *_: None)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("mutant", "protocol", "operation", "message"),
    [
        (wait_removed, "counter", "put", "got before it was put"),
        (get_does_not_look, "flags", "put", "got before it was put"),
        (put_another, "counter", "put", "sums: .* results are wrong"),
        (put_another, "flags", "put", "sums: .* results are wrong"),
        (never_put, "counter", "put", "got before it was put"),
        (never_put, "flags", "put", "gave up waiting"),
        (never_announced, "counter", "put", "gave up waiting"),
    ],
)
def test_a_broken_exchange_is_an_error_and_no_number(delayed, monkeypatch, mutant, protocol, operation, message):
    mutant(monkeypatch)
    once = micro._exchange(quick(spin_limit=200 if "gave up" in message else 20_000), protocol, 2, 128)
    with delayed(operation, 1), pytest.raises(RuntimeError, match=message):
        once()


@pytest.mark.interpreter
def test_a_lost_announcement_is_an_error_where_nothing_else_moves(delayed, monkeypatch):
    """Payload 0: the count is all that there is to check."""
    wait_removed(monkeypatch)
    never_announced(monkeypatch)
    with delayed("put", 1), pytest.raises(RuntimeError, match="announcements: 1 of 1 results are wrong"):
        micro._exchange(quick(), "counter", 2, 0)()


class Spoiled:
    """A kernel that leaves one wrong number in its output."""

    def __init__(self, kernel, output):
        self.kernel, self.output = kernel, output

    def __getitem__(self, programs):
        def call(*arguments, **options):
            self.kernel[programs](*arguments, **options)
            arguments[self.output].view(-1)[-1] += 1

        return call


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "kernel", "output"),
    [("l2", "read_again", 1), ("shared", "sweep_shared", 2), ("barrier", "barriers", 0), ("launch", "touch", 0)],
)
def test_the_other_kernels_check_what_they_compute(monkeypatch, name, kernel, output):
    item = next(item for item in micro.items(Machine(CPU, REHEARSAL)) if item.name == name)
    assert item.start()() is not None
    monkeypatch.setattr(micro_kernels, kernel, Spoiled(getattr(micro_kernels, kernel), output))
    with pytest.raises(RuntimeError, match="results are wrong, the first at"):
        item.start()()


@pytest.mark.interpreter
def test_a_clock_that_jumps_ends_the_spin(monkeypatch):
    """And the cycles say so."""
    machine, clock, calls = quick(), micro_kernels.clock, []
    monkeypatch.setattr(micro_kernels, "clock", lambda *a: clock(*a) + (1 << 20) * (calls.append(a) or len(calls) == 2))
    cycles = machine.new(1, dtype=torch.int64)
    machine.spin(cycles, 640)
    assert cycles.item() > 1 << 20


@pytest.mark.interpreter
def test_every_measurement_runs():
    machine = Machine(CPU, REHEARSAL)
    items = {item.key: item for item in micro.items(machine)}
    assert [item.skip for item in items.values() if item.skip] == ["132 programs on 4 multiprocessors"] * 4
    with concurrent_grid():
        found = [micro.measured(machine, item) for item in items.values() if not item.skip]
    assert len(found) == 16
    assert all(m.rounds == REHEARSAL.rounds and 0 <= m.low <= m.value <= m.high for m in found)
    # 2 blocks of 64 KiB in two turns, and of one step's weights and operand, in the 64 cycles of the clock's stand-in.
    assert {m.value for m in found if m.name == "l2"} == {REHEARSAL.read / 64}
    assert {m.value for m in found if m.name == "shared"} == {REHEARSAL.steps * 64 * 128 * 2 / 64}


# ---- compiled, for a GPU that is not there --------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch as it would be made: the kernel, its arguments and options by name, the grid."""

    kernel: Any
    given: dict[str, Any]
    programs: int


@pytest.fixture
def launch_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """launch_of(item, device): the launch that is measured, compiled for a device, or the spin ahead of it; nothing
    runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Driver, "get_current_device", lambda self: next(DRIVERS))  # none has a kernel in memory
    seen: list[Launch] = []
    run = JITFunction.run

    def watched(self: Any, *positional: Any, grid: Any, **named: Any) -> None:
        kernel = run(self, *positional, grid=grid, **named)
        seen.append(Launch(kernel, dict(zip(self.arg_names, positional, strict=False)) | named, grid[0]))

    monkeypatch.setattr(JITFunction, "run", watched)

    def made(item: Item, device: str, spin: bool = False) -> Launch:
        # Of a rate there is nothing in no cycles.
        with compiling(hardware.DEVICES[device], "counter", 1), contextlib.suppress(ZeroDivisionError):
            item.start()()
        return next(one for one in reversed(seen) if (one.kernel.metadata.name == "spin") == spin)

    return made


def items_of(device: str) -> list[Item]:
    return [item for item in micro.items(Compiler(hardware.DEVICES[device])) if item.name not in ("clock", "memory")]


def disassembly(compiled: Any) -> list[tuple[int, str]]:
    """(address, instruction with its operands) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        line = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
    assert len(found) > 10
    return [(int(address, 16), instruction) for address, instruction in found]


def loops(sass: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of each loop, innermost first; the loop that ends every kernel, of nothing, is not one."""
    found = []
    for address, instruction in sass:
        target = re.search(r"\bBRA 0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            found.append([text for at, text in sass if int(target[1], 16) <= at <= address])
    return sorted(found, key=len)


def count(instructions: list[str], pattern: str) -> int:
    return sum(re.match(rf"(@!?U?P\w+\s+)?{pattern}", text) is not None for text in instructions)


@pytest.mark.audit
@pytest.mark.parametrize(("device", "every"), [("a100", 7), ("h200", 5)])
def test_kernels_compile_without_spills(launch_of, device, every):
    record, items = hardware.DEVICES[device], [item for item in items_of(device) if not item.skip]
    for item in items[::every]:
        made = launch_of(item, device)
        registers, sass = audit.disassemble(made.kernel.asm["cubin"])
        assert not [text for text in sass if text.startswith(("LDL", "STL"))], item
        assert made.kernel.metadata.shared <= record.shared, item
        assert registers * 32 * made.given["num_warps"] <= record.registers, item
        # Programs that wait for one another must be resident together: a grid too large is then an error, not a hang.
        assert made.given["launch_cooperative_grid"] == item.name.startswith(("exchange", "launch coop")), item
        assert made.programs == item.programs


@pytest.mark.audit
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exchange_is_the_librarys_and_all_of_it_is_in_the_loop(launch_of, protocol):
    item = next(i for i in items_of("h200") if i.key == (f"exchange {protocol}", 128, 64 * 1024))
    made = launch_of(item, "h200")
    assert made.given["share"] * 128 * 16 == 64 * 1024
    assert made.given["buffer"].numel() == compile_first.STEPS * 64 * 1024 // 2, "a slot per step"
    body = max(loops(disassembly(made.kernel)), key=len)
    tiles = made.given["GETS"]
    assert tiles == 16
    # Past L1, 16 bytes per thread and tile, by flags once, and again until all words are there.
    if protocol == "counter":
        assert count(body, r"LDG\.E\.128\.STRONG\.") == tiles
        assert count(body, r"STG\.E\.128 ") == made.given["PUTS"] == 1
    else:
        loads = [count(body, rf"LDG\.E\.128\.STRONG\.{scope}") for scope in ("SYS", "GPU")]
        assert loads == [1, 1], "of one tile: a loop inside has all"
        assert count(body, r"STG\.E\.STRONG\.GPU") == made.given["PUTS"] * 8 == 8, "one of two stores the word of both"
    assert count(body, r"RED[GS]?\.E\.ADD\.STRONG\.GPU") == (protocol == "counter")
    assert count(body, r"LDG\.E\.STRONG\.GPU") == (protocol == "counter")
    # Before the announcement of the next step, what was got decides about a store; each must have arrived by then.
    if protocol == "counter":
        assert count(body, "BAR") <= 2
        last = max(i for i, text in enumerate(body) if "FSETP.NAN" in text)
        assert any("STG.E " in text for text in body[last:])
        assert not any("BAR" in text for text in body[last:])


@pytest.mark.audit
@pytest.mark.parametrize("device", ["a100", "h200"])
def test_what_is_timed_is_in_the_loops(launch_of, device):
    """Reads of L2 past L1, barriers, and the spin's clock: in their loops, and nothing else."""
    items = {item.name: item for item in items_of(device)}
    l2 = launch_of(items["l2"], device)
    inner, outer = loops(disassembly(l2.kernel))
    # 64 KiB per program and block, 16 bytes per thread at a time.
    assert count(inner, r"LDG\.E\.128\.STRONG\.GPU") == 64 * 1024 // (16 * 32 * l2.given["num_warps"])
    assert count(outer, "LDG") == count(inner, "LDG")
    bodies = loops(disassembly(launch_of(items["barrier"], device).kernel))
    assert bodies
    assert all(count(body, "BAR") >= 1 for body in bodies), "unrolled or not"
    assert all(len(body) <= 4 * count(body, "BAR") for body in bodies)
    (body,) = loops(disassembly(launch_of(items["barrier"], device, spin=True).kernel))
    assert any("SR_CLOCKLO" in text for text in body)


@pytest.mark.audit
@pytest.mark.parametrize(("device", "payload"), [("a100", 64 * 1024), ("h200", 32 * 1024), ("h200", 128 * 1024)])
def test_swept_weights_are_read_from_shared_memory_in_each_step(launch_of, payload, device):
    item = next(i for i in items_of(device) if i.name == "shared" and i.payload == payload)
    made = launch_of(item, device)
    assert audit.homes(made.kernel.asm["ttgir"]) == Homes(registers=0, shared=payload, streamed=0)
    bodies = [body for body in loops(disassembly(made.kernel)) if count(body, "HMMA")]
    assert bodies
    t = made.given["tiling"]
    # Of one warp and step: products of 16 x 8 x 16, and reads of 512 bytes. A body may hold several steps.
    products, reads = t.m // 16 * t.hidden // 8 // 16, micro_kernels.bytes_swept(t) // 8 // 512
    for body in bodies:
        steps, rest = divmod(count(body, r"HMMA\.16816"), products)
        assert steps >= 1
        assert rest == 0
        assert count(body, r"LDSM\.16\.M88\.4") == count(body, "LDS") == steps * reads
        assert count(body, "LDG") == 0
        assert count(body, "BAR") <= steps


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def entry(name: str, programs: int, payload: int, value: float) -> Micro:
    return Micro(name, programs, payload, value, value, value, "", 15)


def test_constants_follow_their_rule():
    found = [
        entry("exchange counter", 132, 0, 0.5),
        entry("exchange counter", 132, 65536, 1.5),
        entry("exchange counter", 132, 4096, 0.7),
        entry("exchange counter", 66, 4096, 0.6),
        entry("exchange flags", 132, 4096, 0.4),
        entry("l2", 132, 262144, 50.0),
        entry("l2", 132, 65536, 60.0),
        entry("shared", 132, 32768, 100.0),
        entry("shared", 132, 196608, 120.0),
        entry("barrier", 132, 0, 0.02),
        entry("launch", 132, 0, 1.2),
        entry("launch cooperative", 132, 0, 2.2),
        entry("memory", 132, 1 << 31, 4300.0),
        entry("clock", 132, 0, 1.98),
    ]
    expected = {
        "exchange": 0.7, "l2_rate": 60.0, "shared_rate": 120.0, "barrier": 0.02, "launch": 1.2, "memory_rate": 4300.0,
        "clock": 1.98,
    }  # fmt: skip
    assert micro.constants(found) == micro.constants(found[::-1]) == expected
    assert expected.keys() == set(measurements.MEASURABLE), "no constant without a rule"
    # The most programs that there are; the announcement alone is no exchange; no number is no constant.
    assert micro.constants(found[3:4])["exchange"] == 0.6
    assert micro.constants([found[0], found[4], entry("barrier", 132, 0, 0.0)]) == {}


def test_slope_leaves_out_what_is_once_per_launch():
    asked = []

    def run(n: int) -> float:
        asked.append(n)
        return 40.0 + 0.75 * n

    assert micro.slope(run, 512) == 0.75
    assert micro.slope(run, 7) == 0.75
    assert asked == [512, 256, 7, 3]


def measured(values: list[float], cuda: bool = True) -> Micro:
    machine = Machine(CPU, Scale(rounds=5, warmups=3, settle=0.0))
    machine.cuda = cuda
    rounds = iter([100.0] * 3 + values)  # those that come first do not count
    return micro.measured(machine, Item("l2", 132, 4096, "bytes per clock", lambda: lambda: next(rounds)))


def test_a_measurement_is_median_and_quartiles():
    assert measured([5.0, 1.0, 2.0, 3.0, 4.0]) == Micro("l2", 132, 4096, 3.0, 2.0, 4.0, "bytes per clock", 5)
    with pytest.raises(RuntimeError, match=r"l2, 132 programs, 4,096 bytes: -1 .* vary by more"):
        measured([-1.0] * 5)
    assert measured([-1.0, -1.0, 2.0, 2.0, 2.0]).low == 0.0


def test_warmups_last_until_it_has_settled(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(micro, "time", clock)

    def work():
        clock.now += 0.25
        return clock.now

    item = Item("clock", 4, 0, "GHz", lambda: work)
    assert micro.measured(Machine(CPU, Scale(rounds=3, warmups=1, settle=1.0)), item).value == 1.5  # of 1.25 to 1.75


def test_the_first_call(monkeypatch):
    """In a process of its own that has nothing compiled yet; what it says when it fails is kept."""
    environments = []

    def process(command, env, **_):
        environments.append(env)
        assert command == [sys.executable, "-c", micro.FIRST_CALL]
        assert list(Path(env["TRITON_CACHE_DIR"]).iterdir()) == []
        return types.SimpleNamespace(returncode=len(environments) % 2, stdout="compiling\n3.25\n", stderr="it broke")

    monkeypatch.setattr(subprocess, "run", process)
    with pytest.raises(RuntimeError, match="the first call failed with status 1: it broke"):
        micro.first_call()
    assert micro.first_call() == Micro("first call", 1, 0, 3.25, 3.25, 3.25, "s", 1)


@pytest.mark.parametrize(("steps", "lines", "tile"), [(3, 5, 4), (1, 4, 4), (7, 0, 4), (64, 33, 8), (5, 2, 8)])
def test_expected_sums(steps, lines, tile):
    expected = [0] * tile
    for step in range(steps):
        for line in range(lines):
            expected[line % tile] += 8 * ((step * 5 + line * 3) % 64)
    assert micro_kernels.received(steps, lines, tile).tolist() == expected if lines else [0] * tile
    assert micro_kernels.received(512, 17 * 256, 256).max() < 1 << 24, "exact in float32"


def test_lines_carry_the_payload():
    for protocol in PROTOCOLS:
        assert micro_kernels.lines_of(protocol, 132, 4096) == 2
        assert micro_kernels.lines_of(protocol, 2, 4096) == 128
        assert micro_kernels.lines_of(protocol, 33, 64 * 1024) == 125
    assert micro_kernels.lines_of("counter", 16, 0) == 0, "the announcement alone"
    assert micro_kernels.lines_of("flags", 16, 0) == 1, "flags are in the data"


@pytest.mark.parametrize(("name", "largest", "sweeps"), [("h200", 128, 4), ("a100", 64, 3), ("rtx4090", 128, 2)])
def test_what_the_device_is_too_small_for_is_skipped_with_the_reason(name, largest, sweeps, monkeypatch):
    record = hardware.DEVICES[name]
    monkeypatch.setattr(Machine, "free", lambda self: 5 << 30)
    machine = Machine(CPU, Scale())
    machine.hardware, machine.cuda, machine.multiprocessors = record, True, record.multiprocessors
    found = micro.items(machine)
    ran = [item for item in found if not item.skip]
    assert {item.programs for item in ran if item.name.startswith("exchange")} == {
        n for n in (4, 16, 64, 128) if n <= largest
    }
    assert sum(item.name == "shared" for item in ran) == sweeps
    reasons = {item.name: item.skip for item in found if item.skip}
    assert reasons["memory"] == "5,368,709,120 bytes of memory are free"
    assert reasons.get("exchange flags", "") == "128 programs on 108 multiprocessors" * (name == "a100")
    assert reasons.get("shared", "").endswith(f"there are {record.shared:,}") or name == "h200"
    assert len(found) == len({item.key for item in found}) == 24 + 4 + 4 + 5


def test_time_counts_only_if_the_host_was_ahead(monkeypatch):
    """An idle device would wait for the host, and the time would be the host's."""
    late = [True, True, False]
    events: list[str] = []
    spins: list[int] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def query(self):
            return late.pop(0)

        def synchronize(self):
            events.append("wait")

        def elapsed_time(self, after):
            return 0.25  # milliseconds

    machine = Machine(CPU, Scale())
    machine.hardware, machine.cuda = hardware.DEVICES["h200"], True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(machine, "spin", lambda cycles, wanted: (spins.append(wanted), events.append("spin")))
    microseconds = machine.time(lambda: events.append("prepare"), lambda: events.append("work"))
    assert microseconds == 250.0
    assert events == ["prepare", "spin", "record", "work", "record", "wait"] * 3
    assert spins == [round(microseconds * 1980) for microseconds in (200, 400, 800)]
    late += [True] * 20
    with pytest.raises(RuntimeError, match="the host needs more than"):
        machine.time(lambda: None, lambda: None)
