import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_for_tests import byte_bpe, config, contents, rows, text, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trimtab.data.build as build
import trimtab.data.disk as disk
from trimtab.data.store import TokenStore
from trimtab.data.tokens import Progress, build_store, store_folder
from trimtab.errors import DataError

SMALL = 4000  # bytes of text in a shard


def corpus(folder: Path, n: int = 60) -> Path:
    """Rows in two files and a few texts: about ten shards of SMALL."""
    write_jsonl(folder / "a.jsonl", rows(n // 2))
    write_jsonl(folder / "b" / "more.jsonl", rows(n // 2, first=n // 2))
    for i in range(3):
        (folder / f"t{i}.txt").write_text(text(1000 + i, 200), encoding="utf-8")
    return folder


def documents(store: TokenStore, part: str) -> list[str]:
    """The texts of one part, decoded."""
    tokens = getattr(store, part).tokens
    ends = np.flatnonzero(tokens == store.tokenizer.eos_id)
    assert part == "train" or ends[-1] == len(tokens) - 1
    return [store.tokenizer.hf.decode(t[:-1].tolist()) for t in np.split(tokens, ends + 1)[:-1]]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    """1, 2 and 3 workers, small and large shards, another place on the disk: every file of the store is equal."""
    first = build_store(config(corpus(tmp_path / "x")), 3, tmp_path / "s0", shard_bytes=SMALL)
    for number, workers in enumerate((2, 3, 0), start=1):
        changed = config(tmp_path / "x", workers=workers)
        build_store(changed, 3, tmp_path / f"s{number}", shard_bytes=SMALL * number)
        assert contents(tmp_path / f"s{number}") == contents(tmp_path / "s0")
    assert {p.name for p in first.folder.iterdir()} == {
        ".lock",
        "manifest.json",
        "tokenizer",
        "train.bin",
        "validation.bin",
        "validation.bytes",
    }


def test_the_store_holds_the_documents(tmp_path: Path) -> None:
    """Decoded, both parts together are all documents, in order, an end-of-text after each; counts and bytes agree."""
    store = build_store(config(corpus(tmp_path / "x")), 3, tmp_path / "s", shard_bytes=SMALL)
    everything = [row["text"] for row in rows(60)] + [text(1000 + i, 200) for i in range(3)]
    train, held_out = documents(store, "train"), documents(store, "validation")
    assert sorted(train + held_out) == sorted(everything)
    assert train == [t for t in everything if t in set(train)]
    assert 4 <= len(held_out) <= 24
    for part, texts in (("train", train), ("validation", held_out)):
        counts = store.manifest[part]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(t.encode()) for t in texts)
        assert counts["tokens"] == getattr(store, part).n_tokens
    widths = store.validation.byte_lengths
    assert widths is not None
    assert int(widths.sum()) == store.manifest["validation"]["bytes"]
    assert not widths[store.validation.tokens == store.tokenizer.eos_id].any()
    assert store.train.byte_lengths is None
    assert store.train.tokens.dtype == np.uint16
    assert not store.train.tokens.flags.writeable


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    """Above 65,536 ids tokens are uint32, and an id above that limit survives."""
    inner = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 70_000)}}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(tmp_path / "tok")
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"w{i} w{69_999 - i} " * 20} for i in range(1, 20)])
    store = build_store(config(tmp_path / "a.jsonl", tokenizer={"path": str(tmp_path / "tok")}), 1, tmp_path / "s")
    assert store.train.tokens.dtype == store.validation.tokens.dtype == np.uint32
    found = np.unique(np.concatenate([store.train.tokens, store.validation.tokens]))
    assert found.tolist() == [0, *range(1, 20), *range(69_980, 69_999)]


def test_documents_added_elsewhere_leave_the_split_alone(tmp_path: Path) -> None:
    """What was held out stays held out, and what trained still trains, when files are added before and after."""
    corpus(tmp_path / "x")
    settings: dict[str, Any] = {"tokenizer": {"path": str(tmp_path / "tok")}}
    byte_bpe().save(tmp_path / "tok")
    before = build_store(config(tmp_path / "x", **settings), 5, tmp_path / "s")
    write_jsonl(tmp_path / "x" / "0-first.jsonl", rows(20, first=200))
    write_jsonl(tmp_path / "x" / "z-last.jsonl", rows(20, first=300))
    after = build_store(config(tmp_path / "x", **settings), 5, tmp_path / "t")
    assert set(documents(before, "validation")) < set(documents(after, "validation"))
    assert set(documents(before, "train")) < set(documents(after, "train"))
    other = build_store(config(tmp_path / "x", **settings), 6, tmp_path / "u")
    assert set(documents(other, "validation")) != set(documents(after, "validation"))


