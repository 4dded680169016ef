"""In somebody's own loop under DistributedDataParallel, replicas restart alike without a word between them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from models_for_tests import tiny_llama, token_ids
from processes_for_tests import spawn
from torch import Tensor

import trimtab

STEPS = 9


def run(rank: int, world: int, folder: str, settings: dict[str, object]) -> None:
    """Train on this rank's rows of each step's batch; store the losses and all tensors."""
    torch.set_num_threads(1)
    # A store of an earlier group would answer with that group's addresses: each needs a file of its own.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)  # replicas may differ in their global generators; nothing here may depend on them
    model = tiny_llama().to(torch.bfloat16 if settings["bf16"] else torch.float32)
    adapter = trimtab.attach(model, trimtab.ReLoRA(rank=3, restart_every=4, seed=5))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    torch.manual_seed(100 + rank)
    losses = []
    for step in range(1, STEPS + 1):
        rows = token_ids(seed=step, rows=4)[rank::world]
        loss = wrapped(input_ids=rows, labels=rows).loss  # as many scored tokens in each row, so means add up
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean / world)
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
    state: dict[str, Tensor] = dict(model.state_dict()) | adapter.state_dict().tensors
    torch.save({"losses": torch.stack(losses), **state}, f"{folder}/{rank}.pt")
    dist.barrier()  # no rank may go while another still speaks to it
    dist.destroy_process_group()


def results(world: int, folder: Path, **settings: object) -> list[dict[str, Tensor]]:
    folder.mkdir()
    spawn(run, (world, str(folder), settings), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def test_replicas_stay_equal_and_losses_are_those_of_one_process(tmp_path: Path) -> None:
    """After two restarts in bf16 every tensor and carry is byte-equal on both ranks; in fp32 losses are as in one."""
    first, second = results(2, tmp_path / "bf16", bf16=True)
    assert first.keys() == second.keys()
    assert any(name.startswith("carry:") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    two, one = results(2, tmp_path / "two", bf16=False)[0], results(1, tmp_path / "one", bf16=False)[0]
    assert torch.allclose(two["losses"], one["losses"], rtol=1e-4)
    assert one["losses"][-1] != one["losses"][0]
