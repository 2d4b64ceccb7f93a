"""Tokens from logits: sampling with temperature and top-k, and beam search."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.train.layers import map_state
from bench.train.progress import bar


def draw(logits: Tensor, generator: torch.Generator, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """One token for each row, int64 (N,) on the CPU.

    Args:
        logits: (N, V)
        generator: of the CPU, so that every device draws the same
        temperature: above 0; lower makes likely tokens likelier
        top_k: only the k likeliest tokens are drawn; None: all
    """
    logits = logits.detach().cpu().double()
    kept, names = logits.topk(min(top_k, logits.shape[-1])) if top_k else (logits, None)
    chosen = torch.multinomial(torch.softmax(kept / temperature, -1), 1, generator=generator)
    return (chosen if names is None else names.gather(-1, chosen)).squeeze(-1)


class Hypothesis(NamedTuple):
    tokens: list[int]  # without the stop token
    score: float  # the sum of the tokens' log-probabilities, the stop token's among them; by it the beam is kept


def select_rows(state: Any, rows: Tensor) -> Any:
    """These rows of a state, in this order; one may be repeated."""
    return map_state(state, lambda tensor: tensor.index_select(1, rows))


def beam_search(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    state: Any,
    start: Tensor,
    *,
    width: int,
    length: int,
    stop: int | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest continuations that a beam of `width` finds, for each of N rows searched side by side.

    Args:
        step: (tokens int64 (R,), state of R rows) -> (logits (R, V), state after them)
        state: of N rows, before `start`; its tensors have the rows in dimension 1, as those of recurrent layers
        start: the first token of each row, int64 (N,), on the model's device; it is no part of the result
        width: hypotheses kept for each row
        length: the most tokens of a hypothesis
        stop: the token that ends a hypothesis; None: all have `length` tokens

    Returns:
        For each row its hypotheses, up to `width`, the best first.
    """
    count, device = len(start), start.device
    first = torch.arange(count, device=device).repeat_interleave(width)
    state, tokens = select_rows(state, first), start[first]
    scores = torch.full((count, width), -torch.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0.0  # the beams of a row are equal at first: one of them goes on
    history = torch.empty(count, width, 0, dtype=torch.int64, device=device)
    finished = torch.zeros(count, width, dtype=torch.bool, device=device)
    for _ in bar(range(length), "beam search"):
        logits, state = step(tokens, state)
        gains = torch.log_softmax(logits.double(), -1).view(count, width, -1)
        if stop is not None:  # what is finished goes on as it is, at no cost
            gains = gains.masked_fill(finished[..., None], -torch.inf)
            gains[..., stop] = gains[..., stop].masked_fill(finished, 0.0)
        vocabulary = gains.shape[-1]
        scores, best = (scores[..., None] + gains).flatten(1).topk(width)  # in descending order
        parents, chosen = best // vocabulary, best % vocabulary
        history = torch.cat([history.gather(1, parents[..., None].expand_as(history)), chosen[..., None]], -1)
        state = select_rows(state, (parents + torch.arange(count, device=device)[:, None] * width).flatten())
        tokens = chosen.flatten()
        finished = finished.gather(1, parents)
        if stop is not None:
            finished |= chosen == stop
            if finished.all():
                break
    return [
        [
            Hypothesis(list(itertools.takewhile(lambda token: token != stop, tokens)), score)
            for tokens, score in zip(row, row_scores, strict=True)
            if score > -torch.inf  # a beam wider than the vocabulary leaves places empty
        ]
        for row, row_scores in zip(history.tolist(), scores.tolist(), strict=True)
    ]
