"""What a step's process does: every item has its outcome, on the CPU in small, and what is wrong is red."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from synthetic import results as empty
from synthetic import timing

from bench.gpu import command as gpu
from bench.gpu import journal, micro, smoke, steps, stress, tune, worker
from bench.gpu.journal import Task
from bench.race.engine import Race
from bench.report import results
from bench.report.results import Check, Micro, Stress, Tuning, entry, load
from persistrnn.kernels import launch
from persistrnn.kernels.tensors import Kept

CASE = smoke.SMOKE[3]


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    def made(step: str, **changes: Any) -> Task:
        options = {"suites": ["short"], "dtypes": ["fp16"], "arms": ["persistrnn", "xma"], "rehearse": "h200"}
        return Task(step, str(tmp_path / "x.journal"), time.monotonic() + 600, **(options | changes))

    return made


@pytest.fixture(autouse=True)
def no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)  # which a step sets for its process


def entries(task: Task) -> list[results.Entry]:
    path = Path(task.journal)
    return [entry(text) for text in path.read_text().splitlines()] if path.exists() else []


# One after the other


def test_a_task_is_what_its_process_reads(task: Callable[..., Task]) -> None:
    made = task("smoke", done=frozenset({"smoke: a"}))
    made.save()
    assert journal.load(made.file) == made


def test_items_after_one_that_lost_the_device(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left to another process; after any other error they go on in this one, with a clean error word."""
    begun: list[str] = []

    def item(name: str) -> str:
        begun.append(name)
        if name == "c":
            for hit in (True, False, False):
                triton.knobs.compilation.listener(src=None, cache_hit=hit)
        if name == "b":
            launch._error_word(torch.device("cpu")).fill_(1)
            raise ValueError("something is wrong")
        return "seen"

    items = [(name, lambda name=name: item(name)) for name in "zabc"]
    job = task("step", done=frozenset({"step: z"}))
    worker.work(job, items)
    assert begun == ["a", "b", "c"]
    assert not launch._error_word(job.device).any()
    found = entries(job)
    assert [(one.name, one.message) for one in found if one.ok] == [
        ("step: a", "seen"), ("step: c", "seen [compiled here: 2]"),
    ]  # fmt: skip
    assert [one.message.partition(" (")[0] for one in found if not one.ok] == ["ValueError: something is wrong"]
    assert not job.running.exists()

    begun.clear()

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "synchronize", lost)
    with pytest.raises(SystemExit) as stop:
        worker.work(job, items)
    assert stop.value.code == worker.LOST
    assert begun == ["a", "b"]
    assert job.running.read_text() == "\nstep: c"
    launch._errors.clear()


def test_nothing_begins_when_the_time_is_over(task: Callable[..., Task]) -> None:
    job = Task("step", task("step").journal, time.monotonic())
    worker.work(job, [(name, lambda: pytest.fail("begun")) for name in "ab"])
    assert job.running.read_text() == "\nstep: a\nstep: b"
    assert entries(job) == []


# What there is to do on a GPU


