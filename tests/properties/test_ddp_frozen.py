"""Methods with parameters beside the base, under DistributedDataParallel, which sees them on the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models_for_tests import tiny_llama, token_ids
from processes_for_tests import spawn

import trimtab

CONFIGS = {
    "bottleneck": trimtab.Bottleneck(size=4),
    "prompt": trimtab.PromptTuning(length=4),
    "read": trimtab.READ(size=4, cell="lstm"),
    "prefix": trimtab.PrefixTuning(length=4, projection=True),
    "ladder": trimtab.Ladder(reduction=4),
}


def run(rank: int, world: int, folder: str) -> None:
    """Three steps of each method on this rank's rows; store losses and parameters."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    stored = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(rank)
        model = tiny_llama()
        adapter = trimtab.attach(model, config)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
        for step in range(1, 4):
            rows = token_ids(seed=step, rows=4)[rank::world]
            wrapped(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            adapter.after_step(step, optimizer)
            optimizer.zero_grad()
        stored |= {f"{name}:{key}": value for key, value in adapter.state_dict().tensors.items()}
    torch.save(stored, f"{folder}/{world}-{rank}.pt")
    dist.barrier()  # no rank may go while another still speaks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """Of the two ranks, and of one process alone."""
    folder = tmp_path_factory.mktemp("ddp")
    for world in (2, 1):
        spawn(run, (world, str(folder)), world)
    return [torch.load(Path(folder) / f"{name}.pt", weights_only=True) for name in ("2-0", "2-1", "1-0")]


@pytest.mark.parametrize("config", CONFIGS)
def test_replicas_agree_with_each_other_and_with_one_process(
    config: str, results: list[dict[str, torch.Tensor]]
) -> None:
    """Parameters are byte-equal on both ranks, and those of one process up to rounding."""
    first, second, alone = ({k: v for k, v in r.items() if k.startswith(config)} for r in results)
    assert first and first.keys() == second.keys() == alone.keys()
    fresh = trimtab.attach(tiny_llama(), CONFIGS[config]).state_dict().tensors
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.allclose(value, alone[name], atol=2e-3), name
        assert not torch.equal(value, fresh[name.partition(":")[2]]), name
