"""Which of the data is for the test, batches of similar length, padded targets and their loss."""

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

NO_TARGET = -100  # what pads targets: cross_entropy leaves it out, and so does Piece.count
SHARE = 26  # of 256, on average: one in ten is held out


def held_out(name: str) -> bool:
    """Whether the file, number, ... of this name is kept for the test: a hash of its name decides, so that what is
    added moves nothing else."""
    return hashlib.sha256(name.encode()).digest()[0] < SHARE


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(T, B, V) logits and (T, B) targets, some of them NO_TARGET -> the cross entropy, summed in float32."""
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def teacher_forced(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """B sequences of tokens -> inputs and targets, int64 (T, B), and the lengths (B,). The targets are the sequences,
    padded with NO_TARGET; the inputs are 0 and all of a sequence but its last token."""
    targets = pad_sequence([tokens.long() for tokens in sequences], padding_value=NO_TARGET)
    inputs = torch.cat([torch.zeros_like(targets[:1]), targets[:-1].clamp(min=0)])
    return inputs, targets, torch.tensor([len(tokens) for tokens in sequences])


class Buckets:
    """Every epoch, each sequence once, in batches of similar length that come in a new order.

    What `batch` returns follows from the arguments and the number of the step alone.

    Args:
        lengths: of the sequences, integers (N,), N at least 1
        batch: B, sequences in a batch; the batch of the longest is filled up by repeating the longest
        seed: of the order
    """

    def __init__(self, lengths: Tensor, batch: int, seed: int) -> None:
        self.lengths = lengths
        self.size = batch
        self.seed = seed
        self.steps = -(-len(lengths) // batch)  # of an epoch
        self.epoch = functools.lru_cache(maxsize=1)(self._epoch)

    def _epoch(self, epoch: int) -> Tensor:
        """The batches of one epoch in their order, int64 (steps, B)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        # Equal lengths in random order, so that other sequences meet in every epoch.
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        order = shuffled[torch.argsort(self.lengths[shuffled], stable=True)]
        missing = self.steps * self.size - len(order)
        batches = torch.cat([order, order[-1:].expand(missing)]).view(self.steps, self.size)
        return batches[torch.randperm(self.steps, generator=generator)]

    def batch(self, step: int) -> Tensor:
        """The indices, int64 (B,), of the sequences of step 0, 1, ..."""
        epoch, number = divmod(step, self.steps)
        return self.epoch(epoch)[number]
