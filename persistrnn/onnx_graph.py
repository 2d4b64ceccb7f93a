"""A call in a graph of ONNX: its operators LSTM, GRU and RNN, one for each layer, where `torch.onnx.export` traces.

Both of torch's exporters are served: the one on torch.export takes torch.onnx.ops' symbolic operators, the one on
torch.jit.trace operators of ours that it is told of. Time and batch may be dynamic. What ONNX has no
operator for is a loop over the steps in plain torch, unrolled, where their number is fixed, and else refused.

ONNX has the rows of W and R [D, G*H, I or H] in an order of its own, B [D, 2*G*H] with both biases, Y [T, D, B, H].
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from persistrnn import jit_calls
from persistrnn.decide import Call
from persistrnn.kernels.cells import derived
from persistrnn.options import Options


class _Operator(NamedTuple):
    """Of ONNX, for a cell of ours.

    gates: of ours, in the order of ONNX's rows; a "-" before one: with the other sign. peepholes: parameters in the
    order of P.
    """

    name: str
    gates: tuple[str, ...]
    attributes: tuple[tuple[str, int], ...] = ()
    activation: str | None = None
    peepholes: tuple[str, ...] = ()


OPERATORS = {
    "lstm": _Operator("LSTM", ("i", "o", "f", "g")),
    "gru": _Operator("GRU", ("z", "r", "n"), (("linear_before_reset", 1),)),
    "rnn_tanh": _Operator("RNN", ("h",), activation="Tanh"),
    "rnn_relu": _Operator("RNN", ("h",), activation="Relu"),
    "peephole": _Operator("LSTM", ("i", "o", "f", "g"), peepholes=("weight_ci", "weight_co", "weight_cf")),
    # ONNX has the gate i and f = 1 - i, here it is the other way round: i = 1 - sigmoid(f) = sigmoid(-f).
    "coupled": _Operator("LSTM", ("-f", "o", "f", "g"), (("input_forget", 1),)),
}


def obstacle(call: Call, packed: bool) -> str | None:
    """Why ONNX's operators cannot be the call, with the remedy; None if they can."""
    if packed:
        return "a PackedSequence has no form in ONNX; give the padded tensor and lengths=."
    what = None
    if call.cell not in OPERATORS:
        what = f"the cell {call.cell.partition(':')[0]!r}"
    elif call.proj_size:
        what = "projections"
    elif call.heads > 1:
        what = f"heads={call.heads}"
    elif call.marks:
        what = "a mask or resets"
    elif call.return_c:
        what = "every cell state"
    if what is None:
        return None
    return (
        f"ONNX has no recurrent operator with {what}; export with dynamo=True and a number of time steps that is not "
        "dynamic, and the loop over the steps is unrolled"
    )


def unrolls(call: Call, packed: bool) -> bool:
    """Whether a loop over the steps stands for what ONNX's operators cannot do.

    Raises:
        RuntimeError: neither of them can
    """
    reason = obstacle(call, packed)
    if reason is None:
        return False
    fixed = torch.compiler.is_exporting() and isinstance(call.steps, int)
    if packed or not fixed:
        raise RuntimeError(reason)
    return True


def run(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    lengths: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor]]:
    """y [T, B, D*H] and the final states, as a layer of torch.nn has them.

    Args:
        x: [T, B, I]
        weights: all of them, in torch.nn's order
        states: each [L*D, B, H]
        lengths: [B], within [0, T], or None
    """
    directions, layers = options.directions, options.num_layers
    each = len(weights) // layers
    y, finals = x, []
    for layer in range(layers):
        if layer > 0 and options.active_dropout > 0:
            y = F.dropout(y, options.active_dropout)
        initial = [s[layer * directions : (layer + 1) * directions] for s in states]
        own = weights[layer * each : (layer + 1) * each]
        y, *final = _layer(cell, y, own, initial, lengths, options._replace(num_layers=1, dropout=0.0))
        finals.append(final)
    return y, [torch.cat(of_layers) for of_layers in zip(*finals, strict=True)]


