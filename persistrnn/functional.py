"""LSTM and GRU as functions: layers, directions, input GEMMs, dropout and the choice of a path.

Letters: T steps, B batch, I input, H hidden, G gates (LSTM 4, GRU 3), D directions, L layers. What reaches
`autograd.recurrent` is validated, time-major, contiguous and of one dtype.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from persistrnn import autograd, ops, reference, torch_path

Backend = Literal["auto", "persistent", "torch"]
BACKENDS = get_args(Backend)

Input = TypeVar("Input", Tensor, PackedSequence)  # the output has the form of the input

GATES = {"lstm": 4, "gru": 3}


def lstm(
    input: Input,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    backend: Backend = "auto",
) -> tuple[Input, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000).

        i, f, g, o = x_t @ W_ih^T + b_ih + h_{t-1} @ W_hh^T + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)

    Args:
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] unbatched; or a PackedSequence. T >= 1, B >= 0
        weights: the tensors of torch.nn.LSTM in its order: for each layer, for each direction
            weight_ih [4*H, I or D*H], weight_hh [4*H, H], and with bias=True bias_ih and bias_hh [4*H].
            A fifth (third) one, weight_hr [P, H], makes it an LSTM with projections (torch's path only)
        hx: (h0, c0), each [L*D, B, H] ([L*D, H] unbatched); None: zeros
        num_layers: L. Layer l reads the output of layer l-1
        bias: whether the weights hold biases
        dropout: probability of a zero between two layers, where training is True
        training: whether dropout acts
        bidirectional: whether D is 2
        batch_first: whether input and output are [B, T, features]; the states never are
        backend: "auto": the persistent kernels on a GPU that can run them and where they are expected to be
            faster (with gradients enabled: forward and backward together), else torch's own (cuDNN, oneDNN,
            ATen); "persistent": the kernels or an error; "torch": torch's own.
            `persistrnn.explain` says what "auto" chooses, a module's `last_path` what it chose

    Returns:
        output [T, B, D*H] of the last layer, in input's form, and (h_n, c_n), each [L*D, B, H].

    The persistent kernels take float16, bfloat16 and float32 (float32 products as
    `torch.backends.cudnn.rnn.fp32_precision` says, the input GEMM as for any matrix product of torch);
    torch's path takes what torch.nn.LSTM takes. Under autocast all of it runs in autocast's dtype.

    Raises:
        ValueError: an input that is not 2-D or 3-D; a dtype that is not the weights'; a wrong number of
            weights; an unknown backend; a dropout outside [0, 1]
        RuntimeError: any other size or device that does not fit; T == 0; backend="persistent" where the
            kernels cannot run
        TypeError: something that is not a tensor in the place of one
    """
    output, (h_n, c_n), _ = run(
        "lstm", input, weights, hx, num_layers, bias, dropout, training, bidirectional, batch_first, backend
    )
    return output, (h_n, c_n)


def gru(
    input: Input,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    backend: Backend = "auto",
) -> tuple[Input, Tensor]:
    """A stack of GRU layers (Cho et al. 2014, in cuDNN's and torch's form: reset after the matrix product).

        xr, xz, xn = x_t @ W_ih^T + b_ih
        rr, rz, rn = h_{t-1} @ W_hh^T + b_hh
        r, z = sigmoid(xr + rr), sigmoid(xz + rz)
        n = tanh(xn + r * rn)
        h_t = (1 - z) * n + z * h_{t-1}

    Args:
        weights: the tensors of torch.nn.GRU in its order: for each layer, for each direction
            weight_ih [3*H, I or D*H], weight_hh [3*H, H], and with bias=True bias_ih and bias_hh [3*H]
        hx: h0 [L*D, B, H] ([L*D, H] unbatched); None: zeros

    Returns:
        output [T, B, D*H] of the last layer, in input's form, and h_n [L*D, B, H].

    All other arguments, dtypes and errors are those of `lstm`.
    """
    output, (h_n,), _ = run(
        "gru", input, weights, hx, num_layers, bias, dropout, training, bidirectional, batch_first, backend
    )
    return output, h_n


