"""Full training: every parameter trains. The baseline of all others, and the warm start of some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from trimtab.errors import CannotSave, ConfigError, TargetError
from trimtab.methods.base import Method
from trimtab.methods.folder import SavedAdapter
from trimtab.methods.frozen import FrozenBaseAdapter
from trimtab.nn.inject import ALL_LINEAR, find_targets
from trimtab.nn.residence import Residence


class Full(Method):
    """Train every parameter; trained tensors are held in fp32 and cast for compute."""

    abstract = False
    name: Literal["full"] = "full"

    @property
    def writes_base(self) -> str:
        return "full training"

    def _attach(self, model: nn.Module, residence: Residence) -> FullAdapter:
        return FullAdapter(model, self, residence)


class FullAdapter(FrozenBaseAdapter):
    """All parameters of a model, in training."""

    def __init__(self, model: nn.Module, config: Full, residence: Residence) -> None:
        super().__init__(model, config, residence)
        if quantized := residence.quantized():
            raise ConfigError(
                f"name = full: {quantized[0]} is held in 4 bits and cannot train; load the model unquantised, or take "
                "a method that leaves it frozen"
            )
        try:
            self._matrices = find_targets(model, ALL_LINEAR)
        except TargetError:  # a model without linear layers trains all the same; it has no spectrum to show
            self._matrices = {}
        self._begin()

    def _in_full(self) -> Iterable[str]:
        return list(self._residence.parameters)

    def _updated(self) -> dict[str, nn.Module]:
        return self._matrices

    def _saved(self) -> SavedAdapter:
        raise CannotSave("full training has no adapter to save: call merge() and then model.save_pretrained()")
