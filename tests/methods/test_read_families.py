"""READ on every family of Transformer: found, started exactly, trained, saved, taken off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import DECODERS, ENCODERS, FAMILIES, PAIRS, batch_for
from torch import Tensor, nn
from transformers import BertForMaskedLM

import trimtab

READ = trimtab.READ


def config_for(family: str, **settings: Any) -> trimtab.READ:
    named = {"blocks": ("albert_layer_groups",)} if family == "albert" else {}
    return READ(size=8, **named, **settings)


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def trained(model: nn.Module, adapter: trimtab.Adapter, family: str, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=2e-2))
    for step in range(1, steps + 1):
        model(**batch_for(family, seed=step)).loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_life_on_every_family(family: str, cell: str, tmp_path: Path) -> None:
    """Starts as the backbone to the bit, trains all of its tensors, is read back from its file, and leaves no trace."""
    model, batch = FAMILIES[family](), batch_for(family)
    before, first = copy.deepcopy(model.state_dict()), answer(model, batch)
    modules = [type(module) for module in model.modules()]
    config = config_for(family, cell=cell, aggregate="mean" if cell == "none" else "last")
    adapter = trimtab.attach(model, config, keep_base="host")
    assert torch.equal(answer(model, batch), first)
    start = {e.name: e.parameter.detach().clone() for e in adapter.trainable()}
    trained(model, adapter, family)
    after = answer(model, batch)
    assert not torch.allclose(after, first, atol=1e-4)
    assert all(not torch.equal(e.parameter, start[e.name]) for e in adapter.trainable())

    adapter.save(tmp_path)
    fresh = FAMILIES[family]()
    trimtab.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh, batch), after, rtol=1e-5, atol=1e-5)

    with adapter.disabled():
        assert torch.equal(answer(model, batch), first)
    assert torch.equal(answer(model, batch), after)
    with pytest.raises(trimtab.CannotMerge, match="recurrent network"):
        adapter.merge()
    adapter.detach()
    assert torch.equal(answer(model, batch), first)
    left = model.state_dict()
    assert list(left) == list(before) and all(torch.equal(left[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_backbone_is_kept_for_a_backward(family: str) -> None:
    """No saved tensor is of a backbone's parameter, and none is as wide as its feed-forward network."""
    model, batch = FAMILIES[family]().train(), batch_for(family)
    adapter = trimtab.attach(model, config_for(family))
    inside = {p.data_ptr() for n, p in model.named_parameters() if not p.requires_grad and ".0." in n}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert kept and not any(tensor.data_ptr() in inside for tensor in kept)
    assert not any(tensor.shape[-1:] == (48,) for tensor in kept)
    loss.backward()
    assert all(entry.parameter.grad is not None for entry in adapter.trainable())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
def test_generation_with_and_without_cache(family: str, beams: int) -> None:
    """The same tokens either way, with prompts of several lengths, and others than the backbone's."""
    model = FAMILIES[family]()
    batch = {name: value for name, value in batch_for(family).items() if name != "labels"}
    if family != "whisper":
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, slice(None, 4) if family in DECODERS else slice(-4, None)] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    base = model.generate(**batch, **settings)
    adapter = trimtab.attach(model, config_for(family, init="drawn", scale=3.0))
    cached = model.generate(**batch, **settings, use_cache=True)
    assert not torch.equal(cached, base)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    with adapter.disabled():
        assert torch.equal(model.generate(**batch, **settings), base)


def test_what_stands_beside_the_base_model_trains_whatever_its_name_but_not_in_a_language_model() -> None:
    model: Any = ENCODERS["bert"]()
    model.mixing = nn.Linear(32, 32)
    trained = {entry.name for entry in trimtab.attach(model, READ(size=8)).trainable()}
    assert {"mixing.weight", "mixing.bias", "classifier.weight"} <= trained
    torch.manual_seed(0)
    words = BertForMaskedLM(model.config)
    assert all(entry.group == "adapter" for entry in trimtab.attach(words, READ(size=8)).trainable())


@pytest.mark.parametrize("family", ENCODERS)
def test_the_head_of_a_task_trains_unasked(family: str) -> None:
    model = FAMILIES[family]()
    names = {entry.name for entry in trimtab.attach(model, config_for(family)).trainable() if entry.group == "head"}
    base = {id(parameter) for parameter in model.base_model.parameters()}
    beside = {name for name, parameter in model.named_parameters() if id(parameter) not in base}
    assert beside and beside <= names
    model = FAMILIES[family]()
    assert all(e.group == "adapter" for e in trimtab.attach(model, config_for(family, train_also=())).trainable())