def run(
    cell: str,
    input: Input,
    weights: Sequence[Tensor],
    hx: object,
    num_layers: int,
    bias: bool,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    backend: str,
) -> tuple[Input, list[Tensor], str]:
    """Validate, choose a path and run it: (output, [h_n] or [h_n, c_n], "persistent" or "torch")."""
    check_backend(backend)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is a probability in [0, 1], got {dropout}")
    stack = _read_weights(cell, weights, num_layers, bias, bidirectional)

    packed = isinstance(input, PackedSequence)
    data = input.data if isinstance(input, PackedSequence) else input
    batch_sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
    _check_input(stack, data, weights, packed)
    unbatched = data.dim() == 2 and not packed
    if unbatched:
        data, batch_first = data.unsqueeze(1), False
    if batch_sizes is not None:
        batch = int(batch_sizes[0])
    else:
        steps, batch = (data.size(1), data.size(0)) if batch_first else (data.size(0), data.size(1))
        if steps == 0:
            raise RuntimeError(
                f"Expected sequence length to be larger than 0 in RNN, got input of shape {tuple(data.shape)}"
            )
    states = _read_states(stack, hx, data, batch, unbatched)
    if isinstance(input, PackedSequence) and input.sorted_indices is not None and hx is not None:
        states = [s.index_select(1, input.sorted_indices) for s in states]

    dtype = compute_dtype(data, weights[0])
    # an empty batch takes the path of a batch of one
    sizes = (stack.hidden_size, stack.proj_size, batch or 1, stack.directions)
    together = num_layers if may_wave(num_layers, bidirectional, dropout if training else 0.0, dtype) else 1
    time = data.size(1 if batch_first else 0)
    reason = obstacle(backend, cell, *sizes, dtype, data.device, packed, together, time)
    if reason is None:
        path = "persistent"
        output, states = _persistent(stack, data, weights, states, dtype, dropout, training, batch_first)
    elif backend == "persistent":
        raise RuntimeError(f'backend="persistent" cannot run this call: {reason}')
    else:
        path = "torch"
        options = (bias, num_layers, dropout, training, bidirectional, batch_first)
        output, *states = torch_path.stack(cell, data, batch_sizes, states, weights, *options)

    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            states = [s.index_select(1, input.unsorted_indices) for s in states]
        indices = (input.sorted_indices, input.unsorted_indices)
        return PackedSequence(output, input.batch_sizes, *indices), states, path
    if unbatched:
        return output.squeeze(1), [s.squeeze(1) for s in states], path
    return output, states, path


def obstacle(
    backend: str,
    cell: str,
    hidden_size: int,
    proj_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
    layers: int = 1,
    steps: int = 1,
) -> str | None:
    """What keeps a call from the persistent kernels, as one sentence; None: they run it.

    All layers of a stack have the same H, so that the answer holds for the whole call: no stack is run in
    part by one path and in part by the other. layers, steps: of a stack that may run in one launch, else 1.
    """
    if backend == "torch":
        return 'backend="torch" asks for torch\'s own kernels.'
    if proj_size > 0:
        return (
            f"the kernels have no projection, got proj_size={proj_size}; "
            'use proj_size=0, or backend="auto" or "torch" for torch\'s own kernels.'
        )
    if packed:
        return (
            "the kernels take padded tensors, got a PackedSequence; use "
            'torch.nn.utils.rnn.pad_packed_sequence, or backend="auto" or "torch" for torch\'s own kernels.'
        )
    if backend == "auto" and device.type == "cpu":
        return 'backend="auto" runs CPU tensors on torch\'s own kernels; move the tensors to a GPU.'
    reason = ops.unsupported(cell, hidden_size, batch, directions, dtype, device, precision())
    if reason is None and backend == "auto":
        sizes = hidden_size, batch, directions
        return ops.slower(cell, *sizes, dtype, device, precision(), torch.is_grad_enabled(), layers, steps)
    return reason


