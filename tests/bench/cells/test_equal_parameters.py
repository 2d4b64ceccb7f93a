"""``python -m bench.cells``: every cell at equal parameters, stopped and gone on, and what it writes."""

import re
import signal
from pathlib import Path

import pytest
from html_page import Page
from killed_runs import python_source, refused

from bench import UsageError
from bench.cells import __main__ as command
from bench.cells import page, results, training
from bench.cells.training import Which
from bench.report import provenance
from bench.train.language_model import LanguageModel, TextSettings
from bench.train.loop import Run
from persistrnn.profiling import drawing

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "bench" / "results" / "cells"
SMALL = "--parameters 25000 --steps 5 --batch 2 --sequence 8 --embedding 8 --cells lstm slstm:4 rnn_relu"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a comparison that takes a moment."""
    return [*SMALL.split(), "--text", str(python_source(tmp_path / "source")), "--output", str(tmp_path / "cells")]


@pytest.mark.parametrize("which", command.EVERY, ids=str)
def test_each_cell_comes_as_near_as_it_can(which: Which) -> None:
    wanted = 60_000
    given = {"device": "cpu", "cell": which.cell, "heads": which.heads, "layers": 2, "embedding": 16}
    found = training.sized(TextSettings.complete(given), wanted)
    assert found.hidden % which.heads == 0
    counts = [
        sum(weight.numel() for weight in LanguageModel(each, "auto", 256).parameters())
        for step in (-1, 0, 1)
        for each in [TextSettings.complete({**given, "hidden": found.hidden + step * which.heads})]
    ]
    assert counts[1] == training.parameters(found)
    assert min(counts, key=lambda count: abs(count - wanted)) == counts[1]
    assert abs(counts[1] - wanted) < 0.03 * wanted


def test_fewer_parameters_than_any_model_has() -> None:
    settings = TextSettings.complete({"device": "cpu", "cell": "slstm", "heads": 4})
    with pytest.raises(UsageError, match=r"--parameters 99 given: the smallest model of slstm:4 has [\d,]+; allowed"):
        training.sized(settings, 99)


def test_curves_are_means_of_all_steps() -> None:
    losses = [float(n) for n in range(103)]
    row = training.row(Which("lstm"), TextSettings.complete({"device": "cpu"}), "torch", 2.0, losses)
    assert row.every == 3
    assert row.losses[:2] == [1.0, 4.0]
    assert row.losses[-1] == 102.0
    assert row.curve[0][:2] == [1.5, 4.5]


def test_stopped_it_goes_on(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the middle of the second cell; in the end everything is as if it had not been, and all of it is written."""
    out, whole_step = tmp_path / "cells", Run.train_step

    def train_step(run: Run) -> None:
        if run.settings.cell == "slstm" and run.step == 2:
            signal.raise_signal(signal.SIGTERM)
        whole_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", train_step)
        assert command.main(small) == 143
    assert "SIGTERM: every step taken is saved; the same command goes on." in capsys.readouterr().out
    assert [row.cell for row in results.read(out / "results.json").rows] == ["lstm"]
    taken: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", lambda run: (taken.append(run.settings.cell), whole_step(run)))
        assert command.main(small) == 0
    assert taken == ["slstm"] * 2 + ["rnn_relu"] * 5
    found = results.read(out / "results.json")
    assert command.main([*small, "--output", str(tmp_path / "whole")]) == 0
    assert results.read(tmp_path / "whole" / "results.json").rows == found.rows
    assert [(row.cell, row.heads, row.path) for row in found.rows] == [
        ("lstm", 1, "torch"), ("slstm", 4, "stepwise"), ("rnn_relu", 1, "torch"),
    ]  # fmt: skip
    assert all(len(row.losses) == 5 and 5 < row.quality < 9 for row in found.rows)

    text = (out / "table.md").read_text()
    assert text.startswith(page.markdown(found))
    for words in ("Nothing here is a speed", "torch 2.", "python -m bench.cells --parameters 25000", "one seed (0)"):
        assert words in text
    shown = Page((out / "cells.html").read_text())
    assert len(shown.drawings) == 1
    assert [row[0] for row in shown.rows("The best first")][-3:] == [row.name for row in found.best_first]
    drawn = (out / "cells.svg").read_text()
    assert all(row.name in drawn and f"{row.quality:.3f}" in drawn for row in found.rows)
    names = {path.name for path in out.iterdir()}
    assert names == {"results.json", "table.md", "cells.svg", "cells.html", "lock", "lstm", "slstm-4", "rnn_relu"}


def test_a_comparison_is_of_one_kind(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    few = [*small, "--cells", "lstm", "lstm"]
    assert command.main(few) == 0
    assert len(results.read(tmp_path / "cells" / "results.json").rows) == 1
    assert "was made with steps 5, now it is 6: give the same, or begin anew" in refused(
        command.main, [*few, "--steps", "6"], capsys
    )
    (tmp_path / "source" / "more.py").write_text("more = 1\n" * 100)
    assert re.search("was made with (text|trained|held_out)", refused(command.main, few, capsys))
    (tmp_path / "source" / "more.py").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_output", lambda *command: "another commit")
        assert "with commit" in refused(command.main, few, capsys)
    (tmp_path / "cells" / "results.json").write_text("{}")
    assert "begin anew with --overwrite" in refused(command.main, few, capsys)
    assert command.main([*few, "--overwrite", "--seed", "1"]) == 0
    assert results.read(tmp_path / "cells" / "results.json").protocol.seed == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cells lstm relay", r"'relay' given, allowed are lstm, gru, .*slstm:4"),
        ("--cells slstm:0", r"'0' given, allowed is a whole number from 1"),
        ("--parameters 10", r"--parameters 10 given: the smallest model of lstm has [\d,]+"),
        ("--learning-rate 0", r"'0' given, allowed is a number above 0"),
    ],
)
def test_errors_at_the_door(small: list[str], capsys, arguments: str, message: str) -> None:
    assert re.search(message, refused(command.main, [*small, *arguments.split()], capsys))


def test_what_is_committed_is_what_today_s_code_makes_of_it() -> None:
    found = results.read(COMMITTED / "results.json")
    assert not found.provenance.dirty
    trained = {Which(row.cell, row.heads) for row in found.rows}
    assert trained <= set(command.EVERY), "a cell that is no longer there: run `make cells` and commit what it writes"
    assert len(trained) == len(found.rows) >= 10
    own = {name: getattr(found.protocol, name) for name in command.OWN}
    for row in found.rows:
        given = {"device": "cpu", "cell": row.cell, "heads": row.heads, **own}
        settings = training.sized(TextSettings.complete(given), found.protocol.parameters)
        assert (row.hidden, row.parameters) == (settings.hidden, training.parameters(settings))
    assert page.markdown(found) in (COMMITTED / "table.md").read_text()
    assert page.markdown(found) in (ROOT / "bench" / "README.md").read_text()
    drawn = (COMMITTED / "cells.svg").read_text()
    assert len(drawn) < 60_000
    assert all(row.name in drawn and f"{row.quality:.3f}" in drawn for row in found.rows)
    with drawing.style():
        assert page.draw(found).alt in drawn
