"""Tiny models of many families, with random weights, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from models_for_tests import VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn

Batch = dict[str, Tensor]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _made(cls: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = cls(config).eval()
    return model


def opt() -> nn.Module:
    return _made(
        tf.OPTForCausalLM,
        tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.1,
        ),
    )  # fmt: skip


def gpt_neox() -> nn.Module:
    return _made(
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64,
        ),
    )  # fmt: skip


def qwen2() -> nn.Module:
    return _made(
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        ),
    )  # fmt: skip


def roberta() -> nn.Module:
    return _made(
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, num_labels=2, pad_token_id=0,
        ),
    )  # fmt: skip


def distilbert() -> nn.Module:
    return _made(
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(
            vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64, num_labels=2
        ),
    )


def albert() -> nn.Module:
    return _made(
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(
            vocab_size=VOCAB, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64, num_labels=2,
        ),
    )  # fmt: skip


def vit() -> nn.Module:
    return _made(
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16,
            patch_size=4, num_labels=3,
        ),
    )  # fmt: skip


def bart() -> nn.Module:
    return _made(
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=3, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, forced_eos_token_id=None,
            init_std=0.3, **SPECIAL,
        ),
    )  # fmt: skip


def marian() -> nn.Module:
    return _made(
        tf.MarianMTModel,
        tf.MarianConfig(
            vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=3,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, forced_eos_token_id=None,
            init_std=0.3, **SPECIAL,
        ),
    )  # fmt: skip


def whisper() -> nn.Module:
    return _made(
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(
            vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8, max_source_positions=16,
            max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
        ),
    )  # fmt: skip


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama, "gpt2": tiny_gpt2, "opt": opt, "gpt_neox": gpt_neox, "qwen2": qwen2,
}  # fmt: skip
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": tiny_bert, "roberta": roberta, "distilbert": distilbert, "albert": albert, "vit": vit,
}  # fmt: skip
PAIRS: dict[str, Callable[[], nn.Module]] = {"t5": tiny_t5, "bart": bart, "marian": marian, "whisper": whisper}
FAMILIES = {**DECODERS, **ENCODERS, **PAIRS}


def batch_for(family: str, *, seed: int = 1, rows: int = 3) -> Batch:
    """A batch with labels that a model of the family takes as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    ids = token_ids(seed=seed, rows=rows)
    if family == "whisper":
        return {"input_features": torch.randn(rows, 8, 32, generator=generator), "labels": ids[:, :6].contiguous()}
    if family == "vit":
        images = torch.randn(rows, 3, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.arange(rows) % 3}
    if family in ENCODERS:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    if family in PAIRS:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :7].contiguous()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
