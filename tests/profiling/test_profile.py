"""`persistrnn profile` from end to end on a CPU: what it measures, what it writes, and what it refuses."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from persistrnn.profiling import command as profile_command
from persistrnn.profiling import plots as profile_plots
from persistrnn.profiling import progress as profile_progress
from persistrnn.profiling import report as profile_report
from persistrnn.profiling import run as profile_run
from persistrnn.profiling.drawing import MissingMatplotlib
from persistrnn.profiling.measure import measure
from persistrnn.profiling.progress import MissingTqdm
from persistrnn.profiling.record import Settings
from persistrnn.profiling.subject import OURS, TORCH, Sizes, load
from persistrnn.profiling.trace import ORDER

SIZES = Sizes("lstm", 6, 8, 2, False, 3, "fp32", "cpu")
TWICE = Settings("adam", 2, 1, 20.0)
COMMAND = "--cell lstm --hidden 8 --layers 2 --batch 3 --steps 16,4 --device cpu --iterations 2"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A folder with what the command wrote."""
    folder = tmp_path_factory.mktemp("report")
    assert profile_command.main([*COMMAND.split(), "--compare", "torch", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Without plots, which take seconds: `report` has them."""
    monkeypatch.setattr(profile_plots, "draw", lambda profile: [])


def test_everything_is_written(report):
    names = {"profile.html", "profile.txt", "profile.json", "trace.json", "trace-torch.json"}
    assert {path.name for path in report.iterdir()} == names
    data = json.loads((report / "profile.json").read_text())
    points = data["points"]
    assert [(point["arm"], point["steps"]) for point in points] == [(OURS, 4), (OURS, 16), (TORCH, 4), (TORCH, 16)]
    for point in points:
        assert not point["failed"]
        assert point["tokens"] == 3 * point["steps"]
        assert point["iterations"] == 2
        assert 0 < point["low"] <= point["seconds"] <= point["high"]
        assert list(point["phases"]) == [name for name in ORDER if name in point["phases"]]
        assert sum(phase["seconds"] for phase in point["phases"].values()) == pytest.approx(point["seconds"])
        assert {call["path"] for call in point["calls"]} == {"torch" if point["arm"] == OURS else "torch.nn"}
        (call,) = point["calls"]
        assert (call["steps"], call["batch"], call["hidden"], call["layers"]) == (point["steps"], 3, 8, 2)
    # Parameters and Adam's two moments, its count of steps (a float32 per parameter), and the batch.
    parameters = sum(p.numel() for p in torch.nn.LSTM(8, 8, 2).parameters())
    assert [point["held"] for point in points[:2]] == [4 * (3 * parameters + 8 + t * 3 * 8) for t in (4, 16)]
    assert points[1]["peak"] > points[0]["peak"] > 0
    assert data["machine"]["kind"] == "cpu"
    assert data["outlook"]["device"] == "h200"
    assert data["longest"][OURS] > 16
    for name in ("trace.json", "trace-torch.json"):
        events = json.loads((report / name).read_text())["traceEvents"]
        assert any(event["name"] == "profile: backward" for event in events)


class Sound(html.parser.HTMLParser):
    """Every element is closed in turn, no id is there twice, and nothing comes from elsewhere."""

    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.references: set[str] = set()
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                assert value not in self.ids, f"id {value!r} twice"
                self.ids.add(value)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), f"{tag} {name}={value!r} comes from elsewhere"
            self.references |= set(re.findall(r"(?:url\(|^)#([\w-]+)", value or "")) if name != "style" else set()

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_page_is_sound(report):
    """Always, whether there is a browser or not."""
    page = (report / "profile.html").read_text()
    found = Sound()
    found.feed(page)
    found.close()
    assert found.open == []
    assert found.references - {"fff", "ffffff"} <= found.ids
    assert "script" not in found.seen
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 4, "time and memory, phases, timeline, batches"
    for svg in drawings:
        root = ET.fromstring(svg)
        space = "{http://www.w3.org/2000/svg}"
        assert root.get("aria-label")
        assert len(root.findall(f".//{space}path")) > 10
        assert "nan" not in svg.lower().split("aria-label")[0]
    assert {"CPU" in text for text in re.findall(r"<text[^>]*>([^<]*measured[^<]*)</text>", page)} == {True, False}
    # Measured and predicted stand under different heads, and cards of predictions look different.
    assert '<div class="predicted"><dt><b>h200, fp32, predicted</b> per time step' in page
    # Each card says whose its number is.
    cards = re.findall(r"<dt><b>(.*?)</b>", page)
    assert len(cards) == 6
    assert all(re.match(r"persistrnn, (T\xa0=\xa0\d|extrapolated)|h200", whose) for whose in cards), cards


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SPY = """<script>
window.failures = [];
window.addEventListener("error", event => window.failures.push(event.message));
window.addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const shown = [...svg.querySelectorAll("path")].filter(path => path.getBBox().width > 1);
    return [Math.round(box.width), Math.round(box.height), shown.length];
  });
  document.title = JSON.stringify({boxes, failures: window.failures});
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; test_page_is_sound checks the page without one")
@pytest.mark.parametrize("copy", ["as written", "with a spy"])
def test_a_browser_shows_it(report, tmp_path, copy):
    """The page as it is logs nothing to the console; in a copy, a script finds every plot drawn and of some size."""
    page = report / "profile.html"
    if copy == "with a spy":
        page = tmp_path / "profile.html"
        page.write_text((report / "profile.html").read_text().replace("<head>", "<head>" + SPY, 1))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1100,3000", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert "What the numbers say" in done.stdout
    if copy == "with a spy":
        found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
        assert found["failures"] == []
        assert len(found["boxes"]) == 4
        assert all(width > 600 and height > 100 and shown > 5 for width, height, shown in found["boxes"]), found


