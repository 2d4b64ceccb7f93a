"""What a cell is: every number about it, once. Planner, kernels, operators, modules and audit read this table.

The mathematics is in ``cells.library``, one PyTorch function of one time step per cell, and in ``device.pointwise``.
Neither torch nor Triton is imported here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: as in ``torch.nn``, lower case.
        gates: rows of W_hh per unit (G).
        states: tiles of state per unit, h first. Other units see h alone.
        saved: tiles per unit and step that the backward needs besides the states.
        recurrent_gradient: whether the gradient of the recurrent half of the gates differs from that of the input half
            and must be stored beside it.
        after: which of the states after the step the backward reads as well, from where the forward has put them.
        params: names of its parameters per unit, each [H] of a layer and direction, beside weights and biases.
        extras: names of what it takes per step and unit beside its gates, without gradient: masks.
        more_inputs: tiles of the input half beyond the gates.
        more_gradients: tiles that the backward stores behind dx, for the gradients of ``params`` alone.
        finite_at_zero: whether both passes make finite numbers of zeros, step after step: then units past H, which
            have nothing else, need no mask.
    """

    name: str
    gates: int
    states: int
    saved: int
    recurrent_gradient: bool
    after: tuple[int, ...] = ()
    params: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    more_inputs: int = 0
    more_gradients: int = 0
    finite_at_zero: bool = False

    @property
    def inputs(self) -> int:
        """Tiles of the input half (X)."""
        return self.gates + self.more_inputs

    @property
    def stored_gradients(self) -> int:
        """Tiles that the backward stores of the input half (V)."""
        return self.inputs + self.more_gradients

    @property
    def given_out(self) -> int:
        """States of which a caller can have every step: h and, where there is one, the second (c)."""
        return min(self.states, 2)


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", gates=4, states=2, saved=4, recurrent_gradient=False, finite_at_zero=True),
        Cell("gru", gates=3, states=1, saved=4, recurrent_gradient=True, finite_at_zero=True),
    )
}
