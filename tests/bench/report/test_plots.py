"""Every plot has its numbers, can be read, and says what is only predicted."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from synthetic import add, many, pair, predicted, raced, results

from bench.report import plots
from bench.report.results import ARMS, DTYPES, MODES, Results
from persistrnn.profiling import drawing


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
    plots.draw(found)
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
        visible = [axes for axes in figure.axes if axes.get_visible()]
        fixed = [legend.get_window_extent(), figure._suptitle.get_window_extent()]
        for axes in visible:
            for one in fixed:
                assert not one.overlaps(axes.get_window_extent()), name
            rotated = any(text.get_rotation() for text in axes.get_xticklabels())
            for boxes in texts(axes):
                assert rotated or not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), name
                fixed += boxes
        for box in fixed:
            assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, name
            assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, name


def test_many_cases_are_on_pages_of_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [figure.axes[0] for name, figure in drawn(many(), monkeypatch).items() if name.startswith("speedup")]
    assert [len(axes.get_yticks()) for axes in pages] == [44, 44, 42]
    assert len({axes.get_xlim() for axes in pages}) == 1
    labels = [text.get_text() for axes in pages for text in axes.get_yticklabels()]
    assert len(set(labels)) == 130


def points(axes: Any, name: str) -> list[tuple[float, float]]:
    (found,) = (c for c in axes.collections if c.get_label() == name)
    return [(float(x), float(y)) for x, y in found.get_offsets()]


def test_speed_ups_are_sorted_and_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(raced(), monkeypatch)
    (axes,) = figures["speedup-suite-bf16-forward-1"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        f"a name: lstm H={hidden} B=16 T=100" for hidden in (1024, 256, 512)
    ]
    assert points(axes, "over torch") == [(4, 0), (4, -1), (0.5, -2)]
    assert axes.get_xscale() == "log"
    assert 1.0 in axes.lines[0].get_xdata()


def test_measured_points_and_predicted_lines_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = drawn(raced(), monkeypatch)["step-bf16-forward-1"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == {"floor, predicted", "persistrnn, predicted"}
    assert lines["persistrnn, predicted"].get_linestyle() == "--"
    assert lines["floor, predicted"].get_linestyle() == "-"
    assert list(lines["persistrnn, predicted"].get_xydata()[:, 1]) == [4.0] * 3
    assert points(axes, "persistrnn, measured") == [(256, 1), (512, 2), (1024, 3)]
    assert points(axes, "torch, measured") == [(256, 4), (512, 1), (1024, 12)]


def test_floor_and_memory_have_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(raced(), monkeypatch)
    axes = {ax.get_title(): ax for ax in figures["floor"].axes}
    assert axes.keys() == {"bf16, forward", "bf16, training"}
    assert points(axes["bf16, forward"], "suite, measured") == [(256, 0.5), (512, 1), (1024, 1.5)]
    (unmeasured,) = drawn(predicted(), monkeypatch)["floor"].axes
    assert points(unmeasured, "suite, predicted") == [(256, 2), (512, 2), (1024, 2)]
    memory = {ax.get_title(): ax for ax in figures["memory"].axes}
    assert points(memory["training"], "other") == [(3, 3)]


def test_unmeasured_is_drawn_as_predicted_or_left_out_with_a_sentence() -> None:
    speedups, times, floors, memory = plots.draw(predicted())
    assert speedups.plots == memory.plots == []
    assert speedups.missing.startswith("3 of 3 cases have no speed-up")
    assert memory.missing.startswith("3 of 3 cases have no peak memory")
    for plot in (times.plots[0], floors.plots[0]):
        assert "predicted; not yet measured" in plot.alt
        assert "predicted; not yet measured" in plot.svg
    for section in plots.draw(results()):
        assert section.plots == []
        assert section.missing


def test_rehearsal_is_written_on_every_plot() -> None:
    found = add(results(rehearsal=True), *pair(256, 100, 400))
    made = [plot for section in plots.draw(found) for plot in section.plots]
    assert len(made) == 4
    assert all("Rehearsal, no GPU" in plot.svg for plot in made)


def test_names_of_dtypes_modes_and_arms_have_places_in_the_plots() -> None:
    assert plots.COLOURS.keys() == set(ARMS)
    assert len(set(plots.CYCLE)) == len(plots.CYCLE) == len({marker for _, marker in plots.CYCLE})
    assert (len(DTYPES), len(MODES)) == (4, 2)
