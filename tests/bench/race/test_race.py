"""The race: a wrong arm is caught whatever is wrong with it, all arms do the same work, and times are what they say."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import persistrnn
from bench.race import arms, correctness, timing
from bench.race import engine as race
from bench.race.arms import ARMS, DTYPES, Runner, Skip
from bench.race.correctness import Truth
from bench.race.engine import Race
from bench.report.results import MODES, Case
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner.hardware import INTERPRETER, named
from persistrnn.kernels.planner.pipeline import plan_pipeline
from persistrnn.kernels.planner.problem import Problem
from persistrnn.kernels.tensors import Gradients

CPU = torch.device("cpu")
CASE = Case("suite", "name", "lstm", 5, 4, 1, False, 3, 6, "fp32", "training")
# (cell, input, layers, bidirectional): 0 leaves the input's product out.
SHAPES = [(cell, *shape) for cell in ("lstm", "gru") for shape in [(5, 1, False), (5, 2, True), (0, 1, False)]]


def case(shape: tuple[str, int, int, bool], **changes: object) -> Case:
    cell, input, layers, bidirectional = shape
    return replace(CASE, **({"cell": cell, "input": input, "layers": layers, "bidirectional": bidirectional} | changes))


@functools.cache
def truth(of: Case) -> Truth:
    return Truth(of, CPU)


def right(of: Case, parameters: dict[str, Tensor] | None = None) -> Runner:
    """A correct arm of plain torch, without the input's product too."""
    parameters = truth(of).parameters if parameters is None else parameters
    if of.input:
        return arms.torch_nn(of, parameters, CPU)
    dtype = DTYPES[of.dtype]
    leaves = {n: parameters[f"{n}_l0"].to(dtype, copy=True).requires_grad_() for n in ("weight_hh", "bias_hh")}
    h0 = torch.zeros(1, of.batch, of.hidden, dtype=dtype)

    def forward(x: Tensor) -> Tensor:
        states, weights = [h0] * CELLS[of.cell].states, [v[None] for v in leaves.values()]
        return persistrnn.reference.recurrent(of.cell, x.unsqueeze(2), *weights, states).y

    return Runner(forward, leaves, of.dtype, lambda: "plain")


def hooked(of: Case, name: str, change: Callable[[Tensor], Tensor]) -> Runner:
    """A correct arm, but for one output or gradient."""
    runner = right(of)
    if name.startswith("d ") and name != "d x":
        runner.leaves[name[2:]].register_hook(change)
        return runner

    def forward(x: Tensor) -> Tensor:
        if name == "d x" and x.requires_grad:
            x = x * 1
            x.register_hook(change)
        y = runner.forward(x)
        return change(y) if name == "y" else y

    return replace(runner, forward=forward)


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor * factor


# Right and wrong


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_right_arm_is_ok(shape: tuple[str, int, int, bool], dtype: str, mode: str) -> None:
    of = case(shape, dtype=dtype, mode=mode)
    check = truth(of).check("torch", right(of))
    assert check.ok, check.message
    assert (check.case, check.arm, check.message) == (of, "torch", "")
    assert 0 <= check.error <= 1


