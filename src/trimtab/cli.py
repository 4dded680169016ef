"""The command line: parse, call, print. What the commands do is done elsewhere.

Heavy libraries are imported inside the commands, so that a help page comes at once.
"""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trimtab import __version__
from trimtab.clierrors import INTERRUPTED, USER_ERROR, Fault, one_line_errors
from trimtab.clieval import EVAL, EvalCommand, evaluate
from trimtab.cliexport import EXPORT, MERGE, ExportCommand, MergeCommand, export, merge
from trimtab.clifinetune import FINETUNE, finetune
from trimtab.cligenerate import GENERATE, GenerateCommand, generate
from trimtab.cliparts import (
    RunCommand,
    Words,
    config_of,
    interrupted,
    note_interrupt,
    open_console,
    plain_warnings,
    split_words,
    to_nowhere,
    told_if_interrupted,
)
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.config import PretrainConfig

# The classes of typer's errors, by way of the one that typer exports: where they live differs by version.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]

_MANUAL = """Train large Transformers through small updates.

Trimtab pre-trains language models with ReLoRA (high-rank training through a sequence of low-rank
updates, arXiv 2307.05695), and fine-tunes Hugging Face checkpoints on tasks; both in full or with
any of its methods (LoRA, AdaLoRA, VeRA, (IA)3, BitFit, bottleneck adapters, prompt and prefix
tuning, READ, Ladder Side-Tuning). A run leaves a folder with what was trained and a report.

\b
EXAMPLES
  trimtab pretrain examples/demo.yaml              a small run, 3 minutes on 2 cores
  trimtab pretrain run.yaml --dry-run              what it would be: parameters, memory, schedule
  trimtab pretrain run.yaml optim.lr=5e-4 name=b   the same run with two settings changed
  trimtab pretrain --resume runs/b                 go on from the newest checkpoint
  trimtab generate base --adapter adapter          chat with a model and an adapter on it
  trimtab finetune examples/finetune-reviews.yaml  a checkpoint learns a task
  trimtab eval runs/reviews                        its scores; or of other files, or other models
  trimtab merge base adapter out                   an adapter into a checkpoint, file by file
  trimtab export runs/b delta --delta-rank 64      a run's whole update as one LoRA
  trimtab export runs/b b.gguf --gguf              its model for llama.cpp

\b
CONFIGURATION
  One YAML file with the sections model, data, method, optim, schedule, train, loss, eval,
  checkpoint and log. Words of the form section.key=value change it; their values are read as
  YAML. A misspelt key is an error that names the nearest one. docs/config.md lists all keys.

\b
EXIT STATUS
  0    the command did what it was asked for
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C; a run writes a last checkpoint first (a second Ctrl-C leaves at once)
  143  SIGTERM, as when a job scheduler ends a job; a run writes a last checkpoint first
"""

_PRETRAIN = """Pre-train a causal language model, from random weights or from a checkpoint.

Text is turned into a store of tokens first, unless that is there already. Then the model trains,
with restarts, evaluations and checkpoints as configured. At the end the update is merged into the
weights, the merged model is evaluated and saved, and a report is written. A method that has no
merged form leaves its adapter beside the base.

\b
ARGUMENTS
  CONFIG.yaml        the run's configuration; it may be left out if the words give all that is
                     needed, or with --resume
  section.key=value  changes one setting, after the file: train.steps=2000, out=/scratch/runs,
                     'data.sources=[a.txt, b.txt]', 'method={name: full}'. A value is YAML, and
                     a text as it stands; quote it for your shell if it has blanks or braces.

\b
EXAMPLES
  trimtab pretrain run.yaml
  trimtab pretrain run.yaml --dry-run
  trimtab pretrain run.yaml name=baseline 'method={name: full}'
  trimtab pretrain run.yaml train.stop_at=1000
  trimtab pretrain --resume runs/run
  trimtab pretrain --resume runs/run train.steps=40000

\b
FILES
  runs/NAME/config.yaml     the resolved configuration; it repeats the run
  runs/NAME/metrics.jsonl   one JSON object a logged step; restarts and evaluations are events in it
  runs/NAME/checkpoints/    the newest ones; each is written whole or not at all
  runs/NAME/model/          the merged model and its tokenizer, for AutoModelForCausalLM; for a
                            method without a merged form the base, beside adapter/
  runs/NAME/adapter/        the adapter of such a method, for trimtab.load_adapter
  runs/NAME/report.html     curves, schedule, memory, spectrum of the update; needs no network
  runs/tokens/              token stores, shared by the runs of one `out` folder

\b
EXIT STATUS
  0    the run is complete, or stopped at train.stop_at
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C, after a last checkpoint (a second Ctrl-C leaves at once)
  143  SIGTERM, after a last checkpoint
"""

