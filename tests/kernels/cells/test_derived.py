"""What is derived of a step: against autograd of it in float64, over long sequences of rounded tiles, and as text."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import maximum, sigmoid, tanh

from persistrnn.kernels import cells
from persistrnn.kernels.cells import BUILT_IN, CELLS, STAGED, derived, library, rules, saving, verify
from persistrnn.kernels.cells.derive import Derived, Names
from persistrnn.kernels.cells.registration import of_step, register

B, H = 4, 16
RTOL, ATOL = 1e-10, 1e-12
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(cells, "_registered", dict(cells._registered))


def held_m(x, r, state):
    """sLSTM with m held fixed, on which h does not depend."""
    i, f, z, o = (a + b for a, b in zip(x, r, strict=True))
    f = torch.nn.functional.logsigmoid(f) + state.m.detach()
    with torch.no_grad():
        m = maximum(f, i)
    i, f = torch.exp(i - m), torch.exp(f - m)
    c, n = f * state.c + i * tanh(z), f * state.n + i
    return sigmoid(o) * c / n, c, n, m


def detached(x, r, state):
    """What something is detached from has its derivatives all the same."""
    h = tanh(x.h + r.h)
    with torch.no_grad():
        held = h.view_as(h)
    return h * state.h - held * h.detach() * x.h.detach() * x.h


def scaled(x, r, state, p):
    """Its parameters' gradients need tiles that no scan of a built-in cell stores."""
    c = sigmoid(p.scale * x.f + r.f) * state.c + tanh(p.scale * x.g + r.g)
    return torch.where(c > 0, c, p.slope * c), c


def zoneout(x, r, state, e):
    h = tanh(x.h + r.h)
    return torch.where(e.keep > 0.5, state.h, h)


def many_operations(x, r, state, p):
    """Operations that the built-in cells have not."""
    a = x.a + r.a
    low = torch.clamp(a, -0.5, 0.5).abs() + torch.nn.functional.softplus(x.b, beta=2.0) + torch.lerp(a, r.b, 0.3)
    low = low + torch.nn.functional.elu(a) + torch.nn.functional.silu(x.skip)
    low = low + torch.sin(a) * torch.cos(p.w) + torch.erf(r.b) + torch.log1p(a * a) + torch.expm1(0.1 * a)
    low.mul_(0.1)
    h = torch.where((low > state.h) & ~(low > 1) | (x.b <= 0), low, torch.nn.functional.leaky_relu(state.h - low))
    return h * p.w, torch.rsqrt(1 + state.c.square()) + torch.addcmul(h, p.w, low, value=0.5) / (2 + h.exp())


OTHERS = {
    "held_m": (held_m, {"gates": ("i", "f", "z", "o"), "states": ("h", "c", "n", "m")}),
    "detached": (detached, {"gates": ("h",)}),
    "scaled": (scaled, {"gates": ("f", "g"), "states": ("h", "c"), "params": ("scale", "slope")}),
    "zoneout": (zoneout, {"gates": ("h",), "extras": ("keep",)}),
    "many_operations": (
        many_operations,
        {"gates": ("a", "b"), "states": ("h", "c"), "params": ("w",), "more_inputs": ("skip",)},
    ),
}
ALL = [*BUILT_IN, *OTHERS]


def of(name):
    return derived(name) if name in BUILT_IN else register(OTHERS[name][0], **OTHERS[name][1])


def drawn(cell, seed=0):
    """x, r, state, p, e, float64 leaves but for e; the states of an sLSTM as they may be."""
    generator = torch.Generator().manual_seed(seed)

    def tiles(names, *shape):
        found = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in names]
        return [(t.abs() + 0.5 if name == "n" else t).requires_grad_() for t, name in zip(found, names, strict=True)]

    names = cell.names
    masks = [(torch.rand(B, H, generator=generator) < 0.4).double() for _ in names.extras]
    return tiles(names.inputs, B, H), tiles(names.gates, B, H), tiles(names.states, B, H), tiles(names.params, H), masks


def gradients(outputs, leaves, weights, **options):
    return torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True, **options)


def through_the_pair(cell, x, r, state, p, e, d, d_saved=None):
    """As the kernels and what follows them: gradients of x, r, the states and the parameters."""
    new, saved = cell.run_forward(x, r, state, p, e)
    after = [new[i] for i in cell.cell.after]
    if d_saved is not None:
        return cell.run_second(d, saved, d_saved, after, state, p, e)
    dx, dr, ds = cell.run_backward(d, saved, after, state, p, e)
    return dx[: cell.cell.inputs], dr, ds, cell.param_gradients(dx, dr, saved, after, state, p, e)


