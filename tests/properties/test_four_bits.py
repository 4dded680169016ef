"""A 4-bit base: with a master a restart keeps what the design promises; without one it says what is lost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_llama, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.errors import CannotMerge
from trimtab.methods.base import AdapterState
from trimtab.methods.lora import LoRAAdapter
from trimtab.nn import nf4
from trimtab.nn.nf4layer import NF4Linear

FAMILIES = ["llama", "gpt2", "bert", "t5"]
WHOLE = slice(None)


def started(
    master: str | Path | None = "host", *, family: str = "llama", every: int = 100, dtype: torch.dtype = torch.bfloat16,
    double: bool = True, **options: object,
) -> tuple[nn.Module, LoRAAdapter]:  # fmt: skip
    model = MODELS[family]().to(dtype)
    trimtab.quantize(model, double=double, master=master, **options)  # type: ignore[arg-type]
    adapter = trimtab.attach(model, trimtab.ReLoRA(rank=4, alpha=8, restart_every=every))
    assert isinstance(adapter, LoRAAdapter)
    return model, adapter


def stir(adapter: LoRAAdapter, relative: float, seed: int = 7) -> dict[str, Tensor]:
    """Give every B such values that |s B A| is `relative` times |W|; returns s B A in float64."""
    generator, products = torch.Generator().manual_seed(seed), {}
    for name, layer in adapter.layers.items():
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            size = layer.base.rows(layer.weight, WHOLE).norm()
            layer.lora_B.mul_(relative * size / (layer.scale * layer.lora_B @ layer.lora_A).norm())
            products[name] = layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
    return products


def values(adapter: LoRAAdapter) -> dict[str, Tensor]:
    """What each weight stands for, in float64."""
    return {name: layer.base.rows(layer.weight, WHOLE).double() for name, layer in adapter.layers.items()}


def decoded(layer: NF4Linear) -> Tensor:
    return nf4.dequantize(layer.weight, layer.scales(), layer.in_features, torch.float32)


def restart(adapter: LoRAAdapter, step: int = 100) -> dict[str, object]:
    adapter._last_step = step - 1
    report = adapter.after_step(step, torch.optim.AdamW(adapter.parameter_groups(lr=1e-3)))
    return report.events[0]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("relative", [5e-4, 2e-3, 1e-2, 1.0])
def test_the_sum_survives_and_the_codes_are_its_nearest(relative: float, family: str, double: bool) -> None:
    """(i) The master is W + s B A within 2^-15 |W|; (ii) the codes and scales are those of that sum, nothing else's."""
    _, adapter = started(family=family, double=double)
    before, products = values(adapter), stir(adapter, relative)
    offsets = {name: layer.absmax_offset.clone() for name, layer in adapter.layers.items() if double}
    event = restart(adapter)
    assert "kept" not in event
    for name, layer in adapter.layers.items():
        total, after = before[name] + products[name], values(adapter)[name]
        assert ((after - total).abs() <= 2.0**-15 * total.abs()).all(), name
        packed, absmax = nf4.quantize(after.float())
        assert torch.equal(layer.weight.view(torch.uint8), packed)
        if double:
            assert torch.equal(layer.absmax_offset, offsets[name])
            absmax = nf4.dequantize_scales(*nf4.quantize_scales(absmax, offsets[name]), offsets[name])
        assert torch.equal(layer.scales(), absmax)


@pytest.mark.parametrize("where", ["host", "file"])
def test_fifty_restarts_do_not_drift(where: str, tmp_path: Path) -> None:
    """After 50 small merges the master is the float64 sum of all of them within 2^-15 |W|, and the codes follow it."""
    _, adapter = started("host" if where == "host" else tmp_path / "m")
    start = values(adapter)
    expected = {name: value.clone() for name, value in start.items()}
    snapped = {name: decoded(layer) for name, layer in adapter.layers.items()}
    begun = {name: value.clone() for name, value in snapped.items()}
    for count in range(1, 51):
        for name, product in stir(adapter, 2e-3, seed=count).items():
            expected[name] += product
            packed, absmax = nf4.quantize(snapped[name] + product.float())
            snapped[name] = nf4.dequantize(packed, absmax, product.shape[1], torch.float32)
        restart(adapter, step=100 * count)
    for name, value in values(adapter).items():
        size = torch.maximum(expected[name].abs(), start[name].abs())
        assert ((value - expected[name]).abs() <= 2.0**-15 * size).all(), name
        moved = (expected[name] - start[name]).norm()
        # The control: without a master most of what was learnt is gone.
        assert (snapped[name].double() - begun[name].double() - (expected[name] - start[name])).norm() > 0.5 * moved