@pytest.mark.parametrize(("dtype", "factor"), [("fp32", 1.0001), ("tf32", 1.02), ("fp16", 1.02), ("bf16", 1.1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_output_and_gradient_alone_is_looked_at(
    shape: tuple[str, int, int, bool], dtype: str, factor: float
) -> None:
    of = case(shape, dtype=dtype)
    for name in truth(of).true:
        check = truth(of).check("torch", hooked(of, name, scaled(factor)))
        assert not check.ok, name
        assert f"{name} has error" in check.message
        assert len(check.message.split(";")) == 1 or name == "y"
        assert 1 < check.error < 1e9


def test_what_is_compared() -> None:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    layers = [f"{n}_l{i}{d}" for i in range(2) for d in ("", "_reverse") for n in names]
    assert list(truth(case(("gru", 5, 2, True))).true) == ["y", "d x", *(f"d {name}" for name in layers)]
    assert list(truth(case(("gru", 0, 1, False))).true) == ["y", "d x", "d weight_hh", "d bias_hh"]
    assert list(truth(case(("gru", 0, 1, False), mode="forward")).true) == ["y"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bound(shape: tuple[str, int, int, bool]) -> None:
    """1.5 times the witness's error, and 16 roundings: just below and just above."""
    of = case(shape)
    made = truth(of)
    for name in made.true:
        witness = float((made.witness[name] - made.true[name]).norm() / made.true[name].norm())
        allowed = 1.5 * witness + 16 * 2**-24
        wrong = made.true[name] * (1 + 0.99 * allowed)
        assert made._compare(name, wrong, 16 * 2**-24) == (pytest.approx(0.99), "")
        ratio, message = made._compare(name, made.true[name] * (1 + 1.01 * allowed), 16 * 2**-24)
        assert ratio == pytest.approx(1.01)
        assert f"allowed {allowed:.2e}" in message


@pytest.mark.parametrize("name", ["d bias_ih_l0", "d bias_hh_l1_reverse"])
def test_a_bias_without_a_gradient(name: str) -> None:
    """Zeros are wrong, and so is none at all."""
    of = case(("lstm", 5, 2, True))
    assert f"{name} has error 1.00" in truth(of).check("torch", hooked(of, name, torch.zeros_like)).message
    module = torch.nn.LSTM(of.input, of.hidden, of.layers, bidirectional=True)
    module.load_state_dict(truth(of).parameters)
    leaves = dict(module.named_parameters())
    used = leaves | {name[2:]: leaves[name[2:]].detach()}
    runner = Runner(lambda x: torch.func.functional_call(module, used, (x,))[0], leaves, of.dtype, str)
    check = truth(of).check("torch", runner)
    assert (check.ok, check.message, check.error) == (False, f"{name} is missing", 1e9)


def swapped(tensor: Tensor, gates: int) -> Tensor:
    first, second, *others = tensor.chunk(gates)
    return torch.cat([second, first, *others])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swapped_gates(shape: tuple[str, int, int, bool]) -> None:
    of = case(shape)
    gates = CELLS[of.cell].gates
    swap = functools.partial(swapped, gates=gates)
    check = truth(of).check("torch", right(of, {n: swap(p) for n, p in truth(of).parameters.items()}))
    assert not check.ok
    assert "y has error" in check.message
    for name in list(truth(of).true)[2:]:
        check = truth(of).check("torch", hooked(of, name, swap))
        assert not check.ok
        assert check.message.startswith(f"{name} has error"), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["y", "d x", "d weight_hh_l0"])
def test_nan_is_not_ok(name: str, value: float) -> None:
    """One is enough; the error stays a number that a results file can hold."""

    def spoil(tensor: Tensor) -> Tensor:
        spoiled = tensor.clone()
        spoiled.view(-1)[3] = value
        return spoiled

    check = truth(CASE).check("torch", hooked(CASE, name, spoil))
    assert not check.ok
    assert f"{name} has error" in check.message
    assert check.error == 1e9


@pytest.mark.parametrize("input", [0, 5])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_is_exactly_0_must_be(cell: str, input: int) -> None:
    """After one step from a state of zeros W_hh has no gradient."""
    of = case((cell, input, 1, False), steps=1)
    name = "d weight_hh_l0" if input else "d weight_hh"
    assert not truth(of).true[name].any()
    assert truth(of).check("torch", right(of)).ok
    for small in (1e-30, math.nan):
        check = truth(of).check("torch", hooked(of, name, lambda g, small=small: g + small))
        assert (check.ok, check.message) == (False, f"{name} is not 0")


def test_another_shape_is_wrong() -> None:
    """Not broadcast."""
    of = replace(CASE, mode="forward")
    check = truth(of).check("torch", hooked(of, "y", lambda y: y[:, :1]))
    assert (check.ok, check.message) == (False, "y has shape [6, 1, 4], allowed [6, 3, 4]")


def test_another_dtype_is_held_to_the_coarser() -> None:
    """torch-best: bfloat16 in a case of float32 is as exact as bfloat16 must be, and no more."""
    for dtype, other in itertools.product(DTYPES, DTYPES):
        of = replace(CASE, dtype=dtype)
        check = truth(of).check("torch-best", arms.torch_nn(of, truth(of).parameters, CPU, other))
        assert check.ok, (dtype, other, check.message)
    of = replace(CASE, dtype="fp32")
    runner = replace(arms.torch_nn(of, truth(of).parameters, CPU, "fp16"), dtype="fp32")
    assert not truth(of).check("torch-best", replace(runner, forward=lambda x: runner.forward(x.half()))).ok


def test_a_check_leaves_the_truth_alone() -> None:
    of = replace(CASE, dtype="fp16")
    made = Truth(of, CPU)
    x = made.x.clone()
    made.check("torch", right(of))
    assert torch.equal(made.x, x)
    assert not made.x.requires_grad


# The same work


def test_parameters_and_inputs_are_the_same_in_every_dtype() -> None:
    """The same seed's, rounded; whoever draws numbers in between."""
    one = Truth(replace(CASE, dtype="fp16"), CPU)
    torch.rand(7)
    other = Truth(CASE, CPU)
    for name, p in other.parameters.items():
        assert torch.equal(one.parameters[name], p.half().float())
    assert torch.equal(one.x, other.x.half())
    assert torch.equal(one.dy, other.dy.half())
    assert not torch.equal(other.x[0], other.x[1])


def test_the_reference_without_input_product() -> None:
    """torch.nn with an identity is the recurrence itself, which is written down elsewhere."""
    for cell in ("lstm", "gru"):
        of = case((cell, 0, 1, False))
        for name, found in correctness.run(right(of), of, truth(of).x, truth(of).dy).items():
            torch.testing.assert_close(found.double(), truth(of).true[name], rtol=1e-4, atol=1e-6)


def test_precision_is_restored() -> None:
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision
    with arms.precision("tf32"):
        assert rnn.fp32_precision == matmul.fp32_precision == "tf32"
        with arms.precision("bf16"):
            assert rnn.fp32_precision == matmul.fp32_precision == "ieee"
        assert rnn.fp32_precision == matmul.fp32_precision == "tf32"
    with pytest.raises(ZeroDivisionError), arms.precision("tf32"):
        raise ZeroDivisionError
    assert (rnn.fp32_precision, matmul.fp32_precision) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_timed_call_does_all_the_work(mode: str, dtype: str) -> None:
    """In the arm's dtype and precision, with gradients of the input and every parameter when it trains."""
    of = replace(CASE, dtype=dtype, mode=mode)
    contest = Race(of, CPU)
    runner = contest.runner("torch")
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append((x.dtype, x.shape, torch.is_grad_enabled(), torch.backends.cudnn.rnn.fp32_precision))
        return runner.forward(x)

    found = contest.call(replace(runner, forward=forward))()
    asked = "tf32" if dtype == "tf32" else "ieee"
    assert seen == [(DTYPES[dtype], (6, 3, 5), mode == "training", asked)]
    if mode == "forward":
        assert isinstance(found, Tensor)
        return
    expected = correctness.run(runner, of, contest.truth.x, contest.truth.dy)
    for gradient, right in zip(found, list(expected.values())[1:], strict=True):
        assert torch.equal(gradient, right)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_our_kernels(shape: tuple[str, int, int, bool]) -> None:
    """Right, on our kernels, with gradients to the tensors that the others have, in their order."""
    of = case(shape, dtype="fp16")
    before = launch.LAUNCHES.copy()
    contest = Race(of, CPU)
    runner = contest.runner("persistrnn")
    check = contest.check("persistrnn", runner)
    assert check.ok, check.message
    assert (launch.LAUNCHES - before).total() >= 2, "a forward and a backward of the kernels"
    assert runner.path() == "persistent"
    others = right(of).leaves
    assert list(runner.leaves) == list(others)
    for name, leaf in runner.leaves.items():
        assert leaf.requires_grad
        assert torch.equal(leaf, others[name].to(leaf.dtype)), name


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_our_kernels_if_they_were_wrong(shape: tuple[str, int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    of, backward = case(shape, dtype="bf16"), launch.backward

    def wrong(*arguments: object) -> Gradients:
        found = backward(*arguments)
        found.dx_gates.mul_(1.2)
        return found

    monkeypatch.setattr(launch, "backward", wrong)
    check = truth(of).check("persistrnn", ARMS["persistrnn"](of, truth(of).parameters, CPU))
    assert not check.ok
    assert "d x has error" in check.message
    assert "y has" not in check.message


def test_ours_never_takes_torchs_path() -> None:
    """Without a GPU and without the interpreter it is an error."""
    runner = ARMS["persistrnn"](CASE, truth(CASE).parameters, CPU)
    with pytest.raises(RuntimeError, match="need a GPU"):
        truth(CASE).check("persistrnn", runner)


# One arm on one case


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Median and quartiles over the rounds, and what follows from the median."""
    asked: list[tuple[int, int]] = []

    def timer(call: Callable[[], object], rounds: int, calls: int) -> list[float]:
        call()
        asked.append((rounds, calls))
        return [5e-6, 1e-6, 4e-6, 2e-6, 3e-6, 6e-6, 7e-6]

    monkeypatch.setattr(timing, "seconds_of", lambda call, clock: 5e-4)
    contest = Race(CASE, CPU)
    found = contest.time("torch", contest.runner("torch"), timer)
    assert asked == [(3, 4)]
    assert (found.case, found.arm, found.skipped, found.dtype, found.path) == (CASE, "torch", "", "fp32", "torch")
    assert (found.low, found.microseconds, found.high) == pytest.approx((2.0, 4.0, 6.0))
    assert (found.rounds, found.peak) == (7, 0)
    # 3 * 2 * 16 * (4 + 5) * 3 * 6 operations in 4 us.
    assert found.tflops == pytest.approx(15552 / 4e-6 / 1e12)
    assert (found.predicted, found.floor, found.plan) == race.expectation(CASE, CPU)


@pytest.mark.parametrize("fastest", race.CANDIDATES)
def test_torch_best_is_the_fastest(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the median: one slow or fast call decides nothing."""
    luck: Iterator[float] = itertools.cycle([9.0, 1.0, 1.0, 1.0, 0.0])

    def seconds_of(call: functools.partial[None], clock: object) -> float:
        (dtype,) = call.args
        return (1.0 if dtype == fastest else 2.0) * next(luck)

    monkeypatch.setattr(Race, "call", lambda self, runner: functools.partial(lambda dtype: None, runner.dtype))
    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    runner = Race(CASE, CPU).runner("torch-best")
    assert runner.dtype == fastest
    assert {leaf.dtype for leaf in runner.leaves.values()} == {DTYPES[fastest]}


def test_what_an_arm_does_not_run() -> None:
    bare = case(("lstm", 0, 1, False))
    for name, of, reason in [
        ("torch", bare, "torch.nn cannot leave the input's product out"),
        ("torch-best", bare, "torch.nn cannot leave the input's product out"),
        ("persistrnn", replace(bare, layers=2), "one layer of one direction"),
        ("persistrnn", replace(bare, bidirectional=True), "one layer of one direction"),
    ]:
        contest = object.__new__(Race)
        contest.case, contest.device, contest.truth = of, CPU, truth(bare)
        with pytest.raises(Skip, match=reason):
            contest.runner(name)


def test_expectation() -> None:
    """Of the whole stack: both passes when it trains, every layer."""
    hardware = named("h200")
    forward = replace(CASE, hidden=512, input=512, mode="forward", dtype="bf16", bidirectional=True)
    predicted, floor, plan = race.expectation(forward, hardware)
    assert 0 < floor < predicted
    assert "rounds=1" in plan
    both, twice, passes = race.expectation(replace(forward, mode="training"), hardware)
    assert both > predicted
    assert twice == 2 * floor
    assert passes.startswith(plan + "; ")
    assert race.expectation(replace(forward, layers=3), hardware)[:2] == pytest.approx((3 * predicted, 3 * floor))
    nothing, none, why = race.expectation(replace(forward, hidden=30_000), hardware)
    assert nothing == none == 0
    assert "hidden_size=30000" in why


@pytest.mark.parametrize("mode", MODES)
def test_expectation_of_a_stack_that_runs_at_once(mode: str) -> None:
    """What our layers do with it on a GPU: T + L - 1 steps of all forward, T + 2L - 2 backward, where that is predicted
    to be faster. No step is shorter than the floor of one layer's."""
    hardware, training = named("h200"), mode == "training"
    stack = replace(CASE, hidden=512, input=512, batch=16, layers=4, steps=256, dtype="bf16", mode=mode)
    found = plan_pipeline(Problem(CELLS["lstm"], 512, 16, 1, "bf16", hardware), 4)
    assert found is not None
    assert found.faster(256, training)
    step = (found.forward.predicted * 259 + training * found.backward.predicted * 262) / 256
    floor = race.expectation(replace(stack, layers=1), hardware)[1]
    predicted = race.expectation(stack, hardware)
    assert predicted[:2] == pytest.approx((step, floor))
    assert predicted[2].startswith("pipeline of 4 layers: ")
    assert floor < predicted[0] < sum(found.layered[: 1 + training])
    one_step = race.expectation(replace(stack, steps=1), hardware)
    assert one_step[:2] == pytest.approx((sum(found.layered[: 1 + training]), 4 * floor))
    assert "pipeline" not in race.expectation(stack, INTERPRETER)[2]


# Rows with marks


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("marks", ["lengths", "resets"])
def test_rows_with_marks_are_held_to_torch_nn(cell: str, marks: str) -> None:
    """Their truth is torch.nn's, cut by hand. With the marks persistrnn keeps the bound, without them it does not."""
    of = replace(CASE, cell=cell, marks=marks, batch=5, steps=9)
    found = Truth(of, CPU)
    options = {"bidirectional": False, "backend": "torch"}
    module = arms.OURS[cell](of.input, of.hidden, **options)
    given = {marks: arms.MARKS[marks](of)}
    for marked, ok in ((given, True), ({}, False)):
        runner = arms._module(module, found.parameters, of.dtype, lambda: "", lambda x, m=marked: module(x, **m)[0])
        assert found.check("persistrnn", runner).ok is ok


def test_marks_are_of_several_kinds_of_rows() -> None:
    of = replace(CASE, batch=4, steps=8)
    assert arms.lengths(of).tolist() == [8, 7, 6, 5]
    assert [row.nonzero().flatten().tolist() for row in arms.resets(of).T] == [[4], [2], [4], [2]]
    assert arms.lengths(replace(of, steps=1)).tolist() == [1, 1, 1, 1]


def test_arms_that_have_marks() -> None:
    lengths, resets = (replace(CASE, marks=marks) for marks in ("lengths", "resets"))
    made = Truth(lengths, CPU)
    assert made.check("torch", arms.torch_nn(lengths, made.parameters, CPU)).ok
    with pytest.raises(Skip, match=r"torch\.nn has no resets"):
        arms.torch_nn(resets, made.parameters, CPU)
    for name in ("torchrl", "flashrnn", "xma"):
        with pytest.raises(Skip, match=r"lengths are raced against torch\.nn only"):
            ARMS[name](lengths, made.parameters, CPU)
