"""Networks beside a frozen backbone that FSDP2 (`fully_shard`) splits over two processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models_for_tests import tiny_bert, tiny_llama, tiny_t5, token_ids
from processes_for_tests import spawn
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from trimtab.bench.meters import saved_bytes
from trimtab.methods.base import AdapterState

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def in_four_bits() -> nn.Module:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    trimtab.quantize(model)
    return model


#: A model, a method, and what fully_shard is told: for the blocks, for the model, for other modules that are one unit.
CASES: dict[str, tuple[Callable[[], nn.Module], trimtab.Method, dict[str, Any]]] = {
    "llama": (tiny_llama, trimtab.READ(size=5, cell="gru", train_also=("final_norm",)), {}),
    "let go": (tiny_llama, trimtab.READ(size=4, cell="lstm"), {"model": {"reshard_after_forward": True}}),
    "behind": (tiny_llama, trimtab.READ(size=4, train_also=("head",)), {"unit": ("model.norm", "lm_head")}),
    "hybrid": (tiny_llama, trimtab.READ(size=4), {"mesh": (2, 1)}),
    "t5": (tiny_t5, trimtab.READ(size=4), {}),
    "bert": (tiny_bert, trimtab.READ(size=4, aggregate="mean"), {"blocks": {"reshard_after_forward": False}}),
    "nf4": (in_four_bits, trimtab.READ(size=4), {}),
    "ladder": (tiny_t5, trimtab.Ladder(reduction=4), {}),
    "mixed": (tiny_t5, trimtab.READ(size=4), {"blocks": {"mp_policy": BF16}}),
}
#: In "mixed" the blocks of two processes compute in bf16, and those of one in fp32.
ALIKE = [case for case in CASES if case != "mixed"]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Of the backbone, as transformers marks them."""
    return [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]


def split(model: nn.Module, blocks: list[nn.Module], options: dict[str, Any]) -> None:
    sizes = options.get("mesh", (2,))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "parts")[-len(sizes) :])
    for block in blocks:
        fully_shard(block, mesh=mesh, **options.get("blocks", {}))
    if unit := [model.get_submodule(name) for name in options.get("unit", ())]:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, **options.get("model", {}))


def batch_of(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if "Bert" in type(model).__name__ else ids}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch_of(model, ids)).logits
    return out


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Calls(TorchDispatchMode):
    """Counts what is sent between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in str(function):
            self.counts["gathers"] += 1
        return function(*args, **(kwargs or {}))


def train(case: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Three steps on this rank's rows, from a model that is split where there are two; what can be seen of it."""
    make, config, options = CASES[case]
    model, rows = make(), token_ids(rows=4)[rank::world].contiguous()
    blocks, plain = blocks_of(model), logits(model, rows)
    adapter = trimtab.attach(model, config)
    if world > 1:
        split(model, blocks, options)
    seen: dict[str, Any] = {"starts": bool(torch.equal(logits(model, rows), plain))}
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    start = {name: whole(tensor) for name, tensor in adapter.state_dict().tensors.items()}
    seen["losses"], seen["norms"] = [], []
    for step in range(1, 4):
        batch = batch_of(model, token_ids(seed=step, rows=4)[rank::world].contiguous())
        loss = model(**batch).loss
        if step == 2:
            adapter.check_save()
            adapter.state_dict()  # lets the units go, which the backward pass must not notice
        with Calls() as calls:
            loss.backward()
        seen["gathers"] = calls.counts["gathers"]
        seen["norms"].append(float(whole(torch.nn.utils.clip_grad_norm_(trained, 0.1))))
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        seen["losses"].append(float(mean))
    seen["saved"] = saved_bytes(lambda: model(**batch_of(model, token_ids(rows=2))).loss)
    logits(model, rows)
    adapter.save(folder / f"{case}-{world}")
    assert (folder / f"{case}-{world}" / "adapter_config.json").is_file()  # on every rank, when the call returns
    seen["local"] = sum(getattr(p, "to_local", lambda p=p: p)().numel() for b in blocks for p in b.parameters())
    state = adapter.state_dict()
    seen["tensors"] = {name: whole(tensor) for name, tensor in state.tensors.items()}
    adapter.load_state_dict(AdapterState(start, state.meta))
    back = {name: whole(tensor) for name, tensor in adapter.state_dict().tensors.items()}
    seen["back"] = all(torch.equal(back[name], start[name]) for name in start)
    return seen


