"""8-bit weights as a product takes them: the very same numbers in the operand's 16-bit dtype.

int8 holds integers, uint8 the bits of float8_e4m3fn without its NaN; the scale of each row stands outside the product.
fp8 is widened by shifts and a product, so that it needs no instruction of sm_89 and runs on sm_80 as well.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def eight_bits(tiling):
    return tiling.widened != ""


@triton.jit
def widened(tile, tiling: tl.constexpr):
    """A tile of weights in the dtype of the product; what is not of 8 bits, as it is."""
    dtype: tl.constexpr = tl.bfloat16 if tiling.widened == "bf16" else tl.float16
    if not eight_bits(tiling):
        return tile
    elif tile.dtype == tl.uint8:
        # Sign, exponent and mantissa at their places in float16; the product makes up for the other bias.
        bits = tile.to(tl.int16)
        half = (((bits << 8) & -0x8000) | ((bits << 7) & 0x3F80)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(dtype)
    else:
        # The interpreter makes garbage of an integer in bfloat16 (seen on 3.9.0).
        return tile.to(tl.float32 if tiling.interpreted else dtype)


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
    """The gates times the scales of their rows, [U, 1] each; none: as they are."""
    if len(scales) == 0:
        return tiles
    else:
        found = ()
        for i in tl.static_range(len(tiles)):
            found = found + (tiles[i] * scales[i],)
        return found
