"""Attach leaves the function alone; detach gives the base back bit for bit, or says why it cannot."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models_for_tests import MODELS, forward, logits, loss_of, tiny_llama, token_ids, train

import trimtab

CONFIGS = {
    "full": trimtab.Full(),
    "lora": trimtab.LoRA(rank=4),
    "lora-rs": trimtab.LoRA(rank=4, rslora=True, dropout=0.1, train_also=("norms", "head")),
    "lora-dora": trimtab.LoRA(rank=4, dora=True, init="gaussian"),
    "lora-patterns": trimtab.LoRA(rank=4, rank_pattern={".*": 3}, alpha_pattern={".*": 2.0}, train_also=("norms",)),
    "lora-warm": trimtab.LoRA(rank=4, warm_start_steps=3),
    "relora": trimtab.ReLoRA(rank=4, restart_every=2),
    "bottleneck": trimtab.Bottleneck(size=4, targets="all-linear"),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=4, total_steps=8, allocate_every=1),
    "ia3": trimtab.IA3(targets="all-linear", feedforward=()),
    "ia3-in": trimtab.IA3(targets=(), feedforward="all-linear"),
    "bitfit": trimtab.BitFit(add_bias=True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MODELS)
def test_attach_keeps_the_function_and_detach_the_bits(family: str, config: str, dtype: str) -> None:
    """Outputs are bit-equal after attach; after detach weights, classes, flags and names are as before."""
    model = MODELS[family]().to(DTYPES[dtype])
    model.requires_grad_(True)
    before, ids = copy.deepcopy(model), token_ids()
    classes = {name: type(module) for name, module in model.named_modules()}
    adapter = trimtab.attach(model, CONFIGS[config])
    assert torch.equal(logits(model, ids), logits(before, ids))
    loss_of(model, ids).backward()
    assert any(entry.parameter.grad is not None for entry in adapter.trainable())
    adapter.detach()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.dtype == then.dtype and torch.equal(now, then), name
        assert now.requires_grad and now.grad is None


@pytest.mark.parametrize("config", CONFIGS)
def test_what_trains_is_held_in_fp32_and_what_is_frozen_in_the_compute_dtype(config: str) -> None:
    """With dtype=bf16 on an fp32 model, the two sets have exactly these dtypes and hidden states are bf16."""
    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config], dtype=torch.bfloat16)
    trained = {id(entry.parameter) for entry in adapter.trainable()}
    for name, parameter in model.named_parameters():
        expected = torch.float32 if id(parameter) in trained else torch.bfloat16
        assert parameter.dtype == expected, name
        assert parameter.requires_grad == (id(parameter) in trained), name
    assert model.model(token_ids()).last_hidden_state.dtype == torch.bfloat16


def test_pure_holds_everything_in_the_compute_dtype() -> None:
    """`pure` reproduces bf16-only training: no fp32 tensor and no carry is left."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.ReLoRA(rank=4, restart_every=2), dtype=torch.bfloat16, pure=True)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(model, adapter, optimizer, range(1, 4))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not [name for name in adapter.state_dict().tensors if name.startswith("carry:")]


@pytest.mark.parametrize("held", [True, False])
def test_a_norm_weight_moves_only_when_it_is_held_in_fp32(held: bool) -> None:
    """Twenty AdamW steps of 1e-3 near 1.0: bf16 rounds every one of them away."""
    model = tiny_llama().to(torch.bfloat16)
    adapter = trimtab.attach(model, trimtab.Full(), pure=not held)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
    train(model, adapter, optimizer, range(1, 21))
    moved = not torch.equal(model.model.norm.weight.float(), torch.ones(32))
    assert moved == held


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", ["full", "lora-rs", "relora"])
def test_detach_refuses_once_the_base_was_written_into(config: str, fused: bool) -> None:
    """Even when the loop never called after_step, a trained base is noticed and the way out is named."""
    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config])
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2), fused=fused)
    loss_of(model, token_ids()).backward()
    optimizer.step()
    with pytest.raises(trimtab.CannotDetach, match=r"merge\(\)"):
        adapter.detach()
    adapter.merge()
    trimtab.attach(model, trimtab.LoRA(rank=2)).detach()


