"""BitFit: what trains, models without biases, merging, and its files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama, token_ids, train
from torch import nn

import trimtab
from trimtab.methods.bitfit import BitFitAdapter

WITH = ("gpt2", "bert", "mlp", "encoder")
WITHOUT = ("llama", "t5")


def trained(model: nn.Module, lr: float = 0.05, **settings: Any) -> BitFitAdapter:
    adapter = trimtab.attach(model, trimtab.BitFit(**settings))
    assert isinstance(adapter, BitFitAdapter)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=lr)), range(1, 5))
    return adapter


@pytest.mark.parametrize("family", WITH)
def test_all_biases_train_and_nothing_else(family: str) -> None:
    """After training exactly the vectors called bias have changed, each of them."""
    model = MODELS[family]()
    before = copy.deepcopy(model.state_dict())
    adapter = trained(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    biases = {name for name in before if name.endswith("bias")}
    # A bias of the keys shifts all of a query's scores alike, so the gradient is rounding alone.
    assert changed | {name for name in biases if ".key." in name} == biases
    assert {entry.name for entry in adapter.trainable()} == biases
    adapter.merge()


def test_bert_trains_a_thousandth() -> None:
    """On BERT-base's shape the biases are 0.09 % of the model, as in the paper."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    share = sum(e.parameter.numel() for e in trimtab.attach(model, trimtab.BitFit()).trainable())
    assert share / sum(p.numel() for p in model.parameters()) == pytest.approx(0.0009, abs=0.0001)


def test_a_subset_by_endings() -> None:
    """The paper's smaller set, the queries' and the widening layer's; and the head beside it; and torch's own names."""
    adapter = trained(tiny_bert(), biases=("query", "intermediate.dense.bias"), train_also=("head",))
    names = {entry.name.removeprefix("bert.encoder.layer.") for entry in adapter.trainable()}
    body = {f"{i}.{leaf}.bias" for i in (0, 1) for leaf in ("attention.self.query", "intermediate.dense")}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert names == body | head
    adapter = trained(tiny_encoder(), biases=("in_proj_bias",))
    assert len(adapter.trainable()) == 2


def test_what_does_not_exist_is_named() -> None:
    """No biases, unknown endings, an empty list: the way out is named and the model stays as it was."""
    for model, settings, message in [
        (tiny_llama(), {}, "LlamaForCausalLM has no biases to train; add_bias=True"),
        (tiny_llama(), {"biases": ("q_proj",)}, "'q_proj' matches no bias; LlamaForCausalLM has none; add_bias=True"),
        (tiny_bert(), {"biases": ("qery",)}, "'qery' matches no bias; the closest names are query"),
        (tiny_bert(), {"biases": ()}, "empty list"),
        (tiny_llama(), {"biases": ("norm",), "add_bias": True}, "'norm' matches no bias"),
    ]:
        with pytest.raises(trimtab.TargetError, match=message):
            trimtab.attach(model, trimtab.BitFit(**settings))
        assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())
    assert trimtab.BitFit(seed=3).idle_settings().keys() == {"seed"} and not trimtab.BitFit().idle_settings()


@pytest.mark.parametrize("family", WITHOUT)
def test_added_biases_start_at_zero_train_and_go(family: str) -> None:
    """Each linear of the blocks gets one; the base is left alone, so detach needs no copy of it."""
    model = MODELS[family]()
    before, base = copy.deepcopy(model.state_dict()), logits(model, token_ids())
    adapter = trimtab.attach(model, trimtab.BitFit(add_bias=True))
    assert isinstance(adapter, BitFitAdapter)
    assert torch.equal(logits(model, token_ids()), base)
    assert {type(e.parameter) for e in adapter.trainable()} == {nn.Parameter}
    assert all(e.name.endswith(".added_bias") and not e.parameter.any() for e in adapter.trainable())
    assert len(adapter.layers) == {"llama": 14, "t5": 32}[family]
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=0.05)), range(1, 5))
    assert not torch.allclose(logits(model, token_ids()), base, atol=1e-2)
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_added_biases_are_as_real_ones() -> None:
    """A LLaMA whose config has biases computes what one with added biases of the same values does."""
    model = tiny_llama()
    adapter = trained(model, add_bias=True)
    real = tiny_llama(attention_bias=True, mlp_bias=True)
    state = dict(model.state_dict())
    state = {name.replace("added_bias", "bias"): value for name, value in state.items()}
    real.load_state_dict(state)
    assert torch.allclose(logits(real, token_ids()), logits(model, token_ids()), atol=1e-6)
    assert len(adapter.layers) == 14


@pytest.mark.parametrize("family", WITHOUT)
def test_added_biases_train_in_bf16_and_survive_a_pickle(family: str) -> None:
    """Held in fp32, computed in bf16; a pickled copy answers the same."""
    model = MODELS[family]()
    adapter = trimtab.attach(model, trimtab.BitFit(add_bias=True), dtype=torch.bfloat16)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=0.05)), range(1, 5))
    out = logits(model, token_ids())
    assert out.isfinite().all() and {e.parameter.dtype for e in adapter.trainable()} == {torch.float32}
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), token_ids()), out)


