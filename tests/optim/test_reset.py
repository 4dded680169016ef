"""A reset forgets what it should, counts it, and touches no other parameter's state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.errors import ConfigError, TrimtabError
from trimtab.optim.reset import _magnitude, reset_state

BETAS = (0.9, 0.95)
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, betas=BETAS)
    return optimizer


OPTIMIZERS: dict[str, Make] = {
    "plain": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=BETAS, foreach=False),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=BETAS, foreach=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=BETAS, fused=True),
    "8bit": adamw8bit,
}


def stepped(make: Make, steps: int = 5) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter], nn.Parameter]:
    """An optimizer after some steps on two parameters to reset (one below 8-bit's size) and one to keep."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (40, 130), "B": (10, 7), "kept": (48, 128)}
    parameters = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    optimizer = make(list(parameters.values()))
    step(optimizer, parameters, steps, generator)
    kept = parameters.pop("kept")
    return optimizer, parameters, kept


def step(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: int, generator: torch.Generator
) -> None:
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def moments(state: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two moments' values, decoded where they are 8-bit codes."""
    first, second = ("exp_avg", "exp_avg_sq") if "exp_avg" in state else ("state1", "state2")
    values = []
    for key in (first, second):
        value = state[key]
        if value.dtype == torch.uint8:
            sign = state[f"qmap{key[-1]}"][value.flatten().int()].sign()
            value = (_magnitude(state, key) * sign).view(value.shape)
        values.append(value)
    return values[0], values[1]


@pytest.mark.parametrize("mode", ["drop", "magnitude", "random"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_parameters_keep_their_state_byte_for_byte(name: str, mode: str) -> None:
    """Reset by identity: the third parameter's state is untouched, and a step still works afterwards."""
    optimizer, parameters, kept = stepped(OPTIMIZERS[name])
    before = copy.deepcopy(optimizer.state[kept])
    touched = reset_state(optimizer, parameters, mode=mode, ratio=0.9)  # type: ignore[arg-type]
    assert touched > 0
    after = optimizer.state[kept]
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
    step(optimizer, parameters, 2, torch.Generator().manual_seed(1))
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drop_makes_the_next_step_a_first_step(name: str) -> None:
    """After `drop` an update is exactly what a fresh optimizer gives, step count and bias correction included."""
    optimizer, parameters, _ = stepped(OPTIMIZERS[name])
    touched = reset_state(optimizer, parameters, mode="drop")
    assert touched == 2 * sum(p.numel() for p in parameters.values())
    fresh = {key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    new = OPTIMIZERS[name](list(fresh.values()))
    step(optimizer, parameters, 3, torch.Generator().manual_seed(1))
    step(new, fresh, 3, torch.Generator().manual_seed(1))
    assert all(torch.equal(parameters[key], fresh[key]) for key in parameters)


@pytest.mark.parametrize("mode", ["magnitude", "random"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruning_keeps_the_same_entries_of_both_moments(name: str, mode: str) -> None:
    """Exactly (1 - ratio) n entries survive in both moments; the corrected moments of these are unchanged."""
    optimizer, parameters, _ = stepped(OPTIMIZERS[name], steps=5)
    before = {key: [m.clone() for m in moments(optimizer.state[p])] for key, p in parameters.items()}
    touched = reset_state(optimizer, parameters, mode=mode, ratio=0.8)  # type: ignore[arg-type]
    expected = 0
    for key, parameter in parameters.items():
        state = optimizer.state[parameter]
        n = parameter.numel()
        kept = round(0.2 * n)
        expected += 2 * (n - kept)
        assert float(state["step"]) == 1.0
        m, v = moments(state)
        alive = (m != 0) | (v != 0)
        assert alive.sum() <= kept
        assert alive.sum() > 0.9 * kept  # an 8-bit moment may have been zero before
        for now, then, beta in zip((m, v), before[key], BETAS, strict=True):
            corrected_now, corrected_then = now / (1 - beta), then / (1 - beta**5)
            assert torch.allclose(corrected_now[alive], corrected_then[alive], rtol=1e-4, atol=1e-7)
        if mode == "magnitude":
            size = before[key][0].abs()
            assert size[alive].min() >= size[~alive].max()
    assert touched == expected


@pytest.mark.parametrize("name", ["plain", "8bit"])
def test_the_reference_keeps_the_step_and_masks_apart(name: str) -> None:
    """The authors' behaviour, on request: step untouched, values not rescaled, two different masks."""
    optimizer, parameters, _ = stepped(OPTIMIZERS[name])
    before = {key: [m.clone() for m in moments(optimizer.state[p])] for key, p in parameters.items()}
    reset_state(optimizer, parameters, mode="random", ratio=0.5, reference=True)
    state = optimizer.state[parameters["A"]]
    assert float(state["step"]) == 5.0
    m, v = moments(state)
    assert torch.equal(m[m != 0], before["A"][0][m != 0])
    assert ((m != 0) != (v != 0)).float().mean() > 0.3


def test_an_eight_bit_zero_is_looked_up_in_its_map() -> None:
    """Code 0 of the signed map is -0.993: writing 0 into the codes would make the momentum maximally negative."""
    optimizer, parameters, _ = stepped(adamw8bit)
    state = optimizer.state[parameters["A"]]
    assert float(state["qmap1"][0]) < -0.9
    reset_state(optimizer, parameters, mode="magnitude", ratio=1.0)
    assert float(state["qmap1"][127]) == 0.0 and float(state["qmap2"][0]) == 0.0
    assert (state["state1"] == 127).all() and (state["state2"] == 0).all()


def adamw32bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW32bit(parameters, lr=1e-2, betas=BETAS)
    return optimizer


@pytest.mark.parametrize("make", [adamw8bit, adamw32bit])
def test_a_paged_state_is_made_new_in_its_own_memory(make: Make) -> None:
    """Nothing can free paged memory, so "drop" keeps the buffers; the next step is that of a new optimizer."""
    optimizer, parameters, kept = stepped(make)
    buffers = {}
    for key, parameter in parameters.items():
        for name in ("state1", "state2"):
            optimizer.state[parameter][name].is_paged = True
            buffers[key, name] = optimizer.state[parameter][name]
    other = copy.deepcopy(optimizer.state[kept])
    touched = reset_state(optimizer, parameters, mode="drop")
    assert touched == sum(2 * p.numel() for p in parameters.values())
    assert all(
        torch.equal(value, optimizer.state[kept][key]) if isinstance(value, torch.Tensor) else True
        for key, value in other.items()
    )
    fresh = {key: nn.Parameter(p.detach().clone()) for key, p in parameters.items()}
    new = make(list(fresh.values()))
    step(optimizer, parameters, 3, torch.Generator().manual_seed(1))
    step(new, fresh, 3, torch.Generator().manual_seed(1))
    for key, parameter in parameters.items():
        assert torch.equal(parameter, fresh[key]), key
        state, expected = optimizer.state[parameter], new.state[fresh[key]]
        assert state["step"] == expected["step"]
        for name in ("state1", "state2"):
            assert state[name] is buffers[key, name]
            assert torch.equal(state[name], expected[name])


def test_thresholds_are_exact_above_16_million_entries() -> None:
    """torch.quantile refuses such sizes; the reset keeps exactly the share that was asked for, ties included."""
    parameter = nn.Parameter(torch.empty(4100, 4100))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4100, 4100), "exp_avg_sq": torch.ones(4100, 4100)}
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    optimizer.state[parameter] = state
    n = parameter.numel()
    assert n > 2**24
    assert reset_state(optimizer, {"A": parameter}, mode="magnitude", ratio=0.999) == 2 * (n - round(0.001 * n))
    assert int((state["exp_avg"] != 0).sum()) == round(0.001 * n)


def test_masks_depend_on_seed_and_name_alone() -> None:
    """Random masks repeat for one seed and differ for another, and between parameters of one shape."""
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        optimizer, parameters, _ = stepped(OPTIMIZERS["plain"])
        reset_state(optimizer, parameters, mode="random", ratio=0.5, seed=(seed,))
        drawn.append(optimizer.state[parameters["A"]]["exp_avg"] != 0)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_touching_nothing_is_an_error_but_for_a_fresh_optimizer() -> None:
    """A reset that finds no state to reset says so; `none`, and an optimizer that has not stepped, may do nothing."""
    optimizer, parameters, _ = stepped(OPTIMIZERS["plain"])
    stranger = {"A": nn.Parameter(torch.zeros(3))}
    with pytest.raises(TrimtabError, match="touched no element"):
        reset_state(optimizer, stranger, mode="drop")
    with pytest.raises(TrimtabError, match=r"reset_ratio = 0\.001 rounds to none"):
        reset_state(optimizer, {"B": parameters["B"]}, mode="random", ratio=0.001)
    assert reset_state(optimizer, parameters, mode="none") == 0
    assert optimizer.state[parameters["A"]]["step"] == 5
    assert reset_state(torch.optim.AdamW(stranger.values()), stranger, mode="drop") == 0


def test_an_optimizer_without_two_moments_is_refused() -> None:
    """Momentum SGD has nothing that these modes know how to forget."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ConfigError, match="use AdamW"):
        reset_state(optimizer, {"A": parameter}, mode="drop")
