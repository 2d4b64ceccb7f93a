"""How many kernels a call launches on a GPU, counted without one (`launched`)."""

import contextlib

import pytest
import torch
from launched import stubbed
from pairs import make_layer

import persistrnn
from persistrnn import step_marks
from persistrnn.kernels import fills, launch

T, B, H = 64, 16, 256
LENGTHS, RESETS = {"lengths": torch.full((B,), 5)}, {"resets": torch.zeros(T, B, dtype=torch.bool)}

# Name: (options of the layer, of the call, (LSTM, GRU) without gradients, (LSTM, GRU) forward and backward). Each count
# is of launches beside products; of those without gradients one is the scan, of the others two.
COUNTS = {
    # One fill, with which the initial states come. In training a fill of the backward, and two sums for the biases, one
    # of which belongs to the product of the input.
    "zeros": ({}, {}, (2, 2), (6, 6)),
    "states": ({}, {"hx": True}, (2, 2), (6, 6)),
    "float32": ({"dtype": torch.float32}, {}, (2, 2), (6, 6)),
    "float32 c": ({"cell_dtype": torch.float32}, {}, (3, None), (7, None)),
    "no bias": ({"bias": False}, {}, (2, 2), (4, 4)),
    # A copy of W_hh, to rows of 16-byte multiples, of each launch that streams some of it or has rows of odd bytes.
    "whole words": ({"hidden": 250}, {}, (2, 2), (6, 6)),
    "odd": ({"hidden": 333}, {}, (3, 3), (8, 8)),
    "streamed": ({"hidden": 1538, "dtype": torch.float32}, {}, (3, None), (8, None)),
    "two directions": ({"bidirectional": True}, {}, (3, 3), (11, 11)),
    "two directions, states": ({"bidirectional": True}, {"hx": True}, (4, 4), (13, 12)),
    "two layers": ({"num_layers": 2, "dropout": 0.5}, {}, (9, 8), (18, 17)),
    "pipeline": ({"num_layers": 2}, {}, (6, 6), (12, 12)),
    # One that makes the marks, and those that put zeros where rows have ended: into the output, and in training into
    # the input and the gradients of both. Another gathers what each step went on from, for the gradient of W_hh.
    "lengths": ({}, LENGTHS, (4, 4), (12, 12)),
    "resets": ({}, RESETS, (3, 3), (8, 8)),
    "save=state": ({"save": "state"}, {}, (8, 5), (53, 40)),
    "save=checkpoint": ({"save": "checkpoint"}, {}, (8, 5), (51, 38)),
}


@pytest.fixture
def counter(monkeypatch):
    fills._kept_zeros(torch.device("cpu"))  # once in a process
    launch._error_word(torch.device("cpu"))
    step_marks.word(torch.device("cpu"))
    return stubbed(monkeypatch)


def call(cell, training, options, given):
    options = {"dtype": torch.bfloat16, **options}
    hidden = options.pop("hidden", H)
    layer = make_layer(cell, H, hidden, options.pop("num_layers", 1), backend="persistent", **options)
    x = torch.randn(T, B, H, dtype=options["dtype"], requires_grad=training)
    if "hx" in given:
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        h0 = x.new_zeros(rows, B, hidden)
        given = {"hx": (h0, h0.clone()) if cell == "lstm" else h0}
    dy = x.new_zeros(T, B, hidden * (2 if layer.bidirectional else 1))
    return layer, x, given, dy


@pytest.mark.parametrize(
    ("cell", "training", "name"),
    [(c, t, n) for c in ("lstm", "gru") for t in (False, True) for n in COUNTS if COUNTS[n][2][c == "gru"]],
)
def test_launches(counter, cell, training, name):
    options, given, *counts = COUNTS[name]
    layer, x, given, dy = call(cell, training, options, given)
    with counter, torch.set_grad_enabled(training):
        y, _ = layer(x, **given)
        if training:
            torch.autograd.grad([y], [x, *layer.parameters()], [dy])
    assert layer.last_path == "persistent"
    assert counter.others == counts[training][cell == "gru"], counter.found
    assert counter.found["scan_backward"] == (counter.found["scan_forward"] if training else 0) or "save" in name
    if name != "lengths":  # out of range they are an error on a CPU at once
        assert not counter.waits


