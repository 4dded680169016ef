"""What every metric of generated text asks of its inputs, and how it finds the libraries it stands on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from trimtab.errors import ConfigError, DataError


def check_pairs(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse what no corpus metric can be computed of.

    Raises:
        DataError: there is no example, there are more of one than of the other, references are a text and not a list
            of texts, or an example has no reference with a word in it.
    """
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} hypotheses, but references for {len(references)} examples")
    if not hypotheses:
        raise DataError("no hypotheses: a metric of no examples is undefined")
    for number, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(f"example {number}: its references are the text {texts!r}; give a list of texts")
        if not any(text.strip() for text in texts):
            raise DataError(f"example {number} has no reference")


def need(module: str, what: str) -> Any:
    """A module of the extra `tasks`, imported at first use.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{what} needs the package {package}: pip install 'trimtab[tasks]' ({error})") from error