def test_a_bpe_sees_the_training_part_alone(tmp_path: Path) -> None:
    """A word that fills the validation documents, and them alone, is not learnt; in the training part it is."""
    write_jsonl(tmp_path / "t.jsonl", rows(30))
    write_jsonl(tmp_path / "v.jsonl", [{"text": "quixotry " * 50} for _ in range(30)])
    held_out = build_store(
        config(tmp_path / "t.jsonl", validation_sources=(str(tmp_path / "v.jsonl"),)), 0, tmp_path / "s"
    )
    seen = build_store(config(tmp_path, tokenizer={"bpe_vocab_size": 300}), 0, tmp_path / "u")
    word = "Ġquixotry"
    assert word in seen.tokenizer.hf.get_vocab()
    assert word not in held_out.tokenizer.hf.get_vocab()


def test_validation_sources_are_the_validation_part(tmp_path: Path) -> None:
    """Nothing else is held out then, and the seed does not matter."""
    write_jsonl(tmp_path / "t.jsonl", rows(30))
    write_jsonl(tmp_path / "v.jsonl", rows(5, first=100))
    changed = config(tmp_path / "t.jsonl", validation_sources=(str(tmp_path / "v.jsonl"),))
    store = build_store(changed, 0, tmp_path / "s", shard_bytes=SMALL)
    assert documents(store, "train") == [row["text"] for row in rows(30)]
    assert documents(store, "validation") == [row["text"] for row in rows(5, first=100)]
    assert store_folder(changed, 0, tmp_path) == store_folder(changed, 9, tmp_path)


@pytest.mark.parametrize("limit", [3000, 5000])
def test_max_tokens_cuts_before_the_document_that_exceeds_it(tmp_path: Path, limit: int) -> None:
    """The training part is the longest run of whole documents within the limit, for any workers and shards."""
    byte_bpe().save(tmp_path / "tok")
    settings: dict[str, Any] = {"tokenizer": {"path": str(tmp_path / "tok")}, "validation_share": 0.3}
    whole = build_store(config(corpus(tmp_path / "x"), **settings), 3, tmp_path / "all")
    ends = np.flatnonzero(whole.train.tokens == whole.tokenizer.eos_id) + 1
    expected = whole.train.tokens[: ends[ends <= limit][-1]]
    for workers, shard_bytes in ((1, SMALL), (3, SMALL), (2, 1 << 20)):
        cut = build_store(
            config(tmp_path / "x", max_tokens=limit, workers=workers, **settings),
            3,
            tmp_path / f"{workers}",
            shard_bytes=shard_bytes,
        )
        assert np.array_equal(cut.train.tokens, expected)
        n = cut.validation.n_tokens
        assert np.array_equal(cut.validation.tokens, whole.validation.tokens[:n])
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_progress_tells_all_stages(tmp_path: Path) -> None:
    """Stages come in order; numbers only rise within one; a text's bytes reach the known total."""
    seen: list[Progress] = []
    corpus(tmp_path / "x")
    store = build_store(config(tmp_path / "x", workers=2), 3, tmp_path / "s", seen.append, shard_bytes=SMALL)
    stages = [p.stage for p in seen]
    assert list(dict.fromkeys(stages)) == ["train tokenizer", "tokenize", "assemble"]
    for stage in dict.fromkeys(stages):
        of_it = [p for p in seen if p.stage == stage]
        assert len(of_it) > (0 if stage == "train tokenizer" else 5)
        for name in ("documents", "bytes", "tokens"):
            values = [getattr(p, name) for p in of_it]
            assert values == sorted(values)
        assert of_it[-1].documents == 63
        if stage != "assemble":
            assert of_it[-1].bytes == of_it[-1].total_bytes
    assert seen[-1].tokens == store.train.n_tokens + store.validation.n_tokens
    seen.clear()
    build_store(config(tmp_path / "x"), 3, tmp_path / "s", seen.append)
    assert seen == []


def test_a_complete_store_stands_alone(tmp_path: Path) -> None:
    """It opens without its sources and is not touched again."""
    source = corpus(tmp_path / "x")
    build_store(config(source), 3, tmp_path / "s")
    before = contents(tmp_path / "s")
    source.rename(tmp_path / "gone")
    assert build_store(config(source), 3, tmp_path / "s").train.n_tokens > 0
    assert contents(tmp_path / "s") == before


