"""Tagging of long signals: which exercise does a person do, at each of ten thousand steps of a smartwatch's sensors?

The package seglearn ships the recordings: six channels (acceleration in g, rate of rotation in rad/s, three axes each),
50 steps a second; ten people, each with seven exercises on either arm, one exercise in a recording of about 35 s (Burns
et al. 2018, arXiv:1802.01489). A session is one person's recordings joined in random order, each cut to a random
stretch. `Tagger` reads it both ways, and is asked about people that it has never seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from bench import UsageError
from bench.train import command
from bench.train.batches import NO_TARGET
from bench.train.checkpoint import write_text
from bench.train.layers import map_state, recurrent, run_padded
from bench.train.options import Settings, absolute, number, option
from bench.train.progress import bar
from bench.train.workload import Metric, Piece, Workload

SESSIONS = 4  # of each held-out person
FILE = "data/watch_dataset.npy"  # within seglearn, which need not be imported (it would import scikit-learn)


@dataclass(frozen=True, kw_only=True)
class SignalSettings(Settings):
    hidden: int = 32
    batch: int = 4
    steps: int = 250
    learning_rate: float = 1e-2
    sequence: int = option(
        10_000, "steps of a session; it ends with the recording that reaches them", type=number(int, 1)
    )
    stretch: int = option(2000, "the most steps that are taken of a recording", type=number(int, 1))
    held_out: int = option(2, "people who are kept for the test, the last ones", type=number(int, 1))
    recordings: str = option(
        None,
        "a .npy file of the form of seglearn's (default: seglearn's), a pickle: take only one that you trust",
        type=absolute,
        metavar="FILE",
    )

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return super().defaults(given) | ({} if given.get("recordings") else {"recordings": str(shipped())})


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


def run_rows(layer: nn.Module, x: Tensor, lengths: Tensor, state: Any) -> tuple[Tensor, Any]:
    """`run_padded`. On torch's own kernels of a CPU every row is a call of its own, for both arms: padded or packed
    rows go step by step there, and their backward takes time that grows with T squared."""
    if x.device.type != "cpu" or getattr(layer, "backend", None) == "persistent":
        return run_padded(layer, x, lengths, state)
    # oneDNN keeps a primitive for each length, up to ONEDNN_PRIMITIVE_CACHE_CAPACITY (1024): most of the memory.
    y, states = [], []
    for row, length in enumerate(lengths.tolist()):
        only = slice(row, row + 1)
        found, after = layer(x[:length, only], map_state(state, lambda part, only=only: part[:, only].contiguous()))
        y.append(found[:, 0])
        states.append(after)
    if isinstance(states[0], tuple):
        return pad_sequence(y), tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
    return pad_sequence(y), torch.cat(states, 1)


class Tagger(nn.Module):
    """Tags every step: recurrent layers that read both ways, linear."""

    def __init__(self, settings: SignalSettings, backend: str, channels: int, tags: int) -> None:
        super().__init__()
        self.rnn = recurrent(settings, backend, channels, bidirectional=True)
        self.linear = nn.Linear(2 * settings.hidden, tags)

    def forward(self, signals: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """(T, B, channels) signals, the longest of T steps, and their lengths (B,) -> (T, B, tags) logits, and the
        state after them."""
        y, state = run_rows(self.rnn, signals, lengths, state)
        return self.linear(y), state


class Tagging(Workload):
    name = "signals"
    description = "Trains a tagger of long sensor signals: which exercise is done at each step."
    settings_type = SignalSettings
    small = {"sequence": 24, "stretch": 10, "hidden": 8}  # noqa: RUF012
    loss_unit = "nats/step"
    unit = "steps"
    metrics = (
        Metric("of the held-out steps tagged right", "higher"),
        Metric("of the steps of the worst exercise", "higher"),
        Metric("nats per held-out step", "lower"),
    )

    settings: SignalSettings

    def __init__(self, settings: SignalSettings) -> None:
        self.settings = settings
        self.sequence = settings.sequence
        self.data = f"--recordings {settings.recordings}"
        self.recordings: Recordings = load_recordings(Path(settings.recordings))
        self.fingerprint = self.recordings.fingerprint
        subjects = self.recordings.subjects
        if settings.held_out >= len(subjects):
            raise UsageError(
                f"--held-out {settings.held_out} given, but {self.data} has {len(subjects)} people: at least one must "
                f"be left to train on; allowed is 1 to {len(subjects) - 1}"
            )
        self.train, self.held_out = subjects[: -settings.held_out], subjects[-settings.held_out :]
        seen = torch.cat([recording.signal for subject in self.train for recording in self.of(subject)])
        self.mean, self.scale = seen.mean(0), seen.std(0).clamp(min=1e-6)

    def of(self, subject: int) -> list[Recording]:
        return [recording for recording in self.recordings.all if recording.subject == subject]

    def describe(self) -> str:
        every = self.recordings.all
        return (
            f"{len(every)} recordings of {sum(len(recording.signal) for recording in every):,} steps, "
            f"{self.recordings.channels} channels, {len(self.recordings.exercises)} exercises, by {len(self.train)} "
            f"people to train on and {len(self.held_out)} held out\n"
            f"joined to sessions of {self.settings.sequence:,} steps or a few more"
        )

    def model(self, backend: str) -> Tagger:
        return Tagger(self.settings, backend, self.recordings.channels, len(self.recordings.exercises))

    def session(self, subjects: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One of these people's recordings, joined until there are enough steps: a signal (T, channels) and its tags
        (T,). All of the person's recordings come in random order, then all again in another."""
        recordings = self.of(subjects[int(torch.randint(len(subjects), (), generator=generator))])
        parts, tags, steps = [], [], 0
        while steps < self.settings.sequence:
            for index in torch.randperm(len(recordings), generator=generator).tolist():
                signal = recordings[index].signal
                length = min(len(signal), self.settings.stretch)
                first = int(torch.randint(len(signal) - length + 1, (), generator=generator))
                parts.append(signal[first : first + length])
                tags.append(torch.full((length,), recordings[index].exercise))
                steps += length
                if steps >= self.settings.sequence:
                    break
        return (torch.cat(parts) - self.mean) / self.scale, torch.cat(tags)

    def cut(self, sessions: Sequence[tuple[Tensor, Tensor]]) -> list[Piece]:
        """Sessions side by side, in pieces of time: signals (T, B, channels), lengths (B,) and tags (T, B). A session
        that has ended goes on as one step without a tag."""
        signals = pad_sequence([signal for signal, _ in sessions])
        tags = pad_sequence([tags for _, tags in sessions], padding_value=NO_TARGET)
        ends = torch.tensor([len(signal) for signal, _ in sessions])
        size = self.settings.truncate or len(signals)
        pieces = []
        for first in range(0, len(signals), size):
            part = slice(first, first + size)
            lengths = (ends - first).clamp(1, len(signals[part]))
            pieces.append(Piece((signals[part], lengths, tags[part]), int((tags[part] != NO_TARGET).sum())))
        return pieces

    def pieces(self, step: int, rows: slice) -> list[Piece]:
        sessions = []
        for row in range(rows.start, rows.stop):
            number = (self.settings.seed * 1_000_003 + step) * self.settings.batch + row
            sessions.append(self.session(self.train, torch.Generator().manual_seed(number % 2**63)))
        return self.cut(sessions)

    def loss(self, model: nn.Module, tensors: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Any]:
        signals, lengths, tags = tensors
        logits, state = model(signals, lengths, state)
        total = cross_entropy(logits.float().flatten(0, 1), tags.flatten(), ignore_index=NO_TARGET, reduction="sum")
        return total, map_state(state, forward_only)

    def tagged(self, model: nn.Module, session: tuple[Tensor, Tensor]) -> Tensor:
        """The log-probabilities (T, tags) of a session's tags, on the CPU; read as in training, piece by piece."""
        device, state, found = next(model.parameters()).device, None, []
        for piece in self.cut([session]):
            signals, lengths, _ = (tensor.to(device) for tensor in piece.tensors)
            logits, state = model(signals, lengths, state)
            state = map_state(state, forward_only)
            found.append(logits[:, 0].float().log_softmax(-1).cpu())
        return torch.cat(found)

    def tests(self) -> list[tuple[Tensor, Tensor]]:
        """Sessions of the held-out people, the same at every call and for every seed."""
        generator = torch.Generator().manual_seed(0)
        return [self.session([subject], generator) for subject in self.held_out for _ in range(SESSIONS)]

    def evaluate(self, model: nn.Module) -> list[float]:
        right = torch.zeros(len(self.recordings.exercises), dtype=torch.int64)
        count, loss = right.clone(), 0.0
        for session in bar(self.tests(), "held-out sessions"):
            found, tags = self.tagged(model, session), session[1]
            count += tags.bincount(minlength=len(count))
            right += tags[found.argmax(-1) == tags].bincount(minlength=len(count))
            loss -= found.gather(1, tags[:, None]).double().sum().item()
        shares = right[count > 0] / count[count > 0]
        return [int(right.sum()) / int(count.sum()), shares.min().item(), loss / int(count.sum())]

    def finish(self, model: nn.Module, job: Namespace, folder: Path) -> None:
        """One held-out session, exercise by exercise."""
        session = self.tests()[0]
        found, (_, tags) = self.tagged(model, session).argmax(-1), session
        names = self.recordings.exercises
        changes = [0, *((tags[1:] != tags[:-1]).nonzero()[:, 0] + 1).tolist(), len(tags)]
        lines = []
        for first, end in pairwise(changes):
            tag, most = int(tags[first]), int(found[first:end].mode().values)
            share = (found[first:end] == tag).float().mean().item()
            lines.append(f"{first:>7,} to {end:>7,}  {names[tag]:<6}  {share:>6.1%} right, mostly tagged {names[most]}")
        path = write_text(folder, "session.txt", "\n".join(lines) + "\n")
        print(f"The steps of a held-out session (in {path}):\n\n" + "\n".join(lines) + "\n")


def forward_only(state: Tensor) -> Tensor:
    """The state (layers*2, B, H) that the next piece begins with: the direction that reads backwards begins anew."""
    state = state.clone()
    state[1::2] = 0
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main(Tagging, arguments)


if __name__ == "__main__":
    sys.exit(main())
