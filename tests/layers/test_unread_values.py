"""What nobody reads may be anything: with NaN or Inf in it, each output and each gradient is what it is with zeros
there."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from grid import concurrent_grid
from pairs import as_hx, make_layer, tensors
from torch import Tensor

import persistrnn
from persistrnn import autograd, step_marks
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.planner import memory

STEPS, INPUT, HIDDEN = 4, 3, 4
FULL, NO_STEP, SHORT, ANEW = range(4)  # rows: every step; none; some; every step, the first of which is a reset
ROWS = 4
LENGTHS = torch.tensor([STEPS, 0, 2, STEPS])
MASK = torch.arange(STEPS).unsqueeze(1) < LENGTHS
MASK[1, FULL] = MASK[0, SHORT] = False
RESETS = torch.zeros(STEPS, ROWS, dtype=torch.bool)
RESETS[2, FULL] = RESETS[0, ANEW] = True
RESETS[3, SHORT] = True  # past its length
JUNK = {"nan": float("nan"), "inf": float("inf")}
CUTS = {
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": MASK},
    "resets": {"resets": RESETS},
    "lengths and resets": {"lengths": LENGTHS, "resets": RESETS},
}


@dataclass(frozen=True)
class Case:
    cell: str
    cut: str = "lengths and resets"
    layers: int = 2
    bidirectional: bool = False
    proj: int = 0
    dropout: float = 0.0
    save: str = "gates"
    every_c: bool = False
    hidden: int = HIDDEN

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def layer(self, backend: str) -> torch.nn.Module:
        options = {name: getattr(self, name) for name in ("bidirectional", "dropout", "save")} | {
            "proj_size": self.proj
        }
        return make_layer(self.cell, INPUT, self.hidden, self.layers, backend=backend, **options)


def unread(case: Case) -> dict[str, Tensor]:
    """Bool, where nobody reads: of the input, of the initial and of the reset states, and of the outputs' gradients."""
    lengths, mask, resets = (CUTS[case.cut].get(name) for name in ("lengths", "mask", "resets"))
    active = torch.ones(STEPS, ROWS, dtype=torch.bool) if mask is None else mask
    if lengths is not None:
        active = torch.arange(STEPS).unsqueeze(1) < lengths
    initial = torch.zeros(case.directions, ROWS, dtype=torch.bool)
    initial[:, ~active.any(0)] = True
    anew = torch.ones(case.directions, ROWS, dtype=torch.bool)
    if resets is not None:
        initial[0, ANEW] = True
        anew[:, FULL] = False
        anew[0, ANEW] = False
        if lengths is None:
            anew[:, SHORT] = False  # its reset is read
    return {"x": ~active, "initial": initial.repeat(case.layers, 1), "reset": anew.repeat(case.layers, 1), "d": ~active}


