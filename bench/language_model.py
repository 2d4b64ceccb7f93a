"""The main job, `make train`: a byte language model learns the source of Python's own standard library.

It is also the example to read: `LanguageModel` is all it takes to use persistrnn, `Run.train_step` is
truncated back-propagation through time. T is the sequence length, B the number of streams in a batch.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import persistrnn
from bench import UsageError, checkpoint, curves
from bench.options import DTYPES, Settings, parser, split
from bench.text import START, VOCABULARY, Corpus, load_corpus, window

State: TypeAlias = "Tensor | tuple[Tensor, ...]"  # GRU: h; LSTM: (h, c); each (layers, B, hidden)

OURS = {"lstm": persistrnn.LSTM, "gru": persistrnn.GRU}
THEIRS = {"lstm": nn.LSTM, "gru": nn.GRU}


class LanguageModel(nn.Module):
    """Predicts the next byte: embedding, recurrent layers, linear."""

    def __init__(self, settings: Settings, backend: str) -> None:
        super().__init__()
        sizes = (settings.embedding, settings.hidden, settings.layers)
        self.embedding = nn.Embedding(VOCABULARY, settings.embedding)
        if backend == "torch.nn":
            self.rnn = THEIRS[settings.cell](*sizes, dropout=settings.dropout)
        else:
            self.rnn = OURS[settings.cell](*sizes, dropout=settings.dropout, backend=backend)
        self.linear = nn.Linear(settings.hidden, VOCABULARY)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(T, B) bytes and the state before them -> (T, B, 256) logits and the state after them."""
        y, state = self.rnn(self.embedding(tokens), state)
        return self.linear(y), state

    @property
    def path(self) -> str:
        """The path the last call took: "persistent", "torch", or "torch.nn" for torch's own layer."""
        return getattr(self.rnn, "last_path", "torch.nn")


def new_model(settings: Settings) -> LanguageModel:
    """A model whose initial weights follow from the seed alone, whichever backend runs it."""
    torch.manual_seed(settings.seed)
    model = LanguageModel(settings, "torch" if settings.backend == "torch.nn" else settings.backend)
    if settings.backend == "torch.nn":
        weights = model.state_dict()
        model = LanguageModel(settings, "torch.nn")
        model.load_state_dict(weights)  # persistrnn's parameters have torch.nn's names and shapes
    return model.to(settings.device)


def map_state(state: State | None, change: Any) -> Any:
    """`change` applied to every tensor of a carried state."""
    if state is None:
        return None
    return tuple(map(change, state)) if isinstance(state, tuple) else change(state)


