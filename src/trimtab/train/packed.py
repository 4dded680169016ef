"""Whether a model keeps packed examples apart, found by asking it.

Families differ in what they do with a mask of their own shape and with positions: some take neither, some add their own
distances, some read a window. So before the first step two short examples are packed; the second must not notice a
change in the first, and must get what it gets alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from trimtab.tasks.batches import LayCausal, Part
from trimtab.tasks.encode import Encoded
from trimtab.tasks.ragged import Ragged
from trimtab.train.objective import Objective, eval_mode

# Tokens of the two examples: of unequal lengths, so that one row is the least room for both.
_FIRST, _SECOND = 12, 6


def packing_fault(model: nn.Module, collate: LayCausal, data: Encoded) -> str:
    """Why examples of this model cannot be packed; empty where they can.

    Args:
        model: a causal model, on its device, without or with an adapter.
        collate: makes its tensors.
        data: of the training split.
    """
    if window := _window(model, int(data.ids.lengths.max())):
        return f"some of its layers see {window} tokens back, which a mask of ours would not say"
    words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    first = np.arange(_FIRST) % min(words, 97)
    second = (7 + np.arange(_SECOND)) % min(words, 97)
    other = first.copy()
    other[3] = (other[3] + 1) % min(words, 97)
    objective = Objective(model, chunked=False)
    try:
        with torch.no_grad(), eval_mode(model):
            packed, changed = (
                _logits(objective, collate, [rows, second])[0, _FIRST : _FIRST + _SECOND] for rows in (first, other)
            )
            alone = _logits(objective, collate, [second])[0, :_SECOND]
    except Exception as error:  # families refuse a mask or positions each in its own way
        return f"it does not take them ({type(error).__name__})"
    if not torch.equal(packed, changed):
        return "its attention lets examples of one sequence see each other"
    unit = 2.0**-5 if packed.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if float((packed - alone).abs().max()) > unit * (1.0 + float(alone.abs().max())):
        return "an example gets other logits in company than alone"
    return ""


def _logits(objective: Objective, collate: LayCausal, rows: list[Any]) -> torch.Tensor:
    ids = Ragged.of(rows)
    learned = Ragged(np.ones(len(ids.flat), dtype=bool), ids.starts)
    part: Part = LayCausal(collate.pad_id, _FIRST + _SECOND, True)(
        Encoded(ids, np.arange(len(rows)), learned=learned), list(range(len(rows)))
    )
    device = next(objective.model.parameters()).device
    logits: torch.Tensor = objective.model(**objective.arguments(part.to(device))).logits
    return logits


def _window(model: nn.Module, longest: int) -> int:
    """How far back layers see that see no further, if an example is longer than that; 0 for none."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(window, int) or window <= 0 or longest <= window:
        return 0
    return window if kinds is None or any("sliding" in kind for kind in kinds) else 0
