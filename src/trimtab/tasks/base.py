"""The contract of a task: what it reads, what an example is, and how predictions are scored.

A task is a small frozen config (a tagged union by `task.name`) over rows of files or of a Hugging Face dataset.
It says what its examples are; whoever trains decides how a model is given them:

    Labelled    a text, or two, and a class or a number: the head of an encoder, or words that a language model writes
    Written     a source and what may be written for it: an encoder-decoder, or a causal model that goes on
    Chat        messages; each answer of the assistant is learned
    Plain       a text, each token of which is learned

Nothing outside a task's own file knows its name.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from trimtab.errors import ConfigError
from trimtab.settings import Settings

#: What the examples of a task are: `Labelled` with a class, `Labelled` with a number, `Written`, `Chat`, `Plain`.
Form = Literal["class", "number", "text", "chat", "plain"]
#: Which figures a paper prints (see `Task.headline`).
Convention = Literal["official", "lora", "galore", "adalora", "read"]

#: The tasks by name; read it through `registry.tasks()`.
REGISTRY: dict[str, type[Task]] = {}


class Labelled(NamedTuple):
    """A text, or a pair of texts; `label` is the number of a class or a value, None where it is kept secret."""

    text: str
    pair: str | None
    label: float | None


class Written(NamedTuple):
    """A source text and all that may be written for it; the first of `references` is what is trained on."""

    source: str
    references: tuple[str, ...]


class Message(NamedTuple):
    """A turn of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Chat(NamedTuple):
    """The turns of a chat, at least one of them the assistant's."""

    messages: tuple[Message, ...]


class Plain(NamedTuple):
    """A text of its own."""

    text: str


Example = Labelled | Written | Chat | Plain
#: A class's number, a value, a text; None is an answer that is none (a word that names no class).
Prediction = float | str | None


@dataclass(frozen=True)
class Loaded:
    """A task's examples.

    Attributes:
        splits: examples by the split's name; "train" is trained on, all others are scored, in this order. The first
            of those is what chooses the best step.
        labels: names of the classes in the order of their numbers; empty for other forms.
        skipped: by split, how many rows were passed over because `skip_bad_rows` asked for it.
        notes: what a user should know of them, one sentence each.
        places: by split, the file and line of each example, for errors; a task need not say.
    """

    splits: Mapping[str, Sequence[Example]]
    labels: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def scored(self) -> list[str]:
        """The splits that are scored."""
        return [name for name in self.splits if name != "train"]


class Headline(NamedTuple):
    """One figure for a task: its name, its value, and whether more is better."""

    name: str
    value: float
    rising: bool = True


class Task(Settings, abc.ABC):
    """A frozen config of one task; subclasses are registered by the default of their `name`.

    Args:
        skip_bad_rows: pass over rows that cannot be read or lack what is needed, and count them; otherwise the first
            is an error that names its line.
    """

    name: str
    skip_bad_rows: bool = False

    #: Set by a subclass that is no task of its own.
    abstract: ClassVar[bool] = True

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not cls.__dict__.get("abstract", False):
            REGISTRY[cls.model_fields["name"].default] = cls

    @property
    @abc.abstractmethod
    def form(self) -> Form:
        """What its examples are."""

    @abc.abstractmethod
    def load(self, seed: int = 0, *, training: bool = True) -> Loaded:
        """Read all splits.

        Args:
            seed: of a split that is drawn here, where the files bring none.
            training: whether "train" is needed; without it, only what is scored is read, if that can be done.

        Raises:
            DataError: a file is missing, a row is damaged or lacks a column, a label was not seen in training, a split
                is empty.
            ConfigError: settings that do not go together.
        """

    @property
    def decoding(self) -> Mapping[str, Any]:
        """How its papers generate, as settings of `transformers`' `generate`; empty where any way will do."""
        return {}

    @property
    def has_sources(self) -> bool:
        """Whether a model that writes is given a source and answers, as against chats and texts to go on with."""
        return self.form in ("class", "number", "text")

    @property
    def asked_columns(self) -> tuple[str, ...]:
        """Columns of its files, each of which holds all that is asked (see `as_source`); empty where none does."""
        return ()

    @property
    def places(self) -> tuple[str, ...]:
        """Settings that say no more than where the rows lie."""
        return ()

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that `load` gives to chats that bring none."""
        return None

    def as_source(self, text: str) -> str:
        """A text of a user's own as `load` (or `as_text`) makes a source of one: with the task's prompt around it.

        Raises:
            ConfigError: a source is made of more than one text, or not of any.
        """
        return text

    def as_text(self, example: Labelled, labels: Sequence[str]) -> Written:
        """A labelled example for a model that writes; the reference is the word of its label.

        Raises:
            ConfigError: the task has no text form.
        """
        raise ConfigError(f"task.name = {self.name}: has no labels to be written as words")

    def read_answer(self, text: str, labels: Sequence[str]) -> float | None:
        """The label that a model wrote, or None where it is none (such answers count as wrong)."""
        raise ConfigError(f"task.name = {self.name}: has no labels to be written as words")

    @abc.abstractmethod
    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """The task's own metrics over one split; empty where the loss alone tells (`Chat`, `Plain`).

        Args:
            split: the name of the split.
            predictions: one for each example.
            examples: those of the split whose answer is known.
        """

    def headline(self, scores: Mapping[str, Mapping[str, float]], convention: Convention = "official") -> Headline:
        """The one figure of a model on this task, which chooses the best step and stands in tables.

        Args:
            scores: by split, what `score` gave, and the mean `loss` where there is one.
            convention: whose way of reporting; a task that no paper reports in its own way ignores it.
        """
        first = next(iter(scores.values()))
        name = next(iter(first))
        return Headline(name, first[name], rising=name not in ("loss", "perplexity", "bits_per_byte"))
