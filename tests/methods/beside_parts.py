"""READ and Ladder on tiny models, for tests of what holds of every network beside a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families_for_tests import FAMILIES, batch_for
from models_for_tests import tiny_llama, train
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import trimtab


def wide_gpt_neox() -> nn.Module:
    """Heads wide enough that a quarter of a narrower one can be rotated."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval()


#: The families that each method takes. Not ALBERT with Ladder: its one block runs in every layer.
TAKEN: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "read": FAMILIES,
    "ladder": {name: make for name, make in FAMILIES.items() if name != "albert"} | {"gpt_neox": wide_gpt_neox},
}
EVERY = [(method, family) for method, families in TAKEN.items() for family in families]


def config_for(method: str, family: str = "", **settings: Any) -> trimtab.Method:
    if method == "ladder":
        return trimtab.Ladder(reduction=4, **settings)
    named = {"blocks": ("albert_layer_groups",)} if family == "albert" else {}
    return trimtab.READ(**{"size": 8, **named, **settings})


def shaken(adapter: trimtab.Adapter, seed: int = 7) -> None:
    """Move every tensor, so that nothing is zero, and no gate one half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.own().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def trained_llama(config: trimtab.Method) -> tuple[nn.Module, trimtab.Adapter]:
    model = tiny_llama()
    adapter = trimtab.attach(model, config)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 5))
    return model, adapter


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
