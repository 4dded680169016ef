"""ReLoRA for a plain PEFT LoRA model, in the user's own loop:

    restarts = Restarts(peft_model, every=1000)
    schedule = restarts.schedule(total_steps=10_000, warmup_steps=500, rewarm_steps=50)
    for step in range(10_000):
        ...loss, backward, optimizer.step() at the rate lr * schedule(step)...
        restarts.after_step(step + 1, optimizer)
        optimizer.zero_grad()
    model = restarts.merge_and_unload()

PEFT's model, its forward, its optimizer and its files stay as they are. A restart merges each layer's s B A into
the base weight (summed in float64; what a 16-bit weight cannot hold goes into a carry in host memory), draws A
anew, sets B = 0, and lets the optimizer forget the two.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import CheckpointError, ConfigError
from trimtab.interop.modelstate import check_settings
from trimtab.methods.base import AdapterState, StepReport, Trainable
from trimtab.methods.relora import ReLoRA
from trimtab.nn.draw import stable_generator
from trimtab.nn.lowrank import draw_a
from trimtab.nn.weights import holder_of
from trimtab.optim.reset import ResetMode, reset_state
from trimtab.optim.schedule import Schedule
from trimtab.train.tensorfile import write_tensors

#: The file in a Trainer's checkpoint folder, beside PEFT's own.
STATE_FILE = "trimtab_restarts.safetensors"

CARRY = "carry:"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


#: The live object of each model.
_LIVE: weakref.WeakKeyDictionary[nn.Module, Callable[[], Restarts | None]] = weakref.WeakKeyDictionary()


class Restarts:
    """Restarts of the LoRA of a PEFT model.

    In a Trainer: `Trainer(model=peft_model, ..., callbacks=[TrimtabCallback(Restarts(peft_model, every=1000))])`.

    Args:
        model: a `peft.PeftModel` with one plain LoRA adapter on linear layers, with or without rsLoRA, rank and
            alpha patterns, and `modules_to_save`.
        every: steps of one cycle; a restart lies after steps `every`, 2 * `every`, ..., never at the end.
        reset, reset_ratio, reset_reference: what a restart does to the optimizer's state, as in `trimtab.ReLoRA`.
        seed: of the draws of A.

    Raises:
        ConfigError: the model has something that a restart would not merge exactly; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        reset: ResetMode = "drop",
        reset_ratio: float = 0.9,
        reset_reference: bool = False,
        seed: int = 0,
    ) -> None:
        self.config = ReLoRA(
            restart_every=every, reset=reset, reset_ratio=reset_ratio, reset_reference=reset_reference, seed=seed
        )
        self.model = model
        self.adapter_name, layers = _plain_layers(model)
        other = _LIVE.get(model, lambda: None)()
        if other is not None:
            raise ConfigError(
                f"the PEFT model has {other!r} already, and two would both restart it: use that one, or delete it first"
            )
        _LIVE[model] = weakref.ref(self)
        self._layers: dict[str, Any] = layers
        self._holders = {name: holder_of(layer.get_base_layer()) for name, layer in layers.items()}
        self._last_step = 0
        self._restart_count = 0
        self._planned: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return (
            f"<Restarts of {len(self._layers)} layers of the PEFT adapter {self.adapter_name!r}, every "
            f"{self.config.restart_every} steps; step {self._last_step}, {self._restart_count} restarts>"
        )

    # -- the loop's calls ----------------------------------------------------------------------

    def after_step(self, step: int, optimizer: Optimizer) -> StepReport:
        """Restart, where one is due. Call it after every `optimizer.step()`, before `zero_grad` or after it.

        Args:
            step: the number of completed optimizer steps, from 1.
            optimizer: AdamW of torch or bitsandbytes, over the model's trained parameters.

        Raises:
            ValueError: `step` does not rise, or a restart between two calls was left out.
        """
        if step <= self._last_step:
            raise ValueError(
                f"after_step({step}) follows after_step({self._last_step}): it takes the number of completed "
                f"optimizer steps, each number once and in rising order; the next one is {self._last_step + 1}"
            )
        skipped = [n for n in range(self._last_step + 1, step) if self._is_restart(n)]
        if skipped:
            raise ValueError(
                f"after_step({step}): the restart after step {skipped[0]} was left out; call it after every step"
            )
        events = (self._restart(step, optimizer),) if self._is_restart(step) else ()
        self._last_step = step
        return StepReport(events=events)

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        """The restarts of a run of `total_steps`; from now on `after_step` restarts at exactly these."""
        self._planned = self.config.restarts(total_steps, rewarm_steps)
        return self._planned

    def schedule(self, total_steps: int, *, rewarm_steps: int = 0, **shape: Any) -> Schedule:
        """The learning-rate multiplier of a run of `total_steps`, with the restarts in it; see `trimtab.Schedule`."""
        restarts = self.restarts(total_steps, rewarm_steps)
        return Schedule(total_steps, restarts=restarts, rewarm_steps=rewarm_steps, **shape)

    def catch_up(self, optimizer: Optimizer) -> StepReport:
        """After a state was loaded: the restart that was due at its step and not made, since its run ended there."""
        due = [n for n in self._planned or () if n <= self._last_step]
        if len(due) <= self._restart_count or due[-1] != self._last_step:
            return StepReport()
        return StepReport(events=(self._restart(self._last_step, optimizer),))

    def extra_loss(self) -> None:
        """There is none."""

    def trainable(self) -> list[Trainable]:
        """What trains in the model, by PEFT's own choice."""
        return [Trainable(n, p, "adapter") for n, p in self.model.named_parameters() if p.requires_grad]

    def _is_restart(self, step: int) -> bool:
        if self._planned is not None:
            return step in self._planned
        return step > 0 and step % self.config.restart_every == 0

    def _restart(self, step: int, optimizer: Optimizer) -> dict[str, Any]:
        began = time.perf_counter()
        self._check_plain()
        self._merge()
        self._restart_count += 1
        parameters: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            a, b = layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name].weight
            draw_a(a, stable_generator(self.config.seed or 0, self._restart_count, f"{name}.lora_A"))
            with torch.no_grad():
                b.zero_()
            a.grad = b.grad = None
            parameters |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        touched = reset_state(
            optimizer,
            parameters,
            mode=self.config.reset,
            ratio=self.config.reset_ratio,
            seed=(self.config.seed or 0, self._restart_count),
            reference=self.config.reset_reference,
        )
        return {
            "event": "restart",
            "step": step,
            "restart": self._restart_count,
            "reset_mode": self.config.reset,
            "reset_elements": touched,
            "seconds": round(time.perf_counter() - began, 4),
        }

    def _check_plain(self) -> None:
        """The adapter may have been merged, switched or added to since the last restart."""
        name, layers = _plain_layers(self.model)
        if name != self.adapter_name or layers.keys() != self._layers.keys():
            raise ConfigError(
                f"the PEFT model changed since Restarts was built: it was adapter {self.adapter_name!r} on "
                f"{len(self._layers)} layers and is {name!r} on {len(layers)}; build Restarts anew"
            )

    @torch.no_grad()
    def _merge(self) -> None:
        """W + carry += s B A for every layer, a block of rows at a time, the sum in float64."""
        for name, layer in self._layers.items():
            holder, weight = self._holders[name], layer.get_base_layer().weight
            wide = torch.float32 if weight.device.type == "mps" else torch.float64
            left = layer.lora_B[self.adapter_name].weight.to(wide)
            right = layer.lora_A[self.adapter_name].weight.to(wide)
            for block in holder.row_blocks(weight):
                value = holder.rows(weight, block).to(wide)
                value.addmm_(left[block], right, alpha=layer.scaling[self.adapter_name])
                holder.write_rows(weight, block, value)

    # -- state and ending ----------------------------------------------------------------------

    def state_dict(self) -> AdapterState:
        """What PEFT's own files do not hold: A, B, the base weights that restarts changed, carries, and counters."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            tensors[f"{name}.lora_A"] = layer.lora_A[self.adapter_name].weight.detach()
            tensors[f"{name}.lora_B"] = layer.lora_B[self.adapter_name].weight.detach()
            if self._restart_count:
                tensors[f"{name}.weight"] = layer.get_base_layer().weight.detach()
            carry = self._holders[name].carry
            if carry is not None:
                tensors[CARRY + name] = carry
        return AdapterState(tensors, {"last_step": self._last_step, "restarts": self._restart_count})

    def load_state_dict(self, state: AdapterState) -> None:
        """Take up a state of `state_dict`, on a model just made like the one it was taken from.

        Raises:
            CheckpointError: names, shapes or dtypes differ; nothing was changed then.
        """
        targets: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            targets[f"{name}.lora_A"] = layer.lora_A[self.adapter_name].weight
            targets[f"{name}.lora_B"] = layer.lora_B[self.adapter_name].weight
            if state.meta["restarts"]:
                targets[f"{name}.weight"] = layer.get_base_layer().weight
        carries = {key.removeprefix(CARRY): t for key, t in state.tensors.items() if key.startswith(CARRY)}
        stored = {key: t for key, t in state.tensors.items() if not key.startswith(CARRY)}
        if odd := sorted((stored.keys() ^ targets.keys()) | (carries.keys() - self._holders.keys())):
            raise CheckpointError(f"the state is of another model: {len(odd)} names differ, {odd[0]} first")
        for key, target in targets.items():
            if (stored[key].shape, stored[key].dtype) != (target.shape, target.dtype):
                raise CheckpointError(
                    f"the state is of another model: {key} is {tuple(stored[key].shape)} {stored[key].dtype} in it and "
                    f"{tuple(target.shape)} {target.dtype} in the model"
                )
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(stored[key])
        for name, holder in self._holders.items():
            holder.carry = carries[name].clone() if name in carries else None
        self._last_step, self._restart_count = int(state.meta["last_step"]), int(state.meta["restarts"])

    def save_state(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Write the state, and JSON values beside it, as one safetensors file into a folder, which is made."""
        state, path = self.state_dict(), Path(folder) / STATE_FILE
        text = json.dumps(_stored(self.config, state.meta, extra or {}), sort_keys=True).encode()
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            write_tensors(temporary, {**state.tensors, "json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})
            os.replace(temporary, path)
        except OSError as error:
            raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from None
        return path

    def load_state(self, folder: str | Path) -> dict[str, Any]:
        """Take up what `save_state` wrote beside PEFT's adapter, which is loaded already; return the JSON values.

        Raises:
            CheckpointError: the file is missing or damaged, of other settings, or of another adapter.
        """
        path = Path(folder) / STATE_FILE
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = json.loads(bytes(tensors.pop("json").tolist()))
            meta, extra, settings = dict(stored["meta"]), dict(stored["extra"]), dict(stored["config"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}): resume from a checkpoint that was written with Restarts, and "
                "say where it lies: TrimtabCallback(..., resume_from_checkpoint=folder)"
            ) from None
        check_settings(self.config, self.config.name, settings)
        now = self.state_dict().tensors
        for name in (name for name in now if name.endswith((".lora_A", ".lora_B"))):
            if name in tensors and not torch.equal(tensors[name].to(now[name]), now[name]):
                raise CheckpointError(
                    f"{path} is of another checkpoint than the one that the Trainer loaded ({name} differs): say where "
                    "that lies: TrimtabCallback(..., resume_from_checkpoint=folder)"
                )
        self.load_state_dict(AdapterState(tensors, meta))
        return extra

    def merge_and_unload(self) -> nn.Module:
        """Merge what the last cycle learned, carries included, and give PEFT's plain model back."""
        self._check_plain()
        self._merge()
        with torch.no_grad():
            for layer in self._layers.values():
                layer.lora_B[self.adapter_name].weight.zero_()
        plain: nn.Module = self.model.unload()  # type: ignore[operator]
        _LIVE.pop(self.model, None)
        return plain


def _stored(config: ReLoRA, meta: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds as JSON."""
    return {"format": 2, "config": config.model_dump(mode="json"), "meta": dict(meta), "extra": dict(extra)}


def _plain_layers(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The adapter's name and the LoRA layers of a model on which a restart is exact.

    Raises:
        ConfigError: it is no PEFT model, or has something else than one plain LoRA on linear layers.
    """
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError("Restarts needs the package peft: pip install 'trimtab[peft]'") from error
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"Restarts takes a peft.PeftModel, got {type(model).__name__}: use trimtab.ReLoRA on a plain model"
        )
    names = list(model.peft_config)
    if len(names) != 1 or list(model.active_adapters) != names:
        raise ConfigError(
            f"the PEFT model has the adapters {names}, of which {list(model.active_adapters)} are active; restarts "
            "write into the base under them all: keep one, and active (delete_adapter)"
        )
    name, config = names[0], model.peft_config[names[0]]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"the PEFT adapter is a {config.peft_type}; Restarts takes LoRA")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ConfigError("the PEFT model has no LoRA layer")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, layer in layers.items():
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if type(layer) is not Linear or not isinstance(layer, LoraLayer):
            what = f"a {type(layer).__module__}.{type(layer).__name__}, not LoRA's plain Linear"
        elif layer.lora_variant or layer.lora_magnitude_vector:
            variant = next(iter(layer.lora_variant.values()), None)
            what = f"not plain LoRA but {type(variant).__name__ if variant else 'DoRA'}"
        elif layer.lora_bias.get(name):
            what = "LoRA with a bias (lora_bias=True)"
        elif layer.merged or layer.disable_adapters:
            what = "merged" if layer.merged else "disabled"
        elif not (type(base) is nn.Linear or type(base).__name__ == "Conv1D"):
            what = f"on a {type(base).__module__}.{type(base).__name__}, not a plain linear layer"
        elif type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            what = f"on a weight of type {type(weight).__name__} and dtype {getattr(weight, 'dtype', None)}"
        elif layer.fan_in_fan_out != (type(base).__name__ == "Conv1D"):
            what = f"set to fan_in_fan_out={layer.fan_in_fan_out} on a {type(base).__name__}"
        elif owners[id(weight)] > 1:
            what = "on a weight that is tied to another module's, which a merge would change, too"
        else:
            continue
        raise ConfigError(f"Restarts cannot merge {path} exactly: it is {what}")
    return name, layers
