"""8-bit weights as a product takes them: the very same numbers in the operand's 16-bit dtype.

int8 holds integers, uint8 the bits of float8_e4m3fn without its NaN; the scale of each row stands outside the product.
Four weights are a register, and become two in 5 to 10 instructions that sm_80 has: conversions, of which a
multiprocessor does a quarter as many in a cycle, are not among them.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def eight_bits(tiling):
    return tiling.widened != ""


@triton.constexpr_function
def assembly(bits, to):
    """From $2 to $0 and $1, of PTX. A byte becomes a half of each half of a register: the lower one, with an exponent
    that makes an integer of it, or the upper one, as a number of another bias. One operation, exact, mends it."""
    if bits == "int8" and to == "bf16":  # 128 + the lower 7 bits, less 128 + 128 of the sign
        constants, selectors = (0xBF80BF80, 0), (0x4140, 0x4342)
        each = "prmt.b32 x, x, 0x43434343, {}; and.b32 y, x, 0x43804380; and.b32 x, x, 0x437F437F;"
        each += "fma.rn.bf16x2 ${}, y, c, x;"
    elif bits == "int8":  # 1024 + 128 + the integer
        constants, selectors = (0x64806480, 0), (0x4140, 0x4342)
        each = "xor.b32 x, x, 0x80808080; prmt.b32 x, x, 0x64646464, {}; sub.f16x2 ${}, x, c;"
    else:
        shift, mask, power = (4, 0x07F007F0, 0x7B807B80) if to == "bf16" else (1, 0x3F803F80, 0x5C005C00)
        constants, selectors = (power, 0x80008000), (0x1404, 0x3424)
        each = f"prmt.b32 x, x, 0, {{}}; shr.b32 y, x, {shift}; and.b32 y, y, {mask}; and.b32 x, x, z; or.b32 x, x, y;"
        each += "fma.rn.bf16x2 ${}, x, c, z;" if to == "bf16" else "mul.f16x2 ${}, x, c;"
    both = "".join(f"mov.b32 x, $2; {each.format(selector, i)} " for i, selector in enumerate(selectors))
    set_up = "".join(f"mov.b32 {name}, {value}; " for name, value in zip("cz", constants, strict=True))
    return f"{{ .reg .b32 x, y, c, z; {set_up}{both}}}"


@triton.jit
def widened(tile, tiling: tl.constexpr):
    """A tile of weights in the dtype of the product; what is not of 8 bits, as it is."""
    if not eight_bits(tiling):
        return tile
    elif not tiling.interpreted:
        bits: tl.constexpr = "fp8" if tile.dtype == tl.uint8 else "int8"
        text: tl.constexpr = assembly(bits, tiling.widened)
        if tiling.widened == "bf16":
            return tl.inline_asm_elementwise(text, "=&r,=&r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(text, "=&r,=&r,r", [tile], dtype=tl.float16, is_pure=True, pack=4)
    elif tile.dtype == tl.uint8:
        # As float16, whose exponent has another bias.
        bits = tile.to(tl.int16)
        half = (((bits << 8) & -0x8000) | ((bits << 7) & 0x3F80)).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    else:
        return tile.to(tl.float32)


@triton.jit
def in_turn(tiles, turn, tiling: tl.constexpr):
    """A tuple of tiles, in each turn of the loop that counts ``turn`` anew: so that 8 bits stay in shared memory.

    Were it the same in each turn, the compiler would widen in front of the loop over time, and put 16 bits into shared
    memory. So a tile hangs on a condition of which only LLVM, much later, knows that it always holds. It must be a
    branch: it becomes a select by a scalar, which Triton takes a change of layout past. Where tl.where or an exclusive
    or spread the scalar over a tile, it took none, and the weights were in registers for all steps (seen on 3.6.0 and
    3.9.0, as what is written here).
    """
    if not eight_bits(tiling):
        return tiles
    else:
        always = ((turn * 2) & 1) == 0
        found = ()
        for i in tl.static_range(len(tiles)):
            found = found + (_if(always, tiles[i]),)
        return found


@triton.jit
def _if(condition, tile):
    other = tl.zeros_like(tile)
    if condition:
        other = tile
    return other


@triton.jit
def scaled(tiles, scales):
    """The gates times the scales of their rows, [1, U] each; none: as they are."""
    if len(scales) == 0:
        return tiles
    else:
        found = ()
        for i in tl.static_range(len(tiles)):
            found = found + (tiles[i] * scales[i],)
        return found
