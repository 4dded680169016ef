"""A tiny PEFT model with LoRA, and its training."""

from __future__ import annotations

from typing import Any

import torch
from models_for_tests import MODELS, loss_of, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from trimtab.interop.peft import Restarts

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "value"]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peft_model(family: str = "llama", dtype: str = "fp32", **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 12, "target_modules": TARGETS[family]} | changes
    if family == "gpt2":
        settings["fan_in_fan_out"] = True
    model = get_peft_model(MODELS[family]().to(DTYPES[dtype]), LoraConfig(**settings))
    assert isinstance(model, PeftModel)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, restarts: Restarts, optimizer: torch.optim.Optimizer, steps: range) -> list[dict[str, Any]]:
    events = []
    for step in steps:
        loss_of(model, token_ids(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        events += restarts.after_step(step, optimizer).events
    return events
