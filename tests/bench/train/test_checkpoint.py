"""Checkpoints and folders of training runs: damage, contents of another form, a full disk, two runs in one folder."""

import errno
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import ROOT, assert_same, python_source, saved, two_processes

from bench import UsageError
from bench.train import checkpoint, folder, language_model
from bench.train.language_model import LanguageModeling, TextSettings
from bench.train.training import Run

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
    """refused(folder, option, ...): the one sentence by which the program ends."""

    def ended(where: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            language_model.main(["--output", str(where), *arguments])
        assert stop.value.code == 2
        before, _, sentence = capsys.readouterr().err.partition("make train: error: ")
        assert "usage: make train" in before
        assert sentence.count("\n") == 1
        return sentence

    return ended


def new(source: Path) -> list[str]:
    """The options of a new run."""
    return ["--device=cpu", f"--text={source}", f"--steps={STEPS}", *(f"--{n}={size}" for n, size in SIZES.items())]


class TestDamage:
    def test_every_byte_counts(self, tmp_path: Path) -> None:
        """Of torch's records, of its archive's own tables, of the padding between, of the checksum."""
        content = {"weight": torch.arange(3.0), "losses": [1.0, 2.0]}
        checkpoint.save(tmp_path, content)
        assert_same(checkpoint.load(tmp_path), content)
        path, bits = tmp_path / "checkpoint.pt", random.Random(0)
        whole = path.read_bytes()
        for index in range(len(whole)):
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

    @pytest.mark.parametrize("arguments", [[], ["--resume"], ["--generate"], ["--resume", "--compare=torch"]])
    def test_of_a_run(self, unfinished: Path, refused: Callable[..., str], arguments: list[str]) -> None:
        path = unfinished / "checkpoint.pt"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        path.write_bytes(damaged)
        sentence = refused(unfinished, *arguments)
        assert re.search(r"bytes of it have changed\): set it aside with --overwrite, or choose another", sentence)

    def test_is_set_aside(self, source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "checkpoint.pt").write_bytes(b"torn")
        assert "cut short" in refused(tmp_path)
        assert language_model.main(["--output", str(tmp_path), "--overwrite", "--sample-tokens=5", *new(source)]) == 0
        assert (tmp_path / "previous-checkpoint.pt").read_bytes() == b"torn"
        assert len(saved(tmp_path)["losses"]) == STEPS


class TestForm:
    """Of files that are whole."""

    def test_a_list(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        checkpoint.save(tmp_path, [1, 2])
        assert "(ValueError: it holds a list, not a dict): set it aside with --overwrite" in refused(tmp_path)

    @pytest.mark.parametrize("arguments", [[], ["--resume"], ["--generate"]])
    def test_those_of_other_programs(self, tmp_path: Path, refused: Callable[..., str], arguments: list[str]) -> None:
        checkpoint.save(tmp_path, {"workload": "signals", "losses": [], "settings": {"steps": 1}})
        assert "holds a run of signals, this is language_model: name" in refused(tmp_path, *arguments)
        checkpoint.save(tmp_path, {"losses": [], "settings": {"steps": 1}})
        assert "of an earlier version of this program" in refused(tmp_path, *arguments)

    @pytest.mark.parametrize(
        ("where", "value", "message"),
        [
            (["losses"], None, r"content is without losses, allowed is what this program"),
            (["model"], None, r"content is without model"),
            (["more"], 1, r"content is with more, allowed"),
            (["settings"], [1], r"settings is list, allowed is dict"),
            (["losses", 1], "low", r"losses\[1\] is str, allowed is float"),
            (["count"], 2.5, r"count is float, allowed is int"),
            (["quality"], [1.0, 2.0], r"quality is of length 2, allowed is 1"),
            (["cost", "speed"], None, r"cost is without speed"),
            (["settings", "more"], 1, r"another version of this program, .*\(more\)"),
            (["settings", "steps"], 0, r"with --steps 0: '0' given, allowed is a whole number from 1"),
            (["settings", "hidden"], "8", r"with --hidden 8: '8' given, allowed is a int"),
            (["settings", "dropout"], [0.0], r"with --dropout \[0.0\]: '\[0.0\]' given, allowed is a number from 0"),
            (["settings", "learning_rate"], float("nan"), r"with --learning-rate nan: 'nan' given"),
            (["settings", "cell"], "rnn", r"with --cell rnn: 'rnn' given, allowed: lstm, gru"),
            (["settings", "lines"], 2, r"with --lines 2: 2 given, allowed is True or False"),
            (["settings", "device"], "cuda:77", r"with --device cuda:77: 'cuda:77' given, allowed here: cpu"),
            (["settings", "text"], "/nowhere", r"with --text /nowhere: '/nowhere' is no folder"),
            (["settings", "tied"], True, r"--tied given with --embedding 4 and --hidden 8"),
            (["settings", "hidden"], 9, r"model\['rnn.weight_ih_l0'\] is a tensor of \(32, 4\), allowed .*\(36, 4\)"),
            (["settings", "layers"], 2, r"model is without rnn.bias_hh_l1, .*rnn.weight_ih_l1, allowed"),
            (["settings", "cell"], "gru", r"model\['rnn.weight_ih_l0'\] is a tensor of \(32, 4\), allowed .*\(24, 4\)"),
            (["scaler"], {"scale": 1.0}, r"scaler is with scale, allowed"),
            (["optimizer", "state", 0], None, r"optimizer\['state'\] is without 0"),
            (["optimizer", "state", 0, "exp_avg"], torch.ones(3), r"\[0\]\['exp_avg'\] is a tensor of \(3,\), allowed"),
            (["optimizer", "param_groups"], [], r"optimizer\['param_groups'\] is of length 0, allowed is 1"),
            (["optimizer", "param_groups", 0, "params"], [0], r"\['params'\] is of length 1, allowed is 7"),
            (["ranks", 0], 5, r"ranks\[0\] is int, allowed is dict"),
            (["ranks", 0, "random"], torch.ones(3), r"ranks\[0\]\['random'\] is a tensor of \(3,\), allowed"),
            (["ranks", 0, "state", 1], torch.ones(1, 3, 8), r"\['state'\]\[1\] is a tensor of \(1, 3, 8\), .*1, 2, 8"),
        ],
    )  # fmt: skip
    def test_of_another_form(
        self, unfinished: Path, refused: Callable[..., str], where: list[Any], value: Any, message: str
    ) -> None:
        content = checkpoint.load(unfinished)
        assert content is not None
        content["ranks"][0]["state"] = list(content["ranks"][0]["state"])
        *path, last = where
        inner: Any = content
        for key in path:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        content["ranks"] = [own | {"state": tuple(own["state"])} if own != 5 else 5 for own in content["ranks"]]
        checkpoint.save(unfinished, content)
        before = (unfinished / "checkpoint.pt").read_bytes()
        sentence = refused(unfinished, "--resume")
        assert re.search(message, sentence)
        assert "anew with --overwrite or another --output" in sentence or "--tied" in message
        assert (unfinished / "checkpoint.pt").read_bytes() == before

    def test_what_was_written_fits(self, unfinished: Path, run: Run) -> None:
        content = checkpoint.load(unfinished)
        assert content is not None
        again = Run(LanguageModeling(TextSettings.resumed(content["settings"], {})))
        again.probe()
        again.load(content)
        assert again.losses == run.losses

    def test_that_of_more_processes(self, unfinished: Path, run: Run) -> None:
        content = checkpoint.load(unfinished)
        assert content is not None
        content["ranks"] *= 2
        with pytest.raises(UsageError, match="made by 2 processes, 1 given: allowed is the same number"):
            run.load(content)
        run.load(content, to_train=False)  # to generate, one does

    def test_settings_pass_as_given(self, source: Path) -> None:
        for given in ({}, {"tokens": "words", "lines": True}, {"learning_rate": 1, "dropout": 0.5, "layers": 2}):
            settings = TextSettings.complete({"device": "cpu", "text": str(source), **given})
            assert TextSettings.resumed(asdict(settings), {}) == settings


class Full:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """full(room): from here on only so many bytes of each checkpoint fit on the disk."""
    whole = Path.open

    def limit(room: int) -> None:
        def opened(path: Path, mode: str = "r", **options: Any) -> Any:
            file = whole(path, mode, **options)
            return Full(file, room) if path.name == "checkpoint.pt.tmp" and mode == "wb" else file

        monkeypatch.setattr(Path, "open", opened)

    return limit


class TestFolder:
    @pytest.mark.parametrize("where", ["/proc/nope", "file", "file/below", "checkpoint.pt.tmp"])
    @pytest.mark.parametrize("compared", [[], ["--compare=torch"]])
    def test_that_cannot_be_made(
        self,
        source: Path,
        tmp_path: Path,
        refused: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
        where: str,
        compared: list[str],
    ) -> None:
        monkeypatch.setattr(LanguageModeling, "__init__", None)  # it does not come to that
        (tmp_path / where.partition("/")[0]).touch()
        found = refused(tmp_path / where, *compared, *new(source))
        assert re.match(
            rf".*{where}.* cannot be written \(.+\): choose a folder that can be written to with --output", found
        )

    def test_that_is_read_only(self, source: Path, unfinished: Path, refused: Callable[..., str], monkeypatch) -> None:
        """Seen even where the lock of an earlier run may be written to, and by who may write everywhere (root)."""
        (unfinished / "lock").touch()

        def touch(path: Path, *options: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(Path, "touch", touch)
        sentence = refused(unfinished, "--resume")
        assert "lock.tmp cannot be written (Read-only file system): choose a folder" in sentence

    @pytest.mark.parametrize("room", [0, 3000, 10**4])
    def test_a_full_disk(
        self, unfinished: Path, refused: Callable[..., str], full: Callable[[int], None], room: int
    ) -> None:
        before = (unfinished / "checkpoint.pt").read_bytes()
        assert len(before) > 10**4
        full(room)
        sentence = refused(unfinished, "--resume", "--save-seconds=0")
        assert re.search(
            r"run cannot be written \(No space left on device\): make room there, go on from the checkpoint before "
            "with --resume; or choose a folder",
            sentence,
        )
        assert (unfinished / "checkpoint.pt").read_bytes() == before
        assert sorted(path.name for path in unfinished.iterdir()) == ["checkpoint.pt", "lock"]

    def test_a_disk_that_is_full_at_first(
        self, source: Path, tmp_path: Path, refused: Callable[..., str], full: Callable[[int], None]
    ) -> None:
        full(2000)
        assert "make room there; or choose a folder" in refused(tmp_path / "run", *new(source))
        assert not (tmp_path / "run").exists()

    def test_an_error_of_torchs_own_is_shown(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="of a GPU"), folder.written(tmp_path):
            raise RuntimeError("of a GPU")

    def test_a_sample_that_does_not_fit(
        self, source: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write_text(path: Path, text: str, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", write_text)
        assert "cannot be written (No space left on device): make room there; or" in refused(tmp_path, *new(source))
        assert len(saved(tmp_path)["losses"]) == STEPS


# Holds a folder until its input ends.
HOLDER = """
import sys
from pathlib import Path
from bench.train.folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


# The program with a real limit on what it may write.
FULL = """
import resource
from bench.train import language_model

def main(arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return language_model.main(arguments)
"""


class TestLock:
    def test_one_run_at_a_time(self, source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        where = tmp_path / "run"
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(where)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with holder:
            assert holder.stdout.readline() == "held\n"
            for arguments in ([], ["--overwrite"], ["--compare=torch"]):
                sentence = refused(where, *arguments, *new(source))
                assert re.search(
                    rf"run is in use by another run \(process {holder.pid}\): wait until it has ended, or choose "
                    "another folder with --output",
                    sentence,
                )
            assert [path.name for path in where.iterdir()] == ["lock"]
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert language_model.main(["--output", str(where), "--sample-tokens=5", *new(source)]) == 0

    def test_a_folder_that_the_other_run_is_removing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flock = fcntl.flock

        def late(file: Any, how: int) -> None:
            (tmp_path / "lock").unlink()
            flock(file, how)

        monkeypatch.setattr("fcntl.flock", late)
        with pytest.raises(UsageError, match="in use by another run"), folder.held(tmp_path):
            pass

    def test_to_generate_none_is_needed(self, unfinished: Path) -> None:
        with folder.held(unfinished):
            assert language_model.main(["--generate", "--output", str(unfinished), "--sample-tokens=5"]) == 0

    def test_a_file_system_without_locks(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def flock(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", flock)
        assert language_model.main(["--output", str(tmp_path), "--sample-tokens=5", *new(source)]) == 0
        assert "on a file system without locks: begin no other run there" in capsys.readouterr().out

    def test_every_rank_is_told(self, source: Path, tmp_path: Path) -> None:
        """None waits for the one that found it, nor dies of its end."""
        (tmp_path / "file").touch()
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "checkpoint.pt").write_bytes(b"torn")
        taken = ["--output", str(tmp_path / "taken"), "--sample-tokens=5", *new(source)]
        with folder.held(tmp_path / "taken"):
            jobs = [[*taken[2:], "--output", str(tmp_path / name)] for name in ("file", "torn")]
            shown = two_processes("bench.train.language_model", taken, *jobs)
        assert re.findall(r"(.*) are the statuses", shown) == ["[2, 2]"] * 3

    def test_every_rank_hears_of_a_full_disk(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "program.py").write_text(FULL)
        arguments = ["--output", str(tmp_path / "run"), *new(source)]
        shown = two_processes("program", arguments, path=tmp_path)
        assert re.findall(r"(.*) are the statuses", shown) == ["[2, 2]"]
        assert not (tmp_path / "run").exists()
