"""A page of ours as a test reads it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

ALONE = ("meta", "link")
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Sections, banners and tables. Raises AssertionError unless every element is closed in turn, no id is there twice,
    every reference has its id, and nothing runs or comes from elsewhere; whatever names are in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.banners: list[str] = []
        self.drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)]
        self._open: list[str] = []
        self._ids: list[str] = []
        self._references: set[str] = set()
        self._section = self._caption = ""
        self._into: list[str] | None = None
        self.feed(text)
        self.close()
        assert self._open == []
        assert len(self._ids) == len(set(self._ids))
        assert self._references <= set(self._ids)
        assert all(drawing.get("role") == "img" and drawing.get("aria-label") for drawing in self.drawings)
        assert all(len(drawing.findall(f".//{SVG}path")) > 10 for drawing in self.drawings)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "iframe", "object", "image")
        given = dict(attributes)
        self._open += [tag] * (tag not in ALONE)
        self._ids += [value or "" for name, value in attributes if name == "id"]
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:")), f"{tag} {name}={value!r} comes from elsewhere"
                self._references |= {(value or "")[1:]} if (value or "").startswith("#") else set()
            self._references |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in ("h2", "caption", "td", "th") or (given.get("class") or "").startswith("banner"):
            self._into = []

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self._open = self._open[: len(self._open) - (tag not in ALONE)]

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into.append(data)
        self.sections[self._section] = self.sections.get(self._section, "") + data

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"
        if self._into is None or tag not in ("h2", "caption", "td", "th", "p"):
            return
        text, self._into = "".join(self._into), None
        if tag == "h2":
            self._section = text
        elif tag == "caption":
            self._caption = text
            self.tables[text] = []
        elif tag == "p":
            self.banners.append(text)
        else:
            self.tables[self._caption][-1].append(text)

    def rows(self, caption: str) -> list[list[str]]:
        """Of a table, without its header."""
        return self.tables[caption][1:] if caption in self.tables else []
