"""The training loop: a run begins anew or where its checkpoint stands, takes its steps, saves, stops on a signal."""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench import UsageError
from bench.train import checkpoint, layers, ranks
from bench.train.checkpoint import ANEW
from bench.train.layers import map_state
from bench.train.options import Settings
from bench.train.progress import PeakMemory, bar
from bench.train.ranks import say
from bench.train.workload import Workload

BASELINE = "torch.nn"  # the folder, within that of the run, of what a comparison trains beside persistrnn
# Of a checkpoint: what is no attribute of the run, what has a state_dict, and what is kept as it is.
OTHERS = ("workload", "settings", "data", "ranks")
MODULES = ("model", "optimizer", "scaler")
NUMBERS = ("losses", "count", "quality", "speed", "memory")


class Run:
    """All that a checkpoint holds, and the step that moves it forward. The same on every rank, but for the state and
    the random numbers of its rows."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.settings = settings = workload.settings
        self.device = ranks.device(settings.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.manual_seed(settings.seed)  # of the initial weights, the same in torch.nn's layers
        self.model = workload.model(settings.backend).to(self.device)
        if ranks.rank():
            torch.manual_seed(settings.seed + ranks.rank())  # every rank drops units of its own
        # Threads that share a process's first square root may get inexact ones from MKL, and runs would not repeat
        # (github.com/pytorch/pytorch/issues/188792). A first one on a single thread prevents it.
        torch.ones(1).sqrt()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        # Scales the loss so that float16 gradients do not underflow; does nothing for other dtypes.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.network = self.model  # what `loss` calls: in `train` it averages the gradients over the ranks
        self.rows = ranks.rows(settings.batch)
        self.state: Any = None
        self.losses: list[float] = []  # of every step so far, in the workload's unit
        self.count = 0  # of the loss's terms so far: tokens, say
        self.quality: list[float] | None = None  # the workload's metrics, once measured
        self.speed = math.nan  # tokens per second
        self.memory = math.nan  # GiB at most

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def train_step(self) -> None:
        """One optimizer step on the next batch: the gradient of the mean loss over all its terms, on all ranks."""
        settings, workload = self.settings, self.workload
        pieces = workload.pieces(self.step, self.rows)
        count = sum(ranks.of_all(sum(piece.count for piece in pieces)))
        state = self.state if workload.continues else None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad()
        for number, piece in enumerate(pieces, 1):
            # The gradients add up in each process; those of the last piece are averaged with all before.
            network, more = self.network, number < len(pieces)
            with network.no_sync() if more and isinstance(network, DistributedDataParallel) else nullcontext():
                with self.autocast():
                    loss, state = workload.loss(self.network, piece.on(self.device), state)
                # DistributedDataParallel takes the mean over the ranks, where the sum is due.
                self.scaler.scale(loss / count * ranks.world()).backward()
            state = map_state(state, Tensor.detach)  # no gradient flows back into the next piece's first state
            total += loss.detach()
        self.state = state if workload.continues else None

        self.optimizer.param_groups[0]["lr"] = learning_rate(settings, self.step)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        mean = sum(ranks.of_all(total.item())) / count * workload.loss_scale
        if not math.isfinite(mean):
            raise UsageError(
                f"the loss is {mean} at step {self.step + 1:,} with --learning-rate {settings.learning_rate} and "
                f"--dtype {settings.dtype}: it must stay finite; lower the rate or take --dtype float32"
            )
        self.losses.append(mean)
        self.count += count

    def save(self, folder: Path) -> None:
        """Every rank calls it, rank 0 writes."""
        own = {
            "state": map_state(self.state, Tensor.cpu),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        content = {
            "workload": self.workload.name,
            "settings": asdict(self.settings),
            "data": self.workload.fingerprint,
            "ranks": ranks.of_all(own),
            **{name: getattr(self, name).state_dict() for name in MODULES},
            **{name: getattr(self, name) for name in NUMBERS},
        }
        ranks.by_first(lambda: checkpoint.save(folder, content))

    def load(self, content: dict[str, Any], to_train: bool = True) -> None:
        """What `save` has written, for `train_step` or, not `to_train`, for `using` alone. It must be of the same data,
        version and, to train, number of processes."""
        if content["data"] != self.workload.fingerprint:
            raise UsageError(
                f"{self.workload.data} has changed since the checkpoint (sha256 {self.workload.fingerprint[:12]} "
                f"now, {content['data'][:12]} then): resume with the same data and the same Python, or {ANEW}"
            )
        if to_train and len(content["ranks"]) != ranks.world():
            raise UsageError(
                f"the checkpoint was made by {len(content['ranks'])} processes, {ranks.world()} given: allowed is the "
                f"same number (torchrun --nproc-per-node), or {ANEW}"
            )
        try:
            for name in MODULES:
                getattr(self, name).load_state_dict(content[name])
            for name in NUMBERS:
                setattr(self, name, content[name])
        except (LookupError, RuntimeError, ValueError) as error:
            raise UsageError(f"the checkpoint was made by another version of this program ({error}): {ANEW}") from error
        if to_train:
            own = content["ranks"][ranks.rank()]
            self.state = map_state(own["state"], lambda tensor: tensor.to(self.device))
            torch.set_rng_state(own["random"])
            if own["random_gpu"] is not None:
                torch.cuda.set_rng_state(own["random_gpu"], self.device)

    @contextmanager
    def using(self) -> Iterator[nn.Module]:
        """The model to be used and not trained: in eval mode, within no_grad and autocast."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield self.model
        finally:
            self.model.train()

    def evaluate(self) -> list[float]:
        """The workload's metrics on its held-out data."""
        with self.using() as model:
            return self.workload.evaluate(model)

    def finish(self, job: Namespace, folder: Path) -> None:
        """The finishing touches, and the metrics into the checkpoint."""
        with self.using() as model:
            ranks.by_first(lambda: self.workload.finish(model, job, folder))
        self.measure(folder)

    def measure(self, folder: Path) -> None:
        """The metrics, into the checkpoint."""
        self.quality = ranks.by_first(self.evaluate)
        self.save(folder)

    def explanation(self) -> str:
        """Which path each recurrent layer will take, with which plan, and why."""
        with self.autocast():
            rows = self.rows.stop - self.rows.start
            return layers.explanation(self.model, rows, self.settings.truncate or self.workload.sequence)

    def probe(self) -> None:
        """One call as in training, to find out at the door whether this machine can run it."""
        settings, piece = self.settings, self.workload.pieces(0, self.rows)[0]
        try:
            with self.autocast():
                self.workload.loss(self.model, piece.on(self.device), None)
        except RuntimeError as error:
            raise UsageError(
                f"--cell {settings.cell} --dtype {settings.dtype} --device {settings.device} --backend "
                f"{settings.backend} --save {settings.save} cannot run here: {error}\n--dtype float32 --backend torch "
                "runs everywhere; a smaller --batch or --sequence and --save checkpoint take less memory"
            ) from error


