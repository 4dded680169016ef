"""`pretrain`: build everything a run needs from its configuration, train, and leave a run folder.

The order matters in three places. Random states are restored last, right before the first step. The
adapter's state is loaded before the optimizer is built, since it decides what trains. At the end the
spectrum is taken before the merge, because the merge rounds.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import trimtab
from trimtab.config import PretrainConfig
from trimtab.data.batches import TrainBatches, validation_batches
from trimtab.data.tokens import TokenStore, build_store, store_folder
from trimtab.errors import CheckpointError, ConfigError, DataError, TrimtabError
from trimtab.loadconfig import dump_config
from trimtab.methods.base import Adapter
from trimtab.methods.registry import attach
from trimtab.models.load import build_model
from trimtab.optim.build import build_optimizer
from trimtab.optim.schedule import Schedule
from trimtab.preflight import preflight
from trimtab.report.page import write_report
from trimtab.report.spectrum import update_spectrum
from trimtab.report.start import write_start
from trimtab.report.tokenbar import token_bar
from trimtab.train import randomstate
from trimtab.train.cached import open_cached
from trimtab.train.checkpoint import Checkpoint, Checkpointer, newest
from trimtab.train.evaluate import EvalResult, evaluate
from trimtab.train.folder import refuse_used_folder, replace_text, save_model, sole_user
from trimtab.train.loop import Training, train
from trimtab.train.memory import measured_peak, phase_row, phase_table, predict_phases, size_text
from trimtab.train.metrics import MetricsFile, RunLog, require_tensorboard, tensorboard_writer, truncate
from trimtab.train.objective import Objective
from trimtab.train.progress import ProgressLine
from trimtab.train.resume import continued
from trimtab.train.signals import StopSignals

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: completed steps; a checkpoint holds them.
        finished: whether the schedule's end was reached and `model/` written.
        exit_status: 0, or 130 and 143 after SIGINT and SIGTERM.
        evaluation: of the merged model, when finished.
    """

    folder: Path
    step: int
    finished: bool
    exit_status: int
    evaluation: EvalResult | None = None


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
    _refuse_distributed()
    folder = resume or config.out / config.name
    with ExitStack() as stack:
        checkpoint, damaged = None, frozenset[str]()
        if resume is None:
            refuse_used_folder(folder)
            preflight(config)
        else:
            if folder.is_dir():
                stack.enter_context(sole_user(folder))
            checkpoint, damaged = _find_checkpoint(folder, console)
            config, notes = continued(config, checkpoint)
            for note in notes:
                _say(console, note)
        run = _Run(config, folder, console, config.multiplier(), damaged)
        return run.go(checkpoint, stack)


def _refuse_distributed() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE = {world} in the environment asks for a distributed run, and pretrain runs in one process; "
            "start it without torchrun"
        )


