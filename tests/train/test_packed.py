"""Models are asked whether they keep packed examples apart, and those that do not are given padded ones."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from trimtab.tasks.batches import LayCausal
from trimtab.tasks.encode import Encoded
from trimtab.tasks.ragged import Ragged
from trimtab.train.objective import Objective
from trimtab.train.packed import packing_fault

SHAPE: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}, ""),
    "gpt2": ("GPT2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, ""),
    "gpt_neox": ("GPTNeoX", {**SHAPE, "intermediate_size": 64, "rotary_pct": 0.5}, ""),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "",
    ),
    "gptj": ("GPTJ", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, ""),
    "gemma2": (
        "Gemma2",
        {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64},
        "",
    ),
    "mistral": (
        "Mistral",
        {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8},
        "see 8 tokens back",
    ),
    "bloom": (
        "Bloom",
        {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "does not take them|see each",
    ),
    "mamba": ("Mamba", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "."),
}


def build(family: str, attention: str | None = None) -> PreTrainedModel:
    kind, shape, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    options = {} if attention is None else {"attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def rows(*lengths: int) -> Encoded:
    drawn = np.random.default_rng(0)
    ids = Ragged.of([drawn.integers(3, 97, size=length) for length in lengths])
    learned = Ragged(np.ones(len(ids.flat), dtype=bool), ids.starts)
    learned.flat[ids.starts[:-1]] = False
    return Encoded(ids, np.arange(len(lengths)), learned=learned)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_keeps_examples_apart_is_packed_and_no_other(family: str) -> None:
    """What is said of a model is what its losses show: packed as padded where it says nothing."""
    model, data, collate = build(family), rows(20, 7, 11), LayCausal(0, 64, True)
    fault = packing_fault(model, collate, data)
    wanted = FAMILIES[family][2]
    assert re.search(wanted, fault) if wanted else fault == ""
    if not fault:
        objective = Objective(model, chunked=False)
        with torch.no_grad():
            packed = float(objective(collate(data, [0, 1, 2])))
            alone = sum(float(objective(LayCausal(0, 64, False)(data, [n]))) for n in range(3))
        assert packed == pytest.approx(alone, rel=1e-5)


def test_attention_that_adds_masks_is_given_one_to_add() -> None:
    """Where True would be added as 1, examples would see each other."""
    for family in ("llama", "gemma2"):
        model = build(family, "eager")
        assert packing_fault(model, LayCausal(0, 64, True), rows(20, 7)) == ""


def test_a_window_longer_than_every_example_is_no_matter() -> None:
    model = build("mistral")
    assert packing_fault(model, LayCausal(0, 64, True), rows(8, 5)) == ""
    assert packing_fault(model, LayCausal(0, 64, True), rows(9, 5)) != ""


def test_a_model_that_lets_them_see_each_other_is_found_out() -> None:
    """A control: a model that takes neither mask nor positions (from either alone it would tell the examples)."""
    model = build("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert "see each other" in packing_fault(model, LayCausal(0, 64, True), rows(20, 7))
