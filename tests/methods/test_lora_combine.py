"""Weighted sums of LoRAs: exact on weights, plain LoRAs themselves, and refused where there is no such sum."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models_for_tests import logits, tiny_gpt2, tiny_llama, token_ids, train
from torch import Tensor, nn

import trimtab

CONFIGS = {
    "a": trimtab.LoRA(rank=4, targets=("q_proj", "up_proj", "embed_tokens")),
    "b": trimtab.LoRA(rank=3, alpha=5, rslora=True, targets=("q_proj", "v_proj"), rank_pattern={"1.*q_proj": 2}),
    "c": trimtab.LoRA(rank=14, alpha=3, targets=("k_proj", "q_proj"), init="orthogonal"),
}


def model_with(configs: dict[str, trimtab.LoRA]) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A LLaMA with trained adapters, and the update of each by weight name."""
    model = tiny_llama()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = {}
    for name, config in configs.items():
        adapter = trimtab.attach(model, config, name=name)
        train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
        updates[name] = {key: value - base[key] for key, value in adapter.effective_weights()}
    return model, updates


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": -0.5, "c": 2.0}, {"b": 1.0}])
def test_the_sum_is_exact(weights: dict[str, float]) -> None:
    """Each layer's update is the weighted sum of those that have it, and the parts stay as they were."""
    model, updates = model_with(CONFIGS)
    before = {name: copy.deepcopy(a.state_dict()) for name, a in trimtab.adapters(model).items()}
    base = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    mixed = trimtab.combine(model, weights, name="mix")
    assert trimtab.adapters(model)["mix"] is mixed
    found = {name: value - base[name] for name, value in mixed.effective_weights()}
    assert set(found) == {name for given in weights for name in updates[given]}
    for name, update in found.items():
        wanted = sum(w * updates[given].get(name, torch.zeros(())) for given, w in weights.items())
        assert (update - wanted).norm() < 1e-5 * base[name].norm(), name
    for name, state in before.items():
        now = trimtab.adapters(model)[name].state_dict()
        assert all(torch.equal(now.tensors[key], tensor) for key, tensor in state.tensors.items())


def test_ranks_add_up_to_the_layers_size_at_most() -> None:
    """4 + 3 and 4 + 2 for the two q_proj; 14 + 4 + 3 in k_proj's 16 rows would be too many for c twice."""
    model, _ = model_with(CONFIGS)
    mixed = trimtab.combine(model, {"a": 1, "b": 1}, name="mix")
    own = mixed.own()  # type: ignore[attr-defined]
    assert [len(own[f"model.layers.{n}.self_attn.q_proj.lora_A"]) for n in (0, 1)] == [7, 6]
    assert own["model.layers.0.self_attn.v_proj.lora_B"].shape == (16, 3)
    again = trimtab.combine(model, {"mix": 1, "c": 0.5, "a": 1}, name="all")
    assert len(again.own()["model.layers.0.self_attn.q_proj.lora_A"]) == 7 + 14 + 4  # type: ignore[attr-defined]
    last = trimtab.combine(model, {"all": 1, "c": -0.5}, name="last")
    assert len(last.own()["model.layers.0.self_attn.q_proj.lora_A"]) == 32  # type: ignore[attr-defined]
    assert len(last.own()["model.layers.0.self_attn.k_proj.lora_A"]) == 16  # type: ignore[attr-defined]


def test_the_mix_is_a_lora_like_any(tmp_path: Path) -> None:
    """It trains, is saved and read again, and merges once it is alone; alone at weight one it answers as its part."""
    model, _ = model_with({"a": CONFIGS["a"], "b": CONFIGS["b"]})
    ids = token_ids()
    second = logits(model, ids)
    mixed = trimtab.combine(model, {"b": 1.0}, name="copy")
    assert torch.allclose(logits(model, ids), second, atol=1e-5)
    mixed.detach()
    mixed = trimtab.combine(model, {"a": 0.5, "b": 0.5}, name="mix")
    before = logits(model, ids)
    train(model, mixed, torch.optim.AdamW(mixed.parameter_groups(lr=1e-2)), range(1, 3))
    now = logits(model, ids)
    assert not torch.allclose(before, now, atol=1e-3)
    mixed.save(tmp_path)
    other = tiny_llama()
    trimtab.load_adapter(other, tmp_path)
    assert torch.allclose(logits(other, ids), now, atol=1e-5)
    for name in ("a", "b"):
        trimtab.adapters(model)[name].detach()
    mixed.merge()
    assert torch.allclose(logits(model, ids), now, atol=1e-5)


def test_what_has_no_sum_is_refused() -> None:
    """Unknown, taken, empty and not finite; DoRA, and methods that are no LoRA. What is active stays so."""
    model, _ = model_with({"a": CONFIGS["a"], "dora": trimtab.LoRA(rank=2, dora=True)})
    now, ids = logits(model, token_ids()), token_ids()
    for weights, name, message in [
        ({"x": 1.0}, "mix", r"no adapter 'x'; it has 'a', 'dora'"),
        ({"a": 1.0}, "a", "already has an adapter 'a'"),
        ({}, "mix", "at least one"),
        ({"a": float("nan")}, "mix", "not finite"),
        ({"a": 0.5, "dora": 0.5}, "mix", "'dora' is a DoRA"),
    ]:
        with pytest.raises(trimtab.ConfigError, match=message):
            trimtab.combine(model, weights, name=name)
    assert list(trimtab.adapters(model)) == ["a", "dora"] and torch.equal(logits(model, ids), now)
    full = tiny_gpt2()
    trimtab.attach(full, trimtab.Full())
    with pytest.raises(trimtab.ConfigError, match="method full; only LoRAs"):
        trimtab.combine(full, {"default": 1.0}, name="mix")
    warm = tiny_llama()
    trimtab.attach(warm, trimtab.LoRA(rank=2, warm_start_steps=2))
    with pytest.raises(trimtab.ConfigError, match="warm start"):
        trimtab.combine(warm, {"default": 1.0}, name="mix")
    writing = tiny_llama()
    trimtab.attach(writing, trimtab.ReLoRA(rank=2, restart_every=2))
    with pytest.raises(trimtab.ConfigError, match="changes base tensors"):
        trimtab.combine(writing, {"default": 1.0}, name="mix")
