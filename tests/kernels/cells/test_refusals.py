"""A function that is no pointwise step is refused with its own line, the reason and the remedy."""

import re
from pathlib import Path

import pytest
import torch
from torch import tanh

from persistrnn.kernels.cells.registration import register
from persistrnn.kernels.cells.stages import Mean, Product

OUTSIDE = torch.ones(3, 5)
WEIGHT = torch.nn.Parameter(torch.ones(()))


def product(x, r, state):
    return x.h @ r.h.T


def linear(x, r, state):
    return torch.nn.functional.linear(x.h, r.h)


def transposed(x, r, state):
    return x.h.T + r.h.T


def mean(x, r, state):
    return x.h - r.h.mean(-1, keepdim=True)


def softmax(x, r, state):
    return torch.softmax(x.h + r.h, -1)


def branch(x, r, state):
    if x.h > 0:
        return tanh(x.h + r.h)
    return r.h


def number(x, r, state):
    return x.h * r.h[0, 0].item()


def in_place(x, r, state):
    x.h.add_(r.h)
    return x.h


def in_place_through_a_view(x, r, state):
    state.h.view_as(x.h).mul_(2)
    return x.h + r.h


def in_place_through_what_is_detached(x, r, state):
    h = tanh(x.h + r.h)
    return h.detach().mul_(2) + h


def written_out(x, r, state):
    return torch.add(x.h.detach(), r.h.detach(), out=torch.zeros_like(x.h))


def wider(x, r, state):
    return tanh(x.h.double() + r.h)


def whole_numbers(x, r, state):
    return x.h + r.h.int()


def from_outside(x, r, state):
    return tanh(x.h + r.h) * OUTSIDE


def parameter_from_outside(x, r, state):
    return tanh(x.h + r.h) * WEIGHT


def shifted(x, r, state):
    return tanh(x.h + torch.roll(r.h, 1, -1))


def joined(x, r, state):
    return torch.cat([x.h, r.h], -1)


def assigned(x, r, state):
    h = x.h + r.h
    h[h > 0] = 0
    return h


def of_float32(x, r, state):
    return tanh(x.h.float() + r.h)


def of_a_size(x, r, state):
    return tanh(x.h + r.h) + torch.ones(3, 5)


def yields_a_tile(x, r, state):
    n = yield state.h
    return tanh(x.h + n)


def yields_a_number(x, r, state):
    n = yield Mean(state.h.mean())
    return tanh(x.h + n)


def yields_for_ever(x, r, state):
    while True:
        yield Mean(state.h)


def part(x, r, state):
    return tanh(x.h[:, :1] + r.h)


def random(x, r, state):
    return torch.nn.functional.dropout(x.h + r.h, 0.5)


def power(x, r, state):
    return x.h**r.h


def rounded(x, r, state):
    return torch.div(x.h, 2 + r.h * r.h, rounding_mode="floor")


def deeper(x, r, state):
    return helper(x.h) + r.h


def helper(t):
    return torch.cumsum(t, 0)


def wrong_name(x, r, state):
    return tanh(x.g + r.h)


REFUSED = [
    (product, "x.h @ r.h.T", "mm is a matrix product; W_ih x and W_hh h are already in the step's first two arguments"),
    (linear, "functional.linear", "mm is a matrix product"),
    (transposed, "x.h.T + r.h.T", "add gives the shape (5, 3) from tiles (3, 5)"),
    (mean, "r.h.mean", "mean reduces over units or rows; a step is pointwise"),
    (softmax, "torch.softmax", "reduces over units or rows"),
    (branch, "if x.h > 0:", "a tensor's value is needed as a number, as in a branch; use torch.where"),
    (number, ".item()", "from tiles"),
    (in_place, "x.h.add_(r.h)", "add_ changes an argument of the step in place; use the operation without '_'"),
    (in_place_through_a_view, "mul_(2)", "changes an argument of the step in place"),
    (in_place_through_what_is_detached, "mul_(2)", "mul_ changes a detached tile, and what it is of, in place"),
    (written_out, "out=", "add writes into a tensor that is given; use the operation that returns a new one"),
    (wider, "x.h.double()", "gives torch.float64; a step runs in one dtype"),
    (whole_numbers, "r.h.int()", "gives torch.int32; a step runs in one dtype"),
    (from_outside, "* OUTSIDE", "from outside the step; pass it as a parameter or an extra of the cell"),
    (parameter_from_outside, "* WEIGHT", "from outside the step; pass it as a parameter"),
    (shifted, "torch.roll", "roll moves units or rows; a step is pointwise"),
    (joined, "torch.cat", "cat moves units or rows; a step is pointwise"),
    (assigned, "h[h > 0] = 0", "index_put chooses elements; use torch.where"),
    (of_float32, "x.h.float()", "a cast gives torch.float32; a step runs in one dtype, that of its arguments"),
    (of_a_size, "torch.ones(3, 5)", "must match the size of tensor b"),
    (yields_a_tile, "yield state.h", "a step yields a Product or a Mean of a tensor as its arguments, got a tensor"),
    (yields_a_number, "yield Mean(", "a step yields a Product or a Mean of a tensor as its arguments, got a tensor ()"),
    (yields_for_ever, "yield Mean(state.h)", "a step has at most 64 products and means"),
    (part, "x.h[:, :1]", "each unit and row by itself"),
    (random, "dropout", "is not one of the pointwise operations that a step may have: abs, add, "),
    (power, "x.h**r.h", "a power other than by a number"),
    (rounded, "rounding_mode", "div with rounding_mode='floor' is not supported in a step"),
    (deeper, "torch.cumsum(t, 0)", "cumsum reduces over units or rows"),
    (wrong_name, "x.g", "x has no 'g'; it has h"),
]


