"""Run folders as `trimtab pretrain` leaves them, made up without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trimtab.config import PretrainConfig
from trimtab.report.spectrum import MatrixSpectrum, Spectrum

LAYER = {"q_proj": 768, "k_proj": 768, "v_proj": 768, "o_proj": 768, "gate_proj": 2048, "up_proj": 2048}


def config(steps: int = 2000, **method: Any) -> dict[str, Any]:
    """A ReLoRA run with a warm start of a fifth and four restarts or so."""
    return {
        "name": "fake",
        "seed": 7,
        "model": {"name": "llama-130m"},
        "data": {"sources": ["text/"], "tokenizer": {"bpe_vocab_size": 8192}},
        "method": {
            "name": "relora",
            "rank": 128,
            "restart_every": max(1, steps // 6),
            "warm_start_steps": steps // 5,
            **method,
        },
        "optim": {"lr": 1e-3, "warm_start_lr": 5e-4},
        "schedule": {"warmup_steps": steps // 40, "rewarm_steps": steps // 60, "floor": 0.1},
        "train": {"steps": steps, "batch_tokens": 2048},
    }


def metrics(tree: dict[str, Any], every: int = 10, upto: int | None = None) -> list[dict[str, Any]]:
    """The events of a run of this config, up to a step."""
    parsed = PretrainConfig.model_validate(tree)
    plan, total = parsed.multiplier(), parsed.train.steps
    noise = np.random.default_rng(0)
    began = 1_760_000_000.0
    events: list[dict[str, Any]] = [
        {"event": "run", "step": 0, "time": began, "version": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 2}
    ]

    def loss_at(step: int) -> float:
        bump = sum(0.25 * math.exp(-(step - n) / (total / 150)) for n in plan.restarts if step > n)
        return 3.3 + 5.2 * math.exp(-step / (total / 25)) + 1.3 * math.exp(-step / (total / 2.5)) + bump

    for step in range(1, (total if upto is None else upto) + 1):
        time = began + step * 0.25
        if step % every == 0 or step == 1:
            rate = parsed.optim.warm_start_lr if step <= plan.warm_start_steps else parsed.optim.lr
            events.append(
                {
                    "event": "step",
                    "step": step,
                    "time": time,
                    "loss": loss_at(step) + noise.normal() * 0.06,
                    "lr": (rate or 0.0) * plan(step - 1),
                    "grad_norm": float(0.5 * math.exp(noise.normal() * 0.3)),
                    "tokens": step * 2048,
                    "tokens_per_second": 8100 + 300 * noise.normal() + (1500 if step > plan.warm_start_steps else 0),
                    "epoch": step / total * 1.4,
                }
            )
        if step % max(1, total // 20) == 0:
            value = loss_at(step) + 0.05
            events.append(
                {
                    "event": "eval",
                    "step": step,
                    "time": time,
                    "loss": value,
                    "perplexity": math.exp(value),
                    "bits_per_byte": value / math.log(2) / 4.1,
                    "tokens": 100_000,
                }
            )
        if step == plan.warm_start_steps:
            events.append({"event": "switch", "step": step, "time": time})
        if step in plan.restarts:
            number = plan.restarts.index(step) + 1
            events.append(
                {"event": "restart", "step": step, "time": time, "restart": number, "reset_elements": 44_826_624}
            )
    if upto is None:
        value = loss_at(total) + 0.05
        events.append(
            {
                "event": "eval",
                "step": total,
                "time": began + total * 0.25 + 4,
                "loss": value,
                "perplexity": math.exp(value),
                "bits_per_byte": value / math.log(2) / 4.1,
                "tokens": 200_000,
                "final": True,
                "merged": True,
            }
        )
    return events


def spectrum(layers: int = 12, rank: int = 128, restarts: int = 4, width: int = 768) -> Spectrum:
    """Falling singular values with an edge at r and the end at (k + 1) r."""
    found = []
    for layer in range(layers):
        for index, (kind, out) in enumerate(LAYER.items()):
            at = np.arange(width)
            values = np.exp(-at / (90 + 12 * index + 5 * layer)) * (1.4 + index / 4)
            values = np.where(at < (restarts + 1) * rank, values, 1e-7 * values)
            found.append(
                MatrixSpectrum(
                    name=f"model.layers.{layer}.{'mlp' if out > 1000 else 'self_attn'}.{kind}",
                    type=kind,
                    shape=(out, width),
                    singular_values=tuple(values.tolist()),
                    rank=int((values > 1e-2 * values[0]).sum()),
                    frobenius=float(np.linalg.norm(values)),
                    start_frobenius=60.0,
                )
            )
    return Spectrum(tuple(found), rank=rank, restarts=restarts)


PARAMETERS: dict[str, Any] = {
    "measured": {"peak_resident": 3_221_225_472},
    "phases": [
        {
            "phase": "warm start",
            "from_step": 0,
            "total": 134_105_856,
            "trainable": 134_105_856,
            "groups": {"adapter": 0, "embedding": 24_576_000, "norm": 19_200, "head": 24_576_000, "base": 84_934_656},
            "memory": {"weights": 536_423_424, "carry_host": 0, "gradients": 536_423_424, "optimizer": 1_072_846_848},
        },
        {
            "phase": "adapter",
            "from_step": 400,
            "total": 156_519_168,
            "trainable": 71_584_512,
            "groups": {"adapter": 22_413_312, "embedding": 24_576_000, "norm": 19_200, "head": 24_576_000, "base": 0},
            "memory": {
                "weights": 456_207_360,
                "carry_host": 169_869_312,
                "gradients": 286_338_048,
                "optimizer": 572_676_096,
            },
        },
    ],
}


def write_lines(path: Path, events: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def make_run(folder: Path, steps: int = 2000, every: int = 10, layers: int = 12, **method: Any) -> Path:
    """A finished run."""
    folder.mkdir(parents=True)
    tree = config(steps, **method)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_lines(folder / "metrics.jsonl", metrics(tree, every))
    (folder / "parameters.json").write_text(json.dumps(PARAMETERS))
    spectrum(layers).save(folder / "spectrum.json")
    return folder