def test_added_biases_do_not_merge_silently() -> None:
    """A checkpoint of the model would lose them, so merge refuses, says why, and leaves the adapter at work."""
    model = tiny_llama()
    adapter = trained(model, add_bias=True)
    out = logits(model, token_ids())
    with pytest.raises(trimtab.CannotMerge, match=r"would lose them.*save\(\)"):
        adapter.merge()
    with pytest.raises(trimtab.CannotMerge):
        adapter.merged_tensor("lm_head.weight", model.lm_head.weight)
    assert torch.equal(logits(model, token_ids()), out)


def test_some_of_the_layers_are_given_a_bias() -> None:
    """With endings, the layers they name alone; where a layer has a bias, that one trains."""
    adapter = trained(tiny_llama(), biases=("q_proj", "down_proj"), add_bias=True)
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj", "down_proj"}
    adapter = trained(tiny_gpt2(), add_bias=True)
    assert not adapter.layers and adapter.trainable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", WITH)
def test_merged_is_the_same_function_and_comes_back(family: str, dtype: torch.dtype) -> None:
    """merge() rounds the biases once; unmerge, with a kept base, trains on; detach restores the bits."""
    model = MODELS[family]()
    before = copy.deepcopy(model.state_dict())
    adapter = trimtab.attach(model, trimtab.BitFit(), dtype=dtype, keep_base="host")
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=0.05)), range(1, 5))
    held = {entry.name: entry.parameter.detach().clone() for entry in adapter.trainable()}
    out = logits(model, token_ids())
    assert all(adapter.merged_tensor(n, before[n].to(dtype)).dtype == dtype for n in held)
    adapter.merge()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, held.get(name, before[name]).to(dtype)), name
    assert (logits(model, token_ids()).double() - out.double()).norm() < 1e-2 * out.double().norm()
    adapter.unmerge()
    assert all(torch.equal(e.parameter, held[e.name]) for e in adapter.trainable())
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {}),
        ("bert", {"biases": ("query",), "train_also": ("head",)}),
        ("gpt2", {"train_also": ("norms",)}),
        ("llama", {"add_bias": True}),
        ("t5", {"add_bias": True, "biases": ("q", "wo")}),
    ],
)
def test_an_adapter_is_the_same_after_save_and_load(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """A fresh base with the loaded folder answers bit for bit the same; the file holds what trained alone."""
    model = MODELS[family]()
    adapter = trained(model, **settings)
    adapter.save(tmp_path)
    fresh = MODELS[family]()
    loaded = trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))
    assert loaded.config == adapter.config
    numbers = sum(entry.parameter.numel() for entry in adapter.trainable())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 10_000


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    """A tensor too few or too many, an unknown field, another base; the model stays free and as it was."""
    trained(tiny_bert(), biases=("query",)).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for change, message in [
        ({"biases": ["query", "value"]}, r"lacks bert\..*value\.bias"),
        ({"train_also": ["norms"]}, "lacks"),
        ({"biases": ["value"]}, "does not train here|lacks"),
        ({"biases": 3}, "biases = 3"),
        ({"new_trick": True}, "new_trick"),
    ]:
        file.write_text(json.dumps(saved | change))
        model = tiny_bert()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(trimtab.CheckpointError, match=message):
            trimtab.load_adapter(model, tmp_path)
        assert not trimtab.adapters(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    file.write_text(json.dumps({k: v for k, v in saved.items() if k != "biases"}))
    with pytest.raises(trimtab.CheckpointError, match="lacks biases"):
        trimtab.load_adapter(tiny_bert(), tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_resuming_is_exact(family: str) -> None:
    """2N = N + save + resume + N, bit for bit, with real and with added biases."""
    config = trimtab.BitFit(add_bias=True)
    whole = MODELS[family]()
    adapter = trimtab.attach(whole, config)
    train(whole, adapter, torch.optim.SGD(adapter.parameter_groups(lr=0.1)), range(1, 9))
    model, again = MODELS[family](), MODELS[family]()
    first = trimtab.attach(model, config)
    train(model, first, torch.optim.SGD(first.parameter_groups(lr=0.1)), range(1, 5))
    second = trimtab.attach(again, config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(again, second, torch.optim.SGD(second.parameter_groups(lr=0.1)), range(5, 9))
    assert torch.equal(logits(again, token_ids()), logits(whole, token_ids()))


def test_training_in_bf16_keeps_no_activation_of_a_layer() -> None:
    """Held in fp32 and computed in bf16, biases keep less than LoRA, which keeps every layer's input."""

    def saved(config: trimtab.BitFit | trimtab.LoRA) -> int:
        model = tiny_bert()
        trimtab.attach(model, config, dtype=torch.bfloat16)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(input_ids=token_ids(rows=8, length=32)).logits
        assert out.requires_grad
        return sum(kept.values())

    assert saved(trimtab.BitFit()) < 0.8 * saved(trimtab.LoRA(rank=2))
