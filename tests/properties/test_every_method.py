"""What every method must do, on every family of models, over a dense and over a 4-bit base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, token_ids, train
from torch import nn

import trimtab
from trimtab.nn.replay import Reads
from trimtab.nn.weights import is_conv1d

FAMILIES = ("llama", "gpt2", "bert", "t5")
BASES = ("dense", "nf4")
#: Families without biases.
BARE = ("llama", "t5")
#: Each method with settings that fit models 32 wide, and what is not as usual about it.
METHODS: dict[str, Callable[[str], trimtab.Method]] = {
    "full": lambda family: trimtab.Full(),
    "lora": lambda family: trimtab.LoRA(rank=4),
    "lora-dora": lambda family: trimtab.LoRA(rank=4, dora=True),
    "lora-plus": lambda family: trimtab.LoRA(rank=4, init="orthogonal", rslora=True, lora_plus=4),
    "lora-pissa": lambda family: trimtab.LoRA(rank=4, alpha=4, init="pissa"),
    "lora-warm": lambda family: trimtab.LoRA(rank=4, warm_start_steps=2),
    "lora-patterns": lambda family: trimtab.LoRA(rank=4, rank_pattern={".*": 3}, alpha_pattern={".*": 5.0}),
    "lora-bias": lambda family: trimtab.LoRA(rank=4, bias="all" if family in ("gpt2", "bert") else "none"),
    "vera": lambda family: trimtab.VeRA(rank=16),
    "adalora": lambda family: trimtab.AdaLoRA(
        rank=3, init_rank=5, total_steps=8, initial_steps=1, final_steps=3, allocate_every=1
    ),
    "ia3": lambda family: trimtab.IA3(),
    "bitfit": lambda family: trimtab.BitFit(add_bias=family in BARE),
    "bottleneck": lambda family: trimtab.Bottleneck(size=4),
    "prompt": lambda family: trimtab.PromptTuning(length=4),
    "prefix": lambda family: trimtab.PrefixTuning(length=4),
    "read": lambda family: trimtab.READ(size=8, train_also=()),
    "ladder": lambda family: trimtab.Ladder(reduction=4, train_also=()),
    "relora": lambda family: trimtab.ReLoRA(rank=4, restart_every=4, train_also=("norms",)),
}
#: They train or rewrite the whole base, which 4 bits cannot hold.
DENSE_ONLY = {"full", "lora-pissa", "lora-warm"}
#: Restarts need a master of a 4-bit base.
NEEDS_MASTER = {"relora"}
#: The function at attach is the base's within rounding.
STARTS_NEAR = {"lora-plus", "lora-pissa"}
#: The function at attach is another one.
STARTS_ELSEWHERE = {"prompt", "prefix"}
#: Writes into the base at attach.
EDITS_AT_ONCE = {"lora-pissa"}
UNMERGEABLE = {"bottleneck", "prompt", "prefix", "read", "ladder"}
#: The adapter alone does not describe what was trained.
UNSAVABLE = {"full", "relora", "lora-warm"}
CASES = [
    pytest.param(family, base, method, id=f"{family}-{base}-{method}")
    for family in FAMILIES
    for base in BASES
    for method in METHODS
    if not (base == "nf4" and method in DENSE_ONLY)
]


def built(family: str, base: str, method: str, seed: int = 0) -> nn.Module:
    """A model of the family, its linears quantised or not."""
    torch.manual_seed(seed)
    model = MODELS[family]()
    if base == "nf4":
        trimtab.quantize(model, "nf4", master="host" if method in NEEDS_MASTER else None)
    return model


def optimizer_for(adapter: trimtab.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("family", "base", "method"), CASES)
def test_a_method_lives_a_whole_life(family: str, base: str, method: str, tmp_path: Path) -> None:
    """Attach, train, save and load, merge and take it back, detach: each does what it says."""
    config, ids = METHODS[method](family), token_ids()
    model = built(family, base, method)
    before, first = bits(model), logits(model, ids)
    adapter = trimtab.attach(model, config, keep_base="host")
    start = logits(model, ids)
    assert torch.equal(start, first) == (method not in STARTS_NEAR | STARTS_ELSEWHERE)
    assert torch.allclose(start, first, atol=1e-4) == (method not in STARTS_ELSEWHERE)

    train(model, adapter, optimizer_for(adapter), range(1, 7))
    after = logits(model, ids)
    assert after.isfinite().all()
    assert not torch.equal(after, start)

    if method in UNSAVABLE:
        with pytest.raises(trimtab.CannotSave, match="merge"):
            adapter.save(tmp_path)
    else:
        adapter.save(tmp_path)
        fresh = built(family, base, method)
        trimtab.load_adapter(fresh, tmp_path)
        assert torch.allclose(logits(fresh, ids), after, atol=1e-5)

    with adapter.disabled():
        assert torch.equal(logits(model, ids), first)
    assert torch.equal(logits(model, ids), after)

    if method in UNMERGEABLE or (method == "bitfit" and family in BARE):
        with pytest.raises(trimtab.CannotMerge, match=rf"{config.name}|add_bias"):
            adapter.merge()
    else:
        wanted = dict(adapter.effective_weights())
        adapter.merge()
        for name, value in wanted.items():
            stored = model.get_parameter(name).detach()
            assert torch.allclose(stored.t() if is_conv1d(model.get_submodule(name[:-7])) else stored, value, atol=1e-6)
        assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"torch", "transformers"}
        if not (base == "nf4" and method in NEEDS_MASTER):  # there the master's sum is merged, not its 4-bit rounding
            assert torch.allclose(logits(model, ids), after, atol=1e-4)
        adapter.unmerge()
    assert torch.equal(logits(model, ids), after)

    adapter.detach()
    assert same(bits(model), before)
    assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize(("family", "base", "method"), CASES)
def test_a_state_goes_on_where_it_was_taken(family: str, base: str, method: str) -> None:
    """Six steps are three, a state and a base that are stored and loaded, and three more, bit for bit."""
    config = METHODS[method](family)
    model = built(family, base, method)
    adapter = trimtab.attach(model, config)
    optimizer = optimizer_for(adapter)
    train(model, adapter, optimizer, range(1, 4))
    state, moments, stored = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict()), bits(model)
    train(model, adapter, optimizer, range(4, 7))

    again = built(family, base, method)
    resumed = trimtab.attach(again, config)
    resumed.load_state_dict(state)
    again.load_state_dict({name: tensor for name, tensor in stored.items() if name not in state.tensors}, strict=False)
    optimizer = optimizer_for(resumed)
    optimizer.load_state_dict(moments)
    train(again, resumed, optimizer, range(4, 7))
    assert same(bits(again), bits(model))
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize(("family", "base", "method"), CASES)
def test_a_frozen_base_stays_as_it_was(family: str, base: str, method: str) -> None:
    """Between two restarts training writes into nothing but what `trainable` names."""
    config = METHODS[method](family)
    model = built(family, base, method)
    base_names = set(bits(model))
    adapter = trimtab.attach(model, config)
    before = {name: value for name, value in bits(model).items() if name in base_names}
    trained = {entry.name for entry in adapter.trainable()}
    train(model, adapter, optimizer_for(adapter), range(1, 4))
    changed = {
        name for name, value in model.named_parameters() if name in before and not torch.equal(before[name], value)
    }
    assert changed <= trained
    assert changed or not config.writes_base or method in EDITS_AT_ONCE or family in BARE
    if not config.writes_base:
        assert not changed
        assert not trained & set(before)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNSAVABLE])
def test_what_diverged_is_not_saved(method: str, tmp_path: Path) -> None:
    """The tensor is named, and an adapter that was saved before stays."""
    adapter = trimtab.attach(built("bert", "dense", method), METHODS[method]("bert"), keep_base="host")
    adapter.save(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        adapter.trainable()[-1].parameter.view(-1)[0] = float("nan")
    with pytest.raises(trimtab.CannotSave, match=r"is not finite.*diverged"):
        adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_whether_its_hidden_states_can_be_kept(method: str) -> None:
    """It gives a reason, unless its adapter tells what it reads."""
    adapter = trimtab.attach(built("llama", "dense", method), METHODS[method]("llama"))
    assert isinstance(adapter, Reads) == (adapter.config.no_hidden_cache == "")
    assert isinstance(adapter, Reads) == (method == "read")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", sorted(DENSE_ONLY))
def test_what_needs_the_whole_base_is_refused_on_four_bits(family: str, method: str) -> None:
    """A clear error names the layer that is held in 4 bits, and the model is as it was."""
    model = built(family, "nf4", method)
    before = bits(model)
    with pytest.raises(trimtab.ConfigError, match="4 bits"):
        trimtab.attach(model, METHODS[method](family))
    assert same(bits(model), before)
    assert not trimtab.adapters(model)
