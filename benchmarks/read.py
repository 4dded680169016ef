"""READ beside other methods: what trains, what is kept for the backward pass, memory, FLOPs, time.

    python benchmarks/read.py                                    # all tables, an hour on 2 cores
    python benchmarks/read.py --costs costs.json --costs-alone   # the deterministic figures, kept for later
    python benchmarks/read.py --costs costs.json                 # those figures and the times
    python benchmarks/read.py --device cuda                      # times, and energy where NVML counts it
    python benchmarks/read.py --quick                            # toy shapes, to see that it runs

Models with random weights in bf16: the shape of LLaMA-130M with 8 x 256 tokens; of T5-base (first version: relu, one
matrix for embeddings and head) with 8 sources and 8 targets of 256 tokens each; in the third table also BERT-base with
a classifier. T5's and BERT's dropout is 0 in every row: what it would keep, READ alone would not. AdamW (fused).

* "full" holds what trains in fp32; "full, plain PyTorch" has weights and moments in bf16, in which most of a small
  update is rounded away, and the model's own loss.
* peft's row has its defaults and the model's own loss; "our loss" gives it the chunked loss (`Objective`), which all
  other rows have, to tell what is the loss's. LoRA sits on all linears of the blocks, ours and peft's.
* "READ gru 256, mean" is the variant of the authors' code; "READ none 128, mean" has a network for each layer instead
  of a recurrence. LST is Ladder Side-Tuning.

Three tables for each model:

* costs: saved bytes are those that autograd keeps for the backward pass, a token (of T5: of sources and targets
  together); peak live bytes are of all tensors during a step, so weights, gradients and moments among them. A forward
  of the batch without gradients, all logits at once, gives the peak of inference; adapters are not merged, and of the
  full rows only the plain one is the backbone as one would use it.
* growth: parameters and saved bytes as the backbone gets twice and four times as deep, with one sequence.
* later: a step of a later epoch that reads the hidden states which the first one stored (`trimtab.HiddenCache`).

Costs come from a process for each row and are the same on every machine; times from one process, interleaved
(medians, and medians of the ratios within a round with the least and the largest).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.bench.energy import energy_counter, joules
from trimtab.bench.meters import live_bytes, saved_bytes
from trimtab.bench.runner import Timings, circumstances, interleave, markdown_table
from trimtab.bench.steps import RATE, Costs, Loss, Stepper, apart, chunked_loss, kept_from, own_loss, trained
from trimtab.bench.synthetic import FAMILIES, QUICK, Family, Shape

FULL, PLAIN = "full", "full, plain PyTorch"
PEFT, PEFT_CHUNKED, LORA = "peft LoRA r=8", "peft LoRA r=8, our loss", "trimtab LoRA r=8"
READ, AUTHORS, APART = "READ rnn 128", "READ gru 256, mean", "READ none 128, mean"
LADDER = "LST"
LATER = f"{READ}, a later epoch"
METHODS: dict[str, Callable[[tuple[str, ...]], trimtab.Method]] = {
    FULL: lambda _: trimtab.Full(),
    LORA: lambda targets: trimtab.LoRA(rank=8, alpha=8, targets=targets),
    "bottleneck m=16": lambda _: trimtab.Bottleneck(size=16),
    "BitFit": lambda _: trimtab.BitFit(add_bias=True),
    "prompt, 16": lambda _: trimtab.PromptTuning(length=16),
    LADDER: lambda _: trimtab.Ladder(),
    READ: lambda _: trimtab.READ(cell="rnn", size=128),
    AUTHORS: lambda _: trimtab.READ(cell="gru", size=256, aggregate="mean", init="drawn"),
    APART: lambda _: trimtab.READ(cell="none", size=128, aggregate="mean"),
}
ROWS = tuple(dict.fromkeys((FULL, PLAIN, LORA, PEFT, PEFT_CHUNKED, *METHODS)))


GENERATIVE = ("llama", "t5")


@dataclass(frozen=True)
class RowCosts(Costs):
    """Also what autograd keeps, a token, and the peak of a forward without gradients."""

    saved: float
    inference: int
    allocated: int | None
    stored: float


class Row(Stepper):
    """A model with a method and an optimizer, ready to step; of a later epoch if it has a folder for hidden states."""

    def __init__(self, family: Family, name: str, shape: Shape, device: str, folder: Path | None = None) -> None:
        self.device, self.cache = device, None
        model = family.model(shape).to(device)
        batch = family.batch(shape).to(device)
        self.arguments, labels = family.arguments(batch)
        self.tokens = shape.tokens * (1 if batch.decoder_input_ids is None else 2)
        words = labels.dim() == 2  # of a classifier there is one loss only

        def own(called: Any) -> Loss:
            return own_loss(called, **self.arguments, labels=labels)

        def ours(called: Any) -> Loss:
            return chunked_loss(called, batch) if words else own(called)

        self.model = model
        if name == PLAIN:
            super().__init__(own(model), trained(model), device=device)
        elif name in (PEFT, PEFT_CHUNKED):
            import peft

            self.model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=list(family.targets)))
            loss = own(self.model) if name == PEFT else ours(model)
            super().__init__(loss, trained(self.model), device=device)
        else:
            adapter = trimtab.attach(model, METHODS[name](family.targets), dtype=torch.bfloat16)
            loss = ours(model)
            if folder is not None:
                self.cache = cache = trimtab.HiddenCache(adapter, folder)
                loss = _within(cache, self.arguments if words else {**self.arguments, "labels": labels}, loss)
            super().__init__(loss, adapter.parameter_groups(lr=RATE), device=device)
        self.model.train()

    def infer(self) -> None:
        """A forward of the batch without gradients."""
        self.model.eval()
        with torch.no_grad():
            self.model(**self.arguments)
        self.model.train()

    def saved(self) -> float:
        """Bytes a token that autograd keeps."""
        given = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        return saved_bytes(self.loss, exclude=given) / self.tokens

    def costs(self) -> RowCosts:
        """Inference first, while there is neither gradient nor optimizer state."""
        inference = live_bytes(self.infer).peak if self.cache is None else 0
        measured, allocated = asdict(super().costs()), None
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            allocated = torch.cuda.max_memory_allocated()
        stored = 0.0 if self.cache is None else self.cache.size / self.tokens
        return RowCosts(**measured, saved=self.saved(), inference=inference, allocated=allocated, stored=stored)


def _within(cache: Any, batch: dict[str, Any], loss: Loss) -> Loss:
    """The loss with the hidden states that its first call stores and later ones read."""

    def cached() -> torch.Tensor:
        with cache.batch(batch):
            return loss()

    return cached


def shape_of(family: str, options: argparse.Namespace) -> Shape:
    shape = QUICK if options.quick else FAMILIES[family].shape
    return replace(shape, sequences=options.sequences or shape.sequences)


def ask(family: str, row: str, options: argparse.Namespace, **more: object) -> dict[str, Any]:
    """What a row costs, from a process of its own or from `--costs`."""
    arguments = [
        "--row",
        row,
        "--families",
        family,
        "--device",
        options.device,
        *(["--quick"] if options.quick else []),
    ]
    for name, value in (more | ({"sequences": options.sequences} if options.sequences else {})).items():
        arguments += [f"--{name}", str(value)]
    return apart(Path(__file__).resolve(), arguments, options.costs)


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """What such a process prints."""
    name, family = options.row, FAMILIES[options.families[0]]
    shape = shape_of(options.families[0], options)
    if options.deeper:
        row = Row(family, name, replace(shape, layers=options.deeper * shape.layers, sequences=1), options.device)
        return {"trainable": sum(parameter.numel() for parameter in row.parameters), "saved": row.saved()}
    if name != LATER:
        return asdict(Row(family, name, shape, options.device).costs())
    with tempfile.TemporaryDirectory() as folder:
        return asdict(Row(family, READ, shape, options.device, Path(folder)).costs())


def over(mine: float | None, other: float | None) -> str:
    return "-" if mine is None or not other else f"{mine / other:.3f}"


# -- the tables --------------------------------------------------------------------------------------


def cost_table(costs: dict[str, RowCosts]) -> str:
    """What each row holds and does, with the ratios to full training and to peft's LoRA."""

    def to(name: str, what: str, others: Sequence[str]) -> list[str]:
        return [over(getattr(costs[name], what), getattr(costs[o], what) if o in costs else None) for o in others]

    lines = [
        [
            name,
            f"{cost.trainable / 1e3:,.0f}",
            f"{cost.saved:,.0f}",
            *to(name, "saved", (FULL, PEFT)),
            f"{cost.peak_live / 2**20:,.0f}",
            *to(name, "peak_live", (FULL, PEFT)),
            f"{cost.flops / 1e12:.3f}",
            *to(name, "flops", (FULL, PEFT)),
            f"{cost.inference / 2**20:,.0f}",
            *([] if cost.allocated is None else [f"{cost.allocated / 2**20:,.0f}"]),
        ]
        for name, cost in costs.items()
    ]
    header = ["row", "trained, K", "saved B/token", "/ full", "/ peft", "peak live MiB", "/ full", "/ peft"]
    header += ["TFLOP/step", "/ full", "/ peft", "inference MiB"]
    return markdown_table([*header, "peak allocated MiB"][: len(lines[0])], lines)


