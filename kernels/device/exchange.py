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
    neighbour in a pipeline may wait on it as well: the argument is that of any reader, and since nobody waits for the
    layer after it, no two groups wait for each other.

``"flags"``
    The buffer is filled beforehand with a reserved NaN (all bits one). put: stores, with a computed NaN of that
    pattern rewritten to another NaN. get: load the tile until no reserved pattern is left. Each element carries its
    own flag, so no order between elements is needed and NaN in the data flows through.

    Why it is right: a plain store beside a load that may come before it is a data race in the PTX memory model, which
    then promises nothing, ``volatile`` or not. Store and load are therefore ``relaxed`` at gpu scope, and of one
    element each: morally strong, they do not tear, and a load that repeats sees the store in the end. So they are not
    vectorised. Where there is no PTX (the interpreter, and AMD, whose model is another), stores are plain and loads
    volatile.

Every wait is bounded: ``spin_limit`` polls. Each thread whose wait runs out writes to the error word in host memory,
and its limit is 0 from then on: the program runs to its end without waiting again, and the host raises.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

# About 6 seconds at the 0.7 us that one poll of L2 is assumed to take: far above any step, far below a hang.
SPIN_LIMIT = 1 << 23

MANY = tl.constexpr(1024)  # elements of a tile


@dataclass(frozen=True)
class Exchange:
    """Compile-time choice of protocol.

    Attributes:
        protocol: ``"counter"`` or ``"flags"``.
        poll: ``"ptx"``, a spin per thread with no barrier in it (seen: 5 to 6 barriers per step against 10), or
            ``"atomic"`` for the interpreter and for targets that have no PTX.
        spin_limit: polls before a wait gives up.
        stride: elements between the counters of two jobs, so that they lie in different 128-byte lines.
        release: of an announcement: ``"ptx"``, behind one barrier, or ``"atomic"``, Triton's own.
    """

    protocol: str = "counter"
    poll: str = "ptx"
    spin_limit: int = SPIN_LIMIT
    stride: int = 32
    release: str = "ptx"


def exchange_on(arch: str) -> Exchange:
    """What kernels for an architecture use; "" is the interpreter.

    With tcgen05 the release by hand spilled in the streamed LSTM backward (seen: H=4096, B=64, bf16, 46 instructions on
    Triton 3.6.0 and 116 on 3.9.0), where Triton's own does not.
    """
    if not arch.startswith("sm_"):
        return Exchange(poll="atomic")
    return Exchange(release="atomic" if arch.startswith("sm_10") else "ptx")


@triton.jit
def put(pointers, tile, mask, exchange: tl.constexpr):
    """Store a tile, already in the buffer's dtype, that other slices will read."""
    if exchange.protocol == "flags":
        bits = tile.to(_integer(tile.dtype), bitcast=True)
        # The largest positive integer is a NaN too, and not the reserved one.
        other: tl.constexpr = 0x7FFF if tile.dtype.primitive_bitwidth == 16 else 0x7FFFFFFF
        bits = tl.where(bits == -1, other, bits).to(bits.dtype)
        if exchange.poll == "ptx":
            _store_each(pointers, bits, mask, True)
        else:
            tl.store(pointers, bits.to(tile.dtype, bitcast=True), mask=mask)
    else:
        store_held(pointers, tile, mask, exchange)


@triton.jit
def store_held(pointers, tile, mask, exchange: tl.constexpr):
    """Each thread stores the elements that it holds.

    ``tl.store`` first moves every tile through shared memory, between two barriers, so that a thread has more of a row:
    of h, c and four saved tiles that was 11 barriers of 16 in a step, and 19% of its 3,674 cycles (clock, LSTM 256,
    B=16, bf16, sm_90, forward). Of a tile with many elements per thread it is the better way (registers 155 against
    187, LSTM 128 backward in one slice).
    """
    if exchange.poll == "ptx" and tile.numel < MANY:
        _store_each(pointers, tile.to(_integer(tile.dtype), bitcast=True), mask, False)
    else:
        tl.store(pointers, tile, mask=mask)


@triton.jit
def arrive(counter, exchange: tl.constexpr):
    """Announce that everything this program has put is there."""
    if exchange.protocol == "counter":
        announce(counter, exchange)


@triton.jit
def wait(counter, target, spin_limit, error, exchange: tl.constexpr):
    """Return once the group's counter has reached ``target``: the spin limit from then on (0: it never did)."""
    if exchange.protocol == "counter":
        return await_count(counter, target, spin_limit, error, exchange)
    else:
        return spin_limit


