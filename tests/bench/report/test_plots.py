"""Every plot has its numbers, can be read, and says what is only predicted."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from synthetic import add, case, many, pair, predicted, raced, results, timing

from bench.report import plots
from bench.report.results import ARMS, Results
from persistrnn.profiling import drawing
from persistrnn.profiling.page import Part


def draw(found: Results) -> list[Part]:
    with drawing.style():
        return plots.draw(found)


def drawn(found: Results, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures, by name, laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures: dict[str, Any] = {}

    def keep(figure: Any, name: str, *rest: Any, **more: Any) -> Any:
        plot = finish(figure, name, *rest, **more)
        FigureCanvasAgg(figure).draw()
        figures[name] = figure
        return plot

    finish = drawing.finish
    monkeypatch.setattr(drawing, "finish", keep)
    draw(found)
    return figures


def texts(axes: Any) -> list[list[Any]]:
    """The boxes of the labels along x and of those along y; of ticks beyond the limits nothing is drawn."""
    sides = ((axes.get_xticklabels(), axes.get_xlim()), (axes.get_yticklabels(), axes.get_ylim()))
    return [
        [t.get_window_extent() for t in side if t.get_text() and t.get_visible() and low <= t.get_position()[n] <= high]
        for n, (side, (low, high)) in enumerate(sides)
    ]


@pytest.mark.parametrize("make", [many, raced, lambda: add(results(), *pair(64, 100, 400))])
def test_nothing_overlaps_or_is_cut_off(make: Callable[[], Results], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(make(), monkeypatch)
    assert len(figures) >= 4
    for name, figure in figures.items():
        (legend,) = figure.legends
        fixed = [legend.get_window_extent(), figure._suptitle.get_window_extent()]
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            for one in fixed:
                assert not one.overlaps(axes.get_window_extent()), name
            rotated = any(text.get_rotation() for text in axes.get_xticklabels())
            for boxes in texts(axes):
                assert rotated or not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), name
                fixed += boxes
        for box in fixed:
            assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, name
            assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, name


def test_many_cases_are_on_figures_of_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [figure.axes[0] for name, figure in drawn(many(), monkeypatch).items() if name.startswith("speedup")]
    assert [len(axes.get_yticks()) for axes in every] == [44, 44, 42]
    assert len({axes.get_xlim() for axes in every}) == 1
    assert len({text.get_text() for axes in every for text in axes.get_yticklabels()}) == 130
    assert plots._figures(range(31), plots.PANELS) == [
        (range(11), " (1 of 3)"), (range(11, 22), " (2 of 3)"), (range(22, 31), " (3 of 3)"),
    ]  # fmt: skip


def points(axes: Any, name: str) -> list[tuple[float, float]]:
    (found,) = (c for c in axes.collections if c.get_label() == name)
    return [(float(x), float(y)) for x, y in found.get_offsets()]


def test_numbers_are_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed-ups are sorted; what is measured is a point, what is predicted a line or hollow."""
    found, less = raced(), case(hidden=64, batch=2, mode="training")
    add(found, timing(less, peak=1 << 20), timing(less, "torch", peak=5 << 20))
    figures = drawn(found, monkeypatch)
    (axes,) = figures["speedup-0"].axes
    expected = [f"a name: lstm H={hidden} B=16 T=100" for hidden in (256, 1024, 512)]
    assert [text.get_text() for text in axes.get_yticklabels()] == expected
    assert points(axes, "over torch") == [(4, 0), (4, -1), (0.5, -2)]
    assert 1.0 in axes.lines[0].get_xdata()
    (axes,) = figures["step-0"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {name: line.get_linestyle() for name, line in lines.items()} == {
        "floor, predicted": "-", "persistrnn, predicted": "--",
    }  # fmt: skip
    assert list(lines["persistrnn, predicted"].get_xydata()[:, 1]) == [4.0] * 3
    assert points(axes, "persistrnn, measured") == [(256, 1), (512, 2), (1024, 3)]
    assert points(axes, "torch, measured") == [(256, 4), (512, 1), (1024, 12)]
    by_title = {axes.get_title(): axes for axes in figures["floor"].axes}
    assert by_title.keys() == {"bf16, forward", "bf16, training"}
    assert points(by_title["bf16, forward"], "suite, measured") == [(256, 0.5), (512, 1), (1024, 1.5)]
    (unmeasured,) = drawn(predicted(), monkeypatch)["floor"].axes
    assert points(unmeasured, "suite, predicted") == [(256, 2), (512, 2), (1024, 2)]
    assert len(unmeasured.collections[0].get_facecolors()) == 0, "hollow"
    by_title = {axes.get_title(): axes for axes in figures["memory"].axes}
    assert points(by_title["training"], "other") == [(3, 3)]
    assert points(by_title["training"], "suite") == [(5, 1)], "torch along x"


def test_ticks_of_logarithmic_axes_are_the_numbers_that_they_stand_at() -> None:
    with drawing.style():
        axes = drawing.figure(6, 3).subplots()
        axes.plot([64, 1 << 16], [3e4, 5e5])
        drawing.log(axes, "x", base=2)
        drawing.log(axes, "y", unit="x")
        ticks = axes.get_xticklabels() + axes.get_yticklabels()
        places = [*axes.get_xticks(), *axes.get_yticks()]
        axes.figure.draw_without_rendering()
    for text, place in zip(ticks, places, strict=True):
        factor = 1024 if text.get_text().endswith("k") else 1
        assert float(text.get_text().rstrip("kx").replace(",", "")) * factor == pytest.approx(place)
    assert {"64", "64k", "50,000x"} <= {text.get_text() for text in ticks}


def test_unmeasured_is_drawn_as_predicted_or_left_out_with_a_sentence() -> None:
    speedups, times, floors, memory = draw(predicted())
    assert speedups.plots == memory.plots == []
    assert speedups.sentences[-1].startswith("3 of 3 cases have no speed-up")
    assert memory.sentences[-1].startswith("3 of 3 cases have no peak memory")
    for plot in (times.plots[0], floors.plots[0]):
        assert "predicted; not yet measured" in plot.svg
    for section in draw(results()):
        assert section.plots == []
        assert len(section.sentences) == 2


def test_rehearsal_is_written_on_every_plot() -> None:
    made = [plot for section in draw(add(results(rehearsal=True), *pair(256, 100, 400))) for plot in section.plots]
    assert len(made) == 4
    assert all("Rehearsal, no GPU" in plot.svg for plot in made)


def test_every_arm_has_its_colour() -> None:
    assert plots.COLOURS.keys() == set(ARMS)
    assert len(set(plots.CYCLE)) == len(plots.CYCLE) == len({marker for _, marker in plots.CYCLE})
