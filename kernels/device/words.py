"""Words of 32 bits that are their own flags: what ``exchange`` exchanges by the protocol ``"flags"``.

A word is one element of 32 bits or two of 16. All ones: not there yet.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

ASK = tl.constexpr(64)  # polls after which a wait asks whether another one has given up


@triton.jit
def look(pointers, mask):
    """Load words, there or not. mask: a tuple of one, or of none."""
    if len(mask) == 0:
        return tl.load(pointers, volatile=True)
    else:
        return tl.load(pointers, mask=mask[0], other=0, volatile=True)


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
                tile = look(pointers[i], masks[i])
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
def _missing(words):
    """1 where any word is not there, else 0."""
    return tl.max(tl.ravel((words == -1).to(tl.int32)), axis=0)


@triton.jit
def pairs(tile):
    """The last axis as pairs of neighbours."""
    return tl.reshape(tile, tile.shape[:-1] + (tile.shape[len(tile.shape) - 1] // 2, 2))


@triton.jit
def _apart(tile, n: tl.constexpr):
    """The last axis, in runs of n, as a tuple of n tiles."""
    if n == 1:
        return (tile,)
    elif n == 2:
        return tl.split(pairs(tile))
    else:
        even, odd = tl.split(pairs(tile))
        first, third = tl.split(pairs(even))
        second, fourth = tl.split(pairs(odd))
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
