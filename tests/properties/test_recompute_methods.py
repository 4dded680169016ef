"""Selective recomputation with every method: the same gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import loss_of, token_ids
from test_checkpointing import CHECKPOINTED, FAMILIES, attached
from torch import Tensor, nn

from trimtab.nn import recompute
from trimtab.nn.recompute import recomputing


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of these models are smaller than what is worth it."""
    monkeypatch.setattr(recompute, "_SMALL", 0)


CASES = [(method, "llama") for method in CHECKPOINTED] + [
    (method, family) for family in FAMILIES[1:] for method in ("relora",)
]


def without_dropout(model: nn.Module) -> None:
    """Of the model; that of the adapters is theirs, and drawn alike."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(("method", "family"), CASES)
def test_gradients_are_the_same_bit_for_bit(method: str, family: str) -> None:
    found: list[dict[str, Tensor]] = []
    for within in (False, True):
        model, _ = attached(method, family)
        without_dropout(model)
        torch.manual_seed(7)
        if within:
            with recomputing(model):
                loss = loss_of(model, token_ids())
        else:
            loss = loss_of(model, token_ids())
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())
