"""What a caller gives, read and checked before anything runs: each error says what was given, what is allowed and how
to mend it, and has the type that torch.nn's has.

Letters: T steps, B batch, I input, H hidden, P projection, G gates (LSTM 4, GRU 3), D directions, L layers.
A cell's facts are in ``kernels.cells``: gates, states, and its parameters per unit beside weights and biases.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from persistrnn import step_marks, torch_path
from persistrnn.decide import TORCH, called
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Options, check_heads, check_sizes, described
from persistrnn.tracing import by_the_host, by_torch_jit

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Stack(NamedTuple):
    """What the flat list of weights says about the stack."""

    cell: str
    num_layers: int
    directions: int
    bias: bool
    input_size: int
    hidden_size: int
    proj_size: int  # 0: no projection
    heads: int = 1  # blocks of a block-diagonal W_hh


class Batch(NamedTuple):
    """An input as it came: data [T, B, I], [B, T, I] with batch_first, or that of the PackedSequence ``packed``."""

    data: Tensor
    packed: PackedSequence | None
    steps: int
    rows: int
    batch_first: bool
    unbatched: bool

    def time_major(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if self.batch_first else tensor


class Cuts(NamedTuple):
    """Where the rows of a batch run and begin anew. active, resets: bool [T, B]; lengths: integers [B], of which active
    is not made yet. reset: the states that a row begins anew from, each [L*D, B, features]; empty: zeros. fresh: the
    initial states are zeros. extras: what the cell takes per step and unit, each [L*D, T, B, H]. keys: of the masks
    that it takes behind them [L*D, E, fields] (`masks`); None: it takes none."""

    active: Tensor | None = None
    resets: Tensor | None = None
    reset: Sequence[Tensor] = ()
    fresh: bool = False
    extras: Sequence[Tensor] = ()
    keys: Tensor | None = None
    lengths: Tensor | None = None

    def without_lengths(self, steps: int) -> "Cuts":
        """With where the rows run in their place. On a GPU those out of [0, T] are clamped there, and raised later
        (`step_marks.check`)."""
        if self.lengths is None:
            return self
        time = torch.arange(steps, device=self.lengths.device).unsqueeze(1)
        return self._replace(active=time < step_marks.within(self.lengths, steps), lengths=None)


def parameter_names(cell: str, layer: int, direction: int, bias: bool, projection: bool) -> list[str]:
    """torch.nn's names of one layer's and direction's parameters, in torch.nn's order, with those of the cell's own
    behind the biases."""
    own = list(CELLS[cell].params)
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias + own + ["weight_hr"] * projection
    return [f"{name}_l{layer}{'_reverse' * direction}" for name in names]


def parameter_shapes(stack: "Stack", layer: int) -> list[tuple[int, ...]]:
    """Their shapes."""
    cell, H, features = CELLS[stack.cell], stack.hidden_size, stack.proj_size or stack.hidden_size
    width = stack.input_size if layer == 0 else stack.directions * features
    n = stack.heads
    weight_hh = (cell.gates * H, features) if n == 1 else (n, cell.gates * H // n, H // n)
    shapes: list[tuple[int, ...]] = [(cell.inputs * H, width), weight_hh]
    shapes += [(cell.inputs * H,), (cell.gates * H,)] * stack.bias + [(n * H,) for n in cell.param_tiles]
    return shapes + [(stack.proj_size, H)] * (stack.proj_size > 0)


def read_weights(cell: str, weights: Sequence[Tensor], options: Options) -> Stack:
    if not isinstance(weights, (list, tuple, Sequence, nn.ParameterList)) or isinstance(weights, str):
        raise TypeError(
            f"weights is a list or tuple of tensors in torch.nn's order, got {described(weights)}; give "
            "list(layer.parameters())"
        )
    num_layers, bias, directions, heads = options.num_layers, options.bias, options.directions, options.heads
    check_reductions(cell, heads)
    groups = num_layers * directions
    plain = len(parameter_names(cell, 0, 0, bias, False))
    projection = len(weights) == groups * (plain + 1)
    if len(weights) != groups * plain and not projection:
        raise ValueError(
            f"{num_layers} layers x {directions} directions with bias={bias} take {groups * plain} weights "
            f"({groups * (plain + 1)} with projections), got {len(weights)}"
        )
    if projection and not (cell in TORCH and TORCH[cell].projects):
        raise ValueError(f"a {called(cell)} has no projections: it takes {groups * plain} weights, got {len(weights)}")
    if projection:
        check_heads(heads, heads, True)
    per_group = plain + projection

    def name_of(k: int) -> str:
        group = k // per_group
        return parameter_names(cell, group // directions, group % directions, bias, projection)[k % per_group]

    for k, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights are tensors, got {described(weight)} as {name_of(k)}")
        if weight.layout is not torch.strided or weight.is_nested:
            _check_dense(name_of(k), weight)
    dtype = weights[0].dtype
    if dtype not in FLOATS:
        raise ValueError(
            f"weights are torch.float16, torch.bfloat16, torch.float32 or torch.float64, got {dtype}; convert them: "
            ".to(torch.float32)"
        )
    matrix = weights[1].dim() == 2 + (heads > 1)
    stack = Stack(
        cell,
        num_layers,
        directions,
        bias,
        input_size=weights[0].size(-1) if weights[0].dim() else 0,
        hidden_size=heads * (weights[1].size(-2) // CELLS[cell].gates) if matrix else 0,
        proj_size=weights[1].size(1) if matrix and projection else 0,
        heads=heads,
    )
    lowest, upper = parameter_shapes(stack, 0) * directions, parameter_shapes(stack, 1) * directions
    expected = lowest + upper * (num_layers - 1)
    for k, weight in enumerate(weights):
        if len(expected) != len(weights) or weight.shape != expected[k] or not stack.hidden_size:
            _refuse_shapes(stack, weights, [name_of(k) for k in range(len(weights))])
        if weight.dtype != dtype:
            raise ValueError(
                f"weights must share one dtype, got {dtype} and of {name_of(k)} {weight.dtype}; "
                f"convert it: .to({dtype})"
            )
    if projection and not by_torch_jit():  # where sizes are tensors
        check_sizes(stack.input_size or 1, stack.hidden_size, stack.proj_size or -1)
    return stack


def _refuse_shapes(stack: Stack, weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise RuntimeError for the first weight that does not fit what most of them say of H and P."""
    cell, per_group = CELLS[stack.cell], len(weights) // (stack.num_layers * stack.directions)
    plain = len(parameter_names(stack.cell, 0, 0, stack.bias, False))
    rows = [cell.inputs, cell.gates] * (1 + stack.bias) + [*cell.param_tiles]  # of each weight, per unit
    heads, hidden, features = stack.heads, [], []
    for k, weight in enumerate(weights):
        slot = k % per_group
        if weight.dim() == (1 if 2 <= slot < plain else 2 + (slot == 1 and heads > 1)):
            each, n = (-2, heads) if slot == 1 else (0, 1)
            hidden.append(weight.size(1) if slot == plain else weight.size(each) // rows[slot] * n)
            features += [weight.size(-1) * n] if slot == 1 else [weight.size(0)] if slot == plain else []
    projection = per_group > plain
    H = Counter(hidden if projection else hidden + features).most_common(1)[0][0] if hidden else 0
    # A projection is smaller than H: one that is not says nothing.
    possible = [size for size in features if 0 < size < H]
    P = Counter(possible).most_common(1)[0][0] if projection and possible else 0
    if H == 0 or (projection and P == 0):
        sizes = f"{cell.gates}*H, {'P) and weight_hr_l0 (P, H) with H > P > 0' if projection else 'H) with H > 0'}"
        if heads > 1:
            sizes = f"{heads}, {cell.gates}*H/{heads}, H/{heads}) with H > 0"
        got = f"{tuple(weights[1].shape)}" + (f" and {tuple(weights[plain].shape)}" if projection else "")
        raise RuntimeError(f"weight_hh_l0 must have shape ({sizes}, got {got}")
    check_heads(heads, H, False)
    stack = stack._replace(hidden_size=H, proj_size=P)
    for k, (weight, name) in enumerate(zip(weights, names, strict=True)):
        expected = parameter_shapes(stack, k // (per_group * stack.directions))[k % per_group]
        if weight.shape != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(weight.shape)}")


def check_reductions(cell: str, heads: int) -> None:
    """Raise ValueError for heads of a cell that averages over all units."""
    if heads > 1 and CELLS[cell].means:
        raise ValueError(
            f"a {called(cell)} normalises over all units, which heads keep apart, got heads={heads}; use heads=1"
        )


def check_states(cell: str, cell_dtype: object, return_c: bool = False) -> None:
    """Raise ValueError for what asks for more states than the cell has."""
    if CELLS[cell].states == 1 and (cell_dtype is not None or return_c):
        what = "return_cell_states" if return_c else "cell_dtype"
        raise ValueError(f"{what} is for cells with a state beside h, and a {called(cell)} has none; leave it out")


def check_attributes(stack: Stack, input_size: object, hidden_size: object, proj_size: object) -> None:
    """Raise RuntimeError where a module's sizes, changed since, are not those of its weights."""
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("proj_size", proj_size)):
        if value != (found := getattr(stack, name)):
            raise RuntimeError(
                f"{name} of the layer is {value!r}, and its weights are those of {name}={found}; set it back, or make "
                "a layer of the other size"
            )


