"""What one instruction of a warp costs, per architecture: published measurements, and what is assumed beside them.

The papers: Abdelkhalik et al. (arXiv 2208.11174), A100; Sun et al. (arXiv 2206.02874), A100; Luo et al. (arXiv
2402.13499), A100 and H800, whose chip is that of an H100. A number that none of them has is "assumed: why".
"""

from __future__ import annotations

from dataclasses import dataclass

from .ptx import EmulatorError, Instruction, width

ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Cost:
    """cycles: until a dependent instruction can issue, after the pipe has begun; pipe: "" if it takes none; busy: how
    long it keeps its pipe; slots: how many instructions the scheduler issues for it. Pipes are a scheduler's own but
    "shared" and "l2", which the multiprocessor has once, with a queue: an instruction issues and waits there."""

    cycles: float
    pipe: str
    busy: float
    slots: int
    source: str


_TWO = "Abdelkhalik et al., table II: add.u32 and mad.f32 4 dependent, 2 independent"
_FIVE = "Abdelkhalik et al., table V"
_LANES = "Luo et al., table III: 64 cores per multiprocessor on an A100, 128 on an H800"
_SHARED = (
    "Sun et al., tables 9 and 10: ldmatrix x1, x2, x4 take 23, 25 and 29 cycles, ld.shared the same by its conflicts; "
    "128 bytes a clock; Luo et al., table IV, have an A100 and an H800 alike"
)

# Class -> cost on sm_80 and on sm_90.
COSTS: dict[str, tuple[Cost, Cost]] = {}


def _both(name: str, cycles: float | tuple[float, float], pipe: str, busy: float | tuple[float, float], slots: int,
          source: str) -> None:  # fmt: skip
    c, b = (x if isinstance(x, tuple) else (x, x) for x in (cycles, busy))
    COSTS[name] = Cost(c[0], pipe, b[0], slots, source), Cost(c[1], pipe, b[1], slots, source)


_both("free", 0, "", 0, 0, "assumed: ptxas gives moves between registers and widening without sign no instruction")
_both("float", 4, "float", (2, 1), 1, f"{_TWO}; {_LANES}")
_both("integer", 4, "integer", 2, 1, f"{_TWO}; on sm_90 assumed: as on sm_80")
_both("integer of 64 bits", 6, "integer", 4, 2, f"{_FIVE}: two instructions; the second assumed to wait for a carry")
_both("multiply", 4, "integer", 2, 1, f"{_FIVE}: mul.wide.u32 4; {_TWO}")
_both("multiply of 64 bits", 12, "integer", 8, 4, "assumed: four 32-bit products and sums, three of them in a chain")
_both("integer divide", 66, "integer", 32, 16, f"{_FIVE}: s32 66; slots assumed")
_both("convert", 4, "integer", 2, 1, "assumed: as an integer add; table V of Abdelkhalik et al. has F2I only, 6")
_both("exp2", 18, "special", 8, 4, f"{_FIVE}: compare, 2 multiplies, MUFU.EX2; 4 lanes of 16 per multiprocessor")
_both("divide", 31, "special", 8, 3, f"{_FIVE}: rcp.approx 23; two dependent multiplies assumed")
_both("reciprocal root", 23, "special", 8, 1, "assumed: as rcp.approx in Abdelkhalik et al., table V")
_both("shuffle", 23, "shared", 1, 1, "assumed: as a shared load, whose crossbar it uses")
_both("reduce", 23, "integer", 2, 1, "assumed: as a shuffle")
_both("branch", 0, "", 0, 1, "assumed: one slot; where it goes to is known in time")
_both("mma of 16 bits", (24.7, 24.1), "tensor", (8, 6.6), 1,
      "A100: Sun et al., table 3, and 1024 multiply-adds a clock; H800: Luo et al., table VII (as a review quotes it), "
      "whose 494.4 TFLOP/s are 6.6 cycles per scheduler")  # fmt: skip
