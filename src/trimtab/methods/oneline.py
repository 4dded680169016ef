"""Mistakes in a method's settings, each as one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trimtab.errors import ConfigError
from trimtab.settings import Settings, wrong_kind

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(Settings)


class OneLine(ModelMetaclass):
    """Calling a config's class with wrong settings is a ConfigError of one line.

    Validation of a tree of settings does not come by here, so that the tree still knows where it went wrong.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        check_kinds(cls, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise misfit(cls, error) from None


def check_kinds(method: Any, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that pydantic would turn into one of another kind (True into the rank 1)."""
    for key, value in values.items():
        field = method.model_fields.get(key)
        if field is not None and (wanted := wrong_kind(field.annotation, value)) is not None:
            raise ConfigError(f"{method.__name__}: {key} = {value!r}: give {wanted}")


def misfit(method: Any, error: ValidationError) -> ConfigError:
    """The first of a config's mistakes, as one line."""
    first = error.errors()[0]
    key, known = str(first["loc"][0]), list(method.model_fields)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        what = f"is no setting of it; did you mean {near[0]}?" if near else f"is no setting of it: {', '.join(known)}"
    elif first["type"] == "missing":
        what = "is missing; it has no default"
    elif first["type"] == "tuple_type":
        what = f"= {first['input']!r}: give a list or a tuple, such as ({first['input']!r},)"
    else:
        said = first["msg"].removeprefix("Value error, ")
        what = f"= {first['input']!r}: {said[0].lower()}{said[1:]}"
    return ConfigError(f"{method.__name__}: {key} {what}")
