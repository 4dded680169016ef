"""Tasks over files of one's own: which file is which split, how validation is drawn, what is refused."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from trimtab.data.sources import is_validation
from trimtab.errors import ConfigError, DataError
from trimtab.tasks import metrics
from trimtab.tasks.base import Example, Labelled, Loaded, Task, Written
from trimtab.tasks.rows import Layout, Row, Sources, read_rows, skippable, text_of, told
from trimtab.tasks.words import check_template
from trimtab.words import many

_SHARE = 0.1


class Item(NamedTuple):
    """A row that was read: where it stands, a hash of its text (see `same`), and what is in it."""

    where: str
    key: str
    value: Any


class FileTask(Task):
    """A task whose splits are files, folders or datasets that the settings name.

    Args:
        train: what is trained on: a source or several (see `rows.read_rows`).
        validation: what chooses the best step; where there is none it is drawn from `train`.
        test: what is scored besides.
        validation_share: of the rows of `train`, about how many are drawn for validation (None: 0.1). A row is drawn
            by a hash of its text and the seed, so that other rows do not matter and equal texts stay together.
        max_train: train on this many rows at most, drawn by the same kind of hash.
        max_eval: score this many rows of each split at most, drawn likewise.
        delimiter: between the fields of .csv and .tsv files (None: a comma, or a tab for .tsv).
        quotes: whether double quotes enclose fields of .csv and .tsv files, or are plain characters.
    """

    abstract: ClassVar[bool] = True
    #: Modules that its metrics need.
    needs: ClassVar[tuple[str, ...]] = ()

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    max_train: PositiveInt | None = None
    max_eval: PositiveInt | None = None
    delimiter: str | None = None
    quotes: bool = True

    @property
    def places(self) -> tuple[str, ...]:
        return "train", "validation", "test"

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or value in '\r\n"'):
            raise ValueError(f"{value!r} is no delimiter: give one character, neither a line's end nor a double quote")
        return value

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation is not None and self.validation_share is not None:
            raise ConfigError(
                f"validation_share = {self.validation_share:g} draws what `validation` gives already; drop one of them"
            )
        return self

    @abc.abstractmethod
    def _columns(self) -> list[str]:
        """The columns that each row must have."""

    @abc.abstractmethod
    def _item(self, row: Row, setting: str) -> Item:
        """What a row holds.

        Raises:
            DataError: a value is missing or of the wrong kind.
        """

    @abc.abstractmethod
    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        """The example of an item, given the names of the classes."""

    def _labels(self, train: Sequence[Item]) -> tuple[str, ...]:
        """Names of the classes, given all rows of `train`."""
        return ()

    def _notes(self, splits: dict[str, list[Item]], labels: tuple[str, ...]) -> list[str]:
        """What a user should know; raises DataError where the splits cannot be trained on."""
        return []

    def _knows_labels(self) -> bool:
        """Whether `_labels` can do without the rows of `train`."""
        return True

    def _layout(self) -> Layout:
        return Layout(self.delimiter, self.quotes)

    def load(self, seed: int = 0, *, training: bool = True) -> Loaded:
        metrics.require(*self.needs)
        skipped: dict[str, int] = {}
        whole: dict[str, list[Item]] = {}
        draws = self.validation is None
        if training or draws or not self._knows_labels():
            whole["train"], skipped["train"] = self._read("train", self.train)
        labels = self._labels(whole.get("train", []))
        if draws:
            share = _SHARE if self.validation_share is None else self.validation_share
            drawn = [is_validation(seed, item.key, share) for item in whole["train"]]
            whole["validation"] = [item for item, out in zip(whole["train"], drawn, strict=True) if out]
            whole["train"] = [item for item, out in zip(whole["train"], drawn, strict=True) if not out]
            self._check_drawn(whole, share)
        else:
            assert self.validation is not None
            whole["validation"], skipped["validation"] = self._read("validation", self.validation)
        if self.test is not None:
            whole["test"], skipped["test"] = self._read("test", self.test)
        notes = _shared(whole)
        if not training:
            whole.pop("train", None)
        splits = {
            name: _draw(items, self.max_train if name == "train" else self.max_eval, seed)
            for name, items in whole.items()
        }
        notes += self._notes(splits, labels)
        settings = {name: f"task.{name}" for name in splits}
        if draws:
            settings["validation"] = "task.train"
        return Loaded(
            {name: [self._example(i, settings[name], labels) for i in items] for name, items in splits.items()},
            labels,
            skipped,
            tuple(notes),
            {name: [item.where for item in items] for name, items in splits.items()},
        )

    def _read(self, split: str, source: Sources) -> tuple[list[Item], int]:
        setting = f"task.{split}"
        columns = list(dict.fromkeys(self._columns()))
        rows, skipped = read_rows(source, setting, skip_bad=self.skip_bad_rows, columns=columns, layout=self._layout())
        items = []
        for row in rows:
            try:
                items.append(self._item(row, setting))
            except DataError as error:
                if not self.skip_bad_rows:
                    raise skippable(error) from error
                skipped += 1
        if not items:
            passed = f" ({many(skipped, 'bad one was', 'bad ones were')} passed over)" if skipped else ""
            raise DataError(f"{setting}: {told(source)}: there is no row in it{passed}")
        return items, skipped

    def _check_drawn(self, splits: dict[str, list[Item]], share: float) -> None:
        rows = len(splits["train"]) + len(splits["validation"])
        for name in ("validation", "train"):
            if not splits[name]:
                raise DataError(
                    f"task.train: of its {rows} rows none is left for {name} (task.validation_share = {share:g}, drawn "
                    "by a hash of each text); give task.validation, or another share"
                )


class LabelledFileTask(FileTask):
    """A task of one's own whose rows are a text, or two, and a label.

    Args:
        text: the column of the text.
        pair: the column of the second text, where there are two.
        label: the column of the label.
        prompt: for models that write: the source, with {text} (and {pair}) for the texts, whatever their columns are
            called. None is the texts on a line each and what is asked on the last.
    """

    abstract: ClassVar[bool] = True
    #: What the last line of the prompt asks for.
    asks: ClassVar[str] = "Label:"

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    prompt: str | None = None

    @model_validator(mode="after")
    def _columns_and_prompt(self) -> Self:
        seen: dict[str, str] = {}
        for key in ("text", "pair", "label"):
            column = getattr(self, key)
            if column is not None and column in seen:
                raise ConfigError(f"{key} = {column!r}: is the column of the {seen[column]} already; give another")
            seen[column] = key
        if self.prompt is not None:
            check_template(self.prompt, "prompt", ["text"] if self.pair is None else ["text", "pair"])
        return self

    def _columns(self) -> list[str]:
        return [self.text, self.label] if self.pair is None else [self.text, self.pair, self.label]

    def _item(self, row: Row, setting: str) -> Item:
        text = text_of(row, self.text, setting)
        pair = text_of(row, self.pair, setting) if self.pair is not None else None
        return Item(row.where, same(text, pair), Labelled(text, pair, self._value(row, setting)))

    @abc.abstractmethod
    def _value(self, row: Row, setting: str) -> Any:
        """The label of a row; `_example` makes it a number."""

    def _source(self, example: Labelled) -> str:
        """An example's source text for models that write."""
        prompt = self.prompt or ("{text}\n" if self.pair is None else "{text}\n{pair}\n") + self.asks
        return prompt.format(text=example.text, pair=example.pair)

    @property
    def asked_columns(self) -> tuple[str, ...]:
        return (self.text,) if self.pair is None else ()

    def as_source(self, text: str) -> str:
        if self.pair is not None:
            raise two_texts(self.name)
        return self._source(Labelled(text, None, None))

    def as_text(self, example: Labelled, labels: Sequence[str]) -> Written:
        word = () if example.label is None else (self._word(example.label, labels),)
        return Written(self._source(example), word)

    @abc.abstractmethod
    def _word(self, label: float, labels: Sequence[str]) -> str:
        """A label in writing."""


