"""The main job, `make train`: a language model learns the source of Python's own standard library.

It is also the example to read: `LanguageModel` is all it takes to use persistrnn, `LanguageModeling` what it takes to
train it. T is the sequence length, B the number of streams, or of lines, in a batch.
"""

import math
import sys
import sysconfig
from argparse import Namespace, _ArgumentGroup
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import UsageError
from bench.train import command
from bench.train.batches import Buckets
from bench.train.decoding import beam_search, draw
from bench.train.layers import recurrent, run_padded
from bench.train.options import Backend, Settings, absolute, number, option
from bench.train.progress import bar
from bench.train.text import START, Bytes, Lines, Words, load_corpus, window
from bench.train.workload import Piece, Workload


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    layers: int = 2
    steps: int = 1500
    embedding: int = option(64, "width of a token's embedding", type=number(int, 1))
    tied: bool = option(False, "embedding and output share one matrix (--embedding is then --hidden)")
    tokens: str = option("bytes", "what the model reads and predicts", choices=["bytes", "words"])
    vocabulary: int = option(10_000, "with words: this many tokens, the most frequent ones", type=number(int, 4))
    lines: bool = option(False, "learn line by line, in batches of similar length, instead of on and on")
    sequence: int = option(512, "tokens of a step; with --lines, the most of a line", type=number(int, 1))
    text: str = option(None, "folder of .py files to learn (default: the standard library)", type=absolute)

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        own = {"embedding": given.get("hidden", cls.hidden)} if given.get("tied") else {}
        return super().defaults(given) | {"text": sysconfig.get_path("stdlib")} | own

    @property
    def whole(self) -> bool:
        return self.lines

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied and self.embedding != self.hidden:
            raise UsageError(
                f"--tied given with --embedding {self.embedding} and --hidden {self.hidden}: one matrix cannot have "
                "both widths; leave --embedding out"
            )


class LanguageModel(nn.Module):
    """Predicts the next token: embedding, recurrent layers, linear."""

    def __init__(self, settings: TextSettings, backend: Backend, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, settings.embedding)
        self.rnn = recurrent(settings, backend, settings.embedding)
        self.linear = nn.Linear(settings.hidden, vocabulary)
        if settings.tied:
            self.embedding.weight = self.linear.weight

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """(T, B) tokens, if need be the rows' lengths (B,), and the state before them -> (T, B, V) logits and the state
        after them."""
        x = self.embedding(tokens)
        y, state = self.rnn(x, state) if lengths is None else run_padded(self.rnn, x, lengths, state)
        return self.linear(y), state


