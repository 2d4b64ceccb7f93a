"""One iteration, read from a trace of torch.profiler: time, arithmetic and bytes by phase, and the peak of memory.

The trace is the JSON of ``torch.profiler.profile.export_chrome_trace``, with shapes. The iteration is in a range
``ITERATION``, its stages in ranges of ``STAGES``; the layers' own ranges are those of ``phases``. On a GPU a kernel
belongs to the range from which it was launched (by correlation), on a CPU an operator's own time belongs to the range
around it.

What torch's own kernels do within one call, the products of the input and the scan, is not separable and not separated.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import phases

ITERATION = "profile: iteration"
STAGES = {name: f"profile: {name}" for name in ("forward", "loss", "backward", "optimizer")}

INPUT_GEMM, SCAN_FORWARD, RECOMPUTE, SCAN_BACKWARD, WEIGHT_GEMMS = (name.split(": ")[1] for name in phases.PHASES)
TORCH_FORWARD, TORCH_BACKWARD = "torch's layers, forward", "torch's layers, backward"
REST = {name: f"rest of {name}" for name in ("forward", "backward")} | {"loss": "loss", "optimizer": "optimizer"}
OTHER, IDLE = "other", "device idle"
# Every phase there is, in the order of an iteration.
ORDER = (
    INPUT_GEMM, SCAN_FORWARD, TORCH_FORWARD, REST["forward"], "loss", RECOMPUTE, SCAN_BACKWARD, WEIGHT_GEMMS,
    TORCH_BACKWARD, REST["backward"], "optimizer", OTHER, IDLE,
)  # fmt: skip

# Ranges and operators of our layers, and their phases.
_LAYERS = {name: name.split(": ")[1] for name in phases.PHASES}
_LAYERS |= {"persistrnn::scan_forward": SCAN_FORWARD, "persistrnn::scan_backward": SCAN_BACKWARD}
# What of this node is neither in a range nor in an operator of ours is the gradients of W_hh and of the bias.
_NODE = "_ScanBackward"
_STAGE_OF = {name: stage for stage, name in STAGES.items()}
# Torch's own layers, as operators and as nodes of autograd; in ATen's loops over steps nodes have no such name.
_TORCH_FORWARD = ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "persistrnn::torch_layer")
_TORCH_BACKWARD = (
    *("MkldnnRnnLayerBackward0", "CudnnRnnBackward0", "MiopenRnnBackward0"),
    "persistrnn::torch_layer_backward",
)
# Matrix products, and where their first operand stands.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0}
_PRODUCTS |= {f"aten::{name}": 1 for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")}
_BYTES = {"c10::Half": 2, "c10::BFloat16": 2, "float": 4, "double": 8}


class Span(NamedTuple):
    """Seconds from the iteration's start; track: "stages", "host" or "device"."""

    track: str
    name: str
    start: float
    seconds: float


@dataclass
class Phase:
    """seconds: in an iteration; flops, bytes: of the matrix products in it, counted from their shapes. floor: seconds
    that the device needs at least, predicted; 0 where unknown."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0


class Iteration(NamedTuple):
    """seconds: its wall time while it was profiled. peak: bytes that torch had allocated at most, above those at its
    start (on a CPU; 0 if memory was not traced). device: whether ``phases`` are times of kernels, else of the host.
    of_inputs: operations of the input's products in the forward."""

    seconds: float
    phases: dict[str, Phase]
    spans: list[Span]
    peak: int
    device: bool
    of_inputs: float


@dataclass
class _Host:
    """An operator, a range or a launch on a thread, in microseconds of the trace, inside another one. node: its phase
    is that of a node of autograd, which ranges in it divide."""

    name: str
    start: float
    end: float
    arguments: Mapping[str, Any]
    inside: _Host | None = None
    children: float = 0.0
    stage: str = ""
    label: str = ""
    counted: bool = False
    node: bool = False


