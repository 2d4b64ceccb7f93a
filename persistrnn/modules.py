"""LSTM and GRU modules with torch.nn's constructor, parameters, state_dict and results."""

import math
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from persistrnn import functional, validate
from persistrnn.functional import Input
from persistrnn.kernels.cells import CELLS
from persistrnn.options import Backend, Options, Save, check_options, check_save, check_sizes
from persistrnn.validate import Given


def take_over(new: nn.Module, old: nn.Module, ignored: Container[str] = ()) -> None:
    """Give `new`, of the same sizes, what `old` has: its very Parameter objects, its hooks (the same dictionaries, so
    that handles still remove them), its training mode, and attributes that `new` does not know, but for those ignored.
    """
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    apart = {"_parameters", "_buffers", "_modules"}
    for name in nn.Module().__dict__.keys() - apart:
        new.__dict__[name] = old.__dict__[name]
    for name, value in old.__dict__.items():
        if name not in new.__dict__ and name not in ignored:
            new.__dict__[name] = value


class _Recurrent(nn.Module):
    """What LSTM and GRU share. Not a torch.nn.RNNBase: each subclass of that breaks a compiled graph, and it
    keeps a second list of the weights which goes stale under parametrizations."""

    mode: str  # "LSTM" or "GRU", as in torch.nn
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    backend: Backend
    cell_dtype: torch.dtype | None
    save: Save = "gates"  # here too, for layers pickled before it was
    save_budget: int | None = None
    last_path: str | None

    def __init__(
        self, input_size: int, hidden_size: int, proj_size: int, options: Options, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        check_options(options)
        check_sizes(input_size, hidden_size, proj_size)
        check_save(options.save, options.save_budget, proj_size)
        num_layers, bias, dropout = options.num_layers, options.bias, float(options.dropout)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={options.dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        self.input_size, self.hidden_size, self.proj_size = input_size, hidden_size, proj_size
        for name, value in options._replace(dropout=dropout)._asdict().items():
            setattr(self, name, value)
        self.last_path = None

        rows = CELLS[self.mode.lower()].gates * hidden_size
        features = proj_size or hidden_size
        for layer, names in self._names():
            width = input_size if layer == 0 else self._directions * features
            shapes = [(rows, width), (rows, features)] + [(rows,), (rows,)] * bias + [(proj_size, hidden_size)]
            for name, shape in zip(names, shapes, strict=False):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _names(self) -> Iterator[tuple[int, list[str]]]:
        """(layer, names of its parameters), once for each direction of each layer."""
        for layer in range(self.num_layers):
            for direction in range(self._directions):
                yield layer, validate.parameter_names(layer, direction, self.bias, self.proj_size != 0)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights in torch.nn's order, one list for each direction of each layer.

        Raises:
            RuntimeError: one is missing, or would be left out: the sizes, changed since, are not those of the layer
        """
        # No AttributeError, which Module.__getattr__ would take for one of all_weights itself.
        places = self._parameters, self.__dict__, type(self).__dict__  # hasattr takes 8 us to find nothing
        if left := [name for name in self._names_beyond() if any(name in place for place in places)]:
            raise RuntimeError(f"the layer has {left[0]}, and {self._shape_in_words()} leave it out; set them back")
        try:
            # by name at every call: a parametrization, functional_call and weight_norm replace the attribute
            return [[getattr(self, name) for name in names] for _, names in self._names()]
        except AttributeError as error:
            missing = [name for _, names in self._names() for name in names if not hasattr(self, name)]
            raise RuntimeError(
                f"the layer has no {', '.join(missing)}, and {self._shape_in_words()} ask for it; register it "
                "again, or set them back"
            ) from error

    def _names_beyond(self) -> list[str]:
        """The first names that the layer would have with a layer, a direction, biases or projections more."""
        names = [f"weight_ih_l{self.num_layers}"]
        if not self.bidirectional:
            names.append("weight_ih_l0_reverse")
        if not self.bias:
            names.append("bias_ih_l0")
        if not self.proj_size:
            names.append("weight_hr_l0")
        return names

    def _shape_in_words(self) -> str:
        names = ("num_layers", "bidirectional", "bias", "proj_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def _all_weights(self) -> list[list[str]]:
        """Their names, as torch.nn has them: TorchRL, for one, reads it."""
        return [names for _, names in self._names()]

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(H), 1/sqrt(H)): with torch.nn's seed, torch.nn's weights."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing: torch.nn needs it for cuDNN, here no path asks for contiguous weights."""

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """One time step, for environments and streams: y_t and the state that the next step takes.

        Step by step it is what the sequence call computes, to rounding; dropout between layers is drawn anew each time.

        Args:
            input: [B, I], or [I] unbatched, whatever batch_first says
            hx: the state, in the form that a call takes and returns; None: zeros

        Returns:
            y_t [B, H] ([B, P] with projections; [H] unbatched), and the state after it.

        Raises:
            ValueError: a bidirectional layer, which needs the whole sequence; an input that is not 1-D or 2-D
        """
        if self.bidirectional:
            raise ValueError(
                "a bidirectional layer has no steps: its second direction begins at the sequence's end; "
                "call it with the sequence, or use bidirectional=False"
            )
        if not isinstance(input, Tensor):
            raise TypeError(f"the input of a step is a tensor [B, I] or [I], got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"the input of a step is [B, I] or [I], got {input.dim()}-D; a sequence goes to the layer")
        time = 1 if self.batch_first and input.dim() == 2 else 0
        y, state = self(input.unsqueeze(time), hx)
        return y.squeeze(time), state

    def to_torch(self) -> nn.LSTM | nn.GRU:
        """The torch.nn layer of the same sizes with the same Parameter objects, hooks and mode (for ONNX, to compare).

        Raises:
            ValueError: a parametrized layer, for which torch.nn has no equal; remove the parametrizations first
        """
        if parametrize.is_parametrized(self):
            raise ValueError(
                f"a parametrized {self.mode} has no equal in torch.nn; call torch.nn.utils.parametrize."
                "remove_parametrizations on its tensors first"
            )
        options = {"proj_size": self.proj_size} if self.proj_size else {}
        new: nn.LSTM | nn.GRU = getattr(nn, self.mode)(
            self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first,
            bidirectional=self.bidirectional, device=torch.device("meta"), **options,
        )  # fmt: skip
        new.dropout = self.dropout
        take_over(new, self, ignored={"backend", "cell_dtype", "save", "save_budget", "last_path"})
        return new

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in {"proj_size": 0, **Options._field_defaults}.items():
            if name != "training" and (value := getattr(self, name)) != default:
                text += f", {name}={value}"
        return text

    @property
    def options(self) -> Options:
        """How a call runs now."""
        return Options(
            self.num_layers, self.bias, self.batch_first, self.dropout, self.bidirectional, self.backend,
            self.cell_dtype, self.save, self.save_budget, self.training,
        )  # fmt: skip

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: object,
        given: Given,
        return_c: bool = False,
    ) -> functional.Found:
        options, sizes = self.options, (self.input_size, self.hidden_size, self.proj_size)
        check_options(options)
        check_sizes(*sizes)
        weights = [weight for weights in self.all_weights for weight in weights]
        found = functional.run(self.mode.lower(), input, weights, hx, options, given, return_c, sizes)
        if not torch.compiler.is_compiling():  # a graph must not carry a side effect on the module
            self.last_path = found.path
        return found


class LSTM(_Recurrent):
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
            weight_hr_l[k] [P, H]
        last_path: what ran the last eager call: "persistent", "torch", or "stepwise", a loop over torch's operations
            for what torch's own kernels cannot do; None before the first. A call under torch.compile leaves it as it
            is: ask `persistrnn.explain`

    Dtypes: float16, bfloat16 and float32 on the kernels, also what torch.nn.LSTM takes on torch's path. Under
    autocast the layer computes in autocast's dtype, as torch.nn.LSTM does, and so on every CPU: one without oneDNN's
    LSTM in that dtype (bfloat16 wants avx512) runs ATen's loop, which is slower.

    A second derivative (a gradient penalty, say) is right and slow: it runs step by step. The kernels refuse
    forward-mode AD.

    Raises: ValueError, RuntimeError and TypeError as torch.nn.LSTM does, and RuntimeError where
    backend="persistent" cannot run a call. Not scriptable by torch.jit, and no instance of torch.nn.LSTM: code that
    asks isinstance(m, torch.nn.LSTM) must ask for this class (`to_torch` gives torch.nn's back).
    """

    mode = "LSTM"

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
    ) -> None:
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, training=True
        )
        super().__init__(input_size, hidden_size, proj_size, options, device, dtype)

    def forward(
        self,
        input: Input,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        found = self._run(input, hx, Given(lengths, mask, resets, reset_state), return_cell_states)
        h_n, c_n = found.states
        return (found.output, (h_n, c_n), found.c) if return_cell_states else (found.output, (h_n, c_n))


class GRU(_Recurrent):
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

    Arguments, dtypes and errors are those of `LSTM`; as in torch.nn.GRU there is no projection, and
    proj_size is refused with ValueError.
    """

    mode = "GRU"

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
        backend: Backend = "auto",
        save: Save = "gates",
        save_budget: int | None = None,
        proj_size: int | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError(
                f"proj_size argument is only supported for LSTM, not for GRU, got {proj_size}; leave it out"
            )
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, None, save, save_budget, training=True
        )
        super().__init__(input_size, hidden_size, 0, options, device, dtype)

    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Input, Tensor]:
        found = self._run(input, hx, Given(lengths, mask, resets, reset_state))
        return found.output, found.states[0]
