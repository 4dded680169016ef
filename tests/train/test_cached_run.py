"""`train.cache_hidden`: what it keeps, what it spares, and that nothing else changes."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cached_parts import LAYERS, SEQ_LEN, WIDTH, config, counting_blocks, records, trained, write_inputs
from models_for_tests import tiny_llama
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import trimtab
from trimtab.config import PretrainConfig
from trimtab.data.batches import Batch, TrainBatches
from trimtab.data.store import TokenStore
from trimtab.data.tokens import build_store
from trimtab.errors import ConfigError
from trimtab.loadconfig import load_config
from trimtab.train.cached import CachedLoss
from trimtab.train.objective import Objective

#: Bytes of a token in int8.
EACH = LAYERS * (WIDTH + 4)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_inputs(folder)
    build_store(config(folder).data, 0, folder / "store")
    return folder


def int8(project: Path, out: Path, **changes: Any) -> PretrainConfig:
    """Ten steps over 13 sequences, so a micro-batch has one that is new and one that is not; stored with rounding."""
    given = {"train__cache_hidden": str(out / "hidden"), "train__cache_storage": "int8", "eval__every": 3, **changes}
    return config(project, out=str(out), **given)


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run, a/, and of its hidden states."""
    out = tmp_path_factory.mktemp("whole")
    trained(int8(project, out))
    return out


def sequences(project: Path) -> int:
    return TokenStore.open(project / "store").train.n_chunks(SEQ_LEN)


def assert_same_run(one: Path, other: Path) -> None:
    """Every figure of metrics.jsonl and every trained number."""
    assert records(one) == records(other)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_folder_holds_each_sequence_once(project: Path, whole: Path) -> None:
    """Of the training text: evaluations, of which there were some, leave nothing."""
    assert [record["step"] for record in records(whole / "a") if record["event"] == "eval"] == [3, 6, 9, 10]
    data = whole / "hidden" / "data.bin"
    assert sequences(project) % 2 == 1
    assert data.stat().st_size == sequences(project) * SEQ_LEN * EACH
    assert len((whole / "hidden" / "index.txt").read_text().splitlines()) == sequences(project)


