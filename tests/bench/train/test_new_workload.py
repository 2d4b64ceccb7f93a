"""A workload is added by the steps in CONTRIBUTING.md, and exact resume comes with the loop."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import die_and_resume
from torch import Tensor, nn

from bench.train import command, layers
from bench.train.options import Settings, number, option
from bench.train.workload import Piece, Workload


@dataclass(frozen=True, kw_only=True)
class EchoSettings(Settings):
    delay: int = option(2, "steps until a number comes back", type=number(int, 1))


class Model(nn.Module):
    def __init__(self, settings: EchoSettings, backend: str) -> None:
        super().__init__()
        self.recurrent = layers.recurrent(settings, backend, 1)
        self.out = nn.Linear(settings.hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.recurrent(x)[0])
        return found


class Echo(Workload):
    """Says what it heard some steps ago."""

    name, description, settings_type = "echo", "repeats a signal with a delay", EchoSettings
    metrics, unit, sequence, data, summary = ("mean square error",), "numbers", 12, "noise", "noise, without end"
    fingerprint = hashlib.sha256(b"echo").hexdigest()

    def __init__(self, settings: EchoSettings) -> None:
        self.settings = settings

    def model(self, backend: str) -> nn.Module:
        return Model(self.settings, backend)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.sequence, self.settings.batch, 1, generator=torch.Generator().manual_seed(seed))
        return x, torch.cat([torch.zeros(self.settings.delay, *x.shape[1:]), x])[: len(x)]

    def pieces(self, step: int, rows: slice) -> list[Piece]:
        x, wanted = (t[:, rows] for t in self.batch(step))
        return [Piece((x, wanted), wanted.numel())]

    def loss(self, model: nn.Module, tensors: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Any]:
        x, wanted = tensors
        return (model(x) - wanted).square().sum().float(), None

    def evaluate(self, model: nn.Module) -> list[float]:
        x, wanted = self.batch(-1)
        return [(model(x) - wanted).square().mean().item()]


def test_it_trains_and_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--device=cpu", "--hidden=8", "--batch=4", "--steps=12", "--learning-rate=0.01"]
    die_and_resume(partial(command.main, Echo), options, tmp_path, monkeypatch)
