"""Texts to be written for texts, from files of one's own: summaries, translations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self, cast

from pydantic import model_validator

from trimtab.errors import ConfigError, DataError
from trimtab.tasks import nlg
from trimtab.tasks.base import Example, Form, Prediction, Written
from trimtab.tasks.files import FileTask, Item, same
from trimtab.tasks.rows import Row, text_of
from trimtab.tasks.words import check_template


class Seq2Seq(FileTask):
    """A source text and what is to be written for it: one text, or a list of several of which each is right.

    The first target is trained on; all are references of the metrics, ROUGE and BLEU.

    Args:
        source: the column of the source.
        target: the column of the target or the list of targets.
        prompt: what the model is given, with {source} for the source: "summarize: {source}".
    """

    name: Literal["seq2seq"] = "seq2seq"
    needs: ClassVar[tuple[str, ...]] = ("sacrebleu", "rouge_score")

    source: str = "source"
    target: str = "target"
    prompt: str = "{source}"

    @model_validator(mode="after")
    def _columns_and_prompt(self) -> Self:
        if self.source == self.target:
            raise ConfigError(f"target = {self.target!r}: is the column of the source already; give another")
        check_template(self.prompt, "prompt", ["source"])
        return self

    @property
    def form(self) -> Form:
        return "text"

    def _columns(self) -> list[str]:
        return [self.source, self.target]

    def _item(self, row: Row, setting: str) -> Item:
        source = text_of(row, self.source, setting)
        value = row.values[self.target]
        if isinstance(value, list):
            if not value:
                raise DataError(f"{setting}: {row.where}: column {self.target!r} is a list without any text")
            each = [Row(row.where, {self.target: one}) for one in value]
        else:
            each = [row]
        targets = tuple(text_of(one, self.target, setting) for one in each)
        return Item(row.where, same(source), Written(self.as_source(source), targets))

    @property
    def asked_columns(self) -> tuple[str, ...]:
        return (self.source,)

    def as_source(self, text: str) -> str:
        return self.prompt.format(source=text)

    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        example: Written = item.value
        return example

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        written = [one if isinstance(one, str) else "" for one in predictions]
        references = [cast("Written", example).references for example in examples]
        return {**nlg.rouge(written, references), "BLEU (lower case)": nlg.bleu(written, references)}
