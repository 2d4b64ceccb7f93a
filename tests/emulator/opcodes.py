"""One method per PTX instruction: each writes the Python that does it to vectors of lanes.

What is not in ``KNOWN``, name or modifier, is an error that names the instruction: nothing is ignored unless it has no
effect on the values (``.uni``, ``.sync``, ``.aligned``, ``.rn`` of what is rounded to nearest anyway).
"""

from __future__ import annotations

from typing import Any

from .ptx import EmulatorError, Instruction, width

INTEGERS = "s16 u16 s32 u32 s64 u64"
BITS = "b8 b16 b32 b64"
COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu nan"
MEMORY = f"global shared cta v2 v4 u8 s32 u32 u64 f32 {BITS}"
SCOPES = "volatile relaxed gpu sys"
ATOMICS = f"global gpu sys relaxed acquire release acq_rel add v2 v4 {BITS} s32 u32 u64 f32"
MATRIX = "sync aligned m8n8 x1 x2 x4 trans shared cta b16"
KNOWN = {
    "abs": "f32", "add": f"{INTEGERS} f32 f32x2 rn f16 bf16", "and": f"{BITS} pred", "atom": ATOMICS,
    "bar": "sync red and pred", "barrier": "red and pred", "bfe": "s32 u32 s64 u64", "bra": "uni",
    "cp": "async cg shared global commit_group wait_group",
    "cvt": f"{INTEGERS} u8 f32 f16 bf16 tf32 f16x2 bf16x2 rn rna rzi", "div": f"{INTEGERS} approx full rn f32",
    "ex2": "approx f32", "fence": "proxy async shared cta", "fma": "rn ftz f32 f32x2 f16 bf16 bf16x2",
    "ld": f"param acquire cg {SCOPES} {MEMORY}", "ldmatrix": MATRIX,
    "lg2": "approx ftz f32", "mad": f"lo wide {INTEGERS}",
    "max": f"{INTEGERS} f32 NaN", "min": f"{INTEGERS} f32 NaN",
    "mma": "sync aligned m16n8k16 m16n8k8 row col f32 f16 bf16 tf32", "mov": f"{INTEGERS} {BITS} f32 pred",
    "mul": f"lo hi wide rn f32 f32x2 f16x2 {INTEGERS}", "neg": "s32 f32 s64 s16", "not": f"{BITS} pred",
    "or": f"{BITS} pred",
    "prmt": "b32", "rcp": "approx f32", "red": ATOMICS, "redux": "sync max add s32", "rem": INTEGERS, "ret": "",
    "rsqrt": "approx ftz f32",
    "selp": f"{INTEGERS} {BITS} f32", "setp": f"{COMPARISONS} and or xor {INTEGERS} {BITS} f32",
    "shfl": "sync idx bfly b32", "shl": BITS, "shr": f"{INTEGERS} {BITS}", "sqrt": "approx rn ftz f32",
    "st": f"release cg {SCOPES} {MEMORY}",
    "stmatrix": MATRIX, "sub": f"{INTEGERS} f32 f32x2 rn f16 bf16 f16x2", "tanh": "approx f32",
    "wgmma": "fence commit_group wait_group mma_async sync aligned f32 f16 bf16 tf32", "xor": f"{BITS} pred",
}  # fmt: skip

BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
UNARY = {"abs": "absolute({})", "ex2": "exp2({})", "lg2": "log2({})", "neg": "-{}", "not": "~{}", "rcp": "1 / {}",
         "rsqrt": "1 / sqrt({})", "sqrt": "sqrt({})", "tanh": "tanh({})"}  # fmt: skip
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
           "hs": ">="}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}

# What comes next, of which a schedule may think: a barrier, a plain store, an acquire load, a release, a load past L1
# or a strong one, another atomic.
BARRIER, STORE, ACQUIRE, RELEASE, LOAD, ATOMIC = range(1, 7)
# How an access takes part in the memory model.
WEAK, STRONG, SYNCHRONISING = range(3)


