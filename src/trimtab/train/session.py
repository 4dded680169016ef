"""What every run does around its training: its folder, its device, its phases, and where it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

import trimtab
from trimtab.config import DTYPES, RunConfig
from trimtab.errors import CheckpointError, ConfigError, NonFiniteError, TrimtabError
from trimtab.loadconfig import dump_config
from trimtab.methods.base import Adapter, Method
from trimtab.methods.registry import attach
from trimtab.optim.build import build_optimizer
from trimtab.report.page import write_report
from trimtab.report.spectrum import update_spectrum
from trimtab.report.start import write_start
from trimtab.train import randomstate
from trimtab.train.asbuilt import AsBuilt
from trimtab.train.checkpoint import Checkpoint, Checkpointer, newest
from trimtab.train.evaluate import EvalResult
from trimtab.train.folder import begin_anew, refuse_used_folder, replace_text, sole_user, way_on
from trimtab.train.loop import Training, train
from trimtab.train.memory import measured_peak, phase_row, phase_table, predict_phases, size_text
from trimtab.train.metrics import MetricsFile, RunLog, tensorboard_writer, truncate
from trimtab.train.progress import ProgressLine
from trimtab.train.resume import continued
from trimtab.train.signals import StopSignals

Config = TypeVar("Config", bound=RunConfig)


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


def refuse_distributed() -> None:
    """Raise ConfigError where torchrun has started several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE = {world} in the environment asks for a distributed run, and this command is one process; "
            "start it without torchrun"
        )


def find_checkpoint(folder: Path, console: Console) -> tuple[Checkpoint, frozenset[str]]:
    """The checkpoint to continue from, and the names of the damaged ones that were passed over."""
    damaged = set()

    def pass_over(name: str, fault: str) -> None:
        damaged.add(name)
        say(console, f"checkpoint {name} is passed over: {fault}")

    found = newest(folder / "checkpoints", pass_over)
    if found is None:
        if not folder.is_dir():
            raise CheckpointError(f"--resume {folder}: there is no such folder")
        raise CheckpointError(
            f"--resume {folder}: there is no checkpoint in it; leave --resume out{begin_anew(folder)}"
        )
    return found, frozenset(damaged)


@dataclass(frozen=True)
class Begun(Generic[Config]):
    """What a run starts from.

    Attributes:
        config: of the run; of one that goes on, with what the user changed.
        folder: of the run.
        checkpoint: what it goes on from; None for a new run.
        damaged: names of the checkpoints that were passed over.
    """

    config: Config
    folder: Path
    checkpoint: Checkpoint | None = None
    damaged: frozenset[str] = frozenset()


def begin(config: Config, resume: Path | None, console: Console, stack: ExitStack) -> Begun[Config]:
    """Find a run's folder free, or, of a run that goes on, take it for this process alone and find its checkpoint.

    Raises:
        ConfigError: this is one process of several, the folder is used, or a setting changed that must not.
        CheckpointError: there is no checkpoint to go on from.
    """
    refuse_distributed()
    if resume is None:
        folder = config.out / config.name
        refuse_used_folder(folder)
        return Begun(config, folder)
    if resume.is_dir():
        stack.enter_context(sole_user(resume))
    checkpoint, damaged = find_checkpoint(resume, console)
    config, notes = continued(config, checkpoint)
    for note in notes:
        say(console, note)
    return Begun(config, resume, checkpoint, damaged)


def device_of(chosen: str) -> torch.device:
    """The device of a setting.

    Raises:
        ConfigError: it is not there.
    """
    if chosen == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = cuda, but torch sees no GPU here; use device=cpu or device=auto")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen)


