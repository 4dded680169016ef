"""The LLaMA shapes of the ReLoRA paper (arXiv 2307.05695, and the `configs/` of its code), by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

#: The vocabulary of the paper's runs, taken when no tokenizer is known.
PAPER_VOCABULARY = 32_000

#: What a preset's config says at least; rotary positions have no weights, so a larger number costs nothing.
MIN_POSITIONS = 1024


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that tell one preset from another.

    Attributes:
        hidden: d, width of the residual stream.
        inner: width of the feed-forward network.
        layers: number of blocks.
        heads: attention heads, each d / heads wide, with as many keys and values.
    """

    hidden: int
    inner: int
    layers: int
    heads: int

    def parameters(self, vocab_size: int) -> int:
        """Number of parameters: embedding and head untied, no biases, two norms a block and one at the end."""
        d = self.hidden
        return 2 * vocab_size * d + self.layers * (4 * d * d + 3 * d * self.inner + 2 * d) + d


PRESETS: dict[str, LlamaShape] = {
    "llama-9m": LlamaShape(128, 352, 4, 4),
    "llama-20m": LlamaShape(256, 688, 4, 4),
    "llama-35m": LlamaShape(384, 1024, 6, 8),
    "llama-40m": LlamaShape(416, 1024, 8, 8),
    "llama-60m": LlamaShape(512, 1376, 8, 8),
    "llama-71m": LlamaShape(512, 1368, 12, 8),
    "llama-100m": LlamaShape(640, 1708, 12, 10),
    "llama-130m": LlamaShape(768, 2048, 12, 12),
    "llama-250m": LlamaShape(768, 2560, 24, 16),
    "llama-350m": LlamaShape(1024, 2736, 24, 16),
    "llama-1.3b": LlamaShape(2048, 5461, 24, 32),
    "llama-3b": LlamaShape(2560, 6848, 32, 32),
    "llama-7b": LlamaShape(4096, 11008, 32, 32),
}


def nearest_presets(name: str) -> list[str]:
    """Up to three presets whose names are like `name`."""
    return difflib.get_close_matches(name.lower().replace("_", "-"), list(PRESETS), n=3, cutoff=0.6)


def llama_config(
    preset: str,
    vocab_size: int = PAPER_VOCABULARY,
    max_positions: int = MIN_POSITIONS,
    *,
    eos_id: int | None = None,
    bos_id: int | None = None,
) -> LlamaConfig:
    """The transformers config of a preset: SDPA attention, RMSNorm eps 1e-6, init std 0.02, untied head.

    Args:
        preset: a key of `PRESETS`.
        vocab_size: the tokenizer's.
        max_positions: longest sequence; raised to `MIN_POSITIONS`.
        eos_id: end of text, for generation.
        bos_id: beginning of text, where the tokenizer has one.

    Raises:
        ConfigError: no preset has this name.
    """
    if preset not in PRESETS:
        raise ConfigError(f"model.name: no preset is called {preset!r}; the presets are {', '.join(PRESETS)}")
    from transformers import LlamaConfig

    shape = PRESETS[preset]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(max_positions, MIN_POSITIONS),
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
