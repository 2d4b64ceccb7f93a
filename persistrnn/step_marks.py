"""Lengths, masks and resets as marks on the steps, which the kernels and the reference read.

A row of the batch is cut where an episode begins, and ends at its length; each direction runs within the parts. Marks
are uint8 [T, B, D]: 0 where a step goes on from the one before it in its direction, BEGINS where it goes on from the
reset state instead, SKIPPED where the row has no step (padding, a masked step) and the state stays as it is.
"""

import torch
from torch import Tensor

from persistrnn.kernels.tensors import host_word, taken
from persistrnn.tracing import exporting_to_onnx

BEGINS, SKIPPED = 1, 2


def marks(active: Tensor | None, resets: Tensor | None, directions: int) -> Tensor:
    """Marks of ``active`` (where a row runs) and ``resets``, bool [T, B] each, of which one may be None.

    Direction 1 runs from the end: it begins anew one step before, in time, where the next episode begins.
    """
    if resets is None:
        assert active is not None
        begins = [torch.zeros_like(active)] * directions
    else:
        going_on = torch.ones_like(resets) if active is None else active
        time = torch.arange(resets.size(0), device=resets.device).unsqueeze(1)
        # Rolled: a slice of T - 1 steps would be one more size that torch.compile makes a graph for.
        next_begins = (resets & going_on).roll(-1, 0) & (time < resets.size(0) - 1)
        begins = [resets, next_begins][:directions]
    found = torch.stack(begins, dim=2).to(torch.uint8) * BEGINS
    return found if active is None else torch.where(active.unsqueeze(2), found, SKIPPED).to(torch.uint8)


def without_skipped(y: Tensor, marks: Tensor | None) -> Tensor:
    """A layer's output [..., T, B, features] as the next one reads it: zeros where a row skips the step, as marks
    [T, B, D] say. There the state repeats, and may be a NaN that nobody read: 0 * NaN in the weights' gradient."""
    return y if marks is None else torch.where(marks[:, :, :1] == SKIPPED, 0.0, y)


def only_where(active: Tensor, tensor: Tensor) -> Tensor:
    """Zeros where ``active`` does not hold."""
    return torch.where(active, tensor, 0.0)


def first_steps(active: Tensor, directions: int) -> Tensor:
    """The first step of each row in each direction: bool [T, B, D]."""
    runs = [active, active.flip(0)][:directions]
    first = [run & (run.cumsum(0) == 1) for run in runs]
    return torch.stack([f.flip(0) if d else f for d, f in enumerate(first)], dim=2)


# Whether lengths on a device were not within [0, T]: noted there, and on its way to the host, which ``check`` asks.
_out_of_range: dict[torch.device, tuple[Tensor, Tensor]] = {}
# The same, noted by a kernel.
_words: dict[torch.device, Tensor] = {}


def word(device: torch.device) -> Tensor:
    """What a kernel sets to 1 if a length is out of range."""
    if device not in _words:
        _words[device] = host_word(device)
    return _words[device]


def _note(bad: Tensor) -> None:
    if bad.device not in _out_of_range:
        with torch.inference_mode(False):  # else a call outside of it could not write them
            seen = torch.zeros((), dtype=torch.bool, device=bad.device)
            told = torch.zeros((), dtype=torch.bool, pin_memory=bad.device.type == "cuda")
        _out_of_range[bad.device] = seen, told
    seen, told = _out_of_range[bad.device]
    seen.logical_or_(bad)
    told.copy_(seen, non_blocking=True)


def check() -> None:
    """Raise RuntimeError if lengths were out of range, once the host can know: perhaps still in their own call."""
    for device, (seen, told) in _out_of_range.items():
        if told:
            seen.zero_()
            told.zero_()
            raise _as_told(device)
    for device, noted in _words.items():
        if taken(noted):
            raise _as_told(device)


def _as_told(device: torch.device) -> RuntimeError:
    return RuntimeError(
        f"lengths on {device}, of this call or an earlier one, were not within [0, T]; they were taken as 0 or T. "
        "Clamp them: lengths.clamp(0, T)"
    )


def refuse(lengths: Tensor, steps: int) -> None:
    """Raise ValueError if a kernel has just noted these, on a CPU."""
    if taken(word(lengths.device)):
        raise _not_within(lengths, steps)


def _not_within(lengths: Tensor, steps: int) -> ValueError:
    return ValueError(f"lengths must be within [0, T={steps}], got {lengths.tolist()}")


def within(lengths: Tensor, steps: int) -> Tensor:
    """Lengths within [0, steps], int64; others are an error (``bounded``), but in ONNX, which has none."""
    return lengths.long().clamp(0, steps) if exporting_to_onnx() else bounded(lengths, steps)


def bounded(lengths: Tensor, steps: int) -> Tensor:
    """Lengths within [0, steps], int64. Others are an error: at once on the CPU, else at the next call (``check``)."""
    # An operator only where something looks on: the first call of one imports the compiler, which takes a second.
    looks_on = torch.compiler.is_compiling() or torch._C._get_tracing_state() or type(lengths) is not Tensor
    if looks_on or torch._C._len_torch_dispatch_stack() or torch._C._functorch.get_dynamic_layer_stack_depth():
        result: Tensor = _bounded(lengths, steps)
        return result
    return _within(lengths, steps)


def _within(lengths: Tensor, steps: int) -> Tensor:
    check()  # of an earlier call: the loop over torch's operations has no other place for it
    lengths = lengths.long()  # T need not fit the dtype that they came in
    bad = (lengths < 0) | (lengths > steps)
    if lengths.device.type == "cpu":
        if bad.any():
            raise _not_within(lengths, steps)
    else:
        _note(bad.any())
    return lengths.clamp(0, steps)  # never the argument itself, which an operator may not return


_bounded = torch.library.custom_op("persistrnn::bounded_lengths", _within, mutates_args=())


@_bounded.register_fake
def _(lengths: Tensor, steps: int) -> Tensor:
    return torch.empty_like(lengths, dtype=torch.int64)


@_bounded.register_vmap
def _(info: object, in_dims: tuple[int | None, None], lengths: Tensor, steps: int) -> tuple[Tensor, int | None]:
    return _bounded(lengths, steps), in_dims[0]
