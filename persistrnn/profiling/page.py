"""One way to tabulate and to make a page, for the profile and the benchmarks' report."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MARK = "persistrnn report"  # in everything that is written, by which the next run knows its own files
TEMPLATE = Path(__file__).with_name("page.html.jinja")
NOTHING = "not yet measured"
FOLDED = 16  # longer tables are closed at first
MIB = 1 << 20


def number(value: float | None) -> str:
    """Four digits that count."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 999.95 else f"{value:#.4g}"


def times(value: float | None) -> str:
    """A ratio; what is below 1 never looks like 1."""
    if value is None:
        return NOTHING
    return f"{value:.2f}x" if value >= 1 else f"{min(value, 0.999):.3f}x"


def known(value: float) -> str:
    """Of the plan's numbers 0 is unknown."""
    return number(value) if value else "unknown"


def printable(text: str, length: int) -> str:
    """On one line, at most ``length`` signs."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    return text if len(text) <= length else text[: length - 1] + "\u2026"


@dataclass(frozen=True)
class Plot:
    """One drawing. name: of its file, without ending; alt: what it shows, in words; png: empty if not asked for."""

    name: str
    alt: str
    svg: str
    png: bytes = b""


@dataclass(frozen=True)
class Column:
    """number: aligned to the right; band: a header above it and its neighbours of the same band."""

    name: str
    number: bool = True
    band: str = ""


@dataclass(frozen=True)
class Line:
    """The cells of one row; bad: it stands out."""

    cells: Sequence[str]
    bad: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Line, ...]
    folded: bool

    @property
    def bands(self) -> list[tuple[str, int]]:
        """(band, how many columns), in order; empty if no column has one."""
        if not any(column.band for column in self.columns):
            return []
        return [(band, len(list(own))) for band, own in itertools.groupby(column.band for column in self.columns)]

    def __str__(self) -> str:
        """In columns of signs; the bands stand below the caption."""
        bands = "; ".join(
            f"{', '.join(dict.fromkeys(c.name for c in self.columns if c.band == band))}: {band}"
            for band in dict.fromkeys(column.band for column in self.columns if column.band)
        )
        above = [self.caption] * bool(self.caption) + [f"({bands})"] * bool(bands)
        grid = [[column.name for column in self.columns], *(line.cells for line in self.rows)]
        widths = [max(len(row[n]) for row in grid) for n in range(len(self.columns))]
        for row in grid:
            cells = zip(row, widths, self.columns, strict=True)
            above.append("  ".join(c.rjust(w) if column.number else c.ljust(w) for c, w, column in cells).rstrip())
        return "\n".join(above)


@dataclass
class Part:
    """A section of a page: sentences, points, what is missing and why, plots, tables, text as it is, and parts of its
    own."""

    title: str
    sentences: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    missing: str = ""
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    text: str = ""
    parts: list[Part] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "".join(sign if sign.isalnum() else "-" for sign in self.title.lower())


class Card(NamedTuple):
    """A number that one looks for first. whose: what was measured, or what was predicted for which device."""

    whose: str
    what: str
    value: str
    unit: str
    predicted: bool = False


class Banner(NamedTuple):
    text: str
    alarm: bool = True


def words(*names: str, band: str = "") -> list[Column]:
    return [Column(name, False, band) for name in names]


def numbers(*names: str, band: str = "") -> list[Column]:
    return [Column(name, True, band) for name in names]


def table(caption: str, columns: Sequence[Column], lines: Iterable[Line], folded: bool | None = None) -> Table:
    """folded: by its length if not given."""
    found = tuple(lines)
    return Table(caption, tuple(columns), found, len(found) > FOLDED if folded is None else folded)


def render(
    title: str, heading: str, below: str, banners: Sequence[Banner], parts: Sequence[Part], cards: Sequence[Card] = ()
) -> str:
    """The page. title: of the window; heading, and a line below it."""
    import jinja2  # which torch brings

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        mark=MARK, title=title, heading=heading, below=below, banners=banners, cards=cards, parts=parts
    )


def ours(path: Path) -> bool:
    """Whether this was written by us: a file with our mark near its start."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(2048)


def refuse_others(paths: Iterable[Path]) -> None:
    """Raises FileExistsError for what is there and was not written by us."""
    for path in paths:
        if os.path.lexists(path) and not ours(path):
            raise FileExistsError(f"{path} is there, and no report wrote it: move it, or name another folder")
