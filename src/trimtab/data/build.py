"""Making a store: plan, tokenizer, shards, assembly, manifest; each step is kept once it is done.

    plan.json      the settings and the exact inputs; what is taken up again must be the same
    tokenizer/     written under a temporary name and renamed
    shards/        one file for about 2 MiB of text, in document order; each is written under a temporary name,
                   flushed to disk and renamed, so that a shard that is there is whole
    train.bin ...  the shards one after another; manifest.json comes last, then plan and shards go

Only this process reads sources, one document after another, and hands shards to threads (see `encode`). Where a shard
ends depends on the documents alone, and each says where the next one begins, so that a build that is taken up
again starts reading there.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import local
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trimtab.config import DataConfig
from trimtab.data.disk import naming_disk_errors, sha256, sync_folder, to_json, write_whole
from trimtab.data.encode import Encoder, Job, ShardInfo, encode_shard, shard_info
from trimtab.data.readers import BEGINNING, Cursor, Document, probe, read_documents
from trimtab.data.sources import Input, is_validation, resolve
from trimtab.data.store import BYTE_LENGTHS, FORMAT, MANIFEST
from trimtab.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from trimtab.errors import DataError

_LOG = logging.getLogger(__name__)

SHARD_BYTES = 2 << 20

# A BPE sees at most this much text, from the start; with max_tokens, at most this many bytes for each of those.
# Its counts hardly change after that, and a streamed dataset is not read twice in full.
BPE_BYTES = 512 << 20
BPE_BYTES_A_TOKEN = 8

_DATA_FILES = ("train.bin", "validation.bin", "validation.bytes")
_OURS = {".lock", MANIFEST, "plan.json", "tokenizer", "shards", *_DATA_FILES}


@dataclass(frozen=True)
class Progress:
    """How far a build is.

    Attributes:
        stage: what is being done.
        documents: read so far in this stage.
        bytes: of the sources, read so far in this stage ("assemble": of tokens written).
        tokens: made so far.
        total_bytes: what `bytes` will be at the end, if that is known.
        total_tokens: where `tokens` will stop at the latest (data.max_tokens), if that is set.
    """

    stage: Literal["train tokenizer", "tokenize", "assemble"]
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    total_bytes: int | None = None
    total_tokens: int | None = None


class Build:
    """One build of one store; `run` is called with the folder's lock held."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        settings: dict[str, Any],
        folder: Path,
        progress: Callable[[Progress], None],
        shard_bytes: int,
    ) -> None:
        self.config = config
        self.seed = seed
        self.settings = settings
        self.folder = folder
        self.progress = progress
        self.shard_bytes = shard_bytes
        self.workers = config.workers or _cpus()
        self.inputs: list[Input] = []

    def check_folder(self) -> None:
        """Refuse to build among files that are not a store's."""
        strangers = sorted(
            entry.name for entry in self.folder.iterdir() if entry.name not in _OURS and not entry.name.endswith(".tmp")
        )
        if strangers:
            raise DataError(
                f"{self.folder} is no token store (it holds {strangers[0]!r}); set data.store to a new or empty folder"
            )

    def run(self) -> None:
        """Build what is not there yet."""
        self._sweep()
        self._plan()
        tokenizer = self._tokenizer()
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        shards = self._shards(tokenizer, dtype)
        counts = self._assemble(shards, dtype)
        self._finish(tokenizer, dtype, counts)

    # -- steps -----------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove what a killed build left half-written. The lock is ours, so nobody else is writing here."""
        for folder in (self.folder, self.folder / "shards"):
            for entry in folder.glob("*.tmp"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def _plan(self) -> None:
        path = self.folder / "plan.json"
        old: dict[str, Any] | None = None
        if path.exists():
            try:
                old = json.loads(path.read_bytes())
            except ValueError as error:
                raise DataError(f"{path}: damaged; delete {self.folder} and start again") from error
        pins = {i["name"]: i["revision"] for i in old["inputs"] if i["kind"] == "hub"} if old else None
        self.inputs = resolve(self.config, pins)
        plan: dict[str, Any] = {
            "format": FORMAT,
            "settings": self.settings,
            "shard_bytes": self.shard_bytes,
            "inputs": [i.as_dict() for i in self.inputs],
        }
        if old is None:
            probe(self.inputs, self.config.text_field)
            write_whole(path, to_json(plan))
        else:
            for key in ("format", "settings", "shard_bytes"):
                if to_json(old.get(key)) != to_json(plan[key]):
                    raise DataError(
                        f"{self.folder}: a build that was begun here had other {key}; to start again delete the "
                        "folder, or set data.store to another one"
                    )
            if to_json(old["inputs"]) != to_json(plan["inputs"]):
                self._forget(old["inputs"], plan["inputs"])
                probe(self.inputs, self.config.text_field)
                write_whole(path, to_json(plan))
        (self.folder / "shards").mkdir(exist_ok=True)

    def _forget(self, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
        """The sources were changed during a build (say, a broken line was mended): drop what depends on the change."""
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
        number, place = 0, BEGINNING
        if self.config.tokenizer.bpe_vocab_size is not None:
            shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)
        else:
            while (info := shard_info(self._shard(number), place)) is not None and info.end.input < same:
                number, place = number + 1, info.end
        _LOG.warning("%s: the sources have changed since this build was begun; %d shards are kept", self.folder, number)
        for path in sorted((self.folder / "shards").glob("*.safetensors")):
            if path >= self._shard(number):
                path.unlink()

    def _tokenizer(self) -> TextTokenizer:
        path = self.folder / "tokenizer"
        if not path.exists():
            size = self.config.tokenizer.bpe_vocab_size
            if size is None:
                assert self.config.tokenizer.path is not None
                tokenizer = load_tokenizer(self.config.tokenizer.path)
            else:
                tokenizer = train_bpe(self._bpe_texts(), size)
            temporary = self.folder / "tokenizer.tmp"
            with naming_disk_errors(path):
                tokenizer.save(temporary)
                os.replace(temporary, path)
                sync_folder(self.folder)
        return load_tokenizer(str(path))

    def _bpe_texts(self) -> Iterator[str]:
        limit = BPE_BYTES
        if self.config.max_tokens is not None:
            limit = min(limit, BPE_BYTES_A_TOKEN * self.config.max_tokens)
        now = Progress("train tokenizer", total_bytes=self._total_bytes())
        shown = size = 0
        for document in read_documents(self.inputs, self.config.text_field):
            now = replace(now, documents=now.documents + 1, bytes=now.bytes + document.read)
            if now.bytes - shown >= 1 << 20:
                self.progress(now)
                shown = now.bytes
            if not self._held_out(document):
                yield document.data.decode()
                size += len(document.data)
                if size >= limit:
                    break
        self.progress(now)

    def _shards(self, tokenizer: TextTokenizer, dtype: str) -> list[Path]:
        """Tokenize what is not tokenized yet; returns the shards in order."""
        threads = local()
        content = tokenizer.to_json()

        def work(job: Job) -> ShardInfo:
            if not hasattr(threads, "encoder"):
                threads.encoder = Encoder(content, tokenizer.eos_id, dtype)
            return encode_shard(threads.encoder, job, self._shard(job.number))

        limit = self.config.max_tokens
        now = Progress("tokenize", total_bytes=self._total_bytes(), total_tokens=limit)
        train_tokens = number = 0
        place = BEGINNING

        def count(info: ShardInfo) -> None:
            nonlocal now, train_tokens, place, number
            train_tokens += info.train_tokens
            place, number = info.end, number + 1
            now = replace(
                now,
                documents=now.documents + info.documents,
                bytes=now.bytes + info.read,
                tokens=now.tokens + info.tokens,
            )

        def enough() -> bool:
            return limit is not None and train_tokens > limit

        while not enough() and (info := shard_info(self._shard(number), place)) is not None:
            count(info)
        self.progress(now)
        with _one_thread_a_call(), ThreadPoolExecutor(self.workers) as pool:
            running: collections.deque[Future[ShardInfo]] = collections.deque()
            jobs = iter(()) if enough() else self._jobs(place, number)
            try:
                while not enough():
                    while len(running) < 2 * self.workers and (job := next(jobs, None)) is not None:
                        running.append(pool.submit(work, job))
                    if not running:
                        break
                    count(running.popleft().result())
                    self.progress(now)
            finally:
                for future in running:
                    future.cancel()
        return [self._shard(i) for i in range(number)]

    def _jobs(self, place: Cursor, number: int) -> Iterator[Job]:
        """Cut the documents from `place` on into shards."""
        documents: list[Document] = []
        size = 0
        for document in read_documents(self.inputs, self.config.text_field, place):
            documents.append(document)
            size += len(document.data)
            if size >= self.shard_bytes:
                yield self._job(number, documents)
                number, documents, size = number + 1, [], 0
        if documents:
            yield self._job(number, documents)

    def _job(self, number: int, documents: list[Document]) -> Job:
        return Job(
            number=number,
            place=documents[0].place,
            end=Cursor(documents[-1].place.input, documents[-1].place.row + 1),
            read=sum(d.read for d in documents),
            ids=[d.id for d in documents],
            texts=[d.data for d in documents],
            validation=[self._held_out(d) for d in documents],
        )

    def _assemble(self, shards: list[Path], dtype: str) -> dict[str, dict[str, int]]:
        """Put the shards together, up to the document with which training tokens would exceed max_tokens."""
        counts = {part: {"documents": 0, "tokens": 0, "bytes": 0} for part in ("train", "validation")}
        temporary = [self.folder / f"{name}.tmp" for name in _DATA_FILES]
        with contextlib.ExitStack() as stack:
            stack.enter_context(naming_disk_errors(self.folder))
            files: list[BinaryIO] = [stack.enter_context(open(path, "wb")) for path in temporary]
            for path in shards:
                shard = load_file(path)
                keep = self._kept(shard, counts["train"]["tokens"])
                lengths, sizes = shard["lengths"][:keep], shard["sizes"][:keep]
                held_out = shard["is_validation"][:keep].astype(bool)
                for part, chosen in (("train", ~held_out), ("validation", held_out)):
                    counts[part]["documents"] += int((lengths[chosen] > 0).sum())
                    counts[part]["tokens"] += int(lengths[chosen].sum())
                    counts[part]["bytes"] += int(sizes[chosen & (lengths > 0)].sum())
                n_train, n_validation = int(lengths[~held_out].sum()), int(lengths[held_out].sum())
                _append(files[0], shard["train"][:n_train], dtype)
                _append(files[1], shard["validation"][:n_validation], dtype)
                _append(files[2], shard["byte_lengths"][:n_validation], BYTE_LENGTHS)
                self.progress(
                    Progress(
                        "assemble",
                        documents=sum(c["documents"] for c in counts.values()),
                        bytes=sum(file.tell() for file in files),
                        tokens=sum(c["tokens"] for c in counts.values()),
                    )
                )
                if keep < len(shard["lengths"]):
                    break
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if not counts["train"]["documents"]:
            raise DataError(self._nothing_to_train_on(counts))
        with naming_disk_errors(self.folder):
            for path in temporary:
                os.replace(path, path.with_suffix(""))
            sync_folder(self.folder)
        return counts

    def _finish(self, tokenizer: TextTokenizer, dtype: str, counts: dict[str, dict[str, int]]) -> None:
        names = [*_DATA_FILES, *sorted(f"tokenizer/{path.name}" for path in (self.folder / "tokenizer").iterdir())]
        manifest = {
            "format": FORMAT,
            "settings": self.settings,
            "inputs": [i.public() for i in self.inputs],
            "tokenizer": {
                "sha256": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "bos_id": tokenizer.bos_id,
            },
            "dtype": dtype,
            **counts,
            "files": {
                name: {"size": (self.folder / name).stat().st_size, "sha256": sha256(self.folder / name)}
                for name in names
            },
        }
        write_whole(self.folder / MANIFEST, to_json(manifest))
        self.clean()

    def clean(self) -> None:
        """Remove what only an unfinished build needs; the plan last, as the sign that there is something left."""
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
        (self.folder / "plan.json").unlink(missing_ok=True)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _shard(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:08d}.safetensors"

    def _held_out(self, document: Document) -> bool:
        if document.part == "split":
            return is_validation(self.seed, document.id, self.config.validation_share)
        return document.part == "validation"

    def _total_bytes(self) -> int | None:
        if any(i.kind not in ("txt", "jsonl") for i in self.inputs):
            return None
        return sum(i.size or 0 for i in self.inputs)

    def _kept(self, shard: dict[str, NDArray[Any]], train_tokens: int) -> int:
        """How many documents of a shard come before the cut."""
        if self.config.max_tokens is None:
            return len(shard["lengths"])
        totals = train_tokens + np.cumsum(np.where(shard["is_validation"], 0, shard["lengths"]))
        return int(np.searchsorted(totals, self.config.max_tokens, side="right"))

    def _nothing_to_train_on(self, counts: dict[str, dict[str, int]]) -> str:
        if self.config.max_tokens is not None:
            return f"data.max_tokens={self.config.max_tokens} is less than the first training document has; raise it"
        if counts["validation"]["documents"]:
            return (
                "every document fell into the validation part and none is left to train on; "
                "give more documents or name data.validation_sources"
            )
        return "data.sources hold no text: there is not one document with a token in it"


def _cpus() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _append(file: BinaryIO, values: NDArray[Any], dtype: str) -> None:
    file.write(np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).data)


@contextlib.contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Let the tokenizer library start no threads of its own: there are as many as `data.workers` already."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
