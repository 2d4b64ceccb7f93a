"""Rows of different lengths on torch's own path: the numbers of ATen's loop over packed rows, in linear time."""

import itertools
import math

import pytest
import torch
from pairs import PAIRS, as_hx, assert_close, assert_same_bits, make_layer, pair, results, states, tensors
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persistrnn import rows, torch_path
from persistrnn.kernels.planner import memory

pytestmark = [
    pytest.mark.torch_path,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

INPUT, HIDDEN = 3, 5
LENGTHS = {"unsorted": [3, 12, 7, 7, 1, 9], "sorted": [9, 9, 7, 2], "equal": [4, 4, 4], "one": [6]}


@pytest.fixture(params=[1, 2**62], ids=["cut at each length", "padded"])
def parts(request, monkeypatch):
    """However short they are."""
    monkeypatch.setattr(rows, "WORTH_A_CALL", request.param)
    monkeypatch.setattr(rows, "FEW_STEPS", 0)


def packs(layer, x: Tensor, lengths: Tensor, hx=None):
    """A call with a PackedSequence, its output padded again."""
    time = 1 if layer.batch_first else 0
    ordered = bool((lengths.diff() <= 0).all())
    packed = pack_padded_sequence(x, lengths, layer.batch_first, ordered)
    y, state = layer(packed, hx)
    assert isinstance(y, PackedSequence)
    return pad_packed_sequence(y, layer.batch_first, total_length=x.size(time))[0], state


def compare(cell: str, lengths: list[int], tolerance: float = 1e-5, hx: bool = True, **options) -> None:
    """lengths= and a PackedSequence beside torch.nn's PackedSequence: outputs, states and all gradients."""
    extra = {name: options.pop(name) for name in ("save",) if name in options}
    ours, theirs = pair(cell, INPUT, HIDDEN, **options)
    for name, value in extra.items():
        setattr(ours, name, value)
    n = torch.tensor(lengths)
    shape = (len(lengths), max(lengths)) if options.get("batch_first") else (max(lengths), len(lengths))
    x = torch.randn(*shape, INPUT, dtype=options.get("dtype"))
    of = ours.num_layers * (2 if ours.bidirectional else 1), len(lengths)
    given = [torch.randn(*of, size or HIDDEN, dtype=x.dtype) for size in (ours.proj_size, 0)][: 1 + (cell == "lstm")]
    calls = [
        (theirs, lambda x, hx: packs(theirs, x, n, hx)),
        (ours, lambda x, hx: packs(ours, x, n, hx)),
        (ours, lambda x, hx: ours(x, hx, lengths=n)),
    ]
    found = []
    for layer, call in calls:
        torch.manual_seed(3)
        found.append(results(call, x, as_hx(given) if hx else None, layer.parameters()))
        torch.testing.assert_close(found[-1], found[0], rtol=tolerance, atol=tolerance)
    assert ours.last_path == "torch"


STACKS = [
    {},
    {"num_layers": 2, "dropout": 0.4, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "bias": False, "dropout": 0.4},
]
PROJECTED = [{"proj_size": 2, "num_layers": 2}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}]


LAYERS = [*itertools.product(PAIRS, STACKS), *(("lstm", options) for options in PROJECTED)]


