"""One way to tabulate and to make a page, for the profile and the benchmarks' report."""

from __future__ import annotations

import importlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MARK = "persistrnn report"  # in every page, by which the next run knows its own folder
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
    """One drawing. alt: what it shows, in words."""

    alt: str
    svg: str


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
    """A section of a page: sentences, points, text as it is, plots and tables."""

    title: str
    sentences: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    text: str = ""
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

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


def needs(package: str, what: str) -> None:
    """Raises ImportError where a package of the extra ``profile`` cannot be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install 'persistrnn[profile]'"
        ) from error


def folder(given: str | Path, page: str, *others: str) -> Path:
    """A folder to write a page and other files into; it is made, and an earlier page and its files will be replaced.

    Raises:
        OSError: it cannot be made or written, or has a file of such a name and no page that bears our mark.
    """
    path = Path(given)
    path.mkdir(parents=True, exist_ok=True)
    if not _ours(path / page):
        for name in (page, *others):
            if os.path.lexists(path / name):
                raise FileExistsError(
                    f"{path / name} is there, and no report wrote it: move it, or name another folder"
                )
    with tempfile.TemporaryFile(dir=path):  # raises where the folder cannot be written
        pass
    return path


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(2048)
