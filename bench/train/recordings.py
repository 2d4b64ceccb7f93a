"""Recordings of a smartwatch's motion sensors while people exercise, as the package seglearn ships them.

Six channels (acceleration in g, rate of rotation in rad/s, three axes each), 50 steps a second; ten people, each with
seven exercises on either arm, one exercise in a recording of about 35 s (Burns et al. 2018, arXiv:1802.01489).
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import UsageError

FILE = "data/watch_dataset.npy"  # within seglearn, which need not be imported (it would import scikit-learn)


@dataclass(frozen=True)
class Recording:
    signal: Tensor  # (T, channels) float32
    exercise: int
    subject: int


@dataclass(frozen=True)
class Recordings:
    all: tuple[Recording, ...]
    exercises: tuple[str, ...]  # their names, by number
    channels: int
    fingerprint: str  # sha256 of signals, exercises and subjects

    @property
    def subjects(self) -> list[int]:
        return sorted({recording.subject for recording in self.all})


def shipped() -> Path:
    """The file in the installed package.

    Raises:
        UsageError: there is none
    """
    package = importlib.util.find_spec("seglearn")
    folders = package.submodule_search_locations if package is not None else None
    file = Path(folders[0]) / FILE if folders else None
    if file is None or not file.is_file():
        raise UsageError(
            "--recordings is not given, and seglearn, which ships the recordings of the default, is not installed: "
            "pip install 'persistrnn[signals]', or name a file of the same form"
        )
    return file


def load_recordings(file: Path) -> Recordings:
    """Reads a file like seglearn's: a NumPy object array that holds a dict with X (signals, [T, channels] each), y (the
    exercise of each, 0 and up), y_labels (the exercises' names) and subject.

    Such a file is a pickle: reading it runs what its maker put in.

    Raises:
        UsageError: a file of another form; NumPy is missing
    """
    try:
        content = read(file)
        every = tuple(
            Recording(torch.tensor(signal, dtype=torch.float32), int(exercise), int(subject))
            for signal, exercise, subject in zip(content["X"], content["y"], content["subject"], strict=True)
        )
        names = tuple(map(str, content["y_labels"]))
        shapes = {tuple(recording.signal.shape[1:]) for recording in every}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not all(len(r.signal) for r in every):
            raise ValueError("each signal is [T, channels] with the same channels and at least one step")
        if not all(recording.signal.isfinite().all() for recording in every):
            raise ValueError("a signal has values that are not finite")
        if not all(0 <= recording.exercise < len(names) for recording in every):
            raise ValueError(f"an exercise is none of 0 to {len(names) - 1}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"--recordings {file} cannot be read ({error!r}): allowed is a .npy file of a dict with X, y, y_labels and "
            "subject, as seglearn ships it; leave --recordings out to take that one"
        ) from error
    digest = hashlib.sha256(repr(names).encode())
    for recording in every:
        digest.update(repr((recording.exercise, recording.subject)).encode())
        digest.update(recording.signal.numpy().tobytes())
    return Recordings(every, names, shape[0], digest.hexdigest())


def read(file: Path) -> dict[str, Any]:
    try:
        import numpy  # only here: torch alone does not need it
    except ImportError as error:
        raise UsageError(
            f"--recordings {file}: NumPy reads it and is not installed: pip install 'persistrnn[signals]'"
        ) from error
    content: dict[str, Any] = numpy.load(file, allow_pickle=True).item()
    return content
