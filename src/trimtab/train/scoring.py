"""Scores of a model on a task: its predictions or answers, the task's own metrics over them, and the loss.

A model with a head predicts in one pass. A model that writes answers by generation, as its users will have it answer,
so an answer that names no class counts as wrong. Chats and plain texts have no metric but the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from trimtab.finetuneconfig import TaskEvalConfig
from trimtab.methods.attached import adapters
from trimtab.naming import named
from trimtab.nn.virtual import position_limit
from trimtab.quiet import quiet_libraries
from trimtab.tasks.base import Example, Headline, Labelled, Loaded, Prediction, Task, Written
from trimtab.tasks.batches import Collate, Part, in_order
from trimtab.tasks.encode import Encoded, Encoder, Reading
from trimtab.train.headobjective import HeadObjective
from trimtab.train.objective import eval_mode

#: The longest answer that is waited for when nothing says how long answers are.
_LONGEST_ANSWER = 256


class Answered(NamedTuple):
    """What a model was given, all that would be right, and what it wrote."""

    source: str
    references: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Scores:
    """Scores by split and metric; `loss` is among them.

    Attributes:
        splits: by split, by the name of the metric.
        headline: the one figure.
        answers: by split, what the model wrote for each example, in their order; nothing of models with a head.
    """

    splits: Mapping[str, Mapping[str, float]]
    headline: Headline
    answers: Mapping[str, Sequence[Answered]]

    @property
    def warning(self) -> str:
        """What a user should know of the answers, in a line; empty where they can be read."""
        mute = [split for split, row in self.splits.items() if row.get("unreadable") == 1.0]
        if not mute:
            return ""
        first = self.answers[mute[0]][0]
        return (
            f"no answer on {', '.join(mute)} can be read as a label, so each counts as wrong; to "
            f"{first.source[-60:]!r} the model wrote {first.answer[:60]!r}, and {first.references[0]!r} was due"
        )

    def record(self) -> dict[str, Any]:
        """As a record of metrics.jsonl: the figures of the first split under their names, and all of them."""
        first = next(iter(self.splits.values()))
        return {
            **first,
            "headline": {"name": self.headline.name, "value": self.headline.value, "rising": self.headline.rising},
            "scores": {split: dict(scores) for split, scores in self.splits.items()},
        }


class Scorer:
    """Scores the splits of a task.

    Args:
        task: whose metrics they are.
        loaded: its examples.
        reading: how the model reads them.
        encoder: makes their tokens.
        collate: makes tensors of them.
        options: how many at once, and how answers are searched.

    Attributes:
        encoded: by split, its tokens.
        notes: what was cut or passed over, one sentence each.

    Raises:
        DataError: a split cannot be scored: all of it is too long, say.
    """

    def __init__(
        self,
        task: Task,
        loaded: Loaded,
        reading: Reading,
        encoder: Encoder,
        collate: Collate,
        options: TaskEvalConfig,
    ) -> None:
        self.task, self.loaded, self.reading = task, loaded, reading
        self.encoder, self.collate, self.options = encoder, collate, options
        self._examples = {split: known_answers(loaded.splits[split]) for split in loaded.scored}
        self.encoded = {
            split: encoder(as_written(task, reading, loaded, examples), split, known_places(loaded, split))
            for split, examples in self._examples.items()
        }
        self.notes = [f"split {split}: {note}" for split, data in self.encoded.items() for note in data.notes]

    def __call__(
        self, model: nn.Module, objective: Callable[[Part], Tensor], *, examples: int | None = None, final: bool = True
    ) -> Scores:
        """Score in eval mode; every module's mode is restored.

        Args:
            model: what is scored.
            objective: its loss.
            examples: of each split, score the first ones only.
            final: score the split "test", too; it chooses nothing, so it need not be scored before the end.
        """
        splits: dict[str, dict[str, float]] = {}
        answers: dict[str, list[Answered]] = {}
        with eval_mode(model), torch.no_grad():
            for split, every in self._examples.items():
                if split == "test" and not final and len(self._examples) > 1:
                    continue
                chosen = every[:examples]
                data = self.encoded[split]
                if len(chosen) < len(every):
                    data = data.select(np.flatnonzero(data.source < len(chosen)))
                found = self._loss(model, objective, data)
                if self.reading == "head":
                    assert isinstance(objective, HeadObjective)
                    predictions = self._predict(model, objective, data, len(chosen))
                    found = {**self._score(split, predictions, chosen), **found}
                elif self.task.has_sources:
                    answers[split] = self._write(model, chosen)
                    written = [one.answer for one in answers[split]]
                    read = self._read(written)
                    found = {**self._score(split, read, chosen), **found}
                    if self.task.form != "text":  # each counts as wrong, which a score alone does not tell
                        found["unreadable"] = sum(answer is None for answer in read) / len(read)
                splits[split] = found
        return Scores(splits, self.task.headline(splits, self.options.report), answers)

    def _loss(self, model: nn.Module, objective: Callable[[Part], Tensor], data: Encoded) -> dict[str, float]:
        device = next(model.parameters()).device
        total, due = torch.zeros((), dtype=torch.float64, device=device), 0
        for part, _ in in_order(data, self.collate, self.options.batch):
            total += objective(part.to(device)).double()
            due += part.n_valid
        nats = float(total)
        found = {"loss": nats / due}
        if self.task.form in ("chat", "plain"):
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        if data.text_bytes is not None and (size := int(data.text_bytes.sum())):
            found["bits_per_byte"] = nats / math.log(2) / size
        return found

    def _predict(self, model: nn.Module, objective: HeadObjective, data: Encoded, number: int) -> list[Prediction]:
        device = next(model.parameters()).device
        found: list[Prediction] = [None] * number
        for part, rows in in_order(data, self.collate, self.options.batch):
            logits = objective.logits(part.to(device))
            values = logits.argmax(-1).tolist() if objective.classes else logits.squeeze(-1).tolist()
            for row, value in zip(data.source[rows], values, strict=True):
                found[row] = value
        return found

    def _write(self, model: Any, examples: Sequence[Example]) -> list[Answered]:
        """What the model writes for each example, in their order."""
        of_task = as_written(self.task, self.reading, self.loaded, examples)
        asked = [example for example in of_task if isinstance(example, Written)]
        settings: dict[str, Any] = {"max_new_tokens": _LONGEST_ANSWER, **self.task.decoding}
        if self.options.beams is not None:
            settings["num_beams"] = self.options.beams
        if self.options.max_new_tokens is not None:
            settings["max_new_tokens"] = self.options.max_new_tokens
        limit = position_limit(model)
        taken = sum(adapter.config.virtual_tokens for adapter in adapters(model).values())
        most = None if limit is None else max(limit - taken - int(settings["max_new_tokens"]), 1)
        prompts = self.encoder.prompts(asked, most)
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        written = [""] * len(prompts)
        for start in range(0, len(order), self.options.batch):
            rows = order[start : start + self.options.batch]
            for row, text in zip(rows, self._generate(model, [prompts[n] for n in rows], settings), strict=True):
                written[row] = text
        return [Answered(*example, answer) for example, answer in zip(asked, written, strict=True)]

    def _generate(self, model: Any, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> list[str]:
        tokenizer, device = self.encoder.tokenizer, next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            # A causal model goes on from the right end; an encoder is read from the left.
            place = slice(width - len(prompt), width) if self.reading == "causal" else slice(0, len(prompt))
            ids[n, place], mask[n, place] = torch.tensor(prompt), 1
        settings = dict(settings)
        processors = LogitsProcessorList()
        if self.reading == "causal" and (n := settings.pop("no_repeat_ngram_size", 0)):
            processors.append(_NoRepeatInAnswer(n, width))
        # Nothing of the checkpoint's own way to write: a task's scores are comparable between checkpoints.
        config = GenerationConfig(
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            use_cache=not any(adapter.no_cache for adapter in adapters(model).values()),
            **settings,
        )
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with quiet_libraries():
                out = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    logits_processor=processors,
                )
        finally:
            model.generation_config = own
        new = out[:, width:] if self.reading == "causal" else out
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _score(self, split: str, found: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """The task's own metrics."""
        with named("task", self.task):
            return self.task.score(split, found, examples)

    def _read(self, written: Sequence[str]) -> list[Prediction]:
        """What the answers mean: labels, where the task has some."""
        if self.task.form == "text":
            return list(written)
        return [self.task.read_answer(text, self.loaded.labels) for text in written]


class _NoRepeatInAnswer(NoRepeatNGramLogitsProcessor):
    """Lets an answer repeat what stands in the prompt, but not itself: attributes have to be named as they are."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size)
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = super().__call__(input_ids[:, self._width :], scores)
        return found


def known_answers(examples: Sequence[Example]) -> list[Example]:
    """Without those whose label is kept secret."""
    return [e for e in examples if _is_known(e)]


def known_places(loaded: Loaded, split: str) -> list[str]:
    """Where the examples of `known_answers` stand; empty where the task does not say."""
    places = loaded.places.get(split, ())
    return [p for p, e in zip(places, loaded.splits[split], strict=True) if _is_known(e)] if places else []


def _is_known(example: Example) -> bool:
    return not (isinstance(example, Labelled) and example.label is None)


def as_written(task: Task, reading: Reading, loaded: Loaded, examples: Sequence[Example]) -> Sequence[Example]:
    """Labelled examples in their text form, where the model writes; others as they are."""
    if reading == "head" or task.form not in ("class", "number"):
        return examples
    return [task.as_text(e, loaded.labels) for e in examples if isinstance(e, Labelled)]
