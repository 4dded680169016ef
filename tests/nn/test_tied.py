"""Parting a tied head from its embedding: the function stays, the config says so, and it can be taken back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from models_for_tests import logits, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5, token_ids, train
from transformers import GPT2LMHeadModel

import trimtab
from trimtab.methods.lora import LoRAAdapter


def test_untie_and_back() -> None:
    """Two equal weights and a rewritten config; tying again gives the one tensor back."""
    model, ids = tiny_gpt2(), token_ids()
    before, weight = logits(model, ids), model.transformer.wte.weight
    tie_again = trimtab.untie(model)
    assert model.lm_head.weight is not weight and torch.equal(model.lm_head.weight, weight)
    assert model.transformer.wte.weight is weight
    assert model.config.tie_word_embeddings is False and torch.equal(logits(model, ids), before)
    tie_again()
    assert model.lm_head.weight is weight and model.config.tie_word_embeddings is True


def test_a_model_that_is_not_tied_is_left_alone() -> None:
    """Nothing to part: an untied head, and a model of which no library knows the head."""
    for model in (tiny_llama(), tiny_mlp()):
        before = copy.deepcopy(model.state_dict())
        trimtab.untie(model)()
        assert list(model.state_dict()) == list(before)


def test_more_than_two_users_are_refused() -> None:
    """T5's one table is read by four modules."""
    model = tiny_t5()
    with pytest.raises(trimtab.ConfigError, match=r"shared.weight = .* is one weight"):
        trimtab.untie(model)
    assert model.lm_head.weight is model.shared.weight


def test_a_model_that_reads_the_flag_is_refused() -> None:
    """Where the forward depends on the config's flag, rewriting it would change the function."""

    class Reader(GPT2LMHeadModel):
        def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            assert self.config.tie_word_embeddings is not None
            return super().forward(*args, **kwargs)  # type: ignore[arg-type]

    model = Reader(tiny_gpt2().config)
    with pytest.raises(trimtab.ConfigError, match=r"Reader.forward reads config.tie_word_embeddings"):
        trimtab.untie(model)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_a_tied_target_is_refused_or_parted(target: str, tmp_path: Path) -> None:
    """Without untie an error names the way out; with it the other side stays, also in the merged model's files."""
    model, ids = tiny_gpt2(), token_ids()
    with pytest.raises(trimtab.TargetError, match=r"tied .*trimtab.untie\(model\)"):
        trimtab.attach(model, trimtab.LoRA(rank=4, targets=[target]))
    base = model.transformer.wte.weight.detach().clone()
    before = logits(model, ids)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=[target], untie=True))
    assert torch.equal(logits(model, ids), before)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 5))
    now = logits(model, ids)
    assert not torch.allclose(now, before, atol=1e-3)
    adapter.merge()
    merged, other = model.transformer.wte.weight, model.lm_head.weight
    merged, other = (merged, other) if target == "wte" else (other, merged)
    assert torch.equal(other, base) and not torch.equal(merged, base)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.allclose(logits(again, ids), now, atol=1e-5)


def test_detach_ties_again() -> None:
    """After detach the model is the one that came: one tensor, and the config as it was; also after a failed attach."""
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=["wte"], untie=True))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 3))
    with pytest.raises(trimtab.ConfigError, match="untie=True"):
        trimtab.attach(model, trimtab.LoRA(rank=2), name="second")
    adapter.detach()
    with pytest.raises(trimtab.ConfigError, match="rank = 33"):
        trimtab.attach(model, trimtab.LoRA(rank=33, untie=True))
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.tie_word_embeddings
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_tied_again_by_itself(how: str) -> None:
    """A parted model can be copied and stored, and a detach concerns the model that it is called on alone."""
    model, ids = tiny_gpt2(), token_ids()
    base = logits(model, ids)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=["wte"], untie=True))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 3))
    now = logits(model, ids)
    again = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, ids), now)
    copied = trimtab.adapters(again)["default"]
    assert isinstance(copied, LoRAAdapter) and copied.model is again and copied.parted is not None
    copied.parted.tie(copied.model)  # the last act of a detach
    assert again.lm_head.weight is again.transformer.wte.weight and again.config.tie_word_embeddings
    assert torch.equal(logits(model, ids), now) and not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.transformer.wte.weight
    adapter.detach()
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(logits(model, ids), base)


def test_what_ties_again_can_be_copied_with_its_model() -> None:
    """Also what `trimtab.untie` returns."""
    model = tiny_gpt2()
    other, tie_other = copy.deepcopy((model, trimtab.untie(model)))
    tie_other()
    assert other.lm_head.weight is other.transformer.wte.weight
    assert model.lm_head.weight is not model.transformer.wte.weight