def test_final_states_are_memory_of_their_own(counter):
    """What is written into a state that a call gave changes no output, as with torch.nn."""
    for training in (False, True):
        layer, x, given, _ = call("lstm", training, {}, {})
        with torch.set_grad_enabled(training):
            y, states = layer(x, **given)
        places = {t.untyped_storage().data_ptr() for t in (y, *states)}
        assert len(places) == 3
        for state in states:
            assert state.is_contiguous()
            with torch.no_grad():
                state.add_(1)


def test_a_capture_takes_no_zeros_that_it_would_have_to_make(monkeypatch):
    """They would not be there before the first replay, and stay in use after it."""
    device = torch.device("cuda", 7)
    monkeypatch.setattr(fills, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fills._kept_zeros(device) is None
    assert device not in fills._ZEROS


WAYS = {
    "in place": lambda w: w.mul_(2),
    "through data": lambda w: w.data.mul_(2),
    "data assigned": lambda w: setattr(w, "data", w.data * 2),
    "data assigned twice": lambda w: [setattr(w, "data", w.data + w.data / 2 * k) for k in (1, 2 / 3)],
    "set_": lambda w: w.set_((w * 2).detach()),
    "through a view": lambda w: w.view(-1)[:].mul_(2),
    "through NumPy": lambda w: w.detach().numpy().__imul__(2),
    "through DLPack": lambda w: torch.from_dlpack(w.detach()).mul_(2),
    "by an optimizer": lambda w: (setattr(w, "grad", -w.detach()), torch.optim.SGD([w], 1.0).step()),
    "under inference mode": lambda w: torch.inference_mode()(w.data.mul_)(2),
}


@pytest.mark.parametrize("way", WAYS)
def test_padded_rows_are_those_of_now(counter, monkeypatch, way):
    """No copy of W_hh outlives its launch: most of these ways leave a version as it is, and some the address too."""
    layer, x, given, _ = call("gru", False, {"hidden": 1538, "dtype": torch.float32}, {})
    seen = []
    of = launch._with_stride
    monkeypatch.setattr(launch, "_with_stride", lambda *args: seen.append(of(*args)) or seen[-1])
    with torch.no_grad():
        layer(x, **given)
        WAYS[way](layer.weight_hh_l0)
        layer(x, **given)
    first, second = (t[..., :1538] for t in seen)
    torch.testing.assert_close(second, first * 2)
    torch.testing.assert_close(second[0], layer.weight_hh_l0.detach())


def test_zeros_and_copies_in_one_launch(counter):
    memory = torch.full((5, 6), 7.0)
    together = fills.Fills()
    together.put(memory[0], torch.arange(6.0))
    together.put(memory[2], None)
    words = torch.full((3,), -1, dtype=torch.int32)
    together.put(words, None)
    with counter:
        together.run()
    assert counter.found == {"_foreach_copy_": 1}
    assert memory[0].tolist() == list(range(6))
    assert memory[1].tolist() == [7.0] * 6
    assert memory[2].tolist() == [0.0] * 6
    assert words.tolist() == [0] * 3
    for zeros in fills._ZEROS.values():
        assert not zeros.any()


def test_what_does_not_go_together_is_right_all_the_same(counter):
    """Other dtypes, a turned source, more zeros than are kept."""
    single, half, turned = torch.ones(4), torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 3)
    many = torch.ones(fills.KEPT_ZEROS, dtype=torch.int32)
    together = fills.Fills()
    together.put(single, torch.arange(4.0))
    together.put(half, torch.arange(4.0))
    together.put(turned, torch.arange(6.0).view(3, 2).T)
    together.put(many, None)
    with counter:
        together.run()
    assert counter.found == {"copy_": 2, "_foreach_copy_": 1, "_foreach_zero_": 1}
    assert single.tolist() == half.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert turned.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert not many.any()


def test_zeros_narrower_than_what_is_copied(counter):
    """An odd number of them is no whole number of the others."""
    single, half, words = torch.ones(4), torch.ones(5, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int32)
    together = fills.Fills()
    together.put(single, torch.arange(4.0))
    for zeros in (half, words):
        together.put(zeros, None)
    with counter:
        together.run()
    assert counter.found == {"_foreach_copy_": 1, "_foreach_zero_": 1}
    assert single.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not half.any()
    assert not words.any()


def test_check_reads_the_error_word(counter):
    """Without an operation of torch."""
    word = launch._error_word(torch.device("cpu"))
    with counter:
        launch.check()
    assert not counter.found
    assert not counter.waits
    word.fill_(1)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        persistrnn.check()
    persistrnn.check()
