"""Texts to go on with, from files of one's own: each token is learned, the loss alone tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trimtab.tasks.base import Example, Form, Plain, Prediction
from trimtab.tasks.files import FileTask, Item, same
from trimtab.tasks.rows import Layout, Row, text_of


class Language(FileTask):
    """Texts: each a row, or a whole file: .txt in a folder, and any that holds no rows where it is named by itself.

    Args:
        text: the column of the text; files that are texts need none.
    """

    name: Literal["language"] = "language"

    text: str = "text"

    @property
    def form(self) -> Form:
        return "plain"

    def _columns(self) -> list[str]:
        return [self.text]

    @property
    def asked_columns(self) -> tuple[str, ...]:
        return (self.text,)

    def _layout(self) -> Layout:
        return super()._layout()._replace(text_files=self.text)

    def _item(self, row: Row, setting: str) -> Item:
        text = text_of(row, self.text, setting)
        return Item(row.where, same(text), Plain(text))

    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        example: Plain = item.value
        return example

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        return {}