def read_input(input: object, stack: Stack, weights: Sequence[Tensor], batch_first: bool) -> Batch:
    packed = input if isinstance(input, PackedSequence) else None
    data = _dense("input", input if packed is None else packed.data, "a tensor or a PackedSequence")
    if packed is not None:
        by_the_host(_check_packed, packed)
    if data.dim() not in (2, 3):
        raise ValueError(f"{called(stack.cell)}: Expected input to be 2D or 3D, got {data.dim()}D instead")
    dtype = weights[0].dtype
    if data.dtype != dtype and not _autocast_together(data, dtype):
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
    if packed is not None:
        rows = by_the_host(lambda: int(packed.batch_sizes[0]))
        return Batch(data, packed, packed.batch_sizes.numel(), rows, False, False)
    shape = tuple(data.shape)
    unbatched = data.dim() == 2
    if unbatched:
        data, batch_first = data.unsqueeze(1), False
    steps, rows = (data.size(1), data.size(0)) if batch_first else (data.size(0), data.size(1))
    if steps == 0:
        raise RuntimeError(f"Expected sequence length to be larger than 0 in RNN, got input of shape {shape}")
    return Batch(data, None, steps, rows, batch_first, unbatched)


def _autocast_together(data: Tensor, other: torch.dtype) -> bool:
    """Whether autocast makes one dtype of the data's and another; it leaves float64 alone."""
    both = (data.dtype, other)
    return all(d in FLOATS and d != torch.float64 for d in both) and torch_path.autocast_dtype(data) is not None


