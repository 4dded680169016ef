"""Cached hidden states on disk: sizes, damage, crashes, other writers, a full disk."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families_for_tests import FAMILIES
from hidden_parts import (
    FIVE,
    assert_same,
    collate,
    counting,
    examples,
    hearing,
    inside_blocks,
    open_cache,
    visit,
    with_read,
)
from torch import nn

import trimtab
from trimtab.train.hidden.codes import pack, unpack

STORAGES = ("bf16", "int8", "exact")


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FIVE)
def test_the_data_on_disk_is_bytes_per_token_times_tokens(family: str, storage: str, tmp_path: Path) -> None:
    model, adapter = with_read(family)
    rows = examples(family)
    with open_cache(adapter, tmp_path, storage) as cache:
        each = cache.token_bytes
        visit(model, adapter, cache, collate(rows[:4], more=2))
        visit(model, adapter, cache, collate(rows[2:]))
        assert len(cache) == len(rows) and cache.token_bytes == each
        valid = [len(row["input_ids"]) if "input_ids" in row else 17 for row in rows]  # ViT: 16 patches and one more
        tokens = [sum(valid)] if len(each) == 1 else [sum(valid), sum(len(row["labels"]) for row in rows)]
        assert cache.tokens == tuple(tokens)
        data = (tmp_path / "data.bin").stat().st_size
        assert data == sum(n * size for n, size in zip(tokens, each, strict=True))
        assert cache.size == data + (tmp_path / "index.txt").stat().st_size
        assert cache.bytes_per_token == sum(each)


def shaped(kind: str) -> nn.Module:
    """Models of real shapes, without memory."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        if kind == "SmolLM2-135M":
            sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
            return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 30522}
        return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=12))


@pytest.mark.parametrize(("kind", "bf16", "int8"), [("SmolLM2-135M", 34_560, 17_400), ("MiniLM", 4_608, 2_328)])
def test_the_documented_sizes(kind: str, bf16: int, int8: int, tmp_path: Path) -> None:
    """N x d x 2 bytes a token, and N x (d + 4); docs/hidden-cache.md has them."""
    adapter = trimtab.attach(shaped(kind), trimtab.READ(size=8))
    assert trimtab.HiddenCache(adapter, tmp_path, "bf16").bytes_per_token == bf16
    assert trimtab.HiddenCache(adapter, tmp_path, "int8").bytes_per_token == int8
    words = (Path(__file__).parents[2] / "docs" / "hidden-cache.md").read_text()
    for size in (bf16, int8):
        assert f"{size:,}" in words


