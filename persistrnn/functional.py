"""Recurrent layers as functions: what goes in and out of the path that is decided on.

Letters: T steps, B batch, I input, H hidden, P projection, D directions, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from persistrnn import stack as stacks
from persistrnn import torch_path, validate
from persistrnn.decide import Call, Decision, decide, expects_backward
from persistrnn.eight_bits import NAMES, EightBits
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Backend, Options, Save, check_flag, check_name, check_options, check_save
from persistrnn.tracing import outside_of_graphs
from persistrnn.validate import Batch, Cuts, Given, Stack

NOTHING = Given()

Input = TypeVar("Input", Tensor, PackedSequence)  # the output has the form of the input


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
    cell_dtype: torch.dtype | None = None,
    save: Save = "gates",
    save_budget: int | None = None,
    heads: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    return_cell_states: bool = False,
) -> Any:
    """A stack of LSTM layers (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000).

        i, f, g, o = x_t @ W_ih^T + b_ih + h_{t-1} @ W_hh^T + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)                  (with projections, Sak et al. 2014: W_hr times that)

    Args:
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] unbatched; or a PackedSequence. T >= 1, B >= 0
        weights: the tensors of torch.nn.LSTM in its order: for each layer, for each direction
            weight_ih [4*H, I or D*H], weight_hh [4*H, H], and with bias=True bias_ih and bias_hh [4*H].
            A fifth (third) one, weight_hr [P, H], makes it an LSTM with projections: then h, here and below, has P
            features, weight_hh is [4*H, P] and weight_ih [4*H, I or D*P]
        hx: (h0, c0), each [L*D, B, H] ([L*D, H] unbatched); None: zeros
        num_layers: L. Layer l reads the output of layer l-1
        bias: whether the weights hold biases
        dropout: probability of a zero between two layers, where training is True
        training: whether dropout acts
        bidirectional: whether D is 2
        batch_first: whether input and output are [B, T, features]; the states never are
        backend: "auto": the persistent kernels on a GPU that can run them and where they are expected to be
            faster (forward and backward together where a backward may come), else torch's own (cuDNN, oneDNN,
            ATen); "persistent": the kernels or an error; "torch": torch's own. What torch's own cannot do (resets,
            every c, and lengths but for those of CPU tensors, which it runs as a PackedSequence) is a loop over torch's
            operations there, step by step.
            `persistrnn.explain` says what "auto" chooses, a module's `last_path` what it chose
        cell_dtype: dtype in which c is given out, and in which the kernels store it for the backward: None (that of
            the computation) or torch.float32; between the steps the kernels' c is float32 in any case
        save: what the call keeps for its backward: "gates", "state" or "checkpoint", or "auto", the first of them that
            is predicted to need at most save_budget bytes (`LSTM` has the details)
        save_budget: bytes, with save="auto"
        heads: n blocks of a block-diagonal W_hh; weight_hh is then [n, 4*H/n, H/n] (`LSTM` has the details)
        lengths: integers [B] on the input's device, each in [0, T]. Past its length a row's output is zero and takes
            no gradient; the final state is that after its last step; the second direction begins there. Nothing is
            sorted and the host does not wait: on a GPU a length out of range is taken as 0 or T, and raised by the
            next call, by backward on the kernels or by `persistrnn.check`
        mask: bool [T, B], laid out as the input: where False, a row skips the step, its state stays as it is and its
            output is zero. lengths for rows that need not be left-aligned; not with lengths or resets
        resets: bool [T, B], laid out as the input: True where a new episode begins, before that step. Its state there
            is the reset state, and no gradient crosses. The second direction is cut at the same places: it begins
            anew at the last step of each episode
        reset_state: (h, c) as hx, which rows begin anew from; None: zeros
        return_cell_states: whether to return every c of the last layer, too

    Returns:
        output [T, B, D*H] of the last layer, in input's form, and (h_n, c_n), each [L*D, B, H]; with
        return_cell_states also c [T, B, D*H], in input's form.

    The persistent kernels take float16, bfloat16 and float32 (float32 products as
    `torch.backends.cudnn.rnn.fp32_precision` says, the input GEMM as for any matrix product of torch);
    torch's path takes what torch.nn.LSTM takes. Under autocast all of it runs in autocast's dtype, and so is what it
    gives, but for torch's own exception: on a CPU a GRU's results, and the c of an LSTM with projections, keep the
    wider of their state's dtype and autocast's. A CPU without oneDNN's LSTM in that dtype (bfloat16 wants avx512) runs
    ATen's loop, which is slower.

    Raises:
        ValueError: an input that is not 2-D or 3-D; a dtype that is not the weights'; a wrong number of
            weights; an unknown backend; a dropout outside [0, 1]; lengths, a mask or resets of a wrong dtype, out of
            range, or together with a PackedSequence
        RuntimeError: any other size or device that does not fit; T == 0; backend="persistent" where the
            kernels cannot run
        TypeError: something that is not a tensor in the place of one
    """
    options = Options(
        num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, training, heads
    )
    check_options(options)
    found = run("lstm", input, weights, hx, options, Given(lengths, mask, resets, reset_state), return_cell_states)
    h_n, c_n = found.states
    return (found.output, (h_n, c_n), found.c) if return_cell_states else (found.output, (h_n, c_n))


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
    save: Save = "gates",
    save_budget: int | None = None,
    heads: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
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
        reset_state: as hx; None: zeros

    Returns:
        output [T, B, D*H] of the last layer, in input's form, and h_n [L*D, B, H].

    All other arguments, dtypes and errors are those of `lstm`.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, bidirectional, backend, None, save, save_budget, training, heads
    )
    check_options(options)
    found = run("gru", input, weights, hx, options, Given(lengths, mask, resets, reset_state))
    return found.output, found.states[0]


def rnn(
    input: Input,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    backend: Backend = "auto",
    save: Save = "gates",
    save_budget: int | None = None,
    heads: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> tuple[Input, Tensor]:
    """A stack of RNN layers (Elman 1990).

        h_t = nonlinearity(x_t @ W_ih^T + b_ih + h_{t-1} @ W_hh^T + b_hh)

    Args:
        weights: the tensors of torch.nn.RNN in its order: for each layer, for each direction
            weight_ih [H, I or D*H], weight_hh [H, H], and with bias=True bias_ih and bias_hh [H]
        nonlinearity: "tanh" or "relu"

    All other arguments, the results, dtypes and errors are those of `gru`.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, bidirectional, backend, None, save, save_budget, training, heads
    )
    check_options(options)
    found = run(rnn_cell(nonlinearity), input, weights, hx, options, Given(lengths, mask, resets, reset_state))
    return found.output, found.states[0]


