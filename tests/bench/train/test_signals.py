"""Tagging of long signals: the recordings, the sessions made of them, the model, and that a kill changes nothing."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_runs import assert_same, die_and_resume, refused
from torch import Tensor, nn

import persistrnn
from bench import UsageError
from bench.train import layers, signals
from bench.train.batches import NO_TARGET
from bench.train.loop import Run
from bench.train.signals import SignalSettings, Tagging, load_recordings, run_rows

EXERCISES = ["slow", "medium", "quick"]
SMALL = ["--hidden=6", "--batch=2", "--sequence=50", "--stretch=45", "--held-out=1", "--steps=6", "--device=cpu"]


def content(people: int = 4) -> dict[str, Any]:
    """In seglearn's form: each exercise is a swing of its own period, twice by each person, who is channel 1."""
    random = np.random.default_rng(0)
    kinds = [(person, exercise) for person in range(people) for exercise in range(3) for _ in range(2)]
    motion = []
    for person, exercise in kinds:
        steps = np.arange(random.integers(25, 60)) + random.integers(100)
        swing = np.sin(2 * np.pi * steps / (16, 8, 4)[exercise]) + 0.1 * random.standard_normal(len(steps))
        motion.append(np.stack([swing, np.full(len(steps), 10.0 * person)], 1))
    who, what = zip(*kinds, strict=True)
    return {"X": motion, "y": np.array(what), "subject": np.array(who), "y_labels": EXERCISES}


def written(path: Path, content: Any) -> Path:
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "recordings.npy", content())


