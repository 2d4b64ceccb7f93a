"""The compiled kernels, run on a CPU: right, without a race or an access out of bounds, under any schedule.

`make emulate` runs more of them for longer (test_emulated_long.py).
"""

from unittest import mock

import accuracy
import emulated as cases
import own_cells
import pytest
import recurrences
import torch
import triton
from accuracy import failures
from emulated import ARCHITECTURES, COUNTER, FLAGS, GROUPS, precise, scans
from emulator import Schedule
from emulator.opcodes import ACQUIRE, LOAD, RELEASE, STORE
from forced import force_pipelines
from gpu import operands, outputs_and_gradients
from pairs import make_layer

import persistrnn
from persistrnn import reference
from persistrnn.kernels import launch
from persistrnn.kernels.cells import BUILT_IN
from persistrnn.kernels.device.exchange import Exchange
from persistrnn.kernels.planner import memory

pytestmark = pytest.mark.emulator

RING = {"units": 32, "batch_tile": 32, "streamed_k_block": 32, "ring": 3}

# One slice, several, both splits, every home, streams, batch tiles, directions, both protocols.
CASES = [
    # cell, dtype, protocol, hidden, batch, layers, bidirectional, chosen
    ("lstm", "fp32", "counter", 13, 3, 1, False, {"units": 16}),  # one slice
    ("gru", "bf16", "counter", 13, 3, 1, True, {"units": 16, "homes": "shared"}),
    ("lstm", "bf16", "counter", 21, 17, 1, False, {"homes": "all three"}),
    ("gru", "fp16", "counter", 29, 1, 1, True, {"homes": "shared and stream", "splits": 2}),
    ("lstm", "fp16", "flags", 22, 3, 1, False, {"homes": "registers and shared"}),
    ("gru", "fp32", "flags", 13, 3, 1, False, {"homes": "stream", "splits": 2}),
    ("lstm", "fp32", "counter", 29, 3, 1, False, {"k_parts": 2}),
    ("gru", "bf16", "flags", 98, 3, 1, False, {"k_parts": 2, "units": 32, "homes": "all three"}),
    ("lstm", "bf16", "counter", 27, 19, 1, False, {"subtiles": 2, "batch_tile": 8, "homes": "shared"}),
    ("gru", "fp16", "counter", 61, 11, 1, False, {"k_parts": 2, "units": 16, "subtiles": 2, "batch_tile": 8}),
    # Several parts of K per warp.
    ("gru", "bf16", "counter", 45, 3, 1, False, {"splits": 8, "homes": "registers and shared"}),
    ("lstm", "fp16", "flags", 46, 3, 1, False, {"splits": 8, "batch_tile": 8, "k_parts": 2}),
    # Streamed through a ring, for a wide batch tile; products of warp groups on sm_90.
    ("lstm", "bf16", "counter", 104, 19, 1, False, {"homes": "shared and stream", **RING}),
    ("gru", "fp16", "counter", 136, 33, 1, False, {"homes": "stream", **RING, "units": 64}),
    ("lstm", "fp16", "counter", 112, 3, 1, True, {"homes": "shared and stream", **RING, "k_parts": 2}),
    ("lstm", "bf16", "flags", 104, 19, 1, False, {"homes": "stream", **RING}),
]
# In warps one program has other interleavings within; in rows all of a group move together.
UNITS = ("programs", "warps", "rows")


# In turn on each architecture; three on both.
RUNS = [(ARCHITECTURES[i % 2], i) for i in range(len(CASES))] + [("sm_90", 2), ("sm_80", 5), ("sm_90", 14)]


@pytest.mark.parametrize(
    ("arch", "index"), RUNS, ids=lambda i: i if isinstance(i, str) else "-".join(map(str, CASES[i][:4]))
)
def test_compiled_kernels_keep_the_bound(emulated, forced, monkeypatch, arch, index):
    cell, dtype, protocol, hidden, batch, layers, bidirectional, chosen = CASES[index]
    precise(monkeypatch, "ieee")
    session = emulated(arch, units=UNITS[index % 3], schedule=Schedule(seed=index, slow=((index % 2, None, None),)))
    forced(protocol, **chosen)
    assert failures(accuracy.Case(cell, dtype, hidden, batch, 3, layers, bidirectional, True, True)) == []
    assert {*scans(session)} == {"scan_forward", "scan_backward"}


