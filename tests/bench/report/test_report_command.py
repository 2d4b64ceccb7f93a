"""``python -m bench.report``: what it writes, what it leaves alone, and how it answers wrong arguments."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from synthetic import predicted, results

from bench.report import __main__ as report

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        status = report.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    results().save(path)
    return path


def test_command_says_what_it_wrote(tmp_path: Path) -> None:
    predicted().save(tmp_path / "results.json")
    command = [sys.executable, "-m", "bench.report", "results.json", "--output", "a/b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"wrote a/b/{n}" for n in ("report.html", "step-bf16-forward-1.png", "floor.png")
    ]
    assert all((tmp_path / line.removeprefix("wrote ")).is_file() for line in done.stdout.splitlines())


def test_earlier_report_is_replaced_and_other_files_are_not(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    report.write([predicted()], folder)
    (folder / "mine.png").write_bytes(b"mine")
    before = (folder / "floor.png").read_bytes()
    status, out, err = call(capsys, file, "--output", folder)
    assert (status, err) == (0, "")
    wrote, left = out.splitlines()
    assert wrote == f"wrote {folder / 'report.html'}"
    assert left == f"left of an earlier report: {folder / 'floor.png'}, {folder / 'step-bf16-forward-1.png'}"
    assert "Nothing is timed" in (folder / "report.html").read_text()
    assert "H=1024" not in (folder / "report.html").read_text()
    assert ((folder / "mine.png").read_bytes(), (folder / "floor.png").read_bytes()) == (b"mine", before)


@pytest.mark.parametrize("name", ["report.html", "floor.png"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_file_of_somebody_else_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, kind: str
) -> None:
    predicted().save(tmp_path / "results.json")
    folder = tmp_path / "report"
    folder.mkdir()
    path = folder / name
    if kind == "file":
        path.write_bytes(b"<html>mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    status, out, err = call(capsys, tmp_path / "results.json", "--output", folder)
    assert (status, out) == (2, "")
    assert f"{path} is there, and no report wrote it" in err
    assert list(folder.iterdir()) == [path], "nothing is written"


def bad_arguments(file: Path) -> Iterator[tuple[Sequence[object], Sequence[str]]]:
    folder = file.parent
    (folder / "bad.json").write_text("{")
    (folder / "empty.json").write_text("[]")
    out = ("--output", folder / "out")
    yield (folder / "no.json", *out), ("argument RESULTS.json: ", "no.json' given", "No such file", "allowed: a file")
    yield (folder, *out), ("argument RESULTS.json: ", "Is a directory")
    yield (file, folder / "bad.json", *out), ("argument RESULTS.json: ", "bad.json: not JSON")
    yield (folder / "empty.json", *out), ("argument RESULTS.json: ", "empty.json is '[]', allowed: an object with")
    yield (file, "--output", file), ("argument --output: ", f"{str(file)!r} given", "allowed: a folder")
    yield (file, "--output", file / "below"), ("argument --output: ", "Not a directory", "allowed: a folder")
    yield (file, "--output", "a" * 300), ("argument --output: ", "File name too long", "allowed: a folder")
    yield (file,), ("required: --output",)
    yield out, ("required: RESULTS.json",)


@pytest.mark.parametrize("n", range(9))
def test_wrong_arguments_are_refused_at_the_door(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path, n: int
) -> None:
    monkeypatch.chdir(file.parent)
    arguments, told = list(bad_arguments(file))[n]
    before = sorted(file.parent.iterdir())
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    message = err.splitlines()[-1]
    assert message.startswith("python -m bench.report: error: ")
    for word in told:
        assert word in message
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_may_not_be_written_is_an_error(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    file.parent.chmod(0o500)
    status, _, err = call(capsys, file, "--output", file.parent / "out")
    file.parent.chmod(0o700)
    assert status == 2
    assert "Permission denied" in err


def test_without_matplotlib_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = call(capsys, file, "--output", file.parent / "out")
    assert (status, out) == (2, "")
    assert "pip install 'persistrnn[profile]'" in err
    assert not (file.parent / "out").exists()
