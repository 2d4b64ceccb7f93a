"""Interruptions lose nothing: atomic checkpoints, which show any damage, and signals that wait for a step."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch

from bench import UsageError
from bench.train.folder import written
from bench.train.options import OUT

CHECKPOINT = "checkpoint.pt"
MARK, SUM = b"sha256:", 32  # what follows torch's archive in the file: the mark and as many bytes of checksum


class Stopped(Exception):
    """SIGINT or SIGTERM arrived, and everything up to `step` is saved in `folder`."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step:,}; everything is saved in {folder}.")
        self.number = number


class Signals:
    """Inside `with Signals() as signals`, SIGINT and SIGTERM only set `signals.received` to their number."""

    def __enter__(self) -> Signals:
        self.received = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Summed:
    """A file to be written, with the checksum of what was: for torch.save."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes the checkpoint whole or not at all, whenever the process is killed; after its last byte, its checksum.

    Raises:
        UsageError: it cannot be written, as on a full disk; the checkpoint before it stays
    """
    unfinished = folder / f"{CHECKPOINT}.tmp"
    again = ", go on from the checkpoint before with --resume" if exists(folder) else ""
    with written(folder, f"make room there{again}; or "):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                summed = Summed(file)
                torch.save(content, summed)
                file.write(MARK + summed.sum.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, folder / CHECKPOINT)
        finally:
            unfinished.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    return os.path.exists(folder / CHECKPOINT)  # False as well where it may not be looked for


def check_sum(path: Path) -> None:
    """Raises ValueError unless the file is, byte for byte, as `save` wrote it."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - len(MARK) - SUM
        found = hashlib.sha256()
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            found.update(part)
            left -= len(part)
        end = file.read()
    if left or not end.startswith(MARK):
        raise ValueError("no checksum at its end: it is cut short, or another program or version wrote it")
    if end != MARK + found.digest():
        raise ValueError("its checksum differs: bytes of it have changed")


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`, its tensors on the CPU; None where there is none.

    Raises:
        UsageError: a file that is not as `save` wrote it, or that holds no run
    """
    path = folder / CHECKPOINT
    if not exists(folder):
        return None
    try:
        check_sum(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except Exception as error:  # of many kinds, as torch meets an unknown content here or there
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"{path} is no checkpoint that can be read ({type(error).__name__}: {said}): set it aside with "
            f"--overwrite, or choose another folder with {OUT}"
        ) from error
    return content


def set_aside(folder: Path) -> Path | None:
    """Renames the checkpoint, in place of the one set aside before it; returns its new path."""
    if not exists(folder):
        return None
    return (folder / CHECKPOINT).replace(folder / f"previous-{CHECKPOINT}")
