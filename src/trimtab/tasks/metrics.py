"""Metrics of labelled tasks, over scikit-learn and SciPy, for models whose answers may be none.

A model that writes may answer with what is no label at all; such a prediction is None (or a number that is not
finite) and never helps: each function says what it is taken for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from trimtab.tasks.pairs import need

#: Number of no class: stands for an answer that names none.
_NO_CLASS: Final = -1


def require(*modules: str) -> None:
    """Raise ConfigError where one of these modules is not installed, before any work is done."""
    for name in modules:
        need(name, "scoring this task")


def accuracy(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Share of predictions that equal their label, 0 to 1; None is wrong."""
    return float(np.mean([p == y for p, y in _pairs(predictions, labels)]))


def f1(predictions: Sequence[float | None], labels: Sequence[float], positive: int = 1) -> float:
    """F1 of one class, 0 to 1; None counts as the opposite of its label. 0 where nothing of the class is found."""
    pairs = _pairs(predictions, labels)
    truth = [int(y == positive) for _, y in pairs]
    found = [1 - t if p is None else int(p == positive) for (p, _), t in zip(pairs, truth, strict=True)]
    return float(need("sklearn.metrics", "this metric").f1_score(truth, found, zero_division=0.0))


def macro_f1(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Mean F1 of the classes that are labels or predictions here, unweighted, 0 to 1.

    None is missing from its label's recall and is no other class's false find.
    """
    pairs = _pairs(predictions, labels)
    truth = [int(y) for _, y in pairs]
    found = [_NO_CLASS if p is None else int(p) for p, _ in pairs]
    classes = sorted(set(truth + found) - {_NO_CLASS})
    return float(
        need("sklearn.metrics", "this metric").f1_score(
            truth, found, labels=classes, average="macro", zero_division=0.0
        )
    )


def matthews(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Matthews correlation, -1 to 1; 0 where predictions or labels are constant (it is not defined there).

    With classes 0 and 1 alone None counts as the other class; with more, as a class of its own.
    """
    pairs = _pairs(predictions, labels)
    binary = all(y in (0, 1) and p in (0, 1, None) for p, y in pairs)
    truth = [int(y) for _, y in pairs]
    found = [(1 - int(y) if binary else _NO_CLASS) if p is None else int(p) for p, y in pairs]
    if len(set(truth)) == 1 or len(set(found)) == 1:
        return 0.0
    return float(need("sklearn.metrics", "this metric").matthews_corrcoef(truth, found))


def pearson(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Pearson correlation, -1 to 1; 0 where predictions or labels are constant (it is not defined there).

    None counts as the least or the greatest of the labels, whichever is farther from its own.
    """
    return _correlation("pearsonr", predictions, labels)


def spearman(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Spearman rank correlation, with ties at their mean rank; constants and None as for `pearson`."""
    return _correlation("spearmanr", predictions, labels)


def mse(predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    """Mean squared error; None as for `pearson`."""
    found, truth = _values(predictions, labels)
    return float(np.mean((found - truth) ** 2))


def _correlation(name: str, predictions: Sequence[float | None], labels: Sequence[float]) -> float:
    found, truth = _values(predictions, labels)
    if len(truth) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant values, which give NaN, and of nearly constant ones
        value = float(getattr(need("scipy.stats", "this metric"), name)(found, truth).statistic)
    return value if math.isfinite(value) else 0.0


def _pairs(predictions: Sequence[float | None], labels: Sequence[float]) -> list[tuple[float | None, float]]:
    """Predictions beside their labels; one that is not finite is None."""
    if not labels or len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return [(p if p is not None and math.isfinite(p) else None, y) for p, y in zip(predictions, labels, strict=True)]


def _values(predictions: Sequence[float | None], labels: Sequence[float]) -> tuple[Any, Any]:
    """Both as float64 arrays, None replaced by the end of the labels' range that is farther from its label."""
    pairs = _pairs(predictions, labels)
    least, most = min(labels), max(labels)
    found = [(most if most - y > y - least else least) if p is None else p for p, y in pairs]
    return np.array(found, dtype=np.float64), np.array([y for _, y in pairs], dtype=np.float64)