_both("mma of tf32", 25.0, "tensor", (8, 6.6), 1, "A100: Sun et al., table 3; sm_90 assumed: as at 16 bits")
_both("shared load", 23, "shared", 1, 1, _SHARED)
_both("shared store", 0, "shared", 1, 1, _SHARED)
_both(
    "load from L2", (261.5, 263.0), "l2", 0, 1, "Luo et al., table IV; busy: 32 bytes per sector at the record's rate"
)
_both("load from memory", (466.3, 478.8), "l2", 0, 1, "Luo et al., table IV; busy: as from L2")
_both("global store", 0, "l2", 0, 1, "assumed: nobody waits for it; busy: as a load")
_both("copy", (261.5, 263.0), "l2", 0, 1, "assumed: as a load from L2; in shared memory it is a store")
_both("order", 0, "", 0, 1, "assumed: one slot to fence, and to commit and await a group; its end is what is awaited")
_both("product of a warp group", 47.1, "tensor", 0.5, 1,
      "Luo et al., table VIII: m64n256k16 128.0 one after the other, half a cycle for each column, at 729.3 TFLOP/s; "
      "with tf32 as many; cycles, behind those, assumed: a shared load and an mma of 16 bits")  # fmt: skip
_both("barrier", 0, "", 0, 1, "the device's record: hardware.barrier")

SHARED_CONFLICT = 2  # cycles more per further transaction of a shared load: the same tables


def group_columns(i: Instruction) -> int:
    """N of a product of a warp group."""
    return int(next(m for m in i.modifiers if m.startswith("m64n"))[4:].split("k")[0])


def group_reads(i: Instruction) -> float:
    """Transactions of shared memory for one warp of a product of a warp group, whose operands have rows of 32 bytes:
    its 16 rows of A, unless they are in registers, and a quarter of B. Assumed: B is read once for all four. Then, with
    16 + N / 4 cycles for both, N below 64 is slower with A in shared memory, as Luo et al. say (2501.12084)."""
    return (0 if isinstance(i.args[1], list) else 4) + group_columns(i) / 16


_FLOATS = ("f32", "f16", "bf16", "f32x2")
_PLAIN = (
    "add",
    "sub",
    "and",
    "or",
    "xor",
    "not",
    "shl",
    "shr",
    "bfe",
    "min",
    "max",
    "neg",
    "abs",
    "selp",
    "setp",
    "prmt",
)


def kind(i: Instruction) -> str:
    """The class of an instruction; of a global load, "load"."""
    last = i.modifiers[-1] if i.modifiers else ""
    if i.name == "mov":
        packs = any(isinstance(a, list) for a in i.args) and last != "b64"  # halves of one register
        return "integer" if packs else "free"
    if i.name == "cvt":
        to, origin = i.modifiers[-2:]
        if to[0] in "us" and origin[0] in "us":
            return "integer" if origin[0] == "s" and width(to) > width(origin) else "free"
        return "convert"
    if i.name == "ld" and "param" in i.modifiers:
        return "free"
    if i.name in ("mul", "mad") and last not in _FLOATS:
        return "multiply of 64 bits" if last[1:] == "64" else "multiply"
    if i.name in ("add", "sub", "mul", "fma", "neg", "abs") and last in _FLOATS:
        return "float"
    if i.name in _PLAIN:
        return "integer of 64 bits" if last[1:] == "64" else "integer"
    if i.name in ("div", "rem"):
        return "divide" if last == "f32" else "integer divide"
    if i.name == "mma":
        return "mma of tf32" if "tf32" in i.modifiers else "mma of 16 bits"
    if i.name in ("cp", "wgmma", "fence"):
        if i.name == "cp" and "cg" in i.modifiers:
            return "copy"
        return "product of a warp group" if "mma_async" in i.modifiers else "order"
    if i.name in ("ld", "ldmatrix"):
        return "shared load" if i.name == "ldmatrix" or "shared" in i.modifiers else "load"
    if i.name in ("st", "stmatrix"):
        return "shared store" if i.name == "stmatrix" or "shared" in i.modifiers else "global store"
    others = {
        "ex2": "exp2",
        "rsqrt": "reciprocal root",
        "shfl": "shuffle",
        "redux": "reduce",
        "bra": "branch",
        "ret": "branch",
        "bar": "barrier",
        "barrier": "barrier",
        "red": "global store",
    }
    if i.name not in others:
        raise EmulatorError(f"{i}: an instruction that the clock does not know")
    return others[i.name]
