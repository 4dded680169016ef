"""Models whose parameters are replaced after attach: what is there trains and is saved, or an error says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models_for_tests import VOCAB, logits, loss_of, tiny_bert, tiny_gpt2, tiny_llama, token_ids, train
from torch import nn

import trimtab
from trimtab.errors import ConfigError
from trimtab.methods.base import AdapterState

CONFIGS: dict[str, trimtab.Method] = {
    "lora": trimtab.LoRA(rank=4),
    "lora-also": trimtab.LoRA(rank=4, train_also=("norms", "head")),
    "lora-dora": trimtab.LoRA(rank=4, dora=True),
    "relora": trimtab.ReLoRA(rank=4, restart_every=2, train_also=()),
    "vera": trimtab.VeRA(rank=8),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=4, total_steps=9, allocate_every=1),
    "ia3": trimtab.IA3(),
    "bitfit": trimtab.BitFit(add_bias=True),
    "bottleneck": trimtab.Bottleneck(size=4),
    "prompt": trimtab.PromptTuning(length=4),
    "prefix": trimtab.PrefixTuning(length=4),
    "full": trimtab.Full(),
}


def assign(model: nn.Module) -> None:
    """Every parameter becomes another one of the same value."""
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def adam(adapter: trimtab.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


@pytest.mark.parametrize("config", CONFIGS)
def test_what_took_the_place_of_a_parameter_trains(config: str) -> None:
    """After load_state_dict(assign=True) training, states and endings are those of a model that was left alone."""
    models = [tiny_llama(), tiny_llama()]
    before = copy.deepcopy(models[0].state_dict())
    adapters = [trimtab.attach(model, CONFIGS[config], keep_base="host") for model in models]
    assign(models[1])
    states = []
    for model, adapter in zip(models, adapters, strict=True):
        train(model, adapter, adam(adapter), range(1, 4))
        states.append(copy.deepcopy(adapter.state_dict().tensors))
    assert {e.parameter for e in adapters[1].trainable()} <= set(models[1].parameters())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    out = logits(models[1], token_ids())
    assert torch.equal(out, logits(models[0], token_ids()))
    with adapters[1].disabled():
        pass
    assert torch.equal(logits(models[1], token_ids()), out)
    adapters[1].detach()
    assert all(torch.equal(value, before[name]) for name, value in models[1].state_dict().items())


@pytest.mark.parametrize("config", [name for name in CONFIGS if name not in ("full", "relora", "bottleneck")])
def test_what_took_the_place_of_a_parameter_is_saved(config: str, tmp_path: Path) -> None:
    """A folder has what the model computes with, and so has a merge, which unmerge takes back."""
    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config], keep_base="host")
    assign(model)
    before = logits(model, token_ids())
    train(model, adapter, adam(adapter), range(1, 4))
    assign(model)
    out = logits(model, token_ids())
    assert not torch.equal(out, before)
    adapter.save(tmp_path)
    other = tiny_llama()
    trimtab.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other, token_ids()), out)
    if not adapter.no_merge:
        adapter.merge()
        torch.testing.assert_close(logits(model, token_ids()), out, rtol=1e-3, atol=1e-4)
        adapter.unmerge()
        assert torch.equal(logits(model, token_ids()), out)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_optimizer_of_replaced_parameters_is_refused(config: str) -> None:
    """At the first step, and in the middle of a run at the next one: it would write into what nobody reads."""
    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config])
    optimizer = adam(adapter)
    assign(model)
    with pytest.raises(ConfigError, match="parameter_groups"):
        train(model, adapter, optimizer, range(1, 2))
    optimizer = adam(adapter)
    train(model, adapter, optimizer, range(1, 3))
    assign(model)
    with pytest.raises(ConfigError, match=r"after_step\(3\).*replaced.*parameter_groups"):
        train(model, adapter, optimizer, range(3, 4))
    train(model, adapter, adam(adapter), range(3, 4))


def test_a_single_replaced_parameter_is_noticed() -> None:
    """By name at the first step; in the middle of a run within as many steps as its group has parameters."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=("q_proj",)))
    layer, count = model.model.layers[1].self_attn.q_proj, len(adapter.trainable())
    optimizer = adam(adapter)
    layer.lora_A = nn.Parameter(layer.lora_A.detach().clone())
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.lora_A was replaced"):
        adapter.after_step(1, optimizer)
    optimizer = adam(adapter)
    adapter.after_step(1, optimizer)
    layer.lora_B = nn.Parameter(layer.lora_B.detach().clone())
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.lora_B was replaced"):
        train(model, adapter, optimizer, range(2, 2 + count))