def _check_packed(packed: PackedSequence) -> None:
    """Raise RuntimeError for what `pack_padded_sequence` does not make."""
    data, sizes = packed.data, packed.batch_sizes
    remedy = "make the sequence with pack_padded_sequence or pack_sequence"
    if data.dim() != 2:
        raise RuntimeError(f"the data of a PackedSequence must be 2-D, got {data.dim()}-D; {remedy}")
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or sizes.dim() != 1 or sizes.device.type != "cpu":
        raise RuntimeError(
            "batch_sizes of a PackedSequence is a 1-D int64 tensor on the CPU, got "
            f"{_tensor_described(sizes)}; {remedy}"
        )
    if sizes.numel() == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN, got a PackedSequence without a step; leave the call "
            "out for it"
        )
    if torch.compiler.is_compiling():
        return  # a graph has no values to look at
    rows = int(sizes[0])
    if int(sizes[-1]) < 1 or bool((sizes.diff() > 0).any()) or int(sizes.sum()) != data.size(0):
        raise RuntimeError(
            "batch_sizes of a PackedSequence are at least 1, never grow and sum up to the rows of its data, "
            f"{data.size(0)}, got {sizes.tolist()}; {remedy}"
        )
    for name in ("sorted_indices", "unsorted_indices"):
        indices = getattr(packed, name)
        of_rows = isinstance(indices, Tensor) and indices.dim() == 1 and indices.numel() == rows
        if indices is not None and not (of_rows and indices.dtype in INTEGERS):
            raise RuntimeError(
                f"{name} of a PackedSequence is None or has an integer for each of its {rows} rows, got "
                f"{_tensor_described(indices)}; {remedy}"
            )


def _tensor_described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of size {list(value.shape)} on {value.device}"


def state_sizes(stack: Stack) -> list[int]:
    """The features of each state."""
    return [stack.proj_size or stack.hidden_size] + [stack.hidden_size] * (CELLS[stack.cell].states - 1)


