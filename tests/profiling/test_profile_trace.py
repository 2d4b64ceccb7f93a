"""Phases from a trace: synthetic events of a GPU and of a CPU, and a real profile with the layers' ranges in it."""

import json

import pytest
import torch

from persistrnn import phases
from persistrnn.profiling import trace as profile_trace
from persistrnn.profiling.trace import ITERATION, STAGES, read

MAIN, AUTOGRAD = 1, 2


def event(name, start, end, tid=MAIN, cat="user_annotation", **arguments):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": arguments}


def stages(*bounds):
    """An iteration from 0 to the last bound, cut into the four stages."""
    pairs = zip(STAGES.values(), (0, *bounds[:-1]), bounds, strict=True)
    return [event(ITERATION, 0, bounds[-1]), *(event(name, start, end) for name, start, end in pairs)]


def launched(correlation, start, seconds, kernel_start, tid=MAIN, name="some_kernel"):
    """A launch on the host and the kernel that it starts, later and on the device."""
    yield event("cuLaunchKernelEx", start, start + 1, tid, "cuda_driver", correlation=correlation)
    yield event(name, kernel_start, kernel_start + seconds, "stream 7", "kernel", correlation=correlation)


def trace(*events):
    return {"traceEvents": list(events)}


def seconds(found):
    return {name: round(phase.seconds * 1e6, 6) for name, phase in found.phases.items()}


def test_kernels_belong_to_the_range_that_launched_them():
    """The device runs behind the host: kernels of the forward run while the host is in the backward."""
    found = read(
        trace(
            *stages(100, 110, 200, 230),
            event(phases.INPUT_GEMM, 10, 20),
            *launched(1, 12, 40, 50),
            event(phases.SCAN_FORWARD, 20, 40),
            *launched(2, 25, 300, 90),
            *launched(3, 60, 7, 390),  # of the forward, in no range of a layer
            *launched(4, 105, 5, 397),
            # The thread of autograd has no stage range, and lies within that of the main thread.
            event(phases.SCAN_BACKWARD, 120, 150, AUTOGRAD),
            event(phases.RECOMPUTE, 130, 140, AUTOGRAD),  # nested: the outermost counts
            *launched(5, 135, 400, 402, AUTOGRAD),
            event(phases.WEIGHT_GEMMS, 150, 160, AUTOGRAD),
            *launched(6, 155, 60, 802, AUTOGRAD),
            *launched(7, 170, 3, 862, AUTOGRAD),
            *launched(8, 205, 11, 865),
            event("Memcpy DtoD", 876, 880, "stream 7", "gpu_memcpy", correlation=99),  # launched before the iteration
        )
    )
    assert found.device
    assert seconds(found) == {
        "input GEMM": 40, "scan forward": 300, "rest of forward": 7, "loss": 5, "scan backward": 400,
        "weight GEMMs": 60, "rest of backward": 3, "optimizer": 11, "other": 4,
    }  # fmt: skip
    spans = [(span.track, span.name, round(span.start * 1e6), round(span.seconds * 1e6)) for span in found.spans]
    assert spans[:4] == [("stages", name, start, long) for name, start, long in (
        ("forward", 0, 100), ("loss", 100, 10), ("backward", 110, 90), ("optimizer", 200, 30),
    )]  # fmt: skip
    assert ("host", "input GEMM", 10, 10) in spans
    assert ("host", "scan backward", 120, 30) in spans
    assert not [name for track, name, _, _ in spans if track == "host" and name.startswith("rest")]
    device = [rest for track, *rest in spans if track == "device"]
    assert device[:2] == [["input GEMM", 50, 40], ["scan forward", 90, 300]]
    assert len(device) == 9


def test_a_kernel_without_a_launch_event_is_found_by_its_operator():
    found = read(
        trace(
            *stages(100, 110, 200, 230),
            event("aten::mm", 10, 20, cat="cpu_op", **{"External id": 4}),
            event("gemm", 30, 80, "stream 7", "kernel", correlation=12, **{"External id": 4}),
        )
    )
    assert seconds(found) == {"rest of forward": 50}