@pytest.mark.parametrize(("step", "line", "reason"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_says_the_line_the_reason_and_the_remedy(step, line, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        register(step, gates=("h",))
    said = str(caught.value)
    place = re.match(rf"{step.__name__}: (\S+):(\d+): (.*)", said)
    assert place is not None, said
    assert place[1] == __file__
    assert line in Path(__file__).read_text().splitlines()[int(place[2]) - 1]
    assert line in place[3]
    assert len(re.findall(rf"\b{step.__name__}: ", said)) == 1


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda x, r, s: None, "got a NoneType"),
        (lambda x, r, s: (s.h, s.h, s.h), "got a tuple of 3"),
        (lambda x, r, s: [s.h, s.c], "got a list"),
        (lambda x, r, s: (s.h, 1.0), "got a float"),
        (lambda x, r, s: (s.h, torch.zeros(())), r"got one of shape \(\)"),
        (lambda x, r, s: (s.h, s.c.T), r"got one of shape \(5, 3\)"),
    ],
)
def test_the_result_is_the_tuple_of_the_states(result, said):
    with pytest.raises(ValueError, match=f"^own: a step returns .*{said}"):
        register(result, gates=("f",), states=("h", "c"), name="own")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gates": "ifgo"}, "gates='ifgo'; allowed: a sequence of different names"),
        ({"gates": ("f", "f")}, "gates=('f', 'f')"),
        ({"gates": ("f",), "params": ("class",)}, "params=('class',)"),
        ({"gates": ("f",), "extras": ("_x",)}, "extras=('_x',)"),
        ({"gates": ("f",), "more_inputs": ("f",)}, "gates and more_inputs=('f', 'f')"),
        ({"gates": ()}, "no gates"),
        ({"gates": ("f",), "states": ()}, "no states"),
        ({"gates": ("f",), "name": "my cell"}, "name=('my cell',)"),
    ],
)
def test_names_are_names(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        register(lambda x, r, state: tanh(x[0] + r[0]), **{"name": "own"} | given)


def test_at_most_eight_outcomes():
    def step(x, r, state):
        h = x.h + r.h
        for k in range(10):
            h = torch.clamp(h * 1.1, -1.0 - k, 1.0 + k)
        return h

    with pytest.raises(ValueError, match="needs the outcomes of 10 comparisons; allowed: 8"):
        register(step, gates=("h",), name="own")


def two_products(x, r, state):
    return tanh((yield Product(state.h)) + (yield Product(state.h)))


def no_states(x, r, state):
    yield Mean(state.h)


def in_place_of_what_is_needed(x, r, state):
    h = tanh(x.h + r.h)
    h += x.h
    return h


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x, r: tanh(x.h + r.h), r"^cell: is called as step\(x, r, state\), got too many positional arguments"),
        (lambda x, r, state, p: tanh(x.h), r"^cell: is called as step\(x, r, state\), got missing a required .* 'p'"),
        (
            two_products,
            r"^two_products: 2 products beside that with h, and 1 gates; allowed: one for each gate but",
        ),
        (no_states, r"^no_states: a step returns the tuple of its 1 new states, h first; got a NoneType"),
        (
            in_place_of_what_is_needed,
            r"a tile that its derivative needs is changed in place; .* h = h \+ x in",
        ),
        (lambda x, r, state: torch.where(x.h > 0, x.h.sqrt(), r.h), r"^cell:.* not finite; .*sqrt\(where\(x > 0, x, 1"),
    ],
)
def test_what_has_no_line(step, said):
    with pytest.raises(ValueError, match=said):
        register(step, gates=("h",))


def test_a_step_that_is_not_finite_on_zeros():
    with pytest.raises(ValueError, match="on arguments that are all zeros h is not finite"):
        register(lambda x, r, state: (x.h + r.h) / state.h, gates=("h",), name="own")
