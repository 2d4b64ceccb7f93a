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
from triton.language.extra.cuda import num_threads

# About 6 seconds at the 0.7 us that one poll of L2 is assumed to take: far above any step, far below a hang.
SPIN_LIMIT = 1 << 23

MANY = tl.constexpr(1024)  # elements of a tile
ASK = tl.constexpr(64)  # polls after which a wait by flags asks whether another one has given up

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
            word = tl.sum(_pairs(bits), 2)[:, :, None]
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
        return _load(pointers, mask, ".cg", False)
    else:
        return _load(pointers, mask, "", True)


@triton.jit
def settle(tiles, pointers, masks, spin_limit, error, in_a_row: tl.constexpr, exchange: tl.constexpr):
    """By flags: the tiles of words, all of one shape, once all words are there, and the spin limit from then on.

    tiles: what ``get`` loaded from there, int32. in_a_row: how many words of the last axis are next to each other in
    memory, from a multiple of as many on: 1, 2 or 4.
    """
    if exchange.poll == "ptx":
        return _spin(tiles, pointers, spin_limit, error, in_a_row), spin_limit
    else:
        found = ()
        for i in tl.static_range(len(tiles)):
            tile = tiles[i]
            polls = spin_limit
            missing = _missing(tile)
            while (missing > 0) & (polls > 0):
                tile = _load(pointers[i], masks[i], "", True)
                missing = _missing(tile)
                polls -= 1
            left = tl.where(missing > 0, 0, spin_limit)
            tl.store(error, 1, mask=left < spin_limit)
            spin_limit = left
            found = found + (tile,)
        return found, spin_limit


