"""The decision of a call: whether a backward may come, made once, and constant in a compiled graph."""

import contextlib

import pytest
import torch
from asked import asked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vjp, vmap

import persistrnn
from persistrnn import calls, decide
from persistrnn.decide import expects_backward

X = torch.zeros(4, 3, 5)
LENGTHS = torch.tensor([4, 2, 1])

# (what, context, whether the input and the weight require a gradient, whether a backward may come)
RULE = [
    ("training", contextlib.nullcontext, False, True, True),
    ("input alone", contextlib.nullcontext, True, False, True),
    ("frozen", contextlib.nullcontext, False, False, False),
    ("no_grad", torch.no_grad, True, True, False),
    ("inference", torch.inference_mode, True, True, False),
    ("enable_grad", torch.enable_grad, False, True, True),
]


@pytest.fixture
def decisions(monkeypatch):
    """The decisions that are made."""
    made = []

    def noted(call):
        made.append(decide.decide(call))
        return made[-1]

    monkeypatch.setattr(calls, "decide", noted)
    return made


def answer(x, *others):
    """``x`` times 1, or times 2 where a backward may come."""
    return x * (2 if expects_backward([None, x, *others]) else 1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("context", "of_input", "of_weight", "expected"), [r[1:] for r in RULE], ids=[r[0] for r in RULE]
)
def test_the_rule(context, of_input, of_weight, expected, compiled):
    torch._dynamo.reset()
    run = torch.compile(answer, fullgraph=True, backend="eager") if compiled else answer
    x, weight = (torch.ones((), requires_grad=needed) for needed in (of_input, of_weight))
    with context():
        assert run(x, weight).item() == 1 + expected


@pytest.mark.parametrize("compiled", [False, True])
def test_inside_torch_func(compiled):
    """Its wrapped tensors do not say so themselves; under an outer no_grad it differentiates all the same."""
    torch._dynamo.reset()

    def through(use):
        return torch.compile(use, fullgraph=True, backend="eager") if compiled else use

    def without(x):
        with torch.no_grad():
            return answer(x)

    x = torch.ones(3)
    with torch.no_grad():
        assert through(lambda x: grad(lambda x: answer(x).sum())(x))(x).tolist() == [2, 2, 2]
    assert through(lambda x: vjp(answer, x)[0])(x).tolist() == [2, 2, 2]
    assert through(lambda x: vjp(without, x)[0])(x).tolist() == [1, 1, 1]
    assert through(lambda x: vmap(grad(answer))(x))(x).tolist() == [2, 2, 2]
    assert through(lambda x: vmap(answer)(x))(torch.ones(3, requires_grad=True)).tolist() == [2, 2, 2]
    with torch.no_grad():
        assert through(lambda x: vmap(answer)(x))(x).tolist() == [1, 1, 1]


def test_a_call_asks_of_all_that_it_takes(decisions):
    layer, h0 = persistrnn.GRU(5, 6, save="state"), torch.zeros(1, 3, 6, requires_grad=True)
    layer(X)
    with torch.no_grad():
        layer(X)
    grad(lambda w: functional_call(layer, w, (X,))[0].sum())({n: p.detach() for n, p in layer.named_parameters()})
    layer.requires_grad_(False)
    layer(X)
    layer(X.clone().requires_grad_())
    layer(X, h0)
    layer(X, resets=torch.zeros(4, 3, dtype=torch.bool), reset_state=h0)
    assert [made.call.backward for made in decisions] == [True, False, True, False, True, True, True]


def test_what_cannot_go_back_needs_no_budget():
    layer = persistrnn.LSTM(5, 6, save="auto", save_budget=1)
    for call in (lambda: layer(X), lambda: persistrnn.explain(layer, 3, 4)):
        with pytest.raises(RuntimeError, match="save_budget=1 bytes do not hold"):
            call()
        with torch.no_grad():
            call()
    layer.requires_grad_(False)
    layer(X)
    persistrnn.explain(layer, 3, 4)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({}, "torch"),
        ({"lengths": LENGTHS}, "torch"),
        ({"lengths": LENGTHS, "return_cell_states": True}, "stepwise"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, "stepwise"),
    ],
)
def test_one_decision_in_a_call(decisions, given, path):
    layer = persistrnn.LSTM(5, 6, 2)
    layer(X, **given)
    (made,) = decisions
    assert made.path == layer.last_path == path
    assert made.plan is None


def test_time_chunks_and_pipelines(monkeypatch):
    monkeypatch.setattr(decide, "unsupported", lambda call: None)
    monkeypatch.setattr(decide, "pipeline_of", lambda call: None)
    call = asked("lstm", 512, batch=64, steps=100_000, backend="persistent", input_size=8)
    chunk = decide.chunk_steps(call, "gates", True)
    assert decide.decide(call).chunk == chunk < 100_000
    assert decide.decide(call._replace(steps=chunk)).chunk == 0, "one launch"
    assert decide.decide(call._replace(proj_size=4)).chunk == 0
    assert decide.decide(call._replace(backend="torch")).chunk == 0
    assert decide.decide(call._replace(steps=4, save="state")).chunk > 0
    monkeypatch.setattr(decide, "runs_as_pipeline", lambda call: True)
    together = decide.decide(call._replace(num_layers=2))
    assert (together.pipeline, together.chunk) == (True, 0)
    assert not decide.decide(call._replace(num_layers=2, batch=0)).pipeline


@pytest.mark.parametrize("given", [{}, {"return_cell_states": True, "resets": True}], ids=str)
def test_a_graph_has_one_decision(monkeypatch, given):
    """For every T and B, with none of their symbols in it."""
    calls, counter = [], CompileCounterWithBackend("eager")
    monkeypatch.setattr(decide, "unsupported", lambda call: calls.append(call) or "no.")
    layer = persistrnn.LSTM(5, 6, 2, dropout=0.3, cell_dtype=torch.float32, device="meta")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for steps, batch in ((9, 3), (90, 7), (70, 300)):
        cuts = {"resets": torch.zeros(steps, batch, dtype=torch.bool, device="meta")} if given else {}
        assert compiled(torch.zeros(steps, batch, 5, device="meta"), **given | cuts)[0].shape == (steps, batch, 6)
    assert counter.frame_count == 1
    assert len(set(calls)) == 1
    assert {type(value) for call in calls for value in (call.batch, call.steps)} == {int}