def test_a_store_of_other_settings_or_sources_is_an_error(tmp_path: Path) -> None:
    """Each names what differs: a setting, the seed, the sources, the tokenizer's folder."""
    source = corpus(tmp_path / "x")
    byte_bpe().save(tmp_path / "tok")
    settings: dict[str, Any] = {"tokenizer": {"path": str(tmp_path / "tok")}}
    build_store(config(source, **settings), 3, tmp_path / "s")
    with pytest.raises(DataError, match=r"data\.validation_share=0\.2, now it is 0\.3; delete"):
        build_store(config(source, validation_share=0.3, **settings), 3, tmp_path / "s")
    with pytest.raises(DataError, match="seed=3, now it is 4"):
        build_store(config(source, **settings), 4, tmp_path / "s")
    with pytest.raises(DataError, match=r"data\.tokenizer="):
        build_store(config(source), 3, tmp_path / "s")
    inner = byte_bpe()
    inner.hf.add_tokens(["<new>"])
    inner.save(tmp_path / "tok")
    with pytest.raises(DataError, match=r"tokenizer in .* has changed"):
        build_store(config(source, **settings), 3, tmp_path / "s")
    byte_bpe().save(tmp_path / "tok")
    (source / "t1.txt").write_text("another text")
    with pytest.raises(DataError, match=r"sources have changed .*'t1\.txt'"):
        build_store(config(source, **settings), 3, tmp_path / "s")
    (source / "t1.txt").unlink()
    with pytest.raises(DataError, match="sources have changed"):
        build_store(config(source, **settings), 3, tmp_path / "s")


def test_the_folder_of_a_store_follows_from_what_decides_its_bytes(tmp_path: Path) -> None:
    """`data.store` wins; else what changes bytes changes the folder, and what does not, does not."""
    base = store_folder(config("x"), 0, tmp_path)
    assert base.parent == tmp_path / "tokens"
    assert store_folder(config("x", workers=3, seq_len=99, document_mask=True), 0, tmp_path) == base
    others = [
        store_folder(config("y"), 0, tmp_path),
        store_folder(config("x"), 1, tmp_path),
        store_folder(config("x", max_tokens=5), 0, tmp_path),
        store_folder(config("x", text_field="t"), 0, tmp_path),
        store_folder(config("x", tokenizer={"bpe_vocab_size": 301}), 0, tmp_path),
    ]
    assert len({base, *others}) == 6
    assert store_folder(config("x", store=tmp_path / "mine"), 0, tmp_path) == tmp_path / "mine"