class Opcodes:
    """Mixed into ``Translator``, whose ``kernel``, ``mask`` and methods it uses."""

    def check_known(self, i: Instruction) -> None:
        if i.name not in KNOWN:
            raise EmulatorError(f"{i}: an instruction that the emulator does not know")
        allowed = KNOWN[i.name].split()
        unknown = [m for m in i.modifiers if m not in allowed and not (i.name == "wgmma" and m.startswith("m64n"))]
        if unknown:
            raise EmulatorError(f"{i}: a modifier that the emulator does not know: {', '.join(unknown)}")

    def is_constant(self, argument: Any) -> bool:
        return self.kernel.kind(argument) is None and not argument.startswith("%")

    def _mov(self, i: Instruction, d: Any, s: Any) -> None:
        kind = i.modifiers[-1]
        if isinstance(d, list):
            part = 8 * width(kind) // len(d)
            source = self.read(s, kind, True)
            for n, register in enumerate(d):
                moved = f"({source} >> {self.constant(part * n, kind)}).astype(U{part})"
                self.write(register, moved, f"b{part}")
        elif isinstance(s, list):
            part, out = 8 * width(kind) // len(s), 8 * width(kind)
            terms = [f"({self.read(r, f'b{part}', True)}.astype(U{out}) << {self.constant(part * n, kind)})"
                     for n, r in enumerate(s)]  # fmt: skip
            self.write(d, " | ".join(terms), kind)
        else:
            self.write(d, self.read(s, kind, True), kind)

    def _cvt(self, i: Instruction, d: Any, *s: Any) -> None:
        to, origin = i.modifiers[-2:]
        if to in ("f16x2", "bf16x2"):
            high, low = (f"to_{to[:-2]}({self.read(r, 'f32', True)})" for r in s)
            return self.write(d, f"({high}.astype(U32) << {self.constant(16, 'u32')}) | {low}", "u32")
        kind = self.kernel.kind(s[0]) if origin[0] in "us" else {"bf16": "b16"}.get(origin)  # integers: may be wider
        a = self.read(s[0], kind or origin, True)
        if to in ("f16", "bf16", "tf32") and origin == "f32":
            self.write(d, f"to_{to}({a})", "b32" if to == "tf32" else "b16")
        elif to == "f32" and origin in ("f16", "bf16"):
            self.write(d, self.widened(a, origin), "f32")
        elif to == "f32" and origin[0] in "us" and i.modifiers[0] == "rn":
            self.write(d, f"{a}.astype({origin.upper()}).astype(F32)", "f32")
        elif to == "s32" and i.modifiers[0] == "rzi":
            self.write(d, f"to_s32({a if origin == 'f32' else self.widened(a, origin)})", "s32")
        elif origin[0] in "us" and to[0] in "us":
            self.write(d, f"{a}.astype({origin.upper()}).astype({to.upper()})", to)
        else:
            raise EmulatorError(f"{i}: a conversion that the emulator does not know")

    @staticmethod
    def widened(expression: str, origin: str) -> str:
        return f"of_bf16({expression})" if origin == "bf16" else f"{expression}.astype(F32)"

    def _selp(self, i: Instruction, d: Any, a: Any, b: Any, p: Any) -> None:
        kind = i.modifiers[-1]
        self.write(d, f"where({self.read(p, 'pred')}, {self.read(a, kind)}, {self.read(b, kind)})", kind)

    def _prmt(self, i: Instruction, d: Any, a: Any, b: Any, c: Any) -> None:
        selector = str(int(c.rstrip("U"), 0)) if self.is_constant(c) else self.read(c, "u32")
        self.write(d, f"permute({self.read(a, 'u32', True)}, {self.read(b, 'u32', True)}, {selector})", "u32")

    def operands(self, kind: str, *sources: Any) -> list[str]:
        """A vector at least in the first place, so that NumPy works on vectors."""
        return [self.read(s, kind, n == 0) for n, s in enumerate(sources)]

    @staticmethod
    def flushed(i: Instruction, expression: str) -> str:
        return f"flush({expression})" if "ftz" in i.modifiers else expression

    def _add(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        kind, sign = i.modifiers[-1], BINARY[i.name]
        if kind == "f32x2":
            x, y = (f"pairs({self.read(s, 'b64', True)})" for s in (a, b))
            return self.write(d, f"packed({x} {sign} {y})", "b64")
        if kind == "f16x2":
            x, y = (f"elements({self.read(s, 'b32', True)}, 'f16')" for s in (a, b))
            return self.write(d, f"halves({x} {sign} {y}, 'f16')", "b32")
        if kind in ("f16", "bf16"):  # float32 and 16 bits
            x, y = self.widened(self.read(a, "f16" if kind == "f16" else "b16", True), kind), self.read(b, "f32")
            return self.write(d, f"{x} {sign} {y}", "f32")
        if kind[0] == "s":
            kind = f"u{kind[1:]}"  # wraps
        x, y = self.operands(kind, a, b)
        self.write(d, f"{x} {sign} {y}", kind)

    _sub = _add

    def _mul(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        kind = i.modifiers[-1]
        if "wide" in i.modifiers:
            self.write(d, self.wide_product(a, b, kind), WIDER[kind])
        elif "hi" in i.modifiers and kind == "u64":
            x, y = (self.read(s, kind, True) for s in (a, b))
            self.write(d, f"high_product({x}, {y})", kind)
        elif "hi" in i.modifiers:
            half = self.constant(8 * width(kind), WIDER[kind])
            self.write(d, f"(({self.wide_product(a, b, kind)}) >> {half}).astype({kind.upper()})", kind)
        else:
            self._add(i, d, a, b)

    def wide_product(self, a: Any, b: Any, kind: str) -> str:
        return " * ".join(f"{self.read(s, kind, True)}.astype({WIDER[kind].upper()})" for s in (a, b))

    def _mad(self, i: Instruction, d: Any, a: Any, b: Any, c: Any) -> None:
        kind = i.modifiers[-1]
        if "wide" in i.modifiers:
            return self.write(d, f"{self.wide_product(a, b, kind)} + {self.read(c, WIDER[kind])}", WIDER[kind])
        kind = f"u{kind[1:]}"
        x, y, z = self.operands(kind, a, b, c)
        self.write(d, f"{x} * {y} + {z}", kind)

    def _fma(self, i: Instruction, d: Any, a: Any, b: Any, c: Any) -> None:
        kind = i.modifiers[-1]
        if kind == "f32x2":
            x, y, z = (self.flushed(i, f"pairs({self.read(s, 'b64', True)})") for s in (a, b, c))
            return self.write(d, f"packed({self.flushed(i, f'fma({x}, {y}, {z})')})", "b64")
        if kind == "bf16x2":
            x, y, z = (f"elements({self.read(s, 'b32', True)}, 'bf16')" for s in (a, b, c))
            return self.write(d, f"halves(fma({x}, {y}, {z}), 'bf16')", "b32")
        if kind in ("f16", "bf16"):
            of = "f16" if kind == "f16" else "b16"
            x, y = (self.widened(self.read(s, of, True), kind) for s in (a, b))
            return self.write(d, f"fma({x}, {y}, {self.read(c, 'f32')})", "f32")
        x, y, z = (self.flushed(i, s) for s in self.operands("f32", a, b, c))
        self.write(d, self.flushed(i, f"fma({x}, {y}, {z})"), "f32")

    def _div(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        kind = i.modifiers[-1]
        x, y = self.operands(kind, a, b)
        if "approx" in i.modifiers:
            return self.write(d, f"approximate_quotient({x}, {y})", kind)
        self.write(d, f"{x} / {y}" if kind == "f32" else f"divide({x}, {y})", kind)

    def _rem(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        x, y = self.operands(i.modifiers[-1], a, b)
        self.write(d, f"{x} - divide({x}, {y}) * {y}", i.modifiers[-1])

    def _unary(self, i: Instruction, d: Any, a: Any) -> None:
        x = self.flushed(i, self.read(a, i.modifiers[-1], True))
        self.write(d, self.flushed(i, UNARY[i.name].format(x)), i.modifiers[-1])

    _abs = _ex2 = _lg2 = _neg = _not = _rcp = _rsqrt = _sqrt = _tanh = _unary

    def _min(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        kind = i.modifiers[-1]
        x, y = self.operands(kind, a, b)
        name = f"f{i.name}" if kind == "f32" and "NaN" not in i.modifiers else f"{i.name}imum"
        self.write(d, f"{name}({x}, {y})", kind)

    _max = _min

    def _and(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        x, y = self.operands(i.modifiers[-1], a, b)
        self.write(d, f"{x} {BINARY[i.name]} {y}", i.modifiers[-1])

    _or = _xor = _and

    def _shl(self, i: Instruction, d: Any, a: Any, b: Any) -> None:
        kind, sign = i.modifiers[-1], "<<" if i.name == "shl" else ">>"
        x, top = self.read(a, kind, True), 8 * width(kind) - 1
        signed = kind[0] == "s"
        if self.is_constant(b):
            amount = int(b, 0)
            if amount > top and not signed:
                return self.write(d, self.constant(0, kind, True), kind)
            return self.write(d, f"{x} {sign} {self.constant(min(amount, top), kind)}", kind)
        amount, limit = self.read(b, "u32"), self.constant(top, "u32")
        moved = f"{x} {sign} minimum({amount}, {limit}).astype({kind.replace('b', 'u').upper()})"
        if not signed:
            moved = f"where({amount} > {limit}, {self.constant(0, kind)}, {moved})"
        self.write(d, moved, kind)

    _shr = _shl

    def _bfe(self, i: Instruction, d: Any, a: Any, b: Any, c: Any) -> None:
        kind, at, length = i.modifiers[-1], int(b, 0), int(c, 0)
        bits = 8 * width(kind)
        up, down = self.constant(bits - at - length, f"u{bits}"), self.constant(bits - length, kind)
        moved = f"({self.read(a, f'u{bits}', True)} << {up})"
        self.write(d, f"{moved}.view({kind.upper()}) >> {down}", kind)

    def _setp(self, i: Instruction, d: Any, a: Any, b: Any, *c: Any) -> None:
        compare, kind = i.modifiers[0], i.modifiers[-1]
        x, y = self.operands(kind, a, b)
        unordered = f"({x} != {x}) | ({y} != {y})"
        if compare == "ne" and kind == "f32":  # ordered, unlike Python's
            found = f"({x} != {y}) & ~({unordered})"
        elif compare in COMPARE:
            found = f"{x} {COMPARE[compare]} {y}"
        else:
            found = unordered if compare == "nan" else f"({x} {COMPARE[compare[:-1]]} {y}) | {unordered}"
        if c:
            found = f"({found}) {BINARY[i.modifiers[1]]} {self.read(c[0], 'pred')}"
        self.write(d, found, "pred")

    def strength(self, i: Instruction) -> int:
        if {"acquire", "release", "acq_rel"} & set(i.modifiers):
            return SYNCHRONISING
        return STRONG if {"volatile", "relaxed"} & set(i.modifiers) else WEAK

    def _ld(self, i: Instruction, d: Any, a: Any) -> None:
        kind = i.modifiers[-1]
        if "param" in i.modifiers:
            names = [name for _, name in self.kernel.parameters]
            return self.write(d, f"P[{names.index(a.strip('[] '))}]", f"b{kind[1:]}")
        registers, size = d if isinstance(d, list) else [d], width(kind)
        how = f"{self.condition()}, {size}, {len(registers)}, {i.number}"
        if "shared" in i.modifiers:
            return self.write_loaded(registers, f"load_shared({self.address(a, 'u32')}, {how})", size)
        strength = self.strength(i)
        if strength or "cg" in i.modifiers:
            self.say(f"yield {ACQUIRE if strength == SYNCHRONISING else LOAD}")
        self.write_loaded(registers, f"load_global({self.address(a, 'u64')}, {how}, {strength})", size)

    def _st(self, i: Instruction, a: Any, s: Any) -> None:
        size, values = width(i.modifiers[-1]), s if isinstance(s, list) else [s]
        data = ", ".join(self.read(v, self.kernel.kind(v) or f"b{8 * size}", True) for v in values)  # may be wider
        how = f"{self.condition()}, ({data},), {size}, {i.number}"
        if "shared" in i.modifiers:
            return self.say(f"store_shared({self.address(a, 'u32')}, {how})")
        strength = self.strength(i)
        self.say(f"yield {RELEASE if strength == SYNCHRONISING else STORE}")
        self.say(f"store_global({self.address(a, 'u64')}, {how}, {strength})")

    def _cp(self, i: Instruction, *args: Any) -> None:
        self.together(i)
        if i.modifiers[1] == "wait_group":
            return self.say(f"copies_wait({int(args[0], 0)})")
        if i.modifiers[1] == "commit_group":
            return self.say("copies_commit()")
        to, source, size, *given = args
        if "cg" not in i.modifiers or int(size, 0) != 16:
            raise EmulatorError(f"{i}: copies past L1, of 16 bytes, are modelled")
        self.say(f"yield {LOAD}")
        taken = self.read(given[0], "u32", True) if given else self.constant(16, "u32", True)
        how = f"{self.condition()}, {taken}, {i.number}"
        self.say(f"copy({self.address(to, 'u32')}, {self.address(source, 'u64')}, {how})")

    def _atom(self, i: Instruction, d: Any, a: Any, value: Any, offset: int = 0) -> None:
        if isinstance(value, list):  # each element of a vector is an atomic of its own
            for n, element in enumerate(value):
                self._atom(i, d and d[n], a, element, n * width(i.modifiers[-1]))
            return
        acquires, releases = (bool({way, "acq_rel"} & set(i.modifiers)) for way in ("acquire", "release"))
        kind = i.modifiers[-1]
        self.say(f"yield {RELEASE if releases else ACQUIRE if acquires else ATOMIC}")
        address, data = f"{self.address(a, 'u64')} + {self.constant(offset, 'u64')}", self.read(value, kind, True)
        call = f"atomic({address}, {self.condition()}, {data}, {i.number}, {acquires}, {releases})"
        if d is None:
            return self.say(call)
        self.write(d, call, f"b{kind[1:]}")

    def _red(self, i: Instruction, a: Any, value: Any) -> None:
        self._atom(i, None, a, value)

    def _fence(self, i: Instruction, *_: Any) -> None:
        self.say(f"proxy_fence({self.condition()})")

    def together(self, i: Instruction) -> None:
        """An instruction of whole warps: an error in divergent code."""
        if self.mask:
            self.say(f"raise EmulatorError(name({i.number}) + ': of whole warps, in divergent code')")

    def _bar(self, i: Instruction, *args: Any) -> None:
        reduces = "red" in i.modifiers
        if args[1:2] != ("0",) if reduces else args != ("0",):
            raise EmulatorError(f"{i}: only barrier 0, of all threads of the program, is modelled")
        self.together(i)
        self.say(f"barrier({i.number}, {self.read(args[2], 'pred') if reduces else 'None'})")
        self.say(f"if parts: yield {BARRIER}")
        if reduces:
            self.write(args[0], "unit.agreed()", "pred")

    _barrier = _bar

    def _shfl(self, i: Instruction, d: Any, a: Any, b: Any, c: Any, members: Any) -> None:
        self.together(i)
        call = f"shuffle({self.read(a, 'u32', True)}, {self.read(b, 'u32', True)}, '{i.modifiers[1]}')"
        self.write(d.split("|")[0], call, "u32")

    def _redux(self, i: Instruction, d: Any, a: Any, members: Any) -> None:
        self.together(i)
        kind = i.modifiers[-1]
        self.write(d, f"reduce({self.read(a, kind, True)}, '{i.modifiers[1]}')", kind)

    def _ldmatrix(self, i: Instruction, d: Any, a: Any) -> None:
        self.together(i)
        d = d if isinstance(d, list) else [d]
        self.say(f"V = ldmatrix({self.address(a, 'u32')}, {len(d)}, {'trans' in i.modifiers}, {i.number})")
        self._spread(d, "u32")

    def _stmatrix(self, i: Instruction, a: Any, s: Any) -> None:
        self.together(i)
        data = ", ".join(self.read(r, "u32", True) for r in (s if isinstance(s, list) else [s]))
        self.say(f"stmatrix({self.address(a, 'u32')}, ({data},), {'trans' in i.modifiers}, {i.number})")

    def _spread(self, registers: list[str], kind: str) -> None:
        for n, register in enumerate(registers):
            self.write(register, f"V[{n}]", kind)

    def _mma(self, i: Instruction, d: Any, *abc: Any) -> None:
        self.together(i)
        x, y, z = (f"[{', '.join(self.read(r, kind, True) for r in s)}]"
                   for s, kind in zip(abc, ("u32", "u32", "f32"), strict=True))  # fmt: skip
        self.say(f"V = mma({x}, {y}, {z}, '{i.modifiers[-3]}')")
        self._spread(d, "f32")

    def _wgmma(self, i: Instruction, *args: Any) -> None:
        self.together(i)
        if i.modifiers[0] == "wait_group":
            return self.say(f"wgmma_wait({int(args[0], 0)})")
        if i.modifiers[0] != "mma_async":
            return self.say(f"wgmma_order('{i.modifiers[0]}')")
        d, a, b, scale, *flags = args
        if [int(flag, 0) for flag in flags[:2]] != [1, 1]:
            raise EmulatorError(f"{i}: a negated operand is not modelled")
        columns = int(next(m for m in i.modifiers if m.startswith("m64n"))[4:].split("k")[0])
        x = f"[{', '.join(self.read(r, 'u32', True) for r in a)}]" if isinstance(a, list) else self.read(a, "u64", True)
        z = f"[{', '.join(self.read(r, 'f32', True) for r in d)}]"
        how = f"'{i.modifiers[-1]}', {columns}, {[int(flag, 0) for flag in flags[2:]]}, {i.number}"
        self.say(f"V = wgmma({x}, {self.read(b, 'u64', True)}, {z}, {self.read(scale, 'pred')}, {how})")
        self._spread(d, "f32")
