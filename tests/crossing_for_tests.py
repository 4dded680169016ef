"""Small encoder-decoder models of several families, and values and a sink to tap them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models_for_tests import VOCAB, tiny_t5
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from trimtab.nn.crossing import Crossing

WIDE, HEADS, BLOCKS = 32, 4, 2
FRAMES = 14
_SIZES = {"d_model": WIDE, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "vocab_size": VOCAB, "init_std": 0.3}
_HEADS = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
_WITHIN = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128}
_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
_OFF = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def bart(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "forced_eos_token_id": None} | changes
    return BartForConditionalGeneration(BartConfig(**sizes))


def marian(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "forced_eos_token_id": None} | changes
    return MarianMTModel(MarianConfig(**sizes))


def whisper(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "num_mel_bins": 8, "max_source_positions": FRAMES}
    own = {"max_target_positions": 128, "suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**(sizes | own | changes)))


def umt5(**changes: Any) -> nn.Module:
    sizes = {"d_model": WIDE, "d_kv": 8, "d_ff": 48, "num_layers": BLOCKS, "num_heads": HEADS, "vocab_size": VOCAB}
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, **changes))


def bert_to_bert(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": WIDE, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 48}
    off = {
        "vocab_size": VOCAB,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    encoder = BertModel(BertConfig(**sizes, **off))
    decoder = BertLMHeadModel(BertConfig(**sizes, **off, is_decoder=True, add_cross_attention=True, **changes))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    return model


def bert_to_gpt2(**changes: Any) -> nn.Module:
    sizes = {"n_embd": WIDE, "n_layer": BLOCKS, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 128}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2}
    decoder = GPT2LMHeadModel(GPT2Config(**sizes, **off, add_cross_attention=True, initializer_range=0.3, **changes))
    return EncoderDecoderModel(encoder=bert_to_bert().encoder, decoder=decoder)


FAMILIES: dict[str, Callable[..., Any]] = {
    "t5": tiny_t5,
    "umt5": umt5,
    "bart": bart,
    "marian": marian,
    "whisper": whisper,
    "bert": bert_to_bert,
}
MAIN = ("t5", "bart", "marian", "whisper")


def build(family: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's blocks."""
    decoder = model.get_decoder()
    lists = [
        m
        for m in decoder.modules()
        if isinstance(m, nn.ModuleList) and type(m[0]).__name__.endswith(("Block", "Layer"))
    ]
    return lists[0]


def batch_of(
    model: Any, *, padded: bool = False, queries: int = 7, keys: int = FRAMES, rows: int = 2
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, queries), generator=generator)
    if isinstance(model, WhisperForConditionalGeneration):
        shape = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator, dtype=model.dtype), "decoder_input_ids": ids}
    mask = torch.ones(rows, keys, dtype=torch.long)
    if padded:
        mask[0, -4:] = 0
        mask[1, :2] = 0
    given = torch.randint(3, VOCAB, (rows, keys), generator=generator)
    return {"input_ids": given, "attention_mask": mask, "decoder_input_ids": ids}


class Tapper:
    """Values that are a linear map of the encoder's states, and a sink that keeps what it is given."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float64, d: int = WIDE) -> None:
        self.weight = torch.randn(width, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.weight = (self.weight / 6).to(dtype).requires_grad_()
        self.states: list[Tensor] = []
        self.c: list[tuple[int, Tensor]] = []
        self.modes: list[bool] = []

    def values(self, states: Tensor) -> Tensor:
        self.states.append(states)
        return states @ self.weight.t()

    def sink(self, j: int, c: Tensor) -> None:
        self.modes.append(torch.is_grad_enabled())
        self.c.append((j, c))


@contextmanager
def tapped(model: Any) -> Iterator[Tapper]:
    crossing = Crossing(blocks_of(model), type(model).__name__)
    tapper = Tapper(crossing.width, model.dtype)
    crossing.put_on(tapper.values, tapper.sink)
    try:
        yield tapper
    finally:
        crossing.take_off()


def expected(model: Any, batch: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    """c_j by plain operations, from the probabilities that the eager model's cross-attentions return."""
    own = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    modules = Crossing(blocks_of(model), "").modules
    handles = [module.register_forward_hook(lambda _, args, out: seen.append(out[-1])) for module in modules]
    with torch.no_grad():
        states = model(**batch).encoder_last_hidden_state
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(own)
    assert all(torch.allclose(P.sum(-1), torch.ones((), dtype=P.dtype)) for P in seen)
    split = (states @ weight.t()).view(*states.shape[:2], HEADS, -1).transpose(1, 2)
    return [(P @ split).transpose(1, 2).flatten(2) for P in seen]
