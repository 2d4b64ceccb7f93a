"""Tuples of tiles between memory and registers, and what is done to all tiles of a tuple alike."""

import triton
import triton.language as tl

from .exchange import MANY, load_held, store_held
from .tiles import narrow


@triton.jit
def load(pointers, mask, like=None, exchange: tl.constexpr = None):
    """In float32. With a tile ``like`` as ``load_held`` does, and as it is in memory: what widens it waits for it."""
    if like is None:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        return load_held(pointers, mask, like, exchange)


@triton.jit
def load_tiles(pointer, offsets, mask, stride: tl.constexpr, n: tl.constexpr, like=None, exchange: tl.constexpr = None):
    """n tiles [BB, U], ``stride`` elements apart."""
    tiles = ()
    for i in tl.static_range(n):
        tiles = tiles + (load(pointer + offsets + i * stride, mask, like, exchange),)
    return tiles


@triton.jit
def load_states(states, position, offsets, mask, like=None, exchange: tl.constexpr = None):
    """The tuple of states at one 64-bit position of every state's tensor."""
    tiles = ()
    for i in tl.static_range(len(states)):
        tiles = tiles + (load(states[i] + position + offsets, mask, like, exchange),)
    return tiles


@triton.jit
def widen_tiles(tiles):
    wide = ()
    for i in tl.static_range(len(tiles)):
        wide = wide + (tiles[i].to(tl.float32),)
    return wide


@triton.jit
def store(pointers, tile, mask, tiling: tl.constexpr, exchange: tl.constexpr):
    # With one slice no other exchange hides the barriers.
    many: tl.constexpr = 4 * MANY if tiling.slices == 1 else MANY
    store_held(pointers, narrow(tile, pointers.dtype.element_ty, tiling.interpreted), mask, exchange, many)


@triton.jit
def store_tiles(pointer, offsets, mask, stride: tl.constexpr, tiles, tiling: tl.constexpr, exchange: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        store(pointer + offsets + i * stride, tiles[i], mask, tiling, exchange)


@triton.jit
def add_tiles(a, b):
    """Tile by tile, as many as b has; what a has more stays as it is."""
    tiles = ()
    for i in tl.static_range(len(b)):
        tiles = tiles + (a[i] + b[i],)
    return tiles + a[len(b) :]


@triton.jit
def zero_where(condition, tiles):
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where(condition, 0.0, tiles[i]),)
    return chosen


@triton.jit
def only_where(condition, tiles):
    chosen = ()
    for i in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where(condition, tiles[i], 0.0),)
    return chosen


@triton.jit
def choose(condition, a, b):
    """a where the condition holds, else b."""
    chosen = ()
    for i in tl.static_range(len(a)):
        chosen = chosen + (tl.where(condition, a[i], b[i]),)
    return chosen


@triton.jit
def moved(pointers, distance):
    """A tuple of pointers, all so many elements on."""
    result = ()
    for i in tl.static_range(len(pointers)):
        result = result + (pointers[i] + distance,)
    return result
