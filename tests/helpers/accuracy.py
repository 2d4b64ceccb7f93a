"""The bound that every number must keep, and the cases it is checked on.

The truth is torch.nn in float64. The witness is torch.nn in the tested dtype on ATen's own kernels (oneDNN off: it
keeps bfloat16 gates in float32 and rounds less than cuDNN does). With e the relative RMS error against the truth and
u half the dtype's eps, each output and gradient keeps

    e <= 1.5 * e_witness + 8 u  (16 u in float32)     in every single case
    e <= 1.5 * e_witness                              pooled over the cases and seeds of a class

and is exactly 0 where the truth is 0.
"""

import contextlib
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from cuts import by_pieces
from pairs import CELLS, PAIRS, as_hx, tensors
from torch import Tensor

from persistrnn import autograd

MODULES = PAIRS
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STATES, RESET_STATES = ("h0", "c0"), ("reset_h0", "reset_c0")


@dataclass(frozen=True)
class Case:
    """One stack and one input; with projections, or with rows that lengths and resets cut."""

    cell: str
    dtype: str
    hidden: int
    batch: int
    steps: int
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    state: bool = False
    proj: int = 0
    lengths: bool = False
    resets: bool = False
    reset_state: bool = False

    @property
    def input(self) -> int:
        return self.hidden // 2 + 3  # differs from hidden


# Cut by all there is.
CUT = {"lengths": True, "resets": True, "state": True, "reset_state": True}
FACTORS = {
    "cell": ("lstm", "gru"),
    "dtype": ("fp32", "fp16", "bf16"),
    # One unit has a test of its own: its gates are nearly the same at all steps, so that their rounding errors add up.
    "hidden": (2, 10, 18, 25, 64, 136),
    "batch": (1, 3, 17),
    "steps": (1, 2, 7),
    "layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "state": (True, False),
}


def pairwise(factors: dict[str, tuple], seed: int = 0, candidates: int = 40) -> list[dict]:
    """Rows in which every pair of values of two factors occurs, by greedy choice among random rows."""
    names = list(factors)
    uncovered = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    generator = random.Random(seed)
    rows = []
    while uncovered:
        a, x, b, y = min(uncovered, key=str)
        options = [{n: generator.choice(factors[n]) for n in names} | {a: x, b: y} for _ in range(candidates)]
        pairs = [{(p, row[p], q, row[q]) for p, q in itertools.combinations(names, 2)} for row in options]
        gains = [len(uncovered & covered) for covered in pairs]
        best = gains.index(max(gains))
        uncovered -= pairs[best]
        rows.append(options[best])
    return rows


def cases() -> list[Case]:
    """With a seed that gives each class of cell and dtype three cases at least, none of them tiny in all."""
    return [Case(**row) for row in pairwise(FACTORS, seed=51)]


@contextlib.contextmanager
def exact_gemms(device: str) -> Iterator[None]:
    """Inside, gradients of weights are summed in float64: on some CPUs torch's product adds the T*B terms one by one,
    to three times the error of the witness, which multiplies step by step. The bound is not about that product."""
    gemm = autograd._gemm
    if device == "cpu":
        autograd._gemm = lambda a, b: gemm(a.double(), b.double()).to(a.dtype)
    try:
        yield
    finally:
        autograd._gemm = gemm


