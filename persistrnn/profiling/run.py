"""``profile``: measure, predict, and write the report."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .. import decide
from ..options import check_count, check_flag, check_name
from . import predicted
from .measure import LEAST, OPTIMIZERS, measure, on
from .page import needs
from .record import Profile, Settings
from .subject import OURS, TORCH, Build, Sizes, SubjectError, of_callable, on_ours, on_torch

Compare = Literal["torch", "persistrnn"]
COMPARISONS = get_args(Compare)


def profile(
    subject: Callable[[int], tuple[Any, ...]],
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
            or ``(module, args, kwargs)``; some layer in it is an LSTM or GRU of persistrnn or torch.nn
        steps: the values of T, at least 1 each, none twice
        compare: run the same with torch.nn's layers in place of ours ("torch"), or with ours in place of torch.nn's
            ("persistrnn")
        output: a folder for the page, the tables, the numbers and the Chrome traces; made if it is not there. It needs
            matplotlib
        device: "cuda", "cuda:1" or "cpu"; None: a GPU where there is one
        device_model: plan for a device that need not be there ("h200", see `persistrnn plan`); None: for that at hand
        optimizer: "adam", "adamw", "sgd" or "none"
        iterations, warmup: at each T, 1 at the least; None: 10 and 3 on a GPU, 3 and 1 on a CPU
        seconds: after so many no further iteration is begun, but for two
        title: of the report; "" for the subject's name
        progress: show a bar (needs tqdm)

    Returns:
        What was measured and predicted. A T that does not fit the memory has a point that says so.

    Raises:
        SubjectError (a ValueError): the subject cannot be run as asked, with the reason and the remedy
        ValueError, TypeError: an argument out of range, or of another type
        ImportError: matplotlib or tqdm is not installed, and needed
        OSError: the report cannot be written; see ``report.folder``
    """
    if not callable(subject):
        raise SubjectError(
            f"the subject is of type {type(subject).__name__}, allowed: a callable, called with the number of steps"
        )
    if compare is not None:
        check_name("compare", compare, COMPARISONS)
    check_name("optimizer", optimizer, list(OPTIMIZERS))
    check_flag("progress", progress)
    for count in steps if isinstance(steps, Sequence) else ():
        check_count("each of steps", count)
    if not isinstance(steps, Sequence) or not steps or len(set(steps)) < len(steps):
        raise ValueError(f"steps is {steps!r}, allowed: a list of ints of at least 1, one or more, none twice")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}, allowed: a finite number, at least 0")
    if device_model is not None:
        decide.check_device(device_model)
    where = _device(device)
    usual = (10, 3) if where.startswith("cuda") else (3, 1)
    settings = Settings(
        optimizer,
        check_count("iterations", usual[0] if iterations is None else iterations),
        check_count("warmup", usual[1] if warmup is None else warmup),
        seconds,
    )
    if output is not None:
        from . import report  # only here: it needs jinja2 and matplotlib

        needs("matplotlib", "the page")
        folder = report.folder(output)
    arms = _arms(subject, compare, where)
    name = title or (str(subject) if isinstance(subject, Sizes) else getattr(subject, "__name__", "a model"))
    # Traces go to the folder with the rest: a run that is killed leaves nothing there that the next one would not know.
    with tempfile.TemporaryDirectory() as traces, _bar(len(arms), steps, settings, progress) as tell:
        found = measure(name, arms, steps, where, settings, None if output is None else Path(traces), tell)
        with on(where):  # the plan is for the current GPU
            predicted.add(found, device_model)
        if output is not None:
            tell(found.arms[-1], max(steps), "write the report")
            report.write(found, folder, Path(traces))
    return found


def _device(given: str | None) -> str:
    """The device to run on. Raises ValueError for one that is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = ("cuda" if count else "cpu") if given is None else given
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, allowed: cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"device is {name!r}, and torch sees {count} GPUs here; allowed: one of them, or cpu")
    return name


def _arms(subject: Callable[[int], tuple[Any, ...]], compare: Compare | None, device: str) -> dict[str, Build]:
    build = of_callable(subject, device)
    if compare is None:
        return {OURS if isinstance(subject, Sizes) else "as given": build}
    return {OURS: build, TORCH: on_torch(build)} if compare == "torch" else {OURS: on_ours(build), TORCH: build}


@contextlib.contextmanager
def _bar(arms: int, steps: Sequence[int], settings: Settings, shown: bool) -> Iterator[Callable[[str, int, str], None]]:
    """What is to be called before each iteration with (arm, T, what comes). Raises ImportError without tqdm."""
    if not shown:
        yield lambda arm, steps, what: None
        return
    needs("tqdm", "the progress of a profile")
    from tqdm import tqdm

    each = 2 + settings.warmup + max(settings.iterations, LEAST)  # 2: built, and profiled
    quiet = not sys.stderr.isatty()  # a log file gets an update every half minute
    before, now, seen = 0, ("", 0), 0
    with tqdm(
        total=arms * sum(steps) * each,
        mininterval=30 if quiet else 0.2,
        maxinterval=60 if quiet else 10,
        bar_format="{percentage:3.0f}% {bar:20} {elapsed}<{remaining} {desc}",
    ) as drawn:

        def tell(arm: str, steps: int, what: str) -> None:
            nonlocal before, now, seen
            if (arm, steps) != now:
                before, now, seen = before + each * now[1], (arm, steps), 0
            drawn.set_description_str(f"{arm}, T = {steps:,}: {what}", refresh=False)
            drawn.update(before + min(seen, each) * steps - drawn.n)
            seen += 1

        yield tell
        drawn.update(drawn.total - drawn.n)  # all is done, whatever was left out
        drawn.set_description_str("done")
