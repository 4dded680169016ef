"""Named adapters, switching them off and on, merging and taking it back, and bases that are kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_llama, token_ids, train
from torch import nn

import trimtab

PURE = {
    "lora": trimtab.LoRA(rank=4),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=4, total_steps=9, allocate_every=1),
    "ia3": trimtab.IA3(targets="all-linear", feedforward=()),
    "lora-dora": trimtab.LoRA(rank=4, dora=True),
    "lora-orthogonal": trimtab.LoRA(rank=4, init="orthogonal", lora_plus=2),
}
#: Edits the base and keeps what it replaced.
KEEPING = {
    "lora-pissa": trimtab.LoRA(rank=4, alpha=4, init="pissa"),
    "lora-pissa-dora": trimtab.LoRA(rank=4, init="pissa", dora=True),
}
EDITING = {
    "full": trimtab.Full(),
    "lora-also": trimtab.LoRA(rank=4, train_also=("norms", "head")),
    "lora-warm": trimtab.LoRA(rank=4, warm_start_steps=2),
    "relora": trimtab.ReLoRA(rank=4, restart_every=2, train_also=("norms",)),
}
#: Edits the base of a model with biases, and adds to one without.
EITHER = {"bitfit": trimtab.BitFit(add_bias=True)}
ALL = PURE | KEEPING | EDITING | EITHER
#: Models without biases: what is added to them has no merged form.
BARE = ("llama", "t5")
MERGING = [(family, config) for family in MODELS for config in ALL if config not in EITHER or family not in BARE]
#: Pure ones without a merged form.
UNMERGEABLE = {"bottleneck": trimtab.Bottleneck(size=4, targets="all-linear")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trained(model: nn.Module, config: object, **kwargs: object) -> trimtab.Adapter:
    adapter = trimtab.attach(model, config, **kwargs)  # type: ignore[arg-type]
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 6))
    return adapter


def same(a: nn.Module, b: nn.Module) -> bool:
    now, then = a.state_dict(), b.state_dict()
    return list(now) == list(then) and all(torch.equal(now[k], then[k]) and now[k].dtype == then[k].dtype for k in now)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["host", "folder"])
@pytest.mark.parametrize("config", ALL | UNMERGEABLE)
@pytest.mark.parametrize("family", MODELS)
def test_a_kept_base_comes_back_bit_for_bit(family: str, config: str, where: str, dtype: str, tmp_path: Path) -> None:
    """With keep_base, detach restores what training and restarts wrote into, narrowed weights included."""
    model = MODELS[family]()
    before = copy.deepcopy(model)
    keep = "host" if where == "host" else tmp_path / "kept"
    adapter = trained(model, (ALL | UNMERGEABLE)[config], keep_base=keep, dtype=DTYPES[dtype])
    assert not torch.equal(logits(model, token_ids()).float(), logits(before, token_ids()).float())
    adapter.detach()
    assert same(model, before)
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "config"), MERGING)
def test_unmerge_takes_a_merge_back(family: str, config: str, dtype: str) -> None:
    """After merge and unmerge state, function and trained tensors are as before the merge, and training goes on."""
    model = MODELS[family]()
    adapter = trained(model, ALL[config], keep_base="host", dtype=DTYPES[dtype], name="one")
    state, out = copy.deepcopy(adapter.state_dict()), logits(model, token_ids())
    weights = copy.deepcopy(model.state_dict())
    adapter.merge()
    assert not trimtab.adapters(model)
    adapter.unmerge()
    assert trimtab.adapters(model) == {"one": adapter}
    again = adapter.state_dict()
    assert again.meta == state.meta and list(again.tensors) == list(state.tensors)
    assert all(torch.equal(again.tensors[n], t) for n, t in state.tensors.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, token_ids()), out)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(6, 8))
    adapter.detach()


def test_unmerge_needs_a_copy_and_a_free_model() -> None:
    """Without keep_base there is nothing to go back to; with another adapter on the model it would be broken."""
    model = tiny_llama()
    adapter = trained(model, trimtab.LoRA(rank=4))
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()
    adapter.merge()
    with pytest.raises(trimtab.CannotDetach, match="keep_base"):
        adapter.unmerge()
    kept = trained(model, trimtab.LoRA(rank=4), keep_base="host")
    kept.merge()
    other = trimtab.attach(model, trimtab.LoRA(rank=2))
    with pytest.raises(trimtab.CannotDetach, match="another adapter"):
        kept.unmerge()
    other.detach()
    kept.unmerge()


@pytest.mark.parametrize("config", ALL | UNMERGEABLE)
@pytest.mark.parametrize("family", MODELS)
def test_disabled_shows_the_base(family: str, config: str) -> None:
    """Within disabled() the function is the base's bit for bit, and afterwards the adapter's again."""
    model = MODELS[family]()
    before, ids = logits(model, token_ids()), token_ids()
    adapter = trained(model, (ALL | UNMERGEABLE)[config], keep_base="host")
    after = logits(model, ids)
    with adapter.disabled():
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("config", EDITING)
def test_disabled_refuses_where_the_base_is_gone(config: str) -> None:
    """A base that was written into and not kept cannot be shown; the adapter stays at work."""
    model = tiny_llama()
    adapter = trained(model, EDITING[config])
    out = logits(model, token_ids())
    with pytest.raises(trimtab.CannotDetach, match="keep_base"), adapter.disabled():
        pass
    assert torch.equal(logits(model, token_ids()), out)


def test_adapters_are_switched_by_name() -> None:
    """Two adapters on one base: each answers as it did alone, none as the base; detach in any order."""
    model, ids = tiny_llama(), token_ids()
    before, base = copy.deepcopy(model), logits(model, ids)
    one = trained(model, trimtab.LoRA(rank=4), name="one")
    first = logits(model, ids)
    two = trained(model, trimtab.LoRA(rank=2, targets=["q_proj"]), name="two")
    second = logits(model, ids)
    assert not torch.equal(first, second)
    trimtab.activate(model, "one")
    assert torch.equal(logits(model, ids), first)
    loss_of(model, ids).backward()
    assert all(e.parameter.grad is None for e in two.trainable())
    trimtab.activate(model, None)
    assert torch.equal(logits(model, ids), base)
    trimtab.activate(model, "two")
    assert torch.equal(logits(model, ids), second)
    with pytest.raises(trimtab.CannotMerge, match="'one'"):
        two.merge()
    one.detach()
    assert torch.equal(logits(model, ids), second)
    two.detach()
    assert same(model, before)


def test_what_cannot_stand_beside_another_is_refused() -> None:
    """A taken name, an unknown one, another dtype, and methods that change the base; the first stays at work."""
    model, ids = tiny_llama(), token_ids()
    adapter = trained(model, trimtab.LoRA(rank=4), name="one")
    out = logits(model, ids)
    with pytest.raises(trimtab.ConfigError, match="already has an adapter 'one'"):
        trimtab.attach(model, trimtab.LoRA(rank=4), name="one")
    with pytest.raises(trimtab.ConfigError, match=r"restart_every=3.*the adapter 'one'"):
        trimtab.attach(model, trimtab.ReLoRA(restart_every=3), name="two")
    with pytest.raises(trimtab.ConfigError, match="dtype"):
        trimtab.attach(model, trimtab.LoRA(rank=4), name="two", dtype=torch.bfloat16)
    with pytest.raises(trimtab.TargetError):
        trimtab.attach(model, trimtab.LoRA(rank=4, targets=["nope"]), name="two")
    with pytest.raises(trimtab.ConfigError, match="no such adapter; it has 'one'"):
        trimtab.activate(model, "two")
    assert torch.equal(logits(model, ids), out)
    adapter.detach()
    full = trimtab.attach(model, trimtab.Full(), name="all")
    with pytest.raises(trimtab.ConfigError, match="'all', which changes base tensors"):
        trimtab.attach(model, trimtab.LoRA(rank=4), name="two")
    full.detach()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Same shapes, other weights: the sample in the file tells; a bf16 copy of the base passes."""
    model = tiny_llama()
    trained(model, trimtab.LoRA(rank=4)).save(tmp_path)
    other = tiny_llama(seed=5)
    before = copy.deepcopy(other)
    with pytest.raises(trimtab.CheckpointError, match="another base"):
        trimtab.load_adapter(other, tmp_path)
    assert same(other, before) and not trimtab.adapters(other)
    trimtab.load_adapter(tiny_llama().to(torch.bfloat16), tmp_path)


