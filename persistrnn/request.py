"""What is asked of a call, and what it gives: the records between the layers' surfaces and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from persistrnn.eight_bits import EightBits
from persistrnn.options import Options
from persistrnn.validate import Given


class Request(NamedTuple):
    """A call as it came.

    Attributes:
        weights: in torch.nn's order, the cell's own parameters behind each layer's and direction's
        hx: the states, in the form of the layer's
        options: checked before
        sizes: a module's own input_size, hidden_size and proj_size, of which its weights must be
        learned: the states that stand for zeros, each [L*D, features]; empty: zeros do
        eight_bits: W_hh of a quantised layer, for which `weights` has placeholders
    """

    cell: str
    input: Tensor | PackedSequence
    weights: Sequence[Tensor]
    hx: Any
    options: Options
    given: Given = Given()
    return_c: bool = False
    sizes: tuple[int, int, int] | None = None
    learned: Sequence[Tensor] = ()
    eight_bits: EightBits | None = None

    @property
    def dequantized(self) -> Request:
        """With the weights that the 8 bits stand for in their places."""
        if self.eight_bits is None:
            return self
        return self._replace(weights=self.eight_bits.dequantized(self.weights), eight_bits=None)


class Found(NamedTuple):
    """What a call gives: output, the final states, every c or None, and the path that ran it."""

    output: Any
    states: list[Tensor]
    c: Any
    path: str

    def given_out(self, return_c: bool) -> Any:
        """As a layer gives it: (output, state), and with return_c every c."""
        state = self.states[0] if len(self.states) == 1 else tuple(self.states)
        return (self.output, state, self.c) if return_c else (self.output, state)