def read_states(stack: Stack, hx: object, batch: Batch, name: str = "hidden") -> list[Tensor]:
    """[h0] or [h0, c0], each [L*D, B, H], from what the caller gave as hx; zeros for None."""
    data, several = batch.data, CELLS[stack.cell].states > 1
    rows, sizes = stack.num_layers * stack.directions, state_sizes(stack)
    if hx is None:
        return [data.new_zeros(rows, batch.rows, size) for size in sizes]
    given = "hx" if name == "hidden" else name
    states = state_tensors(stack.cell, hx, given)
    dims = 2 if batch.unbatched else 3
    if any(s.dim() != dims for s in states):
        kind = "unbatched 2-D" if batch.unbatched else "batched 3-D"
        every = "both" if len(sizes) == 2 else "all"
        names = f"{every} tensors of {given}" if several else given
        got = ", ".join(f"{s.dim()}-D" for s in states)
        raise RuntimeError(f"For {kind} input, {names} should also be {dims}-D but got {got}")
    if batch.unbatched:
        states = [s.unsqueeze(1) for s in states]
    for k, (state, size) in enumerate(zip(states, sizes, strict=True)):
        which = f"{name}[{k}]" if several else name
        if state.shape != (rows, batch.rows, size):
            raise RuntimeError(
                f"Expected {which} size {(rows, batch.rows, size)}, got {list(state.shape)} "
                "(num_layers * directions, batch, features; batch_first does not apply to states)"
            )
        if state.device != data.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {data.device} and {name} tensor at {state.device}"
            )
        if state.dtype != data.dtype and not _autocast_together(data, state.dtype):
            raise RuntimeError(
                f"{which} dtype ({state.dtype}) does not match input dtype ({data.dtype}). "
                f"Convert it: .to({data.dtype})"
            )
    return states


def state_tensors(cell: str, hx: object, name: str) -> list[Tensor]:
    """The cell's states, h first, dense, of what was given as hx, or under another name."""
    count, initial = CELLS[cell].states, "0" if name == "hx" else ""
    several = count > 1
    tuples = {1: f"one tensor h{initial}", 2: f"a pair of tensors (h{initial}, c{initial})"}
    form = tuples.get(count, f"a tuple of {count} tensors, h{initial} first")
    if several and isinstance(hx, Tensor):
        raise RuntimeError(
            f"{called(cell)}: {name} is {form}, got one tensor of shape {tuple(hx.shape)}; give "
            f"{'both' if count == 2 else 'all'}, or None for zeros"
        )
    states = list(hx) if several and isinstance(hx, (tuple, list)) else [hx]
    tensors = [s for s in states if isinstance(s, Tensor)]
    if len(tensors) < len(states):
        raise TypeError(f"{called(cell)}: {name} is {form}, got {type(hx).__name__}")
    if len(tensors) != count:
        raise RuntimeError(f"{called(cell)}: {name} is {form}, got {len(tensors)} of them")
    for state in tensors:
        _check_dense(name, state)
    return tensors


class Given(NamedTuple):
    """The arguments that cut a batch, as they came."""

    lengths: object = None
    mask: object = None
    resets: object = None
    reset_state: object = None
    extras: Mapping[str, object] = {}


def read_cuts(stack: Stack, batch: Batch, fresh: bool, given: Given) -> Cuts:
    """fresh: no initial states were given."""
    lengths, mask, resets, reset_state, extras = given
    if mask is not None and (lengths is not None or resets is not None):
        other = "lengths" if lengths is not None else "resets"
        raise ValueError(f"mask says by itself which steps a row has, got {other} too; give one of them")
    if reset_state is not None and mask is not None:
        raise ValueError("a mask has no resets, got reset_state too; give hx for the state that the rows begin from")
    if reset_state is not None and resets is None:
        raise ValueError(
            "reset_state is the state after a reset, got it without resets; give resets too, or hx instead"
        )
    return Cuts(
        _read_bools("mask", mask, batch),
        _read_bools("resets", resets, batch),
        () if reset_state is None else read_states(stack, reset_state, batch, "reset_state"),
        fresh,
        _read_extras(stack, batch, extras),
        lengths=None if lengths is None else _read_lengths(lengths, batch),
    )