class LanguageModeling(Workload):
    name = "language_model"
    description = "Trains a language model, of bytes or words, on the source of Python's own standard library."
    settings_type = TextSettings
    using = "generate"
    loss_scale = 1 / math.log(2)  # bits

    settings: TextSettings
    vocabulary: Bytes | Words

    def __init__(self, settings: TextSettings) -> None:
        self.settings = settings
        self.sequence = settings.sequence
        self.continues = not settings.lines
        self.data = f"--text {settings.text}"
        texts, files, self.fingerprint = load_corpus(Path(settings.text))
        self.vocabulary = Words(texts[0], settings.vocabulary) if settings.tokens == "words" else Bytes()
        self.train, self.held_out = map(self.vocabulary.encode, texts)
        self.summary = (
            f"{settings.text}: {len(files[0])} files, {len(self.train):,} {settings.tokens} to train on; "
            f"{len(files[1])} files, {len(self.held_out):,} {settings.tokens} held out"
        )
        self.loss_unit, self.unit = f"bits/{self.vocabulary.name}", settings.tokens
        self.metrics = (f"bits per {self.vocabulary.name} on held-out files (lower is better)",)
        if settings.lines:
            self.lines, self.held_out_lines = (
                Lines(side, self.vocabulary.newline, settings.sequence) for side in (self.train, self.held_out)
            )
            self.buckets = Buckets(self.lines.lengths, settings.batch, settings.seed)

    @classmethod
    def add_options(cls, job: _ArgumentGroup) -> None:
        add, count = job.add_argument, number(int, 1)
        words = "length of the text written at the end, in bytes or words as --tokens says (default %(default)s)"
        positive = number(float, 0, above=True)
        model = "do not train: continue --prompt, by the model in --output"
        add("--generate", action="store_true", default=False, help=model)
        add("--prompt", default="", metavar="TEXT", help="what the sample continues (default: a file begins)")
        add("--sample-tokens", type=number(int, 0), default=1500, metavar="N", help=words)
        add("--temperature", type=positive, default=None, metavar="X", help="of the sample (default 0.7)")
        add("--top-k", type=count, default=None, metavar="K", help="of the sample: only the K likeliest tokens")
        add("--beam", type=count, default=None, metavar="W", help="not a sample: the likeliest text a beam finds")

    @classmethod
    def check_options(cls, job: Namespace) -> None:
        if job.beam and (job.temperature or job.top_k):
            raise UsageError(
                f"--temperature or --top-k given with --beam {job.beam}, which draws nothing: leave one of them out"
            )

    def model(self, backend: Backend) -> LanguageModel:
        return LanguageModel(self.settings, backend, len(self.vocabulary))

    def pieces(self, step: int, rows: slice) -> list[Piece]:
        settings = self.settings
        if settings.lines:
            return [self.of_lines(self.lines, self.buckets.batch(step)[rows])]
        inputs, targets = (part[:, rows] for part in window(self.train, step, settings.batch, settings.sequence))
        length = settings.truncate or settings.sequence
        cut = zip(inputs.split(length), targets.split(length), strict=True)
        return [Piece.of(*pair) for pair in cut]

    def of_lines(self, lines: Lines, indices: Tensor) -> Piece:
        inputs, targets, lengths = lines.padded(indices)
        return Piece.of(inputs, lengths, targets)

    def evaluate(self, model: nn.Module) -> list[float]:
        """Bits per token on the held-out files: read once in 32 streams with carried state, or every line."""
        batch, length = 32, self.settings.sequence
        if self.settings.lines:
            order = torch.argsort(self.held_out_lines.lengths, stable=True).split(batch)
            pieces = (self.of_lines(self.held_out_lines, indices) for indices in bar(order, "held-out lines"))
        else:
            steps = bar(range(max(1, len(self.held_out) // (batch * length))), "held-out files")
            pieces = (Piece.of(*window(self.held_out, step, batch, length)) for step in steps)
        return [self.mean_loss(model, pieces) * self.loss_scale]

    def finish(self, model: nn.Module, job: Namespace, folder: Path) -> None:
        text = self.generated(model, job)
        path = folder / "sample.txt"
        path.write_text(text, encoding="utf-8")
        how = f"of a beam of {job.beam}" if job.beam else f"at temperature {job.temperature or 0.7}"
        print(f"A sample, {how} (in {path}):\n\n{text}\n")

    def use(self, model: nn.Module, job: Namespace) -> None:
        print(self.generated(model, job))

    def generated(self, model: nn.Module, job: Namespace) -> str:
        """The prompt and what the model makes up after it, as the options say."""
        prompt = self.vocabulary.encode(job.prompt.encode(errors="surrogateescape")).tolist()
        if job.beam:
            tokens = self.likeliest(model, prompt, job.sample_tokens, job.beam)
        else:
            tokens = self.sample(model, prompt, job.sample_tokens, job.temperature or 0.7, job.top_k)
        return job.prompt + self.vocabulary.decode(tokens).replace("\0", "\n\n# ---- next file ----\n")

    def ends(self, token: int) -> bool:
        """Whether the state ends with this token: with --lines, each line begins anew."""
        return self.settings.lines and token in (START, self.vocabulary.newline)

    def context(self, prompt: list[int]) -> list[int]:
        """What the model reads before the first token that it predicts."""
        ended = [index for index, token in enumerate(prompt, 1) if self.ends(token)]
        return [START, *prompt[max(ended, default=0) :]]

    def sample(
        self, model: nn.Module, prompt: list[int], length: int, temperature: float, top_k: int | None = None
    ) -> list[int]:
        """`length` tokens drawn after the prompt, always the same."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self.settings.seed)
        read, state, made = self.context(prompt), None, []
        for _ in bar(range(length), "sample"):
            logits, state = model(torch.tensor(read, device=device)[:, None], state=state)
            token = int(draw(logits[-1].float(), generator, temperature, top_k))
            made.append(token)
            read, state = ([START], None) if self.ends(token) else ([token], state)
        return made

    def likeliest(self, model: nn.Module, prompt: list[int], length: int, width: int) -> list[int]:
        """The likeliest continuation that a beam finds: `length` tokens, with --lines no further than the line."""
        read, state = torch.tensor(self.context(prompt), device=next(model.parameters()).device)[:, None], None
        if len(read) > 1:
            _, state = model(read[:-1])

        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, state = model(tokens[None], state=state)
            return logits[0].float(), state

        stop = self.vocabulary.newline if self.settings.lines else None
        found = beam_search(step, state, read[-1], width=width, length=length, stop=stop)
        return found[0][0].tokens


main = partial(command.main, LanguageModeling)


if __name__ == "__main__":
    sys.exit(main())
