"""A LLaMA-like checkpoint as a GGUF file for llama.cpp: hyperparameters, tokenizer, and the tensors one at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.export.checkpoint import Checkpoint, meta_model, model_names, open_checkpoint, ties
from trimtab.export.gguffile import FILE_TYPES, refuse_used_file, write_gguf
from trimtab.export.ggufnames import Names
from trimtab.export.gguftokens import write_tokenizer

#: llama.cpp's tensor of factors by which the rotation's frequencies are divided.
_ROPE_FACTORS = "rope_freqs.weight"


def export_model(source: str, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write a model for llama.cpp.

    Args:
        source: a checkpoint, a folder or a hub name.
        out: the new file.
        dtype: of the matrices (fp32, fp16 or bf16); None keeps the checkpoint's. Vectors are fp32, as llama.cpp
            wants them.

    Returns:
        The number of tensors written.

    Raises:
        ConfigError: there is no such model, or `out` is in use.
        CheckpointError: the model or its tokenizer has no form in llama.cpp, or a file is damaged.
    """
    refuse_used_file(out)
    checkpoint = open_checkpoint(source)
    model = meta_model(checkpoint.folder, source)
    config: Any = model.config
    names = Names(config, source)
    tied = {name for group in ties(model) for name in group[1:]}
    stored = {name: key for key, name in model_names(checkpoint, model).items() if name not in tied}
    for group in ties(model):  # a file may hold a tied weight under its second name
        other = next((key for key, name in model_names(checkpoint, model).items() if name in group), None)
        if other is not None:
            stored[group[0]] = other
    missing = [name for name, _ in model.named_parameters() if name not in stored]
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} of the model's tensors, {missing[0]} first")
    keys: dict[str, str] = {}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    extra = _rope_factors(config, source)
    if extra is not None:
        kinds[_ROPE_FACTORS] = (torch.float32, tuple(extra.shape))
    for name, parameter in model.named_parameters():
        theirs = names.of(name)
        if theirs is None:
            raise CheckpointError(f"{source}: {name} has no place in llama.cpp's {names.family.arch}")
        wide = dtype or _stored_dtype(checkpoint, stored[name])
        kinds[theirs] = (torch.float32 if parameter.dim() == 1 else wide, tuple(parameter.shape))
        keys[theirs] = name

    def value(theirs: str) -> Tensor:
        if theirs == _ROPE_FACTORS:
            assert extra is not None
            return extra
        return names.rows(keys[theirs], checkpoint.read(stored[keys[theirs]]))

    def describe(writer: Any) -> None:
        matrices = [kind for kind, shape in kinds.values() if len(shape) == 2]
        writer.add_type("model")
        writer.add_name(Path(source).name)
        writer.add_file_type(FILE_TYPES[max(set(matrices), key=matrices.count)])
        _describe(writer, config, source)
        write_tokenizer(writer, checkpoint.folder, config.vocab_size)

    write_gguf(out, names.family.arch, describe, kinds, value)
    return len(kinds)


def _stored_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    dtype = checkpoint.tensors[key].dtype
    return dtype if dtype in FILE_TYPES else torch.float32


def _describe(writer: Any, config: Any, label: str) -> None:
    """The hyperparameters."""
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"{label}: hidden_act is {config.hidden_act!r}; llama.cpp computes SiLU in this model")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _context(config: Any) -> int:
    """Positions; with a sliding window no more than it, up to which every token sees all before it, as in llama.cpp."""
    window = getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True)
    return int(min(config.max_position_embeddings, window) if used else config.max_position_embeddings)


def _rope_factors(config: Any, label: str) -> Tensor | None:
    """What llama.cpp divides each pair's frequency by, (head_dim / 2,); None for 1 everywhere.

    Llama 3.1 slows the low frequencies by `factor`, leaves the high ones, and goes from one to the other linearly in
    original_length / wavelength between low_freq_factor and high_freq_factor.
    """
    rope = config.rope_parameters
    if rope["rope_type"] in ("default", "linear"):
        return None
    if rope["rope_type"] != "llama3":
        raise CheckpointError(
            f"{label}: the rotation is of the type {rope['rope_type']!r}; default, linear and llama3 can be written"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequency = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1.0 - kept) / rope["factor"] + kept)
    return factors.float()
