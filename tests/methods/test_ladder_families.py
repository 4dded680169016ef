"""Ladder Side-Tuning on every family of Transformer, held against the family's own blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import TAKEN, answer, padded
from families_for_tests import DECODERS, ENCODERS, PAIRS, albert
from torch import Tensor, nn

import trimtab
from trimtab.nn.stacks import find_stacks

Ladder = trimtab.Ladder
FAMILIES = TAKEN["ladder"]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_network_as_wide_as_the_model_is_the_model(family: str) -> None:
    """r = 1, gates at 1 and U = 1: cut weights are whole, and the side network ends with the model's own states.

    So the side blocks get the masks, positions, biases and encoder outputs that the model's own blocks get.
    """
    model = FAMILIES[family]()
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


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
def test_generation_needs_no_cache_and_refuses_one(family: str, beams: int) -> None:
    """Greedy tokens are those of the teacher-forced logits; with a cache the error says what to do."""
    model = FAMILIES[family]()
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
        trimtab.attach(albert(), Ladder(reduction=4, blocks=("albert_layer_groups",)))
