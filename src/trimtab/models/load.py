"""The model that a run trains: a preset with random weights, or a causal LM from a folder or a hub.

A preset's weights are drawn tensor by tensor from a generator seeded by a hash of (seed, name), so they
depend on nothing else: not on the global random state, the number of threads, or the other tensors.
Files are read as safetensors alone, and no code that came with a model is ever run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from trimtab.config import ModelConfig
from trimtab.errors import ConfigError
from trimtab.models.presets import PRESETS, llama_config, nearest_presets
from trimtab.quiet import quiet_libraries

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    eos_id: int | None = None,
    bos_id: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The model in fp32 on the CPU, with SDPA attention where it has that.

    Args:
        config: a preset, a folder or a hub name, and whether to checkpoint activations.
        vocab_size: the tokenizer's; a preset takes it, a loaded model must have at least as many.
        seq_len: the longest sequence it will see.
        eos_id: the tokenizer's end of text; a preset takes it.
        bos_id: the tokenizer's beginning of text or None; a preset takes it.
        seed: of a preset's weights.

    Raises:
        ConfigError: there is no such model, it cannot be reached or read, it is no causal LM, or the
            vocabulary or the sequence length does not fit it.
    """
    if config.name in PRESETS:
        shape = llama_config(config.name, vocab_size, seq_len, eos_id=eos_id, bos_id=bos_id)
        with no_init_weights():
            model: PreTrainedModel = LlamaForCausalLM(shape)
        draw_weights(model, seed)
    else:
        _check_fit(config.name, read_config(config.name), vocab_size, seq_len)
        model = _load(config.name)
        _check_causal(config.name, model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def shadow_model(config: ModelConfig, *, vocab_size: int, seq_len: int, offline: bool = False) -> PreTrainedModel:
    """The same model on the meta device: shapes without values, for counting.

    Args:
        config: as for `build_model`.
        vocab_size: as for `build_model`.
        seq_len: as for `build_model`.
        offline: take a hub model's config from the local cache alone.

    Raises:
        ConfigError: as `build_model`, as far as the config of the model shows it.
    """
    if config.name in PRESETS:
        with torch.device("meta"):
            return LlamaForCausalLM(llama_config(config.name, vocab_size, seq_len))
    hf = read_config(config.name, offline=offline)
    _check_fit(config.name, hf, vocab_size, seq_len)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf, trust_remote_code=False)
    except ValueError as error:
        raise _not_of_kind(config.name, hf, "causal language model", error) from None


def checkpoint_activations(model: Any) -> None:
    """Keep a block's input alone, and compute the block again in the backward pass."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # what later releases of transformers 5 call it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def draw_weights(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Fill each matrix with N(0, std) and each vector (a norm's weight) with 1, in fp32 on the CPU."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn_weight(name, parameter.shape, seed, std))


def drawn_weight(name: str, shape: Sequence[int], seed: int, std: float = 0.02) -> Tensor:
    """One tensor of `draw_weights`; it depends on its own name alone."""
    if len(shape) == 1:
        return torch.ones(tuple(shape))
    digest = hashlib.sha256(f"model\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def read_config(name: str, *, offline: bool = False) -> Any:
    """The transformers config of a local folder or a hub name, without its weights.

    Raises:
        ConfigError: the folder has no config, the name is no model's, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.name: the folder {name} has no config.json; give a folder that save_pretrained wrote"
            )
    else:
        _check_name(name, folder)
    try:
        with quiet_libraries():
            hf = AutoConfig.from_pretrained(
                str(folder) if folder.is_dir() else name, trust_remote_code=False, local_files_only=offline
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name, folder, error) from None
    if getattr(hf, "quantization_config", None) is not None:
        raise ConfigError(f"model.name: {name} holds quantised weights; training needs the plain checkpoint")
    return hf


def _check_name(name: str, folder: Path) -> None:
    """Refuse what is certainly neither a preset, a folder nor a hub name, before anything is asked of a hub."""
    if folder.is_file():
        raise ConfigError(f"model.name: {name} is a file; give the folder that holds it and config.json")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"model.name: there is no folder {name}")
    if name in PRESETS:
        raise ConfigError(
            f"model.name: {name} is a preset, whose weights are random, for `trimtab pretrain`; give the folder or hub "
            "name of a model that was trained"
        )
    near = nearest_presets(name)
    if not _HUB_NAME.fullmatch(name) or (near and "/" not in name):
        hint = f"did you mean {' or '.join(near)}? The" if near else "the"
        raise ConfigError(f"model.name: no preset is called {name!r}; {hint} presets are {', '.join(PRESETS)}")


