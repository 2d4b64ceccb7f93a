"""Numbers into words: the data, the model with its attention, decoding, and that a kill changes nothing."""

import re
from pathlib import Path
from typing import Any

import num2words
import pytest
import torch
from killed_runs import die_and_resume, refused
from torch import nn

from bench import UsageError
from bench.train import translation
from bench.train.batches import NO_TARGET
from bench.train.loop import Run
from bench.train.translation import END, Pair, Translation, TranslationSettings, draw, load_pairs
from persistrnn.kernels.cells import CELLS

SMALL = ["--hidden=12", "--embedding=6", "--batch=4", "--pairs=120", "--digits=2", "--languages=en,de", "--steps=6"]
SMALL += ["--device=cpu"]


def settings(**given: Any) -> TranslationSettings:
    small = {"device": "cpu", "hidden": 12, "embedding": 6, "batch": 8, "pairs": 120, "digits": 2, "languages": "en,de"}
    small |= {"warmup": 2}
    return TranslationSettings.complete(small | given)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a moment; it writes into tmp_path / "run"."""
    return [*SMALL, "--output", str(tmp_path / "run")]


class TestPairs:
    def test_the_words_are_those_of_the_language(self) -> None:
        train, held_out, _ = load_pairs("en,fr_BE", 3, 300)
        assert Pair("en", 42, "forty-two") in train + held_out
        for pair in train + held_out:
            assert pair.words == num2words.num2words(pair.number, lang=pair.language)

    def test_a_held_out_number_is_so_in_every_language(self) -> None:
        train, held_out, _ = load_pairs("en,de,es", 4, 900)
        assert not {pair.number for pair in train} & {pair.number for pair in held_out}
        assert len(train + held_out) == 900 == len({*train, *held_out})
        assert 0.05 < len(held_out) / 900 < 0.15

    def test_they_are_always_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = load_pairs("en,de", 5, 200)
        assert one == load_pairs("en,de", 5, 200)
        assert load_pairs("en,nl", 5, 200)[-1] != one[-1]
        monkeypatch.setattr(num2words, "num2words", lambda number, lang: "seven")
        assert load_pairs("en,de", 5, 200)[-1] != one[-1], "the fingerprint is of the words"

    def test_few_digits_are_as_frequent_as_many(self) -> None:
        assert sorted(draw(2, 100)) == sorted(draw(2, 1000)) == list(range(100))
        numbers = draw(6, 3000)
        assert len(set(numbers)) == 3000
        sizes = [sum(len(str(number)) == digits for number in numbers) for digits in range(1, 7)]
        assert sizes[:2] == [10, 90]
        assert all(300 < size < 1000 for size in sizes[2:])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("en,xx", 2, 100), "--languages en,xx given: allowed are, with commas, .*,de,en,"),
            (("", 2, 100), "--languages  given: allowed are, with commas, .*,de,en,"),
            (("en,de", 1, 2), r"--pairs 2 of --digits 1 .*at least one of each is needed; allowed is"),
        ],
    )
    def test_what_makes_no_pairs(self, given: tuple[str, int, int], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            load_pairs(*given)

    def test_a_number_without_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def overflow(number: int, lang: str) -> str:
            raise OverflowError("abs(1000) must be less than 1000")

        monkeypatch.setattr(num2words, "num2words", overflow)
        with pytest.raises(UsageError, match=r"no words for \d+ in 'en' .*must be less than 1000.*lower --digits"):
            load_pairs("en", 4, 100)


class TestModel:
    @pytest.fixture(params=[("lstm", 1), ("gru", 1), ("slstm", 3)], ids=str)
    def run(self, request: pytest.FixtureRequest) -> Run:
        cell, heads = request.param
        return Run(Translation(settings(cell=cell, heads=heads, layers=2)))

    def test_batches(self, run: Run) -> None:
        (piece,) = run.workload.pieces(3, slice(0, 8))
        source, lengths, inputs, targets = piece.tensors
        assert source.shape == (lengths.max(), 8)
        assert inputs.shape == targets.shape
        assert piece.count == (targets != NO_TARGET).sum()
        known = {(pair.language, str(pair.number)): pair.words for pair in run.workload.train}
        names = list(run.workload.source_numbers)
        for row, length in enumerate(lengths.tolist()):
            language, *digits = (names[token] for token in source[:length, row])
            words = targets[targets[:, row] != NO_TARGET, row].tolist()
            assert words[-1] == END
            assert END not in words[:-1]
            assert "".join(run.workload.characters[token] for token in words[:-1]) == known[language, "".join(digits)]
            assert inputs[: len(words), row].tolist() == [END, *words[:-1]]
        (part,) = run.workload.pieces(3, slice(2, 5))
        assert part.tensors[0].shape[1] == 3
        assert torch.equal(part.tensors[1], lengths[2:5])
        assert not torch.equal(run.workload.pieces(4, slice(0, 8))[0].tensors[3], targets)

    def test_teacher_forcing_is_decoding_step_by_step(self, run: Run) -> None:
        source, lengths, inputs, _ = run.workload.pieces(0, slice(0, 8))[0].tensors
        with torch.no_grad():
            whole, _ = run.model(source, lengths, inputs)
            state, attended = run.model.encode(source, lengths)
            for step, tokens in enumerate(inputs):
                logits, state = run.model.decode(tokens[None], state, attended)
                torch.testing.assert_close(logits[0], whole[step])

    def test_every_state_goes_from_the_encoder_to_the_decoder(self, run: Run) -> None:
        source, lengths, inputs, _ = run.workload.pieces(0, slice(0, 8))[0].tensors
        first, attended = run.model.encode(source, lengths)
        first = first if isinstance(first, tuple) else (first,)
        assert len(first) == CELLS[run.settings.cell].states
        for state in first:
            assert state.shape == (2, 8, 12)
            weights = list(run.model.encoder.parameters())
            assert all(d.abs().max() > 0 for d in torch.autograd.grad(state.sin().sum(), weights, retain_graph=True))
        leaves = [state.detach().requires_grad_() for state in first]
        decoded = run.model.decode(inputs, tuple(leaves) if len(leaves) > 1 else leaves[0], attended)[0]
        assert all(d.abs().max() > 0 for d in torch.autograd.grad(decoded.sin().sum(), leaves))

    def test_further_states_keep_the_scale_of_the_second(self) -> None:
        """A normaliser stays positive, and no c is above it; where both directions agree, it is theirs."""
        run = Run(Translation(settings(cell="slstm", heads=2)))
        torch.manual_seed(0)
        c, n, m = torch.rand(3, 2, 8, 12) * 9
        given = torch.randn(2, 8, 12), c.minimum(n), n, m
        _, c, n, m = run.model.bridged(given)
        for found, (one, other) in zip((c, n, m), given[1:], strict=True):
            share = (found - other) / (one - other)
            torch.testing.assert_close(share, (n - given[2][1]) / (given[2][0] - given[2][1]), rtol=1e-3, atol=1e-3)
        assert (c <= n).all()
        assert (n > 0).all()
        same = tuple(state[:1].expand(2, -1, -1) for state in given)
        torch.testing.assert_close(run.model.bridged(same)[1:], tuple(state[:1] for state in same[1:]))

    def test_a_row_does_not_see_the_others(self, run: Run) -> None:
        """Nor what it is padded with: neither the encoder nor the attention does."""
        pairs = [Pair("en", 7, "seven"), Pair("de", 42, "zweiundvierzig")]
        with torch.no_grad():
            both, _ = run.model(*run.workload.piece(pairs).tensors[:3])
            for row, pair in enumerate(pairs):
                alone, _ = run.model(*run.workload.piece([pair]).tensors[:3])
                torch.testing.assert_close(both[: len(alone), row], alone[:, 0])

    def test_the_encoder_reads_both_ways(self, run: Run) -> None:
        """And the decoder attends to all of it: the first logits depend on every token of the source."""
        source, lengths, inputs, _ = run.workload.piece([Pair("en", 42, "forty-two")]).tensors
        with torch.no_grad():
            before, _ = run.model(source, lengths, inputs)
            for step in range(len(source)):
                changed = source.clone()
                changed[step] = 9 - changed[step] if step else 1
                assert (run.model(changed, lengths, inputs)[0] - before)[0].abs().max() > 1e-5

    def test_it_learns(self) -> None:
        """The numbers below a hundred in one language, half of which have one word or a rule."""
        run = Run(Translation(settings(hidden=48, languages="en", pairs=100, batch=30, steps=200, learning_rate=0.02)))
        before = run.evaluate()
        assert before[:2] == [0, 0]
        while not run.finished:
            run.train_step()
        exact, greedy, nats = run.evaluate()
        assert nats < 0.3 < 2 < before[2]
        assert exact >= 0.5
        assert greedy >= 0.5
        with run.using() as model:
            train = run.workload.train
            found = [run.workload.text(best[0]) for best in run.workload.translations(model, train, 1)]
        assert sum(pair.words == text for pair, text in zip(train, found, strict=True)) > 0.95 * len(train)


class TestEvaluation:
    def test_exact_matches_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With translations that are known: half of them are right with the beam, four of five without."""
        run = Run(Translation(settings(digits=3, pairs=600)))
        held_out = run.workload.held_out
        right = {4: 0, 1: 0}

        def translations(model: nn.Module, pairs: list[Pair], width: int) -> list[list[Any]]:
            found = []
            for pair in pairs:
                good = pair.number % 2 == 0 if width == 4 else pair.number % 5 > 0
                right[width] += good
                words = [run.workload.target_numbers[character] for character in pair.words]
                found.append([translation.Hypothesis(words[: None if good else -1], 0.0)])
            return found

        monkeypatch.setattr(run.workload, "translations", translations)
        exact, greedy, nats = run.evaluate()
        assert exact == right[4] / len(held_out)
        assert greedy == right[1] / len(held_out)
        assert 0 < exact < greedy < 1
        with torch.no_grad():
            tensors = run.workload.piece(held_out).tensors
            loss = run.workload.loss(run.model, tensors, None)[0]
        assert nats == pytest.approx(loss.item() / int((tensors[3] != NO_TARGET).sum()), rel=1e-5)

    def test_the_words_are_not_looked_at(self) -> None:
        run = Run(Translation(settings()))
        known, unknown = Pair("de", 21, "einundzwanzig"), Pair("de", 21, "")
        with run.using() as model:
            assert run.workload.translations(model, [known], 3) == run.workload.translations(model, [unknown], 3)