def test_an_optimizer_may_hold_a_part_and_change() -> None:
    """Whoever trains some of the parameters, in groups of their own, and others later, is left in peace."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    own = [entry.parameter for entry in adapter.trainable()]
    first, second = (torch.optim.AdamW([{"params": part}], lr=1e-2) for part in (own[::2], own[1::2]))
    train(model, adapter, first, range(1, 4))
    train(model, adapter, second, range(4, 7))
    second.add_param_group({"params": own[::2]})
    second.param_groups.reverse()
    train(model, adapter, second, range(7, 9))


def test_looking_after_the_optimizer_costs_a_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains is listed at the first step and not again, as long as the optimizer stays the same."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    optimizer, calls = adam(adapter), []
    plain = type(adapter).trainable
    monkeypatch.setattr(type(adapter), "trainable", lambda self: calls.append(1) or plain(self))
    for step in range(1, 40):
        adapter.after_step(step, optimizer)
        assert len(calls) == 1
    adapter.after_step(40, adam(adapter))
    assert len(calls) == 2  # for its groups


def resized(model: nn.Module) -> nn.Module:
    model.resize_token_embeddings(VOCAB + 7)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_head_that_was_resized_trains(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """resize_token_embeddings puts a new module in: an older optimizer is refused, a new one trains it."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, train_also=("embeddings", "head")), dtype=dtype)
    optimizer = adam(adapter)
    adapter.after_step(1, optimizer)
    resized(model)
    with pytest.raises(ConfigError, match=r"lm_head\.weight was replaced"):
        adapter.after_step(2, optimizer)
    before = model.lm_head.weight.detach().clone()
    train(model, adapter, adam(adapter), range(2, 5))
    assert not torch.equal(model.lm_head.weight, before)
    adapter.save(tmp_path)
    other = resized(tiny_llama())
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def calls(adapter: trimtab.Adapter, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that trains, stores or folds in what an adapter has."""
    optimizer = torch.optim.SGD(adapter.model.parameters(), lr=0.0)
    state = AdapterState({}, {"last_step": 0})
    yield "parameter_groups", lambda: adapter.parameter_groups(lr=1.0)
    yield "after_step", lambda: adapter.after_step(1, optimizer)
    yield "state_dict", adapter.state_dict
    yield "load_state_dict", lambda: adapter.load_state_dict(state)
    yield "save", lambda: adapter.save(folder)
    yield "merge", adapter.merge


def test_an_adapted_head_that_was_resized_is_refused(tmp_path: Path) -> None:
    """The adapter is on a module that the model has no more; detach still works."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4, targets=("q_proj", "lm_head")))
    resized(model)
    for name, call in calls(adapter, tmp_path / "saved"):
        with pytest.raises(ConfigError, match=rf"{name}\(.*lm_head.*another module"):
            call()
    assert not (tmp_path / "saved").exists()
    adapter.detach()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_tied_weights_that_were_parted_are_refused(tmp_path: Path) -> None:
    """load_state_dict(assign=True) makes two tensors of a tied one; frozen ones may be parted."""
    model = tiny_gpt2()
    adapter = trimtab.attach(model, trimtab.BitFit(train_also=("embeddings",)))
    assign(model)
    for name, call in calls(adapter, tmp_path / "saved"):
        with pytest.raises(ConfigError, match=rf"{name}\(.*lm_head\.weight.*tie_weights"):
            call()
    model.tie_weights()
    train(model, adapter, adam(adapter), range(1, 3))
    assert model.lm_head.weight is model.transformer.wte.weight
    frozen = tiny_gpt2()
    adapter = trimtab.attach(frozen, trimtab.LoRA(rank=4))
    assign(frozen)
    train(frozen, adapter, adam(adapter), range(1, 3))


def test_a_parameter_that_is_gone_is_refused(tmp_path: Path) -> None:
    """Its name is said."""
    for take in (lambda m: m.classifier._parameters.pop("bias"), lambda m: setattr(m, "classifier", nn.Identity())):
        model = tiny_bert()
        adapter = trimtab.attach(model, trimtab.LoRA(rank=4, train_also=("head",)))
        take(model)
        for name, call in calls(adapter, tmp_path / "saved"):
            with pytest.raises(ConfigError, match=rf"{name}\(.*classifier\.\w+ is no parameter"):
                call()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("config", ["lora", "lora-also", "relora", "vera", "prompt"])
def test_attached_without_values(config: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Attached on the meta device, then to_empty and load_state_dict: as one that is attached to those values."""
    narrow = tiny_llama().to(dtype)
    straight = trimtab.attach(narrow, CONFIGS[config])
    with torch.device("meta"):
        model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config], dtype=dtype)
    model.to_empty(device="cpu")
    model.model.rotary_emb = copy.deepcopy(narrow.model.rotary_emb)
    model.load_state_dict(narrow.state_dict())
    for one, other in ((narrow, straight), (model, adapter)):
        train(one, other, adam(other), range(1, 4))
    assert torch.equal(logits(model, token_ids()), logits(narrow, token_ids()))
    assert not any(tensor.is_meta for tensor in adapter.state_dict().tensors.values())
    if config != "relora":
        adapter.save(tmp_path)
        again = tiny_llama().to(dtype)
        trimtab.load_adapter(again, tmp_path)
        torch.testing.assert_close(logits(again, token_ids()), logits(model, token_ids()))
    for other in () if adapter.no_merge else (straight, adapter):
        other.merge()
    assert torch.equal(logits(model, token_ids()), logits(narrow, token_ids()))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("config", ["lora", "vera", "prompt", "full"])
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_fsdp_is_refused_by_name(config: str, after_a_forward: bool, tmp_path: Path) -> None:
    """fully_shard puts DTensors in (and, after a forward, whole ones for a while); no part is taken for the whole."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS[config])
    fully_shard(model)
    if after_a_forward:
        logits(model, token_ids())
    for name, call in calls(adapter, tmp_path / "saved"):
        with pytest.raises(ConfigError, match=rf"{name}\(.*FSDP.*DDP"):
            call()
    with pytest.raises(ConfigError, match=r"attach.*FSDP"):
        trimtab.attach(fully_shard(tiny_llama()), CONFIGS[config])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("original", [False, True])
def test_the_older_fsdp_is_refused_by_name(original: bool, tmp_path: Path) -> None:
    """FullyShardedDataParallel makes one flat tensor of all, or shards of one dimension in the parameters' place."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny_llama()
    adapter = trimtab.attach(model, CONFIGS["full"])
    FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    for name, call in calls(adapter, tmp_path / "saved"):
        with pytest.raises(ConfigError, match=rf"{name}\(.*FSDP.*DDP"):
            call()


@pytest.mark.usefixtures("process_group")
def test_a_tensor_that_is_split_over_processes_is_refused() -> None:
    """Tensor parallelism leaves DTensors in plain modules, DeepSpeed's stage 3 empty tensors beside their shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = tiny_llama()
    norm = model.model.norm
    norm.weight.ds_tensor = torch.ones(2)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"attach: model\.norm\.weight.*DeepSpeed"):
        trimtab.attach(model, trimtab.LoRA(rank=4))
    whole = torch.ones(32)
    norm.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,))))
    with pytest.raises(ConfigError, match=r"attach: model\.norm\.weight is a DTensor"):
        trimtab.attach(model, trimtab.LoRA(rank=4))
    assert not trimtab.adapters(model)
    norm.weight = nn.Parameter(whole)
    trimtab.attach(model, trimtab.LoRA(rank=4))


def test_a_loss_is_of_the_replaced_parameters() -> None:
    """The gradient of a step reaches what parameter_groups gives."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=4))
    assign(model)
    groups = adapter.parameter_groups(lr=1e-2)
    loss_of(model, token_ids()).backward()
    assert all(parameter.grad is not None for group in groups for parameter in group["params"])
