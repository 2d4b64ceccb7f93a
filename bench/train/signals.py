"""Tagging of long signals: which exercise does a person do, at each of ten thousand steps of a smartwatch's sensors?

The package seglearn ships the recordings: six channels (acceleration in g, rate of rotation in rad/s, three axes each),
50 steps a second; ten people, each with seven exercises on either arm, one exercise in a recording of about 35 s (Burns
et al. 2018, arXiv:1802.01489). A session is one person's recordings joined in random order, each cut to a random
stretch. `Tagger` reads it both ways, and is asked about people that it has never seen.
"""

import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench import UsageError
from bench.train import command
from bench.train.batches import NO_TARGET
from bench.train.layers import map_state, recurrent, run_padded
from bench.train.options import Backend, Settings, absolute, number, option
from bench.train.progress import bar
from bench.train.workload import Piece, Workload

SESSIONS = 4  # of each held-out person


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


class Recording(NamedTuple):
    signal: Tensor  # (T, channels) float32
    exercise: int
    subject: int


def shipped() -> Path:
    """The file in the installed package seglearn, which need not be imported (it would import scikit-learn)."""
    package = importlib.util.find_spec("seglearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(name="seglearn")
    return Path(package.submodule_search_locations[0]) / "data/watch_dataset.npy"


def load_recordings(file: Path) -> tuple[list[Recording], list[str], str]:
    """Reads a file like seglearn's: a NumPy object array that holds a dict with X (signals, [T, channels] each), y (the
    exercise of each, 0 and up), y_labels (the exercises' names) and subject. It is a pickle: reading it runs what its
    maker put in. Returns the recordings, the exercises' names and a sha256 of all of it."""
    import numpy  # only here: torch alone does not need it

    try:
        content = numpy.load(file, allow_pickle=True).item()
        names = list(map(str, content["y_labels"]))
        every = [
            Recording(torch.tensor(signal, dtype=torch.float32), int(exercise), int(subject))
            for signal, exercise, subject in zip(content["X"], content["y"], content["subject"], strict=True)
        ]
        joined = torch.cat([recording.signal for recording in every])  # which must have as many channels
        if joined.ndim != 2 or not joined.isfinite().all() or not all(len(recording.signal) for recording in every):
            raise ValueError("each signal is [T, channels], at least one step, finite")
        if not {recording.exercise for recording in every} <= set(range(len(names))):
            raise ValueError(f"an exercise is none of 0 to {len(names) - 1}")
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"--recordings {file} cannot be read ({error!r}): allowed is a .npy file of a dict with X, y, y_labels and "
            "subject, as seglearn ships it; leave --recordings out to take that one"
        ) from error
    digest = hashlib.sha256(repr(names).encode())
    for recording in every:
        digest.update(repr((recording.exercise, recording.subject)).encode())
        digest.update(recording.signal.numpy().tobytes())
    return every, names, digest.hexdigest()


def rows_of(only: slice, state: Tensor) -> Tensor:
    return state[:, only].contiguous()


def run_rows(layer: nn.Module, x: Tensor, lengths: Tensor, state: Any) -> tuple[Tensor, Any]:
    """`run_padded`. On torch's own kernels of a CPU every row is a call of its own, for both arms: padded or packed
    rows go step by step there, and their backward takes time that grows with T squared."""
    if x.device.type != "cpu" or getattr(layer, "backend", None) == "persistent":
        return run_padded(layer, x, lengths, state)
    # oneDNN keeps a primitive for each length, up to ONEDNN_PRIMITIVE_CACHE_CAPACITY (1024): most of the memory.
    y, states = [], []
    for row, length in enumerate(lengths.tolist()):
        only = slice(row, row + 1)
        found, after = layer(x[:length, only], map_state(state, partial(rows_of, only)))
        y.append(found[:, 0])
        states.append(after)
    if isinstance(states[0], tuple):
        return pad_sequence(y), tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
    return pad_sequence(y), torch.cat(states, 1)