def precision() -> str:
    """How float32 is multiplied in the recurrence, "tf32" or "ieee": torch's own setting for RNNs.

    `torch.backends.cudnn.rnn.fp32_precision` inherits from `torch.backends.cudnn` and `torch.backends`; its
    default is "tf32". As in cuDNN, anything else, "none" included, means "ieee".
    """
    setting: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


def compute_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the recurrence: the input's, or autocast's, which leaves float64 and integers alone."""
    autocast = torch_path.autocast_dtype(input)
    if autocast is None or torch.float64 in (input.dtype, weight.dtype) or not input.is_floating_point():
        return input.dtype
    return autocast


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def parameter_names(layer: int, direction: int, bias: bool, projection: bool) -> list[str]:
    """torch.nn's names of one layer's and direction's parameters, in torch.nn's order."""
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias + ["weight_hr"] * projection
    return [f"{name}_l{layer}{'_reverse' * direction}" for name in names]


class _Stack(NamedTuple):
    """What the flat list of weights says about the stack."""

    cell: str
    num_layers: int
    directions: int
    bias: bool
    input_size: int
    hidden_size: int
    proj_size: int  # 0: no projection


def _read_weights(cell: str, weights: Sequence[Tensor], num_layers: int, bias: bool, bidirectional: bool) -> _Stack:
    if num_layers <= 0:
        raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
    directions = 2 if bidirectional else 1
    groups = num_layers * directions
    plain = 4 if bias else 2
    projection = len(weights) == groups * (plain + 1)
    if len(weights) != groups * plain and not projection:
        raise ValueError(
            f"{num_layers} layers x {directions} directions with bias={bias} take {groups * plain} weights "
            f"({groups * (plain + 1)} with projections), got {len(weights)}"
        )
    if projection and cell == "gru":
        raise ValueError(f"a GRU has no projections: it takes {groups * plain} weights, got {len(weights)}")
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights are tensors, got {type(weight).__name__}")
    per_group = plain + projection
    hidden = weights[1].size(0) // GATES[cell] if weights[1].dim() == 2 else 0
    if hidden == 0:
        raise RuntimeError(
            f"weight_hh_l0 must have shape ({GATES[cell]}*H, H) with H > 0, got {tuple(weights[1].shape)}"
        )
    stack = _Stack(
        cell,
        num_layers,
        directions,
        bias,
        input_size=weights[0].size(-1) if weights[0].dim() else 0,
        hidden_size=hidden,
        proj_size=weights[plain].size(0) if projection else 0,
    )
    for k, weight in enumerate(weights):
        layer, slot = k // (per_group * directions), k % per_group
        if weight.shape != (expected := _weight_shape(stack, layer, slot)):
            name = parameter_names(layer, k // per_group % directions, bias, projection)[slot]
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(weight.shape)}")
        if weight.dtype != weights[0].dtype:
            raise ValueError(f"weights must share one dtype, got {weights[0].dtype} and {weight.dtype}")
    return stack


def _weight_shape(stack: _Stack, layer: int, slot: int) -> tuple[int, ...]:
    rows = GATES[stack.cell] * stack.hidden_size
    features = stack.proj_size or stack.hidden_size
    if slot == 0:
        return rows, stack.input_size if layer == 0 else stack.directions * features
    if slot == 1:
        return rows, features
    if slot < 4 and stack.bias:
        return (rows,)
    return stack.proj_size, stack.hidden_size


def _check_input(stack: _Stack, data: Tensor, weights: Sequence[Tensor], packed: bool) -> None:
    if not isinstance(data, Tensor):
        raise TypeError(f"input is a tensor or a PackedSequence, got {type(data).__name__}")
    if packed and data.dim() != 2:
        raise RuntimeError(f"the data of a PackedSequence must be 2-D, got {data.dim()}-D")
    if data.dim() not in (2, 3):
        raise ValueError(f"{stack.cell.upper()}: Expected input to be 2D or 3D, got {data.dim()}D instead")
    dtype = weights[0].dtype
    if data.dtype != dtype and torch_path.autocast_dtype(data) is None:
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({data.dtype})"
        )
    if data.size(-1) != stack.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {stack.input_size}, got {data.size(-1)}"
        )
    for weight in weights:
        if weight.device != data.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {data.device} and parameter tensor at {weight.device}"
            )


def _read_states(stack: _Stack, hx: object, data: Tensor, batch: int, unbatched: bool) -> list[Tensor]:
    """[h0] or [h0, c0], each [L*D, B, H], from what the caller gave as hx; zeros for None."""
    rows = stack.num_layers * stack.directions
    sizes = [stack.proj_size or stack.hidden_size, stack.hidden_size][: 2 if stack.cell == "lstm" else 1]
    if hx is None:
        return [data.new_zeros(rows, batch, size) for size in sizes]
    states = _state_tensors(stack.cell, hx)
    dims = 2 if unbatched else 3
    if any(s.dim() != dims for s in states):
        kind = "unbatched 2-D" if unbatched else "batched 3-D"
        names = "hx and cx" if stack.cell == "lstm" else "hx"
        got = ", ".join(f"{s.dim()}-D" for s in states)
        raise RuntimeError(f"For {kind} input, {names} should also be {dims}-D but got {got}")
    if unbatched:
        states = [s.unsqueeze(1) for s in states]
    for k, (state, size) in enumerate(zip(states, sizes, strict=True)):
        name = f"hidden[{k}]" if stack.cell == "lstm" else "hidden"
        if state.shape != (rows, batch, size):
            raise RuntimeError(
                f"Expected {name} size {(rows, batch, size)}, got {list(state.shape)} "
                "(num_layers * directions, batch, features; batch_first does not apply to states)"
            )
        if state.device != data.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {data.device} and hidden tensor at {state.device}"
            )
        if state.dtype != data.dtype and torch_path.autocast_dtype(data) is None:
            raise RuntimeError(
                f"{name} dtype ({state.dtype}) does not match input dtype ({data.dtype}). Convert it: .to({data.dtype})"
            )
    return states


def _state_tensors(cell: str, hx: object) -> list[Tensor]:
    if cell == "gru":
        if not isinstance(hx, Tensor):
            raise TypeError(f"GRU: hx is one tensor h0, got {type(hx).__name__}")
        return [hx]
    if isinstance(hx, Tensor):
        raise RuntimeError(
            f"LSTM: hx is a pair of tensors (h0, c0), got one tensor of shape {tuple(hx.shape)}; "
            "give both, or None for zeros"
        )
    if not isinstance(hx, (tuple, list)) or not all(isinstance(s, Tensor) for s in hx):
        raise TypeError(f"LSTM: hx is a pair of tensors (h0, c0), got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"LSTM: hx is a pair of tensors (h0, c0), got {len(hx)} of them")
    return list(hx)


def _persistent(
    stack: _Stack,
    data: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    dtype: torch.dtype,
    dropout: float,
    training: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The stack on the persistent kernels: one GEMM over all T*B rows and one recurrence per layer, or, where all
    layers fit the device together and that is predicted to win, one of each for the whole stack."""
    y = (data.transpose(0, 1) if batch_first else data).to(dtype).contiguous()
    states = [s.to(dtype).contiguous() for s in states]
    weights = [w.to(dtype) for w in weights]
    between = dropout if training else 0.0
    if may_wave(stack.num_layers, stack.directions == 2, between, dtype) and _waves(stack, y, [*weights, *states]):
        y, finals = _wave(stack, y, weights, states)
    else:
        y, finals = _layers(stack, y, weights, states, between)
    return y.transpose(0, 1) if batch_first else y, finals


