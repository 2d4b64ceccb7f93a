"""The process of a step: ``python -m bench.gpu.worker FILE``, as `bench.gpu.supervisor` starts it."""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
from pathlib import Path

import torch
import triton

from bench.gpu import journal, smoke
from bench.gpu.steps import STEPS, Item
from bench.report.results import Stress
from persistrnn.kernels import launch

LOST = 70  # exit status of a process that can do nothing more on the device; none of pytest's or Python's


def work(task: journal.Task, items: list[Item]) -> None:
    """All items that are not done, each with its outcome in the journal; none is begun when the time is over."""
    items = [(task.name(name), run) for name, run in items if task.name(name) not in task.done]
    compiled: list[bool] = []  # what was not compiled beforehand
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    for i, (name, run) in enumerate(items):
        left = [name for name, _ in items[i + 1 :]]
        if task.late():
            task.mark("", [name, *left])
            return
        task.mark(name, left)
        start = time.monotonic()
        try:
            message, ok = run(), True
        except Exception as error:  # whatever it is, the other items still have their turn
            where = traceback.extract_tb(error.__traceback__)[-1]
            message, ok = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:2000], False
        message += f" [compiled here: {sum(compiled)}]" if any(compiled) else ""
        compiled.clear()
        if not (ok and name.startswith("race:")):  # of thousands of rows the timings are enough
            task.add(Stress(name, ok, time.monotonic() - start, message))
        print(f"{time.strftime('%H:%M:%S')}   {name}: {'ok' if ok else 'WRONG'}: {message}", flush=True)
        task.mark("", left)
        if not ok and not usable(task.device):
            raise SystemExit(LOST)


def usable(device: torch.device) -> bool:
    """Whether the next item has a chance in this process: after an illegal access, say, every call of CUDA's fails."""
    try:
        smoke.synchronize(device)
    except RuntimeError as error:
        print(f"this process has lost the device: {error}", flush=True)
        return False
    for word in launch._errors.values():
        word.zero_()  # not the next item's fault
    return True


def main() -> None:
    faulthandler.enable()
    task = journal.load(Path(sys.argv[1]))
    items = STEPS[task.step].items
    assert items is not None
    work(task, list(items(task)))


if __name__ == "__main__":
    main()
