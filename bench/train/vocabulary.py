"""Tokens of a text: its bytes, or its words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bench.train.progress import bar

START = 0  # a NUL opens every file: Python source never contains one, so sampling can begin there
UNKNOWN = "<unk>"  # stands for every word outside the vocabulary

# Names, numbers, runs of spaces, and every other character alone: joined again they are the text.
WORD = re.compile(r"[^\W\d]\w*|\d+| +|[^\w ]")


class Vocabulary(Protocol):
    name: str  # of one token
    newline: int  # the token

    def __len__(self) -> int: ...

    def encode(self, text: bytes) -> Tensor:
        """(N,) integers of any dtype."""

    def decode(self, tokens: Sequence[int]) -> str: ...


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
        numbers, unknown = self.numbers, self.unknown
        parts = []
        for index, file in enumerate(bar(text.split(b"\0"), "words")):
            tokens = [START] * (index > 0) + [
                numbers.get(w, unknown) for w in WORD.findall(file.decode(errors="replace"))
            ]
            parts.append(torch.tensor(tokens, dtype=torch.int32))
        return torch.cat(parts)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token] for token in tokens)
