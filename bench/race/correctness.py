"""Whether an arm computes a case rightly: the check that must be green before its speed counts.

The truth is torch.nn in float64 on the same device, the witness torch.nn in the case's dtype, all from the same rounded
numbers. With e the relative RMS error against the truth and u half the dtype's eps, every output and gradient keeps
e <= 1.5 * e_witness + 8 u (16 u in full float32), the bound of the tests. tf32 rounds as float16 does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.race import arms
from bench.race.arms import DTYPES, TORCH, Runner
from bench.report.results import Arm, Case, Check

FACTOR = 1.5


def unit(dtype: str) -> float:
    return torch.finfo(torch.float16 if dtype == "tf32" else DTYPES[dtype]).eps / 2


def run(runner: Runner, case: Case, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and for a training case the gradients of the input and of every parameter, by name; those that autograd does
    not reach are left out."""
    dtype = DTYPES.get(runner.dtype, torch.float64)
    with arms.precision(runner.dtype):
        if case.mode == "forward":
            with torch.no_grad():
                return {"y": runner.forward(x.to(dtype))}
        leaf = x.detach().to(dtype).requires_grad_()  # detached: x itself stays as it is
        y = runner.forward(leaf)
        gradients = torch.autograd.grad(y, [leaf, *runner.leaves.values()], dy.to(y.dtype), allow_unused=True)
    names = ["d x", *(f"d {name}" for name in runner.leaves)]
    found = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return {"y": y.detach()} | found


class Truth:
    """Inputs of a case and what is right for them; made once, asked by every arm."""

    def __init__(self, case: Case, device: torch.device, seed: int = 1) -> None:
        self.case, self.device = case, device
        dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(seed)
        directions = 2 if case.bidirectional else 1
        shape = case.steps, case.batch, directions * case.hidden
        # Rounded to the case's dtype once: all arms see the same numbers.
        self.parameters = {name: p.to(dtype).float() for name, p in arms.source(case).items()}
        self.x = torch.randn(arms.input_shape(case), generator=generator).to(device, dtype)
        self.dy = torch.randn(shape, generator=generator).to(device, dtype)
        self.true = self._reference(torch.float64, "fp64")
        self.witness = self._reference(dtype, case.dtype)

    def _reference(self, dtype: torch.dtype, label: str) -> dict[str, Tensor]:
        """torch.nn; with the input's product left out that of the gates' input halves with W_ih the identity."""
        case, parameters = self.case, self.parameters
        width = arms.input_shape(case)[-1]
        if not case.input:
            parameters = parameters | {"weight_ih_l0": torch.eye(width), "bias_ih_l0": torch.zeros(width)}
        module = TORCH[case.cell](
            width, case.hidden, case.layers, bidirectional=case.bidirectional, device=self.device, dtype=dtype
        )
        module.load_state_dict(parameters)
        named = dict(module.named_parameters())
        leaves = named if case.input else arms.recurrent(named)
        runner = Runner(lambda x: self._forward(module, x), leaves, label, lambda: "torch")
        return {name: tensor.double() for name, tensor in run(runner, case, self.x, self.dy).items()}

    def _forward(self, module: torch.nn.Module, x: Tensor) -> Tensor:
        """torch.nn; rows that are reset alike go through it together, episode by episode."""
        if self.case.marks == "lengths":
            return arms.packed(module, x, arms.lengths(self.case))
        if self.case.marks != "resets":
            return module(x)[0]
        patterns, which = arms.resets(self.case).T.unique(dim=0, return_inverse=True)
        rows = [(which == i).nonzero().flatten() for i in range(len(patterns))]
        found = []
        for pattern, own in zip(patterns, rows, strict=True):
            episodes = x[:, own].tensor_split(pattern.nonzero().flatten())
            found.append(torch.cat([module(part)[0] for part in episodes if len(part)]))
        return torch.cat(found, dim=1)[:, torch.cat(rows).argsort()]

    def check(self, arm: Arm, runner: Runner) -> Check:
        """Compare an arm's outputs and gradients, each alone; one that is missing, or of another shape, is wrong."""
        found = run(runner, self.case, self.x, self.dy)
        # An arm in another dtype is held to the coarser of the two.
        rough = max(self.case.dtype, runner.dtype, key=unit)
        floor = (16 if rough == "fp32" else 8) * unit(rough)
        compared = {name: self._compare(name, found.get(name), floor) for name in self.true}
        failures = [f"{name} {failure}" for name, (_, failure) in compared.items() if failure]
        worst = max(ratio for ratio, _ in compared.values())
        return Check(self.case, arm, not failures, min(worst, 1e9), "; ".join(failures))

    def _compare(self, name: str, ours: Tensor | None, floor: float) -> tuple[float, str]:
        """Error over what is allowed, and what is wrong, empty if nothing is."""
        true = self.true[name]
        if ours is None:
            return math.inf, "is missing"
        if ours.shape != true.shape:
            return math.inf, f"has shape {list(ours.shape)}, allowed {list(true.shape)}"
        size = true.square().sum()
        if size == 0:
            return (math.inf, "is not 0") if ours.any() else (0.0, "")
        e, e_witness = (
            float(((tensor.double() - true).square().sum() / size).sqrt()) for tensor in (ours, self.witness[name])
        )
        allowed = FACTOR * e_witness + floor
        if e <= allowed:
            return e / allowed, ""
        # NaN comes here too.
        return (e / allowed if e > allowed else math.inf), f"has error {e:.2e}, allowed {allowed:.2e}"
