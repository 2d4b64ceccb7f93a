"""The layers: LSTM, GRU and RNN with torch.nn's constructor, parameters, state_dict and results, and cells that torch
has not. The mathematics of all of them is in ``kernels.cells.library``."""

import torch
from torch import nn

from persistrnn import functional
from persistrnn.options import Backend, Options, Save, check_flag
from persistrnn.recipe import PLAIN, Recipe
from persistrnn.recurrent import RecurrentBase
from persistrnn.rnn_base import with_its_own_error


class LSTM(RecurrentBase):
    """torch.nn.LSTM on persistent kernels: constructor, parameters, state_dict and results are torch.nn's.

    Each layer computes (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000)

        i, f, g, o = x_t @ W_ih^T + b_ih + h_{t-1} @ W_hh^T + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(c_t)

    Args:
        input_size: I, the features of the input
        hidden_size: H, the features of the state; any H
        num_layers: L, the layers of the stack
        bias: whether the layers have bias_ih and bias_hh
        batch_first: whether input and output are [B, T, features]; the states never are
        dropout: probability of a zero between two layers, in training
        bidirectional: whether each layer reads the sequence both ways; then D is 2, else 1
        proj_size: P > 0 projects each h to P features (Sak et al. 2014); the output then has D*P features
        device, dtype: of the parameters
        backend: "auto" runs the persistent kernels on a GPU that can run them and where they are expected to be
            faster, and torch's own kernels elsewhere (CPU, float64, ...); "persistent" runs the kernels or raises;
            "torch" runs torch's own
        cell_dtype: dtype in which c is given out, and in which the kernels store it for the backward: None (that of
            the computation) or torch.float32; between the steps the kernels' c is float32 in any case
        save: what a call keeps for its backward, from the fastest to the smallest: "gates" (y, c and the gates of every
            step), "state" (y and c; the backward forms the gates again, with two GEMMs), "checkpoint" (the state every
            so many steps; the backward runs the forward again between them; with one direction and without dropout the
            whole stack keeps only the last layer's output). Time is processed in chunks, so that all else takes the
            memory of a chunk. "auto" takes the first of them that is predicted to need at most save_budget bytes.
            torch's own path keeps what it keeps with "gates", and runs the forward again in chunks with both others.
            Of few steps one chunk holds all, and "gates" needs the least. Not with projections
        save_budget: with save="auto", bytes at the highest point of a training step, without the input, the weights,
            and the gradients of the input and the output
        heads: n > 1 makes W_hh block-diagonal (the heads of xLSTM, Beck et al. 2024; TorchRL's block GRU): head k alone
            reads and writes the k-th of n equal parts of the H units, and one that fits a multiprocessor waits for no
            other. n divides H; not with projections. torch.nn has none: beside the kernels it runs step by step
        recipe: noise in training, learned states, the forget gate's first bias; see `Recipe`

    Inputs: input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence), T >= 1; and
    optionally (h0, c0), each [L*D, B, H] ([L*D, H] unbatched; h0 has P features with projections). By keyword, what
    torch.nn has not (`functional.lstm` has the details):

        lengths: integers [B] on the input's device: a row's output is zero past its length, its final state is that
            after its last step, the second direction begins there; nothing is sorted and the host does not wait
        mask: bool as the input, [T, B]: a row skips the steps where it is False
        resets: bool as the input, [T, B]: an episode begins before the steps where it is True, from reset_state
        reset_state: as (h0, c0); None: zeros
        return_cell_states: whether to return every c of the last layer, too

    Outputs: output [T, B, D*H] of the last layer (D*P with projections), in the input's form, and (h_n, c_n), shaped
    as (h0, c0); with return_cell_states also c [T, B, D*H], in the input's form.

    Attributes:
        weight_ih_l[k] [4*H, I or D*H], weight_hh_l[k] [4*H, H], bias_ih_l[k], bias_hh_l[k] [4*H]: gate order
            i, f, g, o; the second direction's names end in _reverse. With projections [4*H, I or D*P], [4*H, P] and
            weight_hr_l[k] [P, H]. With heads weight_hh_l[k] is [n, 4*H/n, H/n], each head's rows in gate order, and all
            others are as before: weight_hh @ h is

                r = torch.einsum("bnk,ngk->bng", h.unflatten(1, (n, -1)), weight_hh)  # [B, n, 4*H/n]
                r.unflatten(2, (4, -1)).transpose(1, 2).flatten(1)  # [B, 4*H], gate by gate

        last_path: what ran the last eager call: "persistent", "torch", or "stepwise", a loop over torch's operations
            for what torch's own kernels cannot do; None before the first. A call under torch.compile leaves it as it
            is: ask `persistrnn.explain`

    Dtypes: float16, bfloat16 and float32 on the kernels, also what torch.nn.LSTM takes on torch's path. Under
    autocast the layer computes in autocast's dtype, as torch.nn.LSTM does, and so on every CPU: one without oneDNN's
    LSTM in that dtype (bfloat16 wants avx512) runs ATen's loop, which is slower.

    A second derivative (a gradient penalty, say) is right and slow: it runs step by step. So does a call under
    forward-mode AD, with any backend, and on torch's path under a torch.func.vmap of weights.

    Raises: ValueError, RuntimeError and TypeError as torch.nn.LSTM does, and RuntimeError where
    backend="persistent" cannot run a call. Not scriptable by torch.jit, and no instance of torch.nn.LSTM: code that
    asks isinstance(m, torch.nn.LSTM) must ask for this class (`to_torch` gives torch.nn's back).
    """

    cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        cell_dtype: torch.dtype | None = None,
        save: Save = "gates",
        save_budget: int | None = None,
        heads: int = 1,
        recipe: Recipe = PLAIN,
    ) -> None:
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, True, heads,
            recipe,
        )  # fmt: skip
        self._build(input_size, hidden_size, proj_size, options, device, dtype)


