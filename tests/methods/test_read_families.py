"""READ on families of Transformer: what they generate, and which head trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import config_for
from families_for_tests import DECODERS, ENCODERS, FAMILIES, PAIRS, batch_for
from torch import nn
from transformers import BertForMaskedLM

import trimtab

READ = trimtab.READ


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [*DECODERS, *PAIRS])
def test_generation_with_and_without_cache(family: str, beams: int) -> None:
    """The same tokens either way, with prompts of several lengths, and others than the backbone's."""
    model = FAMILIES[family]()
    batch = {name: value for name, value in batch_for(family).items() if name != "labels"}
    if family != "whisper":
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, slice(None, 4) if family in DECODERS else slice(-4, None)] = 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    base = model.generate(**batch, **settings)
    adapter = trimtab.attach(model, config_for("read", family, init="drawn", scale=3.0))
    cached = model.generate(**batch, **settings, use_cache=True)
    assert not torch.equal(cached, base)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    with adapter.disabled():
        assert torch.equal(model.generate(**batch, **settings), base)


def test_what_stands_beside_the_base_model_trains_whatever_its_name_but_not_in_a_language_model() -> None:
    model: Any = ENCODERS["bert"]()
    model.mixing = nn.Linear(32, 32)
    trained = {entry.name for entry in trimtab.attach(model, READ(size=8)).trainable()}
    assert {"mixing.weight", "mixing.bias", "classifier.weight"} <= trained
    torch.manual_seed(0)
    words = BertForMaskedLM(model.config)
    assert all(entry.group == "adapter" for entry in trimtab.attach(words, READ(size=8)).trainable())


@pytest.mark.parametrize("family", ENCODERS)
def test_the_head_of_a_task_trains_unasked(family: str) -> None:
    model = FAMILIES[family]()
    adapter = trimtab.attach(model, config_for("read", family))
    names = {entry.name for entry in adapter.trainable() if entry.group == "head"}
    base = {id(parameter) for parameter in model.base_model.parameters()}
    beside = {name for name, parameter in model.named_parameters() if id(parameter) not in base}
    assert beside and beside <= names
    adapter = trimtab.attach(FAMILIES[family](), config_for("read", family, train_also=()))
    assert all(entry.group == "adapter" for entry in adapter.trainable())