def load_for_generation(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal or an encoder-decoder model on the CPU, to write with.

    Args:
        name: a folder or hub name.
        dtype: that its weights are read in.

    Raises:
        ConfigError: there is no such model, it cannot be reached or read, or it writes nothing.
    """
    if read_config(name).is_encoder_decoder:
        return _load(name, AutoModelForSeq2SeqLM, "encoder-decoder model of text", dtype)
    model = _load(name, dtype=dtype)
    _check_causal(name, model)
    return model


def _load(
    name: str, kind: Any = AutoModelForCausalLM, what: str = "causal language model", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    try:
        model, missing = load_with(kind, name, dtype=dtype)
    except ConfigError:  # a ValueError, too, and it says all already
        raise
    except ValueError as error:
        raise _not_of_kind(name, read_config(name), what, error) from None
    if missing:
        raise ConfigError(
            f"model.name: {name} lacks {len(missing)} of the model's tensors, {missing[0]} first; "
            f"it is not a whole {what}"
        )
    return model


@quiet_libraries()
def load_with(kind: Any, name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, list[str]]:
    """A checkpoint by one of transformers' auto classes, and the names of the tensors that it lacks.

    Those that it has in another shape count, where `settings` let such pass.

    Args:
        kind: the auto class.
        name: a folder or hub name.
        dtype: of the model, whatever the files have.
        settings: changes of its config.

    Raises:
        ConfigError: it cannot be reached or read.
        ValueError: there is no such model for the class, as transformers says it.
    """
    folder = Path(name).expanduser()
    try:
        model, info = kind.from_pretrained(
            str(folder) if folder.is_dir() else name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    except ValueError:
        raise
    except Exception as error:  # torn files and wrong shapes raise whatever safetensors and transformers raise
        raise _unreadable(name, folder, error) from error
    mismatched = (entry[0] for entry in info.get("mismatched_keys", ()))
    return model, sorted({*info.get("missing_keys", ()), *mismatched})


def _check_fit(name: str, hf: Any, vocab_size: int, seq_len: int) -> None:
    text = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
    words = getattr(text, "vocab_size", None)
    if words is not None and words < vocab_size:
        raise ConfigError(
            f"model.name: {name} has a vocabulary of {words:,} and the tokenizer one of {vocab_size:,}; "
            "set data.tokenizer.path to the model's own tokenizer"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and 0 < positions < seq_len:
        raise ConfigError(f"data.seq_len: {seq_len} is longer than the {positions} positions of {name}")


def _check_causal(name: str, model: PreTrainedModel) -> None:
    """A word must not see the words after it: an encoder would look its answers up."""
    words = min(model.get_input_embeddings().weight.shape[0], 8)
    first = torch.arange(4).remainder(words).unsqueeze(0)
    other = first.clone()
    other[0, -1] = (other[0, -1] + 1) % words
    model.eval()
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (first, other))
    if not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())):
        raise ConfigError(
            f"model.name: {name} sees later words when it predicts a word; it is not a causal language model"
        )


def _not_of_kind(name: str, hf: Any, what: str, error: Exception) -> ConfigError:
    if "Unrecognized configuration class" in str(error) or "for this kind of AutoModel" in str(error):
        return ConfigError(f"model.name: {name} is a {getattr(hf, 'model_type', 'model')}, which has no {what}")
    return ConfigError(f"model.name: {name} cannot be built: {_first_line(error)}")


def _unreadable(name: str, folder: Path, error: Exception) -> ConfigError:
    text = str(error)
    if "ignore_mismatched_sizes" in text:
        return ConfigError(f"model.name: the weights of {name} do not have the shapes that its config.json says")
    if folder.is_dir():
        weights = [path.suffix for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
        if ".safetensors" not in weights and (folder / "config.json").is_file() and "config" not in text.lower():
            kind = "only pickled weights, which are not read" if weights else "no weights"
            return ConfigError(f"model.name: the folder {name} holds {kind}; it needs model.safetensors")
        return ConfigError(f"model.name: the folder {name} cannot be read: {_first_line(error)}")
    if "offline" in text.lower() or "connect" in text.lower() or "cached" in text.lower():
        return ConfigError(
            f"model.name: {name} is no folder here, and the hub cannot be reached; give a local "
            "folder, or go online once"
        )
    return ConfigError(f"model.name: {name} is no folder here, and the hub does not give it: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
