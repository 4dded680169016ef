"""Examples as tokens, in the three ways that models read them.

    with a head     the text, or the pair of texts, as the tokenizer joins them; a class or a number is due
    causal          one sequence, of which some tokens are learned: an answer and its end, or all of a text; an
                    answer to a source begins on the line after it
    pairs           an encoder's sequence, and the decoder's

Tokens are made once, before the first step, by the tokenizer's own threads, and stand in flat arrays, 4 bytes a token.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.tasks.base import Chat, Example, Labelled, Plain, Written
from trimtab.tasks.ragged import Ragged
from trimtab.words import many

#: How a model is given an example: see the head of this file.
Reading = Literal["head", "causal", "pair"]
TooLong = Literal["cut", "skip", "error"]
# Examples that the tokenizer gets at once; its threads share them.
_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Encoded:
    """n sequences, with what is due for each; arrays that a way of reading does not need are None.

    Attributes:
        ids: tokens that the model (or its encoder) reads.
        types: segment ids, where the tokenizer tells two texts apart.
        learned: bool, as `ids`: which tokens are to be predicted from those before them. The first never is.
        targets: tokens that a decoder writes, its end included.
        labels: (n,) float64: the number of a class, or a value.
        source: (n,) int64: the number of the example that each sequence is of.
        text_bytes: (n,) int64: UTF-8 bytes that the scored tokens of a `Plain` text stand for.
        notes: what was cut or passed over, one sentence each.
    """

    ids: Ragged
    source: NDArray[np.int64]
    types: Ragged | None = None
    learned: Ragged | None = None
    targets: Ragged | None = None
    labels: NDArray[np.float64] | None = None
    text_bytes: NDArray[np.int64] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: NDArray[np.int64]) -> Encoded:
        """Some of the sequences."""

        def some(ragged: Ragged | None) -> Ragged | None:
            return None if ragged is None else Ragged.of([ragged[row] for row in rows], ragged.flat.dtype)

        ids = some(self.ids)
        assert ids is not None
        return Encoded(
            ids,
            self.source[rows],
            types=some(self.types),
            learned=some(self.learned),
            targets=some(self.targets),
            labels=None if self.labels is None else self.labels[rows],
            text_bytes=None if self.text_bytes is None else self.text_bytes[rows],
        )

    @functools.cached_property
    def digest(self) -> str:
        """What tells two sets apart."""
        found = hashlib.sha256()
        for ragged in (self.ids, self.types, self.learned, self.targets):
            if ragged is not None:
                found.update(ragged.starts.tobytes() + ragged.flat.tobytes())
        if self.labels is not None:
            found.update(self.labels.tobytes())
        return found.hexdigest()

    @functools.cached_property
    def tokens(self) -> NDArray[np.int64]:
        """(n,): tokens of each sequence, a decoder's included."""
        return self.ids.lengths if self.targets is None else self.ids.lengths + self.targets.lengths

    @functools.cached_property
    def due(self) -> NDArray[np.int64]:
        """(n,): how much of each sequence is scored: tokens, or one label."""
        if self.targets is not None:
            return self.targets.lengths
        if self.learned is None:
            return np.ones(len(self), dtype=np.int64)
        sums = np.concatenate([[0], np.cumsum(self.learned.flat, dtype=np.int64)])
        found: NDArray[np.int64] = np.diff(sums[self.learned.starts])
        return found


class _Split(NamedTuple):
    """The split that is encoded, and where its examples stand, as far as that is known."""

    name: str
    places: Sequence[str]

    def example(self, number: int) -> str:
        """An example (counted from 0) as an error names it."""
        return f"split {self.name!r}: example {number + 1}" + (f" ({self.places[number]})" if self.places else "")


