"""How the nine GLUE tasks are laid out: columns, classes, files, metrics (Wang et al. 2018, arXiv 1804.07461).

Columns and the order of classes are those of the dataset `nyu-mll/glue` of the Hugging Face hub; the files are those
of the official download, tab-separated and without quoting.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Subset(NamedTuple):
    """One of the tasks.

    Attributes:
        columns: of the text, and of the second text where there is one, at the hub; they are also the names by which
            T5 is given them (Raffel et al. 2020, arXiv 1910.10683, appendix D).
        labels: names of the classes in the order of their numbers; empty where the label is a number.
        metrics: in the order in which they are printed.
        folder: of the official download.
        tsv: the columns of the texts and the label in its train.tsv and dev.tsv.
        header: the columns of those files, where their first line is a row.
        torn: whether rows of those files are known to lack fields; they are passed over, as they are at the hub.
        splits: scored splits, with their file in the official download.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    folder: str
    tsv: tuple[str, ...]
    header: tuple[str, ...] | None = None
    torn: bool = False
    splits: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)


_PAIR: Final = ("sentence1", "sentence2")
_ENTAILMENT: Final = ("entailment", "not_entailment")
_MNLI_SPLITS: Final = (("validation_matched", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv"))

SUBSETS: Final[dict[str, Subset]] = {
    "cola": Subset(
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        "CoLA",
        ("sentence", "label"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Subset(("sentence",), ("negative", "positive"), ("accuracy",), "SST-2", ("sentence", "label")),
    "mrpc": Subset(
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        "MRPC",
        ("#1 String", "#2 String", "Quality"),
    ),
    "qqp": Subset(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "QQP",
        ("question1", "question2", "is_duplicate"),
        torn=True,
    ),
    "stsb": Subset(_PAIR, (), ("pearson", "spearman"), "STS-B", (*_PAIR, "score")),
    "mnli": Subset(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "MNLI",
        (*_PAIR, "gold_label"),
        splits=_MNLI_SPLITS,
    ),
    "qnli": Subset(("question", "sentence"), _ENTAILMENT, ("accuracy",), "QNLI", ("question", "sentence", "label")),
    "rte": Subset(_PAIR, _ENTAILMENT, ("accuracy",), "RTE", (*_PAIR, "label")),
    "wnli": Subset(_PAIR, ("not_entailment", "entailment"), ("accuracy",), "WNLI", (*_PAIR, "label")),
}
