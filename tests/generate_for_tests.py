"""Tiny models that write, with tokenizers, as folders; and adapters on them that change what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from chats_for_tests import chat_tokenizer
from models_for_tests import tiny_llama
from transformers import T5Config, T5ForConditionalGeneration

import trimtab

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4, "dropout": 0.5},
    "read": {"name": "read"},
    "prompt": {"name": "prompt", "length": 3},
    "prefix": {"name": "prefix", "length": 3},
    "ladder": {"name": "ladder", "reduction": 2},
}


def save_llama(folder: Path, template: str | None = None, **changes: Any) -> str:
    """A causal model of 64 positions with its tokenizer."""
    tokenizer = chat_tokenizer(template)
    model = tiny_llama(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None, **changes)
    return _save(folder, model, tokenizer)


def save_t5(folder: Path) -> str:
    """An encoder-decoder model with its tokenizer."""
    tokenizer = chat_tokenizer(None, pad_token="</s>")
    torch.manual_seed(3)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(**sizes, vocab_size=len(tokenizer), decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    return _save(folder, T5ForConditionalGeneration(config), tokenizer)


def _save(folder: Path, model: Any, tokenizer: Any) -> str:
    """Only words of ASCII are written, and answers do not end by themselves: random weights write anything."""
    odd = [n for n in range(len(tokenizer)) if not tokenizer.decode([n]).isascii() or n == tokenizer.eos_token_id]
    model.generation_config.suppress_tokens = odd
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(model: Any, method: dict[str, Any], folder: Path, seed: int = 0) -> str:
    """An adapter of a model, with random values; the model is given back as it was."""
    adapter = trimtab.attach(model, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for entry in adapter.trainable():
            entry.parameter.copy_(torch.randn(entry.parameter.shape, generator=generator) * 0.5)
    adapter.save(folder)
    adapter.detach()
    return str(folder)
