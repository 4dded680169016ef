from __future__ import annotations

import io

from trimtab.config import PretrainConfig
from trimtab.report.terminal import curve, draws_braille, schedule_picture, terminal_width


def config(steps: int = 240, **changes: object) -> PretrainConfig:
    tree: dict[str, object] = {
        "model": {"name": "llama-9m"},
        "data": {"sources": ["a"], "tokenizer": {"path": "t"}},
        "method": {"name": "relora", "warm_start_steps": steps // 4, "restart_every": steps // 4},
        "schedule": {"rewarm_steps": 5},
        "train": {"steps": steps, "batch_tokens": 256},
    }
    return PretrainConfig.model_validate({**tree, **changes})


def test_no_line_is_wider_than_asked() -> None:
    """The picture keeps to its width, in braille and in ASCII."""
    for width in (48, 80, 100):
        for braille in (True, False):
            picture = schedule_picture(config(), width=width, braille=braille)
            assert max(len(line) for line in picture.splitlines()) <= width
            assert picture.isascii() is not braille


def test_restarts_and_the_end_of_the_warm_start_are_marked_where_they_lie() -> None:
    """At 70 columns for 240 steps, step n is marked in column n * 70 / 240."""
    lines = schedule_picture(config(), width=80).splitlines()
    marks = lines[11][10:]
    assert {column for column, sign in enumerate(marks) if sign == "▲"} == {120 * 70 // 240, 180 * 70 // 240}
    assert marks.index("┆") == 60 * 70 // 240
    assert "restart (2)" in lines[-1]
    assert "step 60" in lines[-1]


def test_a_run_without_restarts_has_no_marks() -> None:
    """Full training shows the curve alone."""
    picture = schedule_picture(config(method={"name": "full"}), width=60)
    assert "restart" not in picture
    assert "▲" not in picture


def test_the_peak_labels_the_axis() -> None:
    """The upper label is the largest rate of the run, whichever phase has it."""
    picture = schedule_picture(config(optim={"lr": 1e-3, "warm_start_lr": 4e-3}, schedule={"rewarm_steps": 5}))
    assert picture.splitlines()[0].startswith("4.00e-03 ")


def test_a_dip_of_one_step_is_seen_in_a_million() -> None:
    """A column that stands for thousands of steps still shows the one at which the value falls to 0."""
    lines = curve(lambda t: 0.0 if t == 500_000 else 1.0, 1_000_000, jumps=[500_000], width=80, braille=False)
    assert lines[0].count("'") + lines[0].count(":") == 70
    assert [line.count(":") for line in lines[1:-1]] == [1] * 9


def test_one_step_and_a_rate_of_zero_can_be_drawn() -> None:
    """The smallest run, and one whose rate never leaves 0, are no special cases."""
    assert len(curve(lambda t: 0.0, 1, width=40, height=3)) == 4
    assert len(curve(lambda t: 1.0, 1, width=40, height=3, braille=False)) == 4


def test_the_stream_decides_on_characters_and_width() -> None:
    """ASCII where the encoding has no braille; 80 columns where there is no terminal."""
    assert not draws_braille(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert draws_braille(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert terminal_width(io.StringIO()) in (80, terminal_width())
