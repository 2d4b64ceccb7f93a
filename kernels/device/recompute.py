"""What a forward saved, of many steps at once, from the states that are known: elementwise, by the cell's own forward.

No scan is needed: the recurrent half of the gates is one GEMM with the h of all steps.
"""

import triton
import triton.language as tl

from .marks import BEGINS
from .tiles import narrow, previous_slot

BLOCK = 1024


@triton.jit(do_not_specialize=["T", "B"])
def activate(
    x_gates, r_gates, bias, states, step_data, saved, T, B, cell: tl.constexpr, of: tl.constexpr, D: tl.constexpr,
    H: tl.constexpr, heads: tl.constexpr, interpreted: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_gates: [T, B, D, X*H]; r_gates: fp32 [D, T*B, G*H]; bias: [D, G*H]; states: a tuple of [T + 2, B, D, H], those
    of all steps; step_data: as in ``scan``; saved: [T, B, D, n, H]. of: the cell's numbers. heads: in each direction; D
    counts all of them. The first axis of the grid has the T*B*H elements of one."""
    G: tl.constexpr = of.gates
    X: tl.constexpr = of.inputs
    n: tl.constexpr = of.saved
    P: tl.constexpr = len(of.params)
    E: tl.constexpr = len(of.extras)
    marks, params, extras = step_data
    direction = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = T.to(tl.int64) * B * H
    mask = index < count
    row, unit = index // H, index % H
    both = row * D + direction
    x = ()
    for g in tl.static_range(X):
        x = x + (tl.load(x_gates + (both * X + g) * H + unit, mask=mask, other=0.0).to(tl.float32),)
    r = ()
    for g in tl.static_range(G):
        at = direction.to(tl.int64) * count * G + (row * G + g) * H + unit
        b = tl.load(bias + (direction * G + g) * H + unit, mask=mask, other=0.0).to(tl.float32)
        r = r + (tl.load(r_gates + at, mask=mask, other=0.0) + b,)
    reverse = direction // heads
    before = row + previous_slot(0, reverse) * B
    if marks is not None:
        # Of a row that begins anew, the reset state: in slot T + 1, in reverse in slot 0.
        begins = tl.load(marks + row * (D // heads) + reverse, mask=mask, other=0) == BEGINS
        before = tl.where(begins, row % B + tl.where(reverse == 0, (T + 1).to(tl.int64) * B, 0), before)
    state = ()
    for i in tl.static_range(len(states)):
        at = (before * D + direction) * H + unit
        state = state + (tl.load(states[i] + at, mask=mask, other=0.0).to(tl.float32),)
    p = ()
    for i in tl.static_range(P):
        p = p + (tl.load(params + (direction * P + i) * H + unit, mask=mask, other=0.0).to(tl.float32),)
    e = ()
    for i in tl.static_range(E):
        e = e + (tl.load(extras + (both * E + i) * H + unit, mask=mask, other=0.0).to(tl.float32),)
    _new, kept = cell(x, r, state, p, e)
    for i in tl.static_range(n):
        value = narrow(kept[i], saved.dtype.element_ty, interpreted)
        tl.store(saved + (both * n + i) * H + unit, value, mask=mask)
