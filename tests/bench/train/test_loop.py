"""The loop of the training programs: steps, schedule, options, kills, comparison, several processes."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import ROOT, assert_same, kill_at_random, python_source, saved, two_processes
from torch import nn

from bench import UsageError
from bench.train import comparison, language_model, layers, ranks
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.loop import Run, learning_rate
from bench.train.options import Settings, number, option, parser, split
from bench.train.progress import PeakMemory

SMALL = ["--hidden=16", "--embedding=8", "--sequence=16", "--device=cpu"]
SAMPLE = "--sample-tokens=20"

# While both take their third step, rank 1 sends a signal to torchrun, whose own then arrives in the same step.
STOPPED = """
import os, signal, sys, time
from bench.train import language_model, ranks
from bench.train.loop import Run

step = Run.train_step

def train_step(run):
    if run.step == 2 and ranks.rank() == 1:
        seen, note = [], signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *received: (seen.append(received), note(*received)))
        os.kill(os.getppid(), signal.SIGTERM)
        while not seen:
            time.sleep(0.01)
    step(run)

Run.train_step = train_step
sys.exit(language_model.main())
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
            ({"warmup": 2}, [0.5, 1.0, 1.0, 0.5]),
            ({"warmup": 3, "schedule": "constant"}, [1 / 3, 2 / 3, 1.0, 1.0]),
        ],
    )
    def test_rates(self, options: dict[str, Any], expected: list[float]) -> None:
        settings = Settings(device="cpu", dtype="float32", steps=4, learning_rate=10.0, **options)
        assert [learning_rate(settings, step) / 10 for step in range(4)] == pytest.approx(expected)

    def test_a_step_takes_its_rate(self, source: Path) -> None:
        run = new_run(source, warmup=4, weight_decay=0.25)
        rates = []
        for _ in range(6):
            run.train_step()
            rates.append(run.optimizer.param_groups[0]["lr"])
        assert rates == [learning_rate(run.settings, step) for step in range(6)]
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
            logits, state = reference(inputs, state=state)
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


