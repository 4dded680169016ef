"""Random models and batches of a given shape, for benchmarks: seeded, made in the dtype they are used in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


@dataclass(frozen=True)
class Shape:
    """A Transformer and a batch; the defaults are those of LLaMA-130M and 8 sequences of 256 tokens.

    `layers` are those of each stack: an encoder-decoder model has as many in both.
    """

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


#: T5-base and BERT-base, at the same number of tokens.
T5_BASE = Shape(intermediate=3072, words=32_128)
BERT_BASE = Shape(intermediate=3072, words=30_522)
#: A toy, to see that a script runs.
QUICK = Shape(hidden=128, intermediate=384, layers=2, heads=2, words=500, sequences=2, length=32)


@dataclass(frozen=True)
class Batch:
    """Random tokens.

    For a causal model the labels are shifted, the last of each sequence not scored; for an encoder-decoder
    `decoder_input_ids` are the labels shifted to the right; for a classifier the labels are (n,).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    decoder_attention_mask: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: value.to(device) for name, value in tensors if value is not None})


def _made_in(dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """A seeded model made in `dtype`: no fp32 copy in anyone's resident memory."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(default)


def random_llama(shape: Shape, dtype: torch.dtype = torch.bfloat16, *, groups: int | None = None) -> Any:
    """A LLaMA with seeded random weights, made in `dtype`.

    Args:
        shape: of the model.
        dtype: of its weights.
        groups: heads of the keys and values; None has as many as of the queries.
    """
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
    return _made_in(dtype, lambda: LlamaForCausalLM(config))


def random_t5(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A T5 of the first version (relu, one matrix of embeddings and head), without dropout."""
    config = T5Config(
        vocab_size=shape.words,
        d_model=shape.hidden,
        d_kv=shape.hidden // shape.heads,
        d_ff=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        attn_implementation="sdpa",
    )
    return _made_in(dtype, lambda: T5ForConditionalGeneration(config))


def random_bert(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A BERT with a classifier of two classes, without dropout."""
    config = BertConfig(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(512, 2 * shape.length),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return _made_in(dtype, lambda: BertForSequenceClassification(config))


def random_batch(shape: Shape) -> Batch:
    """Seeded tokens of the shape's batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.words, (shape.sequences, shape.length), generator=generator)
    return Batch(ids, torch.cat((ids[:, 1:], torch.full((shape.sequences, 1), -100)), dim=1))


def random_pairs(shape: Shape) -> Batch:
    """Seeded sources and targets, each of the shape's length."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, shape.words, (2, shape.sequences, shape.length), generator=generator)
    start = torch.zeros(shape.sequences, 1, dtype=torch.long)
    return Batch(ids, labels, decoder_input_ids=torch.cat((start, labels[:, :-1]), dim=1))


def random_labelled(shape: Shape) -> Batch:
    """Seeded sequences, each of one of two classes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.words, (shape.sequences, shape.length), generator=generator)
    return Batch(ids, torch.arange(shape.sequences) % 2)


@dataclass(frozen=True)
class Family:
    """A kind of model, a shape and a batch for it, and the linears of its blocks."""

    describe: str
    shape: Shape
    model: Callable[[Shape], Any]
    batch: Callable[[Shape], Batch]
    targets: tuple[str, ...]

    def arguments(self, batch: Batch) -> tuple[dict[str, Any], torch.Tensor]:
        """What such a model is called with, and the labels from which it computes a loss itself."""
        if self.model is random_bert:
            return {"input_ids": batch.input_ids}, batch.labels
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.decoder_input_ids is None:
            return arguments, batch.input_ids  # a causal model shifts them itself
        return {**arguments, "decoder_input_ids": batch.decoder_input_ids}, batch.labels


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": Family("LLaMA-130M", Shape(), random_llama, random_batch, _LLAMA),
    "t5": Family("T5-base", T5_BASE, random_t5, random_pairs, ("q", "k", "v", "o", "wi", "wo")),
    "bert": Family(
        "BERT-base, classifier", BERT_BASE, random_bert, random_labelled, ("query", "key", "value", "dense")
    ),
}
