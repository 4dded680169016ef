"""Two processes of a Trainer under DDP restart alike, and train as one process with both their batches."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
from models_for_tests import tiny_llama
from processes_for_tests import spawn
from trainer_parts import Tokens, arguments, relora
from transformers import Trainer

import trimtab
from trimtab.interop.transformers import TrimtabCallback


class Tilted(trimtab.ReLoRA):
    """With an extra term, whose gradient must count once, whatever the number of processes and micro-batches."""

    abstract = True

    def _attach(self, model: Any, residence: Any) -> trimtab.Adapter:
        adapter = super()._attach(model, residence)
        adapter.extra_loss = lambda: sum(  # type: ignore[method-assign]
            (layer.lora_A @ layer.lora_A.t()).pow(2).sum() for layer in adapter.layers.values()
        )
        return adapter


def run(rank: int, world: int, folder: str, tilted: bool, port: int) -> None:
    """Train, and store all parameters; the sum of the micro-batches of a step is the same for 1 and 2 processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kind = Tilted if tilted else trimtab.ReLoRA
    config = kind(**relora().model_dump(exclude={"name"}))
    callback = TrimtabCallback(config, rewarm_steps=2, merge_at_end=False)
    args = arguments(
        Path(folder),
        gradient_accumulation_steps=4 // world,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        ddp_backend="gloo",
        optim="sgd" if tilted else "adamw_torch",
        lr_scheduler_type="constant",
    )
    if tilted:
        callback = TrimtabCallback(kind(rank=3, alpha=12, restart_every=4, reset="none"), merge_at_end=False)
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=Tokens(96), callbacks=[callback])
    trainer.train()
    assert [event["step"] for event in callback.events] == [4, 8]
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank holds the store that the others still talk to
        torch.distributed.destroy_process_group()


def results(world: int, folder: Path, tilted: bool) -> list[dict[str, torch.Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(run, (world, str(folder), tilted, port), world)
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_processes_restart_alike(tmp_path: Path) -> None:
    """After two restarts every parameter is byte-equal on both ranks, and as in one process; so with an extra term."""
    for tilted in (False, True):
        folder = tmp_path / str(tilted)
        folder.mkdir()
        first, second = results(2, folder, tilted)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        (one,) = results(1, folder, tilted)
        if tilted:  # plain gradient descent, which does not blow up what was rounded in a tiny gradient
            assert all((first[name] - p).norm() <= 1e-4 * p.norm() for name, p in one.items())
