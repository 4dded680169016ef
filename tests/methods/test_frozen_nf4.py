"""Bottlenecks, prompts and prefixes on a base of 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_llama, token_ids

import trimtab

CONFIGS = {
    "bottleneck": trimtab.Bottleneck(size=4),
    "prompt": trimtab.PromptTuning(length=4),
    "prefix": trimtab.PrefixTuning(length=4),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_it_learns_saves_and_leaves_on_four_bits(family: str, config: str, tmp_path: Path) -> None:
    """The loss falls, every parameter learns, a folder loads onto another copy, detach gives the 4-bit base back."""
    model = MODELS[family]().to(torch.bfloat16)
    trimtab.quantize(model, "nf4")
    before, ids = copy.deepcopy(model.state_dict()), token_ids()
    other, base = copy.deepcopy(model), logits(model, ids)
    adapter = trimtab.attach(model, CONFIGS[config])
    assert torch.equal(logits(model, ids), base) == (config == "bottleneck")
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=3e-2))
    start = {e.name: e.parameter.detach().clone() for e in adapter.trainable()}
    losses = []
    for _ in range(10):
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(losses[5:]) < losses[0]
    assert all(e.parameter.dtype == torch.float32 for e in adapter.trainable())
    assert all(not torch.equal(e.parameter, start[e.name]) for e in adapter.trainable())
    adapter.save(tmp_path)
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    adapter.detach()
    assert torch.equal(logits(model, ids), base)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_prefix_follows_a_cast_of_its_model(base: str, projection: bool) -> None:
    """model.to(dtype) after attach: keys and values come in what the attention computes in, both ways."""
    model = tiny_llama()
    if base == "nf4":
        trimtab.quantize(model, "nf4")
    adapter = trimtab.attach(model, trimtab.PrefixTuning(length=3, projection=projection))
    before = logits(model, token_ids())
    model.to(torch.bfloat16)
    assert torch.allclose(logits(model, token_ids()).float(), before, atol=0.1)
    model.to(torch.float64)
    assert logits(model, token_ids()).dtype == torch.float64
    assert adapter.trainable()
