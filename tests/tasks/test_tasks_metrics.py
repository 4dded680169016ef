import builtins
import importlib
import math
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from trimtab.errors import ConfigError
from trimtab.tasks import metrics


def test_hand_computed_classes() -> None:
    """TP 2, FP 1, FN 1, TN 1: accuracy 3/5, F1 2/3, macro F1 (2/3 + 1/2) / 2, Matthews 1 / 6."""
    truth, found = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert metrics.accuracy(found, truth) == pytest.approx(3 / 5)
    assert metrics.f1(found, truth) == pytest.approx(2 / 3)
    assert metrics.f1(found, truth, positive=0) == pytest.approx(1 / 2)
    assert metrics.macro_f1(found, truth) == pytest.approx(7 / 12)
    assert metrics.matthews(found, truth) == pytest.approx((2 * 1 - 1 * 1) / 6)


def test_hand_computed_numbers() -> None:
    """Of (1, 2, 3, 4) and (1, 3, 2, 4): Pearson = Spearman = 4/5, mean squared error 1/2."""
    truth, found = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    assert metrics.pearson(found, truth) == pytest.approx(0.8)
    assert metrics.spearman(found, truth) == pytest.approx(0.8)
    assert metrics.mse(found, truth) == pytest.approx(0.5)
    bent = [math.exp(x) for x in truth]
    assert metrics.spearman(bent, truth) == pytest.approx(1.0)
    assert metrics.pearson(bent, truth) < 0.95


def test_against_the_libraries() -> None:
    """On random answers, with scores tied, each figure is the library's own."""
    draw = random.Random(0)
    truth, found = [draw.randrange(3) for _ in range(99)], [draw.randrange(3) for _ in range(99)]
    assert metrics.accuracy(found, truth) == pytest.approx(sklearn.metrics.accuracy_score(truth, found))
    assert metrics.macro_f1(found, truth) == pytest.approx(sklearn.metrics.f1_score(truth, found, average="macro"))
    assert metrics.matthews(found, truth) == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, found))
    truth, found = [x % 2 for x in truth], [x % 2 for x in found]
    assert metrics.f1(found, truth) == pytest.approx(sklearn.metrics.f1_score(truth, found))
    numbers, near = [x / 5 for x in truth], [x / 5 + draw.random() // 0.3 for x in truth]
    assert metrics.pearson(near, numbers) == pytest.approx(np.corrcoef(near, numbers)[0, 1])
    ranks = [scipy.stats.rankdata(values) for values in (near, numbers)]
    assert metrics.spearman(near, numbers) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert metrics.mse(near, numbers) == pytest.approx(sklearn.metrics.mean_squared_error(numbers, near))


def test_answers_that_are_none_are_wrong() -> None:
    """None is the opposite of its label for F1 and, with two classes, for Matthews."""
    truth, found = [1, 1, 0, 0], [1, None, None, 0]
    opposite = [1, 0, 1, 0]
    assert metrics.accuracy(found, truth) == 0.5
    assert metrics.f1(found, truth) == sklearn.metrics.f1_score(truth, opposite) == 0.5
    assert metrics.matthews(found, truth) == sklearn.metrics.matthews_corrcoef(truth, opposite) == 0.0
    assert metrics.macro_f1(found, truth) == pytest.approx(2 / 3)  # recall 1/2 and precision 1, of both
    three = metrics.matthews([0, 1, 2, None], [0, 1, 2, 0])
    assert three == pytest.approx(sklearn.metrics.matthews_corrcoef([0, 1, 2, 0], [0, 1, 2, 3]))


@pytest.mark.parametrize("none", [None, math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_counts_as_the_far_end(none: float | None) -> None:
    """The end of the labels' range farther from its own label stands in its place."""
    truth = [0.0, 1.0, 4.0, 5.0]
    found, worst = [none, 1.0, none, 5.0], [5.0, 1.0, 0.0, 5.0]
    assert metrics.mse(found, truth) == pytest.approx((25 + 16) / 4)
    assert metrics.pearson(found, truth) == pytest.approx(scipy.stats.pearsonr(worst, truth).statistic)
    assert metrics.spearman(found, truth) == pytest.approx(scipy.stats.spearmanr(worst, truth).statistic)


@pytest.mark.filterwarnings("error")
def test_constant_answers_give_zero_and_no_warning() -> None:
    """A correlation that is not defined is 0; F1 of a class that is never found is 0."""
    for name in ("pearson", "spearman"):
        metric = getattr(metrics, name)
        assert metric([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == 0.0
        assert metric([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
        assert metric([1.0], [2.0]) == 0.0
        assert -1.0 <= metric([1.0, 1.0, 1.0 + 1e-15], [1.0, 2.0, 3.0]) <= 1.0
    assert metrics.matthews([1, 1, 1], [0, 1, 1]) == 0.0
    assert metrics.matthews([1, 1], [1, 1]) == 0.0
    assert metrics.f1([0, 0], [0, 1]) == metrics.f1([0, 0], [0, 0]) == 0.0
    assert metrics.macro_f1([None, None], [0, 1]) == 0.0


def test_lengths_must_fit() -> None:
    """Nothing, or more of the one than of the other, is the caller's fault."""
    for name in ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "mse"):
        for found, truth in (([], []), ([1], [1, 2])):
            with pytest.raises(ValueError, match=rf"{len(found)} predictions for {len(truth)} labels"):
                getattr(metrics, name)(found, truth)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scikit-learn the error says what to install."""
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.startswith("sklearn"):
            raise builtins.ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"needs the package sklearn: .*pip install 'trimtab\[tasks\]'"):
        metrics.require("scipy.stats", "sklearn.metrics")
    with pytest.raises(ConfigError, match="sklearn"):
        metrics.f1([1], [1])
