"""ROUGE-L and CIDEr as the MS-COCO caption scripts compute them, for which there is no maintained library.

rouge-score's ROUGE-L is another number: it balances precision and recall equally and takes the best single reference.

Source: github.com/tylin/coco-caption (and its package pycocoevalcap); Lin, "ROUGE: a package for automatic evaluation
of summaries", 2004; Vedantam et al., "CIDEr: consensus-based image description evaluation", arXiv 1411.5726.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.tasks.pairs import check_pairs
from trimtab.tasks.ptb import tokenize

_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0

Gram = tuple[str, ...]


def rouge_l(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer_jar: str | None = None
) -> float:
    """ROUGE-L x100: the mean over examples of F with beta 1.2.

    P is the longest common subsequence's share of the hypothesis, R its share of the reference; each is the largest
    over an example's references, P and R not necessarily of the same one. F = (1 + b^2) P R / (R + b^2 P).

    Args:
        hypotheses: one for each example.
        references: those of each example.
        tokenizer_jar: see `ptb.tokenize`.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: the jar cannot be run.
    """
    check_pairs(hypotheses, references)
    written, wanted = _tokenized(hypotheses, references, tokenizer_jar)
    return 100 * sum(map(_rouge_l, written, wanted)) / len(written)


def _rouge_l(written: list[str], wanted: list[list[str]]) -> float:
    common = [_common(written, words) for words in wanted]
    if not any(common):
        return 0.0
    precision = max(common) / len(written)
    recall = max(n / len(words) for n, words in zip(common, wanted, strict=True) if words)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]


class _Vector(NamedTuple):
    """A text's tf-idf weights and their norm, by order; `length` counts its pairs of words."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer_jar: str | None = None) -> float:
    """CIDEr over the corpus: between 0 and 10, and 0 where there is one example (then no word is informative).

    Weights are tf-idf, where a document is all references of one example. For each order 1-4, the similarity of a
    hypothesis and a reference is the cosine of their weights, those of the hypothesis cut off at the reference's,
    times exp(-(difference of lengths)^2 / (2 * 6^2)); the score is 10 times its mean over orders, references and
    examples. As in the authors' code, the lengths are numbers of word pairs, and words are not stemmed.

    Args:
        hypotheses: one for each example.
        references: those of each example.
        tokenizer_jar: see `ptb.tokenize`.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: the jar cannot be run.
    """
    check_pairs(hypotheses, references)
    written, wanted = _tokenized(hypotheses, references, tokenizer_jar)
    grams = [[_grams(words) for words in texts] for texts in wanted]
    found_in: Counter[Gram] = Counter()
    for texts in grams:
        found_in.update(set().union(*texts))
    examples = math.log(len(written))

    def vector(counts: Counter[Gram]) -> _Vector:
        weights: list[dict[Gram, float]] = [{} for _ in range(_ORDERS)]
        for gram, n in counts.items():
            weights[len(gram) - 1][gram] = n * (examples - math.log(max(found_in[gram], 1)))
        norms = [math.sqrt(sum(w * w for w in part.values())) for part in weights]
        return _Vector(weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2))

    total = 0.0
    for words, texts in zip(written, grams, strict=True):
        hypothesis = vector(_grams(words))
        total += sum(_similarity(hypothesis, vector(text)) for text in texts) / len(texts)
    return 10 * total / len(written)


def _grams(words: list[str]) -> Counter[Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """The mean over orders."""
    total = 0.0
    for order in range(_ORDERS):
        norm = hypothesis.norms[order] * reference.norms[order]
        if norm:
            theirs = reference.weights[order]
            shared = (min(w, theirs[g]) * theirs[g] for g, w in hypothesis.weights[order].items() if g in theirs)
            total += sum(shared) / norm
    return total / _ORDERS * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * _SIGMA**2))


def _tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], jar: str | None
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """All texts as words, in one run of the tokenizer."""
    tokens = iter(tokenize([*hypotheses, *(text for texts in references for text in texts)], jar))
    written = [next(tokens) for _ in hypotheses]
    return written, [[next(tokens) for _ in texts] for texts in references]
