"""Metrics of generated text over a corpus, each example with one or more references.

`score_generated` gives what the E2E challenge's script (github.com/tuetschek/e2e-metrics) prints: BLEU and NIST of
mteval-v13a, METEOR, ROUGE-L and CIDEr of the MS-COCO caption scripts. `rouge` is for summaries and the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from trimtab.tasks.meteor import meteor, meteor_nltk, wordnet
from trimtab.tasks.mscoco import cider, rouge_l
from trimtab.tasks.nist import nist
from trimtab.tasks.pairs import check_pairs, need

__all__ = ["bleu", "cider", "meteor", "meteor_nltk", "nist", "rouge", "rouge_l", "score_generated"]


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 x100 as mteval-v13a prints it: lower-cased, 13a tokens, by sacrebleu.

    Each example's reference length is that of the reference nearest to the hypothesis in length. An order without
    any match is smoothed as mteval does it ("exp").

    Raises:
        DataError: see `check_pairs`.
        ConfigError: sacrebleu is not installed.
    """
    check_pairs(hypotheses, references)
    sacrebleu = need("sacrebleu", "BLEU")
    # sacrebleu wants the first reference of every example, then the second; None where an example has no more.
    columns = [list(column) for column in zip_longest(*references)]
    return float(
        sacrebleu.corpus_bleu(
            list(hypotheses), columns, smooth_method="exp", lowercase=True, tokenize="13a", force=True
        ).score
    )


def rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, stem: bool = True) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L as F1 x100 by rouge-score: the mean over examples, of each the best reference.

    Not the ROUGE-L of `score_generated`, whose F weighs recall more. Only the letters a-z and digits make words.

    Args:
        hypotheses: one for each example.
        references: those of each example.
        stem: cut words of more than three letters to Porter's stem, as summaries are scored.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: rouge-score is not installed.
    """
    check_pairs(hypotheses, references)
    kinds = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = need("rouge_score.rouge_scorer", "ROUGE").RougeScorer(list(kinds), use_stemmer=stem)
    found = [scorer.score_multi(list(texts), text) for text, texts in zip(hypotheses, references, strict=True)]
    return {name: 100 * sum(float(one[kind].fmeasure) for one in found) / len(found) for kind, name in kinds.items()}


def score_generated(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    meteor_jar: str | None = None,
    tokenizer_jar: str | None = None,
) -> dict[str, float]:
    """The metrics of the E2E challenge. BLEU, METEOR and ROUGE-L are x100; NIST and CIDEr stand as they are.

    Args:
        hypotheses: one for each example.
        references: those of each example, any number but none.
        meteor_jar: path of meteor-1.5.jar, for "METEOR". Without it, NLTK's metric is given as "METEOR (NLTK)"
            where NLTK's WordNet data is there; "METEOR" is then missing.
        tokenizer_jar: path of stanford-corenlp-3.4.1.jar, for the official script's very tokens in METEOR, ROUGE-L
            and CIDEr.

    Returns:
        "BLEU", "NIST", "METEOR" or "METEOR (NLTK)" or neither, "ROUGE-L", "CIDEr".

    Raises:
        DataError: see `check_pairs`.
        ConfigError: a library of the extra `tasks` is not installed; a jar is missing or cannot be run.
    """
    check_pairs(hypotheses, references)
    scores = {"BLEU": bleu(hypotheses, references), "NIST": nist(hypotheses, references)}
    if meteor_jar is not None:
        scores["METEOR"] = meteor(hypotheses, references, meteor_jar, tokenizer_jar=tokenizer_jar)
    elif wordnet() is not None:
        scores["METEOR (NLTK)"] = meteor_nltk(hypotheses, references)
    scores["ROUGE-L"] = rouge_l(hypotheses, references, tokenizer_jar=tokenizer_jar)
    scores["CIDEr"] = cider(hypotheses, references, tokenizer_jar=tokenizer_jar)
    return scores
