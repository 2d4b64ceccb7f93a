"""The compiled kernels on a CPU: an emulator of the PTX that Triton makes of them, with detectors of wrong accesses.

``emulate(monkeypatch, "sm_90")`` puts a stand-in (``driver``) in the place of Triton's CUDA driver. A launch then
parses the PTX (``ptx``), translates it into a Python generator over NumPy vectors of lanes (``translate``,
``opcodes``), and runs the programs of the grid in turns, as a seeded schedule says (``grid``). Each access goes through
memcheck (``unit``, ``memory``) and the race detector (``races``); what was executed is counted (``counts``) and, of
one program, clocked (``trace``, ``order``, ``latencies``, ``clock``).

Modelled: the integer, floating-point, memory, atomic, barrier, shuffle, ldmatrix, stmatrix, mma, wgmma and cp.async
instructions of these kernels; divergence within a unit; the order that the PTX memory model gives to barriers,
acquire and release at gpu scope; the proxy of wgmma; reads of shared memory, and of memory that a launch takes for
itself, that nobody wrote; tf32 operands, whose lower 13 bits are dropped.

Not modelled: SASS, registers and spills, caches, residency, time but for the clock's prediction; the last bits of
``ex2``, ``lg2``, ``rcp``, ``rsqrt``, ``sqrt``, ``tanh`` and ``div``; the order of sums inside a matrix product; effects
of weak memory other than races (every access is seen at once by all); races between lanes of one warp; fences,
TMA, mbarrier, clusters and tcgen05. An unknown instruction is an error that names it.
"""

from .counts import Report
from .driver import Session, emulate
from .grid import Schedule
from .ptx import EmulatorError

__all__ = ["EmulatorError", "Report", "Schedule", "Session", "emulate"]