@triton.jit
def _spin(tiles, pointers, spin_limit, error, in_a_row: tl.constexpr):
    """Each thread tests its words, of all tiles at once, and loads again those that it misses."""
    n: tl.constexpr = len(tiles)
    parts = ()
    first = ()
    for i in tl.static_range(n):
        parts = parts + _apart(tiles[i], in_a_row)
        first = first + _apart(pointers[i], in_a_row)[:1]
    held: tl.constexpr = min(max(parts[0].numel // num_threads(), 1), 16)
    parts = tl.inline_asm_elementwise(
        _spin_of(n, in_a_row, held),
        _constraints(n, in_a_row, held),
        first + parts + (spin_limit, error),
        dtype=(tl.int32,) * (n * in_a_row),
        is_pure=False,
        pack=held,
    )
    found = ()
    for i in tl.static_range(n):
        found = found + (tl.reshape(_together(parts[i * in_a_row : (i + 1) * in_a_row]), tiles[i].shape),)
    return found


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


@triton.constexpr_function
def _spin_of(tiles, in_a_row, held):
    """Outputs and inputs in the order of ``_spin``, each ``held`` registers."""
    results = tiles * in_a_row * held
    words = [f"${i}" for i in range(results)]
    pointers = [f"${results + i}" for i in range(tiles * held)]
    limit, error = (f"${2 * results + (tiles + i) * held}" for i in range(2))
    loaded = [f"mov.b32 {word}, ${results + tiles * held + i};" for i, word in enumerate(words)]

    larger = [f"larger{i}" for i in range(max(results // 2, 1))]

    def test(of):
        """Whether one of the words is all ones: by the largest, in a tree, which chains few instructions."""
        lines = []
        while len(of) > 1:
            pairs = [(larger[i // 2], of[i], of[i + 1]) for i in range(0, len(of) - 1, 2)]
            lines += [f"max.u32 {most}, {one}, {other};" for most, one, other in pairs]
            of = [pair[0] for pair in pairs] + list(of[2 * len(pairs) :])
        return lines + [f"setp.eq.u32 missing, {of[0]}, 0xffffffff;"]

    again = []
    for i, pointer in enumerate(pointers):
        tile, element = divmod(i, held)
        vector = [words[(tile * in_a_row + part) * held + element] for part in range(in_a_row)]
        wide = f".v{in_a_row}.b32 {{{', '.join(vector)}}}" if in_a_row > 1 else f".b32 {vector[0]}"
        again += [*test(vector), f"@missing ld.relaxed.gpu.global{wide}, [{pointer}];"]
    lines = [
        "{", ".reg .pred missing, ask;", f".reg .b32 {', '.join(larger)}, polls, told;", *loaded, *test(words),
        "@!missing bra done;", f"mov.b32 polls, {limit};",
        "again:", "setp.le.s32 ask, polls, 0;", "@ask bra late;", "sub.s32 polls, polls, 1;", *again,
        f"and.b32 told, polls, {ASK.value - 1};", "setp.ne.u32 ask, told, 0;", "@ask bra test;",
        f"ld.relaxed.sys.global.u32 told, [{error}];", "setp.ne.u32 ask, told, 0;", "@ask bra done;",
        "test:", *test(words), "@missing bra again;", "bra done;",
        "late:", f"st.relaxed.sys.global.u32 [{error}], 1;", "done:", "}",
    ]  # fmt: skip
    return "\n".join(lines)


@triton.constexpr_function
def _constraints(tiles, in_a_row, held):
    results = tiles * in_a_row * held
    return ",".join(["=r"] * results + ["l"] * (tiles * held) + ["r"] * (results + held) + ["l"] * held)


@triton.jit
def read(pointers):
    """Load, past L1, what was put before an announcement that this program has awaited."""
    return _load(pointers, (), ".cg", False)


@triton.jit
def _load(pointers, mask, cache_modifier: tl.constexpr, volatile: tl.constexpr):
    if len(mask) == 0:
        return tl.load(pointers, cache_modifier=cache_modifier, volatile=volatile)
    else:
        return tl.load(pointers, mask=mask[0], other=0.0, cache_modifier=cache_modifier, volatile=volatile)


@triton.jit
def _missing(words):
    """1 where any word is not there, else 0."""
    return tl.max(tl.ravel((words == -1).to(tl.int32)), axis=0)


@triton.jit
def _pairs(tile):
    """The last axis as pairs of neighbours."""
    return tl.reshape(tile, tile.shape[:-1] + (tile.shape[len(tile.shape) - 1] // 2, 2))


@triton.jit
def _apart(tile, n: tl.constexpr):
    """The last axis, in runs of n, as a tuple of n tiles."""
    if n == 1:
        return (tile,)
    elif n == 2:
        return tl.split(_pairs(tile))
    else:
        even, odd = tl.split(_pairs(tile))
        first, third = tl.split(_pairs(even))
        second, fourth = tl.split(_pairs(odd))
        return first, second, third, fourth


@triton.jit
def _together(parts):
    """The inverse, but for a reshape."""
    if len(parts) == 1:
        return parts[0]
    elif len(parts) == 2:
        return tl.join(parts[0], parts[1])
    else:
        return tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))


@triton.constexpr_function
def per_word(dtype, exchange):
    """Elements of a word of the exchange; 1 where it knows none."""
    return 32 // dtype.primitive_bitwidth if exchange.protocol == "flags" else 1


@triton.jit
def words_at(pointer, exchange: tl.constexpr):
    """Where the words are of which a buffer's elements are."""
    if exchange.protocol == "flags":
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer


@triton.jit
def elements_of(words, dtype: tl.constexpr, exchange: tl.constexpr):
    """Tiles of words as tiles of their elements, with a further axis behind: that within a word."""
    if dtype.primitive_bitwidth == 32:
        return words.to(dtype, bitcast=True)
    else:
        bits = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        if exchange.poll == "ptx":
            # An instruction that Triton looks for no load behind: else the join would halve its idea of an operand's
            # width, and h would be shuffled into another layout (seen in TTGIR: kWidth 4 for 2).
            bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.int16, is_pure=False, pack=2)
        return bits.to(dtype, bitcast=True)


@triton.constexpr_function
def _integer(dtype):
    return tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