def test_micro_and_tune_keep_what_they_measure(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """And an item that the device is too small for says so."""
    on_cpu = property(lambda self: torch.device("cpu"))
    monkeypatch.setattr(Task, "device", on_cpu)
    call = Micro("first call", 1, 0, 9.0, 9.0, 9.0, "s", 1)
    barrier = Micro("barrier", 4, 0, 1.0, 1.0, 1.0, "us", 3)
    items = [
        micro.Item("barrier", 4, 0, "us", lambda: lambda: 1.0),
        micro.Item("exchange flags", 9, 0, "us", lambda: lambda: 1.0, skip="9 programs on 4 multiprocessors"),
    ]
    monkeypatch.setattr(micro, "first_call", lambda: call)
    monkeypatch.setattr(micro, "items", lambda machine: items)
    monkeypatch.setattr(micro, "measured", lambda machine, item: barrier)
    found = Tuning(CASE.case, True, "U=8", True, 1.0, 2.0)
    monkeypatch.setattr(tune, "items", lambda device: iter([("a choice", lambda: found)]))
    for name in ("micro", "exchange", "constants", "tune"):
        job = task(name, rehearse="")
        worker.work(job, list(steps.STEPS[name].items(job)))
    kept = entries(job)
    assert [one for one in kept if not isinstance(one, Stress)] == [call, barrier, barrier, found]
    assert all(one.ok for one in kept if isinstance(one, Stress))
    assert "skipped: 9 programs on 4 multiprocessors" in [one.message for one in kept if isinstance(one, Stress)]


def test_stress_has_its_share_of_the_time(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(Task, "device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(stress, "ITEMS", {str(i): lambda device, seconds: asked.append(seconds) for i in range(5)})
    for minutes in (8.0, 1.0):
        for _, item in steps.stressed(task("stress", rehearse="", minutes=minutes)):
            item()
    assert asked == [90.0] * 5 + [12.0] * 5


def test_a_rehearsal_of_the_race_predicts_every_case_once(task: Callable[..., Task]) -> None:
    """And keeps nothing that it runs in small."""
    job = task("race", suites=["short", "stacked"])
    list(steps.raced(job))
    found = entries(job)
    assert [one.case for one in found] == steps.suites.cases(["short", "stacked"], ["fp16"])
    assert {(one.arm, one.skipped) for one in found} == {("persistrnn", "not measured: a rehearsal without a GPU")}
    assert all(one.predicted > one.floor > 0 for one in found)
    list(steps.raced(task("race", done=frozenset(f"race: {one.case.key}, persistrnn" for one in found))))
    assert len(entries(job)) == len(found)


@pytest.mark.interpreter
def test_a_race_checks_before_it_times(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """A right arm has a check and a time, an arm that does not run the reason, and a wrong one is red and has none."""
    job = task("race", rehearse="")
    monkeypatch.setattr(Task, "device", property(lambda self: torch.device("cpu")))
    (case,) = steps.suites.miniatures([smoke.SMOKE[0].case])
    monkeypatch.setattr(Race, "time", lambda self, arm, runner: timing(self.case, arm))
    worker.work(job, list(steps.contest(job, [case], ("persistrnn", "xma"))))
    check, ours, theirs = entries(job)
    assert isinstance(check, Check)
    assert check.ok
    assert ours == timing(case)
    assert theirs.skipped == "XMA is not installed"
    wrong(monkeypatch)
    worker.work(job, list(steps.contest(job, [case], ("persistrnn",))))
    check, skipped, outcome = entries(job)[3:]
    assert not check.ok
    assert skipped.skipped.startswith("wrong: y has error")
    assert (outcome.name, outcome.ok) == (f"race: {case.key}, persistrnn", False)


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = launch.forward

    def off(*arguments: Any, **options: Any) -> Kept:
        kept = forward(*arguments, **options)
        kept.states[0][:, 1:-1] *= 1.5
        return kept

    monkeypatch.setattr(launch, "forward", off)


@pytest.mark.interpreter
def test_a_red_case_and_its_causes(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch)
    job = task("smoke", done=frozenset(f"smoke: {one.name}" for one in smoke.SMOKE if one is not CASE))
    worker.work(job, list(steps.smoked(job)))
    (red,) = entries(job)
    assert not red.ok
    assert red.message.startswith("AssertionError: y has error ")
    causes = task("causes", red=CASE.name)
    assert [name for name, _ in steps.causes(causes)] == [f"{CASE.name}: {name}" for name in smoke.VARIANTS]


@pytest.mark.interpreter
def test_a_rehearsal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """For real, every step in its own process: what was green is not run again, and the file says what it is."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))  # else in the checkout
    path = tmp_path / "results.json"
    unknown = dict.fromkeys(("device", "driver", "torch", "triton", "commit"), "unknown")
    before = empty(rehearsal=True, **unknown)
    for one in smoke.SMOKE[1:]:
        before.add(Stress(f"smoke: {one.name}", True, 0.0, "before"))
    before.save(path)
    assert gpu.main(["machine", "smoke", "--rehearse", "h200", "--output", str(path)]) == 0
    found = load(path)
    assert found.provenance.rehearsal
    assert found.timings == found.micro == []
    fresh = [one.name for one in found.stress if one.message != "before"]
    assert fresh == [f"machine: {n}" for n in ("facts", "plain launch", "cooperative launch", "pinned memory")] + [
        f"smoke: {smoke.SMOKE[0].name}"
    ]
    assert all(one.ok for one in found.stress)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert "smoke: 16 of 16 ok" in capfd.readouterr().out
