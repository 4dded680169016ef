"""The commands for what leaves a run: `merge` and `export`. Parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trimtab.clierrors import one_line_errors
from trimtab.errors import ConfigError
from trimtab.words import many

if TYPE_CHECKING:
    from trimtab.export.delta import DeltaReport
    from trimtab.export.sources import Update

MERGE = """Merge an adapter into a checkpoint.

Reads the base's safetensors files one tensor at a time, adds the adapter, rounds once, and writes
the same files to OUT. Memory is bounded by the adapter and a few times the largest tensor,
whatever the size of the model. The result is the one of a merge in memory, bit for bit.

\b
ARGUMENTS
  BASE     the checkpoint: a folder, or a name on the Hugging Face hub
  ADAPTER  an adapter folder (adapter_config.json, adapter_model.safetensors), written by trimtab
           or by PEFT, of any method that has a merged form
  OUT      the new folder, outside those two; it must not exist, or be empty

\b
EXAMPLES
  trimtab merge HuggingFaceTB/SmolLM2-135M my-adapter merged
  trimtab merge ./base ./adapter ./merged --dtype bf16

\b
FILES
  OUT gets the base's weight files, config.json and tokenizer files. Other files of the base (code,
  pickles) are never read or copied. OUT appears when it is complete, or not at all.

\b
TIED WEIGHTS
  Where embeddings and head are one tensor and the adapter changes only one of the two, one tensor
  cannot hold both: that is an error. With --untie they are written as two tensors, and config.json
  says tie_word_embeddings: false.

\b
EXIT STATUS
  0    OUT is complete
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C; nothing is left of OUT
"""

EXPORT = """Write what a training changed as one LoRA, or a model or a LoRA for llama.cpp.

\b
With --delta-rank K: the whole update W_end - W_start of a run (ReLoRA's many adapters, or full
training) becomes one LoRA of rank K in PEFT's layout, by truncated SVD. It loads on the start model
with peft and with trimtab.load_adapter. The share of the update's energy that is kept is printed.
What is no linear layer of a block and changed too (embeddings, norms, head, biases) is stored in
full beside it; what has no place in an adapter file is named.

\b
With --gguf: a file for llama.cpp. SOURCE is a model (LLaMA, Mistral, Qwen 2, Qwen 3), or an
adapter folder with a LoRA for one of them.

A run whose method has no merged form is refused by both, with the reason: its adapter/ has no place
in either result, and model/ is not all that it learned.

\b
ARGUMENTS
  SOURCE  a run folder (runs/NAME), a checkpoint (a folder or a hub name), or with --gguf also an
          adapter folder
  OUT     the new folder, or with --gguf the new file

\b
EXAMPLES
  trimtab export runs/demo delta --delta-rank 64
  trimtab export ./finetuned delta --delta-rank 64 --base ./pretrained
  trimtab export runs/demo demo.gguf --gguf
  trimtab export ./my-lora my-lora.gguf --gguf --base HuggingFaceTB/SmolLM2-135M

\b
FILES
  OUT/adapter_config.json, OUT/adapter_model.safetensors   the LoRA
  OUT/delta.json   for each layer: rank, size of the update, share kept; and what else is stored
  OUT appears when it is complete, or not at all.

\b
EXIT STATUS
  0    OUT is complete
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C; nothing is left of OUT
"""


class MergeCommand(TyperCommand):
    """`merge`, with a usage line of words; what they mean stands in the help text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["BASE", "ADAPTER", "OUT", "[OPTIONS]"]


class ExportCommand(TyperCommand):
    """`export`, likewise."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["SOURCE", "OUT", "(--delta-rank K | --gguf)", "[OPTIONS]"]


class Dtype(str, Enum):  # noqa: UP042  (typer shows the members of a str enum)
    """A dtype on the command line."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


def _whole(word: str | int) -> int:
    """A whole number on the command line."""
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is not a whole number") from None


def _torch_dtype(dtype: Dtype | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
        dtype.value if dtype else None
    ]


@one_line_errors
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", hidden=True)],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", hidden=True)],
    out: Annotated[Path, typer.Argument(metavar="OUT", hidden=True)],
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the result. [default: each tensor's own]", show_default=False)
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Write tied weights as two where the adapter makes them differ.")
    ] = False,
) -> int:
    """Merge; the help text above is what a user reads."""
    from trimtab.export.merge import merge_checkpoint

    with _bar("merging") as progress:
        done = merge_checkpoint(base, adapter, out, dtype=_torch_dtype(dtype), untie=untie, progress=progress)
    untied = f"; untied {' and '.join(done.untied)}" if done.untied else ""
    typer.echo(
        f"{out}: {many(done.tensors, 'tensor')} in {many(done.files, 'file')}, {len(done.changed):,} changed{untied}"
    )
    if not done.changed:
        typer.echo("note: the adapter changes nothing; was it trained?")
    return 0


