"""One way to draw, for the profile and the benchmarks' report: the look, logarithmic axes, legends, SVG within a page.

matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .page import Plot, needs, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Paul Tol's "bright" scheme, safe for the colour-blind, light ones darkened; each has a marker of its own too.
COLOURS = {
    "persistrnn": ("#4477AA", "o"),
    "torch": ("#EE6677", "s"),
    "torch-best": ("#AA3377", "D"),
    "torchrl": ("#228833", "^"),
    "flashrnn": ("#A88600", "v"),
    "xma": ("#1E9CBF", "P"),
}
INK, FAINT, RULE, ALARM = "#1a1a1a", "#707070", "#d8d8d8", "#b00020"
# In the page these follow its light and dark mode; matplotlib writes colours in small letters.
THEME = {INK: "--ink", FAINT: "--faint", RULE: "--rule", ALARM: "--alarm"}
THEME |= {"#4477aa": "--blue", "#aa3377": "--purple", "#228833": "--green"}
STYLE: Any = {
    "svg.hashsalt": "persistrnn",
    "svg.fonttype": "none",  # text stays text: found by a search, and small
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.scatterpoints": 1,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Drawn inside, a figure has our look, whatever the reader's own settings are. Raises ImportError."""
    needs("matplotlib", "the page")
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(drawn: Figure, name: str, alt: str, lines: Sequence[str], alarm: bool = False) -> Plot:
    """The figure with ``lines`` above it, as SVG. name: one that no other drawing of a page has."""
    head = "\n".join(printable(line, 110) for line in lines)
    drawn.suptitle(head, fontsize=9 if len(lines) > 1 else 8, x=0.01, ha="left", color=ALARM if alarm else INK)
    svg = io.StringIO()
    drawn.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
    return Plot(alt, _inline(svg.getvalue(), name, alt))


def _inline(svg: str, name: str, alt: str) -> str:
    """An SVG for a page with others: no prolog and no style of its own, ids of its own, the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)

    def retag(tag: re.Match[str]) -> str:
        text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])
        for colour, variable in THEME.items():
            text = text.replace(colour, f"var({variable}, {colour})")
        return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")

    svg = re.sub(r"<[^>]+>", retag, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1).rstrip()


def log(axes: Axes, which: str, base: int = 10, unit: str = "") -> None:
    """A logarithmic axis with plain numbers, at 1, 2, 5 (or finer) or at powers of 2; for what is drawn already."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    fine = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(base, fine if base == 10 else (1,), numticks=6 if base == 2 else None))

    def words(value: float, _: object) -> str:
        return f"{value / 1024:g}k" if base == 2 and value >= 16384 else f"{value:,.6g}{unit}"  # 65536 is 64k

    axis.set_major_formatter(FuncFormatter(words))
    axis.set_minor_locator(NullLocator())


def dots(
    axes: Axes, points: Sequence[tuple[float, float]], style: tuple[str, str], name: str, full: bool = True
) -> None:
    """Markers at (x, y): filled where measured, hollow where predicted; of the measured, earlier calls lie on top."""
    (colour, marker), x, y = style, [x for x, _ in points], [y for _, y in points]
    order = 4 - 0.01 * len(axes.collections) if full else 3
    axes.scatter(
        x, y, s=17, marker=marker, linewidths=0.8, label=name, facecolors=colour if full else "none",
        edgecolors=colour, alpha=0.9 if full else 0.6, zorder=order,
    )  # fmt: skip


def rows(axes: Axes) -> None:
    """For horizontal bars: the first on top, no grid between them."""
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def legend(drawn: Figure) -> None:
    """Of all panels, each name once, below them."""
    handles: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    # A digit is about 0.065 inches wide, a marker with its gaps 0.55.
    columns = int(drawn.get_figwidth() / (0.55 + 0.065 * max(map(len, handles))))
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=max(1, columns))
