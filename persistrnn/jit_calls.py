"""A call as one operator, ``persistrnn::call``, for torch.jit.trace.

A trace of what a call does would hold for one B and T alone: the plan, the chunks of time and the path are decided for
them. So a trace has the call itself, which validates, decides and runs as the one in Python does, at every run of the
trace; and derivatives are those of what it runs, since the operator is composite, above autograd. Where torch's own
kernels run the call as a whole (``torch_alone``), the trace has torch's operator instead, and needs no persistrnn.

A trace with the operator can be loaded where persistrnn is imported; elsewhere torch says "Unknown builtin op:
persistrnn::call".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from persistrnn.decide import TORCH
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options
from persistrnn.request import Found, Request
from persistrnn.validate import Given

CALL = "persistrnn::call"
# packed: what a PackedSequence has beside its data. hx, reset_state, learned, extras: empty if there are none.
torch.library.define(
    CALL,
    "(str cell, str how, Tensor input, Tensor[] packed, Tensor[] weights, Tensor[] hx, Tensor? lengths, Tensor? mask, "
    "Tensor? resets, Tensor[] reset_state, Tensor[] extras, Tensor[] learned) -> Tensor[]",
)

Run = Callable[[Request], Found]

_path: ContextVar[str] = ContextVar("path")  # that ran the last call in this thread


def implement(run: Run) -> None:
    """Make ``run`` what the operator does."""

    def call(cell: str, how: str, input: Tensor, packed: Any, weights: Any, hx: Any, *others: Any) -> list[Tensor]:
        lengths, mask, resets, reset_state, extras, learned = others
        if cell not in CELLS:
            raise RuntimeError(
                f"the trace asks for the cell {cell!r}, which is not defined here; import the module that decorates it "
                "with @persistrnn.cell, as it was when the layer was traced"
            )
        options, names, return_c, sizes = _read(how)
        sequence: Any = PackedSequence(input, *packed) if packed else input
        cuts = lengths, mask, resets, _state(cell, reset_state), dict(zip(names, extras, strict=True))
        given = Given(*cuts)
        found = run(Request(cell, sequence, weights, _state(cell, hx), options, given, return_c, sizes, learned))
        _path.set(found.path)
        outputs = [found.output] if found.c is None else [found.output, found.c]
        return [*(t.data if packed else t for t in outputs), *found.states]

    torch.library.impl(CALL, "CompositeImplicitAutograd")(call)


def record(run: Run, request: Request) -> Found:
    """A call while torch.jit.trace records it."""
    cell, input, weights, hx, options, given, return_c, sizes, learned, _ = request
    packed = input if isinstance(input, PackedSequence) else None
    data: Any = input if packed is None else packed.data
    states, anew = (_tensors(cell, given_states) for given_states in (hx, given.reset_state))
    bad = not all(isinstance(t, Tensor) for t in (data, *weights, *states, *anew))  # which a call refuses
    plain = packed is None and given._replace(extras={}) == Given() and not given.extras and not return_c
    if bad or (plain and torch_alone(cell, options, len(weights), data.device)):
        with warnings.catch_warnings():  # of checks, whose answers do not depend on B and T
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return run(request)
    beside = [] if packed is None else [t for t in packed[1:] if t is not None]
    flat = torch.ops.persistrnn.call(
        cell, written(options, list(given.extras), return_c, sizes), data, beside, list(weights), states,
        given.lengths, given.mask, given.resets, anew, list(given.extras.values()), list(learned),
    )  # fmt: skip
    formed = [t if packed is None else PackedSequence(t, *packed[1:]) for t in flat[: 1 + return_c]]
    return Found(formed[0], list(flat[1 + return_c :]), formed[1] if return_c else None, _path.get())


def torch_alone(cell: str, options: Options, weights: int, device: torch.device) -> bool:
    """Whether torch's own kernels run the call as a whole, whatever B and T are, without projections."""
    free = {"num_layers", "bias", "batch_first", "dropout", "bidirectional", "backend", "save_budget", "training"}
    options = options._replace(recipe=options.recipe._replace(forget_bias=None))  # of the first weights alone
    others = {name: value for name, value in options._asdict().items() if name not in free}
    simple = all(value == Options._field_defaults[name] for name, value in others.items())
    asked = options.backend == "torch" or (options.backend == "auto" and device.type == "cpu")
    unprojected = weights == options.num_layers * options.directions * (4 if options.bias else 2)
    return simple and asked and unprojected and cell in TORCH


def _tensors(cell: str, states: Any) -> list[Any]:
    """States as they came, as a list; h of a cell with no other by itself."""
    if states is None:
        return []
    return list(states) if CELLS[cell].states > 1 and isinstance(states, (tuple, list)) else [states]


def _state(cell: str, states: list[Tensor]) -> Any:
    """And back."""
    if not states:
        return None
    return states[0] if CELLS[cell].states == 1 else tuple(states)


def written(options: Options, extras: list[str], return_c: bool, sizes: tuple[int, int, int] | None) -> str:
    """What is no tensor, as JSON; a dtype by its name."""
    fields = {name: _plain(value) for name, value in options._asdict().items()}
    return json.dumps({"options": fields, "extras": extras, "return_c": return_c, "sizes": sizes})


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _read(how: str) -> tuple[Options, list[str], bool, tuple[int, int, int] | None]:
    found = json.loads(how)
    given = found["options"]
    for name, value in given.items():
        if isinstance(value, dict):  # a record among the options
            fields = {field: tuple(inner) if isinstance(inner, list) else inner for field, inner in value.items()}
            given[name] = Options._field_defaults[name]._replace(**fields)
    if given["cell_dtype"] is not None:
        given["cell_dtype"] = getattr(torch, given["cell_dtype"])
    sizes = found["sizes"]
    return Options(**given), found["extras"], found["return_c"], None if sizes is None else tuple(sizes)
