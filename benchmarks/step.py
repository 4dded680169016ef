"""One training step: full training, `peft` LoRA and Trimtab, on the shape of LLaMA-130M.

    python benchmarks/step.py                 # some minutes on 2 cores
    python benchmarks/step.py --quick         # a toy shape, to see that it runs
    python benchmarks/step.py --profile       # also: what the time of each row is spent on
    python benchmarks/step.py --cpu-time      # CPU seconds of one thread: for a machine that others use, too
    python benchmarks/step.py --device cuda   # on a GPU, where the profile's kinds of operators do not fit

Hidden 768, 12 layers, 12 heads, intermediate 2048, V = 32,000; batch 8 x 256 random tokens, bf16, AdamW
(fused), every row from the same bf16 model. Adapters sit on q, k, v, o, gate, up and down.

* "full, plain PyTorch": bf16 weights and moments, the model's own loss. The usual baseline, and no
  recommendation: in bf16 most of a small update is rounded away.
* "peft LoRA": `peft.LoraConfig` with its defaults, the model's own loss; embeddings, norms and head frozen.
* "..., our loss": the same with the chunked loss instead, to tell what is the loss's and what the layers'.
* "trimtab ...": what trains is held in fp32; the loss is the chunked one. LoRA freezes the rest, as
  peft does; ReLoRA trains embeddings, norms and head, too.

Times come from one process, interleaved (A B C A B C): s/step is a median, a ratio the median of the ratios within a
round, with the least and the largest in brackets.
Peak live bytes, FLOPs and peak resident memory come from a process for each row. Peak live bytes are all
tensors of the row: weights, gradients, optimizer state, activations. Resident memory holds the interpreter
and its libraries as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import trimtab
from trimtab.bench.meters import own_peak_resident
from trimtab.bench.runner import Timings, circumstances, interleave, markdown_table
from trimtab.bench.steps import RATE, Costs, Loss, Stepper, apart, chunked_loss, own_loss, trained
from trimtab.bench.synthetic import QUICK, Batch, Shape, random_batch, random_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FULL, TRIMTAB_FULL, RELORA = "full, plain PyTorch", "trimtab full", "trimtab ReLoRA r=128"
PEFT = {rank: f"peft LoRA r={rank}" for rank in (8, 128)}
LORA = {rank: f"trimtab LoRA r={rank}" for rank in (8, 128)}
FULL_CHUNKED, PEFT_CHUNKED = "full, our loss", "peft LoRA r=8, our loss"
RANK = {row: rank for rows in (PEFT, LORA) for rank, row in rows.items()} | {RELORA: 128, PEFT_CHUNKED: 8}
ROWS = (FULL, FULL_CHUNKED, TRIMTAB_FULL, PEFT[8], PEFT_CHUNKED, LORA[8], PEFT[128], LORA[128], RELORA)
PLAIN = (FULL, FULL_CHUNKED, *PEFT.values(), PEFT_CHUNKED)
RESTART = "one restart"


@dataclass(frozen=True)
class RowCosts(Costs):
    """What one row holds and does; resident memory aside, the same on every run."""

    resident: int
    head_trains: bool


class Row(Stepper):
    """A model with a method and an optimizer, ready to step."""

    def __init__(self, name: str, shape: Shape, device: str = "cpu") -> None:
        model = random_llama(shape).to(device)
        batch = random_batch(shape).to(device)
        self.adapter: trimtab.Adapter | None = None
        if name in PLAIN:
            loss, groups = _plain(model, batch, name)
        else:
            self.adapter = trimtab.attach(model, _method(name), dtype=torch.bfloat16)
            loss, groups = chunked_loss(model, batch), self.adapter.parameter_groups(lr=RATE)
        super().__init__(loss, groups, device=device)
        head = model.get_output_embeddings().weight
        self.head_trains = any(parameter is head for parameter in self.parameters)
        model.train()

    def restart(self) -> None:
        """Merge, draw anew, reset: the method restarts at every step that this is called after."""
        assert self.adapter is not None
        report = self.adapter.after_step(self.steps, self.optimizer)
        assert [event["event"] for event in report.events] == ["restart"], report

    def costs(self) -> RowCosts:
        """As of any step, and the resident memory of two steps before anything else is measured."""
        for _ in range(2):
            self.step()
        resident = own_peak_resident()
        return RowCosts(**asdict(super().costs()), resident=resident, head_trains=self.head_trains)


def _plain(model: Any, batch: Batch, name: str) -> tuple[Loss, list[dict[str, Any]]]:
    called = model
    if name in RANK:
        import peft

        called = peft.get_peft_model(model, peft.LoraConfig(r=RANK[name], target_modules=list(TARGETS)))
    if name in (FULL_CHUNKED, PEFT_CHUNKED):
        return chunked_loss(model, batch), trained(called)
    ids = batch.input_ids
    return own_loss(called, input_ids=ids, labels=ids, use_cache=False), trained(called)


def _method(name: str) -> trimtab.Method:
    if name == TRIMTAB_FULL:
        return trimtab.Full()
    if name == RELORA:
        return trimtab.ReLoRA(rank=RANK[name], targets=TARGETS, restart_every=1)
    return trimtab.LoRA(rank=RANK[name], alpha=8, targets=TARGETS)


def costs_apart(name: str, options: argparse.Namespace) -> RowCosts:
    """The costs of a row, measured in a process of its own."""
    quick = ["--quick"] if options.quick else []
    return RowCosts(**apart(Path(__file__).resolve(), ["--row", name, "--device", options.device, *quick]))


def measure_times(names: list[str], shape: Shape, rounds: int, clock: Callable[[], float], device: str) -> Timings:
    """All rows in one process, interleaved; a restart follows the ReLoRA row's step."""
    print(f"timing {rounds} rounds after a warm-up", file=sys.stderr)
    programs: dict[str, Callable[[], object]] = {}
    for name in names:
        row = Row(name, shape, device)
        programs[name] = row.step
        if name == RELORA:
            programs[RESTART] = row.restart
    return interleave(programs, rounds=rounds, clock=clock)


