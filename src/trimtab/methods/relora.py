"""ReLoRA (arXiv 2307.05695): LoRA, a list of restart steps, and `after_step`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trimtab.methods.lora import LoRA


class ReLoRA(LoRA):
    """High-rank training through a sequence of low-rank updates."""

    abstract = False
    name: Literal["relora"] = "relora"  # type: ignore[assignment]
    rank: Annotated[int, Field(ge=1)] = 128
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    restart_every: Annotated[int, Field(ge=1)]

    def restarts(self, total_steps: int, rewarm_steps: int = 0) -> tuple[int, ...]:
        first = self.warm_start_steps + self.restart_every
        return tuple(n for n in range(first, total_steps, self.restart_every) if total_steps - n >= rewarm_steps)