@pytest.mark.parametrize("name", ["train.bin", "validation.bytes", "tokenizer/tokenizer.json"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    """A flipped byte fails the checksum, a cut file and a missing file the size; the file is named."""
    build_store(config(corpus(tmp_path / "x")), 3, tmp_path / "s")
    path = tmp_path / "s" / name
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(DataError, match=f"checksum of {name} is wrong; delete the folder"):
        TokenStore.open(tmp_path / "s")
    TokenStore.open(tmp_path / "s", verify=False)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=f"{name} has {len(good) - 1} bytes instead of {len(good)}"):
        TokenStore.open(tmp_path / "s", verify=False)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        build_store(config(tmp_path / "x"), 3, tmp_path / "s")


def test_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    """An empty folder, a broken manifest, another format, and a folder of other files are each told apart."""
    with pytest.raises(DataError, match="no complete token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(DataError, match="format 99"):
        TokenStore.open(tmp_path)
    corpus(tmp_path / "x")
    with pytest.raises(DataError, match=r"is no token store \(it holds 'a\.jsonl'\)"):
        build_store(config(tmp_path / "x"), 3, tmp_path / "x")
    assert not (tmp_path / "x" / "plan.json").exists()


def test_too_little_text_is_one_clear_line(tmp_path: Path) -> None:
    """No document, none with a token, too few for one sequence, none to validate on, and a limit that is too small."""
    byte_bpe().save(tmp_path / "tok")
    settings: dict[str, Any] = {"tokenizer": {"path": str(tmp_path / "tok")}}
    write_jsonl(tmp_path / "none.jsonl", [])
    write_jsonl(tmp_path / "few.jsonl", rows(1))
    write_jsonl(tmp_path / "many.jsonl", rows(40))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("none.jsonl", settings, "data.sources hold no text"),
        ("none.jsonl", {}, "no training document to train a tokenizer on"),
        ("few.jsonl", settings, "validation part has 0 documents with 0 tokens.*data.validation_share"),
        ("many.jsonl", {**settings, "seq_len": 10**6}, "training part has .* fewer than one sequence of data.seq_len"),
        ("many.jsonl", {**settings, "max_tokens": 5}, "data.max_tokens=5 is less than the first training document"),
    ]
    for number, (name, changes, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            build_store(config(tmp_path / name, **changes), 0, tmp_path / f"s{number}")
    only = config(tmp_path / "many.jsonl", validation_sources=(str(tmp_path / "few.jsonl"),), seq_len=600, **settings)
    with pytest.raises(
        DataError, match=r"validation part has 1 documents .* give more text in data\.validation_source"
    ):
        build_store(only, 0, tmp_path / "only")


def test_a_wrong_field_is_found_before_any_work(tmp_path: Path) -> None:
    """A field that only the last file lacks is named before anything is tokenized."""
    corpus(tmp_path / "x")
    write_jsonl(tmp_path / "x" / "z.jsonl", [{"body": "x"}])
    seen: list[Progress] = []
    with pytest.raises(DataError, match=r"z\.jsonl:1: no field"):
        build_store(config(tmp_path / "x"), 0, tmp_path / "s", seen.append, shard_bytes=SMALL)
    assert seen == []


@pytest.mark.parametrize("tokenizer", ["folder", "bpe"])
def test_a_mended_source_takes_the_build_up_again(tmp_path: Path, tokenizer: str) -> None:
    """A broken line far on stops the build; mended, the shards before it are kept and the bytes are as from scratch."""
    byte_bpe().save(tmp_path / "tok")
    chosen = {"path": str(tmp_path / "tok")} if tokenizer == "folder" else {"bpe_vocab_size": 300}
    settings = config(corpus(tmp_path / "x"), tokenizer=chosen)
    last = tmp_path / "x" / "b" / "more.jsonl"
    good = last.read_text()
    last.write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"more\.jsonl:31: this line is not JSON"):
        build_store(settings, 3, tmp_path / "s", shard_bytes=SMALL)
    last.write_text(good + json.dumps({"text": "mended"}) + "\n")
    seen: list[Progress] = []
    build_store(settings, 3, tmp_path / "s", seen.append, shard_bytes=SMALL)
    kept = next(p for p in seen if p.stage == "tokenize").documents
    assert kept > 10 if tokenizer == "folder" else kept == 0
    build_store(settings, 3, tmp_path / "fresh", shard_bytes=SMALL)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


def test_a_begun_build_of_other_settings_is_an_error(tmp_path: Path) -> None:
    """What was begun with other settings is not mixed with this build."""
    source = corpus(tmp_path / "x")
    last = write_jsonl(source / "z.jsonl", rows(1))
    last.write_text(last.read_text() + "{broken\n")
    with pytest.raises(DataError, match="not JSON"):
        build_store(config(source), 3, tmp_path / "s", shard_bytes=SMALL)
    with pytest.raises(DataError, match="had other settings; to start again delete"):
        build_store(config(source, validation_share=0.3), 3, tmp_path / "s", shard_bytes=SMALL)


def test_a_damaged_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard file that cannot be read is redone, not trusted and not fatal."""
    settings = config(corpus(tmp_path / "x"))
    build_store(settings, 3, tmp_path / "fresh", shard_bytes=SMALL)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build.Build, "_assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            build_store(settings, 3, tmp_path / "s", shard_bytes=SMALL)
    shard = tmp_path / "s" / "shards" / "00000002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    build_store(settings, 3, tmp_path / "s", shard_bytes=SMALL)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space while a shard is flushed: the file is named, what was done is kept, a second try succeeds."""
    settings = config(corpus(tmp_path / "x"))
    flush, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        with pytest.raises(DataError, match=r"safetensors: cannot be written .No space left on device.*run again"):
            build_store(settings, 3, tmp_path / "s", shard_bytes=SMALL)
    seen: list[Progress] = []
    build_store(settings, 3, tmp_path / "s", seen.append, shard_bytes=SMALL)
    assert next(p for p in seen if p.stage == "tokenize").documents > 0
    build_store(settings, 3, tmp_path / "fresh", shard_bytes=SMALL)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


def test_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOKENIZERS_PARALLELISM is set while workers run and given back, set or unset."""
    corpus(tmp_path / "x")
    during: list[str | None] = []
    for number, value in enumerate((None, "true")):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)

        def note(p: Progress) -> None:
            if p.stage == "tokenize" and p.documents:
                during.append(os.environ.get("TOKENIZERS_PARALLELISM"))

        build_store(config(tmp_path / "x"), 3, tmp_path / f"s{number}", note, shard_bytes=SMALL)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
    assert set(during) == {"false"}