def test_a_wider_compute_dtype_needs_no_carry() -> None:
    """A bf16 base computed in fp32 loses nothing, so nothing is carried, and detach gives its bits back."""
    model = tiny_llama().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4), dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [name for name in adapter.state_dict().tensors if name.startswith("carry:")]
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_detach_refuses_a_base_that_was_narrowed() -> None:
    """Stored as bf16, an fp32 base cannot be given back bit for bit."""
    adapter = trimtab.attach(tiny_llama(), trimtab.LoRA(rank=4), dtype=torch.bfloat16)
    with pytest.raises(trimtab.CannotDetach, match="fewer bits"):
        adapter.detach()


def test_a_failed_attach_leaves_the_model_free() -> None:
    """An error in attach changes nothing: the model takes another adapter afterwards."""
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(trimtab.ConfigError, match="rank = 33"):
        trimtab.attach(model, trimtab.LoRA(rank=33))
    with pytest.raises(trimtab.TargetError):
        trimtab.attach(model, trimtab.LoRA(rank=4, targets=["nope"]))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    trimtab.attach(model, trimtab.LoRA(rank=4))


@pytest.mark.parametrize("config", CONFIGS)
def test_groups_are_the_same_five_in_the_same_order(config: str) -> None:
    """Whatever trains, parameter_groups has one group a role, tied tensors once, weight decay 0."""
    model = MODELS["gpt2"]()
    adapter = trimtab.attach(model, CONFIGS[config])
    groups = adapter.parameter_groups(lr=1e-3)
    assert [g["group"] for g in groups] == ["adapter", "embedding", "norm", "head", "base"]
    assert all(g["lr"] == 1e-3 and g["weight_decay"] == 0.0 for g in groups)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(adapter.trainable())
    named = dict(model.named_parameters())
    assert all(named[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))


def test_training_a_tied_head_trains_the_one_tensor() -> None:
    """With a tied embedding, train_also=head trains the shared tensor once and keeps it tied."""
    model = MODELS["gpt2"]().to(torch.bfloat16)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, train_also=("head",)))
    assert [e.name for e in adapter.trainable() if e.group != "adapter"] == ["transformer.wte.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_generation_works_with_an_adapter() -> None:
    """generate() with the KV cache answers what the merged model answers."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, alpha=64))
    for layer in adapter.layers.values():  # type: ignore[attr-defined]
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    ids = token_ids(rows=2)
    grown = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    adapter.merge()
    assert torch.equal(grown, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("config", ["full", "lora-warm", "relora", "adalora", "ia3"])
@pytest.mark.parametrize("family", MODELS)
def test_a_model_trains_in_bf16_whatever_it_is_made_of(family: str, config: str) -> None:
    """Held in fp32, computed in bf16: every family steps, evaluates, survives a pickle, and merges to bf16."""
    model = MODELS[family]()
    adapter = trimtab.attach(model, CONFIGS[config], dtype=torch.bfloat16)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 7))
    out = logits(model, token_ids())
    assert out.isfinite().all()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, token_ids()), out)
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model, token_ids()).float() - out.float()).norm() < 0.05 * out.float().norm()


@pytest.mark.parametrize("family", MODELS)
def test_evaluation_sees_the_adapter(family: str) -> None:
    """What eval mode without gradients answers is what training mode answers, adapter included."""
    model = MODELS[family]()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, alpha=64))
    base = logits(model, token_ids())
    for layer in adapter.layers.values():  # type: ignore[attr-defined]
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    trained = forward(model.train(), token_ids()).detach()
    assert torch.allclose(logits(model, token_ids()), trained, atol=1e-5)
    assert not torch.allclose(base, trained, atol=1e-2)
