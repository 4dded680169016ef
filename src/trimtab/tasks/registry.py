"""The tasks by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from trimtab.errors import ConfigError
from trimtab.tasks.base import REGISTRY, Task


def tasks() -> dict[str, type[Task]]:
    """The known tasks by name."""
    return dict(REGISTRY)


def parse_task(value: Task | Mapping[str, Any]) -> Task:
    """A config as it is, or one made from a mapping such as `{"name": "classification", "train": "a.csv"}`.

    Raises:
        ConfigError: the mapping has no known `name`.
        pydantic.ValidationError: a setting of the named task is unknown or out of range.
    """
    if isinstance(value, Task):
        return value
    given: object = value
    if not isinstance(given, Mapping):
        raise ConfigError(f"a task is a config or a mapping with a `name`, got {type(given).__name__}")
    name = value.get("name")
    if name is None:
        raise ConfigError(f"name is missing; the tasks are {', '.join(sorted(REGISTRY))}")
    if name not in REGISTRY:
        near = difflib.get_close_matches(str(name), REGISTRY, n=1)
        hint = f"did you mean {near[0]}? The" if near else "the"
        raise ConfigError(f"name: no task is called {name!r}; {hint} tasks are {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name].model_validate(dict(value))


#: A field of a settings tree that holds any registered task, given as a config or a mapping.
TaskField = Annotated[SerializeAsAny[Task], BeforeValidator(parse_task)]
