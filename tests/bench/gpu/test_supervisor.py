"""The supervisor: a step that hangs, dies, lies or is cut short costs itself and says so, and the others go on."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import CASE, timing
from synthetic import results as empty

from bench.gpu import smoke, supervisor
from bench.gpu.journal import Task
from bench.gpu.steps import CAUSES, FIRST, PARTS, Step
from bench.gpu.supervisor import LEAST, START, Run
from bench.race import suites
from bench.report.results import Micro, Results, Stress, line, load

# A step's process without torch: it does what its items are called, and keeps the journal as a worker does.
FAKE = """
import json, os, signal, subprocess, sys, time
task = json.load(open(sys.argv[1]))
journal = task["journal"]
state = os.path.splitext(journal)[0] + ".running"
items = [name for name in (f"{task['step']}: {item}" for item in sys.argv[2:]) if name not in task["done"]]
for i, item in enumerate(items):
    open(state + ".tmp", "w").write("\\n".join(items[i:]))
    os.replace(state + ".tmp", state)
    if "hang" in item:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(journal + ".pid", "w").write(str(child.pid))
        time.sleep(600)
    if "die" in item:
        print("it broke", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    text = json.dumps({"Stress": {"name": item, "ok": "red" not in item, "seconds": 0.5, "message": "seen"}})
    if "cut" in item:
        open(journal, "a").write(text[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    open(journal, "a").write(text + "\\n")
    if "lost" in item:
        open(state, "w").write("\\n".join(["", *items[i + 1 :]]))
        sys.exit(70)
os.remove(state)
"""
STEP = Step("step", 60, 1, "", lambda task: ())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def run_of(path: Path, before: Results | None = None, minutes: float = 8.0) -> Run:
    options = {"minutes": minutes, "rehearse": None, "suite": [], "dtype": [], "arm": []}
    return Run(path, before or empty(), Namespace(**options))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., Run]:
    """fake(item, ...): a run whose steps have these items."""
    program = path.with_name("fake.py")
    program.write_text(FAKE)

    def made(*items: str, before: Results | None = None) -> Run:
        command = [sys.executable, str(program)]
        monkeypatch.setattr(Run, "command", lambda self, step, task: [*command, str(task.file), *items])
        return run_of(path, before)

    return made


def outcomes(path: Path) -> dict[str, tuple[bool, str]]:
    return {one.name: (one.ok, one.message) for one in load(path).stress}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# What goes wrong in a step


def test_whatever_an_item_does_the_others_have_their_turn(fake: Callable[..., Run], path: Path) -> None:
    run = fake("a", "die", "b", "red and lost", "c", "cut", "d", "hang", "e")
    run.watch(STEP, 60)
    found = outcomes(path)
    assert found.pop("step: die") == (False, "died by SIGSEGV. it broke")
    assert found.pop("step: red and lost") == (False, "seen")
    assert found.pop("step: cut") == (False, "died by SIGKILL.")
    assert found.pop("step: journal")[1].startswith('cut short by a kill; its last line is b\'{"Stress"')
    ok, message = found.pop("step: hang")
    assert not ok
    assert message.startswith("was killed after 1 s: it hung, or was too slow")
    assert found == {f"step: {name}": (True, "seen") for name in "abcde"}
    pid = run.journal("step").with_suffix(".journal.pid")
    for _ in range(100):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(pid.read_text())), "the process that the item had started is still there"
    pid.unlink()
    assert sorted(p.name for p in path.parent.iterdir()) == ["fake.py", "results.json"]


def test_a_step_whose_time_is_over(fake: Callable[..., Run], path: Path) -> None:
    """What was begun late is not wrong; it is named with what was left, and no other process begins."""
    fake("a", "hang", "b", "c").watch(replace(STEP, item=60), 1.5)
    assert outcomes(path) == {
        "step: a": (True, "seen"),
        "not run: step": (False, "its time was over: step: hang; step: b; step: c"),
    }


def test_a_process_that_cannot_begin(fake: Callable[..., Run], path: Path) -> None:
    run = fake("a")
    path.with_name("fake.py").write_text("raise SystemExit('no such driver')")
    run.watch(STEP, 60)
    assert outcomes(path) == {"step": (False, "ended with status 1. no such driver")}


def test_a_speed_without_a_check_is_red_and_not_kept(path: Path) -> None:
    """Of a run that was killed the journal is taken."""
    run = run_of(path)
    run.journal("smoke").write_text(line(timing(CASE)) + line(Stress("smoke: a", True, 1.0, "")) + "nonsense\n")
    run.all([])
    assert not load(path).timings
    assert {name: ok for name, (ok, _) in outcomes(path).items()} == {"smoke: a": True, "smoke: an entry": False}
    assert not run.journal("smoke").exists()


def test_the_same_file_again(fake: Callable[..., Run], path: Path) -> None:
    """Green ones are not run again, red ones are, those of the race stay as they are, and not-run is not."""
    before = empty()
    before.add(Stress("step: hang", True, 1.0, "before"))
    before.add(Stress("step: red", False, 1.0, "before"))
    before.add(Stress("not run: step", False, 0.0, "before"))
    before.add(Stress("race-1: a row, torch", False, 0.0, "wrong"))
    before.add(Stress("compile: kernels", True, 0.0, "on another machine"))
    before.add(replace(timing(CASE), skipped="not installed", microseconds=0.0))
    run = fake("hang", "red", "b", before=before)
    before.add(Micro("l2", 7, 4096, 1.0, 1.0, 1.0, "us", 3))
    found = {f"race: {CASE.key}, persistrnn", "race: l2, 7 programs, 4,096 bytes"}
    assert run.done("race") == {"step: hang", "race-1: a row, torch"} | found
    run.watch(STEP, 60)
    found = outcomes(path)
    assert found["step: hang"] == (True, "before")
    assert found["step: red"] == (False, "seen")
    assert "not run: step" not in found


# All steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., tuple[list[str], bool]]:
    """steps(red smoke case, ...): what begins in the first run, and whether all of it is right."""

    def run(*red: str, minutes: float = 8.0) -> tuple[list[str], bool]:
        begun: list[str] = []

        def watch(self: Run, step: Step, seconds: float, case: str = "") -> None:
            begun.append(f"{step.name} {case}".strip())
            if step.name == "smoke":
                for one in smoke.SMOKE:
                    self.note(f"smoke: {one.name}", one.name not in red, 0.0, "seen")

        monkeypatch.setattr(Run, "watch", watch)
        return begun, run_of(path, minutes=minutes).all([FIRST])

    return run


EVERY = ["machine", "compile", "smoke", "exchange", "constants", "race-1", "race-2", "race-3", "correctness"]


@pytest.mark.parametrize(
    ("red", "begun"),
    [
        ([], EVERY),
        ([smoke.SMOKE[5].name], [*EVERY[:3], f"causes {smoke.SMOKE[5].name}", *EVERY[3:]]),
        ([smoke.FIRST[1]], [*EVERY[:3], f"causes {smoke.FIRST[1]}"]),
    ],
    ids=["all right", "a later case is wrong", "the first cases are wrong"],
)
def test_every_step_in_its_order(
    red: list[str], begun: list[str], steps: Callable[..., tuple[list[str], bool]], path: Path
) -> None:
    assert steps(*red) == (begun, not red)
    stopped = f"the simplest cases are wrong: {smoke.FIRST[1]}"
    left = EVERY[3:] if len(begun) == 4 else []
    assert {n: m for n, (_, m) in outcomes(path).items() if "not run" in n} == {f"not run: {n}": stopped for n in left}


def test_without_time_the_steps_say_so(steps: Callable[..., tuple[list[str], bool]], path: Path) -> None:
    assert steps(minutes=0.4) == ([], True)
    assert outcomes(path) == {f"not run: {step.name}": (False, "no time was left") for step in FIRST}


def test_red_outcomes_of_other_steps_are_not_this_runs(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    before = empty()
    before.add(Stress("stress: many streams", False, 1.0, "another result"))
    monkeypatch.setattr(Run, "watch", lambda *_: None)
    assert run_of(path, before).all([PARTS[:1]])
    assert not run_of(path, before).all([PARTS[1:2]])


def test_eight_minutes_hold_every_step() -> None:
    *before, last = FIRST
    assert START + sum(step.seconds for step in before) <= 8 * 60 - last.item
    assert all(LEAST <= step.seconds <= 60 for step in before)
    assert all(step.item <= step.seconds for step in (*FIRST, CAUSES, *PARTS))
    assert "480 s at most" in supervisor.printed(FIRST, 8)


def test_rows_are_those_of_the_suites() -> None:
    """So that the targets find them; two have marks, which no suite has. All of them are in a step."""
    rows = suites.first()
    known = {case.key for case in suites.cases()}
    others = [case for case in rows if case.key not in known]
    assert [case.marks for case in others if case.marks] == ["resets", "lengths"]
    assert len(others) <= 4, [case.key for case in others]
    task = Task("race", "none.journal", 0.0)
    named = [name for step in FIRST if step.name.startswith("race-") for name, _ in step.items(task)]
    assert named == [f"{c.key}, {arm}" for c in rows for arm in ("persistrnn", "torch")]


# The GPU tests


def test_tests_that_hang_and_tests_that_are_left(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in its turn, the most telling first; after one that hangs the others go on."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_plain(): pass\ndef test_two_streams(): assert 1 == 2\ndef test_nan_and_inf_flow(): time.sleep(60)\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\naddopts = -p no:cacheprovider\n")
    monkeypatch.setattr(supervisor, "ROOT", folder)
    monkeypatch.setattr(supervisor, "TESTS", (str(folder / "test_it.py"),))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    assert not run_of(path).all([[replace(PARTS[0], item=1)]])
    found = list(outcomes(path).items())
    assert [name.removeprefix("correctness: test_it.py::test_") for name, _ in found] == [
        "nan_and_inf_flow", "two_streams", "plain",
    ]  # fmt: skip
    assert [ok for _, (ok, _) in found] == [False, False, True]
    assert found[0][1][1].startswith("was killed after 1 s")
