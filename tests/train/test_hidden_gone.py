"""Cached hidden states in a folder that may only be read, or that is deleted under the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hidden_parts import assert_same, collate, examples, open_cache, visit, with_read

import trimtab


def test_a_folder_that_may_only_be_read_serves_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = with_read("llama")
    rows = examples("llama")
    with open_cache(adapter, tmp_path) as cache:
        first = visit(model, adapter, cache, collate(rows[:3]))
    opened = os.open

    def forbidden(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == ".lock":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbidden)
    cache = open_cache(adapter, tmp_path)
    assert_same(visit(model, adapter, cache, collate(rows[:3])), first)
    with pytest.raises(
        trimtab.ConfigError, match=r"nothing can be written here \(Permission denied\).* make the folder writable"
    ):
        visit(model, adapter, cache, collate(rows))
    monkeypatch.undo()
    with open_cache(adapter, tmp_path) as other:
        visit(model, adapter, other, collate(rows[3:4]))
        with pytest.raises(trimtab.ConfigError, match="somebody else writes to this cache of hidden states; wait"):
            visit(model, adapter, cache, collate(rows))


@pytest.mark.parametrize("deleted", ["folder", "data.bin"])
@pytest.mark.parametrize("new", [True, False])
def test_a_cache_that_is_deleted_while_it_is_in_use(deleted: str, new: bool, tmp_path: Path) -> None:
    model, adapter = with_read("llama")
    rows, folder = examples("llama"), tmp_path / "cache"
    cache = open_cache(adapter, folder)
    visit(model, adapter, cache, collate(rows[:3]))
    if deleted == "folder":
        shutil.rmtree(folder)
        told = "and it was deleted; open the cache again, and it is filled anew"
    else:
        (folder / deleted).unlink()
        told = "and data.bin in it was deleted"
    with pytest.raises(trimtab.CheckpointError, match=f"the cached hidden states was in use, {told}"):
        visit(model, adapter, cache, collate(rows[3:] if new else rows[:3]))
    with pytest.raises(trimtab.CheckpointError, match=told):
        cache.prepare(3)
