"""A layer that remembers its state from call to call: streams, environments, truncated back-propagation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from persistrnn import tracing, validate
from persistrnn.kernels.cells import CELLS
from persistrnn.options import check_flag
from persistrnn.recurrent import RecurrentBase, check_layer
from persistrnn.stacked import Stacked


class Streaming(nn.Module):
    """Run a layer over a sequence that comes in pieces: each call goes on from the state that the last one left.

    Piece by piece it is what the layer computes of the whole. The gradient ends at the border between two calls
    (truncated back-propagation), or with detach=False goes through it to the beginning.

    Args:
        layer: one of persistrnn's layers, or a `Stacked` of them, of one direction
        detach: whether the state is cut from its graph after each call; if not, reset() before a deepcopy

    Inputs: a piece of the input, [T, B, I], [B, T, I] with the layer's batch_first, or [T, I], and the layer's keyword
    arguments but hx. Outputs: output, as the layer's, and every c with return_cell_states.

    Attributes:
        state: what the next call begins from, in the layer's form (hx); None: zeros. It is not in the state_dict: it
            belongs to the stream, not to the model

    Raises:
        TypeError: a layer of another type, a state that is none
        ValueError: a bidirectional layer, which needs the whole sequence
    """

    holds_ours = True  # as of a stack

    def __init__(self, layer: RecurrentBase | Stacked, *, detach: bool = True) -> None:
        super().__init__()
        if not isinstance(layer, Stacked):
            check_layer(layer)
        if layer.bidirectional:
            raise ValueError(
                "a bidirectional layer has no stream: its second direction begins at the sequence's end; "
                "use bidirectional=False"
            )
        check_flag("detach", detach)
        self.layer = layer
        self.detach = detach
        self.state: Any = None

    def forward(self, input: Tensor, **options: Any) -> Any:
        if "hx" in options:
            raise TypeError("a stream has a state of its own, got hx; set .state, or call the layer")
        if (proxy := tracing.proxy_in(input, options)) is not None:
            return tracing.leaf(proxy, self, input, **options)
        output, state, *c = self.layer(input, self._initial(), **options)
        self._keep(state)
        return (output, *c) if c else output

    def step(self, input: Tensor) -> Tensor:
        """One time step: y_t [B, H] of x_t [B, I] ([H] of [I] unbatched)."""
        if tracing.proxy_in(input) is not None:  # torch.fx has nodes of forward alone
            time = -2 if self.layer.batch_first else 0
            y: Tensor = self(input.unsqueeze(time)).squeeze(time)
            return y
        output, state = self.layer.step(input, self._initial())
        self._keep(state)
        return output

    def reset(self, rows: Tensor | None = None) -> None:
        """Begin anew with zeros, or the layer's learned states: all rows, or those where ``rows``, bool [B] on the
        state's device, is True.

        Raises:
            TypeError: rows that are no tensor
            ValueError: rows of another dtype or size
        """
        if rows is None:
            self.state = None
            return
        states = self._states()
        rows = validate.read_rows(rows, states)
        if not states:
            return
        begins: list[Tensor] = []
        for layer, _ in self._by_layer():
            zero = states[0].new_zeros(1)
            begins += layer.initial_states() or [zero] * CELLS[layer.cell].states
        anew = iter(zip(begins, states, strict=True))

        def reset(_: Tensor) -> Tensor:
            begin, s = next(anew)
            begin = begin.to(s.dtype)
            return torch.where(
                rows.unsqueeze(-1), begin.unsqueeze(1) if begin.dim() == 2 and s.dim() == 3 else begin, s
            )

        self.state = tree_map(reset, self.state)

    def _by_layer(self) -> list[tuple[RecurrentBase, Any]]:
        """Each layer with its state."""
        if not isinstance(self.layer, Stacked):
            return [(self.layer, self.state)]
        return list(zip(self.layer.each(), self.layer.states_by_layer(self.state, "state"), strict=True))

    def _states(self) -> list[Tensor]:
        """What ``state`` holds, which anyone may set, as a list."""
        if self.state is None:
            return []
        states = [s for layer, state in self._by_layer() for s in validate.state_tensors(layer.cell, state, "state")]
        first = states[0]
        if any(s.dtype not in validate.FLOATS for s in states):
            raise RuntimeError(
                f"state is of torch.float16, torch.bfloat16, torch.float32 or torch.float64, got {states[-1].dtype}; "
                "convert it to the layer's dtype"
            )
        if any(s.dim() not in (2, 3) or (s.dim(), s.shape[1:-1]) != (first.dim(), first.shape[1:-1]) for s in states):
            sizes = ", ".join(str(tuple(s.shape)) for s in states)
            raise RuntimeError(
                f"state is [L, B, features], or [L, features] unbatched, got {sizes}; set what a call of the layer "
                "returned, or None"
            )
        return states

    def _initial(self) -> Any:
        """The state, as a copy where a gradient may be asked for of what was computed in inference mode."""
        states = self._states()
        if torch.is_inference_mode_enabled() or not any(s.is_inference() for s in states):
            return self.state
        return tree_map(lambda s: s.clone() if s.is_inference() else s, self.state)

    def _apply(self, fn: Any, recurse: bool = True) -> "Streaming":
        """The state goes where the parameters go: .to(), .cuda(), .double()."""
        states = self._states()
        super()._apply(fn, recurse)
        if states:
            self.state = tree_map(fn, self.state)
        return self

    def _keep(self, state: Any) -> None:
        check_flag("detach", self.detach)
        self.state = tree_map(torch.detach, state) if self.detach else state