#: What READ shall reach: what, of which cost, against which row, and at most which ratio of each model.
AIMS = (
    ("saved", FULL, {"llama": 0.10, "t5": 0.10}),
    ("saved", PLAIN, {"llama": 0.10, "t5": 0.10}),
    ("saved", LORA, {"llama": 0.25, "t5": 0.25}),
    ("saved", PEFT, {"llama": 0.25, "t5": 0.25}),
    ("peak_live", FULL, {"llama": 0.25, "t5": 0.25}),
    ("peak_live", PLAIN, {"llama": 0.25, "t5": 0.25}),
    ("peak_live", PEFT, {"llama": 0.40, "t5": 0.40}),
    ("flops", FULL, {"llama": 0.44, "t5": 0.40}),
    ("time", PEFT, {"llama": 0.55, "t5": 0.55}),
)
LATER_AIMS = {"llama": 0.17, "t5": 0.10, "bert": 0.10}
WORDS = {"saved": "saved bytes", "peak_live": "peak live bytes", "flops": "FLOPs", "time": "step time"}


def aims_table(family: str, costs: dict[str, RowCosts], times: Timings | None) -> str:
    """What READ reaches of what it shall."""
    lines = []
    for what, other, bounds in AIMS:
        if other not in costs or (what == "time" and times is None):
            continue
        if times is not None and what == "time":
            ratio = times.ratio(READ, other)
        else:
            ratio = getattr(costs[READ], what) / getattr(costs[other], what)
        lines.append(aim(f"{WORDS[what]} / {other}", bounds[family], ratio))
    return markdown_table([READ, "at most", "is", "holds"], lines)


