"""Cross entropy of a language model's head: time and peak live bytes of forward and backward.

    python benchmarks/loss.py            # 4096 tokens x 32,000 words x 768, bf16
    python benchmarks/loss.py --quick

Rows: `F.cross_entropy` on all logits in fp32, torch's own chunked function where this torch has one, and
`linear_cross_entropy` with the head's weight in bf16, in fp32 (as it is held when it trains), and frozen.
The error is that of the value against fp64. Peak live bytes are above the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bench.meters import live_bytes
from trimtab.bench.runner import circumstances, interleave, markdown_table
from trimtab.nn.loss import linear_cross_entropy


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="256 x 2000 x 64 in one round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.words, options.width, options.chunk, options.rounds = 256, 2000, 64, 64, 1

    torch.manual_seed(0)
    device = torch.device(options.device)
    hidden = torch.randn(options.tokens, options.width).bfloat16().to(device).requires_grad_()
    weight = (torch.randn(options.words, options.width) * 0.02).bfloat16().to(device).requires_grad_()
    held = weight.detach().float().requires_grad_()
    frozen = weight.detach()
    labels = torch.randint(0, options.words, (options.tokens,)).to(device)
    with torch.no_grad():
        exact = 0.0
        for i in range(0, options.tokens, 512):
            logits = hidden[i : i + 512].double() @ weight.double().t()
            exact += F.cross_entropy(logits, labels[i : i + 512], reduction="sum").item() / options.tokens
    del logits

    losses: dict[str, Callable[[], Tensor]] = {
        "F.cross_entropy(logits.float())": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels)
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, labels)
    for name, head in (("bf16 head", weight), ("fp32 head", held), ("frozen bf16 head", frozen)):
        losses[f"trimtab, {name}"] = lambda head=head: linear_cross_entropy(hidden, head, labels, chunk=options.chunk)

    values: dict[str, float] = {}

    def clear() -> None:
        hidden.grad = weight.grad = held.grad = None

    def program(name: str) -> Callable[[], None]:
        def run() -> None:
            clear()
            loss = losses[name]()
            loss.backward()
            values[name] = loss.item()

        return run

    programs = {name: program(name) for name in losses}
    peaks = {}
    for name, run in programs.items():
        clear()
        peaks[name] = live_bytes(run, existing=[hidden, weight, held, labels]).above
    clear()
    timings = interleave(programs, rounds=options.rounds)
    plain = next(iter(programs))
    table = [
        [
            name,
            f"{timings.median(name) * 1e3:.0f}",
            timings.shown(name, plain),
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks[plain]:.3f}",
            f"{abs(values[name] / exact - 1.0):.1e}",
        ]
        for name in programs
    ]
    size = f"{options.tokens} tokens x {options.words} words x {options.width}, bf16, chunks of {options.chunk}"
    print(f"{size}; {circumstances()}\n")
    print(markdown_table(["loss", "ms", "time ratio", "peak live MiB", "peak ratio", "relative error"], table))


if __name__ == "__main__":
    main()