@triton.jit
def announce(counter, exchange: tl.constexpr):
    tl.debug_barrier()
    if exchange.poll == "ptx" and exchange.release == "ptx":
        # In front of its own release-add Triton 3.9 puts a second barrier, Triton 3.6 none.
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.s32 first, thread, 0;
            @first red.release.gpu.global.add.u32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l",
            [counter],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


# Every thread polls for itself, and one that gives up tells so itself: by the time thread 0 polls, the late program may
# have come, while other threads have gone on with old data. The store stands behind the loop: within it the LSTM's
# backward in a pipeline spilled (seen: H=512, bf16, sm_90, Triton 3.9.0).
_POLL = tl.constexpr(
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
    setp.gt.and.s32 more, $3, 0, !reached;
    @more st.relaxed.sys.global.u32 [$4], 1;
    """
)
# What follows in ``get`` has barriers inside a loop up to the spin limit, on which all threads must agree.
_AGREE = tl.constexpr("bar.red.and.pred reached, 0, reached;\n")
_LEFT = tl.constexpr("selp.b32 $0, $3, 0, reached;\n}")


@triton.jit
def await_count(counter, target, spin_limit, error, exchange: tl.constexpr):
    if exchange.poll == "ptx":
        assembly: tl.constexpr = _POLL + (_AGREE if exchange.protocol == "flags" else "") + _LEFT
        return tl.inline_asm_elementwise(
            assembly,
            "=r,l,r,r,l",
            [counter, target, spin_limit, error],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        polls = spin_limit
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while (seen < target) & (polls > 0):
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            polls -= 1
        left = tl.where(seen < target, 0, spin_limit)
        tl.store(error, 1, mask=left < spin_limit)
        return left


@triton.jit
def get(pointers, mask, spin_limit, error, exchange: tl.constexpr):
    """Load a tile that other slices have put, and the spin limit from then on. ``mask`` may be None."""
    if exchange.protocol == "counter":
        return _load(pointers, mask, ".cg", False), spin_limit
    else:
        tile = _load_flagged(pointers, mask, exchange)
        polls = spin_limit
        missing = _missing(tile)
        while (missing > 0) & (polls > 0):
            tile = _load_flagged(pointers, mask, exchange)
            missing = _missing(tile)
            polls -= 1
        left = tl.where(missing > 0, 0, spin_limit)
        _report(error, left < spin_limit, exchange)
        return tile, left


@triton.jit
def _report(error, gave_up, exchange: tl.constexpr):
    if exchange.poll == "ptx":
        tl.inline_asm_elementwise(
            """{
            .reg .pred late;
            setp.ne.s32 late, $2, 0;
            @late st.relaxed.sys.global.u32 [$1], 1;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [error, gave_up.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(error, 1, mask=gave_up)


@triton.jit
def _store_each(pointers, bits, mask, relaxed: tl.constexpr):
    """Store integers, each by an access of its own width."""
    narrow: tl.constexpr = bits.dtype.primitive_bitwidth == 16
    assembly: tl.constexpr = _store_of(bits.dtype.primitive_bitwidth, relaxed)
    tl.inline_asm_elementwise(
        assembly,
        "=r,l,h,r" if narrow else "=r,l,r,r",
        [pointers, bits, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_flagged(pointers, mask, exchange: tl.constexpr):
    if exchange.poll == "ptx":
        dtype: tl.constexpr = pointers.dtype.element_ty
        narrow: tl.constexpr = dtype.primitive_bitwidth == 16
        there = 1 if mask is None else mask.to(tl.int32)
        bits = tl.inline_asm_elementwise(
            _LOAD_16 if narrow else _LOAD_32,
            "=h,l,r" if narrow else "=r,l,r",
            [pointers, there],
            dtype=tl.int16 if narrow else tl.int32,
            is_pure=False,
            pack=1,
        )
        return bits.to(dtype, bitcast=True)
    else:
        return _load(pointers, mask, "", True)


@triton.constexpr_function
def _store_of(width, relaxed):
    return f"""{{
    .reg .pred there;
    setp.ne.s32 there, $3, 0;
    @there st{".relaxed.gpu" if relaxed else ""}.global.b{width} [$1], $2;
    mov.b32 $0, 0;
    }}"""


_LOAD = """{{
    .reg .pred there;
    setp.ne.s32 there, $2, 0;
    mov.b{0} $0, 0;
    @there ld.relaxed.gpu.global.b{0} $0, [$1];
    }}"""
_LOAD_16, _LOAD_32 = tl.constexpr(_LOAD.format(16)), tl.constexpr(_LOAD.format(32))


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
