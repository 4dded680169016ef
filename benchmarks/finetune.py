"""The same fine-tuning by Trimtab and by transformers' Trainer with peft: memory, time, and making the tokens.

    python benchmarks/finetune.py                          # all tables; an hour on 2 cores
    python benchmarks/finetune.py --tables costs           # the deterministic one alone
    python benchmarks/finetune.py --tables time --rounds 3
    python benchmarks/finetune.py --tables costs time --steps 3 --cpu-time    # for a machine that others use, too
    python benchmarks/finetune.py --quick                  # toy shapes, to see that it runs

Two tasks, LoRA r = 8 on every linear layer of the blocks, bf16 on the CPU, AdamW (fused), no weight decay, a linear
decay of the rate, clipping at 1:

* chat: SmolLM2-135M on chats made of encyclopedia articles, of which the answers are learned.
* pairs: MiniLM-L6 with a new head, which trains in full, on pairs of texts, of one encyclopedia article or of two.

Models and texts are those of examples/real_models.py; where a package is missing, stand-ins of the same shapes, which
the table says. All rows take an epoch of the same examples, as many a step, from the same values. The examples are few
with the lengths of many: stretches, evenly spaced, of those of 50 steps in the order of their lengths.

* "Trainer + peft": dynamic padding, bf16 autocast over a bf16 model (which is faster and smaller here than without),
  no activation checkpointing, no logging, no saving; batches as they are drawn. "grouped": batches of similar length.
* "trimtab": as `trimtab finetune` trains by default. Chats are packed, several to a sequence, in batches as they are
  drawn; for a model with a head batches are of similar length. "all kept": without selective recomputation
  (model.selective_recompute=false). "padded": chats as drawn, and not packed; "grouped": of similar length, and not
  packed (data.packing=false).

Peak live bytes, FLOPs and peak resident memory come from a process for each row: all tensors of the run; products in
the run; and all that the process holds, its interpreter and libraries with it. The time is that of the steps alone, in
one process, interleaved; each run starts anew. Tokens a second are counted without padding. With --cpu-time it is CPU
seconds of one thread.

The table of tokens: a file of chats, made of the same texts in other rows, is read and becomes token ids and the flags
of what is learned; for `datasets` with two processes (`map`, batched) ids and flags, and ids alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import finetune_sides as sides
import torch
from finetune_data import parts, sample

from trimtab.bench.meters import count_flops, live_bytes, own_peak_resident
from trimtab.bench.runner import Timings, circumstances, markdown_table
from trimtab.bench.steps import apart

TABLES = ("costs", "time", "tokens")
#: Examples a step, by task.
BATCH = {"chat": 8, "pairs": 16}
#: Programs that make tokens.
ENCODE, MAP, MAP_IDS = "trimtab", "datasets.map, 2 processes", "datasets.map, 2 processes, ids alone"


@dataclass(frozen=True)
class RunCosts:
    """What a run holds and does."""

    peak_live: int
    resident: int
    flops: int
    trainable: int
    padding: float
    tokens: int


def setup_of(task: str, options: argparse.Namespace) -> sides.Setup:
    batch = options.batch or BATCH[task]
    some = sample(parts(task, options.out, options.quick), options.steps, batch, options.out / "benchmark")
    return sides.Setup(task, some, options.steps, batch)


# -- costs -------------------------------------------------------------------------------------------


def costs(task: str, row: str, options: argparse.Namespace) -> RunCosts:
    """In a process of its own: a run as it is, then another under the meters."""
    setup = setup_of(task, options)
    program = sides.make(setup, row)
    program.run()
    resident = own_peak_resident()
    program = sides.make(setup, row)
    flops: list[int] = []
    peak = live_bytes(lambda: flops.append(count_flops(program.run))).peak
    return RunCosts(peak, resident, flops[0], program.trainable, program.padding, program.tokens)


def costs_apart(task: str, row: str, options: argparse.Namespace) -> RunCosts:
    given = ["--task", task, "--row", row, "--steps", str(options.steps), "--out", str(options.out)]
    given += ["--quick"] if options.quick else []
    given += ["--batch", str(options.batch)] if options.batch else []
    return RunCosts(**apart(Path(__file__).resolve(), given, options.costs))


def cost_table(task: str, found: dict[str, RunCosts]) -> str:
    def over(row: str, name: str, other: str) -> str:
        return "-" if row in (sides.THEIRS, other) else f"{getattr(found[row], name) / getattr(found[other], name):.2f}"

    lines = [
        [
            row,
            f"{cost.peak_live / 2**20:.0f}",
            over(row, "peak_live", sides.THEIRS),
            over(row, "peak_live", sides.GROUPED),
            f"{cost.resident / 2**20:.0f}",
            over(row, "resident", sides.THEIRS),
            f"{cost.flops / 1e12:.3f}",
            over(row, "flops", sides.THEIRS),
            over(row, "flops", sides.GROUPED),
            f"{100 * cost.padding:.1f}",
            f"{cost.trainable / 1e3:,.0f}",
        ]
        for row, cost in found.items()
    ]
    header = [task, "peak live MiB", "/ Trainer", "/ grouped", "peak resident MiB", "/ Trainer"]
    return markdown_table([*header, "TFLOP", "/ Trainer", "/ grouped", "padding, %", "trained, K"], lines)


# -- time --------------------------------------------------------------------------------------------


def measure(
    setup: sides.Setup, rows: tuple[str, ...], rounds: int, clock: Callable[[], float]
) -> tuple[Timings, dict[str, float], int]:
    """Interleaved runs, each of which starts anew: their times, each row's mean loss, and the tokens of a run."""
    for row in rows:  # what happens once in a process is not counted
        sides.make(setup, row).run(1)
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    losses: dict[str, float] = {}
    tokens = 0
    for number in range(rounds):
        for row in rows:
            program = sides.make(setup, row)
            begin = clock()
            losses[row] = program.run()
            seconds[row].append(clock() - begin)
            tokens = program.tokens
            print(f"{setup.task}, round {number + 1}, {row}: {seconds[row][-1]:.1f} s", file=sys.stderr, flush=True)
            del program
    return Timings({row: tuple(times) for row, times in seconds.items()}), losses, tokens


