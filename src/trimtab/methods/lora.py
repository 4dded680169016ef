"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', with W frozen, its later improvements, and a full-rank warm start.

rsLoRA and LoRA+ change numbers (the scale, the rate of B), DoRA the layer (see `nn.dora`), PiSSA what the base
is: its largest singular components move into A and B, and W keeps the rest.

A warm start belongs to every method of this family: until `warm_start_steps` the whole model trains, held
in fp32; then each target's weight is frozen in the compute dtype (what that loses is its carry) and A and
B come into being beside it. LoRA with a warm start is the baseline that ReLoRA has to beat.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from trimtab.errors import CannotSave, CheckpointError, ConfigError
from trimtab.methods import lora_files
from trimtab.methods.base import Adapter, AdapterState, StepReport
from trimtab.methods.dropout import Dropout
from trimtab.methods.folder import SavedAdapter
from trimtab.methods.frozen import FrozenBaseAdapter, Targeted
from trimtab.methods.keep import Kept
from trimtab.methods.lora_checks import check, pattern_of
from trimtab.nn.adapted import Adapted
from trimtab.nn.dora import DoRAMixin
from trimtab.nn.initial import Init, draw_factors, principal_factors
from trimtab.nn.lora_embedding import LoRAEmbeddingMixin
from trimtab.nn.lowrank import LoRAMixin
from trimtab.nn.residence import Residence
from trimtab.nn.tied import Parted, part
from trimtab.nn.weights import holder_of, is_conv1d, shape_of

#: Of `parameter_groups`: the name of LoRA+'s group, and the key of what its rate is multiplied by.
FAST, RATIO = "adapter_fast", "lr_ratio"

#: Before the name of a tensor of PiSSA's start in a state.
START = "start:"


class LoRA(Targeted):
    """Low-rank adapters on linear layers and embeddings.

    Args:
        rank: r, at least 1.
        alpha: the scale is s = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
        dropout: on the adapter branch's input.
        dora: a trained length for each row of W + s B A (arXiv 2402.09353).
        init: what A and B start from, see `nn.initial`.
        lora_plus: the rate of B (and of DoRA's lengths) over that of A, at least 1 (LoRA+, arXiv 2402.12354).
        bias: which biases of the model train, too: "none", "all", or those of the adapted layers, "lora_only".
        rank_pattern, alpha_pattern: another rank or alpha for the layers whose names end with a regular
            expression, of which the first that matches counts, as in PEFT.
        untie: give a tied output head a weight of its own first, and say so in the model's config.
        warm_start_steps: steps of full-rank training before the adapter comes into being.

    `targets`, `exclude`, `train_also` and `seed` (of the initial A) are as for every method on linear layers.
    """

    abstract = False
    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    dropout: Dropout = 0.0
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    lora_plus: Annotated[float, Field(ge=1.0)] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default={})
    untie: bool = False
    warm_start_steps: Annotated[int, Field(ge=0)] = 0

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    def __hash__(self) -> int:
        # Equal dictionaries may be in another order, and pydantic's own hash takes none.
        values = (getattr(self, key) for key in type(self).model_fields)
        return hash((type(self), *(frozenset(v.items()) if isinstance(v, dict) else v for v in values)))

    def rank_of(self, name: str) -> int:
        """The rank of the layer called `name`."""
        return int(self.rank_pattern.get(pattern_of(self.rank_pattern, name), self.rank))

    def scale_of(self, name: str) -> float:
        """s, the factor of B A, of the layer called `name`."""
        rank = self.rank_of(name)
        alpha = self.alpha_pattern.get(pattern_of(self.alpha_pattern, name), self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def switch_step(self) -> int:
        return self.warm_start_steps

    @property
    def update_rank(self) -> int | None:
        return None if self.dora else max(self.rank, *self.rank_pattern.values(), 0)

    @property
    def writes_base(self) -> str:
        fields = type(self).model_fields
        keys = ("warm_start_steps", "bias", "untie", *(["init"] if self.init == "pissa" else []))
        given = [key for key in keys if getattr(self, key) != fields[key].default]
        return f"{given[0]}={getattr(self, given[0])!r}" if given else super().writes_base

    def attach(self, model: nn.Module, **settings: Any) -> Adapter:
        parted = part(model) if self.untie else None
        try:
            adapter = super().attach(model, **settings)
        except BaseException:
            if parted is not None:
                parted.tie(model)
            raise
        assert isinstance(adapter, LoRAAdapter)
        adapter.parted = parted
        return adapter

    def _attach(self, model: nn.Module, residence: Residence) -> LoRAAdapter:
        return LoRAAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> LoRA | None:
        if cls is not LoRA or saved.get("peft_type") != "LORA":
            return None
        try:
            return cls(**lora_files.settings_of(saved))
        except ConfigError as error:
            raise CheckpointError(f"the adapter's config cannot be used: {error}") from None

    @classmethod
    def from_folder(cls, saved: SavedAdapter) -> LoRA | None:
        config = cls.from_saved(saved.config)
        return config and config.model_copy(update=lora_files.settings_from_tensors(saved, config))

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, LoRAAdapter)
        adapter.load_tensors(lora_files.without_base(lora_files.with_signs(saved), adapter.model), lora_files.SUFFIXES)


