"""Prefix tuning: what lies in the cache, its projection, and activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import MODELS, VOCAB, forward, logits, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, FalconConfig, FalconForCausalLM

import trimtab
from trimtab.methods.prefix import PrefixTuningAdapter


def attached(model: torch.nn.Module, **settings: Any) -> PrefixTuningAdapter:
    adapter = trimtab.attach(model, trimtab.PrefixTuning(**settings))
    assert isinstance(adapter, PrefixTuningAdapter)
    return adapter


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_keys_of_three_tokens_are_the_three_tokens(heads: int) -> None:
    """A prefix made of a prompt's own keys and values answers as that prompt does, whatever the grouping of heads."""
    model, ids = tiny_llama(num_key_value_heads=heads).eval(), token_ids()
    words = torch.tensor([5, 3, 8])
    expected = logits(model, torch.cat((words.expand(3, -1), ids), dim=1))[:, 3:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=words[None], past_key_values=cache, use_cache=True)
    adapter = attached(model, length=3)
    (prefix,) = adapter.own().values()
    assert prefix.shape == (3, 2 * 2 * heads * 8)
    states = torch.stack([t[0] for layer in cache.layers for t in (layer.keys, layer.values)])  # (2 L, heads, p, width)
    with torch.no_grad():
        prefix.copy_(states.permute(2, 0, 1, 3).reshape(3, -1))
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)


def test_a_head_width_of_its_own() -> None:
    """head_dim apart from hidden_size / heads, in LLaMA and in T5."""
    model = tiny_llama(head_dim=12)
    assert attached(model, length=3).prompt().shape == (3, 2 * 2 * 2 * 12)
    assert logits(model, token_ids()).isfinite().all()
    config = tiny_t5().config
    config.d_kv = 12
    wide = type(tiny_t5())(config)
    assert attached(wide, length=3).prompt().shape == (3, 2 * 2 * 4 * 12)
    assert logits(wide, token_ids()).isfinite().all()


def test_a_decoder_with_more_layers_than_its_encoder() -> None:
    """BART with one encoder and three decoder layers: a pair for each of the three, each read by one."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 3, "vocab_size": VOCAB, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "dropout": 0.0}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=64))
    adapter = attached(model, length=3)
    assert adapter.prompt().shape == (3, 2 * 3 * 16) and sorted(adapter.geometry.pairs) == [0, 1, 2]
    ids = token_ids()
    model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.square().mean().backward()
    (prefix,) = adapter.own().values()
    assert prefix.grad is not None and (prefix.grad.abs().sum(0) > 0).all()


def test_the_projection_is_pefts_network() -> None:
    """Embeddings, then tanh between two linear layers; the parts' shapes and ranges of torch's own draw."""
    adapter = attached(tiny_gpt2(), length=4, projection=True, projection_size=9)
    parts = {name.rpartition(".")[2]: part for name, part in adapter.own().items()}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {
        "prefix_embedding": (4, 32),
        "prefix_middle": (9, 32),
        "prefix_middle_bias": (9,),
        "prefix_last": (128, 9),
        "prefix_last_bias": (128,),
    }
    network = torch.nn.Sequential(torch.nn.Linear(32, 9), torch.nn.Tanh(), torch.nn.Linear(9, 128))
    for mine, yours in zip(list(parts.values())[1:], network.parameters(), strict=True):
        assert mine.abs().max() <= (1 / 32**0.5 if mine.shape[0] == 9 else 1 / 3)
        assert mine.std().item() == pytest.approx(yours.std().item(), rel=0.5)
        yours.data.copy_(mine.data)
    assert torch.allclose(adapter.prompt(), network(parts["prefix_embedding"]), atol=1e-6)
    forward(adapter.model, token_ids()).square().mean().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts.values())


@pytest.mark.parametrize("projection", [False, True])
def test_zero_is_zero(projection: bool) -> None:
    """init=zero: all keys and values are 0, as PEFT's init_weights="zero"."""
    assert (attached(tiny_llama(), length=3, projection=projection, init="zero").prompt() == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_checkpointing_is_refused_before_and_after(family: str) -> None:
    """At attach; when it is switched on later; and not in evaluation, where nothing is computed twice."""
    model = MODELS[family]().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(trimtab.ConfigError, match="does not go with activation checkpointing"):
        attached(model, length=3)
    assert all(p.requires_grad for p in model.parameters())
    model.gradient_checkpointing_disable()
    attached(model, length=3)
    out = logits(model, token_ids())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(trimtab.ConfigError, match="prompt tuning"):
        forward(model, token_ids())
    assert torch.equal(logits(model, token_ids()), out)


def test_torchs_checkpoint_wrapper_is_refused_too() -> None:
    """Blocks wrapped by torch.distributed's wrapper would fill the cache twice."""
    model = tiny_llama().train()
    attached(model, length=3)
    forward(model, token_ids())
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    with pytest.raises(trimtab.ConfigError, match="activation checkpointing"):
        forward(model, token_ids())


def test_blocks_that_pass_the_prefix_by_are_noticed() -> None:
    """Whatever drops the past keys and values, a prefix without effect is an error."""
    model = tiny_llama()
    attached(model, length=3)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "past_key_values": None, "attention_mask": None}),
            with_kwargs=True,
        )
    with pytest.raises(trimtab.ConfigError, match="the prefix had no effect"):
        logits(model, token_ids())


def test_who_wants_no_cache_gets_none() -> None:
    """use_cache=False: no cache in the output; True: one that holds prefix and batch."""
    model = tiny_llama().eval()
    attached(model, length=3)
    with torch.no_grad():
        assert model(input_ids=token_ids(), use_cache=False).past_key_values is None
        assert model(input_ids=token_ids(), use_cache=True).past_key_values.get_seq_length() == 15


def test_layers_of_another_kind_are_refused() -> None:
    """One head of keys for all, and a projection of another width than the config says."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    with pytest.raises(trimtab.ConfigError, match="one shape"):
        attached(FalconForCausalLM(FalconConfig(**sizes, multi_query=True)), length=3)
    model = tiny_llama()
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(32, 20, bias=False)
    with pytest.raises(trimtab.ConfigError, match=r"layers.1.self_attn.k_proj makes keys of 20 numbers"):
        attached(model, length=3)


def test_an_idle_setting_is_reported() -> None:
    """A projection's size without a projection."""
    assert trimtab.PrefixTuning(projection_size=8).idle_settings() == {"projection_size": "projection is false"}
    assert not trimtab.PrefixTuning(projection=True, projection_size=8).idle_settings()
