"""Parser of the PTX that Triton emits: one entry, its instructions in basic blocks, and which registers live where.

Inner scopes (of inline assembly) get names of their own. Each instruction knows its line of the PTX text and the line
of our source that it was made from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Argument = str | list["Argument"]


class EmulatorError(RuntimeError):
    """An access out of bounds, a race, a hang, a barrier that not all reach, or PTX that the emulator does not know."""


_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s.*?([\w$]+_param_\d+)")
_LABEL = re.compile(r"([$\w]+):")
_NAME = re.compile(r"[%$\w.]+")
# Registers are bits: how they are read is the instruction's.
_BITS = {"f16": "b16", "s16": "b16", "u16": "b16", "f32": "b32", "s32": "b32", "u32": "b32", "f64": "b64", "s64": "b64",
         "u64": "b64"}  # fmt: skip
_BRANCHES = ("bra", "ret", "exit")
_LIBRARY = ("core.py", "math.py", "standard.py")
_ONLY_READ = ("st", "red", "bar", "barrier", "stmatrix", "cp", "fence", "membar", *_BRANCHES)


@dataclass
class Instruction:
    """``op`` with its modifiers; predicate: (register, whether negated)."""

    op: str
    args: list[Argument]
    predicate: tuple[str, bool] | None
    line: int
    source: str  # "scan.py:123"
    number: int

    def __post_init__(self) -> None:
        self.name, *self.modifiers = self.op.replace("::", ".").split(".")
        self.branches = self.name in _BRANCHES

    def __str__(self) -> str:
        return f"PTX line {self.line} ({self.source}): {self.op}"


def width(kind: str) -> int:
    """Bytes of a type: 4 of "f32"."""
    return int(kind[1:]) // 8


def split(text: str) -> list[Argument]:
    """Operands, split at commas outside of brackets; braces become lists."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    parts.append(current.strip())
    return [split(part[1:-1]) if part.startswith("{") else part for part in parts if part]


class Parser:
    """Reads the statements of a body in order."""

    def __init__(self, files: dict[str, str]):
        self.files = files
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}  # label -> number of the instruction behind it
        self.types: dict[str, str] = {}  # register -> pred, b16, b32, b64
        self.families: dict[str, str] = {}  # "%r" of "%r<7>" -> the same
        self.source = "?"
        self._scopes: list[dict[str, str]] = []  # of inner scopes: name -> unique name
        self._starts: list[int] = []
        self._made = 0
        self._statement, self._begun = "", 0

    def read(self, lines: list[str], first: int) -> None:
        """From the line behind the entry's opening brace to its closing one."""
        written_by_hand = False
        for number in range(first, len(lines)):
            text, _, comment = (part.strip() for part in lines[number].partition("//"))
            if "inline asm" in comment:  # LLVM counts its lines on from that of the call: not ours
                written_by_hand = "begin" in comment
            if text.startswith(".loc"):
                if not written_by_hand:
                    self.source = self._place(text)
                continue
            while text:
                if not self._statement:
                    self._begun = number + 1
                    if text[0] == "}" and not self._scopes:
                        return
                    rest = self._structure(text)
                    if rest is not None:
                        text = rest.strip()
                        continue
                part, ended, text = text.partition(";")
                self._statement = f"{self._statement} {part}".strip()
                text = text.strip()
                if ended:
                    self._finish(self._statement)
                    self._statement = ""

    def _place(self, text: str) -> str:
        """Of ``.loc``: in Triton's own files, of our call."""
        words = text.split()
        file, row = words[1:3]
        if "inlined_at" in text and self.files.get(file) in _LIBRARY:
            file, row = words[words.index("inlined_at") + 1 :][:2]
        return f"{self.files.get(file, '?')}:{row}"

    def _structure(self, text: str) -> str | None:
        """A brace or a label: what follows it; None if there is neither."""
        if text[0] == "{":
            self._made += 1
            self._scopes.append({})
            self._starts.append(len(self.code))
            return text[1:]
        if text[0] == "}":
            # Labels may be used before they stand there: only now are all of this scope known.
            names = self._scopes.pop()
            for instruction in self.code[self._starts.pop() :]:
                instruction.args = [names.get(a, a) if isinstance(a, str) else a for a in instruction.args]
            return text[1:]
        found = _LABEL.match(text)
        if found is None:
            return None
        self.labels[self._declared(found.group(1))] = len(self.code)
        return text[found.end() :]

    def _declared(self, name: str) -> str:
        if not self._scopes:
            return name
        self._scopes[-1][name] = f"{name.lstrip('%')}__{self._made}"
        return self._scopes[-1][name]

    def _known(self, name: str) -> str:
        return next((names[name] for names in reversed(self._scopes) if name in names), name)

    def _renamed(self, argument: Argument) -> Argument:
        if isinstance(argument, list):
            return [self._renamed(a) for a in argument]
        return _NAME.sub(lambda found: self._known(found.group()), argument)

    def _finish(self, text: str) -> None:
        if found := _REGISTERS.match(text):
            kind = _BITS.get(found.group(1), found.group(1))
            for name in found.group(2).replace(" ", "").split(","):
                if "<" in name:
                    self.families[name.split("<")[0]] = kind
                else:
                    self.types[self._declared(name)] = kind
        elif text.startswith(".pragma"):
            return
        elif text.startswith("."):
            raise EmulatorError(f"PTX line {self._begun}: a directive that the emulator does not know: {text}")
        else:
            self._instruction(text)

    def _instruction(self, text: str) -> None:
        predicate = None
        if text.startswith("@"):
            word, text = text.split(None, 1)
            predicate = self._known(word[1:].lstrip("!")), word[1] == "!"
        op, *rest = text.split(None, 1)
        args = [self._renamed(a) for a in split(rest[0] if rest else "")]
        self.code.append(Instruction(op, args, predicate, self._begun, self.source, len(self.code)))