def two_texts(task: str) -> ConfigError:
    """The error for one text where a task's sources have two."""
    return ConfigError(
        f"the task {task} reads two texts, and one is given; write all that the model is to read, prompt included, and "
        "give it with --raw"
    )


def same(text: str, pair: str | None = None) -> str:
    """Equal for texts (or pairs) of the same words, whatever the white space and the case of letters: a hash."""
    parts = [text] if pair is None else [text, pair]
    words = "\0".join(" ".join(part.split()).casefold() for part in parts)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()  # a long text is not kept twice


def _draw(items: list[Item], most: int | None, seed: int) -> list[Item]:
    """At most so many items, in their order; fewer are a part of more."""
    if most is None or len(items) <= most:
        return items

    def rank(number: int) -> tuple[bytes, int]:
        key = f"trimtab.draw:{seed}:{items[number].key}".encode()
        return hashlib.blake2b(key, digest_size=8).digest(), number

    return [items[number] for number in sorted(sorted(range(len(items)), key=rank)[:most])]


def _shared(splits: dict[str, list[Item]]) -> list[str]:
    """A note for each scored split of which texts stand in "train" too."""
    trained = {item.key for item in splits.get("train", [])}
    notes = []
    for name, items in splits.items():
        both = sum(item.key in trained for item in items) if name != "train" else 0
        if both:
            notes.append(f"{both} of the {len(items)} rows of {name} have a text that stands in train too")
    return notes
