"""``persistrnn.profile``: where the time and the memory of training on long sequences go, measured over several T.

One iteration is forward, loss, backward and the optimizer's step. Its time is measured without a profiler (CUDA events,
or the clock of a CPU); where it goes, from one more iteration under torch.profiler.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import trace
from .record import GIB, NO_KERNELS, UNTRACED, Point, Profile, Settings, machine
from .subject import TORCH, Build, Built, Call, SubjectError, calls, shown
from .trace import STAGES, Iteration, Phase

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer] | None] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "none": None,
}
LEAST = 2  # iterations that are timed at any rate
# Operators of a forward, of which a loop over steps has many: more of them make a trace of hundreds of megabytes.
MOST_OPERATORS = 25_000


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products in tf32 for "tf32", in full for "fp32", else as they are set."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
    if dtype in ("tf32", "fp32"):
        rnn.fp32_precision = matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rnn.fp32_precision, matmul.fp32_precision = before  # type: ignore[attr-defined]


def on(device: str) -> contextlib.AbstractContextManager[Any]:
    """With that GPU as the current one; of a CPU there is only one."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else contextlib.nullcontext()


class _Training:
    """A built subject with its optimizer. Called, it runs one iteration."""

    def __init__(self, built: Built, settings: Settings, device: str) -> None:
        self.built = built
        self.cuda = torch.device(device).type == "cuda"
        self.parameters = [p for p in built.module.parameters() if p.requires_grad]
        if not self.parameters:
            raise SubjectError("the model has no parameter that requires a gradient; allowed: a model to train")
        make = OPTIMIZERS[settings.optimizer]
        self.optimizer = None if make is None else make(self.parameters, lr=1e-4)

    def __call__(self) -> None:
        stage = torch.profiler.record_function
        with stage(STAGES["forward"]):
            output = self.built.module(*self.built.args, **self.built.kwargs)
        with stage(STAGES["loss"]):
            loss = _loss(output)
        with stage(STAGES["backward"]):
            loss.backward()
        with stage(STAGES["optimizer"]):
            if self.optimizer is not None:
                self.optimizer.step()
            for parameter in self.parameters:
                parameter.grad = None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def few_operators(self) -> bool:
        """Whether a forward has fewer than MOST_OPERATORS."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.suppress(_TooMany), _Counter():
            self.built.module(*self.built.args, **self.built.kwargs)
            return True
        return False

    def held(self) -> int:
        """Bytes between iterations."""
        if self.cuda:
            return torch.cuda.memory_allocated()
        module, states = self.built.module, self.optimizer.state.values() if self.optimizer else ()
        every = [*module.parameters(), *module.buffers()]
        every += _tensors([self.built.args, self.built.kwargs, *map(dict, states)])
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in every}
        return sum(storage.nbytes() for storage in storages.values())


class _TooMany(Exception):
    pass


class _Counter(TorchDispatchMode):
    """Raises _TooMany at the operator of that number."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen >= MOST_OPERATORS:
            raise _TooMany
        return func(*args, **(kwargs or {}))


def _loss(output: Any) -> Tensor:
    """The output itself if it is a scalar, else the mean square of its first tensor that has a gradient."""
    for tensor in _tensors([output]):
        if tensor.requires_grad and tensor.is_floating_point():
            return tensor if tensor.dim() == 0 else tensor.float().square().mean()
    raise SubjectError("the model's output holds no tensor with a gradient, allowed: a scalar loss, or a tensor")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "out of memory")
    raised = isinstance(error, RuntimeError) and any(some in str(error).lower() for some in words)
    return raised or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def measure(
    subject: str,
    arms: Mapping[str, Build],
    steps: Sequence[int],
    device: str,
    settings: Settings,
    traces: Path | None = None,
    progress: Callable[[str, int, str], None] = lambda arm, steps, what: None,
) -> Profile:
    """Run every arm at every T, the shortest first. subject: what is run, in words; traces: a folder for the Chrome
    trace of each arm at its longest T; progress: called before each iteration with (arm, T, what comes).

    Raises:
        SubjectError: an arm cannot be built or trained. Where memory does not suffice, the point says so and the rest
            goes on.
    """
    found = Profile(subject, machine(device), settings, [])
    for count, (arm, build) in itertools.product(sorted(steps), arms.items()):
        most = found.longest(arm)
        if found.machine.kind == "cpu" and 0 < most < count:
            # A process that takes too much is killed there, and says nothing.
            gib = found.machine.memory / GIB
            point = Point(arm, count, f"not run: it would need more than this machine's {gib:.1f} GiB (extrapolated)")
        else:
            keep = None if traces is None else traces / trace_name(arm)
            each = functools.partial(progress, arm, count)
            try:
                with on(device):
                    point = _point(arm, build, count, device, settings, not found.of(arm), keep, each)
            except SubjectError:
                raise
            except Exception as error:
                if not _out_of_memory(error):
                    raise SubjectError(f"{arm} failed at T = {count}: {shown(error)}") from error
                point = Point(arm, count, "out of memory")
        found.points.append(point)
    found.points.sort(key=lambda point: list(arms).index(point.arm))
    return found


