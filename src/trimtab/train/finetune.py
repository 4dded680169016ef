"""`finetune`: train a checkpoint for a task, score it, keep the best step, and leave a run folder.

The best step is a checkpoint like any other, and stays when newer ones are written. At the end the model is built
again from its files and that checkpoint, since a method may not be able to go back to an earlier phase.
"""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.errors import CannotSave, CheckpointError, ConfigError, DataError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.methods.base import Adapter
from trimtab.models.taskmodel import LABELS
from trimtab.report.page import write_report
from trimtab.train.best import Best
from trimtab.train.cached import open_cache
from trimtab.train.cachedexamples import CachedExamples
from trimtab.train.checkpoint import Checkpoint, load
from trimtab.train.folder import replace_text, save_model, sole_user
from trimtab.train.material import Material, prepare
from trimtab.train.metrics import RunLog, jsonable, require_tensorboard
from trimtab.train.scoring import Scores
from trimtab.train.session import RunResult, Session, begin, say
from trimtab.words import many


@dataclass(frozen=True)
class FinetuneResult(RunResult):
    """How a run ended.

    Attributes:
        scores: of the model that was kept, when finished.
        best_step: the step that it is of.
    """

    scores: Scores | None = None
    best_step: int | None = None


def finetune(config: FinetuneConfig, *, resume: Path | None = None, console: Console | None = None) -> FinetuneResult:
    """Fine-tune a model as `config` says; leave everything in its run folder.

    Args:
        config: for a new run, `out`/`name` is its folder; for a resumed one, the folder's own
            configuration with what the user changed.
        resume: the folder of a run to continue from its newest complete checkpoint, bit for bit.
        console: where progress is shown.

    Raises:
        TrimtabError: whatever a user can mend, in one line.
    """
    console = console or Console()
    with ExitStack() as stack:
        begun = begin(config, resume, console, stack)
        if begun.config.log.tensorboard:
            require_tensorboard()
        material = prepare(begun.config)
        for note in material.notes:
            say(console, f"note: {note}")
        run = _Run(material.config, begun.folder, console, begun.damaged, material=material)
        return run.go(begun.checkpoint, stack)


