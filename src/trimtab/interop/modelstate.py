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
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.methods.base import Adapter, AdapterState

PREFIX = "trimtab_state."
META = PREFIX + "meta"
FORMAT = 1


class ModelState:
    """Puts an adapter's state into `adapter.model.state_dict()`, and takes it out in `load_state_dict`.

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

        def add(*args: Any) -> None:  # torch marks this hook by an attribute, which a method cannot have
            self._add(*args)

        self._handles: list[Any] = [
            adapter.model.register_state_dict_post_hook(add),  # type: ignore[no-untyped-call]
            adapter.model.register_load_state_dict_pre_hook(self._take),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Leave the model's `state_dict` as it is without this class."""
        for handle in self._handles:
            handle.remove()

    def _add(self, model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: Any) -> None:
        if self.adapter._closed:
            return
        state = self.adapter.state_dict()
        own = {key: tensor for key, tensor in state.tensors.items() if prefix + key not in state_dict}
        meta = {
            "format": FORMAT,
            "method": self.adapter.config.name,
            "adapter": state.meta,
            "in_model": sorted(set(state.tensors) - set(own)),
            "counters": self.counters(),
        }
        for key, tensor in own.items():
            state_dict[prefix + PREFIX + key] = tensor
        text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
        state_dict[prefix + META] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _take(self, model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        if self.adapter._closed:
            return
        if prefix + META not in state_dict:
            self._check_foreign(state_dict, prefix)
            return
        meta = _parse(state_dict.pop(prefix + META))
        if meta["method"] != self.adapter.config.name:
            raise CheckpointError(
                f"the checkpoint was written with the method {meta['method']}, and the model has "
                f"{self.adapter.config.name}; attach the method of the checkpoint"
            )
        own = [key for key in state_dict if key.startswith(prefix + PREFIX)]
        tensors: dict[str, Tensor] = {key.removeprefix(prefix + PREFIX): state_dict.pop(key) for key in own}
        aliases = _aliases(model)
        for name in meta["in_model"]:
            stored = next((prefix + n for n in aliases.get(name, (name,)) if prefix + n in state_dict), None)
            if stored is None:
                raise CheckpointError(f"the checkpoint lacks {name}, which the adapter trains; it is not whole")
            tensors[name] = state_dict[stored]
        self._check_shapes(tensors)
        self.adapter.load_state_dict(AdapterState(tensors, dict(meta["adapter"])))
        self.loaded(meta["counters"])

    def _check_foreign(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """A state without ours may be a mere set of weights (an average of them, say), if it is complete."""
        aliases = _aliases(self.adapter.model)
        for entry in self.adapter.trainable():
            names = aliases.get(entry.name, ())
            if names and not any(prefix + name in state_dict for name in names):
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


def _parse(text: Tensor) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(bytes(text.cpu().tolist()))
        if meta["format"] == FORMAT and {"method", "adapter", "in_model", "counters"} <= set(meta):
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