class Kernel:
    """A parsed entry.

    code: all instructions; blocks: the same in basic blocks; after: blocks that may follow each; parameters: (type,
    name); threads: of a program; shared: bytes of shared memory; loops: (first, last block) of each backward branch;
    live_after: registers of each block that a later one may read.
    """

    def __init__(self, ptx: str, shared: int):
        lines = ptx.splitlines()
        start = next(n for n, line in enumerate(lines) if ".entry" in line)
        body = next(n for n in range(start, len(lines)) if lines[n].strip() == "{")
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
        if threads is None:
            raise EmulatorError("PTX that does not say how many threads a program has")
        self.name = lines[start].split(".entry")[1].split("(")[0].strip()
        self.threads, self.shared = int(threads.group(1)), shared
        self.parameters = [found.groups() for line in lines[start:body] if (found := _PARAMETER.search(line))]
        self.translations: dict[int, Any] = {}  # lanes of a unit -> generator
        parser = Parser(dict(re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^"/]+)"', ptx)))
        parser.read(lines, body + 1)
        self.code, self._labels = parser.code, parser.labels
        self._types, self._families = parser.types, parser.families
        self._make_blocks()
        self._find_live()
        # The narrowest access to shared memory, which the race detector works with.
        widths = [width(i.modifiers[-1]) for i in self.code if i.name in ("ld", "st") and "shared" in i.modifiers]
        self.grain = min([4, *widths, *(2 for i in self.code if "matrix" in i.op)])

    def uses(self, name: str) -> bool:
        return any(i.name == name for i in self.code)

    def kind(self, name: str) -> str | None:
        """Type of a register; None if it is none."""
        if name in self._types:
            return self._types[name]
        found = re.fullmatch(r"(%[a-zA-Z]+)\d+", name)
        return self._families.get(found.group(1)) if found else None

    def _make_blocks(self) -> None:
        starts = {0, *self._labels.values(), *(i.number + 1 for i in self.code if i.branches)}
        starts = sorted(s for s in starts if s < len(self.code))
        self._block_at = {start: k for k, start in enumerate(starts)}
        self.blocks = [self.code[a:b] for a, b in zip(starts, [*starts[1:], len(self.code)], strict=True)]
        self.block_of = {i.number: k for k, block in enumerate(self.blocks) for i in block}
        self.after: list[list[int]] = []
        for k, block in enumerate(self.blocks):
            last = block[-1]
            after = [self.target(last)] if last.name == "bra" else []
            if not last.branches or last.predicate:
                after.append(k + 1)
            self.after.append(after)
        self.loops = sorted((n, k) for k, after in enumerate(self.after) for n in after if n <= k)

    def target(self, branch: Instruction) -> int:
        """The block that a branch goes to; the number of blocks: the end."""
        return self._block_at.get(self._labels[str(branch.args[0])], len(self.blocks))

    def registers(self, argument: Argument) -> list[str]:
        if isinstance(argument, list):
            return [r for a in argument for r in self.registers(a)]
        return [r for r in re.findall(r"%?[a-zA-Z_]\w*", argument) if self.kind(r)]

    def read_and_written(self, i: Instruction) -> tuple[list[str], list[str]]:
        read = [i.predicate[0]] if i.predicate else []
        if i.name in _ONLY_READ:
            return read + self.registers(i.args), []
        written = self.registers(i.args[0]) if i.args else []
        read += self.registers(i.args[1:])
        if i.predicate or i.name == "wgmma":  # what was there before stays, or is added to
            read += written
        return read, written

    def _find_live(self) -> None:
        first_read: list[set[str]] = []
        all_written: list[set[str]] = []
        for block in self.blocks:
            needs: set[str] = set()
            has: set[str] = set()
            for i in block:
                read, written = self.read_and_written(i)
                needs |= set(read) - has
                has |= set(written)
            first_read.append(needs)
            all_written.append(has)
        before: list[set[str]] = [set() for _ in range(len(self.blocks) + 1)]
        changed = True
        while changed:
            changed = False
            for k in reversed(range(len(self.blocks))):
                live = set().union(*(before[n] for n in self.after[k]))
                needed = first_read[k] | (live - all_written[k])
                changed |= needed != before[k]
                before[k] = needed
        self.live_after = [set().union(*(before[n] for n in after)) for after in self.after]
