"""`trimtab eval`: parse, call, print. What it does is done in `trimtab.train.score`."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trimtab.clierrors import one_line_errors
from trimtab.cliparts import Words, in_effect, open_console
from trimtab.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.finetuneconfig import ScoreConfig
    from trimtab.train.scoring import Scores

EVAL = """Score a model on a task: a checkpoint, with or without an adapter, or what fine-tuning runs left.

\b
ARGUMENTS
  MODEL              a run's folder, with its task, adapter and settings; or a checkpoint's folder or
                     hub name, with a task given in words. Several are scored one after another;
                     runs that differ in their seed alone share a row of the table, as mean and
                     standard deviation.
  section.key=value  changes one setting of what is measured: task.test=new.csv, eval.batch=8,
                     'task={name: glue, subset: rte}'. A value is YAML; quote it for your shell if
                     it has blanks or braces.

\b
EXAMPLES
  trimtab eval runs/lora
  trimtab eval runs/lora-0 runs/lora-1 runs/lora-2 --out scores.json
  trimtab eval runs/lora task.validation=other.csv
  trimtab eval gpt2 --text book.txt
  trimtab eval roberta-base --adapter my-adapter 'task={name: glue, subset: sst2}'
  trimtab eval runs/lora --lm-eval hellaswag,arc_easy

\b
EXIT STATUS
  0    all of them were scored
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
"""


class EvalCommand(TyperCommand):
    """A command whose usage line names its two kinds of words."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["MODEL...", "[section.key=value ...]", "[OPTIONS]"]


@one_line_errors
def evaluate(
    words: Words = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="An adapter to put on the checkpoint.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Perplexity and bits a byte on a text, in place of a task: any UTF-8 file, or rows (.jsonl, .parquet) "
            "with a column text.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write all scores as JSON, too.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASKS", help="Run these tasks of lm-evaluation-harness in place of one of ours."
        ),
    ] = None,
) -> int:
    """Score; the help text above is what a user reads."""
    subjects, overrides = _split(words or [])
    extra = [f"adapter={json.dumps(str(adapter))}"] if adapter is not None else []
    if text is not None:
        if lm_eval is not None or any(word.partition("=")[0] == "task" for word in overrides):
            raise ConfigError("--text: a text is measured in place of a task; leave one of the two out")
        if text.is_dir():
            raise ConfigError(f"--text {text}: is a folder; give a file")
        if not text.is_file():
            raise ConfigError(f"--text {text}: there is no such file")
        # Figures of runs and of bare models can be compared only if they read pieces of one length.
        extra += [_language(str(text)), "data.seq_len=null"]
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; give a file")
    if lm_eval is not None:
        extra.append(_language("none"))  # the harness brings its own
    configs = {subject: _config(subject, [*extra, *overrides]) for subject in subjects}
    if lm_eval is not None:
        from trimtab.interop.lmeval import run_harness

        harness = {subject: run_harness(config, lm_eval.split(",")) for subject, config in configs.items()}
        _write(out, harness)
        typer.echo(json.dumps(harness, indent=1))
        return 0
    from trimtab.train.score import score

    console, found = open_console(), {}

    def note(text: str) -> None:
        console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    for subject, config in configs.items():
        with _told_of_text(text):
            found[subject] = score(config, note)
        if warning := found[subject].warning:
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        if len(configs) > 1:
            head = found[subject].headline
            console.print(f"{subject}: {head.name} {head.value:.4g}", markup=False, highlight=False, soft_wrap=True)
    console.print(_table(configs, found))
    _write(out, {subject: scores.record() for subject, scores in found.items()})
    return 0


@contextlib.contextmanager
def _told_of_text(text: Path | None) -> Iterator[None]:
    """Errors of the text's file name the option by which it was given."""
    try:
        yield
    except DataError as error:
        key, _, said = str(error).partition(": ")
        if text is None or key != "task.validation":
            raise
        raise DataError(f"--text: {said}") from error


def _language(file: str) -> str:
    """A task that reads no more than one file."""
    return f"task={{name: language, train: {json.dumps(file)}, validation: {json.dumps(file)}}}"


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    subjects = [word for word in words if "=" not in word or Path(word).exists()]
    if not subjects:
        raise ConfigError("command line: no model is given; name a run's folder, a checkpoint's, or a hub name")
    return subjects, in_effect([word for word in words if word not in subjects])


def _config(subject: str, overrides: list[str]) -> ScoreConfig:
    from trimtab.finetuneconfig import ScoreConfig
    from trimtab.loadconfig import load_tree
    from trimtab.train.score import of_run, refuse_trained_rows

    folder = Path(subject).expanduser()
    start: dict[str, Any] = {"model": {"name": subject}}
    if (folder / "config.yaml").is_file():
        start = of_run(folder)
    elif "/" in subject and subject.count("/") != 1 and not folder.exists():
        raise ConfigError(f"{subject}: there is no such folder")
    elif (folder / "comparison.json").is_file():
        raise ConfigError(f"{subject} is a comparison; its scores are in comparison.md, its runs in the folders below")
    elif not any(word.partition("=")[0].split(".")[0] == "task" for word in overrides):
        what = "is no fine-tuning run, so it" if folder.exists() else "is no folder here, and a model of the hub"
        raise ConfigError(
            f"{subject} {what} has no task; give one, such as 'task={{name: glue, subset: sst2}}', or --text FILE"
        )
    config = load_tree(ScoreConfig, None, overrides, start)
    if "task" in start:
        refuse_trained_rows(folder, config)
    return config


def _group(subject: str, config: ScoreConfig) -> str:
    """What runs that differ in their seed alone have in common, whatever they were called with here."""
    from trimtab.train.score import run_config

    folder = Path(subject).expanduser()
    if not (folder / "config.yaml").is_file():
        return subject
    without: Any = {"seed": True, "name": True, "out": True, "method": {"seed"}}
    own = run_config(folder).model_dump(mode="json", exclude=without)
    scored = config.model_dump(mode="json", exclude={"seed", "adapter", "model"})
    return json.dumps([own, scored], sort_keys=True)


def _table(configs: dict[str, ScoreConfig], found: dict[str, Scores]) -> Table:
    from rich.table import Table

    groups: dict[str, list[str]] = {}
    for subject, config in configs.items():
        groups.setdefault(_group(subject, config), []).append(subject)
    table = Table("model", "split", "metric", "score")
    for members in groups.values():
        label = "\n".join(members)
        for split, row in found[members[0]].splits.items():
            for name in row:
                numbers = [found[subject].splits[split][name] for subject in members]
                spread = f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
                table.add_row(label, split, name, f"{statistics.mean(numbers):.4g}{spread}")
                label = ""
        table.add_section()
    return table


def _write(out: Path | None, found: dict[str, Any]) -> None:
    from trimtab.train.metrics import jsonable

    if out is None:
        return
    try:
        out.write_text(json.dumps(jsonable(found), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"--out {out}: cannot be written: {error.strerror or error}") from error