# A model of the user's.

MODEL = """
import torch, persistrnn
class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embedding, self.rnn, self.head = torch.nn.Embedding(11, 6), layer, torch.nn.Linear(10, 11)
    def forward(self, tokens, scale=1.0):
        return {"logits": self.head(self.rnn(self.embedding(tokens))[0]) * scale}
def make(steps):
    return Model(persistrnn.GRU(6, 5, bidirectional=True, batch_first=True)), torch.zeros(2, steps, dtype=torch.long)
def of_torch(steps):
    return Model(torch.nn.GRU(6, 5, 1, True, True, 0.0, True)), (torch.zeros(2, steps).long(),), {"scale": 2}
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
def one_thing(steps): return torch.zeros(3)
def three_things(steps): return torch.nn.Linear(3, 3), [1], {}
def wrong_size(steps): return persistrnn.LSTM(3, 3), torch.zeros(steps, 1, 4)
def without(): pass
number = 3
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with mymodel.py, as the working folder."""
    (tmp_path / "mymodel.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    for name in ("mymodel", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_model_of_the_users(model, undrawn, capsys):
    arguments = (
        "--model mymodel:make --steps 5 --compare torch --device cpu --iterations 2 --optimizer sgd --output out"
    )
    assert profile_command.main(arguments.split()) == 0
    data = json.loads((model / "out" / "profile.json").read_text())
    ours, theirs = data["points"]
    for point, path in ((ours, "torch"), (theirs, "torch.nn")):
        (call,) = point["calls"]
        assert (call["cell"], call["steps"], call["batch"], call["directions"]) == ("gru", 5, 2, 2)
        assert call["path"] == path
        assert point["tokens"] == 10
        assert "rest of forward" in point["phases"], "the embedding and the head"
    assert data["subject"] == "mymodel:make"
    assert "wrote out/profile.html" in capsys.readouterr().out


def test_a_model_imports_its_neighbours_late(model, undrawn, monkeypatch):
    """When it is made, and when it is called; afterwards modules are looked for where they were before."""
    (model / "neighbour.py").write_text("import torch; layer = torch.nn.LSTM(3, 3)")
    (model / "other_neighbour.py").write_text("factor = 2.0")
    (model / "late.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self, layer):\n"
        "        super().__init__()\n"
        "        self.layer = layer\n"
        "    def forward(self, x):\n"
        "        import other_neighbour\n"
        "        return self.layer(x)[0] * other_neighbour.factor\n"
        "def make(steps):\n"
        "    import neighbour\n"
        "    return Model(neighbour.layer), torch.zeros(steps, 2, 3)\n"
    )
    before = [path for path in sys.path if path not in ("", str(model))]
    monkeypatch.setattr(sys, "path", before.copy())
    arguments = "--model late:make --steps 4 --device cpu --iterations 2 --output out"
    assert profile_command.main(arguments.split()) == 0
    assert sys.path == before
    for name in ("late", "neighbour", "other_neighbour"):
        del sys.modules[name]


def test_a_model_of_torchs(model):
    make = load("mymodel:of_torch")
    found = profile_run.profile(make, [4], compare="persistrnn", device="cpu", iterations=2, optimizer="none")
    assert [(point.arm, point.path) for point in found.points] == [(OURS, "torch"), (TORCH, "torch.nn")]
    alone = profile_run.profile(make, [4], device="cpu", iterations=2)
    assert [point.arm for point in alone.points] == ["as given"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model mymodel", "--model: 'mymodel' given, allowed: module:callable"),
        ("--model :make", "--model: ':make' given, allowed: module:callable"),
        ("--model nowhere_at_all:make", "'nowhere_at_all' cannot be imported (ModuleNotFoundError"),
        (
            "--model broken:make",
            "'broken' cannot be imported (ModuleNotFoundError: No module named 'nothing_of_",
        ),
        ("--model mymodel:maker", "and 'mymodel' has no 'maker'"),
        ("--model mymodel:number", "and that is of type int"),
        ("--model mymodel:make --hidden 3", "--hidden: given with --model, allowed with --cell"),
        ("--model mymodel:make --save state", "--save: given with --model, allowed with --cell"),
        ("--model mymodel:make --cell lstm", "not allowed with argument"),
        ("", "one of the arguments --cell --model is required"),
        ("--cell lstm", "--hidden: not given"),
        ("--cell rnn --hidden 3", "--cell: invalid choice: 'rnn'"),
        ("--cell lstm --hidden 0", "--hidden: '0' given, allowed: an integer of at least 1"),
        ("--cell lstm --hidden 3 --dtype float64", "--dtype: invalid choice: 'float64'"),
        ("--cell lstm --hidden 3 --device tpu", "device is 'tpu', allowed: cpu, cuda or cuda:N"),
        ("--cell lstm --hidden 3 --save all", "--save: invalid choice: 'all'"),
        ("--cell lstm --hidden 3 --warmup 0", "--warmup: '0' given, allowed: an integer of at least 1"),
        ("--cell lstm --hidden 3 --backend cudnn", "--backend: invalid choice: 'cudnn'"),
        ("--cell lstm --hidden 3 --optimizer lion", "--optimizer: invalid choice: 'lion'"),
        ("--cell lstm --hidden 3 --compare cudnn", "--compare: invalid choice: 'cudnn'"),
        ("--cell lstm --hidden 3 --iterations 0", "--iterations: '0' given, allowed: an integer of at least 1"),
        ("--cell lstm --hidden 3 --seconds soon", "--seconds: 'soon' given, allowed: a number of at least 0"),
        ("--cell lstm --hidden 3 --output mymodel.py", "mymodel.py"),
        ("--cell lstm --hidden 3 --device-model h300", "the device is 'h300'"),
    ],
)
def test_bad_arguments(model, arguments, message, capsys):
    given = arguments.split()
    given += [] if "--device " in arguments else ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        profile_command.main([*given, "--steps", "4"])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (model / "persistrnn-profile").exists()


