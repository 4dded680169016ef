"""What hidden states depend on beside the example: the frozen part of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Settings of a model that say nothing about what its blocks compute.
_ASIDE = {
    "architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
#: Dropout acts in training alone, and a backbone does not train. By name: there is also the `token_dropout` of ESM,
#: which scales what it reads when it does not train.
_DROPOUT = {
    "activation_dropout", "attention_dropout", "attention_dropout_rate", "attention_probs_dropout_prob", "attn_dropout",
    "attn_pdrop", "classifier_dropout", "classifier_dropout_prob", "classifier_dropout_rate", "decoder_layerdrop",
    "drop_path_rate", "dropout", "dropout_rate", "embd_pdrop", "embedding_dropout", "emb_pdrop", "encoder_layerdrop",
    "feat_proj_dropout", "final_dropout", "hidden_dropout", "hidden_dropout_prob", "hidden_dropout_rate", "layerdrop",
    "mlp_dropout", "pooler_dropout", "qa_dropout", "resid_dropout", "resid_pdrop", "residual_dropout",
    "seq_classif_dropout", "summary_first_dropout", "summary_last_dropout",
}  # fmt: skip
#: What `generate()` does with the logits. The words that start, end and fill a text are not among them: a decoder's
#: inputs, and some positions, are made with these.
_GENERATION = {
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_decoder_ids",
    "forced_eos_token_id", "length_penalty", "max_new_tokens", "median_filter_width", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "task_specific_params",
}  # fmt: skip
_LEFT_OUT = frozenset(_ASIDE | _DROPOUT | _GENERATION)

#: Numbers of a tensor, or so, that are looked at before each batch. A step of 1e-5 changes one in six of bf16 weights
#: of deviation 0.02, the others being rounded back: all of 64 stay as they were in one of 50,000 tensors.
_SAMPLED = 64
#: Dtypes by whose numbers those of equal size are compared, bit for bit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Backbone:
    """The frozen tensors of a model, and how it is set.

    Args:
        model: any module.
        trained: parameters that are no part of it.
        beside: modules that are no part of it.
    """

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter], beside: Iterable[nn.Module]) -> None:
        self._model = model
        self._trained = list(trained)  # held, so that their ids stay theirs
        self._beside = list(beside)

    def settings(self) -> dict[str, Any]:
        """The model's class and config, as JSON values."""
        config: Any = getattr(self._model, "config", None)
        found = config.to_dict() if hasattr(config, "to_dict") else {}
        plain: dict[str, Any] = json.loads(json.dumps(_kept(found), default=str, sort_keys=True))
        return {"class": type(self._model).__name__, **plain}

    def digests(self) -> dict[str, str]:
        """A SHA-256 (its first 16 hex digits) of each tensor, of its dtype and its shape."""
        return {name: _digest(tensor) for name, tensor in self._tensors()}

    def state(self) -> tuple[Any, ...]:
        """Changes when somebody writes into a tensor or puts another in its place.

        torch counts writes, but not those through `.data`, nor those of fused optimizers. Such a write touches much of
        a tensor as a rule, so a sample of each is part of the state: cheap enough to be taken before every batch.
        """
        plain = list(self._plain())
        told = ((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in plain)
        return (*told, *_sample(plain))

    def _outside(self) -> tuple[set[int], set[int]]:
        return {id(p) for p in self._trained}, {id(m) for network in self._beside for m in network.modules()}

    def _plain(self) -> Iterator[Tensor]:
        trained, beside = self._outside()
        for module in self._model.modules():
            if id(module) not in beside:
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and id(tensor) not in trained:
                        yield tensor

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """With what a module keeps elsewhere and writes into its state, such as the scales of quantised weights."""
        trained, beside = self._outside()
        seen: dict[int, Tensor] = {}  # held: a tensor made for its state alone (bitsandbytes) would leave its id behind
        for name, module in self._model.named_modules():
            if id(module) in beside:
                continue
            prefix = f"{name}." if name else ""
            stored: dict[str, Any] = {}
            module._save_to_state_dict(stored, prefix, keep_vars=True)
            stored |= {f"{prefix}{leaf}": buffer for leaf, buffer in module._buffers.items() if buffer is not None}
            for key, tensor in stored.items():
                if isinstance(tensor, Tensor) and id(tensor) not in trained and id(tensor) not in seen:
                    seen[id(tensor)] = tensor
                    yield key, tensor


def _kept(settings: Any) -> Any:
    """Without what the blocks do not depend on, in the settings of a model's parts, too."""
    if not isinstance(settings, dict):
        return settings
    return {k: _kept(v) for k, v in settings.items() if k not in _LEFT_OUT and not str(k).startswith("_")}


def _sample(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """The bits of some `_SAMPLED` numbers of each tensor, or of all of a small one."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_meta:
            continue
        # In the order of memory, since a transposed tensor would be copied whole.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        flat = tensor.detach().permute(order).reshape(-1)
        step, width = max(1, len(flat) // _SAMPLED), tensor.shape[order[-1]] if order else 1
        if step >= width > 1:  # from row to row by the golden section of a row: of all rows, and of all columns
            step += int(width * 0.618) - step % width
        some = flat[::step]
        some = some.view(_BITS.get(some.dtype.itemsize, some.dtype))
        alike.setdefault((some.device, some.dtype), []).append(some)
    for parts in alike.values():  # one read of each device, and no copy of a tensor
        yield torch.cat(parts).cpu().numpy().tobytes()


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.is_meta:  # sizes can be told without values
        return digest.hexdigest()[:16]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """What differs between two flat mappings, in a few words; empty where nothing does."""
    odd = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if not odd:
        return ""
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    values = f" ({_shown(there, odd[0])} there, {_shown(here, odd[0])} here)"
    return f"{odd[0]}{values}{more}"


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
