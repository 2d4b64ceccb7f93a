"""What old code reads of torch.nn.RNNBase beside its documented surface: flat weights, and its checks by name."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from persistrnn import dynamic_quantization
from persistrnn.decide import TORCH
from persistrnn.kernels.cells import CELLS

Value = TypeVar("Value")


def with_its_own_error(get: Callable[[], Value]) -> Value:
    """What a property gives. Of an AttributeError in it, as of a deleted weight, `nn.Module.__getattr__` would say that
    there is no such property."""
    try:
        return get()
    except AttributeError as error:
        raise RuntimeError(str(error)) from error


class RNNBaseSurface:
    """Methods and attributes of torch.nn.RNNBase that libraries call, over the parameters as they are now. Our own
    forward uses none of them."""

    cell: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    _all_weights: list[list[str]]

    @property
    def mode(self) -> str:
        """The cell's name, as torch.nn's layers have it."""
        return self.cell.upper()

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights in one list, made at each call; None in the place of one that is missing. Assigned, it sets them
        by name."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization sets on every module of a model that it quantizes; else there is none. See
        ``dynamic_quantization``."""
        try:
            return self.__dict__["qconfig"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        of_torch = getattr(nn, TORCH[self.cell].layer) if self.cell in TORCH else None
        self.__dict__["qconfig"] = dynamic_quantization.configured(self, of_torch, value)

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("qconfig", None)

    def flatten_parameters(self) -> None:
        """Do nothing: torch.nn needs it for cuDNN, here no path asks for contiguous weights."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise ValueError for another dtype than the weights', RuntimeError for other dimensions or features.

        input: [T, B, I], [B, T, I] with batch_first, or with batch_sizes the data of a PackedSequence
        """
        weight = next((w for w in self._flat_weights if w is not None), None)
        if weight is not None and input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}); convert the input: "
                f"input.to({weight.dtype}), or the layer"
            )
        dimensions = 3 if batch_sizes is None else 2
        if input.dim() != dimensions:
            raise RuntimeError(f"input must have {dimensions} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The size of h0: (L*D, B, P or H)."""
        return self._expected(input, batch_sizes, self.proj_size or self.hidden_size)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The size of the states after h: (L*D, B, H)."""
        return self._expected(input, batch_sizes, self.hidden_size)

    def _expected(self, input: Tensor, batch_sizes: Tensor | None, features: int) -> tuple[int, int, int]:
        rows = input.size(0 if self.batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        return self.num_layers * (2 if self.bidirectional else 1), rows, features

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = "Expected hidden size {}, got {}"
    ) -> None:
        """Raise RuntimeError for a state of another size."""
        if hx.size() != expected_hidden_size:
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.size())))

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """The three checks together; hidden: a tensor, or the tuple of a cell with more states."""
        self.check_input(input, batch_sizes)
        n = CELLS[self.cell].states
        for k, state in enumerate([hidden] if n == 1 else hidden):
            expected = self.get_expected_cell_size if k else self.get_expected_hidden_size
            name = "hidden" if n == 1 else f"hidden[{k}]"
            self.check_hidden_size(state, expected(input, batch_sizes), f"Expected {name} size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states with their rows in another order."""
        if permutation is None:
            return hx
        return hx[:, permutation] if isinstance(hx, Tensor) else tuple(state[:, permutation] for state in hx)
