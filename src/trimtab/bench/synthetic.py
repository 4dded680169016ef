"""Random models and batches of a given shape, for benchmarks: seeded, made in the dtype they are used in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A LLaMA and a batch; the defaults are those of LLaMA-130M and 8 sequences of 256 tokens."""

    hidden: int = 768
    intermediate: int = 2048
    layers: int = 12
    heads: int = 12
    words: int = 32_000
    sequences: int = 8
    length: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return self.sequences * self.length


#: A toy, to see that a script runs.
QUICK = Shape(hidden=128, intermediate=384, layers=2, heads=2, words=500, sequences=2, length=32)


@dataclass(frozen=True)
class Batch:
    """Random tokens; labels shifted, the last of each sequence not scored."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


def random_llama(shape: Shape, dtype: torch.dtype = torch.bfloat16, *, groups: int | None = None) -> Any:
    """A LLaMA with seeded random weights, made in `dtype`: no fp32 copy in anyone's resident memory.

    Args:
        shape: of the model.
        dtype: of its weights.
        groups: heads of the keys and values; None has as many as of the queries.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=groups,
        max_position_embeddings=2 * shape.length,  # room for a prompt
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def random_batch(shape: Shape) -> Batch:
    """Seeded tokens of the shape's batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.words, (shape.sequences, shape.length), generator=generator)
    return Batch(ids, torch.cat((ids[:, 1:], torch.full((shape.sequences, 1), -100)), dim=1))
