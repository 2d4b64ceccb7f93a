"""Checkpoints and folders of training runs: damage, other settings, a full disk, two runs in one folder."""

import errno
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch
from killed_runs import assert_same, python_source, saved, two_processes

from bench import UsageError
from bench.train import checkpoint, language_model
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.loop import Run

SIZES = {"hidden": 8, "embedding": 4, "layers": 1, "batch": 2, "sequence": 8}
STEPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def run(source: Path) -> Run:
    return Run(LanguageModeling(TextSettings.complete({"device": "cpu", "text": str(source), "steps": STEPS, **SIZES})))


@pytest.fixture
def unfinished(run: Run, tmp_path: Path) -> Path:
    """The folder of a run that has taken half of its steps."""
    for _ in range(STEPS // 2):
        run.train_step()
    run.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(folder, option, ...): the message by which the program ends."""

    def ended(where: Path, *arguments: str) -> str:
        return killed_runs.refused(language_model.main, ["--output", str(where), *arguments], capsys)

    return ended


def new(source: Path) -> list[str]:
    """The options of a new run."""
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    return ["--device=cpu", f"--text={source}", f"--steps={STEPS}", "--sample-tokens=5", *sizes]


class TestDamage:
    def test_bytes_all_over_the_file_count(self, tmp_path: Path) -> None:
        """Of torch's records, of its archive's own tables, of the padding between, of the checksum."""
        content = {"weight": torch.arange(3.0), "losses": [1.0, 2.0]}
        checkpoint.save(tmp_path, content)
        assert_same(checkpoint.load(tmp_path), content)
        path, bits = tmp_path / "checkpoint.pt", random.Random(0)
        whole = path.read_bytes()
        for index in (*range(0, len(whole), 11), *range(len(whole) - 39, len(whole))):
            damaged = bytearray(whole)
            damaged[index] ^= 1 << bits.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(UsageError, match="no checkpoint that can be read"):
                checkpoint.load(tmp_path)
        for length in (0, 1, 39, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(UsageError, match="cut short"):
                checkpoint.load(tmp_path)
        path.write_bytes(whole)
        assert_same(torch.load(path, weights_only=True), content)  # for everyone else it is torch's file

    def test_of_a_run(self, source: Path, unfinished: Path, refused: Callable[..., str]) -> None:
        """It is refused until it is set aside."""
        path = unfinished / "checkpoint.pt"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        path.write_bytes(damaged)
        for arguments in ([], ["--resume"], ["--generate"], ["--resume", "--compare=torch"]):
            assert "bytes of it have changed): begin anew with --overwrite or another" in refused(
                unfinished, *arguments
            )
        assert path.read_bytes() == damaged
        assert language_model.main(["--output", str(unfinished), "--overwrite", *new(source)]) == 0
        assert (unfinished / "previous-checkpoint.pt").read_bytes() == damaged
        assert len(saved(unfinished)["losses"]) == STEPS


class TestContent:
    """Of files that are whole."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: content.update(workload="signals"), "holds a run of signals, this is language_model"),
            (lambda content: content["settings"].update(more=1), r"another version of this program.*\(more\)"),
            (lambda content: content["settings"].update(device="cuda:77"), "--device cuda:77 given.*allowed here: cpu"),
            (lambda content: content["settings"].update(text="/nowhere"), "/nowhere cannot be read or written"),
            (lambda content: content["settings"].update(hidden=9), "another version of this program .*size mismatch"),
            (lambda content: content["settings"].update(layers=2), "another version of this program .*Missing key"),
            (lambda content: content["settings"].update(dropout=7.0), "made with --dropout 7.0, which is not allowed"),
            (lambda content: content["settings"].update(batch=2.0), "made with --batch 2.0, which is not allowed"),
            (lambda content: content["settings"].update(tied=1), "made with --tied 1, which is not allowed"),
            (lambda content: content["settings"].update(cell="gru2"), "made with --cell 'gru2', which is not allowed"),
            (lambda content: content.update(settings=[1]), r"another version of this program.*\(none\)"),
            (lambda content: content.pop("losses"), r"another version of this program \(it lacks losses\)"),
            (lambda content: content.pop("settings"), r"another version of this program \(it lacks settings\)"),
            (lambda content: content.update(data="0" * 64), "--text .* has changed since the checkpoint"),
            (lambda content: content["ranks"].append({}), "made by 2 processes, 1 given: allowed is the same number"),
        ],
    )
    def test_that_does_not_fit_is_refused(
        self, unfinished: Path, refused: Callable[..., str], change: Callable[[Any], None], message: str
    ) -> None:
        content = checkpoint.load(unfinished)
        change(content)
        assert content is not None
        checkpoint.save(unfinished, content)
        before = (unfinished / "checkpoint.pt").read_bytes()
        assert re.search(message, refused(unfinished, "--resume"))
        assert (unfinished / "checkpoint.pt").read_bytes() == before

    def test_that_is_no_run_is_refused(self, unfinished: Path, refused: Callable[..., str]) -> None:
        checkpoint.save(unfinished, [1, 2])  # type: ignore[arg-type]
        assert "no checkpoint that can be read (it holds a list): begin anew" in refused(unfinished, "--resume")

    def test_one_process_uses_what_several_have_made(self, unfinished: Path) -> None:
        content = checkpoint.load(unfinished)
        assert content is not None
        content["ranks"] *= 2
        checkpoint.save(unfinished, content)
        assert language_model.main(["--generate", "--output", str(unfinished), "--sample-tokens=5"]) == 0