def _layer(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    options: Options,
) -> list[Tensor]:
    of, directions = OPERATORS[cell], options.directions
    each, names = len(weights) // directions, derived(cell).names
    hidden = int(initial[0].size(-1))  # traced by torch.jit, a tensor
    parts = [weights[d * each : (d + 1) * each] for d in range(directions)]

    def rows(weight: Tensor) -> Tensor:
        """In ONNX's order."""
        tiles = {gate: weight[k * hidden : (k + 1) * hidden] for k, gate in enumerate(names.gates)}
        found = [-tiles[gate[1:]] if gate.startswith("-") else tiles[gate] for gate in of.gates]
        return torch.cat(found) if len(found) > 1 else found[0]

    w, r = (torch.stack([rows(part[k]) for part in parts]) for k in range(2))
    bias = torch.stack([torch.cat([rows(part[2]), rows(part[3])]) for part in parts]) if options.bias else None
    steps = None if lengths is None else lengths.to(torch.int32)
    inputs = [x, w, r, bias, steps, *initial]
    if of.peepholes:
        own = [dict(zip(names.params, part[4 if options.bias else 2 :], strict=True)) for part in parts]
        inputs.append(torch.stack([torch.cat([p[name] for name in of.peepholes]) for p in own]))
    attributes: dict[str, Any] = {"hidden_size": hidden, **dict(of.attributes)}
    if directions > 1:
        attributes["direction"] = "bidirectional"
    if of.activation is not None:
        attributes["activations"] = [of.activation] * directions
    if torch.compiler.is_exporting():
        shapes = [[x.size(0), directions, x.size(1), hidden], *([directions, x.size(1), hidden] for _ in initial)]
        dtypes = [x.dtype] * len(shapes)
        found = torch.onnx.ops.symbolic_multi_out(of.name, inputs, attributes, dtypes=dtypes, shapes=shapes)
    else:
        _register()
        how = jit_calls.written(options._replace(batch_first=False), [], False, None)
        operator = getattr(torch.ops.persistrnn, f"onnx_{of.name.lower()}")
        c, p = ([*inputs[6:], None, None][:2]) if of.name == "LSTM" else (None, None)
        found = operator(cell, how, json.dumps(attributes), list(weights), lengths, *inputs[:6], c, p)
    y, *finals = found
    y = y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2)
    if lengths is not None:  # of a row without a step ONNX does not say what its final state is
        some = (lengths > 0).unsqueeze(-1)
        finals = [torch.where(some, new, old) for new, old in zip(finals, initial, strict=True)]
    return [y, *finals]


# ---- for the exporter on torch.jit.trace ----------------------------------------------------------------------------

# x, w, r, b, steps (the lengths), the states h and c, and p are the operator's in ONNX, too; the rest is for ``_call``.
OUTPUTS = {"LSTM": 3, "GRU": 2, "RNN": 2}
for _name, _outputs in OUTPUTS.items():
    torch.library.define(
        f"persistrnn::onnx_{_name.lower()}",
        "(str cell, str how, str attributes, Tensor[] weights, Tensor? lengths, Tensor x, Tensor w, Tensor r, "
        f"Tensor? b, Tensor? steps, Tensor h, Tensor? c, Tensor? p) -> ({', '.join(['Tensor'] * _outputs)})",
    )


def _call(
    cell: str, how: str, attributes: str, weights: list[Tensor], lengths: Tensor | None, x: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """What ONNX's operator gives of the tensors that are traced with."""
    *_, h, c, _ = others
    states = [h] if c is None else [h, c]
    y, *finals = torch.ops.persistrnn.call(cell, how, x, [], weights, states, lengths, None, None, [], [], [])
    return (y.unflatten(2, (h.size(0), -1)).transpose(1, 2), *finals)


def _symbolic(name: str) -> Any:
    from torch.onnx import symbolic_helper

    @symbolic_helper.parse_args("s", "s", "s", *"vvvvvvvvvv")
    def symbolic(
        g: Any, cell: str, how: str, attributes: str, weights: Any, lengths: Any,
        x: Any, w: Any, r: Any, b: Any, steps: Any, h: Any, c: Any, p: Any,
    ) -> Any:  # fmt: skip
        suffixes = {int: "i", str: "s", list: "s"}
        named = {f"{key}_{suffixes[type(value)]}": value for key, value in json.loads(attributes).items()}
        of_lstm = (c, p) if name == "LSTM" else ()
        return g.op(name, x, w, r, b, steps, h, *of_lstm, outputs=OUTPUTS[name], **named)

    return symbolic


@functools.cache
def _register() -> None:
    """Tell the exporter of them; torch.onnx is imported when it exports, and not before."""
    from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]

    for name in OUTPUTS:
        register_custom_op_symbolic(f"persistrnn::onnx_{name.lower()}", _symbolic(name), 9)


for _name in OUTPUTS:
    torch.library.impl(f"persistrnn::onnx_{_name.lower()}", "CompositeImplicitAutograd")(_call)
