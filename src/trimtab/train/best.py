"""The best step of a run by its evaluations, and when to stop waiting for a better one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.tasks.base import Headline


@dataclass
class Best:
    """Follows the headline from evaluation to evaluation.

    What it knows is in the evaluations alone, which the log keeps; so a run that goes on knows the same.

    Args:
        patience: evaluations without a better one after which it is enough; None is never.
        step: of the best so far, with its `value`.
        seen: the step of the last evaluation.
    """

    patience: int | None = None
    step: int | None = None
    value: float = 0.0
    seen: int | None = None
    _since: int = field(default=0, repr=False)

    def offer(self, step: int, headline: Headline) -> bool:
        """Take note of an evaluation; whether it is the best so far (the first of equals is)."""
        rises = headline.value > self.value if headline.rising else headline.value < self.value
        better = self.step is None or math.isnan(self.value) or rises
        self.seen = step
        if better:
            self.step, self.value, self._since = step, headline.value, 0
        else:
            self._since += 1
        return better

    def enough(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self._since >= self.patience

    def read_log(self, path: Path) -> None:
        """Take up the evaluations of a metrics.jsonl."""
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            if record.get("event") == "eval" and "headline" in record and not record.get("final"):
                value = record["headline"]["value"]
                headline = Headline(record["headline"]["name"], float("nan") if value is None else value)
                self.offer(record["step"], headline._replace(rising=bool(record["headline"]["rising"])))