def recurrent(
    cell: str,
    input: Input,
    weights: Sequence[Tensor],
    hx: Any = None,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    backend: Backend = "auto",
    cell_dtype: torch.dtype | None = None,
    save: Save = "gates",
    save_budget: int | None = None,
    heads: int = 1,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
    return_cell_states: bool = False,
    **extras: Tensor,
) -> Any:
    """A stack of layers of any cell.

    Args:
        cell: a built-in one by its name, or ``step.cell`` of a function decorated with `persistrnn.cell`
        weights: for each layer, for each direction weight_ih, weight_hh, with bias=True bias_ih and bias_hh, and the
            cell's own parameters, as `persistrnn.Recurrent` has them
        hx, reset_state, extras: as of `persistrnn.Recurrent`

    All other arguments, the results and errors are those of `lstm`.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, training, heads
    )
    check_options(options)
    check_name("cell", cell, list(CELLS))
    found = run(
        cell, input, weights, hx, options, Given(lengths, mask, resets, reset_state, extras), return_cell_states
    )
    state = found.states[0] if len(found.states) == 1 else tuple(found.states)
    return (found.output, state, found.c) if return_cell_states else (found.output, state)


def rnn_cell(nonlinearity: object) -> str:
    """The cell of an RNN.

    Raises:
        ValueError: another nonlinearity
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


class Found(NamedTuple):
    """What a call gives: output, the final states, every c or None, and the path that ran it."""

    output: Any
    states: list[Tensor]
    c: Any
    path: str


