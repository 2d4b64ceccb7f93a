"""The text of the language model: its files, its windows and lines, bytes and words."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from killed_runs import python_source

from bench import UsageError
from bench.train import text
from bench.train.text import START, UNKNOWN, Bytes, Words

TEXT = "\0def f(x1, été):\n\treturn x1 + 12  # ok\r\n\0\0def g(): pass".encode()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return python_source(tmp_path / "source")


class TestFiles:
    def test_the_same_files_give_the_same_text(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(source, copy)
        one = text.load_corpus(source)
        walk = os.walk
        monkeypatch.setattr(os, "walk", lambda folder, **_: reversed(list(walk(folder))))  # another file system
        other = text.load_corpus(copy)
        assert one == other
        (copy / one.files[0][0]).write_text("changed = True\n")
        assert text.load_corpus(copy).fingerprint != one.fingerprint

    def test_every_file_is_on_one_side(self, source: Path) -> None:
        corpus = text.load_corpus(source)
        every = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
        train, held_out = map(set, corpus.files)
        assert not train & held_out
        assert train | held_out == every
        for content, names in zip(corpus.texts, corpus.files, strict=True):
            assert content == b"".join(b"\0" + (source / name).read_bytes() for name in names)
        for index in range(20):
            (source / f"new_{index}.py").write_text("pass\n")
        for before, after in zip(corpus.files, text.load_corpus(source).files, strict=True):
            assert set(before) < set(after), "a new file moves no other"

    def test_foreign_code_and_tests_are_left_out(self, source: Path) -> None:
        before = text.load_corpus(source)
        for name in ("site-packages", "test", "idle_test"):
            (source / "package_0" / name / "deep").mkdir(parents=True)
            (source / "package_0" / name / "deep" / "module.py").write_text("pass\n")
        (source / "gone.py").symlink_to(source / "nowhere.py")
        os.mkfifo(source / "pipe.py")
        assert text.load_corpus(source) == before

    def test_the_standard_library_is_there(self) -> None:
        corpus = text.load_corpus(Path(sysconfig.get_path("stdlib")))
        train, held_out = corpus.texts
        assert len(train) > 5_000_000
        assert 0.03 < len(held_out) / len(train) < 0.2
        assert [content.count(b"\0") for content in corpus.texts] == [len(names) for names in corpus.files]

    def test_that_cannot_be_read(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match=r"--text \S+empty: 0 training and 0 held-out .py files found"):
            text.load_corpus(tmp_path / "empty")
        with pytest.raises(FileNotFoundError):
            text.load_corpus(tmp_path / "none")

        def read_bytes(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        with pytest.raises(PermissionError):
            text.load_corpus(source)


def test_windows_continue_the_text() -> None:
    tokens = torch.arange(100, dtype=torch.uint8)
    inputs, targets = text.window(tokens, 0, batch=4, sequence=10)
    assert inputs.shape == targets.shape == (10, 4)
    assert inputs[0].tolist() == [0, 25, 50, 75]
    assert torch.equal(targets[:-1], inputs[1:])
    following, _ = text.window(tokens, 1, batch=4, sequence=10)
    assert torch.equal(following[0], targets[-1])
    beyond, _ = text.window(tokens, 9, batch=4, sequence=10)
    assert beyond[:, 0].tolist() == list(range(90, 100))
    assert beyond[:, 3].tolist() == list(range(65, 75))


def test_the_lines_are_those_of_the_text() -> None:
    content = b"\0first\n\n  second\n\0no newline\0x = 1\n\nlast"
    lines = text.Lines(Bytes().encode(content), 10, longest=8)
    inputs, targets, lengths = lines.padded(torch.arange(5))
    read = [bytes(targets[:length, row].tolist()) for row, length in enumerate(lengths.tolist())]
    assert read == [b"first\n", b"  second", b"no newli", b"x = 1\n", b"last\0"]
    for row, length in enumerate(lengths.tolist()):
        assert inputs[:length, row].tolist() == [0, *targets[: length - 1, row].tolist()]
        assert (targets[length:, row] == -100).all()


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
    assert Words(b"z y x w", 5).words == Words(b"w z x y", 5).words, "equal counts, in any order"


def test_bytes_that_are_no_utf8() -> None:
    words = Words(b"\xff\xfe ok", 100)
    assert words.decode(words.encode(b"ok \xff").tolist()) == "ok �"
