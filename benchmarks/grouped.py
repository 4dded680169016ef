"""Would layers that read one input be faster as one product? LoRA's q/k/v and gate/up, forward and backward.

    python benchmarks/grouped.py            # about two minutes on one thread
    python benchmarks/grouped.py --quick    # toy shapes, to see that it runs

Four programs compute the same outputs and gradients from 2,048 tokens in bf16, at r = 8:

* separate: Trimtab's layers, one after the other (`nn.lowrank`).
* one function: one autograd function for the group, whose backward sums the layers' shares of dx in place.
* stacked A: that, with the layers' A in one matrix: one product x A' and one h' x instead of one for each layer.
* stacked A and W: the frozen weights in one matrix as well, laid out so beforehand, so that the copy is not timed.
  The gradients of the outputs have to be brought side by side for its one product g W.

Seconds are CPU seconds of one thread, so that other programs on the machine disturb little; the programs take turns in
one process, and the ratio is the median of the ratios within a round, with the least and the largest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.bench.runner import circumstances, interleave, markdown_table
from trimtab.nn.lowrank import lora_linear
from trimtab.nn.weights import Dense

RANK, SCALE = 8, 1.0
PROGRAMS = ("separate", "one function", "stacked A", "stacked A and W")

#: Layers that read one input: their input width and their output widths.
GROUPS = {
    "q/k/v, d = 768": (768, (768, 768, 768)),
    "gate/up, d = 768": (768, (2048, 2048)),
    "q/k/v, d = 1024": (1024, (1024, 1024, 1024)),
    "gate/up, d = 1024": (1024, (2736, 2736)),
}
QUICK = {"q/k/v, d = 64": (64, (64, 32, 32))}


class Grouped(torch.autograd.Function):
    """All layers of a group at once; saves x alone, as the separate layers do.

    Args:
        x_TI: the input.
        a: A of each layer, or one matrix with all of them.
        weights: W of each layer, or one matrix with all of them.
        bs: B of each layer.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, parts: int, weights: tuple[Tensor, ...], *rest: Tensor) -> Any:
        a, bs = rest[:parts], rest[parts:]
        ctx.weights, ctx.parts = weights, parts
        ctx.save_for_backward(x_TI, *rest)
        us = _each([x_TI @ part.to(x_TI.dtype).t() for part in a], [RANK] * len(bs))
        ys = _each([x_TI @ w.t() for w in weights], [len(b) for b in bs])
        return tuple(y.addmm_(u, (b * SCALE).to(y.dtype).t()) for y, u, b in zip(ys, us, bs, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TI, *rest = ctx.saved_tensors
        a, bs = [part.to(x_TI.dtype) for part in rest[: ctx.parts]], rest[ctx.parts :]
        us = _each([x_TI @ part.t() for part in a], [RANK] * len(bs))
        db = [(g.t() @ u).to(b.dtype).mul_(SCALE) for g, u, b in zip(grads, us, bs, strict=True)]
        hs = [g @ (b * SCALE).to(g.dtype) for g, b in zip(grads, bs, strict=True)]
        hs = hs if len(a) == len(bs) else [torch.cat(hs, dim=1)]
        gs = grads if len(ctx.weights) == len(bs) else (torch.cat(grads, dim=1),)
        dx = gs[0] @ ctx.weights[0]
        for g, w in [*zip(gs[1:], ctx.weights[1:], strict=True), *zip(hs, a, strict=True)]:
            dx.addmm_(g, w)
        da = [(h.t() @ x_TI).to(part.dtype) for h, part in zip(hs, rest[: ctx.parts], strict=True)]
        return dx, None, None, *da, *db


def _each(products: list[Tensor], widths: list[int]) -> list[Tensor]:
    """A product for each layer, whether they were formed one by one or as one."""
    return products if len(products) == len(widths) else list(products[0].split(widths, dim=1))


class Group:
    """A group of layers, and the three ways to run it."""

    def __init__(self, width: int, outs: tuple[int, ...], tokens: int) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        self.weights = [torch.randn(out, width, dtype=torch.bfloat16) / width**0.5 for out in outs]
        self.a = [(torch.randn(RANK, width) / width**0.5).requires_grad_() for _ in outs]
        self.b = [torch.randn(out, RANK).requires_grad_() for out in outs]
        self.stacked_a = torch.cat(self.a).detach().requires_grad_()
        self.stacked_w = torch.cat(self.weights)
        self.grads = [torch.randn(tokens, out, dtype=torch.bfloat16) for out in outs]

    def outputs(self, program: str) -> tuple[Tensor, ...]:
        """What the layers answer."""
        if program == "separate":
            layers = zip(self.weights, self.a, self.b, strict=True)
            return tuple(lora_linear(self.x, w, None, a, b, base=Dense(), scale=SCALE) for w, a, b in layers)
        weights = (self.stacked_w,) if program == "stacked A and W" else tuple(self.weights)
        a = self.factors(program)
        outputs: tuple[Tensor, ...] = Grouped.apply(self.x, len(a), weights, *a, *self.b)
        return outputs

    def factors(self, program: str) -> list[Tensor]:
        """A of each layer, or the one with all of them."""
        return [self.stacked_a] if program.startswith("stacked") else self.a

    def gradients(self, program: str) -> tuple[Tensor, ...]:
        """Of x, of all A in one matrix, and of each B."""
        own = self.factors(program)
        dx, *rest = torch.autograd.grad(self.outputs(program), [self.x, *own, *self.b], self.grads)
        return dx, torch.cat(rest[: len(own)]), *rest[len(own) :]


def table(groups: dict[str, tuple[int, tuple[int, ...]]], tokens: int, rounds: int) -> str:
    lines = []
    for name, (width, outs) in groups.items():
        group = Group(width, outs, tokens)
        runs: dict[str, Callable[[], object]] = {program: partial(group.gradients, program) for program in PROGRAMS}
        times = interleave(runs, rounds=rounds, warmup=2, clock=time.process_time)
        ratios = [times.shown(program, PROGRAMS[0]) for program in PROGRAMS[1:]]
        lines.append([name, f"{times.median(PROGRAMS[0]) * 1e3:.0f}", *ratios])
    return markdown_table(["group", "separate, ms", *(f"{program} / separate" for program in PROGRAMS[1:])], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy shapes in one round")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    groups, tokens, rounds = (QUICK, 32, 1) if options.quick else (GROUPS, 2048, options.rounds)
    print(f"{tokens} tokens, r = {RANK}, bf16; {circumstances()}\n")
    print(table(groups, tokens, rounds))


if __name__ == "__main__":
    main()