def test_own_time_of_a_cpu_adds_up():
    found = read(
        trace(
            *stages(100, 110, 200, 230),
            event(phases.INPUT_GEMM, 10, 30),
            event("aten::addmm", 12, 28, cat="cpu_op"),
            event(phases.SCAN_FORWARD, 30, 90),
            event("_ScanBackward", 120, 180, cat="cpu_op"),
            event(phases.SCAN_BACKWARD, 125, 160),
            event("aten::add_", 205, 220, cat="cpu_op"),
        )
    )
    assert not found.device
    expected = {"input GEMM": 20, "scan forward": 60, "rest of forward": 20, "loss": 10, "scan backward": 35}
    assert seconds(found) == expected | {"weight GEMMs": 25, "rest of backward": 30, "optimizer": 30, "other": 0}
    assert sum(phase.seconds for phase in found.phases.values()) == pytest.approx(found.seconds) == 230e-6


def test_torchs_layers_are_told_apart_where_nodes_have_names_and_else_not():
    events = [
        *stages(100, 110, 200, 230),
        event("aten::lstm", 10, 90, cat="cpu_op"),
        event("aten::mm", 20, 30, cat="cpu_op"),
    ]
    one = read(trace(*events, event("CudnnRnnBackward0", 120, 180, cat="cpu_op")))
    assert seconds(one)["torch's layers, forward"] == 80
    assert seconds(one)["torch's layers, backward"] == 60
    assert seconds(one)["rest of backward"] == 30
    # ATen's loop over steps: nodes of addition and products, which a head of the model might have as well.
    other = read(trace(*events, event("AddmmBackward0", 120, 180, cat="cpu_op")))
    assert seconds(other)["torch's layers, backward"] == 90
    assert "rest of backward" not in seconds(other)


def test_nodes_of_autograd_belong_to_the_layer_whose_forward_they_follow():
    """The gradient of the input's product, by its number; what a scan's node does besides its operator."""

    def numbered(name, start, end, number, tid=MAIN):
        return event(name, start, end, tid, "cpu_op", **{"Sequence number": number})

    found = read(
        trace(
            *stages(100, 110, 200, 230),
            event(phases.INPUT_GEMM, 10, 20),
            numbered("aten::addmm", 12, 18, 7),
            numbered("persistrnn::scan_forward", 20, 50, -1),
            numbered("aten::addmm", 60, 70, 8),  # of the model's head
            numbered("AddmmBackward0", 112, 120, 8, AUTOGRAD),
            *launched(1, 115, 1, 300, AUTOGRAD),
            numbered("_ScanBackward", 120, 170, 9, AUTOGRAD),
            numbered("_ScanBackward", 121, 150, 10, AUTOGRAD),
            numbered("persistrnn::scan_backward", 122, 140, -1, AUTOGRAD),
            *launched(2, 125, 2, 301, AUTOGRAD),
            event(phases.SCAN_BACKWARD, 142, 148, AUTOGRAD),  # a range within a node
            *launched(3, 144, 4, 303, AUTOGRAD),
            *launched(4, 160, 8, 307, AUTOGRAD),  # the gradient of W_hh
            numbered("AddmmBackward0", 170, 190, 7, AUTOGRAD),
            *launched(5, 175, 16, 315, AUTOGRAD),
            *launched(6, 195, 32, 331, AUTOGRAD),
        )
    )
    assert seconds(found) == {"scan backward": 6, "weight GEMMs": 24, "rest of backward": 33}


