"""What a step's process is asked, and what it leaves: a journal of entries, and the item that is running.

An entry is a line of the journal as soon as there is one. In JOURNAL.running stand the item that is running ("": none)
and, below it, those that are left: whoever has to kill the process knows where it hung.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.report import results
from bench.report.results import Arm, Dtype, Entry, Results
from persistrnn.kernels.planner.hardware import Hardware, named
from persistrnn.profiling.page import write

LISTED = 20  # of what is left


@dataclass(frozen=True)
class Task:
    """One process of a step.

    Attributes:
        journal: the file that it writes.
        until: ``time.monotonic()`` from which on it begins no other item.
        done: names of items that it leaves out.
        red: the smoke case whose variants are run.
        rehearse: the device for which it predicts, on a CPU; "": it runs on a GPU.
        minutes: of the whole step. suites, dtypes, arms: of the race.
    """

    step: str
    journal: str
    until: float
    done: frozenset[str] = frozenset()
    red: str = ""
    rehearse: str = ""
    minutes: float = 8.0
    suites: Sequence[str] = ()
    dtypes: Sequence[Dtype] = ()
    arms: Sequence[Arm] = ()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else torch.device("cuda", torch.cuda.current_device())

    @property
    def hardware(self) -> Hardware | None:
        """The device for which a rehearsal predicts."""
        return named(self.rehearse) if self.rehearse else None

    @property
    def file(self) -> Path:
        """Where the process finds this."""
        return Path(self.journal).with_suffix(".task")

    @property
    def running(self) -> Path:
        return Path(self.journal).with_suffix(".running")

    def save(self) -> None:
        self.file.write_text(json.dumps(asdict(self), default=sorted))

    def late(self) -> bool:
        return time.monotonic() >= self.until

    def name(self, item: str) -> str:
        """Of an item, among those of all steps."""
        return f"{self.step}: {item}"

    def add(self, entry: Entry) -> None:
        """In one write, so that a kill cuts a line and never mixes two."""
        with Path(self.journal).open("ab", buffering=0) as file:
            file.write(results.line(entry).encode())

    def mark(self, item: str, left: Sequence[str]) -> None:
        """Say what is running and what is left; nothing of both: the step is through."""
        if not item and not left:
            self.running.unlink(missing_ok=True)
            return
        # The race has thousands of them.
        more = [f"and {len(left) - LISTED} more"] if len(left) > LISTED else []
        write(self.running, "\n".join([item, *left[:LISTED], *more]))


def load(file: Path) -> Task:
    given = json.loads(file.read_text())
    return Task(**given | {"done": frozenset(given["done"])})


def outcomes(found: Results) -> dict[str, bool]:
    """Whether what ran is green, by name; the last time counts, and of a test that includes its teardown."""
    return {entry.name: entry.ok for entry in found.stress}