class GRU(RecurrentBase):
    """torch.nn.GRU on persistent kernels: constructor, parameters, state_dict and results are torch.nn's.

    Each layer computes (Cho et al. 2014, in cuDNN's and torch's form: reset after the matrix product)

        xr, xz, xn = x_t @ W_ih^T + b_ih
        rr, rz, rn = h_{t-1} @ W_hh^T + b_hh
        r, z = sigmoid(xr + rr), sigmoid(xz + rz)
        n = tanh(xn + r * rn)
        h_t = (1 - z) * n + z * h_{t-1}

    Inputs: input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence), T >= 1; and
    optionally h0 [L*D, B, H] ([L*D, H] unbatched), and by keyword lengths, mask, resets and reset_state as for `LSTM`.

    Outputs: output [T, B, D*H] of the last layer, in the input's form, and h_n, shaped as h0.

    Attributes:
        weight_ih_l[k] [3*H, I or D*H], weight_hh_l[k] [3*H, H], bias_ih_l[k], bias_hh_l[k] [3*H]: gate order
            r, z, n; the second direction's names end in _reverse
        last_path: as for `LSTM`

    With reset_after=False the reset gate acts before the product, as in Cho et al. 2014, in Keras's GRU of that option
    and in ONNX's GRU with linear_before_reset=0:

        n = tanh(xn + (r * h_{t-1}) @ W_hn^T + b_hn)

    Parameters have the same names and shapes, so that a state_dict loads into either, but they are two functions, and
    torch.nn has this one not: `to_torch` refuses it. The kernels keep what its backward needs of every step: with
    another save than "gates" it runs step by step ("stepwise"). Keras has the gates in the order z, r, n, matrices
    transposed, and one bias; ONNX z, r, n.

    Arguments, dtypes and errors are else those of `LSTM`; as in torch.nn.GRU there is no projection, and
    proj_size is refused with ValueError.
    """

    reset_after: bool = True  # here too, for layers pickled before it was

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: Backend = "auto",
        save: Save = "gates",
        save_budget: int | None = None,
        heads: int = 1,
        cell_dtype: torch.dtype | None = None,
        proj_size: int | None = None,
        recipe: Recipe = PLAIN,
    ) -> None:
        check_flag("reset_after", reset_after)
        self.reset_after = reset_after
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, True, heads,
            recipe,
        )  # fmt: skip
        self._build(input_size, hidden_size, self._unprojected(proj_size), options, device, dtype)

    @property
    def cell(self) -> str:  # type: ignore[override]
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNN(RecurrentBase):
    """torch.nn.RNN on persistent kernels: constructor, parameters, state_dict and results are torch.nn's.

    Each layer computes (Elman 1990), with nonlinearity "tanh" or "relu",

        h_t = nonlinearity(x_t @ W_ih^T + b_ih + h_{t-1} @ W_hh^T + b_hh)

    Attributes:
        weight_ih_l[k] [H, I or D*H], weight_hh_l[k] [H, H], bias_ih_l[k], bias_hh_l[k] [H]
        nonlinearity: "tanh" or "relu"

    Inputs, outputs and all else are those of `GRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        save: Save = "gates",
        save_budget: int | None = None,
        heads: int = 1,
        recipe: Recipe = PLAIN,
        proj_size: int | None = None,
    ) -> None:
        self.nonlinearity = nonlinearity
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, None, save, save_budget, True, heads, recipe
        )
        self._build(input_size, hidden_size, self._unprojected(proj_size), options, device, dtype)

    @property
    def cell(self) -> str:  # type: ignore[override]
        return functional.rnn_cell(with_its_own_error(lambda: self.nonlinearity))


class PeepholeLSTM(RecurrentBase):
    """An LSTM whose gates see c (Gers, Schraudolph and Schmidhuber 2002), with x = x_t @ W_ih^T + b_ih and r = h_{t-1}
    @ W_hh^T + b_hh:

        i = sigmoid(x_i + r_i + weight_ci * c_{t-1})
        f = sigmoid(x_f + r_f + weight_cf * c_{t-1})
        c_t = f * c_{t-1} + i * tanh(x_g + r_g)
        h_t = sigmoid(x_o + r_o + weight_co * c_t) * tanh(c_t)

    Attributes: those of `LSTM`, gate order i, f, g, o, and weight_ci_l[k], weight_cf_l[k], weight_co_l[k] [H], behind
    the biases. ONNX's LSTM has gate order i, o, f, c in W, R and B, and P [D, 3*H] is weight_ci, weight_co, weight_cf,
    one behind the other.

    Arguments, inputs, outputs and errors are those of `LSTM`, without projections.
    """

    cell = "peephole"


class CoupledLSTM(RecurrentBase):
    """An LSTM whose input gate is 1 - f (CIFG of Greff et al. 2015), with x and r as for `PeepholeLSTM`:

        f = sigmoid(x_f + r_f)
        c_t = f * c_{t-1} + (1 - f) * tanh(x_g + r_g)
        h_t = sigmoid(x_o + r_o) * tanh(c_t)

    Attributes: those of `LSTM`, with 3*H rows, gate order f, g, o. ONNX's LSTM with input_forget=1 has the gate i and f
    = 1 - i: its rows of i are those of f here with the other sign.

    Arguments, inputs, outputs and errors are those of `LSTM`, without projections.
    """

    cell = "coupled"


class MGU(RecurrentBase):
    """The minimal gated unit (Zhou et al. 2016) in the form of `GRU`: the gate acts after the matrix product. x and r
    are those of `PeepholeLSTM`:

        f = sigmoid(x_f + r_f)
        h_t = (1 - f) * h_{t-1} + f * tanh(x_n + f * r_n)

    Attributes: those of `GRU`, with 2*H rows, gate order f, n. Arguments, inputs, outputs and errors are those of
    `GRU`.
    """

    cell = "mgu"


class JANET(RecurrentBase):
    """Just another network: an LSTM with a forget gate alone (van der Westhuizen and Lasenby 2018), with beta = 1. x
    and r are those of `PeepholeLSTM`:

        f, g = x_f + r_f, x_g + r_g
        c_t = sigmoid(f) * c_{t-1} + (1 - sigmoid(f - 1)) * tanh(g)
        h_t = c_t

    Attributes: those of `LSTM`, with 2*H rows, gate order f, g. Arguments, inputs, outputs and errors are those of
    `LSTM`, without projections.
    """

    cell = "janet"


class SLSTM(RecurrentBase):
    """The sLSTM of xLSTM (Beck et al. 2024): exponential gates, a normaliser n and a stabiliser m. x and r are those of
    `PeepholeLSTM`:

        i, f, z, o = x + r
        m_t = max(log(sigmoid(f)) + m_{t-1}, i)
        i', f' = exp(i - m_t), exp(log(sigmoid(f)) + m_{t-1} - m_t)
        c_t = f' * c_{t-1} + i' * tanh(z)
        n_t = f' * n_{t-1} + i'
        h_t = sigmoid(o) * c_t / n_t

    Attributes: those of `LSTM`, gate order i, f, z, o. The states are (h, c, n, m), each [L*D, B, H]. Arguments,
    inputs, outputs and errors are else those of `LSTM`, without projections.
    """

    cell = "slstm"


class _Normalised(RecurrentBase):
    """Layers whose halves of the gates are layer-normalised."""

    def reset_parameters(self) -> None:
        """Draw the matrices from U(-1/sqrt(H), 1/sqrt(H)); the norms begin with weights of 1 and biases of 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_ln"):
                nn.init.ones_(parameter)
            elif name.startswith("bias"):
                nn.init.zeros_(parameter)
        self._set_forget_bias()


