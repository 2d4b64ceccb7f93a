"""The first run: its plan adds up, and a step that hangs, dies, lies or is cut short costs itself and says so."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from synthetic import results as empty

from bench.gpu import command as gpu
from bench.gpu import first, first_steps, smoke
from bench.gpu.first import STEPS, First, Step
from bench.race import suites
from bench.report.results import Results, Stress, entry, line, load
from persistrnn.kernels import launch
from persistrnn.kernels.planner.hardware import named

# A step's process without torch: it does what its items are called, and keeps the journal as `first_steps` does.
FAKE = """
import json, os, signal, subprocess, sys, time
journal, done, items = sys.argv[1], open(sys.argv[2]).read().splitlines(), sys.argv[3:]
state = os.path.splitext(journal)[0] + ".running"
items = [item for item in items if f"step: {item}" not in done]
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
    text = json.dumps({"Stress": {"name": f"step: {item}", "ok": "red" not in item, "seconds": 0.5, "message": "seen"}})
    if "cut" in item:
        open(journal, "a").write(text[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    open(journal, "a").write(text + "\\n")
    if "lost" in item:
        open(state, "w").write("\\n".join(["", *items[i + 1 :]]))
        sys.exit(3)
os.remove(state)
"""
STEP = Step("step", 60, 1, "")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def run_of(path: Path, before: Results | None = None, **changed: Any) -> gpu.Run:
    """A run without its validate."""
    run = object.__new__(gpu.Run)
    run.path, run.device, run.results, run.hardware = path, torch.device("cpu"), before or empty(), None
    given: dict[str, Any] = {"minutes": 8.0, "steps": None, "inject": [], "rehearse": None}
    run.arguments = Namespace(**(given | changed))
    run.save()
    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., First]:
    """fake(item, ...): a run whose steps have these items."""
    program = path.with_name("fake.py")
    program.write_text(FAKE)

    def made(*items: str, before: Results | None = None) -> First:
        found = First(run_of(path, before), ())

        def command(self: First, step: Step, until: float, red: str) -> list[str]:
            names = path.with_name("done")
            names.write_text("\n".join(self.done()))
            return [sys.executable, str(program), str(first.journal_of(path, step.name)), str(names), *items]

        monkeypatch.setattr(First, "command", command)
        return found

    return made


def outcomes(path: Path) -> dict[str, tuple[bool, str]]:
    return {one.name: (one.ok, one.message) for one in load(path).stress}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# The plan


@pytest.mark.parametrize("minutes", [0.5, 1, 2, 4, 8, 15])
def test_the_plan_adds_up(minutes: float) -> None:
    """What is beside another step takes no time of its own; what comes last is cut first."""
    plan = first.plan(minutes)
    assert [step for step, _ in plan] == list(STEPS)
    total = first.START + sum(seconds for step, seconds in plan if not step.beside)
    assert total <= 60 * minutes
    assert f"{total:5.0f} s at most" in first.printed(minutes)
    granted = [bool(seconds) for step, seconds in plan]
    assert granted == sorted(granted, reverse=True), "in order, until none is left"


def test_eight_minutes_hold_every_step() -> None:
    plan = dict(first.plan(8))
    assert all(plan[step] >= 20 for step in STEPS)
    assert first.START + sum(seconds for step, seconds in plan.items() if not step.beside) == 480
    assert all(20 <= step.seconds <= 60 for step in (*STEPS, first.CAUSES))
    assert all(step.item <= step.seconds for step in (*STEPS, first.CAUSES))
    assert all(first.plan(4)[i][1] for i, step in enumerate(STEPS) if step.name in ("smoke", "exchange", "race-1"))


def test_steps_are_those_of_the_processes() -> None:
    assert {step.name for step in (*STEPS, first.CAUSES)} == {*first_steps.STEPS, "tests"}
    rows = suites.first()
    assert len(rows) <= 3 * first_steps.PER_STEP
    assert len({case.key for case in rows}) == len(rows)


def test_rows_are_those_of_the_suites() -> None:
    """So that the targets find them; two have marks, which no suite has."""
    known = {case.key for case in suites.cases()}
    others = [case for case in suites.first() if case.key not in known]
    assert [case.marks for case in others if case.marks] == ["resets", "lengths"]
    assert len(others) <= 4, [case.key for case in others]


# The door


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first", "micro"], "PART must be of correctness, stress, micro, race, tune, or first alone, got 'first'"),
        (["micro", "--steps", "smoke"], "--steps is of first alone"),
        (["first", "--steps", "lunch"], "argument --steps: invalid choice: 'lunch'"),
        (["first", "--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_arguments_that_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# What goes wrong in a step


def test_all_goes_well(fake: Callable[..., First], path: Path) -> None:
    fake("a", "b").watch([(STEP, 60)])
    assert outcomes(path) == {"step: a": (True, "seen"), "step: b": (True, "seen")}
    assert sorted(p.name for p in path.parent.iterdir()) == ["done", "fake.py", "results.json"]


def test_an_item_that_hangs_is_killed_with_its_children_and_the_others_go_on(
    fake: Callable[..., First], path: Path
) -> None:
    fake("a", "hang", "b").watch([(STEP, 60)])
    found = outcomes(path)
    ok, message = found.pop("step: hang")
    assert not ok
    assert message.startswith("was killed after 1 s: it hung, or was too slow")
    assert found == {"step: a": (True, "seen"), "step: b": (True, "seen")}
    child = int(first.journal_of(path, "step").with_suffix(".journal.pid").read_text())
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child), "the process that the item had started is still there"


def test_an_item_that_dies_by_a_signal(fake: Callable[..., First], path: Path) -> None:
    fake("a", "die", "b").watch([(STEP, 60)])
    found = outcomes(path)
    assert found.pop("step: die") == (False, "died by SIGSEGV. it broke")
    assert found == {"step: a": (True, "seen"), "step: b": (True, "seen")}


def test_a_process_that_has_lost_the_device(fake: Callable[..., First], path: Path) -> None:
    """Its item is red, and the others have their turn in a new process, in which they may be right."""
    fake("a", "red and lost", "b").watch([(STEP, 60)])
    assert outcomes(path) == {
        "step: a": (True, "seen"),
        "step: red and lost": (False, "seen"),
        "step: b": (True, "seen"),
    }


def test_items_after_one_that_lost_the_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left to another process; after any other error they go on in this one, with a clean error word."""
    begun: list[str] = []

    def item(name: str) -> str:
        begun.append(name)
        if name == "c":
            for hit in (True, False, False):
                triton.knobs.compilation.listener(src=None, cache_hit=hit)
        if name == "b":
            launch._error_word(job.device).fill_(1)
            raise ValueError("something is wrong")
        return "seen"

    job = first_steps.Job(first.journal_of(path, "step"), torch.device("cpu"), None, "", {})
    items = [(name, lambda name=name: item(name)) for name in "abc"]
    monkeypatch.setitem(first_steps.STEPS, "step", lambda job: iter(items))
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)  # which a step sets for its process
    first_steps.work("step", job, set(), time.monotonic() + 60)
    assert begun == ["a", "b", "c"]
    assert not launch._error_word(job.device).any()
    told = [entry(text) for text in job.journal.read_text().splitlines()]
    assert [one.message for one in told if one.ok] == ["seen", "seen [compiled here: 2]"]

    begun.clear()

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "synchronize", lost)
    with pytest.raises(SystemExit) as stop:
        first_steps.work("step", job, set(), time.monotonic() + 60)
    assert stop.value.code == first_steps.LOST
    assert begun == ["a", "b"]
    assert first_steps.running(job.journal).read_text() == "\nc"
    launch._errors.clear()


