"""Tokenizers: any Hugging Face tokenizer that has a fast form, or a byte-level BPE trained on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.errors import DataError
from trimtab.quiet import quiet_libraries

END_OF_TEXT = "<|endoftext|>"

# What transformers notes about how a tokenizer was loaded; kept out of the folder that `save` writes.
_HOW_IT_WAS_LOADED = ("is_local", "local_files_only")


@dataclass(frozen=True)
class TextTokenizer:
    """A fast Hugging Face tokenizer and what the data and the model need to know of it.

    Attributes:
        hf: the tokenizer.
        vocab_size: number of ids, added tokens included: one above the largest id.
        eos_id: the end-of-text token, put after each document.
        bos_id: the token that begins a text, where there is one. The store does not use it.
        fingerprint: sha256 of the content of `tokenizer.json`, without padding and truncation.
    """

    hf: PreTrainedTokenizerFast
    vocab_size: int
    eos_id: int
    bos_id: int | None
    fingerprint: str

    def save(self, folder: Path) -> None:
        """Write a Hugging Face tokenizer folder; the same tokenizer gives the same bytes."""
        self.hf.save_pretrained(str(folder))

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return str(self.hf.backend_tokenizer.to_str())


def load_tokenizer(path_or_name: str) -> TextTokenizer:
    """Load a tokenizer from a local folder, or by its name on the Hugging Face hub.

    Raises:
        DataError: the folder is missing or holds no tokenizer, the hub cannot be reached or does not
            have it, there is no fast form of it, or it has no end-of-text token.
    """
    folder = Path(path_or_name).expanduser()
    local = folder.exists()
    if local and not folder.is_dir():
        raise DataError(f"tokenizer {path_or_name!r} is a file; give the folder that holds its tokenizer.json")
    if not local and _looks_like_a_path(path_or_name):
        raise DataError(f"tokenizer folder {path_or_name!r} does not exist")
    try:
        with quiet_libraries():
            hf = AutoTokenizer.from_pretrained(str(folder) if local else path_or_name, trust_remote_code=False)
    except Exception as error:  # the libraries below raise many kinds; all of them mean that it did not load
        reason = _first_line(error)
        if local:
            raise DataError(f"tokenizer folder {path_or_name!r} could not be loaded: {reason}") from error
        raise DataError(
            f"tokenizer {path_or_name!r} is no local folder and could not be had from the Hugging Face hub "
            f"({reason}); check the name and the network, give a folder, or set data.tokenizer.bpe_vocab_size"
        ) from error
    return _wrap(hf, path_or_name)


def train_bpe(texts: Iterator[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE with the end-of-text token `<|endoftext|>` on `texts`.

    The same texts give the same tokenizer, whatever the number of threads. A small corpus may hold fewer
    than `vocab_size` - 257 pairs worth merging; the tokenizer is then smaller.

    Raises:
        DataError: there are no texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    first = next(texts, None)
    if first is None:
        raise DataError("there is no training document to train a tokenizer on (data.tokenizer.bpe_vocab_size)")

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(all_texts(), trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
    return _wrap(hf, "the trained BPE")


def _wrap(hf: Any, name: str) -> TextTokenizer:
    if not getattr(hf, "is_fast", False):
        raise DataError(f"tokenizer {name!r} has no fast form (tokenizer.json), which tokenizing needs")
    if hf.eos_token_id is None:
        raise DataError(
            f"tokenizer {name!r} has no end-of-text token to put between documents; "
            "set eos_token in its tokenizer_config.json"
        )
    backend = hf.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    for key in _HOW_IT_WAS_LOADED:
        hf.init_kwargs.pop(key, None)
    return TextTokenizer(
        hf=hf,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=int(hf.eos_token_id),
        bos_id=None if hf.bos_token_id is None else int(hf.bos_token_id),
        fingerprint=hashlib.sha256(backend.to_str().encode()).hexdigest(),
    )


def _looks_like_a_path(name: str) -> bool:
    """A hub name is NAME or OWNER/NAME."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or name.endswith("/")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A line that ends in a colon announces a list; without its first entry it says nothing.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"
