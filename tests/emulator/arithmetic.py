"""Numbers as the GPU has them, on NumPy vectors with one element per lane.

``ex2.approx``, ``div.approx`` and ``div.full`` are exact here up to NumPy's rounding. The sum inside a matrix product
is in float32, in NumPy's order. Operands in tf32 lose their lower 13 bits, as the PTX ISA lets them.
"""

from __future__ import annotations

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S16, S32, S64, F16, F32, F64 = np.int16, np.int32, np.int64, np.float16, np.float32, np.float64
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}

Array = np.ndarray


def to_f16(x: Array) -> Array:
    """Bits of float32 in float16, to nearest even; NaN becomes the canonical one."""
    return np.where(x == x, x.astype(F16).view(U16), U16(0x7FFF))


def to_bf16(x: Array) -> Array:
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(x == x, rounded, U16(0x7FFF))


def to_tf32(x: Array) -> Array:
    return np.where(np.isfinite(x), (x.view(U32) + U32(0x1000)) & U32(0xFFFFE000), x.view(U32))


def to_s32(x: Array) -> Array:
    """Toward zero, held within the integers; 0 of NaN."""
    return np.clip(np.where(x == x, x, F32(0)).astype(F64), -(2.0**31), 2.0**31 - 1).astype(S32)


def cut_to_tf32(bits: Array) -> Array:
    return (bits & U32(0xFFFFE000)).view(F32)


def of_bf16(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once, but for the rare double rounding from float64."""
    return (a.astype(F64) * b + c).astype(F32)


def flush(x: Array) -> Array:
    """``.ftz``: zeros of their sign for the subnormal numbers of float32."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)


def pairs(x: Array) -> Array:
    """The two float32 in each 64-bit register: [lanes, 2]."""
    return np.ascontiguousarray(x).view(F32).reshape(-1, 2)


def packed(x: Array) -> Array:
    """[lanes, 2] of float32 as 64-bit registers."""
    return np.ascontiguousarray(x, F32).view(U64).reshape(-1)


def approximate_quotient(a: Array, b: Array) -> Array:
    """``div.approx``: that of a large divisor is 0."""
    return np.where(np.abs(b) > F32(2.0**126), a * np.copysign(F32(0), b), a / b)


def divide(a: Array, b: Array) -> Array:
    """Of integers, toward zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // safe
    return (np.sign(a) * np.sign(safe)).astype(a.dtype) * (np.abs(a) // np.abs(safe))


def high_product(a: Array, b: Array) -> Array:
    """The upper 64 bits of a product of unsigned 64-bit integers."""
    low, half = U64(0xFFFFFFFF), U64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    return a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)


def permute(a: Array, b: Array, selector: Array | int) -> Array:
    """``prmt.b32``: four bytes of the eight in a and b; bit 3 of a selector spreads the byte's sign."""
    both = np.stack(np.broadcast_arrays(a, b), -1).view(U8)
    out = np.empty((len(both), 4), U8)
    for n in range(4):
        code = (np.asarray(selector, U32) >> U32(4 * n)) & U32(0xF)
        index = np.broadcast_to(code & U32(7), len(both)).astype(S64)
        byte = np.take_along_axis(both, index[:, None], 1)[:, 0]
        out[:, n] = np.where(code & U32(8), np.where(byte >> U8(7), 255, 0), byte)
    return out.view(U32)[:, 0]


def elements(registers: Array, kind: str) -> Array:
    """The operands in 32-bit registers in float32: [...] of tf32, [..., 2] of 16 bits."""
    if kind == "tf32":
        return cut_to_tf32(registers)[..., None]
    halves = np.ascontiguousarray(registers).view(U16).reshape(*registers.shape, 2)
    return halves.view(F16).astype(F32) if kind == "f16" else of_bf16(halves)


def halves(x: Array, kind: str) -> Array:
    """[lanes, 2] of float32 as 32-bit registers of two 16-bit numbers."""
    rounded = to_f16(x) if kind == "f16" else to_bf16(np.ascontiguousarray(x))
    return np.ascontiguousarray(rounded).view(U32).reshape(-1)


def fragment(registers: Array, rows: int, kind: str) -> Array:
    """A fragment [groups, rows, columns] of a matrix: rows of 4 lanes with one register each."""
    return elements(registers.reshape(-1, rows, 4), kind).reshape(len(registers) // (rows * 4), rows, -1)


def mma(a: list[Array], b: list[Array], c: list[Array], kind: str) -> list[Array]:
    """``mma.sync`` m16n8: registers of all warps. a: 4 fragments (8 rows: upper, lower, then the same in K), b: 2."""
    upper_left, lower_left, upper_right, lower_right = (fragment(r, 8, kind) for r in a)
    left = np.block([[upper_left, upper_right], [lower_left, lower_right]])
    right = np.concatenate([fragment(r, 8, kind) for r in b], 2)
    product = left @ right.swapaxes(1, 2)  # [warps, 16, 8]
    out = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [out[n] + c[n] for n in range(4)]


def wgmma_operand(registers: list[Array], kind: str) -> Array:
    """The left operand of ``wgmma`` from registers: [groups, 64, K]."""
    parts = [fragment(r, 32, kind).reshape(len(r) // 128, 4, 8, -1) for r in registers]
    top, bottom = np.concatenate(parts[0::2], 3), np.concatenate(parts[1::2], 3)
    return np.concatenate([top, bottom], 2).reshape(len(top), 64, -1)


def wgmma(left: Array, right: Array, c: list[Array], scale: Array) -> list[Array]:
    """left [groups, 64, K], right [groups, N, K]: the accumulators of all lanes."""
    columns = right.shape[1]
    product = (left @ right.swapaxes(1, 2)).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
    out = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)
    return [np.where(scale, old, F32(0)) + out[n] for n, old in enumerate(c)]


def descriptor_offsets(descriptor: Array, rows: int, transposed: bool, size: int) -> Array:
    """Byte offsets [groups, rows, 32 // size] of a tile of 32 bytes of K that ``wgmma`` reads from shared memory, from
    its matrix descriptors [groups] (PTX ISA, "Matrix-descriptor format" and "Strides")."""
    d = descriptor.astype(S64)
    start, lead, stride = ((((d >> at) & 0x3FFF) << 4)[:, None, None] for at in (0, 16, 32))
    swizzle = int((d[0] >> 62) & 3)
    line, bits = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[swizzle]
    r, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if transposed:  # the rows are contiguous, in chunks of a line; K in groups of 8
        per = line // size
        # CUTLASS's canonical layouts in N (mma_sm90_desc.hpp): without a swizzle the strides change places.
        of_rows, of_k = (lead, stride) if swizzle else (stride, lead)
        offsets = start + (r % per) * size + (k % 8) * line + (r // per) * of_rows + (k // 8) * of_k
    elif swizzle:
        offsets = start + (r // 8) * stride + (r % 8) * line + k * size
    else:
        offsets = start + (r // 8) * stride + (r % 8) * 16 + (k * size // 16) * lead + k * size % 16
    return offsets ^ (((offsets >> 7) & bits) << 4)
