"""The command as a whole: what it prints without a command, its help and its version."""

import sys
from importlib import metadata

import pytest

import persistrnn
from persistrnn import __main__

COMMANDS = ("plan", "audit", "profile")


def call(monkeypatch, capsys, *arguments):
    """(status, out, err)."""
    monkeypatch.setattr(sys, "argv", ["persistrnn", *arguments])
    try:
        status = __main__.main()
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_help_version_and_nothing(monkeypatch, capsys):
    """The help has a line on each command."""
    status, out, err = call(monkeypatch, capsys, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: persistrnn [-h] [--version] COMMAND ...")
    lines = [line.split() for line in out.splitlines()]
    for name in COMMANDS:
        assert any(line[:1] == [name] and len(line) > 4 for line in lines), name
    assert set(__main__.COMMANDS) == set(COMMANDS)
    assert call(monkeypatch, capsys) == (2, "", out)
    assert call(monkeypatch, capsys, "--version") == (0, f"persistrnn {persistrnn.__version__}\n", "")


@pytest.mark.parametrize("given", ["train", "--hidden", "pla", ""])
def test_what_is_no_command_is_refused(monkeypatch, capsys, given):
    status, out, err = call(monkeypatch, capsys, given)
    assert (status, out) == (2, "")
    assert "usage: persistrnn " in err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(monkeypatch, capsys, name):
    status, out, err = call(monkeypatch, capsys, name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: persistrnn {name} ")


def test_a_command_reads_what_follows_it(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "plan", "--cell", "GRU", "--hidden", "64", "--device", "H100")
    assert status == 0
    assert out.startswith("gru H=64 B=16 D=1 bf16 on h100 (sm_90")
    status, _, err = call(monkeypatch, capsys, "plan", "--version")
    assert status == 2
    assert "usage: persistrnn plan " in err


def test_the_installed_command_is_the_same():
    found = [e.value for e in metadata.entry_points(group="console_scripts") if e.name == "persistrnn"]
    assert all(value == "persistrnn.__main__:main" for value in found)
