"""torch.export for every T and B: strict and not, in all save modes, on both paths; saved and loaded."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import persistrnn

ROOT = Path(__file__).resolve().parents[2]
INPUT, HIDDEN = 3, 4


class Cut(nn.Module):
    """With lengths or a mask, by name."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor, cut: Tensor) -> Any:
        return self.layer(x, **{self.name: cut})


def exported(model: nn.Module, *given: Tensor, strict: bool) -> torch.export.ExportedProgram:
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    dynamic = [{0: steps, 1: batch}, {0: batch} if len(given) > 1 and given[1].dim() == 1 else {0: steps, 1: batch}]
    return torch.export.export(model, given, dynamic_shapes=tuple(dynamic[: len(given)]), strict=strict)


def again(program: torch.export.ExportedProgram) -> Any:
    """Saved and loaded."""
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    ("make", "save", "strict"),
    [
        (persistrnn.LSTM, "gates", True), (persistrnn.GRU, "gates", False), (persistrnn.LSTM, "state", False),
        (persistrnn.RNN, "state", True), (persistrnn.LSTM, "checkpoint", True), (persistrnn.GRU, "checkpoint", False),
    ],
)  # fmt: skip
def test_on_torch_s_path(make: Any, save: Any, strict: bool) -> None:
    layer = make(INPUT, HIDDEN, 2, save=save, backend="torch")
    program = again(exported(layer, torch.randn(4, 3, INPUT), strict=strict))
    for T, B in ((70, 2), (2, 5)):  # more than a chunk, and less
        x = torch.randn(T, B, INPUT)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("name", ["lengths", "mask", "resets"])
@pytest.mark.parametrize("make", [persistrnn.GRU, persistrnn.SLSTM])
def test_with_cuts(make: Any, name: str) -> None:
    def given(T: int, B: int) -> tuple[Tensor, Tensor]:
        cut = torch.arange(1, B + 1).clamp(max=T) if name == "lengths" else torch.rand(T, B) < 0.5
        return torch.randn(T, B, INPUT), cut

    model = Cut(make(INPUT, HIDDEN), name)
    program = again(exported(model, *given(4, 3), strict=False))
    for T, B in ((7, 2), (2, 5)):
        tensors = given(T, B)
        torch.testing.assert_close(program(*tensors), model(*tensors))


def test_loads_where_persistrnn_is_imported_and_else_names_it(tmp_path: Path) -> None:
    torch.export.save(
        torch.export.export(persistrnn.GRU(INPUT, HIDDEN), (torch.ones(4, 2, INPUT),)), tmp_path / "p.pt2"
    )
    code = """
        import sys, torch
        try:
            torch.export.load("p.pt2").module()(torch.ones(4, 2, 3))
        except RuntimeError:
            print("refused")
        sys.path.append(sys.argv[1])
        import persistrnn
        print(torch.export.load("p.pt2").module()(torch.ones(4, 2, 3))[0].shape)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = [sys.executable, "-c", textwrap.dedent(code), str(ROOT)]
    found = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["refused", "torch.Size([4, 2, 4])"], found.stderr
    assert "failed to resolve torch.ops.persistrnn.torch_layer" in found.stderr  # in torch's own log
