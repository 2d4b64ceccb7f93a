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
    A word of 32 bits, which is two elements of 16, carries its own flag: the buffer is filled beforehand with words of
    all ones, a NaN in float32 and in each half. put: stores of words, with a computed one of that pattern rewritten to
    other NaN. get and settle: load the tile until no such word is left. No order between words is needed, there is no
    announcement and no barrier, and NaN in the data flows through.

    Why it is right: a plain store beside a load that may come before it is a data race in the PTX memory model, which
    then promises nothing. Two accesses are morally strong, and no race, if both are strong, of scopes that hold both
    threads, and overlap completely (PTX ISA 9, section 8.7); accesses of other widths beside them would void the model
    (8.7.2). A word is therefore stored by one ``st.relaxed.gpu.b32``. A load of four words is four accesses of one word
    each, in no order (8.2.4): ``ld.v4.b32`` is right where ``ld.b128`` would not be, and each word is tested by itself.
    The first load is a volatile one, because Triton then finds its layout and width; it is as a relaxed one of system
    scope (8.4.2). A relaxed load that repeats sees the store in the end. Where there is no PTX (the interpreter, and
    AMD, whose model is another), stores are plain and loads volatile.

    Rows must be whole words: of an odd H in 16 bits the counter is taken (``fitting``). Slots that no step puts hold
    states of the caller, whose NaN are replaced (``launch.unreserved``).

Every wait is bounded: ``spin_limit`` polls. Each thread whose wait runs out writes to the error word in host memory,
and the host raises. By the counter its limit is 0 from then on: the program runs to its end without waiting again. By
flags, in PTX, a thread cannot hand on to the next wait what it knows of a tile: there every wait asks the error word
now and then, and ends where somebody has given up.
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from .words import look, pairs, words_at

# About 6 seconds at the 0.7 us that one poll of L2 is assumed to take: far above any step, far below a hang.
SPIN_LIMIT = 1 << 23

MANY = tl.constexpr(1024)  # elements of a tile

# What the next two are when nothing else is asked for: nobody has measured yet which is faster (bench/NOTES.md).
PROTOCOL = "counter"
POLLERS = "all"


@dataclass(frozen=True)
class Exchange:
    """Compile-time choice of protocol.

    Attributes:
        protocol: ``"counter"`` or ``"flags"``.
        poll: ``"ptx"``, a spin with no barrier in it (seen: 5 to 6 barriers per step against 10), or ``"atomic"`` for
            the interpreter and for targets that have no PTX.
        spin_limit: polls before a wait gives up.
        stride: elements between the counters of two jobs, so that they lie in different 128-byte lines.
        release: of an announcement: ``"ptx"``, behind one barrier, or ``"atomic"``, Triton's own.
        pollers: of a counter, by ``"ptx"``: ``"all"`` threads, each for itself, or one ``"warp"`` or one ``"thread"``,
            for which the others wait at a barrier.
    """

    protocol: str = PROTOCOL
    poll: str = "ptx"
    spin_limit: int = SPIN_LIMIT
    stride: int = 32
    release: str = "ptx"
    pollers: str = POLLERS


def exchange_on(arch: str) -> Exchange:
    """What kernels for an architecture use; "" is the interpreter.

    With tcgen05 the release by hand spilled in the streamed LSTM backward (seen: H=4096, B=64, bf16, 46 instructions on
    Triton 3.6.0 and 116 on 3.9.0), where Triton's own does not.
    """
    if not arch.startswith("sm_"):
        return Exchange(poll="atomic")
    return Exchange(release="atomic" if arch.startswith("sm_10") else "ptx")


def fitting(exchange: Exchange, row_bytes: int) -> Exchange:
    """``exchange`` for buffers with rows of H elements of so many bytes: the counter where they are no whole words, as
    of an odd H in 16 bits."""
    return exchange if row_bytes % 4 == 0 else replace(exchange, protocol="counter")


