"""`Stacked`: layers of their own sizes one above the other, against a loop over rows in the test."""

import copy
import itertools
from functools import partial

import pytest
import torch
from pairs import tensors
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import persistrnn
from persistrnn import GRU, LSTM, Recipe, Stacked

T, B, INPUT = 6, 3, 5


def layers(*, residual=0, ways=1, **options):
    torch.manual_seed(0)
    bidirectional = ways == 2
    if residual:
        return [
            LSTM(INPUT, residual, bidirectional=bidirectional, **options),
            GRU(residual, residual, bidirectional=bidirectional, **options),
        ]
    return [
        LSTM(INPUT, 6, bidirectional=bidirectional, **options),
        GRU(6, 8, bidirectional=bidirectional, **options),
        LSTM(8, 4, bidirectional=bidirectional, **options),
    ]


# name: (layers, options of the stack)
STACKS = {
    "sizes": (partial(layers), {}),
    "alternate": (partial(layers), {"alternate": True}),
    "residual": (partial(layers, residual=INPUT), {"residual": True}),
    "residual, alternate": (partial(layers, residual=8), {"residual": True, "alternate": True}),
    "sum": (partial(layers, ways=2), {"merge": "sum"}),
    "residual, sum": (partial(layers, residual=8, ways=2), {"residual": True, "merge": "sum"}),
}


