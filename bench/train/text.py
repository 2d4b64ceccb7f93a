"""The text that every machine has: the source of Python's own standard library, as bytes or words, read on and on or
line by line."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from bench import UsageError
from bench.train.batches import held_out, teacher_forced
from bench.train.progress import bar

START = 0  # a NUL opens every file: Python source never contains one, so sampling can begin there
UNKNOWN = "<unk>"  # stands for every word outside the vocabulary

# Names, numbers, runs of spaces, and every other character alone: joined again they are the text.
WORD = re.compile(r"[^\W\d]\w*|\d+| +|[^\w ]")

# Other people's packages; tests (many systems leave them out, and the text should be the same with and
# without); generated files (tables so alike that a held-out one is known from its neighbours, and the manual).
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Corpus(NamedTuple):
    texts: tuple[bytes, bytes]  # to train on, and held out: whole files one after the other, each opened by START
    files: tuple[list[str], list[str]]
    fingerprint: str  # sha256 of both texts; a resumed run must read the very same bytes


def load_corpus(folder: Path) -> Corpus:
    """Reads every .py file below `folder`, in the order of the names' hashes: the same everywhere, and every stretch of
    the text is a fair mix of it. A hash of its name decides on which side a file falls."""
    texts = bytearray(), bytearray()
    names: tuple[list[str], list[str]] = [], []
    for name in sorted(source_files(folder), key=lambda name: hashlib.sha256(name.encode()).digest()):
        side = held_out(name)
        names[side].append(name)
        texts[side].append(START)
        texts[side].extend((folder / name).read_bytes())
    if not all(texts):
        raise UsageError(
            f"--text {folder}: {len(names[0])} training and {len(names[1])} held-out .py files found, at least one of "
            "each is needed; name a folder that holds more Python source"
        )
    return Corpus((bytes(texts[0]), bytes(texts[1])), names, hashlib.sha256(texts[0] + texts[1]).hexdigest())


def source_files(folder: Path) -> Iterator[str]:
    """The name, relative to `folder`, of every .py file below."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths = [Path(root) / name for name in files if name.endswith(".py")]
        yield from (path.relative_to(folder).as_posix() for path in paths if path.is_file())  # no pipe, no broken link


def window(text: Tensor, step: int, batch: int, sequence: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the next token) of one step: two int64 tensors of shape (sequence, batch).

    Column b reads the text from its b-th of `batch` equal parts onwards and step after step continues where
    the step before ended (past the end it begins anew), so the layer's state may be carried over.
    """
    starts = torch.arange(batch, device=text.device) * (len(text) // batch)
    offsets = torch.arange(sequence + 1, device=text.device) + step * sequence
    tokens = text[(offsets[:, None] + starts) % len(text)].long()
    return tokens[:-1], tokens[1:]


class Lines:
    """The lines of a text, each up to and including its newline or the next file's START; empty ones are left out.

    Args:
        text: 1-D tokens
        newline: the token that ends a line
        longest: lines are cut to as many tokens
    """

    def __init__(self, text: Tensor, newline: int, longest: int) -> None:
        self.text = torch.cat([text, text.new_tensor([START])])
        ends = ((self.text == newline) | (self.text == START)).nonzero().flatten()
        starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        lengths = ends - starts + 1
        self.starts = starts[lengths > 1]
        self.lengths = lengths[lengths > 1].clamp(max=longest)
        if not len(self.lengths):
            raise UsageError("--lines given, and there is no line that is not empty: name more Python source by --text")

    def padded(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some lines what `teacher_forced` makes: START opens each."""
        places = zip(self.starts[indices].tolist(), self.lengths[indices].tolist(), strict=True)
        return teacher_forced([self.text[start : start + length] for start, length in places])


class Bytes:
    """A token is one byte."""

    name = "byte"
    newline = ord("\n")

    def __len__(self) -> int:
        return 256

    def encode(self, text: bytes) -> Tensor:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Words:
    """A token is one of the most frequent words of a text, START, or UNKNOWN.

    Args:
        text: of which the words are counted
        size: of the vocabulary; it has fewer tokens where the text has fewer words
    """

    name = "word"

    def __init__(self, text: bytes, size: int) -> None:
        counts: Counter[str] = Counter()
        for file in bar(text.split(b"\0"), "words"):
            counts.update(WORD.findall(file.decode(errors="replace")))
        counts["\n"] += 1  # --lines needs it
        # Equal counts in the order of the alphabet: the same text gives the same numbers.
        frequent = sorted(counts, key=lambda word: (word != "\n", -counts[word], word))
        self.words = ["\0", UNKNOWN, *frequent[: size - 2]]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.newline = self.numbers["\n"]
        self.unknown = self.numbers[UNKNOWN]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: bytes) -> Tensor:
        parts = []
        for index, file in enumerate(bar(text.split(b"\0"), "words")):
            words = ["\0"] * (index > 0) + WORD.findall(file.decode(errors="replace"))
            parts.append(torch.tensor([self.numbers.get(word, self.unknown) for word in words], dtype=torch.int32))
        return torch.cat(parts)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token] for token in tokens)