@pytest.mark.parametrize("relative", [2e-3, 5e-2])
def test_the_error_against_float64_does_not_double(relative: float) -> None:
    """(iii) The distance of f from a float64 forward of the exact sum is at most twice what it was."""
    model, adapter = started(dtype=torch.float32)
    before, products, ids = values(adapter), stir(adapter, relative), token_ids(rows=8, length=32)
    oracle = tiny_llama().double()
    with torch.no_grad():
        for name in products:
            oracle.get_submodule(name).weight.copy_(before[name] + products[name])
    truth = logits(oracle, ids)
    error = (logits(model, ids).double() - truth).pow(2).mean().sqrt()
    restart(adapter)
    assert (logits(model, ids).double() - truth).pow(2).mean().sqrt() <= 2 * error


def test_restarts_grow_the_rank() -> None:
    """After k restarts r < rank of the update <= (k + 1) r, on a 4-bit base with a master."""
    rank, steps = 3, 40
    model = tiny_llama()
    trimtab.quantize(model, master="host")
    adapter = trimtab.attach(model, trimtab.ReLoRA(rank=rank, alpha=12, restart_every=10))
    adapter.restarts(steps)
    start = dict(adapter.effective_weights())
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=2e-2)), range(1, steps + 1))
    for name, now in adapter.effective_weights():
        found = torch.linalg.svdvals((now - start[name]).double())
        assert rank < int((found > 1e-2 * found[0]).sum()) <= 4 * rank, name


@pytest.mark.parametrize("family", FAMILIES)
def test_relora_trains_on_it(family: str) -> None:
    """Over several restarts the loss falls, the master moves, and the first step of each cycle reaches B."""
    model, adapter = started(family=family, every=5, dtype=torch.float32)
    start, losses = dict(adapter.effective_weights()), []
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    for step in range(1, 17):
        loss = loss_of(model, token_ids(seed=3))
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(bool(layer.lora_B.grad.any()) for layer in adapter.layers.values())
        optimizer.step()
        optimizer.zero_grad()
        adapter.after_step(step, optimizer)
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(now, start[name]) for name, now in adapter.effective_weights())


def test_without_a_master_a_swallowed_merge_is_refused_before_anything_is_written() -> None:
    """The share that would be left is named, with the way out; codes, adapter and optimizer are as they were."""
    model, adapter = started(None)
    stir(adapter, 0.01)
    before = tensors(model)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
    a = adapter.layers["model.layers.0.self_attn.q_proj"].lora_A
    moments = {"exp_avg": torch.ones_like(a), "exp_avg_sq": torch.ones_like(a)}
    optimizer.state[a] = {"step": torch.tensor(3.0), **moments}
    adapter._last_step = 99
    with pytest.raises(
        CannotMerge, match=r"leave \d\.\d % of this merge .* than min_kept = 0.5; nothing was written"
    ) as info:
        adapter.after_step(100, optimizer)
    assert "master='host'" in str(info.value) and "\n" not in str(info.value)
    assert equal(before, tensors(model)) and len(optimizer.state) == 1


def test_without_a_master_the_surviving_share_is_reported_and_true() -> None:
    """The event's share is what is found in the weights afterwards; a lower min_kept lets a small one pass."""
    for relative, options in ((0.3, {}), (0.01, {"min_kept": 0.0})):
        _, adapter = started(None, **options)
        before, products = values(adapter), stir(adapter, relative)
        event = restart(adapter)
        after = values(adapter)
        left = sum(float(((after[n] - before[n]) * products[n]).sum()) for n in products)
        whole = sum(float(products[n].square().sum()) for n in products)
        assert event["kept"] == pytest.approx(left / whole, abs=2e-3)
        assert event["least_kept"] <= event["kept"] and event["least_kept_layer"] in products
        assert (event["kept"] > 0.9) == (relative == 0.3)


