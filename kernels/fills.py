"""What must be in memory before a launch, or be taken out of it after one: gathered, and done in as few launches as
torch has: one that fills with zeros, or one that copies.

Why zeros at every launch, and no counter that goes on from the launch before (an epoch) or that a kernel sets back: a
kernel counts what it waits for from 0. An epoch would be a number of the host's, which a captured CUDA graph repeats
while its counters go on; and a launch that ended half-way (a wait that ran out, an error) would leave counters that no
later launch could trust. Memory that belongs to one launch and is zeroed right before it, on its stream, has no user to
be told apart from: none on other streams, for the allocator gives it to them only when this one is done with it, and
none in a graph, where the zeroing is captured with the launch and replayed before each of its replays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compilation import on_device

# Bytes of zeros that are kept to be copied from: more than the counters of most launches.
KEPT_ZEROS = 1 << 18


class Fills:
    """Tensors that do not overlap, and what each is to hold."""

    def __init__(self) -> None:
        self._zeros: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def put(self, to: Tensor, of: Tensor | None) -> None:
        """of: of the same shape; None: zeros, for which ``to`` is contiguous."""
        if of is None:
            self._zeros.append(to.view(-1))
        else:
            self._copies.append((to, of))

    def run(self) -> None:
        """On the current stream. One launch where all that is copied has one dtype and is contiguous, which torch's
        operations on lists ask for; the rest tensor by tensor."""
        flat, apart = _flat(self._copies)
        for to, of in apart:
            to.copy_(of)
        zeros = self._zeros
        # As numbers of what is copied: narrower ones need not fill a whole number of them.
        if flat and zeros and max(z.nbytes for z in zeros) <= KEPT_ZEROS:
            dtype = flat[0][0].dtype
            source = _kept_zeros(zeros[0].device) if all(z.itemsize >= dtype.itemsize for z in zeros) else None
            if source is not None:
                words = [z.view(dtype) for z in zeros]
                flat += [(z, source.view(dtype)[: z.numel()]) for z in words]
                zeros = []
        if flat:
            torch._foreach_copy_([to for to, _ in flat], [of for _, of in flat])
        if zeros:
            narrowest = min(zeros, key=lambda z: z.itemsize).dtype
            torch._foreach_zero_([z.view(narrowest) for z in zeros])


def edges(
    fills: Fills, states: Tensor, initial: Tensor | None, reset: Tensor | None, marked: bool, heads: int = 1
) -> None:
    """Fill the slots of states [L, T + 2, B, D, H] that no step fills, from [L*D, B, H]: an operator's output is
    defined everywhere.

    The initial state goes before each direction's first step, the reset state, or what else is at hand where there are
    no marks, after its last one. None: zeros.
    """
    last, directions = states.shape[1] - 1, states.shape[3]
    anew = reset if marked else initial
    if directions == 1 or (initial is None and anew is None):
        for layer, of_layer in enumerate(states.unbind()):
            for slot, of in ((0, initial), (last, anew)):
                fills.put(of_layer[slot], None if of is None else of[layer].unsqueeze(1))
        return
    before, after = (
        None if s is None else s.unflatten(0, (-1, 1, directions)).transpose(2, 3) for s in (initial, anew)
    )
    ends = states[:, ::last]
    if before is None or after is None:
        ends.zero_()
    if not marked and before is not None:
        ends.copy_(before)
        return
    for where, of in ((0, before), (1, after)):
        if of is not None:
            ends[:, where, :, :heads].copy_(of[:, 0, :, :heads])
            ends[:, 1 - where, :, heads:].copy_(of[:, 0, :, heads:])


def _flat(copies: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Those that torch copies in one launch, as vectors, and the others."""
    flat: list[tuple[Tensor, Tensor]] = []
    apart = []
    for to, of in copies:
        dtype = flat[0][0].dtype if flat else to.dtype
        if to.dtype == of.dtype == dtype and to.is_contiguous() and of.is_contiguous():
            flat.append((to.view(-1), of.view(-1)))
        else:
            apart.append((to, of))
    return flat, apart


def _kept_zeros(device: torch.device) -> Tensor | None:
    """Zeros that nobody writes; None while a graph is captured that would have to make them: they would not be there
    before its first replay."""
    if device not in _ZEROS:
        with on_device(device):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            zeros = torch.zeros(KEPT_ZEROS // 4, dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # once in a process: other streams copy from them, too
        _ZEROS[device] = zeros
    return _ZEROS[device]


_ZEROS: dict[torch.device, Tensor] = {}
