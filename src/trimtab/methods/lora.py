"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', with W frozen, and its full-rank warm start.

A warm start belongs to every method of this family: until `warm_start_steps` the whole model trains, held
in fp32; then each target's weight is frozen in the compute dtype (what that loses is its carry) and A and
B come into being beside it. LoRA with a warm start is the baseline that ReLoRA has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError, ConfigError
from trimtab.methods.base import Adapter, StepReport
from trimtab.methods.folder import SavedAdapter
from trimtab.methods.frozen import FrozenBaseAdapter, Targeted
from trimtab.nn.draw import stable_generator
from trimtab.nn.lowrank import LoRAMixin, draw_a
from trimtab.nn.residence import Residence
from trimtab.nn.weights import is_conv1d, shape_of


class LoRA(Targeted):
    """Low-rank adapters on linear layers.

    Args:
        rank: r, at least 1.
        alpha: the scale is s = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
        dropout: on the adapter branch's input.
        warm_start_steps: steps of full-rank training before the adapter comes into being.

    `targets`, `exclude`, `train_also` and `seed` (of the initial A) are as for every method on linear layers.
    """

    abstract = False
    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = False
    warm_start_steps: Annotated[int, Field(ge=0)] = 0

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def switch_step(self) -> int:
        return self.warm_start_steps

    @property
    def update_rank(self) -> int:
        return self.rank

    @property
    def writes_base(self) -> str:
        return f"warm_start_steps={self.warm_start_steps}" if self.warm_start_steps else super().writes_base

    def _attach(self, model: nn.Module, residence: Residence) -> LoRAAdapter:
        return LoRAAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> LoRA | None:
        if cls is not LoRA or saved.get("peft_type") != "LORA":
            return None
        unsupported = {
            "use_dora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "bias": "none",
            "layer_replication": None,
            "target_parameters": None,
        }
        for key, plain in unsupported.items():
            if saved.get(key, plain) not in (plain, None):
                raise CheckpointError(f"the adapter's {key} = {saved[key]!r} is not supported; only {plain!r} is")
        targets = saved.get("target_modules")
        if not targets:
            raise CheckpointError("the adapter's config names no target_modules")
        try:
            return cls(
                rank=saved["r"],
                alpha=saved["lora_alpha"],
                dropout=saved.get("lora_dropout", 0.0),
                rslora=saved.get("use_rslora", False),
                targets=targets if isinstance(targets, str) else tuple(targets),
            )
        except KeyError as error:
            raise CheckpointError(f"the adapter's config lacks {error.args[0]}") from None
        except ConfigError as error:
            raise CheckpointError(f"the adapter's config cannot be used: {error}") from None

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, LoRAAdapter)
        adapter.load_tensors(saved, {".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B"})


class LoRAAdapter(FrozenBaseAdapter):
    """LoRA at work on a model; before its switch step, full training."""

    config: LoRA
    mixin = LoRAMixin

    def __init__(self, model: nn.Module, config: LoRA, residence: Residence) -> None:
        super().__init__(model, config, residence)
        for name, module in self._targets.items():
            shape = shape_of(module)
            if config.rank > min(shape):
                raise ConfigError(
                    f"rank = {config.rank} is above the size of {name}, {shape}: no low-rank update is "
                    f"left; use a rank of at most {min(shape)} or exclude=['{name}']"
                )
        self._restart_count = 0
        self.adapted = False
        if config.switch_step:
            residence.train(residence.everything())
        else:
            self._adapt()

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        out_features, in_features = shape_of(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        shapes = {"lora_A": (self.config.rank, in_features), "lora_B": (out_features, self.config.rank)}
        return {k: nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)) for k, shape in shapes.items()}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        return {"scale": self.config.scale, "dropout": self.config.dropout}

    def _adapt(self) -> None:
        """Freeze the base and put A and B beside each target's weight."""
        self._begin()
        self.adapted = True
        self._draw()

    def _draw(self) -> None:
        """Draw every A from (seed, restart, name) and set B = 0."""
        for name, layer in self.layers.items():
            draw_a(layer.lora_A, stable_generator(self.config.seed or 0, self._restart_count, f"{name}.lora_A"))
            with torch.no_grad():
                layer.lora_B.zero_()

    # -- between steps -------------------------------------------------------------------------

    def _after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        switch = self.config.switch_step
        if self.adapted or step < switch:
            return StepReport()
        if step > switch:
            raise ValueError(f"after_step({step}): the warm start ends after step {switch}, which was left out")
        return self._switch(step, optimizer)

    def _switch(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        """End the warm start: the base's gradients and optimizer state go, A and B come."""
        groups = {group.get("group"): group for group in optimizer.param_groups}
        if "base" not in groups or "adapter" not in groups:
            raise ConfigError(
                "the optimizer was not built from adapter.parameter_groups(), so the warm start cannot end"
            )
        self._adapt()
        kept = {id(entry.parameter) for entry in self.trainable()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in kept:
                    optimizer.state.pop(parameter, None)
        for fresh in self.parameter_groups(lr=0.0):
            groups[fresh["group"]]["params"][:] = fresh["params"]
            groups[fresh["group"]]["names"][:] = fresh["names"]
        return StepReport(trainable_changed=True, events=({"event": "switch", "step": step},))

    # -- state and files -----------------------------------------------------------------------

    def _meta(self) -> dict[str, Any]:
        return {"adapted": self.adapted, "restarts": self._restart_count}

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        if meta["adapted"] and not self.adapted:
            self._adapt()
        if self.adapted and not meta["adapted"]:
            raise CheckpointError("the stored state is of a warm start, and this adapter is past it; attach it anew")
        self._restart_count = int(meta["restarts"])

    def _saved(self) -> SavedAdapter:
        if not self.adapted or self._restart_count or self.config.switch_step:
            what = "a restart" if self._restart_count else "the warm start"
            raise CannotSave(
                f"{what} wrote into the base weights, so the adapter alone would not describe the model: "
                "call merge() and model.save_pretrained() instead"
            )
        full, modules = self._saved_in_full()
        config = {
            **self._peft_config("LORA"),
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "use_rslora": self.config.rslora,
            "target_modules": list(self._targets),
            "modules_to_save": modules or None,
            "fan_in_fan_out": any(is_conv1d(module) for module in self._targets.values()),
            "bias": "none",
            "init_lora_weights": True,
        }
        return SavedAdapter(config, {f"{n}.weight": p for n, p in self.own().items()} | full, self._extra())