def _find_checkpoint(folder: Path, console: Console) -> tuple[Checkpoint, frozenset[str]]:
    """The checkpoint to continue from, and the names of the damaged ones that were passed over."""
    damaged = set()

    def pass_over(name: str, fault: str) -> None:
        damaged.add(name)
        _say(console, f"checkpoint {name} is passed over: {fault}")

    found = newest(folder / "checkpoints", pass_over)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint to resume from; remove the folder and start the run anew, "
            "with a smaller checkpoint.every"
        )
    return found, frozenset(damaged)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class _Run:
    """The parts of one run that more than one of its stages needs."""

    config: PretrainConfig
    folder: Path
    console: Console
    schedule: Schedule
    damaged: frozenset[str]
    phases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        chosen = self.config.device
        if chosen == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device = cuda, but torch sees no GPU here; use device=cpu or device=auto")
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen)
        self.dtype = DTYPES[self.config.dtype]
        # The configuration has refused a number that leaves a rest.
        self.sequences = self.config.train.batch_tokens // self.config.data.seq_len

    def go(self, checkpoint: Checkpoint | None, stack: ExitStack) -> RunResult:
        """The whole run, from the data to the report."""
        config = self.config
        start = checkpoint.step if checkpoint else 0
        total, last = config.train.steps, min(config.train.stop_at or config.train.steps, config.train.steps)
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
        method = config.method.for_pretraining(config.seed)
        self.phases = predict_phases(model, method, config.optim, dtype=self.dtype, pure=config.pure)
        for caution in config.cautions():
            _say(self.console, f"warning: {caution}")
        adapter = attach(model.to(self.device), method, dtype=self.dtype, pure=config.pure)
        adapter.restarts(total, config.schedule.rewarm_steps)
        if checkpoint:
            checkpoint.load_model(model, adapter)
        optimizer = build_optimizer(
            config.optim,
            adapter.parameter_groups(config.optim.lr, config.optim.weight_decay),
            self.device,
        )
        if checkpoint:
            checkpoint.load_optimizer(optimizer)
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
        before = checkpoint.extra.get("cache_hidden") if checkpoint else None
        if cached := open_cached(config, adapter, objective, batches, self.device, before):
            stack.callback(cached.cache.close)
            cached.prepare(start, self.console)
        self._open_folder(checkpoint)
        if checkpoint is None:
            write_start(self.folder / "start.safetensors", adapter.effective_weights())
        self._show_phases()

        saver = Checkpointer(
            self.folder / "checkpoints",
            model,
            adapter,
            optimizer,
            config.model_dump(mode="json"),
            keep=config.checkpoint.keep,
            extra={
                "data": _data_identity(store),
                "store": str(store.folder.resolve()),
                "cache_hidden": cached.place if cached else None,
            },
            damaged=self.damaged,
            last=checkpoint.path if checkpoint else None,
        )
        more = cached.growth if cached else str
        progress = ProgressLine(self.console, total, start, last, self.schedule.restarts, more)
        board = tensorboard_writer(self.folder / "tensorboard", start) if config.log.tensorboard else None
        log = RunLog(MetricsFile(self.folder / "metrics.jsonl"), progress, board, every=config.log.every, last=last)
        stack.callback(log.close)
        log.event(self._opening(start) if checkpoint is None else {"event": "resume", "step": start})

        def trainable_changed(step: int) -> None:
            self._phase_changed(adapter, step)
            objective.check(sample)

        # Whatever was built before may have drawn from the generators (a store made now, say, and not found ready).
        if checkpoint:
            checkpoint.load_random()
        else:
            randomstate.seed_all(config.seed)
        for event in adapter.catch_up(optimizer).events if checkpoint else ():
            log.event({"step": start, **event})
        with StopSignals() as signals, progress:
            step = train(
                Training(
                    model=model,
                    adapter=adapter,
                    optimizer=optimizer,
                    schedule=self.schedule,
                    objective=cached or objective,
                    batches=batches,
                    saver=saver,
                    log=log,
                    signals=signals,
                    lr=config.optim.lr,
                    warm_start_lr=config.optim.warm_start_lr,
                    micro_batch=config.train.micro_batch,
                    clip=config.train.clip,
                    stop_at=config.train.stop_at,
                    eval_every=config.eval.every,
                    checkpoint_every=config.checkpoint.every,
                    evaluate=lambda: self._evaluate(model, objective, store, config.eval.tokens),
                    trainable_changed=trainable_changed,
                    device=self.device,
                ),
                start,
            )
        if step < total or signals.name is not None:
            log.event({"event": "stop", "step": step, "reason": signals.name or "train.stop_at"})
            self._note_peak()
            write_report(self.folder)
            _say(self.console, f"stopped after step {step} of {total}; continue with --resume {self.folder}")
            return RunResult(self.folder, step, False, signals.status)
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

    def _open_folder(self, checkpoint: Checkpoint | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if checkpoint:
                truncate(self.folder / "metrics.jsonl", checkpoint.step)
            replace_text(self.folder / "config.yaml", dump_config(self.config))
        except OSError as error:
            raise CheckpointError(
                f"the run folder {self.folder} cannot be written: {error.strerror or error}; choose another out=FOLDER"
            ) from error

    def _opening(self, start: int) -> dict[str, Any]:
        return {
            "event": "run",
            "step": start,
            "version": trimtab.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }

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

    def _phase_changed(self, adapter: Adapter, step: int) -> None:
        """The trained set is another one: what was derived from the old set is made anew."""
        write_start(self.folder / "start.safetensors", adapter.effective_weights())
        label = next((row["phase"] for row in self.phases if row["from_step"] == step), "training")
        row = phase_row(adapter, self.config.optim, label, step)
        if row in self.phases:
            _say(self.console, f"step {step}  phase {label}: {row['trainable']:,} parameters train; memory as foretold")
            return
        self.phases = [*(old for old in self.phases if old["from_step"] < step), row]
        self._show_phases()

    def _show_phases(self) -> None:
        replace_text(self.folder / "parameters.json", json.dumps({"phases": self.phases}))
        self.console.print(phase_table(self.phases))

    def _note_peak(self) -> dict[str, int]:
        peak = measured_peak(self.device)
        replace_text(self.folder / "parameters.json", json.dumps({"phases": self.phases, "measured": peak}))
        for name, value in peak.items():
            _say(self.console, f"measured {name.replace('_', ' ')} memory: {size_text(value)}")
        return peak

    def _finish(self, model: Any, adapter: Adapter, store: TokenStore, log: RunLog) -> EvalResult:
        """From the last step to the finished folder: spectrum, merge, evaluation, model, report."""
        config, step = self.config, self.config.train.steps
        start = self.folder / "start.safetensors"
        try:
            update_spectrum(
                start,
                adapter.effective_weights(),
                rank=adapter.config.update_rank,
                restarts=len(self.schedule.restarts),
                device=self.device,
            ).save(self.folder / "spectrum.json")
        except TrimtabError as error:  # a side file; the model must not wait for it
            _say(self.console, f"the spectrum of the update cannot be shown: {error}")
        if not adapter.no_merge:
            adapter.merge()
        model.eval()
        objective = Objective(model, config.loss.chunked, config.loss.chunk)
        result = self._evaluate(model, objective, store, config.eval.final_tokens or config.eval.tokens)
        log.event({"event": "eval", "step": step, "final": True, "merged": not adapter.no_merge, **result.record()})
        self._save(model, adapter, store)
        self._note_peak()
        write_report(self.folder)
        _say(self.console, f"model: {self.folder / 'model'}   report: {self.folder / 'report.html'}")
        return result

    def _save(self, model: Any, adapter: Adapter, store: TokenStore) -> None:
        """The merged model; or, where a method has no merged form, the base and the adapter, each in its folder."""
        if not adapter.no_merge:
            save_model(model, store.tokenizer, self.folder / "model")
            return
        own = {entry.name for entry in adapter.trainable() if entry.group == "adapter"}
        save_model(model, store.tokenizer, self.folder / "model", without=own)
        adapter.save(self.folder / "adapter")
        _say(
            self.console,
            f"adapter: {self.folder / 'adapter'}, to be put on the base in {self.folder / 'model'} by "
            f"trimtab.load_adapter (it is not merged: {adapter.no_merge})",
        )


def _data_identity(store: TokenStore) -> str:
    """What tells two token stores apart: a checksum of the checksums of all their files."""
    return hashlib.sha256(json.dumps(store.manifest["files"], sort_keys=True).encode()).hexdigest()


__all__ = ["DTYPES", "RunResult", "phase_table", "pretrain", "save_model"]