def test_a_step_beside_nothing(steps: Callable[..., tuple[list[str], bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "STEPS", STEPS[:1])
    assert steps() == (["machine"], True)


def test_a_journal_cut_short_by_a_kill(fake: Callable[..., First], path: Path) -> None:
    fake("a", "cut", "b").watch([(STEP, 60)])
    found = outcomes(path)
    assert found.pop("results-step: journal")[1].startswith('cut short by a kill; its last line is b\'{"Stress"')
    assert found.pop("step: cut") == (False, "died by SIGKILL.")
    assert found == {"step: a": (True, "seen"), "step: b": (True, "seen")}


def test_a_step_whose_time_is_over(fake: Callable[..., First], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was running is red, what was left is named, and no other process begins."""
    fake("a", "hang", "b", "c").watch([(replace(STEP, item=60), 1.5)])
    found = outcomes(path)
    assert found.pop("step: hang")[0] is False
    assert found.pop("not run: step") == (False, "its time was over: b; c")
    assert found == {"step: a": (True, "seen")}


def test_a_process_that_cannot_begin(fake: Callable[..., First], path: Path) -> None:
    run = fake("a")
    path.with_name("fake.py").write_text("raise SystemExit('no such driver')")
    run.watch([(STEP, 60)])
    assert outcomes(path) == {"step": (False, "ended with status 1. no such driver")}


def test_two_beside_each_other(fake: Callable[..., First], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("a", "die").watch([(replace(STEP, name="one"), 60), (replace(STEP, name="two"), 60)])
    found = outcomes(path)
    assert {name for name, (ok, _) in found.items() if not ok} == {"one: die", "two: die"}


def test_a_speed_without_a_check_is_red_and_not_kept(fake: Callable[..., First], path: Path) -> None:
    from synthetic import CASE, timing

    run = fake()
    journal = first.journal_of(path, "step")
    journal.write_text(line(timing(CASE)) + line(Stress("step: a", True, 1.0, "")) + "nonsense\n")
    assert run.fold(journal, 0, True) > 0
    assert not load(path).timings
    found = outcomes(path)
    assert found["step: a"][0]
    assert not found["results-step: an entry"][0]
    assert not journal.exists()


def test_the_same_file_again(fake: Callable[..., First], path: Path) -> None:
    """Green ones are not run again, red ones are; of a run that was killed the journal is taken, and not-run is not."""
    before = empty()
    before.add(Stress("step: hang", True, 1.0, "before"))
    before.add(Stress("step: red", False, 1.0, "before"))
    before.add(Stress("not run: step", False, 0.0, "before"))
    before.add(Stress("race-1: a row, torch", False, 0.0, "wrong"))
    run = fake("hang", "red", "b", before=before)
    assert "race-1: a row, torch" in run.done(), "what was wrong in the race stays so"
    run.watch([(STEP, 60)])
    found = outcomes(path)
    assert found["step: hang"] == (True, "before")
    assert found["step: red"] == (False, "seen")
    assert "not run: step" not in found


# All steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., tuple[list[str], bool]]:
    """steps(red smoke case, ...): what begins, and whether all of it is right."""

    def run(*red: str, minutes: float = 8.0, before: Results | None = None) -> tuple[list[str], bool]:
        begun: list[str] = []
        made = First(run_of(path, before, minutes=minutes), ())

        def watch(self: First, steps: list[tuple[Step, float]], case: str = "") -> None:
            begun.append(" ".join([*(step.name for step, _ in steps), case]).strip())
            if steps[-1][0].name == "smoke":
                for one in smoke.SMOKE:
                    self.note(f"smoke: {one.name}", one.name not in red, 0.0, "seen")

        monkeypatch.setattr(First, "watch", watch)
        monkeypatch.setattr(First, "pytest", lambda self, until: begun.append("tests") or False)
        return begun, made.all()

    return run


EVERY = ["machine compile", "smoke", "exchange", "constants", "race-1", "race-2", "race-3", "tests"]


def test_every_step_in_its_order(steps: Callable[..., tuple[list[str], bool]]) -> None:
    assert steps() == (EVERY, True)


def test_where_the_first_case_is_wrong_it_stops(steps: Callable[..., tuple[list[str], bool]], path: Path) -> None:
    red = smoke.FIRST[1]
    begun, ok = steps(red)
    assert (begun, ok) == (["machine compile", "smoke", f"causes {red}"], False)
    for name in EVERY[2:]:
        assert outcomes(path)[f"not run: {name}"] == (False, f"the simplest cases are wrong: {red}")


def test_where_a_later_case_is_wrong_it_goes_on(steps: Callable[..., tuple[list[str], bool]]) -> None:
    red = smoke.SMOKE[5].name
    begun, ok = steps(red)
    assert (begun, ok) == ([*EVERY[:2], f"causes {red}", *EVERY[2:]], False)


def test_without_time_the_last_steps_say_so(steps: Callable[..., tuple[list[str], bool]], path: Path) -> None:
    assert steps(minutes=0.4) == ([], True)
    assert outcomes(path) == {f"not run: {step.name}": (False, "no time was left") for step in STEPS}


def test_a_results_file_cut_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set aside, and the new one says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu.provenance, "provenance", lambda *_: empty().provenance)
    monkeypatch.setattr(First, "watch", lambda *_: None)
    monkeypatch.setattr(First, "pytest", lambda *_: False)
    empty().save(path)
    path.write_text(path.read_text()[:200])
    assert gpu.main(["first", "--output", str(path)]) == 1
    assert path.with_suffix(".broken").exists()
    ok, message = outcomes(path)["results"]
    assert not ok
    assert message.startswith("results.broken is what was there, and no results file: ")


# The GPU tests


def test_tests_that_hang_and_tests_that_are_left(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in its turn, most telling first; what had no turn is counted by file."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_plain(): pass\ndef test_two_streams(): pass\ndef test_nan_and_inf_flow(): time.sleep(60)\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\naddopts = -p no:cacheprovider\n")
    monkeypatch.setattr(first.provenance, "ROOT", folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    run = First(run_of(path), (str(folder / "test_it.py"),))
    run.run.save()
    monkeypatch.setattr(first, "STEPS", (replace(STEPS[-1], item=3),))
    assert run.pytest(time.monotonic() + 60), "two tests are left"
    found = outcomes(path)
    ((name, (ok, message)),) = found.items()
    assert name == "test_it.py::test_nan_and_inf_flow", "the more telling one comes first"
    assert not ok
    assert message.startswith("was killed after ")
    assert run.left == ["test_it.py::test_plain", "test_it.py::test_two_streams"]

    # Without it the others go on; none is left.
    assert not run.pytest(time.monotonic() + 60) or run.left == []
    assert {name for name, (ok, _) in outcomes(path).items() if ok} == {
        "test_it.py::test_plain",
        "test_it.py::test_two_streams",
    }


# The rehearsal, for real: every step's own process, on the CPU


def kept(*steps_and_items: str) -> Results:
    """A rehearsal's file in which all items of smoke, causes and race-1 are green but these."""
    job = first_steps.Job(Path("none"), torch.device("cpu"), named("h200"), smoke.SMOKE[3].name, {})
    found = empty(
        rehearsal=True, device="unknown", driver="unknown", torch="unknown", triton="unknown", commit="unknown"
    )
    for step in ("smoke", "causes", "race-1", "machine"):
        for name, _ in first_steps.STEPS[step](job):
            if f"{step}: {name}" not in steps_and_items:
                found.add(Stress(f"{step}: {name}", True, 0.0, "before"))
    return found


@pytest.mark.interpreter
def test_a_rehearsal_in_which_all_goes_wrong(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs, one that dies, wrong numbers, a file cut short: each is a line, and the others go on."""
    assert launch.INTERPRETED
    one, two, three = (f"smoke: {smoke.SMOKE[i].name}" for i in (3, 4, 5))
    cause = f"causes: {smoke.SMOKE[3].name}: T=2"
    row = f"race-1: {suites.miniatures(suites.first())[0].key}, persistrnn"
    facts, plain, pinned = (f"machine: {name}" for name in ("facts", "plain launch", "pinned memory"))
    kept(facts, plain, pinned, one, two, three, cause, row).save(path)
    inject = [f"{facts}=cut", f"{plain}=hang", f"{one}=wrong", f"{two}=die", f"{row}=wrong"]
    steps = ["machine", "smoke", "race-1"]
    # Short only where something hangs: the others may share their cores.
    alone = (replace(s, beside=False, seconds=150, item=5 if s.name == "machine" else 60) for s in STEPS)
    monkeypatch.setattr(first, "STEPS", tuple(alone))
    command = ["--rehearse", "h200", "first", "--output", str(path), "--steps", *steps]
    command += ["--minutes", "20", "--inject", *inject]
    assert gpu.main(command) == 1
    found = outcomes(path)
    assert found["results-machine: journal"][1].startswith("cut short by a kill")
    assert found[facts][1].startswith("died by SIGKILL")
    assert found[plain][1].startswith("was killed after 5 s")
    assert found[pinned][0]
    assert found[one][1].startswith("AssertionError: y has error ")
    assert found[two][1].startswith("died by SIGSEGV")
    assert found[three][0]
    assert found[cause][0], "the variants of the red case have run"
    assert found[row][1].startswith("AssertionError: y has error ")
    assert sum(ok is False for ok, _ in found.values()) == 6
    (red,) = (check for check in load(path).checks if not check.ok)
    assert red.case == suites.miniatures(suites.first())[0]
    (skipped,) = load(path).timings
    assert skipped.skipped.startswith("wrong: y has error ")
    assert not [p.name for p in path.parent.iterdir() if p.suffix in (".journal", ".running", ".done")]
    json.loads(path.read_text())