def time_table(task: str, times: Timings, losses: dict[str, float], tokens: int) -> str:
    lines = []
    for row, loss in losses.items():
        cells = [row, f"{loss:.4f}", f"{times.median(row):.2f}", f"{tokens / times.median(row):,.0f}"]
        for other in (sides.THEIRS, sides.GROUPED):
            cells.append("-" if row in (sides.THEIRS, other) else times.shown(row, other))
        lines.append(cells)
    return markdown_table([task, "mean loss", "s/run", "tokens/s", "time / Trainer", "time / grouped"], lines)


# -- tokens ------------------------------------------------------------------------------------------


def chat_file(source: Path, folder: Path, megabytes: float) -> Path:
    """A file of chats, each of one to three of the source's after one another, no two rows drawn alike."""
    rows = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()]
    draw, size, path = random.Random(0), 0, folder / "chats.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            turns = [turn for row in draw.sample(rows, draw.randint(1, 3)) for turn in row]
            size += len(json.dumps({"messages": turns}, ensure_ascii=False).encode()) + 1
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


def encode(program: str, path: Path, model: Path, validation: Path) -> dict[str, float]:
    """Seconds and tokens of a program, in a process of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if program == ENCODE:
        from trimtab.tasks import parse_task
        from trimtab.tasks.encode import Encoder

        task = parse_task({"name": "chat", "train": str(path), "validation": str(validation)})
        begin = time.perf_counter()
        encoded = Encoder(tokenizer, "causal", sides.SEQ_LEN["chat"])(task.load().splits["train"], "train")
        return {"seconds": time.perf_counter() - begin, "tokens": len(encoded.ids.flat)}
    return _mapped(tokenizer, path, flags=program == MAP)


def _mapped(tokenizer: Any, path: Path, *, flags: bool) -> dict[str, float]:
    """The usual way with `datasets`: templates and tokenizer in batches; each answer's tokens from its prompt's."""
    import datasets

    datasets.disable_progress_bars()
    longest = sides.SEQ_LEN["chat"]

    def tokens_of(chats: list[Any], **settings: Any) -> list[list[int]]:
        texts = tokenizer.apply_chat_template(chats, tokenize=False, **settings)
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def tokenised(rows: dict[str, Any]) -> dict[str, Any]:
        chats = rows["messages"]
        ids = tokens_of(chats)
        if not flags:
            return {"input_ids": [row[:longest] for row in ids]}
        learned = [[0] * len(row) for row in ids]
        places = [
            (n, at) for n, chat in enumerate(chats) for at, turn in enumerate(chat) if turn["role"] == "assistant"
        ]
        starts = tokens_of([chats[n][:at] for n, at in places], add_generation_prompt=True)
        ends = tokens_of([chats[n][: at + 1] for n, at in places])
        for (n, _), before, after in zip(places, starts, ends, strict=True):
            learned[n][len(before) : len(after)] = [1] * (len(after) - len(before))
        return {"input_ids": [row[:longest] for row in ids], "learned": [row[:longest] for row in learned]}

    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        found = found.map(tokenised, batched=True, num_proc=2, remove_columns=found.column_names)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "tokens": sum(len(row) for row in found["input_ids"])}


def token_table(options: argparse.Namespace) -> str:
    real = parts("chat", options.out, options.quick)
    programs = (MAP, MAP_IDS, ENCODE)
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    tokens: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = chat_file(real.train, Path(folder), options.megabytes)
        for _ in range(options.rounds):
            for program in programs:
                given = ["--encode", program, "--files", str(path), str(real.model), str(real.validation)]
                found = apart(Path(__file__).resolve(), given)
                seconds[program].append(found["seconds"])
                tokens[program] = found["tokens"]
        size = path.stat().st_size / 1e6
    times = Timings({program: tuple(values) for program, values in seconds.items()})
    lines = []
    for program in programs:
        ratios = ["-" if program != ENCODE else times.shown(program, other) for other in (MAP, MAP_IDS)]
        speed = size / times.median(program)
        lines.append([program, f"{times.median(program):.1f}", f"{speed:.2f}", f"{tokens[program] / 1e6:.2f}", *ratios])
    header = [f"{size:.0f} MB of chats ({real.describe})", "s", "MB/s", "M tokens"]
    return markdown_table([*header, "time / datasets", "time / ids alone"], lines)


# -- what runs where ---------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    parser.add_argument("--tasks", nargs="+", choices=list(BATCH), default=list(BATCH), metavar="TASK")
    every = sides.ROWS["chat"]
    parser.add_argument("--rows", nargs="*", choices=every, default=every, metavar="ROW", help="; ".join(every))
    parser.add_argument("--quick", action="store_true", help="toy shapes in one round")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--batch", type=int, help="examples a step, in place of each task's own number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of the file that becomes tokens")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread: for a machine in use")
    parser.add_argument("--costs", type=Path, help="a JSON file that keeps what was counted from run to run")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where models and texts are, or are made")
    for hidden in ("--task", "--row", "--encode"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    if options.quick:
        options.rounds, options.steps, options.megabytes = 1, min(options.steps, 4), 0.05
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.encode:
        print(json.dumps(encode(options.encode, *options.files)))
        return
    if options.row:
        print(json.dumps(asdict(costs(options.task, options.row, options))))
        return
    print(f"{circumstances()}; {os.getloadavg()[0]:.1f} processes were running or waiting", flush=True)
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    for task in options.tasks:
        setup = setup_of(task, options)
        rows = tuple(row for row in sides.ROWS[task] if row in (*options.rows, sides.THEIRS, sides.GROUPED))
        what = f"{setup.parts.describe}; {setup.steps} steps of {setup.batch} examples"
        if "costs" in options.tables:
            found = {row: costs_apart(task, row, options) for row in rows}
            count = next(iter(found.values())).tokens
            print(f"\n{what}, {count:,} tokens:\n\n{cost_table(task, found)}", flush=True)
        if "time" in options.tables:
            timed = time_table(task, *measure(setup, rows, options.rounds, clock))
            print(f"\n{what}, {options.rounds} rounds:\n\n{timed}", flush=True)
    if "tokens" in options.tables:
        print(f"\n{token_table(options)}")


if __name__ == "__main__":
    main()
