"""What can be found wrong with a run before anything is paid for it: hours of tokenization, to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from trimtab.config import DTYPES, DataConfig, PretrainConfig
from trimtab.data.sources import Input, resolve
from trimtab.data.store import MANIFEST, TokenStore
from trimtab.data.tokenizer import load_tokenizer
from trimtab.data.tokens import store_folder
from trimtab.errors import CannotSave, ConfigError
from trimtab.methods import attach
from trimtab.methods.base import Adapter
from trimtab.models.load import shadow_model
from trimtab.models.presets import PAPER_VOCABULARY, PRESETS
from trimtab.naming import named

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def preflight(config: PretrainConfig) -> None:
    """Refuse a run whose text, tokenizer, model or method is certainly wrong; nothing is written.

    The model is made as shapes without values and the method attached to it, so that an unknown model, a rank
    above its width, or targets that match nothing are found in a moment.

    Raises:
        TrimtabError: what is wrong, in one line.
    """
    store = complete_store(config)
    if store is None:
        local_inputs(config.data)
    model = shadow(config, None if store is None else store.tokenizer.vocab_size)
    check_method(config, model)


def check_method(config: PretrainConfig, model: nn.Module) -> Adapter:
    """Attach the run's method to a shadow of its model, which is of no other use afterwards; the adapter.

    Raises:
        TrimtabError: it does not go with the model, or what it learns could not be saved.
    """
    dtype = DTYPES[config.dtype]
    with named("method", config.method):
        adapter = attach(model, config.method.for_pretraining(config.seed), dtype=dtype, pure=config.pure)
    if adapter.no_merge:  # then what was learned is saved beside the model
        try:
            adapter.check_save()
        except CannotSave as error:
            raise ConfigError(f"method.train_also: {error}") from None
    return adapter


def complete_store(config: PretrainConfig) -> TokenStore | None:
    """The token store of this run, if it is there already."""
    folder = store_folder(config.data, config.seed, config.out)
    return TokenStore.open(folder, verify=False) if (folder / MANIFEST).exists() else None


def local_inputs(data: DataConfig) -> list[Input]:
    """The files of the sources, without the datasets of a hub.

    Raises:
        DataError: one is missing, or of an unknown kind.
    """
    local = [[s for s in sources if isinstance(s, str)] for sources in (data.sources, data.validation_sources)]
    return resolve(data.model_copy(update={"sources": tuple(local[0]), "validation_sources": tuple(local[1])}))


def known_vocabulary(config: PretrainConfig) -> int | None:
    """The number of words of the tokenizer that will be used; None for one on a hub.

    Raises:
        ConfigError: there is no such folder.
        DataError: the folder holds no tokenizer.
    """
    tokenizer = config.data.tokenizer
    if tokenizer.path is None:
        return tokenizer.bpe_vocab_size
    if Path(tokenizer.path).expanduser().exists():
        return load_tokenizer(tokenizer.path).vocab_size
    # "tokenizers/mine" might be a hub's name, but not where there is a folder tokenizers.
    above = "/" in tokenizer.path and Path(tokenizer.path).parent.is_dir()
    if above or tokenizer.path.startswith(("/", ".", "~")) or tokenizer.path.count("/") > 1:
        raise ConfigError(f"data.tokenizer.path: there is no folder {tokenizer.path}")
    return None


def shadow(config: PretrainConfig, vocab_size: int | None, *, offline: bool = False) -> PreTrainedModel:
    """The run's model on the meta device; with an unknown vocabulary, a preset takes the paper's."""
    words = vocab_size or known_vocabulary(config)
    if words is None:  # a loaded model has its own, and whether the tokenizer's fits it is seen later
        words = PAPER_VOCABULARY if config.model.name in PRESETS else 1
    return shadow_model(config.model, vocab_size=words, seq_len=config.data.seq_len, offline=offline)
