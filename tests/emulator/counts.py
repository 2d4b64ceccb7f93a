"""What a launch did, and counts of it per program and time step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .ptx import Instruction, Kernel


@dataclass
class Report:
    """races, unwritten: what was found, each pair of instructions once. blocks: executions of basic blocks, by unit.
    bytes: (number of the instruction, tensor or "shared") -> bytes, of all programs."""

    kernel: Kernel
    programs: int
    slices: int
    races: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    bytes: Counter[tuple[int, str]] = field(default_factory=Counter)

    def executed(self, steps: int) -> list[tuple[Instruction, float]]:
        """The instructions of the loop over time in the order of the text, each with how often a program executes it in
        a step (once for all its warps): the longest loop whose head runs at least once per step."""
        units = len(self.blocks)
        loops = [range(a, b + 1) for a, b in self.kernel.loops if self.blocks[0][a] >= steps]
        return [
            (i, sum(counts[k] for counts in self.blocks) / units / steps)
            for k in max(loops, key=len, default=range(0))
            for i in self.kernel.blocks[k]
        ]

    def moved(self, steps: int) -> Counter[tuple[str, str]]:
        """(tensor or "shared", "read" or "written") -> bytes that a program moves in the loop over time, per step."""
        inside = {i.number for i, _ in self.executed(steps)}
        found: Counter[tuple[str, str]] = Counter()
        for (number, where), size in self.bytes.items():
            if number in inside:
                reads = self.kernel.code[number].name in ("ld", "ldmatrix", "wgmma")
                found[where, "read" if reads else "written"] += size / self.programs / steps
        return found
