"""The main job: its text, its options, and that an interruption changes nothing."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import UsageError, checkpoint, curves, language_model, text
from bench.options import Settings

ROOT = Path(__file__).parents[1]
SMALL = ["--hidden=16", "--embedding=8", "--batch=2", "--sequence=16", "--steps=12", "--device=cpu"]
SMALL += ["--sample-bytes=20"]

# Runs the main job; a signal arrives while step STEP is under way.
INTERRUPTED = """
import os, sys
from bench import language_model
number, step, *arguments = sys.argv[1:]
whole_step = language_model.Run.train_step
def train_step(run):
    if run.step == int(step):
        os.kill(os.getpid(), int(number))
    whole_step(run)
language_model.Run.train_step = train_step
sys.exit(language_model.main(arguments))
"""


@pytest.fixture(autouse=True)
def no_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--compare torch` on a CPU replaces its process: that must never be the tests' own."""

    def execve(*_: object) -> None:
        raise AssertionError("os.execve called")

    monkeypatch.setattr(os, "execve", execve)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small folder of Python files."""
    folder = tmp_path / "source"
    for index in range(40):
        path = folder / f"package_{index % 3}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{index}(x):\n    return x + {index}\n" * (1 + index % 5))
    return folder


@pytest.fixture
def small(source: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment; it writes into tmp_path / "run"."""
    return [*SMALL, "--text", str(source), "--out", str(tmp_path / "run")]