class LoRAAdapter(FrozenBaseAdapter):
    """LoRA at work on a model; before its switch step, full training."""

    config: LoRA
    mixin = LoRAMixin
    embeddings = True

    def __init__(self, model: nn.Module, config: LoRA, residence: Residence) -> None:
        super().__init__(model, config, residence)
        check(config, self._targets, set(self._in_full()))
        if config.bias != "none" and not self._biases():
            raise ConfigError(f"bias = {config.bias!r}: there is no such bias in {type(model).__name__}")
        if config.switch_step and (quantized := residence.quantized()):
            raise ConfigError(
                f"warm_start_steps = {config.switch_step}: {quantized[0]} is held in 4 bits and cannot train; do the "
                "warm start on an unquantised model"
            )
        self._restart_count = 0
        self.adapted = False
        self.parted: Parted | None = None
        #: PiSSA's A and B at the start, in host memory: what was taken from the base.
        self.start: dict[str, tuple[Tensor, Tensor]] = {}
        if config.switch_step:
            residence.train(residence.parameters)
        else:
            self._adapt()

    # -- what the settings mean on this model --------------------------------------------------

    def _biases(self) -> list[str]:
        """The biases that `bias` lets train."""
        parameters = self._residence.parameters
        if self.config.bias == "all":
            return [name for name in parameters if name.rpartition(".")[2] == "bias"]
        adapted = [f"{name}.bias" for name in self._targets] if self.config.bias == "lora_only" else []
        return [name for name in adapted if name in parameters]

    def _in_full(self) -> Iterable[str]:
        return list(dict.fromkeys([*super()._in_full(), *self._biases()]))

    def _mixin(self, module: nn.Module) -> type[Adapted]:
        if isinstance(module, nn.Embedding):
            return LoRAEmbeddingMixin
        return DoRAMixin if self.config.dora else LoRAMixin

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        weight, rank = module.weight, self.config.rank_of(name)
        assert isinstance(weight, Tensor)
        rows, columns = shape_of(module)
        shapes: dict[str, tuple[int, ...]]
        if isinstance(module, nn.Embedding):
            shapes = {"lora_embedding_A": (rank, rows), "lora_embedding_B": (columns, rank)}
        else:
            shapes = {"lora_A": (rank, columns), "lora_B": (rows, rank)}
            shapes |= {"lora_magnitude_vector": (rows,)} if self.config.dora else {}
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        return {k: nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)) for k, shape in shapes.items()}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        values: dict[str, Any] = {"scale": self.config.scale_of(name), "dropout": self.config.dropout}
        return values | ({"squares": None} if self._mixin(module) is DoRAMixin else {})

    # -- coming into being ---------------------------------------------------------------------

    def _adapt(self) -> None:
        """Freeze the base and put A and B beside each target's weight."""
        kept = Kept("host")
        if self.config.init == "pissa":
            self.start = self._principal()
            weights = {f"{name}.weight": self._residence.parameters[f"{name}.weight"] for name in self.start}
            weights = {name: weight for name, weight in weights.items() if weight.device.type != "meta"}
            if self._residence.kept is not None:
                self._residence.edit(weights)  # copies what it is given: a file that cannot be written stops it here
            elif not self.config.switch_step:  # what a warm start trained is not what the model came with
                for name, weight in weights.items():
                    kept.put(name, weight)
        self._begin()
        self.adapted = True
        self._draw()
        if self.start:
            self._take_out(kept)
        if self.config.dora:
            for layer in self.layers.values():
                layer.set_magnitude()

    def _draw(self) -> None:
        """Draw every A and B from (seed, restart, name)."""
        key = (self.config.seed or 0, self._restart_count)
        for name, layer in self.layers.items():
            if isinstance(layer, LoRAEmbeddingMixin):
                layer.draw(*key, f"{name}.lora_embedding_B")
            else:
                draw_factors(self.config.init, layer.lora_A, layer.lora_B, *key, f"{name}.lora_A")

    def _principal(self) -> dict[str, tuple[Tensor, Tensor]]:
        """PiSSA's A and B of each target, with entries that the compute dtype holds, so that no cast loses any."""
        found = {}
        for name, module in self._targets.items():
            weight, holder = module.weight, holder_of(module)
            assert isinstance(weight, Tensor)
            if weight.device.type == "meta":
                rank, (rows, columns) = self.config.rank_of(name), shape_of(module)
                found[name] = torch.empty(rank, columns, device="meta"), torch.empty(rows, rank, device="meta")
                continue
            value = torch.cat([holder.rows(weight.detach(), block) for block in holder.row_blocks(weight)])
            try:
                factors = principal_factors(value, self.config.rank_of(name), self.config.scale_of(name))
            except RuntimeError as error:  # torch.linalg.LinAlgError
                raise ConfigError(f"init = 'pissa': {name}.weight has no singular values: {error}") from None
            dtype = self._residence.compute_dtype(name, module)
            a, b = (factor.to(dtype).float().cpu() for factor in factors)
            found[name] = (a, b)
        return found

    @torch.no_grad()
    def _take_out(self, kept: Kept) -> None:
        """Let A and B be PiSSA's, and W what they leave of it."""
        for name, (a, b) in self.start.items():
            if a.device.type == "meta":
                continue
            layer = self.layers[name]
            self._residence.edit([f"{name}.weight"], kept=kept)
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
            wide = torch.float32 if layer.weight.device.type == "mps" else torch.float64
            for block in layer.base.row_blocks(layer.weight):
                rows = layer.base.rows(layer.weight, block).to(wide)
                rows.addmm_(layer.lora_B[block].to(rows), layer.lora_A.to(rows), alpha=-layer.scale)
                layer.base.write_rows(layer.weight, block, rows)

    # -- what trains, and between steps --------------------------------------------------------

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """As every method's; LoRA+ has one more at the end, "adapter_fast", with what its rate is multiplied by.

        Whoever sets a group's `lr` anew multiplies it by the group's `lr_ratio`, if it has one.
        """
        groups = super().parameter_groups(lr, weight_decay)
        if self.config.lora_plus is None:
            return groups
        ratio = self.config.lora_plus
        fast = {**groups[0], "params": [], "names": [], "group": FAST, "lr": lr * ratio, RATIO: ratio}
        slow = {**groups[0], "params": [], "names": []}
        for name, parameter in zip(groups[0]["names"], groups[0]["params"], strict=True):
            group = fast if name.endswith((".lora_B", ".lora_magnitude_vector")) else slow
            group["params"].append(parameter)
            group["names"].append(name)
        return [slow, *groups[1:], fast]

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
        if any(group["group"] not in groups for group in self.parameter_groups(lr=0.0)):
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

    def state_dict(self) -> AdapterState:
        state = super().state_dict()
        for name, (a, b) in self.start.items():
            state.tensors |= {f"{START}{name}.lora_A": a, f"{START}{name}.lora_B": b}
        return state

    def load_state_dict(self, state: AdapterState) -> None:
        start = {name: tensor for name, tensor in state.tensors.items() if name.startswith(START)}
        rest = {name: tensor for name, tensor in state.tensors.items() if name not in start}
        super().load_state_dict(AdapterState(rest, state.meta))
        try:
            self.start = {
                name: (start[f"{START}{name}.lora_A"].clone(), start[f"{START}{name}.lora_B"].clone())
                for name in self.start
            }
        except KeyError as error:
            raise CheckpointError(f"the stored state lacks {error.args[0]}") from None
        for layer in self.layers.values():
            if isinstance(layer, DoRAMixin):
                layer.squares = None  # the weight may be loaded, too, after this

    def merged_tensor(self, name: str, value: Tensor) -> Tensor:
        """As every method's; for PiSSA `value` is one of the base as it came, of which the start is taken out first."""
        owner, _, leaf = name.rpartition(".")
        if owner not in self.start or leaf != "weight":
            return super().merged_tensor(name, value)
        a, b = (factor.to(value.device).double() for factor in self.start[owner])
        product = self.config.scale_of(owner) * (b @ a)
        rest = value.double() - (product.t() if is_conv1d(self._targets[owner]) else product)
        return super().merged_tensor(name, rest).to(value.dtype)

    def detach(self) -> None:
        super().detach()
        if self.parted is not None:
            self.parted.tie(self.model)

    def _saved(self) -> SavedAdapter:
        if not self.adapted or self._restart_count or self.config.switch_step:
            what = "a restart" if self._restart_count else "the warm start"
            raise CannotSave(
                f"{what} wrote into the base weights, so the adapter alone would not describe the model: "
                "call merge() and model.save_pretrained() instead"
            )
        return lora_files.saved_adapter(self)