def run(case: Case, backend: str, junk: float, second: bool = False, compiled: bool = False) -> dict[str, Any]:
    """Outputs and gradients by name, and the path that ran, with ``junk`` where nobody reads."""
    layer, where = case.layer(backend), unread(case)
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int, spoilt: Tensor) -> Tensor:
        found = torch.randn(*shape, generator=generator)
        return torch.where(spoilt.unsqueeze(-1), junk, found).requires_grad_()

    rows, features = case.layers * case.directions, case.proj or case.hidden
    names = {"h": features, "c": case.hidden} if case.cell == "lstm" else {"h": features}
    leaves = {"x": numbers(STEPS, ROWS, INPUT, spoilt=where["x"])}
    for kind in ("initial", "reset") if "resets" in case.cut else ("initial",):
        leaves |= {f"{kind} {n}": numbers(rows, ROWS, size, spoilt=where[kind]) for n, size in names.items()}
    states = {kind: tuple(t for n, t in leaves.items() if n.startswith(kind)) for kind in ("initial", "reset")}
    options = dict(CUTS[case.cut]) | ({"return_cell_states": True} if case.every_c else {})
    if states["reset"]:
        options["reset_state"] = as_hx(states["reset"])
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    torch.manual_seed(2)
    output, final, *c = call(leaves["x"], as_hx(states["initial"]), **options)
    outputs = {"output": output} | {f"final {n}": t for n, t in zip(names, tensors(final), strict=True)}
    outputs |= {"every c": c[0]} if c else {}
    spoilt = {"output": where["d"], "every c": where["d"]}
    nowhere = torch.zeros(rows, ROWS, dtype=torch.bool)
    cotangents = {n: numbers(*t.shape, spoilt=spoilt.get(n, nowhere)).detach() for n, t in outputs.items()}
    inputs = leaves | dict(layer.named_parameters())
    how = {"create_graph": second, "allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), list(cotangents.values()), **how)
    found = outputs | {f"d {n}": g for n, g in zip(inputs, grads, strict=True)} | {"d final h": cotangents["final h"]}
    if second:
        # Of the gradients that are read: those of the parameters.
        total = sum(found[f"d {n}"].square().sum() for n, _ in layer.named_parameters())
        again = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, materialize_grads=True)
        found |= {f"d2 {n}": g for n, g in zip(inputs, again, strict=True)}
    return found | {"path": layer.last_path}


