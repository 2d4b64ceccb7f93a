"""``persistrnn.profile`` refuses what it cannot run as asked before it runs anything."""

import dataclasses

import pytest

import persistrnn
from persistrnn.profiling import run
from persistrnn.profiling.subject import Sizes, SubjectError

SIZES = Sizes("lstm", 4, 6, 1, False, 2, "fp32", "cpu")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("not refused"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cell", "rnn", "cell is 'rnn', allowed: lstm, gru"),
        ("cell", None, "cell is None, allowed: lstm, gru"),
        ("cell", ["lstm"], r"cell is \['lstm'\]"),
        ("dtype", "int8", "dtype is 'int8', allowed: fp16, bf16, tf32, fp32"),
        ("batch", 0, "batch is 0, allowed: an int of at least 1"),
        ("batch", 2.0, "batch is 2.0"),
        ("batch", True, "batch is True"),
        ("hidden", -6, "hidden_size must be greater than zero, got -6"),
        ("hidden", "6", "hidden_size should be of type int"),
        ("input", 0, "input_size must be greater than zero, got 0"),
        ("layers", 0, "num_layers must be greater than zero, got 0"),
        ("bidirectional", 1, "bidirectional should be of type bool"),
        ("backend", "cudnn", "'auto', 'persistent', 'torch', got 'cudnn'"),
        ("save", "all", "got 'all'"),
        ("save_budget", 3, "got save='gates' and save_budget=3"),
        ("device", 3, "device is 3, allowed: 'cpu', 'cuda' or 'cuda:N'"),
        ("device", None, "device is None"),
    ],
)
def test_sizes(name, value, message):
    with pytest.raises(SubjectError, match=message):
        persistrnn.profile(dataclasses.replace(SIZES, **{name: value}), [2])


@pytest.mark.parametrize("steps", [None, 3, "12", b"12", [], [0], [-1], [2, 2], [2.0], [True]], ids=repr)
def test_steps(steps):
    with pytest.raises(ValueError, match=r"steps is .*, allowed: "):
        persistrnn.profile(SIZES, steps)


@pytest.mark.parametrize("subject", [None, 3, "lstm", persistrnn.LSTM], ids=repr)
def test_subject(subject):
    if subject is persistrnn.LSTM:
        with pytest.raises(BaseException, match="not refused"):  # a callable is only called where it is measured
            persistrnn.profile(subject, [2])
        return
    with pytest.raises(SubjectError, match=f"of type {type(subject).__name__}, allowed: a callable"):
        persistrnn.profile(subject, [2])


@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        *((name, 3, ValueError) for name in ("compare", "device", "device_model", "optimizer", "output", "title")),
        *((name, [], ValueError) for name in ("compare", "device", "device_model", "optimizer", "output", "title")),
        ("optimizer", None, ValueError),
        ("optimizer", "adagrad", ValueError),
        ("compare", "cudnn", ValueError),
        ("device", "tpu", ValueError),
        ("device", "cuda", ValueError),
        ("device_model", "h900", ValueError),
        ("device_model", "", ValueError),
        ("iterations", 0, ValueError),
        ("warmup", True, ValueError),
        ("iterations", 2.5, ValueError),
        ("seconds", float("nan"), ValueError),
        ("seconds", -1, ValueError),
        ("progress", 1, TypeError),
    ],
)
def test_the_others(name, value, exception):
    with pytest.raises(exception, match=rf"{name} (is|should be)|the device is"):
        persistrnn.profile(SIZES, [2], **{"progress": False, name: value})


def test_devices_are_understood_in_capitals():
    with pytest.raises(BaseException, match="not refused"):
        persistrnn.profile(SIZES, [2], device_model="H100", progress=False)
