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

# Bytes of zeros that are kept to be copied from: enough for the counters of any launch that a plan makes.
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
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        zeros = torch.zeros(KEPT_ZEROS // 4, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once in a process: other streams copy from them, too
        _ZEROS[device] = zeros
    return _ZEROS[device]


_ZEROS: dict[torch.device, Tensor] = {}
