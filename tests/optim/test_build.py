"""Optimizers by name: they run here, keep the groups' keys, or say in one line why not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from trimtab.config import OptimConfig
from trimtab.errors import ConfigError
from trimtab.optim import build
from trimtab.optim.build import build_optimizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("kernels") is not None,
    reason="bitsandbytes is absent, or refused beside kernels",
)


def groups_of(*parameters: nn.Parameter) -> list[dict[str, object]]:
    """An empty group, and one with the parameters."""
    names = [f"p{i}" for i in range(len(parameters))]
    return [
        {"params": [], "names": [], "group": "adapter", "lr": 0.1, "weight_decay": 0.0},
        {"params": list(parameters), "names": names, "group": "base", "lr": 0.2, "weight_decay": 0.3},
    ]


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw8bit", marks=needs_bitsandbytes)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_trains_and_keeps_what_groups_carry(name: str, dtype: torch.dtype) -> None:
    """Every named optimizer takes real steps on this device, and the groups' own keys survive."""
    large, small = nn.Parameter(torch.ones(80, 64, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.5, beta2=0.99), groups_of(large, small), "cpu")
    for _ in range(3):
        optimizer.zero_grad()
        (large.float().square().sum() + small.float().square().sum()).backward()
        optimizer.step()
    assert [group["group"] for group in optimizer.param_groups] == ["adapter", "base"]
    assert [group["names"] for group in optimizer.param_groups] == [[], ["p0", "p1"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    assert tuple(optimizer.param_groups[1]["betas"]) == (0.9, 0.99)
    assert large.detach().float().max() < 0.7
    assert small.detach().float().max() < 0.7


@needs_bitsandbytes
@pytest.mark.parametrize(("name", "instead"), [("paged_adamw8bit", "adamw8bit"), ("paged_adamw32bit", "adamw")])
def test_paging_that_is_only_pretended_is_an_error(name: str, instead: str) -> None:
    """bitsandbytes' paged optimizers run on a CPU with a warning and page nothing; that is refused, in one line."""
    with pytest.raises(ConfigError, match=rf"{name} only pretends to page on cpu.*use optim.name={instead}$") as info:
        build_optimizer(OptimConfig(name=name), groups_of(nn.Parameter(torch.ones(3))), "cpu")
    assert "\n" not in str(info.value)


@needs_bitsandbytes
@pytest.mark.parametrize(("name", "dtype"), [("paged_adamw8bit", torch.uint8), ("paged_adamw32bit", torch.float32)])
def test_paged_adamw_is_what_its_name_says(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device pages, the optimizer is built, pages, and holds moments of the named width."""
    import bitsandbytes

    def paged(self: object, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = p.numel() >= 1e5  # type: ignore[attr-defined]
        return buffer

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda tensor: None)
    parameter = nn.Parameter(torch.ones(80, 64))
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.5), [{"params": [parameter]}], "cpu")
    assert optimizer.is_paged  # type: ignore[attr-defined]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype == dtype


@needs_bitsandbytes
def test_8bit_adamw_holds_large_moments_in_8_bits_and_follows_adamw() -> None:
    """The moments of a large tensor are one byte an element, and the path stays near fp32 AdamW's."""
    torch.manual_seed(0)
    start = torch.randn(64, 128)
    moved = {}
    for name in ("adamw", "adamw8bit"):
        parameter = nn.Parameter(start.clone())
        optimizer = build_optimizer(OptimConfig(name=name, lr=1e-2), [{"params": [parameter]}], "cpu")
        for _ in range(10):
            optimizer.zero_grad()
            (parameter - 1.0).square().sum().backward()
            optimizer.step()
        moved[name] = parameter.detach() - start
        if name == "adamw8bit":
            assert optimizer.state[parameter]["state1"].dtype == torch.uint8
            assert optimizer.state[parameter]["state2"].dtype == torch.uint8
    distance = (moved["adamw"] - moved["adamw8bit"]).norm() / moved["adamw"].norm()
    assert distance < 0.05


def test_adamw_is_fused_on_cpu() -> None:
    """Where torch has a fused AdamW it is used."""
    optimizer = build_optimizer(OptimConfig(), groups_of(nn.Parameter(torch.ones(3))), torch.device("cpu"))
    assert optimizer.param_groups[0]["fused"] is True


def test_adamw_runs_unfused_where_no_fused_kernel_exists() -> None:
    """A dtype without a fused kernel gets the same optimizer in its general form."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = build_optimizer(OptimConfig(lr=0.5), [{"params": [parameter]}], "cpu")
    assert not optimizer.param_groups[0]["fused"]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.detach().real.max() < 0.6


def test_kernels_package_is_refused_and_never_called(tmp_path: Path) -> None:
    """With `kernels` importable, 8-bit AdamW is a ConfigError, and bitsandbytes is not even imported."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('fetched')\n")
    code = """
        import sys
        import torch
        from trimtab.config import OptimConfig
        from trimtab.errors import ConfigError
        from trimtab.optim.build import build_optimizer
        sys.path.insert(0, sys.argv[1])
        try:
            build_optimizer(OptimConfig(name="adamw8bit"), [{"params": [torch.nn.Parameter(torch.ones(3))]}], "cpu")
        except ConfigError as error:
            assert "bitsandbytes" not in sys.modules and "kernels" not in sys.modules
            print(error)
    """
    source = str(Path(build.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{textwrap.dedent(code)}", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "optim.name = adamw8bit" in done.stdout
    assert "`kernels`" in done.stdout
    assert done.stdout.count("\n") == 1


def test_missing_bitsandbytes_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes the error names the setting and how to install it."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    if importlib.util.find_spec("kernels") is not None:
        pytest.skip("refused before the import is tried")
    with pytest.raises(ConfigError, match=r"optim.name = adamw8bit needs .*trimtab\[bnb\]"):
        build_optimizer(OptimConfig(name="adamw8bit"), groups_of(nn.Parameter(torch.ones(3))), "cpu")


class _Refuses(torch.optim.SGD):
    """An optimizer whose kernel does not exist on this device."""

    def __init__(self, groups: object, lr: float, **options: object) -> None:
        super().__init__(groups, lr=lr)  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        raise NotImplementedError("Could not run 'update' with arguments from the 'CPU' backend\nlong list")


class _DoesNothing(_Refuses):
    """An optimizer that silently leaves its parameters where they are."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(("broken", "says"), [(_Refuses, "cannot run on cpu"), (_DoesNothing, "wrong first step")])
def test_optimizer_that_does_not_really_run_is_an_error(
    broken: type, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer is tried before it is handed out; one that fails, or does nothing, is refused."""
    monkeypatch.setattr(build, "_bitsandbytes", lambda name: broken)
    with pytest.raises(ConfigError, match=rf"optim.name = adamw8bit .*{says}|optim.name = adamw8bit {says}") as info:
        build_optimizer(OptimConfig(name="adamw8bit"), groups_of(nn.Parameter(torch.ones(3))), "cpu")
    assert "\n" not in str(info.value)
