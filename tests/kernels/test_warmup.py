"""Kernels that are compiled ahead are those that a call then launches, and no call compiles more than it launches."""

import threading

import pytest
import torch
import triton
from pairs import make_layer
from torch import nn

import persistrnn
from persistrnn.kernels import compilation, launch
from persistrnn.kernels.device import marks, masks, recompute, scan

KERNELS = (scan.scan_forward, scan.scan_backward, recompute.activate, masks.draw, marks.make_marks, marks.gather_before)


@pytest.fixture
def session(emulated, tmp_path, monkeypatch):
    """Nothing is compiled yet, in this process or on disk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    forget(monkeypatch)
    return emulated("sm_90")


def forget(monkeypatch):
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "compile", triton.compile, raising=False)  # which its first launch sets
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))


@pytest.fixture
def compilations(monkeypatch):
    """(kernel, thread) of each that Triton is asked for."""
    found, compiles = [], triton.compiler.compile

    def compile_(source, **options):
        found.append((source.fn.__name__, threading.get_ident()))
        return compiles(source, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile_)
    return found


def layer(cell="lstm", **options):
    return make_layer(cell, 8, 16, backend="persistent", dtype=torch.bfloat16, **options)


def call(module, batch, steps, **given):
    x = torch.randn(steps, batch, 8, dtype=torch.bfloat16)
    with torch.set_grad_enabled(module.training):
        y, _ = module(x, **given)
        if module.training:
            torch.autograd.grad(y.float().square().sum(), list(module.parameters()))


@pytest.mark.emulator
@pytest.mark.parametrize("training", [True, False])
def test_the_first_call_compiles_no_more_than_its_kernels(compilations, session, training):
    module = layer().train(training)
    call(module, 3, 2)
    assert [name for name, _ in compilations] == ["scan_forward", "scan_backward"][: 1 + training]
    call(module, 5, 4)
    assert len(compilations) == 1 + training


@pytest.mark.emulator
def test_what_is_compiled_is_what_is_launched(session, compilations, monkeypatch, tmp_path):
    """Compiled on threads, without a launch; then launched without a compilation, in a later process from the disk."""
    module = layer(num_layers=2, dropout=0.5)
    model, state = nn.Sequential(nn.Linear(3, 8), module), torch.get_rng_state()
    before = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    launches = launch.LAUNCHES.copy()
    assert persistrnn.warmup(model, batch=3, steps=2) == 2
    assert sorted(name for name, _ in compilations) == ["scan_backward", "scan_forward"]
    assert all(thread != threading.get_ident() for _, thread in compilations)
    assert not session.reports
    assert launches == launch.LAUNCHES
    assert {name: value for name, value in vars(module).items() if not name.startswith("_")} == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)

    call(module, 5, 4)
    assert len(compilations) == 2, "the call compiled another kernel"
    assert len(session.reports) == 4
    files = sorted((tmp_path / "triton").rglob("*"))
    forget(monkeypatch)
    call(module, 3, 2)
    assert sorted((tmp_path / "triton").rglob("*")) == files


@pytest.mark.emulator
def test_what_else_a_call_has_makes_kernels_of_its_own(session, compilations):
    module = layer("gru").eval()
    assert persistrnn.warmup(module, 3, 2, threads=1, lengths=torch.tensor([2, 1, 0])) == 2  # the scan, and the marks
    call(module, 3, 2, lengths=torch.tensor([1, 1, 2]))
    assert len(compilations) == 2
    call(module, 3, 2)
    assert len(compilations) == 3


@pytest.mark.emulator
def test_another_thread_launches_meanwhile(session):
    """Only what the warming thread would launch is compiled in its place."""
    module = layer().eval()
    call(module, 3, 2)
    started, found = len(session.reports), []
    with compilation.instead_of_launches(1, found):
        other = threading.Thread(target=call, args=(module, 3, 2))
        other.start()
        other.join()
        assert len(session.reports) == started + 1
        call(module, 3, 2)
    assert len(session.reports) == started + 1
    assert len(found) == 1


@pytest.mark.emulator
def test_an_error_of_the_compiler_is_raised(session, monkeypatch):
    def fails(*args, **options):
        raise ValueError("no such instruction")

    monkeypatch.setattr(triton.compiler, "compile", fails)
    module = layer().eval()
    with pytest.raises(ValueError, match="no such instruction"):
        persistrnn.warmup(module, 3, 2)
    monkeypatch.undo()
    assert compilation._noted.get() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 1, 1), TypeError, "module is a layer of persistrnn's, or a model that has such, got NoneType"),
        ((nn.Linear(2, 2), 1, 1), ValueError, "the Linear has no layer of persistrnn's"),
        ((nn.LSTM(2, 2), 1, 1), ValueError, r"persistrnn\.replace makes them"),
        ((persistrnn.LSTM(2, 2), 0, 1), ValueError, "batch must be greater than zero, got 0"),
        ((persistrnn.LSTM(2, 2), 1, 1.5), TypeError, "steps should be of type int"),
        ((persistrnn.LSTM(2, 2), 1, 1), RuntimeError, "no layer would run on the kernels: .*move the tensors to a GPU"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        persistrnn.warmup(*arguments)


def test_bad_threads():
    with pytest.raises(ValueError, match="threads must be greater than zero, got -1"):
        persistrnn.warmup(persistrnn.LSTM(2, 2), 1, 1, threads=-1)


@pytest.mark.interpreter
def test_the_interpreter_compiles_nothing():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 interprets the kernels"):
        persistrnn.warmup(persistrnn.LSTM(2, 2, backend="persistent"), 1, 1)