@one_line_errors
def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", hidden=True)],
    out: Annotated[Path, typer.Argument(metavar="OUT", hidden=True)],
    delta_rank: Annotated[
        int | None,
        typer.Option("--delta-rank", metavar="K", help="Write the whole update as a LoRA of this rank.", parser=_whole),
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a file for llama.cpp.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="START",
            help="What the training began with, or the adapter's base: a checkpoint, or a run's start.safetensors. "
            "[default: what the run's config.yaml, or the adapter, names]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="With --gguf: of the matrices. [default: the checkpoint's; fp32 for a LoRA]",
            show_default=False,
        ),
    ] = None,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="With --delta-rank: an error if anything has to be left out.")
    ] = False,
) -> int:
    """Export; the help text above is what a user reads."""
    if gguf == (delta_rank is not None):
        what = "choose one of --delta-rank and --gguf; for both, export the LoRA first, and then that folder"
        raise ConfigError(what if gguf else "say what to write: --delta-rank K or --gguf")
    if gguf:
        if require_all:
            raise ConfigError("--require-all goes with --delta-rank; --gguf never leaves anything out")
        return _gguf(Path(source).expanduser(), source, out, base, dtype)
    if dtype is not None:
        raise ConfigError("--dtype goes with --gguf; the factors of --delta-rank are fp32")
    from trimtab.export.delta import export_delta
    from trimtab.export.sources import find_update

    assert delta_rank is not None
    update = find_update(source, base)
    report = export_delta(update, out, delta_rank, require_all=require_all)
    _show(report, update, out)
    return 0


def _gguf(folder: Path, source: str, out: Path, base: str | None, dtype: Dtype | None) -> int:
    from trimtab.export.gguflora import export_lora
    from trimtab.export.ggufmodel import export_model
    from trimtab.methods.folder import CONFIG_FILE

    if (folder / CONFIG_FILE).is_file():
        layers = export_lora(folder, out, base, _torch_dtype(dtype or Dtype.FP32))
        typer.echo(f"{out}: a LoRA of {many(layers, 'layer')}; llama-cli -m BASE.gguf --lora {out}")
        return 0
    if base is not None:
        raise ConfigError(f"--base goes with an adapter folder, and {source} holds no {CONFIG_FILE}")
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        from trimtab.export.sources import refuse_unmerged

        refuse_unmerged(folder, "a file for llama.cpp would leave it out")
        source = str(folder / "model")
    tensors = export_model(source, out, _torch_dtype(dtype))
    typer.echo(f"{out}: a model of {many(tensors, 'tensor')}")
    return 0


def _show(report: DeltaReport, update: Update, out: Path) -> None:
    """What an exported update holds, for a person."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.report.spectrum import matrix_types
    from trimtab.words import short

    kinds = matrix_types([layer.name for layer in report.layers])
    table = Table(box=None, pad_edge=False)
    for heading in ("layers", "number", "shape", "rank", "kept: lowest", "highest", "update / weight"):
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    for kind in dict.fromkeys(kinds.values()):
        group = [layer for layer in report.layers if kinds[layer.name] == kind]
        low, high = min(x.kept for x in group), max(x.kept for x in group)
        table.add_row(
            kind,
            f"{len(group):,}",
            f"{group[0].shape[0]} x {group[0].shape[1]}",
            str(group[0].rank),
            f"{low:.2%}",
            f"{high:.2%}",
            f"{max(x.relative for x in group):.2g}",
        )
    console = Console()
    console.print(table)
    typer.echo(f"{report.kept:.2%} of the update's energy is kept; each layer's share is in {out / 'delta.json'}")
    if report.whole:
        size = short(sum(report.whole.values()))
        typer.echo(f"stored in full ({size} parameters): {_some(list(report.whole))}")
    if report.biases:
        typer.echo(f"biases stored: {len(report.biases)}")
    if report.unknown:
        typer.echo(
            f"note: the start of {len(report.unknown)} of the tensors is not known, so they are stored as they are"
        )
    if update.switch:
        typer.echo(
            f"note: the run began with {update.switch} steps of full training, which are part of the update; to leave "
            "them out: --base RUN/start.safetensors"
        )
    for name, why in report.left_out.items():
        typer.echo(f"left out: {name}: {why}")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback with bytes done and bytes in all that moves a bar, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