def run(
    case: Case, seed: int, device: str = "cpu", backend: str = "persistent"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(ours, truth, witness): outputs and gradients by name, in float64 on the CPU, from the same rounded numbers."""
    ours_class, torch_class = MODULES[case.cell]
    dtype = DTYPES.get(case.dtype, torch.float64)
    torch.manual_seed(seed)
    options = {"num_layers": case.layers, "bias": case.bias, "bidirectional": case.bidirectional}
    options |= {"proj_size": case.proj} if case.proj else {}
    sizes = (case.input, case.hidden)
    ours = ours_class(*sizes, **options, dtype=dtype, device=device, backend=backend)
    witness = torch_class(*sizes, **options, dtype=dtype, device=device)
    truth = torch_class(*sizes, **options, dtype=torch.float64)
    for module in (witness, truth):
        module.load_state_dict(ours.state_dict())
    directions = 2 if case.bidirectional else 1
    rows, features = case.layers * directions, case.proj or case.hidden

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    given = {"x": numbers(case.steps, case.batch, case.input)}
    widths = dict(zip("hc", (features, case.hidden)[: CELLS[case.cell].states], strict=False))
    for kind, there in (("", case.state), ("reset_", case.reset_state)):
        given |= {f"{kind}{n}0": numbers(rows, case.batch, width) for n, width in widths.items() if there}
    cotangents = {"y": numbers(case.steps, case.batch, directions * features)}
    cotangents |= {f"{n}_n": numbers(rows, case.batch, width) for n, width in widths.items()}
    lengths = resets = None
    if case.lengths:
        lengths = torch.randint(0, case.steps + 1, (case.batch,))
        lengths[:2] = torch.tensor([0, case.steps])[: case.batch]
    if case.resets:
        resets = torch.rand(case.steps, case.batch) < 0.4
    cut = case.lengths or case.resets

    def results(module: torch.nn.Module) -> dict[str, Tensor]:
        like = next(module.parameters())
        leaves = {n: t.to(like).requires_grad_() for n, t in given.items()}
        if cut and module is not ours:
            found = by_pieces(module, leaves, lengths, resets)
        else:
            initial, reset = (as_hx(leaves[n] for n in names if n in leaves) for names in (STATES, RESET_STATES))
            marks = {n: t.to(like.device) for n, t in (("lengths", lengths), ("resets", resets)) if t is not None}
            found = tensors(module(leaves["x"], initial, **marks, **({} if reset is None else {"reset_state": reset})))
        outputs = dict(zip(cotangents, found, strict=True))
        inputs = leaves | dict(module.named_parameters())
        gradients = [cotangents[n].to(like) for n in outputs]
        # Of an input that no step reads, cut as the rows are, the gradient is zero.
        unread = {"allow_unused": cut, "materialize_grads": cut}
        grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), gradients, **unread)
        found = outputs | {f"d {n}": g for n, g in zip(inputs, grads, strict=True)}
        return {n: t.detach().to("cpu", torch.float64) for n, t in found.items()}

    with exact_gemms(device):
        of_ours = results(ours)
    with torch.backends.mkldnn.flags(enabled=False):
        return of_ours, results(truth), results(witness)


@dataclass
class Bound:
    """Collects the errors of a class; ``failures`` lists what broke the bound."""

    dtype: torch.dtype
    squares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    failures: list[str] = field(default_factory=list)

    def add(self, what: object, ours: dict[str, Tensor], truth: dict[str, Tensor], witness: dict[str, Tensor]) -> None:
        unit = torch.finfo(self.dtype).eps / 2
        floor = (16 if self.dtype == torch.float32 else 8) * unit
        # One kind of gradient in all layers and directions together: the witness's error of a single sum over T*B
        # terms that nearly cancel, as a bias has at H=1, says little of what rounding does to it.
        kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for name, true in truth.items():
            if not true.any():
                if ours[name].any():
                    self.failures.append(f"{what}: {name} is not 0")
                continue
            size, error, allowed = (t.square().sum().item() for t in (true, ours[name] - true, witness[name] - true))
            kind = name.split("_l")[0]
            for i, value in enumerate((error / size, allowed / size, 1.0)):
                kinds[kind][i] += value
                self.squares[kind][i] += value
        for kind, (error, allowed, count) in kinds.items():
            e, e_witness = math.sqrt(error / count), math.sqrt(allowed / count)
            if not e <= 1.5 * e_witness + floor:
                self.failures.append(f"{what}: {kind} has error {e:.2e}, witness {e_witness:.2e}")

    def pooled(self) -> Iterator[str]:
        for name, (error, allowed, count) in self.squares.items():
            if not math.sqrt(error) <= 1.5 * math.sqrt(allowed):
                yield f"pooled {name}: {math.sqrt(error / count):.2e}, witness {math.sqrt(allowed / count):.2e}"

    def check(self) -> None:
        failures = self.failures + list(self.pooled())
        assert not failures, "\n".join(failures)


def failures(case: Case, seed: int = 0) -> list[str]:
    """What of a case breaks the bound of single cases: the pooled one is for pools."""
    bound = Bound(DTYPES[case.dtype])
    bound.add((case, seed), *run(case, seed))
    return bound.failures