def say(console: Console, text: str) -> None:
    """A line of plain text, however wide."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass
class Session(Generic[Config]):
    """The parts of one run that more than one of its stages needs."""

    #: Whether a run that goes on builds the model that it began with again, so that its files need no copy of it.
    rebuilds: ClassVar[bool] = False

    config: Config
    folder: Path
    console: Console
    damaged: frozenset[str]
    phases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = device_of(self.config.device)
        self.dtype = DTYPES[self.config.dtype]
        self.built: AsBuilt | None = None

    def attach(
        self, model: Any, method: Method, checkpoint: Checkpoint | None, drawn: Collection[str] = ()
    ) -> tuple[Adapter, Optimizer]:
        """Put the method on the model and build its optimizer, both as the checkpoint has them.

        `drawn` are the names of what the model's source does not have.
        """
        config = self.config
        self.phases = predict_phases(model, method, config.optim, dtype=self.dtype, pure=config.pure)
        for caution in config.cautions():
            say(self.console, f"warning: {caution}")
        model.to(self.device)
        self.built = AsBuilt(model, drawn) if self.rebuilds else None
        adapter = attach(model, method, dtype=self.dtype, pure=config.pure)
        self._forget_trained(model)
        adapter.restarts(config.total_steps, config.schedule.rewarm_steps)
        if checkpoint:
            checkpoint.load_model(model, adapter)
        groups = adapter.parameter_groups(config.optim.lr, config.optim.weight_decay)
        optimizer = build_optimizer(config.optim, groups, self.device)
        if checkpoint:
            checkpoint.load_optimizer(optimizer)
        return adapter, optimizer

    def open_folder(self, checkpoint: Checkpoint | None, adapter: Adapter) -> None:
        """Make the run's folder, with what it holds before the first step."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if checkpoint:
                truncate(self.folder / "metrics.jsonl", checkpoint.step)
            replace_text(self.folder / "config.yaml", dump_config(self.config))
        except OSError as error:
            raise CheckpointError(
                f"the run folder {self.folder} cannot be written: {error.strerror or error}; choose another out=FOLDER"
            ) from error
        if checkpoint is None and not self._has_start(adapter):
            write_start(self.folder / "start.safetensors", adapter.effective_weights())
        self.show_phases()

    def open_log(self, checkpoint: Checkpoint | None, stack: ExitStack, more: Callable[[], str] = str) -> RunLog:
        """The log of what is to come; `more` is put behind the progress line."""
        config = self.config
        start = checkpoint.step if checkpoint else 0
        last = min(config.stop_at or config.total_steps, config.total_steps)
        self.progress = ProgressLine(self.console, config.total_steps, start, last, config.restarts(), more)
        board = tensorboard_writer(self.folder / "tensorboard", start) if config.log.tensorboard else None
        metrics = MetricsFile(self.folder / "metrics.jsonl")
        log = RunLog(metrics, self.progress, board, every=config.log.every, last=last)
        stack.callback(log.close)
        log.event(self.opening(start) if checkpoint is None else {"event": "resume", "step": start})
        return log

    def saver(
        self,
        model: nn.Module,
        adapter: Adapter,
        optimizer: Optimizer,
        extra: Mapping[str, Any],
        checkpoint: Checkpoint | None,
    ) -> Checkpointer:
        """Who writes the checkpoints, with `extra` in each."""
        return Checkpointer(
            self.folder / "checkpoints",
            model,
            adapter,
            optimizer,
            self.config.model_dump(mode="json"),
            keep=self.config.checkpoint.keep,
            extra=extra,
            damaged=self.damaged,
            last=checkpoint.path if checkpoint else None,
            built=self.built,
        )

    def train(self, checkpoint: Checkpoint | None, log: RunLog, **parts: Any) -> tuple[int, StopSignals]:
        """Train from the checkpoint on.

        Args:
            checkpoint: what the run goes on from.
            log: of `open_log`.
            parts: what else `Training` needs and the configuration does not say.

        Returns:
            The completed steps, and the signal that ended the training, if one did.
        """
        config = self.config
        start = checkpoint.step if checkpoint else 0
        # Whatever was built before may have drawn from the generators (a store made now, say, and not found ready).
        if checkpoint:
            checkpoint.load_random()
        else:
            randomstate.seed_all(config.seed)
        for event in parts["adapter"].catch_up(parts["optimizer"]).events if checkpoint else ():
            log.event({"step": start, **event})
        try:
            with StopSignals() as signals, self.progress:
                step = train(
                    Training(
                        log=log,
                        signals=signals,
                        schedule=config.multiplier(),
                        lr=config.optim.lr,
                        warm_start_lr=config.optim.warm_start_lr,
                        stop_at=config.stop_at,
                        clip=config.clip,
                        checkpoint_every=config.checkpoint.every,
                        device=self.device,
                        selective_recompute=config.model.recomputes,
                        **parts,
                    ),
                    start,
                )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}{way_on(self.folder)}") from error
        return step, signals

    def stopped(self, step: int, signals: StopSignals, log: RunLog) -> RunResult:
        """The end of a run that is to be continued."""
        log.event({"event": "stop", "step": step, "reason": signals.name or "train.stop_at"})
        self.note_peak()
        write_report(self.folder)
        say(
            self.console,
            f"stopped after step {step} of {self.config.total_steps}; continue with --resume {self.folder}",
        )
        return RunResult(self.folder, step, False, signals.status)

    def save_spectrum(self, adapter: Adapter) -> None:
        """Write the spectrum of the update since the start, where that can be done."""
        try:
            update_spectrum(
                adapter.base_weights() if self._has_start(adapter) else self.folder / "start.safetensors",
                adapter.effective_weights(),
                rank=adapter.config.update_rank,
                restarts=len(self.config.restarts()),
                device=self.device,
            ).save(self.folder / "spectrum.json")
        except TrimtabError as error:  # a side file; the model must not wait for it
            say(self.console, f"the spectrum of the update cannot be shown: {error}")

    def _forget_trained(self, model: Any) -> None:
        if self.built is not None:
            self.built.forget_trained(model)

    def _has_start(self, adapter: Adapter) -> bool:
        """Whether the matrices at attach need no file: the base has them, as its source gave them, to the end."""
        if self.built is None or self.config.restarts() or adapter.config.switch_step:
            return False
        known = dict(adapter.model.named_parameters(remove_duplicate=False))
        frozen = (known.get(name) for name in adapter.updated())
        return all(tensor is not None and tensor in self.built for tensor in frozen)

    def opening(self, start: int) -> dict[str, Any]:
        return {
            "event": "run",
            "step": start,
            "version": trimtab.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }

    def phase_changed(self, adapter: Adapter, step: int) -> None:
        """The trained set is another one: what was derived from the old set is made anew."""
        self._forget_trained(adapter.model)
        write_start(self.folder / "start.safetensors", adapter.effective_weights())
        label = next((row["phase"] for row in self.phases if row["from_step"] == step), "training")
        row = phase_row(adapter, self.config.optim, label, step)
        if row in self.phases:
            say(self.console, f"step {step}  phase {label}: {row['trainable']:,} parameters train; memory as foretold")
            return
        self.phases = [*(old for old in self.phases if old["from_step"] < step), row]
        self.show_phases()

    def show_phases(self) -> None:
        replace_text(self.folder / "parameters.json", json.dumps({"phases": self.phases}))
        self.console.print(phase_table(self.phases))

    def note_peak(self) -> dict[str, int]:
        peak = measured_peak(self.device)
        replace_text(self.folder / "parameters.json", json.dumps({"phases": self.phases, "measured": peak}))
        for name, value in peak.items():
            say(self.console, f"measured {name.replace('_', ' ')} memory: {size_text(value)}")
        return peak