def _read_extras(stack: Stack, batch: Batch, given: Mapping[str, object]) -> list[Tensor]:
    """What the cell takes per step and unit, each [L*D, T, B, H] in the input's dtype."""
    names, data = CELLS[stack.cell].extras, batch.data
    if unknown := [name for name in given if name not in names]:
        takes = f"it takes {', '.join(names)}" if names else "it takes none of the kind"
        raise TypeError(f"{called(stack.cell)}: got an unexpected keyword argument {unknown[0]!r}; {takes}")
    if missing := [name for name in names if given.get(name) is None]:
        raise TypeError(f"{called(stack.cell)}: {missing[0]}=, a tensor [L*D, T, B, H], is missing; give it")
    if names:
        _check_padded(names[0], batch)
    size = (stack.num_layers * stack.directions, batch.steps, batch.rows, stack.hidden_size)
    found = []
    for name in names:
        value = _dense(name, given[name], "a tensor [L*D, T, B, H]")
        if batch.unbatched and value.dim() == 3:
            value = value.unsqueeze(2)
        if value.shape != size:
            raise RuntimeError(
                f"Expected {name} size {size}, got {list(value.shape)} (num_layers * directions, steps, batch, "
                "hidden_size; batch_first does not apply)"
            )
        _same_device(name, value, data)
        found.append(value.detach())
    return found


def _read_lengths(lengths: object, batch: Batch) -> Tensor:
    if batch.packed is not None:
        raise ValueError("a PackedSequence has lengths of its own; leave lengths out, or give the padded tensor")
    remedy = "; use torch.tensor(lengths, device=input.device)"
    lengths = _dense("lengths", lengths, "an integer tensor [B] on the input's device", remedy)
    if batch.unbatched:
        raise ValueError("lengths goes with a batch, got an unbatched input; cut it: input[:length]")
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths is an integer tensor, got {lengths.dtype}; convert it: lengths.long()")
    if lengths.shape != (batch.rows,):
        raise RuntimeError(
            f"Expected lengths size ({batch.rows},), one for each row of the batch, got {list(lengths.shape)}"
        )
    _same_device("lengths", lengths, batch.data)
    return lengths


def _read_bools(name: str, value: object, batch: Batch) -> Tensor | None:
    """Resets or a mask as bool [T, B]."""
    if value is None:
        return None
    _check_padded(name, batch)
    value = _dense(name, value, "a bool tensor [T, B] on the input's device")
    if value.dtype != torch.bool:
        raise ValueError(f"{name} is a bool tensor, got {value.dtype}; convert it: {name}.bool()")
    shapes = {"[T]": (batch.steps,), "[B, T]": (batch.rows, batch.steps), "[T, B]": (batch.steps, batch.rows)}
    letters = "[T]" if batch.unbatched else "[B, T]" if batch.batch_first else "[T, B]"
    if value.shape != shapes[letters]:
        raise RuntimeError(f"Expected {name} size {shapes[letters]}, {letters} as the input, got {list(value.shape)}")
    _same_device(name, value, batch.data)
    return value.unsqueeze(1) if batch.unbatched else batch.time_major(value)


def _check_padded(name: str, batch: Batch) -> None:
    if batch.packed is not None:
        raise ValueError(f"{name} goes with a padded tensor, got a PackedSequence; give the padded tensor and lengths")


def _dense(name: str, value: object, form: str, remedy: str = "") -> Tensor:
    """The value, which is a dense tensor; form: in words what it is to be."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {form}, got {type(value).__name__}{remedy}")
    _check_dense(name, value)
    return value


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise RuntimeError(
            f"{name} is a dense tensor, got a nested one; pad it, torch.nested.to_padded_tensor({name}, 0.0), and give "
            "the rows' lengths as lengths=..."
        )
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"{name} is a dense tensor, got layout {tensor.layout}; convert it: .to_dense()")


def read_rows(rows: object, states: Sequence[Tensor]) -> Tensor:
    """The rows of a stream's states, each [L, B, features], to begin anew: bool [B]."""
    rows = _dense("rows", rows, "a bool tensor [B]", "; use torch.tensor(rows)")
    batch = states[0].shape[1:-1] if states else rows.shape[:1]
    if rows.dtype != torch.bool or rows.shape != batch:
        raise ValueError(
            f"rows is a bool tensor of size {tuple(batch)}, one for each row of the batch, got {rows.dtype} of "
            f"size {tuple(rows.shape)}; reset() without rows resets all"
        )
    if states and rows.device != states[0].device:
        raise RuntimeError(f"the state is on {states[0].device} and rows on {rows.device}; move it: rows.to(device)")
    return rows


def _same_device(name: str, tensor: Tensor, data: Tensor) -> None:
    if tensor.device != data.device:
        raise RuntimeError(
            f"Input and {name} are not at the same device, found input at {data.device} and {name} at {tensor.device}; "
            f"move it: {name}.to(input.device)"
        )
