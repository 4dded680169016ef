"""Say in one line what is wrong with a configuration: where it stands, which key, what, and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.config import Misfit
from trimtab.methods import Method, registry
from trimtab.naming import in_section, leading_key
from trimtab.settings import annotation_parts
from trimtab.tasks import Task, tasks

#: The sections whose settings are those of what their `name` names.
_NAMED: dict[str, tuple[type[BaseModel], Callable[[], Mapping[str, type[BaseModel]]]]] = {
    "method": (Method, registry),
    "task": (Task, tasks),
}

Key = tuple[str | int, ...]
Tree = dict[str, Any]


class Origins:
    """Where each key of a tree was written: a line of the file, or the command line. `root` is the tree's class."""

    def __init__(self, path: Path | None, root: type[BaseModel]) -> None:
        self.path = path
        self.root = root
        self._places: dict[Key, str] = {}

    @property
    def default(self) -> str:
        return "command line" if self.path is None else str(self.path)

    def note_line(self, key: Key, line: int) -> None:
        self._places[key] = f"{self.path}:{line + 1}"

    def note_override(self, key: Key) -> None:
        for known in [known for known in self._places if known[: len(key)] == key]:
            del self._places[known]
        self._places[key] = "command line"

    def of(self, key: Key) -> str:
        """The place of the key, or of the nearest section around it that was written at all."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._places:
                return self._places[key[:length]]
        below = [place for known, place in self._places.items() if known[: len(key)] == key]
        return below[0] if below else self.default


def section_model(annotation: Any) -> type[BaseModel] | None:
    """The settings class of a field that is a section of its own."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def field_section(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The settings class that a section's value will be read by; for a method or a task, by its name."""
    kind = section_model(annotation)
    for base, known in _NAMED.values():
        if kind is base:
            return known().get(str(value.get("name"))) if isinstance(value, dict) else None
    return kind


def possible_sections(annotation: Any, value: Any) -> list[type[BaseModel]]:
    """As `field_section`; of a method or a task whose name is not known yet, the classes of all of them."""
    kind = field_section(annotation, value)
    known = [every() for base, every in _NAMED.values() if section_model(annotation) is base]
    return list(known[0].values()) if kind is None and known else [kind] if kind is not None else []


def describe(error: ValidationError, tree: Tree, origins: Origins) -> str:
    """One line: the first mistake in full, the keys of the others by name."""
    found: dict[Key, tuple[int, str]] = {}
    excused: set[Key] = set()
    for detail in error.errors(include_url=False):
        if _is_other_branch(detail, tree):
            continue
        key, rank, text, instead_of = _explain(detail, tree, origins.root)
        if instead_of is not None:
            excused.add(instead_of)
        if key not in found or rank < found[key][0]:
            found[key] = (rank, text)
    # A misspelt key that is required is reported once, as misspelt.
    keys = sorted((key for key in found if key not in excused), key=lambda key: found[key][0])
    first = keys[0]
    more = f" (also wrong: {', '.join(dotted(key) for key in keys[1:])})" if keys[1:] else ""
    return f"{origins.of(first)}: {dotted(first)}: {one_line(found[first][1])}{more}"


def _explain(detail: ErrorDetails, tree: Tree, root: type[BaseModel]) -> tuple[Key, int, str, Key | None]:
    """Key, rank (0 comes first), text, and the key whose absence this mistake explains."""
    kind, value = detail["type"], detail["input"]
    context = detail.get("ctx", {})
    key = _clean(detail["loc"])
    if kind == "extra_forbidden":
        text, nearest = _unknown_key(key, tree, root)
        return key, 0, text, None if nearest is None else (*key[:-1], nearest)
    if kind == "missing":
        if len(key) == 1 and (what := str(key[0])) in _NAMED:
            return (what, "name"), 3, f"is missing; the {what}s are {', '.join(sorted(_NAMED[what][1]()))}", None
        return key, 3, "is missing; it has no default", None
    if kind == "value_error":
        cause = context.get("error")
        if isinstance(cause, Misfit):
            return (*key, *cause.key.split(".")), 2, cause.message, None
        text = str(cause)
        if len(key) == 1 and key[0] in _NAMED:
            return _explain_named(str(key[0]), tree.get(str(key[0])), text)
        return key, 1, text, None
    custom = detail["msg"].startswith("is ")  # a method's own words
    return key, 1, f"{shown(value)} {detail['msg'] if custom else _requirement(kind, context, value)}", None


def _explain_named(what: str, section: Any, text: str) -> tuple[Key, int, str, Key | None]:
    names = sorted(_NAMED[what][1]())
    if not isinstance(section, dict):
        name = section if section in names else names[-1]
        return (what,), 1, f"{shown(section)} is not a section; write `{what}:` and below it `name: {name}`", None
    if "name" not in section:
        return (what, "name"), 1, f"is missing; the {what}s are {', '.join(names)}", None
    if section["name"] in names:
        kind = _NAMED[what][1]()[section["name"]]
        if led := leading_key(kind, text):
            return (what, led[0]), 1, in_section(what, kind, led[1]), None
        return (what,), 1, in_section(what, kind, text), None
    near = _nearest(str(section["name"]), names)
    hint = f"did you mean {near}? The" if near else "the"
    said = f"no {what} is called {shown(section['name'])}; {hint} {what}s are {', '.join(names)}"
    return (what, "name"), 1, said, None