@pytest.mark.parametrize("where", ["host", "file"])
def test_a_run_goes_on_from_its_state_bit_for_bit(where: str, tmp_path: Path) -> None:
    """The adapter's state has the master, the model's codes and scales: a resumed run makes the same restart."""
    place = {"host": ("host", "host"), "file": (tmp_path / "a", tmp_path / "b")}[where]
    first, adapter = started(place[0], every=4)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(first, adapter, optimizer, range(1, 7))
    state = adapter.state_dict()
    saved = AdapterState({name: value.clone() for name, value in state.tensors.items()}, dict(state.meta))
    base, moments = tensors(first), copy.deepcopy(optimizer.state_dict())

    second, resumed = started(place[1], every=4)
    resumed.load_state_dict(saved)
    second.load_state_dict(base)
    other = torch.optim.AdamW(resumed.parameter_groups(lr=1e-2))
    other.load_state_dict(moments)
    for model, live, opt in ((first, adapter, optimizer), (second, resumed, other)):
        train(model, live, opt, range(7, 10))
    assert equal(tensors(first), tensors(second))
    a, b = values(adapter), values(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("master", [None, "host"])
@pytest.mark.parametrize("keep", ["host", "path"])
def test_a_kept_base_comes_back_bit_for_bit(keep: str, master: str | None, tmp_path: Path) -> None:
    """With keep_base, disabled() shows the first base after restarts; detach() restores codes, scales and master."""
    model = tiny_llama()
    trimtab.quantize(model, master=master, min_kept=0.0)
    ids = token_ids()
    before, first = tensors(model), logits(model, ids)
    masters = {n: m.holder.carry.clone() for n, m in model.named_modules() if isinstance(m, NF4Linear) and master}
    config = trimtab.ReLoRA(rank=4, alpha=8, restart_every=3)
    adapter = trimtab.attach(model, config, keep_base="host" if keep == "host" else tmp_path / "kept")
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=2e-2)), range(1, 8))
    now = logits(model, ids)
    assert not torch.equal(now, first)
    with adapter.disabled():
        assert torch.equal(logits(model, ids), first)
    assert torch.equal(logits(model, ids), now)
    adapter.detach()
    assert equal(before, tensors(model)) and torch.equal(logits(model, ids), first)
    assert all(torch.equal(model.get_submodule(n).holder.carry, value) for n, value in masters.items())


@pytest.mark.parametrize("quantized", [False, True])
def test_unmerge_gives_the_4_bit_base_back(quantized: bool) -> None:
    """After merge() to 16 bits, or into 4 bits, unmerge() restores codes, scales, adapter and outputs bit for bit."""
    model = tiny_llama().to(torch.bfloat16)
    trimtab.quantize(model, min_kept=0.0)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4), keep_base="host")
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=2e-2)), range(1, 6))
    ids = token_ids()
    before, outputs = tensors(model), logits(model, ids)
    adapter.merge(quantized=quantized)  # type: ignore[call-arg]
    assert any(isinstance(m, NF4Linear) for m in model.modules()) == quantized
    assert not equal(before, tensors(model))
    adapter.unmerge()
    assert equal(before, tensors(model)) and torch.equal(logits(model, ids), outputs)


def test_several_adapters_share_a_4_bit_base() -> None:
    """Two LoRAs on one quantised base are switched without touching it."""
    model = tiny_llama()
    trimtab.quantize(model)
    base, ids = tensors(model), token_ids()
    plain = logits(model, ids)
    one = trimtab.attach(model, trimtab.LoRA(rank=2), name="one")
    stir(one, 0.1)  # type: ignore[arg-type]
    first = logits(model, ids)
    two = trimtab.attach(model, trimtab.LoRA(rank=4, seed=1), name="two")
    assert torch.equal(logits(model, ids), plain)
    trimtab.activate(model, "one")
    assert torch.equal(logits(model, ids), first) and not torch.equal(first, plain)
    one.detach()
    two.detach()
    assert equal(base, tensors(model))
