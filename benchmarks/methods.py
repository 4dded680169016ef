"""Every method, Trimtab's against `peft`'s: saved bytes a token, peak live bytes, FLOPs, time.

    python benchmarks/methods.py                   # all three tables, half an hour on 2 cores
    python benchmarks/methods.py --tables saved    # the deterministic one alone, seconds
    python benchmarks/methods.py --quick           # toy shapes, to see that it runs

Three tables, bf16 on the CPU:

* saved: bytes that autograd keeps for the backward, a token of 2,048, of a q/k/v group (three 1024 x 1024 linears on
  one input; "GQA": k and v 256 wide) and of a whole LLaMA block of width 1024 (intermediate 2736; attention and norms
  included, no checkpointing), with the adapter on every linear; and FLOPs of the group, forward and backward. Bytes are
  those that a forward adds: what is there anyway (parameters, buffers, VeRA's frozen pair) counts on neither side.
* step: one training step of the LLaMA-130M shape, batch 8 x 256, AdamW (fused), every row from the same bf16 model.
  Trimtab's rows compute the loss in chunks (`Objective`); peft's rows the model's own; "our loss" gives peft the
  chunked loss, to tell what is the loss's and what the layers'.
* qlora: LoRA on a 4-bit base (NF4, double quantisation, all linears of the blocks) of the same shape, at 2,048 and at
  256 tokens, against peft on bitsandbytes' Linear4bit.

peft runs with the defaults of its configs and of `get_peft_model`, which hold adapters in fp32, as ours are. Times
come from one process, interleaved: s/step is a median, a ratio the median of the ratios within a round, with the least
and the largest in brackets. Peak live bytes and FLOPs come from a process for each row.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trimtab
from trimtab.bench.meters import count_flops, saved_bytes
from trimtab.bench.runner import Timings, circumstances, interleave, markdown_table
from trimtab.bench.steps import RATE, Costs, Stepper, apart, chunked_loss, kept_from, own_loss, trained
from trimtab.bench.synthetic import QUICK, Shape, random_batch, random_llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = 2048  # of what is counted
STEPS = 1000  # of the run that AdaLoRA plans for

#: Each method's rows, with the settings that both sides get.
PAIRS = (
    "LoRA r=8",
    "LoRA r=8, dropout 0.05",
    "DoRA r=8",
    "VeRA r=256",
    "AdaLoRA r=8",
    "(IA)3",
    "prompt, 16",
    "prefix, 16",
)
#: Ours alone: peft has neither.
ALONE = ("BitFit", "bottleneck m=16", "full")
LAYERED = PAIRS[:6]


def ours(row: str, targets: tuple[str, ...], rank: int) -> trimtab.Method:
    """Trimtab's config of a row."""
    kinds: dict[str, Callable[[], trimtab.Method]] = {
        PAIRS[0]: lambda: trimtab.LoRA(rank=8, alpha=8, targets=targets),
        PAIRS[1]: lambda: trimtab.LoRA(rank=8, alpha=8, dropout=0.05, targets=targets),
        PAIRS[2]: lambda: trimtab.LoRA(rank=8, alpha=8, dora=True, targets=targets),
        PAIRS[3]: lambda: trimtab.VeRA(rank=rank, targets=targets),
        PAIRS[4]: lambda: trimtab.AdaLoRA(rank=8, init_rank=12, total_steps=STEPS, targets=targets),
        PAIRS[5]: lambda: trimtab.IA3(
            targets=tuple(t for t in targets if t != "down_proj"), feedforward=("down_proj",)
        ),
        PAIRS[6]: lambda: trimtab.PromptTuning(length=16),
        PAIRS[7]: lambda: trimtab.PrefixTuning(length=16),
        ALONE[0]: lambda: trimtab.BitFit(add_bias=True),
        ALONE[1]: lambda: trimtab.Bottleneck(size=16),
        ALONE[2]: lambda: trimtab.Full(),
    }
    return kinds[row]()


def theirs(row: str, targets: tuple[str, ...], rank: int) -> Any:
    """peft's config of a row."""
    import peft

    chosen = list(targets)
    kinds: dict[str, Callable[[], Any]] = {
        PAIRS[0]: lambda: peft.LoraConfig(r=8, target_modules=chosen),
        PAIRS[1]: lambda: peft.LoraConfig(r=8, lora_dropout=0.05, target_modules=chosen),
        PAIRS[2]: lambda: peft.LoraConfig(r=8, use_dora=True, target_modules=chosen),
        PAIRS[3]: lambda: peft.VeraConfig(r=rank, target_modules=chosen),
        PAIRS[4]: lambda: peft.AdaLoraConfig(target_r=8, init_r=12, total_step=STEPS, target_modules=chosen),
        PAIRS[5]: lambda: peft.IA3Config(
            target_modules=chosen, feedforward_modules=[t for t in chosen if t == "down_proj"]
        ),
        PAIRS[6]: lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
        PAIRS[7]: lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16),
    }
    return kinds[row]()


# -- saved bytes -------------------------------------------------------------------------------------


