"""Translates a kernel into one Python generator over NumPy vectors: one element per lane of a unit.

The generator is a chain of ``if pc == k``, with each basic block twice: for all lanes, and for the lanes of a mask
(SIMT: those with the lowest program counter go first). It yields, before what other programs may see and at barriers
where it is a part of a program, which kind of operation comes next, so that a schedule can let others run. A register
has a Python name per view (unsigned, signed, floating): views are made where needed; blocks begin with the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import F16, F32, F64, S16, S32, S64, U8, U16, U32, U64, UNSIGNED
from .opcodes import Opcodes
from .ptx import EmulatorError, Instruction, Kernel

END = 1 << 20  # program counter of a lane that has returned

DTYPES = {"u8": U8, "b8": U8, "u16": U16, "b16": U16, "s16": S16, "u32": U32, "b32": U32, "s32": S32, "u64": U64,
          "b64": U64, "s64": S64, "f32": F32, "f16": F16, "f64": F64}  # fmt: skip
VIEWS = {"b": "u", "u": "u", "s": "s", "f": "f"}
SPECIAL = {"%tid.x": "tid", "%ctaid.x": "cx", "%ctaid.y": "cy", "%ctaid.z": "cz", "%nctaid.x": "nx", "%nctaid.y": "ny",
           "%nctaid.z": "nz"}  # fmt: skip
METHODS = """load_global store_global load_shared store_shared atomic proxy_fence barrier shuffle reduce ldmatrix
             stmatrix copy copies_commit copies_wait wgmma wgmma_order wgmma_wait name"""
NUMPY = "where absolute minimum maximum fmin fmax exp2 log2 sqrt tanh count_nonzero"
# What nobody has written is neither zero nor a useful number.
POISON = {"b16": 0x7DBA, "b32": 0x7FBADBAD, "b64": 0x7FBADBADDEADBEEF}


class Translator(Opcodes):
    """Writes the text of one generator, for units of ``lanes`` lanes."""

    def __init__(self, kernel: Kernel, lanes: int):
        self.kernel, self.lanes = kernel, lanes
        self.constants: dict[str, Any] = {}
        self.lines: list[str] = []
        self.views: dict[str, set[str]] = {}  # register -> its views that are up to date
        self.mask: str | None = None
        self.at: Instruction = kernel.code[0]
        self.depth = 0

    def say(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def constant(self, value: int, kind: str, full: bool = False) -> str:
        """The name of a constant of a type of PTX: a scalar, or (``full``) a vector."""
        name = f"K_{kind}_{value}{'_full' if full else ''}".replace("-", "m")
        if name not in self.constants:
            bits = UNSIGNED[int(kind[1:]) // 8](value & (2 ** int(kind[1:]) - 1))
            scalar = np.array(bits).view(DTYPES[kind])[()]
            self.constants[name] = np.full(self.lanes, scalar) if full else scalar
        return name

    def variable(self, register: str, view: str) -> str:
        return f"{register.replace('%', '').replace('$', '_')}_{view}"

    def read(self, argument: Any, kind: str, full: bool = False) -> str:
        """The expression of an operand in a type of PTX; ``full``: a vector even of a constant."""
        if kind == "pred":
            if argument in ("-1", "0", "1"):
                return "FALSE" if argument == "0" else "TRUE"
            return ("~" if argument[0] == "!" else "") + self.variable(argument.lstrip("!"), "p")
        have = self.kernel.kind(argument)
        if have is None:
            return self._literal(argument, kind, full)
        if int(have[1:]) != int(kind[1:]):
            raise EmulatorError(f"{self.at}: {argument} is {have}, used as {kind}")
        return self.viewed(argument, VIEWS[kind[0]])

    def _literal(self, argument: str, kind: str, full: bool) -> str:
        if argument.startswith("%"):
            if argument not in SPECIAL:
                raise EmulatorError(f"{self.at}: a register that the emulator does not know: {argument}")
            return SPECIAL[argument]
        if argument[:2] in ("0f", "0F"):
            return self.constant(int(argument[2:], 16), kind, full)
        # Shared memory begins at 0.
        return self.constant(0 if argument == "global_smem" else int(argument.rstrip("U"), 0), kind, full)

    def viewed(self, register: str, view: str) -> str:
        known = self.views.setdefault(register, {"u"})
        if view not in known:
            dtype = f"{view.upper()}{self.kernel.kind(register)[1:]}"
            self.say(f"{self.variable(register, view)} = {self.variable(register, min(known))}.view({dtype})")
            known.add(view)
        return self.variable(register, view)

    def condition(self) -> str | None:
        """The lanes on which the instruction acts: the block's and its predicate's; None: all."""
        parts = [self.mask] if self.mask else []
        if self.at.predicate:
            register, negated = self.at.predicate
            parts.append(("~" if negated else "") + self.variable(register, "p"))
        return " & ".join(parts) or None

    def write(self, register: str, expression: str, kind: str) -> None:
        if register == "_":
            return
        condition = self.condition()
        if kind == "pred":
            target = self.variable(register, "p")
            self.say(f"{target} = {expression}" if condition is None else
                     f"{target} = where({condition}, {expression}, {target})")  # fmt: skip
            return
        view, wide = VIEWS[kind[0]], int(self.kernel.kind(register)[1:])
        if wide > int(kind[1:]):  # filled up with the sign or with zeros
            expression = f"({expression}).astype({view.upper()}{wide})"
        if condition is not None:
            old = self.viewed(register, view)
            expression = f"where({condition}, {expression}, {old})"
        self.say(f"{self.variable(register, view)} = {expression}")
        self.views[register] = {view}

    def write_loaded(self, registers: list[str], call: str, size: int) -> None:
        """Registers from the tuple of vectors, of ``size`` bytes each, that a load gives for its active lanes."""
        masked = self.condition() is not None
        wide = {r: int(self.kernel.kind(r)[1:]) for r in registers}
        if masked:
            for r in registers:
                self.viewed(r, "u")
        self.say(f"V, A = {call}")
        for n, r in enumerate(registers):
            value = f"V[{n}].astype(U{wide[r]})" if 8 * size < wide[r] else f"V[{n}]"
            name = self.variable(r, "u")
            self.say(f"if len(A): {name} = {name}.copy(); {name}[A] = {value}" if masked else f"{name} = {value}")
            self.views[r] = {"u"}

    def address(self, argument: str, kind: str) -> str:
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", argument)
        if found is None:
            raise EmulatorError(f"{self.at}: an address that the emulator does not know: {argument}")
        base, offset = self.read(found.group(1), kind, True), int(found.group(2) or "0", 0)
        return f"{base} + {self.constant(offset, kind)}" if offset else base

    def instruction(self, i: Instruction) -> None:
        self.at = i
        self.check_known(i)
        getattr(self, f"_{i.name}")(i, *i.args)

    def block(self, index: int) -> None:
        self.views = {}
        body = self.kernel.blocks[index]
        last = body[-1]
        self.say(f"count[{index}] += 1")
        self.say(f"if trace: trace.enter(unit, {index}, {self.mask})")
        for i in body[:-1] if last.branches else body:
            self.instruction(i)
        for register in sorted(self.views):
            if register in self.kernel.live_after[index]:
                self.viewed(register, "u")
        self.at = last
        if not last.branches:
            self._go(str(index + 1))
        elif last.name != "bra":
            if last.predicate:
                raise EmulatorError(f"{last}: a predicated return is not modelled")
            self.say(f"pcs = where({self.mask}, {END}, pcs)" if self.mask else "return")
        elif last.predicate is None:
            self._go(str(self.kernel.target(last)))
        else:
            self._branch(last, index)

    def _go(self, target: str) -> None:
        self.say(f"pcs = where({self.mask}, {target}, pcs)" if self.mask else f"pc = {target}")

    def _branch(self, i: Instruction, index: int) -> None:
        register, negated = i.predicate
        targets = self.kernel.target(i), index + 1
        yes, no = reversed(targets) if negated else targets
        test = self.variable(register, "p")
        if self.mask:
            return self._go(f"where({test}, {yes}, {no})")
        self.say(f"N = count_nonzero({test})")
        self.say(f"if N == {self.lanes}: pc = {yes}")
        self.say(f"elif N == 0: pc = {no}")
        self.say(f"else: pcs, pc = where({test}, {yes}, {no}), -1")

    def function(self) -> Callable[[Any], Generator[int, None, None]]:
        kernel = self.kernel
        self.say("def run(unit):")
        self.depth = 1
        for method in METHODS.split():
            self.say(f"{method} = unit.{method}")
        self.say("P, count, parts, trace = unit.parameters, unit.count, unit.parts, unit.trace")
        self.say(f"{', '.join(SPECIAL.values())} = unit.special")
        for register in sorted({r for i in kernel.code for some in kernel.read_and_written(i) for r in some}):
            kind = kernel.kind(register)
            name = self.variable(register, "p" if kind == "pred" else "u")
            self.say(f"{name} = {'FALSE' if kind == 'pred' else self.constant(POISON[kind], kind, True)}")
        self.say("pc = 0")
        self.say("while True:")
        self.depth = 2
        self.say("if pc < 0:")
        self.depth = 3
        self.say("q = int(pcs.min()); mask = pcs == q")
        self.say(f"if q >= {len(kernel.blocks)}: return")
        self.say("if mask.all(): pc = q")
        self._chain("elif q == {}:", "mask")
        self.depth = 2
        self._chain("if pc == {}:", None)
        self.say(f"if pc >= {len(kernel.blocks)}: return")
        space = {n: getattr(np, n) for n in NUMPY.split()} | vars(arithmetic) | self.constants
        space |= {"EmulatorError": EmulatorError, "TRUE": np.ones(self.lanes, bool),
                  "FALSE": np.zeros(self.lanes, bool)}  # fmt: skip
        exec(compile("\n".join(self.lines), f"<PTX of {kernel.name}>", "exec"), space)
        return space["run"]

    def _chain(self, head: str, mask: str | None) -> None:
        self.mask = mask
        for index in range(len(self.kernel.blocks)):
            self.say(head.format(index))
            self.depth += 1
            self.block(index)
            self.depth -= 1
