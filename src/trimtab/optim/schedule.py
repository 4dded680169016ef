"""The learning rate as a pure function of the step.

Legend: T total steps, W steps of warm start, F first warm-up, R re-warm, m floor. Steps are 0-based:
`schedule(t)` is the multiplier of the step about to be taken, and a restart listed at n happens after
step n was completed, so n is also the index of the first step of the new cycle.

No state exists, so a resumed run, a plot and the loop cannot disagree; restarts and the jagged shape
come from the one list that the method computes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from trimtab.errors import ConfigError

Shape = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A learning-rate multiplier, jagged where the run restarts (ReLoRA, arXiv 2307.05695, section 3).

    Args:
        total_steps: T.
        shape: what the multiplier falls along: "cosine", "linear" or "constant".
        warmup_steps: F, linear from 1/F to 1.
        floor: m, the multiplier at the end, as a share of the peak.
        warm_start_steps: W; the full-rank phase is a schedule over T that is cut off at W.
        after_warm_start: "restart": from W a new warm-up of F steps and a new curve over T - W (the
            paper's runs); "continue": the one curve over T goes on, and W is re-warmed like a restart.
        restarts: completed-step counts, rising, each in (W, T).
        rewarm_steps: R; step k = 0..R-1 of a re-warm has (k+1)/R times the curve at the re-warm's end.
        reference: warm up with t/F and re-warm with k/R, as the authors' `cosine_restarts` does; the
            first step of each cycle then has rate 0.

    Raises:
        ConfigError: lengths that do not fit together.
    """

    total_steps: int
    shape: Shape = "cosine"
    warmup_steps: int = 0
    floor: float = 0.1
    warm_start_steps: int = 0
    after_warm_start: Literal["restart", "continue"] = "restart"
    restarts: tuple[int, ...] = ()
    rewarm_steps: int = 0
    reference: bool = False

    def __post_init__(self) -> None:
        total, start = self.total_steps, self.warm_start_steps
        if total < 1:
            raise ConfigError(f"the schedule's total_steps must be at least 1, got {total}")
        if self.shape not in ("cosine", "linear", "constant"):
            raise ConfigError(f"the schedule's shape must be cosine, linear or constant, got {self.shape!r}")
        if self.after_warm_start not in ("restart", "continue"):
            raise ConfigError(f"after_warm_start must be restart or continue, got {self.after_warm_start!r}")
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"the schedule's floor must lie in [0, 1], got {self.floor}")
        if self.warmup_steps < 0 or self.rewarm_steps < 0:
            raise ConfigError(
                f"warmup_steps and rewarm_steps must not be negative, got {self.warmup_steps} and {self.rewarm_steps}"
            )
        if not 0 <= start < total:
            raise ConfigError(f"warm_start_steps must lie in [0, total_steps), got {start} of {total}")
        origins = (0, start) if start and self.after_warm_start == "restart" else (0,)
        for origin in origins:
            end = start if origin == 0 and start else (self.restarts[0] if self.restarts else total)
            if self.warmup_steps > end - origin:
                what = "run" if end == total else "warm start" if end == start else "cycle"
                raise ConfigError(
                    f"warmup_steps = {self.warmup_steps} is longer than the stretch from step {origin} to step "
                    f"{end} that it opens; shorten the warm-up or lengthen the {what}"
                )
        cuts = (start, *self.restarts, total) if start else (0, *self.restarts, total)
        if any(low >= high for low, high in pairwise(cuts)):
            raise ConfigError(f"restarts must rise and lie between step {start} and step {total}, got {self.restarts}")
        jagged = [*self.restarts, start] if start and self.after_warm_start == "continue" else list(self.restarts)
        for first, last in pairwise(cuts):
            if first in jagged and last - first < self.rewarm_steps:
                raise ConfigError(
                    f"rewarm_steps = {self.rewarm_steps} is longer than the cycle from step {first} to step {last}"
                )

    def __call__(self, step: int) -> float:
        """The multiplier of the step with 0-based index `step`; past the end it stays at the last value."""
        t = min(max(step, 0), self.total_steps - 1)
        origin = self._origin(t)
        since = self._last_restart(t)
        if since is not None and t - since < self.rewarm_steps:
            k = t - since
            share = (k if self.reference else k + 1) / self.rewarm_steps
            return share * self._curve(since + self.rewarm_steps, origin)
        if t - origin < self.warmup_steps:
            return (t - origin + (0 if self.reference else 1)) / self.warmup_steps
        return self._curve(t, origin)

    def _origin(self, t: int) -> int:
        """Where the curve that holds at `t` began."""
        return self.warm_start_steps if self.after_warm_start == "restart" and t >= self.warm_start_steps else 0

    def _last_restart(self, t: int) -> int | None:
        """The last re-warmed step at or before `t`."""
        position = bisect_right(self.restarts, t)
        if position:
            return self.restarts[position - 1]
        start = self.warm_start_steps
        return start if start and self.after_warm_start == "continue" and t >= start else None

    def _curve(self, t: int, origin: int) -> float:
        """The smooth multiplier at `t`; its phase is clamped so that nothing climbs at the end."""
        if self.shape == "constant":
            return 1.0
        span = self.total_steps - origin - self.warmup_steps
        phase = min(max((t - origin - self.warmup_steps) / span, 0.0), 1.0) if span > 0 else 1.0
        height = (1.0 + math.cos(math.pi * phase)) / 2.0 if self.shape == "cosine" else 1.0 - phase
        return self.floor + (1.0 - self.floor) * height