def cost_table(costs: dict[str, RowCosts], times: Timings) -> str:
    def ratio(name: str, other: str | None) -> str:
        return times.shown(name, other) if other in costs else "-"

    lines = [
        [
            name,
            f"{times.median(name):.3f}",
            ratio(name, PEFT[RANK[name]] if name in RANK else None),
            ratio(name, FULL),
            f"{cost.peak_live / 2**20:.0f}",
            f"{cost.resident / 2**20:.0f}",
            f"{cost.flops / 1e12:.3f}",
            f"{cost.trainable / 1e6:.2f}",
            "yes" if cost.head_trains else "no",
        ]
        for name, cost in costs.items()
    ]
    header = ["row", "s/step", "time / peft", "time / full", "peak live MiB", "peak resident MiB"]
    return markdown_table([*header, "TFLOP/step", "trained, M", "head trains"], lines)


# Operators by what they are for; the rest is activations, norms, rotations, sums.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "optimizer": ("aten::_fused_adamw_",),
    "softmax of the loss": (
        "aten::_log_softmax",
        "aten::_log_softmax_backward_data",
        "aten::_softmax",
        "aten::amax",
    ),
    "copies and casts": ("aten::copy_",),
}


def profile_table(names: list[str], shape: Shape, device: str = "cpu") -> str:
    """Seconds of one more step under the profiler, by kind of operator: each one's own time on the CPU.

    A rough split: the profiler slows a step, and does not see work that runs under no operator of torch's (the
    interpreter, autograd's engine); "unaccounted" is what the step took beyond the sum.
    """
    lines = []
    kind_of = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    for name in names:
        row = Row(name, shape, device)
        row.step()
        begin = time.perf_counter()
        with torch.profiler.profile() as recorded:
            row.step()
            whole = time.perf_counter() - begin
        spent = dict.fromkeys((*KINDS, "other"), 0.0)
        for event in recorded.key_averages():
            spent[kind_of.get(event.key, "other")] += event.self_cpu_time_total / 1e6
        left = whole - sum(spent.values())
        lines.append([name, *(f"{seconds:.2f}" for seconds in (*spent.values(), left, whole))])
    return markdown_table(["row, seconds in one profiled step", *KINDS, "other", "unaccounted", "whole step"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy shape in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--profile", action="store_true", help="also print what each row's time is spent on")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread instead of wall time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else Shape()
    if options.row:
        print(json.dumps(asdict(Row(options.row, shape, options.device).costs())))
        return
    costs = {name: costs_apart(name, options) for name in options.rows}
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = measure_times(options.rows, shape, 1 if options.quick else options.rounds, clock, options.device)
    print(f"{shape}; {circumstances()}\n")
    print(cost_table(costs, times))
    if RELORA in options.rows:
        restart, share = times.median(RESTART), times.ratio(RESTART, RELORA)
        print(f"\nOne restart of ReLoRA takes {restart:.3f} s: {share:.2f} of its training step.")
    if options.profile:
        print(f"\n{profile_table(options.rows, shape, options.device)}")


if __name__ == "__main__":
    main()
