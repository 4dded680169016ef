"""Checkpoints for a task: which kind of model reads it how, the model itself, and its tokenizer.

Files are read as safetensors alone, and no code that came with a model is ever run (see `models.load`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from trimtab.errors import ConfigError, DataError, TargetError
from trimtab.finetuneconfig import DEFAULT_LENGTH, TaskModelConfig
from trimtab.models.load import checkpoint_activations, load_with, read_config
from trimtab.models.quantize import quantize
from trimtab.models.quantized import load_quantized
from trimtab.nn.virtual import position_limit
from trimtab.quiet import quiet_libraries
from trimtab.tasks.base import Form
from trimtab.tasks.encode import Reading

#: Beside an adapter with a head: the names of its classes, in the order of their numbers.
LABELS = "labels.json"

#: The forms of examples in words.
_WHAT: dict[Form, str] = {
    "class": "classes",
    "number": "numbers",
    "text": "texts to be written",
    "chat": "chats",
    "plain": "plain texts",
}

Family = Literal["encoder", "causal", "pair"]


def family_of(hf: Any) -> Family:
    """Whether a model writes, with a decoder alone or behind an encoder, or only reads.

    Encoders such as BERT are among the causal models of transformers, too (as decoders for pairs); what has a masked
    form and does not call itself a decoder is an encoder here.
    """
    if getattr(hf, "is_encoder_decoder", False):
        return "pair"
    kind = hf.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(hf, "is_decoder", False)
    ):
        return "causal"
    return "encoder"


def reading_of(config: TaskModelConfig, hf: Any, form: Form) -> Reading:
    """How a model of this config reads the examples of a task.

    Raises:
        ConfigError: the model cannot do the task.
    """
    family = family_of(hf)
    labelled = form in ("class", "number")
    if labelled and config.head == "classes" and family == "pair":
        raise ConfigError(
            f"model.head = classes: {config.name} is a {hf.model_type}, an encoder-decoder model, which writes its "
            "answers; set it to auto"
        )
    if labelled and (config.head == "classes" or (config.head == "auto" and family == "encoder")):
        return "head"
    if family == "encoder":
        needs, others = f"a task of {_WHAT[form]} needs one that does", "a causal or an encoder-decoder model"
        if labelled:
            needs = "with model.head = words it would have to write"
        elif form != "text":
            others = "a causal model"
        raise ConfigError(
            f"model.name: {config.name} is a {hf.model_type}, an encoder, which writes nothing, and {needs}; "
            f"take {others}"
        )
    if config.head == "classes":
        raise ConfigError(f"model.head = classes: the task has no labels, being one of {_WHAT[form]}; set it to auto")
    if family == "pair" and form in ("chat", "plain"):
        raise ConfigError(
            f"model.name: {config.name} is a {hf.model_type}, an encoder-decoder model, and a task of "
            f"{_WHAT[form]} is for causal models"
        )
    if family == "pair" and hf.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"model.name: {config.name} is a {hf.model_type}, which does not read text")
    return "pair" if family == "pair" else "causal"


def model_class(reading: Reading) -> Any:
    """The auto class of transformers that builds such a model."""
    return {
        "head": AutoModelForSequenceClassification,
        "causal": AutoModelForCausalLM,
        "pair": AutoModelForSeq2SeqLM,
    }[reading]


def head_settings(reading: Reading, form: Form, labels: Sequence[str], pad_id: int | None = None) -> dict[str, Any]:
    """What the config of a model with a new head says of it; nothing where there is none."""
    if reading != "head":
        return {}
    settings: dict[str, Any] = {"num_labels": len(labels) or 1}
    settings["problem_type"] = "single_label_classification" if form == "class" else "regression"
    if labels:
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}
    if pad_id is not None:
        settings["pad_token_id"] = pad_id  # decoders look for their last token by it
    return settings


def build_task_model(
    config: TaskModelConfig, reading: Reading, settings: dict[str, Any], seed: int, compute: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, list[str]]:
    """The model on the CPU, and the names of its new tensors: a head, drawn from `seed` by the model's own rules.

    It is in fp32, or in `compute` if that is what its config says of its files: then nothing is lost, and nothing is
    held that they do not have. With `config.quantize` its linear layers are in 4 bits and compute in `compute`. A model
    that writes is read tensor by tensor then and never exists whole; one with a new head does for a moment.

    Raises:
        ConfigError: there is no such model, it cannot be reached or read, tensors beside the head are missing, or
            nothing in it can be quantised.
        CheckpointError: of a model to be quantised: a file is damaged or does not fit the config.
    """
    hf = read_config(config.name)
    dtype = compute if getattr(hf, "dtype", None) == compute else torch.float32
    new: list[str] = []
    if config.quantize is not None and reading != "head":
        kind = type(_shadow(hf, reading, settings))
        model = _quantized(load_quantized, config, config.name, dtype=dtype, compute=compute, model_class=kind)
    else:
        model, new = _loaded(config, reading, settings, seed, dtype)
        quantize_as(config, model, compute)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model, new


def shadow_task_model(config: TaskModelConfig, hf: Any, reading: Reading, settings: dict[str, Any]) -> PreTrainedModel:
    """The same model on the meta device: shapes without values.

    Raises:
        ConfigError: nothing in it can be quantised, as `config.quantize` asks.
    """
    model = _shadow(hf, reading, settings)
    quantize_as(config, model, None)
    return model


def _shadow(hf: Any, reading: Reading, settings: dict[str, Any]) -> PreTrainedModel:
    for name, value in settings.items():
        setattr(hf, name, value)
    with torch.device("meta"), quiet_libraries():
        model: PreTrainedModel = model_class(reading).from_config(hf, trust_remote_code=False)
    return model


def _loaded(
    config: TaskModelConfig, reading: Reading, settings: dict[str, Any], seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # A head that is there may be of other classes; then a new one takes its place.
            model, missing = load_with(
                model_class(reading), config.name, dtype=dtype, **settings, ignore_mismatched_sizes=reading == "head"
            )
        except ConfigError:  # a ValueError, too, and it says all already
            raise
        except ValueError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(f"model.name: {config.name} cannot be built for this task: {first}") from error
    base = f"{model.base_model_prefix}."
    inside = [name for name in missing if reading != "head" or (name.startswith(base) and ".pooler." not in name)]
    if inside:
        raise ConfigError(
            f"model.name: {config.name} lacks {len(inside)} of the model's tensors, {inside[0]} first; it is not a "
            f"whole {model.config.model_type} checkpoint"
        )
    return model, missing


def quantize_as(config: TaskModelConfig, model: PreTrainedModel, compute: torch.dtype | None) -> None:
    """Hold a model's linear layers in 4 bits, in place, if `config.quantize` asks for it.

    Raises:
        ConfigError: nothing in it can be quantised.
    """
    if config.quantize is not None:
        _quantized(quantize, config, model, compute=compute)


def _quantized(do: Any, config: TaskModelConfig, what: Any, *, compute: torch.dtype | None, **options: Any) -> Any:
    """`quantize` or `load_quantized` as `config.quantize` says; what it finds wrong is said of that setting."""
    try:
        return do(what, "nf4", double=config.quantize == "nf4", compute_dtype=compute, **options)
    except (ConfigError, TargetError) as error:
        raise ConfigError(f"model.quantize = {config.quantize}: {error}") from error


def task_tokenizer(
    config: TaskModelConfig, way_out: str = "name a folder or a hub's tokenizer with model.tokenizer"
) -> Any:
    """The tokenizer of a checkpoint, with a token to pad with; `way_out` is said where there is none.

    Raises:
        DataError: there is none, it has no fast form, or no token that ends a text.
    """
    name = config.tokenizer or config.name
    folder = Path(name).expanduser()
    setting = "model.tokenizer" if config.tokenizer else "model.name"
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else name, trust_remote_code=False)
    except Exception as error:  # the libraries below raise many kinds; all of them mean that it did not load
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{setting}: the tokenizer of {name!r} could not be loaded ({first}); {way_out}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{setting}: the tokenizer of {name!r} has no fast form (tokenizer.json), which is needed")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{setting}: the tokenizer of {name!r} has neither a token to pad with nor one that ends a text"
        )
    return tokenizer


def fitting_length(config: TaskModelConfig, hf: Any, tokenizer: Any, seq_len: int | None, taken: int = 0) -> int:
    """The longest sequence: as given, or 512 and at most the model's positions less those that are `taken`.

    Raises:
        ConfigError: the tokenizer has more words than the model, or its positions are too few.
    """
    text = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
    words = getattr(text, "vocab_size", None)
    if words is not None and len(tokenizer) > words:
        raise ConfigError(
            f"model.tokenizer: {config.tokenizer or config.name} has {len(tokenizer):,} tokens and {config.name} "
            f"embeddings for {words:,}; give the model's own tokenizer"
        )
    with torch.device("meta"), quiet_libraries():  # some count positions from behind their padding
        positions = position_limit(AutoModel.from_config(hf, trust_remote_code=False))
    if positions is None or positions <= 0:
        return seq_len or DEFAULT_LENGTH
    room = int(positions) - taken
    of = f"{room} that the method's {taken} virtual tokens leave of the {positions} positions" if taken else ""
    if room < 1:
        raise ConfigError(
            f"method.length = {taken} virtual tokens leave no room in the {positions} positions of {config.name}; take "
            "fewer"
        )
    if seq_len is not None and room < seq_len:
        of = of or f"{positions} positions"
        raise ConfigError(f"data.seq_len: {seq_len} is longer than the {of} of {config.name}; {room} fit")
    return seq_len or min(DEFAULT_LENGTH, room)
