"""Interruptions lose nothing: atomic checkpoints, and signals that wait for the running step to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench import UsageError

CHECKPOINT = "checkpoint.pt"


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


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes the checkpoint whole or not at all, whenever the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{CHECKPOINT}.tmp"
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / CHECKPOINT)


def exists(folder: Path) -> bool:
    return (folder / CHECKPOINT).exists()


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`, its tensors on the CPU; None where there is none.

    Raises:
        UsageError: a file that torch cannot read
    """
    if not exists(folder):
        return None
    try:
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, as the file is torn here or there
        said = next(iter(str(error).splitlines()), "")
        raise UsageError(
            f"{folder / CHECKPOINT} is no checkpoint that torch can read ({type(error).__name__}: {said}): remove "
            "it, or name another folder with --output"
        ) from error


def set_aside(folder: Path) -> Path | None:
    """Renames the checkpoint, in place of the one set aside before it; returns its new path."""
    if not exists(folder):
        return None
    return (folder / CHECKPOINT).replace(folder / f"previous-{CHECKPOINT}")
