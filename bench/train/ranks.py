"""The processes that train one model together, as torchrun starts them; a process alone is rank 0 of 1.

Numbers that all must agree on pass through the host (gloo), gradients through DistributedDataParallel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench import UsageError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # a process that waits longer for another raises; for a dead one it does at once


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def neighbours() -> int:
    """The processes on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


@contextmanager
def connected() -> Iterator[None]:
    """Inside, the processes that torchrun started can reach each other. Once in a process."""
    if world() == 1:
        yield
        return
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        # gloo alone is left to the end of the process: destroying it joins its threads (a process hung there, 1 in 50).
        if gpu:
            dist.destroy_process_group()


def device(name: str) -> torch.device:
    """This process's device: "cuda" is the GPU of its own, or torch's current one; with its number in either case."""
    if name == "cuda":
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world() > 1 else torch.cuda.current_device())
    return torch.device(name)


def rows(batch: int) -> slice:
    """This process's part of range(batch): equal parts, to one row."""
    return slice(batch * rank() // world(), batch * (rank() + 1) // world())


def share(values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, in the order of the ranks; as many from each."""
    mine = torch.tensor(values, dtype=torch.float64)
    if world() == 1:
        return [mine.tolist()]
    everyone = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(everyone, mine)
    return [theirs.tolist() for theirs in everyone]


def total(value: float) -> float:
    """The sum over the ranks, the same on each."""
    return sum(theirs[0] for theirs in share([value]))


def gather(thing: Any) -> list[Any]:
    """Every rank's object, on rank 0; an empty list elsewhere."""
    if world() == 1:
        return [thing]
    things: list[Any] = [None] * world() if rank() == 0 else []
    dist.gather_object(thing, things or None)
    return things


def from_first(thing: Any) -> Any:
    """Rank 0's object."""
    if world() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things)
    return things[0]


def by_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it, or the UsageError that it raises there: on every rank."""
    result, refusal = None, None
    if rank() == 0:
        try:
            result = work()
        except UsageError as error:
            if world() == 1:
                raise
            refusal = str(error)
    result, refusal = from_first((result, refusal))
    if refusal is not None:
        raise UsageError(refusal)
    return result


def wrap(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over the ranks in every backward."""
    return DistributedDataParallel(model) if world() > 1 else model


def averaged(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Inside, a backward averages the gradients if `now`; else they add up in each process until it does."""
    return nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync()


def say(text: str) -> None:
    """Prints it once, from rank 0."""
    if rank() == 0:
        print(text, flush=True)
