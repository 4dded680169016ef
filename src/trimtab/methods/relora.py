"""ReLoRA (arXiv 2307.05695): LoRA, a list of restart steps, and `after_step`.

Every `restart_every` steps: W += s B A, A is drawn anew, B = 0, the optimizer forgets A's and B's past, and
the schedule (which reads the same list) re-warms the learning rate. A sum of low-rank updates has the rank
of their sum, so training ends with an update of a rank that no single adapter has.

The restart leaves the function as it was. What others get wrong here: a dead first cycle (A = B = 0), a
merge that forgets s or rounds the update away, an optimizer reset that touches nothing, or everything.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from trimtab.errors import TrimtabError
from trimtab.methods.base import StepReport
from trimtab.methods.frozen import Role
from trimtab.methods.lora import LoRA, LoRAAdapter
from trimtab.nn.adapted import merge_report
from trimtab.nn.initial import Init
from trimtab.nn.residence import Residence
from trimtab.optim.reset import ResetMode, check_reset, reset_state


class ReLoRA(LoRA):
    """High-rank training through a sequence of low-rank updates.

    Beside the arguments of `LoRA`:

    Args:
        restart_every: steps of one cycle. A restart at n happens after step n; they lie at
            `warm_start_steps` + j * `restart_every`, never at the end of the run.
        reset: what a restart does to the optimizer's state of A and B. "drop": moments and step go, as if
            the parameter were new. "magnitude", "random": keep the share 1 - `reset_ratio` of the entries
            (the largest first moments, or random ones; one mask for both moments) and rescale them so that
            bias correction at step 1 gives what it gave before. "none": leave it.
        reset_ratio: share of the entries to forget in the modes "magnitude" and "random".
        reset_reference: do as the authors' code does in these modes: a mask for each moment, the step kept.
    """

    abstract = False
    name: Literal["relora"] = "relora"  # type: ignore[assignment]
    rank: Annotated[int, Field(ge=1)] = 128
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    train_also: tuple[Role, ...] | None = ("embeddings", "norms", "head")
    restart_every: Annotated[int, Field(ge=1)]
    reset: ResetMode = "drop"
    reset_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    reset_reference: bool = False

    @field_validator("dora")
    @classmethod
    def _is_low_rank(cls, dora: bool) -> bool:
        if dora:
            raise ValueError(
                "the lengths of DoRA change every row in full, and a restart would take them in and forget them, so "
                "there is no sum of low-rank updates; use method lora"
            )
        return dora

    @field_validator("init")
    @classmethod
    def _begins_anew(cls, init: Init) -> Init:
        if init == "pissa":
            raise ValueError(
                "each restart would take the same largest components out of the base again, and the update would not "
                "grow in rank; use kaiming, gaussian or orthogonal"
            )
        return init

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        super().restarts(total_steps, rewarm_steps)
        first = self.warm_start_steps + self.restart_every
        return tuple(n for n in range(first, total_steps, self.restart_every) if total_steps - n >= rewarm_steps)

    def check_length(self, total_steps: int) -> tuple[str, str] | None:
        if self.restarts(total_steps):
            return None
        adapted = total_steps - self.switch_step
        way_out = f"at most {adapted - 1} would" if adapted > 1 else "raise train.steps"
        return "restart_every", (
            f"{self.restart_every} is longer than the run: no restart would fit into its {adapted} adapted "
            f"step{'s' * (adapted > 1)}; {way_out}"
        )

    def idle_settings(self) -> dict[str, str]:
        if self.reset in ("magnitude", "random"):
            return {}
        fields = type(self).model_fields
        given = [key for key in ("reset_ratio", "reset_reference") if getattr(self, key) != fields[key].default]
        return dict.fromkeys(given, f"reset is {self.reset}")

    @property
    def writes_base(self) -> str:
        return f"restart_every={self.restart_every}"

    def _attach(self, model: nn.Module, residence: Residence) -> ReLoRAAdapter:
        return ReLoRAAdapter(model, self, residence)


class ReLoRAAdapter(LoRAAdapter):
    """ReLoRA at work on a model."""

    config: ReLoRA
    #: The restarts of a run of known length; None until `restarts` was called: then every cycle's end is one.
    _planned: tuple[int, ...] | None = None

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        self._planned = self.config.restarts(total_steps, rewarm_steps)
        return self._planned

    def _is_restart(self, step: int) -> bool:
        if self._planned is not None:
            return step in self._planned
        since = step - self.config.switch_step
        return since > 0 and since % self.config.restart_every == 0

    def _after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        skipped = [n for n in range(self._last_step + 1, step) if self._is_restart(n)]
        if skipped:
            raise ValueError(
                f"after_step({step}): the restart after step {skipped[0]} was left out; call it after every step"
            )
        self._check_alive(step)
        report = super()._after_step(step, optimizer)
        if not self._is_restart(step):
            return report
        return StepReport(report.trainable_changed, (*report.events, self._restart(step, optimizer)))

    def catch_up(self, optimizer: torch.optim.Optimizer) -> StepReport:
        due = [n for n in self._planned or () if n <= self._last_step]
        if not self.adapted or len(due) <= self._restart_count or due[-1] != self._last_step:
            return StepReport()
        return StepReport(events=(self._restart(self._last_step, optimizer),))

    def _check_alive(self, step: int) -> None:
        """After the first step of a cycle some adapter must be able to learn.

        With A = B = 0 none ever will. And when gradients are still there, those of B must not all be zero while
        others are not: then the adapted layers do not reach the loss.
        """
        opened = step - 1
        if not self.adapted or not (opened == self.config.switch_step or self._is_restart(opened)):
            return
        layers = list(self.layers.values())
        dead = not any(bool(getattr(layer, part).any()) for layer in layers for part in layer.parts)
        first = [getattr(layer, layer.starts_at_zero).grad for layer in layers]
        grads = [grad for grad in first if grad is not None]
        if grads and not any(bool(grad.any()) for grad in grads):
            others = (e.parameter.grad for e in self.trainable() if e.group != "adapter")
            dead = dead or any(bool(grad.any()) for grad in others if grad is not None)
        if dead:
            raise TrimtabError(
                f"step {step}: no adapter got a gradient in the first step of its cycle; the adapted layers do not "
                "reach the loss (check targets)"
            )

    def _restart(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        began = time.perf_counter()
        parameters, mode, ratio = self.own(), self.config.reset, self.config.reset_ratio
        # Whatever can be wrong is found before the base is written into: half a restart cannot be done again.
        check_reset(optimizer, parameters, mode=mode, ratio=ratio)
        losses = merge_report(self.layers)
        self._residence.edit(f"{name}.weight" for name in self.layers)
        for layer in self.layers.values():
            layer.merge_()
        self._restart_count += 1
        self._draw()
        for parameter in parameters.values():
            parameter.grad = None
        touched = reset_state(
            optimizer,
            parameters,
            mode=mode,
            ratio=ratio,
            seed=(self.config.seed or 0, self._restart_count),
            reference=self.config.reset_reference,
        )
        return {
            "event": "restart",
            "step": step,
            "restart": self._restart_count,
            "reset_mode": mode,
            "reset_elements": touched,
            **losses,
            "seconds": round(time.perf_counter() - began, 4),
        }
