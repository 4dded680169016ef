"""Splitting a model by FSDP2 in an order or in a way that a network beside its backbone does not work with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import batch_for, whisper
from models_for_tests import tiny_llama, token_ids
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

import trimtab
from trimtab.errors import CannotMerge, ConfigError

METHODS = {"read": trimtab.READ(size=4), "ladder": trimtab.Ladder(reduction=4)}


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def attached(**settings: Any) -> tuple[Any, trimtab.Adapter]:
    model = tiny_llama()
    return model, trimtab.attach(model, trimtab.READ(size=4, **settings))


def shard(model: Any) -> None:
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def test_only_methods_that_say_so_work_on_a_split_model() -> None:
    """A method is refused by default: all are but those that are tested."""
    from trimtab.methods import registry

    assert {name for name, method in registry().items() if method.works_sharded} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_splitting_before_attaching_is_refused(method: str, tmp_path: Path) -> None:
    """What comes later is no part of a unit; attach and load_adapter say in which order to go."""
    model = tiny_llama()
    trimtab.attach(model, METHODS[method]).save(tmp_path / "saved")
    model = tiny_llama()
    fully_shard(model.model.layers[0])
    wanted = r": model\.layers\.0 is under FSDP \(fully_shard\).* attach to the whole model first, and call fully"
    with pytest.raises(ConfigError, match="attach" + wanted):
        trimtab.attach(model, METHODS[method])
    with pytest.raises(ConfigError, match="load_adapter" + wanted):
        trimtab.load_adapter(model, tmp_path / "saved")
    assert not trimtab.adapters(model)


def test_splitting_the_blocks_alone_is_refused() -> None:
    """Nobody would average the network's gradients, so that replicas part without a word."""
    model, adapter = attached()
    for block in model.model.layers:
        fully_shard(block)
    with pytest.raises(ConfigError, match=r"parameter_groups\(\): .*so each process would train its own; call fully_s"):
        adapter.parameter_groups(lr=1e-2)
    with pytest.raises(ConfigError, match=r"called on blocks and not on LlamaForCausalLM, which has the adapter"):
        model(input_ids=token_ids())


def test_leaving_out_what_trains_is_refused() -> None:
    model, adapter = attached()
    fully_shard(model, ignored_params={dict(adapter.own())["model.read.output_bias"]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"save\(\): .*model\.read\.output_bias is not, so each process would train"):
        adapter.save("nowhere")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["", ".cells", ".blocks"])
def test_a_unit_of_its_own_for_the_network_is_refused(method: str, part: str) -> None:
    """Its forward is not called as a module's, so nobody would gather it."""
    model = tiny_llama()
    adapter = trimtab.attach(model, METHODS[method])
    lists = dict(model.get_submodule(f"model.{method}").named_children())
    if part and part[1:] not in lists:
        pytest.skip(f"{method} has no {part}")
    name = f"model.{method}{part and f'{part}.0'}"
    fully_shard(model.get_submodule(name))
    fully_shard(model)
    for call in (lambda: adapter.parameter_groups(lr=1e-2), lambda: model(input_ids=token_ids())):
        with pytest.raises(ConfigError, match=rf"fully_shard was called on {name}, whose parameters are then let go"):
            call()


def test_an_encoder_of_its_own_is_refused_and_a_whole_in_between_is_not() -> None:
    """The encoder's output has no gradient that would have its unit gathered again; what holds both ends well."""
    model = whisper()
    adapter = trimtab.attach(model, METHODS["read"])
    fully_shard(model.model.encoder)
    fully_shard(model)
    for call in (lambda: adapter.parameter_groups(lr=1e-2), lambda: model(**batch_for("whisper"))):
        with pytest.raises(ConfigError, match=r"fully_shard was called on model\.encoder, whose parameters"):
            call()
    model = whisper()
    trimtab.untie(model)  # units share no parameter
    adapter = trimtab.attach(model, METHODS["read"])
    fully_shard(model.model)
    fully_shard(model)
    groups = adapter.parameter_groups(lr=1e-2)
    with torch.no_grad():
        next(p for name, p in adapter.own().items() if name.endswith("decoder.read.output_weight")).fill_(0.1)
    model(**batch_for("whisper")).loss.backward()
    assert all(p.grad is not None and bool(p.grad.full_tensor().any()) for p in groups[0]["params"])


def test_an_optimizer_of_before_the_split_is_refused() -> None:
    model, adapter = attached()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    shard(model)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=r"was replaced in the model \(by fully_shard.* build it anew"):
        adapter.after_step(1, optimizer)


def test_what_would_take_the_network_off_is_refused() -> None:
    """The units go on gathering what they were made of, and a module's class has theirs on top of ours."""
    model, adapter = attached()
    second = trimtab.attach(model, METHODS["read"], name="second")
    shard(model)
    model(input_ids=token_ids())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"FSDP.*cannot be switched.*before fully_shard"), second.disabled():
        pass
    with pytest.raises(ConfigError, match=r"FSDP.*cannot be switched"):
        trimtab.activate(model, "default")
    with pytest.raises(ConfigError, match=r"save\(\): .*read.* is not, so each process would train its own"):
        adapter.save("nowhere")
    with pytest.raises(ConfigError, match=r"FSDP.*cannot be detached.*before fully_shard"):
        second.detach()
    with pytest.raises(CannotMerge, match="a recurrent network over the layers"):
        second.merge()
    assert [type(module) for module in model.modules()] == classes


def test_hidden_states_are_not_cached(tmp_path: Path) -> None:
    """Neither by a cache that was opened before the split, nor by one that would be after it."""
    model, adapter = attached()
    batch = {"input_ids": token_ids()}
    cache = trimtab.HiddenCache(adapter, tmp_path / "hidden")
    shard(model)
    wanted = r"FSDP.*hidden states cannot be kept.*a folder for each rank"
    with pytest.raises(ConfigError, match=wanted), cache.batch(batch):
        model(**batch)
    with pytest.raises(ConfigError, match=wanted):
        trimtab.HiddenCache(adapter, tmp_path / "other")


def test_other_ways_to_split_are_refused() -> None:
    """The older FSDP, DeepSpeed's stage 3, and tensor parallelism, alone and under FSDP2."""
    older, adapter = attached()
    FullyShardedDataParallel(older, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parameter_groups\(\): .* split by FSDP, and adapters work with DDP and FS"):
        adapter.parameter_groups(lr=1e-2)
    model, adapter = attached()
    model.model.norm.weight.ds_tensor = torch.ones(2)
    with pytest.raises(ConfigError, match=r"split by DeepSpeed's stage 3, and adapters work with DDP and FSDP2 alone"):
        adapter.parameter_groups(lr=1e-2)
    model, adapter = attached()
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model.model.norm.weight = nn.Parameter(distribute_tensor(torch.ones(32), mesh["tensor"]), requires_grad=False)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is a DTensor, .* adapters work with DDP and FSDP2"):
        adapter.parameter_groups(lr=1e-2)
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(ConfigError, match=r"split over different meshes.*without tensor parallelism"):
        adapter.parameter_groups(lr=1e-2)
