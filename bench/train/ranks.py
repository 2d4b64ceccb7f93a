"""The processes that train one model together, as torchrun starts them; a process alone is rank 0 of 1.

Numbers that all must agree on pass through the host (gloo), gradients through DistributedDataParallel.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bench import UsageError

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def connected() -> Iterator[None]:
    """Inside, the processes that torchrun started can reach each other. Once in a process."""
    if world() == 1:
        yield
        return
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    # A process that waits longer for another raises; for a dead one it does at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=30))
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


def of_all(mine: T) -> list[T]:
    """Every rank's object, in the order of the ranks, on each of them."""
    if world() == 1:
        return [mine]
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, mine)
    return everyone


def by_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it, or the error of the user or of a file that it raises there:
    on every rank."""
    if world() == 1:
        return work()
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = work()
        except (UsageError, OSError) as error:
            result[1] = error
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def say(text: str) -> None:
    """Prints it once, from rank 0."""
    if rank() == 0:
        print(text, flush=True)