class Run:
    """A training run: all that a checkpoint holds, and the step that moves it forward."""

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings = settings
        self.corpus = corpus
        self.device = torch.device(settings.device)
        self.text = corpus.train.to(self.device)
        self.model = new_model(settings)
        # Threads that share a process's first square root may get inexact ones from MKL, and runs would not repeat
        # (github.com/pytorch/pytorch/issues/188792). A first one on a single thread prevents it.
        torch.ones(1).sqrt()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate)
        # Scales the loss so that float16 gradients do not underflow; does nothing for other dtypes.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.state: State | None = None
        self.losses: list[float] = []  # bits per character of every step so far
        self.speed = math.nan  # tokens per second
        self.held_out: float | None = None  # bits per byte, once measured

    @property
    def step(self) -> int:
        return len(self.losses)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def train_step(self) -> None:
        """One optimizer step on the next T bytes of each of B streams."""
        settings = self.settings
        inputs, targets = window(self.text, self.step, settings.batch, settings.sequence)
        with self.autocast():
            logits, state = self.model(inputs, self.state)
        loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        # The next step continues the text: it starts from this state, and no gradient flows back into it.
        self.state = map_state(state, Tensor.detach)

        cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / settings.steps)
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * cosine
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            raise UsageError(
                f"the loss is {bits} at step {self.step + 1:,} with --learning-rate {settings.learning_rate} and "
                f"--dtype {settings.dtype}: it must stay finite; lower the rate or take --dtype float32"
            )
        self.losses.append(bits)

    def save(self, folder: Path) -> None:
        on_gpu = self.device.type == "cuda"
        content = {
            "settings": asdict(self.settings),
            "text": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": self.state,
            "losses": self.losses,
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "speed": self.speed,
            "held_out": self.held_out,
        }
        checkpoint.save(folder, content)

    def load(self, content: dict[str, Any]) -> None:
        if content["text"] != self.corpus.fingerprint:
            raise UsageError(
                f"--text {self.settings.text} has changed since the checkpoint (sha256 {self.corpus.fingerprint[:12]} "
                f"now, {content['text'][:12]} then): resume with the same Python, or start anew with --overwrite"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = map_state(content["state"], lambda tensor: tensor.to(self.device))
        self.losses = content["losses"]
        self.speed = content["speed"]
        self.held_out = content["held_out"]
        torch.set_rng_state(content["random"])
        if content["random_gpu"] is not None:
            torch.cuda.set_rng_state(content["random_gpu"], self.device)

    def explanation(self) -> str:
        """Which path the layer will take, with which plan, and why."""
        with self.autocast():
            if self.settings.backend == "torch.nn":
                return str(self.model.rnn)
            return persistrnn.explain(self.model.rnn, self.settings.batch, self.settings.sequence)

    def probe(self) -> None:
        """One call as in training, to find out at the door whether this machine can run it."""
        settings = self.settings
        inputs, _ = window(self.text, 0, settings.batch, settings.sequence)
        try:
            with self.autocast():
                self.model(inputs)
        except RuntimeError as error:
            asked = " ".join(f"--{name} {getattr(settings, name)}" for name in ("cell", "dtype", "device", "backend"))
            raise UsageError(
                f"{asked} cannot run here: {error}\n--dtype float32 --backend torch runs everywhere"
            ) from error

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte on the held-out files, read once in 32 streams with carried state."""
        batch, length = 32, self.settings.sequence
        text = self.corpus.held_out.to(self.device)
        steps = max(1, len(text) // (batch * length))
        state, total = None, 0.0
        self.model.eval()
        for step in tqdm(range(steps), "held-out files", leave=False, disable=not sys.stderr.isatty()):
            inputs, targets = window(text, step, batch, length)
            with self.autocast():
                logits, state = self.model(inputs, state)
            total += cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()
        self.model.train()
        return total / steps / math.log(2)

    @torch.no_grad()
    def sample(self, length: int, temperature: float) -> str:
        """`length` bytes the model makes up, from the beginning of a file on."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        token, state, text = START, None, bytearray()
        self.model.eval()
        while len(text) < length:
            with self.autocast():
                logits, state = self.model(torch.tensor([[token]], device=self.device), state)
            weights = torch.softmax(logits.flatten().cpu().double() / temperature, 0)
            token = int(torch.multinomial(weights, 1, generator=generator))
            text.append(token)
        self.model.train()
        return text.replace(bytes([START]), b"\n\n# ---- next file ----\n").decode(errors="replace")

    def peak_memory(self) -> float:
        """GiB: allocated on the GPU, or resident on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        kilobyte = 1 if sys.platform == "darwin" else 1024  # of getrusage
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30


def train(run: Run, folder: Path, save_seconds: float) -> None:
    """Takes the run to its last step, with a checkpoint every `save_seconds`, at the end and on a signal."""
    settings = run.settings
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)  # another run may have gone before
    quiet = not sys.stderr.isatty()  # a log file gets an update every half minute
    bar = tqdm(
        total=settings.steps,
        initial=run.step,
        mininterval=30 if quiet else 0.2,
        maxinterval=60 if quiet else 10,
        bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} steps {elapsed}<{remaining}{postfix}",
    )
    first = timed_from = run.step
    begin = saved = time.monotonic()
    with checkpoint.Signals() as signals, bar:
        while run.step < settings.steps and not signals.received:
            run.train_step()
            now = time.monotonic()
            run.speed = (run.step - timed_from) * settings.batch * settings.sequence / (now - begin)
            if run.step == first + 1:  # this step compiled the kernels: the speed is that of the others
                timed_from, begin = run.step, now
            recent = run.losses[-20:]
            bar.set_postfix_str(
                f"{sum(recent) / len(recent):.3f} bits/char, {run.speed:,.0f} tokens/s, "
                f"{run.peak_memory():.2f} GiB, path {run.model.path}",
                refresh=False,
            )
            bar.update()
            if now - saved >= save_seconds:
                run.save(folder)
                saved = time.monotonic()
        run.save(folder)
    if signals.received:
        raise checkpoint.Stopped(signals.received, run.step, folder)


def start(folder: Path, job: Namespace, given: dict[str, Any]) -> Run:
    """The run in `folder` continued, or a new one that nothing unfinished stands in the way of."""
    content = checkpoint.load(folder)
    if job.resume and content is None:
        raise UsageError(f"--resume given, but {folder} holds no checkpoint: leave --resume out, or name --out")
    if content is not None and not job.resume and not job.overwrite:
        done, steps = len(content["losses"]), content["settings"]["steps"]
        if done < steps:
            raise UsageError(
                f"{folder} holds an unfinished run ({done:,} of {steps:,} steps): continue it with --resume, set it "
                "aside with --overwrite, or choose another folder with --out"
            )
    settings = Settings.resumed(content["settings"], given) if job.resume else Settings.complete(given)
    run = Run(settings, load_corpus(Path(settings.text)))
    run.probe()
    if job.resume:
        run.load(content)
        print(f"{folder}: {run.step:,} of {settings.steps:,} steps are done.")
    return run


def make_room(folder: Path, job: Namespace) -> None:
    """Sets the checkpoint of an earlier run aside, unless it is the one to resume."""
    if not job.resume and (kept := checkpoint.set_aside(folder)):
        print(f"The run that was in {folder} is kept as {kept}.")


def single(job: Namespace, given: dict[str, Any]) -> None:
    """Trains, measures on the held-out files, writes a sample."""
    run = start(job.out, job, given)
    settings, corpus = run.settings, run.corpus
    if run.held_out is not None:
        print(f"This run is finished: {run.held_out:.4f} bits per byte on held-out files.")
        print("Leave --resume out to begin a new one.")
        return
    make_room(job.out, job)
    for files, text, use in (
        (corpus.train_files, corpus.train, "to train on"),
        (corpus.held_out_files, corpus.held_out, "held out"),
    ):
        print(f"{len(files)} files, {len(text) / 1e6:.1f} MB {use}, from {settings.text}")
    print(run.explanation())

    train(run, job.out, job.save_seconds)
    sample = run.sample(job.sample_bytes, job.temperature)
    (job.out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"A sample, at temperature {job.temperature}:\n\n{sample}\n")
    run.held_out = run.evaluate()
    run.save(job.out)
    print(
        f"{run.step:,} steps, {run.speed:,.0f} tokens/s, {run.peak_memory():.2f} GiB, path {run.model.path}: "
        f"{run.held_out:.4f} bits per byte on held-out files. Checkpoint and sample are in {job.out}."
    )


def compare(job: Namespace, given: dict[str, Any]) -> None:
    """Trains persistrnn and torch.nn from the same weights and prints both curves."""
    ours = start(job.out, job, given)
    if ours.settings.dropout:
        raise UsageError(
            f"--dropout {ours.settings.dropout} given with --compare: each path drops other units, so their curves "
            "differ anyway; allowed is --dropout 0"
        )
    if ours.model.path != "persistent":
        compare_interpreted(job, ours.settings, ours.model.path)
    folder = job.out / "torch.nn"
    second = Namespace(**{**vars(job), "resume": job.resume and checkpoint.exists(folder)})
    theirs = start(folder, second, asdict(replace(ours.settings, backend="torch.nn")))
    make_room(job.out, job)
    make_room(folder, second)
    print(ours.explanation())
    train(ours, job.out, job.save_seconds)
    train(theirs, folder, job.save_seconds)
    names = ("persistrnn", "torch.nn")
    print(curves.table(names, (ours.losses, theirs.losses)))
    for name, run in zip(names, (ours, theirs), strict=True):
        print(f"{name}: {run.speed:,.0f} tokens/s")


def compare_interpreted(job: Namespace, settings: Settings, path: str) -> NoReturn:
    """Becomes a process that compares a small model, its kernels run by Triton's interpreter on the CPU."""
    if settings.backend == "persistent":
        raise RuntimeError(f"--backend persistent took path {path}")
    print(
        f"Here (--device {settings.device} --backend {settings.backend}) persistrnn takes path {path}: both curves "
        "would be torch's own.\nComparing a small model on the interpreted kernels instead (slow: no speed is meant)."
    )
    limits = {"hidden": 32, "batch": 4, "sequence": 32, "steps": 15}
    small = {"device": "cpu", "backend": "persistent"}
    small |= {name: min(getattr(settings, name), limit) for name, limit in limits.items()}
    small |= {name: getattr(settings, name) for name in ("cell", "layers", "dtype", "seed", "text")}
    command = [sys.executable, "-m", "bench.language_model", "--compare", "torch", "--overwrite"]
    command += ["--out", str(job.out / "interpreted")]
    command += [f"--{name}={value}" for name, value in small.items()]
    sys.stdout.flush()
    # Triton reads the variable when it is imported, so this process is too late for it.
    os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 128 plus the number of the signal that stopped the run (2: bad usage)."""
    options = parser()
    job, given = split(options.parse_args(arguments))
    try:
        (compare if job.compare else single)(job, given)
    except UsageError as error:
        options.error(str(error))
    except (checkpoint.Stopped, KeyboardInterrupt) as stop:  # outside the training loop Ctrl-C stops at once
        print(str(stop) or "SIGINT; nothing is lost.")
        if checkpoint.exists(job.out) and os.environ.get("TRITON_INTERPRET") != "1":  # a small comparison starts anew
            compared = f" --compare {job.compare}" if job.compare else ""
            print(f'Continue with: make train ARGS="--resume --out {job.out}{compared}"')
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
