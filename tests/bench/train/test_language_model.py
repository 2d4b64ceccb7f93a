"""The main job: its model, its options, and that an interruption changes nothing."""

import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import assert_same, python_source, refused, saved
from torch import nn

from bench import UsageError
from bench.train import checkpoint, language_model
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.loop import Run
from bench.train.text import Lines, window
from persistrnn.kernels.cells import BUILT_IN, CELLS

SMALL = ["--hidden=16", "--embedding=8", "--batch=2", "--sequence=16", "--steps=8", "--device=cpu"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return python_source(tmp_path / "source")


@pytest.fixture
def small(source: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment; it writes into tmp_path / "run"."""
    return [*SMALL, "--sample-tokens=20", "--text", str(source), "--output", str(tmp_path / "run")]


def interrupted(arguments: list[str], monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> int:
    """The exit status of a command to which a signal is sent while it takes this step."""
    whole_step = Run.train_step

    def train_step(run: Run) -> None:
        if run.step == step:
            signal.raise_signal(number)
        whole_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", train_step)
        return language_model.main(arguments)


@pytest.mark.parametrize(
    ("number", "status", "extra"),
    [
        (signal.SIGINT, 130, "--cell lstm --dropout 0.2"),
        (signal.SIGTERM, 143, "--cell gru --tokens words --vocabulary 20 --lines"),
        (signal.SIGTERM, 143, "--cell slstm --heads 4"),
        pytest.param(signal.SIGINT, 130, "--device cuda --dropout 0.2", marks=pytest.mark.gpu),
    ],
    ids=["SIGINT", "SIGTERM", "heads", "gpu"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
    extra: str,
) -> None:
    arguments = [*small, *extra.split()]
    assert interrupted(arguments, monkeypatch, step=5, number=number) == status
    assert f"Go on with --resume --output {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(saved(tmp_path / "run")["losses"]) == 6  # the running step is finished
    torch.manual_seed(12345)  # as another process would begin

    assert language_model.main(["--resume", "--output", str(tmp_path / "run"), "--sample-tokens", "20"]) == 0
    assert language_model.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert len(saved(tmp_path / "run")["losses"]) == 8
    samples = [(tmp_path / name / "sample.txt").read_text() for name in ("run", "whole")]
    assert samples[0] == samples[1]


def new_run(source: Path, **changes: Any) -> Run:
    sizes = {"hidden": 16, "embedding": 8, "batch": 2, "sequence": 16, "steps": 40}
    given = {"device": "cpu", "text": str(source), **sizes, **changes}
    return Run(LanguageModeling(TextSettings.complete(given)))


class TestRun:
    @pytest.fixture
    def run(self, source: Path) -> Run:
        return new_run(source)

    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    def test_state_is_carried_and_detached(self, source: Path, cell: str) -> None:
        carried, forgetful = (new_run(source, cell=cell) for _ in range(2))
        for each in (carried, forgetful):
            each.train_step()
        tensors = carried.state if cell == "lstm" else [carried.state]
        assert len(tensors) == (2 if cell == "lstm" else 1)
        for tensor in tensors:
            assert tensor.shape == (2, 2, 16)
            assert tensor.grad_fn is None
            assert not tensor.requires_grad
            assert tensor.abs().sum() > 0
        inputs, targets = window(carried.workload.train, 1, 2, 16)
        with torch.no_grad():
            logits, _ = carried.model(inputs, state=carried.state)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / math.log(2)
        forgetful.state = None
        for each in (carried, forgetful):
            each.train_step()
        assert carried.losses[0] == forgetful.losses[0]
        assert carried.losses[1] == pytest.approx(expected, rel=1e-6)
        assert abs(forgetful.losses[1] - expected) > 1e-4

    def test_it_learns(self, run: Run) -> None:
        run.settings = replace(run.settings, steps=100, learning_rate=0.03)
        before = run.evaluate()[0]
        for _ in range(100):
            run.train_step()
        assert before == pytest.approx(8, abs=0.5)  # of 256 bytes it knows nothing
        assert run.evaluate()[0] < 5
        assert run.losses[-1] < 5
        assert run.optimizer.param_groups[0]["lr"] < 1e-4  # decayed

    def test_evaluation_carries_state_over_the_held_out_text(self, run: Run) -> None:
        held_out = run.workload.train[: 32 * 32]  # 32 streams of two windows
        run.workload.held_out = held_out
        run.model.rnn.dropout = 0.5  # must not act
        inputs, targets = window(held_out, 0, 32, 32)
        with torch.no_grad():
            logits, _ = run.model.eval()(inputs)
        run.model.train()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert run.evaluate() == [pytest.approx(loss.item() / math.log(2), rel=1e-6)]
        assert run.model.training

    def test_gradients_are_clipped(self, run: Run) -> None:
        run.settings = replace(run.settings, clip=0.01)
        run.train_step()
        norms = [parameter.grad.norm() for parameter in run.model.parameters()]
        assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)

    def test_torch_nn_starts_from_the_same_weights(self, run: Run, source: Path) -> None:
        baseline = new_run(source, backend="torch.nn")
        assert type(baseline.model.rnn) is nn.LSTM
        assert_same(run.model.state_dict(), baseline.model.state_dict())
        for each in (run, baseline):
            each.train_step()
            each.train_step()
        assert run.losses == pytest.approx(baseline.losses, rel=1e-6)

    @pytest.mark.torch_path
    def test_bfloat16_keeps_its_parameters(self, run: Run, source: Path) -> None:
        lower = new_run(source, dtype="bfloat16")
        for each in (run, lower):
            each.train_step()
            each.train_step()
        assert {parameter.dtype for parameter in lower.model.parameters()} == {torch.float32}
        assert lower.losses != run.losses
        assert lower.losses == pytest.approx(run.losses, rel=1e-2)

    def test_a_loss_that_is_not_finite_stops_it(self, run: Run) -> None:
        run.model.linear.bias.data[0] = math.nan
        with pytest.raises(UsageError, match=r"loss is nan at step 1 with --learning-rate 0.004 .* lower the rate"):
            run.train_step()

    @pytest.mark.parametrize("cell", BUILT_IN)
    def test_every_cell_trains_in_heads(self, source: Path, cell: str) -> None:
        run = new_run(source, cell=cell, heads=4)
        assert run.model.rnn.weight_hh_l0.shape[0] == run.model.rnn.heads == 4
        run.train_step()
        run.train_step()
        assert all(weight.grad.abs().max() > 0 for weight in run.model.rnn.parameters())
        states = run.state if isinstance(run.state, tuple) else (run.state,)
        assert len(states) == CELLS[cell].states

    def test_tied_weights_are_one(self, source: Path) -> None:
        run = new_run(source, tied=True, embedding=16)
        before = run.model.embedding.weight.detach().clone()
        run.train_step()
        assert run.model.embedding.weight is run.model.linear.weight
        assert not torch.equal(run.model.embedding.weight, before)
        assert TextSettings.complete({"tied": True, "hidden": 24}).embedding == 24


class TestLines:
    @pytest.mark.parametrize("tokens", ["bytes", "words"])
    def test_each_line_is_predicted_alone(self, source: Path, tokens: str) -> None:
        run = new_run(source, tokens=tokens, lines=True, batch=240, sequence=64)
        (piece,) = run.workload.pieces(3, slice(0, 240))
        inputs, lengths, targets = piece.tensors
        assert len(lengths.unique()) > 1, "padding is not tested"
        expected = 0.0
        with torch.no_grad():
            for row, length in enumerate(lengths.tolist()):
                logits, _ = run.model(inputs[:length, row : row + 1])
                expected += nn.functional.cross_entropy(logits[:, 0], targets[:length, row], reduction="sum").item()
            loss, _ = run.workload.loss(run.model, piece.tensors, None)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert piece.count == int(lengths.sum()) == int((targets != -100).sum())

    def test_every_held_out_line_is_evaluated(self, source: Path) -> None:
        run = new_run(source, lines=True)
        run.workload.held_out_lines = lines = Lines(run.workload.train, 10, 16)
        total, count = 0.0, 0
        with torch.no_grad():
            for index in range(len(lines.lengths)):
                inputs, targets, _ = lines.padded(torch.tensor([index]))
                logits, _ = run.model(inputs)
                total += nn.functional.cross_entropy(logits[:, 0], targets[:, 0], reduction="sum").item()
                count += len(inputs)
        assert run.evaluate() == [pytest.approx(total / count / math.log(2), rel=1e-5)]


class TestGeneration:
    @pytest.fixture
    def strong(self, source: Path) -> Run:
        """Its weights are so large that each token matters much to those after it."""
        run = new_run(source)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter *= 5
        return run

    def test_sample(self, strong: Run) -> None:
        sample = strong.workload.sample
        with strong.using() as model:
            assert sample(model, [], 50, 1.0) == sample(model, [], 50, 1.0) != sample(model, [], 50, 100.0)
            assert sample(model, [], 0, 1.0) == []
            assert sample(model, [], 50, 1.0) != sample(model, list(b"def"), 50, 1.0)

    def test_the_state_holds_the_text_before(self, strong: Run) -> None:
        """Likeliest tokens one by one, and the same from the whole text at every step."""
        with strong.using() as model:
            prompt = list(b"def f")
            made = strong.workload.sample(model, prompt, 12, 1.0, top_k=1)
            for count, token in enumerate(made):
                read = torch.tensor([0, *prompt, *made[:count]])[:, None]
                assert int(model(read)[0][-1, 0].argmax()) == token
            assert strong.workload.likeliest(model, prompt, 12, 1) == made

    def test_a_beam_finds_likelier_text(self, strong: Run) -> None:
        def score(made: list[int]) -> float:
            inputs = torch.tensor([0, *made])[:, None]
            return -nn.functional.cross_entropy(model(inputs)[0][:-1, 0], inputs[1:, 0], reduction="sum").item()

        with strong.using() as model:
            greedy, found = (strong.workload.likeliest(model, [], 20, width) for width in (1, 8))
            assert len(greedy) == len(found) == 20
            assert score(found) > score(greedy)

    def test_lines_begin_anew(self, source: Path) -> None:
        run = new_run(source, lines=True)
        assert run.workload.context(list(b"one\ntwo")) == [0, *b"two"]
        assert run.workload.context(list(b"one\n")) == [0]
        assert new_run(source).workload.context(list(b"one\n")) == [0, *b"one\n"]
        run.model.linear.bias.data[10] = 100  # a newline, always
        with run.using() as model:
            assert run.workload.sample(model, [], 3, 1.0) == [10] * 3
            assert run.workload.likeliest(model, [], 3, 2) == []

    def test_from_a_checkpoint(
        self, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert language_model.main(small) == 0
        sample = (tmp_path / "run" / "sample.txt").read_text()
        before = saved(tmp_path / "run")
        generate = ["--generate", "--output", str(tmp_path / "run"), "--sample-tokens", "20"]
        capsys.readouterr()
        assert language_model.main(generate) == 0
        assert capsys.readouterr().out == f"{sample}\n"
        for how in (["--top-k", "3"], ["--temperature", "2"], ["--beam", "2"]):
            assert language_model.main([*generate, "--prompt", "def", *how]) == 0
            shown = capsys.readouterr().out
            assert shown.startswith("def")
            assert shown != f"{sample}\n"
        assert_same(saved(tmp_path / "run"), before)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            # one of each kind that argparse checks
            ("--cell relay", r"--cell.*'relay'.*lstm.*gru"),
            ("--hidden 0", r"--hidden: '0' given, allowed is a whole number from 1"),
            ("--dropout 1.5", r"--dropout: '1.5' given, allowed is a number from 0 to 1"),
            ("--clip nan", r"--clip: 'nan' given, allowed is a number above 0"),
            ("--hid 32", r"unrecognized arguments: --hid"),
            ("--resume --overwrite", r"--overwrite: not allowed with argument --resume"),
            # and each combination that settings, the command or the program refuse
            ("--device tpu", r"--device tpu given .*allowed here: cpu"),
            ("--save state --backend torch.nn", r"--save state given with --backend torch.nn.*leave --save out"),
            ("--heads 3", r"--heads 3 given, which does not divide --hidden 16: allowed with it are 1, 2, 4, 8, 16;"),
            ("--heads 0", r"--heads: '0' given, allowed is a whole number from 1"),
            ("--heads 2 --compare torch", r"--heads 2 given with torch.nn's layers: torch.nn has no heads.*--compare"),
            (
                "--cell mgu --compare torch",
                r"--cell mgu --heads 1 given with torch.nn's layers: torch.nn has GRU, LSTM",
            ),
            ("--tied", r"--tied given with --embedding 8 and --hidden 16.*leave --embedding out"),
            ("--lines --truncate 4", r"--truncate 4 given: the gradient flows through all.*allowed is --truncate 0"),
            ("--beam 2 --top-k 3", r"--top-k given with --beam 2.*leave one of them out"),
            ("--resume", r"--resume given, but .*run holds no checkpoint: train first"),
            ("--generate", r"--generate given, but .*run holds no checkpoint: train first"),
            ("--generate --compare torch", r"--generate given with --resume, --overwrite or --compare"),
            ("--backend torch.nn --compare torch", r"--backend torch.nn given with --compare.*another --backend"),
            ("--dropout 0.1 --compare torch", r"--dropout 0.1 given with --compare.*allowed is --dropout 0"),
        ],
    )
    def test_errors_at_the_door(
        self,
        small: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        arguments: str,
        message: str,
    ) -> None:
        monkeypatch.delattr(language_model, "load_corpus")  # it does not come to that
        assert re.search(message, refused(language_model.main, [*small, *arguments.split()], capsys), re.DOTALL)

    @pytest.mark.parametrize(
        ("calls", "message"),
        [
            (0, "--dtype float32 --device cpu --backend auto --save gates cannot run here: out of memory"),
            (3, "memory is full (out of memory): take a smaller --batch or --sequence, or --save checkpoint"),
        ],
        ids=["at the door", "in training"],
    )
    def test_what_this_machine_cannot_run(
        self,
        small: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        calls: int,
        message: str,
    ) -> None:
        forward, done = language_model.LanguageModel.forward, []

        def limited(model: nn.Module, *given: Any, **more: Any) -> Any:
            if len(done) == calls:
                raise torch.OutOfMemoryError("out of memory")
            done.append(None)
            return forward(model, *given, **more)

        monkeypatch.setattr(language_model.LanguageModel, "forward", limited)
        assert message in refused(language_model.main, small, capsys)

    def test_it_reports(self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert language_model.main([*small, "--steps", "40"]) == 0
        output, errors = capsys.readouterr()
        assert re.search(r"40/40 .*\d\.\d+ bits/byte, [\d,]+ bytes/s, \d+\.\d\d GiB, path torch", errors)
        assert len(re.split(r"[\r\n]", errors)) < 6  # a log is not flooded
        assert re.search(r"path +torch\nbits per byte on held-out files \(lower is better\)  \d\.\d+\n", output)
        assert (tmp_path / "run" / "sample.txt").read_text() in output

    def test_a_finished_run_is_kept_when_the_next_begins(
        self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert language_model.main(small) == 0
        first = saved(tmp_path / "run")
        assert language_model.main([*small, "--resume"]) == 0
        assert "This run is finished" in capsys.readouterr().out
        assert_same(saved(tmp_path / "run"), first)
        assert language_model.main([*small, "--seed", "1"]) == 0
        kept = tmp_path / "run" / "previous-checkpoint.pt"
        assert f"is kept as {kept}" in capsys.readouterr().out
        assert torch.load(kept)["losses"] == first["losses"] != saved(tmp_path / "run")["losses"]

    def test_an_unfinished_run_is_neither_replaced_nor_changed(
        self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert interrupted(small, monkeypatch, step=2) == 130
        error = refused(language_model.main, [*small, "--resume", "--hidden", "17"], capsys)
        assert "--hidden 17 given, but the checkpoint was made with --hidden 16: leave --hidden out" in error
        error = refused(language_model.main, [*small, "--resume", "--heads", "2"], capsys)
        assert "--heads 2 given, but the checkpoint was made with --heads 1: leave --heads out" in error
        error = refused(language_model.main, small, capsys)
        assert re.search(r"unfinished run \(3 of 8 steps\): continue it with --resume, or begin anew", error)
        assert language_model.main([*small, "--overwrite"]) == 0
        assert len(torch.load(tmp_path / "run" / "previous-checkpoint.pt")["losses"]) == 3


class TestCompare:
    def test_both_arms(self, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [*small, "--compare", "torch"]
        assert language_model.main(arguments) == 0
        shown = capsys.readouterr().out
        assert "largest difference" in shown
        assert "path torch: both curves are torch's own layers'. With TRITON_INTERPRET=1" in shown
        ours, theirs = saved(tmp_path / "run"), saved(tmp_path / "run" / "torch.nn")
        assert ours["settings"] == {**theirs["settings"], "backend": "auto"}
        assert theirs["settings"]["backend"] == "torch.nn"
        assert len(ours["losses"]) == len(theirs["losses"]) == 8
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        quality = [f"{content['quality'][0]:.4f}" for content in (ours, theirs)]
        assert re.search(rf"bits per byte on held-out files \(lower is better\) +{quality[0]} +{quality[1]}\n", shown)
        assert re.search(r"bytes/s \(cpu\) +[\d,]+ +[\d,]+\nMiB resident .*\(cpu\) +[\d,]+ +[\d,]+\n", shown)

        (tmp_path / "run" / "torch.nn" / "checkpoint.pt").unlink()  # as if interrupted between the arms
        assert language_model.main([*arguments, "--resume"]) == 0
        assert_same(saved(tmp_path / "run"), ours)
        assert_same(saved(tmp_path / "run" / "torch.nn"), theirs)

        assert language_model.main([*arguments, "--seed", "1"]) == 0
        for folder, before in ((tmp_path / "run", ours), (tmp_path / "run" / "torch.nn", theirs)):
            assert (
                torch.load(folder / "previous-checkpoint.pt")["losses"] == before["losses"] != saved(folder)["losses"]
            )

    def test_an_earlier_comparison_is_not_taken_up(
        self, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Stopped in its first half, a new comparison has no second half, though there was one of another run."""
        arguments = [*small, "--steps=5", "--compare=torch"]
        assert language_model.main(arguments) == 0
        first = saved(tmp_path / "run" / "torch.nn")
        assert interrupted([*arguments, "--seed=1"], monkeypatch, step=2) == 130
        assert f"--resume --output {tmp_path / 'run'} --compare torch" in capsys.readouterr().out
        assert not checkpoint.exists(tmp_path / "run" / "torch.nn")
        assert torch.load(tmp_path / "run" / "torch.nn" / "previous-checkpoint.pt")["losses"] == first["losses"]
        assert language_model.main(["--resume", "--compare=torch", "--output", str(tmp_path / "run")]) == 0
        ours, theirs = saved(tmp_path / "run"), saved(tmp_path / "run" / "torch.nn")
        assert theirs["settings"]["seed"] == 1
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)

    @pytest.mark.interpreter
    def test_in_the_interpreter(self, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        tiny = ["--layers=1", "--steps=3", "--sequence=6", "--hidden=8"]
        assert language_model.main([*small, *tiny, "--compare=torch", "--backend=persistent"]) == 0
        output, errors = capsys.readouterr()
        assert "path persistent" in errors
        assert "path torch.nn" in errors
        assert float(re.search(r"largest difference (\S+) bits", output)[1]) < 1e-4  # type: ignore[index]