@pytest.mark.parametrize("name", ALL)
def test_both_orders_of_derivatives_are_those_of_the_step(name):
    cell = of(name)
    x, r, state, p, e = drawn(cell)
    leaves = [*x, *r, *state, *p]
    expected = cell.step(x, r, state, p, e)
    found, _ = cell.run_forward(x, r, state, p, e)
    torch.testing.assert_close(list(found), list(expected), rtol=RTOL, atol=ATOL)
    generator = torch.Generator().manual_seed(1)
    d = [torch.randn(B, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in expected]
    pairs = [(t, g) for t, g in zip(expected, d, strict=True) if t.requires_grad]
    first = gradients([t for t, _ in pairs], leaves, [g for _, g in pairs], create_graph=True)
    ours = [g for part in through_the_pair(cell, x, r, state, p, e, d) for g in part]
    ours = [g.expand(B, H).sum(0) if leaf.dim() == 1 else g for g, leaf in zip(ours, leaves, strict=True)]
    torch.testing.assert_close(ours, list(first), rtol=RTOL, atol=ATOL)
    weights = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in first]
    second, ours = (
        gradients(
            [g for g in of if g.requires_grad],
            [*leaves, *d],
            [w for g, w in zip(of, weights, strict=True) if g.requires_grad],
        )
        for of in (first, ours)
    )
    torch.testing.assert_close(list(ours), list(second), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_what_is_saved(name):
    """Which a second derivative has, beside those of the states."""
    cell = of(name)
    x, r, state, p, e = drawn(cell)
    leaves = [*x, *r, *state, *p]
    new, saved = cell.run_forward(x, r, state, p, e)
    generator = torch.Generator().manual_seed(1)
    d, d_saved = ([torch.randn(B, H, generator=generator, dtype=torch.float64) for _ in of] for of in (new, saved))
    pairs = [(t, g) for t, g in zip((*new, *saved), (*d, *d_saved), strict=True) if t.requires_grad]
    expected = gradients([t for t, _ in pairs], leaves, [g for _, g in pairs])
    found = [g for part in through_the_pair(cell, x, r, state, p, e, d, d_saved) for g in part]
    found = [g.expand(B, H).sum(0) if leaf.dim() == 1 else g for g, leaf in zip(found, leaves, strict=True)]
    torch.testing.assert_close(found, list(expected), rtol=RTOL, atol=ATOL)


def broken_bounds(cell, seed=0):
    """Of the gradients of a long sequence of rounded tiles."""
    errors = verify.errors_of_rounding(cell, seed)
    return {what: (e, least) for what, (e, least) in errors.items() if e > verify.MOST_ERROR * least + verify.AND}


@pytest.mark.parametrize("name", ALL)
def test_a_long_sequence_of_tiles_in_bfloat16(name):
    assert [broken_bounds(of(name), seed) for seed in range(3)] == [{}] * 3


def highest(x, r, state):
    return maximum(tanh(3 * (x.h + r.h)), state.h)


def test_outcomes_of_comparisons_are_not_computed_again_from_rounded_tiles(monkeypatch):
    def made():
        return of_step(highest, "highest", Names(("h",), ("h",)))

    assert made().cell.saved == 2
    verify.verify(made())
    monkeypatch.setattr(saving._Prices, "_comes_out", lambda self, i: True)
    assert made().cell.saved == 1
    with pytest.raises(ValueError, match=r"^highest:.*: a comparison comes out another way in the backward"):
        verify.verify(made())
    monkeypatch.setattr(verify, "_check_outcomes", lambda *_: None)
    with pytest.raises(ValueError, match="over 48 steps that keep bfloat16 the gradient of"):
        verify.verify(made())


def test_the_sign_of_a_state_is_that_of_the_state_in_memory(monkeypatch):
    """Which no sum of rounded tiles need have."""
    assert of("scaled").cell.after == (1,)
    monkeypatch.setattr(saving._Prices, "_is_of_signs", lambda self, i: False)
    bit = of_step(scaled, "scaled", Names(("f", "g"), ("h", "c"), ("scale", "slope")))
    assert (bit.saving.bits != [], bit.cell.after) == (True, ())


def test_registration_finds_a_wrong_pair(monkeypatch):
    monkeypatch.setitem(rules.RULES, "tanh_backward", lambda g, y: g * (1 - y))
    with pytest.raises(ValueError, match=r"^own:.*: what was derived differs from the step by up to"):
        register(lambda x, r, state: tanh(x.h + r.h), gates=("h",), name="own")


def test_registration_finds_what_goes_wrong_in_low_precision_alone(monkeypatch):
    backward = Derived.run_backward

    def coarse(self, d_state, saved, *others):
        dx, *rest = backward(self, d_state, saved, *others)
        rounded = all((t == t.bfloat16()).all() for t in saved)
        return tuple(1.03 * t for t in dx) if rounded else dx, *rest

    monkeypatch.setattr(Derived, "run_backward", coarse)
    with pytest.raises(
        ValueError, match=r"over 48 steps that keep bfloat16 the gradient of x has a relative error of 3"
    ):
        register(lambda x, r, state: 0.5 * tanh(x.h + r.h), gates=("h",), name="own")


def test_a_hard_sigmoid():
    """Which torch differentiates once."""
    cell = register(lambda x, r, state: torch.nn.functional.hardsigmoid(x.h + r.h), gates=("h",), name="hard").cell
    assert (cell.saved, cell.after) == (1, ()), "an outcome"


@pytest.mark.parametrize(
    ("name", "saved", "after"),
    [
        *[("lstm", 4, ()), ("gru", 4, ()), ("rnn_tanh", 0, (0,)), ("rnn_relu", 0, (0,)), ("peephole", 4, ())],
        *[("coupled", 3, ()), ("mgu", 3, ()), ("janet", 2, ()), ("slstm", 6, ()), ("held_m", 5, ())],
    ],
)
def test_what_is_saved(name, saved, after):
    cell = of(name).cell
    assert (cell.saved, cell.after) == (saved, after)


def test_the_table_of_names():
    assert tuple(library.CELLS) == BUILT_IN
    assert tuple(library.STAGED) == STAGED
    assert list(CELLS)[: len(BUILT_IN) + len(STAGED)] == [*BUILT_IN, *STAGED]
    with pytest.raises(KeyError, match="no cell 'elman'; there are lstm, gru, rnn_tanh"):
        CELLS["elman"]


def test_which_units_past_the_last_need_a_mask():
    assert [name for name in BUILT_IN if not CELLS[name].finite_at_zero] == ["slstm"]


def test_a_tile_of_parameters_or_numbers_alone_is_widened():
    def step(x, r, state, p):
        return tanh(x.h + r.h), torch.sigmoid(p.w) + 0.0 * state.a, torch.ones_like(x.h), torch.zeros_like(x.h)

    cell = register(step, gates=("h",), states=("h", "a", "b", "c"), params=("w",))
    assert re.search(r"return \(v\d+, (tl.zeros_like\(state\[0\]\)) \+ v\d+, \1 \+ 1.0, \1\), \(\)", cell.source), (
        cell.source
    )


def test_two_cells_of_one_name_are_two():
    def step(slope):
        def cell(x, r, state):
            return slope * tanh(x.h + r.h)

        return cell

    first, again, other = (register(step(slope), gates=("h",), name="same") for slope in (1.0, 1.0, 0.5))
    assert first.cell == again.cell
    assert first.cell.name != other.cell.name
    assert {first.cell.name, other.cell.name} <= set(CELLS)
    assert first.forward is derived(first.cell.name).forward is again.forward
    assert first.forward is not other.forward
    named = register(lambda x, r, state: tanh(x[0] + r[0]), gates=("g",), name="same")
    assert named.source == first.source
    assert named.cell.name != first.cell.name, "of a gate by another name"


def test_a_cell_is_derived_in_any_surroundings():
    def step(x, r, state):
        return torch.tanh(x.h + 0.3 * r.h)

    plain = register(step, gates=("h",)).source

    def inside(v):
        cells._registered.clear()
        assert register(step, gates=("h",)).source == plain
        return v.square().sum()

    torch.func.vmap(torch.func.grad(inside))(torch.ones(2, 3))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        inside(torch.ones(()))
    with torch._subclasses.FakeTensorMode():
        inside(torch.ones(()))
    torch.set_default_dtype(torch.float64)
    try:
        inside(torch.ones(()))
    finally:
        torch.set_default_dtype(torch.float32)


def run(code, **environment):
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=given, capture_output=True, text=True)


