"""METEOR: the official Java program where its jar is given, and NLTK's under a name of its own.

METEOR 1.5 matches words by form, stem, WordNet synonym and paraphrase table, with weights tuned on human judgements;
NLTK's is the metric of 2007 without the tables and those weights. The two are not comparable.

Source: Denkowski & Lavie, "Meteor universal: language specific translation evaluation for any target language", 2014;
how the MS-COCO caption scripts speak to it.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from trimtab.errors import ConfigError
from trimtab.tasks.pairs import check_pairs, find_jar, need
from trimtab.tasks.ptb import tokenize

#: Why the papers' column is empty where no jar was given.
NO_METEOR = (
    "METEOR is left out: the papers' figure is that of the Java program METEOR 1.5 with its paraphrase table; "
    "set task.meteor_jar to the path of meteor-1.5.jar (beside it data/paraphrase-en.gz)"
)


def meteor(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    jar: str,
    *,
    tokenizer_jar: str | None = None,
) -> float:
    """METEOR 1.5 x100 over the corpus, from the official program.

    Its words are those of `ptb.tokenize`, as in the MS-COCO scripts; the program then normalises them itself.

    Args:
        hypotheses: one for each example.
        references: those of each example.
        jar: path of meteor-1.5.jar; the program looks for data/paraphrase-en.gz beside it.
        tokenizer_jar: see `ptb.tokenize`.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: the jar does not exist, Java cannot run it, or it answers with something else than numbers.
    """
    check_pairs(hypotheses, references)
    path = find_jar(jar, "meteor_jar")
    words = (" ".join(line).replace("|||", "") for line in tokenize(_flat(hypotheses, references), tokenizer_jar))
    wanted = [" ||| ".join(next(words) for _ in texts) for texts in references]
    asked = [f"SCORE ||| {texts} ||| {next(words)}" for texts in wanted]

    # Where the locale is not UTF-8, Java before 18 would read the words as something else.
    command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(path), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=path.parent, encoding="utf-8"
        )
        try:
            return 100 * _ask(program, asked, errors, jar)
        finally:
            program.kill()
            program.communicate()


def _flat(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
    return [*(text for texts in references for text in texts), *hypotheses]


def _ask(program: subprocess.Popen[str], asked: list[str], errors: IO[bytes], jar: str) -> float:
    """The corpus score: a line of counts for each example, then one EVAL over them all."""
    assert program.stdin is not None and program.stdout is not None

    def say(line: str) -> None:
        try:
            program.stdin.write(line + "\n")  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it has ended: there is no answer, and that says why

    def hear() -> str:
        answer = program.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            program.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise ConfigError(
                f"meteor_jar = {jar!r}: the program ended with status {program.returncode} before it gave a score"
                + (f" ({said[-1].strip()})" if said else "")
            )
        return answer.strip()

    counts = []
    for line in asked:
        say(line)
        counts.append(hear())
    say(" ||| ".join(["EVAL", *counts]))
    answer = ""
    for _ in range(len(asked) + 1):  # one score for each example, then that of the corpus
        answer = hear()
    try:
        return float(answer)
    except ValueError as error:
        raise ConfigError(f"meteor_jar = {jar!r}: the program answered {answer!r} where a score was due") from error


def wordnet() -> Any:
    """NLTK's WordNet reader, or None where its data is not on this machine. Nothing is downloaded."""
    data = need("nltk.corpus", "METEOR (NLTK)").wordnet
    try:
        data.ensure_loaded()
    except LookupError:
        return None
    return data


def meteor_nltk(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NLTK's METEOR x100: the mean over examples of the best score of a single reference; not the papers' figure.

    Words are those of `ptb.tokenize`.

    Raises:
        DataError: see `check_pairs`.
        ConfigError: NLTK or its WordNet data is not installed.
    """
    check_pairs(hypotheses, references)
    data = wordnet()
    if data is None:
        raise ConfigError("METEOR (NLTK) needs NLTK's WordNet data: python -m nltk.downloader wordnet")
    score = need("nltk.translate.meteor_score", "METEOR (NLTK)").meteor_score
    words = iter(tokenize(_flat(hypotheses, references)))
    wanted = [[next(words) for _ in texts] for texts in references]
    return 100 * sum(float(score(texts, next(words), wordnet=data)) for texts in wanted) / len(wanted)
