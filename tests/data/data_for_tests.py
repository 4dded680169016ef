"""Small corpora, tokenizers and stores that the tests of this folder share."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.config import DataConfig
from trimtab.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe

WORDS = ["the", "ship", "steers", "by", "a", "small", "rudder", "and", "moves", "北", "海", "naïve", "😀", "zero\n"]


def text(seed: int, words: int = 120) -> str:
    """Some words, the same for the same seed."""
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(words))


def rows(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": text(i), "n": i} for i in range(first, first + n)]


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(*sources: Any, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "sources": tuple(str(s) if isinstance(s, Path) else s for s in sources),
        "tokenizer": {"bpe_vocab_size": 300},
        "validation_share": 0.2,
        "seq_len": 16,
        "workers": 1,
    }
    return DataConfig.model_validate({**settings, **changes})


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file of a store."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def byte_bpe() -> TextTokenizer:
    """A byte-level BPE, whose tokens may hold parts of characters."""
    return train_bpe(iter(text(i) for i in range(20)), 300)


def sentencepiece_bpe() -> TextTokenizer:
    """LLaMA's kind: spaces become a visible character, unknown characters fall back on bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    inner.train_from_iterator(
        ["plain words alone"], trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    )
    return _finished(inner, "</s>")


def unigram() -> TextTokenizer:
    """T5's kind: normalises, and has its end-of-text token among the plain words."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator([text(i) for i in range(5)], trainer)
    return _finished(inner, "</s>")


def wordpiece() -> TextTokenizer:
    """BERT's kind: drops white space, folds case and accents."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(
        [text(i) for i in range(5)],
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[EOS]"], show_progress=False),
    )
    return _finished(inner, "[EOS]")


def _finished(inner: Tokenizer, eos: str) -> TextTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos).save_pretrained(folder)
        return load_tokenizer(folder)


KINDS = {"byte_bpe": byte_bpe, "sentencepiece": sentencepiece_bpe, "unigram": unigram, "wordpiece": wordpiece}