def test_the_backbone_runs_for_one_epoch_and_for_evaluations(project: Path, tmp_path: Path) -> None:
    """With the steps of four epochs they see no more rows than with those of one; a second run spares that, too."""

    def rows(name: str, steps: int, cache: str | None) -> int:
        given = {"train__cache_hidden": None if cache is None else str(tmp_path / cache)}
        with counting_blocks() as seen:
            trained(config(project, out=str(tmp_path), name=name, train__steps=steps, **given))
        return sum(seen)

    epoch = -(-sequences(project) // 4)
    one = rows("one", epoch, "first")
    assert rows("four", 4 * epoch, "second") == one
    again = rows("again", 4 * epoch, "second")
    # All micro-batches in which a sequence is new ran: 12 sequences, and the 13th with one that was known.
    assert one - again == LAYERS * (sequences(project) + 1)
    assert rows("without", 4 * epoch, None) - again == LAYERS * 4 * epoch * 4


@pytest.mark.parametrize("changes", [{}, {"data__document_mask": True}, {"loss__chunked": False}])
def test_exact_storage_trains_as_without(project: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Losses, norms and evaluations of ten steps, to what company changes in the last bits."""
    found = []
    for name, cache in (("with", str(tmp_path / "hidden")), ("without", None)):
        asked = config(
            project, out=str(tmp_path), name=name, train__cache_hidden=cache, train__cache_storage="exact",
            eval__every=3, **changes,
        )  # fmt: skip
        trained(asked)
        found.append([{k: v for k, v in record.items() if k != "event"} for record in records(tmp_path / name)])
    assert len(found[0]) == 14
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-5), one["step"]


def leave(cache: Path, whole: Path) -> None:
    """As the process left it."""


def delete(cache: Path, whole: Path) -> None:
    shutil.rmtree(cache)


def cut(cache: Path, whole: Path) -> None:
    """As after a crash of the machine, which lost the last pages."""
    with open(cache / "data.bin", "r+b") as file:
        file.truncate(5 * SEQ_LEN * EACH + 7)


def run_ahead(cache: Path, whole: Path) -> None:
    """As after a kill long behind the last checkpoint."""
    shutil.rmtree(cache)
    shutil.copytree(whole / "hidden", cache)


@pytest.mark.parametrize("stop", [2, 6])
@pytest.mark.parametrize("happens", [leave, delete, cut, run_ahead])
@pytest.mark.filterwarnings("ignore:.*was not written whole")
def test_a_run_in_two_parts_is_the_unbroken_one(
    happens: Callable[[Path, Path], None], stop: int, project: Path, whole: Path, tmp_path: Path
) -> None:
    """In the first epoch and in the second, bit for bit; the files hold the same sequences in the same order."""
    trained(int8(project, tmp_path, train__stop_at=stop))
    happens(tmp_path / "hidden", whole)
    run = tmp_path / "a"
    _, printed = trained(load_config(run / "config.yaml"), resume=run)
    assert_same_run(run, whole / "a")
    for name in ("data.bin", "index.txt"):
        assert (tmp_path / "hidden" / name).read_bytes() == (whole / "hidden" / name).read_bytes()
    assert ("micro-batches of the" in printed) == (happens in (delete, cut))


def test_what_is_computed_anew_is_computed_in_its_old_company(project: Path, whole: Path, tmp_path: Path) -> None:
    """Micro-batches that hold nothing new are left out, and each counts once."""
    trained(int8(project, tmp_path, train__stop_at=8))
    shutil.rmtree(tmp_path / "hidden")
    with counting_blocks() as rows:
        _, printed = trained(load_config(tmp_path / "a" / "config.yaml"), resume=tmp_path / "a")
    assert "hidden states: computing 7 micro-batches of the 8 completed steps anew" in printed
    assert rows.count(2) >= 7 * LAYERS
    assert_same_run(tmp_path / "a", whole / "a")


def test_a_resumed_run_finds_a_relative_folder_and_takes_a_moved_one(
    project: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working directory, and at another place that the user names: nothing is computed again."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    asked = int8(project, tmp_path, train__stop_at=6, train__cache_hidden="hidden")
    trained(asked)
    monkeypatch.chdir(there)
    run = tmp_path / "a"
    _, printed = trained(load_config(run / "config.yaml", ["train.stop_at=8"]), resume=run)
    assert f"are there, in {here / 'hidden'}" in printed and not list(there.iterdir())
    shutil.copytree(here / "hidden", tmp_path / "moved")
    given = load_config(run / "config.yaml", [f"train.cache_hidden={tmp_path / 'moved'}"])
    _, printed = trained(given, resume=run)
    assert f"are there, in {tmp_path / 'moved'}" in printed and "bit for bit" not in printed
    assert_same_run(run, whole / "a")


@pytest.mark.parametrize("word", ["train.cache_hidden=null", "train.cache_storage=exact"])
def test_another_cache_on_the_way_is_no_longer_bit_for_bit(word: str, project: Path, tmp_path: Path) -> None:
    trained(int8(project, tmp_path, train__stop_at=2))
    shutil.rmtree(tmp_path / "hidden")
    _, printed = trained(load_config(tmp_path / "a" / "config.yaml", [word]), resume=tmp_path / "a")
    assert f"{word.partition('=')[0]} was " in printed and "but not bit for bit" in printed


def test_the_run_says_what_it_will_take_and_how_far_it_is(
    project: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    _, printed = trained(int8(project, tmp_path))
    tokens = sequences(project) * SEQ_LEN
    size = f"{tokens * EACH / 1024:.1f} KiB"
    assert f"hidden states: {size} for {tokens} tokens ({EACH} bytes each, int8), in {tmp_path / 'hidden'}; " in printed
    steps = [line for line in printed.splitlines() if line.startswith("step ") and " lr " in line]
    assert f"hidden states {8 * SEQ_LEN * EACH / 1024:.1f} KiB of {size}" in steps[1]
    assert ["hidden states" in line for line in steps[:10]] == [True] * 3 + [False] * 7
    assert "train.cache_storage = int8 rounds the hidden states, which are computed in fp32" in printed
    assert not [warning for warning in recwarn if "storage=" in str(warning.message)]
    assert "sees each sequence once" not in printed


def test_a_run_says_that_it_looks_for_its_sequences_in_a_folder_that_holds_some(
    project: Path, tmp_path: Path, whole: Path
) -> None:
    """With a bar on a terminal, whose end is the epoch's; an empty folder has nothing to look for."""
    found = int8(project, tmp_path, train__steps=5, train__cache_hidden=str(whole / "hidden"))
    text = f"hidden states: looking for {sequences(project)} sequences in {whole / 'hidden'}\n"
    assert text in trained(found)[1]
    assert "looking" not in trained(int8(project, tmp_path, name="b", train__steps=1))[1]
    terminal = Console(file=io.StringIO(), width=200, force_terminal=True)
    adapter = trimtab.attach(tiny_llama(vocab_size=300), trimtab.READ(size=8))
    cache = trimtab.HiddenCache(adapter, tmp_path / "new", "int8")
    batches = TrainBatches(TokenStore.open(project / "store").train, SEQ_LEN, 4, 0, eos_id=0)
    loss = CachedLoss(cache, Objective(cache.adapter.model), batches, found, torch.device("cpu"))
    with pytest.warns(UserWarning, match="storage='int8'"):
        loss.prepare(3, terminal)
    assert len(cache) == 12
    loss.prepare(0, terminal)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "looking for them" in shown and "100%" in shown.rpartition("looking for them")[2]


def test_a_run_that_sees_each_sequence_once_is_warned(project: Path, tmp_path: Path, whole: Path) -> None:
    """Unless it finds all of them."""
    _, printed = trained(int8(project, tmp_path, train__steps=3))
    assert "warning: train.cache_hidden: the run sees each sequence once" in printed
    found = int8(project, tmp_path, name="b", train__steps=3, train__cache_hidden=str(whole / "hidden"))
    assert "sees each sequence once" not in trained(found)[1]


def test_a_disk_without_room_is_refused_before_the_first_step(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """By what is missing: a folder that has all of it needs no room."""
    asked = int8(project, tmp_path)
    full = sequences(project) * SEQ_LEN * EACH
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 26) + full - 1))
    with pytest.raises(ConfigError, match=rf"^train.cache_hidden: .* need {full:,} bytes more, and the disk has"):
        trained(asked)
    assert not list((tmp_path / "a").iterdir())
    trained(int8(project, tmp_path, train__cache_hidden=str(whole / "hidden")))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 26) + full))
    trained(int8(project, tmp_path, name="b"))


