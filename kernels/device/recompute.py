"""The activated gates of many steps at once, from y and c that are known: elementwise, by the cell's own forward.

What a cell saves besides its states depends on the two halves of the gates alone, so that no scan is needed: the
recurrent half is one GEMM with the h of all steps.
"""

import triton
import triton.language as tl

from .tiles import narrow

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def activate(
    x_gates, r_gates, bias, saved, count, cell: tl.constexpr, shape: tl.constexpr, interpreted: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x_gates: [T, B, D, G*H]; r_gates: fp32 [D, T*B, G*H]; bias: [D, G*H]; saved: [T, B, D, n, H].
    shape: (states, G, D, n, H); count: T*B*H, the elements of one direction, on the first axis of the grid."""
    states: tl.constexpr = shape[0]
    G: tl.constexpr = shape[1]
    D: tl.constexpr = shape[2]
    n: tl.constexpr = shape[3]
    H: tl.constexpr = shape[4]
    direction = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    row, unit = index // H, index % H
    both = row * D + direction
    x = ()
    r = ()
    for g in tl.static_range(G):
        x = x + (tl.load(x_gates + (both * G + g) * H + unit, mask=mask, other=0.0).to(tl.float32),)
        at = direction.to(tl.int64) * count * G + (row * G + g) * H + unit
        b = tl.load(bias + (direction * G + g) * H + unit, mask=mask, other=0.0).to(tl.float32)
        r = r + (tl.load(r_gates + at, mask=mask, other=0.0) + b,)
    state = ()
    for _i in tl.static_range(states):
        state = state + (tl.zeros([BLOCK], tl.float32),)
    _new, kept = cell(x, r, state, (), ())
    for i in tl.static_range(n):
        value = narrow(kept[i], saved.dtype.element_ty, interpreted)
        tl.store(saved + (both * n + i) * H + unit, value, mask=mask)
