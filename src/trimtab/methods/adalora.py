"""AdaLoRA (arXiv 2303.10512): y = x W' + s P diag(Lambda) Q x, under a budget that moves between the layers.

Every triplet (a column of P, an entry of Lambda, a row of Q) has an importance, averaged over the steps. The
budget of triplets falls from `init_rank` to `rank` a layer, and at each reallocation the entries of Lambda of all
but the most important ones, over the whole model, are set to 0. Their P and Q stay and train, so they can come
back, until the last `final_steps`, in which the choice stands.

All of it happens in `after_step`, so no loop can train this as a plain LoRA by mistake. It needs the gradients of
the step, so it goes before `optimizer.zero_grad()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trimtab.errors import CheckpointError, ConfigError, TrimtabError
from trimtab.methods.base import Adapter, AdapterState, StepReport
from trimtab.methods.dropout import Dropout
from trimtab.methods.folder import SavedAdapter, reading_config, saved_layers
from trimtab.methods.frozen import FrozenBaseAdapter, Targeted
from trimtab.nn.adalora import AVERAGES, AdaLoRAMixin, Importance, orthogonality
from trimtab.nn.draw import stable_generator
from trimtab.nn.residence import Residence
from trimtab.nn.weights import is_conv1d, shape_of

#: The standard deviation of the first P and Q (the authors' code).
INIT_STD = 0.02

#: Fields of PEFT's config that are read here, or that change nothing in what is computed.
PEFT_FIELDS = {
    "beta1", "beta2", "deltaT", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "init_r", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "orth_reg_weight",
    "qalora_group_size", "r", "rank_pattern", "target_modules", "target_r", "tfinal", "tinit", "total_step",
}  # fmt: skip


class AdaLoRA(Targeted):
    """Low-rank adapters whose ranks are found in training.

    Args:
        rank: the average rank at the end; the final budget is `rank` times the number of layers.
        init_rank: the rank of every layer at the start; the paper takes 1.5 times `rank`.
        alpha: the scale is s = alpha / init_rank (with 1e-5 added below, as the authors' code and PEFT do).
        dropout: on the adapter branch's input.
        total_steps: optimizer steps of the whole run; None: the loop says (`adapter.restarts(total_steps)`).
        initial_steps: steps at the start with the whole budget; None: a tenth of the run.
        final_steps: steps at the end in which the choice stands; None: half of the run.
        allocate_every: steps between two reallocations.
        beta1, beta2: decay of the averages of importance and of its uncertainty.
        orthogonality: weight of the term that keeps P's columns and Q's rows orthonormal.

    `targets`, `exclude`, `train_also` and `seed` (of the initial P and Q) are as for every method on linear layers.
    """

    abstract = False
    name: Literal["adalora"] = "adalora"
    rank: Annotated[int, Field(ge=1)] = 8
    init_rank: Annotated[int, Field(ge=1)] = 12
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    dropout: Dropout = 0.0
    total_steps: Annotated[int, Field(ge=1)] | None = None
    initial_steps: Annotated[int, Field(ge=0)] | None = None
    final_steps: Annotated[int, Field(ge=0)] | None = None
    allocate_every: Annotated[int, Field(ge=1)] = 10
    beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.1

    @field_validator("init_rank")
    @classmethod
    def _not_below_rank(cls, init_rank: int, info: ValidationInfo) -> int:
        rank = info.data.get("rank", 1)
        if init_rank < rank:
            raise PydanticCustomError("below_rank", "is below rank = {rank}", {"rank": rank})
        return init_rank

    @property
    def scale(self) -> float:
        """s, the factor of P Lambda Q."""
        return self.alpha / (self.init_rank + 1e-5)

    @property
    def update_rank(self) -> int:
        return self.init_rank

    def phases(self, total_steps: int) -> tuple[int, int]:
        """The steps at the start with the whole budget, and those at the end in which the choice stands."""
        return (
            total_steps // 10 if self.initial_steps is None else self.initial_steps,
            total_steps // 2 if self.final_steps is None else self.final_steps,
        )

    def check_length(self, total_steps: int) -> tuple[str, str] | None:
        if self.total_steps not in (None, total_steps):
            return "total_steps", f"{self.total_steps} is not the length of the run, {total_steps}; leave it out"
        initial, final = self.phases(total_steps)
        if initial + final < total_steps and final <= total_steps - 2:
            return None
        key = "final_steps" if self.initial_steps is None or final > total_steps - 2 else "initial_steps"
        return key, (
            f"{initial if key == 'initial_steps' else final} leaves no step of {total_steps} in which the budget could "
            f"fall: initial_steps = {initial} and final_steps = {final} must together stay below the run"
        )

    def budget(self, step: int, total_steps: int, layers: int) -> int:
        """The triplets that `layers` layers may keep after `step`, between the first phase and the last.

        (b0 - bT)(1 - (t - t_i) / (T - t_i - t_f))^3 + bT, as the authors' code has it (the paper's appendix prints
        another numerator, which would make the budget jump at t_i).
        """
        initial, final = self.phases(total_steps)
        left = 1 - (step - initial) / (total_steps - final - initial)
        return int((self.init_rank - self.rank) * layers * left**3 + self.rank * layers)

    def _attach(self, model: nn.Module, residence: Residence) -> AdaLoRAAdapter:
        return AdaLoRAAdapter(model, self, residence)

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> AdaLoRA | None:
        if saved.get("peft_type") != "ADALORA":
            return None
        layers = saved_layers(saved, PEFT_FIELDS)
        with reading_config():
            return cls(
                rank=min(saved["target_r"], saved["init_r"]),  # PEFT lets a budget rise, which asks for nothing
                init_rank=saved["init_r"],
                alpha=saved["lora_alpha"] if saved["lora_alpha"] > 0 else saved["init_r"],
                dropout=saved.get("lora_dropout", 0.0),
                initial_steps=saved["tinit"] if saved["total_step"] > 1 else None,
                final_steps=saved["tfinal"] if saved["total_step"] > 1 else None,
                allocate_every=saved["deltaT"],
                beta1=saved["beta1"],
                beta2=saved["beta2"],
                orthogonality=saved["orth_reg_weight"],
                **layers,
            )

    def load_saved(self, adapter: Adapter, saved: SavedAdapter) -> None:
        assert isinstance(adapter, AdaLoRAAdapter)
        adapter.take_saved(saved)
        # The file's run is over: another length, which the next run's loop tells, is as good.
        if self.check_length(saved.config["total_step"]) is None:
            adapter.restarts(saved.config["total_step"])


class AdaLoRAAdapter(FrozenBaseAdapter):
    """AdaLoRA at work on a model.

    Attributes:
        pattern: which triplets of each layer were kept, once the last phase has begun; None before.
        importance: of all entries of P, Lambda and Q; empty in the last phase.
    """

    config: AdaLoRA
    mixin = AdaLoRAMixin

    def __init__(self, model: nn.Module, config: AdaLoRA, residence: Residence) -> None:
        super().__init__(model, config, residence)
        for name, module in self._targets.items():
            shape = shape_of(module)
            if config.init_rank > min(shape):
                raise ConfigError(
                    f"init_rank = {config.init_rank} is above the size of {name}, {shape}; use at most {min(shape)} "
                    f"or exclude=['{name}']"
                )
        self.pattern: dict[str, list[bool]] | None = None
        self._masks: list[Tensor] = []
        self.importance = Importance(config.beta1, config.beta2)
        self._total: int | None = None
        if config.total_steps is not None:
            self.restarts(config.total_steps)
        self._begin()
        self._draw()

    def _new_parts(self, name: str, module: nn.Module) -> dict[str, nn.Parameter]:
        out_features, in_features = shape_of(module)
        weight, rank = module.weight, self.config.init_rank
        assert isinstance(weight, Tensor)
        dtype = self._residence.held_dtype(self._residence.compute_dtype(name, module))
        shapes = {"lora_A": (rank, in_features), "lora_E": (rank, 1), "lora_B": (out_features, rank)}
        return {k: nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)) for k, shape in shapes.items()}

    def _attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        return {"scale": self.config.scale, "dropout": self.config.dropout}

    @torch.no_grad()
    def _draw(self) -> None:
        """P, Q ~ N(0, 0.02^2), drawn on the CPU; Lambda = 0."""
        for name, parts in self._parts.items():
            for leaf in ("lora_A", "lora_B"):
                part = parts[leaf]
                if part.device.type != "meta":
                    generator = stable_generator(self.config.seed or 0, f"{name}.{leaf}")
                    part.copy_(torch.empty(part.shape).normal_(0.0, INIT_STD, generator=generator))

    # -- the loop's calls ----------------------------------------------------------------------

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        """None; but by this call the adapter learns the length of the run, which the budget's fall goes by."""
        if self.pattern is None and (misfit := self.config.check_length(total_steps)) is not None:
            raise ConfigError(f"{misfit[0]} = {misfit[1]}")
        self._total = total_steps
        return ()

    def extra_loss(self) -> Tensor | None:
        if not self.config.orthogonality or self.record.active != self.attached_name:
            return None
        parts = self._parts.values()
        rows = [part["lora_A"] for part in parts] + [part["lora_B"].t() for part in parts]
        return self.config.orthogonality * orthogonality(rows)

    @torch.no_grad()
    def _after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        if step != self._last_step + 1:
            raise ValueError(
                f"after_step({step}) follows after_step({self._last_step}): the importance of the steps between is "
                "not known; call it after every step"
            )
        if self.pattern is not None:
            self._apply(self.pattern)
            return StepReport()
        if self._total is None:
            raise ConfigError(
                "total_steps is not known, and the budget falls by it: give total_steps, or call "
                "adapter.restarts(total_steps) before the first step"
            )
        total, config = self._total, self.config
        initial, final = config.phases(total)
        if step >= total - final:
            self.pattern, event = self._allocate(step, config.rank * len(self._parts))
            self.importance.averages.clear()
            ranks = {name: sum(kept) for name, kept in self.pattern.items()}
            return StepReport(events=({**event, "final": True, "ranks": ranks},))
        self._average(step)
        if step <= initial or step % config.allocate_every:
            return StepReport()
        _, event = self._allocate(step, config.budget(step, total, len(self._parts)))
        return StepReport(events=(event,))

    # -- the budget ----------------------------------------------------------------------------

    def _average(self, step: int) -> None:
        """Take this step's gradients into the importance."""
        own = self.own()
        grads = [part.grad for part in own.values() if part.grad is not None]
        if not grads:
            raise TrimtabError(
                f"after_step({step}): the gradients are gone, and importance is made of them; call after_step "
                "between optimizer.step() and optimizer.zero_grad()"
            )
        if torch.isfinite(get_total_norm(grads)):  # else a GradScaler left the step out; it would spoil the averages
            self.importance.update(own)

    def _allocate(self, step: int, budget: int) -> tuple[dict[str, list[bool]], dict[str, Any]]:
        """Keep the `budget` most important triplets of the whole model; which they are, and the event."""
        if not self.importance.averages:
            raise TrimtabError(f"after_step({step}): no step's importance is known, so no budget can be dealt out")
        scores = torch.cat([self.importance.of_triplets(name).cpu() for name in self._parts])
        if not scores.any():
            raise TrimtabError(
                f"after_step({step}): no triplet has any importance: all gradients were zero. Call after_step before "
                "optimizer.zero_grad(), and check that the targets reach the loss"
            )
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = True
        pattern = dict(zip(self._parts, kept.view(-1, self.config.init_rank).tolist(), strict=True))
        self._masks.clear()
        self._apply(pattern)
        return pattern, {"event": "budget", "step": step, "budget": int(kept.sum()), "of": len(scores)}

    def _apply(self, pattern: Mapping[str, list[bool]]) -> None:
        """Set Lambda of what is not kept to 0."""
        lambdas = [parts["lora_E"].data for parts in self._parts.values()]
        if not self._masks or self._masks[0].device != lambdas[0].device:
            self._masks = [
                torch.tensor(pattern[name], dtype=value.dtype, device=value.device).unsqueeze(1)
                for name, value in zip(self._parts, lambdas, strict=True)
            ]
        torch._foreach_mul_(lambdas, self._masks)

    # -- state and files -----------------------------------------------------------------------

    def _meta(self) -> dict[str, Any]:
        return {"pattern": self.pattern}

    def _take_meta(self, meta: Mapping[str, Any]) -> None:
        self.pattern = meta["pattern"]
        self._masks.clear()

    def state_dict(self) -> AdapterState:
        state = super().state_dict()
        state.tensors.update(self.importance.tensors())
        return state

    def load_state_dict(self, state: AdapterState) -> None:
        averages = {name: tensor for name, tensor in state.tensors.items() if name.startswith(AVERAGES)}
        rest = {name: tensor for name, tensor in state.tensors.items() if name not in averages}
        super().load_state_dict(AdapterState(rest, state.meta))
        try:
            self.importance.take(averages, self.own())
        except KeyError as error:
            raise CheckpointError(f"the stored state lacks {error.args[0]}") from None

    def _saved(self) -> SavedAdapter:
        config, total = self.config, self._total
        initial, final = config.phases(total) if total else (0, 0)
        full, modules = self._saved_in_full()
        saved = {
            **self._peft_config("ADALORA"),
            "target_r": config.rank,
            "init_r": config.init_rank,
            "tinit": initial,
            "tfinal": final,
            "deltaT": config.allocate_every,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": config.orthogonality,
            "total_step": total or 1,  # PEFT wants a number; 1 is no run that has a budget to deal out
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "rank_pattern": self.pattern and {f"{name}.lora_E": kept for name, kept in self.pattern.items()},
            "target_modules": list(self._targets),
            "modules_to_save": modules or None,
            "fan_in_fan_out": any(is_conv1d(module) for module in self._targets.values()),
            "bias": "none",
            "init_lora_weights": True,
        }
        tensors: dict[str, Tensor] = {}
        for name, parts in self._parts.items():
            kept = torch.tensor(self.pattern[name] if self.pattern else [True] * config.init_rank)
            for leaf, part in parts.items():
                at = kept.to(part.device)
                tensors[f"{name}.{leaf}"] = part.detach()[:, at] if leaf == "lora_B" else part.detach()[at]
        return SavedAdapter(saved, tensors | full, self._extra())

    @torch.no_grad()
    def take_saved(self, saved: SavedAdapter) -> None:
        """Take an adapter folder's tensors; triplets that were dropped for good come back with Lambda = 0.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape, or the pattern is of another base.
        """
        given = saved.config.get("rank_pattern")
        if not given:
            return self.load_tensors(saved, {})
        pattern = {key.removesuffix(".lora_E"): kept for key, kept in given.items()}
        tensors = dict(saved.tensors)
        for name, parts in self._parts.items():
            kept = torch.tensor(pattern.get(name, ()), dtype=torch.bool)
            if len(kept) != self.config.init_rank:
                raise CheckpointError(
                    f"the adapter is of another base: its rank_pattern has {len(kept)} entries for {name}, not "
                    f"{self.config.init_rank}"
                )
            for leaf, part in parts.items():
                key, side = f"{name}.{leaf}", int(leaf == "lora_B")
                if key not in tensors:
                    continue  # reported with its name below
                if tensors[key].dim() != 2 or tensors[key].shape[side] != int(kept.sum()):
                    raise CheckpointError(
                        f"the adapter's {key} is {tuple(tensors[key].shape)}, but its rank_pattern keeps "
                        f"{int(kept.sum())} of {len(kept)}"
                    )
                whole = torch.zeros_like(part) if leaf == "lora_E" else part.detach().clone()
                if tensors[key].shape[1 - side] == whole.shape[1 - side]:
                    whole.index_copy_(side, kept.nonzero()[:, 0].to(part.device), tensors[key].to(whole))
                    tensors[key] = whole
        self.load_tensors(SavedAdapter(saved.config, tensors, saved.extra), {})
        self.pattern = {name: [bool(kept) for kept in pattern[name]] for name in self._parts}
        self._masks.clear()
