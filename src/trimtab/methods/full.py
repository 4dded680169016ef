"""Full training: every parameter trains. The baseline of all others, and the warm start of some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.errors import CannotDetach, CannotSave, CheckpointError, TargetError
from trimtab.methods.base import Adapter, AdapterState, Method, Trainable, group_of
from trimtab.nn.inject import ALL_LINEAR, find_targets, parameter_roles
from trimtab.nn.precision import is_conv1d
from trimtab.nn.residence import Residence


class Full(Method):
    """Train every parameter; trained tensors are held in fp32 and cast for compute."""

    abstract = False
    name: Literal["full"] = "full"

    def attach(self, model: nn.Module, *, dtype: torch.dtype | None = None, pure: bool = False) -> FullAdapter:
        return FullAdapter(model, self, dtype, pure)


class FullAdapter(Adapter):
    """All parameters of a model, in training."""

    def __init__(self, model: nn.Module, config: Full, dtype: torch.dtype | None, pure: bool) -> None:
        super().__init__(model, config)
        self._roles = parameter_roles(model)
        try:
            self._matrices = find_targets(model, ALL_LINEAR)
        except TargetError:  # a model without linear layers trains all the same; it has no spectrum to show
            self._matrices = {}
        self._residence = Residence(model, dtype, pure)
        self._residence.train(self._residence.parameters)

    def trainable(self) -> list[Trainable]:
        return [Trainable(name, p, group_of(self._roles[name])) for name, p in self._residence.parameters.items()]

    def state_dict(self) -> AdapterState:
        return AdapterState(
            tensors={name: p.detach() for name, p in self._residence.parameters.items()},
            meta={"last_step": self._last_step},
        )

    def load_state_dict(self, state: AdapterState) -> None:
        parameters = self._residence.parameters
        if set(state.tensors) != set(parameters):
            odd = sorted(set(state.tensors) ^ set(parameters))
            raise CheckpointError(f"the stored state is of another model: {len(odd)} names differ, {odd[0]} first")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.tensors[name])
        self._last_step = int(state.meta["last_step"])

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._matrices.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            value = weight.detach().float().cpu()
            yield f"{name}.weight", value.t().contiguous() if is_conv1d(module) else value.clone()

    def merge(self) -> None:
        self._residence.settle()
        self._close("merged")

    def detach(self) -> None:
        if self._last_step or self._residence.written():
            raise CannotDetach(
                "full training wrote into every weight, so the base is gone; call merge() to keep what was trained, "
                "or load the checkpoint anew"
            )
        self._residence.restore()
        self._close("detached")

    def save(self, path: str | Path) -> None:
        raise CannotSave("full training has no adapter to save: call merge() and then model.save_pretrained()")
