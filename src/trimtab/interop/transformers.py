"""Trimtab's methods in `transformers.Trainer` and its descendants (TRL's SFTTrainer), by one callback.

    trainer = Trainer(model=model, args=args, train_dataset=data,
                      callbacks=[TrimtabCallback(trimtab.ReLoRA(restart_every=1000), rewarm_steps=50)])
    trainer.train()
    trainer.save_model("out")       # a plain model: the adapter was merged at the end

What a Trainer does in a step, and what the callback does there (transformers 5):

    on_step_begin         the gradient of the method's extra term is put into .grad, once a step: its weight is one
                          whatever the accumulation, the loss function or the Trainer's own normalisation
    forward, backward     of each micro-batch
    clip, optimizer.step
    on_optimizer_step     `adapter.after_step(n)`: gradients are still there, and the rate of the next step is not set
    scheduler.step        reads the list of restarts that the method follows
    zero_grad, on_step_end, save

n counts the steps that the optimizer took. A step that fp16's gradient scaler skipped is none, neither here nor in
the Trainer's scheduler, so the two stay together, and the run ends that many steps before its schedule does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trimtab.errors import CheckpointError, ConfigError
from trimtab.interop.checks import check_arguments, check_callback, check_optimizer
from trimtab.interop.modelstate import ModelState
from trimtab.interop.peft import Restarts
from trimtab.interop.rates import check_resumed, lr_scheduler, schedule_from, schedule_of, take_over
from trimtab.methods import attach
from trimtab.methods.base import Adapter, Method
from trimtab.methods.registry import method_from_user
from trimtab.optim.schedule import Schedule

__all__ = ["TrimtabCallback", "lr_scheduler"]

_log = logging.getLogger(__name__)


class TrimtabCallback(TrainerCallback):
    """Runs a method inside a Trainer: give it in `callbacks=` when the Trainer is built.

    The most natural form takes a method's config. It attaches to the Trainer's model, follows the Trainer's own
    optimizer and the schedule that `TrainingArguments` describe (`lr_scheduler_type` cosine, linear, constant,
    constant_with_warmup or cosine_with_min_lr, with the restarts put in), and merges at the end of the training,
    so that `trainer.save_model()` writes a plain model. The live adapter is `callback.adapter`.

    A method with a warm start, or with a learning rate of its own for some group (LoRA+), needs an optimizer with
    its parameter groups; everything else of `args` (the kind of optimizer, betas, weight decay) stays:

        callback = TrimtabCallback(trimtab.ReLoRA(restart_every=1000, warm_start_steps=500))
        Trainer(model=model, args=args, callbacks=[callback], optimizers=callback.optimizers(model, args))

    Checkpoints hold everything: `trainer.train(resume_from_checkpoint=...)` continues bit for bit. The adapter's
    state lies in the checkpoint's `model.safetensors`, beside lora_A and lora_B under their names in the model.
    Such a folder is for resuming; `from_pretrained` on it would leave the adapter out. For a PEFT model, give a
    `trimtab.interop.peft.Restarts`: its state is a file of its own in the checkpoint's folder.

    Args:
        method: a config (or a mapping with a `name`), an adapter that is already attached to the Trainer's model,
            or a `trimtab.interop.peft.Restarts`.
        rewarm_steps: steps of the re-warm after each restart.
        schedule: instead of the one that `args` describe. Its `total_steps` and its `restarts` must be those of
            the run.
        merge_at_end: merge when the training ends. None: where `method` is a config, if it has a merged form.
        resume_from_checkpoint: with `Restarts`, the folder that `trainer.train` resumes from, where that is not
            a checkpoint in `args.output_dir`.
        **attach_settings: `dtype`, `pure`, `keep_base` and `name` of `trimtab.attach`, where `method` is a config.

    Attributes:
        adapter: what is at work on the model; None before the Trainer is built.
        events: what the method did, as dictionaries with `event` and `step`; also in `state.log_history`.
        skipped: optimizer steps that were skipped.

    Raises:
        ConfigError: when it is made, for settings that are unknown or of the wrong kind; at the beginning of the
            training, for whatever would go wrong later.
    """

    def __init__(
        self,
        method: Method | Mapping[str, Any] | Adapter | Restarts,
        *,
        rewarm_steps: int = 0,
        schedule: Schedule | None = None,
        merge_at_end: bool | None = None,
        resume_from_checkpoint: str | Path | None = None,
        **attach_settings: Any,
    ) -> None:
        check_callback(
            rewarm_steps=rewarm_steps,
            schedule=schedule,
            merge_at_end=merge_at_end,
            resume_from_checkpoint=resume_from_checkpoint,
            attach_settings=attach_settings,
        )
        if schedule is not None and rewarm_steps not in (0, schedule.rewarm_steps):
            raise ConfigError(f"rewarm_steps = {rewarm_steps}, and the schedule's is {schedule.rewarm_steps}")
        self.adapter: Adapter | Restarts | None = None
        self.events: list[dict[str, Any]] = []
        self.skipped = 0
        self._config: Method | None = None
        if isinstance(method, Method | Mapping):
            self._config = method_from_user(method)
        elif not isinstance(method, Adapter | Restarts):
            raise ConfigError(
                f"TrimtabCallback takes a method's config, such as trimtab.LoRA(), an attached adapter, or Restarts of "
                f"a PEFT model; got {method!r}"
            )
        elif attach_settings:
            raise ConfigError(
                f"{next(iter(attach_settings))} goes with a method's config; this one is attached already"
            )
        else:
            self.adapter = method
        self._attach_settings = attach_settings
        self._rewarm_steps = rewarm_steps if schedule is None else schedule.rewarm_steps
        self._schedule = schedule
        self._merge_at_end = merge_at_end
        self._resume_from = resume_from_checkpoint
        self._taken = 0
        self._state: ModelState | None = None
        self._own_optimizer: Optimizer | None = None
        self._built = self._scheduler_given = False

    # -- before the training -------------------------------------------------------------------

    def attach(self, model: nn.Module) -> Adapter | Restarts:
        """Attach to `model`, once; the Trainer's construction does it, too."""
        if self._state is None and ModelState.of(model) is not None:
            raise ConfigError(
                "the model has a TrimtabCallback already, and one is the limit: give one in callbacks=[...], and the "
                "same object to a second Trainer of this model"
            )
        if self.adapter is None:
            if _is_peft(model):
                raise ConfigError(
                    "the Trainer's model is a PEFT model: use TrimtabCallback(trimtab.interop.peft.Restarts(model, "
                    "every=...)) for restarts of its LoRA, or give the Trainer the plain model"
                )
            assert self._config is not None
            self.adapter = attach(model, self._config, **self._attach_settings)
            if self._merge_at_end is None:
                self._merge_at_end = not getattr(self.adapter, "no_merge", "")
        if self.adapter.model is not model:
            raise ConfigError(
                f"the adapter is attached to another model than the Trainer's ({type(model).__name__}); attach it to "
                "the object that the Trainer gets, and do not use model_init"
            )
        if self._merge_at_end and (why := getattr(self.adapter, "no_merge", "")):
            raise ConfigError(
                f"merge_at_end=True: {why}; leave it out, and save with callback.adapter.save(folder) at the end"
            )
        if self._state is None and isinstance(self.adapter, Adapter):
            self._state = ModelState(self.adapter, self._counters, self._loaded)
        return self.adapter

    def optimizers(self, model: nn.Module, args: Any) -> tuple[Optimizer, None]:
        """What to give as `Trainer(optimizers=...)`: the optimizer of `args`, made of the method's parameter groups.

        Every group gets `args.weight_decay`. The scheduler is left to the Trainer, and follows the restarts.

        Args:
            model: the Trainer's model; the method is attached to it here.
            args: the Trainer's `TrainingArguments`.
        """
        adapter = self.attach(model)
        if not isinstance(adapter, Adapter):
            raise ConfigError("a PEFT model needs no optimizer from here: leave `optimizers` to the Trainer")
        make, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not (isinstance(make, type) and issubclass(make, Optimizer)) or {"params", "model", "optimizer_dict"} & set(
            options
        ):
            raise ConfigError(
                f"optim={args.optim} makes parameter groups of its own; use an AdamW, such as adamw_torch"
            )
        groups = adapter.parameter_groups(lr=args.learning_rate, weight_decay=args.weight_decay)
        self._own_optimizer = make(groups, **options)
        return self._own_optimizer, None

    def on_init_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Attach, now that the model lies where it will train, and before the Trainer makes its optimizer."""
        self.attach(parts["model"])
        self._built, self._scheduler_given = True, parts.get("lr_scheduler") is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Check that everything fits together, and put the restarts into the schedule."""
        if not self._built:
            raise ConfigError("TrimtabCallback came too late: give it in Trainer(callbacks=[...]), not by add_callback")
        assert self.adapter is not None
        self.attach(extract_model_from_parallel(parts["model"]))
        optimizer = _unwrap(parts["optimizer"])
        if not isinstance(self.adapter, Adapter):
            self._load_beside(args, state)
        elif self._state is not None:
            self._state.check_whole()
        self._check_progress(state)
        restarts = self._plan(state.max_steps)
        check_arguments(args, state, self.adapter, restarts)
        check_optimizer(self.adapter, optimizer, restarts)
        if state.global_step:
            check_resumed(parts["lr_scheduler"], self._taken)
        if restarts or self.adapter.config.switch_step or self._schedule is not None:
            self._set_schedule(args, state.max_steps, restarts, parts["lr_scheduler"])
        if state.global_step:
            self._note(state, self._taken, self.adapter.catch_up(optimizer).events)

    def _plan(self, total: int) -> tuple[int, ...]:
        assert self.adapter is not None
        if self._schedule is not None and self._schedule.total_steps != total:
            raise ConfigError(
                f"the schedule has total_steps = {self._schedule.total_steps}, and the Trainer trains for {total} "
                "steps (max_steps, or what its epochs come to); make them equal"
            )
        if misfit := self.adapter.config.check_length(total):
            raise ConfigError(f"{misfit[0]} = {misfit[1]}")
        restarts = self.adapter.restarts(total, self._rewarm_steps)
        if self._rewarm_steps and self._schedule is None and not self.adapter.config.restarts(total):
            _log.warning("rewarm_steps = %d has no effect: the method has no restarts", self._rewarm_steps)
        if not restarts and self.adapter.config.restarts(total):
            raise ConfigError(
                f"rewarm_steps = {self._rewarm_steps} is longer than what follows the first restart (step "
                f"{self.adapter.config.restarts(total)[0]} of {total}), so the run would have none; make it shorter"
            )
        return restarts

    def _set_schedule(self, args: Any, total: int, restarts: tuple[int, ...], scheduler: Any) -> None:
        assert self.adapter is not None
        given = schedule_of(scheduler) if self._scheduler_given else None
        if self._scheduler_given and given is None:
            raise ConfigError(
                f"the Trainer was given a scheduler of its own ({type(scheduler).__name__}), which knows no restarts: "
                "leave it out, or make it with trimtab.interop.transformers.lr_scheduler(optimizer, schedule)"
            )
        schedule = self._schedule or given
        if schedule is None:
            schedule = schedule_from(args, total, restarts, self._rewarm_steps, self.adapter.config.switch_step)
        asked = (total, restarts, self.adapter.config.switch_step)
        found = (schedule.total_steps, schedule.restarts, schedule.warm_start_steps)
        for name, ours, theirs in zip(("total_steps", "restarts", "warm_start_steps"), asked, found, strict=True):
            if ours != theirs:
                raise ConfigError(f"the schedule's {name} = {theirs}, and this run's is {ours}; make them equal")
        take_over(scheduler, schedule)

    def _check_progress(self, state: Any) -> None:
        """The Trainer and the method must have done the same steps."""
        done = self._taken + self.skipped
        if done == state.global_step:
            return
        if state.global_step:
            raise CheckpointError(
                f"the Trainer resumes at step {state.global_step}, and the adapter is at step {done}: the checkpoint "
                "holds no state of trimtab, or was not loaded; resume from one that was written with the callback"
            )
        raise ConfigError(
            f"the adapter has gone {done} steps already, and this training begins at 0: resume from a checkpoint, or "
            "build a new model, callback and Trainer"
        )

    # -- in a step -----------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Put the gradient of the method's extra term into `.grad`, before those of the micro-batches."""
        assert self.adapter is not None
        extra = self.adapter.extra_loss()
        if extra is not None:
            scaler = getattr(parts["optimizer"], "scaler", None)
            torch.autograd.backward(extra if scaler is None else scaler.scale(extra))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Let the method do what is due between two steps."""
        assert self.adapter is not None
        if getattr(parts["optimizer"], "step_was_skipped", False):
            self.skipped += 1
            return
        self._taken += 1
        self._note(state, self._taken, self.adapter.after_step(self._taken, _unwrap(parts["optimizer"])).events)

    def _note(self, state: Any, step: int, events: tuple[dict[str, Any], ...]) -> None:
        for event in events:
            self.events.append({"step": step, **event})
            state.log_history.append({"step": step, **event})
            _log.info("step %d: %s", step, event["event"])

    # -- saving and the end --------------------------------------------------------------------

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Write the state of a PEFT model's restarts into the checkpoint; other states are in the model's file."""
        if self.adapter is not None and not isinstance(self.adapter, Adapter) and args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.adapter.save_state(folder, self._counters())

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Merge, where that was asked for."""
        if self._state is not None:
            self._state.check_whole()  # load_best_model_at_end has loaded another checkpoint
        if isinstance(self.adapter, Adapter) and self._merge_at_end:
            self.adapter.merge()
            if self._state is not None:
                self._state.remove()
        elif isinstance(self.adapter, Adapter) and self.adapter.no_merge:
            _log.warning(
                "the model was not merged (%s), and what trainer.save_model() writes is no plain model: save with "
                "callback.adapter.save(folder), and load with trimtab.load_adapter",
                self.adapter.no_merge,
            )
        elif self.adapter is not None and any(event["event"] == "restart" for event in self.events):
            _log.warning(
                "restarts changed the base weights, so the adapter alone does not describe the model: merge before "
                "you save (%s)",
                "adapter.merge()" if isinstance(self.adapter, Adapter) else "restarts.merge_and_unload()",
            )

    def _counters(self) -> dict[str, Any]:
        return {"taken": self._taken, "skipped": self.skipped}

    def _loaded(self, counters: Mapping[str, Any]) -> None:
        """A state was taken up: an optimizer that was made before must train what it trains."""
        self._taken, self.skipped = int(counters["taken"]), int(counters["skipped"])
        if self._own_optimizer is None:
            return
        assert isinstance(self.adapter, Adapter)
        groups = {group["group"]: group for group in self._own_optimizer.param_groups}
        for fresh in self.adapter.parameter_groups(lr=0.0):
            groups[fresh["group"]].update(params=fresh["params"], names=fresh["names"])

    def _load_beside(self, args: Any, state: Any) -> None:
        assert self.adapter is not None
        assert not isinstance(self.adapter, Adapter)
        if state.global_step and self._taken == 0:
            default = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folder = Path(self._resume_from or args.resume_from_checkpoint or default)
            self._loaded(self.adapter.load_state(folder))


def _unwrap(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrappers: a reset must reach what bitsandbytes keeps beside its state."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _is_peft(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)