# -- the stored form -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    """A step is the largest of a token's numbers by 127; in 16 bits, the rounding of what comes back comes on top."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 33, generator=generator) * torch.logspace(-6, 4, 200)[:, None]
    x[:, 5] *= 100  # one channel that is larger than the others, as in real models
    x[7] = 0
    x = x.clamp(-6e4, 6e4).to(dtype)
    back = unpack(pack(x, "int8"), "int8", dtype)
    assert back.dtype == dtype and pack(x, "int8").shape == (200, 33 + 4)
    step = x.float().abs().amax(1, keepdim=True) / 127
    slack = 1e-5 if dtype == torch.float32 else 1e-5 + 127 * torch.finfo(dtype).eps
    assert bool(((back - x).float().abs() <= step / 2 * (1 + slack) + torch.finfo(dtype).tiny).all())
    assert torch.equal(back[7], x[7])
    assert float((back - x).float().abs().max() / step.max()) > 0.4  # the bound is not loose


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_stored_int8_is_within_half_a_step_of_each_tokens_and_layers_numbers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding and without; and the backbone computes as ever while its hidden states are stored."""
    model, adapter = with_read(family)
    batch = collate(examples(family))
    with hearing(monkeypatch) as plain:
        visit(model, adapter, None, batch)
    with hearing(monkeypatch) as kept:
        visit(model, adapter, open_cache(adapter, tmp_path, "int8"), batch)
    valid = batch["attention_mask"] != 0 if family == "llama" else torch.ones(6, 17, dtype=torch.bool)
    for (_, exact, _), (_, rounded, _) in zip(plain, kept, strict=True):
        step = exact[valid].abs().amax(1, keepdim=True) / 127
        assert bool(((rounded - exact)[valid].abs() <= step / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("storage", ["bf16", "exact"])
def test_packing_twice_changes_nothing(storage: Any) -> None:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    once = unpack(pack(x, storage), storage, x.dtype)
    assert torch.equal(unpack(pack(once, storage), storage, x.dtype), once)
    assert unpack(pack(x[:0], storage), storage, x.dtype).shape == (0, 16)


def test_numbers_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    cache = open_cache(adapter, tmp_path)
    with pytest.raises(trimtab.NonFiniteError, match="call 1 gives numbers that are not finite"):
        visit(model, adapter, cache, collate(examples("llama")))
    assert len(cache) == 0


# -- crashes and damage ----------------------------------------------------------------------------


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def only_data(folder: Path) -> None:
    """What is left when a process dies between the data and their line."""
    lines = (folder / "index.txt").read_bytes().splitlines(keepends=True)
    (folder / "index.txt").write_bytes(b"".join(lines[:-1]))


CRASHES: dict[str, Callable[[Path], Any]] = {
    "a line cut off": lambda folder: cut(folder / "index.txt", 5),
    "a line without its end": lambda folder: cut(folder / "index.txt", 1),
    "data cut off": lambda folder: cut(folder / "data.bin", 5),
    "data without a line": only_data,
    "more data": lambda folder: (folder / "data.bin").open("ab").write(b"half of a record"),
    "no data": lambda folder: (folder / "data.bin").write_bytes(b""),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_what_a_crash_cut_off_is_computed_again(crash: str, tmp_path: Path) -> None:
    model, adapter = with_read("t5")
    batches = [collate(examples("t5")[:3]), collate(examples("t5")[3:])]
    with open_cache(adapter, tmp_path) as cache:
        first = [visit(model, adapter, cache, batch) for batch in batches]
        whole = {name: (tmp_path / name).read_bytes() for name in ("data.bin", "index.txt")}
    CRASHES[crash](tmp_path)
    with pytest.warns(UserWarning, match="was not written whole, and is dropped"):
        cache = trimtab.HiddenCache(adapter, tmp_path)
    left = len(cache)
    assert left == {"more data": 6, "no data": 0}.get(crash, 5)
    for batch, before in zip(batches, first, strict=True):
        assert_same(visit(model, adapter, cache, batch), before)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    cache.close()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not written whole")
        open_cache(adapter, tmp_path)


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cache goes on afterwards, though the data file has bytes that no line speaks of."""
    import os

    model, adapter = with_read("llama")
    batches = [collate(examples("llama")[:3]), collate(examples("llama")[3:])]
    cache = open_cache(adapter, tmp_path)
    first = visit(model, adapter, cache, batches[0])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(trimtab.CheckpointError, match="No space left on device; what was stored before is kept"):
            visit(model, adapter, cache, batches[1])
    with pytest.warns(UserWarning, match="was not written whole"):
        second = visit(model, adapter, cache, batches[1])
    assert_same(visit(model, adapter, cache, batches[0]), first)
    assert_same(visit(model, adapter, cache, batches[1]), second)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_flipped_byte_is_found(storage: str, opened: bool, tmp_path: Path) -> None:
    """Anywhere in the data, whether the cache was open meanwhile or not."""
    model, adapter = with_read("llama")
    batch = collate(examples("llama"))
    cache = open_cache(adapter, tmp_path, storage)
    first = visit(model, adapter, cache, batch)
    data = (tmp_path / "data.bin").read_bytes()
    for at in (0, len(data) // 2, len(data) - 1):
        with open(tmp_path / "data.bin", "r+b") as file:  # in place, as a disk would
            file.seek(at)
            file.write(bytes([data[at] ^ 16]))
        if not opened:
            cache.close()
            cache = open_cache(adapter, tmp_path, storage)
        with pytest.raises(trimtab.CheckpointError, match=r"data\.bin is damaged: the checksum"):
            visit(model, adapter, cache, batch)
        with open(tmp_path / "data.bin", "r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    assert_same(visit(model, adapter, cache, batch), first)


def test_a_damaged_index_or_meta_is_found(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    with open_cache(adapter, tmp_path) as cache:
        visit(model, adapter, cache, collate(examples("llama")))
    for name, message in (("index.txt", r"index\.txt is damaged at byte 0"), ("meta.json", r"meta\.json is damaged")):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"~" + content[1:])
        with pytest.raises(trimtab.CheckpointError, match=message):
            open_cache(adapter, tmp_path)
        (tmp_path / name).write_bytes(content)
    meta = json.loads((tmp_path / "meta.json").read_text())
    del meta["calls"]["forms"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(trimtab.CheckpointError, match=r"meta\.json is damaged \('forms'\)"):
        open_cache(adapter, tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(trimtab.ConfigError, match=r"holds no hidden states \(meta.json is missing\)"):
        open_cache(adapter, tmp_path)


# -- writers and the disk --------------------------------------------------------------------------


def test_one_writer_at_a_time_and_any_number_of_readers(tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    rows = examples("llama")
    old, new, newer = collate(rows[:2]), collate(rows[2:4]), collate(rows[4:])
    writer = open_cache(adapter, tmp_path)
    first = visit(model, adapter, writer, old)
    twin = FAMILIES["llama"]().train()
    other = trimtab.attach(twin, trimtab.READ(size=8, init="drawn"))
    reader = open_cache(other, tmp_path)
    assert_same(visit(twin, other, reader, old), first)
    with pytest.raises(trimtab.ConfigError, match="somebody else writes to this cache"):
        visit(twin, other, reader, new)
    second = visit(model, adapter, writer, new)
    writer.close()
    with counting(inside_blocks(other)) as calls:
        assert_same(visit(twin, other, reader, new), second)  # written by the other after this one was opened
    assert not calls
    assert len(reader.missing(newer)) == 2 and not reader.missing(new)
    with pytest.raises(trimtab.ConfigError, match=r"need [\d,]+ bytes more"):
        reader.prepare(1 << 50)
    reader.prepare(9)
    with pytest.raises(trimtab.ConfigError, match="somebody else writes to this cache"):
        writer.prepare(9)
    visit(twin, other, reader, newer)
    with pytest.raises(trimtab.ConfigError, match="somebody else writes to this cache"):
        visit(
            model,
            adapter,
            writer,
            collate(rows[1:5], more=1) | {"input_ids": collate(rows[1:5], more=1)["input_ids"] + 1},
        )
    reader.close()
    assert len(open_cache(adapter, tmp_path)) == 6


def test_the_disk_is_checked_before_it_starts_and_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = with_read("llama")
    reserve = 1 << 26
    free = reserve + 128 * 1000 + 100  # a thousand tokens
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(trimtab.ConfigError, match=rf"need 128,128 bytes more, and the disk has {free:,} free"):
        open_cache(adapter, tmp_path, tokens=1001)
    cache = open_cache(adapter, tmp_path, tokens=1000)
    first = visit(model, adapter, cache, collate(examples("llama")[:3]))
    free = reserve + 100
    with pytest.raises(trimtab.ConfigError, match=r"need [\d,]+ bytes more, and the disk has 67,108,964 free"):
        visit(model, adapter, cache, collate(examples("llama")[3:]))
    assert len(cache) == 3
    assert_same(visit(model, adapter, cache, collate(examples("llama")[:3])), first)
    cache.close()
    stored = sum(cache.tokens)
    open_cache(adapter, tmp_path, tokens=stored)  # nothing more is needed
    with pytest.raises(trimtab.ConfigError, match="need 128 bytes more"):
        open_cache(adapter, tmp_path, tokens=stored + 1)
    for odd in (-1, (3, 4)):
        with pytest.raises(trimtab.ConfigError, match="give a number of tokens, or one for each of 1 stacks"):
            open_cache(adapter, tmp_path, tokens=odd)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    adapter = with_read("llama")[1]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(trimtab.ConfigError, match="is not empty and holds no hidden states"):
        open_cache(adapter, tmp_path)
    with pytest.raises(trimtab.CheckpointError, match=r"cannot be used: .*; give another folder"):
        open_cache(adapter, tmp_path / "notes.txt")
