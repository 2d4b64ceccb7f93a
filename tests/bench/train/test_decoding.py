"""Sampling and beam search, against every continuation of a small chain."""

import itertools

import pytest
import torch
from torch import Tensor

from bench.train.decoding import Hypothesis, beam_search, draw

V = 4  # tokens
STOP = 3


def chain(seed: int) -> Tensor:
    """log p(next | token) at steps 0 to 6, (7, V, V): other ones at each step, so that no two texts are as likely."""
    return torch.log_softmax(2 * torch.randn(7, V, V, generator=torch.Generator().manual_seed(seed)).double(), -1)


def search(chains: list[Tensor], width: int, length: int, **options: object) -> list[list[Hypothesis]]:
    """Side by side; the state is each row's chain and the number of steps it has gone."""

    def step(tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        table, steps = state
        assert (steps == steps[0, 0]).all()
        logits = table[0, torch.arange(len(tokens)), steps[0], tokens] + 5.0  # up to a constant
        return logits, (table, steps + 1)

    state = (torch.stack(chains)[None], torch.zeros(1, len(chains), dtype=torch.int64))
    start = torch.zeros(len(chains), dtype=torch.int64)
    return beam_search(step, state, start, width=width, length=length, **options)


def every(table: Tensor, length: int, stop: int | None) -> list[Hypothesis]:
    """All hypotheses, by exhaustive search, the best first."""
    found = {}
    for tokens in itertools.product(range(V), repeat=length):
        tokens = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        pairs = enumerate(itertools.pairwise([0, *tokens]))
        found[tokens] = sum(table[step, one, other].item() for step, (one, other) in pairs)
    best = sorted(found.items(), key=lambda each: -each[1])
    return [Hypothesis([token for token in tokens if token != stop], score) for tokens, score in best]


@pytest.mark.parametrize("stop", [None, STOP])
def test_a_wide_beam_finds_the_best_of_all(stop: int | None) -> None:
    chains = [chain(seed) for seed in range(6)]
    found = search(chains, 64, 4, stop=stop)
    for table, hypotheses in zip(chains, found, strict=True):
        for ours, theirs in zip(hypotheses[:9], every(table, 4, stop), strict=False):
            assert ours.tokens == theirs.tokens
            assert ours.score == pytest.approx(theirs.score, rel=1e-9)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    chains = [chain(seed) for seed in range(4)]
    together = search(chains, 3, 6, stop=STOP)
    assert together == [search([table], 3, 6, stop=STOP)[0] for table in chains]
    assert len({len(hypothesis.tokens) for row in together for hypothesis in row}) > 1


def test_a_beam_wider_than_its_tree() -> None:
    assert len(search([chain(0)], 10, 1)[0]) == V
    assert search([chain(0)], 3, 0)[0] == [Hypothesis([], 0.0)]


class TestDraw:
    LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0]])

    def shares(self, **options: float) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        drawn = draw(self.LOGITS.expand(20_000, V), generator, **options)
        return (drawn.bincount(minlength=V) / len(drawn)).tolist()

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_temperature(self, temperature: float) -> None:
        expected = torch.softmax(self.LOGITS[0] / temperature, -1).tolist()
        assert self.shares(temperature=temperature) == pytest.approx(expected, abs=0.015)

    def test_top_k(self) -> None:
        expected = [0, 0, *torch.softmax(self.LOGITS[0, 2:], -1).tolist()]
        shares = self.shares(top_k=2)
        assert shares == pytest.approx(expected, abs=0.015)
        assert shares[:2] == [0, 0]
        assert self.shares(top_k=1) == [0, 0, 0, 1]
        assert self.shares(top_k=100) == pytest.approx(self.shares(), abs=0.015)
