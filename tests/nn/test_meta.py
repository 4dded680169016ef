"""Layers that wear an adapter compute shapes on the meta device, which knows no autocast."""

from __future__ import annotations

import pytest
from models_for_tests import tiny_llama, token_ids

import trimtab

METHODS: dict[str, trimtab.Method] = {
    "lora": trimtab.LoRA(rank=2, dropout=0.5),
    "dora": trimtab.LoRA(rank=2, dora=True, dropout=0.5),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=3, orthogonality=0.1),
    "vera": trimtab.VeRA(rank=4),
    "ia3": trimtab.IA3(),
    "bitfit": trimtab.BitFit(add_bias=True),
    "bottleneck": trimtab.Bottleneck(size=3),
    "read": trimtab.READ(size=3, cell="gru"),
    "ladder": trimtab.Ladder(reduction=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_forward_and_backward_give_the_shapes_of_the_cpu(name: str) -> None:
    model = tiny_llama()
    trimtab.attach(model, METHODS[name])
    here = model(input_ids=token_ids()).logits
    model.to("meta")
    there = model(input_ids=token_ids().to("meta")).logits
    assert there.is_meta and there.shape == here.shape and there.dtype == here.dtype
    there.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and p.grad.shape == p.shape for p in trained)
