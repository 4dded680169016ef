"""Activation checkpointing of each block, non-re-entrant: the same gradients, bit for bit, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import MODELS, loss_of, token_ids
from test_compile import METHODS
from torch import Tensor, nn

import trimtab

#: The methods of test_compile that back-propagate through blocks (prefix tuning is refused with checkpointing), and
#: more. One line adds a method.
CHECKPOINTED: dict[str, tuple[dict[str, Any], torch.dtype | str]] = {
    n: m for n, m in METHODS.items() if n not in ("prefix", "read")
} | {
    "lora, half adapted": ({"name": "lora", "rank": 3, "targets": ["o_proj", "down_proj"]}, torch.float32),
}

FAMILIES = ("llama", "gpt2", "bert", "t5")


def attached(method: str, family: str = "llama") -> tuple[nn.Module, trimtab.Adapter]:
    config, dtype = CHECKPOINTED[method]
    model = MODELS[family]()
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    else:
        trimtab.quantize(model, dtype)
    adapter = trimtab.attach(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for entry in adapter.trainable():
            if entry.group == "adapter" and not entry.parameter.any():
                entry.parameter.copy_(0.1 * torch.randn(entry.parameter.shape, generator=generator))
    model.config.use_cache = False
    return model.train(), adapter


def enable(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def gradients(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """The gradients of a loss, and the bytes that autograd kept for them outside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, token_ids(rows=8, length=24))
    saved = sum(kept.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, saved


CASES = [(method, "llama") for method in CHECKPOINTED] + [("relora", family) for family in FAMILIES[1:]]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_checkpointing_changes_no_gradient(method: str, family: str) -> None:
    """With every block recomputed, dropout included, gradients are bit for bit those without, and less is kept."""
    plain, kept = gradients(attached(method, family)[0])
    model, _ = attached(method, family)
    enable(model)
    checkpointed, less = gradients(model)
    assert plain and plain.keys() == checkpointed.keys()
    # Plain T5 is not bit for bit itself under checkpointing: another attention kernel, another order of sums.
    bound = 1e-5 if family == "t5" else 0.0
    assert all((checkpointed[name] - grad).norm() <= bound * grad.norm() for name, grad in plain.items())
    assert less < 0.8 * kept


def test_the_recomputed_mask_is_the_first_one() -> None:
    """The control of the test above: with another seed between forward and backward, dropout's gradients differ."""
    first = gradients(attached("lora, dropout")[0])[0]
    model, _ = attached("lora, dropout")
    torch.manual_seed(8)
    model.zero_grad()
    loss_of(model, token_ids(rows=8, length=24)).backward()
    others = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(not torch.equal(first[name], others[name]) for name in first)


def test_prefix_tuning_is_refused() -> None:
    """Blocks drop their past keys and values under checkpointing, so a prefix would be dropped in silence."""
    model = MODELS["llama"]()
    trimtab.attach(model, METHODS["prefix"][0])
    enable(model.train())
    with pytest.raises(trimtab.ConfigError, match="prefix tuning does not go with activation checkpointing"):
        loss_of(model, token_ids())


@pytest.mark.parametrize("method", [name for name in METHODS if "relora" in name or name == "adalora"])
def test_training_with_checkpointing_ends_as_without(method: str) -> None:
    """Steps and restarts under checkpointing give bit for bit the same weights."""
    ends = []
    for checkpointing in (False, True):
        model, adapter = attached(method)
        if checkpointing:
            enable(model)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
        for step in range(1, 6):
            torch.manual_seed(step)
            loss_of(model, token_ids(seed=step)).backward()
            optimizer.step()
            adapter.after_step(step, optimizer)
            optimizer.zero_grad()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
