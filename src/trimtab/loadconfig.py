"""Read the configuration tree from a YAML file and `section.key=value` words, and write it back.

Every mistake becomes one `ConfigError` of one line that says where it stands (file and line, or the
command line), which key it is, what is wrong, and the way out. YAML is read by its 1.2 rules where the
two versions differ: `no` and `on` are words, `1e-3` is a number, a date is a word.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from yaml.resolver import BaseResolver

from trimtab.config import PretrainConfig, RunConfig
from trimtab.configerrors import (
    Key,
    Origins,
    Tree,
    describe,
    dotted,
    field_section,
    one_line,
    possible_sections,
    section_model,
    shown,
)
from trimtab.errors import ConfigError
from trimtab.settings import annotation_parts, given

Config = TypeVar("Config", bound=BaseModel)

_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|nan))$"
)
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$")
_NULL = r"~|null|Null|NULL|"
_PLAIN_TAGS = (BaseResolver.DEFAULT_SEQUENCE_TAG, BaseResolver.DEFAULT_MAPPING_TAG)
_RULES = (
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:null", re.compile(rf"({_NULL})$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the scalars of YAML 1.2 and without anchors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own table)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes every word which either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RULES:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read the configuration of a pre-training run; see `load_tree`."""
    return load_tree(PretrainConfig, path, overrides)


def load_tree(
    kind: type[Config], path: Path | None, overrides: Sequence[str] = (), start: Mapping[str, Any] | None = None
) -> Config:
    """Read a run's configuration.

    Args:
        kind: of configuration.
        path: a YAML file; None when everything stands in `overrides`.
        overrides: words `section.key=value`, applied in order over the file; a value is read as YAML, so
            that `data.sources=[a.txt, b.txt]` is a list and `optim.warm_start_lr=null` takes a default. Where a
            setting can be nothing but a text or null, it is taken as it stands, but for quotes around all of it.
        start: what stands there before the overrides, in place of a file.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the message is one line.
    """
    tree, origins = _read(kind, path, overrides, start)
    for key, value in _switches_as_numbers(tree, kind):
        raise ConfigError(f"{origins.of(key)}: {dotted(key)}: {shown(value)} is not a number")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, tree, origins)) from None


def _read(
    kind: type[BaseModel], path: Path | None, overrides: Sequence[str], start: Mapping[str, Any] | None = None
) -> tuple[Tree, Origins]:
    """The tree as it was written, with nothing checked."""
    origins = Origins(path, kind)
    tree: Tree = copy.deepcopy(dict(start or {})) if path is None else _read_yaml(path, origins)
    for word in overrides:
        _apply(tree, word, origins, kind)
    _empty_sections(tree, kind)
    return tree, origins


def given_method(kind: type[RunConfig], path: Path | None, overrides: Sequence[str] = ()) -> str | None:
    """The name of the method that file and words give, if they give one; nothing is checked.

    Raises:
        ConfigError: the file cannot be read, or a word is no setting.
    """
    section = _read(kind, path, overrides)[0].get("method")
    return str(section["name"]) if isinstance(section, dict) and "name" in section else None


def flow_list(text: str, where: str) -> list[Any]:
    """The values of a list that is written without its brackets: `1e-4, [a, b], {name: lora}`.

    Raises:
        ConfigError: it is no such list; `where` begins the message.
    """
    values = _parse(f"[{text}]", where, None)
    if not isinstance(values, list):
        raise ConfigError(f"{where}: is not a list of values between commas")
    return values


