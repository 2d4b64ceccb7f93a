"""The compiled kernels, run on a CPU for longer: every case of the exchange, of marks and of layer pipelines, planned
sizes up to H=1024, offsets past 31 bits, more schedules. Run by `make emulate`."""

import dataclasses

import accuracy
import pytest
import test_exchange
import test_lengths_and_resets
import test_memory_modes
import test_pipeline
import torch
from accuracy import failures
from emulated import ARCHITECTURES, precise
from emulator import EmulatorError, Schedule
from emulator.opcodes import ACQUIRE, LOAD, RELEASE, STORE
from forced import force, force_pipelines
from pairs import CELLS

import persistrnn
from persistrnn.kernels import launch
from persistrnn.kernels.planner import memory
from persistrnn.kernels.tensors import Weights

pytestmark = [pytest.mark.emulator_long, pytest.mark.timeout(900)]

# What a slow program is slow at; None: everything.
KINDS = (None, STORE, ACQUIRE, RELEASE, LOAD)
# The tensor instructions of Blackwell work on memory of their own, which is not modelled: smaller products there are
# those of Ampere.
EVERY = (*ARCHITECTURES, "sm_100")


def schedule(index):
    return Schedule(seed=index, slow=((index % 2, None, KINDS[index % len(KINDS)]),))


def check(bound_failures, arch):
    """tcgen05 ends a case of sm_100, and nothing else does."""
    try:
        assert bound_failures() == []
    except EmulatorError as error:
        if arch != "sm_100" or "does not know" not in str(error):
            raise
        pytest.skip(f"not modelled: {error}")


# What the interpreter runs in a concurrent grid: (how it is forced, protocol, choice, case).
CASES = [
    *(
        (force, protocol, chosen, accuracy.Case(cell, dtype, hidden, batch, 3, layers, bidirectional, True, True))
        for cell, dtype, protocol, hidden, batch, layers, bidirectional, chosen in test_exchange.CASES
    ),
    *(
        (force_pipelines, protocol, chosen, accuracy.Case(cell, dtype, hidden, batch, 4, layers, False, bias, state))
        for cell, dtype, protocol, hidden, batch, layers, bias, state, chosen in test_pipeline.CASES
    ),
    *((force, *marked) for marked in test_lengths_and_resets.SLICED),
    *((force_pipelines, *marked) for marked in test_lengths_and_resets.PIPELINES),
]


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("arch", EVERY)
def test_cases_of_the_interpreter(emulated, monkeypatch, arch, index):
    how, protocol, chosen, case = CASES[index]
    precise(monkeypatch, "ieee")
    emulated(arch, units=("programs", "warps")[index % 2], schedule=schedule(index))
    how(monkeypatch, protocol, **chosen)
    check(lambda: failures(case), arch)


@pytest.mark.parametrize("case", test_memory_modes.CASES, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_modes_agree_in_chunks(emulated, forced, monkeypatch, arch, case):
    cell, dtype, layers, bidirectional, kind, steps, chunk = case
    precise(monkeypatch, "ieee")
    emulated(arch, units="rows")
    forced()
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: chunk)
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "backend": "persistent", "dtype": dtype}
    layer = getattr(persistrnn, cell.upper())(5, 19, layers, **options)
    x, state = torch.randn(steps, 3, 5, dtype=dtype), test_memory_modes.states_of(layer, 3, dtype)
    given = test_memory_modes.cuts(kind, steps, 3, layer, dtype)
    found = [
        test_memory_modes.run(test_memory_modes.copies(layer, save=save), x, state, **dict(given))
        for save in memory.MODES
    ]
    for other in found[1:]:
        for a, b in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]], strict=True):
            assert (a.float() - b.float()).norm() <= 4 * torch.finfo(dtype).eps * a.float().norm() + 1e-30


