"""Numbers of texts, or of pairs of texts, from files of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

from trimtab.errors import DataError
from trimtab.tasks import metrics
from trimtab.tasks.base import Example, Form, Labelled, Prediction
from trimtab.tasks.files import Item, LabelledFileTask
from trimtab.tasks.rows import Row
from trimtab.tasks.words import number_of


class Regression(LabelledFileTask):
    """A text, or two, and a number; scored by Pearson and Spearman correlation and mean squared error."""

    name: Literal["regression"] = "regression"
    needs: ClassVar[tuple[str, ...]] = ("scipy.stats",)
    asks: ClassVar[str] = "Score:"

    @property
    def form(self) -> Form:
        return "number"

    def _value(self, row: Row, setting: str) -> float:
        value = row.values[self.label]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            what = "nothing (null)" if value is None else f"{value!r}"[:40]
            raise DataError(f"{setting}: {row.where}: column {self.label!r} holds {what}, not a finite number")
        return number

    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        example: Labelled = item.value
        return example

    def _notes(self, splits: dict[str, list[Item]], labels: tuple[str, ...]) -> list[str]:
        train = splits.get("train", [])
        if train and len({item.value.label for item in train}) == 1:
            raise DataError(
                f"task.train: all {len(train)} rows that are trained on have the number {train[0].value.label:g}; "
                "there is nothing to learn"
            )
        return []

    def _word(self, label: float, labels: Sequence[str]) -> str:
        return f"{label:.6g}"

    def read_answer(self, text: str, labels: Sequence[str]) -> float | None:
        return number_of(text)

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        found = cast("Sequence[float | None]", predictions)
        truth = [cast("float", cast("Labelled", example).label) for example in examples]
        return {
            "pearson": metrics.pearson(found, truth),
            "spearman": metrics.spearman(found, truth),
            "mse": metrics.mse(found, truth),
        }
