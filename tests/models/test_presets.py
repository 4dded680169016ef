from __future__ import annotations

import pytest
import torch

from trimtab import ConfigError
from trimtab.config import ModelConfig
from trimtab.models.load import shadow_model
from trimtab.models.presets import PRESETS, llama_config

#: Millions of parameters with 32,000 words, as the paper's configurations give them.
PAPER = {"llama-60m": 58.07, "llama-130m": 134.11, "llama-250m": 247.37, "llama-350m": 367.97, "llama-1.3b": 1339.08}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_its_shape(name: str) -> None:
    """The model that is built, the formula and (where it is known) the paper agree on the count."""
    model = shadow_model(ModelConfig(name=name), vocab_size=32_000, seq_len=256)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PRESETS[name].parameters(32_000)
    if name in PAPER:
        assert round(count / 1e6, 2) == PAPER[name]


def test_a_preset_follows_the_papers_settings() -> None:
    """RMSNorm eps 1e-6, init std 0.02, an untied head, SDPA attention, and the tokenizer's vocabulary."""
    config = llama_config("llama-60m", 4096, 2048, eos_id=3, bos_id=5)
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, False)
    assert (config.vocab_size, config.max_position_embeddings) == (4096, 2048)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (3, 5, None)
    model = shadow_model(ModelConfig(name="llama-60m"), vocab_size=4096, seq_len=2048)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())


def test_an_unknown_preset_lists_the_known_ones() -> None:
    """The message names all presets."""
    with pytest.raises(ConfigError, match=r"llama-9m, .*llama-7b"):
        llama_config("llama-61m")