def may_wave(num_layers: int, bidirectional: bool, dropout: float, dtype: torch.dtype) -> bool:
    """Whether a stack may run in one launch: nothing happens between its layers, and the products of the upper layers'
    inputs, which are then inside, have the precision that they have outside."""
    single = num_layers > 1 and not bidirectional and dropout == 0
    return single and (dtype != torch.float32 or precision() == _matmul_precision())


@torch.compiler.assume_constant_result  # dynamo cannot read the setting
def _matmul_precision() -> str:
    """How float32 is multiplied outside of RNNs, "tf32" or "ieee"."""
    setting: str = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if setting == "tf32" else "ieee"


def _waves(stack: _Stack, y: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether it does: where that is predicted to win. The interpreter's programs cannot wait for each other."""
    if y.size(1) == 0 or y.device.type == "cpu":
        return False
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (y, *others))
    sizes = stack.hidden_size, stack.num_layers, y.size(1), y.size(0)
    return ops.waves(stack.cell, *sizes, y.dtype, y.device, precision(), grad)


def _wave(stack: _Stack, y: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """[T, B, H] of the highest layer and the final states, each [L, B, H]."""
    step = 4 if stack.bias else 2
    weight_hh = torch.stack(list(weights[1::step]))
    weight_ih = torch.stack(list(weights[step::step]))
    bias_hh = torch.stack(list(weights[3::step])) if stack.bias else weight_hh.new_zeros(weight_hh.shape[:2])
    bias_ih = torch.stack(list(weights[step + 2 :: step])) if stack.bias else bias_hh.new_zeros(weight_ih.shape[:2])
    x_gates = F.linear(y, weights[0], weights[2] if stack.bias else None)
    c0 = states[1] if stack.cell == "lstm" else None
    tensors = (x_gates, weight_hh, bias_hh, weight_ih, bias_ih, states[0], c0)
    y, h_n, c_n = autograd.wave(stack.cell, *tensors, precision())
    return y, [h_n] if c_n is None else [h_n, c_n]


def _layers(
    stack: _Stack, y: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], dropout: float
) -> tuple[Tensor, list[Tensor]]:
    """[T, B, D*H] of the highest layer and the final states, each [L*D, B, H]."""
    directions, per_direction = stack.directions, 4 if stack.bias else 2
    finals = []
    for layer in range(stack.num_layers):
        if layer > 0 and dropout > 0:
            y = F.dropout(y, dropout)
        rows = slice(layer * directions, (layer + 1) * directions)
        first, last = rows.start * per_direction, rows.stop * per_direction
        weight_ih, weight_hh, *biases = (
            _side_by_side(weights[first + k : last : per_direction]) for k in range(per_direction)
        )
        bias_ih = biases[0].flatten() if biases else None
        bias_hh = biases[1] if biases else weight_hh.new_zeros(weight_hh.shape[:2])
        # both directions read the same rows, so that one GEMM with [D*G*H, I] makes the gates of both
        x_gates = F.linear(y, weight_ih.flatten(0, 1), bias_ih).unflatten(-1, (directions, -1))
        h0, c0 = states[0][rows], states[1][rows] if stack.cell == "lstm" else None
        y, h_n, c_n = _recurrent(stack.cell, x_gates, weight_hh, bias_hh, h0, c0)
        finals.append([h_n] if c_n is None else [h_n, c_n])
    return y, [torch.cat(s) for s in zip(*finals, strict=True)]


def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """The directions' weights as one contiguous tensor [D, ...], without a copy where D is 1."""
    return weights[0].contiguous().unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))


def _recurrent(
    cell: str, x_gates: Tensor, weight_hh: Tensor, bias_hh: Tensor, h0: Tensor, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if x_gates.size(1) > 0:
        return autograd.recurrent(cell, x_gates, weight_hh, bias_hh, h0, c0, precision())
    # Without a row there is nothing to launch: one step of the reference gives every shape and, as torch.nn
    # does, a gradient of zeros to every weight.
    y, h_n, c_n = reference.recurrent(cell, x_gates[:1], weight_hh, bias_hh, h0, c0)
    return y.expand(x_gates.size(0), -1, -1), h_n, c_n
