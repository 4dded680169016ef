"""The hidden states of a backbone that never changes, kept on disk, so that a later epoch need not run its blocks.

cache = trimtab.HiddenCache(adapter, "hidden-states")
for batch in batches:
    with cache.batch(batch):
        loss = model(**batch).loss
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from trimtab.config import Storage
from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.base import Adapter
from trimtab.nn.replay import Reading, called_with
from trimtab.train.hidden.backbone import differences
from trimtab.train.hidden.codes import STORAGES, is_exact
from trimtab.train.hidden.examples import Examples, examples_of
from trimtab.train.hidden.identity import Identity, planes_of, readable, token_bytes
from trimtab.train.hidden.labels import check_labels
from trimtab.train.hidden.store import Store
from trimtab.train.hidden.visit import Calls, Recorder, Replayer, attention_of, autocast_of


class _Enough(Exception):
    """Ends a forward after the last block."""


class HiddenCache:
    """Keeps what a network beside a frozen backbone reads (READ), by the content of the examples.

    ```python
    cache = trimtab.HiddenCache(adapter, "hidden-states")
    for batch in batches:
        with cache.batch(batch):
            loss = model(**batch).loss
    ```

    The first visit of an example runs the blocks and writes; on later visits the blocks do not run, and embeddings,
    final norm, head and loss are the model's own. A batch in which any example is new runs through the backbone whole.
    What the network reads always went through the stored form, so that all visits read the same bits; the correction
    is added to the stored form of the last hidden states. Positions without a token (by the masks; in a decoder, behind
    the last label) are zeros.

    Args:
        adapter: at work on the model, such as READ.
        folder: of the files; made where it is not there. One process writes to it at a time, any number reads.
        storage: "bf16"; "int8", with a scale for each token and layer; or "exact", in the dtype of the backbone.
        tokens: how many will be stored in all, for the estimate and for the check of free disk before it starts; of
            each stack (encoder, decoder), or one number for both.

    Attributes:
        folder: of the files.
        storage: as given.
        bytes_per_token: of a token in every stack: one token of the encoder and one of the decoder, where there are
            both.
        token_bytes: the same for each stack.

    Raises:
        ConfigError: the adapter reads no backbone that could be kept, a setting is wrong, or the disk has no room.
        CheckpointError: the folder holds hidden states of another backbone, or stored in another form, or is damaged.
    """

    def __init__(
        self,
        adapter: Adapter,
        folder: str | Path,
        storage: Storage = "bf16",
        tokens: int | Sequence[int] | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise ConfigError(f"storage={storage!r} of hidden states is not known; use one of {', '.join(STORAGES)}")
        if not isinstance(adapter, Adapter):
            raise ConfigError(
                f"HiddenCache(adapter, folder): adapter is a {type(adapter).__name__}; give what trimtab.attach() gave"
            )
        if not isinstance(folder, str | Path) or not str(folder):
            raise ConfigError(f"HiddenCache(adapter, folder): folder={folder!r}; give the path of a folder")
        self.adapter, self.folder, self.storage = adapter, Path(folder), storage
        self._reading: Reading = readable(adapter)
        self._identity = Identity(adapter, self._reading, storage)
        self._calls: Calls | None = None
        self._planes = planes_of(self._reading, None)
        self._busy = self._cautioned = False
        self._store = Store(self.folder)
        self._take_meta()
        self._expected = None if tokens is None else self._per_stack(tokens)
        if self._expected is not None:
            self._store.check_room(max(0, self._bytes(self._expected) - self._bytes(self.tokens)))

    def _take_meta(self) -> None:
        """Take up what the folder says, if it says anything that is new here."""
        if self._calls is None and self._store.meta is not None:
            self._set_calls(self._identity.check_meta(self.folder, self._store.meta))

    def _set_calls(self, calls: Calls) -> None:
        self._calls, self._planes = calls, planes_of(self._reading, calls)
        rounded = [plane.dtype for plane in self._planes if not is_exact(self.storage, plane.dtype)]
        if rounded:
            kind = {"bf16": "bfloat16", "int8": "int8 with a scale for each token and layer"}[self.storage]
            name = str(rounded[0]).removeprefix("torch.")
            self._tell_rounding(
                f"storage={self.storage!r}: hidden states in {name} are rounded to {kind}, in the first epoch as in "
                "later ones; storage='exact' keeps them as they are"
            )

    def _tell_rounding(self, text: str) -> None:
        """Say once that what is stored is rounded."""
        warnings.warn(text, stacklevel=4)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """Bytes of a token, of each stack."""
        return token_bytes(self._planes, self.storage)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in every stack."""
        return sum(self.token_bytes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens of each stack are stored."""
        return self._store.counts or (0,) * len(self._reading.hooks)

    @property
    def size(self) -> int:
        """Bytes on disk: what is stored, and its index."""
        return self._store.size

    def __len__(self) -> int:
        """How many examples are stored."""
        return len(self._store.entries)

    def __bool__(self) -> bool:
        """True, also without examples: `if cache:` asks whether there is one."""
        return True

    def _bytes(self, tokens: Sequence[int]) -> int:
        return sum(n * size for n, size in zip(tokens, self.token_bytes, strict=True))

    def _per_stack(self, tokens: int | Sequence[int]) -> tuple[int, ...]:
        stacks = len(self._reading.hooks)
        each = tuple(tokens) if isinstance(tokens, Sequence) else (tokens,) * stacks
        if len(each) != stacks or not all(type(n) is int and n >= 0 for n in each):
            raise ConfigError(f"tokens={tokens!r}: give a number of tokens, or one for each of {stacks} stacks")
        return each

    # -- at work -------------------------------------------------------------------------------

    @contextmanager
    def batch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within this context, calls of the model are calls with this batch.

        Args:
            batch: the mapping that the model is called with.

        Raises:
            ConfigError: the model is called with something else, or was not called; a label counts that is predicted
                from a position without a token; the adapter is not at work; the disk is nearly full, or another
                process writes to the folder.
            CheckpointError: the backbone is not the one that the cache was opened with; what is stored is damaged.
        """
        with self._visiting(batch, stop=False) as called:
            yield
            if not called:
                raise ConfigError(
                    "cache.batch(batch): the model was not called; call the one that the adapter is on, or its wrapper"
                )

    def fill(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Store what is new of these batches: the blocks run, the head does not. Shows a bar and the estimated size.

        Args:
            batches: mappings that the model could be called with, under the autocast that is on here.

        Raises:
            ConfigError: as `batch`.
            CheckpointError: as `batch`.
        """
        from tqdm.auto import tqdm

        try:
            total = len(batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        with tqdm(batches, total=total, desc="hidden states", unit="batch") as bar:
            bar.write(self._estimate(self._expected))
            for done, batch in enumerate(bar, start=1):
                before = self.tokens
                self.add(batch)
                if done == 1 and total is not None and self._expected is None:
                    new = (now - then for now, then in zip(self.tokens, before, strict=True))
                    bar.write(self._estimate([then + n * total for then, n in zip(before, new, strict=True)]))
                bar.set_postfix_str(_size(self.size))

    def add(self, batch: Mapping[str, Any]) -> None:
        """Store what is new of a batch: the blocks run, the head does not.

        Raises:
            ConfigError: as `batch`.
            CheckpointError: as `batch`.
        """
        with torch.no_grad(), self._visiting(batch, stop=True), suppress(_Enough):
            self.adapter.model(**batch)

    def missing(self, batch: Mapping[str, Any]) -> set[str]:
        """The keys of the examples of a batch that are not stored.

        Raises:
            ConfigError: the batch is none that could be.
        """
        _refuse_no_mapping(batch)
        return {key for key in examples_of(batch, self._identity.sides).keys if key not in self._store.entries}

    def prepare(self, tokens: int | Sequence[int]) -> None:
        """Make sure, before anything is computed, that so many more tokens can be written.

        Args:
            tokens: of each stack, or one number for both.

        Raises:
            ConfigError: the disk has no room for them, or another process writes to the folder.
        """
        self._store.check_room(self._bytes(self._per_stack(tokens)))
        self._store.begin_writing()
        self._take_meta()

    def _estimate(self, tokens: Sequence[int] | None) -> str:
        """How large it will be with so many tokens, in words; checked against the free disk."""
        each = f"{_size(self.bytes_per_token)} a token, into {self.folder}"
        if tokens is None:
            return f"hidden states: {each}"
        needed = self._bytes(tokens)
        self._store.check_room(max(0, needed - self._bytes(self.tokens)))
        return f"hidden states: about {_size(needed)} for {sum(tokens):,} tokens, {each}"

    @contextmanager
    def _visiting(self, batch: Mapping[str, Any], *, stop: bool) -> Iterator[list[bool]]:
        self._check_ready()
        _refuse_no_mapping(batch)
        examples = examples_of(batch, self._identity.sides)
        labels = batch.get("labels")
        self._check_labels(labels, examples)
        model, called = self.adapter.model, list[bool]()
        with ExitStack() as on:
            self._busy = True
            on.callback(setattr, self, "_busy", False)
            forward = on.enter_context(ExitStack())

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                forward.close()
                called.append(True)
                call = called_with(module, args, kwargs)
                examples.check_call(call, pair=self._identity.pair)
                if call.get("labels") is not labels:
                    self._check_labels(call.get("labels"), examples)
                self._start(examples, stop).put_on(forward)

            def after(module: nn.Module, args: Any, output: Any) -> None:
                forward.close()

            on.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            on.callback(model.register_forward_hook(after, always_call=True).remove)
            yield called

    def _check_labels(self, labels: Any, examples: Examples) -> None:
        """Whether a loss with these labels is that of the model without the cache; a doubt is told once."""
        caution = check_labels(self.adapter.model, labels, examples, self._identity.sides)
        if caution and not self._cautioned:
            self._cautioned = True
            warnings.warn(f"cache.batch(batch): {caution}", stacklevel=4)

    def _start(self, examples: Examples, stop: bool) -> Recorder | Replayer:
        """What lets a forward with these examples run."""
        entries = self._store.entries
        self._check_called_alike()
        if not all(key in entries for key in examples.keys):
            self._store.begin_writing()  # and see what others wrote
            self._take_meta()
            self._check_called_alike()
        known = {row: key for row, key in enumerate(examples.keys) if key in entries}
        records = {row: (self._store.read(key), entries[key].counts) for row, key in known.items()}
        if len(records) == len(examples.keys):
            if stop:
                raise _Enough
            assert self._calls is not None
            found = [records[row] for row in range(len(records))]
            return Replayer(self._reading, self._planes, self.storage, examples, found, self._calls)

        def finish(new: dict[int, tuple[tuple[int, ...], bytes]], calls: Calls) -> None:
            self._write(examples, new, calls)
            if stop:
                raise _Enough

        return Recorder(self._reading, self._planes, self.storage, examples, records, finish)

    def _check_called_alike(self) -> None:
        """Whether the model runs as it did when what is stored was computed."""
        if self._calls is None:
            return
        now = {"autocast": autocast_of(self._reading), "attention": attention_of(self._reading)}
        then = {"autocast": self._calls.autocast, "attention": self._calls.attention}
        for name, value in now.items():
            if value != then[name]:
                there, here = (", ".join((x,) if isinstance(x, str) else x) or "off" for x in (then[name], value))
                raise CheckpointError(
                    f"{self.folder}: the cached hidden states were computed with {name} {there}, and it is {here} now; "
                    "call the model as before, or give another folder"
                )

    def _write(self, examples: Examples, new: dict[int, tuple[tuple[int, ...], bytes]], calls: Calls) -> None:
        if self._calls is None:
            self._store.write_meta({**self._identity.facts, "calls": asdict(calls)})
            self._set_calls(calls)
        elif calls != self._calls:
            odd = differences(asdict(calls), asdict(self._calls))
            raise CheckpointError(
                f"{self.folder}: the model is called in another way than when the cache was begun: {odd}; call it as "
                "before, or give another folder"
            )
        records = {examples.keys[row]: (examples.keys[row], counts, data) for row, (counts, data) in new.items()}
        self._store.append(list(records.values()))

    def _check_ready(self) -> None:
        """Whether the cache is of what the model computes now."""
        if self._busy:
            raise ConfigError("cache.batch(): one batch at a time; leave the context of the other first")
        try:
            self.adapter._require_open("cache.batch()")
        except ValueError as error:
            raise ConfigError(f"{error}, with a cache of it") from None
        if self.adapter.record.active != self.adapter.attached_name:
            raise ConfigError("cache.batch(): the adapter is not at work; trimtab.activate() it first")
        self._identity.check_unchanged(self.folder)

    def close(self) -> None:
        """Let go of the files, so that others can write to them; the cache can be opened again."""
        self._store.close()

    def __enter__(self) -> HiddenCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse_no_mapping(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"cache.batch(batch): batch is a {type(batch).__name__}; give the mapping that the model is called with, "
            "such as {'input_ids': ..., 'attention_mask': ...}"
        )


def _size(count: float) -> str:
    """Bytes in words."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {('bytes', 'KB', 'MB', 'GB', 'TB')[power]}" if power else f"{count} bytes"