PLANNED = [
    # cell, dtype, hidden, batch
    ("lstm", "bf16", 64, 64),
    ("gru", "fp16", 128, 16),
    ("gru", "fp32", 100, 3),
    ("lstm", "fp16", 256, 16),
    ("gru", "bf16", 320, 1),
    ("lstm", "fp32", 512, 16),
    ("gru", "bf16", 640, 33),
    ("lstm", "bf16", 1000, 3),
    ("lstm", "bf16", 1024, 16),
    ("gru", "fp16", 1024, 64),
]


@pytest.mark.parametrize(("cell", "dtype", "hidden", "batch"), PLANNED)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_planned_sizes(emulated, monkeypatch, arch, cell, dtype, hidden, batch):
    precise(monkeypatch, "ieee")
    emulated(arch, units="rows")
    assert failures(accuracy.Case(cell, dtype, hidden, batch, 3, 1, hidden == 256, True, True)) == []


@pytest.mark.parametrize("index", range(24))
def test_equal_bits_under_more_schedules(emulated, forced, index):
    protocol, chosen = [("counter", {"k_parts": 2}), ("flags", {"k_parts": 2}), ("counter", {"homes": "all three"})][
        index % 3
    ]
    found = []
    for how in (Schedule(order="turns"), schedule(index)):
        emulated(ARCHITECTURES[index % 2], schedule=how, units=("programs", "warps")[index // 3 % 2])
        forced(protocol, **chosen)
        found.append(accuracy.run(accuracy.Case("lstm", "bf16", 32, 3, 4, 1, False, True, True), seed=0)[0])
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("cell", CELLS)
def test_offsets_past_31_bits(emulated, monkeypatch, arch, cell):
    """The last rows of a batch of 2**31 gates and more, of which nothing else is in memory: the bits of these rows
    alone."""
    emulated(arch)
    torch.use_deterministic_algorithms(False)  # which would fill what nobody touches
    H, T, rows, gates = 64, 64, 8, CELLS[cell].gates
    B = 2**31 // (T * gates * H) // 16 * 16 + 1600
    assert T * B * gates * H > 2**31
    only_the_last_job(monkeypatch)
    torch.manual_seed(0)
    made = {"weight_hh": torch.randn(1, gates * H, H).mul(0.1), "bias_hh": torch.randn(1, gates * H)}
    few = {"x": torch.randn(T, rows, 1, gates * H), "d": torch.randn(T, rows, 1, H)}
    made, few = ({n: t.half() for n, t in some.items()} for some in (made, few))
    found = []
    for batch in (rows, B):
        x, d = (torch.empty(T, batch, *few[n].shape[2:], dtype=torch.half) for n in ("x", "d"))
        x[:, -rows:], d[:, -rows:] = few["x"], few["d"]
        zeros = torch.zeros(1, batch, H, dtype=torch.half)
        states = [zeros] * CELLS[cell].states
        kept = launch.forward(CELLS[cell], x, Weights(**made), states, "ieee", save=True)
        dx, dr, *_ = launch.backward(CELLS[cell], [d], states, made["weight_hh"], None, kept, "ieee")
        found.append([t[0, :, -rows:] for t in (kept.states[0][:, 1:-1], kept.saved, dx, dr)])
    for alone, among in zip(*found, strict=True):
        assert torch.equal(alone, among)


def only_the_last_job(monkeypatch):
    """Each job in a launch of its own, and of those the last one alone."""
    choose = launch.choose

    def one_by_one(*arguments):
        plan = choose(*arguments)
        parts = {n: dataclasses.replace(getattr(plan, n), groups=1) for n in ("forward", "backward")}
        return dataclasses.replace(plan, **parts)

    class Last:
        def __init__(self, kernel):
            self.kernel, self.__name__ = kernel, kernel.__name__

        def __getitem__(self, grid):
            def run(**arguments):
                if arguments["first_job"] == arguments["tiling"].jobs(arguments["B"]) - 1:
                    self.kernel[grid](**arguments)

            return run

    monkeypatch.setattr(launch, "choose", one_by_one)
    for name in ("scan_forward", "scan_backward"):
        monkeypatch.setattr(launch, name, Last(getattr(launch, name)))
