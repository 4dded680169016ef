"""What a model hands out when asked stays what it is without a network beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import config_for
from families_for_tests import FAMILIES, batch_for
from models_for_tests import tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn

import trimtab

LISTS = ("hidden_states", "attentions")
KINDS = tuple(f"{part}{kind}" for part in ("", "encoder_", "decoder_", "cross_") for kind in LISTS)


def handed_out(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    with torch.no_grad():
        out: Any = model(**batch, output_hidden_states=True, output_attentions=True)
    return {kind: out[kind] for kind in KINDS if out.get(kind) is not None}


def plain(family: str) -> Any:
    model: Any = FAMILIES[family]()
    model.eval().set_attn_implementation("eager")  # the others form no probabilities
    return model


@pytest.mark.parametrize(
    ("name", "family"), [*(("read", one) for one in FAMILIES), ("ladder", "gpt2"), ("ladder", "t5")]
)
def test_hidden_states_and_attentions_are_those_of_the_plain_model(name: str, family: str) -> None:
    batch, model = batch_for(family), plain(family)
    wanted = handed_out(plain(family), batch)
    trimtab.attach(model, config_for(name, family))
    model.train().eval()
    found = handed_out(model, batch)
    assert wanted and list(found) == list(wanted)
    for kind, values in wanted.items():
        torch.testing.assert_close(found[kind], values, msg=kind)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_generation_hands_out_hidden_states(make: Any) -> None:
    """For two tokens, of two blocks and what these began with."""
    model = make().eval()
    trimtab.attach(model, trimtab.READ(size=8))
    out = model.generate(
        token_ids(), max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True, eos_token_id=None
    )
    states = out.get("hidden_states") or out.get("decoder_hidden_states")
    assert len(states) == 2 and all(len(step) == 3 for step in states)
