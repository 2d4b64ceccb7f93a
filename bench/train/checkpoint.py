"""What a kill must not harm: the folder of a run, which one run at a time holds, and the checkpoint in it."""

import fcntl
import hashlib
import io
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import UsageError
from bench.train import ranks

CHECKPOINT = "checkpoint.pt"
MARK = b"sha256:"  # follows torch's archive in the file, and then its checksum of 32 bytes
ANEW = "begin anew with --overwrite or another --output"


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM only add their number to the list."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is there and no other run gets it. Under torchrun rank 0 holds it for all. The lock is the
    kernel's and ends with the process, however that ends; the file stays, without a meaning."""
    with ExitStack() as stack:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{folder} is in use by another run: wait until it has ended, or choose another --output"
                ) from error

        ranks.by_first(lock)
        yield


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes the checkpoint whole or not at all: killed, or on a full disk, it leaves the one before. After its last
    byte stands its checksum."""
    archive = io.BytesIO()
    torch.save(content, archive)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{CHECKPOINT}.tmp"
    try:
        with unfinished.open("wb") as file:
            file.write(archive.getbuffer())
            file.write(MARK + hashlib.sha256(archive.getbuffer()).digest())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / CHECKPOINT)
    finally:
        unfinished.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    return os.path.exists(folder / CHECKPOINT)  # False as well where it may not be looked for


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`, its tensors on the CPU; None where there is none. It must be as `save` wrote it, byte
    for byte."""
    path = folder / CHECKPOINT
    if not exists(folder):
        return None
    try:
        data = path.read_bytes()
        archive, end = data[:-39], data[-39:]
        if not end.startswith(MARK):
            raise ValueError("no checksum at its end: it is cut short, or another program or version wrote it")
        if end != MARK + hashlib.sha256(archive).digest():
            raise ValueError("its checksum differs: bytes of it have changed")
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no checkpoint that can be read ({error}): {ANEW}") from error
    return content


def set_aside(folder: Path) -> Path | None:
    """Renames the checkpoint, in place of the one set aside before it; returns its new path."""
    if not exists(folder):
        return None
    return (folder / CHECKPOINT).replace(folder / f"previous-{CHECKPOINT}")
