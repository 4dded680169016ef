"""The token store: two memory-mapped parts, a tokenizer and a manifest.

manifest.json        written last: settings, inputs, counts, and size and sha256 of every other file
tokenizer/           a Hugging Face tokenizer folder
train.bin            tokens, little-endian uint16 (vocabularies up to 65,536) or uint32,
validation.bin       document after document, each with an end-of-text token at its end
validation.bytes     uint32: how many UTF-8 bytes of its document each validation token covers
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.data.disk import sha256
from trimtab.data.tokenizer import TextTokenizer, load_tokenizer
from trimtab.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
BYTE_LENGTHS = "uint32"

# Stores up to this many bytes have their checksums verified whenever they are opened: it takes a second or two.
VERIFY_BELOW = 1 << 30


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a store.

    Attributes:
        tokens: (n_tokens,) uint16 or uint32, memory-mapped and read-only.
        byte_lengths: (n_tokens,) uint32, of the validation part alone: the UTF-8 bytes each token covers,
            0 for an end-of-text token. They add up to the bytes of the documents.
        documents: number of documents.
        text_bytes: UTF-8 bytes of the documents.
    """

    tokens: NDArray[Any]
    byte_lengths: NDArray[np.uint32] | None
    documents: int
    text_bytes: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens, end-of-text tokens included."""
        return len(self.tokens)

    def n_chunks(self, seq_len: int) -> int:
        """How many samples of `seq_len` inputs and as many labels the part holds (see `batches`)."""
        return max(0, self.n_tokens - 1) // seq_len


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An opened store. Use `open`, or `trimtab.data.tokens.build_store`.

    Attributes:
        folder: where it lies.
        manifest: what manifest.json says.
        train: the training part.
        validation: the validation part.
    """

    folder: Path
    manifest: dict[str, Any]
    train: Split
    validation: Split

    @classmethod
    def open(cls, folder: Path, *, verify: bool | None = None) -> TokenStore:
        """Open a complete store.

        Args:
            folder: where it lies.
            verify: compare checksums, which reads every byte. None: if the store is smaller than 1 GiB.
                The sizes of all files are always compared.

        Raises:
            DataError: there is no complete store, it is of another version, or it is damaged.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
            version, files = manifest["format"], manifest["files"]
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: no complete token store (no {MANIFEST}); build it with trimtab tokenize"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"{MANIFEST} cannot be read") from error
        if version != FORMAT:
            raise DataError(f"{folder}: a token store of format {version}; this version reads {FORMAT}: build it anew")
        for name, facts in files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != facts["size"]:
                there = "is missing" if size is None else f"has {size} bytes instead of {facts['size']}"
                raise _damaged(folder, f"{name} {there}")
        store = cls(folder, manifest, _split(folder, manifest, "train"), _split(folder, manifest, "validation"))
        if verify or (verify is None and sum(facts["size"] for facts in files.values()) < VERIFY_BELOW):
            store.verify()
        return store

    def verify(self) -> None:
        """Compare the checksum of every file with the manifest. Raises DataError."""
        for name, facts in self.manifest["files"].items():
            if sha256(self.folder / name) != facts["sha256"]:
                raise _damaged(self.folder, f"the checksum of {name} is wrong")

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that made the store, from the store's own folder."""
        tokenizer = load_tokenizer(str(self.folder / "tokenizer"))
        if tokenizer.fingerprint != self.manifest["tokenizer"]["sha256"]:
            raise _damaged(self.folder, "its tokenizer is not the one that made it")
        return tokenizer


def _split(folder: Path, manifest: dict[str, Any], part: str) -> Split:
    counts = manifest[part]
    tokens = _map(folder / f"{part}.bin", manifest["dtype"], counts["tokens"])
    widths = _map(folder / f"{part}.bytes", BYTE_LENGTHS, counts["tokens"]) if part == "validation" else None
    return Split(tokens, widths, counts["documents"], counts["bytes"])


def _map(path: Path, dtype: str, n: int) -> NDArray[Any]:
    kind = np.dtype(dtype).newbyteorder("<")
    if path.stat().st_size != n * kind.itemsize:
        raise _damaged(path.parent, f"{path.name} does not hold {n} tokens")
    if n == 0:
        return np.zeros(0, dtype=kind)  # nothing cannot be mapped
    return np.memmap(path, dtype=kind, mode="r", shape=(n,))


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"{folder}: the token store is damaged: {what}; delete the folder and build it anew")
