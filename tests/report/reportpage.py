"""A report page, read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from trimtab.report.page import write_report

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """What is in a page: balanced tags, text, attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [value for found, attrs in self.tags if found == tag and (value := attrs.get(name)) is not None]

    def series(self) -> dict[str, list[dict[str, Any]]]:
        """The data under each chart's cross-hair, by the chart's title."""
        boxes = [attrs for tag, attrs in self.tags if tag == "div" and "data-s" in attrs]
        return {str(box["aria-label"]).split(".")[0]: json.loads(str(box["data-s"])) for box in boxes}


def report(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))
