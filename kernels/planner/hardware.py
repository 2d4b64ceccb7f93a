"""What a device can do: records of known devices, and the live device. No torch, no Triton.

A record says of each of its numbers where it comes from (``sources``): a public document, a published measurement, or
"assumed: why". What was measured on a device (``measurements``) takes the place of what was assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .measurements import MEASURED, measurements


@dataclass(frozen=True)
class Hardware:
    """One device as the plan sees it.

    Attributes:
        name: of the record, e.g. "h200"; of a device without one, its marketing name.
        arch: "sm_90", "gfx942"; "" for the interpreter.
        multiprocessors: how many (compute units on AMD).
        shared: bytes of shared memory per block, opt-in maximum.
        registers: 32-bit registers per multiprocessor.
        clock: GHz, boost.
        l2: bytes of the cache that all multiprocessors share.
        l2_rate: bytes per clock per multiprocessor read from that cache, all multiprocessors reading at once.
        shared_rate: bytes per clock per multiprocessor read from shared memory.
        memory_rate: GB/s (1e9 bytes per second) of the device's memory.
        exchange: microseconds from the release-add of the last program until another program has seen it by an
            acquire poll and the data behind it has arrived.
        barrier: microseconds of one barrier within a program.
        launch: microseconds of one kernel launch in a stream of small kernels.
        matrix: (dtype, dense TFLOP/s of the whole device); fp32 without tensor cores. Read it by ``rate``.
        sources: (field, where its number comes from), for each field that is a number, and for ``matrix``.
    """

    name: str
    arch: str
    multiprocessors: int
    shared: int
    registers: int
    clock: float
    l2: int
    l2_rate: float
    shared_rate: float
    memory_rate: float
    exchange: float
    barrier: float
    launch: float
    matrix: tuple[tuple[str, float], ...]
    sources: tuple[tuple[str, str], ...]

    def rate(self, dtype: str) -> float:
        """Dense TFLOP/s of products in ``dtype``."""
        for name, tflops in self.matrix:
            if name == dtype:
                return tflops
        raise ValueError(f"dtype is {dtype!r}, allowed for {self.name}: {', '.join(name for name, _ in self.matrix)}")


NUMBERS = tuple(f.name for f in fields(Hardware) if f.name not in ("name", "arch", "sources"))

_GUIDE = "CUDA C++ Programming Guide, technical specifications per compute capability"
_GUESSED = {
    "exchange": "assumed: two trips through L2 and a fence, as the design's model of an H200 has it",
    "barrier": "assumed: some 50 cycles until the last warp arrives and the first goes on",
    "launch": "assumed: what drivers reach with small kernels one behind the other",
}
_NVIDIA = _GUESSED | {
    "shared": _GUIDE,
    "registers": _GUIDE,
    "shared_rate": "CUDA C++ Programming Guide, shared memory: 32 banks of 4 bytes",
}


def _sources(common: dict[str, str], otherwise: str, **exceptions: str) -> tuple[tuple[str, str], ...]:
    """One source per number: the exception if there is one, else the common one, else ``otherwise``."""
    return tuple((name, exceptions.get(name) or common.get(name, otherwise)) for name in NUMBERS)


def _matrix(fp16: float, bf16: float, tf32: float, fp32: float) -> tuple[tuple[str, float], ...]:
    return (("fp16", fp16), ("bf16", bf16), ("tf32", tf32), ("fp32", fp32))


_HOPPER_L2 = (
    "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture (2024), L2 throughput: 4472 bytes per "
    "clock on an H800, shared by 132 multiprocessors"
)
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5"
_HOPPER_CLOCK = "nvidia-smi, highest clock of the multiprocessors; tensor peaks are stated at 1.83 GHz"

# Stands for Triton's interpreter: one slice whatever the size, for its programs run one after the other.
INTERPRETER = Hardware(
    name="interpreter",
    arch="",
    multiprocessors=1 << 30,
    shared=1 << 40,
    registers=1 << 40,
    clock=1.0,
    l2=1 << 40,
    l2_rate=1.0,
    shared_rate=1.0,
    memory_rate=1.0,
    exchange=1.0,
    barrier=1.0,
    launch=1.0,
    matrix=_matrix(1.0, 1.0, 1.0, 1.0),
    sources=_sources({}, "assumed: there is no device, so nothing limits it"),
)

# What all NVIDIA records share; their sources are in _NVIDIA.
_ALIKE: dict[str, Any] = {"registers": 65_536, "shared_rate": 128.0, "exchange": 0.7, "barrier": 0.03, "launch": 2.5}

DEVICES: dict[str, Hardware] = {
    device.name: device
    for device in (
        Hardware(
            name="a100",  # SXM4, 80 GB
            arch="sm_80",
            multiprocessors=108,
            shared=163 * 1024,
            clock=1.41,
            l2=40 * 1024**2,
            l2_rate=47.4,
            memory_rate=2039.0,
            **_ALIKE,
            matrix=_matrix(312.0, 312.0, 156.0, 19.5),
            sources=_sources(
                _NVIDIA,
                "NVIDIA A100 Tensor Core GPU Architecture whitepaper, table 4",
                l2_rate="NVIDIA A100 Tensor Core GPU Architecture whitepaper: 5120 bytes per clock, shared by 108 "
                "multiprocessors",
                memory_rate="NVIDIA A100 datasheet, A100 80GB SXM",
            ),
        ),
        Hardware(
            name="rtx4090",
            arch="sm_89",
            multiprocessors=128,
            shared=99 * 1024,
            clock=2.52,
            l2=72 * 1024**2,
            l2_rate=15.2,
            memory_rate=1008.0,
            **_ALIKE,
            matrix=_matrix(165.2, 165.2, 82.6, 82.6),  # accumulated in fp32: half of GeForce's rate for fp16
            sources=_sources(
                _NVIDIA,
                "NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090",
                l2_rate="published microbenchmark (smallscientist1/cuda_microbenchmark, RTX 4090): 1946 bytes per "
                "clock, shared by 128 multiprocessors",
            ),
        ),
        Hardware(
            name="h100",  # SXM5, 80 GB
            arch="sm_90",
            multiprocessors=132,
            shared=227 * 1024,
            clock=1.98,
            l2=50 * 1024**2,
            l2_rate=33.9,
            memory_rate=3350.0,
            **_ALIKE,
            matrix=_matrix(989.4, 989.4, 494.7, 66.9),
            sources=_sources(
                _NVIDIA,
                _HOPPER,
                clock=_HOPPER_CLOCK,
                l2_rate=_HOPPER_L2,
                memory_rate="NVIDIA H100 datasheet, H100 SXM",
            ),
        ),
        Hardware(
            name="h200",  # SXM
            arch="sm_90",
            multiprocessors=132,
            shared=227 * 1024,
            clock=1.98,
            l2=60 * 1024**2,
            l2_rate=33.9,
            memory_rate=4800.0,
            **_ALIKE,
            matrix=_matrix(989.4, 989.4, 494.7, 66.9),
            sources=_sources(
                _NVIDIA,
                f"{_HOPPER}: the H200 has the same chip",
                clock=_HOPPER_CLOCK,
                l2="reported by the driver of an H200",
                l2_rate=_HOPPER_L2,
                memory_rate="NVIDIA H200 datasheet, H200 SXM",
            ),
        ),
        Hardware(
            name="b200",  # HGX
            arch="sm_100",
            multiprocessors=148,
            shared=227 * 1024,
            clock=1.965,
            l2=253 * 1024**2 // 2,
            l2_rate=33.9,
            memory_rate=7672.0,
            **(_ALIKE | {"exchange": 1.0}),
            matrix=_matrix(2250.0, 2250.0, 1125.0, 74.4),
            sources=_sources(
                _NVIDIA,
                "NVIDIA HGX B200 datasheet, one GPU, without sparsity; fp32: 128 cores per multiprocessor at the clock",
                multiprocessors="reported by the driver of a B200",
                clock="assumed: no public specification has it; about the clock of an H100 SXM",
                l2="reported by the driver of a B200; 126 MB in the NVIDIA Blackwell Tuning Guide",
                l2_rate="assumed: as on an H100",
                memory_rate="reported by the driver of a B200: 7680 bits at 3.996 GHz, twice per clock",
                exchange="assumed: as on an H200, and half as much again for the way between the two dies",
            ),
        ),
        Hardware(
            name="rtx5090",
            arch="sm_120",
            multiprocessors=170,
            shared=99 * 1024,
            clock=2.407,
            l2=96 * 1024**2,
            l2_rate=15.2,
            memory_rate=1792.0,
            **_ALIKE,
            matrix=_matrix(209.5, 209.5, 104.8, 104.8),  # accumulated in fp32: half of GeForce's rate for fp16
            sources=_sources(
                _NVIDIA,
                "NVIDIA RTX Blackwell GPU Architecture whitepaper, GeForce RTX 5090",
                l2_rate="assumed: as on an RTX 4090",
            ),
        ),
        Hardware(
            name="mi300x",
            arch="gfx942",
            multiprocessors=304,
            shared=64 * 1024,
            registers=512 * 1024 // 4,
            clock=2.1,
            # The Infinity Cache, and its rate: the level that all eight compute dies (XCDs) share. Each die has an L2
            # of its own of 4 MiB, which does not see what another die writes.
            l2=256 * 1024**2,
            l2_rate=26.9,
            shared_rate=128.0,
            memory_rate=5300.0,
            exchange=1.5,
            barrier=0.03,
            launch=2.5,
            matrix=_matrix(1307.4, 1307.4, 653.7, 163.4),
            sources=_sources(
                _GUESSED,
                "AMD Instinct MI300X datasheet",
                shared="ROCm documentation, AMD GPU specifications: LDS",
                registers="ROCm documentation, AMD GPU specifications: VGPR file of 512 KiB per compute unit",
                l2="ROCm documentation, AMD GPU specifications: L3 (Infinity Cache)",
                l2_rate="AMD CDNA 3 whitepaper: 17.2 TB/s from the Infinity Cache, 304 compute units at 2.1 GHz",
                shared_rate="assumed: 32 banks of 4 bytes, as on earlier CDNA",
                exchange="assumed: twice as on an H200, for the way between the dies through the Infinity Cache",
            ),
        ),
    )
}

# Words of the marketing name that say which record a device has.
_WORDS = {
    "a100": {"A100"},
    "rtx4090": {"GEFORCE", "RTX", "4090"},
    "h100": {"H100"},
    "h200": {"H200"},
    "b200": {"B200"},
    "rtx5090": {"GEFORCE", "RTX", "5090"},
    "mi300x": {"MI300X"},
}
# Words that say that it is a different product after all, with other clocks, memory and power.
_VARIANTS = {"LAPTOP", "MOBILE", "D", "PCIE", "NVL"}


def corrected(hardware: Hardware, folder: Path = MEASURED) -> Hardware:
    """The record with measured constants in place of its own."""
    found = measurements(hardware.name, folder)
    if found is None or not found.constants:
        return hardware
    of = found.provenance
    source = f"measured: {of.device}, {of.date}, commit {of.commit}"
    constants: dict[str, Any] = {str(name): value for name, value in found.constants.items()}
    sources = tuple((name, source if name in constants else old) for name, old in hardware.sources)
    return replace(hardware, **constants, sources=sources)


def named(name: str) -> Hardware:
    """The record of a known device, in capitals or small letters, with what was measured on it."""
    key = str(name).lower()
    if key not in DEVICES:
        raise ValueError(f"the device is {name!r}, known: {', '.join(DEVICES)}; without a name you get the live device")
    return corrected(DEVICES[key])


def _version(arch: str) -> tuple[str, int, int]:
    """(family, major, minor): ("sm", 10, 0) of "sm_100", ("gfx", 9, 0x42) of "gfx942"."""
    found = re.fullmatch(r"sm_(\d+)(\d)[a-z]?|gfx(\d+)([0-9a-f]{2})", arch)
    if found is None:
        return arch, 0, 0
    if found[1]:
        return "sm", int(found[1]), int(found[2])
    return "gfx", int(found[3]), int(found[4], 16)


def _nearest(arch: str) -> Hardware:
    """The record of the same major architecture with the nearest minor one; without one, the H200's."""
    family, major, minor = _version(arch)
    same = [record for record in DEVICES.values() if _version(record.arch)[:2] == (family, major)]
    h200 = DEVICES["h200"]
    return min(same, key=lambda r: (abs(_version(r.arch)[2] - minor), r is not h200), default=h200)