@dataclass
class _Run(Session[FinetuneConfig]):
    """One run of `finetune`."""

    rebuilds = True

    material: Material = field(kw_only=True)

    def go(self, checkpoint: Checkpoint | None, stack: ExitStack) -> FinetuneResult:
        """The whole run, from the weights to the report."""
        config, material = self.config, self.material
        start = checkpoint.step if checkpoint else 0
        if checkpoint and checkpoint.extra.get("data") != material.digest:
            raise DataError(
                "the examples of the task are not those that the run was computed on; restore the files it was made "
                "from, or start a new run"
            )
        batches, micro = material.batches, config.train.micro_batch
        model = material.model()
        shape, was = material.shape(model), checkpoint.config["model"]["name"] if checkpoint else config.model.name
        if checkpoint and was != config.model.name and checkpoint.extra.get("model") != shape:
            raise ConfigError(
                f"model.name = {config.model.name}: its config.json is not that of {was}, with which the run was "
                "begun; name a copy of that model"
            )
        for fault in material.faults:
            say(self.console, f"note: data.packing has no effect on {type(model).__name__}: {fault}")
        adapter, optimizer = self.attach(model, material.method, checkpoint, material.drawn)
        objective = material.objective(model)
        sample = next(iter(batches.batch(start).split(1))).to(self.device)
        objective.check(sample)
        if checkpoint is None:
            stack.enter_context(sole_user(self.folder))
        cached, caches = None, stack.enter_context(ExitStack())
        if (cache := open_cache(config.train, adapter, checkpoint, caches)) is not None:
            cached = CachedExamples(cache, objective, batches, config, self.device)
            cached.prepare(start, self.console)
        self.open_folder(checkpoint, adapter)
        say(
            self.console,
            f"{many(len(batches.data), 'training example')}, {many(batches.per_epoch, 'step')} an epoch, "
            f"{many(config.total_steps, 'step')} in all; {100 * batches.padding(micro):.1f} % of the positions are "
            "padding",
        )
        best = Best(config.eval.patience)
        best.read_log(self.folder / "metrics.jsonl")
        extra = {"cache_hidden": cached.place if cached else None, "data": material.digest, "model": shape}
        saver = self.saver(model, adapter, optimizer, extra, checkpoint)
        saver.pinned = best.step
        log = self.open_log(checkpoint, stack)

        def evaluate(step: int) -> Scores:
            return material.scorer(model, objective, examples=config.eval.examples, final=False)

        def evaluated(step: int, scores: Scores) -> None:
            if best.offer(step, scores.headline) and config.eval.keep_best:
                saver.pinned = step
                saver.save(step)

        def trainable_changed(step: int) -> None:
            self.phase_changed(adapter, step)
            objective.check(sample)

        step, signals = self.train(
            checkpoint,
            log,
            model=model,
            adapter=adapter,
            optimizer=optimizer,
            objective=cached or objective,
            batches=batches,
            saver=saver,
            micro_batch=micro,
            eval_every=config.eval.every or batches.per_epoch,
            evaluate=evaluate,
            evaluated=evaluated,
            enough=best.enough,
            trainable_changed=trainable_changed,
        )
        if signals.name is not None or (step < config.total_steps and not best.enough()):
            stopped = self.stopped(step, signals, log)
            return FinetuneResult(stopped.folder, step, False, stopped.exit_status)
        if config.eval.keep_best and best.seen != step:
            scores = evaluate(step)
            log.event({"event": "eval", "step": step, **scores.record()})
            best.offer(step, scores.headline)
        kept = step
        if config.eval.keep_best and best.step is not None and best.step != step:
            kept = best.step
            say(self.console, f"the best step was {kept} of {step}; going back to it")
            path = saver.path(kept)
            caches.close()
            # There may be no room for two models: nothing may hold this one when that one comes.
            del model, adapter, optimizer, objective, cached, cache, saver
            gc.collect()
            model, adapter = self._go_back(path)
        return self._finish(model, adapter, log, step, kept)

    # -- stages --------------------------------------------------------------------------------

    def _go_back(self, path: Path) -> tuple[Any, Adapter]:
        """The model and its adapter as a checkpoint has them."""
        checkpoint = load(path)
        phases = self.phases
        model = self.material.model()
        adapter, _ = self.attach(model, self.material.method, checkpoint, self.material.drawn)
        self.phases = phases
        return model, adapter

    def _finish(self, model: Any, adapter: Adapter, log: RunLog, step: int, kept: int) -> FinetuneResult:
        """From the last step to the finished folder: spectrum, what is saved, scores, report."""
        config = self.config
        self.save_spectrum(adapter)
        places, merged = self._save(model, adapter)
        scores = self.material.scorer(model, self.material.objective(model))
        log.event(
            {"event": "eval", "step": step, "final": True, "merged": merged, "kept_step": kept, **scores.record()}
        )
        if scores.warning:
            say(self.console, f"warning: {scores.warning}")
        self._write_results(scores, step, kept)
        self.note_peak()
        write_report(self.folder)
        name = scores.headline.name
        rest = [f"{split} {row[name]:.4g}" for split, row in list(scores.splits.items())[1:] if name in row]
        first = next(iter(scores.splits))
        told = ", ".join([f"{first} {scores.headline.value:.4g}", *rest])
        say(self.console, f"{config.task.name}: {name} on {told} (step {kept})")
        say(self.console, "   ".join([*places, f"report: {self.folder / 'report.html'}"]))
        return FinetuneResult(self.folder, step, True, 0, scores=scores, best_step=kept)

    def _save(self, model: Any, adapter: Adapter) -> tuple[list[str], bool]:
        """What `save` asks for, or what there is; and whether the model is merged now."""
        places, wanted = [], self.config.save
        tokenizer = _Tokenizer(self.material.tokenizer)
        whole = not adapter.no_merge
        if wanted != "merged" or not whole:
            try:
                adapter.save(self.folder / "adapter")
                if self.material.reading == "head" and self.material.loaded.labels:
                    replace_text(self.folder / "adapter" / LABELS, json.dumps(list(self.material.loaded.labels)))
                places.append(f"adapter: {self.folder / 'adapter'}")
                if not whole and wanted != "adapter":
                    say(self.console, f"save = {wanted}: there is no merged model ({adapter.no_merge})")
                    return places, False
            except CannotSave as error:
                if not whole:
                    raise
                if wanted != "adapter" or not _is_full(adapter):
                    say(self.console, f"the model is saved whole: {error}")
                wanted = "merged"
        if wanted == "adapter":
            return places, False
        adapter.merge()
        save_model(model, tokenizer, self.folder / "model")
        places.append(f"model: {self.folder / 'model'}")
        return places, True

    def _write_results(self, scores: Scores, step: int, kept: int) -> None:
        results = {"task": self.config.task.name, "steps": step, "kept_step": kept, **scores.record()}
        try:
            replace_text(self.folder / "results.json", json.dumps(jsonable(results), indent=1))
            for split, answers in scores.answers.items():
                lines = (json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in answers)
                replace_text(self.folder / f"answers-{split}.jsonl", "".join(lines))
        except OSError as error:
            raise CheckpointError(f"{self.folder}: the results cannot be written: {error.strerror or error}") from error


def _is_full(adapter: Adapter) -> bool:
    """Whether all that trains is the base itself, so that nobody expects an adapter."""
    return all(entry.group != "adapter" for entry in adapter.trainable())


@dataclass(frozen=True)
class _Tokenizer:
    """A Hugging Face tokenizer for `save_model`."""

    hf: Any

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(str(folder))
