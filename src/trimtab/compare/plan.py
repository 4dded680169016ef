"""What a comparison runs: methods, swept settings, seeds; every configuration is read and checked here.

    OUT/NAME/METHOD/SETTINGS-seedN/        the folder of a run
    OUT/NAME/METHOD/SETTINGS-seedN.yaml    the configuration that it was asked for

A folder's name depends on its own run alone, so that more methods, values or seeds may be asked for later.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import flow_list, given_method, load_tree

#: Names of folders are not longer than this.
_LONGEST = 80
#: What cannot be swept, and what is given instead.
_FIXED = {
    "seed": "seeds are given with --seeds",
    "name": "it is the comparison's own",
    "out": "it is the comparison's own",
    "method": "methods are given with --methods",
    "method.name": "methods are given with --methods",
    "task": "scores on different examples cannot be compared",
    "eval": "scores that are taken in different ways cannot be compared",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: the label of its method.
        sweep: its swept settings, by dotted key.
        seed: its seed.
        config: all of it; `out` and `name` are those of its own folder.
    """

    method: str
    sweep: Mapping[str, Any]
    seed: int
    config: FinetuneConfig

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.config.out / self.config.name

    @property
    def asked(self) -> Path:
        """The configuration that it was asked for, beside its folder: the one in it has what became of that."""
        return self.folder.parent / f"{self.folder.name}.yaml"

    def told(self) -> str:
        """As a person calls it."""
        return ", ".join([self.method, *([settings_text(self.sweep)] if self.sweep else []), f"seed {self.seed}"])


@dataclass(frozen=True)
class Entry:
    """A method of the comparison.

    Attributes:
        label: its name, and the settings that were given with it.
        name: of the method.
        settings: given with it.
        grid: by point of the grid, its runs in the order of the seeds.
    """

    label: str
    name: str
    settings: Mapping[str, Any]
    grid: tuple[tuple[Run, ...], ...]

    @property
    def folder(self) -> Path:
        """That of all its runs."""
        return self.grid[0][0].folder.parent

    @property
    def first(self) -> list[Run]:
        """The runs that choose the settings: all of the grid, with the first seed."""
        return [runs[0] for runs in self.grid]


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        folder: OUT/NAME.
        entries: the methods, in the order in which they were given.
        seeds: the first one chooses the settings.
        command: the words that asked for it, for the page.
    """

    folder: Path
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    command: Sequence[str] = field(default=())

    @property
    def size(self) -> int:
        """How many runs there will be."""
        return sum(len(entry.grid) + len(self.seeds) - 1 for entry in self.entries)

    @property
    def swept(self) -> bool:
        """Whether there is anything to choose."""
        return any(len(entry.grid) > 1 for entry in self.entries)


@dataclass(frozen=True)
class _Sweep:
    key: str
    values: tuple[Any, ...]
    method: str | None

    @property
    def option(self) -> str:
        return f"--sweep {self.method}:{self.key}" if self.method else f"--sweep {self.key}"


def make_plan(
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] = (),
    seeds: str | None = None,
    sweeps: Sequence[str] = (),
    command: Sequence[str] = (),
) -> Plan:
    """Read a comparison.

    Args:
        path: the configuration that all runs have in common.
        overrides: words `section.key=value` over it.
        methods: lists of names, or of flow mappings with a name: "lora,vera", "{name: lora, rank: 16}". Without any,
            the configuration's own method; it also keeps its settings when its bare name is given.
        seeds: how many, from the configuration's `seed` on, or a list with commas.
        sweeps: "key=v1,v2", or "method:key=v1,v2" for one method, whose values take the place of the others'.
        command: the words that asked for it.

    Raises:
        ConfigError: anything in it is wrong; no run has begun.
    """
    chosen = _read_methods(methods, given_method(FinetuneConfig, path, overrides))
    parsed = [_read_sweep(text) for text in sweeps]
    _check_sweeps(parsed, chosen)
    base = load_tree(FinetuneConfig, path, [*overrides, *chosen[0].words])
    if base.train.stop_at is not None:
        raise ConfigError(
            f"train.stop_at = {base.train.stop_at}: the runs of a comparison go on to their end; set it to null"
        )
    folder = base.out / base.name
    if (folder / "config.yaml").exists():
        raise ConfigError(f"name: {folder} is the folder of a single run; choose another name for the comparison")
    numbers = _read_seeds(seeds, base.seed)
    entries = []
    for one in chosen:
        grid = []
        for point in _grid(parsed, one):
            runs = []
            for seed in numbers:
                words = [*overrides, *one.words, *_words(point), f"seed={seed}"]
                config = load_tree(FinetuneConfig, path, words)
                name = _slug("-".join([*(f"{key}-{_plain(value)}" for key, value in point.items()), f"seed{seed}"]))
                update = {"out": folder / one.folder, "name": name}
                runs.append(Run(one.label, point, seed, config.model_copy(update=update)))
            grid.append(tuple(runs))
        entries.append(Entry(one.label, one.name, one.settings, tuple(grid)))
    return Plan(folder, tuple(entries), numbers, tuple(command))


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as they are given: optim.lr=0.0003 train.batch=32."""
    return " ".join(f"{key}={_plain(value)}" for key, value in settings.items())


