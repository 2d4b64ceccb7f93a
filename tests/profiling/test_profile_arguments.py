"""What is refused, by ``persistrnn.profile`` before it runs anything, and by the command with its status and reason."""

import sys

import pytest
import torch

import persistrnn
from persistrnn.profiling import command, run
from persistrnn.profiling.subject import Sizes, SubjectError

SIZES = Sizes("lstm", 4, 6, batch=2)


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("not refused"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("subject", [None, 3, "lstm"], "the subject is of type .*, allowed: a callable"),
        ("steps", [None, 3, [], [2, 2]], "steps is .*, allowed: a list of ints of at least 1, one or more, none twice"),
        ("steps", [[0], [-1]], "each of steps must be greater than zero, got"),
        ("steps", ["12", [2.0], [True]], "each of steps should be of type int, got"),
        ("compare", [3, "cudnn"], "compare is one of 'torch', 'persistrnn', got"),
        ("optimizer", [3, None, "adagrad"], "optimizer is one of 'adam', 'adamw', 'sgd', 'none', got"),
        ("device", [3, [], "tpu"], "device is .*, allowed: cpu, cuda or cuda:N"),
        ("device", ["cuda:99"], "and torch sees . GPUs here; allowed: one of them, or cpu"),
        ("device_model", [3, "h900", ""], "the device is "),
        ("iterations", [0, -1], "iterations must be greater than zero, got"),
        ("warmup", [True, 2.5], "warmup should be of type int, got"),
        ("seconds", [float("nan"), -1, "20"], "seconds is .*, allowed: a finite number, at least 0"),
        ("progress", [1], "progress should be of type bool"),
    ],
)
def test_arguments_out_of_range(nothing_runs, name, values, message):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=message):
            persistrnn.profile(**{"subject": SIZES, "steps": [2], "progress": False, name: value})


def test_devices_are_understood_in_capitals_and_callables_called_late(nothing_runs):
    with pytest.raises(BaseException, match="not refused"):
        persistrnn.profile(persistrnn.LSTM, (2,), device_model="H100", progress=False)


# The command.