def test_killed_it_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = die_and_resume(translation.main, [*SMALL, "--layers=2", "--dropout=0.2"], tmp_path, monkeypatch)
    one, other = ((folder / "translations.txt").read_text() for folder in folders)
    assert one == other


def test_few_steps_have_a_short_warm_up() -> None:
    found = [TranslationSettings.complete({"device": "cpu", **given}).warmup for given in ({}, {"steps": 50})]
    assert found == [100, 5]
    assert TranslationSettings.complete({"device": "cpu", "steps": 50, "warmup": 0}).warmup == 0


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--digits 13", r"--digits: '13' given, allowed is a whole number from 1 to 12"),
            ("--truncate 8", r"--truncate 8 given: .*allowed is --truncate 0"),
            ("--translate=de", r"--translate given, but .*run holds no checkpoint: train first, or name --output"),
        ],
    )
    def test_errors_at_the_door(
        self, small: list[str], capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        assert re.search(message, refused(translation.main, [*small, *arguments.split()], capsys), re.DOTALL)

    def test_from_training_to_a_translation(
        self, small: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert translation.main(small) == 0
        output, errors = capsys.readouterr()
        assert re.search(r"\d+ numbers with words to train on, \d+ held out", output)
        assert re.search(r"6/6 .*nats/char, [\d,]+ characters/s", errors)
        assert re.search(r"of the held-out numbers exactly right, beam of 4  0\.\d{4}\n", output)
        shown = (tmp_path / "run" / "translations.txt").read_text()
        assert shown in output
        assert re.search(r"^de \d+: .*\(right: \w+\)$", shown, re.MULTILINE)

        out = ["--output", str(tmp_path / "run")]
        assert translation.main([*out, "--translate", "de 42"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4  # the beam's
        scores = [float(re.search(r"\(log-probability (-[\d.]+)\)$", line)[1]) for line in lines]  # type: ignore[index]
        assert scores == sorted(scores, reverse=True)
        assert translation.main([*out, "--translate", "de 42", "--beam", "2"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        for wrong in ("fr 42", "de", "de 123", "de -1", "42", "de ٣"):
            message = refused(translation.main, [*out, "--translate", wrong], capsys)
            assert f"--translate {wrong!r} given: allowed is a language of en,de, a space and a number of" in message