def run(
    cell: str,
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: object,
    options: Options,
    given: Given = NOTHING,
    return_c: bool = False,
    sizes: tuple[int, int, int] | None = None,
    eight_bits: EightBits | None = None,
) -> Found:
    """Validate, decide and run.

    eight_bits: of a quantised layer, whose W_hh in ``weights`` are placeholders. options: checked before. sizes: a
    module's own input_size, hidden_size and proj_size, of which its weights must be.
    """
    check_flag("return_cell_states", return_c)
    validate.check_states(cell, options.cell_dtype, return_c)
    stack = validate.read_weights(cell, weights, options)
    if sizes is not None:
        validate.check_attributes(stack, *sizes)
    batch = validate.read_input(input, stack, weights, options.batch_first)
    data, packed = batch.data, batch.packed
    check_save(options.save, options.save_budget, stack.proj_size)
    states = validate.read_states(stack, hx, batch)
    cuts = validate.read_cuts(stack, batch, hx is None, given)
    if packed is not None and hx is not None:
        states = _rows(states, packed.sorted_indices)

    backward = expects_backward([data, *weights, *states, *cuts.reset])
    if eight_bits is not None and backward:
        raise RuntimeError(
            f"a layer quantised to {eight_bits.dtype} is for inference, got a call that a gradient may be asked of; "
            "call it under torch.no_grad() or with tensors that require none, or persistrnn.dequantize it"
        )
    sizes_of_call = batch.rows, batch.steps, compute_dtype(data, weights[0]), data.device
    kind = "" if eight_bits is None else NAMES[eight_bits.dtype]
    decision = decide(asked(stack, options, *sizes_of_call, backward, given, return_c, kind))
    if decision.reason is not None and options.backend == "persistent":
        raise RuntimeError(f'backend="persistent" cannot run this call: {decision.reason}')
    if eight_bits is not None and decision.path != "persistent":
        weights = _with_matrices(weights, stack, eight_bits.dequantized(weights[0].dtype))
    c: Any = None
    if decision.path == "torch" and given.lengths is not None:
        assert cuts.active is not None
        output, *states = _by_packing(decision, options, batch, weights, states, given.lengths, cuts.active)
    elif decision.path == "torch":
        batch_sizes = None if packed is None else packed.batch_sizes
        how = options._replace(batch_first=batch.batch_first)
        output, *states = _on_torch(decision, how, data, batch_sizes, states, weights)
    else:
        output, c, states = _on_kernels_or_steps(decision, batch, weights, states, cuts, eight_bits)

    formed: list[Any] = [output] if c is None else [output, c]
    if packed is not None:
        states = _rows(states, packed.unsorted_indices)
        formed = [PackedSequence(t, packed.batch_sizes, *packed[2:]) for t in formed]
    elif batch.unbatched:
        formed, states = [t.squeeze(1) for t in formed], [s.squeeze(1) for s in states]
    output, c = (*formed, None)[:2]
    return Found(output, states, c, decision.path)


def asked(
    stack: Stack,
    options: Options,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    given: Given = NOTHING,
    return_c: bool = False,
    eight_bits: str = "",
) -> Call:
    """The call, as `decide` takes it."""
    return Call(
        *stack[:-1], batch, steps, dtype, device, precision(), backward,
        options.backend, options.save, options.save_budget, options.cell_dtype, options.active_dropout,
        lengths=given.lengths is not None,
        marks=given.mask is not None or given.resets is not None,
        return_c=bool(return_c),  # read, so that dynamo makes a constant of it
        heads=stack.heads,
        weights=eight_bits,
    )  # fmt: skip


def _with_matrices(weights: Sequence[Tensor], stack: Stack, matrices: Sequence[Tensor]) -> list[Tensor]:
    """The weights with others in the places of W_hh."""
    found, each = list(weights), len(weights) // (stack.num_layers * stack.directions)
    found[1::each] = matrices
    return found


