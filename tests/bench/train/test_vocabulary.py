"""Bytes and words."""

import pytest

from bench.train.vocabulary import START, UNKNOWN, Bytes, Words

TEXT = "\0def f(x1, été):\n\treturn x1 + 12  # ok\r\n\0\0def g(): pass".encode()


@pytest.mark.parametrize("vocabulary", [Bytes(), Words(TEXT, 100)], ids=["bytes", "words"])
def test_decoding_undoes_encoding(vocabulary: Bytes | Words) -> None:
    tokens = vocabulary.encode(TEXT).tolist()
    assert vocabulary.decode(tokens) == TEXT.decode()
    assert max(tokens) < len(vocabulary)
    assert tokens[0] == START
    assert tokens.count(START) == 3
    assert tokens.count(vocabulary.newline) == 2
    assert vocabulary.encode(b"").tolist() == []
    assert vocabulary.decode([]) == ""


def test_words_are_whole() -> None:
    words = Words(TEXT, 100)
    decoded = [words.decode([token]) for token in words.encode(b"def  f(x1):").tolist()]
    assert decoded == ["def", "  ", "f", "(", "x1", ")", ":"]


def test_frequent_words_are_known() -> None:
    words = Words(b"a a a b b c d\n", 6)
    assert words.words == ["\0", UNKNOWN, "\n", " ", "a", "b"]
    assert words.decode(words.encode(b"a c b new").tolist()) == "a <unk> b <unk>"
    assert len(Words(b"a", 1000)) == 4


def test_equal_counts_keep_their_order() -> None:
    assert Words(b"z y x w", 5).words == Words(b"w z x y", 5).words


def test_bytes_that_are_no_utf8() -> None:
    words = Words(b"\xff\xfe ok", 100)
    assert words.decode(words.encode(b"ok \xff").tolist()) == "ok �"