@pytest.fixture
def small(file: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment; it writes into tmp_path / "run"."""
    return [*SMALL, "--recordings", str(file), "--output", str(tmp_path / "run")]


def tagging(file: Path, **given: Any) -> Tagging:
    small = {"device": "cpu", "hidden": 6, "batch": 3, "sequence": 70, "stretch": 45, "recordings": str(file)}
    return Tagging(SignalSettings.complete(small | given))


class TestRecordings:
    def test_all_of_the_file_is_read(self, file: Path) -> None:
        (read, exercises, _), given = load_recordings(file), content()
        assert exercises == EXERCISES
        for recording, signal, exercise, subject in zip(read, given["X"], given["y"], given["subject"], strict=True):
            assert torch.equal(recording.signal, torch.tensor(signal, dtype=torch.float32))
            assert (recording.exercise, recording.subject) == (exercise, subject)

    def test_the_fingerprint_is_of_all_of_it(self, tmp_path: Path) -> None:
        prints = {load_recordings(written(tmp_path / "same.npy", content()))[-1] for _ in range(2)}
        assert len(prints) == 1
        for key, change in [("X", 0.5), ("y", 1), ("subject", 7)]:
            changed = content()
            changed[key][-1] = changed[key][-1] * 0 + change
            prints.add(load_recordings(written(tmp_path / "changed.npy", changed))[-1])
        assert len(prints) == 4

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("X", None, "KeyError"),
            ("", 0, "ValueError"),
            ("X", 3, "TypeError"),
            ("y_labels", ["one"], "an exercise is none of 0 to 0"),
            ("subject", [1], "ValueError"),
            ("X", [np.zeros((5, 2)), np.zeros((5, 3))], "Sizes of tensors must match"),
            ("X", [np.zeros((0, 2))] * 2, "at least one step"),
            ("X", [np.zeros(5)] * 2, "is \\[T, channels\\]"),
            ("X", [np.full((5, 2), np.nan)] * 2, "finite"),
        ],
    )
    def test_files_of_another_form(self, tmp_path: Path, key: str, value: Any, message: str) -> None:
        given = {"X": [np.zeros((5, 2))] * 2, "y": [0, 1], "subject": [0, 1], "y_labels": ["one", "two"]}
        load_recordings(written(tmp_path / "good.npy", given))
        given[key] = value
        if value is None:
            del given[key]
        bad = written(tmp_path / "bad.npy", given if key else np.zeros(3))
        with pytest.raises(UsageError, match=rf"--recordings {bad} cannot be read .*{message}.*leave --recordings out"):
            load_recordings(bad)

    def test_without_seglearn(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        message = "seglearn is not installed: pip install 'persistrnn[signals]'"
        assert message in refused(signals.main, ["--device=cpu", f"--output={tmp_path}"], capsys)

    @pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="pip install 'persistrnn[signals]'")
    def test_seglearns_own(self) -> None:
        before = set(sys.modules)
        read, exercises, _ = load_recordings(signals.shipped())
        assert len(read) == 140
        assert len(exercises) == 7
        assert len({recording.subject for recording in read}) == 10
        assert sum(len(recording.signal) for recording in read) == 244_102
        assert "seglearn" not in set(sys.modules) - before


class TestSessions:
    def test_they_are_joined_of_one_persons_recordings(self, file: Path) -> None:
        """Each stretch is one of the person's recordings of the exercise that its tags say, and none comes twice
        before all have come."""
        workload = tagging(file, sequence=200, stretch=30)
        signal, tags = workload.session([2], torch.Generator().manual_seed(0))
        assert len(signal) == len(tags) >= 200
        signal = signal * workload.scale + workload.mean
        own = workload.of(2)
        order, first = [], 0
        while first < len(tags):
            for number, recording in enumerate(own):
                length = min(len(recording.signal), 30)
                starts = recording.signal.unfold(0, length, 1).transpose(1, 2)  # (places, length, channels)
                if (
                    first + length <= len(tags)
                    and (starts - signal[first : first + length]).abs().amax((1, 2)).min() < 1e-3
                ):
                    assert (tags[first : first + length] == recording.exercise).all()
                    order.append(number)
                    first += length
                    break
            else:
                pytest.fail(f"step {first} begins no recording")
        assert sorted(order[:6]) == list(range(6))
        assert len(signal) - 200 < 30

    def test_held_out_people_are_never_trained_on(self, file: Path) -> None:
        workload = tagging(file, held_out=2)
        trained = torch.cat([r.signal for r in workload.recordings if r.subject < 2])
        torch.testing.assert_close((workload.mean, workload.scale), (trained.mean(0), trained.std(0)))
        people = set()
        for step in range(10):
            (piece,) = workload.pieces(step, slice(0, 3))
            who = (piece.tensors[0] * workload.scale + workload.mean)[0, :, 1]
            people |= set(who.mul(0.1).round().int().tolist())
        assert people == {0, 1}
        tests = {round(float((signal * workload.scale + workload.mean)[0, 1]) / 10) for signal, _ in workload.tests()}
        assert tests == {2, 3}
        with pytest.raises(UsageError, match=r"--held-out 4 given, but .* has 4 people: .*allowed is 1 to 3"):
            tagging(file, held_out=4)

    def test_batches_follow_from_the_step(self, file: Path) -> None:
        workload = tagging(file)
        (whole,) = workload.pieces(5, slice(0, 3))
        x, lengths, tags = whole.tensors
        assert x.shape == (lengths.max(), 3, 2)
        assert whole.count == lengths.sum() == (tags != NO_TARGET).sum()
        assert len(set(lengths.tolist())) > 1
        assert_same(tagging(file).pieces(5, slice(0, 3))[0].tensors, whole.tensors)
        (part,) = workload.pieces(5, slice(1, 3))  # as another process of two takes them
        assert torch.equal(part.tensors[0], x[: len(part.tensors[0]), 1:])
        assert torch.equal(part.tensors[1], lengths[1:])
        for other in (workload.pieces(6, slice(0, 3)), tagging(file, seed=1).pieces(5, slice(0, 3))):
            assert other[0].tensors[0].shape != x.shape or not torch.equal(other[0].tensors[0], x)

    def test_pieces_of_time_are_the_whole(self, file: Path) -> None:
        whole = tagging(file).pieces(0, slice(0, 3))[0]
        pieces = tagging(file, truncate=16).pieces(0, slice(0, 3))
        assert len(pieces) > 2
        assert torch.equal(torch.cat([piece.tensors[0] for piece in pieces]), whole.tensors[0])
        assert torch.equal(torch.cat([piece.tensors[2] for piece in pieces]), whole.tensors[2])
        assert sum(piece.count for piece in pieces) == whole.count
        for piece in pieces:
            signal, lengths, tags = piece.tensors
            assert lengths.max() == len(signal) <= 16
            assert torch.equal(lengths, (tags != NO_TARGET).sum(0).clamp(min=1))


class TestModel:
    @pytest.mark.parametrize("cell", ["LSTM", "GRU"])
    @pytest.mark.parametrize("package", [nn, persistrnn], ids=["torch.nn", "persistrnn"])
    def test_rows_alone_are_rows_padded(self, package: Any, cell: str) -> None:
        torch.manual_seed(0)
        layer = getattr(package, cell)(2, 5, num_layers=2, bidirectional=True)
        x, lengths = torch.randn(9, 3, 2), torch.tensor([4, 9, 1])
        state = [torch.randn(4, 3, 5) for _ in range(2)]
        state = tuple(state) if cell == "LSTM" else state[0]
        found = []
        for run in (run_rows, layers.run_padded):
            layer.zero_grad()
            y, after = run(layer, x, lengths, state)
            (y**2).sum().backward()
            found.append([y, *(after if cell == "LSTM" else [after]), *(p.grad for p in layer.parameters())])
        for alone, padded in zip(*found, strict=True):
            torch.testing.assert_close(alone, padded)

    def test_only_the_kernels_get_padded_rows_on_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        monkeypatch.setattr(signals, "run_padded", lambda layer, *_: calls.append(layer))
        for backend in ("auto", "persistent"):
            layer = persistrnn.LSTM(2, 5, bidirectional=True, backend=backend)
            run_rows(layer, torch.randn(4, 1, 2), torch.tensor([4]), None)
        assert [layer.backend for layer in calls] == ["persistent"]

    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    def test_the_forward_direction_goes_on_from_piece_to_piece(self, file: Path, cell: str) -> None:
        run = Run(tagging(file, truncate=16, cell=cell))
        pieces = run.workload.pieces(0, slice(0, 3))
        _, state = run.workload.loss(run.model, pieces[0].tensors, None)
        for part in state if cell == "lstm" else [state]:
            assert part.shape == (2, 3, 6)
            assert part[0].abs().sum() > 0
            assert part[1].abs().sum() == 0
        x, lengths, _ = pieces[1].tensors
        with torch.no_grad():
            carried, anew = (run.model(x, lengths, before)[0] for before in (state, None))
        assert (carried - anew)[0].abs().max() > 1e-4

    def test_evaluation_reads_as_training_does(self, file: Path) -> None:
        run = Run(tagging(file, truncate=16))
        session = run.workload.tests()[0]
        state, total = None, 0.0
        with torch.no_grad():
            for piece in run.workload.cut([session]):
                loss, state = run.workload.loss(run.model, piece.tensors, state)
                total += loss.item()
            found = run.workload.tagged(run.model, session)
        assert -found.gather(1, session[1][:, None]).sum().item() == pytest.approx(total, rel=1e-5)
        with torch.no_grad():
            anew = sum(
                run.workload.loss(run.model, piece.tensors, None)[0].item() for piece in run.workload.cut([session])
            )
        assert abs(anew - total) > 1e-3

    def test_it_learns(self, file: Path) -> None:
        run = Run(tagging(file, hidden=16, steps=80, learning_rate=0.03, sequence=150, stretch=60, truncate=32))
        assert run.evaluate()[0] < 0.6
        while not run.finished:
            run.train_step()
        right, worst, nats = run.evaluate()
        assert right > 0.85
        assert worst > 0.7
        assert nats < 0.5


class Always(nn.Module):
    """Tags all steps alike."""

    def __init__(self, tag: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))
        self.logits.data[tag] = math.log(2)  # softmax: 1/2, 1/4, 1/4

    def forward(self, signals: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.logits.expand(*signals.shape[:2], 3), torch.zeros(2, signals.shape[1], 1)


def test_every_held_out_step_is_evaluated(file: Path) -> None:
    workload = tagging(file, truncate=16, sequence=120)
    tags = torch.cat([tags for _, tags in workload.tests()])
    with torch.no_grad():
        right, worst, nats = workload.evaluate(Always(1))
    share = (tags == 1).float().mean().item()
    assert right == pytest.approx(share)
    assert worst == 0
    assert nats == pytest.approx((share + 2 * (1 - share)) * math.log(2), rel=1e-5)


def test_killed_it_ends_as_if_it_had_not_been(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*SMALL, "--recordings", str(file), "--layers=2", "--dropout=0.2", "--truncate=16"]
    die_and_resume(signals.main, arguments, tmp_path, monkeypatch)


@pytest.mark.interpreter
def test_on_the_kernels_in_the_interpreter(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Both directions, rows of several lengths, pieces of time: as on a GPU."""
    tiny = ["--hidden=4", "--sequence=12", "--stretch=7", "--truncate=8", "--steps=1"]
    assert signals.main([*small, *tiny, "--compare=torch", "--backend=persistent"]) == 0
    output, errors = capsys.readouterr()
    assert "path persistent" in errors
    assert float(re.search(r"largest difference (\S+) nats", output)[1]) < 1e-4  # type: ignore[index]