def test_a_folder_of_another_backbone_or_that_another_writes_to_is_refused(project: Path, tmp_path: Path) -> None:
    trained(int8(project, tmp_path, train__stop_at=2))
    adapter = trimtab.attach(tiny_llama(vocab_size=300), trimtab.READ(size=8), dtype=torch.float32)
    with pytest.warns(UserWarning, match="storage='int8'"):
        other = trimtab.HiddenCache(adapter, tmp_path / "hidden", "int8")
    other.prepare(1)
    with pytest.raises(ConfigError, match=r"^train.cache_hidden: .*somebody else writes to this cache"):
        trained(int8(project, tmp_path, name="b"))
    other.close()
    changed = tmp_path / "model"
    tiny_llama(seed=1, vocab_size=300).save_pretrained(changed)
    with pytest.raises(trimtab.CheckpointError, match=r"^train.cache_hidden: .*of another backbone"):
        trained(int8(project, tmp_path, name="b", model__name=str(changed)))


def test_a_method_without_such_hidden_states_is_refused(project: Path) -> None:
    for method in ({"name": "full"}, {"name": "lora"}, {"name": "ladder"}, {"name": "prompt"}):
        with pytest.raises(ConfigError, match=rf"train.cache_hidden.*method {method['name']}: .*; leave it out"):
            load_config(None, _words(project, method))
    for more, message in (({}, ""), ({"backbone_dropout": True}, r"backbone_dropout=True they are drawn anew")):
        words = _words(project, {"name": "read", **more})
        if message:
            with pytest.raises(ConfigError, match=rf"command line: train.cache_hidden: c: .*{message}"):
                load_config(None, words)
        else:
            load_config(None, words)


def _words(project: Path, method: dict[str, Any]) -> list[str]:
    section = ", ".join(f"{key}: {str(value).lower()}" for key, value in method.items())
    return [
        "model.name=llama-9m", "data.sources=[a.txt]", "data.tokenizer.bpe_vocab_size=300", "train.steps=9",
        "train.batch_tokens=256", "train.cache_hidden=c", f"method={{{section}}}",
    ]  # fmt: skip


def test_documents_that_are_packed_otherwise_are_another_sequence(project: Path, tmp_path: Path) -> None:
    """The same tokens, cut into documents at other places: each gets its own loss, at first sight and later."""
    model = tiny_llama(vocab_size=300)
    adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn"))
    objective = Objective(model)
    asked = config(project, train__cache_hidden=str(tmp_path), train__cache_storage="exact", data__document_mask=True)
    cache = trimtab.HiddenCache(adapter, tmp_path / "hidden", "exact")
    parts = [packed(project, eos) for eos in (11, 12)] + [packed(project, None)]
    assert torch.equal(parts[0].input_ids, parts[1].input_ids)
    batches = TrainBatches(TokenStore.open(project / "store").train, SEQ_LEN, 4, 0, eos_id=0)
    loss = CachedLoss(cache, objective, batches, asked, torch.device("cpu"))
    plain = [float(objective(part).detach()) for part in parts]
    assert len(set(plain)) == 3
    for seen in (1, 2):
        with counting_blocks() as rows:
            assert [float(loss(part).detach()) for part in parts] == plain
        assert (sum(rows) == 0) == (seen == 2)


def packed(project: Path, eos: int | None) -> Batch:
    """Two sequences in which some tokens end documents; None: without documents."""
    ids = torch.tensor([[5, 11, 7, 12, 9, 8, 11, 12], [5, 6, 12, 7, 11, 9, 4, 3]])
    labels = ids.roll(-1, 1)
    if eos is None:
        return Batch(ids, labels, (8, 8))
    ends = (ids == eos).long()
    documents = ends.cumsum(1) - ends
    mask = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    return Batch(ids, labels, (8, 8), mask, positions(documents))


def positions(documents: Tensor) -> Tensor:
    """Counted from the start of each document."""
    return torch.stack([torch.cat([torch.arange(int((row == d).sum())) for d in row.unique()]) for row in documents])