@triton.jit
def put(pointers, tile, mask, exchange: tl.constexpr):
    """Store a tile, already in the buffer's dtype, that other slices will read. Its last axis is a row of memory."""
    if exchange.protocol == "flags":
        bits = tile.to(_integer(tile.dtype), bitcast=True)
        if tile.dtype.primitive_bitwidth == 16:
            # In the tile's own layout: neighbours are mostly in neighbouring threads, and nothing passes through shared
            # memory (as two tiles of halves it did, between two barriers). Of two, the first stores.
            second = tl.arange(0, tile.shape[1])[None, :] % 2
            bits = bits.to(tl.uint16, bitcast=True).to(tl.int32) << (16 * second)
            word = tl.sum(pairs(bits), 2)[:, :, None]
            bits = tl.reshape(tl.broadcast_to(word, (tile.shape[0], tile.shape[1] // 2, 2)), tile.shape)
            mask = mask & (second == 0)
        pointers = words_at(pointers, exchange)
        # Another NaN, of float32 and in each half.
        bits = tl.where(bits == -1, 0x7FFFFFFF, bits)
        if exchange.poll == "ptx":
            _store_each(pointers, bits, mask, True)
        else:
            tl.store(pointers, bits, mask=mask)
    else:
        store_held(pointers, tile, mask, exchange)


@triton.jit
def store_held(pointers, tile, mask, exchange: tl.constexpr, many: tl.constexpr = MANY):
    """Each thread stores the elements that it holds.

    ``tl.store`` first moves every tile through shared memory, between two barriers, so that a thread has more of a row:
    of h, c and four saved tiles that was 11 barriers of 16 in a step, and 19% of its 3,674 cycles (clock, LSTM 256,
    B=16, bf16, sm_90, forward). Of a tile with many elements per thread it is the better way (registers 155 against
    187, LSTM 128 backward in one slice).
    """
    if exchange.poll == "ptx" and tile.numel < many:
        _store_each(pointers, tile.to(_integer(tile.dtype), bitcast=True), mask, False)
    else:
        tl.store(pointers, tile, mask=mask)


@triton.jit
def load_held(pointers, mask, like, exchange: tl.constexpr):
    """Load, zero where the mask is not, what nobody writes during the launch: each thread the elements that it has of
    ``like``, a float32 tile of the same shape.

    ``tl.load`` reads a row in a row, and what is then each thread's own passes through shared memory: between two
    barriers, before which it must be there. (Clock, LSTM 32, B=16, bf16, one slice, forward, a step ahead in both: with
    ``tl.load`` 10 barriers and 1,720 cycles on sm_80, with this 2 and 1,270.)
    """
    if exchange.poll == "ptx" and pointers.dtype.element_ty.primitive_bitwidth > 8:
        width: tl.constexpr = pointers.dtype.element_ty.primitive_bitwidth
        assembly: tl.constexpr = _load_of(width)
        # Of ``like`` nothing is read: an operation on elements takes the layout of its operands.
        return tl.inline_asm_elementwise(
            assembly,
            "=h,l,r,r" if width == 16 else "=r,l,r,r",
            [pointers, mask.to(tl.int32), like.to(tl.int32, bitcast=True)],
            dtype=pointers.dtype.element_ty,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.constexpr_function
def _load_of(width):
    return f"""{{
    .reg .pred there;
    setp.ne.s32 there, $2, 0;
    mov.b{width} $0, 0;
    @there ld.global.b{width} $0, [$1];
    }}"""


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


# A thread that polls and gives up tells so itself: by the time another one polls, the late program may have come, while
# it has gone on with old data. The store stands behind the loop: within it the LSTM's
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
_LEFT = tl.constexpr("selp.b32 $0, $3, 0, reached;\n}")
# The threads that do not poll go on to a barrier, where all agree: one for threads of a warp on different ways.
_OTHERS = """.reg .pred other;
    mov.u32 seen, %tid.x;
    setp.ge.u32 other, seen, {};
    setp.eq.u32 reached, 0, 0;
    @other bra done;
    again:"""
_AGREE = "barrier.red.and.pred reached, 0, reached;\n"
_POLL_OF_WARP, _POLL_OF_THREAD = (
    tl.constexpr(_POLL.value.replace("again:", _OTHERS.format(threads), 1) + _AGREE) for threads in (32, 1)
)


@triton.jit
def await_count(counter, target, spin_limit, error, exchange: tl.constexpr):
    if exchange.poll == "ptx":
        some: tl.constexpr = _POLL_OF_WARP if exchange.pollers == "warp" else _POLL_OF_THREAD
        assembly: tl.constexpr = (_POLL if exchange.pollers == "all" else some) + _LEFT
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
def get(pointers, mask, exchange: tl.constexpr):
    """Load a tile that other slices have put, by flags as ``settle`` takes it. mask: a tuple of one, or of none."""
    if exchange.protocol == "counter":
        return _load(pointers, mask)
    else:
        return look(pointers, mask)


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


@triton.constexpr_function
def _store_of(width, relaxed):
    return f"""{{
    .reg .pred there;
    setp.ne.s32 there, $3, 0;
    @there st{".relaxed.gpu" if relaxed else ""}.global.b{width} [$1], $2;
    mov.b32 $0, 0;
    }}"""


@triton.jit
def read(pointers):
    """Load, past L1, what was put before an announcement that this program has awaited."""
    return _load(pointers, ())


@triton.jit
def _load(pointers, mask):
    if len(mask) == 0:
        return tl.load(pointers, cache_modifier=".cg")
    else:
        return tl.load(pointers, mask=mask[0], other=0.0, cache_modifier=".cg")


@triton.constexpr_function
def _integer(dtype):
    return tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
