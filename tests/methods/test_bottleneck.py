"""Bottleneck adapters on models: where they begin, training, files, resuming, endings, bad input."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, forward, logits, loss_of, tiny_bert, tiny_llama, token_ids, train

import trimtab
from trimtab.methods.bottleneck import BottleneckAdapter

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def attached(model: torch.nn.Module, config: trimtab.Bottleneck, **kwargs: object) -> BottleneckAdapter:
    adapter = trimtab.attach(model, config, **kwargs)  # type: ignore[arg-type]
    assert isinstance(adapter, BottleneckAdapter)
    return adapter


def steps(model: torch.nn.Module, adapter: trimtab.Adapter, numbers: range) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(model, adapter, optimizer, numbers)
    return optimizer


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_at_the_base_learns_and_leaves(family: str, placement: str) -> None:
    """Bit-equal at attach; the loss falls; every parameter gets a gradient; detach gives every bit back."""
    model = MODELS[family]()
    before, ids = copy.deepcopy(model), token_ids()
    adapter = attached(model, trimtab.Bottleneck(size=8, placement=placement))  # type: ignore[arg-type]
    assert torch.equal(logits(model, ids), logits(before, ids))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    losses = []
    for _ in range(15):
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.995 * losses[0]
    loss_of(model, ids).backward()
    assert all(entry.parameter.grad.abs().sum() > 0 for entry in adapter.trainable())  # type: ignore[union-attr]
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(before.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())


def test_the_count_is_the_papers() -> None:
    """2 d m + d + m parameters an adapter; two a block, or one."""
    for placement, number in (("houlsby", 4), ("pfeiffer", 2)):
        adapter = attached(tiny_llama(), trimtab.Bottleneck(size=8, placement=placement))  # type: ignore[arg-type]
        assert sum(p.numel() for p in adapter.own().values()) == number * (2 * 32 * 8 + 32 + 8)


def test_it_computes_what_a_hook_would() -> None:
    """The same function as a plain torch network put on the output of each layer by a hook."""
    model, other = tiny_bert(), tiny_bert()
    adapter = attached(model, trimtab.Bottleneck(size=8, activation="relu"))
    for number, part in enumerate(adapter.own().values()):
        torch.nn.init.normal_(part, std=0.3, generator=torch.Generator().manual_seed(number))
    for name, layer in adapter.layers.items():

        def adapt(_: object, __: object, y: torch.Tensor, layer: object = layer) -> torch.Tensor:
            down, up = layer.adapter_down, layer.adapter_up  # type: ignore[attr-defined]
            h = torch.relu(y @ down.t() + layer.adapter_down_bias)  # type: ignore[attr-defined]
            return y + h @ up.t() + layer.adapter_up_bias  # type: ignore[attr-defined]

        other.get_submodule(name).register_forward_hook(adapt)
    assert torch.allclose(logits(model, token_ids()), logits(other, token_ids()), atol=1e-5)
    assert not torch.allclose(logits(model, token_ids()), logits(tiny_bert(), token_ids()), atol=1e-2)


def test_near_identity_is_the_published_start() -> None:
    """init=near: both matrices within two deviations of 1e-3, biases 0, the function changed by next to nothing."""
    model = tiny_llama()
    before = logits(model, token_ids())
    adapter = attached(model, trimtab.Bottleneck(size=32, init="near"))
    drawn = torch.cat([p.detach().flatten() for n, p in adapter.own().items() if not n.endswith("_bias")])
    assert drawn.abs().max() <= 2e-3 and (drawn == 0).sum() == 0
    # The deviation of a normal distribution that is cut at two deviations.
    assert drawn.std().item() == pytest.approx(0.8796e-3, rel=0.03)
    assert all((p == 0).all() for n, p in adapter.own().items() if n.endswith("_bias"))
    change = (logits(model, token_ids()) - before).norm() / before.norm()
    assert 0 < change < 1e-3
    again = attached(tiny_llama(), trimtab.Bottleneck(size=32, init="near"))
    other = attached(tiny_llama(), trimtab.Bottleneck(size=32, init="near", seed=1))
    for name, part in adapter.own().items():
        assert torch.equal(part, again.own()[name])
        assert name.endswith("_bias") or not torch.equal(part, other.own()[name])


def test_houlsbys_norms_train_by_setting() -> None:
    """train_also=norms lets the norms train beside the adapters, and nothing else of the base."""
    adapter = attached(tiny_bert(), trimtab.Bottleneck(size=4, train_also=("norms",)))
    trained = {entry.name for entry in adapter.trainable() if entry.group != "adapter"}
    assert trained and all("LayerNorm" in name for name in trained)


@pytest.mark.parametrize("also", [None, ("norms",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_the_same_when_loaded(family: str, also: tuple[str, ...] | None, tmp_path: Path) -> None:
    """Save and load: logits bit-equal, in a folder that names our method and no PEFT type."""
    model = MODELS[family]()
    config = trimtab.Bottleneck(size=4, activation="tanh", train_also=also)  # type: ignore[arg-type]
    adapter = attached(model, config)
    steps(model, adapter, range(1, 4))
    adapter.save(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "peft_type" not in said and said["trimtab_method"] == "bottleneck"
    fresh = MODELS[family]()
    loaded = trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))
    assert isinstance(loaded.config, trimtab.Bottleneck) and loaded.config.activation == "tanh"


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    """Unknown fields, missing ones, impossible values, another base: one line each, the model stays free."""
    attached(tiny_llama(), trimtab.Bottleneck(size=4)).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    model = tiny_llama()
    for change, message in [
        ({"gate": True}, "gate = True"),
        ({"size": 0}, "size = 0"),
        ({"size": 8}, "another base"),
        ({"target_modules": ["nope"]}, "nope"),
        ({"trimtab_method": "other"}, "peft_type None"),
    ]:
        file.write_text(json.dumps(settings | change))
        with pytest.raises(trimtab.TrimtabError, match=message):
            trimtab.load_adapter(model, tmp_path)
        assert not trimtab.adapters(model)
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "activation"}))
    with pytest.raises(trimtab.CheckpointError, match="lacks activation"):
        trimtab.load_adapter(model, tmp_path)


def test_it_resumes_bit_for_bit() -> None:
    """Four steps equal two, a stored state, and two more."""
    whole = tiny_llama()
    adapter = attached(whole, trimtab.Bottleneck(size=4), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(whole, adapter, optimizer, range(1, 3))
    state, moments = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, adapter, optimizer, range(3, 5))
    halves = tiny_llama()
    second = attached(halves, trimtab.Bottleneck(size=4), dtype=torch.bfloat16)
    second.load_state_dict(state)
    optimizer = torch.optim.AdamW(second.parameter_groups(lr=1e-2))
    optimizer.load_state_dict(moments)
    train(halves, second, optimizer, range(3, 5))
    assert torch.equal(logits(halves, token_ids()), logits(whole, token_ids()))


def test_it_has_no_merged_form() -> None:
    """merge() raises with the reason and leaves the adapter at work."""
    model = tiny_llama()
    adapter = attached(model, trimtab.Bottleneck(size=4))
    steps(model, adapter, range(1, 3))
    out = logits(model, token_ids())
    with pytest.raises(trimtab.CannotMerge, match="activation between"):
        adapter.merge()
    assert torch.equal(logits(model, token_ids()), out)
    assert list(adapter.effective_weights()) == []


def test_bad_settings_are_refused_before_anything_is_edited() -> None:
    """A size above the width, and settings out of their range."""
    model = tiny_llama()
    with pytest.raises(trimtab.ConfigError, match=r"size = 33 is above the width of .*o_proj, 32"):
        trimtab.attach(model, trimtab.Bottleneck(size=33))
    assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())
    for wrong in ({"size": 0}, {"activation": "elu"}, {"placement": "both"}, {"init": "ones"}):
        with pytest.raises(trimtab.ConfigError, match=next(iter(wrong))):
            trimtab.Bottleneck(**wrong)  # type: ignore[arg-type]
    assert trimtab.Bottleneck(placement="pfeiffer", targets=("o_proj",)).idle_settings()
    assert not trimtab.Bottleneck(placement="pfeiffer").idle_settings()


def test_it_trains_in_bf16_with_checkpointing() -> None:
    """bf16 with fp32 adapters: checkpointed blocks give the same gradients as plain ones."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        adapter = attached(model.train(), trimtab.Bottleneck(size=4, init="near"), dtype=torch.bfloat16)
        assert {p.dtype for p in adapter.own().values()} == {torch.float32}
        out = forward(model, token_ids())
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.own().values()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) and math.isfinite(a.sum()) for a, b in zip(*grads, strict=True))


def test_blocks_compile_once_for_all_depths() -> None:
    """Twelve compiled blocks are two graphs (whether the first block's input needs a gradient) and answer alike."""
    torch._dynamo.reset()
    model, ids = tiny_llama(num_hidden_layers=12), token_ids()
    adapter = attached(model, trimtab.Bottleneck(size=4, init="near"))
    eager = logits(model, ids)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    out = model(input_ids=ids, use_cache=False).logits
    out.square().sum().backward()
    assert graphs <= 2
    assert torch.allclose(out, eager, atol=1e-5)
    assert all(p.grad is not None for p in adapter.own().values())
    torch._dynamo.reset()
