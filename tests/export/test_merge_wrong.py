"""`trimtab merge` with wrong inputs, a full disk, an interruption: one line each, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import merged, save, trained_adapter
from models_for_tests import VOCAB, tiny_llama
from safetensors.torch import load_file, save_file

import trimtab
from trimtab.export.merge import merge_checkpoint


def truncated(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def tampered_header(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[20:40] = b"\xff" * 20
    file.write_bytes(raw)


def long_header(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def shard(folder: Path) -> dict[str, str]:
    save(tiny_llama(), folder / "base", max_shard_size="20KB")
    (folder / "base" / "model.safetensors").unlink(missing_ok=True)
    return json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]


def remap(folder: Path, where: str) -> None:
    weight_map = shard(folder)
    weight_map["lm_head.weight"] = where
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def out_of_folder(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(VOCAB, 32)}, folder / "secret.safetensors")
    remap(folder, "../secret.safetensors")


def absolute(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(VOCAB, 32)}, folder / "secret.safetensors")
    remap(folder, str(folder / "secret.safetensors"))


def link_out(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "base" / "model.safetensors").symlink_to("../elsewhere.safetensors")


def linked_tokenizer(folder: Path) -> None:
    (folder / "secret.json").write_text("{}")
    (folder / "base" / "tokenizer.json").symlink_to(folder / "secret.json")


def adapter_link(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "adapter" / "adapter_model.safetensors").symlink_to("../elsewhere.safetensors")


def nul_in_a_name(folder: Path) -> None:
    remap(folder, "a\0b.safetensors")


def long_name(folder: Path) -> None:
    remap(folder, "a" * 300 + ".safetensors")


def one_architecture(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures="LlamaForCausalLM")


def architecture_number(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures=[5])


def old_names(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.gamma"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)


def missing_shard(folder: Path) -> None:
    shard(folder)
    next((folder / "base").glob("model-00002*")).unlink()


def wrong_map(folder: Path) -> None:
    remap(folder, "model-00001-of-00009.safetensors")
    weight_map = json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    first = sorted(set(weight_map.values()) - {"model-00001-of-00009.safetensors"})[0]
    remap(folder, first)


def broken_index(folder: Path) -> None:
    shard(folder)
    (folder / "base" / "model.safetensors.index.json").write_text("[1, 2")


def only_pickles(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")


def pickle_shard(folder: Path) -> None:
    (folder / "base" / "x.bin").touch()
    remap(folder, "x.bin")


def other_shapes(folder: Path) -> None:
    save(tiny_llama(hidden_size=48), folder / "base")


def config_lies(folder: Path) -> None:
    change(folder / "base" / "config.json", intermediate_size=64)


def lacks_a_tensor(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def another_base(folder: Path) -> None:
    save(tiny_llama(seed=9), folder / "base")


def own_code(folder: Path) -> None:
    change(folder / "base" / "config.json", model_type="mine", architectures=["Mine"], auto_map={"AutoModel": "m.M"})


def unknown_class(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures=["MyLlama"])


def not_a_model_class(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures=["pipeline"])


def quantised(folder: Path) -> None:
    change(folder / "base" / "config.json", quantization_config={"quant_method": "gptq"})


def no_config(folder: Path) -> None:
    (folder / "base" / "config.json").unlink()


def no_base(folder: Path) -> None:
    (folder / "base").rename(folder / "gone")


def truncated_adapter(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def no_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_config.json").unlink()


def newer_peft(folder: Path) -> None:
    change(folder / "adapter" / "adapter_config.json", peft_type="TOMORROW")


def out_in_use(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").touch()


def out_is_a_file(folder: Path) -> None:
    (folder / "out").touch()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WRONG = [
    (truncated, "model.safetensors is damaged"), (tampered_header, "model.safetensors is damaged"),
    (long_header, "model.safetensors is damaged"), (out_of_folder, "leads out of the folder"),
    (absolute, "leads out of the folder"), (link_out, "leads out of the folder"),
    (linked_tokenizer, "leads out of the folder"), (missing_shard, "lacks model-00002"),
    (wrong_map, "does not fit the files beside it"), (broken_index, "index.json cannot be read"),
    (only_pickles, "only pickled weights"), (pickle_shard, "only .safetensors files are read"),
    (other_shapes, "of another base"), (config_lies, "by config.json"), (lacks_a_tensor, "model.norm.weight first"),
    (another_base, "of another base"), (own_code, "its config.json gives no model"),
    (unknown_class, "has no model class 'MyLlama'"), (not_a_model_class, "has no model class 'pipeline'"),
    (quantised, "holds quantised weights"), (no_config, "config.json is missing"), (no_base, "there is no folder"),
    (truncated_adapter, "adapter_model.safetensors is damaged"), (no_adapter, "adapter_config.json is missing"),
    (adapter_link, "leads out of the folder"), (nul_in_a_name, "can be no file's name"),
    (long_name, "can be no file's name"), (one_architecture, "architectures = 'LlamaForCausalLM'"),
    (architecture_number, r"architectures = \[5\]"), (old_names, "save_pretrained first"),
    (newer_peft, "TOMORROW"), (out_in_use, "exists and is not empty"), (out_is_a_file, "exists and is no folder"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_wrong_inputs_are_one_line_and_leave_nothing(spoil: object, message: str, tmp_path: Path) -> None:
    """Each is one of our errors in one line that says what is wrong, and no file is left or changed."""
    save(tiny_llama(), tmp_path / "base")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    spoil(tmp_path)  # type: ignore[operator]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(trimtab.TrimtabError, match=message) as said:
        merged(tmp_path)
    assert "\n" not in str(said.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    """An entry of 1e6, in a weight that the adapter changes or in another one, is no infinity in the result."""
    save(tiny_llama().bfloat16(), tmp_path / "base")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    plain = load_file(tmp_path / "base" / "model.safetensors")
    merged(tmp_path, dtype=torch.float16)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors = {key: tensor.clone() for key, tensor in plain.items()}
        tensors[name][-1] = 1e6
        save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(trimtab.CheckpointError, match=rf"{name} has entries too large for fp16.*--dtype bf16"):
            merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype=torch.float16)
        assert not (tmp_path / "half").exists()
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / name, dtype=torch.bfloat16)


def test_paths_are_texts_or_paths_and_out_lies_in_neither_source(tmp_path: Path) -> None:
    """Plain strings do; an OUT in the base's or the adapter's folder is refused, through a link as well."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save(tiny_llama(), base)
    trained_adapter("llama", base, adapter)
    (tmp_path / "link").symlink_to(base)
    for out in (base / "sub", adapter / "sub", tmp_path / "link" / "sub"):
        with pytest.raises(trimtab.ConfigError, match="lies in the folder of the"):
            merge_checkpoint(str(base), str(adapter), str(out))
        assert not out.exists()
    assert merge_checkpoint(str(base), str(adapter), str(tmp_path / "out")).changed