class TestFolder:
    @pytest.mark.parametrize("where", ["/proc/nope", "file", "file/below"])
    def test_that_cannot_be_made(
        self, source: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        monkeypatch.setattr(LanguageModeling, "__init__", None)  # it does not come to that
        (tmp_path / "file").touch()
        assert re.search(
            rf"{where}\S* cannot be read or written \(.+\): .*name another", refused(tmp_path / where, *new(source))
        )

    def test_a_full_disk(self, unfinished: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(file: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = (unfinished / "checkpoint.pt").read_bytes()
        monkeypatch.setattr(os, "fsync", full)
        sentence = refused(unfinished, "--resume", "--save-seconds=0")
        assert "run cannot be read or written (No space left on device): change its permissions, make room" in sentence
        assert (unfinished / "checkpoint.pt").read_bytes() == before
        assert sorted(path.name for path in unfinished.iterdir()) == ["checkpoint.pt", "lock"]


# The program with a real limit on what it may write.
FULL = """
import resource
from bench.train import language_model

def main(arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return language_model.main(arguments)
"""


class TestLock:
    def test_one_run_at_a_time(self, source: Path, unfinished: Path, refused: Callable[..., str]) -> None:
        before = (unfinished / "checkpoint.pt").read_bytes()
        with checkpoint.held(unfinished):
            for arguments in (["--resume"], ["--overwrite", *new(source)], ["--compare=torch", "--resume"]):
                assert "run is in use by another run: wait until it has ended" in refused(unfinished, *arguments)
            assert (unfinished / "checkpoint.pt").read_bytes() == before
            # to generate, none needs it
            assert language_model.main(["--generate", "--output", str(unfinished), "--sample-tokens=5"]) == 0
        assert language_model.main(["--resume", "--output", str(unfinished), "--sample-tokens=5"]) == 0

    def test_an_error_of_one_ends_all(self, source: Path, tmp_path: Path) -> None:
        """None waits for the one that found it, nor dies of its end: of damage, a folder that is taken, a full disk."""
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "checkpoint.pt").write_bytes(b"torn")
        (tmp_path / "program.py").write_text(FULL)
        jobs = [[*new(source), "--output", str(tmp_path / name)] for name in ("torn", "taken", "full")]
        with checkpoint.held(tmp_path / "taken"):
            shown = two_processes("program", *jobs, path=tmp_path)
        assert re.findall(r"(.*) are the statuses", shown) == ["[2, 2]"] * 3
        assert not (tmp_path / "full" / "checkpoint.pt").exists()
