"""From the text of a shard of documents to its tokens, and to the UTF-8 bytes that each token covers.

Workers are threads, each with a tokenizer of its own (one that is shared makes them wait for its word cache). The
tokenizer is native code that runs outside Python's lock, and nearly all of the time is spent there. Compared
with processes nothing is imported again, no script needs a guard around its main part, and none is left behind
when this process is killed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer

from trimtab.data.disk import write_whole
from trimtab.data.readers import Cursor
from trimtab.errors import DataError

# A longer document is tokenized in pieces of this many characters, cut where a word or line begins, so that
# memory stays bounded (a token takes about 100 bytes while it is being made) for a file of any size.
PIECE = 1 << 20


@dataclass(frozen=True)
class Job:
    """The documents of one shard: `place` and `end` are where it begins and where the next one does."""

    number: int
    place: Cursor
    end: Cursor
    read: int
    ids: list[str]
    texts: list[bytes]
    validation: list[bool]


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a finished shard without reading its tokens."""

    end: Cursor
    read: int
    documents: int
    train_tokens: int
    tokens: int


class Encoder:
    """Turns documents into tokens, and never finds a special token in their text.

    Args:
        tokenizer_json: the content of a tokenizer.json.
        eos_id: the id of the end-of-text token.
        dtype: of the tokens, uint16 or uint32.
    """

    def __init__(self, tokenizer_json: str, eos_id: int, dtype: str) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is thirteen characters
        self.eos_id = eos_id
        self.dtype = np.dtype(dtype)

    def tokens(self, text: str) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """The tokens of one document and the UTF-8 bytes each covers, which add up to those of the text.

        A character's bytes count for the token that completes it; what a tokenizer drops (such as white
        space) counts for the token after it, or at the end for the last one. No end-of-text is added.
        """
        ids: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
        spans: list[NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
        for start, stop in _pieces(text):
            piece, offsets = self._piece(text[start:stop])
            ids.append(piece)
            spans.append(offsets + start)
        return np.concatenate(ids).astype(self.dtype), bytes_covered(text, np.concatenate(spans))

    def many(self, texts: Sequence[str]) -> Iterator[NDArray[Any]]:
        """The tokens of many documents, without the bytes they cover; the same as from `tokens`, but faster."""
        for group in _groups(texts):
            if len(group) == 1 and len(group[0]) > PIECE:
                pieces = [self._piece(group[0][a:b])[0].astype(self.dtype) for a, b in _pieces(group[0])]
                yield np.concatenate(pieces)
                continue
            with _naming_tokenizer_errors():
                encodings = self._tokenizer.encode_batch_fast(group, add_special_tokens=False)
            for text, encoding in zip(group, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int64)
                yield (self._piece(text)[0] if (ids == self.eos_id).any() else ids).astype(self.dtype)

    def _piece(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and spans (first character, one after the last) of a text, without any end-of-text among them."""
        with _naming_tokenizer_errors():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        # Some models (Unigram, WordLevel) hold the end-of-text token in their plain vocabulary and so find it in a
        # text that spells it out. Cutting the spelling apart leaves the text and breaks the token.
        found = spans[ids == self.eos_id]
        if not len(found):
            return ids, spans
        short = found[found[:, 1] - found[:, 0] < 2]
        if len(short):
            raise DataError(
                f"the tokenizer turns {text[short[0, 0] : short[0, 1]]!r} into its end-of-text token (id "
                f"{self.eos_id}), so that documents could not be told apart; choose another tokenizer"
            )
        edges = [0, *sorted({int(start) + 1 for start in found[:, 0]}), len(text)]
        parts = [self._piece(text[a:b]) for a, b in itertools.pairwise(edges)]
        return (
            np.concatenate([part for part, _ in parts]),
            np.concatenate([offsets + start for start, (_, offsets) in zip(edges[:-1], parts, strict=True)]),
        )


def bytes_covered(text: str, spans: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The UTF-8 bytes of `text` that each token stands for, from the tokens' character spans (T, 2); int (T,).

    Between two neighbours the border lies where the earlier one ends, but before any character that a later one
    still has a part of. The borders never go back, the last is the end of the text, and so the bytes
    add up exactly.
    """
    if not len(spans):
        return np.zeros(0, dtype=np.uint32)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF).astype(np.int64) + (codes > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])  # (characters + 1,)
    borders = spans[:, 1].copy()
    # The first character that this or a later token has a part of; tokens made of nothing have none.
    starts = np.where(spans[:, 1] > spans[:, 0], spans[:, 0], len(text))
    still_open = np.minimum.accumulate(starts[::-1])[::-1]
    borders[:-1] = np.minimum(borders[:-1], still_open[1:])
    borders = np.maximum.accumulate(borders)
    borders[-1] = len(text)
    return np.diff(bytes_before[borders], prepend=0).astype(np.uint32)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Cut a document of more than PIECE characters before a line, else before a space, else anywhere."""
    start = 0
    while len(text) - start > PIECE:
        half, limit = start + PIECE // 2, start + PIECE
        cut = text.rfind("\n", half, limit) + 1 or text.rfind(" ", half, limit)
        cut = cut if cut > half else limit
        yield start, cut
        start = cut
    yield start, len(text)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Neighbours of about PIECE characters together; a longer text alone."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > PIECE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


@contextlib.contextmanager
def _naming_tokenizer_errors() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # native code raises the plain class
        raise DataError(f"the tokenizer failed on a text ({error}); choose another tokenizer") from error


def encode_shard(encoder: Encoder, job: Job, path: Path) -> ShardInfo:
    """Tokenize one shard and write it to `path`, whole or not at all.

    The file holds the tokens of both parts with an end-of-text token after each document, and for each document
    in order how many tokens it has (0: nothing was left of it, and it is dropped), its bytes and its part.

    Raises:
        DataError: the file cannot be written, or a text makes an end-of-text token.
    """
    texts = [data.decode() for data in job.texts]
    validation = np.array(job.validation, dtype=np.uint8)
    fast = encoder.many([t for t, held_out in zip(texts, job.validation, strict=True) if not held_out])
    parts: dict[bool, list[NDArray[Any]]] = {False: [], True: []}
    covered: list[NDArray[np.uint32]] = []
    lengths = np.zeros(len(texts), dtype=np.int64)
    end = np.array([encoder.eos_id], dtype=encoder.dtype)
    for i, (text, held_out) in enumerate(zip(texts, job.validation, strict=True)):
        try:
            tokens, widths = encoder.tokens(text) if held_out else (next(fast), None)
        except DataError as error:
            raise DataError(f"{job.ids[i]}: {error}") from error
        if len(tokens):
            lengths[i] = len(tokens) + 1
            parts[held_out] += [tokens, end]
            if widths is not None:
                covered += [widths, np.zeros(1, dtype=np.uint32)]
    train, held = (np.concatenate([end[:0], *parts[part]]) for part in (False, True))
    info = ShardInfo(job.end, job.read, int((lengths > 0).sum()), len(train), len(train) + len(held))
    arrays = {
        "train": train,
        "validation": held,
        "byte_lengths": np.concatenate([np.zeros(0, dtype=np.uint32), *covered]),
        "lengths": lengths,
        "sizes": np.array([len(data) for data in job.texts], dtype=np.int64),
        "is_validation": validation,
    }
    header = {
        "place": f"{job.place.input}:{job.place.row}",
        "end": f"{job.end.input}:{job.end.row}",
        **{key: str(getattr(info, key)) for key in ("read", "documents", "train_tokens", "tokens")},
    }
    write_whole(path, save(arrays, header))
    return info


def shard_info(path: Path, place: Cursor) -> ShardInfo | None:
    """What a finished shard says of itself; None if it is not there, unreadable or begins elsewhere."""
    try:
        with safe_open(str(path), framework="np") as file:
            header: dict[str, str] = file.metadata()
        if header["place"] != f"{place.input}:{place.row}":
            return None
        numbers = {key: int(header[key]) for key in ("read", "documents", "train_tokens", "tokens")}
        return ShardInfo(Cursor(*(int(x) for x in header["end"].split(":"))), **numbers)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None  # whatever is wrong with it, it is made again from its source