def saved(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds and must be the same however often the run was interrupted."""
    content = checkpoint.load(folder)
    assert content is not None
    del content["speed"]
    return content


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Equal bit for bit, through dicts, lists and tuples."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


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
        monkeypatch.setattr(os, "walk", lambda folder: reversed(list(walk(folder))))  # another file system
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


# A bare --resume takes all settings from the checkpoint: the second command repeats none of `extra`.
@pytest.mark.parametrize(
    ("number", "status", "extra"),
    [
        (signal.SIGINT, 130, "--cell lstm --dropout 0.2"),
        (signal.SIGTERM, 143, "--cell gru"),
        (signal.SIGKILL, -signal.SIGKILL, "--cell lstm --dropout 0.2"),
        pytest.param(signal.SIGINT, 130, "--device cuda --dropout 0.2", marks=pytest.mark.gpu),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    small: list[str], tmp_path: Path, number: int, status: int, extra: str
) -> None:
    every_step = ["--save-seconds", "0"] if number == signal.SIGKILL else []
    victim = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number)), "5", *small, *extra.split(), *every_step],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert victim.returncode == status, victim.stderr
    done = 5 if number == signal.SIGKILL else 6  # the running step is finished, unless that was impossible
    assert len(saved(tmp_path / "run")["losses"]) == done
    if number != signal.SIGKILL:
        assert f'make train ARGS="--resume --out {tmp_path / "run"}"' in victim.stdout

    assert language_model.main(["--resume", "--out", str(tmp_path / "run"), "--sample-bytes", "20"]) == 0
    assert language_model.main([*small, *extra.split(), "--out", str(tmp_path / "whole")]) == 0
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert len(saved(tmp_path / "run")["losses"]) == 12
    samples = [(tmp_path / name / "sample.txt").read_text() for name in ("run", "whole")]
    assert samples[0] == samples[1]


def test_a_save_cut_short_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, {"step": 1})

    def disk_full(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, {"step": 2})
    assert checkpoint.load(tmp_path) == {"step": 1}


class TestRun:
    @pytest.fixture
    def run(self, source: Path) -> language_model.Run:
        settings = Settings(
            device="cpu", dtype="float32", text=str(source), hidden=16, embedding=8, batch=2, sequence=16, steps=40
        )
        return language_model.Run(settings, text.load_corpus(source))

    @pytest.mark.parametrize("cell", ["lstm", "gru"])
    def test_state_is_carried_and_detached(self, run: language_model.Run, cell: str) -> None:
        settings = replace(run.settings, cell=cell)
        carried, forgetful = (language_model.Run(settings, run.corpus) for _ in range(2))
        for each in (carried, forgetful):
            each.train_step()
        tensors = carried.state if cell == "lstm" else [carried.state]
        assert len(tensors) == (2 if cell == "lstm" else 1)
        for tensor in tensors:
            assert tensor.shape == (2, 2, 16)
            assert tensor.grad_fn is None
            assert not tensor.requires_grad
            assert tensor.abs().sum() > 0
        inputs, targets = text.window(run.corpus.train, 1, 2, 16)
        with torch.no_grad():
            logits, _ = carried.model(inputs, carried.state)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / math.log(2)
        forgetful.state = None
        for each in (carried, forgetful):
            each.train_step()
        assert carried.losses[0] == forgetful.losses[0]
        assert carried.losses[1] == pytest.approx(expected, rel=1e-6)
        assert abs(forgetful.losses[1] - expected) > 1e-4

    def test_it_learns(self, run: language_model.Run) -> None:
        run.settings = replace(run.settings, steps=100, learning_rate=0.03)
        before = run.evaluate()
        for _ in range(100):
            run.train_step()
        assert before == pytest.approx(8, abs=0.5)  # of 256 bytes it knows nothing
        assert run.evaluate() < 5
        assert run.losses[-1] < 5
        assert run.optimizer.param_groups[0]["lr"] < 1e-4  # decayed

    def test_evaluation_carries_state_over_the_held_out_text(self, run: language_model.Run) -> None:
        held_out = run.corpus.train[: 32 * 32]  # 32 streams of two windows
        run.corpus = replace(run.corpus, held_out=held_out)
        run.model.rnn.dropout = 0.5  # must not act
        inputs, targets = text.window(held_out, 0, 32, 32)
        with torch.no_grad():
            logits, _ = run.model.eval()(inputs)
        run.model.train()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert run.evaluate() == pytest.approx(loss.item() / math.log(2), rel=1e-6)
        assert run.model.training

    def test_gradients_are_clipped(self, run: language_model.Run) -> None:
        run.settings = replace(run.settings, clip=0.01)
        run.train_step()
        norms = [parameter.grad.norm() for parameter in run.model.parameters()]
        assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)

    def test_sample(self, run: language_model.Run) -> None:
        assert run.sample(50, 1.0) == run.sample(50, 1.0) != run.sample(50, 100.0)
        assert run.sample(0, 1.0) == ""

    def test_torch_nn_starts_from_the_same_weights(self, run: language_model.Run) -> None:
        baseline = language_model.Run(replace(run.settings, backend="torch.nn"), run.corpus)
        assert type(baseline.model.rnn) is torch.nn.LSTM
        assert_same(run.model.state_dict(), baseline.model.state_dict())
        for each in (run, baseline):
            each.train_step()
            each.train_step()
        assert run.losses == pytest.approx(baseline.losses, rel=1e-6)

    def test_bfloat16_keeps_its_parameters(self, run: language_model.Run) -> None:
        lower = language_model.Run(replace(run.settings, dtype="bfloat16"), run.corpus)
        for each in (run, lower):
            each.train_step()
            each.train_step()
        assert {parameter.dtype for parameter in lower.model.parameters()} == {torch.float32}
        assert lower.losses != run.losses
        assert lower.losses == pytest.approx(run.losses, rel=1e-2)

    def test_a_loss_that_is_not_finite_stops_it(self, run: language_model.Run) -> None:
        run.model.linear.bias.data[0] = math.nan
        with pytest.raises(UsageError, match=r"loss is nan at step 1 with --learning-rate 0.004 .* lower the rate"):
            run.train_step()


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
            ("--text /no/such/folder", r"--text: '/no/such/folder' is no folder"),
            ("--dropout 0.1 --layers 1", r"--dropout 0.1 .*--layers is 1: allowed is --dropout 0, or"),
            ("--dropout 0.1 --compare torch", r"--dropout 0.1 given with --compare.*allowed is --dropout 0"),
            ("--hid 32", r"unrecognized arguments: --hid"),
            ("--resume", r"--resume given, but .*run holds no checkpoint: leave --resume out"),
        ],
    )
    def test_errors_at_the_door(
        self, small: list[str], capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        assert re.search(message, refused([*small, *arguments.split()], capsys), re.DOTALL)

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
        assert language_model.main([*small, "--steps", "300"]) == 0
        output, errors = capsys.readouterr()
        assert re.search(r"300/300 .*\d\.\d+ bits/char, [\d,]+ tokens/s, \d+\.\d\d GiB, path torch", errors)
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

    @pytest.fixture
    def unfinished(self, small: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        whole_step = language_model.Run.train_step

        def train_step(run: language_model.Run) -> None:
            whole_step(run)
            if run.step == 3:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(language_model.Run, "train_step", train_step)
            assert language_model.main(small) == 130
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
        bare = ["--resume", "--out", str(tmp_path / "run"), "--sample-bytes", "0"]
        (source / "package_0" / "module_0.py").write_text("changed = True\n")
        assert "has changed since the checkpoint" in refused(bare, capsys)
        (source / "package_0" / "module_0.py").write_text("def function_0(x):\n    return x + 0\n")
        assert language_model.main(bare) == 0

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            language_model.main(["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        for field in fields(Settings):
            assert f"--{field.name.replace('_', '-')} " in shown


class TestCompare:
    def test_table(self) -> None:
        lines = curves.table(("ours", "theirs"), ([8.0, 4.0, 2.0], [8.0, 4.5, 2.25]), rows=2).splitlines()
        assert lines[0].split()[:4] == ["step", "ours", "theirs", "difference"]
        assert lines[1].split() == ["1", "8.00000", "8.00000", "+0.0e+00"]
        assert lines[2].split() == ["3", "2.00000", "2.25000", "-2.5e-01"]
        assert lines[3] == "largest difference 5.0e-01 bits, at step 2; on average 2.5e-01"

    def test_table_of_one_step(self) -> None:
        assert len(curves.table(("ours", "theirs"), ([8.0], [7.0])).splitlines()) == 3

    def test_both_arms(
        self, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(language_model.LanguageModel, "path", "persistent")
        arguments = [*small, "--compare", "torch"]
        assert language_model.main(arguments) == 0
        shown = capsys.readouterr().out
        assert "largest difference" in shown
        ours, theirs = saved(tmp_path / "run"), saved(tmp_path / "run" / "torch.nn")
        assert ours["settings"] == {**theirs["settings"], "backend": "auto"}
        assert theirs["settings"]["backend"] == "torch.nn"
        assert len(ours["losses"]) == len(theirs["losses"]) == 12
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)

        (tmp_path / "run" / "torch.nn" / "checkpoint.pt").unlink()  # as if interrupted between the arms
        assert language_model.main([*arguments, "--resume"]) == 0
        assert_same(saved(tmp_path / "run"), ours)
        assert_same(saved(tmp_path / "run" / "torch.nn"), theirs)

    def test_where_both_would_take_torchs_path(self, small: list[str], tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "bench.language_model", *small, "--compare=torch", "--layers=1", "--steps=4"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert "persistrnn takes path torch: both curves would be torch's own" in done.stdout
        assert "path persistent" in done.stderr
        assert "path torch.nn" in done.stderr
        largest = re.search(r"largest difference (\S+) bits", done.stdout)
        assert largest is not None
        assert float(largest[1]) < 1e-4
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
