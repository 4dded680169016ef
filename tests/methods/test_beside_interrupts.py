"""Networks beside a backbone when a forward is cut short, or when two run at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import logits, tiny_llama, tiny_t5, token_ids

import trimtab

METHODS = {"read": trimtab.READ(size=8, init="drawn"), "ladder": trimtab.Ladder(reduction=4)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_within_a_block_leaves_gradients_as_they_were(name: str, error: type[BaseException]) -> None:
    """torch runs no hook after the first two, and an interactive session goes on."""
    model = tiny_llama().train()
    classes = [type(module) for module in model.modules()]
    adapter = trimtab.attach(model, METHODS[name])
    ids = token_ids()
    whole = logits(model, ids)

    def stop(*_: Any) -> None:
        raise error

    for mode in (True, False):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with torch.set_grad_enabled(mode):
            with pytest.raises(error):
                model(input_ids=ids)
            assert torch.is_grad_enabled() is mode
        handle.remove()
    assert torch.equal(logits(model, ids), whole)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(entry.parameter.grad is not None for entry in adapter.trainable())
    adapter.detach()
    assert [type(module) for module in model.modules()] == classes


def test_an_interrupt_within_a_cross_attention_is_forgotten() -> None:
    model = tiny_t5()
    trimtab.attach(model, METHODS["read"])
    batch = {"input_ids": token_ids(), "labels": token_ids(length=5)}
    with torch.no_grad():
        whole = model(**batch).logits

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.decoder.block[1].layer[1].EncDecAttention.q.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    assert torch.is_grad_enabled()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, whole)
