"""``profile``: measure, predict, and write the report."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..options import check_flag
from . import predicted
from .measure import OPTIMIZERS, measure, on, precision
from .progress import Bar
from .record import Profile, Settings
from .subject import OURS, TORCH, Build, Sizes, SubjectError, of_callable, on_ours, on_torch

Compare = Literal["torch", "persistrnn"]
COMPARISONS = ("torch", "persistrnn")


def profile(
    subject: Callable[[int], tuple[Any, ...]] | Sizes,
    steps: Sequence[int],
    *,
    compare: Compare | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    device_model: str | None = None,
    optimizer: str = "adam",
    iterations: int | None = None,
    warmup: int | None = None,
    seconds: float = 20.0,
    title: str = "",
    progress: bool = True,
) -> Profile:
    """Measure where the time and the memory of training go, for several lengths of the sequence.

    One iteration is forward, loss, backward and the optimizer's step. The loss is the model's output where that is a
    scalar, else the mean square of its first tensor that has a gradient.

    Args:
        subject: called with the number of steps T, it returns ``(module, batch)`` for a forward of ``module(batch)``,
            or ``(module, args, kwargs)``; some layer in it is an LSTM or GRU of persistrnn or torch.nn. Or ``Sizes``.
        steps: the values of T, at least 1 each, none twice
        compare: run the same with torch.nn's layers in place of ours ("torch"), or with ours in place of torch.nn's
            ("persistrnn")
        output: a folder for the page, the tables, the numbers and the Chrome traces; made if it is not there. It needs
            matplotlib
        device: "cuda", "cuda:1" or "cpu"; None: that of ``Sizes``, else a GPU where there is one
        device_model: plan for a device that need not be there ("h200", see `persistrnn plan`); None: for that at hand
        optimizer: "adam", "adamw", "sgd" or "none"
        iterations, warmup: at each T, 1 at the least; None: 10 and 3 on a GPU, 3 and 1 on a CPU
        seconds: after so many no further iteration is begun, but for two
        title: of the report; "" for one that follows from the subject
        progress: show a bar (needs tqdm)

    Returns:
        What was measured and predicted. A T that does not fit the memory has a point that says so.

    Raises:
        SubjectError (a ValueError): the subject cannot be run as asked, with the reason and the remedy
        ValueError: an argument out of range
        MissingMatplotlib, MissingTqdm: one of them is not installed, and needed
        OSError: the report cannot be written; see ``report.folder``
    """
    if not isinstance(subject, Sizes) and not callable(subject):
        raise SubjectError(
            f"the subject is of type {type(subject).__name__}, allowed: a callable, called with the number of steps, "
            "or Sizes"
        )
    for name, given, allowed in (("compare", compare, [None, *COMPARISONS]), ("optimizer", optimizer, [*OPTIMIZERS])):
        if given not in allowed:
            raise ValueError(f"{name} is {given!r}, allowed: {', '.join(map(str, allowed))}")
    if not isinstance(title, str):
        raise ValueError(f"title is {title!r}, allowed: a str")
    if not isinstance(output, (str, Path, type(None))):
        raise ValueError(f"output is {output!r}, allowed: a folder's name, a str or a Path, or None")
    check_flag("progress", progress)
    check_steps(steps)
    predicted.check_device(device_model)
    if isinstance(subject, Sizes):
        subject.check()
    where = _where(subject, device)
    counts = counted(where, iterations, warmup)
    for name, value in zip(("iterations", "warmup"), counts, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, allowed: an int, at least 1")
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}, allowed: a finite number, at least 0")
    if output is not None:
        from . import drawing, report  # only here: they need jinja2 and matplotlib

        drawing.check()
        folder = report.folder(output)
    arms = _arms(subject, compare, where)
    bar = Bar(len(arms), steps, 2 + sum(counts)) if progress else None  # 2: built, and profiled
    told = bar or (lambda arm, steps, what: None)
    dtype = subject.dtype if isinstance(subject, Sizes) else ""
    name = str(subject) if isinstance(subject, Sizes) else getattr(subject, "__name__", "a model")
    # Traces go to the folder with the rest: a run that is killed leaves nothing there that the next one would not know.
    with precision(dtype), tempfile.TemporaryDirectory() as traces, contextlib.ExitStack() as stack:
        if bar is not None:
            stack.callback(bar.close)
        settings = Settings(optimizer, *counts, seconds)
        keep = None if output is None else Path(traces)
        found = measure(title or name, arms, steps, where, settings, keep, told)
        with on(where):  # the plan is for the current GPU
            predicted.add(found, device_model)
        if output is not None:
            told(found.arms[-1], max(steps), "write the report")
            report.write(found, folder, Path(traces))
        if bar is not None:
            bar.finish()
    return found


def device_problem(device: str) -> str:
    """What is wrong with the name of a device, and what is allowed; empty for one that is here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        return "allowed: cpu, cuda or cuda:N"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        return f"and torch sees {count} GPUs here; allowed: one of them, or cpu"
    return ""


def _where(subject: Callable[[int], tuple[Any, ...]] | Sizes, device: str | None) -> str:
    """The device to run on. Raises ValueError for one that cannot be, or that differs from the sizes' own."""
    own = subject.device if isinstance(subject, Sizes) else None
    if own is not None and device not in (None, own):
        raise ValueError(f"device is {device!r}, and that of the sizes {own!r}; allowed: the same, or None")
    where = own if device is None else device
    where = ("cuda" if torch.cuda.is_available() else "cpu") if where is None else where
    if problem := device_problem(where):
        raise ValueError(f"device is {where!r}, {problem}")
    return where


def counted(device: str, iterations: int | None, warmup: int | None) -> tuple[int, int]:
    """Both, or what stands for None on that device."""
    defaults = (10, 3) if torch.device(device).type == "cuda" else (3, 1)
    return defaults[0] if iterations is None else iterations, defaults[1] if warmup is None else warmup


def check_steps(steps: Sequence[int]) -> None:
    listed = isinstance(steps, Sequence) and not isinstance(steps, (str, bytes))
    whole = listed and steps and all(type(count) is int and count >= 1 for count in steps)
    if not whole or len(set(steps)) < len(steps):
        raise ValueError(f"steps is {steps!r}, allowed: a list of ints of at least 1, one or more, none twice")


def _arms(subject: Callable[[int], tuple[Any, ...]] | Sizes, compare: Compare | None, device: str) -> dict[str, Build]:
    if isinstance(subject, Sizes):
        if compare == "persistrnn":
            raise SubjectError(
                "compare is 'persistrnn', allowed for sizes: 'torch'; the sizes are of persistrnn's layers"
            )
        return {OURS: subject} | ({TORCH: on_torch(subject)} if compare else {})
    build = of_callable(subject, device)
    if compare is None:
        return {"as given": build}
    return {OURS: build, TORCH: on_torch(build)} if compare == "torch" else {OURS: on_ours(build), TORCH: build}