def trace_name(arm: str) -> str:
    return "trace-torch.json" if arm == TORCH else "trace.json"


def _point(
    arm: str, build: Build, steps: int, device: str, settings: Settings, first: bool, keep: Path | None,
    progress: Callable[[str], None],
) -> Point:  # fmt: skip
    """One arm at one T; first: of this arm. keep: a file for its trace."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    progress("build")
    training = _Training(build(steps), settings, device)
    # The profiled iteration warms up as well, but for the very first ones of an arm, which compile. One is before it at
    # any T: where the optimizer's state and oneDNN's primitives are made is no iteration as the others are.
    for _ in range(max(settings.warmup - (not first), 1)):
        progress("warm-up")
        training()
    few = training.cuda or training.few_operators()
    progress("profile" if few else "warm-up")
    iteration = None
    with calls(training.built.module) as called:
        if few:
            iteration = _traced(training, keep)
        else:
            training()
    if not called:
        raise SubjectError(
            "the model calls no recurrent layer; allowed: one with LSTM or GRU of persistrnn or torch.nn"
        )
    if training.cuda:
        torch.cuda.reset_peak_memory_stats()
    point = Point(arm, steps, held=training.held(), calls=called, untraced=untraced(iteration, training.cuda))
    point.tokens = max(call.steps * call.batch for call in called)
    times = _timed(training, settings, progress)
    point.iterations = len(times)
    point.low, point.seconds, point.high = statistics.quantiles(times, n=4, method="inclusive")
    if iteration is not None and not point.untraced:
        point.peak, point.profiled, point.spans = iteration.peak, iteration.seconds, iteration.spans
        point.phases = _scaled(iteration, point.seconds, called)
    if training.cuda:
        point.peak = torch.cuda.max_memory_allocated() - point.held
    return point


def untraced(iteration: Iteration | None, cuda: bool) -> str:
    """Why there are no phases; empty if there are."""
    if iteration is None:
        return UNTRACED
    # Without kernels its times are those of the host, which launches them.
    return NO_KERNELS if cuda and not iteration.device else ""


def _traced(training: _Training, keep: Path | None) -> Iteration:
    """One iteration under the profiler; keep: a file for its trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if training.cuda else []
    training.synchronize()
    # What the profiler logs about itself would tear the progress bar; it reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Memory's events are many; on a GPU the allocator has the statistics.
    options: dict[str, Any] = {"record_shapes": True, "profile_memory": not training.cuda}
    with (
        torch.profiler.profile(activities=activities, **options) as profiler,
        torch.profiler.record_function(trace.ITERATION),
    ):
        training()
        training.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with open(path, encoding="utf-8", errors="replace") as file:
            return trace.read(json.load(file))


def _timed(training: _Training, settings: Settings, progress: Callable[[str], None]) -> list[float]:
    """Seconds of each of several iterations, one behind the other."""
    begin = time.perf_counter()
    marks: list[Any] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if training.cuda else time.perf_counter())
        if training.cuda:
            marks[-1].record()

    training.synchronize()
    mark()
    for n in range(max(settings.iterations, LEAST)):
        if n >= LEAST and time.perf_counter() - begin > settings.seconds:
            break
        progress(f"iteration {n + 1}")
        training()
        mark()
    training.synchronize()
    return [a.elapsed_time(b) / 1e3 if training.cuda else b - a for a, b in itertools.pairwise(marks)]


def _scaled(iteration: Iteration, seconds: float, called: Sequence[Call]) -> dict[str, Phase]:
    """The phases of an iteration that takes so many seconds where nobody watches, with the work that is known from the
    layers' sizes: that of scans, which are no matrix products, and of torch's layers."""
    busy = math.fsum(phase.seconds for phase in iteration.phases.values())
    scale = 1.0 if iteration.device else seconds / busy
    result = {name: replace(phase, seconds=phase.seconds * scale) for name, phase in iteration.phases.items()}
    ours = [call for call in called if call.path == "persistent"]
    torchs = [call for call in called if call.path != "persistent"]
    # In a pipeline the inputs of the upper layers are multiplied within the scan.
    scans = sum(call.flops for call in ours) - iteration.of_inputs
    theirs = sum(call.flops for call in torchs)
    again = scans * any(call.save == "checkpoint" for call in ours)
    again += sum(call.flops for call in torchs if call.save != "gates")
    work = {
        trace.SCAN_FORWARD: (scans, sum(call.scan_bytes(False) for call in ours)),
        trace.SCAN_BACKWARD: (scans, sum(call.scan_bytes(True) for call in ours)),
        trace.TORCH_FORWARD: (theirs, 0.0),
        trace.TORCH_BACKWARD: (2 * theirs, 0.0),
        trace.RECOMPUTE: (again, 0.0),
    }
    for name in work.keys() & result.keys():
        result[name].flops += work[name][0]
        result[name].bytes += work[name][1]
    if trace.RECOMPUTE in result and any(call.save == "auto" for call in called):
        result[trace.RECOMPUTE].flops = 0.0  # which mode it took is not known here
    if iteration.device and busy < seconds:
        result[trace.IDLE] = Phase(seconds - busy)
    return result
