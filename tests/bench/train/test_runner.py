"""The runner of the training programs: steps, schedule, options, kills, comparison, several processes."""

import contextlib
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import ROOT, assert_same, kill_at_random, python_source, saved, two_processes
from torch import nn

from bench import UsageError
from bench.train import curves, language_model, layers, ranks, schedule
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.memory import PeakMemory
from bench.train.options import Settings, number, option, parser, split
from bench.train.training import Run

SMALL = ["--hidden=16", "--embedding=8", "--sequence=16", "--device=cpu"]
SAMPLE = "--sample-tokens=20"

# While both processes take a step, rank 1 signals: of STEP:SIGNAL:self to itself, of STEP:SIGNAL:parent to torchrun,
# whose own signal then arrives in the same step.
STOPPED = """
import os, signal, sys, time
from bench.train import checkpoint, language_model, ranks
from bench.train.training import Run

seen = []
class Signals(checkpoint.Signals):
    def note(self, number, frame):
        seen.append(number)
        super().note(number, frame)
checkpoint.Signals = Signals

def main(arguments):
    when, *arguments = arguments
    step, number, whom = when.split(":")
    whole_step = Run.train_step
    def train_step(run):
        if run.step == int(step) and ranks.rank() == 1:
            os.kill(os.getpid() if whom == "self" else os.getppid(), signal.Signals[number])
            while not seen:
                time.sleep(0.01)
        whole_step(run)
    Run.train_step = train_step
    return language_model.main(arguments)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return python_source(tmp_path / "source")


def new_run(source: Path, **changes: Any) -> Run:
    sizes = {"hidden": 16, "embedding": 8, "batch": 3, "sequence": 12, "steps": 20}
    return Run(LanguageModeling(TextSettings.complete({"device": "cpu", "text": str(source), **sizes, **changes})))


class TestSchedule:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
            ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
            ({"warmup": 2}, [0.5, 1.0, 1.0, 0.5]),
            ({"warmup": 3, "schedule": "constant"}, [1 / 3, 2 / 3, 1.0, 1.0]),
        ],
    )
    def test_rates(self, options: dict[str, Any], expected: list[float]) -> None:
        settings = Settings(device="cpu", dtype="float32", steps=4, learning_rate=10.0, **options)
        rates = [schedule.learning_rate(settings, step) / 10 for step in range(4)]
        assert rates == pytest.approx(expected)

    def test_a_step_takes_its_rate(self, source: Path) -> None:
        run = new_run(source, warmup=4, weight_decay=0.25)
        rates = []
        for _ in range(6):
            run.train_step()
            rates.append(run.optimizer.param_groups[0]["lr"])
        assert rates == [schedule.learning_rate(run.settings, step) for step in range(6)]
        assert run.optimizer.param_groups[0]["weight_decay"] == 0.25


class TestTruncation:
    def test_gradients(self, source: Path) -> None:
        """Those of the whole step, with the state detached every 5 steps of time."""
        runs = whole, cut = new_run(source), new_run(source, truncate=5)
        pieces = cut.workload.pieces(0, slice(0, 3))
        assert [len(piece.tensors[0]) for piece in pieces] == [5, 5, 2]
        reference = whole.model
        state, total = None, torch.zeros(())
        for piece in pieces:
            inputs, targets = piece.tensors
            logits, state = reference(inputs, state)
            state = tuple(tensor.detach() for tensor in state)
            total = total + nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        (total / 36).backward()
        expected = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
        for run in runs:
            run.settings = replace(run.settings, clip=1e9)
            run.train_step()
        for name, parameter in cut.model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
        assert cut.losses == pytest.approx(whole.losses, rel=1e-6)
        full = dict(whole.model.named_parameters())["rnn.weight_hh_l0"].grad
        assert (full - expected["rnn.weight_hh_l0"]).norm() > 1e-3 * full.norm()

    def test_the_state_goes_on_to_the_next_step(self, source: Path) -> None:
        runs = new_run(source), new_run(source, truncate=5)
        for run in runs:
            run.settings = replace(run.settings, learning_rate=0.0)
            for _ in range(3):
                run.train_step()
        assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)

    def test_lines_begin_anew(self, source: Path) -> None:
        run = new_run(source, lines=True)
        run.train_step()
        assert run.state is None


class TestOptions:
    @dataclass(frozen=True, kw_only=True)
    class Own(Settings):
        hidden: int = 7
        more: float = option(0.5, "100% one's own", type=number(float, 0, 1), metavar="X")
        quick: bool = option(False, "a flag", action="store_true")

    def parsed(self, *arguments: str) -> dict[str, Any]:
        made, _ = parser(self.Own, "program {options}", "text", Path("out"))
        return split(self.Own, made.parse_args(arguments))[1]

    def test_every_field_is_an_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.parsed("--help")
        shown = " ".join(capsys.readouterr().out.split())
        for field in fields(self.Own):
            assert f"--{field.name.replace('_', '-')} " in shown
        assert "hidden units a layer (default 7)" in shown
        assert "100% one's own (default 0.5)" in shown

    def test_only_what_is_given(self) -> None:
        assert self.parsed() == {}
        given = self.parsed("--hidden", "3", "--quick", "--learning-rate=1e-3")
        assert given == {"hidden": 3, "quick": True, "learning_rate": 1e-3}
        settings = self.Own.complete({"device": "cpu", **given})
        assert (settings.hidden, settings.quick, settings.more, settings.dtype) == (3, True, 0.5, "float32")

    def test_settings_of_another_version(self) -> None:
        settings = {field.name: None for field in fields(Settings)}
        with pytest.raises(UsageError, match=r"another version .*\(more, old, quick\): start anew"):
            self.Own.resumed({**settings, "old": 1}, {})


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, SAMPLE, "--text", str(source), "--batch=4", "--steps=20", "--dropout=0.2", "--truncate=7"]
    arguments.append("--layers=2")
    kill_at_random("bench.train.language_model", arguments, tmp_path / "whole", tmp_path / "killed")
    whole, killed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert len(whole["losses"]) == 20
    assert_same(killed, whole)
    assert (tmp_path / "killed" / "sample.txt").read_text() == (tmp_path / "whole" / "sample.txt").read_text()


class TestProcesses:
    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(list(range(10))[ranks.rows(10)])
        assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]

    def test_every_gpu_has_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch.cuda.set_device refuses one that has none."""
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        found = [ranks.device(name) for name in ("cpu", "cuda", "cuda:3")]
        assert found == [torch.device("cpu"), torch.device("cuda", 2), torch.device("cuda", 3)]
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert ranks.device("cuda") == torch.device("cuda", 1)

    def test_more_processes_than_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for name, count in (("WORLD_SIZE", "6"), ("LOCAL_WORLD_SIZE", "3")):
            monkeypatch.setenv(name, count)
        settings = {"device": "cuda", "dtype": "float32"}
        with pytest.raises(UsageError, match=r"cuda given to 3 processes .* it has 2: allowed is .*per-node 2 or less"):
            Settings.complete(settings)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        saved = asdict(Settings.complete(settings))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(UsageError, match="cuda given to 3 processes"):
            Settings.resumed(saved, {})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--batch 1", r"--batch 1 given to 2 processes: each needs a row; allowed is 2 or more"),
            ("--compare interpreted", r"--compare interpreted given to 2 processes: allowed is one"),
            ("--cell rnn", r"torchrun --nproc-per-node 2 -m bench.train.language_model.*'rnn'"),
        ],
    )
    def test_errors_at_the_door(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(ranks, "connected", contextlib.nullcontext)
        monkeypatch.setattr(ranks, "from_first", lambda thing: thing)
        for rank, expected in enumerate((message, "^$")):
            monkeypatch.setenv("RANK", str(rank))
            with pytest.raises(SystemExit) as stop:
                language_model.main([*SMALL, *arguments.split()])
            assert stop.value.code == 2
            assert re.search(expected, capsys.readouterr().err, re.DOTALL)

    def test_they_train_as_one(self, source: Path, tmp_path: Path) -> None:
        """Lines of several lengths in unequal parts: each token counts the same, whoever reads it."""
        arguments = [*SMALL, "--text", str(source), "--batch=5", "--steps=8", "--sequence=20"]
        jobs = {"lines": ["--lines", SAMPLE], "streams": ["--truncate=6", SAMPLE]}
        jobs["compared"] = ["--compare=torch", "--steps=2"]
        shown = two_processes(
            "bench.train.language_model",
            *([*arguments, *extra, "--output", str(tmp_path / name)] for name, extra in jobs.items()),
        )
        assert shown.count("[0, 0] are the statuses") == 3
        assert shown.count("bits per byte on held-out files. The checkpoint is in") == 2  # said once
        assert shown.count("bytes/s (CPU)") == 1
        for name in ("lines", "streams"):
            assert language_model.main([*arguments, *jobs[name], "--output", str(tmp_path / "one" / name)]) == 0
            two, one = saved(tmp_path / name), saved(tmp_path / "one" / name)
            assert len(two["ranks"]) == 2
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert two["quality"] == pytest.approx(one["quality"], rel=1e-5)
            for key, tensor in one["model"].items():
                torch.testing.assert_close(two["model"][key], tensor, rtol=1e-3, atol=1e-5)

    def test_a_signal_to_one_stops_all(self, source: Path, tmp_path: Path) -> None:
        """And one to torchrun; what is resumed ends as if it had not been stopped."""
        arguments = [*SMALL, SAMPLE, "--text", str(source), "--batch=4", "--steps=12", "--dropout=0.2", "--truncate=6"]
        (tmp_path / "program.py").write_text(STOPPED)
        run, resumed = ["--output", str(tmp_path / "run")], ["--resume", SAMPLE]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *(str(tmp_path / "program.py"), "3:SIGTERM:parent", *arguments, *run),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert len(saved(tmp_path / "run")["losses"]) == 4, done.stderr
        assert "SIGTERM after step 4; everything is saved" in done.stdout

        whole = ["--output", str(tmp_path / "whole")]
        jobs = [["6:SIGINT:self", *resumed, *run], ["99:SIGINT:self", *resumed, *run]]
        shown = two_processes("program", *jobs, ["99:SIGINT:self", *arguments, *whole], path=tmp_path)
        assert re.findall(r"(.*) are the statuses", shown) == ["[130, 130]", "[0, 0]", "[0, 0]"]
        assert shown.count("SIGINT after step 7; everything is saved") == 1
        assert "torchrun --nproc-per-node 2 -m bench.train.language_model --resume --output" in shown
        assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
        own = saved(tmp_path / "run")["ranks"]
        assert not torch.equal(own[0]["random"], own[1]["random"]), "ranks drop units of their own"


class TestLayers:
    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    def test_padded_rows_are_the_same_on_both(self, cell: str) -> None:
        settings = Settings(device="cpu", dtype="float32", cell=cell, hidden=6, layers=2)
        torch.manual_seed(0)
        ours, theirs = (layers.recurrent(settings, backend, 3, bidirectional=True) for backend in ("auto", "torch.nn"))
        theirs.load_state_dict(ours.state_dict())
        x, lengths = torch.randn(7, 4, 3), torch.tensor([3, 7, 1, 5])
        results = [layers.run_padded(layer, x, lengths) for layer in (ours, theirs)]
        assert_same(*results)
        expected = ours(x, lengths=lengths)  # what a GPU runs
        torch.testing.assert_close(results[0], expected)
        assert results[0][0].shape == (7, 4, 12)
        assert not results[0][0][3:, 0].any()

    def test_save_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[dict[str, Any]] = []
        monkeypatch.setitem(layers.OURS, "lstm", lambda *sizes, **options: made.append(options))
        for save in ("gates", "state", "checkpoint"):
            layers.recurrent(Settings(device="cpu", dtype="float32", save=save), "auto", 3)
        assert [options.get("save") for options in made] == [None, "state", "checkpoint"]

    def test_paths(self) -> None:
        settings = Settings(device="cpu", dtype="float32", hidden=4)
        ours, theirs = (layers.recurrent(settings, backend, 3) for backend in ("auto", "torch.nn"))
        ours(torch.randn(2, 1, 3))
        assert layers.path(nn.Sequential(ours)) == "torch"
        assert layers.path(nn.Sequential(theirs)) == "torch.nn"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process begin its high-water mark anew")
def test_peak_memory_is_that_of_its_time() -> None:
    def work(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**18)

    measured = []
    for mebibytes in (64, 16):
        memory = PeakMemory(torch.device("cpu"))
        work(mebibytes)
        measured.append(memory.added * 1024)
    assert measured == pytest.approx([64, 16], abs=6)
    assert memory.total > memory.added


class TestCurves:
    def test_table(self) -> None:
        lines = curves.table(("ours", "theirs"), ([8.0, 4.0, 2.0], [8.0, 4.5, 2.25]), "bits", rows=2).splitlines()
        assert lines[0].split() == ["step", "ours", "theirs", "difference", "(bits)"]
        assert lines[1].split() == ["1", "8.00000", "8.00000", "+0.0e+00"]
        assert lines[2].split() == ["3", "2.00000", "2.25000", "-2.5e-01"]
        assert lines[3] == "largest difference 5.0e-01 bits, at step 2; on average 2.5e-01"

    def test_table_of_one_step(self) -> None:
        assert len(curves.table(("ours", "theirs"), ([8.0], [7.0]), "bits").splitlines()) == 3

    def test_side_by_side(self) -> None:
        table = curves.side_by_side(("ours", "theirs"), [("tokens/s", "1,000", "900"), ("path", "torch", "torch.nn")])
        assert table.splitlines() == [
            "           ours    theirs",
            "tokens/s  1,000       900",
            "path      torch  torch.nn",
        ]
