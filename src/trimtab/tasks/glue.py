"""The nine tasks of GLUE (Wang et al. 2018, arXiv 1804.07461), from the hub or from local files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, Self, cast

from pydantic import PositiveInt, model_validator

from trimtab.errors import ConfigError, DataError
from trimtab.settings import HubSource, given
from trimtab.tasks import metrics
from trimtab.tasks.base import Convention, Example, Form, Headline, Labelled, Loaded, Prediction, Task, Written
from trimtab.tasks.files import two_texts
from trimtab.tasks.gluelayout import SUBSETS, Subset
from trimtab.tasks.rows import Layout, Row, Sources, read_rows, skippable, text_of
from trimtab.tasks.words import class_of, number_of

#: Names of several figures in a table.
_MEANS: Final[dict[tuple[str, ...], str]] = {
    ("accuracy", "f1"): "accuracy/F1 mean",
    ("pearson", "spearman"): "Pearson/Spearman mean",
}
#: Which figures each convention takes of a task with two, where it takes one alone.
_ALONE: Final[dict[Convention, dict[str, str]]] = {
    "lora": {"mrpc": "accuracy", "qqp": "accuracy", "stsb": "pearson"},
    "galore": {"mrpc": "f1", "qqp": "accuracy", "stsb": "pearson"},
    "adalora": {"mrpc": "accuracy"},
}
#: LST divides the validation set of tasks with fewer training examples than this.
_SMALL: Final = ("cola", "mrpc", "rte", "stsb", "wnli")
_HELD_OUT: Final = 1000


class GLUE(Task):
    """One of the nine tasks, scored by its official metrics on the validation set, whose labels are public.

    Args:
        subset: which of them.
        folder: a folder with the official .tsv files, or with .parquet or .jsonl files (or folders) named by their
            split, as `datasets` writes them; or a folder above it (named CoLA or cola). None reads `dataset`.
        dataset: of the hub, with its `revision`.
        splits: "official", or "lst": those of Ladder Side-Tuning (arXiv 2206.06522), taken over by READ, in which what
            chooses the best step is not what is reported: the validation set becomes "test" and 1000 training
            examples "validation"; of MNLI the mismatched set becomes "validation" and the matched one "test"; of the
            small tasks (CoLA, MRPC, RTE, STS-B, WNLI) the validation set is halved. What is drawn depends on the seed.
        max_train: train on this many examples at most, drawn by the seed.
        max_eval: score this many examples of each split at most, drawn by the seed.
    """

    name: Literal["glue"] = "glue"
    abstract: ClassVar[bool] = False

    subset: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    folder: str | None = None
    dataset: str = "nyu-mll/glue"
    revision: str | None = None
    splits: Literal["official", "lst"] = "official"
    max_train: PositiveInt | None = None
    max_eval: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        beside = given(self, "dataset", "revision")  # not those that are set: in a configuration written whole all are
        if self.folder is not None and beside:
            raise ConfigError(f"folder = {self.folder!r} is read, so that {beside[0]} has no effect; drop one of them")
        return self

    @property
    def _of(self) -> Subset:
        return SUBSETS[self.subset]

    @property
    def form(self) -> Form:
        return "class" if self._of.labels else "number"

    def load(self, seed: int = 0, *, training: bool = True) -> Loaded:
        metrics.require("scipy.stats" if self.form == "number" else "sklearn.metrics")
        holds_out = self.splits == "lst" and self.subset not in (*_SMALL, "mnli")
        splits: dict[str, list[Labelled]] = {}
        skipped: dict[str, int] = {}
        if training or holds_out:
            splits["train"], skipped["train"] = self._read("train", "train.tsv")
        for split, file in self._of.splits:
            splits[split], skipped[split] = self._read(split, file)
        torn = sum(skipped.values())
        notes = (f"{torn} rows of {self.subset} that cannot be read were passed over",) if torn else ()
        if self.splits == "lst":
            splits = self._lst(splits, seed)
        if not training:
            splits.pop("train", None)
        most = {name: self.max_train if name == "train" else self.max_eval for name in splits}
        return Loaded(
            {name: _draw(examples, most[name], seed) for name, examples in splits.items()},
            self._of.labels,
            skipped,
            notes,
        )

    def _lst(self, splits: dict[str, list[Labelled]], seed: int) -> dict[str, list[Labelled]]:
        train = {"train": splits["train"]} if "train" in splits else {}
        if self.subset == "mnli":
            return train | {"validation": splits["validation_mismatched"], "test": splits["validation_matched"]}
        if self.subset in _SMALL:
            one, other = _divided(splits["validation"], len(splits["validation"]) // 2, seed)
            return train | {"validation": one, "test": other}
        if len(splits["train"]) <= _HELD_OUT:
            raise DataError(
                f"task.splits = lst holds out {_HELD_OUT} training examples for validation, but there are only "
                f"{len(splits['train'])}"
            )
        held, rest = _divided(splits["train"], _HELD_OUT, seed)
        return {"train": rest, "validation": held, "test": splits["validation"]}

    def _read(self, split: str, file: str) -> tuple[list[Labelled], int]:
        source, official = self._source(split, file)
        of = self._of
        columns = of.tsv if official else (*of.columns, "label")
        skip_bad = self.skip_bad_rows or (official and of.torn)
        setting = "task.dataset" if self.folder is None else "task.folder"
        rows, skipped = read_rows(
            source,
            setting,
            skip_bad=skip_bad,
            columns=columns,
            layout=Layout(delimiter="\t", quotes=False, header=of.header) if official else None,
        )
        examples = []
        for row in rows:
            try:
                example = self._example(row, columns, setting)
            except DataError as error:
                if not skip_bad:
                    raise skippable(error) from error
                skipped += 1
            else:
                if example.label is not None:
                    examples.append(example)
        if not examples:
            raise DataError(f"{setting}: {split} of {self.subset} holds no labelled row")
        return examples, skipped

    def _source(self, split: str, file: str) -> tuple[Sources, bool]:
        """Where a split is, and whether it is a file of the official download."""
        if self.folder is None:
            return HubSource(dataset=self.dataset, subset=self.subset, split=split, revision=self.revision), False
        above = Path(self.folder).expanduser()
        below = [above / name for name in (self._of.folder, self.subset)]
        folder = next((path for path in below if path.is_dir()), above)
        if not folder.is_dir():
            raise DataError(f"task.folder: {self.folder!r} is no folder")
        if (folder / file).is_file():
            return str(folder / file), True
        if (folder / split).is_dir():
            return str(folder / split), False
        found = sorted(
            path
            for path in folder.iterdir()
            if path.name.split(".")[0].split("-")[0] == split and path.name.endswith((".parquet", ".jsonl"))
        )
        if not found:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
            raise DataError(
                f"task.folder: {str(folder)!r} holds neither {file} nor {split}.parquet or {split}.jsonl (also "
                f"{split}-*.parquet, or a folder {split}), but {there}"
            )
        return tuple(str(path) for path in found), False

    def _example(self, row: Row, columns: Sequence[str], setting: str) -> Labelled:
        # An empty question stands in the official QQP.
        texts = [text_of(row, column, setting, empty=True) for column in columns[:-1]]
        label = self._label(row.values[columns[-1]], f"{setting}: {row.where}: column {columns[-1]!r}")
        return Labelled(texts[0], texts[1] if len(texts) > 1 else None, label)

    def _label(self, value: object, where: str) -> float | None:
        """The number of a class, or a score; None where it is hidden (-1)."""
        names = self._of.labels
        if isinstance(value, str) and value in names:
            return float(names.index(value))
        number = number_of(str(value)) if isinstance(value, str | int | float) else None
        if number == -1:
            return None
        if number is not None and (number in range(len(names)) if names else 0 <= number <= 5):
            return number
        known = f"one of {', '.join(names)} or its number from 0" if names else "a number from 0 to 5"
        raise DataError(f"{where} holds {value!r}, not {known}")

    @property
    def places(self) -> tuple[str, ...]:
        return ("folder",)

    @property
    def asked_columns(self) -> tuple[str, ...]:
        return self._of.columns if len(self._of.columns) == 1 else ()

    def as_source(self, text: str) -> str:
        if len(self._of.columns) > 1:
            raise two_texts(f"{self.name} {self.subset}")
        return self.as_text(Labelled(text, None, None), self._of.labels).source

    def as_text(self, example: Labelled, labels: Sequence[str]) -> Written:
        """As T5 was given it (arXiv 1910.10683, appendix D), columns by alphabet: "mnli hypothesis: ... premise: ...".

        The answer is the name of the class; of STS-B the score to the nearest 0.2, such as "3.8".
        """
        texts = dict(zip(self._of.columns, (example.text, example.pair), strict=False))
        source = " ".join([self.subset, *(f"{column}: {texts[column]}" for column in sorted(texts))])
        if example.label is None:
            return Written(source, ())
        if not self._of.labels:
            return Written(source, (f"{round(example.label * 5) / 5:.1f}",))
        return Written(source, (self._of.labels[int(example.label)],))

    def read_answer(self, text: str, labels: Sequence[str]) -> float | None:
        if self._of.labels:
            return class_of(text, self._of.labels)
        number = number_of(text)
        return number if number is not None and 0 <= number <= 5 else None

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """The official metrics, and of MNLI the number of examples, by which its two sets are weighted."""
        found = cast("Sequence[float | None]", predictions)
        truth = [cast("float", cast("Labelled", example).label) for example in examples]
        scores = {name: getattr(metrics, name)(found, truth) for name in self._of.metrics}
        return scores | {"examples": float(len(truth))} if self.subset == "mnli" else scores

    def headline(self, scores: Mapping[str, Mapping[str, float]], convention: Convention = "official") -> Headline:
        """One figure as papers report it.

        official: the mean of a task's two metrics (accuracy and F1, Pearson and Spearman), and of the two sets of
            MNLI, as the averages of the benchmark's leaderboard.
        lora, galore: MNLI over both sets as one, STS-B by Pearson, MRPC and QQP by accuracy; galore: MRPC by F1.
        adalora: as official, but MRPC by accuracy.
        read: as official.

        Args:
            scores: of the sets of MNLI both are taken, of other splits the first alone.
            convention: whose.
        """
        matched = [scores[name] for name, _ in SUBSETS["mnli"].splits if name in scores]
        if len(matched) == 2:
            weights = [one["examples"] if convention in ("lora", "galore") else 1.0 for one in matched]
            total = sum(one["accuracy"] * weight for one, weight in zip(matched, weights, strict=True))
            return Headline("accuracy (m+mm)", total / sum(weights))
        first = next(iter(scores.values()))
        alone = _ALONE.get(convention, {}).get(self.subset)
        taken = (alone,) if alone is not None else self._of.metrics
        value = sum(first[name] for name in taken) / len(taken)
        return Headline(_MEANS.get(taken, taken[0]), value)


def _divided(examples: list[Labelled], count: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """So many examples drawn by the seed, and the others, both in their order."""
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    return (
        [example for number, example in enumerate(examples) if number in chosen],
        [example for number, example in enumerate(examples) if number not in chosen],
    )


def _draw(examples: list[Labelled], most: int | None, seed: int) -> list[Labelled]:
    return examples if most is None or len(examples) <= most else _divided(examples, most, seed)[0]
