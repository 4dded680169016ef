"""NIST: the information-weighted n-gram score of machine translation, over a variable number of references.

NLTK's `corpus_nist` is not this metric: it matches each hypothesis with one reference at a time, where the official
scripts match it with all, and adds up the lengths of the chosen references over the orders
(https://github.com/nltk/nltk/pull/3901). So it is written here.

Source: Doddington, "Automatic evaluation of machine translation quality using n-gram co-occurrence statistics",
2002, eq. 2-3; mteval-v13a; of E2E's two scripts, the Python one (`measure_scores.py -p`), which LoRA's authors ran.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from trimtab.tasks.pairs import check_pairs, need

_ORDERS = 5
#: The penalty is 1/2 where the hypotheses have 2/3 of the words of the references.
_BETA = -math.log(0.5) / math.log(1.5) ** 2

Gram = tuple[str, ...]


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST over the corpus: no upper bound, about 8-9 for good systems on E2E.

    Words are mteval's (13a), lower-cased. An n-gram's information is log2(count of its first n-1 words / count of
    it) over all references. A hypothesis's n-gram counts as often as it stands in the reference that has most of
    it. The length penalty compares the hypotheses' words with the mean number of words of each example's references.

    E2E's Perl script divides by the largest number of references instead, as if the missing ones were empty: its
    length penalty is weaker, and nearly always 1.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: sacrebleu is not installed.
    """
    check_pairs(hypotheses, references)
    words = need("sacrebleu.tokenizers.tokenizer_13a", "NIST").Tokenizer13a()

    counts: Counter[Gram] = Counter()
    matches: list[Counter[Gram]] = [Counter() for _ in range(_ORDERS)]
    totals = [0] * _ORDERS
    mean_length = 0.0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        written = words(hypothesis.lower()).split()
        wanted = [words(text.lower()).split() for text in texts]
        length = sum(map(len, wanted))
        counts[()] += length
        mean_length += length / len(wanted)
        for order in range(1, _ORDERS + 1):
            most: Counter[Gram] = Counter()
            for text in wanted:
                grams = Counter(_grams(text, order))
                counts.update(grams)
                most |= grams
            matches[order - 1].update(Counter(_grams(written, order)) & most)
            totals[order - 1] += max(len(written) - order + 1, 0)

    score = 0.0
    for found, total in zip(matches, totals, strict=True):
        if total:
            score += sum(math.log2(counts[gram[:-1]] / counts[gram]) * n for gram, n in found.items()) / total
    return score * _length_penalty(totals[0] / mean_length)


def _grams(words: list[str], order: int) -> list[Gram]:
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def _length_penalty(ratio: float) -> float:
    if ratio <= 0:
        return 0.0
    return math.exp(-_BETA * math.log(min(ratio, 1.0)) ** 2)
