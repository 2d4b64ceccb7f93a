"""One arm on one case: checked, then timed. The engine of the suites; what it returns goes into the results file."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from bench.race import arithmetic, arms, timing
from bench.race.arms import DTYPES, Runner
from bench.race.correctness import Truth
from bench.report.results import Arm, Case, Check, Timing
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner.hardware import INTERPRETER, Hardware
from persistrnn.kernels.planner.pipeline import Pipeline, plan_pipeline
from persistrnn.kernels.planner.plan import Pass, PlanError, plan_layer
from persistrnn.kernels.planner.problem import Problem

ROUNDS = 15
REHEARSED = "not measured: a rehearsal without a GPU"
# torch.nn's dtypes, of which "torch-best" is the fastest.
CANDIDATES = ("fp16", "bf16", "tf32")

# Times rounds of calls: (call, rounds, calls per round) -> seconds per call of each round.
Timer = Callable[[Callable[[], object], int, int], list[float]]


def skipped(case: Case, arm: Arm, reason: str, device: torch.device | Hardware) -> Timing:
    """No number, and why; the prediction stands."""
    predicted, floor, plan = expectation(case, device)
    return Timing(case, arm, reason, case.dtype, 0.0, 0.0, 0.0, 0, 0, 0.0, predicted, floor, plan, "")


def expectation(case: Case, device: torch.device | Hardware) -> tuple[float, float, str]:
    """The plan's prediction and floor in microseconds per step of the whole stack, and the plan in a line; zeros and
    the reason where there is no plan. A backward cannot beat the forward's floor."""
    hardware = device if isinstance(device, Hardware) else launch.hardware(device)
    shape = CELLS[case.cell]
    try:
        directions = 2 if case.bidirectional else 1
        found = plan_layer(Problem(shape, case.hidden, case.batch, directions, case.dtype, hardware))
    except PlanError as error:
        return 0.0, 0.0, str(error)
    passes, times, how = [found.forward, found.backward], float(case.layers), ""
    together, training = _pipeline(case, hardware), case.mode == "training"
    if together is not None and together.faster(case.steps, training):
        # All layers are at work at the same time: no step is shorter than that of one.
        passes, times, how = [together.forward, together.backward], 1.0, f"pipeline of {case.layers} layers: "
    passes = passes if training else passes[:1]
    predicted = times * sum(part.predicted for part in passes)
    if how and together is not None:
        predicted = together.microseconds(case.steps, training) / case.steps
    return predicted, times * found.floor * len(passes), how + "; ".join(map(words, passes))


def _pipeline(case: Case, hardware: Hardware) -> Pipeline | None:
    if case.layers == 1 or case.bidirectional or hardware is INTERPRETER:
        return None
    return plan_pipeline(Problem(CELLS[case.cell], case.hidden, case.batch, 1, case.dtype, hardware), case.layers)


def words(part: Pass) -> str:
    """A pass in a line: slices x units, R blocks of K, batch tile x tiles per program, parts of K, groups, rounds."""
    t = part.tiling
    return (
        f"{t.slices}x{t.units} R={t.k_parts} BB={t.batch_tile}x{t.subtiles} P={t.splits} groups={part.groups} "
        f"rounds={part.rounds} resident={part.shares.resident:.0%}"
    )


class Race:
    """All arms of one case, on the same numbers."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.truth = Truth(case, device)

    def runner(self, arm: str) -> Runner:
        """Raises Skip where the arm does not run the case."""
        if arm == "torch-best":
            return self._best()
        return arms.ARMS[arm](self.case, self.truth.parameters, self.device)

    def _best(self) -> Runner:
        """torch.nn in the dtype in which it is fastest here."""
        clock, seconds = timing.EventClock(), {}
        for dtype in CANDIDATES:
            runner = arms.torch_nn(self.case, self.truth.parameters, self.device, dtype)
            call = self.call(runner)
            for _ in range(3):
                call()
            seconds[dtype] = statistics.median(timing.seconds_of(call, clock) for _ in range(5))
        return arms.torch_nn(self.case, self.truth.parameters, self.device, min(seconds, key=seconds.__getitem__))

    def check(self, arm: Arm, runner: Runner) -> Check:
        return self.truth.check(arm, runner)

    def call(self, runner: Runner) -> Callable[[], object]:
        """The work that is timed, on rotated inputs: the forward, or forward and backward to x and all parameters."""
        dtype = DTYPES[runner.dtype]
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0
        n = timing.copies(arithmetic.input_bytes(self.case), cache)
        xs = [self.truth.x.to(dtype, copy=True) for _ in range(n)]
        if self.case.mode == "forward":
            return timing.rotated(_without_gradients(runner), xs)
        dy = self.truth.dy.to(dtype)
        leaves = list(runner.leaves.values())

        def training(x: Tensor) -> object:
            with arms.precision(runner.dtype):
                y = runner.forward(x)
                return torch.autograd.grad(y, [x, *leaves], dy.to(y.dtype))

        return timing.rotated(training, [x.requires_grad_() for x in xs])

    def time(self, arm: Arm, runner: Runner, timer: Timer = timing.seconds_of_rounds) -> Timing:
        """Median and quartiles of a call, and the device memory that it takes."""
        call, clock = self.call(runner), timing.EventClock()
        call()  # compiles
        peak = self._peak(call)
        calls = timing.per_round(min(timing.seconds_of(call, clock) for _ in range(2)))
        seconds = timer(call, ROUNDS if self.device.type == "cuda" else 3, calls)
        low, median, high = statistics.quantiles(seconds, n=4)
        predicted, floor, plan = expectation(self.case, self.device)
        rounds = len(seconds)
        return Timing(
            self.case, arm, "", runner.dtype, median * 1e6, low * 1e6, high * 1e6, rounds, peak,
            arithmetic.operations(self.case) / median / 1e12, predicted, floor, plan, runner.path(),
        )  # fmt: skip

    def _peak(self, call: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _without_gradients(runner: Runner) -> Callable[[Tensor], object]:
    def forward(x: Tensor) -> object:
        with torch.no_grad(), arms.precision(runner.dtype):
            return runner.forward(x)

    return forward
