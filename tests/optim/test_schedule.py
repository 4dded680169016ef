"""The schedule against values computed by hand and against the ReLoRA authors' formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab
from trimtab import Schedule


def cosine(phase: float, floor: float = 0.1) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * phase)) / 2


def authors(t: int, total: int, first: int, rewarm: int, cycle: int, floor: float) -> float:
    """`cosine_restarts` as the authors define it, without their adjust_step: see arXiv 2307.05695."""
    k, n = t % cycle, t // cycle
    if t < first:
        return t / first
    if k < rewarm and t >= cycle:
        end = (n * cycle + rewarm - first) / (total - first)
        return k / rewarm * cosine(end, floor)
    return cosine((t - first) / (total - first), floor)


@pytest.mark.parametrize(
    ("total", "first", "rewarm", "cycle"), [(20_000, 500, 100, 5_000), (400, 30, 7, 40), (90, 0, 5, 30)]
)
def test_the_reference_option_is_the_authors_schedule(total: int, first: int, rewarm: int, cycle: int) -> None:
    """With `reference`, every step's multiplier equals the authors' to 1e-12."""
    schedule = Schedule(
        total,
        warmup_steps=first,
        restarts=trimtab.ReLoRA(restart_every=cycle).restarts(total, rewarm),
        rewarm_steps=rewarm,
        reference=True,
    )
    for t in range(total):
        assert abs(schedule(t) - authors(t, total, first, rewarm, cycle, 0.1)) < 1e-12, t


def test_values_by_hand() -> None:
    """T = 100, F = 10, R = 4, restarts at 40 and 70: the warm-up, the curve and both re-warms."""
    schedule = Schedule(100, warmup_steps=10, restarts=(40, 70), rewarm_steps=4)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(9) == pytest.approx(1.0)
    assert schedule(10) == pytest.approx(1.0)
    assert schedule(39) == pytest.approx(cosine(29 / 90))
    target = cosine(34 / 90)
    assert [schedule(t) for t in range(40, 45)] == pytest.approx(
        [target / 4, target / 2, target * 3 / 4, target, target]
    )
    assert schedule(70) == pytest.approx(cosine(64 / 90) / 4)
    assert schedule(99) == pytest.approx(cosine(89 / 90))


def test_a_warm_start_then_a_new_curve() -> None:
    """W = 30 of T = 130, `restart`: the curve over T is cut off at W, then F steps up and a curve over T - W."""
    schedule = Schedule(130, warmup_steps=5, warm_start_steps=30, restarts=(80,), rewarm_steps=2)
    assert schedule(4) == pytest.approx(1.0)
    assert schedule(29) == pytest.approx(cosine(24 / 125))
    assert [schedule(t) for t in (30, 31, 34, 35)] == pytest.approx([0.2, 0.4, 1.0, 1.0])
    assert schedule(79) == pytest.approx(cosine(44 / 95))
    assert schedule(80) == pytest.approx(cosine(47 / 95) / 2)
    assert schedule(129) == pytest.approx(cosine(94 / 95))


def test_a_warm_start_that_continues() -> None:
    """`continue`: one cosine over T; at W and at the restarts it is re-warmed, and nothing else changes."""
    schedule = Schedule(
        130, warmup_steps=5, warm_start_steps=30, after_warm_start="continue", restarts=(80,), rewarm_steps=4
    )
    for t in range(130):
        expected = (t + 1) / 5 if t < 5 else cosine((t - 5) / 125)
        for start in (30, 80):
            if start <= t < start + 4:
                expected = (t - start + 1) / 4 * cosine((start + 4 - 5) / 125)
        assert schedule(t) == pytest.approx(expected, abs=1e-12), t


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.2 + 0.8 * 0.5), ("constant", 1.0), ("cosine", 0.6)])
def test_the_other_shapes(shape: str, middle: float) -> None:
    """Linear falls to its floor, constant does not fall; both can be jagged."""
    schedule = Schedule(100, shape=shape, floor=0.2)  # type: ignore[arg-type]
    assert schedule(50) == pytest.approx(middle)
    jagged = Schedule(100, shape=shape, floor=0.2, restarts=(50,), rewarm_steps=10)  # type: ignore[arg-type]
    assert jagged(50) == pytest.approx(jagged(60) / 10)


lengths = st.tuples(
    st.integers(20, 400), st.integers(0, 60), st.integers(0, 20), st.integers(1, 60), st.integers(0, 15)
)


@settings(max_examples=300, deadline=None)
@given(lengths, st.sampled_from(["restart", "continue"]), st.sampled_from(["cosine", "linear", "constant"]))
def test_no_step_is_lost_and_nothing_climbs_at_the_end(
    sizes: tuple[int, int, int, int, int], after: str, shape: str
) -> None:
    """Every multiplier is in (0, 1]; outside warm-ups it never rises; restarts sit where the method says."""
    total, start, first, cycle, rewarm = sizes
    config = trimtab.ReLoRA(restart_every=cycle, warm_start_steps=start)
    restarts = config.restarts(total, rewarm)
    assert all(start < n < total for n in restarts)
    assert not restarts or total - restarts[-1] >= rewarm
    try:
        schedule = Schedule(
            total,
            shape=shape,  # type: ignore[arg-type]
            warmup_steps=first,
            warm_start_steps=start,
            after_warm_start=after,  # type: ignore[arg-type]
            restarts=restarts,
            rewarm_steps=rewarm,
        )
    except trimtab.ConfigError:
        return
    values = [schedule(t) for t in range(total)]
    assert all(0 < value <= 1 + 1e-12 for value in values)
    assert values == [schedule(t) for t in reversed(range(total))][::-1]
    rising = {t for n in (*restarts, start, 0) for t in range(n, n + max(first, rewarm) + 1)}
    for t in range(1, total):
        if t not in rising:
            assert values[t] <= values[t - 1] + 1e-12, t
    if rewarm > 1:
        assert all(values[n] < values[n + rewarm - 1] for n in restarts)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"total_steps": 0}, "total_steps"),
        ({"warmup_steps": 101}, "warmup_steps = 101 .* or lengthen the run$"),
        ({"warmup_steps": 41, "restarts": (40, 80)}, "shorten the warm-up or lengthen the cycle"),
        ({"warm_start_steps": 100}, "warm_start_steps"),
        ({"warm_start_steps": 5, "warmup_steps": 6}, "warmup_steps = 6 .* or lengthen the warm start$"),
        ({"restarts": (40, 100)}, "restarts must rise"),
        ({"restarts": (40, 40)}, "restarts must rise"),
        ({"restarts": (40, 45), "rewarm_steps": 6}, "rewarm_steps = 6"),
        ({"floor": 1.5}, "floor"),
        ({"shape": "step"}, "shape"),
        ({"after_warm_start": "stop"}, "after_warm_start"),
        ({"rewarm_steps": -1}, "negative"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(settings_: dict[str, object], message: str) -> None:
    """Each mistake is one ConfigError that names the setting."""
    with pytest.raises(trimtab.ConfigError, match=message):
        Schedule(**({"total_steps": 100} | settings_))  # type: ignore[arg-type]