def test_a_hub_name_without_a_network_says_so(tmp_path: Path) -> None:
    """Offline, a name that is no folder is one line; a name that can be none is said to be no folder."""
    for name, message in [("someone/no-such-model", "the hub cannot be reached"), ("./none", "there is no folder")]:
        with pytest.raises(trimtab.ConfigError, match=message) as said:
            merge_checkpoint(name, tmp_path / "adapter", tmp_path / "out")
        assert "\n" not in str(said.value)


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot folder is made of links to blobs beside it; these do not lead out."""
    save(tiny_llama(), tmp_path / "plain")
    trained_adapter("llama", tmp_path / "plain", tmp_path / "adapter")
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for path in (tmp_path / "plain").iterdir():
        path.rename(repo / "blobs" / f"x{path.name}")
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/x{path.name}")
    merge_checkpoint(str(repo / "snapshots" / "abc"), tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the base's own files is not put down to OUT."""
    import trimtab.export.merge as engine

    save(tiny_llama(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(engine.shutil, "copyfile", refuse)
    with pytest.raises(trimtab.CheckpointError, match=r"json: Permission denied; .*out was not written"):
        merged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing stops in the second of several files, neither OUT nor a torn folder is left."""
    import trimtab.export.merge as engine

    shard(tmp_path)
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    plain, calls = engine.stream_tensors, []

    def fail(*args: object) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise failure
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "stream_tensors", fail)
    before = sorted(tmp_path.rglob("*"))
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else trimtab.CheckpointError
    with pytest.raises(expected):
        merged(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "torn").touch()
    merged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "adapter", "base", "out"]
    assert (tmp_path / ".out.tmp" / "torn").is_file()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "base").stat().st_mode
