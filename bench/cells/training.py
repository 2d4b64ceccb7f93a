"""The language model with one cell after the other, each with as many parameters as the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import UsageError
from bench.cells.results import Row
from bench.train import layers
from bench.train.language_model import LanguageModel, LanguageModeling, TextSettings
from bench.train.loop import begin, look, train
from bench.train.ranks import say
from bench.train.text import Bytes

POINTS = 50  # of a training curve


class Which(NamedTuple):
    """A cell of `persistrnn.kernels.cells.BUILT_IN`, and its heads."""

    cell: str
    heads: int = 1

    def __str__(self) -> str:
        return self.cell + (f":{self.heads}" if self.heads > 1 else "")


def parameters(settings: TextSettings) -> int:
    """Of the whole model: embedding, recurrent layers, and the linear layer of the output."""
    with torch.device("meta"):
        model = LanguageModel(settings, "auto", len(Bytes()))
    return sum(parameter.numel() for parameter in model.parameters())


def sized(settings: TextSettings, wanted: int) -> TextSettings:
    """The settings with the hidden size, a multiple of their heads, whose model comes nearest to `wanted` parameters.

    Raises:
        UsageError: even the smallest has more
    """

    def of(units: int) -> TextSettings:
        return replace(settings, hidden=units * settings.heads)

    if (least := parameters(of(1))) > wanted:
        raise UsageError(
            f"--parameters {wanted} given: the smallest model of {Which(settings.cell, settings.heads)} has {least:,}; "
            "allowed is as many or more"
        )
    low, high = 1, 2  # below or equal, and above
    while parameters(of(high)) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(of(middle)) <= wanted else (low, middle)
    return min(of(low), of(high), key=lambda each: abs(parameters(each) - wanted))


def rows(
    which: Sequence[Which], given: dict[str, Any], wanted: int, folder: Path, overwrite: bool, seconds: float
) -> Iterator[Row]:
    """Trains each cell in a folder of its own, from its checkpoint where there is one, unless `overwrite`.

    given: the language model's settings but for the cell; wanted: parameters; seconds: between two checkpoints.

    Raises:
        UsageError: a folder holds a run with other settings
        KeyboardInterrupt: with the number of a signal that stopped it; what was trained is saved
    """
    for each in which:
        settings = sized(TextSettings.complete({**given, "cell": each.cell, "heads": each.heads}), wanted)
        own, chosen = folder / str(each).replace(":", "-"), {**given, **each._asdict(), "hidden": settings.hidden}
        say(f"\n{each}: hidden size {settings.hidden}, {parameters(settings):,} parameters")
        run = begin(LanguageModeling, look(LanguageModeling, own, True, overwrite), chosen, own)
        train(run, own, seconds)
        if run.quality is None:
            run.measure(own)
        assert run.quality is not None
        yield row(each, settings, layers.path(run.model), run.quality[0], run.losses)


def row(each: Which, settings: TextSettings, path: str, quality: float, losses: Sequence[float]) -> Row:
    every = -(-len(losses) // POINTS)
    parts = [losses[first : first + every] for first in range(0, len(losses), every)]
    means = [round(sum(part) / len(part), 4) for part in parts]
    return Row(*each, settings.hidden, parameters(settings), path, round(quality, 4), every, means)