@pytest.mark.parametrize("steps", ["0", "-4", "4,", "", "4,x", "4,4", "1.5", "4;8", "²"])
def test_bad_steps(steps, capsys):
    with pytest.raises(SystemExit):
        profile_command.main(["--cell", "lstm", "--hidden", "3", f"--steps={steps}"])
    expected = f"--steps: {steps!r} given, allowed: integers of at least 1, none twice"
    assert expected in " ".join(capsys.readouterr().err.split())


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
        ("--model mymodel:of_torch --compare torch", "the model has no layer of persistrnn to replace"),
        ("--model mymodel:make --compare persistrnn", "the model has no torch.nn.LSTM or GRU to replace"),
        ("--cell lstm --hidden 3 --compare persistrnn", "allowed for sizes: 'torch'"),
        ("--cell lstm --hidden 3 --save auto --save-budget 9", "need at least"),
        ("--cell lstm --hidden 3 --backend persistent", "failed at T = 4: "),
        ("--cell lstm --hidden 3 --save auto", "save_budget"),
        ("--cell lstm --hidden 3 --save-budget 9", "save='gates' and save_budget=9"),
        ("--cell lstm --hidden 3 --dtype tf32", "a CPU has no tf32 products"),
    ],
)
def test_what_cannot_be_profiled(model, arguments, message, capsys):
    assert profile_command.main([*arguments.split(), "--steps", "4", "--device", "cpu", "--output", "out"]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_other_peoples_files_stay(tmp_path, capsys):
    theirs = tmp_path / "trace.json"
    theirs.write_text("{}")
    with pytest.raises(SystemExit):
        profile_command.main([*COMMAND.split(), "--output", str(tmp_path)])
    assert "is there, and no report wrote it: move it, or name another folder" in " ".join(
        capsys.readouterr().err.split()
    )
    assert theirs.read_text() == "{}"


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    """Said at the door, not after minutes of measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        profile_command.main([*COMMAND.split(), "--output", str(tmp_path / "out")])
    assert "needs matplotlib" in capsys.readouterr().err
    with pytest.raises(MissingMatplotlib, match=r"pip install 'persistrnn\[profile\]'"):
        profile_run.profile(SIZES, [4], device="cpu", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(profile_progress.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        profile_command.main([*COMMAND.split()])
    assert "needs tqdm, which is not installed: pip install 'persistrnn[profile]'" in capsys.readouterr().err
    with pytest.raises(MissingTqdm):
        profile_run.profile(SIZES, [4])
    assert profile_run.profile(SIZES, [4], progress=False, iterations=2).points


def test_a_second_profile_replaces_the_first(report, tmp_path, undrawn, capsys):
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    assert len(list(tmp_path.glob("trace*.json"))) == 2
    assert profile_command.main([*COMMAND.split(), "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile.html", "profile.txt", "profile.json", "trace.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "profile.json").read_text())["longest"].keys() == {OURS}
    assert capsys.readouterr().out.count(".json") == 2


@pytest.mark.parametrize(("broken", "left"), [("data", set()), ("shutil.move", {"profile.html"})])
def test_a_report_that_fails_leaves_its_folder_to_the_next(broken, left, tmp_path, undrawn, monkeypatch):
    """Nothing is written before all is made; and what is written bears the page's mark."""

    def fail(*given):
        raise OSError("no space left")

    found = measure("lstm", {OURS: SIZES}, [4], "cpu", TWICE)
    traces = tmp_path / "traces"
    traces.mkdir()
    (traces / "trace.json").write_text("{}")
    folder = profile_report.folder(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(f"persistrnn.profiling.report.{broken}", fail)
        with pytest.raises(OSError, match="no space left"):
            profile_report.write(found, folder, traces)
    names = {path.name for path in folder.iterdir()}
    assert left <= names
    assert bool(left) == bool(names)
    assert profile_report.folder(folder) == folder
    profile_report.write(found, folder, traces)
    assert {path.name for path in folder.iterdir()} == {"profile.html", "profile.txt", "profile.json", "trace.json"}


# What is measured.


def test_the_page_comes_first_and_whole(tmp_path, undrawn, monkeypatch):
    """Killed after any step, the folder has the mark or nothing of the report's names."""
    found = measure("lstm", {OURS: SIZES}, [4], "cpu", TWICE)
    replace, order = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda own, other: (order.append(other.name), replace(own, other)))
    (tmp_path / "traces").mkdir()
    profile_report.write(found, tmp_path, tmp_path / "traces")
    assert order == ["profile.html", "profile.txt", "profile.json"]


@pytest.mark.interpreter
def test_phases_of_the_kernels(tmp_path, undrawn):
    """Interpreted: the times say nothing, the phases and the work in them are those of a GPU."""
    sizes = Sizes("gru", 12, 16, 2, False, 2, "fp32", "cpu", "persistent")
    found = profile_run.profile(sizes, [2], compare="torch", device="cpu", iterations=2, output=tmp_path)
    ours, theirs = found.points
    assert ours.path == "persistent"
    assert {"input GEMM", "scan forward", "scan backward", "weight GEMMs"} <= ours.phases.keys()
    tokens, gates = 2 * 2, 3 * 16
    assert ours.phases["input GEMM"].flops == 2 * tokens * gates * (12 + 16)
    # Of both weights of both layers, and of the upper layer's input.
    assert ours.phases["weight GEMMs"].flops == 2 * tokens * gates * (12 + 16 + 2 * 16 + 16)
    assert ours.phases["scan forward"].flops == ours.phases["scan backward"].flops == 2 * tokens * gates * 16 * 2
    assert "scan forward" not in theirs.phases
    assert "torch's layers, forward" in theirs.phases
    text = (tmp_path / "profile.txt").read_text()
    assert "measured in Triton's interpreter, CPU" in text
    assert "no time here says anything about a GPU" in text
