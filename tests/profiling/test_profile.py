"""`persistrnn profile` from end to end on a CPU: what it measures, what it writes, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from html_page import Page

import persistrnn
from persistrnn import phases
from persistrnn.kernels.planner import memory
from persistrnn.profiling import command, page, plots, run
from persistrnn.profiling import report as profile_report
from persistrnn.profiling.measure import measure
from persistrnn.profiling.record import Settings
from persistrnn.profiling.subject import OURS, TORCH, Sizes, load, of_callable
from persistrnn.profiling.trace import ORDER, STAGES

SIZES = Sizes("lstm", 8, 8, 2, batch=3)
TWICE = Settings("adam", 2, 1, 20.0)
COMMAND = "--cell lstm --hidden 8 --layers 2 --batch 3 --steps 16,4 --device cpu --iterations 2"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A folder with what the command wrote."""
    folder = tmp_path_factory.mktemp("report")
    assert command.main([*COMMAND.split(), "--compare", "torch", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Without plots, which take seconds: `report` has them."""
    monkeypatch.setattr(plots, "draw", lambda profile: [])


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
        assert [span["name"] for span in point["spans"] if span["track"] == "stages"] == list(STAGES)
        assert all(
            0 <= span["start"] <= span["start"] + span["seconds"] <= point["profiled"] for span in point["spans"]
        )
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


def test_page_is_sound(report):
    """Measured and predicted stand under different heads, each card says whose its number is, and each plot where it
    was measured, or that it was not."""
    text = (report / "profile.html").read_text()
    found = Page(text)
    assert len(found.drawings) == 4, "time and memory, phases, timeline, batches"
    assert found.banners[0].startswith("Measured on a CPU: torch's own kernels ran, and the persistent ones did not.")
    assert "No time here says anything about a GPU" in found.banners[0]
    assert len(re.findall(r"<text[^>]*>[^<]*measured on this CPU[^<]*</text>", text)) == 3
    assert len(re.findall(r"<text[^>]*>predicted for h200, nothing of it measured[^<]*</text>", text)) == 1
    assert '<div class="predicted"><dt><b>h200, fp32, predicted</b> per time step' in text
    cards = re.findall(r"<dt><b>(.*?)</b>", text)
    assert len(cards) == 6
    assert all(re.match(r"persistrnn, (T\xa0=\xa0\d|extrapolated)|h200", whose) for whose in cards), cards
    (phases,) = (caption for caption in found.tables if caption.startswith("torch.nn at T = 16"))
    assert [row[0] for row in found.rows(phases)][1:] == [name for name in ORDER if name in str(found.rows(phases))]


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
def test_a_browser_shows_it(report, tmp_path):
    """It logs nothing to the console; and a script in a copy finds every plot drawn and of some size."""
    copy = tmp_path / "profile.html"
    copy.write_text((report / "profile.html").read_text().replace("<head>", "<head>" + SPY, 1))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1100,3000", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
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
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with mymodel.py, as the working folder."""
    (tmp_path / "mymodel.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    return tmp_path


def test_a_model_of_the_users(model, undrawn, capsys):
    arguments = (
        "--model mymodel:make --steps 5 --compare torch --device cpu --iterations 2 --optimizer sgd --output out"
    )
    assert command.main(arguments.split()) == 0
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
    """When it is made, and when it is called."""
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
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(model))])
    arguments = "--model late:make --steps 4 --device cpu --iterations 2 --output out"
    assert command.main(arguments.split()) == 0
    for name in ("late", "neighbour", "other_neighbour"):
        del sys.modules[name]


def test_a_model_of_torchs(model):
    sys.path.insert(0, str(model))
    make = load("mymodel:of_torch")
    found = run.profile(make, [4], compare="persistrnn", device="cpu", iterations=2, optimizer="none")
    assert [(point.arm, point.path) for point in found.points] == [(OURS, "torch"), (TORCH, "torch.nn")]
    alone = run.profile(make, [4], device="cpu", iterations=2)
    assert [point.arm for point in alone.points] == ["as given"]


def test_a_second_profile_replaces_the_first(report, tmp_path, undrawn):
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    assert len(list(tmp_path.glob("trace*.json"))) == 2
    assert command.main([*COMMAND.split(), "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "profile.html", "profile.txt", "profile.json", "trace.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "profile.json").read_text())["longest"].keys() == {OURS}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    page.write(path, "before")
    with pytest.raises(TypeError):
        page.write(path, 3)
    monkeypatch.setattr(Path, "replace", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.interpreter
def test_phases_of_the_kernels(tmp_path, undrawn):
    """Interpreted: the times say nothing, the phases are those of a GPU."""
    sizes = Sizes("gru", 12, 16, 2, batch=2, backend="persistent")
    found = run.profile(sizes, [2], compare="torch", device="cpu", iterations=2, output=tmp_path)
    ours, theirs = found.points
    assert ours.path == "persistent"
    assert {"input GEMM", "scan forward", "scan backward", "weight GEMMs"} <= ours.phases.keys()
    assert ours.phases["scan forward"].flops > 0
    assert ours.phases["scan forward"].bytes == ours.calls[0].scan_bytes(False)
    assert ours.phases["scan backward"].bytes == ours.calls[0].scan_bytes(True)
    assert "scan forward" not in theirs.phases
    assert "torch's layers, forward" in theirs.phases
    text = (tmp_path / "profile.txt").read_text()
    assert "measured in Triton's interpreter, CPU" in text
    assert "no time here says anything about a GPU" in text


@pytest.mark.interpreter
@pytest.mark.parametrize(("save", "chunks"), [("gates", 1), ("state", 2)])
def test_a_launch_is_one_range(save, chunks, monkeypatch):
    """torch.profiler's own table adds up nested ranges of one name."""
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 4 // chunks)
    layer = persistrnn.GRU(3, 8, save=save, backend="persistent")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(torch.randn(4, 2, 3))[0].sum().backward()
    counted = Counter(e.name for e in profiler.events())
    assert [counted[name] for name in (phases.SCAN_FORWARD, phases.SCAN_BACKWARD)] == [chunks] * 2


@pytest.mark.parametrize(("broken", "left"), [("data", set()), ("shutil.move", {"profile.html"})])
def test_a_report_that_fails_leaves_its_folder_to_the_next(broken, left, tmp_path, undrawn, monkeypatch):
    """Nothing is written before all is made; and what is written bears the page's mark."""

    def fail(*given):
        raise OSError("no space left")

    found = measure("lstm", {OURS: of_callable(SIZES, "cpu")}, [4], "cpu", TWICE)
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


def test_the_page_comes_first_and_whole(tmp_path, undrawn, monkeypatch):
    """Killed after any step, the folder has the mark or nothing of the report's names."""
    found = measure("lstm", {OURS: of_callable(SIZES, "cpu")}, [4], "cpu", TWICE)
    replace, order = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda own, other: (order.append(other.name), replace(own, other)))
    (tmp_path / "traces").mkdir()
    profile_report.write(found, tmp_path, tmp_path / "traces")
    assert order == ["profile.html", "profile.txt", "profile.json"]
