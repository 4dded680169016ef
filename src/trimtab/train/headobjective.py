"""The loss of a model with a head: of a class or a value for each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import ConfigError
from trimtab.tasks.batches import Part
from trimtab.train.objective import eval_mode


class HeadObjective:
    """The sum of the losses of a batch's examples.

    Args:
        model: gives `logits` (n, classes), or (n, 1) for values.
        classes: how many classes there are; 0 for values, whose loss is the squared error.
        order: of a head that numbers its classes in another way: for each class of the task, its number in the head.
    """

    def __init__(self, model: nn.Module, classes: int, order: Sequence[int] | None = None) -> None:
        self.model, self.classes, self._order = model, classes, order

    def __call__(self, batch: Part) -> Tensor:
        """A scalar in fp32: cross entropies in nats, or squared errors."""
        logits = self.logits(batch)
        if self.classes:
            return functional.cross_entropy(logits, batch.labels.long(), reduction="sum")
        return functional.mse_loss(logits.squeeze(-1), batch.labels.float(), reduction="sum")

    def logits(self, batch: Part) -> Tensor:
        """(n, classes) or (n, 1), in fp32."""
        found: Tensor = self.model(**self.arguments(batch)).logits.float()
        return found if self._order is None else found[:, self._order]

    def arguments(self, batch: Part) -> dict[str, Any]:
        """What the model is called with."""
        given = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
        return {"input_ids": batch.input_ids, **{name: value for name, value in given.items() if value is not None}}

    def check(self, batch: Part) -> None:
        """Raise ConfigError if the model's logits are not one row an example, of as many as there are classes."""
        with eval_mode(self.model), torch.no_grad():
            shape = tuple(self.logits(batch).shape)
        wanted = (batch.input_ids.shape[0], self.classes or 1)
        if shape != wanted:
            raise ConfigError(f"model.head: the logits have the shape {shape}, and the task needs {wanted}")
