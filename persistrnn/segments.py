"""Variable lengths and resets as marks on the steps, which the kernels and the reference read.

A row of the batch is cut where an episode begins and ends at its length; each direction runs within the parts. Marks
are uint8 [T, B, D]: 0 where a step goes on from the one before it in its direction, BEGINS where it goes on from the
reset state instead, ENDED at padding, where the state stays as it is.
"""

import torch
from torch import Tensor

BEGINS, ENDED = 1, 2


def marks(lengths: Tensor | None, resets: Tensor | None, steps: int, directions: int) -> Tensor:
    """Marks of lengths [B] and resets [T, B], of which one may be None. No host synchronisation.

    Direction 1 runs from the end: it begins anew one step before, in time, where the next episode begins.
    """
    given = lengths if lengths is not None else resets
    assert given is not None
    time = torch.arange(steps, device=given.device).unsqueeze(1)
    begins: list[Tensor | None] = [None] * directions
    if resets is not None:
        cut_after = resets.roll(-1, 0) & (time < steps - 1)  # a slice of T - 1 would be one more size to compile for
        begins = [resets, cut_after]
    found = []
    for direction, begin in enumerate(begins[:directions]):
        mark = torch.zeros((), dtype=torch.uint8, device=given.device)
        if begin is not None:
            if direction == 1 and lengths is not None:
                begin = begin & (time + 1 < lengths)
            mark = begin.to(torch.uint8) * BEGINS
        if lengths is not None:
            mark = torch.where(time >= lengths, ENDED, mark).to(torch.uint8)
        found.append(mark)
    return torch.stack(found, dim=2)


def begins(
    marks: Tensor | None, lengths: Tensor | None, steps: int, batch: int, directions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which steps [T, B, D] go on from the initial state, and which from the reset state."""
    time = torch.arange(steps, device=device).unsqueeze(1).expand(steps, batch)
    last = time == (steps - 1 if lengths is None else lengths - 1)
    first = torch.stack([time == 0, last][:directions], dim=2)
    if marks is None:
        return first, torch.zeros_like(first)
    return first & (marks == 0), marks == BEGINS


class _OutOfRange:
    """Lengths on a device that were not within [0, T]: noted there, and told by ``check`` once the host can know."""

    def __init__(self) -> None:
        self.flags: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def note(self, bad: Tensor) -> None:
        if bad.device not in self.flags:
            seen = torch.zeros((), dtype=torch.bool, device=bad.device)
            self.flags[bad.device] = seen, torch.zeros((), dtype=torch.bool, pin_memory=bad.device.type == "cuda")
        seen, told = self.flags[bad.device]
        seen.logical_or_(bad)
        told.copy_(seen, non_blocking=True)

    def check(self) -> None:
        for device, (seen, told) in self.flags.items():
            if told:
                seen.zero_()
                told.zero_()
                raise RuntimeError(
                    f"lengths of an earlier call on {device} were not within [0, T]; they were taken as 0 or T. Clamp "
                    "them: lengths.clamp(0, T)"
                )


_out_of_range = _OutOfRange()
check = _out_of_range.check


@torch.library.custom_op("persistrnn::bounded_lengths", mutates_args=())
def bounded(lengths: Tensor, steps: int) -> Tensor:
    """Lengths within [0, steps]. Others are an error: at once on the CPU, else at the next call (``check``)."""
    bad = (lengths < 0) | (lengths > steps)
    if lengths.device.type == "cpu":
        if bad.any():
            raise ValueError(f"lengths must be within [0, T={steps}], got {lengths.tolist()}")
    else:
        _out_of_range.note(bad.any())
    return lengths.clamp(0, steps)


@bounded.register_fake
def _(lengths: Tensor, steps: int) -> Tensor:
    return torch.empty_like(lengths)


@bounded.register_vmap
def _(info: object, in_dims: tuple[int | None, None], lengths: Tensor, steps: int) -> tuple[Tensor, int | None]:
    return bounded(lengths, steps), in_dims[0]
