"""The records of devices: complete and sourced, corrected by what was measured, matched to the live device."""

import dataclasses
import math
from pathlib import Path

import pytest
from test_measurements import GOOD, write

from persistrnn.kernels.planner.hardware import DEVICES, INTERPRETER, NUMBERS, Hardware, corrected, live, named

RECORDS = [*DEVICES.values(), INTERPRETER]
# As the vendor's driver calls it; what CUDA and ROCm report as a block's opt-in maximum, in bytes.
REPORTED = {
    "a100": ("NVIDIA A100-SXM4-80GB", 166_912), "rtx4090": ("NVIDIA GeForce RTX 4090", 101_376),
    "h100": ("NVIDIA H100 80GB HBM3", 232_448), "h200": ("NVIDIA H200", 232_448), "b200": ("NVIDIA B200", 232_448),
    "rtx5090": ("NVIDIA GeForce RTX 5090", 101_376), "mi300x": ("AMD Instinct MI300X", 65_536),
}  # fmt: skip


def counts(record: Hardware) -> tuple[int, int, int, int]:
    return record.multiprocessors, record.shared, record.registers, record.l2


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.name)
def test_every_number_is_positive_and_has_one_source(record: Hardware) -> None:
    numbers = [f.name for f in dataclasses.fields(Hardware) if isinstance(getattr(record, f.name), int | float)]
    assert {*numbers, "matrix"} == set(NUMBERS)
    assert sorted(name for name, _ in record.sources) == sorted(NUMBERS)
    assert all(source.strip() for _, source in record.sources)
    assert not any(source.startswith("measured") for _, source in record.sources), "of a bare record"
    for name in numbers:
        assert math.isfinite(getattr(record, name))
        assert getattr(record, name) > 0, name
    assert [dtype for dtype, _ in record.matrix] == ["fp16", "bf16", "tf32", "fp32"]


@pytest.mark.parametrize("name", DEVICES)
def test_fp32_is_the_rate_of_the_plain_cores(name: str) -> None:
    """Cores x 2 x clock, within a percent: a rate with sparsity or of another product would be far off."""
    record = DEVICES[name]
    cores = {"a100": 64}.get(name, 128)
    assert record.rate("fp32") == pytest.approx(record.multiprocessors * cores * 2 * record.clock / 1000, rel=0.01)
    assert record.rate("fp16") == record.rate("bf16") == pytest.approx(2 * record.rate("tf32"), rel=1e-3)


def test_rate_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r"'fp8'.*h200.*fp16, bf16, tf32, fp32"):
        DEVICES["h200"].rate("fp8")


