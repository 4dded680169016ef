"""Labels as words: templates of prompts, and what a written answer names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Formatter

from trimtab.errors import ConfigError


def check_template(template: str, setting: str, needed: Sequence[str]) -> None:
    """Raise ConfigError unless a template names each of `needed` in braces, and nothing else."""
    known = " and ".join(f"{{{name}}}" for name in needed)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"{setting} = {template!r}: {error}; a brace that is text is doubled, {{{{ or }}}}"
        ) from error
    named = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (name not in needed or form or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ConfigError(
                f"{setting} = {template!r}: {{{shown}}} is not known; a template names {known} "
                "(a brace that is text is doubled, {{ or }})"
            )
    for name in needed:
        if name not in named:
            raise ConfigError(f"{setting} = {template!r}: lacks {{{name}}}; a template names {known}")


def class_of(answer: str, labels: Sequence[str]) -> float | None:
    """The number of the class that the first line of an answer names, in any case of letters; None if it names none."""
    lines = answer.strip().splitlines()
    word = lines[0].strip() if lines else ""
    if word in labels:
        return float(labels.index(word))
    alike = [number for number, name in enumerate(labels) if name.casefold() == word.casefold()]
    return float(alike[0]) if len(alike) == 1 else None


def number_of(answer: str) -> float | None:
    """The finite number that the first line of an answer is; None if it is none."""
    lines = answer.strip().splitlines()
    try:
        value = float(lines[0]) if lines else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