def generates() -> bool:
    """Whether a model that is split, told of `generate` as FSDP2 asks for, gives the texts that it gave before."""
    model, ids = tiny_t5(), token_ids(rows=2, length=6)
    blocks = blocks_of(model)
    trimtab.attach(model, trimtab.READ(size=4, init="drawn"))
    ask: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "num_beams": 2}
    before = model.eval().generate(ids, **ask)
    split(model, blocks, {})
    register_fsdp_forward_method(model, "generate")
    return bool(torch.equal(model.generate(ids, **ask), before))


def run(rank: int, world: int, folder: str) -> None:
    """All cases, and a save that fails; stored for each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    seen: dict[str, Any] = {case: train(case, rank, world, Path(folder)) for case in CASES}
    seen["generates"] = generates()
    (Path(folder) / "a file").touch()
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.READ(size=4))
    fully_shard(model)
    try:
        adapter.save(Path(folder) / "a file" / "adapter")
    except trimtab.CheckpointError as error:
        seen["failed save"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.barrier()  # no rank may go while another still speaks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the two processes saw."""
    spawn(run, (2, str(folder)), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process sees, with the rows of both."""
    return {case: train(case, 0, 1, folder) for case in CASES}


@pytest.mark.parametrize("case", ALIKE)
def test_two_processes_train_what_one_does(case: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    """Losses, norms of gradients and all that trains; not to the bit, since each sum over tokens is made of two."""
    first, second, wanted = ranks[0][case], ranks[1][case], alone[case]
    for key in ("losses", "norms"):
        assert first[key] == second[key]
        assert first[key] == pytest.approx(wanted[key], rel=1e-5)
    assert first["tensors"].keys() == wanted["tensors"].keys()
    for name, value in first["tensors"].items():
        assert torch.equal(value, second["tensors"][name])
        assert torch.allclose(value, wanted["tensors"][name], atol=1e-5), name
    assert first["back"] and second["back"] and wanted["back"]


def test_blocks_may_compute_in_another_dtype(ranks: list[Any], alone: dict[str, Any]) -> None:
    """What FSDP2 casts for a block, the encoder's states among it, is known again; what trains is not cast."""
    first, wanted = ranks[0]["mixed"], alone["mixed"]
    assert not first["starts"]
    for key in ("losses", "norms"):
        assert first[key] == ranks[1]["mixed"][key] == pytest.approx(wanted[key], rel=1e-2)
    for name, value in first["tensors"].items():
        assert value.dtype == torch.float32
        assert (value - wanted["tensors"][name]).abs().mean() < 5e-3, name


@pytest.mark.parametrize("case", ALIKE)
def test_it_starts_exactly_as_the_backbone(case: str, ranks: list[Any]) -> None:
    """Each rank's own rows, against the model before it was split."""
    assert all(rank[case]["starts"] for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half_of_the_blocks(case: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    """Or all, where a hybrid mesh has replicas of one rank each."""
    share = 1 if case == "hybrid" else 2
    assert [rank[case]["local"] * share for rank in ranks] == [alone[case]["local"]] * 2


@pytest.mark.parametrize("case", CASES)
def test_the_backward_pass_needs_nothing_of_the_blocks(case: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    """Autograd keeps what it keeps in one process, and no block is gathered again: at most what lies behind them."""
    again = {"let go": 1, "behind": 1}.get(case, 0)
    for rank in ranks:
        assert rank[case]["gathers"] == again
        if case in ALIKE:
            assert rank[case]["saved"] == alone[case]["saved"]


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_saved_is_the_adapter_of_one_process(
    case: str, ranks: list[Any], alone: dict[str, Any], folder: Path
) -> None:
    """The same files up to rounding, which load into a model that is whole."""
    ours, theirs = folder / f"{case}-2", folder / f"{case}-1"
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (ours, theirs)]
    assert configs[0] == configs[1]
    tensors = [load_file(path / "adapter_model.safetensors") for path in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.allclose(tensors[0][name], value, atol=1e-5) for name, value in tensors[1].items())
    model = CASES[case][0]()
    adapter = trimtab.load_adapter(model, ours)
    for name, value in adapter.state_dict().tensors.items():
        assert torch.equal(value, ranks[0][case]["tensors"][name])


def test_a_split_model_generates_the_same_texts(ranks: list[Any]) -> None:
    assert all(rank["generates"] for rank in ranks)


def test_a_save_that_fails_fails_on_every_rank(ranks: list[Any]) -> None:
    """The first rank writes; the others hear of it, instead of waiting for ever or going on."""
    assert "cannot be written" in ranks[0]["failed save"]
    assert "the first process could not write" in ranks[1]["failed save"]
