"""Random masks from keys, in one pass over what is written: `persistrnn.masks` has the generator, and it in torch."""

import triton
import triton.language as tl

BLOCK = 1024
WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit(do_not_specialize=["T", "B"])
def draw(keys, found, T, B, rows, H: tl.constexpr, fields: tl.constexpr, BLOCK: tl.constexpr):
    """keys: int64 [L, rows, fields], seed, mask, threshold, first step, stride, first unit; found: uint8 [L, T, B,
    rows, H]; rows: directions times masks. The second axis of the grid is L."""
    layer = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = T.to(tl.int64) * B * rows * H
    inside = index < count
    place = index // H
    key = keys + (layer * rows + place % rows) * fields
    seed, mask = tl.load(key, mask=inside, other=0), tl.load(key + 1, mask=inside, other=0)
    threshold = tl.load(key + 2, mask=inside, other=0)
    step = tl.load(key + 3, mask=inside, other=0) + tl.load(key + 4, mask=inside, other=0) * (place // rows // B)
    unit = index % H + tl.load(key + 5, mask=inside, other=0)
    row = place // rows % B
    low, high = (seed & WORD).to(tl.uint32), (seed >> 32).to(tl.uint32)
    a, b, c, d = tl.philox_impl(
        step.to(tl.uint32), row.to(tl.uint32), (unit >> 2).to(tl.uint32), mask.to(tl.uint32), low, high
    )
    even, odd = tl.where(unit & 2 == 0, a, c), tl.where(unit & 2 == 0, b, d)
    word = tl.where(unit & 1 == 0, even, odd)
    tl.store(found + layer * count + index, (word.to(tl.int64) < threshold).to(tl.uint8), mask=inside)