class Tagger(nn.Module):
    """Tags every step: recurrent layers that read both ways, linear."""

    def __init__(self, settings: SignalSettings, backend: Backend, channels: int, tags: int) -> None:
        super().__init__()
        self.rnn = recurrent(settings, backend, channels, bidirectional=True)
        self.linear = nn.Linear(2 * settings.hidden, tags)

    def forward(self, signals: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """(T, B, channels) signals, the longest of T steps, and their lengths (B,) -> (T, B, tags) logits, and the
        state that the next piece of time begins with."""
        y, state = run_rows(self.rnn, signals, lengths, state)
        return self.linear(y), map_state(state, forward_only)


class Tagging(Workload):
    name = "signals"
    description = "Trains a tagger of long sensor signals: which exercise is done at each step."
    settings_type = SignalSettings
    loss_unit = "nats/step"
    unit = "steps"
    metrics = (
        "of the held-out steps tagged right",
        "of the steps of the worst exercise",
        "nats per held-out step (lower is better)",
    )

    settings: SignalSettings

    def __init__(self, settings: SignalSettings) -> None:
        self.settings = settings
        self.sequence = settings.sequence
        self.data = f"--recordings {settings.recordings}"
        self.recordings, self.exercises, self.fingerprint = load_recordings(Path(settings.recordings))
        subjects = sorted({recording.subject for recording in self.recordings})
        if settings.held_out >= len(subjects):
            raise UsageError(
                f"--held-out {settings.held_out} given, but {self.data} has {len(subjects)} people: at least one must "
                f"be left to train on; allowed is 1 to {len(subjects) - 1}"
            )
        self.summary = (
            f"{len(self.recordings)} recordings of {len(self.exercises)} exercises, by "
            f"{len(subjects) - settings.held_out} people to train on and {settings.held_out} held out"
        )
        self.train, self.held_out = subjects[: -settings.held_out], subjects[-settings.held_out :]
        seen = torch.cat([recording.signal for subject in self.train for recording in self.of(subject)])
        self.mean, self.scale = seen.mean(0), seen.std(0).clamp(min=1e-6)

    def of(self, subject: int) -> list[Recording]:
        return [recording for recording in self.recordings if recording.subject == subject]

    def model(self, backend: Backend) -> Tagger:
        return Tagger(self.settings, backend, len(self.mean), len(self.exercises))

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
            pieces.append(Piece.of(signals[part], lengths, tags[part]))
        return pieces

    def pieces(self, step: int, rows: slice) -> list[Piece]:
        sessions = []
        for row in range(rows.start, rows.stop):
            number = (self.settings.seed * 1_000_003 + step) * self.settings.batch + row
            sessions.append(self.session(self.train, torch.Generator().manual_seed(number % 2**63)))
        return self.cut(sessions)

    def tagged(self, model: nn.Module, session: tuple[Tensor, Tensor]) -> Tensor:
        """The log-probabilities (T, tags) of a session's tags, on the CPU; read as in training, piece by piece."""
        device, state, found = next(model.parameters()).device, None, []
        for piece in self.cut([session]):
            signals, lengths, _ = piece.on(device)
            logits, state = model(signals, lengths, state)
            found.append(logits[:, 0].float().log_softmax(-1).cpu())
        return torch.cat(found)

    def tests(self) -> list[tuple[Tensor, Tensor]]:
        """Sessions of the held-out people, the same at every call and for every seed."""
        generator = torch.Generator().manual_seed(0)
        return [self.session([subject], generator) for subject in self.held_out for _ in range(SESSIONS)]

    def evaluate(self, model: nn.Module) -> list[float]:
        right = torch.zeros(len(self.exercises), dtype=torch.int64)
        count, loss = right.clone(), 0.0
        for session in bar(self.tests(), "held-out sessions"):
            found, tags = self.tagged(model, session), session[1]
            count += tags.bincount(minlength=len(count))
            right += tags[found.argmax(-1) == tags].bincount(minlength=len(count))
            loss -= found.gather(1, tags[:, None]).double().sum().item()
        shares = right[count > 0] / count[count > 0]
        return [int(right.sum()) / int(count.sum()), shares.min().item(), loss / int(count.sum())]


def forward_only(state: Tensor) -> Tensor:
    """The state (layers*2, B, H) that the next piece begins with: the direction that reads backwards begins anew."""
    state = state.clone()
    state[1::2] = 0
    return state


main = partial(command.main, Tagging)


if __name__ == "__main__":
    sys.exit(main())
