"""Training runs in tests: a small text, what a checkpoint holds, and runs that are killed."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.train import checkpoint
from bench.train.loop import Run

ROOT = Path(__file__).parents[2]

# Kills a program at random moments until it ends: it loads torch once, and every attempt is a fork of it. The first
# attempt is not killed, writes elsewhere, and tells how long the program takes.
KILLER = """
import contextlib, importlib, json, os, random, shutil, signal, sys, time
module, seed, least, whole, killed, *arguments = sys.argv[1:]
program = importlib.import_module(module)

def begin(out):
    resume = ["--resume"] if os.path.exists(f"{out}/checkpoint.pt") else []
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            os._exit(program.main([*arguments, *resume, "--output", out, "--save-seconds", "0"]))
    return child

started = time.monotonic()
assert os.waitpid(begin(whole), 0)[1] == 0
duration = time.monotonic() - started
moments, kills = random.Random(int(seed)), 0
while True:
    child = begin(killed)
    # ever later, so that a run comes through on a machine that has become slower
    time.sleep(moments.uniform(0, 0.4) * duration * 1.6**kills)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        kills += 1
    elif kills < int(least) and not status:  # it was too quick
        shutil.rmtree(killed)
        kills = 0
    else:
        break
print(json.dumps({"kills": kills, "status": os.WEXITSTATUS(status)}))
"""


def kill_at_random(module: str, arguments: list[str], whole: Path, killed: Path, least: int = 2) -> None:
    """Runs a training program into `whole`, and again into `killed`, where SIGKILL ends it at random moments and it is
    resumed until it is finished; `least` times or more."""
    seed = random.randrange(2**32)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, module, str(seed), str(least), str(whole), str(killed), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["status"] == 0, f"seed {seed}"
    assert said["kills"] >= least, f"seed {seed}"


def die_and_resume(
    main: Callable[[list[str]], int], arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Runs a training program into one folder, and into another, where an exception ends it and it is resumed: both,
    and what their checkpoints hold is the same."""
    whole, killed = folder / "whole", folder / "killed"
    assert main([*arguments, f"--output={whole}"]) == 0
    step, middle = Run.train_step, len(saved(whole)["losses"]) // 2

    def dies(run: Run) -> None:
        if run.step == middle:
            raise RuntimeError("power failure")
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", dies)
        with pytest.raises(RuntimeError, match="power failure"):
            main([*arguments, f"--output={killed}", "--save-seconds=0"])
    assert len(saved(killed)["losses"]) == middle
    torch.manual_seed(12345)  # as another process would begin
    assert main(["--resume", f"--output={killed}"]) == 0
    assert saved(whole)["quality"] is not None
    assert_same(saved(killed), saved(whole))
    return whole, killed


# What torchrun does for two processes, but it loads torch once for all that it is given.
TWO = """
import importlib, json, os, socket, sys
module, jobs = sys.argv[1], json.loads(sys.argv[2])
program = importlib.import_module(module)
for arguments in jobs:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = program.main(arguments)
            sys.stdout.flush()
            os._exit(status)
    print([os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children], "are the statuses", flush=True)
"""


def two_processes(module: str, *jobs: list[str], path: Path = ROOT) -> str:
    """Runs a training program, which may lie in the folder `path`, with each job's arguments, one job after the other,
    as two processes that share it. Returns what they and, after each job, their statuses print."""
    done = subprocess.run(
        [sys.executable, "-c", TWO, module, json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are the statuses") == len(jobs), done.stderr
    return done.stdout


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a training program turns a command down."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def python_source(folder: Path) -> Path:
    """A small folder of Python files."""
    for index in range(40):
        path = folder / f"package_{index % 3}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{index}(x):\n    return x + {index}\n" * (1 + index % 5))
    return folder


def saved(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds and must be the same however often the run was interrupted."""
    content = checkpoint.load(folder)
    assert content is not None
    del content["speed"], content["memory"]
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
