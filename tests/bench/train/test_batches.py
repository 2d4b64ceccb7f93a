"""Batches of similar length."""

import torch

from bench.train.batches import Buckets

LENGTHS = torch.randint(1, 50, (103,), generator=torch.Generator().manual_seed(0))


def test_an_epoch_holds_every_sequence() -> None:
    buckets = Buckets(LENGTHS, 8, seed=1)
    assert buckets.steps == 13
    indices = torch.cat([buckets.batch(step) for step in range(13)])
    counts = indices.bincount(minlength=103)
    assert len(indices) == 104
    assert counts.min() == 1
    assert LENGTHS[counts.argmax()] == LENGTHS.max()  # the one that fills up


def test_lengths_of_a_batch_are_similar() -> None:
    buckets = Buckets(LENGTHS, 8, seed=1)
    spread = [int(LENGTHS[buckets.batch(step)].max() - LENGTHS[buckets.batch(step)].min()) for step in range(13)]
    assert sum(spread) < 50  # sorted, each length is crossed once


def test_a_batch_follows_from_its_number() -> None:
    one, other = Buckets(LENGTHS, 8, seed=1), Buckets(LENGTHS, 8, seed=1)
    forward = [one.batch(step) for step in range(40)]
    backward = [other.batch(step) for step in reversed(range(40))]
    assert all(torch.equal(*pair) for pair in zip(forward, reversed(backward), strict=True))


def test_epochs_and_seeds_differ() -> None:
    one = Buckets(LENGTHS, 8, seed=1)
    assert not all(torch.equal(one.batch(step), one.batch(step + 13)) for step in range(13))
    other = Buckets(LENGTHS, 8, seed=2)
    assert not all(torch.equal(one.batch(step), other.batch(step)) for step in range(13))
    batches = [{tuple(sorted(one.batch(step + epoch).tolist())) for step in range(13)} for epoch in (0, 13)]
    assert batches[0] != batches[1]  # equal lengths meet others


def test_fewer_sequences_than_rows() -> None:
    assert Buckets(torch.tensor([3, 5]), 4, seed=0).batch(7).bincount().tolist() == [1, 3]
