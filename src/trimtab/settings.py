"""The base of every settings object: frozen, and strict about its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict

from trimtab.errors import ConfigError


class Settings(BaseModel):
    """A frozen pydantic model in which an unknown key is an error and defaults are validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class HubSource(Settings):
    """A Hugging Face dataset by name, read as a stream."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


def given(section: BaseModel, *keys: str) -> list[str]:
    """Those of the keys that differ from their defaults."""
    fields = type(section).model_fields
    return [key for key in keys if getattr(section, key) != fields[key].default]


def annotation_parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything in its brackets."""
    yield annotation
    for arg in get_args(annotation):
        yield from annotation_parts(arg)


def wrong_kind(annotation: Any, value: Any) -> str | None:
    """What a field wants, where pydantic would turn a value of another kind into it: "8" or True into a number.

    YAML and the command line may write a switch as a word; a program has no need to.
    """
    kinds = {part for part in annotation_parts(annotation) if isinstance(part, type)}
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        inner = [arg for arg in _containers(annotation) for arg in get_args(arg)[-1:]]
        if ... in inner:
            inner = [arg for arg in _containers(annotation) for arg in get_args(arg)[:1]]
        return next((f"{what} in it" for i in inner for item in items if (what := wrong_kind(i, item))), None)
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        return "a number"
    if isinstance(value, str) and str not in kinds and not _has_words(annotation):
        return "True or False" if bool in kinds else "a number" if kinds & {int, float} else None
    if isinstance(value, int | float) and not isinstance(value, bool) and bool in kinds and not kinds & {int, float}:
        return "True or False"
    return None


def _containers(annotation: Any) -> list[Any]:
    return [part for part in annotation_parts(annotation) if getattr(part, "__origin__", None) in (dict, list, tuple)]


def _has_words(annotation: Any) -> bool:
    return any(isinstance(part, str) for part in annotation_parts(annotation))


def check_whole(name: str, value: object, least: int = 0) -> None:
    """Raise ConfigError for what is no whole number, or one that is too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} = {value!r}: give a whole number, at least {least}")
