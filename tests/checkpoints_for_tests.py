"""Small checkpoints with tokenizers, and small labelled sets, as a user would have them on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from trimtab.data.tokenizer import END_OF_TEXT, train_bpe

_TEXT = "the a cat dog sat ran on under mat tree red blue big small sky sun moon house river hill good bad"
WORDS = _TEXT.split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences(number: int, seed: int = 0) -> list[str]:
    """Different ones, of 3 to 25 words."""
    drawn = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join(drawn.choice(WORDS) for _ in range(drawn.randint(3, 25)))] = None
    return list(found)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template and a token to pad with that is not its end."""
    made = train_bpe(iter(sentences(300)), 300).hf
    made.add_special_tokens({"pad_token": "<|pad|>", "sep_token": END_OF_TEXT})
    made.chat_template = CHATML
    return made


def save_checkpoints(folder: Path, *families: str) -> Path:
    """One of each family, under its name; returns the folder."""
    for family in families:
        save_checkpoint(folder / family, family)
    return folder


def save_checkpoint(folder: Path, family: str) -> Path:
    """A model of a family ("llama", "bert", "t5") with random weights, and its tokenizer."""
    words = tokenizer()
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "vocab_size": len(words)}
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, **ids, num_key_value_heads=2, max_position_embeddings=256)
        )
    elif family == "bert":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.BertModel(transformers.BertConfig(**shape, **ids, max_position_embeddings=128))
    else:
        shape = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**shape, **ids, decoder_start_token_id=words.pad_token_id)
        )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences that are "warm" when they begin with a word of the sun's side; easy to learn."""
    return [
        {"text": text, "label": "warm" if text.split()[0] in WORDS[: len(WORDS) // 2] else "cold"}
        for text in sentences(number, seed)
    ]
