"""The microbenchmarks: kernels compute what they claim, loops hold what is timed, and the arithmetic is right.

Times are for a GPU to tell; all else is rehearsed here."""

import inspect
import re
import subprocess
import tempfile
import time
import types
from dataclasses import dataclass
from typing import Any

import grid
import pytest
import torch
import triton
from grid import Delays, concurrent_grid
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu import micro, micro_kernels
from bench.gpu.micro import REHEARSAL, Item, Machine, Scale
from bench.report.results import Micro
from persistrnn.kernels.inspect import audit
from persistrnn.kernels.inspect.audit import Homes
from persistrnn.kernels.planner import hardware, measurements

CPU = torch.device("cpu")
PROTOCOLS = ("counter", "flags")


def quick(**changed: Any) -> Machine:
    """Of the interpreter, with a spin limit that a test can outlast."""
    scale = {"exchanges": 4, "lines": 4, "steps": 2, "spin_limit": 20_000, "read": 64 * 1024} | changed
    return Machine(CPU, Scale(**scale))


# ---- in the interpreter -------------------------------------------------------------------------------------------


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch):
    """delayed(operation, slow): the concurrent grid, with that program late at that operation of the exchange."""
    monkeypatch.setattr(grid, "EXCHANGE", dict.fromkeys(("put", "arrive", "wait", "get"), micro_kernels))

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


def counter_off_by_one(monkeypatch):
    wait = micro_kernels.wait
    monkeypatch.setattr(micro_kernels, "wait", lambda counter, target, *others: wait(counter, target - 1, *others))


def get_does_not_look(monkeypatch):
    monkeypatch.setattr(micro_kernels, "get", lambda pointers, mask, spin_limit, *_: (
        micro_kernels.tl.load(pointers, mask=mask, other=0.0), spin_limit
    ))  # fmt: skip


def one_slot_for_all_steps(monkeypatch):
    """Then a fast program overwrites what a slow one has yet to get."""
    put, get = micro_kernels.put, micro_kernels.get

    def first(pointers):
        start = pointers.handle.data.flat[0]
        slot = getattr(first, "start", start)
        first.start = min(slot, start)
        shift = (start - first.start) // 128 * 128
        return micro_kernels.tl.tensor(
            type(pointers.handle)(pointers.handle.data - shift, pointers.handle.dtype), pointers.type
        )

    monkeypatch.setattr(micro_kernels, "put", lambda pointers, *others: put(first(pointers), *others))
    monkeypatch.setattr(micro_kernels, "get", lambda pointers, *others: get(first(pointers), *others))


def told_another(monkeypatch):
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
        (counter_off_by_one, "counter", "put", "got before it was put"),
        (get_does_not_look, "flags", "put", "got before it was put"),
        (one_slot_for_all_steps, "counter", "get", "sums: .* results are wrong"),
        (told_another, "counter", "put", "sums: .* results are wrong"),
        (told_another, "flags", "put", "sums: .* results are wrong"),
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


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["read", "add", "clock"])
def test_the_other_kernels_check_what_they_compute(monkeypatch, name):
    """All right as they are; with a step left out, an error."""
    run = {
        "read": lambda: micro._broadcast(quick(read=128 * 1024), 64 * 1024),
        "add": lambda: micro._sweep(quick(), 128),
        "clock": lambda: micro._clock(quick(cycles=640)),
    }[name]
    run()()
    original, calls = getattr(micro_kernels, name), []

    def mutant(*arguments):
        calls.append(name)
        if name == "read":
            return original(*arguments) * (len(calls) > 1)
        if name == "add":
            return arguments[4] if len(calls) == 1 else original(*arguments)
        return original(*arguments) + (1 << 20) * (len(calls) == 2)

    monkeypatch.setattr(micro_kernels, name, mutant)
    if name != "clock":
        with pytest.raises(RuntimeError, match="results are wrong, the first at"):
            run()()
        return
    # A clock that jumps ends the spin at once, and the cycles say so.
    machine = quick(cycles=640)
    cycles = machine.new(1, dtype=torch.int64)
    machine.spin(cycles, 640)
    assert cycles.item() > 1 << 20