def read(trace: Mapping[str, Any]) -> Iteration:
    """What the one iteration in a trace did.

    Raises:
        ValueError: no range of that name, or several.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    whole = [event for event in events if event["name"] == ITERATION and event.get("cat") == "user_annotation"]
    if len(whole) != 1:
        raise ValueError(f"the trace has {len(whole)} ranges {ITERATION!r}, allowed: one")
    begin, end = whole[0]["ts"], whole[0]["ts"] + whole[0]["dur"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    threads = _threads(events, begin, end)
    _label(threads)
    hosts = [host for thread in threads.values() for host in thread]  # what lies in another one comes after it
    pieces = [("stages", _STAGE_OF[host.name], host.start, host.end) for host in hosts if host.name in _STAGE_OF]
    pieces += [("host", host.label, host.start, host.end) for host in hosts if _leads(host)]
    found: dict[str, Phase] = defaultdict(Phase)
    for label, start, stop in _of_kernels(kernels, hosts):
        found[label].seconds += (stop - start) / 1e6
        pieces.append(("device", label, start, stop))
    for host in threads[whole[0]["tid"]] if not kernels else ():
        found[host.label].seconds += max(0.0, host.end - host.start - host.children) / 1e6
    of_inputs = 0.0
    for host in hosts:
        flops, moved = product(host.name, host.arguments)
        within = host.inside is not None and host.inside.counted
        # What torch's layers do is known from their sizes.
        host.counted = within or bool(flops) or host.name in _TORCH_FORWARD or host.label == TORCH_BACKWARD
        if flops and not within and host.label != TORCH_BACKWARD:
            found[host.label].flops += flops
            found[host.label].bytes += moved
            of_inputs += flops if (host.label, host.stage) == (INPUT_GEMM, "forward") else 0.0
    ordered = {name: found[name] for name in ORDER if name in found}
    most = peak(trace["traceEvents"], begin)
    return Iteration((end - begin) / 1e6, ordered, _spans(pieces, begin, end), most, bool(kernels), of_inputs)


def _threads(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> dict[Any, list[_Host]]:
    """What the host did within the iteration, by thread and in order of time, each inside what it lies in."""
    threads: dict[Any, list[_Host]] = defaultdict(list)
    for event in events:
        kind = event.get("cat")
        if kind not in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            continue
        start, stop = event["ts"], event["ts"] + event["dur"]
        if start < begin or stop > end:
            continue
        threads[event["tid"]].append(_Host(event["name"], start, stop, event.get("args", {})))
    for thread in threads.values():
        thread.sort(key=lambda host: (host.start, -host.end))
        stack: list[_Host] = []
        for host in thread:
            while stack and stack[-1].end <= host.start:
                stack.pop()
            if stack:
                host.inside = stack[-1]
                host.inside.children += host.end - host.start
            stack.append(host)
    return threads


def _label(threads: Mapping[Any, Sequence[_Host]]) -> None:
    """Give every host event its phase: the outermost range or operator of a layer, else torch's layers, else its stage.

    The gradients of a product in a layer's forward belong to the layer: autograd's node has the product's number.
    """
    hosts = sorted((host for thread in threads.values() for host in thread), key=lambda host: (host.start, -host.end))
    stages = [host for host in hosts if host.name in _STAGE_OF]
    starts = [host.start for host in stages]
    names = {host.name for host in hosts}
    # Only torch's layers are there, and what they do in the backward has no name of its own.
    alone = not names.isdisjoint(_TORCH_FORWARD) and names.isdisjoint({*_TORCH_BACKWARD, *_LAYERS})
    products: set[int] = set()
    for host in hosts:
        host.stage = _STAGE_OF.get(host.name) or (host.inside.stage if host.inside else "")
        if not host.stage:  # a thread of autograd has no stage of its own
            at = bisect.bisect_right(starts, host.start) - 1
            host.stage = _STAGE_OF[stages[at].name] if at >= 0 and host.end <= stages[at].end else ""
        above = host.inside.label if host.inside else ""
        number = host.arguments.get("Sequence number", -1)
        if above in _LAYERS.values() and not (host.inside and host.inside.node):
            host.label = above
        elif host.name in _LAYERS:
            host.label = _LAYERS[host.name]
        elif host.name in _TORCH_FORWARD:
            host.label = RECOMPUTE if host.stage == "backward" else TORCH_FORWARD
        elif host.stage == "backward" and (host.name == _NODE or number in products):
            host.label, host.node = WEIGHT_GEMMS, True
        elif above in (TORCH_FORWARD, TORCH_BACKWARD, WEIGHT_GEMMS):
            host.label, host.node = above, above == WEIGHT_GEMMS
        elif host.name in _TORCH_BACKWARD or (host.stage == "backward" and alone):
            host.label = TORCH_BACKWARD
        else:
            host.label = REST.get(host.stage, OTHER)
        if host.label == INPUT_GEMM and host.stage == "forward" and host.name in _PRODUCTS and number >= 0:
            products.add(number)


def _leads(host: _Host) -> bool:
    """Whether a host event is the whole of its phase there, and so worth a place in a timeline."""
    return host.label not in (OTHER, *REST.values()) and (host.inside is None or host.inside.label != host.label)


def _of_kernels(kernels: Iterable[Mapping[str, Any]], hosts: Iterable[_Host]) -> Iterator[tuple[str, float, float]]:
    """The phase from which each kernel was launched, its start and its end."""
    launches: dict[Any, _Host] = {}
    operators: dict[Any, _Host] = {}
    for host in hosts:
        if "correlation" in host.arguments:
            launches[host.arguments["correlation"]] = host
        elif "External id" in host.arguments:
            operators[host.arguments["External id"]] = host
    for kernel in kernels:
        arguments = kernel.get("args", {})
        source = launches.get(arguments.get("correlation")) or operators.get(arguments.get("External id"))
        yield source.label if source else OTHER, kernel["ts"], kernel["ts"] + kernel["dur"]


def _spans(pieces: Iterable[tuple[str, str, float, float]], begin: float, end: float) -> list[Span]:
    """Neighbours of one name on one track as one span, where less than a thousandth of the whole is between them."""
    found: dict[str, list[tuple[str, float, float]]] = {"stages": [], "host": [], "device": []}
    for track, name, start, stop in sorted(pieces, key=lambda piece: piece[2]):
        own = found[track]
        if own and own[-1][0] == name and start - own[-1][2] <= (end - begin) / 1000:
            own[-1] = name, own[-1][1], max(stop, own[-1][2])
        else:
            own.append((name, start, stop))
    return [
        Span(track, name, (start - begin) / 1e6, (stop - start) / 1e6)
        for track, own in found.items()
        for name, start, stop in own
    ]


def peak(events: Iterable[Mapping[str, Any]], begin: float) -> int:
    """The most bytes of host memory that torch held at once from ``begin`` on, above those that it held then. What was
    allocated before the trace is not in it, and its end is not counted."""
    held: dict[int, int] = {}
    now = most = 0
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    for event in sorted(memory, key=lambda event: event["ts"]):
        size, place = event["args"]["Bytes"], event["args"]["Addr"]
        if event["ts"] < begin:
            continue
        if size > 0:
            held[place] = size
            now += size
            most = max(most, now)
        else:
            now -= held.pop(place, 0)
    return most


def product(name: str, arguments: Mapping[str, Any]) -> tuple[float, float]:
    """(floating-point operations, bytes of both operands and the result once) of a matrix product, by the shapes in its
    event; zeros for any other operator."""
    first = _PRODUCTS.get(name)
    shapes = arguments.get("Input Dims")
    if first is None or not shapes or len(shapes) < first + 2:
        return 0.0, 0.0
    (*outer, m, k), (*_, n) = shapes[first], shapes[first + 1]
    count = math.prod(outer)
    size = max((_BYTES.get(kind, 0) for kind in arguments.get("Input type", ())), default=0)
    return 2.0 * count * m * k * n, float(count * (m * k + k * n + m * n) * size)
