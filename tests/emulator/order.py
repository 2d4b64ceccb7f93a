"""The order in which ptxas may have put the instructions of a warp: for ``clock``, whose warps issue in order.

PTX has loads next to their first use. ptxas does not leave them there: within a stretch of straight code it lists first
what the longest chain of latencies hangs on. That is done here, with no limit on registers. Stretches end at barriers,
branches and their targets, at accesses that other programs take part in, at products of warp groups, and where copies
are waited for; stores keep their order, and no load of the same space passes one. To shared memory a copy is a store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .ptx import Instruction, Kernel
from .trace import Event

# (instruction, latency) of each of a stretch -> their order: warps and steps repeat each other.
Known: TypeAlias = dict[tuple[tuple[int, float], ...], list[int]]
_STRONG = {"acquire", "release", "relaxed", "volatile"}
_GROUPS = {"commit_group", "wait_group"}
_STORES = ("st", "stmatrix", "cp")


def ends(i: Instruction) -> bool:
    together = "bar", "barrier", "red", "atom", "fence", "shfl", "redux", "wgmma"
    return i.branches or i.name in together or bool((_STRONG | _GROUPS) & set(i.modifiers))


def space(i: Instruction) -> str:
    """That the instruction accesses: "shared", "global" or ""."""
    if i.name in ("ldmatrix", "stmatrix", "cp"):
        return "shared"
    if i.name not in ("ld", "st") or "param" in i.modifiers:
        return ""
    return "shared" if "shared" in i.modifiers else "global"


def ordered(
    events: list[Event], kernel: Kernel, latency: Callable[[Event], float], known: Known | None = None
) -> list[Event]:
    """The events of one warp. latency: cycles until the result of one is there; known: of the same kernel."""
    known = {} if known is None else known

    def listed(stretch: list[Event]) -> list[Event]:
        key = tuple((event.instruction.number, latency(event)) for event in stretch)
        if key not in known:
            known[key] = _listed(stretch, kernel, latency)
        return [stretch[n] for n in known[key]]

    targets = {kernel.target(i) for i in kernel.code if i.name == "bra"}
    found: list[Event] = []
    stretch: list[Event] = []
    for event in events:
        if event.block in targets:
            found += listed(stretch)
            stretch = []
        if ends(event.instruction):
            found += [*listed(stretch), event]
            stretch = []
        else:
            stretch.append(event)
    return found + listed(stretch)


def _listed(stretch: list[Event], kernel: Kernel, latency: Callable[[Event], float]) -> list[int]:
    """Dependences, then the longest chain first: places in the stretch."""
    before: list[dict[int, float]] = []  # of each: earlier ones -> how long after it they may come
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = {}
    stores: dict[str, int] = {}
    loads: dict[str, list[int]] = {}
    for n, event in enumerate(stretch):
        i, needs = event.instruction, {}
        read, written = kernel.read_and_written(i)
        needs |= {writer[r]: latency(stretch[writer[r]]) for r in read if r in writer}
        later = [m for r in written for m in [*readers.pop(r, []), *([writer[r]] if r in writer else [])]]
        if where := space(i):
            later += [stores[where]] if where in stores else []
            if i.name in _STORES:
                later += loads.pop(where, [])
                stores[where] = n
            else:
                loads.setdefault(where, []).append(n)
        for m in later:
            needs.setdefault(m, 0.0)
        needs.pop(n, None)
        before.append(needs)
        for r in read:
            readers.setdefault(r, []).append(n)
        writer.update(dict.fromkeys(written, n))
    length = [0.0] * len(stretch)
    for n in reversed(range(len(stretch))):
        length[n] = max(length[n], latency(stretch[n]))
        for m, cycles in before[n].items():
            length[m] = max(length[m], cycles + length[n])
    # As a scheduler would: of what could issue now the longest chain, else what can issue first.
    starts: dict[int, float] = {}
    waiting, now = list(range(len(stretch))), 0.0
    while waiting:
        there = {
            n: max([now, *(starts[m] + cycles for m, cycles in before[n].items())])
            for n in waiting
            if before[n].keys() <= starts.keys()
        }
        n = min(there, key=lambda n: (there[n], -length[n], n))
        starts[n], now = there[n], there[n] + 1
        waiting.remove(n)
    return list(starts)
