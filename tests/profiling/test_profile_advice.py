"""Each rule of the advice speaks where its numbers say so, and is silent where they do not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from asked import asked

from persistrnn import decide
from persistrnn.profiling import advice as rules
from persistrnn.profiling.page import number
from persistrnn.profiling.record import NO_KERNELS, UNTRACED, Machine, Point, Profile, Settings
from persistrnn.profiling.subject import Call
from persistrnn.profiling.trace import Phase

GPU = Machine("cuda", "NVIDIA H200", 140 << 30, 8, False, "2.13", "3.9.0", "3.11", "2026-01-31")
CPU = dataclasses.replace(GPU, kind="cpu", name="CPU: some", memory=16 << 30)
TORCH = {"arm": "torch.nn", "path": "torch.nn"}


def point(steps, seconds, arm="persistrnn", path="persistent", peak=1 << 20, spread=0.0, **phases):
    call = Call("lstm", 512, 512, 1, 1, steps, 16, "bf16", path)
    return Point(
        arm, steps, tokens=steps * 16, seconds=seconds, low=seconds * (1 - spread), high=seconds * (1 + spread),
        iterations=5, held=1 << 20, peak=peak, calls=[call],
        phases={name.replace("_", " "): Phase(share * seconds) for name, share in phases.items()},
    )  # fmt: skip


def outlook(batches, dtype="bf16", dtypes=None, resident=1.0):
    """batches: total of each, of which a part is exchange."""
    split = {
        rows: {"compute": total * (1 - share), "weights": 0.0, "state": total * share / 2, "pointwise": 0.0}
        | {"synchronisation": total * share / 2}
        for rows, (total, share) in batches.items()
    }
    first = next(iter(batches))
    one = SimpleNamespace(parts={"weights": 0.25 * batches[first][0]})
    return SimpleNamespace(
        device="h200", dtype=dtype, batch=first, batches=split, dtypes=dtypes or {dtype: batches[first][0]},
        resident=resident, total=batches[first][0], passes={"forward": one},
    )  # fmt: skip


def said(rule, *points, machine=GPU, **more):
    """What one rule says."""
    profile = Profile("lstm", machine, Settings("adam", 5, 2, 20.0), list(points), **more)
    return " ".join(getattr(rules, rule)(profile))


FAILED = Point("persistrnn", 1 << 20, "out of memory")


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (
            {16: (2.0, 0.81), 32: (2.2, 0.75), 64: (3.5, 0.4)},
            "batch 16 to 32 is nearly free, 1.10 times the step for 2",
        ),
        ({16: (2.0, 0.8), 32: (2.2, 0.8), 64: (2.3, 0.8)}, "batch 16 to 64 is nearly free, 1.15"),
        (
            {16: (2.0, 0.5), 32: (2.6, 0.4), 64: (4.0, 0.2), 128: (8.1, 0.1)},
            "batch 16 to 64 makes it 2.00 times as long, for 4 times the rows",
        ),
        ({16: (2.0, 0.1), 32: (4.0, 0.1), 64: (8.0, 0.1)}, ""),
    ],
)
def test_batch(batches, words):
    found = said("batch", point(512, 1), outlook=outlook(batches))
    share = f"{batches[16][1]:.0%} of the step is synchronisation and reading the state"
    assert words in found
    assert found.startswith(share) == bool(words) == bool(found)
    assert said("batch", point(512, 1)) == ""


@pytest.mark.parametrize(
    ("dtype", "dtypes", "speaks"),
    [
        ("fp32", {"fp32": 7.0, "bf16": 2.5}, True),
        ("fp32", {"fp32": 7.0, "bf16": 6.9}, False),
        ("bf16", None, False),
        ("fp32", {"fp32": 7.0}, False),
    ],
)
def test_dtype(dtype, dtypes, speaks):
    found = said("dtype", point(512, 1), outlook=outlook({16: (7.0, 0.1)}, dtype, dtypes))
    assert found.startswith("In bf16 a step is predicted to take 2.50 us on h200, in fp32 7.00") == speaks
    assert bool(found) == speaks


def test_streamed():
    found = said("streamed", point(512, 1), outlook=outlook({32: (80.0, 0.3)}, resident=0.36))
    assert found.startswith("64% of W_hh does not fit on h200 and is read again at each step, 25% of the step")
    assert said("streamed", point(512, 1), outlook=outlook({32: (80.0, 0.3)})) == ""


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({"input_GEMM": 0.3, "weight_GEMMs": 0.31}, "61% of the time is products"),
        ({"recompute": 0.4}, "40% of the time is recomputing"),
        ({"optimizer": 0.2}, "20% of the time is the optimizer"),
        ({"device_idle": 0.33}, "idle for 33%"),
    ],
)
def test_shares_of_phases(phases, words):
    """Of the longest T."""
    assert words in said("shares", point(64, 1e-3, **dict.fromkeys(phases, 0.01)), point(512, 2e-3, **phases))
    little = {name: share / 4 for name, share in phases.items()}
    assert said("shares", point(64, 1e-3, **phases), point(512, 2e-3, **little)) == ""
    assert said("shares", FAILED) == ""


def test_what_does_not_grow_with_t():
    found = said("fixed", point(100, 3e-3), point(200, 4e-3), point(1000, 12e-3))
    assert found.startswith("2 ms of an iteration do not grow with T, 67% of it at T = 100 and 17% at T = 1,000")
    assert said("fixed", point(100, 1e-3), point(1000, 10e-3)) == ""
    assert said("fixed", point(100, 3e-3)) == ""
    assert said("fixed", point(100, 3e-3), point(1000, 3e-3)) == "", "no slope at all"


def test_memory():
    points = [point(1024, 1, peak=1 << 30), point(2048, 2, peak=2 << 30)]
    found = said("memory", *points)
    assert found.startswith("64 KiB per token: about T = 143,000 fits in 140.0 GiB (extrapolated")
    call = asked("lstm", 512, 16, 2048, dtype=torch.bfloat16)
    gates, checkpoint = (decide.needed_bytes(call, save, on_kernels=True) for save in ("gates", "checkpoint"))
    assert found.endswith(
        f'; at T = 2,048 save="checkpoint" is predicted to need {number(checkpoint / 2**20)} MiB in the recurrent '
        f'layers, where save="gates" needs {number(gates / 2**20)}.'
    )
    assert "save=" not in said("memory", point(100, 1, peak=1 << 30)), "where one chunk holds all steps"
    points[-1].calls[0] = dataclasses.replace(points[-1].calls[0], save="checkpoint")
    assert "save=" not in said("memory", *points)
    assert said("memory", *points, FAILED).endswith(". T = 1,048,576 did not fit.")
    assert "save=" not in said("memory", point(512, 1, path="torch.nn"), machine=CPU)
    assert said("memory", FAILED) == ""


def test_untraced():
    """A GPU whose kernels were not seen."""
    blind = dataclasses.replace(point(512, 1), untraced=NO_KERNELS)
    found = said("untraced", point(64, 1, optimizer=0.5), blind)
    assert found.startswith("The profiler saw no kernels at T = 512: where the time goes is not known")
    assert said("untraced", point(64, 1), dataclasses.replace(point(512, 1), untraced=UNTRACED)) == ""


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (
            [point(64, 1), point(512, 2.0, peak=3), point(64, 9, **TORCH), point(512, 5.0, peak=4, **TORCH)],
            "persistrnn is 2.50 times as fast as torch.nn at T = 512; persistrnn needs 25% less memory per token.",
        ),
        (
            [point(512, 2.0, peak=5), point(512, 1.0, peak=4, **TORCH)],
            "torch.nn is 2.00 times as fast as persistrnn at T = 512; persistrnn needs 25% more memory per token.",
        ),
        (
            [point(512, 2.0, path="torch", spread=0.1), point(512, 2.3, **TORCH)],
            "persistrnn and torch.nn take the same time within the spread at T = 512. Both ran torch's own kernels: "
            "what differs is the load of the machine, or our Python around them.",
        ),
        (
            [point(64, 1), point(512, 9), point(64, 3, **TORCH), Point("torch.nn", 512, "out of memory")],
            "persistrnn is 3.00 times as fast as torch.nn at T = 64.",
        ),
        ([point(512, 1)], ""),
    ],
)
def test_compared_at_the_longest_t_that_both_have(points, words):
    assert said("compared", *points) == words


def test_all_rules_together():
    points = [point(100, 3e-3, optimizer=0.5), point(1000, 12e-3, peak=10 << 20, optimizer=0.5)]
    found = outlook({16: (2.0, 0.81), 32: (2.2, 0.75)})
    settings = Settings("adam", 5, 2, 20.0)
    assert len(rules.advice(Profile("lstm", GPU, settings, points, found))) == 4
    assert rules.advice(Profile("lstm", GPU, settings, [FAILED])) == []