def aim(what: str, bound: float, ratio: float) -> list[str]:
    return [what, f"{bound:.2f}", f"{ratio:.3f}", "yes" if ratio <= bound else "no"]


def time_table(family: str, options: argparse.Namespace) -> tuple[str, Timings]:
    """Seconds of a step and of a forward, all rows in one process; joules of a step where they are counted."""
    shape, counter = shape_of(family, options), energy_counter(options.device)
    rows = {name: Row(FAMILIES[family], name, shape, options.device) for name in options.rows}
    steps = interleaved({name: row.step for name, row in rows.items()}, options)
    forwards = interleaved({name: row.infer for name, row in rows.items()}, options)
    lines = []
    for name, row in rows.items():
        ratios = [steps.shown(name, other) if other in rows else "-" for other in (FULL, PLAIN, PEFT)]
        lines.append([name, f"{steps.median(name):.3f}", *ratios, f"{forwards.median(name):.3f}"])
        lines[-1].append(forwards.shown(name, PLAIN) if PLAIN in rows else "-")
        if counter is not None:
            lines[-1].append(f"{joules(row.step, counter):.2f}")
    header = ["row", "s/step", "/ full", "/ plain", "/ peft", "s/forward", "/ plain", "J/step"]
    said = "" if counter else "\n\nNo energy is given: nothing counts it here (NVML, on a GPU)."
    return markdown_table(header[: len(lines[0])], lines) + said, steps


def interleaved(programs: dict[str, Callable[[], object]], options: argparse.Namespace) -> Timings:
    print(f"timing {len(programs)} rows, {options.rounds} rounds after a warm-up", file=sys.stderr)
    return interleave(
        programs, rounds=options.rounds, clock=time.process_time if options.cpu_time else time.perf_counter
    )


