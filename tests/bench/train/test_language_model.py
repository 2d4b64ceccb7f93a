"""The main job: its text, its options, and that an interruption changes nothing."""

import math
import os
import re
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import assert_same, compare_interpreted, python_source, saved
from torch import nn

from bench import UsageError
from bench.train import checkpoint, language_model, layers, text
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.training import Run
from bench.train.vocabulary import Bytes

SMALL = ["--hidden=16", "--embedding=8", "--batch=2", "--sequence=16", "--steps=12", "--device=cpu"]


@pytest.fixture(autouse=True)
def no_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compare torch` on a CPU replaces its process: that must never be the tests' own."""

    def execve(*_: object) -> None:
        raise AssertionError("os.execve called")

    monkeypatch.setattr(os, "execve", execve)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return python_source(tmp_path / "source")


@pytest.fixture
def compared(source: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment; it writes into tmp_path / "run"."""
    return [*SMALL, "--text", str(source), "--output", str(tmp_path / "run")]


@pytest.fixture
def small(compared: list[str]) -> list[str]:
    """The same with a short sample, which no comparison writes."""
    return [*compared, "--sample-bytes=20"]


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


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command is turned down."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        language_model.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


class TestText:
    def test_the_same_files_give_the_same_text(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(source, copy)
        one = text.load_corpus(source)
        walk = os.walk
        monkeypatch.setattr(os, "walk", lambda folder, **_: reversed(list(walk(folder))))  # another file system
        other = text.load_corpus(copy)
        assert one.train_files == other.train_files
        assert one.fingerprint == other.fingerprint
        assert torch.equal(one.train, other.train)
        assert torch.equal(one.held_out, other.held_out)
        (copy / one.train_files[0]).write_text("changed = True\n")
        assert text.load_corpus(copy).fingerprint != one.fingerprint

    def test_every_file_is_on_one_side(self, source: Path) -> None:
        corpus = text.load_corpus(source)
        every = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
        assert not set(corpus.train_files) & set(corpus.held_out_files)
        assert set(corpus.train_files) | set(corpus.held_out_files) == every
        content = b"".join(b"\0" + (source / name).read_bytes() for name in corpus.held_out_files)
        assert bytes(corpus.held_out.tolist()) == content

    def test_a_new_file_moves_no_other(self, source: Path) -> None:
        before = text.load_corpus(source)
        for index in range(20):
            (source / f"new_{index}.py").write_text("pass\n")
        after = text.load_corpus(source)
        assert set(before.train_files) < set(after.train_files)
        assert set(before.held_out_files) < set(after.held_out_files)

    @pytest.mark.parametrize("name", ["site-packages", "dist-packages", "test", "tests", "idle_test"])
    def test_foreign_code_and_tests_are_left_out(self, source: Path, name: str) -> None:
        before = text.load_corpus(source)
        (source / "package_0" / name / "deep").mkdir(parents=True)
        (source / "package_0" / name / "deep" / "module.py").write_text("pass\n")
        assert text.load_corpus(source).fingerprint == before.fingerprint

    def test_the_standard_library_is_there(self) -> None:
        corpus = text.load_corpus(text.standard_library())
        assert len(corpus.train) > 5_000_000
        assert 0.03 < len(corpus.held_out) / len(corpus.train) < 0.2
        for part, files in ((corpus.train, corpus.train_files), (corpus.held_out, corpus.held_out_files)):
            assert int((part == text.START).sum()) == len(files)

    def test_windows_continue_the_text(self) -> None:
        tokens = torch.arange(100, dtype=torch.uint8)
        inputs, targets = text.window(tokens, 0, batch=4, sequence=10)
        assert inputs.shape == targets.shape == (10, 4)
        assert inputs[0].tolist() == [0, 25, 50, 75]
        assert torch.equal(targets[:-1], inputs[1:])
        following, _ = text.window(tokens, 1, batch=4, sequence=10)
        assert torch.equal(following[0], targets[-1])
        beyond, _ = text.window(tokens, 9, batch=4, sequence=10)
        assert beyond[:, 0].tolist() == list(range(90, 100))
        assert beyond[:, 3].tolist() == list(range(65, 75))


# SIGKILL is sent in test_runner.py. A bare --resume takes all settings from the checkpoint: it repeats none of `extra`.
@pytest.mark.parametrize(
    ("number", "status", "extra"),
    [
        (signal.SIGINT, 130, "--cell lstm --dropout 0.2"),
        (signal.SIGTERM, 143, "--cell gru --tokens words --vocabulary 20 --lines"),
        pytest.param(signal.SIGINT, 130, "--device cuda --dropout 0.2", marks=pytest.mark.gpu),
    ],
    ids=["SIGINT", "SIGTERM", "gpu"],
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
    assert f'make train ARGS="--resume --output {tmp_path / "run"}"' in capsys.readouterr().out
    assert len(saved(tmp_path / "run")["losses"]) == 6  # the running step is finished
    torch.manual_seed(12345)  # as another process would begin

    assert language_model.main(["--resume", "--output", str(tmp_path / "run"), "--sample-bytes", "20"]) == 0
    assert language_model.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert len(saved(tmp_path / "run")["losses"]) == 12
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
        inputs, targets = text.window(carried.workload.train, 1, 2, 16)
        with torch.no_grad():
            logits, _ = carried.model(inputs, carried.state)
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
        inputs, targets = text.window(held_out, 0, 32, 32)
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

    def test_tied_weights_are_one(self, source: Path) -> None:
        run = new_run(source, tied=True, embedding=16)
        before = run.model.embedding.weight.detach().clone()
        run.train_step()
        assert run.model.embedding.weight is run.model.linear.weight
        assert not torch.equal(run.model.embedding.weight, before)
        assert TextSettings.complete({"tied": True, "hidden": 24}).embedding == 24

    def test_words_learn(self, source: Path) -> None:
        run = new_run(source, tokens="words", vocabulary=20, learning_rate=0.03)
        assert run.model.linear.out_features == 20
        assert (
            0 < int((run.workload.held_out == run.workload.vocabulary.unknown).sum()) < len(run.workload.held_out)
        )  # some are unknown
        before = run.evaluate()[0]
        for _ in range(40):
            run.train_step()
        assert before == pytest.approx(math.log2(20), abs=0.5)
        assert run.evaluate()[0] < 2.5


class TestLines:
    @pytest.mark.parametrize("tokens", ["bytes", "words"])
    def test_each_line_is_predicted_alone(self, source: Path, tokens: str) -> None:
        run = new_run(source, tokens=tokens, lines=True, batch=240, sequence=64)
        (piece,) = run.workload.pieces(3, slice(0, 240))
        inputs, targets, lengths = piece.tensors
        assert len(lengths.unique()) > 1, "padding is not tested"
        expected = 0.0
        with torch.no_grad():
            for row, length in enumerate(lengths.tolist()):
                logits, _ = run.model(inputs[:length, row : row + 1])
                expected += nn.functional.cross_entropy(logits[:, 0], targets[:length, row], reduction="sum").item()
            loss, _ = run.workload.loss(run.model, piece.tensors, None)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert piece.count == int(lengths.sum()) == int((targets != -100).sum())

    def test_the_lines_are_those_of_the_text(self) -> None:
        content = b"\0first\n\n  second\n\0no newline\0x = 1\n\nlast"
        lines = text.Lines(Bytes().encode(content), 10, longest=8)
        inputs, targets, lengths = lines.padded(torch.arange(5))
        read = [bytes(targets[:length, row].tolist()) for row, length in enumerate(lengths.tolist())]
        assert read == [b"first\n", b"  second", b"no newli", b"x = 1\n", b"last\0"]
        for row, length in enumerate(lengths.tolist()):
            assert inputs[:length, row].tolist() == [0, *targets[: length - 1, row].tolist()]
            assert not inputs[length:, row].any()
            assert (targets[length:, row] == -100).all()

    def test_every_held_out_line_is_evaluated(self, source: Path) -> None:
        run = new_run(source, lines=True)
        run.workload.held_out_lines = lines = text.Lines(run.workload.train, 10, 16)
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
            ("--cell rnn", r"--cell.*'rnn'.*lstm.*gru"),
            ("--hidden 0", r"--hidden: '0' given, allowed is a whole number from 1"),
            ("--layers 1.5", r"--layers: '1.5' given, allowed is a whole number from 1"),
            ("--steps many", r"--steps: 'many' given, allowed is a whole number from 1"),
            ("--dropout 1.5", r"--dropout: '1.5' given, allowed is a number from 0 to 1"),
            ("--learning-rate 0", r"--learning-rate: '0' given, allowed is a number above 0"),
            ("--clip nan", r"--clip: 'nan' given, allowed is a number above 0"),
            ("--dtype half", r"--dtype.*'half'.*float32.*bfloat16.*float16"),
            ("--backend cudnn", r"--backend.*'cudnn'.*auto.*persistent.*torch"),
            ("--device tpu", r"--device: 'tpu' given, allowed here: cpu"),
            ("--compare jax", r"--compare.*'jax'.*torch"),
            ("--save all", r"--save.*'all'.*gates.*state.*checkpoint"),
            ("--save state --backend torch.nn", r"--save state given with --backend torch.nn.*leave --save out"),
            ("--schedule linear", r"--schedule.*'linear'.*cosine.*constant"),
            ("--warmup -1", r"--warmup: '-1' given, allowed is a whole number from 0"),
            ("--warmup 12", r"--warmup 12 given with --steps 12.*allowed is 0 to 11"),
            ("--weight-decay -1", r"--weight-decay: '-1' given, allowed is a number from 0"),
            ("--truncate x", r"--truncate: 'x' given, allowed is a whole number from 0"),
            ("--tokens letters", r"--tokens.*'letters'.*bytes.*words"),
            ("--tied", r"--tied given with --embedding 8 and --hidden 16.*leave --embedding out"),
            ("--vocabulary 3", r"--vocabulary: '3' given, allowed is a whole number from 4"),
            ("--vocabulary 500", r"--vocabulary 500 given with --tokens bytes.*256.*--tokens words"),
            ("--lines --truncate 4", r"--truncate 4 given with --lines.*allowed is --truncate 0"),
            ("--resume --overwrite", r"--overwrite: not allowed with argument --resume"),
            ("--backend torch.nn --compare torch", r"--backend torch.nn given with --compare.*another --backend"),
            ("--generate", r"--generate given, but .*run holds no checkpoint: train first"),
            ("--generate --compare torch", r"--generate given with --resume, --overwrite or --compare"),
            ("--beam 0", r"--beam: '0' given, allowed is a whole number from 1"),
            ("--top-k 0", r"--top-k: '0' given, allowed is a whole number from 1"),
            ("--temperature 0", r"--temperature: '0' given, allowed is a number above 0"),
            ("--beam 2 --top-k 3", r"--top-k 3 given with --beam 2.*leave one of them out"),
            ("--beam 2 --temperature 1", r"--temperature 1.0 given with --beam 2.*leave one of them out"),
            ("--text /no/such/folder", r"--text: '/no/such/folder' is no folder"),
            ("--dropout 0.1 --layers 1", r"--dropout 0.1 .*--layers is 1: allowed is --dropout 0, or"),
            ("--dropout 0.1 --compare torch", r"--dropout 0.1 given with --compare.*allowed is --dropout 0"),
            ("--compare torch --beam 2", r"--beam given with --compare.*leave one of them out"),
            ("--compare torch --prompt x --top-k 3", r"--prompt, --top-k given with --compare"),
            ("--compare torch --temperature 1 --sample-tokens 9", r"--sample-tokens, --temperature given with --comp"),
            ("--compare interpreted --prompt x", r"--prompt given with --compare"),
            ("--compare interpreted --resume", r"--resume given with --compare interpreted.*leave it out"),
            ("--compare interpreted --save-seconds 1", r"--save-seconds given with --compare interpreted"),
            ("--compare interpreted --backend torch", r"--backend torch given with --compare interpreted.*persistent"),
            ("--hid 32", r"unrecognized arguments: --hid"),
            ("--resume", r"--resume given, but .*run holds no checkpoint: leave --resume out"),
        ],
    )
    def test_errors_at_the_door(
        self, compared: list[str], capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        assert re.search(message, refused([*compared, *arguments.split()], capsys), re.DOTALL)

    @pytest.mark.parametrize("calls", [0, 3], ids=["at the door", "in training"])
    def test_memory_that_is_full(
        self, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, calls: int
    ) -> None:
        forward, done = language_model.LanguageModel.forward, []

        def limited(model: nn.Module, *given: Any) -> Any:
            if len(done) == calls:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            done.append(None)
            return forward(model, *given)

        monkeypatch.setattr(language_model.LanguageModel, "forward", limited)
        error = " ".join(refused(small, capsys).split())
        assert "--batch 2 --sequence 16 --save gates takes more memory than --device cpu has (CUDA out of" in error
        assert "take a smaller --batch or a smaller --sequence or --save checkpoint" in error
        assert "--save checkpoint" not in refused([*small, "--save=checkpoint"], capsys).partition("take a")[2]

    def test_a_comparison_is_refused_before_data_is_loaded(
        self, compared: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(language_model, "load_corpus")
        assert "--dropout 0.1 given with --compare" in refused([*compared, "--dropout=0.1", "--compare=torch"], capsys)

    def test_text_that_cannot_be_read(
        self, small: list[str], source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = text.load_corpus(source).fingerprint
        (source / "gone.py").symlink_to(source / "nowhere.py")
        os.mkfifo(source / "pipe.py")
        assert text.load_corpus(source).fingerprint == before

        def read_bytes(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        assert re.search(r"--text \S+: \S+\.py cannot be read \(Permission denied\)", refused(small, capsys))

    def test_a_dtype_or_backend_that_cannot_run_here(
        self, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def forward(*_: object) -> None:
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(language_model.LanguageModel, "forward", forward)
        error = refused([*small, "--dtype", "float16"], capsys)
        assert "--dtype float16 --device cpu --backend auto cannot run here: no such kernel" in error
        assert not (tmp_path / "run").exists()

    def test_too_little_text(self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        error = refused([*small, "--text", str(tmp_path / "empty")], capsys)
        assert "0 training and 0 held-out .py files found" in error

    def test_it_reports(self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert language_model.main([*small, "--steps", "80"]) == 0
        output, errors = capsys.readouterr()
        assert re.search(r"80/80 .*\d\.\d+ bits/byte, [\d,]+ bytes/s, \d+\.\d\d GiB, path torch", errors)
        assert len(re.split(r"[\r\n]", errors)) < 6  # a log is not flooded
        assert re.search(r"path torch: \d\.\d+ bits per byte on held-out files", output)
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

    def test_a_finished_run_is_not_to_be_continued(
        self, small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load_corpus(folder: Path) -> None:
            raise KeyboardInterrupt

        assert language_model.main(small) == 0
        monkeypatch.setattr(language_model, "load_corpus", load_corpus)
        capsys.readouterr()
        assert language_model.main(small) == 130
        assert capsys.readouterr().out == "SIGINT; nothing is lost.\n"

    @pytest.fixture
    def unfinished(self, small: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        assert interrupted(small, monkeypatch, step=2) == 130
        return small

    def test_an_unfinished_run_is_not_replaced(
        self, unfinished: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        error = refused(unfinished, capsys)
        assert re.search(r"unfinished run \(3 of 12 steps\): continue it with --resume, set it\s+aside", error)
        assert language_model.main([*unfinished, "--overwrite"]) == 0
        assert len(torch.load(tmp_path / "run" / "previous-checkpoint.pt")["losses"]) == 3

    def test_resuming_cannot_change_the_run(
        self, unfinished: list[str], source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        error = refused([*unfinished, "--resume", "--hidden", "17"], capsys)
        assert "--hidden 17 given, but the checkpoint was made with --hidden 16: leave --hidden out" in error
        bare = ["--resume", "--output", str(tmp_path / "run"), "--sample-bytes", "0"]
        (source / "package_0" / "module_0.py").write_text("changed = True\n")
        assert "has changed since the checkpoint" in refused(bare, capsys)
        (source / "package_0" / "module_0.py").write_text("def function_0(x):\n    return x + 0\n")
        assert language_model.main(bare) == 0

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            language_model.main(["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        for field in fields(TextSettings):
            assert f"--{field.name.replace('_', '-')} " in shown


class TestCompare:
    def test_both_arms(
        self, compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(layers, "path", lambda model: "persistent")
        arguments = [*compared, "--compare", "torch"]
        assert language_model.main(arguments) == 0
        shown = capsys.readouterr().out
        assert "largest difference" in shown
        assert "--compare interpreted" not in shown
        ours, theirs = saved(tmp_path / "run"), saved(tmp_path / "run" / "torch.nn")
        assert ours["settings"] == {**theirs["settings"], "backend": "auto"}
        assert theirs["settings"]["backend"] == "torch.nn"
        assert len(ours["losses"]) == len(theirs["losses"]) == 12
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        quality = [f"{content['quality'][0]:.4f}" for content in (ours, theirs)]
        assert re.search(rf"bits per byte on held-out files \(lower is better\) +{quality[0]} +{quality[1]}\n", shown)
        assert re.search(r"bytes/s \(CPU\) +[\d,]+ +[\d,]+\nMiB resident .*\(CPU\) +[\d,]+ +[\d,]+\n", shown)

        (tmp_path / "run" / "torch.nn" / "checkpoint.pt").unlink()  # as if interrupted between the arms
        assert language_model.main([*arguments, "--resume"]) == 0
        assert_same(saved(tmp_path / "run"), ours)
        assert_same(saved(tmp_path / "run" / "torch.nn"), theirs)

        assert language_model.main([*arguments, "--seed", "1"]) == 0
        for folder, before in ((tmp_path / "run", ours), (tmp_path / "run" / "torch.nn", theirs)):
            assert (
                torch.load(folder / "previous-checkpoint.pt")["losses"] == before["losses"] != saved(folder)["losses"]
            )

    def test_where_both_take_torchs_path(self, compared: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert language_model.main([*compared, "--compare", "torch"]) == 0
        assert "path torch: both curves are torch's own layers'. --compare interpreted" in capsys.readouterr().out

    def test_an_earlier_comparison_is_not_taken_up(
        self, compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Stopped in its first half, a new comparison has no second half, though there was one of another run."""
        arguments = [*compared, "--steps=5", "--compare=torch"]
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
    def test_in_the_interpreter(
        self, compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny = ["--layers=1", "--steps=3", "--sequence=6", "--hidden=8"]
        assert compare_interpreted(language_model.main, [*compared, *tiny], monkeypatch) == 0
        output, errors = capsys.readouterr()
        assert "path persistent" in errors
        assert "path torch.nn" in errors
        largest = re.search(r"largest difference (\S+) bits", output)
        assert largest is not None
        assert float(largest[1]) < 1e-4
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("steps", [256, 1024, 4096])
def test_the_memory_modes_example_saves_memory(
    small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int
) -> None:
    """`--save checkpoint --sequence ...`, by what torch allocates in a training step."""
    peaks = []
    whole_step = Run.train_step

    def train_step(run: Run) -> None:
        if run.step != 1:  # the optimizer's state is made in the one before
            return whole_step(run)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            whole_step(run)
        level = highest = 0
        events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            highest = max(highest, level)
        peaks.append(highest)
        return None

    monkeypatch.setattr(Run, "train_step", train_step)
    for save in ("gates", "checkpoint"):
        more = ["--steps=3", "--hidden=64", f"--sequence={steps}", f"--save={save}", f"--output={tmp_path / save}"]
        assert language_model.main([*small, *more]) == 0
    gates, checkpoint = peaks
    assert checkpoint < 0.75 * gates, peaks
