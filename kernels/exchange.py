"""How the slices of one group hand a tile of h (or of gate gradients) to each other, once per time step.

A group is the S programs that share a batch tile and a direction. Each owns some units and needs all of them.
Two protocols, chosen at compile time by ``exchange.protocol``:

``"counter"``
    put: plain stores. arrive: CTA barrier, then one release-add of 1 on the group's counter. wait: acquire-load
    the counter until it has reached ``step * S``. get: load past L1.

    Why it is right: the barrier orders every thread's stores before the one thread's release-add; the adds of the
    S programs form one release sequence, so a reader whose acquire-load sees ``step * S`` observes all of their
    stores (PTX memory model, causality order: barrier, release pattern, acquire pattern are cumulative). Every
    thread acquires for itself, or, where a single thread polls, a barrier follows. A line may have entered L1
    before a neighbour wrote its part of it, hence ``.cg``. No slot is written twice in a launch, so a fast program
    cannot overwrite what a slow one still reads. The counter counts up for the whole launch and is owned by it. A
    neighbour of a wave may wait on it as well: the argument is that of any reader, and since nobody waits for the layer
    after it, no two groups wait for each other.

``"flags"``
    The buffer is filled beforehand with a reserved NaN (all bits one). put: stores, with a computed NaN of that
    pattern rewritten to another NaN. get: load the tile until no reserved pattern is left. Each element carries its
    own flag, so no order between elements is needed and NaN in the data flows through.

Every wait is bounded: ``patience`` polls. The wait that runs out writes to the error word in host memory and leaves
patience 0, so that the program then runs to its end without waiting again, and the host raises.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

# About 6 seconds at the 0.7 us that one poll of L2 is assumed to take: far above any step, far below a hang.
PATIENCE = 1 << 23


@dataclass(frozen=True)
class Exchange:
    """Compile-time choice of protocol.

    Attributes:
        protocol: ``"counter"`` or ``"flags"``.
        poll: ``"ptx"``, a spin per thread with no barrier in it (seen: 5 to 6 barriers per step against 10), or
            ``"atomic"`` for the interpreter and for targets that have no PTX.
        patience: polls before a wait gives up.
        stride: elements between the counters of two jobs, so that they lie in different 128-byte lines.
    """

    protocol: str = "counter"
    poll: str = "ptx"
    patience: int = PATIENCE
    stride: int = 32


@triton.jit
def put(pointers, tile, mask, exchange: tl.constexpr):
    """Store a tile, already in the buffer's dtype, that other slices will read."""
    if exchange.protocol == "flags":
        bits = tile.to(_integer(tile.dtype), bitcast=True)
        # The largest positive integer is a NaN too, and not the reserved one.
        other: tl.constexpr = 0x7FFF if tile.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
        tile = tl.where(bits == -1, other, bits).to(bits.dtype).to(tile.dtype, bitcast=True)
    tl.store(pointers, tile, mask=mask)


@triton.jit
def arrive(counter, exchange: tl.constexpr):
    """Announce that everything this program has put is there."""
    if exchange.protocol == "counter":
        announce(counter)


@triton.jit
def wait(counter, target, patience, error, exchange: tl.constexpr):
    """Return once the group's counter has reached ``target``; the patience left over (0: it never did)."""
    if exchange.protocol == "counter":
        return await_count(counter, target, patience, error, exchange)
    else:
        return patience


@triton.jit
def announce(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def await_count(counter, target, patience, error, exchange: tl.constexpr):
    if exchange.poll == "ptx":
        left = tl.inline_asm_elementwise(
            """{
            .reg .pred reached, more;
            .reg .b32 seen, polls;
            mov.b32 polls, $3;
            again:
            ld.acquire.gpu.global.u32 seen, [$1];
            setp.ge.s32 reached, seen, $2;
            @reached bra done;
            sub.s32 polls, polls, 1;
            setp.gt.s32 more, polls, 0;
            @more bra again;
            done:
            selp.b32 $0, $3, 0, reached;
            }""",
            "=r,l,r,r",
            [counter, target, patience],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        polls = patience
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while (seen < target) & (polls > 0):
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls -= 1
        left = tl.where(seen < target, 0, patience)
    tl.store(error, 1, mask=left < patience)
    return left


@triton.jit
def get(pointers, mask, patience, error, exchange: tl.constexpr):
    """Load a tile that other slices have put, and the patience left over. ``mask`` may be None."""
    if exchange.protocol == "counter":
        return _load(pointers, mask, ".cg", False), patience
    else:
        tile = _load(pointers, mask, "", True)
        polls = patience
        missing = _missing(tile)
        while (missing > 0) & (polls > 0):
            tile = _load(pointers, mask, "", True)
            missing = _missing(tile)
            polls -= 1
        left = tl.where(missing > 0, 0, patience)
        tl.store(error, 1, mask=left < patience)
        return tile, left


@triton.jit
def read(pointers):
    """Load, past L1, what was put before an announcement that this program has awaited."""
    return _load(pointers, None, ".cg", False)


@triton.jit
def _load(pointers, mask, cache_modifier: tl.constexpr, volatile: tl.constexpr):
    if mask is None:
        return tl.load(pointers, cache_modifier=cache_modifier, volatile=volatile)
    else:
        return tl.load(pointers, mask=mask, other=0.0, cache_modifier=cache_modifier, volatile=volatile)


@triton.jit
def _missing(tile):
    """1 where any element still holds the reserved NaN, else 0."""
    flagged = tile.to(_integer(tile.dtype), bitcast=True) == -1
    return tl.max(tl.ravel(flagged.to(tl.int32)), axis=0)


@triton.constexpr_function
def _integer(dtype):
    return tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