def _unknown_key(key: Key, tree: Tree, root: type[BaseModel]) -> tuple[str, str | None]:
    """What to say of a key that its section does not have, and the key that was meant, if one is near."""
    name, section, what = str(key[-1]), _fields_at(key[:-1], tree, root), str(key[0])
    named = what in _NAMED and len(key) > 1
    if named and len(key) == 2:
        chosen = tree[what]["name"]
        elsewhere = [other for other, cls in sorted(_NAMED[what][1]().items()) if name in cls.model_fields]
        if elsewhere:
            rest = {k: v for k, v in tree[what].items() if k in section}
            flow = yaml.safe_dump(rest, default_flow_style=True, sort_keys=False, width=10_000).strip()
            return (
                f"is a setting of {', '.join(elsewhere)}, and {what}.name is {chosen}; leave it out, or replace the "
                f"whole section on the command line: '{what}={flow}'",
                None,
            )
    near = _nearest(name, section)
    place = f"the {what} {tree[what]['name']}" if named else dotted(key[:-1]) or "a config"
    if near is not None:
        return f"unknown key; did you mean {dotted((*key[:-1], near))}?", near
    for outer, field in root.model_fields.items():
        kind = section_model(field.annotation)
        if kind is not None and name in kind.model_fields:
            return f"unknown key; did you mean {outer}.{name}?", None
    return f"unknown key; {place} has {', '.join(section)}", None


def _fields_at(key: Key, tree: Tree, root: type[BaseModel]) -> list[str]:
    """The names of the keys that the section at `key` can have."""
    model = root
    for part in key:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        if model is root and part in _NAMED:
            model = _NAMED[part][1]()[tree[part]["name"]]
            continue
        kinds = [kind for kind in map(section_model, annotation_parts(annotation)) if kind is not None]
        model = kinds[0]
    return list(model.model_fields)


def _is_other_branch(detail: ErrorDetails, tree: Tree) -> bool:
    """Whether the mistake is only that a value is not of the *other* kind that its key may have.

    Pydantic reports every member of a union, and calls a list with a wrong item too short as well.
    """
    value: Any = tree
    for part in detail["loc"]:
        if part == "str":
            return isinstance(value, dict | list)
        if isinstance(part, str) and (part == "HubSource" or part.startswith("tuple[")):
            return not isinstance(value, dict | list)
        if not isinstance(value, dict | list):
            return False
        value = value.get(str(part)) if isinstance(value, dict) else value[int(part)]
    return detail["type"] == "too_short" and bool(value)


def _clean(loc: tuple[str | int, ...]) -> Key:
    """The key without the names of union members that pydantic puts into a location."""
    return tuple(
        part for part in loc if isinstance(part, int) or not (part in ("str", "HubSource") or part.startswith("tuple["))
    )


_TEXTS = {
    "int_parsing": "is not a whole number",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "path_type": "is not a path",
    "dict_type": "is not a table; write {name: value}",
    "model_type": "is not a section; it needs keys below it",
}


def _requirement(kind: str, context: Mapping[str, Any], value: Any) -> str:
    """What the value should have been."""
    if kind in _TEXTS:
        return _TEXTS[kind]
    if kind == "greater_than_equal":
        return f"is too small; it must be at least {context['ge']}"
    if kind == "greater_than":
        return f"is too small; it must be greater than {context['gt']:g}"
    if kind == "less_than_equal":
        return f"is too large; it must be at most {context['le']:g}"
    if kind == "less_than":
        return f"is too large; it must be less than {context['lt']:g}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"is not one of {', '.join(choices)}"
    if kind == "string_type":
        quoted = f"; write it in quotes: '{value}'" if isinstance(value, int | float) else ""
        return f"is not text{quoted}"
    if kind == "tuple_type":
        return f"is not a list; write [{value}]"
    if kind == "too_short":
        return f"is too short; it needs at least {context['min_length']}"
    if kind == "string_pattern_mismatch":
        return "may hold letters, digits, '.', '_' and '-' alone, and begins with a letter or digit"
    return f"is not valid ({kind.replace('_', ' ')})"


def _nearest(word: str, choices: Sequence[str]) -> str | None:
    folded = {choice.lower().replace("-", "_"): choice for choice in choices}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(folded), n=1, cutoff=0.6)
    return folded[near[0]] if near else None


def dotted(key: Key) -> str:
    """A key as a person writes it: data.sources[0].dataset."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: Any) -> str:
    """A value as it may have been written, short enough for a line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = one_line(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: str) -> str:
    """The text with each run of white space as one blank."""
    return " ".join(text.split())