#: Methods that update matrices, with what a model of several adapters may hold.
UPDATING = {name: config for name, config in (PURE | KEEPING).items() if name != "lora-pissa-dora"}


def weights_of(adapter: trimtab.Adapter) -> dict[str, torch.Tensor]:
    return dict(adapter.effective_weights())


@pytest.mark.parametrize("config", UPDATING)
def test_what_a_merge_would_give_does_not_ask_who_is_at_work(config: str) -> None:
    """Effective and merged weights are the adapter's own: beside another one, with none at work, and disabled."""
    model, plain = tiny_llama(), tiny_llama()
    keep = {"keep_base": "host"} if config in KEEPING else {}
    one = trained(model, UPDATING[config], name="one", **keep)
    wanted = weights_of(one)
    name = next(key for key, value in wanted.items() if not torch.equal(value, plain.get_parameter(key)))
    base = plain.get_parameter(name).detach()
    merged = one.merged_tensor(name, base)
    assert not torch.equal(merged, base)
    others = [None] if config in KEEPING else ["two", None]
    if "two" in others:
        two = trained(model, trimtab.LoRA(rank=3), name="two")
        mixed = list(zip(one.effective_weights(), two.effective_weights(), strict=True))
        assert all(torch.equal(mine[1], wanted[mine[0]]) for mine, _ in mixed)
        assert all(torch.equal(theirs[1], weights_of(two)[theirs[0]]) for _, theirs in mixed[:2])
        assert all(not torch.equal(mine[1], theirs[1]) for mine, theirs in mixed)
    for other in others:
        trimtab.activate(model, other)
        out = logits(model, token_ids())
        assert all(torch.equal(value, wanted[key]) for key, value in weights_of(one).items())
        assert torch.equal(one.merged_tensor(name, base), merged)
        assert list(trimtab.adapters(model)) == (["one", "two"] if "two" in others else ["one"])
        assert torch.equal(logits(model, token_ids()), out)


