"""What a call asks for (`Call`) and what will be done (`Decision`): decided once, printed by `explain`, carried down.

The kernels are imported, and Triton with them, at the first question that only they can answer. Letters: T steps, B
batch, H hidden, P projection, D directions, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from persistrnn import tracing
from persistrnn.kernels.cells import CELLS
from persistrnn.kernels.inspect import prediction
from persistrnn.kernels.planner import memory
from persistrnn.kernels.planner.forecast import Forecast, forecast
from persistrnn.kernels.planner.pipeline import Pipeline
from persistrnn.kernels.planner.plan import Plan, PlanError, plan_layer
from persistrnn.kernels.planner.plan import without_kernels as without_kernels  # for own_cell, too
from persistrnn.kernels.planner.problem import Problem

MODES = memory.MODES

# Why a call that the kernels could run does not run there, and is no error where they were asked for.
TANGENTS = "forward-mode differentiation is active, and tangents are computed step by step."


class OfTorch(NamedTuple):
    """What torch has of a cell, beside a function of its name in torch._VF.

    layer, arguments: in torch.nn, and what makes it this cell's. projects: whether that has projections. onednn:
    whether ATen asks oneDNN for it on a CPU. keeps_dtype: whether ATen's loop there keeps the states' own dtype under
    autocast, as it does where a step adds the old state to what it computes. padding: which way an input drives each
    gate where a row has ended, so that a state which is not given out stays and one without a bound does not grow.
    """

    layer: str
    arguments: tuple[tuple[str, str], ...] = ()
    projects: bool = False
    onednn: bool = False
    keeps_dtype: bool = False
    padding: tuple[int, ...] = ()


# The cells that torch has kernels of its own for; of all others its path is a loop over torch's operations.
TORCH = {
    "lstm": OfTorch("LSTM", projects=True, onednn=True, keeps_dtype=True, padding=(-1, 1, 0, 0)),
    "gru": OfTorch("GRU", keeps_dtype=True),
    "rnn_tanh": OfTorch("RNN", (("nonlinearity", "tanh"),)),
    "rnn_relu": OfTorch("RNN", (("nonlinearity", "relu"),), padding=(-1,)),
}


def called(cell: str) -> str:
    """A cell as torch's messages name it, or by its own name."""
    name, _, own = cell.partition(":")
    return TORCH[cell].layer if cell in TORCH else name if own else name.upper()


class Call(NamedTuple):
    """What is asked of a stack of layers.

    num_layers, directions, input_size, hidden_size, proj_size, batch, steps: L, D, I, H, P (0: no projection), B, T.
    dtype: of the computation; precision: of float32 products in the recurrence, "tf32" or "ieee".
    backward: whether one may come (`expects_backward`).
    backend, save, save_budget, cell_dtype: as a caller gives them. dropout: between the layers, where it acts.
    lengths, marks: whether rows have lengths; a mask or resets. return_c: whether every c is given out. heads: blocks
    of a block-diagonal W_hh, a divisor of H. hides: whether the cell's h is its second state, behind what other units
    see of it (`recipe`). transforms: what is active, as `active_transforms` says. weight_dtype:
    "int8" or "fp8" where W_hh is of 8 bits, else "".
    """

    cell: str
    num_layers: int
    directions: int
    bias: bool
    input_size: int
    hidden_size: int
    proj_size: int
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    precision: str
    backward: bool
    backend: str = "auto"
    save: str = "gates"
    save_budget: int | None = None
    cell_dtype: torch.dtype | None = None
    dropout: float = 0.0
    lengths: bool = False
    marks: bool = False
    return_c: bool = False
    heads: int = 1
    hides: bool = False
    transforms: str = ""
    weight_dtype: str = ""

    @property
    def packs(self) -> bool:
        """Whether torch's own kernels run rows with lengths, packed (``rows``): where the host knows them."""
        if not self._of_torch or not self.lengths or self.marks or self.return_c or self.device.type != "cpu":
            return False
        traced = torch.compiler.is_compiling() or self.transforms != ""
        return not traced and self.batch > 0

    @property
    def loops(self) -> bool:
        """Whether torch's own kernels cannot do it, and what is left beside ours is a loop over torch's operations."""
        if self.transforms in ("mapped", "forward"):
            return True
        return (self.lengths or self.marks or self.return_c or not self._of_torch) and not self.packs

    @property
    def torchs(self) -> str:
        """What torch has for the cell, in a word."""
        return "kernels" if self._of_torch else "operations"

    @property
    def _of_torch(self) -> bool:
        return self.cell in TORCH and self.heads == 1

    @property
    def layers(self) -> memory.Layers:
        """The stack as the prediction of memory asks for it."""
        between = self.num_layers > 1 and (self.directions > 1 or self.dropout > 0 or self.hides)
        return memory.Layers(
            CELLS[self.cell], self.input_size, self.hidden_size, self.num_layers, self.directions,
            self.dtype.itemsize, (self.cell_dtype or self.dtype).itemsize, between, self.hides,
        )  # fmt: skip