def _on_kernels_or_steps(
    decision: Decision,
    batch: Batch,
    weights: Sequence[Tensor],
    states: list[Tensor],
    cuts: Cuts,
    eight_bits: EightBits | None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(output, every c or None, final states)."""
    call, data, packed = decision.call, batch.data, batch.packed
    x = batch.time_major(data)
    if packed is not None:
        x, row_lengths = outside_of_graphs(_pad, data, packed.batch_sizes, batch.steps)
        cuts = cuts._replace(active=_active_rows(packed, data.device))
    dtypes = [call.dtype] * len(states)
    if decision.path == "stepwise":  # which has torch.nn's; the kernels have autocast's, as torch.nn on a GPU
        dtypes = torch_path.output_dtypes(call.cell, data, states, torch_path.autocast_dtype(data))[1:]
    initial, anew = (
        [s.to(d).contiguous() for s, d in zip(given_states, dtypes, strict=False)]
        for given_states in (states, cuts.reset)
    )
    tensors = x.to(call.dtype).contiguous(), [w.to(call.dtype) for w in weights], initial
    extras = [e.to(call.dtype) for e in cuts.extras]
    scales: Sequence[Tensor] = ()
    if eight_bits is not None and decision.path == "persistent":
        x, own, initial = tensors
        each = len(own) // len(eight_bits.bits)
        own[1::each] = eight_bits.bits
        tensors, scales = (x, own, initial), eight_bits.scales
    found = stacks.run(decision, *tensors, cuts._replace(reset=anew, extras=extras), scales)
    outputs = [found.y] if found.c is None else [found.y, found.c]
    if packed is not None:
        outputs = [outside_of_graphs(_pack, t, row_lengths) for t in outputs]
    y, c = (*(batch.time_major(t) for t in outputs), None)[:2]
    assert y is not None
    return y, c, found.finals


def _on_torch(
    decision: Decision,
    options: Options,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """[output, *states], on torch's own kernels."""
    how = options.bias, options.num_layers, options.dropout, options.training, options.bidirectional
    given_to = decision.call.cell, input, batch_sizes, states, weights, *how, options.batch_first
    if decision.chunk:
        return torch_path.stack_in_chunks(*given_to, decision.chunk)
    return torch_path.stack(*given_to)


def _by_packing(
    decision: Decision,
    options: Options,
    batch: Batch,
    weights: Sequence[Tensor],
    states: list[Tensor],
    lengths: Any,
    active: Tensor,
) -> list[Tensor]:
    """The same for rows with lengths."""
    x, some = batch.time_major(batch.data), lengths > 0
    initial = states
    if not some.all():  # a packed row has a step at least: of one without, no NaN may reach the weights' gradient
        x, *initial = (torch.where(some.unsqueeze(-1), t, 0.0) for t in (x, *states))
    packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
    initial = _rows(initial, packed.sorted_indices)
    how = options._replace(batch_first=False)
    data, *finals = _on_torch(decision, how, packed.data, packed.batch_sizes, initial, weights)
    y = pad_packed_sequence(PackedSequence(data, *packed[1:]), total_length=batch.steps)[0]
    y = torch.where(active.unsqueeze(-1), y, 0.0)
    finals = _rows(finals, packed.unsorted_indices)
    finals = [torch.where(some.unsqueeze(-1), new, old.to(new.dtype)) for new, old in zip(finals, states, strict=True)]
    return [batch.time_major(y), *finals]


def _rows(states: list[Tensor], indices: Tensor | None) -> list[Tensor]:
    return states if indices is None else [s.index_select(1, indices) for s in states]


# Compiled, the graph breaks at both, as it does in torch.nn; on fake tensors they would fail.
def _pad(data: Tensor, batch_sizes: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """[T, B, I] and the lengths, on the CPU, of a PackedSequence."""
    padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, steps)
    return padded, lengths


def _pack(padded: Tensor, lengths: Tensor) -> Tensor:
    packed: Tensor = torch._VF._pack_padded_sequence(padded, lengths, False)[0]
    return packed


def _active_rows(packed: PackedSequence, device: torch.device) -> Tensor:
    """Bool [T, B]: a PackedSequence has its first rows longest."""
    rows = torch.arange(int(packed.batch_sizes[0]))
    return (rows < packed.batch_sizes.unsqueeze(1)).to(device, non_blocking=True)


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
