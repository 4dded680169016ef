"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', with W frozen, and its full-rank warm start.

A warm start belongs to every method of this family: until `warm_start_steps` the whole model trains, held
in fp32; then each target's weight is frozen in the compute dtype (what that loses is its carry) and A and
B come into being beside it. LoRA with a warm start is the baseline that ReLoRA has to beat.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CannotDetach, CannotSave, CheckpointError, ConfigError
from trimtab.methods.base import Adapter, AdapterState, Method, StepReport, Trainable, group_of
from trimtab.methods.folder import write_adapter_folder
from trimtab.nn.inject import ALL_LINEAR, find_targets, parameter_roles
from trimtab.nn.lowrank import LoRAMixin, adapt, draw_a, strip
from trimtab.nn.precision import is_conv1d
from trimtab.nn.residence import Residence
from trimtab.nn.weights import Dense

Role = Literal["embeddings", "norms", "head"]
ROLES: dict[Role, str] = {"embeddings": "embedding", "norms": "norm", "head": "head"}

#: The prefix of a carry among the tensors of a state, before its parameter's name.
CARRY = "carry:"


class LoRA(Method):
    """Low-rank adapters on linear layers.

    Args:
        rank: r, at least 1.
        alpha: the scale is s = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
        dropout: on the adapter branch's input.
        targets: "all-linear" (every linear of the blocks, not the head), a list of name endings, or a
            regular expression that matches a whole qualified name.
        exclude: name endings that are left out.
        train_also: what trains in full beside the adapter; None means nothing in `attach`, and
            embeddings, norms and head in `pretrain`.
        warm_start_steps: steps of full-rank training before the adapter comes into being.
        seed: of the initial A; None is 0 in `attach`, and the run's seed in `pretrain`.
    """

    abstract = False
    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    train_also: tuple[Role, ...] | None = None
    warm_start_steps: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] | None = None

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
    def trained_roles(self) -> frozenset[str]:
        """The roles of the tensors that train in full beside the adapter."""
        return frozenset(ROLES[role] for role in self.train_also or ())

    def for_pretraining(self, seed: int) -> LoRA:
        return self.model_copy(
            update={
                "train_also": tuple(ROLES) if self.train_also is None else self.train_also,
                "seed": seed if self.seed is None else self.seed,
            }
        )

    def attach(self, model: nn.Module, *, dtype: torch.dtype | None = None, pure: bool = False) -> LoRAAdapter:
        return LoRAAdapter(model, self, dtype, pure)

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

    def load_saved(self, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(adapter, LoRAAdapter)
        parameters = dict(adapter.model.named_parameters())
        named = {re.sub(r"\.(lora_[AB])\.weight$", r".\1", name): tensor for name, tensor in tensors.items()}
        missing = [entry.name for entry in adapter.trainable() if entry.name not in named]
        unknown = [name for name in named if name not in parameters]
        if missing or unknown:
            name, what = (missing[0], "lacks") if missing else (unknown[0], "has, but the model lacks,")
            raise CheckpointError(f"the adapter is of another base: it {what} {name}")
        for name, tensor in named.items():
            if parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the adapter is of another base: {name} is {tuple(tensor.shape)} in the file and "
                    f"{tuple(parameters[name].shape)} in the model"
                )
        adapter.train_in_full(name for name in named if not parameters[name].requires_grad)
        with torch.no_grad():
            for name, tensor in named.items():
                parameters[name].copy_(tensor)