# Each layer with every second kind of lengths, each kind with layers of every cell.
@pytest.mark.parametrize(
    ("cell", "options", "lengths"),
    [(*layer, name) for n, layer in enumerate(LAYERS) for k, name in enumerate(LENGTHS) if (n + n // 3 + k) % 2 == 0],
    ids=str,
)
def test_numbers_are_those_of_packed_rows(parts, cell, options, lengths):
    """Dropout draws the same masks."""
    compare(cell, LENGTHS[lengths], hx=lengths != "sorted", **options)


@pytest.mark.parametrize("save", ["state", "checkpoint"])
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_save_modes(parts, monkeypatch, cell, options, save):
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 5)
    calls, layer = [], torch_path.layer
    monkeypatch.setattr(torch_path, "layer", lambda *given: calls.append(given) or layer(*given))
    compare(cell, LENGTHS["unsorted"], **options)
    once = len(calls)
    calls.clear()
    compare(cell, LENGTHS["unsorted"], save=save, **options)
    assert len(calls) > 1.5 * once, "the forward did not run again"


def test_dropout_with_save_modes(parts, monkeypatch):
    """The backward draws what the forward drew: of a loss that is linear in the weights, whose gradient says it."""
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 3)
    layer = make_layer("rnn_relu", INPUT, HIDDEN, 2, dropout=0.5, save="checkpoint")
    x, lengths = torch.rand(8, 3, INPUT), torch.tensor([8, 5, 2])
    torch.manual_seed(1)
    y = layer(x, lengths=lengths)[0]
    (gradient,) = torch.autograd.grad(y.sum(), layer.weight_ih_l1)
    step = 1e-3 * gradient.sign()
    with torch.no_grad():
        torch.manual_seed(1)
        before = layer(x, lengths=lengths)[0].sum()
        layer.weight_ih_l1 += step
        torch.manual_seed(1)
        after = layer(x, lengths=lengths)[0].sum()
    torch.testing.assert_close(after - before, (gradient * step).sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_state_outlasts_much_padding(dtype, autocast, bidirectional):
    """The c of a short row, which no output gives, beside the row alone."""
    layer = make_layer("lstm", INPUT, HIDDEN, bidirectional=bidirectional, dtype=dtype)
    x, lengths = torch.randn(1500, 3, INPUT, dtype=dtype), torch.tensor([1500, 2, 40])
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", autocast, enabled=autocast is not None):
        patch.setattr(rows, "WORTH_A_CALL", 2**62)
        y, (h, c) = layer(x, lengths=lengths)
        for k, n in ((1, 2), (2, 40)):
            alone, (h_alone, c_alone) = layer(x[:n, k : k + 1])
            found = y[:n, k : k + 1], h[:, k : k + 1], c[:, k : k + 1]
            rounding = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (dtype, autocast) else {}
            torch.testing.assert_close(found, (alone, h_alone, c_alone), **rounding)
            gradients = [
                torch.autograd.grad(state.float().sum(), layer.weight_hh_l0, retain_graph=True)[0]
                for state in (c[:, k], c_alone[:, 0])
            ]
            torch.testing.assert_close(*gradients, **rounding)


@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_padding_does_not_grow(cell):
    """Weights that multiply a state by two in every step: of one of 200 padded ones no infinity may come back."""
    layer = make_layer(cell, INPUT, HIDDEN)
    with torch.no_grad():
        for p in (layer.weight_hh_l0, layer.weight_ih_l0):
            p.copy_(torch.eye(HIDDEN, p.size(1)).repeat(p.size(0) // HIDDEN, 1) * 2)
    x = torch.ones(200, 2, INPUT)
    x[:, 0] = -1.0  # the long row stays at 0
    y, state = layer(x, lengths=torch.tensor([200, 3]))
    (y.sum() + sum(s.sum() for s in tensors(state))).backward()
    assert all(t.isfinite().all() for t in (y, *tensors(state), *(p.grad for p in layer.parameters())))


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += sum(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


def elements(layer, lengths: Tensor) -> int:
    x = torch.randn(int(lengths.max()), len(lengths), INPUT, requires_grad=True)
    packed = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
    packed = PackedSequence(packed.data.requires_grad_(), *packed[1:])
    with Elements() as counted:
        layer(packed)[0].data.sum().backward()
    return counted.count


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_work_is_linear_in_time(cell, bidirectional):
    """All lengths differ."""
    layer = make_layer(cell, INPUT, HIDDEN, bidirectional=bidirectional)
    short, long = (elements(layer, torch.linspace(T // 2, T, 16).long()) for T in (100, 400))
    assert long < 5 * short


def test_one_long_row_costs_no_more_than_its_steps():
    """Among many short ones: padded to its length they would be a hundred times as much."""
    layer = make_layer("gru", INPUT, HIDDEN)
    many = elements(layer, torch.tensor([400] + [3] * 400))
    few = elements(layer, torch.tensor([400, 3]))
    assert many < few + 300 * (400 * 3) * HIDDEN


def test_many_lengths_are_few_calls(monkeypatch):
    calls, layer = [], torch_path.layer
    monkeypatch.setattr(torch_path, "layer", lambda *given: calls.append(given) or layer(*given))
    monkeypatch.setattr(rows, "WORTH_A_CALL", 1)
    lengths = torch.arange(1, 301)
    make_layer("rnn_tanh", INPUT, HIDDEN)(torch.randn(300, 300, INPUT), lengths=lengths)
    assert 5 < len(calls) <= math.log(300, 4 / 3) + 1


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_second_derivative(parts, cell):
    ours, theirs = pair(cell, INPUT, HIDDEN, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, INPUT), torch.tensor([6, 2, 4])
    found = []
    for layer, call in ((ours, lambda x: ours(x, lengths=lengths)), (theirs, lambda x: packs(theirs, x, lengths))):
        leaf = x.clone().requires_grad_()
        loss = sum(t.sin().sum() for t in tensors(call(leaf)))
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), [leaf, *layer.parameters()]))
    assert_close(*found)


@pytest.mark.parametrize("cell", PAIRS)
def test_where_packing_is_as_fast_the_bits_are_torch_nn_s(cell):
    """Of few steps, and without a backward of any number."""
    ours, theirs = pair(cell, INPUT, HIDDEN, num_layers=2, bidirectional=True)
    hx = as_hx(states(cell, 4, 3, HIDDEN))
    for steps, training in ((rows.FEW_STEPS, True), (60, False)):
        x, lengths = torch.randn(steps, 3, INPUT), torch.tensor([steps, 3, steps // 2])
        with torch.set_grad_enabled(training):
            assert_same_bits(packs(ours, x, lengths, hx), packs(theirs, x, lengths, hx))
