"""FLOPs by torch's own counter, exact: 2*T*B*G*H*(I + H) forward, twice that backward, and what runs again."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import persistrnn

ROOT = Path(__file__).resolve().parents[2]
T, B, I, H = 3, 2, 3, 4


def counted(layer: Any, x: torch.Tensor) -> tuple[int, int]:
    """Forward and backward."""
    with FlopCounterMode(display=False) as forward:
        y = layer(x)[0]
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def products(layer: Any) -> int:
    """Of one forward: with each matrix once per row and step."""
    return 2 * T * B * sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)


@pytest.mark.parametrize("make", [persistrnn.LSTM, persistrnn.GRU, persistrnn.RNN, persistrnn.MGU])
def test_on_torch_s_path(make: Any) -> None:
    layer, x = make(I, H, 2, bidirectional=True), torch.randn(T, B, I, requires_grad=True)
    assert counted(layer, x) == (products(layer), 2 * products(layer))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"heads": 2}], ids=str)
def test_on_the_kernels(options: dict[str, Any]) -> None:
    make = persistrnn.LSTM if options.get("heads") else persistrnn.GRU
    layer = make(I, H, backend="persistent", **options)
    x = torch.randn(T, B, I, requires_grad=True)
    assert counted(layer, x) == (products(layer), 2 * products(layer))


@pytest.mark.interpreter
@pytest.mark.parametrize("save", ["state", "checkpoint"])
def test_in_chunks_what_runs_again_counts_again(save: Any) -> None:
    layer = persistrnn.PeepholeLSTM(I, H, backend="persistent", save=save)
    forward = products(layer)
    assert counted(layer, torch.randn(T, B, I, requires_grad=True)) == (forward, 3 * forward)
    of_x = 2 * T * B * layer.weight_ih_l0.numel()
    assert counted(layer, torch.randn(T, B, I)) == (forward, 3 * forward - of_x)


@pytest.mark.parametrize("make", [persistrnn.LSTM, persistrnn.MGU])
def test_of_an_exported_program(make: Any) -> None:
    layer, x = make(I, H), torch.randn(T, B, I)
    program = torch.export.export(layer, (x,)).module()
    assert counted(program, x)[0] == products(layer)


def test_the_counter_may_be_imported_before_or_after() -> None:
    """And `import persistrnn` imports neither it nor Triton."""
    code = """
        import sys
        {0}
        import persistrnn, torch
        {1}
        layer = persistrnn.LSTM(3, 4)
        program = torch.export.export(layer, (torch.ones(2, 2, 3),)).module()
        with FlopCounterMode(display=False) as counter:
            program(torch.ones(2, 2, 3))
        assert counter.get_total_flops() == 2 * 2 * 2 * 16 * 7, counter.get_total_flops()
    """
    counter = "from torch.utils.flop_counter import FlopCounterMode"
    after = f"assert not {{'triton', 'torch.utils.flop_counter'}} & sys.modules.keys(); {counter}"
    for first, then in ((counter, ""), ("", after)):
        lines = "\n".join(line[8:] for line in code.format(first, then).splitlines())
        found = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