@pytest.mark.interpreter
def test_counted_steps_are_checked(monkeypatch):
    class Once:
        """A kernel that is launched once too often, or takes one step too many."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, programs):
            def call(count, *arguments, **options):
                self.kernel[programs](count, *arguments, **options)
                count += 1

            return call

    assert micro._barrier(quick(barriers=4))() is not None
    assert micro._launches(quick(launches=4), True)() is not None
    monkeypatch.setattr(micro_kernels, "barriers", Once(micro_kernels.barriers))
    monkeypatch.setattr(micro_kernels, "touch", Once(micro_kernels.touch))
    with pytest.raises(RuntimeError, match="barriers: how many: 4 of 4"):
        micro._barrier(quick(barriers=4))()
    with pytest.raises(RuntimeError, match=r"launches: how many: 4 of 4 .* 8 instead of 4"):
        micro._launches(quick(launches=4), False)()


@pytest.mark.interpreter
def test_rehearsal_measures_everything_once():
    found: list[Micro] = []
    said: list[str] = []
    with concurrent_grid():
        assert micro.measure(found.append, set(), CPU, said.append, None) == []
    skipped = [line for line in said if "skipped" in line]
    assert len(skipped) == 4
    assert all(line.endswith("132 programs on 4 multiprocessors") for line in skipped)
    keys = [(m.name, m.programs, m.payload) for m in found]
    assert keys == [item.key for item in micro.items(Machine(CPU, REHEARSAL)) if not item.skip]
    assert len(keys) == len(set(keys)) == 16
    assert {m.name for m in found} == {
        "clock", "exchange counter", "exchange flags", "l2", "shared", "barrier", "launch", "launch cooperative",
        "memory",
    }  # fmt: skip
    assert all(m.rounds == REHEARSAL.rounds and 0 <= m.low <= m.value <= m.high for m in found)
    # 2 blocks of 64 KiB in two turns, and of one step's weights and operand, in the 64 cycles of the clock's stand-in.
    assert {m.value for m in found if m.name == "l2"} == {REHEARSAL.read / 64}
    assert {m.value for m in found if m.name == "shared"} == {REHEARSAL.steps * (64 + 8) * 128 * 2 / 64}

    # What is done is not done again, and what the deadline leaves out is named.
    again: list[Micro] = []
    left = micro.measure(again.append, set(keys[:-2]), CPU, said.append, time.monotonic())
    assert (again, left) == ([], ["launch cooperative, 4 programs, 0 bytes", "memory, 4 programs, 4,096 bytes"])
    assert micro.measure(again.append, set(keys[:-1]), CPU, said.append, time.monotonic() + 600) == []
    assert [m.name for m in again] == ["memory"]


# ---- compiled, for a GPU that is not there --------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch as it would be made: the kernel, its arguments by name, the grid, the options."""

    kernel: Any
    arguments: dict[str, Any]
    programs: int
    options: dict[str, Any]

    def compile(self, arch: str) -> Any:
        kinds = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
        names = self.kernel.arg_names
        values = [self.arguments[name] for name in names]
        constant = [name for name, parameter in zip(names, self.kernel.params, strict=True) if parameter.is_constexpr]
        signature = {
            name: "constexpr" if name in constant else kinds[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            for name, value in zip(names, values, strict=True)
        }
        aligned = {(i,): audit.ALIGNED for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(
            self.kernel, signature, {(names.index(name),): self.arguments[name] for name in constant}, aligned
        )
        return triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=self.options)

    def identity(self) -> str:
        constexprs = {k: v for k, v in self.arguments.items() if not isinstance(v, torch.Tensor | int) or k.isupper()}
        return f"{self.kernel.__name__} {constexprs} {self.options}"


class Recorded(Exception):
    """Ends a launch that has been seen."""


@pytest.fixture
def launch_of(monkeypatch: pytest.MonkeyPatch):
    """launch_of(item): the launch that an item makes; no kernel runs."""

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, programs: tuple[int]) -> Any:
            def call(*positional: Any, **named: Any) -> None:
                options = {k: v for k, v in named.items() if k not in self.kernel.arg_names}
                arguments = dict(zip(self.kernel.arg_names, positional, strict=False))
                arguments |= {k: v for k, v in named.items() if k in self.kernel.arg_names}
                assert arguments.keys() == set(self.kernel.arg_names)
                raise Recorded(Launch(self.kernel, arguments, programs[0], options))

            return call

    for name in ("exchange_rounds", "read_again", "sweep_shared", "barriers", "spin", "touch"):
        monkeypatch.setattr(micro_kernels, name, Recorder(getattr(micro_kernels, name)))

    def record(item: Item) -> Launch:
        with pytest.raises(Recorded) as caught:
            item.start()()
        return caught.value.args[0]

    return record


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """gpu(name): a machine like the one of that name, as far as it goes without one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 140 << 30))
    monkeypatch.setattr(Machine, "error_word", lambda machine: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(Machine, "time", lambda machine, prepare, work: (prepare(), work())[1])

    def make(name: str, scale: Scale = Scale()) -> Machine:  # noqa: B008
        machine = Machine(CPU, scale)
        machine.hardware, machine.cuda = hardware.DEVICES[name], True
        machine.multiprocessors = machine.hardware.multiprocessors
        return machine

    return make


def compiled_items(machine: Machine, launch_of: Any) -> dict[Item, Launch]:
    """Each kernel once."""
    found: dict[str, tuple[Item, Launch]] = {}
    for item in micro.items(machine):
        if not item.skip and item.name != "memory":
            made = launch_of(item)
            found.setdefault(made.identity(), (item, made))
    return dict(found.values())


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
@pytest.mark.parametrize(("arch", "name"), [("sm_80", "a100"), ("sm_90", "h200")])
def test_every_kernel_compiles_without_spills(gpu, launch_of, arch, name):
    machine = gpu(name)
    found = compiled_items(machine, launch_of)
    assert {item.name for item in found} == {item.name for item in micro.items(machine)} - {"memory"}
    for item, made in list(found.items())[:: 1 if arch == "sm_90" else 3]:
        compiled = made.compile(arch)
        registers, sass = audit.disassemble(compiled.asm["cubin"])
        assert not [text for text in sass if text.startswith(("LDL", "STL"))], item
        assert compiled.metadata.shared <= machine.hardware.shared, item
        assert registers * 32 * made.options["num_warps"] <= machine.hardware.registers, item
        # Programs that wait for one another must be resident together: a grid too large is then an error, not a hang.
        assert made.options["launch_cooperative_grid"] == item.name.startswith(("exchange", "launch coop")), item
        assert made.programs == item.programs


@pytest.mark.audit
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exchange_is_the_librarys_and_all_of_it_is_in_the_loop(gpu, launch_of, protocol):
    machine = gpu("h200")
    item = next(i for i in micro.items(machine) if i.key == (f"exchange {protocol}", 132, 64 * 1024))
    made = launch_of(item)
    share = made.arguments["share"]
    assert 132 * share * 16 >= 64 * 1024 > 132 * (share - 1) * 16
    assert made.arguments["buffer"].numel() == machine.scale.exchanges * 132 * share * 8, "a slot per step"
    compiled = made.compile("sm_90")
    body = max(loops(disassembly(compiled)), key=len)
    tiles = -(-132 * share // 256)
    assert tiles == made.arguments["GETS"] == 17
    # Past L1, 16 bytes per thread and tile; flags are one element each, loaded once and again until they are there.
    if protocol == "counter":
        assert count(body, r"LDG\.E\.128\.STRONG\.") == tiles
        assert count(body, r"STG\.E\.128 ") == made.arguments["PUTS"] == 1
    else:
        assert count(body, r"LDG\.E\.U16\.STRONG\.GPU") == 8 * 2, "of one tile: a loop inside has all"
        assert count(body, r"STG\.E\.U16\.STRONG\.GPU") == made.arguments["PUTS"] * 8 == 8
    assert count(body, r"RED[GS]?\.E\.ADD\.STRONG\.GPU") == (protocol == "counter")
    assert count(body, r"LDG\.E\.STRONG\.GPU") == (protocol == "counter")
    # Before the announcement of the next step, what was got decides about a store; each must have arrived by then.
    if protocol == "counter":
        assert count(body, "BAR") <= 2
        last = max(i for i, text in enumerate(body) if "FSETP.NAN" in text)
        assert any("STG.E " in text for text in body[last:])
        assert not any("BAR" in text for text in body[last:])


@pytest.mark.audit
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_broadcast_is_read_in_each_turn(gpu, launch_of, arch):
    machine = gpu("h200")
    item = next(i for i in micro.items(machine) if i.name == "l2")
    made = launch_of(item)
    inner, outer = loops(disassembly(made.compile(arch)))
    # 64 KiB per program and block, 16 bytes per thread at a time, past L1.
    assert count(inner, r"LDG\.E\.128\.STRONG\.GPU") == 64 * 1024 // (16 * 32 * made.options["num_warps"])
    assert count(outer, "LDG") == count(inner, "LDG"), "and nothing else"
    assert made.arguments["turns"] * 64 * 1024 * made.arguments["blocks"] == machine.scale.read


@pytest.mark.audit
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("payload", [32 * 1024, 64 * 1024, 128 * 1024])
def test_swept_weights_are_read_from_shared_memory_in_each_step(gpu, launch_of, payload, arch):
    item = next(i for i in micro.items(gpu("h200")) if i.name == "shared" and i.payload == payload)
    made = launch_of(item)
    compiled = made.compile(arch)
    assert audit.homes(compiled.asm["ttgir"]) == Homes(registers=0, shared=payload, streamed=0)
    bodies = [body for body in loops(disassembly(compiled)) if count(body, "HMMA")]
    assert bodies
    t = made.arguments["tiling"]
    # Of one warp and step: products of 16 x 8 x 16, and reads of 512 bytes. A body may hold several steps.
    products, reads = t.m // 16 * t.hidden // 8 // 16, micro_kernels.bytes_swept(t) // 8 // 512
    for body in bodies:
        steps, rest = divmod(count(body, r"HMMA\.16816"), products)
        assert steps >= 1
        assert rest == 0
        assert count(body, r"LDSM\.16\.M88\.4") == count(body, "LDS") == steps * reads
        assert count(body, "LDG") == 0
        assert count(body, "BAR") <= steps


@pytest.mark.audit
def test_barriers_and_clock_are_in_their_loops(gpu, launch_of):
    found = {item.name: launch_of(item) for item in micro.items(gpu("h200")) if item.name in ("barrier", "clock")}
    bodies = loops(disassembly(found["barrier"].compile("sm_90")))
    # Unrolled or not: nothing but barriers, and what counts them.
    assert bodies
    assert all(count(body, "BAR") >= 1 for body in bodies)
    assert all(len(body) <= 4 * count(body, "BAR") for body in bodies)
    (body,) = loops(disassembly(found["clock"].compile("sm_90")))
    assert any("SR_CLOCKLO" in text for text in body)


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


def test_summary_is_median_and_quartiles():
    item = Item("l2", 132, 4096, "bytes per clock", lambda: lambda: 0.0)
    assert micro.summary(item, [5.0, 1.0, 2.0, 3.0, 4.0], True) == Micro(
        "l2", 132, 4096, 3.0, 2.0, 4.0, "bytes per clock", 5
    )
    with pytest.raises(RuntimeError, match=r"l2, 132 programs, 4,096 bytes: -1 .* vary by more"):
        micro.summary(item, [-1.0] * 5, True)
    assert micro.summary(item, [-1.0, -1.0, 2.0, 2.0, 2.0], True).low == 0.0


def test_warmups_do_not_count():
    values = iter(range(1, 100))
    item = Item("clock", 4, 0, "GHz", lambda: lambda: float(next(values)))
    assert micro.measured(Machine(CPU, Scale(rounds=5, warmups=3, settle=0.0)), item).value == 6.0  # of 4 to 8


def test_warmups_last_until_it_has_settled(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(micro, "time", clock)

    def work():
        clock.now += 0.25
        return clock.now

    item = Item("clock", 4, 0, "GHz", lambda: work)
    assert micro.measured(Machine(CPU, Scale(rounds=3, warmups=1, settle=1.0)), item).value == 1.5  # of 1.25 to 1.75


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


@pytest.mark.parametrize(("name", "largest", "sweeps"), [("h200", 132, 4), ("a100", 66, 3), ("rtx4090", 66, 2)])
def test_what_the_device_is_too_small_for_is_skipped_with_the_reason(gpu, name, largest, sweeps):
    found = micro.items(gpu(name))
    ran = [item for item in found if not item.skip]
    assert {item.programs for item in ran if item.name.startswith("exchange")} == {
        n for n in (2, 4, 16, 33, 66, 132) if n <= largest
    }
    assert sum(item.name == "shared" for item in ran) == sweeps
    record = hardware.DEVICES[name]
    reasons = {item.key: item.skip for item in found if item.skip}
    if largest < 132:
        assert reasons["exchange flags", 132, 0] == f"132 programs on {record.multiprocessors} multiprocessors"
        assert reasons["shared", record.multiprocessors, 196608].endswith(f"there are {record.shared:,}")
    assert len(found) == len({item.key for item in found}) == 36 + 4 + 4 + 5


def test_a_copy_needs_memory(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 140 << 30))
    (item,) = [item for item in micro.items(gpu("h200")) if item.name == "memory"]
    assert item.skip == "5,368,709,120 bytes of memory are free"


def test_skips_are_told_and_are_not_left_over(gpu, monkeypatch):
    machine = gpu("a100")
    monkeypatch.setattr(micro, "Machine", lambda device, scale: machine)
    monkeypatch.setattr(torch.cuda, "device", lambda device: micro.contextlib.nullcontext())
    said: list[str] = []
    left = micro.measure(lambda entry: None, set(), torch.device("cuda"), said.append, time.monotonic())
    assert sum("skipped: 132 programs on 108 multiprocessors" in line for line in said) == 6
    assert len(left) == 49 - 6 - 1
    assert not [name for name in left if "132 programs" in name]
    assert "exchange counter, 66 programs, 4,096 bytes" in left


def test_without_gpu_and_interpreter_nothing_is_measured():
    said: list[str] = []
    assert micro.measure(lambda entry: pytest.fail("a number"), set(), CPU, said.append, None) == []
    assert said == ["microbenchmarks skipped: they need a CUDA device, or TRITON_INTERPRET=1 for a rehearsal"]


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


def test_kernels_take_the_librarys_exchange():
    """What is measured is what runs."""
    from persistrnn.kernels.device import exchange, product

    for name in ("put", "arrive", "wait", "get", "read"):
        assert getattr(micro_kernels, name) is getattr(exchange, name)
    for name in ("resident", "add"):
        assert getattr(micro_kernels, name) is getattr(product, name)
    assert "debug_barrier" not in inspect.getsource(micro_kernels.exchange_rounds.fn)
