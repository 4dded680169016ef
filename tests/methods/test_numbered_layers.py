"""PEFT's `layers_to_transform`: VeRA and AdaLoRA folders whose config numbers the layers answer as in peft."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_llama, token_ids
from torch import nn

import trimtab
from trimtab.methods.frozen import FrozenBaseAdapter

peft = pytest.importorskip("peft")

#: Targets of each family, and what its stack of blocks is called.
FAMILIES = {
    "llama": (["q_proj", "up_proj"], "layers"),
    "gpt2": (["c_attn", "c_fc"], "h"),
    "bert": (["query", "output.dense"], "layer"),
    "t5": (["q", "wi"], "block"),
}
KINDS: dict[str, Any] = {
    "vera": lambda **given: peft.VeraConfig(r=6, projection_prng_key=11, **given),
    "adalora": lambda **given: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=3, **given),
}


def saved(family: str, kind: str, folder: Path, **given: Any) -> nn.Module:
    """A PEFT model off its start, and its folder."""
    torch.manual_seed(5)
    theirs: nn.Module = peft.get_peft_model(MODELS[family](), KINDS[kind](**given))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(str(folder))  # type: ignore[operator]
    return theirs


@pytest.mark.parametrize("layers", [[1], 0, [0, 1]])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbered_layers_are_pefts(kind: str, family: str, named: bool, layers: Any, tmp_path: Path) -> None:
    """With and without `layers_pattern`, the layers are those that peft chose, and the logits are peft's."""
    targets, stack = FAMILIES[family]
    given = {"target_modules": targets, "layers_to_transform": layers} | ({"layers_pattern": stack} if named else {})
    theirs = saved(family, kind, tmp_path, **given)
    inner = theirs.get_base_model()  # type: ignore[operator]
    chosen = {name for name, module in inner.named_modules() if hasattr(module, "base_layer")}
    ours = MODELS[family]()
    before = logits(ours, token_ids())
    adapter = trimtab.load_adapter(ours, tmp_path)
    assert isinstance(adapter, FrozenBaseAdapter)
    assert set(adapter.layers) == chosen
    expected = logits(inner, token_ids())
    assert (logits(ours, token_ids()) - expected).norm() < 1e-5 * expected.norm()
    assert (before - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_cannot_be_used_are_refused(kind: str, tmp_path: Path) -> None:
    """Names in the place of numbers, and numbers beside a regular expression, as for LoRA."""
    saved("llama", kind, tmp_path, target_modules=["q_proj"], layers_to_transform=[1])
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"layers_to_transform": ["a"]}, r"layers_to_transform = \['a'\] is no list of numbers"),
        ({"target_modules": ".*q_proj"}, "layers_to_transform goes with a list"),
        ({"layers_to_transform": [7]}, "matches no linear layer"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises((trimtab.CheckpointError, trimtab.TargetError), match=message):
            trimtab.load_adapter(tiny_llama(), tmp_path)


def test_peft_has_no_numbered_layers_in_ia3() -> None:
    """Why the field is unknown there: should peft gain it, (IA)3 is to read it, too."""
    known = {field.name for field in dataclasses.fields(peft.IA3Config)}
    assert not {"layers_to_transform", "layers_pattern"} & known
