"""Networks beside a backbone when a forward is cut short, or when two run at once."""

from __future__ import annotations

import contextlib
import threading
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


@pytest.mark.parametrize("name", METHODS)
def test_a_second_thread_is_refused_while_a_forward_runs_and_let_in_then(name: str) -> None:
    """The first one's answer stays right; a thread that ended within a forward keeps nobody out."""
    model, ids = tiny_llama().eval(), token_ids()
    trimtab.attach(model, METHODS[name])
    whole = model(input_ids=ids, use_cache=False).logits
    begun, go_on = threading.Event(), threading.Event()
    answers: list[Any] = []

    def wait(*_: Any) -> None:
        begun.set()
        go_on.wait()

    def run() -> None:
        with contextlib.suppress(ZeroDivisionError):
            answers.append(model(input_ids=ids, use_cache=False).logits)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    other = threading.Thread(target=run)
    other.start()
    begun.wait()
    try:
        with pytest.raises(trimtab.ConfigError, match=r"another thread.*copy\.deepcopy"):
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        go_on.set()
        other.join()
    assert torch.equal(answers.pop(), whole)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)

    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    other = threading.Thread(target=run)
    other.start()
    other.join()
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, use_cache=False)
    handle.remove()
    other = threading.Thread(target=run)
    other.start()
    other.join()
    assert torch.equal(answers.pop(), whole)
    assert not answers and torch.equal(model(input_ids=ids, use_cache=False).logits, whole)


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = tiny_llama()
    trimtab.attach(model, METHODS["read"])
    block = model.model.layers[0]
    replica = block._replicate_for_data_parallel()
    with pytest.raises(trimtab.ConfigError, match="use DDP"):
        replica(torch.zeros(1, 2, 32))
    assert torch.is_grad_enabled()
    assert not model(input_ids=token_ids()).logits.isnan().any()