def test_full_training_has_its_own_weights_while_it_is_off() -> None:
    """Under disabled() the base is shown, and the trained matrices are still what the adapter tells of."""
    model = tiny_llama()
    adapter = trained(model, trimtab.Full(), keep_base="host")
    wanted, name = weights_of(adapter), "model.norm.weight"
    norm = adapter.merged_tensor(name, torch.ones(32))
    with adapter.disabled():
        assert all(torch.equal(value, wanted[key]) for key, value in weights_of(adapter).items())
        assert torch.equal(adapter.merged_tensor(name, torch.ones(32)), norm)
        assert not torch.equal(model.get_parameter(name), norm)


def test_only_the_adapter_at_work_adds_to_the_loss() -> None:
    """AdaLoRA's term is none while another adapter, or none, is at work."""
    model = tiny_llama()
    one = trimtab.attach(model, trimtab.AdaLoRA(rank=2, init_rank=4, total_steps=9), name="one")
    term = one.extra_loss()
    assert term is not None
    trimtab.attach(model, trimtab.LoRA(rank=2), name="two")
    assert one.extra_loss() is None
    trimtab.activate(model, None)
    assert one.extra_loss() is None
    trimtab.activate(model, "one")
    again = one.extra_loss()
    assert again is not None and torch.equal(again, term)
