"""READ and Ladder on every family of Transformer: started exactly, trained, saved, taken off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_parts import EVERY, TAKEN, answer, config_for, padded
from families_for_tests import batch_for
from torch import Tensor

import trimtab
from trimtab.nn.stacks import find_stacks

KINDS: dict[str, list[dict[str, Any]]] = {
    "read": [*({"cell": cell} for cell in ("rnn", "gru", "lstm")), {"cell": "none", "aggregate": "mean"}],
    "ladder": [{"init": "pruned"}, {"init": "drawn"}],
}
LIVES = [
    pytest.param(method, family, kind, id="-".join((method, family, *kind.values())))
    for method, family in EVERY
    for kind in KINDS[method]
]
NO_MERGE = {"read": "recurrent network", "ladder": "a network beside the model"}


@pytest.mark.parametrize(("method", "family", "kind"), LIVES)
def test_a_life_on_every_family(method: str, family: str, kind: dict[str, Any], tmp_path: Path) -> None:
    """Starts as the backbone to the bit, trains all of its tensors, is read back from its file, and leaves no trace."""
    make, batch = TAKEN[method][family], padded(family)
    model = make()
    before, first = copy.deepcopy(model.state_dict()), answer(model, batch)
    modules, random = [type(module) for module in model.modules()], torch.get_rng_state()
    adapter = trimtab.attach(model, config_for(method, family, **kind), keep_base="host")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(answer(model, batch), first)
    start = {e.name: e.parameter.detach().clone() for e in adapter.trainable()}
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=2e-2))
    for step in range(1, 5):
        model(**batch_for(family, seed=step)).loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
    after = answer(model, batch)
    assert not torch.allclose(after, first, atol=1e-4)
    assert all(not torch.equal(e.parameter, start[e.name]) for e in adapter.trainable())

    adapter.save(tmp_path)
    fresh = make()
    trimtab.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh, batch), after, rtol=1e-5, atol=1e-5)

    with adapter.disabled():
        assert torch.equal(answer(model, batch), first)
    assert torch.equal(answer(model, batch), after)
    with pytest.raises(trimtab.CannotMerge, match=NO_MERGE[method]):
        adapter.merge()
    adapter.detach()
    assert torch.equal(answer(model, batch), first)
    left = model.state_dict()
    assert list(left) == list(before) and all(torch.equal(left[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("method", "family"), EVERY)
def test_nothing_of_the_backbone_is_kept_for_a_backward(method: str, family: str) -> None:
    """No saved tensor is of a backbone's parameter in a block, and none is as wide as its feed-forward network."""
    model, batch = TAKEN[method][family]().train(), padded(family)
    config = config_for(method, family)
    blocks = [block for stack in find_stacks(model, config.blocks) for block in stack.blocks]
    inside = {p.data_ptr() for block in blocks for p in block.parameters()}
    adapter = trimtab.attach(model, config)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert inside and kept and not any(tensor.data_ptr() in inside for tensor in kept)
    inner = 92 if (method, family) == ("ladder", "gpt_neox") else 48
    assert not any(tensor.shape[-1:] == (inner,) for tensor in kept)
    loss.backward()
    assert all(entry.parameter.grad is not None for entry in adapter.trainable())
