"""The end of a warm start: the base lets go of its gradients and state, everything else keeps its bits."""

from __future__ import annotations

import copy

import pytest
import torch
from models_for_tests import logits, loss_of, tiny_llama, token_ids, train

import trimtab
from trimtab.nn.weights import join

W = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [trimtab.LoRA, trimtab.ReLoRA])
def test_the_switch_empties_the_base_and_keeps_the_rest(kind: type[trimtab.LoRA], dtype: torch.dtype) -> None:
    """Groups are rewritten in place; embeddings, norms and head keep values and moments byte for byte."""
    extra = {"restart_every": 3} if kind is trimtab.ReLoRA else {}
    model = tiny_llama()
    config = kind(rank=4, warm_start_steps=W, train_also=("embeddings", "norms", "head"), **extra)
    adapter = trimtab.attach(model, config, dtype=dtype)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2, weight_decay=0.1))
    assert not optimizer.param_groups[0]["params"] and len(optimizer.param_groups[4]["params"]) == 14
    reports = train(model, adapter, optimizer, range(1, W))
    assert not any(report.trainable_changed for report in reports)
    loss_of(model, token_ids(seed=W)).backward()
    optimizer.step()
    groups = [group["params"] for group in optimizer.param_groups]
    wide = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
    before = logits(model, token_ids())

    report = adapter.after_step(W, optimizer)

    assert report.trainable_changed and report.events[0]["event"] == "switch"
    assert all(group["params"] is params for group, params in zip(optimizer.param_groups, groups, strict=True))
    assert [len(params) for params in groups] == [28, 1, 5, 1, 0]
    assert [len(group["names"]) for group in optimizer.param_groups] == [28, 1, 5, 1, 0]
    for params in groups[1:4]:
        for parameter in params:
            state = optimizer.state[parameter]
            assert all(torch.equal(state[key], moments[id(parameter)][key]) for key in state)
    assert len(optimizer.state) == 7
    trained = {entry.name for entry in adapter.trainable()}
    for name, parameter in model.named_parameters():
        if name in wide and name in trained:
            assert torch.equal(parameter, wide[name])
        elif name in wide:
            assert parameter.dtype == dtype and parameter.grad is None and not parameter.requires_grad
    effective = dict(adapter.effective_weights())
    assert len(effective) == 14
    for name, value in effective.items():
        assert (value - wide[name]).abs().max() <= (0 if dtype == torch.float32 else 2.0**-23) * wide[name].abs().max()
    assert torch.equal(logits(model, token_ids()), before)
    train(model, adapter, optimizer, range(W + 1, W + 3))
    assert all(layer.lora_B.detach().any() for layer in adapter.layers.values())  # type: ignore[attr-defined]


def test_what_is_neither_target_nor_trained_beside_is_frozen_with_its_carry() -> None:
    """With q_proj alone as target, other linears and the head lose nothing at the switch: value = W + carry."""
    model = tiny_llama()
    config = trimtab.LoRA(rank=4, targets=["q_proj"], warm_start_steps=2)
    adapter = trimtab.attach(model, config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(model, adapter, optimizer, range(1, 2))
    loss_of(model, token_ids()).backward()
    optimizer.step()
    wide = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter.after_step(2, optimizer)
    tensors = adapter.state_dict().tensors
    named = dict(model.named_parameters())
    for name, value in wide.items():
        exact = join(named[name], tensors[f"carry:{name}"])
        assert (exact - value).abs().max() <= 2.0**-23 * value.abs().max(), name
    assert [group["group"] for group in optimizer.param_groups if group["params"]] == ["adapter"]


def test_an_optimizer_that_was_not_built_from_the_groups_is_refused() -> None:
    """The switch has to rewrite the groups, so it needs to know them."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, warm_start_steps=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(trimtab.ConfigError, match="parameter_groups"):
        adapter.after_step(1, optimizer)


def test_the_end_of_the_warm_start_cannot_be_left_out() -> None:
    """Passing over step W is an error, not a run that silently stays full-rank."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, warm_start_steps=3))
    with pytest.raises(ValueError, match="warm start ends after step 3"):
        adapter.after_step(4, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)))


def test_restarts_lie_after_the_warm_start_and_leave_no_short_cycle() -> None:
    """W + j c < T, never T itself, and a last cycle shorter than the re-warm is not opened."""
    config = trimtab.ReLoRA(rank=4, warm_start_steps=50, restart_every=100)
    assert config.restarts(450) == (150, 250, 350)
    assert config.restarts(451) == (150, 250, 350, 450)
    assert config.restarts(451, rewarm_steps=10) == (150, 250, 350)
    assert config.restarts(460, rewarm_steps=10) == (150, 250, 350, 450)


def test_a_planned_length_leaves_out_the_restart_at_the_end() -> None:
    """restarts(T) is the one list: after_step follows it, at T nothing restarts."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.ReLoRA(rank=4, restart_every=3))
    assert adapter.restarts(9) == (3, 6)
    reports = train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 10))
    assert [step for step, report in enumerate(reports, 1) if report.events] == [3, 6]
