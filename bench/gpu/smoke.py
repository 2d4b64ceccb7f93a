"""Whether the kernels run on a GPU at all, from the simplest case up; and where one is wrong, what it depends on.

A case is held to the bound of the race (``bench.race.correctness``). The variants of a red one change one thing each:
those that are right say where to look.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.race.engine import Race, expectation
from bench.report.results import Case, Dtype, Mark, Mode
from persistrnn.kernels import launch
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner.plan import Pass
from persistrnn.kernels.tensors import Weights

# Of a variant: half a second of polls, or so. A kernel that waits for nothing shall not take the time of the others.
SPIN_LIMIT = 1 << 20


@dataclass(frozen=True)
class Smoke:
    """One case and the exchange that it runs with. wanted: what its plan must be, on the device that it is made for."""

    name: str
    case: Case
    protocol: str = "counter"
    wanted: str = "several slices"


def _case(cell: str, mode: Mode, hidden: int, batch: int = 16, steps: int = 32, dtype: Dtype = "fp16", layers: int = 1,
          bidirectional: bool = False, marks: Mark = "") -> Case:  # fmt: skip
    return Case("smoke", "", cell, hidden, hidden, layers, bidirectional, batch, steps, dtype, mode, marks)


SMOKE = (
    Smoke("LSTM forward, one slice", _case("lstm", "forward", 8), wanted="one slice"),
    Smoke("LSTM forward, several slices, counter", _case("lstm", "forward", 256)),
    Smoke("LSTM forward, several slices, flags", _case("lstm", "forward", 256), "flags"),
    Smoke("LSTM training, one slice", _case("lstm", "training", 8), wanted="one slice"),
    Smoke("LSTM training, several slices, counter", _case("lstm", "training", 256)),
    Smoke("LSTM training, several slices, flags", _case("lstm", "training", 256), "flags"),
    Smoke("GRU training, one slice", _case("gru", "training", 8), wanted="one slice"),
    Smoke("GRU training, several slices, counter", _case("gru", "training", 256)),
    Smoke("GRU training, several slices, flags", _case("gru", "training", 256), "flags"),
    Smoke("two-dimensional backward", _case("lstm", "training", 1024, dtype="bf16"), wanted="two dimensions"),
    Smoke("several batch tiles", _case("lstm", "training", 1024, 64, dtype="bf16"), wanted="several tiles"),
    Smoke("streamed weights", _case("lstm", "training", 2816, 2, 8, "bf16"), wanted="streamed"),
    Smoke("two directions", _case("gru", "training", 256, dtype="bf16", bidirectional=True)),
    Smoke("lengths", _case("lstm", "training", 256, dtype="bf16", marks="lengths")),
    Smoke("resets", _case("gru", "training", 256, dtype="bf16", marks="resets")),
    Smoke("a stack in one launch", _case("lstm", "training", 256, steps=64, dtype="bf16", layers=4), wanted="pipeline"),
)
# Nothing else can be right where one of these is wrong.
FIRST = tuple(smoke.name for smoke in SMOKE[:2])


def run(smoke: Smoke, device: torch.device) -> str:
    """The error as a share of what is allowed, and the plan.

    Raises:
        AssertionError: the case is wrong.
        RuntimeError: a program gave up waiting for another.
    """
    with changed(device, protocol=smoke.protocol):
        race = Race(smoke.case, device)
        check = race.check("persistrnn", race.runner("persistrnn"))
        synchronize(device)
        launch.check()
    if not check.ok:
        raise AssertionError(check.message)
    return f"error {check.error:.2f} of what is allowed; {expectation(smoke.case, device)[2]}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def changed(
    device: torch.device, *, cooperative: bool = True, maxnreg: bool = True, word_on_device: bool = False,
    **exchange: Any,
) -> Iterator[None]:  # fmt: skip
    """Inside, launches differ from the default in this. exchange: attributes of ``Exchange``."""
    options = launch.options
    how = replace(launch.exchange_for(device), **exchange)

    def chosen(part: Pass, arch: str) -> dict[str, object]:
        found = options(part, arch)
        if not cooperative:
            found["launch_cooperative_grid"] = False
        if not maxnreg:
            found.pop("maxnreg", None)
        return found

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "exchange_for", return_value=how))
        stack.enter_context(mock.patch.object(launch, "options", chosen))
        if word_on_device:
            word = torch.zeros(1, dtype=torch.int32, device=device)
            stack.enter_context(mock.patch.dict(launch._errors, {device: word}))
        yield


# ---- what a red case depends on -----------------------------------------------------------------------------------


def simplest(case: Case) -> Case:
    """The same size as one layer in one direction without marks, the input's product left out."""
    return replace(case, input=0, layers=1, bidirectional=False, marks="")