def stable_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: the same on every machine, rank and Python."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class LoRAAdapter(Adapter):
    """LoRA at work on a model; before its switch step, full training."""

    config: LoRA

    def __init__(self, model: nn.Module, config: LoRA, dtype: torch.dtype | None, pure: bool) -> None:
        super().__init__(model, config)
        self._targets = find_targets(model, config.targets, config.exclude)
        for name, module in self._targets.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            if config.rank > min(weight.shape):
                raise ConfigError(
                    f"rank = {config.rank} is above the size of {name}, {tuple(weight.shape)}: no low-rank update is "
                    f"left; use a rank of at most {min(weight.shape)} or exclude=['{name}']"
                )
        self._roles = parameter_roles(model)
        self._residence = Residence(model, dtype, pure)
        self._restart_count = 0
        self.adapted = False
        if config.switch_step:
            self._residence.train(self._residence.parameters)
        else:
            self._adapt()

    # -- what trains ---------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, LoRAMixin]:
        """The adapted layers by name; none before the end of a warm start."""
        return {name: m for name, m in self._targets.items() if isinstance(m, LoRAMixin)}

    def trainable(self) -> list[Trainable]:
        return [
            Trainable(name, parameter, group_of(self._roles.get(name, frozenset({"adapter"}))))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        ]

    def train_in_full(self, names: Iterable[str]) -> None:
        """Let further tensors of the model train beside the adapter, by name."""
        self._residence.train(names)

    def _adapt(self) -> None:
        """Freeze the base and put A and B beside each target's weight."""
        frozen = [name for name, roles in self._roles.items() if not roles & self.config.trained_roles]
        self._residence.freeze(name for name in frozen if name in self._residence.parameters)
        self._residence.train(name for name in self._residence.parameters if name not in set(frozen))
        for name, module in self._targets.items():
            key = f"{name}.weight"
            carry = self._residence.carries.pop(key, None)
            compute = self._residence.compute[key]
            adapt(
                module,
                rank=self.config.rank,
                scale=self.config.scale,
                dropout=self.config.dropout,
                base=Dense(transposed=is_conv1d(module), carry=carry, exact=not self._residence.pure),
                dtype=compute if self._residence.pure else torch.promote_types(compute, torch.float32),
            )
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

    # -- state and endings ---------------------------------------------------------------------

    def _carries(self) -> dict[str, Tensor]:
        """The carries by parameter name, those of adapted and those of other frozen weights."""
        held = {f"{name}.weight": layer.base.carry for name, layer in self.layers.items()}
        return {name: c for name, c in {**self._residence.carries, **held}.items() if c is not None}

    def state_dict(self) -> AdapterState:
        tensors = {entry.name: entry.parameter.detach() for entry in self.trainable()}
        tensors.update({CARRY + name: carry for name, carry in self._carries().items()})
        meta = {"last_step": self._last_step, "adapted": self.adapted, "restarts": self._restart_count}
        return AdapterState(tensors, meta)

    def load_state_dict(self, state: AdapterState) -> None:
        if state.meta["adapted"] and not self.adapted:
            self._adapt()
        if self.adapted and not state.meta["adapted"]:
            raise CheckpointError("the stored state is of a warm start, and this adapter is past it; attach it anew")
        trained = {entry.name: entry.parameter for entry in self.trainable()}
        stored = {name for name in state.tensors if not name.startswith(CARRY)}
        if stored != set(trained):
            odd = sorted(stored ^ set(trained))
            raise CheckpointError(
                f"the stored state is of another model or method: {len(odd)} names differ, {odd[0]} first"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.tensors[name])
        self._residence.carries.clear()
        for layer in self.layers.values():
            layer.base.carry = None
        for key, tensor in state.tensors.items():
            if not key.startswith(CARRY):
                continue
            name = key.removeprefix(CARRY)
            weight = self._residence.parameters[name]
            carry = torch.empty_like(tensor, device="cpu", pin_memory=weight.device.type == "cuda").copy_(tensor)
            adapted = self.layers.get(name.removesuffix(".weight"))
            if adapted is None:
                self._residence.carries[name] = carry
            else:
                adapted.base.carry = carry
        self._last_step = int(state.meta["last_step"])
        self._restart_count = int(state.meta["restarts"])

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._targets.items():
            if isinstance(module, LoRAMixin):
                yield f"{name}.weight", module.effective_weight()
            else:
                weight = module.weight
                assert isinstance(weight, Tensor)
                value = weight.detach().float().cpu()
                yield f"{name}.weight", value.t().contiguous() if is_conv1d(module) else value.clone()

    def merge(self) -> None:
        for layer in self.layers.values():
            layer.merge_()
        self._strip()
        self._residence.settle()
        self._close("merged")

    def detach(self) -> None:
        if self._restart_count or (self.config.switch_step and self._last_step):
            what = f"{self._restart_count} restarts" if self._restart_count else "the warm start"
            raise CannotDetach(
                f"{what} wrote into the base weights; call merge() to keep the sum, or load the base anew"
            )
        if written := self._residence.written():
            raise CannotDetach(
                f"{written[0]} and {len(written) - 1} more tensors were trained in full (train_also="
                f"{list(self.config.train_also or ())}); call merge() to keep them, or load the base anew"
            )
        if narrowed := self._residence.narrowed():
            raise CannotDetach(
                f"{narrowed[0]} and {len(narrowed) - 1} more weights were stored in fewer bits (dtype="
                f"{self._residence.compute[narrowed[0]]}); call merge(), or attach without dtype"
            )
        self._strip()
        self._residence.restore()
        self._close("detached")

    def _strip(self) -> None:
        for module in self._targets.values():
            if isinstance(module, LoRAMixin):
                strip(module)
        self.adapted = False

    def save(self, path: str | Path) -> None:
        if not self.adapted or self._restart_count or self.config.switch_step:
            what = "a restart" if self._restart_count else "the warm start"
            raise CannotSave(
                f"{what} wrote into the base weights, so the adapter alone would not describe the model: "
                "call merge() and model.save_pretrained() instead"
            )
        in_full = [entry.name.rpartition(".")[0] for entry in self.trainable() if entry.group != "adapter"]
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": getattr(getattr(self.model, "config", None), "_name_or_path", None),
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "use_rslora": self.config.rslora,
            "target_modules": list(self._targets),
            "modules_to_save": list(dict.fromkeys(in_full)) or None,
            "fan_in_fan_out": any(layer.base.transposed for layer in self.layers.values()),
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
        }
        tensors = {(f"{e.name}.weight" if e.group == "adapter" else e.name): e.parameter for e in self.trainable()}
        write_adapter_folder(Path(path), config, tensors)