# -- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """A method as it was asked for; `words` put it into a configuration."""

    name: str
    settings: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.name} {settings_text(self.settings)}".strip()

    @property
    def folder(self) -> str:
        return _slug("-".join([self.name, *(f"{key}-{_plain(value)}" for key, value in self.settings.items())]))


def _read_methods(texts: Sequence[str], own: str | None) -> list[_Chosen]:
    if not texts:
        if own is None:
            raise ConfigError("--methods: none is given, and the configuration has no method either; name some")
        return [_Chosen(own, {}, ())]
    found = []
    for value in (value for text in texts for value in flow_list(text, f"--methods {text}")):
        if isinstance(value, str):
            words = () if value == own else (f"method={json.dumps({'name': value})}",)
            found.append(_Chosen(value, {}, words))
        elif isinstance(value, dict) and isinstance(value.get("name"), str):
            rest = {key: item for key, item in value.items() if key != "name"}
            found.append(_Chosen(value["name"], rest, (f"method={json.dumps(value)}",)))
        else:
            raise ConfigError(
                f"--methods: {_plain(value)} is neither a method's name nor a mapping with one, such as "
                "'{name: lora, rank: 16}'"
            )
    if not found:
        raise ConfigError("--methods: the list is empty; name some, such as full,lora")
    labels = [one.label for one in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"--methods: {twice} is given twice; leave one out, or give it other settings")
    return found


# -- seeds ----------------------------------------------------------------------------------------


def _read_seeds(text: str | None, first: int) -> tuple[int, ...]:
    if text is None:
        return (first,)
    found = flow_list(text, f"--seeds {text}")
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"--seeds {text}: {_plain(value)} is not a whole number; give 3, or a list such as 0,1,2")
    if "," in text:
        if len(set(found)) < len(found):
            raise ConfigError(f"--seeds {text}: a seed is given twice, and it would only repeat its run; leave one out")
        return tuple(found)
    if not found or found[0] == 0:
        raise ConfigError(f"--seeds {text}: at least one seed is needed; the list of the seed 0 alone is written 0,")
    return tuple(range(first, first + found[0]))


# -- sweeps ---------------------------------------------------------------------------------------


def _read_sweep(text: str) -> _Sweep:
    name, sign, values = text.partition("=")
    method, colon, key = name.rpartition(":")
    method, key = method.strip(), key.strip()
    if not sign or not key or (colon and not method):
        raise ConfigError(f"--sweep {text}: is not of the form key=v1,v2 or method:key=v1,v2")
    found = flow_list(values, f"--sweep {text}")
    if not found:
        raise ConfigError(f"--sweep {name}: has no values; write {name}=v1,v2")
    for index, value in enumerate(found):
        if value in found[:index]:
            raise ConfigError(f"--sweep {name}: {_plain(value)} is given twice; leave one out")
    why = _FIXED.get(key) or _FIXED.get(key.partition(".")[0] if not key.startswith("method.") else "")
    if why is not None:
        raise ConfigError(f"--sweep {name}: {key} cannot be swept: {why}")
    return _Sweep(key, tuple(found), method or None)


def _check_sweeps(sweeps: Sequence[_Sweep], chosen: Sequence[_Chosen]) -> None:
    seen = set()
    for sweep in sweeps:
        if sweep.option in seen:
            raise ConfigError(f"{sweep.option}: is given twice; list all its values in one")
        seen.add(sweep.option)
        if sweep.method is not None and not any(_meant(sweep, one) for one in chosen):
            names = list(dict.fromkeys(one.name for one in chosen))
            near = difflib.get_close_matches(sweep.method, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the methods are {', '.join(names)}"
            raise ConfigError(f"{sweep.option}: no {sweep.method} is compared; {hint}")


def _meant(sweep: _Sweep, one: _Chosen) -> bool:
    return sweep.method in (one.name, one.label)


def _grid(sweeps: Sequence[_Sweep], one: _Chosen) -> list[dict[str, Any]]:
    """The points of a method's grid; its own values of a key take the place of those for all methods."""
    values = {sweep.key: sweep.values for sweep in sweeps if sweep.method is None}
    values |= {sweep.key: sweep.values for sweep in sweeps if sweep.method is not None and _meant(sweep, one)}
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _words(point: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def _plain(value: Any) -> str:
    """A value as it is written without need of quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _slug(text: str) -> str:
    """A name of a folder; what cannot stand in one, or is too long, is told apart by a digest."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    if safe == text and len(text) <= _LONGEST:
        return text
    return f"{safe[: _LONGEST - 7].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


__all__ = ["Entry", "Plan", "Run", "make_plan", "settings_text"]