Variant = tuple[Callable[[Case], Case], dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    "as it is": (lambda case: case, {}),
    "polling in a loop of Triton's": (lambda case: case, {"poll": "atomic"}),
    "the other protocol": (lambda case: case, {"protocol": "other"}),
    "one group, not cooperative": (lambda case: replace(case, batch=1), {"cooperative": False}),
    "without maxnreg": (lambda case: case, {"maxnreg": False}),
    "error word on the device": (lambda case: case, {"word_on_device": True}),
    "one batch tile": (lambda case: replace(case, batch=1), {}),
    "T=1": (lambda case: replace(case, steps=1), {}),
    "T=2": (lambda case: replace(case, steps=2), {}),
    "T=3": (lambda case: replace(case, steps=3), {}),
    "forward only": (lambda case: replace(case, mode="forward"), {}),
    "float32": (lambda case: replace(case, dtype="fp32"), {}),
}


def vary(name: str, smoke: Smoke, device: torch.device) -> str:
    """What one variant of a red case computes.

    Raises:
        AssertionError: it is wrong too; the text says what was seen.
    """
    change, given = VARIANTS[name]
    how: dict[str, Any] = {"protocol": smoke.protocol, "spin_limit": SPIN_LIMIT} | given
    if how["protocol"] == "other":
        how["protocol"] = "counter" if smoke.protocol == "flags" else "flags"
    case = change(simplest(smoke.case))
    with changed(device, **how):
        seen = observe(case, device)
    if seen:
        raise AssertionError(f"{case.key}: {'; '.join(seen)}")
    return f"{case.key}: right"


def observe(case: Case, device: torch.device) -> list[str]:
    """Run one layer as the operators do, on buffers full of the reserved NaN, and say what is wrong; empty if nothing
    is: the error word, which programs did not put their part and of which step, where the first wrong numbers are."""
    race, cell, training = Race(case, device), CELLS[case.cell], case.mode == "training"
    truth, asked = race.truth, "tf32" if case.dtype == "tf32" else "ieee"
    x, dy = truth.x.unsqueeze(2), truth.dy.unsqueeze(2)
    weights = Weights(*(truth.parameters[f"{name}_l0"][None].to(x) for name in ("weight_hh", "bias_hh")))
    states = [x.new_zeros(1, case.batch, case.hidden)] * cell.states
    plan = launch.choose(cell, case.hidden, case.batch, 1, x.dtype, asked, device)
    with mock.patch.object(launch, "flag", lambda buffer, part, exchange: _bits(buffer).fill_(-1)):
        kept = launch.forward(cell, x, weights, states, asked, save=training)
        y = kept.states[0][0, 1:-1, :, 0]
        seen = _gave_up("forward", device) + _missing("forward", y, plan.forward)
        seen = seen or _wrong("y", y, truth.true["y"], truth.witness["y"])
        if training and not seen:
            found = launch.backward(cell, [dy], states, weights.weight_hh, None, kept, asked)
            gates = found.dr_gates[0, :, :, 0].unflatten(-1, (cell.gates, case.hidden)).flip(0).flatten(1, 2)
            seen = _gave_up("backward", device) + _missing("backward, steps from the end,", gates, plan.backward)
    if training and not seen:
        check = race.check("persistrnn", race.runner("persistrnn"))
        seen = [] if check.ok else [check.message]
    return seen


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view(torch.int16 if buffer.element_size() == 2 else torch.int32)


def _gave_up(which: str, device: torch.device) -> list[str]:
    """What the error word says, which is then taken back."""
    synchronize(device)
    seen = [f"{which}: error word {int(word[0])} (a wait ran out)" for word in launch._errors.values() if word[0]]
    for word in launch._errors.values():
        word.zero_()
    return seen


def _missing(which: str, found: Tensor, part: Pass) -> list[str]:
    """Which programs never put their units of which step. found: [T, rows, H], of a buffer that was full of -1."""
    absent = (_bits(found.contiguous()) == -1).any(1)  # [T, H]
    if not absent.any():
        return []
    step, t = int(absent.any(1).nonzero()[0]), part.tiling
    slices = sorted({int(unit) // t.units for unit in absent[step].nonzero().flatten()})
    programs = f"slices {slices} of {-(-found.shape[-1] // t.units)} ({t.slices} programs, R={t.k_parts})"
    lack = f"{int(absent.any(1).sum())} steps of {len(found)} lack some"
    return [f"{which}: step {step} was not put by {programs}; {lack}"]


def _wrong(name: str, found: Tensor, true: Tensor, witness: Tensor) -> list[str]:
    """Where a tensor [T, B, H] first leaves the truth by far more than the witness does."""
    error = (found.double() - true).abs().nan_to_num(torch.inf)
    where = (error > 8 * float((witness - true).abs().max()) + 1e-6).nonzero()
    if not len(where):
        return []
    t, b, unit = (int(i) for i in where[0])
    values = f"{float(found[t, b, unit]):.6g} instead of {float(true[t, b, unit]):.6g}"
    return [f"{name}: {len(where)} of {found.numel()} wrong, the first at t={t}, row {b}, unit {unit}: {values}"]