def by_row(stack, x, hx, lengths, resets):
    """y [T, B, ..] and the final states by layer: each row by itself, each episode by itself, cut out and turned round
    by hand."""
    outputs, finals = torch.zeros(T, B, 0), []
    for k, layer in enumerate(stack.layers):
        turned = stack.alternate and k % 2 == 1
        outputs, of_rows = [], []
        for b in range(B):
            state = tuple(s[:, b : b + 1] for s in hx[k]) if isinstance(hx[k], tuple) else hx[k][:, b : b + 1]
            cuts = [0, *(t for t in range(1, int(lengths[b])) if resets[t, b]), int(lengths[b])]
            episodes = [x[a:z, b : b + 1] for a, z in itertools.pairwise(cuts) if z > a]
            assert not (resets[0, b] and len(episodes))
            ys = []
            for n, episode in enumerate(episodes[::-1] if turned else episodes):
                y, new = layer(episode.flip(0) if turned else episode, state if n == 0 else None)
                if layer.bidirectional:
                    y = y[..., : y.size(-1) // 2] + y[..., y.size(-1) // 2 :]
                y = y.flip(0) if turned else y
                ys.append(y + episode if stack.residual and y.size(-1) == episode.size(-1) else y)
                state = new
            ys = ys[::-1] if turned else ys
            y = torch.cat(ys)
            outputs.append(torch.cat([y, y.new_zeros(T - len(y), 1, y.size(-1))]))
            of_rows.append(state)
        x = torch.cat(outputs, 1)
        finals.append([torch.cat(s, 1) for s in zip(*(tensors(state) for state in of_rows), strict=True)])
    return x, finals


RUNS = [("torch", *run) for run in [*((n, "lengths") for n in STACKS), ("alternate", "resets"), ("sizes", "whole")]]
ON_KERNELS = [("residual, alternate", "lengths"), ("residual, sum", "whole")]
RUNS += [pytest.param("persistent", *run, marks=pytest.mark.interpreter) for run in ON_KERNELS]


@pytest.mark.parametrize(("backend", "name", "cut"), RUNS)
def test_a_stack_is_its_layers_row_by_row(backend, name, cut):
    make, options = STACKS[name]
    dtype = torch.float64 if backend == "torch" else torch.float32
    stack = Stacked(make(backend=backend, dtype=dtype), **options)
    theirs = Stacked([copy.deepcopy(layer) for layer in stack.layers], **options)
    for layer in theirs.layers:
        layer.backend = "torch"
    x = torch.randn(T, B, INPUT, dtype=dtype, requires_grad=True)
    hx = tuple(
        tuple(torch.randn(rows, B, layer.hidden_size, dtype=dtype) for _ in range(2))
        if isinstance(layer, LSTM)
        else torch.randn(rows, B, layer.hidden_size, dtype=dtype)
        for layer in stack.layers
        for rows in [1 + layer.bidirectional]
    )
    lengths, resets = torch.tensor([T] * B if cut != "lengths" else [4, T, 1]), torch.zeros(T, B, dtype=torch.bool)
    given = {"lengths": lengths} if cut == "lengths" else {}
    if cut == "resets":
        resets[2, 0] = resets[3, 2] = resets[5, 2] = True
        given["resets"] = resets
    y, states = stack(x, hx, **given)
    expected, finals = by_row(theirs, x, hx, lengths, resets)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close([y, *tensors(states)], [expected, *itertools.chain(*finals)], **tolerance)
    losses = (sum(t.sin().sum() for t in of) for of in ([y, *tensors(states)], [expected, *itertools.chain(*finals)]))
    ours, exact = (
        torch.autograd.grad(loss, [x, *of.parameters()]) for loss, of in zip(losses, (stack, theirs), strict=True)
    )
    torch.testing.assert_close(ours, exact, **tolerance)


OTHERS = [name for name in STACKS if name != "sizes"]


@pytest.mark.parametrize("name", OTHERS)
def test_forms_of_a_ragged_batch_agree(name):
    """Lengths, the same as a mask, with lengths and resets at once, as a PackedSequence, batch first, without NaN from
    what no step reads."""
    make, options = STACKS[name]
    stack = Stacked(make(dtype=torch.float64), **options)
    x, lengths = torch.randn(T, B, INPUT, dtype=torch.float64), torch.tensor([4, T, 1])
    inside = torch.arange(T).unsqueeze(1) < lengths
    expected, states = stack(x, lengths=lengths)
    x = torch.where(inside.unsqueeze(-1), x, float("nan"))
    assert not expected[~inside].any()
    y, final = stack(x, mask=inside)
    torch.testing.assert_close([y, *tensors(final)], [expected, *tensors(states)])
    y, final = stack(x, lengths=lengths, resets=torch.zeros_like(inside))
    torch.testing.assert_close([y, *tensors(final)], [expected, *tensors(states)])
    y, final = stack(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close([pad_packed_sequence(y)[0], *tensors(final)], [expected, *tensors(states)])
    for layer in stack.layers:
        layer.batch_first = True
    y, final = stack(x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close([y.transpose(0, 1), *tensors(final)], [expected, *tensors(states)])
    y, final = stack(x[:, 1])
    torch.testing.assert_close([y, *tensors(final)], [expected[:, 1], *(s[:, 1] for s in tensors(states))])


def test_episodes_in_rows_of_their_lengths_when_read_from_the_end():
    stack = Stacked(STACKS["alternate"][0](dtype=torch.float64), alternate=True)
    x, lengths, resets = torch.randn(T, B, INPUT).double(), torch.tensor([5, T, 2]), torch.rand(T, B) < 0.5
    resets[0] = False
    resets[2, 2] = resets[5, 0] = True  # past their ends: none
    y, states = stack(x, lengths=lengths, resets=resets)
    zeros = [tuple(s.new_zeros(1, B, s.size(-1)) for s in t) if isinstance(t, tuple) else t * 0 for t in states]
    expected, finals = by_row(stack, x, zeros, lengths, resets)
    torch.testing.assert_close([y, *tensors(states)], [expected, *itertools.chain(*finals)])


def test_states_after_a_reset_and_every_c():
    stack = Stacked([LSTM(INPUT, 6), LSTM(6, 4)], alternate=True).double()
    x, resets = torch.randn(T, 1, INPUT).double(), torch.zeros(T, 1, dtype=torch.bool)
    resets[4] = True
    anew = tuple((torch.randn(1, 1, h).double(), torch.randn(1, 1, h).double()) for h in (6, 4))
    y, states, c = stack(x, resets=resets, reset_state=anew, return_cell_states=True)
    below = torch.cat([stack.layers[0](x[:4])[0], stack.layers[0](x[4:], anew[0])[0]])
    late, _, late_c = stack.layers[1](below[4:].flip(0), return_cell_states=True)
    early, early_state, early_c = stack.layers[1](below[:4].flip(0), anew[1], return_cell_states=True)
    torch.testing.assert_close(
        [y, c], [torch.cat([t.flip(0) for t in pair]) for pair in ((early, late), (early_c, late_c))]
    )
    torch.testing.assert_close(tensors(states[1]), tensors(early_state))


def test_dropout_acts_between_layers_in_training_alone():
    stack = Stacked(layers(residual=8), residual=True, dropout=1.0)
    x = torch.randn(T, B, INPUT)
    torch.testing.assert_close(stack(x)[0], stack.layers[1](torch.zeros(T, B, 8))[0])
    stack.eval()
    below = stack.layers[0](x)[0]
    torch.testing.assert_close(stack(x)[0], stack.layers[1](below)[0] + below)


def test_steps_and_a_stream_are_the_sequence():
    stack = Stacked([LSTM(INPUT, 8, recipe=Recipe(learned_state=True, zoneout=0.2)), GRU(8, 8)], residual=True).double()
    torch.nn.init.normal_(stack.layers[0].h0)
    stack.eval()
    x = torch.randn(T, B, INPUT).double()
    expected, final = stack(x)
    state, y = None, []
    for x_t in x:
        y_t, state = stack.step(x_t, state)
        y.append(y_t)
    torch.testing.assert_close([torch.stack(y), *tensors(state)], [expected, *tensors(final)])
    stream = persistrnn.Streaming(stack)
    torch.testing.assert_close(torch.cat([stream(part) for part in x.split(4)]), expected)
    torch.testing.assert_close(tensors(stream.state), tensors(final))
    stream.reset(torch.tensor([False, True, False]))
    torch.testing.assert_close(stream(x)[:, 1], expected[:, 1])
    stream.float().reset()
    torch.testing.assert_close(stream.step(x[0].float()), expected[0].float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no stream.*use bidirectional=False"):
        persistrnn.Streaming(Stacked([GRU(2, 2), GRU(2, 2)], alternate=True))


def test_it_compiles_as_one_graph():
    stack = Stacked(layers(residual=8), residual=True, alternate=True)
    x, lengths = torch.randn(T, B, INPUT), torch.tensor([4, T, 1])
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    found = []
    for call in (compiled, stack):
        y, states = call(x, lengths=lengths)
        gradients = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
        found.append([y, *tensors(states), *gradients])
    torch.testing.assert_close(*found)


def test_in_words_and_by_name():
    stack = Stacked([LSTM(4, 6), LSTM(6, 6)], residual=True, alternate=True, dropout=0.5)
    assert repr(stack).splitlines()[1] == "  residual=True, alternate=True, dropout=0.5"
    assert list(stack.state_dict())[:2] == ["layers.0.weight_ih_l0", "layers.0.weight_hh_l0"]
    assert persistrnn.explain(stack, 2, 3).count("path: torch") == 2
    other = copy.deepcopy(stack).eval()
    torch.testing.assert_close(other(torch.ones(2, 1, 4))[0], stack.eval()(torch.ones(2, 1, 4))[0])


@persistrnn.cell(gates=("a",), extras=("gain",))
def gained(x, r, state, e):
    return torch.tanh(x.a + e.gain * r.a)


two = partial(LSTM, bidirectional=True)
BAD = [
    (lambda: Stacked([]), ValueError, r"one layer at least, got none; give \[persistrnn\.LSTM"),
    (lambda: Stacked([torch.nn.LSTM(2, 2)]), TypeError, r"one of persistrnn's.*torch\.nn.*LSTM"),
    (lambda: Stacked([LSTM(2, 3), LSTM(4, 3)]), ValueError, "layer 1 has input_size=4, and layer 0 gives 3 features"),
    (lambda: Stacked([two(2, 3), LSTM(3, 3)]), ValueError, r"gives 6 features \(merge='concat'\)"),
    (lambda: Stacked([two(2, 3), LSTM(6, 3)], merge="sum"), ValueError, r"gives 3 features \(merge='sum'\)"),
    (lambda: Stacked([LSTM(2, 3)], merge="sum"), ValueError, 'merge="sum" is of bidirectional layers, got none'),
    (lambda: Stacked([LSTM(2, 3)], merge="mean"), ValueError, "merge is one of 'concat', 'sum', got 'mean'"),
    (lambda: Stacked([LSTM(2, 3), LSTM(3, 4)], residual=True), ValueError, "adds the 3 features .* to the 4 .*equal"),
    (lambda: Stacked([LSTM(2, 3), two(3, 4)], alternate=True), ValueError, "layer 1 with bidirectional=True; leave"),
    (lambda: Stacked([LSTM(2, 3), LSTM(3, 4, batch_first=True)]), ValueError, r"batch_first, got \[False, True\]"),
    (lambda: Stacked([persistrnn.Recurrent(gained, 2, 2)]), ValueError, "layer 0 takes gain at each call.*by itself"),
    (lambda: Stacked([LSTM(2, 3)], dropout=2), ValueError, r"dropout .* \[0, 1\].*got 2"),
    (lambda: Stacked([LSTM(2, 3)], residual=1), TypeError, "residual should be of type bool"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_states_and_steps_are_refused():
    stack, x = Stacked([GRU(2, 3), GRU(3, 3)], alternate=True), torch.randn(4, 1, 2)
    with pytest.raises(TypeError, match="a tuple of one state for each layer, got Tensor"):
        stack(x, torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="reset_state has one state for each of 2 layers, got 1"):
        stack(x, resets=torch.ones(4, 1, dtype=torch.bool), reset_state=(torch.zeros(1, 1, 3),))
    with pytest.raises(ValueError, match=r"no steps; call it with the sequence.*alternate=False"):
        stack.step(x[0])
    with pytest.raises(RuntimeError, match=r"lengths"):
        stack(x, lengths=torch.tensor([1, 2]))


def test_alternate_rows_of_different_lengths_are_one_graph_for_every_length():
    stack = persistrnn.Stacked([persistrnn.LSTM(4, 4), persistrnn.GRU(4, 4)], alternate=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(stack, dynamic=True, fullgraph=True, backend=backend)
    for steps in (5, 7, 9):
        x, lengths = torch.randn(steps, 3, 4), torch.tensor([steps, steps - 2, 1])
        given = {"lengths": lengths, "resets": torch.rand(steps, 3) < 0.3}
        torch.testing.assert_close(compiled(x, **given)[0], stack(x, **given)[0])
        narrow = stack(x, lengths=lengths.to(torch.int8))[0]
        assert torch.equal(narrow, stack(x, lengths=lengths)[0])
    assert len(graphs) == 1


def test_fx_takes_a_stack_as_one_node():
    model = torch.nn.Sequential(persistrnn.Stacked([persistrnn.LSTM(4, 4), persistrnn.LSTM(4, 4)], residual=True))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(5, 2, 4)
    assert torch.equal(traced(x)[0], model(x)[0])