class Encoder:
    """Turns examples into tokens for one model.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        reading: how the model reads.
        seq_len: the longest sequence, of an encoder and of a decoder each.
        too_long: what becomes of a longer one (see `finetuneconfig.ExamplesConfig`).
    """

    def __init__(
        self,
        tokenizer: Any,
        reading: Reading,
        seq_len: int,
        too_long: TooLong = "cut",
    ) -> None:
        self.tokenizer, self.reading, self.seq_len, self.too_long = tokenizer, reading, seq_len, too_long

    def __call__(self, examples: Sequence[Example], split: str, places: Sequence[str] = ()) -> Encoded:
        """Encode the examples of a split.

        Args:
            examples: one or more, all of one kind.
            split: its name, for errors and notes.
            places: the file and line of each example, where they are known.

        Raises:
            DataError: a sequence is too long and `too_long` is "error"; nothing is left to be scored; or the chat
                template of the tokenizer cannot tell an answer's tokens.
        """
        first, of = examples[0], _Split(split, places)
        if isinstance(first, Labelled):
            found = self._labelled(examples, of)  # type: ignore[arg-type]
        elif isinstance(first, Plain):
            found = self._plain(examples)  # type: ignore[arg-type]
        elif isinstance(first, Chat):
            found = self._chats(examples, of)  # type: ignore[arg-type]
        elif self.reading == "pair":
            found = self._pairs(examples, of)  # type: ignore[arg-type]
        else:
            found = self._written(examples, of)  # type: ignore[arg-type]
        if not len(found):
            raise DataError(
                f"split {split!r}: nothing is left of its {many(len(examples), 'example')}: {' '.join(found.notes)} "
                f"Raise data.seq_len = {self.seq_len}, as far as the model has positions, or shorten them"
            )
        return found

    def prompts(self, examples: Sequence[Written], most: int | None = None) -> list[list[int]]:
        """The tokens that a model goes on from when it writes an answer.

        Args:
            examples: what is asked.
            most: at most so many; None: `seq_len`. Of a longer prompt a causal model gets the end, where the question
                stands, behind the token that begins a text; an encoder gets what it got in training.
        """
        room = min(self.seq_len, most or self.seq_len)
        if self.reading == "pair":
            return [self._shortened(ids) for ids in self._ids([e.source for e in examples], special=True, end=True)]
        begin = 1 if _adds_beginning(self.tokenizer) else 0
        found = self._ids([as_prompt(e.source) for e in examples], special=True)
        return [ids if len(ids) <= room else _end_of(ids, room, begin) for ids in found]

    # -- the forms -----------------------------------------------------------------------------

    def _labelled(self, examples: Sequence[Labelled], of: _Split) -> Encoded:
        backend = self.tokenizer.backend_tokenizer
        pairs = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
        backend.no_padding()
        backend.enable_truncation(self.seq_len, strategy="longest_first")
        try:
            encodings = [e for part in _parts(pairs) for e in backend.encode_batch(part)]
        finally:
            backend.no_truncation()
        # Where special tokens alone are more than `seq_len`, nothing is cut.
        long = np.asarray([bool(e.overflowing) or len(e.ids) > self.seq_len for e in encodings])
        keep, notes = self._judge(long, of, "texts")
        taught = np.asarray([not cut or self._has_all(e) for e, cut in zip(encodings, long, strict=True)])
        if mute := int((keep & ~taught).sum()):
            notes.append(f"{mute} of {len(long)} texts have no word within data.seq_len and are left out.")
        keep &= taught
        labels = np.asarray([np.nan if e.label is None else e.label for e in examples], dtype=np.float64)
        chosen = [e for e, kept in zip(encodings, keep, strict=True) if kept]
        typed = "token_type_ids" in self.tokenizer.model_input_names
        return Encoded(
            Ragged.of([e.ids for e in chosen]),
            np.flatnonzero(keep),
            types=Ragged.of([e.type_ids for e in chosen], np.int8) if typed else None,
            labels=labels[keep],
            notes=notes,
        )

    def _written(self, examples: Sequence[Written], of: _Split) -> Encoded:
        prompts = self._ids([as_prompt(e.source) for e in examples], special=True)
        answers = self._ids([e.references[0] for e in examples], special=False)
        end = [self._end()]
        begin = 1 if _adds_beginning(self.tokenizer) else 0
        long = np.asarray([len(p) + len(a) + 1 > self.seq_len for p, a in zip(prompts, answers, strict=True)])
        keep, notes = self._judge(long, of, "examples")
        pairs = []
        for p, a in zip(prompts, answers, strict=True):
            room = max(self.seq_len - len(a) - 1, begin + 1)  # the answer stays, as far as it goes
            p = p if len(p) <= room else _end_of(p, room, begin)
            pairs.append((p + a + end, [False] * len(p) + [True] * (len(a) + 1)))
        return self._causal(pairs, keep, notes, "examples")

    def _chats(self, examples: Sequence[Chat], of: _Split) -> Encoded:
        from trimtab.tasks.chattokens import ChatEncoder

        each = ChatEncoder(self.tokenizer).each([e.messages for e in examples])
        pairs = [(np.asarray(i, np.int32), np.asarray(flags, bool)) for i, flags in each]
        keep, notes = self._judge(np.asarray([len(ids) > self.seq_len for ids, _ in pairs]), of, "chats")
        return self._causal(pairs, keep, notes, "chats")

    def _causal(
        self, pairs: Sequence[tuple[Any, Any]], keep: NDArray[np.bool_], notes: list[str], what: str
    ) -> Encoded:
        """Cut at `seq_len`, and leave out what has nothing to learn then."""
        cut = [(ids[: self.seq_len], learned[: self.seq_len]) for ids, learned in pairs]
        taught = np.asarray([True in learned[1:] for _, learned in cut])
        if mute := int((keep & ~taught).sum()):
            notes.append(f"{mute} of {len(pairs)} {what} have no answer within data.seq_len and are left out.")
        keep &= taught
        chosen = [pair for pair, kept in zip(cut, keep, strict=True) if kept]
        learned = Ragged.of([learned for _, learned in chosen], bool)
        if len(learned):
            learned.flat[learned.starts[:-1]] = False
        return Encoded(Ragged.of([ids for ids, _ in chosen]), np.flatnonzero(keep), learned=learned, notes=notes)

    def _plain(self, examples: Sequence[Plain]) -> Encoded:
        """Long texts become pieces of `seq_len`; all but the first token of each are learned."""
        ids: list[NDArray[np.int32]] = []
        source, sizes = [], []
        begin = self.tokenizer.bos_token_id if _adds_beginning(self.tokenizer) else None
        number = 0
        for part in _parts([e.text for e in examples]):
            for text, encoding in zip(part, self._encode(part), strict=True):
                row = [*([] if begin is None else [begin]), *encoding.ids, self._end()]
                # Of each token, where its text begins; the ends are of no text.
                at = [*([] if begin is None else [0]), *(a for a, _ in encoding.offsets), len(text)]
                for start in range(0, len(row), self.seq_len):
                    stop = min(start + self.seq_len, len(row))
                    if stop - start < 2:
                        continue  # nothing before it that it could be predicted from
                    ids.append(np.asarray(row[start:stop], dtype=np.int32))
                    source.append(number)
                    last = at[stop] if stop < len(row) else len(text)
                    sizes.append(len(text[at[start + 1] : last].encode()))
                number += 1
        found = Ragged.of(ids)
        learned = Ragged(np.ones(len(found.flat), dtype=bool), found.starts)
        if len(found):
            learned.flat[found.starts[:-1]] = False
        pieces = np.asarray(source, dtype=np.int64)
        more = len(pieces) - len(np.unique(pieces))
        notes = [f"texts longer than data.seq_len = {self.seq_len} became {more} pieces more."] if more else []
        return Encoded(found, pieces, learned=learned, text_bytes=np.asarray(sizes, dtype=np.int64), notes=notes)

    def _pairs(self, examples: Sequence[Written], of: _Split) -> Encoded:
        sources = self._ids([e.source for e in examples], special=True, end=True)
        targets = [self._ended(ids) for ids in self._ids([e.references[0] for e in examples], special=True, end=True)]
        long = np.asarray([max(len(s), len(t)) > self.seq_len for s, t in zip(sources, targets, strict=True)])
        keep, notes = self._judge(long, of, "examples")
        chosen = np.flatnonzero(keep)
        return Encoded(
            Ragged.of([self._shortened(sources[n]) for n in chosen]),
            chosen,
            targets=Ragged.of([self._shortened(targets[n]) for n in chosen]),
            notes=notes,
        )

    # -- tokens --------------------------------------------------------------------------------

    def _ids(self, texts: Sequence[str], *, special: bool, end: bool = False) -> list[list[int]]:
        """Token ids; `special` with what the tokenizer puts around a text, without its end unless `end`."""
        found = [e.ids for part in _parts(texts) for e in self._encode(part, special)]
        if special and not end:
            stops = {self.tokenizer.eos_token_id, getattr(self.tokenizer, "sep_token_id", None)} - {None}
            found = [ids[:-1] if ids and ids[-1] in stops else ids for ids in found]
        return found

    def _encode(self, texts: Sequence[str], special: bool = False) -> list[Any]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return list(backend.encode_batch(list(texts), add_special_tokens=special))

    def _ended(self, ids: list[int]) -> list[int]:
        """What a decoder writes ends, whether or not the tokenizer puts its end there."""
        return ids if ids and ids[-1] in (self._end(), self.tokenizer.sep_token_id) else [*ids, self._end()]

    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _shortened(self, ids: list[int]) -> list[int]:
        """At most `seq_len`, with the last token, which is the end, in its place."""
        return ids if len(ids) <= self.seq_len else [*ids[: self.seq_len - 1], ids[-1]]

    def _has_all(self, encoding: Any) -> bool:
        """Whether a token of each text is left where a text, or a pair, was cut, and no more than there is room for."""
        return len(encoding.ids) <= self.seq_len and set(range(encoding.n_sequences)) <= set(encoding.sequence_ids)

    def _judge(self, long: NDArray[np.bool_], of: _Split, what: str) -> tuple[NDArray[np.bool_], list[str]]:
        """Which examples stay, by `too_long`, and what to say of the others.

        Raises:
            DataError: one is too long, and `too_long` is "error".
        """
        number = int(long.sum())
        if number and self.too_long == "error":
            first = of.example(int(np.flatnonzero(long)[0]))
            who = f"{first} is" if number == 1 else f"{first} and {many(number - 1, 'other')} are"
            raise DataError(
                f"{who} longer than data.seq_len = {self.seq_len} tokens; raise it, or set data.too_long to cut or skip"
            )
        done = {"cut": "are cut", "skip": "are left out", "error": ""}[self.too_long]
        notes = [f"{number} of {len(long)} {what} are longer than data.seq_len = {self.seq_len} and {done}."]
        keep = ~long if self.too_long == "skip" else np.ones(len(long), dtype=bool)
        return keep, notes if number else []


def as_prompt(source: str) -> str:
    """A source as a causal model is given it: a line of its own, after which the answer begins."""
    return source if source.endswith("\n") else f"{source}\n"


def _end_of(ids: list[int], room: int, begin: int) -> list[int]:
    """The last of the tokens, where a question stands, behind the `begin` ones that begin every text."""
    return [*ids[:begin], *ids[len(ids) - room + begin :]]


def _parts(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[start : start + _AT_ONCE]) for start in range(0, len(items), _AT_ONCE)]


def _adds_beginning(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its bos token."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
