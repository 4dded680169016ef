"""Building token stores: from a configuration to a complete store, or to the one that is already there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.config import DataConfig
from trimtab.data.build import SHARD_BYTES, Build, Progress
from trimtab.data.disk import locked, naming_disk_errors, to_json
from trimtab.data.sources import resolve
from trimtab.data.store import MANIFEST, Split, TokenStore
from trimtab.data.tokenizer import load_tokenizer
from trimtab.errors import DataError

__all__ = ["Progress", "Split", "TokenStore", "build_store", "store_folder"]


def store_settings(config: DataConfig, seed: int) -> dict[str, Any]:
    """Everything in the configuration that decides the bytes of a store."""
    names = {"sources", "validation_sources", "text_field", "tokenizer", "validation_share", "max_tokens"}
    settings = config.model_dump(mode="json", include=names)
    if config.validation_sources:
        del settings["validation_share"]  # nothing is chosen by hash then
        return settings
    return {**settings, "seed": seed}


def store_folder(config: DataConfig, seed: int, out: Path) -> Path:
    """`data.store`, or a folder in OUT/tokens named by a hash of all that decides the store's bytes."""
    if config.store is not None:
        return config.store.expanduser()
    digest = hashlib.sha256(json.dumps(store_settings(config, seed), sort_keys=True).encode()).hexdigest()
    return Path(out) / "tokens" / digest[:16]


def build_store(
    config: DataConfig,
    seed: int,
    folder: Path,
    progress: Callable[[Progress], None] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> TokenStore:
    """Tokenize the sources into a store in `folder`, or open the complete one that is there.

    The bytes of the store depend on the sources, the tokenizer, the settings and the seed, but not on the number of
    workers, on where the sources lie, or on how often the build was killed and started again. Two
    processes may ask for one store: the second waits for the first.

    A complete store is used without its sources, if these are gone; where they are there, their names and sizes
    and a local tokenizer are compared with what the store was made from.

    Args:
        config: the sources, the tokenizer, and how to split.
        seed: with a document's id, decides whether the document is held out for validation.
        folder: made if missing.
        progress: called in this thread now and then.
        shard_bytes: text in one unit of work, and so what a kill can lose.

    Raises:
        DataError: anything wrong with sources, tokenizer, disk or store, in one line.
    """
    folder = Path(folder)
    settings = store_settings(config, seed)
    if not (folder / MANIFEST).exists() or (folder / "plan.json").exists():
        with naming_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        build = Build(config, seed, settings, folder, progress or (lambda _: None), shard_bytes)
        build.check_folder()
        with locked(folder):
            if (folder / MANIFEST).exists():
                build.clean()  # of one that was killed after its last step
            else:
                build.run()
    store = TokenStore.open(folder)
    _check_made_from(store, config, settings)
    _check_length(store, config)
    return store


def _check_made_from(store: TokenStore, config: DataConfig, settings: dict[str, Any]) -> None:
    way_out = f"delete {store.folder} or set data.store to another folder"
    made = store.manifest["settings"]
    different = [key for key in sorted(made.keys() | settings.keys()) if made.get(key) != settings.get(key)]
    if different:
        key = different[0]
        name = key if key == "seed" else f"data.{key}"
        raise DataError(
            f"{store.folder}: the store was built with {name}={json.dumps(made.get(key))}, now it is "
            f"{json.dumps(settings.get(key))}; {way_out}"
        )
    inputs = store.manifest["inputs"]
    pins = {i["name"]: i["revision"] for i in inputs if i["kind"] == "hub"}
    try:
        now = [i.public() for i in resolve(config, pins)]
    except DataError:
        now = inputs  # the sources are gone; a complete store does not need them
    if to_json(now) != to_json(inputs):
        changed = [a["name"] for a, b in zip(inputs, now, strict=False) if a != b]
        what = f"{changed[0]!r} is another file" if changed else f"{len(now)} inputs instead of {len(inputs)}"
        raise DataError(f"{store.folder}: the sources have changed since the store was built ({what}); {way_out}")
    path = config.tokenizer.path
    if path is not None and Path(path).expanduser().is_dir():
        there = load_tokenizer(path).fingerprint
        if there != store.manifest["tokenizer"]["sha256"]:
            raise DataError(
                f"{store.folder}: the tokenizer in {path!r} has changed since the store was built; {way_out}"
            )


def _check_length(store: TokenStore, config: DataConfig) -> None:
    needed = config.seq_len + 1
    if store.train.n_tokens < needed:
        raise DataError(
            f"the training part has {store.train.n_tokens} tokens, fewer than one sequence of data.seq_len + 1 = "
            f"{needed}; give more text in data.sources" + (", raise data.max_tokens" if config.max_tokens else "")
        )
    if store.validation.n_tokens < needed:
        more = "data.validation_sources" if config.validation_sources else "data.sources"
        raise DataError(
            f"the validation part has {store.validation.documents} documents with {store.validation.n_tokens} "
            f"tokens, fewer than one sequence of data.seq_len + 1 = {needed}; give more text in {more}"
            + ("" if config.validation_sources else ", raise data.validation_share or name data.validation_sources")
        )
