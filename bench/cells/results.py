"""What the comparison of the cells found: one JSON file, written and read here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.report.results import Provenance
from persistrnn.kernels.planner.typed_json import Count, Positive, Words, load
from persistrnn.profiling.page import write

RESULTS = "results.json"


@dataclass(frozen=True)
class Protocol:
    """What all cells have in common. parameters: of the whole model, as near as a hidden size comes to it; text: the
    folder's sha256; trained, held_out: bytes of it. The others are the language model's settings."""

    parameters: Count
    steps: Count
    batch: Count
    sequence: Count
    layers: Count
    embedding: Count
    learning_rate: Positive
    seed: int
    text: Words
    trained: Count
    held_out: Count


@dataclass(frozen=True)
class Row:
    """One cell. parameters: of its model; path: what ran it; quality: bits per byte of the held-out files at the end.

    losses: bits per byte in training, each the mean of `every` steps, the last of what is left.
    """

    cell: Words
    heads: Count
    hidden: Count
    parameters: Count
    path: Words
    quality: Positive
    every: Count
    losses: list[float]

    @property
    def name(self) -> str:
        return self.cell + (f", {self.heads} heads" if self.heads > 1 else "")

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Steps, each in the middle of those whose mean it has, and bits per byte."""
        return [(n + 0.5) * self.every for n in range(len(self.losses))], self.losses


@dataclass(frozen=True)
class Comparison:
    provenance: Provenance
    protocol: Protocol
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        write(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def best_first(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: row.quality)


def read(path: Path) -> Comparison:
    """Raises OSError or ValueError: it cannot be read, or is no such file."""
    return load(Comparison, path)
