"""Where numbers come from: what can be read is right, and what cannot says so instead of failing."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from synthetic import PROVENANCE

from bench import UsageError
from bench.report import provenance

CPU = torch.device("cpu")


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/a/pytest/__main__.py", "--text", "a b"])
    found = provenance.provenance(CPU)
    assert found.rehearsal
    assert found.device == f"CPU ({platform.machine()})"
    assert (found.arch, found.multiprocessors, found.driver, found.cudnn) == ("cpu", 0, "none", "none")
    assert (found.torch, found.triton, found.python) == (
        torch.__version__, triton.__version__, platform.python_version(),
    )  # fmt: skip
    assert found.command == "pytest --text 'a b'"
    assert (found.clocks_before, found.clocks_after) == (0, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.date)


def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi and torch tell, the first GPU's line."""
    asked = tmp_path / "asked"
    program(
        tmp_path,
        "nvidia-smi",
        f'echo "$@" >>{asked}; case "$1" in *clocks.sm*) echo 1980; echo 7;; *) echo 570.1;; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    properties = SimpleNamespace(name="Test GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_000)
    found = provenance.provenance(torch.device("cuda", 0))
    assert (found.device, found.arch, found.multiprocessors) == ("Test GPU", "sm_90", 132)
    assert (found.driver, found.cudnn, found.clocks_before, found.clocks_after) == ("570.1", "91000", 1980, 0)
    assert not found.rehearsal
    assert "--query-gpu=clocks.sm --format=csv,noheader,nounits" in asked.read_text()


@pytest.mark.parametrize(
    "script", ["exit 1", "echo '[N/A]'", "", None], ids=["fails", "knows nothing", "mute", "absent"]
)
def test_clocks_that_cannot_be_read(script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script is not None:
        program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.clock() == 0


def test_a_program_that_hangs_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    assert provenance._output("no-such-program") == ""
    monkeypatch.setattr(subprocess, "run", hang)
    assert provenance._output("nvidia-smi") == ""
    assert provenance.clock() == 0


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git's, with what is not in it; without a history what the caller says, or nothing."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance.provenance(CPU)
    assert (found.commit, found.dirty) == ("unknown", False)
    assert provenance.provenance(CPU, commit="abc").commit == "abc"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    found = provenance.provenance(CPU)
    assert re.fullmatch(r"[0-9a-f]{40,64}", found.commit)
    assert not found.dirty
    (tmp_path / "new.py").touch()
    later = provenance.provenance(CPU)
    assert later == replace(found, dirty=True, date=later.date)


def test_what_may_share_a_file() -> None:
    path = Path("results.json")
    for same in (PROVENANCE, replace(PROVENANCE, date="x", command="y", dirty=True, clocks_before=7, python="4")):
        provenance.refuse_another(path, PROVENANCE, same)
    for name in provenance.SAME:
        provenance.refuse_another(path, PROVENANCE, replace(PROVENANCE, **{name: "unknown"}))
        with pytest.raises(
            UsageError, match=f"results.json was measured with {name} '.*', now it is 'x'; name another"
        ):
            provenance.refuse_another(path, PROVENANCE, replace(PROVENANCE, **{name: "x"}))