class Decision(NamedTuple):
    """What will be done.

    call: what was asked, with save="auto" resolved
    path: "persistent", "torch", or "stepwise", a loop over torch's operations
    reason: why not the kernels, in one sentence; None on them
    pipeline: whether the kernels run the whole stack in one launch
    chunk: steps of the time chunks that it runs in; 0: as a whole
    refused: whether backend="persistent" makes an error of the reason
    """

    call: Call
    path: str
    reason: str | None
    pipeline: bool
    chunk: int

    @property
    def refused(self) -> bool:
        return self.call.backend == "persistent" and self.reason not in (None, TANGENTS)

    @property
    def plan(self) -> Plan | Pipeline | None:
        """Of the kernels; None on the other paths. A launch finds the same one by the sizes of its tensors, which a
        compiled graph does not know."""
        if self.path != "persistent":
            return None
        return pipeline_of(self.call) if self.pipeline else plan_layer(problem_of(self.call))


def expects_backward(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a backward may come through an operation on these tensors. The one rule of it, at every level."""
    if not torch.is_grad_enabled():  # so in inference mode too; torch.func.grad and vjp enable it for their function
        return False
    return inside_torch_func() or any(t is not None and t.requires_grad for t in tensors)


def inside_torch_func() -> bool:
    """Whether the tensors are wrapped ones of torch.func, which do not tell whether they require a gradient."""
    # Of the ways to ask, dynamo gives the right answer to this one (seen: 2.13).
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def active_transforms(weights: Sequence[Tensor] = (), packed: bool = False, dropout: bool = False) -> str:
    """What the transforms that are active now ask of a path.

    "": none is. "reverse": nothing, they are those of reverse mode. "folded": torch.func.vmap, innermost, over no
    weight, so that its dimension may become part of the batch. "mapped": any other vmap, for which torch's own kernels
    have no rule. "forward": forward mode, for which no kernels have one.

    Args:
        weights: those of the call
        packed: whether its input is a PackedSequence, for which torch's own kernels have no rule of torch.func
        dropout: whether masks are drawn, which vmap may want to be the same in all samples
    """
    if not inside_torch_func() and forward_ad._current_level < 0:
        return ""
    found = _transforms()
    if found == "reverse" and packed:
        return "mapped"
    if found != "folded":
        return found
    return "mapped" if packed or dropout or any(torch._C._functorch.is_batchedtensor(w) for w in weights) else found


@tracing.constant  # dynamo cannot read the stack, and guards it
def _transforms() -> str:
    kind = torch._C._functorch.TransformType
    layers = torch._C._functorch.get_interpreter_stack() or ()
    keys = [layer.key() for layer in layers]
    if kind.Jvp in keys or forward_ad._current_level >= 0:
        return "forward"
    if kind.Vmap not in keys:
        return "reverse"
    return "folded" if keys.index(kind.Vmap) == len(keys) - 1 and not torch.compiler.is_compiling() else "mapped"


def decide(call: Call) -> Decision:
    """Compiled, the answer is a constant of the graph, but for ``chunk``: a formula that holds for every T and B.

    Raises:
        RuntimeError: save_budget does not hold what the call keeps for its backward
    """
    if call.save == "auto":
        call = call._replace(save=_save_within_budget(call), save_budget=None)
    reason = obstacle(call)
    if reason is None and call.transforms == "forward":
        reason = TANGENTS
    path = "persistent" if reason is None else "stepwise" if call.loops else "torch"
    pipeline = path == "persistent" and call.batch != 0 and runs_as_pipeline(call)
    return Decision(call, path, reason, pipeline, 0 if pipeline else _chunk(call, path == "persistent"))


def obstacle(call: Call) -> str | None:
    """What keeps a call from the kernels, as one sentence; None: they run it.

    All layers of a stack have the same H, so that the answer holds for the whole call: no stack is run in part by one
    path and in part by the other.
    """
    if call.backend == "torch":
        return f'backend="torch" asks for torch\'s own {call.torchs}.'
    if (reason := without_kernels(CELLS[call.cell])) is not None:
        return reason
    if CELLS[call.cell].staged and call.save != "gates":
        return (
            f"of {call.cell}, whose step has several stages, the kernels keep what the backward needs of every step, "
            f'got save="{call.save}"; use save="gates", or backend="torch", which runs it step by step.'
        )
    if call.backend == "auto" and call.device.type == "cpu":
        return f'backend="auto" runs CPU tensors on torch\'s own {call.torchs}; move the tensors to a GPU.'
    # A compiled graph holds for every B and T: it is decided for some that most have. What fits with 16 rows fits with
    # any. An empty batch takes the path of a batch of one.
    batch, steps = (16, 64) if torch.compiler.is_compiling() else (call.batch or 1, call.steps)
    return _obstacle(*_without_symbols(call, batch, steps))


def _without_symbols(call: Call, batch: int, steps: int) -> Call:
    """What an answer may depend on that is a constant of a graph."""
    return call._replace(batch=batch, steps=steps, dropout=1.0 if call.dropout > 0 else 0.0)


@tracing.constant
def _obstacle(*fields: Any) -> str | None:
    call = Call(*fields)  # of which dynamo would hand over the type alone
    reason = unsupported(call)
    return slower(call) if reason is None and call.backend == "auto" and not call.loops else reason


def unsupported(call: Call) -> str | None:
    """Why the kernels cannot run it, with the remedy; None if they can, which neither T nor B changes."""
    if (reason := missing()) is not None:
        return f"{reason}, or use backend='torch'."
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels run float16, bfloat16 and float32, got {call.dtype}; use one of them, or backend='torch'."
    if call.weight_dtype and call.dtype == torch.float32:
        return (
            f"the kernels multiply {call.weight_dtype} weights with float16 and bfloat16, got {call.dtype}; convert "
            "layer and input to one of these, or use backend='torch'."
        )
    if call.weight_dtype and CELLS[call.cell].staged:
        return (
            f"the kernels have no {call.weight_dtype} weights for a cell with a second product or a mean within its "
            "step; use backend='torch'."
        )
    if call.weight_dtype and call.proj_size:
        return f"the kernels have no {call.weight_dtype} weights with projections; use backend='torch'."
    if call.weight_dtype and call.transforms:
        return f"the kernels have no {call.weight_dtype} weights inside torch.func; use backend='torch' there."
    device = call.device
    if device.type == "cpu":
        from persistrnn.kernels import launch

        if not launch.INTERPRETED:
            return (
                "the kernels need a GPU, got a tensor on cpu; move layer and input to 'cuda', use backend='torch', or "
                "set TRITON_INTERPRET=1 before the first import of triton to run the kernels in Triton's interpreter "
                "(slow, for tests)."
            )
    elif device.type != "cuda" or torch.version.hip is not None:
        kind = "an AMD GPU" if device.type == "cuda" else repr(device.type)
        return f"the kernels run on NVIDIA GPUs, got {kind}; use a 'cuda' device of NVIDIA, or backend='torch'."
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0 or newer, got {name} with {capability}; use backend='torch'."
    try:
        plan_layer(problem_of(call._replace(batch=1)))
    except PlanError as error:
        return str(error)
    return None


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be imported; None if they can."""
    try:
        from persistrnn.kernels import launch  # noqa: F401
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "Triton cannot be imported here; install triton >= 3.6 (Linux)"
    return None


def slower(call: Call) -> str | None:
    """Why the kernels, which can run it, had better not: torch's own path is expected to be faster."""
    if call.device.type != "cuda":
        return None  # the interpreter is for tests, not for speed
    found = compare(call, call.backward)
    if found.persistent <= found.torch:
        return None
    if may_be_pipeline(call):
        together = pipeline_of(call)
        theirs = call.num_layers * call.steps * found.torch
        if together is not None and together.microseconds(call.steps, call.backward) <= theirs:
            return None
    how = "measured on this device" if found.measured else "predicted, not measured"
    return (
        f"torch's own path is expected to be faster here: {found.torch:.2f} us per time step against "
        f"{found.persistent:.2f} ({how}); use backend='persistent' to run the kernels all the same."
    )


def compare(call: Call, backward: bool) -> Forecast:
    """What the kernels and torch's own path are expected to need per time step of one layer."""
    return forecast(problem_of(call), backward)


def problem_of(call: Call) -> Problem:
    """What the planner is asked about one layer."""
    from persistrnn.kernels import launch

    sizes = call.hidden_size // call.heads, call.batch, call.directions
    return launch.problem_of(
        CELLS[call.cell], *sizes, call.dtype, call.precision, call.device, call.heads, call.weight_dtype
    )


# ---- all layers in one launch ---------------------------------------------------------------------------------------


def may_be_pipeline(call: Call) -> bool:
    """Whether nothing happens between the layers, and the products of the upper layers' inputs, which are then inside,
    have the precision that they have outside."""
    single = call.num_layers > 1 and call.directions == 1 and call.dropout == 0 and call.proj_size == 0
    exact = call.dtype != torch.float32 or call.precision == matmul_precision()
    return single and call.heads == 1 and not call.weight_dtype and call.save == "gates" and exact and not call.hides


@tracing.constant  # dynamo cannot read the setting
def matmul_precision() -> str:
    """How float32 is multiplied outside of RNNs, "tf32" or "ieee"."""
    setting: str = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if setting == "tf32" else "ieee"


def pipeline_of(call: Call) -> Pipeline | None:
    """The plan of all layers in one launch; None where they do not fit the device together."""
    from persistrnn.kernels import launch

    sizes = call.hidden_size, call.num_layers, call.batch
    return launch.choose_stack(CELLS[call.cell], *sizes, call.dtype, call.precision, call.device)


def runs_as_pipeline(call: Call) -> bool:
    """Whether that may be, and is predicted to win; in a compiled graph with few rows and with many."""
    if not may_be_pipeline(call):
        return False
    compiling = torch.compiler.is_compiling()
    sizes = ((16, 64), (128, 64)) if compiling else ((call.batch, call.steps),)
    return all(_pipeline_wins(*_without_symbols(call, *size)) for size in sizes)


@tracing.constant
def _pipeline_wins(*fields: Any) -> bool:
    call = Call(*fields)
    found = pipeline_of(call)
    return found is not None and found.faster(call.steps, call.backward)


# ---- what is kept for the backward ----------------------------------------------------------------------------------


def needed_bytes(call: Call, save: str, on_kernels: bool | None = None) -> float:
    """Predicted bytes of a training step at its highest point, without the input, the weights, and the gradients of the
    input and the output. on_kernels: or on torch's own path on a CPU; None: as the backend and the device say, and of
    torch's path on a GPU, which nobody knows, those of the kernels."""
    if on_kernels is None:
        on_kernels = call.backend == "persistent" or call.device.type != "cpu"
    of, batch, steps = call.layers, call.batch or 1, call.steps
    chunk = chunk_steps(call, save, on_kernels)
    if on_kernels:
        return memory.needed(save, of, batch, steps, chunk)
    mkldnn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    onednn = call._of_torch and TORCH[call.cell].onednn and mkldnn and call.dtype in (torch.float32, torch.bfloat16)
    return memory.torch_peak(save, of, batch, steps, chunk, onednn, False) - steps * batch * of.y


def kept_bytes(call: Call, chunk: int) -> float:
    """Bytes per step and row that the kernels keep for the backward: predicted."""
    return memory.kept(call.save, call.layers, chunk)


def chunk_steps(call: Call, save: str, launches: bool) -> int:
    """Steps of a time chunk, a rule that holds for every T and B of a graph. launches: whether it costs launches."""
    if launches and save == "gates" and CELLS[call.cell].staged:
        return call.steps  # in one launch
    sizes = call.hidden_size, call.batch or 1, call.directions, call.dtype.itemsize, call.steps
    return memory.chunk_steps(save, CELLS[call.cell].inputs, *sizes, launches, torch.sym_max, torch.sym_min)


def _chunk(call: Call, on_kernels: bool) -> int:
    if call.transforms in ("mapped", "forward") and not on_kernels:
        return 0  # neither a map nor a tangent goes through what runs the forward again
    if on_kernels and (call.batch == 0 or call.proj_size or call.weight_dtype):
        return 0
    # An exported program may hold no condition on T: there it is one launch.
    if call.save == "gates" and (not on_kernels or torch.compiler.is_exporting()):
        return 0
    chunk = chunk_steps(call, call.save, on_kernels or (call.device.type != "cpu" and not call.loops))
    return chunk if call.save != "gates" or call.steps > chunk else 0


def _save_within_budget(call: Call) -> str:
    """The first mode whose need save_budget holds."""
    assert call.save_budget is not None
    needs = {mode: needed_bytes(call, mode) for mode in MODES}
    for mode, need in needs.items():
        if need <= call.save_budget:
            return mode
    least, smallest = min((need, mode) for mode, need in needs.items())
    if not call.backward:
        return smallest
    raise RuntimeError(
        f"save_budget={call.save_budget} bytes do not hold what {call.steps} steps of {call.batch} rows need at least, "
        f"{math.ceil(least)} bytes with save='{smallest}'; raise the budget, or cut the sequence and carry the state"
    )


# ---- for `persistrnn profile` and `check_cell` ----------------------------------------------------------------------


predict_stack = prediction.predict_stack


def audited(cell: str, hidden: int, batch: int, dtype: str, arch: str) -> tuple[str, str]:
    """Both kernels compiled for an architecture: the audit's table of them, and the device that it plans for.

    Raises:
        ValueError: another architecture
    """
    from persistrnn.kernels.inspect import audit, audit_command

    if arch not in audit.DEVICE_OF_ARCH:
        raise ValueError(f"arch is one of {', '.join(map(repr, audit.DEVICE_OF_ARCH))}, got {arch!r}")
    cases = [audit.Case(cell, backward, dtype, hidden, arch, batch) for backward in (False, True)]
    return audit_command.table([audit_command.attempt(case) for case in cases]), audit.DEVICE_OF_ARCH[arch]


def check_device(name: str) -> None:
    """Raise ValueError for a device that the plan does not know."""
    prediction.device_of(name)