@pytest.mark.parametrize(
    ("arch", "cell", "dtype", "batch", "chosen"),
    [
        ("sm_80", "gru", "fp32", 3, {"units": 16}),
        ("sm_90", "lstm", "bf16", 9, {"subtiles": 2, "batch_tile": 8, "homes": "shared"}),
    ],
)
def test_nothing_is_read_past_the_last_step(emulated, forced, monkeypatch, arch, cell, dtype, batch, chosen):
    """Where a step's own loads are a step ahead: of one step, in both directions."""
    precise(monkeypatch, "ieee")
    session = emulated(arch, units="rows")
    forced("counter", **chosen)
    assert failures(accuracy.Case(cell, dtype, 13, batch, 1, 1, True, True, True)) == []
    assert {*scans(session)} == {"scan_forward", "scan_backward"}


@pytest.mark.parametrize(
    ("cell", "batch", "cut", "chosen"),
    [("lstm", 9, False, {"homes": "shared", "subtiles": 2, "batch_tile": 8}), ("gru", 3, True, {"k_parts": 2})],
)
def test_the_last_states_of_inference(emulated, forced, cell, batch, cut, chosen):
    """Without gradients the kernel itself gives out the last h: with all else that of a call that keeps everything, to
    the bit, without a race."""
    session = emulated("sm_90", units="warps", schedule=Schedule(seed=1))
    forced(**chosen)
    layer = make_layer(cell, 5, 21, bidirectional=cut, backend="persistent", dtype=torch.bfloat16)
    x, given = torch.randn(2, batch, 5, dtype=torch.bfloat16), {}
    if cut:
        given["lengths"] = torch.tensor([1, 2, 0])
    expected = layer(x, **given)
    with torch.no_grad():
        found = layer(x, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert scans(session) == ["scan_forward"] * 2


# Parameters per unit, four states and bits, nothing saved, extras.
FURTHER = [
    # cell, dtype, protocol, hidden, chosen
    ("peephole", "fp32", "counter", 13, {"units": 16}),  # one slice
    ("slstm", "bf16", "counter", 13, {"units": 16}),
    ("peephole", "bf16", "flags", 14, {"homes": "registers and shared"}),
    ("slstm", "fp32", "counter", 29, {"k_parts": 2}),
    ("rnn_tanh", "fp16", "counter", 13, {"units": 16}),
    ("rnn_tanh", "bf16", "flags", 22, {"homes": "shared and stream", "splits": 2}),
    ("rnn_relu", "fp32", "flags", 13, {"homes": "shared"}),
    ("coupled", "fp16", "flags", 14, {"homes": "stream"}),
    ("mgu", "bf16", "counter", 13, {"subtiles": 2, "batch_tile": 8, "homes": "shared"}),
    ("janet", "fp32", "counter", 13, {"homes": "all three"}),
    ("zoneout", "fp16", "counter", 13, {}),
    ("lstm_noise", "bf16", "flags", 14, {"homes": "shared"}),
]


@pytest.mark.parametrize("index", range(len(FURTHER)), ids=lambda i: "-".join(map(str, FURTHER[i][:4])))
def test_further_cells_keep_the_bound(emulated, forced, monkeypatch, index):
    """In turn on each architecture; with rows that end and begin anew."""
    name, dtype, protocol, hidden, chosen = FURTHER[index]
    cell, dtype = own_cells.cell_of(name), accuracy.DTYPES[dtype]
    schedule = Schedule(seed=index, slow=((index % 2, None, None),))
    session = emulated(ARCHITECTURES[index % 2], units=UNITS[index // 2 % 3], schedule=schedule)
    forced(protocol, **chosen)
    assert recurrences.broken(cell, dtype, recurrences.given(cell, 1, dtype, hidden, marked=True)) == []
    assert {*scans(session)} == {"scan_forward", "scan_backward"}


def test_no_cell_is_left_out():
    assert {name for name, *_ in (*CASES, *FURTHER)} >= {*BUILT_IN, "lstm_noise"}


@pytest.mark.parametrize(
    ("arch", "cell", "protocol", "chosen"),
    [
        ("sm_80", "lstm", "counter", {}),
        ("sm_90", "gru", "flags", {"homes": "shared"}),
        ("sm_80", "gru", "flags", {"k_parts": 2}),
        ("sm_90", "lstm", "counter", {"k_parts": 2, "homes": "shared", "splits": 4}),
    ],
)
def test_a_stack_in_one_launch(emulated, monkeypatch, arch, cell, protocol, chosen):
    session = emulated(arch, schedule=Schedule(seed=1, slow=((0, None, None),), rarely=20))
    force_pipelines(monkeypatch, protocol, **chosen)
    precise(monkeypatch, "ieee")
    hidden = 30 if "k_parts" in chosen else 14
    assert failures(accuracy.Case(cell, "bf16", hidden, 3, 4, 3, False, True, True)) == []
    assert scans(session) == ["scan_forward", "scan_backward"]


def test_a_stack_with_rows_that_begin_anew(emulated, monkeypatch):
    """In two dimensions: both products' partial sums in one exchange."""
    session = emulated("sm_90", units="rows", schedule=Schedule(seed=2))
    force_pipelines(monkeypatch, k_parts=2)
    precise(monkeypatch, "ieee")
    assert failures(accuracy.Case("lstm", "fp32", 29, 3, 4, 2, False, **accuracy.CUT)) == []
    assert scans(session) == ["scan_forward", "scan_backward"]


@pytest.mark.parametrize(
    ("arch", "protocol", "case"),
    [
        ("sm_90", "counter", accuracy.Case("lstm", "bf16", 13, 3, 5, 1, False, **accuracy.CUT)),
        ("sm_80", "flags", accuracy.Case("gru", "fp32", 13, 3, 4, 1, True, **accuracy.CUT)),
    ],
    ids=["lstm", "gru"],
)
def test_rows_that_begin_anew_or_end(emulated, forced, monkeypatch, arch, protocol, case):
    precise(monkeypatch, "ieee")
    emulated(arch)
    forced(protocol)
    assert failures(case) == []


@pytest.mark.parametrize(
    ("arch", "cell", "dtype"), [("sm_80", "lstm", torch.bfloat16), ("sm_90", "gru", torch.float32)]
)
def test_chunks_of_time(emulated, forced, monkeypatch, arch, cell, dtype):
    """c and the gradients of the states in float32, and the gates formed again."""
    precise(monkeypatch, "ieee")
    session = emulated(arch, units="rows")
    forced(homes="registers and shared")
    found = []
    for save in ("gates", "state"):
        monkeypatch.setattr(memory, "chunk_steps", lambda *_: 2)
        torch.manual_seed(0)
        layer = getattr(persistrnn, cell.upper())(5, 19, backend="persistent", dtype=dtype, save=save)
        y, _ = layer(x := torch.randn(5, 3, 5, dtype=dtype, requires_grad=True))
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    assert "activate" in [report.kernel.name for report in session.reports]
    for gates, state in zip(*found, strict=True):
        assert (gates - state).float().norm() <= 4 * torch.finfo(dtype).eps * gates.float().norm()


# Of 64 units.
ONE_SLICE = {"units": 64, "homes": "shared"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_planned(emulated, monkeypatch, arch):
    session = emulated(arch, units="rows")
    assert failures(accuracy.Case("lstm", "bf16", 64, 16, 3, 1, False, True, True)) == []
    assert any(session.reports[0].kernel.uses(product) for product in ("mma", "wgmma"))


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_slice(emulated, forced, monkeypatch, arch, rows):
    """On Hopper warp groups multiply (wgmma), with an operand of 8 rows that has no swizzle; on Triton 3.6.0 warps."""
    session = emulated(arch, units="rows")
    forced("counter", **ONE_SLICE, batch_tile=rows)
    assert failures(accuracy.Case("lstm", "bf16", 64, 16, 3, 1, False, True, True)) == []
    groups = arch == "sm_90" and (rows == 16 or not triton.__version__.startswith("3.6."))
    assert session.reports[0].kernel.uses("wgmma" if groups else "mma")


# ---- tf32 ---------------------------------------------------------------------------------------------------------


def tf32_errors(monkeypatch, cell, hidden, steps=8, batch=16):
    """(ours, that of rounded operands) of the outputs and of the gradients: relative RMS errors, pooled over each."""
    precise(monkeypatch, "tf32")
    monkeypatch.setattr("gpu.DEVICE", "cpu")
    made, cotangents = operands(cell, hidden, batch, steps, 1, torch.float32)
    ours = outputs_and_gradients(cell, made, cotangents)
    leaves = [t.detach().double().requires_grad_() for t in made.values()]
    x_gates, weight, bias, *initial = leaves
    others = []
    for _ in range(2):
        y, _, finals = reference.recurrent(cell, x_gates, weight, bias, initial)
        found = [y, *finals]
        others.append([*found, *torch.autograd.grad(found, leaves, [c.double() for c in cotangents])])
        cases.with_rounded_operands(monkeypatch)
    truth, witness = others
    outputs = len(cotangents)

    def error(found, part):
        each = [
            ((a - b).square().sum() / b.square().sum()).item() for a, b in zip(found[part], truth[part], strict=True)
        ]
        return (sum(each) / len(each)) ** 0.5

    return [(error(ours, part), error(witness, part)) for part in (slice(outputs), slice(outputs, None))]


@pytest.mark.parametrize(
    ("arch", "cell", "hidden", "chosen"),
    [
        ("sm_80", "lstm", 128, None),
        ("sm_90", "lstm", 128, None),
        ("sm_80", "gru", 61, {"homes": "all three"}),
        ("sm_90", "lstm", 61, {"k_parts": 2, "units": 16, "homes": "stream"}),
    ],
    ids=["planned sm_80", "planned sm_90", "all homes", "two dimensions"],
)
def test_tf32_rounds_its_operands(emulated, forced, monkeypatch, arch, cell, hidden, chosen):
    """The emulator cuts operands, as tensor cores do: unrounded they would have 2.5 times the error."""
    session = emulated(arch, units="rows")
    if chosen is not None:
        forced(**chosen)
    for ours, witness in tf32_errors(monkeypatch, cell, hidden):
        assert ours <= 1.25 * witness, f"{ours:.2e}, with rounded operands {witness:.2e}"
    assert all(".tf32" in "".join(i.op for i in report.kernel.code) for report in session.reports)


# ---- schedules, mutants -------------------------------------------------------------------------------------------

SCHEDULES = [
    Schedule(order="turns"),
    Schedule(order="first"),
    *(Schedule(seed, slow=((seed % 3, None, kind),)) for seed, kind in enumerate((STORE, ACQUIRE, RELEASE, LOAD))),
]


@pytest.mark.parametrize(("protocol", "chosen"), [("counter", {"k_parts": 2}), ("flags", {"homes": "shared"})])
def test_equal_bits_under_every_schedule(emulated, forced, protocol, chosen):
    found = []
    for number, schedule in enumerate(SCHEDULES):
        emulated("sm_90", schedule=schedule, units=UNITS[number % 3])
        forced(protocol, **chosen)
        found.append(accuracy.run(accuracy.Case("gru", "bf16", 32, 3, 3, 1, False, True, True), seed=0)[0])
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def findings(emulated, forced, protocol, mutate):
    """(races of a forward, its output)."""
    session = emulated("sm_80", mutate=mutate, tolerate=True, schedule=Schedule(slow=((1, None, None),)))
    forced(protocol)
    torch.manual_seed(0)
    layer = persistrnn.LSTM(4, 24, backend="persistent", dtype=torch.bfloat16)
    with torch.no_grad():
        y, _ = layer(torch.randn(3, 3, 4, dtype=torch.bfloat16))
    return [race for report in session.reports for race in report.races], y


@pytest.mark.parametrize(
    ("protocol", "name"), [("counter", name) for name in COUNTER] + [("flags", name) for name in FLAGS]
)
def test_a_mutant_of_the_exchange_is_caught(emulated, forced, protocol, name):
    mutant, only_ordered = (COUNTER if protocol == "counter" else FLAGS)[name]
    races, expected = findings(emulated, forced, protocol, None)
    assert races == []
    races, found = findings(emulated, forced, protocol, mutant)
    if only_ordered:
        assert torch.equal(found, expected), "a mutant whose numbers are right"
        assert races
    else:  # what comes too early may be in order all the same: the slow program has heard of it before it writes
        assert races or not torch.equal(found, expected)


@pytest.mark.parametrize("name", GROUPS)
def test_a_mutant_of_warp_groups_is_caught(emulated, forced, name):
    session = emulated("sm_90", mutate=GROUPS[name], tolerate=True, units="rows")
    forced("counter", **ONE_SLICE)
    layer = persistrnn.LSTM(4, 64, backend="persistent", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(torch.randn(3, 16, 4, dtype=torch.bfloat16))
    assert [race for report in session.reports for race in report.races if "wgmma" in race]


def test_an_odd_row_of_16_bits_takes_the_counter(emulated, forced, monkeypatch):
    """It is no whole number of words."""
    session = emulated("sm_90")
    forced()
    monkeypatch.setattr(launch, "exchange_for", lambda _: Exchange("flags"))
    for hidden, dtype in ((13, torch.bfloat16), (14, torch.bfloat16), (13, torch.float32)):
        layer = persistrnn.LSTM(4, hidden, backend="persistent", dtype=dtype)
        with torch.no_grad():
            layer(torch.randn(2, 3, 4, dtype=dtype))
    kernels = [report.kernel for report in session.reports]
    assert [kernel.uses("red") for kernel in kernels] == [True, False, False]
    assert [any("volatile" in i.modifiers for i in kernel.code) for kernel in kernels] == [False, True, True]


def test_each_announcement_has_one_barrier(emulated, forced):
    """A second one costs every step some 50 cycles: none stands beside it but for barriers that store what was read."""
    session = emulated("sm_90")
    forced()
    layer = persistrnn.LSTM(4, 24, backend="persistent")
    with torch.no_grad():
        layer(torch.randn(3, 3, 4))
    code = session.reports[0].kernel.code
    (release,) = (i.number for i in code if i.name in ("red", "atom") and "release" in i.modifiers)
    before = [i.name for i in code[:release] if i.name in ("bar", "st", "ld")]
    assert before[-2:] == ["st", "bar"], "stored, one barrier, told"


# ---- waits that run out, NaN --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "chosen"), [("counter", {}), ("flags", {}), ("counter", {"k_parts": 2}), ("flags", {"k_parts": 2})]
)
def test_a_program_that_never_arrives_ends_in_an_exception(emulated, forced, protocol, chosen):
    emulated("sm_90", absent=(1,), tolerate=True, units="warps")
    forced(protocol, spin_limit=20, **chosen)
    layer = persistrnn.LSTM(4, 32, backend="persistent")
    with pytest.raises(RuntimeError, match="gave up waiting for another program"):
        layer(torch.randn(3, 2, 4))
    persistrnn.check()  # raised once, then clean


@pytest.mark.parametrize("k_parts", [1, 2])
def test_a_wait_that_runs_out_is_told_by_the_thread_that_gave_up(emulated, forced, k_parts):
    """The warps of program 0 reach their spin limit, all but the first one; then the late program comes."""
    layer = persistrnn.LSTM(4, 16 * k_parts, backend="persistent")
    x, told = torch.randn(3, 2, 4), []
    for seed in range(6):
        emulated("sm_90")
        forced(k_parts=k_parts)
        expected = layer(x)[0]
        late = Schedule(seed, slow=((1, None, None), (0, 0, None)), rarely=80, burst=1)
        emulated("sm_90", tolerate=True, units="warps", schedule=late)
        forced(spin_limit=30, k_parts=k_parts)
        try:
            assert torch.equal(layer(x)[0], expected), f"seed {seed}: wrong, and nothing said"
        except RuntimeError as error:
            told.append(str(error))
    assert told, "warps gave up under every seed, and none has said so"
    assert all("gave up waiting" in text for text in told)


def test_a_wait_by_flags_ends_where_another_one_has_given_up(emulated, forced):
    """The spin limit is out of reach; the error word, as another program would have set it, is asked now and then."""
    session = emulated("sm_90", absent=(1,), tolerate=True, units="warps", patience=2_000)
    forced("flags", spin_limit=1 << 30)
    word = launch._error_word(torch.device("cpu"))
    layer = persistrnn.LSTM(4, 32, backend="persistent")
    given_up = mock.patch.object(launch, "check")  # not told at the door
    with torch.no_grad(), given_up:
        word.fill_(1)
        layer(torch.randn(3, 2, 4))
    word.zero_()
    assert len(session.reports) == 1


@pytest.mark.parametrize("pollers", ["warp", "thread"])
@pytest.mark.parametrize("k_parts", [1, 2])
def test_one_poller_for_all_threads(emulated, forced, pollers, k_parts):
    """The numbers are those of every thread for itself, without a race; where it gives up, all threads do."""
    layer = persistrnn.LSTM(4, 32, backend="persistent")
    x = torch.randn(3, 2, 4)
    forced(k_parts=k_parts)
    emulated("sm_90")
    expected = layer(x)[0]
    emulated("sm_90", units="warps", schedule=Schedule(1, slow=((1, None, None), (0, 0, None))))
    forced(k_parts=k_parts, pollers=pollers)
    assert torch.equal(layer(x)[0], expected)
    session = emulated("sm_90", units="warps", mutate=cases.NO_BARRIER, tolerate=True, schedule=Schedule(1))
    forced(k_parts=k_parts, pollers=pollers)
    with torch.no_grad():
        layer(x)
    assert [race for report in session.reports for race in report.races], "a mutant without the barrier"
    emulated("sm_90", absent=(1,), tolerate=True, units="warps")
    forced(k_parts=k_parts, pollers=pollers, spin_limit=20)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        layer(x)
    persistrnn.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_the_data_is_not_the_reserved_one(emulated, forced, dtype):
    emulated("sm_90")
    forced("flags", spin_limit=200, k_parts=2)
    layer = persistrnn.GRU(4, 32, backend="persistent", dtype=dtype)
    x = torch.randn(3, 2, 4, dtype=dtype)
    x[1, 0] = torch.full((4,), -1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    h0 = torch.zeros(1, 2, 32, dtype=dtype)
    h0[0, 0, 3] = x[1, 0, 0]
    with torch.no_grad():
        y = layer(x)[0]
        assert layer(x, h0)[0][:, 0].isnan().all()
    assert y[1:, 0].isnan().all()
    assert not y[:, 1].isnan().any()


def test_nan_passes_tf32(emulated, forced, monkeypatch):
    precise(monkeypatch, "tf32")
    emulated("sm_80")
    forced(homes="shared")
    for bits in (-1, 0x7FFFFFFF, 0x7FC00000):
        h0 = torch.zeros(1, 2, 24)
        h0[0, 0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        with torch.no_grad():
            y = persistrnn.GRU(4, 24, backend="persistent")(torch.randn(2, 2, 4), h0)[0]
        assert y[:, 0].isnan().all()
        assert not y[:, 1].isnan().any()
