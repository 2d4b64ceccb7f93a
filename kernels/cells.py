"""What a cell is: every number about it, once. Planner, kernels, operators, modules and audit read this table.

The mathematics is in ``device.pointwise``. Neither torch nor Triton is imported here.
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
    """

    name: str
    gates: int
    states: int
    saved: int
    recurrent_gradient: bool


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", gates=4, states=2, saved=4, recurrent_gradient=False),
        Cell("gru", gates=3, states=1, saved=4, recurrent_gradient=True),
    )
}