def _recorded(name: str, arch: str) -> Hardware | None:
    """The record that a device of this marketing name has."""
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    for key, needed in _WORDS.items():
        if needed <= words and not words & _VARIANTS and DEVICES[key].arch == arch:
            return DEVICES[key]
    return None


def live(
    name: str, arch: str, multiprocessors: int, shared: int, registers: int, l2: int, folder: Path = MEASURED
) -> Hardware:
    """The device at hand, from what its driver reports: counts as reported, rates from the record of that device.

    A part of a device (fewer multiprocessors than its record) has its share of the memory's and of the matrix rate.
    A device without a record takes the rates of the nearest one, and its sources say so.

    Args:
        name: the marketing name, e.g. "NVIDIA H200".
        arch: as in ``Hardware``; what follows a colon ("gfx942:sramecc+:xnack-") does not count.
        multiprocessors, shared, registers, l2: as in ``Hardware``.
        folder: where the measured constants are.
    """
    arch = arch.partition(":")[0]
    record = _recorded(name, arch)
    base = corrected(record or _nearest(arch), folder)
    share = multiprocessors / base.multiprocessors
    counts = {"multiprocessors": multiprocessors, "shared": shared, "registers": registers, "l2": l2}
    if arch.startswith("gfx") and base.arch.startswith("gfx"):
        # ROCm reports the L2 of one die (seen: 4 MiB on an MI300X), and whether its registers are all of a compute
        # unit nobody has checked.
        del counts["registers"], counts["l2"]
    if record and all(getattr(base, field) == count for field, count in counts.items()):
        return base

    scaled: dict[str, Any] = {
        "l2": round(base.l2 * share),
        "memory_rate": base.memory_rate * share,
        "matrix": tuple((dtype, tflops * share) for dtype, tflops in base.matrix),
    }

    def source(field: str, old: str) -> str:
        if field in counts:
            return "read from the live device"
        new = old if record else f"assumed: as on {base.name}"
        if field in scaled and share != 1:
            new += f"; scaled to {multiprocessors} of {base.multiprocessors} multiprocessors"
        return new

    return replace(
        base,
        **(scaled | counts),
        name=name,
        arch=arch,
        sources=tuple((field, source(field, old)) for field, old in base.sources),
    )
