"""An adapter's state inside its model's own `state_dict`, for loops that save and load nothing else.

`transformers.Trainer` writes `model.safetensors` and reads it back with `load_state_dict`, before it makes the
optimizer. So that is where the adapter's state has to be: the tensors that the model holds anyway (A, B and
what else trains) are there under their own names, and beside them go, as tensors, what only the adapter has
(carries) and a JSON text of its counters. Loading brings the adapter into the stored phase first, so that the
optimizer is then made of the right parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.methods.base import Adapter, AdapterState, Method

PREFIX = "trimtab_state."
META = PREFIX + "meta"
FORMAT = 2


class ModelState:
    """Puts an adapter's state into `adapter.model.state_dict()`, and takes it out in `load_state_dict`.

    A checkpoint may come in shards, one `load_state_dict` each and in any order: what belongs to the adapter is
    gathered, and taken up when the last of it is there.

    Args:
        adapter: the live adapter; once it is merged or detached, nothing is added any more.
        counters: gives further JSON values to store.
        loaded: called with those values after a state was taken up.
    """

    def __init__(
        self,
        adapter: Adapter,
        counters: Callable[[], dict[str, Any]],
        loaded: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.adapter, self.counters, self.loaded = adapter, counters, loaded
        self._meta: dict[str, Any] | None = None
        self._gathered: dict[str, Tensor] = {}
        self._taken: set[str] | None = None  # names that a whole state was found under
        # The object itself is the hook: torch marks it by an attribute, and a copy of the model copies it, too.
        self._handles: list[Any] = [
            adapter.model.register_state_dict_post_hook(self),  # type: ignore[no-untyped-call]
            adapter.model.register_load_state_dict_pre_hook(self._take),  # type: ignore[no-untyped-call]
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has an adapter of its own, and the counters of this moment: no loop counts in it."""
        return {**self.__dict__, "counters": partial(dict, self.counters()), "loaded": _ignore}

    @staticmethod
    def of(model: nn.Module) -> ModelState | None:
        """The one that is on a model, if there is one."""
        return next((hook for hook in model._state_dict_hooks.values() if isinstance(hook, ModelState)), None)

    def remove(self) -> None:
        """Leave the model's `state_dict` as it is without this class."""
        for handle in self._handles:
            handle.remove()

    def check_whole(self) -> None:
        """Refuse to go on with a part of a checkpoint.

        Raises:
            CheckpointError: shards were loaded, and something of the adapter's was in none of them.
        """
        if self._meta is not None:
            (name, *_) = self._missing(self._meta)
            raise CheckpointError(f"the checkpoint lacks {name}, which the adapter trains; it is not whole")
        if self._gathered:
            self._check_foreign(self._gathered)
            self._gathered = {}

    def __call__(self, model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        if self.adapter._closed:
            return
        state = self.adapter.state_dict()
        own = {key: tensor for key, tensor in state.tensors.items() if prefix + key not in state_dict}
        meta = {
            "format": FORMAT,
            "method": self.adapter.config.name,
            "config": self.adapter.config.model_dump(mode="json"),
            "adapter": state.meta,
            "in_model": sorted(set(state.tensors) - set(own)),
            "own": sorted(own),
            "counters": self.counters(),
        }
        for key, tensor in own.items():
            state_dict[prefix + PREFIX + key] = tensor
        text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
        state_dict[prefix + META] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _take(self, model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        if self.adapter._closed:
            return
        plain = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        if self._meta is None and not self._gathered and not any(key.startswith(PREFIX) for key in plain):
            if self._taken is not None and not self._taken & plain.keys():
                return  # a shard of the base alone, after what is the adapter's was taken up
            if not self._may_be_shard(plain):
                self._check_foreign(plain)
                return
        if META in plain:
            if self._meta is not None:  # another checkpoint begins
                self._gathered = {}
            self._meta = _parse(plain.pop(META))
            check_settings(self.adapter.config, self._meta["method"], self._meta["config"])
        for key in [key for key in state_dict if key.startswith(prefix + PREFIX)]:
            del state_dict[key]
        self._check_shapes(plain)
        self._gathered |= plain
        if self._meta is None or self._missing(self._meta):
            return
        meta, tensors = self._meta, self._tensors(self._meta)
        self._meta, self._gathered = None, {}
        aliases = _aliases(model)
        self._taken = {alias for name in meta["in_model"] for alias in aliases.get(name, (name,))}
        self._check_shapes(tensors)
        self.adapter.load_state_dict(AdapterState(tensors, dict(meta["adapter"])))
        self.loaded(meta["counters"])

    def _tensors(self, meta: Mapping[str, Any]) -> dict[str, Tensor]:
        """What of a state is there, by the adapter's names."""
        aliases, found = _aliases(self.adapter.model), {}
        for name in meta["in_model"]:
            stored = next((n for n in aliases.get(name, (name,)) if n in self._gathered), None)
            if stored is not None:
                found[name] = self._gathered[stored]
        return found | {n: self._gathered[PREFIX + n] for n in meta["own"] if PREFIX + n in self._gathered}

    def _missing(self, meta: Mapping[str, Any]) -> list[str]:
        there = self._tensors(meta)
        return [name for name in (*meta["in_model"], *meta["own"]) if name not in there]

    def _may_be_shard(self, plain: Mapping[str, Any]) -> bool:
        """Whether something is missing that a whole checkpoint would hold, with our state or without it."""
        trained, aliases = set(self.adapter.state_dict().tensors), _aliases(self.adapter.model)
        frozen = [names for names in aliases.values() if not trained & set(names)]
        return any(not plain.keys() & set(names) for names in frozen or aliases.values())

    def _check_foreign(self, plain: Mapping[str, Any]) -> None:
        """A state without ours may be a mere set of weights (an average of them, say), if it is complete."""
        aliases = _aliases(self.adapter.model)
        for entry in self.adapter.trainable():
            names = aliases.get(entry.name, ())
            if names and not any(name in plain for name in names):
                raise CheckpointError(
                    f"what is being loaded holds no state of trimtab and lacks {entry.name}: resume from a checkpoint "
                    "that was written with the callback, or load weights of the base before the method is attached"
                )

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.adapter.model.named_parameters())
        for name, tensor in tensors.items():
            if name in parameters and parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the checkpoint does not fit the model: {name} is {tuple(tensor.shape)} in the file and "
                    f"{tuple(parameters[name].shape)} in the model; use the settings that it was written with"
                )


def check_settings(config: Method, method: str, stored: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings of the method than a checkpoint was written with.

    Raises:
        CheckpointError: as said.
    """
    if method != config.name:
        raise CheckpointError(
            f"the checkpoint was written with the method {method}, and the model has {config.name}; attach the method "
            "of the checkpoint"
        )
    ours = config.model_dump(mode="json")
    for key in sorted(ours.keys() | stored.keys()):
        if ours.get(key) != stored.get(key):
            raise CheckpointError(
                f"the checkpoint was written with {key} = {stored.get(key)!r}, and the method has {key} = "
                f"{ours.get(key)!r}: resume with the settings of the checkpoint, or begin a new run with the others"
            )


def _ignore(counters: Mapping[str, Any]) -> None:
    """Nothing follows the loading of a mere copy."""


def _parse(text: Tensor) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(bytes(text.cpu().tolist()))
        if meta["format"] == FORMAT and {"method", "config", "adapter", "in_model", "own", "counters"} <= set(meta):
            return meta
    except (ValueError, TypeError, KeyError):
        pass
    raise CheckpointError(
        f"the checkpoint's {META} is damaged or of another version of trimtab; resume with the version that wrote it"
    )


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by each of them: a file keeps a tied tensor under one name only."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}