def dump_config(config: RunConfig) -> str:
    """The whole tree as YAML, defaults included, which `load_config` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    for plain in (True, False):
        text = yaml.dump(
            tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=plain, width=100
        )
        if _parse(text, "config", None) == tree:
            return text
    # The dumper does not quote every rare line separator, so the first way is tried; the second escapes them all.
    raise ConfigError("a setting holds characters that YAML cannot hold")


def unused_settings(config: RunConfig) -> list[str]:
    """One line for each setting that differs from its default and has no effect in this run."""
    notes = []
    if not config.method.switch_step:
        why = "has no effect: the method has no warm start"
        notes += [f"optim.{key} {why}" for key in given(config.optim, "warm_start_lr")]
        notes += [f"schedule.{key} {why}" for key in given(config.schedule, "after_warm_start")]
    rewarmed = config.restarts() or (config.method.switch_step and config.schedule.after_warm_start == "continue")
    if not rewarmed:
        notes += [
            f"schedule.{key} has no effect: the run has no restart" for key in given(config.schedule, "rewarm_steps")
        ]
    if config.schedule.shape == "constant":
        notes += [f"schedule.{key} has no effect: the shape is constant" for key in given(config.schedule, "floor")]
    if not config.loss.chunked:
        notes += [f"loss.{key} has no effect: loss.chunked is false" for key in given(config.loss, "chunk")]
    notes += config.own_unused()
    notes += [f"method.{key} has no effect: {why}" for key, why in config.method.idle_settings().items()]
    if config.pure and config.dtype == "fp32":
        notes.append("pure has no effect: dtype is fp32, and what trains is held in fp32 anyway")
    return notes


# -- reading ------------------------------------------------------------------------------------


def _read_yaml(path: Path, origins: Origins) -> Tree:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        hint = f"; to go on with that run: trimtab pretrain --resume {path}" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path}: is a folder, not a config file{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    value = _parse(text, str(path), origins)
    if value is None:
        raise ConfigError(f"{path}: is empty; a config needs at least the sections {_required_sections(origins.root)}")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold sections such as `train:` with keys below them, not {shown(value)}")
    return value


def _parse(text: str, where: str, origins: Origins | None) -> Any:
    """The value of one YAML document; notes the line of each key in `origins`."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), where, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and origins is not None else ""
        raise ConfigError(f"{where}{line}: is not valid YAML: {error.problem or error.context}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: is not valid YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _build(loader: _Loader, node: yaml.Node, key: Key, where: str, origins: Origins | None) -> Any:
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not read here", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            if origins is not None:
                origins.note_line((*key, index), item.start_mark.line)
            items.append(_build(loader, item, (*key, index), where, origins))
        return items
    if isinstance(node, yaml.MappingNode):
        section: Tree = {}
        for name_node, item in node.value:
            line = name_node.start_mark.line
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key of {dotted(key) or 'the file'} is not a word")
            if name in section:
                place = f"{where}:{line + 1}" if origins is not None else where
                raise ConfigError(f"{place}: {dotted((*key, name))}: is given twice; keep one of the two")
            if origins is not None:
                origins.note_line((*key, name), line)
            section[name] = _build(loader, item, (*key, name), where, origins)
        return section
    return loader.construct_object(node, deep=True)


def _apply(tree: Tree, word: str, origins: Origins, kind: type[BaseModel]) -> None:
    """Set one `section.key=value` in the tree."""
    name, sign, text = word.partition("=")
    names = name.split(".")
    if not sign or not all(names):
        raise ConfigError(f"command line: {word!r} is not of the form section.key=value")
    value = _as_typed(text) if _takes_text(kind, names, tree) else _parse(text, f"command line: {word}", None)
    section = tree
    for depth, part in enumerate(names[:-1], start=1):
        below = section.setdefault(part, {})
        if below is None:
            below = section[part] = {}
        if isinstance(below, list):
            raise ConfigError(f"command line: {name}: {'.'.join(names[:depth])} is a list; give the whole list")
        if not isinstance(below, dict):
            raise ConfigError(f"command line: {name}: {'.'.join(names[:depth])} is a value, not a section")
        section = below
    section[names[-1]] = value
    origins.note_override(tuple(names))


def _as_typed(text: str) -> str | None:
    """The value of a setting that is a text: as it stands, but for quotes around all of it, and null."""
    if re.fullmatch(_NULL, text):
        return None
    inside = text.strip()
    if inside[:1] in ("'", '"'):
        try:
            node = yaml.compose(inside, _Loader)  # type: ignore[no-untyped-call, unused-ignore]
        except yaml.YAMLError:
            return text
        if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(inside):
            return str(node.value)
    return text


def _takes_text(kind: type[BaseModel], names: Sequence[str], tree: Tree) -> bool:
    """Whether a setting can hold a text (or a path) and nothing else but null."""
    kinds: list[type[BaseModel]] = [kind]
    section: Any = tree
    for name in names[:-1]:
        section = section.get(name) if isinstance(section, dict) else None
        fields = [one.model_fields[name] for one in kinds if name in one.model_fields]
        kinds = [below for field in fields for below in possible_sections(field.annotation, section)]
    found = [one.model_fields[names[-1]].annotation for one in kinds if names[-1] in one.model_fields]
    return bool(found) and all(_is_text(annotation) for annotation in found)


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return all(part is NoneType or _is_text(part) for part in get_args(annotation))
    return annotation in (str, Path)


def _empty_sections(tree: Tree, model: type[BaseModel]) -> None:
    """A section whose keys are all commented out reads as null; it means a section with no keys."""
    for name, field in model.model_fields.items():
        kind = section_model(field.annotation)
        if kind is None:
            continue
        if name in tree and tree[name] is None:
            tree[name] = {}
        if isinstance(tree.get(name), dict):
            _empty_sections(tree[name], kind)


def _required_sections(kind: type[BaseModel]) -> str:
    return ", ".join(name for name, field in kind.model_fields.items() if field.is_required())


def _switches_as_numbers(section: Tree, model: type[BaseModel], key: Key = ()) -> Iterator[tuple[Key, bool]]:
    """Where true or false stands in the place of a number, for which pydantic would take 1 or 0."""
    for name, field in model.model_fields.items():
        value = section.get(name)
        below = field_section(field.annotation, value)
        if below is not None and isinstance(value, dict):
            yield from _switches_as_numbers(value, below, (*key, name))
        elif isinstance(value, bool) and {int, float} & set(annotation_parts(field.annotation)):
            yield (*key, name), value
