"""Numbers in digits and in the words of several languages, from the package num2words."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from bench import UsageError
from bench.train.held_out import held_out
from bench.train.progress import bar

EXTRA = "num2words makes the words and is not installed: pip install 'persistrnn[translation]'"


class Pair(NamedTuple):
    language: str
    number: int
    words: str


class Pairs(NamedTuple):
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    fingerprint: str  # sha256 of all of them


def load_pairs(languages: str, digits: int, count: int) -> Pairs:
    """Up to `count` pairs: the same numbers, drawn once for all, in each language.

    Numbers of few digits are as frequent as those of many, as far as there are enough. A hash of the number decides
    on which side it falls, in all languages alike.

    Args:
        languages: num2words' names, with commas between them
        digits: the most of a number

    Raises:
        UsageError: an unknown language, one given twice, one that has no word for a number; num2words is missing
    """
    names, say = languages.split(","), speaker(languages)
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    digest = hashlib.sha256()
    for number in bar(draw(digits, max(1, count // len(names))), "words of numbers"):
        side = held_out(str(number))
        for name in names:
            pair = Pair(name, number, say(number, name))
            sides[side].append(pair)
            digest.update(repr(pair).encode())
    if not all(sides):
        raise UsageError(
            f"--pairs {count} of --digits {digits} in --languages {languages}: {len(sides[0])} to train on and "
            f"{len(sides[1])} held out, at least one of each is needed; allowed is more --pairs and --digits"
        )
    return Pairs(tuple(sides[0]), tuple(sides[1]), digest.hexdigest())


def draw(digits: int, count: int) -> list[int]:
    """`count` different numbers below 10**digits, always the same; all of them where there are no more."""
    if count >= 10**digits:
        return list(range(10**digits))
    source = random.Random(digits)
    found: dict[int, None] = {}
    while len(found) < count:
        size = source.randint(1, digits)
        found[source.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)] = None
    return list(found)


def speaker(languages: str) -> Callable[[int, str], str]:
    """(number, language) -> its words, for languages that num2words knows."""
    try:
        from num2words import CONVERTER_CLASSES, num2words
    except ImportError as error:
        raise UsageError(EXTRA) from error
    names = languages.split(",")
    unknown = [name for name in names if name not in CONVERTER_CLASSES]
    if unknown or len(set(names)) < len(names):
        wrong = f"{unknown[0]!r} is none" if unknown else "one is there twice"
        raise UsageError(
            f"--languages {languages} given, of which {wrong}: allowed are different ones of "
            f"{','.join(sorted(CONVERTER_CLASSES))}, with commas between them"
        )

    def say(number: int, language: str) -> str:
        try:
            return str(num2words(number, lang=language))
        except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise UsageError(
                f"num2words has no words for {number} in {language!r} ({error!r}): leave it out of --languages, or "
                "lower --digits"
            ) from error

    return say
