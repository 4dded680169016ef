"""A tiny causal model with random weights and a tokenizer with a chat template, as a folder that can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models_for_tests import tiny_llama

from trimtab.data.tokenizer import train_bpe

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("red", "blue", "green", "gold", "grey", "pink")


def save_chat_model(folder: Path, *, dtype: torch.dtype = torch.float32, positions: int = 512) -> Path:
    """Write a LLaMA of two blocks whose tokenizer has a ChatML template, and return its folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(iter([" ".join(WORDS) * 9, "system user assistant"]), 290).hf.backend_tokenizer,
        **{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=positions, tie_word_embeddings=True, **ends)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_chats(path: Path, count: int, start: int = 0) -> Path:
    """Questions of which the answer is the colour that they name, a row each."""
    rows = []
    for n in range(start, start + count):
        colour = WORDS[n % len(WORDS)]
        question = f"{colour} {WORDS[n // len(WORDS) % len(WORDS)]} {n}"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