def test_products_are_counted_once():
    def shaped(*shapes):
        return {"Input Dims": list(shapes), "Input type": ["c10::BFloat16"] * len(shapes)}

    found = read(
        trace(
            *stages(100, 110, 200, 230),
            event(phases.INPUT_GEMM, 5, 60),
            event("aten::addmm", 10, 50, cat="cpu_op", **shaped([7], [3, 5], [5, 7])),
            event("aten::bmm", 12, 40, cat="cpu_op", **shaped([1, 3, 5], [1, 5, 7])),  # how it was done: not once more
            event("aten::bmm", 70, 80, cat="cpu_op", **shaped([2, 3, 5], [2, 5, 7])),
            event(phases.INPUT_GEMM, 120, 130),
            event("aten::mm", 121, 129, cat="cpu_op", **shaped([3, 5], [5, 7])),
            event("aten::mm", 210, 220, cat="cpu_op"),  # a trace without shapes
        )
    )
    assert found.phases["input GEMM"].flops == 2 * (2 * 3 * 5 * 7)
    assert found.phases["input GEMM"].bytes == 2 * 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert found.phases["rest of forward"].flops == 2 * 2 * 3 * 5 * 7
    assert found.of_inputs == 2 * 3 * 5 * 7, "of the forward alone"


def test_neighbours_of_one_name_are_one_span():
    pieces = [("host", "a", 0, 10), ("host", "b", 20, 30), ("host", "a", 10.5, 20), ("host", "b", 32, 40)]
    found = profile_trace._spans([("device", "b", 30, 40), *pieces], 0, 1000)
    expected = [("host", "a", 0, 20), ("host", "b", 20, 10), ("host", "b", 32, 8), ("device", "b", 30, 10)]
    assert [(*rest, round(start * 1e6), round(long * 1e6)) for *rest, start, long in found] == expected


def test_peak_of_memory():
    def memory(ts, size, place, device=0):
        arguments = {"Bytes": size, "Addr": place, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "ts": ts, "args": arguments}

    events = [
        memory(-5, 1000, 1),  # before the iteration
        memory(10, 300, 2),
        memory(20, -1000, 1),  # what was there before goes: it was not counted
        memory(30, 500, 3),
        memory(40, -300, 2),
        memory(50, 200, 2),  # the same place again
        memory(60, 10_000, 9, device=1),
        memory(70, -500, 3),
        memory(80, 350, 4),
    ]
    assert profile_trace.peak(reversed(events), 0) == 800


@pytest.mark.parametrize("count", [0, 2])
def test_one_iteration_exactly(count):
    with pytest.raises(ValueError, match=f"the trace has {count} ranges 'profile: iteration', allowed: one"):
        read(trace(*[event(ITERATION, 0, 10), event(ITERATION, 20, 30)][:count]))


def test_a_real_profile(tmp_path):
    """Ranges as the layers emit them, around real work, through torch.profiler and its file."""
    x = torch.randn(300, 300)
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True, "profile_memory": True}
    stage = torch.profiler.record_function
    x @ x
    with torch.profiler.profile(**options) as profiler, stage(ITERATION):
        with stage(STAGES["forward"]):
            with phases.phase(phases.INPUT_GEMM):
                y = x @ x
            with phases.phase(phases.SCAN_FORWARD):
                kept = [y.sin() for _ in range(20)]
            x + x
        with stage(STAGES["backward"]), phases.phase(phases.WEIGHT_GEMMS):
            y @ x
            del kept
        with stage(STAGES["optimizer"]):
            x + x
    file = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(file))
    found = read(json.loads(file.read_text()))
    assert list(found.phases) == [
        "input GEMM", "scan forward", "rest of forward", "weight GEMMs", "rest of backward", "optimizer", "other",
    ]  # fmt: skip
    assert found.phases["input GEMM"].flops == found.phases["weight GEMMs"].flops == 2 * 300**3
    assert found.phases["scan forward"].flops == 0
    assert sum(phase.seconds for phase in found.phases.values()) == pytest.approx(found.seconds, rel=1e-3)
    assert 22 * x.nbytes <= found.peak < 24 * x.nbytes
    assert {span.track for span in found.spans} == {"stages", "host"}