MODEL = """
import torch, persistrnn
def no_layer(steps):
    return torch.nn.Linear(3, 3), torch.zeros(steps, 3)
def frozen(steps):
    return persistrnn.LSTM(3, 3).requires_grad_(False), torch.zeros(steps, 1, 3)
def no_gradient(steps):
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = persistrnn.LSTM(3, 3)
        def forward(self, x):
            return self.rnn(x)[0].detach()
    return Silent(), torch.zeros(steps, 1, 3)
def ours(steps): return persistrnn.LSTM(3, 3), torch.zeros(steps, 1, 3)
def theirs(steps): return torch.nn.LSTM(3, 3), torch.zeros(steps, 1, 3)
def wrong_size(steps): return persistrnn.LSTM(3, 3), torch.zeros(steps, 1, 4)
def one_thing(steps): return torch.zeros(3)
def three_things(steps): return torch.nn.Linear(3, 3), [1], {}
def without(): pass
number = 3
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with mymodel.py, as the working folder."""
    (tmp_path / "mymodel.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("mymodel", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


OF_MODELS = {
    "mymodel": "--model: 'mymodel' given, and that is of type module; allowed: module:callable",
    ":make": "--model: ':make' given, which cannot be imported (ValueError",
    "nowhere_at_all:make": "which cannot be imported (ModuleNotFoundError: No module named 'nowhere_at_all')",
    "broken:make": "which cannot be imported (ModuleNotFoundError: No module named 'nothing_of_this_name')",
    "mymodel:maker": "which cannot be imported (AttributeError: module 'mymodel' has no attribute 'maker')",
    "mymodel:number": "and that is of type int",
    "mymodel:ours --hidden 3": "--hidden: given with --model, allowed with --cell",
    "mymodel:ours --save state": "--save: given with --model, allowed with --cell",
    "mymodel:ours --heads 3": "--heads: given with --model, allowed with --cell",
    "mymodel:ours --cell lstm": "not allowed with argument",
}
OF_LAYERS = {
    "": "--hidden: not given",
    "--hidden 0": "hidden_size must be greater than zero, got 0",
    "--hidden 3 --input 0": "input_size must be greater than zero, got 0",
    "--hidden 3 --batch 0": "batch must be greater than zero, got 0",
    "--hidden x": "--hidden: invalid int value: 'x'",
    "--hidden 3 --heads 2": "heads divides hidden_size=3: it is one of 1, 3, got 2",
    "--hidden 3 --heads 0": "heads must be greater than zero, got 0",
    "--hidden 3 --dtype float64": "--dtype: invalid choice: 'float64'",
    "--hidden 3 --dtype tf32": "a CPU has no tf32 products",
    "--hidden 3 --device tpu": "device is 'tpu', allowed: cpu, cuda or cuda:N",
    "--hidden 3 --save auto": "save_budget",
    "--hidden 3 --save-budget 9": "save='gates' and save_budget=9",
    "--hidden 3 --warmup 0": "warmup must be greater than zero, got 0",
    "--hidden 3 --output mymodel.py": "mymodel.py",
    "--hidden 3 --device-model h300": "the device is 'h300'",
    "--hidden 3 --steps 4,x": "--steps: '4,x' given, allowed: integers, such as 512,2048",
    "--hidden 3 --steps 4,4": "steps is [4, 4], allowed: a list of ints",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "one of the arguments --cell --model is required"),
        ("--cell rnn --hidden 3", "--cell: invalid choice: 'rnn'"),
        *((f"--model {given}", message) for given, message in OF_MODELS.items()),
        *((f"--cell lstm {given}", message) for given, message in OF_LAYERS.items()),
    ],
)
def test_bad_arguments(model, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--steps", "4", "--device", "cpu", *arguments.split()])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (model / "persistrnn-profile").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model mymodel:no_layer", "the model calls no recurrent layer"),
        ("--model mymodel:frozen", "the model has no parameter that requires a gradient"),
        ("--model mymodel:no_gradient", "the model's output holds no tensor with a gradient"),
        ("--model mymodel:one_thing", "the callable returned Tensor; allowed: (module, batch)"),
        ("--model mymodel:three_things", "the callable returned ['Linear', 'list', 'dict']; allowed: (module, batch)"),
        ("--model mymodel:without", "the callable failed when called with steps=4: TypeError"),
        ("--model mymodel:wrong_size", "as given failed at T = 4: "),
        ("--model mymodel:theirs --compare torch", "the model has no layer of persistrnn to replace"),
        ("--model mymodel:ours --compare persistrnn", "the model has no torch.nn.LSTM, GRU or RNN to replace"),
        ("--cell lstm --hidden 4 --heads 2 --compare torch", "and the layer cannot: torch.nn has no heads"),
        ("--cell lstm --hidden 3 --save auto --save-budget 9", "need at least"),
        ("--cell lstm --hidden 3 --backend persistent", "persistrnn failed at T = 4: "),
    ],
)
def test_what_cannot_be_profiled(model, arguments, message, capsys):
    assert command.main([*arguments.split(), "--steps", "4", "--device", "cpu", "--output", "out"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_without_a_package(package, monkeypatch, capsys, tmp_path):
    """Said at the door, not after minutes of measuring."""
    monkeypatch.setitem(sys.modules, package, None)
    layer = "--cell lstm --hidden 8 --steps 4 --device cpu"
    with pytest.raises(SystemExit):
        command.main([*layer.split(), "--output", str(tmp_path / "out")])
    words = " ".join(capsys.readouterr().err.split())
    assert f"needs {package}, which cannot be imported" in words
    assert "pip install 'persistrnn[profile]'" in words
    assert persistrnn.profile(SIZES, [4], device="cpu", progress=False, iterations=2).points


def test_other_peoples_files_stay(tmp_path, capsys):
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(SystemExit):
        command.main(["--cell", "lstm", "--hidden", "8", "--steps", "4", "--device", "cpu", "--output", str(tmp_path)])
    assert "trace.json is there, and no report wrote it: move it" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "trace.json").read_text() == "{}"


def test_sizes_are_refused_where_they_are_made():
    with pytest.raises((ValueError, TypeError), match="bidirectional should be of type bool"):
        Sizes("lstm", 4, 6, bidirectional=1)
    layer, x = SIZES(3)
    assert (layer.hidden_size, x.shape, x.dtype) == (6, (3, 2, 4), torch.float32)
    with pytest.raises(ValueError, match="heads divides hidden_size=6"):
        Sizes("lstm", 4, 6, heads=4)
    assert str(Sizes("lstm", 4, 6, heads=2)) == "lstm I=4 H=6 in 2 heads L=1 B=16 fp32"
    assert issubclass(SubjectError, ValueError)
