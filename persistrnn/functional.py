"""Recurrent layers as functions.

A `persistrnn.Recipe` is for layers, which hold what it makes: to a function give dropped weights and a learned hx, and
for zoneout or dropout of h a cell of one's own whose masks are extras.

Letters: T steps, B batch, I input, H hidden, P projection, D directions, L layers.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from persistrnn.calls import run
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Backend, Options, Save, check_name, check_options
from persistrnn.request import Request
from persistrnn.tracing import leaf_function
from persistrnn.validate import Given

Input = TypeVar("Input", Tensor, PackedSequence)  # the output has the form of the input


@leaf_function
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
        num_layers, bias, bidirectional, batch_first, cell_dtype, save, save_budget, heads: as of `persistrnn.LSTM`;
            with heads weight_hh is [n, 4*H/n, H/n]
        dropout: probability of a zero between two layers, where training is True
        backend: as of `persistrnn.LSTM`: "auto" compares forward and backward together where a backward may come. What
            torch's own kernels cannot do (resets, every c, and lengths but for those of CPU tensors, which they run in
            parts of time) is a loop over torch's operations there, step by step. `persistrnn.explain` says what "auto"
            chooses, a module's `last_path` what it chose
        lengths: integers [B] on the input's device, each in [0, T]. Past its length a row's output is zero and takes
            no gradient; the final state is that after its last step; the second direction begins there. Nothing is
            sorted and the host does not wait: on a GPU a length out of range is taken as 0 or T and, once it was seen
            there, raised by the same call or a later one that has lengths or runs on the kernels, by backward on the
            kernels or by `persistrnn.check`; on a CPU at once
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
    given = Given(lengths, mask, resets, reset_state)
    return _run("lstm", input, weights, hx, options, given, return_cell_states)


@leaf_function
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
    return _run("gru", input, weights, hx, options, Given(lengths, mask, resets, reset_state))


@leaf_function
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
    given = Given(lengths, mask, resets, reset_state)
    return _run(rnn_cell(nonlinearity), input, weights, hx, options, given)


@leaf_function
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
    check_name("cell", cell, list(CELLS))
    given = Given(lengths, mask, resets, reset_state, extras)
    return _run(cell, input, weights, hx, options, given, return_cell_states)


def _run(cell: str, input: Any, weights: Any, hx: Any, options: Options, given: Given, return_c: bool = False) -> Any:
    check_options(options)
    return run(Request(cell, input, weights, hx, options, given, return_c)).given_out(return_c)


def rnn_cell(nonlinearity: object) -> str:
    """The cell of an RNN.

    Raises:
        ValueError: another nonlinearity
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"
