"""Sequence to sequence: numbers in digits become words (of the package num2words), in several languages, character by
character.

An encoder reads the digits both ways, a decoder writes the words and attends to it (Luong et al. 2015, the score that
they call general). `Translator` is the model; S source steps, T target steps, B rows, H hidden units.
"""

import hashlib
import random
import sys
from argparse import Namespace, _ArgumentGroup
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench import UsageError
from bench.train import command
from bench.train.batches import Buckets, held_out, teacher_forced
from bench.train.decoding import Hypothesis, beam_search
from bench.train.layers import recurrent, run_padded
from bench.train.options import Backend, Settings, number, option
from bench.train.progress import bar
from bench.train.workload import Piece, Workload
from persistrnn.kernels.cells import CELLS

END = 0  # the target's first input and its last token
BEAM = 4  # hypotheses kept, of the measurement and by default
EVALUATED = 1000  # held-out pairs, at most


@dataclass(frozen=True, kw_only=True)
class TranslationSettings(Settings):
    hidden: int = 128
    batch: int = 64
    steps: int = 3000
    learning_rate: float = 6e-3
    warmup: int = option(
        None, "steps over which the learning rate rises (default 100, at most a tenth of --steps)", type=number(int, 0)
    )
    embedding: int = option(32, "width of a token's embedding", type=number(int, 1))
    languages: str = option("de,en,es,fr", "of the words, by num2words' names", metavar="NAME,NAME,...")
    digits: int = option(6, "the most of a number", type=number(int, 1, 12))
    pairs: int = option(32_000, "numbers with their words, of which one in ten is held out", type=number(int, 2))

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        return super().defaults(given) | {"warmup": min(100, given.get("steps", cls.steps) // 10)}

    @property
    def whole(self) -> bool:
        return True


class Pair(NamedTuple):
    language: str
    number: int
    words: str


def load_pairs(languages: str, digits: int, count: int) -> tuple[list[Pair], list[Pair], str]:
    """Up to `count` pairs: the same numbers of up to so many digits in each of the languages, num2words' names with
    commas between them. A hash of the number decides on which side it falls, in all languages alike. Returns those to
    train on, those held out and a sha256 of all."""
    from num2words import CONVERTER_CLASSES, num2words  # only here: the other programs do not need it

    names = languages.split(",")
    if not set(names) <= CONVERTER_CLASSES.keys():
        raise UsageError(
            f"--languages {languages} given: allowed are, with commas, {','.join(sorted(CONVERTER_CLASSES))}"
        )
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for figure in bar(draw(digits, max(1, count // len(names))), "words of numbers"):
        for name in names:
            try:
                words = str(num2words(figure, lang=name))
            except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
                raise UsageError(
                    f"num2words has no words for {figure} in {name!r} ({error!r}): leave it out of --languages, or "
                    "lower --digits"
                ) from error
            sides[held_out(str(figure))].append(Pair(name, figure, words))
    if not all(sides):
        raise UsageError(
            f"--pairs {count} of --digits {digits} in --languages {languages}: {len(sides[0])} to train on and "
            f"{len(sides[1])} held out, at least one of each is needed; allowed is more --pairs and --digits"
        )
    return *sides, hashlib.sha256(repr(sides).encode()).hexdigest()


def draw(digits: int, count: int) -> list[int]:
    """`count` different numbers below 10**digits, always the same; all of them where there are no more. Numbers of few
    digits are as frequent as those of many, as far as there are enough."""
    if count >= 10**digits:
        return list(range(10**digits))
    source = random.Random(digits)
    found: dict[int, None] = {}
    while len(found) < count:
        size = source.randint(1, digits)
        found[source.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)] = None
    return list(found)


class Translator(nn.Module):
    """Encoder, decoder and attention; the decoder begins with what the encoder has in the end."""

    def __init__(self, settings: TranslationSettings, backend: Backend, sources: int, targets: int) -> None:
        super().__init__()
        hidden = settings.hidden
        self.source = nn.Embedding(sources, settings.embedding)
        self.encoder = recurrent(settings, backend, settings.embedding, bidirectional=True)
        self.bridges = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in range(CELLS[settings.cell].given_out))
        self.target = nn.Embedding(targets, settings.embedding)
        self.decoder = recurrent(settings, backend, settings.embedding)
        self.score = nn.Linear(2 * hidden, hidden, bias=False)
        self.mix = nn.Linear(3 * hidden, hidden)
        self.linear = nn.Linear(hidden, targets)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
        """(S, B) tokens and (B,) lengths -> the decoder's first state, and what `decode` attends to."""
        memory, states = run_padded(self.encoder, self.source(source), lengths)
        states = states if isinstance(states, tuple) else (states,)
        first = self.bridged(states)
        present = torch.arange(len(source), device=source.device)[:, None] < lengths
        return (first if len(first) > 1 else first[0]), (memory, self.score(memory), present)

    def bridged(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The encoder's final states, each (layers*2, B, H), as the decoder's first ones, (layers, B, H).

        h, and the c of a cell of two states, are drawn anew from both directions. Further states give the second one
        its scale (a normaliser, a stabiliser): each unit then takes the same share of either direction in all of them,
        and what holds between them (|c| <= n, n > 0) still does.
        """
        both = (state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2) for state in states)  # (layers, B, 2H)
        bridges = [bridge(state) for bridge, state in zip(self.bridges, both, strict=False)]
        if len(states) <= len(bridges):
            return tuple(torch.tanh(b).to(s.dtype) for b, s in zip(bridges, states, strict=True))
        share = torch.sigmoid(bridges[1]).to(states[1].dtype)
        mixed = (share * s[0::2] + (1 - share) * s[1::2] for s in states[1:])
        return torch.tanh(bridges[0]).to(states[0].dtype), *mixed

    def decode(self, tokens: Tensor, state: Any, attended: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Any]:
        """(T, B) tokens after the state -> (T, B, targets) logits of those that follow, and the state after them."""
        memory, keys, present = attended  # (S, B, 2H), (S, B, H), (S, B)
        y, state = self.decoder(self.target(tokens), state)
        scores = torch.einsum("tbh,sbh->bts", y, keys).masked_fill(~present.T[:, None], -torch.inf)
        context = torch.einsum("bts,sbh->tbh", scores.softmax(-1).to(memory.dtype), memory)
        return self.linear(torch.tanh(self.mix(torch.cat([context, y], -1)))), state

    def forward(self, source: Tensor, lengths: Tensor, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Teacher forcing: the logits after each of the right tokens. No state goes on to other pairs."""
        return self.decode(inputs, *self.encode(source, lengths))[0], None


class Translation(Workload):
    name = "translation"
    description = "Trains a translator of numbers into words, with encoder, decoder and attention."
    settings_type = TranslationSettings
    using = "translate"
    loss_unit = "nats/char"
    unit = "characters"

    settings: TranslationSettings

    def __init__(self, settings: TranslationSettings) -> None:
        self.settings = settings
        self.data = f"the words of --languages {settings.languages}"
        self.train, self.held_out, self.fingerprint = load_pairs(settings.languages, settings.digits, settings.pairs)
        every = [*self.train, *self.held_out]
        names = [*"0123456789", *settings.languages.split(",")]
        self.source_numbers = {name: index for index, name in enumerate(names)}
        self.characters = ["", *sorted(set().union(*(pair.words for pair in every)))]
        self.target_numbers = {name: index for index, name in enumerate(self.characters)}
        self.sequence = self.longest = max(len(pair.words) for pair in every) + 1
        self.summary = f"{len(self.train):,} numbers with words to train on, {len(self.held_out):,} held out"
        lengths = torch.tensor([len(pair.words) for pair in self.train])
        self.buckets = Buckets(lengths, settings.batch, settings.seed)
        self.metrics = (
            f"of the held-out numbers exactly right, beam of {BEAM}",
            "of them exactly right without a beam",
            "nats per held-out character (lower is better)",
        )

    @classmethod
    def add_options(cls, job: _ArgumentGroup) -> None:
        say = "do not train: say this number, by the model in --output"
        keep = "hypotheses kept in translating; the quality is always that of the default (%(default)s)"
        job.add_argument("--translate", default=None, metavar="'LANGUAGE NUMBER'", help=say)
        job.add_argument("--beam", type=number(int, 1), default=BEAM, metavar="W", help=keep)

    def model(self, backend: Backend) -> Translator:
        return Translator(self.settings, backend, len(self.source_numbers), len(self.characters))

    def pieces(self, step: int, rows: slice) -> list[Piece]:
        pairs = [self.train[index] for index in self.buckets.batch(step)[rows].tolist()]
        return [self.piece(pairs)]

    def piece(self, pairs: Sequence[Pair]) -> Piece:
        """Sources (S, B), their lengths (B,), the decoder's inputs and its targets (T, B): int64."""
        sources = [torch.tensor([self.source_numbers[n] for n in (pair.language, *str(pair.number))]) for pair in pairs]
        words = [torch.tensor([self.target_numbers[c] for c in pair.words] + [END]) for pair in pairs]
        lengths = torch.tensor([len(source) for source in sources])
        return Piece.of(pad_sequence(sources), lengths, *teacher_forced(words)[:2])

    def evaluate(self, model: nn.Module) -> list[float]:
        """Exact matches of whole words, with a beam and without, and the loss, on the first held-out pairs."""
        pairs, right = self.held_out[:EVALUATED], [0, 0]
        parts = [pairs[first : first + 100] for first in range(0, len(pairs), 100)]
        for part in bar(parts, "held-out numbers"):
            for index, width in enumerate((BEAM, 1)):
                found = self.translations(model, part, width)
                right[index] += sum(pair.words == self.text(best[0]) for pair, best in zip(part, found, strict=True))
        exact, greedy = (count / len(pairs) for count in right)
        return [exact, greedy, self.mean_loss(model, map(self.piece, parts))]

    def translations(self, model: nn.Module, pairs: Sequence[Pair], width: int) -> list[list[Hypothesis]]:
        """What a beam of `width` finds for each pair's number, the best first; the pair's words are not looked at."""
        assert isinstance(model, Translator)
        device = model.linear.weight.device
        source, lengths, *_ = self.piece(pairs).tensors
        begun = model.encode(source.to(device), lengths.to(device))

        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            logits, after = model.decode(tokens[None], *state)
            return logits[0].float(), (after, state[1])

        start = torch.full((len(pairs),), END, device=device)
        return beam_search(step, begun, start, width=width, length=self.longest, stop=END)

    def text(self, hypothesis: Hypothesis) -> str:
        return "".join(self.characters[token] for token in hypothesis.tokens)

    def finish(self, model: nn.Module, job: Namespace, folder: Path) -> None:
        pairs = self.held_out[-12:]
        lines = []
        for pair, found in zip(pairs, self.translations(model, pairs, job.beam), strict=True):
            said = self.text(found[0])
            lines.append(f"{pair.language} {pair.number}: {said}{f'   (right: {pair.words})' * (said != pair.words)}")
        path = folder / "translations.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"Held-out numbers (in {path}):\n\n" + "\n".join(lines) + "\n")

    def use(self, model: nn.Module, job: Namespace) -> None:
        names, digits = self.settings.languages.split(","), self.settings.digits
        language, _, figures = job.translate.partition(" ")
        if language not in names or not (figures.isascii() and figures.isdigit() and len(figures) <= digits):
            raise UsageError(
                f"--translate {job.translate!r} given: allowed is a language of {','.join(names)}, a space and a "
                f"number of up to {digits} digits, which is what the model in --output has learnt; 'de 42', say"
            )
        for hypothesis in self.translations(model, [Pair(language, int(figures), "")], job.beam)[0]:
            print(f"{self.text(hypothesis)}   (log-probability {hypothesis.score:.2f})")


main = partial(command.main, Translation)


if __name__ == "__main__":
    sys.exit(main())