class LayerNormLSTM(_Normalised):
    """An LSTM with layer norms (Ba, Kiros and Hinton 2016, equations 20 to 22; haste's LayerNormLSTM). norm is over the
    4*H numbers of a row, (v - mean(v)) / sqrt(var(v) + 1e-5), or over the H of c:

        i, f, g, o = weight_ln_ih * norm(x_t @ W_ih^T) + b_ih + weight_ln_hh * norm(h_{t-1} @ W_hh^T) + b_hh
        c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
        h_t = sigmoid(o) * tanh(weight_ln_c * norm(c_t) + bias_ln_c)

    The normalised c goes to h alone. The LayerNormLSTMCell of PyTorch's TorchScript benchmark, else the same, carries
    it to the next step: another function, in which c forgets its scale at every step.

    Attributes: those of `LSTM`, gate order i, f, g, o, and behind the biases weight_ln_ih_l[k] and weight_ln_hh_l[k]
    [4*H], weight_ln_c_l[k] and bias_ln_c_l[k] [H]. The biases are those of the norms; bias=False leaves bias_ih and
    bias_hh out. Weights of norms begin with 1, biases with 0, matrices as those of `LSTM`.

    The kernels keep what its backward needs of every step: with another save than "gates" it runs step by step
    ("stepwise"). heads is 1. Arguments, inputs, outputs and errors are else those of `LSTM`, without projections.
    """

    cell = "layer_norm_lstm"


class LayerNormGRU(_Normalised):
    """A GRU with layer norms (Ba, Kiros and Hinton 2016, in the form of haste's LayerNormGRU: one norm over the 3*H
    numbers of each product, and the reset gate behind it). norm is that of `LayerNormLSTM`:

        xr, xz, xn = weight_ln_ih * norm(x_t @ W_ih^T) + b_ih
        rr, rz, rn = weight_ln_hh * norm(h_{t-1} @ W_hh^T) + b_hh
        r, z = sigmoid(xr + rr), sigmoid(xz + rz)
        n = tanh(xn + r * rn)
        h_t = (1 - z) * n + z * h_{t-1}

    Attributes: those of `GRU`, gate order r, z, n, and behind the biases weight_ln_ih_l[k] and weight_ln_hh_l[k] [3*H].
    All else is as of `LayerNormLSTM`, and as of `GRU`.
    """

    cell = "layer_norm_gru"
