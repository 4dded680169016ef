"""A tokenizer as llama.cpp's metadata.

llama.cpp has the two kinds that LLaMA-like models use. *gpt2*: byte-level BPE with merges; how text is split before
the merges is named by a word (`pre`), and only splits that are known to be the same are named. *llama*: SentencePiece
BPE with byte fallback, by scores; the pieces are merged in falling order of score, so the negative rank of the merge
that makes a piece serves as its score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import CheckpointError, DataError
from trimtab.quiet import quiet_libraries

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: Regular expressions of a `Split` before the byte level, and llama.cpp's words for them.
_SPLITS = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}


def write_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Put the tokenizer of a model folder into a GGUF file.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: of the model.
        vocab_size: the model's number of embeddings; ids that the tokenizer lacks become unused tokens.

    Raises:
        DataError: there is none, it cannot be loaded, or it has more words than the model.
        CheckpointError: llama.cpp has no such tokenizer.
    """
    hf = _load(folder)
    tree = json.loads(hf.backend_tokenizer.to_str())
    model = tree["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"{folder}: the tokenizer is a {model.get('type')}; only BPE can be written as GGUF")
    words = {index: word for word, index in model["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    for token in tree["added_tokens"]:
        words[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(words) >= vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has the id {max(words)} and the model only {vocab_size} embeddings; "
            "the two do not belong together"
        )
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        for index, word in words.items():
            if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
                kinds[index] = BYTE
        if hf.unk_token_id is not None:
            kinds[hf.unk_token_id] = UNKNOWN
    table = [words.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split_name(tree, folder))
    writer.add_token_list(table)
    if pieces:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        writer.add_token_scores([-float(ranks.get(word, len(merges))) for word in table])
        writer.add_add_space_prefix(_prefix(tree, folder))
    writer.add_token_types([kinds.get(index, UNUSED) for index in range(vocab_size)])
    if not pieces:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _write_specials(writer, hf)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the libraries below raise many kinds; all of them mean that it did not load
        line = (str(error).splitlines() or [type(error).__name__])[0].strip()[:200]
        why = "" if line.endswith(":") else f" ({line})"  # a line that announces a list says nothing without it
        raise DataError(
            f"{folder} holds no tokenizer that can be read{why}; llama.cpp needs one, so save it beside the model"
        ) from error
    if not getattr(hf, "is_fast", False):
        raise DataError(f"{folder}: the tokenizer has no fast form (tokenizer.json), which is needed")
    return hf


def _write_specials(writer: Any, hf: Any) -> None:
    for add, index in (
        (writer.add_bos_token_id, hf.bos_token_id),
        (writer.add_eos_token_id, hf.eos_token_id),
        (writer.add_unk_token_id, hf.unk_token_id),
        (writer.add_pad_token_id, hf.pad_token_id),
    ):
        if index is not None:
            add(int(index))
    some = hf("a")["input_ids"]
    writer.add_add_bos_token(hf.bos_token_id is not None and some[0] == hf.bos_token_id)
    writer.add_add_eos_token(hf.eos_token_id is not None and some[-1] == hf.eos_token_id)
    template = getattr(hf, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _split_name(tree: Any, folder: Path) -> str:
    """llama.cpp's word for how the text is split before byte-level merges."""
    before = tree.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    level = steps[-1]
    if level.get("type") == "ByteLevel" and not level.get("add_prefix_space"):
        first = steps[:-1]
        if level.get("use_regex", True) and not tree.get("normalizer"):
            if not first:
                return "gpt-2"
            if len(first) == 1 and first[0]["type"] == "Digits" and first[0]["individual_digits"]:
                return "smollm"
        if len(first) == 1 and first[0]["type"] == "Split" and not level.get("use_regex", True):
            name = _SPLITS.get(first[0]["pattern"].get("Regex", ""))
            plain = (tree.get("normalizer") or {"type": "NFC"})["type"] == "NFC"  # which llama.cpp leaves out
            if name is not None and plain and first[0]["behavior"] == "Isolated" and not first[0]["invert"]:
                return name
    raise CheckpointError(
        f"{folder}: the tokenizer splits text in a way that has no name here (known: GPT-2, SmolLM, Llama 3, Qwen 2); "
        "use llama.cpp's convert_hf_to_gguf.py"
    )


def _prefix(tree: Any, folder: Path) -> bool:
    """Whether a space is put before the text."""
    normal, before = tree.get("normalizer"), tree.get("pre_tokenizer")
    if isinstance(before, dict) and before.get("type") == "Metaspace" and not normal and not before.get("split"):
        return bool(before["prepend_scheme"] != "never")
    steps = (normal or {}).get("normalizers", [normal] if normal else [])
    kinds = [step["type"] for step in steps]
    if before is None and kinds in (["Prepend", "Replace"], ["Replace"]):
        return bool(kinds[0] == "Prepend")
    raise CheckpointError(
        f"{folder}: the tokenizer treats spaces in a way that is not known; use llama.cpp's convert_hf_to_gguf.py"
    )
