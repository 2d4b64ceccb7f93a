"""Each rule of the advice speaks where its numbers say so, and is silent where they do not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from asked import asked

from persistrnn import decide
from persistrnn.profiling import advice as profile_advice
from persistrnn.profiling import report, tables
from persistrnn.profiling.advice import advice
from persistrnn.profiling.page import number
from persistrnn.profiling.record import NO_KERNELS, UNTRACED, Machine, Point, Profile, Settings
from persistrnn.profiling.subject import Call
from persistrnn.profiling.trace import Phase

GPU = Machine("cuda", "NVIDIA H200", 140 << 30, 8, False, "2.13", "3.9.0", "3.11", "2026-01-31")
CPU = Machine("cpu", "CPU: some", 16 << 30, 2, False, "2.13", "3.9.0", "3.11", "2026-01-31")


def point(steps, seconds, arm="persistrnn", path="persistent", peak=1 << 20, spread=0.0, **phases):
    found = {name.replace("_", " "): Phase(share * seconds) for name, share in phases.items()}
    call = Call("lstm", 512, 512, 1, 1, steps, 16, "bf16", path)
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return Point(arm, steps, "", steps * 16, seconds, low, high, 5, 1 << 20, peak, seconds, found, [], [call])


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


def profile(*points, machine=GPU, **more):
    return Profile("lstm", machine, Settings("adam", 5, 2, 20.0), list(points), **more)


def said(rule, *args, **more):
    return getattr(profile_advice, rule)(profile(*args, **more))


def test_batch_that_is_nearly_free():
    found = outlook({16: (2.0, 0.81), 32: (2.2, 0.75), 64: (3.5, 0.4)})
    expected = (
        "81% of the step is synchronisation and reading the state (barriers, and exchange between slices; predicted "
        "for h200): batch 16 to 32 is nearly free, 1.10 times the step for 2 times the rows."
    )
    assert said("batch", point(512, 1), outlook=found) == expected
    # A larger batch that is still within 15%.
    assert "batch 16 to 64 is nearly free, 1.15" in said(
        "batch", point(512, 1), outlook=outlook({16: (2.0, 0.8), 32: (2.2, 0.8), 64: (2.3, 0.8)})
    )


def test_batch_that_is_cheap_but_not_free():
    found = outlook({16: (2.0, 0.5), 32: (2.6, 0.4), 64: (4.0, 0.2), 128: (8.1, 0.1)})
    assert "batch 16 to 64 makes it 2.00 times as long, for 4 times the rows" in said("batch", outlook=found)


def test_batch_that_gains_nothing():
    assert said("batch", outlook=outlook({16: (2.0, 0.1), 32: (4.0, 0.1), 64: (8.0, 0.1)})) == ""
    assert said("batch", point(512, 1)) == ""


def test_dtype():
    found = outlook({16: (7.0, 0.1)}, "fp32", {"fp32": 7.0, "bf16": 2.5})
    assert said("dtype", outlook=found).startswith("In bf16 a step is predicted to take 2.50 us on h200, in fp32 7.00")
    assert said("dtype", outlook=outlook({16: (7.0, 0.1)}, "fp32", {"fp32": 7.0, "bf16": 6.9})) == ""
    assert said("dtype", outlook=outlook({16: (7.0, 0.1)}, "bf16")) == ""
    assert said("dtype", outlook=outlook({16: (7.0, 0.1)}, "fp32", {"fp32": 7.0})) == ""


def test_streamed():
    found = said("streamed", outlook=outlook({32: (80.0, 0.3)}, resident=0.36))
    assert found.startswith(
        "64% of W_hh does not fit on h200 and is read again at each step, 25% of the step (predicted)"
    )
    assert said("streamed", outlook=outlook({32: (80.0, 0.3)})) == ""


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ({"input_GEMM": 0.3, "weight_GEMMs": 0.31}, "61% of the time is products"),
        ({"recompute": 0.4}, "40% of the time is recomputing"),
        ({"optimizer": 0.2}, "20% of the time is the optimizer"),
        ({"device_idle": 0.33}, "idle for 33%"),
    ],
)
def test_shares_of_phases(phases, told):
    (found,) = said("shares", point(64, 1e-3, **dict.fromkeys(phases, 0.01)), point(512, 2e-3, **phases))
    assert told in found
    little = {name: share / 4 for name, share in phases.items()}
    assert said("shares", point(64, 1e-3, **phases), point(512, 2e-3, **little)) == []
    assert said("shares", Point("persistrnn", 512, "out of memory")) == []


def test_what_does_not_grow_with_t():
    found = said("fixed", point(100, 3e-3), point(200, 4e-3), point(1000, 12e-3))
    assert found.startswith("2 ms of an iteration do not grow with T, 67% of it at T = 100 and 17% at T = 1,000")
    assert said("fixed", point(100, 1e-3), point(1000, 10e-3)) == ""
    assert said("fixed", point(100, 3e-3)) == ""
    assert said("fixed", point(100, 3e-3), point(1000, 3e-3)) == "", "no slope at all"


def test_memory():
    points = [point(1024, 1, peak=1 << 30), point(2048, 2, peak=2 << 30)]
    found = said("memory", *points)
    assert found.startswith(
        "64 KiB per token: about T = 143,000 fits in 140.0 GiB (extrapolated from what was measured)"
    )
    call = asked("lstm", 512, 16, 2048, dtype=torch.bfloat16)
    gates, checkpoint = (decide.needed_bytes(call, save, on_kernels=True) for save in ("gates", "checkpoint"))
    assert found.endswith(
        f'; at T = 2,048 save="checkpoint" is predicted to need {number(checkpoint / 2**20)} MiB in the recurrent '
        f'layers, where save="gates" needs {number(gates / 2**20)}.'
    )
    assert "save=" not in said("memory", point(100, 1, peak=1 << 30)), "where one chunk holds all steps"
    points[-1].calls[0] = dataclasses.replace(points[-1].calls[0], save="checkpoint")
    assert "save=" not in said("memory", *points)
    failed = Point("persistrnn", 1 << 20, "out of memory")
    assert said("memory", *points, failed).endswith(". T = 1,048,576 did not fit.")
    assert "save=" not in said("memory", point(512, 1, path="torch.nn"), machine=CPU)
    assert said("memory", failed) == ""


def test_host():
    assert "This is a CPU: torch's own kernels ran" in said("host", point(64, 1, path="torch"), machine=CPU)
    assert said("host", point(64, 1)) == ""
    interpreted = Machine(**{**vars(CPU), "interpreted": True})
    assert "Triton's interpreter" in said("host", point(64, 1), machine=interpreted)


def test_untraced():
    """A GPU whose kernels were not seen; nothing else speaks of where the time goes."""
    blind = dataclasses.replace(point(512, 1), untraced=NO_KERNELS)
    found = said("untraced", point(64, 1, optimizer=0.5), blind)
    assert found.startswith("The profiler saw no kernels at T = 512: where the time goes is not known")
    assert "CUPTI is held by another profiler (nsys, ncu, DCGM: end it), or not allowed" in found
    assert said("untraced", point(64, 1), dataclasses.replace(point(512, 1), untraced=UNTRACED)) == ""


def test_a_peak_is_one_number_in_the_table_and_on_the_page():
    found = profile(point(512, 1.0, peak=3 << 20), point(1024, 2.0, peak=6 << 20))
    card = next(card for card in report.cards(found) if card.what.startswith("peak memory"))
    table = tables.summary(found)
    row = dict(zip((column.name for column in table.columns), table.rows[-1].cells, strict=True))
    assert (card.value, row["peak MiB"], row["of it held MiB"]) == ("7.000", "7.000", "1.000")


def test_compared():
    theirs = {"arm": "torch.nn", "path": "torch.nn"}
    found = said(
        "compared", point(64, 1), point(512, 2.0, peak=3), point(64, 9, **theirs), point(512, 5.0, peak=4, **theirs)
    )
    assert (
        found == "persistrnn is 2.50 times as fast as torch.nn at T = 512; persistrnn needs 25% less memory per token."
    )
    found = said("compared", point(512, 2.0, peak=5), point(512, 1.0, peak=4, **theirs))
    assert (
        found == "torch.nn is 2.00 times as fast as persistrnn at T = 512; persistrnn needs 25% more memory per token."
    )
    found = said("compared", point(512, 2.0, path="torch", spread=0.1), point(512, 2.3, **theirs))
    assert found == (
        "persistrnn and torch.nn take the same time within the spread at T = 512. Both ran torch's own kernels: what "
        "differs is the load of the machine, or our Python around them."
    )
    assert said("compared", point(512, 1)) == ""
    # At the longest T that both have.
    found = said(
        "compared", point(64, 1), point(512, 9), point(64, 3, **theirs), Point("torch.nn", 512, "out of memory")
    )
    assert found == "persistrnn is 3.00 times as fast as torch.nn at T = 64."


def test_all_rules_together():
    points = [point(100, 3e-3, optimizer=0.5), point(1000, 12e-3, peak=10 << 20, optimizer=0.5)]
    found = advice(profile(*points, outlook=outlook({16: (2.0, 0.81), 32: (2.2, 0.75)})))
    assert len(found) == 4
    assert advice(profile(Point("persistrnn", 512, "out of memory"))) == []
