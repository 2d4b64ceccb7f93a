"""What a training program gives the loop: data, model, loss, quality and its finishing touches.

A program is a `Workload` and one line, `sys.exit(command.main(MyWorkload))`. Help for one: `options` (its settings),
`layers` (recurrent layers by settings, padded rows), `batches` (of similar length), `decoding` (sampling, beam search).
"""

from abc import ABC, abstractmethod
from argparse import Namespace, _ArgumentGroup
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.train.batches import NO_TARGET, summed_loss
from bench.train.options import Backend, Settings


@dataclass(frozen=True)
class Piece:
    """One process's part of a batch, or of a stretch of its time: what one call of `Workload.loss` gets."""

    tensors: tuple[Tensor, ...]  # on the CPU; the loop moves them to the device
    count: int  # the terms that the loss sums: tokens, say

    @classmethod
    def of(cls, *tensors: Tensor) -> "Piece":
        """For the loss of `Workload`: the targets come last, NO_TARGET where there is none."""
        return cls(tensors, int((tensors[-1] != NO_TARGET).sum()))

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Its tensors there."""
        return tuple(tensor.to(device, non_blocking=True) for tensor in self.tensors)


class Workload(ABC):
    """Everything about a training program that the loop cannot know.

    Nothing in it changes while it trains: `pieces` follows from the settings and the number of the step alone. So a
    run that was killed, resumed by another process, takes the very same steps.
    """

    name: ClassVar[str]  # of the module in bench/train, and of the folder in runs/
    description: ClassVar[str]  # one line for --help
    settings_type: ClassVar[type[Settings]]
    using: ClassVar[str] = ""  # the option by which a command does not train but uses the model, see `use`: "generate"

    settings: Any  # of settings_type
    metrics: tuple[str, ...]  # what `evaluate` returns, as it reads after a number; the first is the one that counts
    loss_unit: str = "nats"  # of the training loss as it is shown and kept
    loss_scale: float = 1.0  # from what `loss` returns to that unit: 1 / ln 2 makes bits of nats
    unit: str = "tokens"  # what `Piece.count` counts
    continues: bool = False  # whether a step's rows go on where the step before ended: then its last state is its first
    sequence: int  # T of a typical batch, for `persistrnn.explain`
    data: str  # names the data in messages, by the option that chooses it if there is one: "--text FOLDER"
    summary: str  # of the data in a line, printed before training
    fingerprint: str  # sha256 of the data: a resumed run must train on the very same

    @abstractmethod
    def __init__(self, settings: Any) -> None:
        """Loads the data. Raises UsageError where the settings do not fit."""

    @abstractmethod
    def model(self, backend: Backend) -> nn.Module:
        """A new model on the CPU, its recurrent layers made by `layers.recurrent` with this backend. Its parameters'
        names and shapes do not depend on the backend; weights are drawn from torch's generator."""

    @abstractmethod
    def pieces(self, step: int, rows: slice) -> list[Piece]:
        """This process's rows of the batch of a step (0, 1, ...): one piece, or several one after the other in time.

        `rows` is a part of range(settings.batch), all of it without torchrun: every step's batch has that many rows.
        A step sums the gradients of its pieces, then updates the weights once. The state goes on from piece to piece,
        the gradient does not: with settings.truncate = K, cut the time into pieces of at most K steps.
        """

    def loss(self, model: nn.Module, tensors: tuple[Tensor, ...], state: Any) -> tuple[Tensor, Any]:
        """The sum (not the mean) of a piece's loss over its `count` terms, a float32 scalar; and the state after it.

        Called in training mode within autocast; `tensors` are the piece's, on the device. `state` is what the call
        before returned, detached (None at first, and at the first piece of every step unless `continues`): None or
        nested tuples of tensors. `model` may be wrapped in DistributedDataParallel: call it once, by model(...).

        By default the cross entropy of the last tensor, the targets; the model gets the others and the state, and
        returns logits and the state after them.
        """
        *given, targets = tensors
        logits, state = model(*given, state=state)
        return summed_loss(logits, targets), state

    def mean_loss(self, model: nn.Module, pieces: Iterable[Piece]) -> float:
        """For `evaluate`: over all terms of all pieces, read one after the other."""
        device, state, total, count = next(model.parameters()).device, None, 0.0, 0
        for piece in pieces:
            loss, after = self.loss(model, piece.on(device), state)
            state = after if self.continues else None
            total += loss.item()
            count += piece.count
        return total / count

    @abstractmethod
    def evaluate(self, model: nn.Module) -> list[float]:
        """Each of `metrics` on the held-out data. `model` is in eval mode, within no_grad and autocast."""

    # The rest is optional; `model` as in `evaluate`, and `job` has the options that are no settings.

    def finish(self, model: nn.Module, job: Namespace, folder: Path) -> None:
        """Finishing touches after a training, as a sample: prints them, writes them into `folder`."""
        return None

    def use(self, model: nn.Module, job: Namespace) -> None:
        """What the command does instead of training (generate, translate, ...): prints it."""
        raise NotImplementedError

    @classmethod
    def add_options(cls, job: _ArgumentGroup) -> None:
        """Adds options that are no settings, each with a `default=`: they may differ at every call of the program."""
        return None

    @classmethod
    def check_options(cls, job: Namespace) -> None:
        """Raises UsageError where those options contradict each other."""
        return None