_TOKENIZE = """Turn text into a store of tokens, as `trimtab pretrain` does on first use.

Takes the configuration of a run and uses its sections data, seed and out. The store is the same,
byte for byte, for any number of workers; after a kill the same command goes on where it stood, and
a complete store is only checked.

\b
EXAMPLES
  trimtab tokenize run.yaml
  trimtab tokenize run.yaml data.workers=8 data.store=/scratch/c4

\b
FILES
  runs/tokens/ID/  the store: tokens, a manifest with counts and checksums, and the tokenizer.
                   ID depends on all that decides the bytes; data.store names another folder.

\b
EXIT STATUS
  0    the store is complete
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130, 143  Ctrl-C, SIGTERM; what is done so far is kept
"""

app = typer.Typer(
    name="trimtab",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True, help=_MANUAL)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(0)


@app.command(cls=RunCommand, help=_PRETRAIN, short_help="Pre-train a causal language model.")
@one_line_errors
def pretrain(
    words: Words = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved config, parameters and memory, the restarts and the schedule; train and write "
            "nothing.",
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Go on with the run in this folder from its newest complete checkpoint, bit for bit. Without a "
            "CONFIG.yaml its own is used.",
        ),
    ] = None,
) -> int:
    """Train; the help text above is what a user reads."""
    path, overrides = split_words(words or [])
    if resume is not None and path is None:
        path = config_of(resume, "pretrain")
    config = _load(path, overrides)
    console = open_console()
    if dry_run:
        from trimtab.dryrun import dry_run as show

        show(config, console)
        return 0
    with told_if_interrupted(None):
        from trimtab.loadconfig import unused_settings
        from trimtab.train.run import pretrain as train

        if interrupted:  # a Ctrl-C during the imports can get lost in a callback of theirs
            raise KeyboardInterrupt
        for note in unused_settings(config):
            console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    with told_if_interrupted(resume or config.out / config.name):
        return int(train(config, resume=resume, console=console).exit_status)


@app.command(cls=RunCommand, help=_TOKENIZE, short_help="Turn text into a store of tokens.")
@one_line_errors
def tokenize(words: Words = None) -> int:
    """Make the store; the help text above is what a user reads."""
    path, overrides = split_words(words or [])
    config = _load(path, overrides)
    from trimtab.data.tokens import build_store, store_folder
    from trimtab.report.tokenbar import token_bar

    folder = store_folder(config.data, config.seed, config.out)
    with token_bar(open_console()) as progress:
        store = build_store(config.data, config.seed, folder, progress)
    typer.echo(
        f"{store.folder}: {store.train.n_tokens:,} training tokens, {store.validation.n_tokens:,} validation tokens, "
        f"vocabulary {store.tokenizer.vocab_size:,}"
    )
    return 0


app.command(cls=RunCommand, help=FINETUNE, short_help="Fine-tune a checkpoint for a task.")(finetune)
app.command(name="eval", cls=EvalCommand, help=EVAL, short_help="Score a model or runs on a task.")(evaluate)
app.command(cls=GenerateCommand, help=GENERATE, short_help="Answer prompts with a model, or chat with it.")(generate)
app.command(cls=MergeCommand, help=MERGE, short_help="Merge an adapter into a checkpoint, file by file.")(merge)
app.command(cls=ExportCommand, help=EXPORT, short_help="Write an update as a LoRA, or a model or LoRA for llama.cpp.")(
    export
)


def _load(path: Path | None, overrides: list[str]) -> PretrainConfig:
    if path is None and not overrides:
        raise ConfigError("command line: no config file is given; name one, such as examples/demo.yaml")
    with told_if_interrupted(None):
        from trimtab.loadconfig import load_config

        return load_config(path, overrides)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status.

    Args:
        arguments: the words after the program's name; None takes those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a character shows its number; nothing breaks
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note_interrupt)
    try:
        with plain_warnings():
            words = None if arguments is None else list(arguments)
            status = app(args=words, prog_name="trimtab", standalone_mode=False)
        sys.stdout.flush()
    except Fault as fault:
        status = _complain(str(fault))
    except _USAGE_ERROR as error:
        status = _complain(f"{_message(error)} (see trimtab --help)")
    except typer.Abort:
        status = INTERRUPTED
    except BrokenPipeError:
        to_nowhere()
        status = 0
    sys.exit(status or 0)


def _message(error: Exception) -> str:
    """What typer says of a wrong word."""
    return str(getattr(error, "format_message", error.__str__)()).rstrip(".")


def _complain(text: str) -> int:
    """One line on standard error."""
    print(f"trimtab: {' '.join(text.split())}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    main()