class TestOptions:
    @dataclass(frozen=True, kw_only=True)
    class Own(Settings):
        hidden: int = 7
        more: float = option(0.5, "one's own", type=number(float, 0, 1))
        quick: bool = option(False, "a flag")

    def parsed(self, *arguments: str) -> dict[str, Any]:
        return split(self.Own, parser(self.Own, "name", "text").parse_args(arguments))[1]

    def test_every_field_is_an_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.parsed("--help")
        shown = " ".join(capsys.readouterr().out.split())
        for name in Settings.__dataclass_fields__:
            assert f"--{name.replace('_', '-')} " in shown
        assert "--hidden N hidden units a layer (default 7)" in shown
        assert "--more X one's own (default 0.5)" in shown
        assert self.parsed() == {}
        given = self.parsed("--hidden", "3", "--quick", "--learning-rate=1e-3")
        assert given == {"hidden": 3, "quick": True, "learning_rate": 1e-3}
        settings = self.Own.complete({"device": "cpu", **given})
        assert (settings.hidden, settings.quick, settings.more, settings.dtype) == (3, True, 0.5, "float32")


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, SAMPLE, "--text", str(source), "--batch=4", "--steps=10", "--dropout=0.2", "--truncate=7"]
    kill_at_random("bench.train.language_model", arguments, tmp_path / "whole", tmp_path / "killed")
    whole, killed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert len(whole["losses"]) == 10
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
        with pytest.raises(UsageError, match=r"--batch 2 given to 3 processes: each needs a row; allowed is 3 or more"):
            Settings.complete({"device": "cpu", "batch": 2})

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under torchrun each process takes a GPU of its own, and every GPU has its number, as torch needs it."""
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        found = [ranks.device(name) for name in ("cpu", "cuda", "cuda:3")]
        assert found == [torch.device("cpu"), torch.device("cuda", 2), torch.device("cuda", 3)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        for device in ("cpu", "cuda", "cuda:1"):
            assert Settings.complete({"device": device}).device == device
        with pytest.raises(UsageError, match=r"--device cuda:2 given .*allowed here: cpu, cuda, cuda:0, cuda:1"):
            Settings.complete({"device": "cuda:2"})
        monkeypatch.setenv("WORLD_SIZE", "6")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert ranks.device(Settings.complete({"device": "cuda"}).device) == torch.device("cuda", 1)
        for device, local in (("cuda:1", "2"), ("cuda", "3")):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
            with pytest.raises(UsageError, match=rf"--device {device} given to {local} process.* sees 2 GPU"):
                Settings.complete({"device": device})

    def test_they_train_as_one(self, source: Path, tmp_path: Path) -> None:
        """Lines of several lengths in unequal parts: each token counts the same, whoever reads it."""
        arguments = [*SMALL, "--text", str(source), "--batch=5", "--steps=4", "--sequence=20"]
        jobs = {"lines": ["--lines", SAMPLE], "streams": ["--truncate=6", SAMPLE, "--compare=torch"]}
        shown = two_processes(
            "bench.train.language_model",
            *([*arguments, *extra, "--output", str(tmp_path / name)] for name, extra in jobs.items()),
        )
        assert shown.count("[0, 0] are the statuses") == 2
        assert shown.count("This run is finished") == 2  # said once
        assert shown.count("bytes/s (cpu)") == 2
        for name in ("lines", "streams"):
            assert language_model.main([*arguments, *jobs[name], "--output", str(tmp_path / "one" / name)]) == 0
            two, one = saved(tmp_path / name), saved(tmp_path / "one" / name)
            assert len(two["ranks"]) == 2
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert two["quality"] == pytest.approx(one["quality"], rel=1e-5)
            for key, tensor in one["model"].items():
                torch.testing.assert_close(two["model"][key], tensor, rtol=1e-3, atol=1e-5)

    def test_a_signal_to_torchrun_stops_all(self, source: Path, tmp_path: Path) -> None:
        """And what is resumed ends as if it had not been stopped."""
        arguments = [*SMALL, SAMPLE, "--text", str(source), "--batch=4", "--steps=8", "--dropout=0.2", "--truncate=6"]
        (tmp_path / "program.py").write_text(STOPPED)
        run, resumed = ["--output", str(tmp_path / "run")], ["--resume", SAMPLE]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *(str(tmp_path / "program.py"), *arguments, *run),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert len(saved(tmp_path / "run")["losses"]) == 3, done.stderr
        assert "SIGTERM: every step taken is saved. Go on with --resume --output" in done.stdout

        whole = ["--output", str(tmp_path / "whole")]
        shown = two_processes("bench.train.language_model", [*resumed, *run], [*arguments, *whole])
        assert re.findall(r"(.*) are the statuses", shown) == ["[0, 0]", "[0, 0]"]
        assert shown.count("3 of 8 steps are done") == 1
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
        assert results[0][0].shape == (7, 4, 12)
        assert not results[0][0][3:, 0].any()

    def test_settings_are_passed_on(self) -> None:
        settings = Settings(device="cpu", dtype="float32", hidden=4, layers=2, dropout=0.5, save="checkpoint")
        ours, theirs = (layers.recurrent(settings, backend, 3) for backend in ("auto", "torch.nn"))
        assert (ours.save, ours.backend, ours.hidden_size, ours.dropout) == ("checkpoint", "auto", 4, 0.5)
        ours(torch.randn(2, 1, 3))
        assert layers.path(nn.Sequential(ours)) == "torch"
        assert layers.path(nn.Sequential(theirs)) == "torch.nn"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process begin its high-water mark anew")
def test_peak_memory_is_that_of_its_time() -> None:
    measured = []
    for mebibytes in (64, 16):
        memory = PeakMemory(torch.device("cpu"))
        torch.ones(mebibytes * 2**18)
        measured.append(memory.added * 1024)
    assert measured == pytest.approx([64, 16], abs=6)


def test_the_table_of_a_comparison() -> None:
    lines = comparison.curves(([8.0, 4.0, 2.0], [8.0, 4.5, 2.25]), "bits", rows=2).splitlines()
    assert lines[0].split() == ["step", "persistrnn", "torch.nn", "difference", "(bits)"]
    assert lines[1].split() == ["1", "8.00000", "8.00000", "+0.0e+00"]
    assert lines[2].split() == ["3", "2.00000", "2.25000", "-2.5e-01"]
    assert lines[3] == "largest difference 5.0e-01 bits, at step 2; on average 2.5e-01"
    assert len(comparison.curves(([8.0], [7.0]), "bits").splitlines()) == 3
