"""What every metric of generated text asks of its inputs, and how it finds the libraries it stands on."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, DataError


def check_pairs(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse what no corpus metric can be computed of.

    Raises:
        DataError: there is no example, there are more of one than of the other, references are a text and not a list
            of texts, an example has no reference, or an empty one.
    """
    if len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} hypotheses, but references for {len(references)} examples")
    if not hypotheses:
        raise DataError("no hypotheses: a metric of no examples is undefined")
    for number, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(f"example {number}: its references are the text {texts!r}; give a list of texts")
        if not texts:
            raise DataError(f"example {number} has no reference")
        for text in texts:
            if not text.strip():
                raise DataError(f"example {number}: a reference is empty")


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


def find_jar(jar: str, setting: str) -> Path:
    """The file of a Java program.

    Raises:
        ConfigError: there is no such file, or no Java to run it.
    """
    path = Path(jar).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{setting} = {jar!r}: no such file; give the path of the jar, or leave the setting out")
    if shutil.which("java") is None:
        raise ConfigError(
            f"{setting} = {jar!r}: no `java` on the PATH to run it; install Java, or leave the setting out"
        )
    return path
