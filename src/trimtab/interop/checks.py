"""What a Trainer can be set to, or be given, and what would then not work."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from trimtab.errors import ConfigError
from trimtab.methods.attached import check_settings
from trimtab.methods.base import Adapter
from trimtab.optim.schedule import Schedule
from trimtab.settings import check_whole

if TYPE_CHECKING:
    from trimtab.interop.peft import Restarts

#: Optimizers that step inside the backward, so that nothing is left to do between two steps.
_INSIDE_BACKWARD = ("lomo", "layerwise")


#: What `TrimtabCallback` passes on to `trimtab.attach`.
_ATTACH = ("dtype", "pure", "keep_base", "name")


def check_callback(
    *, rewarm_steps: Any, schedule: Any, merge_at_end: Any, resume_from_checkpoint: Any, attach_settings: dict[str, Any]
) -> None:
    """Refuse settings of a `TrimtabCallback` that are unknown or of the wrong kind, when it is made."""
    for key in attach_settings:
        if key not in _ATTACH:
            known = ("rewarm_steps", "schedule", "merge_at_end", "resume_from_checkpoint", *_ATTACH)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"TrimtabCallback: {key} is no setting of it; {hint}")
    check_settings(**{key: value for key, value in attach_settings.items() if key != "keep_base"})
    check_whole("rewarm_steps", rewarm_steps)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ConfigError(
            f"schedule={schedule!r}: give a trimtab.Schedule(...), or leave it out and set lr_scheduler_type"
        )
    if merge_at_end is not None and not isinstance(merge_at_end, bool):
        raise ConfigError(f"merge_at_end={merge_at_end!r}: give True, False or None")
    if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, str | Path):
        raise ConfigError(f"resume_from_checkpoint={resume_from_checkpoint!r}: give the folder")


def check_arguments(args: Any, state: Any, adapter: Adapter | Restarts, restarts: tuple[int, ...]) -> None:
    """Refuse what a Trainer can be set to and what would not work, or not as it says."""
    if isinstance(adapter, Adapter):
        adapter._require_open("train()")
        name = adapter.attached_name
        if adapter.record.active != name:
            raise ConfigError(f"the adapter {name!r} is not the active one; trimtab.activate(model, {name!r}) first")
    if args.fsdp or getattr(args, "deepspeed", None):
        raise ConfigError("TrimtabCallback does not work under FSDP or DeepSpeed: use one process a GPU with DDP")
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process: the Trainer would run nn.DataParallel, whose copies of the model have "
            "no adapter of their own; start one process a GPU (torchrun), or set CUDA_VISIBLE_DEVICES"
        )
    if any(word in str(getattr(args.optim, "value", args.optim)) for word in _INSIDE_BACKWARD):
        raise ConfigError(f"optim={args.optim} steps inside the backward; use an AdamW, such as adamw_torch")
    if state.is_hyper_param_search:
        raise ConfigError("a hyperparameter search rebuilds the model for each trial; build a Trainer for each instead")
    switch = adapter.config.switch_step
    if switch and args.world_size > 1:
        raise ConfigError(
            f"warm_start_steps = {switch}: at its end other tensors train, which DDP does not learn of; "
            "warm-start in a run of its own, or train in one process"
        )
    if args.load_best_model_at_end and (switch or (restarts and not isinstance(adapter, Adapter))):
        what = f"warm_start_steps = {switch}" if switch else "Restarts of a PEFT model"
        raise ConfigError(
            f"load_best_model_at_end=True with {what}: the best checkpoint may be of another phase or base than the "
            "model at the end; leave it off, and load the checkpoint that you want in a new process"
        )
    head = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    extra = [name for name, _ in head.named_parameters() if name not in ("weight", "bias")] if head is not None else []
    if extra and type(args).__module__.startswith("trl."):
        raise ConfigError(
            f"TRL reads the output head's weight past its forward, so {', '.join(extra)} would never train; leave the "
            "head out of the targets"
        )


def check_optimizer(adapter: Adapter | Restarts, optimizer: Optimizer, restarts: tuple[int, ...]) -> None:
    """The optimizer must train what the method trains, and be able to do what the method will ask of it."""
    way_out = "build it with callback.optimizers(model, args)"
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [entry.name for entry in adapter.trainable() if id(entry.parameter) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer does not train {missing[0]} and {len(missing) - 1} more of the method's parameters: it was "
            f"built before the method was attached; leave it to the Trainer, or {way_out}"
        )
    if restarts and "betas" not in optimizer.defaults and getattr(adapter.config, "reset", None) != "none":
        raise ConfigError(
            f"a restart resets Adam's two moments, and {type(optimizer).__name__} has none: use an AdamW, or "
            "reset='none'"
        )
    if not isinstance(adapter, Adapter):
        return
    switch = adapter.config.switch_step
    names = {group.get("group") for group in optimizer.param_groups}
    if switch and not {"base", "adapter"} <= names:
        raise ConfigError(
            f"warm_start_steps = {switch}: at its end the optimizer's groups are rewritten, and this optimizer "
            f"has none of the method's; {way_out}"
        )
    shares = {id(p): group["lr"] for group in adapter.parameter_groups(lr=1.0) for p in group["params"]}
    if len(set(shares.values())) > 1:
        bases = {key: held[key].get("initial_lr", held[key]["lr"]) / share for key, share in shares.items()}
        if max(bases.values()) > 1.0001 * min(bases.values()):
            raise ConfigError(
                f"the method has learning rates of its own for some parameters, and the optimizer does not: {way_out}"
            )
