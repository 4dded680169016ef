"""`pretrain`: build everything a run needs from its configuration, train, and leave a run folder.

The order matters in three places. Random states are restored last, right before the first step. The
adapter's state is loaded before the optimizer is built, since it decides what trains. At the end the
spectrum is taken before the merge, because the merge rounds.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trimtab.config import PretrainConfig
from trimtab.data.batches import TrainBatches, validation_batches
from trimtab.data.tokens import TokenStore, build_store, store_folder
from trimtab.errors import DataError
from trimtab.methods.base import Adapter
from trimtab.models.load import build_model
from trimtab.preflight import preflight
from trimtab.report.page import write_report
from trimtab.report.tokenbar import token_bar
from trimtab.train import randomstate
from trimtab.train.cached import CachedLoss, check_place, open_cache
from trimtab.train.checkpoint import Checkpoint
from trimtab.train.evaluate import EvalResult, evaluate
from trimtab.train.folder import save_model, sole_user
from trimtab.train.memory import phase_table
from trimtab.train.metrics import RunLog, require_tensorboard
from trimtab.train.objective import Objective
from trimtab.train.session import RunResult, Session, begin, say


def pretrain(config: PretrainConfig, *, resume: Path | None = None, console: Console | None = None) -> RunResult:
    """Train a language model as `config` says; leave everything in its run folder.

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
        if begun.checkpoint is None:
            check_place(config.train.cache_hidden)
            preflight(config)
        return _Run(begun.config, begun.folder, console, begun.damaged).go(begun.checkpoint, stack)


@dataclass
class _Run(Session[PretrainConfig]):
    """One run of `pretrain`."""

    def go(self, checkpoint: Checkpoint | None, stack: ExitStack) -> RunResult:
        """The whole run, from the data to the report."""
        config = self.config
        start = checkpoint.step if checkpoint else 0
        if config.log.tensorboard:
            require_tensorboard()
        randomstate.seed_all(config.seed)
        store = self._store(checkpoint)

        tokenizer = store.tokenizer
        model = build_model(
            config.model,
            vocab_size=tokenizer.vocab_size,
            seq_len=config.data.seq_len,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            seed=config.seed,
        )
        adapter, optimizer = self.attach(model, config.method.for_pretraining(config.seed), checkpoint)
        # The configuration has refused a number that leaves a rest.
        self.sequences = config.train.batch_tokens // config.data.seq_len
        batches = TrainBatches(
            store.train,
            config.data.seq_len,
            self.sequences,
            config.seed,
            document_mask=config.data.document_mask,
            eos_id=tokenizer.eos_id,
        )
        objective = Objective(model, config.loss.chunked, config.loss.chunk)
        sample = next(iter(batches.batch(start).split(1))).to(self.device)
        objective.check(sample)
        if checkpoint is None:
            stack.enter_context(sole_user(self.folder))
        cached = None
        if (cache := open_cache(config.train, adapter, checkpoint, stack)) is not None:
            cached = CachedLoss(cache, objective, batches, config, self.device)
            cached.prepare(start, self.console)
        self.open_folder(checkpoint, adapter)
        extra = {
            "data": _data_identity(store),
            "store": str(store.folder.resolve()),
            "cache_hidden": cached.place if cached else None,
        }
        log = self.open_log(checkpoint, stack, cached.growth if cached else str)

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
            saver=self.saver(model, adapter, optimizer, extra, checkpoint),
            micro_batch=config.train.micro_batch,
            eval_every=config.eval.every,
            evaluate=lambda step: self._evaluate(model, objective, store, config.eval.tokens),
            trainable_changed=trainable_changed,
        )
        if step < self.config.total_steps or signals.name is not None:
            return self.stopped(step, signals, log)
        result = self._finish(model, adapter, store, log)
        return RunResult(self.folder, step, True, 0, result)

    # -- stages --------------------------------------------------------------------------------

    def _store(self, checkpoint: Checkpoint | None) -> TokenStore:
        config = self.config
        folder = store_folder(config.data, config.seed, config.out)
        if checkpoint and config.data.store is None and (known := Path(checkpoint.extra["store"])).is_dir():
            folder = known  # resumed from another working directory, `out` may be another place
        with token_bar(self.console) as progress:
            store = build_store(config.data, config.seed, folder, progress)
        if checkpoint and checkpoint.extra["data"] != _data_identity(store):
            raise DataError(
                f"the token store {store.folder} is not the one that the run was computed on; "
                "restore it, or the sources it was made from"
            )
        return store

    def _validation(self, store: TokenStore, tokens: int) -> Any:
        """The validation batches, each with the bytes of its scored tokens."""
        return validation_batches(
            store.validation,
            self.config.data.seq_len,
            tokens,
            self.config.train.micro_batch or self.sequences,
            document_mask=self.config.data.document_mask,
            eos_id=store.tokenizer.eos_id,
        )

    def _evaluate(self, model: torch.nn.Module, objective: Objective, store: TokenStore, tokens: int) -> EvalResult:
        return evaluate(model, objective, self._validation(store, tokens))

    def _finish(self, model: Any, adapter: Adapter, store: TokenStore, log: RunLog) -> EvalResult:
        """From the last step to the finished folder: spectrum, merge, evaluation, model, report."""
        config, step = self.config, self.config.train.steps
        self.save_spectrum(adapter)
        if not adapter.no_merge:
            adapter.merge()
        model.eval()
        objective = Objective(model, config.loss.chunked, config.loss.chunk)
        result = self._evaluate(model, objective, store, config.eval.final_tokens or config.eval.tokens)
        log.event({"event": "eval", "step": step, "final": True, "merged": not adapter.no_merge, **result.record()})
        self._save(model, adapter, store)
        self.note_peak()
        write_report(self.folder)
        say(self.console, f"model: {self.folder / 'model'}   report: {self.folder / 'report.html'}")
        return result

    def _save(self, model: Any, adapter: Adapter, store: TokenStore) -> None:
        """The merged model; or, where a method has no merged form, the base and the adapter, each in its folder."""
        if not adapter.no_merge:
            save_model(model, store.tokenizer, self.folder / "model")
            return
        own = {entry.name for entry in adapter.trainable() if entry.group == "adapter"}
        save_model(model, store.tokenizer, self.folder / "model", without=own)
        adapter.save(self.folder / "adapter")
        say(
            self.console,
            f"adapter: {self.folder / 'adapter'}, to be put on the base in {self.folder / 'model'} by "
            f"trimtab.load_adapter (it is not merged: {adapter.no_merge})",
        )


def _data_identity(store: TokenStore) -> str:
    """What tells two token stores apart: a checksum of the checksums of all their files."""
    return hashlib.sha256(json.dumps(store.manifest["files"], sort_keys=True).encode()).hexdigest()


__all__ = ["RunResult", "phase_table", "pretrain", "save_model"]