def growth_table(family: str, options: argparse.Namespace) -> str:
    """Parameters and saved bytes at one, two and four times the depth."""
    lines = []
    for name in options.rows:
        found = [ask(family, name, options, deeper=factor) for factor in (1, 2, 4)]
        for what, scale in (("trainable", 1e3), ("saved", 1.0)):
            lines.append(
                [name if what == "trainable" else "", "trained, K" if what == "trainable" else "saved B/token"]
            )
            lines[-1] += [f"{one[what] / scale:,.0f}" for one in found]
            lines[-1] += [f"{one[what] / found[0][what]:.2f}" for one in found[1:]]
    layers = shape_of(family, options).layers
    return markdown_table(["row", "what", *(f"{n * layers} layers" for n in (1, 2, 4)), "x 2", "x 4"], lines)


def later_table(families: Sequence[str], options: argparse.Namespace) -> str:
    """A step of a later epoch, from hidden states that the first one stored."""
    rows, lines, aims = (FULL, READ, LATER), [], []
    for family in families:
        costs = {name: RowCosts(**ask(family, name, options)) for name in rows}
        with tempfile.TemporaryDirectory() as folder:
            times = None if options.costs_alone else later_times(family, Path(folder), options)
        for name, cost in costs.items():
            line = [f"{FAMILIES[family].describe}: {name}", f"{cost.flops / 1e12:.3f}"]
            line += [over(cost.flops, costs[FULL].flops), f"{cost.peak_live / 2**20:,.0f}"]
            line += [over(cost.peak_live, costs[FULL].peak_live), f"{cost.stored:,.0f}" if cost.stored else "-"]
            line += ["-", "-"] if times is None else [f"{times.median(name):.3f}", times.shown(name, FULL)]
            lines.append(line)
        ratio = costs[LATER].flops / costs[FULL].flops
        aims.append(aim(f"{FAMILIES[family].describe}: FLOPs / {FULL}", LATER_AIMS[family], ratio))
    header = ["row", "TFLOP/step", "/ full", "peak live MiB", "/ full", "stored B/token", "s/step", "/ full"]
    return f"{markdown_table(header, lines)}\n\n{markdown_table([LATER, 'at most', 'is', 'holds'], aims)}"


def later_times(family: str, folder: Path, options: argparse.Namespace) -> Timings:
    shape, of = shape_of(family, options), FAMILIES[family]
    rows = {name: Row(of, name, shape, options.device) for name in (FULL, READ)}
    rows[LATER] = Row(of, READ, shape, options.device, folder)
    return interleaved({name: row.step for name, row in rows.items()}, options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("costs", "growth", "later")
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables), metavar="TABLE")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="MODEL")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="toy shapes in one round")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sequences", type=int, help="of the batch, instead of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread instead of wall time")
    parser.add_argument("--costs", type=Path, help="a JSON file that keeps the deterministic figures from run to run")
    parser.add_argument("--costs-alone", action="store_true", help="time nothing")
    parser.add_argument("--row", choices=[*ROWS, LATER], help=argparse.SUPPRESS)
    parser.add_argument("--deeper", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        print(json.dumps(answer(options)))
        return
    if options.cpu_time:
        torch.set_num_threads(1)
    options.rounds = 1 if options.quick else options.rounds
    print(f"{circumstances()}\n{kept_from(options.costs)}")
    generative = GENERATIVE if {"costs", "growth"} & set(options.tables) else ()
    for family in (name for name in options.families if name in generative):
        print(f"\n{FAMILIES[family].describe}: {shape_of(family, options)}")
        if "costs" in options.tables:
            costs = {name: RowCosts(**ask(family, name, options)) for name in options.rows}
            print(f"\n{cost_table(costs)}")
            table, times = ("timed nothing", None) if options.costs_alone else time_table(family, options)
            print(f"\n{table}")
            if READ in costs:
                print(f"\nThe aims, which are for the models at size:\n\n{aims_table(family, costs, times)}")
        if "growth" in options.tables:
            print(f"\nOne sequence, a deeper backbone:\n\n{growth_table(family, options)}")
    if "later" in options.tables:
        print(f"\nA later epoch, from stored hidden states:\n\n{later_table(options.families, options)}")


if __name__ == "__main__":
    main()
