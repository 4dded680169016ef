"""Settings in messages as on the command line: `method.rank` where a user of the library writes `rank`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel

from trimtab.errors import ConfigError, TargetError

#: Switches and nothing, as YAML writes them.
_YAML = {"True": "true", "False": "false", "None": "null"}


def leading_key(kind: type[BaseModel], text: str) -> tuple[str, str] | None:
    """The setting of `kind` that a message begins with, and the rest; None where it begins with no setting."""
    found = re.match(r"(\w+)(?:: | ?= ?)(?=\S)", text)
    if found is None or found[1] not in kind.model_fields:
        return None
    return found[1], text[found.end() :]


def in_section(section: str, kind: type[BaseModel], text: str) -> str:
    """A message in which each setting of `kind` that is given a value has its section before it.

    Only `rank = 8`, `rank=8` and a message's own beginning `rank: ...` are such places: other words may be plain words.
    A switch has its value as YAML writes it: `section.dora = true`.
    """
    names = "|".join(map(re.escape, kind.model_fields))
    text = re.sub(rf"(?<![\w.'\"/])({names})(?= ?=)", rf"{section}.\1", text)
    switch = rf"(?<!\w)({section}\.(?:{names}) ?= ?)(True|False|None)\b"
    text = re.sub(switch, lambda found: f"{found[1]}{_YAML[found[2]]}", text)
    return re.sub(rf"^({names})(?=: )", rf"{section}.\1", text)


@contextmanager
def named(section: str, settings: BaseModel) -> Iterator[None]:
    """Put a section's name into the errors of a method or a task, which does not know that it is one of a run.

    Errors of data are as they are: they may hold any text.
    """
    try:
        yield
    except (ConfigError, TargetError) as error:
        error.args = (in_section(section, type(settings), str(error)),)
        raise