class Group(nn.Module):
    """Query, key and value projections that read one input; keys and values are `narrow` wide."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, w, bias=False) for w in (width, narrow, narrow))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def group_of(row: str | None, peft_row: bool, width: int, rank: int, tokens: int, narrow: int) -> tuple[Any, Any]:
    """A q/k/v group with the row's adapter, and an input."""
    torch.manual_seed(0)
    group: nn.Module = Group(width, narrow or width).to(torch.bfloat16).requires_grad_(False)
    group = attached(group, row, peft_row, TARGETS[:3], rank)
    return group, torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)


def group_bytes(
    row: str | None, peft_row: bool, width: int, rank: int, *, tokens: int = TOKENS, shared: int = 1
) -> float:
    """Bytes a token that a q/k/v group keeps; `row` None is the frozen base alone, `shared` heads have one key."""
    group, x = group_of(row, peft_row, width, rank, tokens, width // shared)
    return saved_bytes(lambda: group(x), exclude=there_anyway(group)) / tokens


def group_flops(row: str | None, peft_row: bool, width: int, rank: int, *, tokens: int = TOKENS) -> int:
    """FLOPs of a q/k/v group, forward and backward."""
    group, x = group_of(row, peft_row, width, rank, tokens, width)
    return count_flops(lambda: torch.cat(group(x)).sum().backward())


def block_bytes(
    row: str | None, peft_row: bool, width: int, rank: int, *, tokens: int = TOKENS, shared: int = 1
) -> float:
    """Bytes a token that a LLaMA block keeps."""
    heads = width // 64
    shape = Shape(
        hidden=width, intermediate=width * 171 // 64, layers=1, heads=heads, words=64, sequences=1, length=tokens
    )
    model = random_llama(shape, groups=heads // shared).requires_grad_(False)
    attached(model, row, peft_row, TARGETS, rank)
    block, x = model.model.layers[0], torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotary = model.model.rotary_emb(x, positions)
    model.train()
    run = lambda: block(x, position_embeddings=rotary, position_ids=positions)  # noqa: E731
    return saved_bytes(run, exclude=there_anyway(model)) / tokens


def there_anyway(model: nn.Module) -> list[torch.Tensor]:
    """Frozen tensors that a forward may save and that exist without it: peft's VeRA has buffers, ours plain tensors."""
    pair = [getattr(module, name, None) for module in model.modules() for name in ("vera_A", "vera_B")]
    return [*model.buffers(), *(tensor for tensor in pair if isinstance(tensor, torch.Tensor))]


def attached(model: Any, row: str | None, peft_row: bool, targets: tuple[str, ...], rank: int) -> Any:
    """The model with the row's adapter on it, in training mode."""
    if row is None:
        return model.train()
    if not peft_row:
        trimtab.attach(model, ours(row, targets, rank))
        return model.train()
    import peft

    return peft.get_peft_model(model, theirs(row, targets, rank)).train()


def saved_table(quick: bool) -> str:
    width, rank, tokens = (128, 32, 64) if quick else (1024, 256, TOKENS)
    base = [f"{measure(None, False, width, rank, tokens=tokens):,.0f}" for measure in (group_bytes, block_bytes)]
    lines = [["frozen base alone", base[0], "-", "-", base[1], "-", "-", "-", "-"]]
    for row, shared in [*((row, 1) for row in LAYERED), (PAIRS[3], 2 if quick else 4)]:
        cells = [row if shared == 1 else f"{row}, GQA"]
        for measure in (group_bytes, block_bytes):
            if measure is group_bytes and row == "(IA)3":
                cells += ["-", "-", "-"]  # one of its targets must be the feed-forward
                continue
            sides = (measure(row, side, width, rank, tokens=tokens, shared=shared) for side in (False, True))
            mine, other = sides
            cells += [f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.3f}"]
        counted = row != "(IA)3" and shared == 1
        flops = [group_flops(row, side, width, rank, tokens=tokens) for side in (False, True)] if counted else []
        lines.append([*cells, *([f"{count / 1e9:.1f}" for count in flops] or ["-", "-"])])
    header = ["saved bytes a token", "q/k/v: trimtab", "peft", "ratio", "block: trimtab", "peft", "ratio"]
    return markdown_table([*header, "q/k/v GFLOP: trimtab", "peft"], lines)


# -- a training step ---------------------------------------------------------------------------------


class Row(Stepper):
    """A model with a method and an optimizer, ready to step.

    `name` is "trimtab ...", "peft ..." or "peft ..., our loss", then the method; with "QLoRA" the base is in 4 bits.
    """

    def __init__(self, name: str, shape: Shape, rank: int, device: str = "cpu") -> None:
        batch = random_batch(shape).to(device)
        whose, _, row = name.partition(" ")
        chunked, row = row.endswith(", our loss"), row.removesuffix(", our loss")
        if row.startswith("QLoRA"):
            model = quantised(shape, whose == "peft", device)
            row = PAIRS[0]
        else:
            model = random_llama(shape).to(device)
        if whose == "trimtab":
            adapter = trimtab.attach(model, ours(row, TARGETS, rank), dtype=torch.bfloat16)
            groups, after = adapter.parameter_groups(lr=RATE), adapter.after_step
            super().__init__(chunked_loss(model, batch), groups, device=device, extra=adapter.extra_loss, after=after)
        else:
            import peft

            wrapped, ids = peft.get_peft_model(model, theirs(row, TARGETS, rank)), batch.input_ids
            own = own_loss(wrapped, input_ids=ids, labels=ids, use_cache=False)
            super().__init__(chunked_loss(model, batch) if chunked else own, trained(wrapped), device=device)
            # AdaLoRA in peft is driven by its user.
            if allocate := getattr(wrapped.base_model, "update_and_allocate", None):
                self.after = lambda step, _: allocate(step)
            model = wrapped
        model.train()


def quantised(shape: Shape, bitsandbytes: bool, device: str) -> Any:
    """The LLaMA with its blocks in NF4: ours, or transformers' with bitsandbytes' layers."""
    model = random_llama(shape).to(device)
    if not bitsandbytes:
        trimtab.quantize(model, "nf4", double=True)
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=bits, dtype=torch.bfloat16, device_map=None if device == "cpu" else device
        )


def costs_apart(name: str, sequences: int, options: argparse.Namespace) -> Costs:
    """The costs of a row, measured in a process of its own; or as `--costs` has them from before."""
    row = ["--row", name, "--sequences", str(sequences), "--device", options.device]
    return Costs(**apart(Path(__file__).resolve(), [*row, *(["--quick"] if options.quick else [])], options.costs))


def step_table(names: list[tuple[str, str | None]], shape: Shape, rank: int, options: argparse.Namespace) -> str:
    """A line for each row, with the ratio of its time and peak to those of the row it is compared with."""
    costs = {name: costs_apart(name, shape.sequences, options) for name, _ in names}
    if options.costs_alone:
        return "timed nothing"
    print(f"timing {options.rounds} rounds after a warm-up", file=sys.stderr)
    programs = {name: Row(name, shape, rank, options.device).step for name, _ in names}
    clock = time.process_time if options.cpu_time else time.perf_counter
    times: Timings = interleave(programs, rounds=options.rounds, clock=clock)
    lines = []
    for name, other in names:
        cost = costs[name]
        peak = "-" if other is None else f"{cost.peak_live / costs[other].peak_live:.2f}"
        lines.append(
            [
                name,
                f"{times.median(name):.3f}",
                "-" if other is None else times.shown(name, other),
                f"{cost.peak_live / 2**20:.0f}",
                peak,
                f"{cost.flops / 1e12:.3f}",
                f"{cost.trainable / 1e3:,.0f}",
            ]
        )
    header = ["row", "s/step", "time / peft", "peak live MiB", "peak / peft", "TFLOP/step", "trained, K"]
    return markdown_table(header, lines)


def rows_of_steps(methods: list[str]) -> list[tuple[str, str | None]]:
    """The rows of the step table, each with the row that it is compared with."""
    names: list[tuple[str, str | None]] = []
    for row in (pair for pair in PAIRS if pair in methods):
        names += [(f"peft {row}", None), (f"trimtab {row}", f"peft {row}")]
        if row in (PAIRS[0], PAIRS[3]):
            names.insert(-1, (f"peft {row}, our loss", f"peft {row}"))
    return [*names, *((f"trimtab {row}", None) for row in ALONE if row in methods)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("saved", "step", "qlora")
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables), metavar="TABLE")
    every = [*PAIRS, *ALONE]
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="ROW", help="; ".join(every))
    parser.add_argument("--quick", action="store_true", help="toy shapes in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread instead of wall time")
    parser.add_argument("--costs", type=Path, help="a JSON file that keeps peak bytes and FLOPs from run to run")
    parser.add_argument("--costs-alone", action="store_true", help="fill that file, and time nothing")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the steps")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape, rank = (QUICK, 32) if options.quick else (Shape(), 256)
    if options.row:
        shape = replace(shape, sequences=options.sequences or shape.sequences)
        print(json.dumps(asdict(Row(options.row, shape, rank, options.device).costs())))
        return
    if options.cpu_time:
        torch.set_num_threads(1)
    options.rounds = 1 if options.quick else options.rounds
    print(f"{shape}; {circumstances()}\n{kept_from(options.costs)}")
    if "saved" in options.tables:
        print(f"\n{saved_table(options.quick)}")
    if "step" in options.tables:
        print(f"\n{step_table(rows_of_steps(options.methods), shape, rank, options)}")
    if "qlora" in options.tables:
        rows: list[tuple[str, str | None]] = [("peft QLoRA r=8", None), ("peft QLoRA r=8, our loss", "peft QLoRA r=8")]
        rows.append(("trimtab QLoRA r=8", "peft QLoRA r=8"))
        for at in (shape, replace(shape, sequences=1)):
            print(f"\nQLoRA at {at.tokens} tokens:\n\n{step_table(rows, at, rank, options)}")


if __name__ == "__main__":
    main()
