"""What a run may be continued with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trimtab.config import PretrainConfig
from trimtab.configerrors import shown
from trimtab.errors import CheckpointError, ConfigError
from trimtab.train.checkpoint import Checkpoint
from trimtab.train.folder import refuse_used_folder
from trimtab.train.resume import continued

TREE: dict[str, Any] = {
    "model": {"name": "llama-9m"},
    "data": {"sources": ["a.txt"], "tokenizer": {"bpe_vocab_size": 500}, "seq_len": 32},
    "method": {"name": "relora", "rank": 4, "restart_every": 10, "warm_start_steps": 5},
    "optim": {"lr": 1e-3},
    "schedule": {"rewarm_steps": 4},
    "train": {"steps": 50, "batch_tokens": 128, "stop_at": 20},
}


def config(**changes: Any) -> PretrainConfig:
    """TREE with changes given as section__key=value."""
    tree = {key: dict(value) for key, value in TREE.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    return PretrainConfig.model_validate(tree)


def standing(step: int = 20, **changes: Any) -> Checkpoint:
    """A checkpoint of the run after `step` steps."""
    body = {"step": step, "config": config(**changes).model_dump(mode="json")}
    return Checkpoint(Path("runs/x/checkpoints") / f"step-{step:08d}", step, body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1), ("dtype", "fp32"), ("pure", True), ("model__name", "llama-20m"), ("data__sources", ["b.txt"]),
        ("data__seq_len", 64), ("data__document_mask", True), ("method__rank", 8), ("method__restart_every", 15),
        ("method__warm_start_steps", 4), ("method", {"name": "full"}), ("optim__name", "adamw8bit"),
        ("optim__beta2", 0.95), ("optim__weight_decay", 0.1), ("optim__eps", 1e-6), ("schedule__shape", "linear"),
        ("schedule__warmup_steps", 2), ("schedule__rewarm_steps", 3), ("schedule__reference", True),
        ("train__batch_tokens", 256), ("train__clip", 0.5),
    ],
)  # fmt: skip
def test_a_change_that_would_make_it_wrong_is_named(name: str, value: Any) -> None:
    """The error names the setting, what it was, and what it would be."""
    with pytest.raises(ConfigError) as caught:
        continued(config(**{name: value}), standing())
    key = name.replace("__", ".")
    assert str(caught.value).startswith(key)
    if not isinstance(value, dict):
        assert shown(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim__lr", 2e-3), ("optim__warm_start_lr", 1e-4), ("schedule__floor", 0.0), ("train__steps", 60),
        ("train__stop_at", 30), ("log__every", 1), ("eval__every", 5), ("checkpoint__keep", 9),
        ("checkpoint__every", 3), ("data__workers", 3),
    ],
)  # fmt: skip
def test_what_touches_the_future_alone_may_change(name: str, value: Any) -> None:
    """The new value holds, without a note that exactness is lost."""
    asked = config(**{name: value})
    found, notes = continued(asked, standing())
    flat = asked.model_dump()
    flat["train"]["stop_at"] = None if name != "train__stop_at" else value
    assert found.model_dump() == flat
    assert not [note for note in notes if "bit for bit" in note]


READS: dict[str, Any] = {"method": {"name": "read"}, "schedule": {}}


@pytest.mark.parametrize(
    ("before", "after", "exact"),
    [("a", "b", True), ("a", None, False), (None, "a", False)],
)
def test_hidden_states_may_lie_elsewhere(before: str | None, after: str | None, exact: bool) -> None:
    """Another folder changes nothing that is computed; a cache more or less may, by its rounding."""
    standing_ = standing(**READS, train__cache_hidden=before)
    found, notes = continued(config(**READS, train__cache_hidden=after), standing_)
    assert found.train.cache_hidden == (after and Path(after))
    assert any("train.cache_hidden" in note and "not bit for bit" in note for note in notes) != exact


@pytest.mark.parametrize(("name", "value"), [("device", "cpu"), ("train__micro_batch", 2), ("loss__chunk", 7)])
def test_what_costs_exactness_is_said(name: str, value: Any) -> None:
    """Another way to compute the same is allowed, and its price is named."""
    found, notes = continued(config(**{name: value}), standing())
    assert any(note.startswith(name.replace("__", ".")) and "bit for bit" in note for note in notes)
    assert found.seed == 0


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ("absent", {}, "model.selective_recompute was false and is true: "),
        ("absent", {"model__selective_recompute": True}, "model.selective_recompute was false and is true: "),
        ("absent", {"model__selective_recompute": False}, ""),
        ("absent", {"model__gradient_checkpointing": True}, "model.gradient_checkpointing was false and is true: "),
        (None, {}, ""),
        (None, {"model__selective_recompute": True}, ""),
        (None, {"model__selective_recompute": False}, "model.selective_recompute was true and is false: "),
    ],
)
def test_a_run_of_before_there_was_a_setting_goes_on_with_a_note(
    before: bool | str | None, after: dict[str, Any], note: str
) -> None:
    """Nothing was recomputed then; `null` and what it comes to are the same."""
    checkpoint = standing()
    if before == "absent":
        del checkpoint.config["model"]["selective_recompute"]
    _, notes = continued(config(**after), checkpoint)
    told = [one for one in notes if "bit for bit" in one]
    assert [one.partition("the run")[0] for one in told] == ([note] if note else [])


def test_a_reached_stop_does_not_stop_again() -> None:
    """The stop_at that ended the run is dropped, with a note; a new one that lies behind is an error."""
    found, notes = continued(config(), standing())
    assert found.train.stop_at is None
    assert any("train.stop_at = 20 was reached" in note for note in notes)
    with pytest.raises(ConfigError, match=r"train\.stop_at = 15 is not after step 20"):
        continued(config(train__stop_at=15), standing())


def test_more_steps_must_keep_the_past_restarts() -> None:
    """With T = 48 the restart at 45 was left out (3 steps are too short to re-warm); 60 steps would have had it."""
    assert 45 not in config(train__steps=48).method.restarts(48, 4)
    with pytest.raises(ConfigError, match=r"train\.steps: 48 became 60.* step 45 did not happen"):
        continued(config(train__steps=60), standing(46, train__steps=48))
    found, _ = continued(config(train__steps=60), standing(44, train__steps=48))
    assert found.train.steps == 60
    with pytest.raises(ConfigError, match=r"step 45 happened in this run"):
        continued(config(train__steps=48), standing(46))


def test_fewer_steps_than_were_done() -> None:
    """A run cannot be shortened to before where it stands."""
    with pytest.raises(ConfigError, match=r"train\.steps = 19 is less than the 20 steps"):
        continued(config(train__steps=19, train__stop_at=None), standing())


def test_settings_of_another_version() -> None:
    """A checkpoint with a setting that is unknown here is an error that names it."""
    checkpoint = standing()
    checkpoint.state["config"]["train"]["unheard_of"] = 1  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"train\.unheard_of"):
        continued(config(), checkpoint)


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    """An existing run is never overwritten; the message offers both ways out. An empty folder is fine."""
    refuse_used_folder(tmp_path)
    refuse_used_folder(tmp_path / "new")
    (tmp_path / "config.yaml").write_text("")
    refuse_used_folder(tmp_path)  # all that a run leaves that never took a step
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    with pytest.raises(ConfigError, match=rf"no checkpoint, so remove it \(rm -r {tmp_path}\), or choose another name"):
        refuse_used_folder(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--resume .*choose another name"):
        refuse_used_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("file", ["mine/train.csv", "mine"])
def test_what_is_no_run_is_not_to_be_removed(tmp_path: Path, file: str) -> None:
    """A folder of data, or a file, that has the name."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("text,label\n")
    with pytest.raises(ConfigError, match="is not empty; choose another name") as raised:
        refuse_used_folder(tmp_path / "mine")
    assert "rm -r" not in str(raised.value)


@pytest.mark.parametrize("name", ["name", "out"])
def test_a_resumed_run_stays_in_its_folder(name: str) -> None:
    """Another name or place would neither move the run nor be where it lies."""
    with pytest.raises(ConfigError, match=f"{name} = elsewhere: a resumed run stays in its folder"):
        continued(config(**{name: "elsewhere"}), standing())
