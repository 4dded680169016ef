"""Ladder Side-Tuning on every family of Transformer, held against the family's own blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import DECODERS, ENCODERS, FAMILIES, PAIRS, batch_for
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import trimtab
from trimtab.nn.stacks import find_stacks

Ladder = trimtab.Ladder


def gpt_neox() -> nn.Module:
    """Heads wide enough that a quarter of a narrower one can be rotated."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval()


#: Not ALBERT, whose one block runs in every layer.
MADE = {name: make for name, make in FAMILIES.items() if name != "albert"} | {"gpt_neox": gpt_neox}


def padded(family: str) -> dict[str, Tensor]:
    """A batch whose first row begins with padding, where the family has a mask."""
    batch = {name: value.clone() for name, value in batch_for(family).items()}
    if "attention_mask" in batch:
        batch["attention_mask"][0, :3] = 0
    return batch


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def heard(block: nn.Module) -> list[Tensor]:
    """Fills with what a block gives, as hooks that come from now on see it."""
    found: list[Tensor] = []
    block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    return found


def final_norm(owner: nn.Module) -> Any:
    for name in ("norm", "ln_f", "final_layer_norm", "layer_norm", "layernorm"):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name)
    return lambda states: states  # post-norm blocks


@pytest.mark.parametrize("family", MADE)
def test_a_side_network_as_wide_as_the_model_is_the_model(family: str) -> None:
    """r = 1, gates at 1 and U = 1: cut weights are whole, and the side network ends with the model's own states.

    So the side blocks get the masks, positions, biases and encoder outputs that the model's own blocks get.
    """
    model = MADE[family]()
    stack = find_stacks(model)[-1]
    plain = heard(stack.blocks[-1])
    adapter = trimtab.attach(model, Ladder(reduction=1))
    changed = heard(stack.blocks[-1])
    with torch.no_grad():
        for name, parameter in adapter.own().items():
            if name.endswith("gates"):
                parameter.fill_(10.0)
            elif name.endswith("up.weight"):
                parameter.copy_(torch.eye(len(parameter)))
        answer(model, padded(family))
        added, wanted = changed[0] - plain[0], final_norm(stack.owner)(plain[0])
    kept = padded(family)["attention_mask"].bool() if family in {**DECODERS, **ENCODERS} and family != "vit" else ...
    torch.testing.assert_close(added[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("init", ["pruned", "drawn"])
@pytest.mark.parametrize("family", MADE)
def test_a_life_on_every_family(family: str, init: str, tmp_path: Path) -> None:
    """Starts as the backbone to the bit, trains all of its tensors, is read back from its file, and leaves no trace."""
    model, batch = MADE[family](), padded(family)
    before, first = copy.deepcopy(model.state_dict()), answer(model, batch)
    modules, random = [type(module) for module in model.modules()], torch.get_rng_state()
    adapter = trimtab.attach(model, Ladder(reduction=4, init=init), keep_base="host")
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
    fresh = MADE[family]()
    trimtab.load_adapter(fresh, tmp_path)
    torch.testing.assert_close(answer(fresh, batch), after, rtol=1e-5, atol=1e-5)

    with adapter.disabled():
        assert torch.equal(answer(model, batch), first)
    assert torch.equal(answer(model, batch), after)
    with pytest.raises(trimtab.CannotMerge, match="a network beside the model"):
        adapter.merge()
    adapter.detach()
    assert torch.equal(answer(model, batch), first)
    left = model.state_dict()
    assert list(left) == list(before) and all(torch.equal(left[name], before[name]) for name in before)
    assert [type(module) for module in model.modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", MADE)
def test_nothing_of_the_backbone_is_kept_for_a_backward(family: str) -> None:
    """No saved tensor is of a backbone's parameter in a block, and none is as wide as its feed-forward network."""
    model, batch = MADE[family]().train(), padded(family)
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    adapter = trimtab.attach(model, Ladder(reduction=4))
    inside = {p.data_ptr() for block in blocks for p in block.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    assert inside and kept and not any(tensor.data_ptr() in inside for tensor in kept)
    inner = 92 if family == "gpt_neox" else 48
    assert not any(tensor.shape[-1:] == (inner,) for tensor in kept)
    loss.backward()
    assert all(entry.parameter.grad is not None for entry in adapter.trainable())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
def test_generation_needs_no_cache_and_refuses_one(family: str, beams: int) -> None:
    """Greedy tokens are those of the teacher-forced logits; with a cache the error says what to do."""
    model = MADE[family]()
    batch = {name: value for name, value in padded(family).items() if name != "labels"}
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    base = model.generate(**batch, **settings)
    adapter = trimtab.attach(model, Ladder(reduction=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter.own().items():
            if name.endswith("up.weight"):
                parameter.copy_(4 * torch.randn(parameter.shape, generator=generator))
    tokens = model.generate(**batch, **settings, use_cache=False)
    assert not torch.equal(tokens, base)
    if beams == 1 and family in PAIRS:
        start = torch.ones(len(tokens), 6 - tokens.shape[1], dtype=torch.long)  # Whisper leaves it out of its answer
        forced = answer(model, batch | {"decoder_input_ids": torch.cat((start, tokens[:, :-1]), dim=1)})
        assert torch.equal(forced.argmax(-1)[:, -5:], tokens[:, -5:])
    elif beams == 1:
        ones = torch.ones(len(tokens), 4, dtype=torch.long)
        mask = torch.cat((batch["attention_mask"], ones), dim=1)
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        forced = answer(model, {"input_ids": tokens[:, :-1], "attention_mask": mask, **places})
        assert torch.equal(forced.argmax(-1)[:, -5:], tokens[:, -5:])
    with pytest.raises(trimtab.ConfigError, match="use_cache=False"):
        model.generate(**batch, **settings, use_cache=True)
    with adapter.disabled():
        assert torch.equal(model.generate(**batch, **settings), base)


def test_one_block_for_all_layers_is_refused() -> None:
    with pytest.raises(trimtab.ConfigError, match="runs a block 4 times in a forward"):
        trimtab.attach(FAMILIES["albert"](), Ladder(reduction=4, blocks=("albert_layer_groups",)))