@pytest.mark.skipif(INTERPRETED, reason="the processes compile")
def test_processes_share_the_cache(tmp_path):
    code = """
        from persistrnn.kernels.cells import derived
        import sys, inspect
        path = inspect.getsourcefile(derived("mgu").forward.fn)
        print(path, open(path).read() == derived("mgu").source)
    """
    found = [run(code, TRITON_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [f.stderr for f in found] == ["", ""]
    assert found[0].stdout == found[1].stdout
    path, same = found[0].stdout.split()
    assert path.startswith(str(tmp_path))
    assert same == "True"


@pytest.mark.skipif(INTERPRETED, reason="the process compiles")
def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    code = """
        from persistrnn.kernels.cells import derived
        derived("mgu").forward
    """
    found = run(code, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "RuntimeError: the kernels of a cell are written into Triton's cache" in found.stderr
    assert "set TRITON_CACHE_DIR to a folder that can" in found.stderr


@pytest.mark.parametrize("name", STAGED)
def test_stages_are_one_graph_whose_cut_is_enough_for_the_backward(name, monkeypatch):
    """`verify` says how."""
    cell = derived(name)
    verify.verify(cell)
    monkeypatch.setitem(rules.RULES, "tanh_backward", lambda g, y: g * (1 - y))
    with pytest.raises(ValueError, match=f"^{name}: what was derived differs from the step by up to"):
        verify.verify(library.built_in(name))


def test_what_a_comparison_gives_is_a_number():
    for step in (
        lambda x, r, state: (x.h + r.h > 0) * tanh(x.h),
        lambda x, r, state: (x.h + r.h > 0).to(x.h.dtype) * tanh(x.h),
        lambda x, r, state: (x.h + r.h > 0).float() * tanh(x.h),
    ):
        assert register(step, gates=("h",)).cell.saved == 2, "an outcome, and tanh"