def learning_rate(settings: Settings, step: int) -> float:
    """Of step 0, 1, ...: rises over `warmup` steps, then stays ("constant") or falls along half a cosine to 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))


def look(program: type[Workload], folder: Path, resume: bool, overwrite: bool = False) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run that nothing unfinished stands in the way of."""
    content: dict[str, Any] | None = None if overwrite else ranks.by_first(lambda: checkpoint.load(folder))
    if content is None:
        return None
    if missing := sorted({*OTHERS, *MODULES, *NUMBERS} - content.keys()):
        raise UsageError(
            f"the checkpoint was made by another version of this program (it lacks {', '.join(missing)}): {ANEW}"
        )
    if content["workload"] != program.name:
        raise UsageError(f"{folder} holds a run of {content['workload']}, this is {program.name}: {ANEW}")
    program.settings_type.check_saved(content["settings"])
    if not resume and (done := len(content["losses"])) < (steps := content["settings"]["steps"]):
        raise UsageError(
            f"{folder} holds an unfinished run ({done:,} of {steps} steps): continue it with --resume, or {ANEW}"
        )
    return content if resume else None


def begin(program: type[Workload], content: dict[str, Any] | None, given: dict[str, Any], folder: Path) -> Run:
    """The run of a checkpoint continued, or a new one: then what was in the folder is set aside, with that of torch.nn
    which it was compared with, so that no later comparison takes it for its own."""
    kind = program.settings_type
    run = Run(program(kind.resumed(content["settings"], given) if content else kind.complete(given)))
    run.probe()
    if content:
        run.load(content)
        say(f"{folder}: {run.step:,} of {run.settings.steps:,} steps are done.")
        return run
    for each in (folder / BASELINE, folder):
        if kept := ranks.by_first(partial(checkpoint.set_aside, each)):
            say(f"The run that was in {each} is kept as {kept}.")
    return run


def train(run: Run, folder: Path, save_seconds: float) -> None:
    """Takes the run to its last step, with a checkpoint every `save_seconds`, at the end and on a signal, which then
    raises KeyboardInterrupt with its number."""
    if run.finished:
        return
    if ranks.world() > 1:
        run.network = DistributedDataParallel(run.model)
    memory, before, first = PeakMemory(run.device), run.memory, run.step
    begun = saved = time.monotonic()
    counted, stopped_by = run.count, 0
    progress = bar(
        total=run.settings.steps,
        initial=run.step,
        delay=0,
        leave=True,
        bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} steps {elapsed}<{remaining}{postfix}",
        disable=ranks.rank() > 0,
    )
    with checkpoint.noted_signals() as received, progress:
        while not run.finished and not stopped_by:
            run.train_step()

            now = time.monotonic()
            run.speed = (run.count - counted) / (now - begun)
            if run.step == first + 1:  # this step compiled the kernels: the speed is that of the others
                counted, begun = run.count, now
            run.memory = memory.added if math.isnan(before) else max(memory.added, before)
            recent = run.losses[-20:]
            progress.set_postfix_str(
                f"{sum(recent) / len(recent):.3f} {run.workload.loss_unit}, {run.speed:,.0f} {run.workload.unit}/s, "
                f"{run.memory:.2f} GiB, path {layers.path(run.model)}",
                refresh=False,
            )
            progress.update()

            # A signal or the hour that one rank has seen holds for all: they stop after the same step.
            everyone = ranks.of_all((max(received, default=0), now - saved >= save_seconds))
            stopped_by, due = (max(values) for values in zip(*everyone, strict=True))
            if due and not stopped_by and not run.finished:
                run.save(folder)
                saved = time.monotonic()
        run.save(folder)
    if stopped_by:
        raise KeyboardInterrupt(stopped_by)
