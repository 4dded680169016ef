"""Restarts of a plain PEFT LoRA model leave its function alone, and let the update's rank grow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models_for_tests import logits, loss_of, tiny_llama, token_ids
from peft import LoraConfig, get_peft_model
from peft_parts import DTYPES, TARGETS, adamw, peft_model, train
from torch import Tensor, nn

import trimtab
from trimtab.interop.peft import Restarts
from trimtab.nn.weights import join


def factors(restarts: Restarts) -> Iterator[tuple[str, Any, Tensor, Tensor, float]]:
    """Name, base layer, and A, B, s of each adapted layer."""
    for name, layer in restarts._layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield name, layer.get_base_layer(), a, b, layer.scaling["default"]


def sums(restarts: Restarts) -> dict[str, Tensor]:
    """W + carry + s B A in float64, in the stored orientation."""
    found = {}
    for name, base, a, b, scale in factors(restarts):
        product = scale * (b.double() @ a.double())
        carry, weight = restarts._holders[name].carry, base.weight
        held = weight.double() if carry is None else join(weight, carry).double()
        found[name] = (held + (product.t() if type(base).__name__ == "Conv1D" else product)).detach()
    return found


def stir(restarts: Restarts, relative: float, seed: int = 7) -> None:
    """Give every B such values that |s B A| is `relative` times |W| (as norms)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, base, a, b, scale in factors(restarts):
            b.copy_(torch.randn(b.shape, generator=generator))
            b.mul_(relative * base.weight.float().norm() / (scale * b.float() @ a.float()).norm())


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {".*": 5}, "alpha_pattern": {".*": 3}}])
@pytest.mark.parametrize("family", TARGETS)
def test_a_restart_in_fp32_moves_no_output(family: str, changes: dict[str, Any]) -> None:
    """After real training f changes by at most 1e-6 relative, B is zero, and A is new."""
    model = peft_model(family, **changes)
    restarts, optimizer = Restarts(model, every=20), adamw(model)
    train(model, restarts, optimizer, range(1, 20))
    ids = token_ids(rows=8)
    loss_of(model, token_ids(seed=20)).backward()
    optimizer.step()
    before, old = logits(model, ids), [a.clone() for _, _, a, _, _ in factors(restarts)]
    assert (before - logits(peft_model(family, **changes), ids)).norm() > 1e-2 * before.norm()
    events = restarts.after_step(20, optimizer).events
    assert (logits(model, ids) - before).norm() <= 1e-6 * before.norm()
    assert [event["restart"] for event in events] == [1] and events[0]["reset_elements"] > 0
    assert not any(b.any() for _, _, _, b, _ in factors(restarts))
    assert not any(torch.equal(a, was) for (_, _, a, _, _), was in zip(factors(restarts), old, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("relative", [5e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_survives_and_the_weight_is_it_rounded(dtype: str, relative: float, family: str) -> None:
    """W' + carry' is within 2^-15 |W| of W + carry + s B A, and W' is that sum rounded to nearest."""
    restarts = Restarts(peft_model(family, dtype), every=1)
    stir(restarts, relative)
    expected = sums(restarts)
    restarts.after_step(1, adamw(restarts.model))
    after = sums(restarts)
    for name, base, _, _, _ in factors(restarts):
        size = expected[name].abs()
        assert ((after[name] - expected[name]).abs() <= 2.0**-15 * size).all(), name
        nearest = (expected[name].to(base.weight.dtype).double() - expected[name]).abs()
        assert ((base.weight.double() - expected[name]).abs() <= nearest + 2.0**-23 * size).all(), name


@pytest.mark.parametrize("relative", [2e-3, 5e-2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_against_float64_does_not_double(dtype: str, relative: float) -> None:
    """The distance of f from a float64 forward of the exact sum is at most twice what it was."""
    model = peft_model("llama", dtype)
    restarts = Restarts(model, every=1)
    stir(restarts, relative)
    exact, ids = sums(restarts), token_ids(rows=8, length=32)
    oracle = tiny_llama().to(DTYPES[dtype]).double()
    with torch.no_grad():
        for name, value in exact.items():
            oracle.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(value)
    truth = logits(oracle, ids)
    before = (logits(model, ids).double() - truth).pow(2).mean().sqrt()
    restarts.after_step(1, adamw(model))
    after = (logits(model, ids).double() - truth).pow(2).mean().sqrt()
    assert after <= 2 * before


def test_fifty_restarts_do_not_drift() -> None:
    """In bf16, W + carry after 50 small merges is the float64 sum of all of them; PEFT's own merges miss it by far."""
    restarts = Restarts(peft_model("llama", "bf16"), every=1)
    expected = sums(restarts)
    lost = {name: base.weight.clone() for name, base, _, _, _ in factors(restarts)}
    for count in range(1, 51):
        stir(restarts, 2e-3, seed=count)
        for name, _, a, b, scale in factors(restarts):
            delta = (scale * b.double() @ a.double()).detach()
            expected[name] = expected[name] + delta
            lost[name] += delta.to(torch.bfloat16)
        restarts.after_step(count, adamw(restarts.model))
    for name, value in sums(restarts).items():
        size = expected[name].abs().clamp(min=1e-2)
        assert ((value - expected[name]).abs() <= 2.0**-15 * size).all(), name
        assert ((lost[name].double() - expected[name]).abs() / size).max() > 2.0**-8


def test_the_rank_grows_past_r() -> None:
    """After k restarts the update's rank is in (r, (k + 1) r]; without restarts it stays at r."""
    for every, low, high in ((10, 3, 12), (1000, 0, 3)):
        model = peft_model()
        restarts = Restarts(model, every=every)
        start = sums(restarts)
        restarts.restarts(40)
        train(model, restarts, adamw(model), range(1, 41))
        for name, value in sums(restarts).items():
            sizes = torch.linalg.svdvals(value - start[name])
            assert low < int((sizes > 1e-2 * sizes[0]).sum()) <= high, (name, every)


@pytest.mark.parametrize("reset", ["drop", "magnitude", "random"])
def test_other_parameters_keep_their_state(reset: Any) -> None:
    """What trains beside the adapter (modules_to_save) keeps its moments, byte for byte."""
    model = peft_model(modules_to_save=["lm_head"])
    restarts, optimizer = Restarts(model, every=5, reset=reset), adamw(model)
    train(model, restarts, optimizer, range(1, 5))
    loss_of(model, token_ids(seed=5)).backward()
    optimizer.step()
    others = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert others
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in others.items()}
    events = restarts.after_step(5, optimizer).events
    assert events[0]["reset_elements"] > 0
    for name, parameter in others.items():
        now = optimizer.state[parameter]
        assert now.keys() == before[name].keys() and all(torch.equal(now[k], before[name][k]) for k in now)
    changed = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(not optimizer.state.get(p) or float(optimizer.state[p]["step"]) == 1 for p in changed)


@pytest.mark.parametrize("family", TARGETS)
def test_pefts_own_merge_gives_the_same_function(family: str) -> None:
    """After restarts and further training, merge_and_unload of PEFT and of Restarts give what the model gives."""
    for own in (False, True):
        model = peft_model(family)
        restarts, optimizer = Restarts(model, every=4), adamw(model)
        assert len(train(model, restarts, optimizer, range(1, 11))) == 2
        before = logits(model, token_ids())
        plain = restarts.merge_and_unload() if own else model.merge_and_unload()
        assert not [name for name, _ in plain.named_parameters() if "lora" in name]
        assert (logits(plain, token_ids()) - before).norm() <= 1e-5 * before.norm()


def test_merging_at_the_end_uses_the_carries() -> None:
    """In bf16 the merged weight is the carried sum rounded once."""
    restarts = Restarts(peft_model("llama", "bf16"), every=1)
    for count in range(1, 21):
        stir(restarts, 1e-3, seed=count)
        if count < 20:
            restarts.after_step(count, adamw(restarts.model))
    expected = sums(restarts)
    plain = restarts.merge_and_unload()
    for name, value in expected.items():
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight.double()
        nearest = (value.to(torch.bfloat16).double() - value).abs()
        assert ((weight - value).abs() <= nearest + 2.0**-23 * value.abs()).all(), name


def test_draws_of_a_are_stable() -> None:
    """A depends on (seed, restart, layer): not on the global generator."""
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        restarts = Restarts(peft_model(), every=1, seed=seed)
        torch.manual_seed(noise)
        stir(restarts, 0.1)
        restarts.after_step(1, adamw(restarts.model))
        found.append([a.clone() for _, _, a, _, _ in factors(restarts)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_the_schedule_and_the_restarts_are_one_list() -> None:
    """After `schedule` the restarts are those in it: none at the end, none before a last cycle too short to re-warm."""
    model = peft_model()
    restarts = Restarts(model, every=4)
    schedule = restarts.schedule(13, rewarm_steps=2, warmup_steps=1, floor=0.2)
    assert schedule.restarts == (4, 8) and schedule(4) < schedule(3)
    events = train(model, restarts, adamw(model), range(1, 14))
    assert [event["step"] for event in events] == [4, 8]


def with_second_adapter() -> nn.Module:
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def merged() -> nn.Module:
    model = peft_model()
    model.merge_adapter()
    return model


def disabled() -> nn.Module:
    model = peft_model()
    model.base_model.disable_adapter_layers()
    return model


def tied() -> nn.Module:
    base = tiny_llama(tie_word_embeddings=True)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))


def ia3() -> nn.Module:
    from peft import IA3Config

    return get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def in_4_bits() -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    base = tiny_llama()
    block = base.model.layers[0].self_attn
    block.q_proj = Linear4bit(32, 32, bias=False, compute_dtype=torch.float32)
    base.is_loaded_in_4bit = True
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))


REFUSED = {
    "not a PEFT model": (tiny_llama, "takes a peft.PeftModel"),
    "DoRA": (lambda: peft_model(use_dora=True), "not plain LoRA but Dora"),
    "a bias": (lambda: peft_model(lora_bias=True), "lora_bias"),
    "embeddings": (lambda: peft_model(target_modules=["embed_tokens"]), "lora.layer.Embedding"),
    "two adapters": (with_second_adapter, "the adapters .'default', 'second'."),
    "merged": (merged, "it is merged"),
    "disabled": (disabled, "it is disabled"),
    "tied": (tied, "tied to another module"),
    "another method": (ia3, "IA3"),
    "4 bits": (in_4_bits, "bnb.Linear4bit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_exactly_is_refused(case: str) -> None:
    """Each thing that is not one plain LoRA on linear layers is named before anything is changed."""
    make, match = REFUSED[case]
    with pytest.raises(trimtab.ConfigError, match=match):
        Restarts(make(), every=5)


def test_a_model_that_changed_meanwhile_is_refused() -> None:
    """Merging, or adding an adapter, between two restarts is noticed at the second."""
    model = peft_model()
    restarts = Restarts(model, every=2)
    model.merge_adapter()
    with pytest.raises(trimtab.ConfigError, match="merged"):
        restarts.after_step(2, adamw(model))


def test_after_step_counts_completed_steps_once() -> None:
    """The same number twice and a restart left out are errors; so is an optimizer that knows no A."""
    model = peft_model()
    restarts, optimizer = Restarts(model, every=4), adamw(model)
    train(model, restarts, optimizer, range(1, 3))
    with pytest.raises(ValueError, match=r"after_step\(2\) follows after_step\(2\)"):
        restarts.after_step(2, optimizer)
    with pytest.raises(ValueError, match="restart after step 4 was left out"):
        restarts.after_step(5, optimizer)
    stranger = torch.optim.AdamW([other := nn.Parameter(torch.ones(2))])
    other.grad = torch.ones(2)
    stranger.step()
    with pytest.raises(trimtab.TrimtabError, match="touched no element"):
        restarts.after_step(4, stranger)
