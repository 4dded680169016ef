"""Classes of texts, or of pairs of texts, from files of one's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import model_validator

from trimtab.errors import ConfigError, DataError
from trimtab.tasks import metrics
from trimtab.tasks.base import Example, Form, Labelled, Prediction
from trimtab.tasks.files import Item, LabelledFileTask
from trimtab.tasks.rows import Row
from trimtab.tasks.words import class_of
from trimtab.words import many


class Classification(LabelledFileTask):
    """A text, or two, and the name or number of its class.

    Scored by accuracy and macro F1, and with two classes by the F1 of the second and by Matthews correlation too.

    Args:
        labels: names of the classes in the order of their numbers; None takes those of `train`, sorted (as numbers
            where all of them are).
    """

    name: Literal["classification"] = "classification"
    needs: ClassVar[tuple[str, ...]] = ("sklearn.metrics",)

    labels: tuple[str | int, ...] | None = None

    @model_validator(mode="after")
    def _distinct_labels(self) -> Self:
        names = self._given()
        if names is not None and (len(names) < 2 or len(set(names)) < len(names) or "" in names):
            raise ConfigError(f"labels = {list(names)}: give the names of two classes or more, each once")
        return self

    @property
    def form(self) -> Form:
        return "class"

    def _given(self) -> tuple[str, ...] | None:
        return None if self.labels is None else tuple(str(name).strip() for name in self.labels)

    def _knows_labels(self) -> bool:
        return self.labels is not None

    def _value(self, row: Row, setting: str) -> str:
        return _class_name(row.values[self.label], f"{setting}: {row.where}: column {self.label!r}")

    def _labels(self, train: Sequence[Item]) -> tuple[str, ...]:
        given = self._given()
        if given is not None:
            return given
        names = {item.value.label for item in train}
        numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else (0, name)))

    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        name = item.value.label
        if name not in labels:
            near = difflib.get_close_matches(name, labels, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(repr(one) for one in labels[:20]) + (", ..." if len(labels) > 20 else "")
            raise DataError(
                f"{setting}: {item.where}: the label {name!r} is none of those known ({known}); {hint}"
                "mend the row, or list all labels in task.labels"
            )
        example: Labelled = item.value
        return example._replace(label=float(labels.index(name)))

    def _notes(self, splits: dict[str, list[Item]], labels: tuple[str, ...]) -> list[str]:
        if "train" not in splits:
            return []
        trained = {item.value.label for item in splits["train"]}
        if len(trained) == 1:
            more = "" if self.max_train is None else f"; raise task.max_train = {self.max_train}, or leave it out"
            raise DataError(
                f"task.train: all {many(len(splits['train']), 'row')} that are trained on are labelled "
                f"{trained.pop()!r}; there is nothing to tell apart{more}"
            )
        absent = [name for name in labels if name not in trained]
        return [f"no row that is trained on is labelled {', '.join(map(repr, absent))}"] if absent else []

    def _word(self, label: float, labels: Sequence[str]) -> str:
        return labels[int(label)]

    def read_answer(self, text: str, labels: Sequence[str]) -> float | None:
        return class_of(text, labels)

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        found = cast("Sequence[float | None]", predictions)
        truth = [cast("float", cast("Labelled", example).label) for example in examples]
        scores = {"accuracy": metrics.accuracy(found, truth), "macro_f1": metrics.macro_f1(found, truth)}
        if all(value in (0, 1, None) for value in [*found, *truth]):
            scores |= {"f1": metrics.f1(found, truth), "matthews": metrics.matthews(found, truth)}
        return scores


def _class_name(value: Any, where: str) -> str:
    """The name of a class: a string without white space around it, or a whole number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers of a column with gaps are stored as floats
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        what = "nothing (null)" if value is None else f"{value!r}"[:40]
        raise DataError(f"{where} holds {what}; a class is a word or a whole number")
    if not value.strip():
        raise DataError(f"{where} is empty; a class is a word or a whole number")
    return value.strip()
