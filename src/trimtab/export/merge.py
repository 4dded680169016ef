"""Merging an adapter folder into a checkpoint, one tensor at a time.

The base is opened as a model whose weights are mapped from its files, so an adapter of any method attaches to it as
to a loaded one, and its check that this is the base it was trained on works; but nothing of it is in memory. Then
each tensor is read, given to `adapter.merged_tensor`, rounded once, and written to the file of the same name. The
result is the one of `from_pretrained`, `load_adapter`, `merge`, `save_pretrained`, bit for bit.

Tied weights: an adapter that trained them as one (see `methods.tiedfiles`) is put on a model that ties them. Where an
adapter changes one of them and not the other alike, one tensor in the file cannot hold both.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.export.checkpoint import (
    INDEX,
    Checkpoint,
    Stored,
    mapped_model,
    meta_model,
    model_names,
    open_checkpoint,
    side_files,
    ties,
)
from trimtab.export.folder import refuse_used, whole_folder
from trimtab.methods import Adapter
from trimtab.methods.folder import read_adapter_folder
from trimtab.methods.foldercheck import finite
from trimtab.methods.registry import attach_saved
from trimtab.methods.tiedfiles import trained_alike
from trimtab.train.tensorfile import stream_tensors

_TIE = "tie_word_embeddings"


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        files: weight files written.
        tensors: tensors in them.
        changed: names of those that differ from the base's.
        untied: the names that were one tensor and now are several.
    """

    files: int
    tensors: int
    changed: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    untie: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write a base with an adapter merged into it; memory is bounded by the adapter and a few largest tensors.

    Args:
        base: a checkpoint, a folder or a hub name.
        adapter: an adapter folder, ours or PEFT's.
        out: the new folder. It has the base's files of weights, config and tokenizer.
        dtype: of all floating tensors; None keeps each one's own.
        untie: where the adapter changes tied weights differently, write them as several and say so in the config.
        progress: called with bytes read so far and bytes in all.

    Raises:
        ConfigError: there is no such base, or `out` is in use.
        CheckpointError: a file is damaged, the adapter is of another base, it changes one of two tied weights, or
            `out` cannot be written.
        CannotMerge: the adapter's method has no merged form.
    """
    adapter, out = Path(adapter), Path(out)
    refuse_used(out)
    checkpoint = open_checkpoint(str(base))
    for what, given in (("the base", checkpoint.folder), ("the adapter", adapter)):
        if out.resolve().is_relative_to(given.resolve()):
            raise ConfigError(f"{out} lies in the folder of {what}, {given}; choose a place outside it")
    saved = read_adapter_folder(adapter)
    model = mapped_model(checkpoint, tied=trained_alike(saved))
    live = attach_saved(model, saved, adapter)
    merge = _Merge(checkpoint, model, live, dtype)
    merge.untie(allowed=untie, adapter=adapter)
    total = sum(place.nbytes for place in checkpoint.tensors.values())
    with whole_folder(out) as folder:
        for file in checkpoint.files:
            kinds = {key: merge.kind(key) for key, home in merge.homes.items() if home == file}

            def value(key: str) -> Tensor:
                found = merge.value(key)
                progress(merge.read, total)
                return found

            stream_tensors(folder / file, kinds, value, {"format": "pt"})
        merge.write_rest(folder)
    return Merged(len(checkpoint.files), len(merge.homes), sorted(merge.changed), merge.untied)


class _Merge:
    """One merge: which tensors the result has, in which files, and their values.

    Attributes:
        homes: each tensor's file.
        read: bytes of the base read so far.
        changed: names of the tensors that differ from the base's.
        untied: names of tensors that were one and now are several.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, adapter: Adapter, dtype: torch.dtype | None) -> None:
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._dtype = dtype
        self._shadow = meta_model(checkpoint.folder, checkpoint.name)
        self._names = model_names(checkpoint, self._shadow)
        self._first = _first_names(model)
        self._head = _head_names(self._shadow)
        self._twins: dict[str, str] = {}
        self.homes = {key: place.file for key, place in checkpoint.tensors.items()}
        self.read = 0
        self.changed: set[str] = set()
        self.untied: list[str] = []

    def kind(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor of the result."""
        place = self._place(key)
        return self._target(place.dtype), place.shape

    def value(self, key: str) -> Tensor:
        """A tensor of the result."""
        before = self._checkpoint.read(self._twins.get(key, key))
        after = self._merged(self._names.get(key), before)
        if key not in self._twins:
            self.read += self._place(key).nbytes
        if after is not before and not torch.equal(after, before.to(after.dtype)):
            self.changed.add(key)
        return after

    def untie(self, *, allowed: bool, adapter: Path) -> None:
        """Find tied weights that the merge makes different, and give each a tensor of its own.

        `tie_word_embeddings` is about the head alone: other names of one weight (the embedding that T5's encoder and
        decoder share) have to stay alike. With it off nothing is tied, so every name gets its tensor then.
        """
        stored = {name: key for key, name in self._names.items()}
        groups = ties(self._shadow)
        for group in groups:
            held = next(name for name in group if name in stored)
            before = self._checkpoint.read(stored[held])

            def unlike(first: str, names: list[str], before: Tensor = before) -> list[str]:
                one = self._merged(first, before)
                return [name for name in names if not torch.equal(self._merged(name, before), one)]

            apart = unlike(held, [name for name in group if name != held])
            if not apart:
                continue
            inputs = [name for name in group if name not in self._head]
            if torn := unlike(inputs[0], inputs[1:]):
                raise CheckpointError(
                    f"{adapter} changes {inputs[0]} and {torn[0]} differently, and this model always ties them; it has "
                    "no merged form"
                )
            if not allowed:
                raise CheckpointError(
                    f"{adapter} changes one of the tied weights {' = '.join(group)} and not the other; with --untie "
                    "they are written as two tensors and the config says so (the model grows by one embedding)"
                )
            self.untied += [held, *apart]
        for group in groups if self.untied else ():
            held = next(name for name in group if name in stored)
            for name in group:
                if name not in stored:
                    self._names[name] = name
                    self._twins[name] = stored[held]
                    self.homes[name] = self.homes[stored[held]]

    def write_rest(self, folder: Path) -> None:
        """Config, tokenizer and index."""
        for path in side_files(self._checkpoint.folder):
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)
        config = copy.deepcopy(self._checkpoint.config)
        if self._dtype is not None:
            for part in _parts(config):
                part.update(
                    {key: str(self._dtype).removeprefix("torch.") for key in {"dtype", "torch_dtype"} & set(part)}
                )
        if self.untied:
            config = _untied(config, self._checkpoint.name)
        _write_json(folder / "config.json", config)
        if self._checkpoint.sharded:
            size = sum(shape.numel() * dtype.itemsize for dtype, shape in self._kinds())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self.homes.items()))}
            _write_json(folder / INDEX, index)

    def _kinds(self) -> list[tuple[torch.dtype, torch.Size]]:
        kinds = (self.kind(key) for key in self.homes)
        return [(dtype, torch.Size(shape)) for dtype, shape in kinds]

    def _place(self, key: str) -> Stored:
        return self._checkpoint.tensors[self._twins.get(key, key)]

    def _target(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and stored.is_floating_point else stored

    def _merged(self, name: str | None, before: Tensor) -> Tensor:
        """The merged value of a parameter, rounded once to the dtype wanted."""
        target = self._target(before.dtype)
        if not before.is_floating_point():
            return before
        if name is None:
            after = before.to(target)
        else:
            wide = before.to(torch.promote_types(before.dtype, target))
            with torch.no_grad():
                after = self._adapter.merged_tensor(self._first.get(name, name), wide).to(target)
        if after is not before and not finite(after) and finite(before):
            kind = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(target, str(target).removeprefix("torch."))
            raise CheckpointError(
                f"{self._checkpoint.name}: {name or 'a tensor'} has entries too large for {kind} once it is merged "
                f"(the base's go up to {float(before.abs().max()):.3g}); take --dtype bf16"
            )
        return after


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter: a module that a model holds twice has its adapter under one name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def _head_names(model: nn.Module) -> set[str]:
    """The names of the output head's parameters."""
    getter = getattr(model, "get_output_embeddings", None)
    heads = [] if not callable(getter) else [getter()]
    modules = [(name, module) for name, module in model.named_modules() if any(module is head for head in heads)]
    return {f"{name}.{key}" for name, module in modules for key in module._parameters}


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config and those inside it."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def _untied(config: dict[str, Any], label: str) -> dict[str, Any]:
    """A config that says that the head is a tensor of its own, and nothing else than before.

    Raises:
        CheckpointError: the model would compute something else.
    """
    from transformers import AutoConfig

    def read(value: dict[str, Any]) -> dict[str, Any]:
        settings: dict[str, Any] = AutoConfig.for_model(**value).to_dict()
        return {key: setting for key, setting in settings.items() if key != _TIE}

    before = read(copy.deepcopy(config))
    for part in _parts(config):
        if part is config or _TIE in part:
            part[_TIE] = False
    # A class may take the flag for something else, too: T5's says whether the decoder's output is scaled.
    config.update({key: value for key, value in before.items() if read(copy.deepcopy(config)).get(key) != value})
    if any(value != before[key] for key, value in read(copy.deepcopy(config)).items() if not isinstance(value, dict)):
        raise CheckpointError(f"{label}: with {_TIE}=false this model computes something else, so it cannot be untied")
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
