"""Whether a batch's labels are told from positions that the cache keeps.

Positions without a token come back as zeros, while the model itself computes something there. A label that is predicted
from one therefore has another loss than without the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.train.hidden.examples import IGNORED_LABEL, Examples, Side

#: Losses of transformers: whether they predict a label from the position before it.
_SHIFTS = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False, "ForTokenClassification": False}
#: Kinds of models, as their classes are called, that no library shifts the labels of.
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")


def check_labels(model: nn.Module, labels: Any, examples: Examples, sides: Sequence[Side]) -> str:
    """Whether labels that count are predicted from positions with a token.

    Args:
        model: that makes the loss.
        labels: (B, S) for the positions of the last stack, -100 where they do not count; anything else passes.
        examples: of the batch.
        sides: what each stack is.

    Returns:
        A caution where that hangs on whether the model shifts the labels, and nothing tells it; else nothing.

    Raises:
        ConfigError: they are not.
    """
    side: Side = "decoder" if "decoder" in sides else "only"
    mask = examples.tokens[sides.index(side)].mask if side in sides else None
    if mask is None or not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != mask.shape:
        return ""
    counted = labels.detach().cpu() != IGNORED_LABEL
    name = "attention_mask" if side == "only" else "decoder_attention_mask"
    here = counted & ~mask
    before = torch.zeros_like(here)
    before[:, 1:] = counted[:, 1:] & ~mask[:, :-1]
    shifts = _shifts(model) if side == "only" else False
    wrong = here & before if shifts is None else before if shifts else here
    if len(at := wrong.nonzero()):
        row, place = at[0].tolist()
        told = (
            f"predicted from position {place - 1}, which has no token"
            if shifts and bool(mask[row, place])
            else "at a position without a token"
        )
        raise ConfigError(
            f"labels: the label at position {place} of row {row} counts and is {told} by the {name}; the cache keeps "
            f"nothing there, so the loss would be another one; set that label to {IGNORED_LABEL} (with padding on the "
            "left, that of the first token too, where the model predicts the next token)"
        )
    if shifts is not None or not len(at := (here | before).nonzero()):
        return ""
    row, place = at[0].tolist()
    return (
        f"labels: the label at position {place} of row {row} counts, and it or the position before it has no token by "
        f"the {name}; whether {type(model).__name__} predicts it from there is not known, and if so the loss is "
        f"another one than without the cache; set that label to {IGNORED_LABEL}"
    )


def _shifts(model: nn.Module) -> bool | None:
    """Whether the model predicts each label from the position before it; None where that cannot be known."""
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return _SHIFTS.get(getattr(getattr(model, "loss_function", None), "__name__", ""))
    return False if any(kind in type(model).__name__ for kind in _UNSHIFTED) else None
