"""Rows of different lengths on a CPU against equally long ones: lengths= and a PackedSequence, in training.

pytest bench/race/test_rows.py --benchmark-only
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import persistrnn

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

INPUT, HIDDEN, BATCH = 32, 64, 16
# Rounds in which both run in turn, fewer where a call is long; of each the quickest counts.
ROUNDS = {200: 30, 500: 20, 1000: 10, 2000: 6, 4000: 5}
MOST = 1.5
LAYERS = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU, "rnn": persistrnn.RNN}


@pytest.mark.parametrize("steps", ROUNDS)
@pytest.mark.parametrize(("cell", "directions"), [("lstm", 1), ("lstm", 2), ("gru", 2), ("rnn", 1)])
def test_against_padded_rows(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], cell: str, directions: int, steps: int
) -> None:
    """Lengths from T/2 to T, all different."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    layer, x = LAYERS[cell](INPUT, HIDDEN, bidirectional=directions == 2), torch.randn(steps, BATCH, INPUT)
    lengths = torch.linspace(steps // 2, steps, BATCH).long()

    def packed() -> Tensor:
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
        found = layer(given)[0]
        assert isinstance(found, PackedSequence)
        return found.data

    def seconds(call: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(call().sum(), list(layer.parameters()))
        return time.perf_counter() - start

    calls = {"padded": lambda: layer(x)[0], "lengths": lambda: layer(x, lengths=lengths)[0], "packed": packed}
    found: list[list[float]] = []
    benchmark.group = f"CPU: {cell}, {directions} directions, rows of different lengths beside padded ones"
    benchmark.pedantic(
        lambda: found.append([seconds(call) for call in calls.values()]), rounds=ROUNDS[steps], warmup_rounds=1
    )
    torch.set_num_threads(before)
    padded, *others = (min(times) for times in zip(*found[1:], strict=True))
    ratios = dict(zip(("lengths", "packed"), (t / padded for t in others), strict=True))
    benchmark.extra_info |= {"milliseconds_padded": padded * 1e3, **ratios}
    with capsys.disabled():
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        print(f"\n{cell}, {directions} directions, T={steps}: padded {padded * 1e3:.1f} ms, of that {shown}")
    assert max(ratios.values()) <= MOST, ratios
