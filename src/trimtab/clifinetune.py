"""`trimtab finetune`: parse, call, print. What it does is done in `trimtab.train.finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.clierrors import one_line_errors
from trimtab.cliparts import Words, config_of, interrupted, open_console, split_words, told_if_interrupted
from trimtab.errors import ConfigError

FINETUNE = """Fine-tune a Hugging Face checkpoint for a task, with any method.

The task's examples become tokens; then the model trains, is scored on the task's own metric after each epoch (or every
eval.every steps), and the best step is kept. At the end the adapter is saved, or the merged model, and a report is
written.

\b
ARGUMENTS
  CONFIG.yaml        the run's configuration; it may be left out if the words give all that is
                     needed, or with --resume
  section.key=value  changes one setting, after the file: train.epochs=5, model.name=roberta-base,
                     'task={name: classification, train: a.csv, validation: b.csv}',
                     'task.prompt={text} Label:'. A value is YAML, and a text as it stands; quote it
                     for your shell if it has blanks or braces.

\b
EXAMPLES
  trimtab finetune run.yaml
  trimtab finetune run.yaml 'method={name: lora, rank: 8}' optim.lr=3e-4 name=lora
  trimtab finetune run.yaml eval.every=100 eval.patience=5
  trimtab finetune --resume runs/lora
  trimtab finetune run.yaml --methods full,lora,read --seeds 3 --sweep optim.lr=1e-4,3e-4

\b
COMPARISONS
  With --methods, --seeds or --sweep there is a run for each combination, one after another, in
  runs/NAME/METHOD/SETTINGS-seedN/. For each method the sweep runs with the first seed, the best of
  it by validation is chosen, and the other seeds run with that. The same command goes on where it
  stood. runs/NAME/comparison.html, .md and .json have the table and the figures (docs/compare.md).

\b
FILES
  runs/NAME/config.yaml     the resolved configuration; it repeats the run
  runs/NAME/metrics.jsonl   one JSON object a logged step; evaluations are events in it
  runs/NAME/checkpoints/    the newest ones, and the best one
  runs/NAME/adapter/        the adapter, for trimtab.load_adapter (and PEFT, where it knows the
                            method)
  runs/NAME/model/          with save=merged or save=both, and for full training: the merged model and
                            its tokenizer, for transformers
  runs/NAME/results.json    the scores of what was saved; answers-SPLIT.jsonl has what it was given,
                            the references, and what it wrote
  runs/NAME/report.html     curves, schedule, memory, spectrum of the update; needs no network

\b
EXIT STATUS
  0    the run is complete, or stopped at train.stop_at
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C, after a last checkpoint (a second Ctrl-C leaves at once)
  143  SIGTERM, after a last checkpoint
"""


@one_line_errors
def finetune(
    words: Words = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Go on with the run in this folder from its newest complete checkpoint, bit for bit. Without a "
            "CONFIG.yaml its own is used.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="LIST",
            help="Compare these methods: names or mappings with settings between commas, such as "
            "'full,lora,{name: vera, rank: 256}'. May be repeated.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="N", help="Run each method with N seeds, from `seed` on, or with those of a list: 0,1,2."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=V1,V2",
            help="Try these values of a setting and choose by validation; METHOD:KEY=V1,V2 for one method. May be "
            "repeated: all combinations are tried.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check a comparison and print its runs; train and write nothing.")
    ] = False,
) -> int:
    """Train; the help text above is what a user reads."""
    path, overrides = split_words(words or [])
    if methods or sweep or seeds is not None:
        if resume is not None:
            raise ConfigError(
                f"--resume {resume}: a comparison goes on by the command that began it; leave --resume out"
            )
        return _compare(path, overrides, methods or [], seeds, sweep or [], dry_run)
    if dry_run:
        raise ConfigError("--dry-run: lists the runs of a comparison; give --methods, --seeds or --sweep with it")
    if resume is not None and path is None:
        path = config_of(resume, "finetune")
    if path is None and not overrides:
        raise ConfigError("command line: no config file is given; name one, such as examples/finetune-reviews.yaml")
    with told_if_interrupted(None):
        from trimtab.finetuneconfig import FinetuneConfig
        from trimtab.loadconfig import load_tree

        config = load_tree(FinetuneConfig, path, overrides)
        from trimtab.train.finetune import finetune as train

        if interrupted:  # a Ctrl-C during the imports can get lost in a callback of theirs
            raise KeyboardInterrupt
    with told_if_interrupted(resume or config.out / config.name):
        return int(train(config, resume=resume, console=open_console()).exit_status)


def _compare(
    path: Path | None, overrides: list[str], methods: list[str], seeds: str | None, sweep: list[str], dry_run: bool
) -> int:
    if path is None and not overrides:
        raise ConfigError("command line: no config file is given; name one, such as examples/finetune-reviews.yaml")
    from trimtab.compare.plan import make_plan

    command = ["trimtab", "finetune", *([str(path)] if path else []), *overrides]
    command += [word for one in methods for word in ("--methods", one)]
    command += [] if seeds is None else ["--seeds", seeds]
    command += [word for one in sweep for word in ("--sweep", one)]
    plan = make_plan(path, overrides, methods=methods, seeds=seeds, sweeps=sweep, command=command)
    from trimtab.compare.runner import compare, show_plan

    if interrupted:
        raise KeyboardInterrupt
    if dry_run:
        show_plan(plan, open_console())
        return 0
    try:
        return compare(plan, open_console())
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stood") from stop