def check(case: Case, backend: str, path: str | None, junk: str, **options: bool) -> None:
    """Against torch's operations; where the path is theirs, each bit, since not one of what is not read may count."""
    expected = run(case, "torch", 0.0, **options)
    found = run(case, backend, JUNK[junk], **options)
    assert found.pop("path") == path
    tolerance = 2e-5 if expected.pop("path") != path else 0.0
    where = unread(case)
    stays = where["initial"][:, NO_STEP].all()
    for name, t in found.items():
        if name.startswith("final") and stays:  # which is the initial state
            assert (t[:, NO_STEP] == JUNK[junk]).all() or t[:, NO_STEP].isnan().all(), name
            t = torch.where(torch.arange(ROWS).unsqueeze(1) == NO_STEP, 0.0, t)
        assert t.isfinite().all(), name
        how = {"rtol": tolerance, "atol": tolerance, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(t, expected[name], **how)
    assert not found["d x"][where["x"]].any()
    kinds = [n for n in found if n.startswith(("d initial", "d reset"))]
    for name in kinds:
        nobody = where[name.split()[1]].clone()
        if stays and "initial" in name:
            nobody[:, NO_STEP] = False
        assert not found[name][nobody].any(), name
    if stays:  # a row without a step hands its state's gradient on
        assert torch.equal(found["d initial h"][:, NO_STEP], found["d final h"][:, NO_STEP])


# ---- on torch's own kernels, and step by step ------------------------------------------------------------------------

SHAPES = {
    "one layer": {"layers": 1},
    "a stack": {},
    "three layers": {"layers": 3},
    "both ways": {"bidirectional": True},
    "dropout": {"dropout": 0.5},
    "projected": {"proj": 2},
    "projected both ways": {"proj": 2, "bidirectional": True},
    "state": {"save": "state"},
    "checkpoint": {"save": "checkpoint"},
    "checkpoint both ways": {"save": "checkpoint", "bidirectional": True},
    "checkpoint with dropout": {"save": "checkpoint", "dropout": 0.5},
    "every c": {"every_c": True},
}
OF_LSTM = ("projected", "projected both ways", "every c")


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(memory, "chunk_steps", lambda *_: 2)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
# Each shape with all cuts, by the two cells in turn where both have it.
@pytest.mark.parametrize(
    ("cell", "shape", "cut", "junk"),
    [
        ("lstm" if (n + k) % 2 or shape in OF_LSTM else "gru", shape, cut, junk)
        for n, shape in enumerate(SHAPES)
        for k, (cut, junk) in enumerate([*((cut, "nan") for cut in CUTS), ("lengths and resets", "inf")])
    ],
)
def test_on_torch_s_operations(short_chunks, cell, shape, cut, junk):
    case = Case(cell, cut, **SHAPES[shape])
    packs = cut == "lengths" and not case.every_c
    check(case, "torch", "torch" if packs else "stepwise", junk)


@pytest.mark.parametrize("cut", ["mask", "lengths and resets"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_in_a_second_derivative(cell, cut):
    check(Case(cell, cut), "torch", "stepwise", "nan", second=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("cut", ["lengths", "lengths and resets"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiled(cell, cut):
    torch._dynamo.reset()
    check(Case(cell, cut), "torch", None, "nan", compiled=True)


# ---- on the kernels ------------------------------------------------------------------------------------------------

warns_of_inf = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # the interpreter's, of Inf

warns_of_zero = pytest.mark.filterwarnings(
    "ignore:divide by zero encountered:RuntimeWarning"
)  # the interpreter's, of SLSTM's c / n in a row without a step, of which nothing is read

KERNELS = [
    ("nan", Case("lstm", "lengths")),
    ("inf", Case("gru")),
    ("nan", Case("gru", "mask", bidirectional=True)),
    ("inf", Case("lstm", bidirectional=True, every_c=True)),
    ("nan", Case("lstm", dropout=0.5)),
    ("nan", Case("lstm", proj=2)),
    ("nan", Case("gru", save="state")),
    ("nan", Case("lstm", "mask", save="state", bidirectional=True)),
    ("nan", Case("lstm", save="checkpoint", every_c=True)),
    ("nan", Case("gru", "mask", save="checkpoint")),
]


@warns_of_inf
@pytest.mark.interpreter
@pytest.mark.parametrize(("junk", "case"), KERNELS)
def test_on_the_kernels(short_chunks, junk, case):
    check(case, "persistent", "persistent", junk)


@pytest.mark.interpreter
@pytest.mark.parametrize(("cell", "save"), [("lstm", "gates"), ("gru", "checkpoint")])
def test_in_a_second_derivative_of_the_kernels(short_chunks, cell, save):
    check(Case(cell, "mask", save=save), "persistent", "persistent", "nan", second=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("protocol", "case", "second"),
    [  # of a hidden size that several slices share
        ("counter", Case("lstm", hidden=13), False),
        ("flags", Case("gru", hidden=13), False),
        ("flags", Case("lstm", "mask", hidden=13), True),
    ],
)
def test_in_a_pipeline(pipelines, protocol, case, second):
    pipelines(protocol, homes="shared")
    with concurrent_grid():
        check(case, "persistent", "persistent", "nan", second=second)


# ---- cells with parameters and inputs of their own -------------------------------------------------------------------


@persistrnn.cell(gates=("f", "n"), states=("h", "c"), params=("slope",), extras=("keep",))
def slanted(x, r, state, p, e):
    f = torch.sigmoid(x.f + r.f + p.slope * state.c)
    c = f * state.c + (1 - f) * e.keep * torch.tanh(p.slope * x.n + r.n)
    return p.slope * torch.tanh(c), c


def gradients_of_own(kind: str, cut: str, backend: str, junk: float, **options: Any) -> dict[str, Tensor]:
    """By name, with ``junk`` where nobody reads: padded inputs and extras, and the states of the row without a step."""
    torch.manual_seed(0)
    if kind == "own":
        layer = persistrnn.Recurrent(slanted, INPUT, HIDDEN, 2, backend=backend, **options)
    else:
        layer = getattr(persistrnn, kind)(INPUT, HIDDEN, 2, backend=backend, **options)
    skipped, rows = ~(MASK if cut == "mask" else torch.arange(STEPS).unsqueeze(1) < LENGTHS), 2 * layer._directions
    x, *states = torch.randn(STEPS, ROWS, INPUT), *torch.randn(CELLS[layer.cell].states, rows, ROWS, HIDDEN)
    x[skipped] = junk
    for state in states:
        state[:, NO_STEP] = junk
    keep = torch.where(skipped.unsqueeze(-1), junk, torch.rand(rows, STEPS, ROWS, HIDDEN))
    leaves = [t.requires_grad_() for t in (x, *states)]
    y, final = layer(x, as_hx(states), **CUTS[cut], **({"keep": keep} if kind == "own" else {}))
    cotangents = [torch.where(skipped.unsqueeze(-1), junk, 1.0).expand_as(y), *map(torch.ones_like, tensors(final))]
    named = {"x": x, **{f"state {i}": s for i, s in enumerate(states)}, **dict(layer.named_parameters())}
    found = torch.autograd.grad([y, *tensors(final)], [*leaves, *layer.parameters()], cotangents)
    return {"y": y} | dict(zip(named, found, strict=True))


OWN = [
    ("PeepholeLSTM", "mask", {}),
    ("own", "mask", {"bidirectional": True}),
    ("own", "lengths", {"save": "checkpoint"}),
    ("PeepholeLSTM", "lengths", {"heads": 2, "save": "state"}),
    ("SLSTM", "mask", {"bidirectional": True}),
    ("SLSTM", "lengths", {"save": "checkpoint"}),
]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(("kind", "cut", "options"), OWN)
def test_of_other_cells(short_chunks, kind, cut, options, junk):
    expected, found = (gradients_of_own(kind, cut, "torch", value, **options) for value in (0.0, JUNK[junk]))
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


@warns_of_inf
@warns_of_zero
@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "cut", "options"), [OWN[0], OWN[2], OWN[4]])
def test_of_other_cells_on_the_kernels(short_chunks, kind, cut, options):
    # Where SLSTM's c / n is large, rounding is too.
    expected = gradients_of_own(kind, cut, "persistent" if kind == "SLSTM" else "torch", 0.0, **options)
    for name, t in gradients_of_own(kind, cut, "persistent", JUNK["nan"], **options).items():
        torch.testing.assert_close(t, expected[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@persistrnn.cell(gates=("f",), states=("h", "c"), params=("slope",))
def rooted(x, r, state, p):
    return torch.sqrt((p.slope * state.c) ** 2) + torch.tanh(x.f + r.f), state.c + torch.sigmoid(x.f + r.f)


@pytest.mark.parametrize(
    ("cell", "junk"),
    [
        ("peephole", float("nan")),  # which a mask of the sums alone would let through to a second derivative
        (rooted.cell, 0.5),  # whose derivative has no value at the zeros of a skipped step, and is kept by the scan
    ],
)
def test_skipped_steps_of_the_gradients_of_parameters_per_unit(cell, junk):
    of, generator = CELLS[cell], torch.Generator().manual_seed(0)
    skipped = ~MASK.unflatten(0, (1, STEPS)).unflatten(2, (ROWS, 1))  # [L, T, B, D]

    def numbers(*features: int, steps: int = STEPS) -> Tensor:
        return torch.rand(1, steps, ROWS, 1, *features, generator=generator)

    tiles = (of.stored_gradients, of.gates)[: 1 + of.recurrent_gradient]
    gates = [torch.where(skipped[..., None], 0.0, numbers(n * HIDDEN)).requires_grad_() for n in tiles]
    if cell == rooted.cell:
        assert of.more_gradients
        gates[0] = torch.where(skipped[..., None], float("nan"), gates[0])
    saved = torch.where(skipped[..., None, None], junk, numbers(of.saved, HIDDEN))
    kept = [*(numbers(HIDDEN, steps=STEPS + 2) for _ in range(of.states)), saved]
    params, marks = torch.ones(1, len(of.params), HIDDEN), step_marks.marks(MASK, None, 1)
    found = autograd.param_gradients(cell, 1, gates, kept, params, marks, None)
    assert found.isfinite().all()
    if cell == "peephole":
        assert all(second.isfinite().all() for second in torch.autograd.grad(found.sum(), gates))
