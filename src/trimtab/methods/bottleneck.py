"""Bottleneck adapters: y + f(y D' + b1) U' + b2 on the output y of a sublayer, before the residual is added.

Houlsby et al. (arXiv 1902.00751) put two into each block, after the attention's and after the feed-forward
network's output projection; Pfeiffer et al. (arXiv 2005.00247) one, after the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.methods.base import Adapter
from trimtab.methods.folder import SavedAdapter, reading_config, refuse_unknown
from trimtab.methods.frozen import FrozenBase, FrozenBaseAdapter
from trimtab.nn.bottleneck import Activation, BottleneckMixin
from trimtab.nn.draw import stable_generator
from trimtab.nn.inject import find_targets
from trimtab.nn.lowrank import draw_a
from trimtab.nn.residence import Residence
from trimtab.nn.sublayers import sublayer_outputs
from trimtab.nn.weights import shape_of

AUTO = "auto"

#: PEFT has no such method, so the folder's config is ours: this key in the place of `peft_type`.
KIND = "trimtab_method"
#: The spread of the published initialisation.
NEAR_STD = 1e-3


class Bottleneck(FrozenBase):
    """Small networks with a skip on the outputs of the sublayers.

    Args:
        size: m, the width of the bottleneck.
        placement: "houlsby": after the attention's and the feed-forward network's output projection of each block;
            "pfeiffer": after the latter alone.
        activation: f.
        init: "zero": U = 0, so that training starts at the base exactly, D as LoRA's A; "near": D and U from a normal
            distribution of deviation 1e-3, cut at two deviations, as published.
        targets: "auto" for the layers that `placement` says; or a list of name endings, or a regular expression.
        exclude: name endings that are left out.

    `train_also=("norms",)` lets the norms train, as Houlsby et al. do.
    """

    abstract = False
    name: Literal["bottleneck"] = "bottleneck"
    size: Annotated[int, Field(ge=1)] = 64
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Activation = "gelu"
    init: Literal["zero", "near"] = "zero"
    targets: str | tuple[str, ...] = AUTO
    exclude: tuple[str, ...] = ()

    def idle_settings(self) -> dict[str, str]:
        given = self.targets != AUTO and self.placement != type(self).model_fields["placement"].default
        return {"placement": "targets names the layers"} if given else {}

    @property
    def no_merge(self) -> str:
        return "a bottleneck has an activation between its matrices, so no weight of the base could stand for it"

    def _attach(self, model: nn.Module, residence: Residence) -> BottleneckAdapter:
        return BottleneckAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Bottleneck | None:
        if saved.get("peft_type") is not None or saved.get(KIND) != "bottleneck":
            return None
        settings = ("size", "activation", "placement", "init")
        refuse_unknown(dict(saved), {KIND, "target_modules", "modules_to_save", *settings})
        with reading_config():
            return cls(targets=tuple(saved["target_modules"]), **{key: saved[key] for key in settings})

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, BottleneckAdapter)
        adapter.load_tensors(saved, {})


class BottleneckAdapter(FrozenBaseAdapter):
    """Bottleneck adapters at work on a model."""

    config: Bottleneck
    mixin = BottleneckMixin

    def __init__(self, model: nn.Module, config: Bottleneck, residence: Residence) -> None:
        super().__init__(model, config, residence)
        if config.targets == AUTO:
            both = config.placement == "houlsby"
            self._targets = sublayer_outputs(model, attention=both, exclude=config.exclude)
        else:
            self._targets = find_targets(model, config.targets, config.exclude)
        name, width = min(((name, shape_of(m)[0]) for name, m in self._targets.items()), key=lambda found: found[1])
        if config.size > width:
            raise ConfigError(
                f"size = {config.size} is above the width of {name}, {width}: no bottleneck is left; use a size of at "
                f"most {width} (size={max(1, width // 4)} is a quarter of it) or exclude=['{name}']"
            )
        self._begin()
        self._draw()

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        width, size = shape_of(module)[0], self.config.size
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        shapes = ((size, width), (size,), (width, size), (width,))
        parts = zip(BottleneckMixin.parts, shapes, strict=True)
        return {k: nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)) for k, shape in parts}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        return {"activation": self.config.activation}

    def _draw(self) -> None:
        """Draw the matrices from (seed, name); biases start at 0."""
        for name, part in self.own().items():
            if name.endswith("_bias"):
                continue
            generator = stable_generator(self.config.seed or 0, name)
            if self.config.init == "near":
                _draw_near(part, generator)
            elif name.endswith("adapter_down"):
                draw_a(part, generator)

    def _updated(self) -> dict[str, nn.Module]:
        return {}  # no matrix of the base is

    def _saved(self) -> SavedAdapter:
        full, modules = self._saved_in_full()
        config = {
            KIND: "bottleneck",
            "base_model_name_or_path": self._peft_config("")["base_model_name_or_path"],
            "size": self.config.size,
            "placement": self.config.placement,
            "activation": self.config.activation,
            "init": self.config.init,
            "target_modules": list(self._targets),
            "modules_to_save": modules or None,
        }
        return SavedAdapter(config, {**self.own(), **full}, self._extra())


def _draw_near(part: Tensor, generator: torch.Generator) -> None:
    if part.device.type == "meta":
        return
    drawn = torch.empty(part.shape, dtype=torch.float32, device="cpu")
    nn.init.trunc_normal_(drawn, std=NEAR_STD, a=-2 * NEAR_STD, b=2 * NEAR_STD, generator=generator)
    with torch.no_grad():
        part.copy_(drawn)
