"""Probabilities of dropout that 16 random bits cannot tell from none, or from all, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models_for_tests import loss_of, tiny_llama, token_ids

import trimtab
from trimtab.nn.dropping import dropped, gain

METHODS = (trimtab.LoRA, trimtab.VeRA, trimtab.AdaLoRA, trimtab.ReLoRA)
SETTINGS: dict[type[trimtab.Method], dict[str, int]] = {trimtab.ReLoRA: {"restart_every": 2, "rank": 4}}


@pytest.mark.parametrize("p", [1e-6, 7e-6, 0.999995, 1 - 2**-40])
@pytest.mark.parametrize("method", METHODS)
def test_what_would_be_none_or_all_is_refused(method: type[trimtab.Method], p: float) -> None:
    """The message names the setting, its value, and the range that there is."""
    with pytest.raises(trimtab.ConfigError, match=f"{method.__name__}: dropout = {p}: .*use 0, or 1.6e-05 to 0.99998"):
        method(dropout=p, **SETTINGS.get(method, {}))


@pytest.mark.parametrize("p", [0.0, 1.6e-5, 0.99998])
@pytest.mark.parametrize("method", METHODS)
def test_the_ends_of_the_range_train(method: type[trimtab.Method], p: float) -> None:
    """Forward and backward are finite with the least and the largest dropout there is."""
    model = tiny_llama()
    trimtab.attach(model, method(dropout=p, **SETTINGS.get(method, {}))).model.train()
    loss_of(model, token_ids()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_folder_with_such_a_dropout_is_refused(tmp_path: Path) -> None:
    """The file's field is at fault, in one line."""
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 1e-6}))
    with pytest.raises(trimtab.CheckpointError, match="dropout = 1e-06"):
        trimtab.load_adapter(tiny_llama(), tmp_path)


def test_the_functions_refuse_it_as_well() -> None:
    """Who uses a layer's function without a config gets a ValueError, neither a division by zero nor no dropout."""
    for p in (1e-6, 0.999995):
        with pytest.raises(ValueError, match="dropout"):
            gain(p)
        with pytest.raises(ValueError, match="dropout"):
            dropped(torch.ones(4), p, torch.tensor(0))