def test_measured_constants_replace_the_records_own(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    before = DEVICES["h200"]
    after = corrected(before, tmp_path)
    assert (after.exchange, after.l2_rate) == (0.66, 58.0)
    told = dict(after.sources)
    assert told["exchange"] == told["l2_rate"] == "measured: NVIDIA H200, 2026-01-02, commit abc1234"
    rest = {"sources": before.sources, "exchange": before.exchange, "l2_rate": before.l2_rate}
    assert dataclasses.replace(after, **rest) == before  # type: ignore[arg-type]
    assert [s for s in after.sources if s[0] not in rest] == [s for s in before.sources if s[0] not in rest]
    hash(after)


def test_named() -> None:
    for name, record in DEVICES.items():
        assert named(name) == corrected(record)
        assert named(name).name == name
    with pytest.raises(ValueError, match="'v100'") as caught:
        named("v100")
    assert all(name in str(caught.value) for name in DEVICES)
    assert "live device" in str(caught.value)


@pytest.mark.parametrize("name", DEVICES)
def test_live_is_the_record_of_a_whole_known_device(name: str, tmp_path: Path) -> None:
    assert set(REPORTED) == set(DEVICES)
    record, (marketed, shared) = DEVICES[name], REPORTED[name]
    assert record.shared == shared
    assert live(marketed, record.arch, *counts(record), folder=tmp_path) == record


def test_live_with_what_was_measured(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    record = DEVICES["h200"]
    assert live("NVIDIA H200", "sm_90", *counts(record), folder=tmp_path) == corrected(record, tmp_path) != record


def test_live_mi300x_as_rocm_reports_it(tmp_path: Path) -> None:
    reported = (304, 65_536, 65_536, 4 * 1024**2)  # the L2 of one die
    found = live("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", *reported, folder=tmp_path)
    assert found == DEVICES["mi300x"]


def test_live_partition(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"constants": {"exchange": 0.66, "memory_rate": 4400.0}})
    whole = DEVICES["h200"]
    name = "NVIDIA H200 MIG 4g.71gb"
    part = live(name, "sm_90", 66, whole.shared, whole.registers, whole.l2 // 2, folder=tmp_path)
    assert part.name == name
    assert counts(part) == (66, whole.shared, whole.registers, whole.l2 // 2)
    assert part.memory_rate == pytest.approx(2200.0)
    assert part.rate("bf16") == pytest.approx(whole.rate("bf16") / 2)
    assert (part.exchange, part.l2_rate, part.clock) == (0.66, whole.l2_rate, whole.clock)
    told = dict(part.sources)
    assert sorted(told) == sorted(NUMBERS)
    assert told["multiprocessors"] == told["l2"] == "read from the live device"
    assert told["exchange"] == "measured: NVIDIA H200, 2026-01-02, commit abc1234"
    assert told["memory_rate"].startswith("measured: ")
    assert told["memory_rate"].endswith("scaled to 66 of 132 multiprocessors")
    hash(part)


@pytest.mark.parametrize(
    ("name", "arch", "nearest"),
    [
        ("NVIDIA L40S", "sm_89", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "sm_89", "rtx4090"),
        ("NVIDIA A10G", "sm_86", "rtx4090"),
        ("NVIDIA Orin", "sm_87", "rtx4090"),
        ("NVIDIA GH200 480GB", "sm_90", "h200"),
        ("NVIDIA H100 PCIe", "sm_90", "h200"),
        ("NVIDIA GB200", "sm_100", "b200"),
        ("NVIDIA B300", "sm_103", "b200"),
        ("NVIDIA GB10", "sm_121", "rtx5090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", "rtx4090"),
        ("Tesla V100-SXM2-16GB", "sm_70", "h200"),
        ("AMD Instinct MI355X", "gfx950", "mi300x"),
        ("AMD Instinct MI210", "gfx90a", "mi300x"),
        ("AMD Radeon RX 7900 XTX", "gfx1100", "h200"),
        ("NVIDIA H200", "sm_100", "b200"),  # a name against its architecture is no match
    ],
)
def test_live_unknown_device_takes_the_rates_of_the_nearest(name: str, arch: str, nearest: str, tmp_path: Path) -> None:
    record = DEVICES[nearest]
    found = live(name, arch, 40, 50_000, 32_768, 4_000_000, folder=tmp_path)
    assert (found.name, found.arch, found.multiprocessors, found.shared) == (name, arch, 40, 50_000)
    told = dict(found.sources)
    if record.arch.startswith("gfx"):
        assert (found.registers, found.l2) == (record.registers, round(record.l2 * 40 / record.multiprocessors))
        assert told["l2"].startswith(f"assumed: as on {nearest}; scaled")
    else:
        assert (found.registers, found.l2) == (32_768, 4_000_000)
        assert told["l2"] == told["registers"] == "read from the live device"
    assert (found.clock, found.l2_rate, found.exchange) == (record.clock, record.l2_rate, record.exchange)
    assert found.memory_rate == pytest.approx(record.memory_rate * 40 / record.multiprocessors)
    assert found.rate("fp32") == pytest.approx(record.rate("fp32") * 40 / record.multiprocessors)
    assert sorted(told) == sorted(NUMBERS)
    assert told["clock"] == told["exchange"] == f"assumed: as on {nearest}"
    assert told["matrix"] == f"assumed: as on {nearest}; scaled to 40 of {record.multiprocessors} multiprocessors"
    assert told["shared"] == "read from the live device"


def test_live_unknown_device_with_the_counts_of_a_known_one_keeps_its_name(tmp_path: Path) -> None:
    record = DEVICES["h200"]
    found = live("NVIDIA GH200 480GB", "sm_90", *counts(record), folder=tmp_path)
    assert found.name == "NVIDIA GH200 480GB"
    assert dict(found.sources)["memory_rate"] == "assumed: as on h200"
