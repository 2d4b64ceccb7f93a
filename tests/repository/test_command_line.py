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


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_a_line_on_each_command(monkeypatch, capsys, option):
    status, out, err = call(monkeypatch, capsys, option)
    assert (status, err) == (0, "")
    assert out.startswith("usage: persistrnn [-h] [--version] COMMAND ...")
    lines = [line.split() for line in out.splitlines()]
    for name in COMMANDS:
        assert any(line[:1] == [name] and len(line) > 4 for line in lines), name
    assert set(__main__.COMMANDS) == set(COMMANDS)


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"persistrnn {persistrnn.__version__}\n", "")


def test_without_a_command_the_help_is_shown(monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys)
    assert (status, out) == (2, "")
    assert err == call(monkeypatch, capsys, "--help")[1]


@pytest.mark.parametrize("given", ["train", "--hidden", "pla", ""])
def test_what_is_no_command_is_refused(monkeypatch, capsys, given):
    status, out, err = call(monkeypatch, capsys, given)
    assert (status, out) == (2, "")
    assert "usage: persistrnn " in err
    assert (
        f"invalid choice: {given!r}" in err or f"unrecognized arguments: {given}" in err or "required: COMMAND" in err
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(monkeypatch, capsys, name):
    status, out, err = call(monkeypatch, capsys, name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: persistrnn {name} ")
    options = out[out.index("options:") :]
    for line in options.splitlines():
        if line.startswith("  --") and len(line) < 24:
            assert options.splitlines()[options.splitlines().index(line) + 1].startswith(" " * 10), (
                f"{line} is explained"
            )


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
