"""What the modules of all cells share: torch.nn's constructor, parameters, state_dict; checks, `step`, `to_torch`."""

import math
import warnings
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from persistrnn import functional, validate
from persistrnn.decide import TORCH
from persistrnn.eight_bits import EightBits
from persistrnn.functional import Input
from persistrnn.options import Backend, Options, Save, check_options, check_save, check_sizes
from persistrnn.validate import Given, Stack


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


def check_layer(layer: object) -> None:
    """Raise TypeError for what is no layer of ours."""
    if not isinstance(layer, RecurrentBase):
        raise TypeError(
            f"layer is one of persistrnn's, such as persistrnn.LSTM, got {type(layer).__module__}."
            f"{type(layer).__qualname__}; persistrnn.replace makes them of torch.nn's"
        )


class RecurrentBase(nn.Module):
    """A stack of layers of one cell, which a subclass names. `persistrnn.LSTM` says what arguments, inputs, outputs and
    attributes are; of these ``cell_dtype`` and ``return_cell_states`` are for cells of two states or more.

    Not a torch.nn.RNNBase: each subclass of that breaks a compiled graph, and it keeps a second list of the weights
    which goes stale under parametrizations.
    """

    cell: str  # its name in ``kernels.cells.CELLS``
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
    heads: int = 1
    weight_dtype: torch.dtype | None = None  # of W_hh, where `persistrnn.quantize` has made it of 8 bits
    last_path: str | None

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
        cell_dtype: torch.dtype | None = None,
        save: Save = "gates",
        save_budget: int | None = None,
        heads: int = 1,
        proj_size: int | None = None,
    ) -> None:
        options = Options(
            num_layers, bias, batch_first, dropout, bidirectional, backend, cell_dtype, save, save_budget, True, heads
        )
        self._build(input_size, hidden_size, self._unprojected(proj_size), options, device, dtype)

    def _unprojected(self, proj_size: object) -> int:
        if proj_size is None:
            return 0
        name = type(self).__name__
        raise ValueError(
            f"proj_size argument is only supported for LSTM, not for {name}, got {proj_size}; leave it out"
        )

    def _build(
        self, input_size: int, hidden_size: int, proj_size: int, options: Options, device: Any, dtype: Any
    ) -> None:
        """What every constructor calls by itself: the warning names the line that called it."""
        super().__init__()
        check_options(options)
        validate.check_states(self.cell, options.cell_dtype)
        check_sizes(input_size, hidden_size, proj_size, options.heads)
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

        stack = Stack(self.cell, num_layers, self._directions, bias, input_size, hidden_size, proj_size, options.heads)
        for layer, names in self._names():
            for name, shape in zip(names, validate.parameter_shapes(stack, layer), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def mode(self) -> str:
        """The cell's name, as torch.nn's layers have it."""
        return self.cell.upper()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _names(self) -> Iterator[tuple[int, list[str]]]:
        """(layer, names of its parameters), once for each direction of each layer."""
        for layer in range(self.num_layers):
            for direction in range(self._directions):
                yield layer, validate.parameter_names(self.cell, layer, direction, self.bias, self.proj_size != 0)

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

    @property
    def _weights(self) -> tuple[list[Tensor], EightBits | None]:
        """All of them as one list, and W_hh of a quantised layer, which has placeholders for it there."""
        weights = [weight for weights in self.all_weights for weight in weights]
        if self.weight_dtype is None:
            return weights, None
        each = len(self.all_weights[0])
        bits, scales = weights[1::each], [getattr(self, f"{names[1]}_scale") for _, names in self._names()]
        weights[1::each] = [weights[0].new_zeros(()).expand(b.shape) for b in bits]
        return weights, EightBits(self.weight_dtype, bits, scales)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales of 8-bit weights go where the parameters go, and stay float32."""
        names = [] if self.weight_dtype is None else [f"{names[1]}_scale" for _, names in self._names()]
        exact = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, scale in exact.items():
            if (moved := getattr(self, name)).dtype != scale.dtype:
                setattr(self, name, scale.to(moved.device))
        return self

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

    def to_torch(self) -> Any:
        """The torch.nn layer of the same sizes with the same Parameter objects, hooks and mode (for ONNX, to compare).

        Raises:
            ValueError: a cell, or heads, that torch.nn has not; a parametrized layer, which has no equal in torch.nn:
                remove the parametrizations first
        """
        name = type(self).__name__
        if self.weight_dtype is not None:
            raise ValueError(f"torch.nn has no {name} with W_hh in {self.weight_dtype}; persistrnn.dequantize it first")
        if self.cell not in TORCH:
            known = ", ".join(sorted({of.layer for of in TORCH.values()}))
            raise ValueError(f"torch.nn has {known}, and no layer of this {name}'s cell")
        if self.heads > 1:
            raise ValueError(
                f"torch.nn has no heads, this {name} has heads={self.heads}; one with heads=1 has an equal"
            )
        if parametrize.is_parametrized(self):
            raise ValueError(
                f"a parametrized {TORCH[self.cell].layer} has no equal in torch.nn; call torch.nn.utils.parametrize."
                "remove_parametrizations on its tensors first"
            )
        options: dict[str, Any] = dict(TORCH[self.cell].arguments)
        if self.proj_size:
            options["proj_size"] = self.proj_size
        new: nn.RNNBase = getattr(nn, TORCH[self.cell].layer)(
            self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, device=torch.device("meta"), **options,
        )  # fmt: skip
        new.dropout = self.dropout
        ours = {"cell", "function", "backend", "cell_dtype", "save", "save_budget", "heads", "last_path"}
        take_over(new, self, ignored=ours)
        return new

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in {"proj_size": 0, **Options._field_defaults}.items():
            if name != "training" and (value := getattr(self, name)) != default:
                text += f", {name}={value}"
        return text if self.weight_dtype is None else f"{text}, weight_dtype={self.weight_dtype}"

    @property
    def options(self) -> Options:
        """How a call runs now."""
        return Options(
            self.num_layers, self.bias, self.batch_first, self.dropout, self.bidirectional, self.backend,
            self.cell_dtype, self.save, self.save_budget, self.training, self.heads,
        )  # fmt: skip

    def forward(
        self,
        input: Input,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_cell_states: bool = False,
        **extras: Tensor,
    ) -> Any:
        options, sizes = self.options, (self.input_size, self.hidden_size, self.proj_size)
        check_options(options)
        check_sizes(*sizes, self.heads)
        weights, eight_bits = self._weights
        given = Given(lengths, mask, resets, reset_state, extras)
        found = functional.run(self.cell, input, weights, hx, options, given, return_cell_states, sizes, eight_bits)
        if not torch.compiler.is_compiling():  # a graph must not carry a side effect on the module
            self.last_path = found.path
        state = found.states[0] if len(found.states) == 1 else tuple(found.states)
        return (found.output, state, found.c) if return_cell_states else (found.output, state)
