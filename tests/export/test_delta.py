"""`export --delta-rank`: W_end - W_start as an adapter that gives the end's logits on the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import everything, is_block_matrix, move, save
from models_for_tests import MODELS, logits, tiny_llama, token_ids
from torch import nn

import trimtab
from trimtab.export.delta import DeltaReport, export_delta
from trimtab.export.sources import find_update

peft = pytest.importorskip("peft")
FAMILIES = ["llama", "gpt2", "bert", "t5"]


def pair(family: str, folder: Path, changes: object = is_block_matrix, **how: object) -> tuple[nn.Module, nn.Module]:
    """Start and end of a training, both on disk."""
    start, end = MODELS[family](), MODELS[family]()
    move(end, changes, **how)  # type: ignore[arg-type]
    save(start, folder / "start")
    save(end, folder / "end")
    return start, end


def export(folder: Path, rank: int, **how: bool) -> DeltaReport:
    update = find_update(str(folder / "end"), str(folder / "start"))
    return export_delta(update, folder / "out", rank, **how)


def in_peft(family: str, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(MODELS[family](), str(folder / "out")).get_base_model()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_end_model(family: str, tmp_path: Path) -> None:
    """With every singular value kept the start plus the adapter answers as the end, whatever was trained."""
    start, end = pair(family, tmp_path, everything)
    report = export(tmp_path, 32, require_all=True)
    assert report.kept == pytest.approx(1.0, abs=1e-9)
    assert all(layer.rank == min(layer.shape) for layer in report.layers)
    assert not report.left_out
    expected, ours = logits(end, token_ids()), MODELS[family]()
    assert (expected - logits(start, token_ids())).abs().max() > 0.1
    assert torch.allclose(logits(in_peft(family, tmp_path), token_ids()), expected, atol=2e-4)
    if family == "t5":  # encoder, decoder and head share one tensor, of which only the head can be parted here
        with pytest.raises(trimtab.ConfigError, match="only a head and an embedding can be parted"):
            trimtab.load_adapter(ours, tmp_path / "out")
        return
    trimtab.load_adapter(ours, tmp_path / "out")
    assert torch.allclose(logits(ours, token_ids()), expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_rank_k_needs_rank_k(family: str, tmp_path: Path) -> None:
    """A LoRA-like update is kept whole at its own rank, and loads here and in PEFT."""
    _, end = pair(family, tmp_path, rank=3)
    report = export(tmp_path, 3)
    assert report.kept == pytest.approx(1.0, abs=1e-9)
    assert not (report.whole or report.biases or report.left_out or report.unknown)
    ours = MODELS[family]()
    trimtab.load_adapter(ours, tmp_path / "out")
    for model in (ours, in_peft(family, tmp_path)):
        assert torch.allclose(logits(model, token_ids()), logits(end, token_ids()), atol=1e-4)


def test_the_dropped_energy_is_what_is_reported(tmp_path: Path) -> None:
    """Each layer keeps what the best rank-k approximation keeps (float64 svd), and the total is their weighted mean."""
    start, end = pair("llama", tmp_path, everything)
    report = export(tmp_path, 5)
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    merged = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out")).merge_and_unload()
    kept = total = 0.0
    for layer in report.layers:
        key = f"{layer.name}.weight"
        delta = after[key].double() - before[key].double()
        values = torch.linalg.svdvals(delta) ** 2
        assert layer.kept == pytest.approx(float(values[:5].sum() / values.sum()), abs=1e-6)
        assert layer.update == pytest.approx(float(delta.norm()), rel=1e-9)
        left = (after[key].double() - merged.get_parameter(key).double()).norm() ** 2
        assert float(left / delta.norm() ** 2) == pytest.approx(1 - layer.kept, abs=1e-5)
        kept, total = kept + float(values[:5].sum()), total + float(values.sum())
    assert report.kept == pytest.approx(kept / total, abs=1e-6)
    assert 0.2 < report.kept < 0.9
    told = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert told["kept"] == report.kept
    assert len(told["layers"]) == len(report.layers) == 14


def test_more_rank_keeps_more_and_comes_nearer(tmp_path: Path) -> None:
    """Kept energy rises with the rank, and the logits come nearer to the end's."""
    _, end = pair("llama", tmp_path)
    gaps, kept = [], []
    for rank in (2, 8, 16, 32):
        report = export_delta(
            find_update(str(tmp_path / "end"), str(tmp_path / "start")), tmp_path / f"out{rank}", rank
        )
        model = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / f"out{rank}"))
        gaps.append(float((logits(model, token_ids()) - logits(end, token_ids())).norm()))
        kept.append(report.kept)
    assert gaps == sorted(gaps, reverse=True)
    assert kept == sorted(kept)
    assert gaps[-1] < 1e-3 < gaps[-2]


def test_what_is_no_linear_layer_is_stored_in_full(tmp_path: Path) -> None:
    """Embeddings, norms and head that trained too are in modules_to_save; what did not train is not."""
    pair("llama", tmp_path, lambda name, p: "q_proj" in name or name in ("model.norm.weight", "lm_head.weight"))
    report = export(tmp_path, 4)
    assert report.whole == {"model.norm": 32, "lm_head": 32 * 97}
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"q_proj"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm", "lm_head"]
    assert config["base_model_name_or_path"] == str(tmp_path / "start")


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    """A changed buffer is reported as left out; with --require-all it is an error and nothing is written."""
    for name, scale in (("start", 1.0), ("end", 2.0)):
        model = tiny_llama()
        if name == "end":
            move(model, is_block_matrix)
        model.model.register_buffer("calibration", torch.full((3,), scale))
        save(model, tmp_path / name)
    import trimtab.export.sources as sources

    plain = sources.meta_model

    def with_buffer(folder: Path, label: str) -> nn.Module:
        model = plain(folder, label)
        model.model.register_buffer("calibration", torch.zeros(3, device="meta"))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "meta_model", with_buffer)
        with pytest.raises(trimtab.ConfigError, match=r"--require-all: 1 changed tensors .* model\.calibration"):
            export(tmp_path, 4, require_all=True)
        assert not (tmp_path / "out").exists()
        assert list(export(tmp_path, 4).left_out) == ["model.calibration"]


def test_a_conv1d_is_turned(tmp_path: Path) -> None:
    """GPT-2 stores (in, out); the report says (out, in) and the factors lie as PEFT wants them."""
    pair("gpt2", tmp_path, rank=2)
    shapes = {layer.name: layer.shape for layer in export(tmp_path, 2).layers}
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)


WRONG = {
    "rank 0": ("end", "start", 0, "--delta-rank 0: the rank must lie between 1 and 32"),
    "rank above the model": ("end", "start", 33, "--delta-rank 33: the rank must lie between 1 and 32"),
    "no start": ("end", None, 4, "is no run folder, so its start is not known; name it with --base"),
    "missing end": ("none", "start", 4, "there is no folder"),
    "missing start": ("end", "none", 4, "there is no folder"),
    "start of another shape": ("end", "wide", 4, "is another model than the end: lm_head.weight is .97, 48. there"),
    "start of another family": ("end", "gpt2", 4, "is another model than the end"),
    "nothing changed": ("start", "start", 4, "start and end have the same linear layers"),
    "not finite": ("nan", "start", 4, "is not finite"),
    "out is in use": ("end", "start", 4, "out exists and is not empty"),
}


@pytest.mark.parametrize(("end", "start", "rank", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_inputs_are_one_line_and_leave_nothing(
    end: str, start: str | None, rank: int, message: str, tmp_path: Path
) -> None:
    """Each mistake is one of our errors, says what is wrong, and leaves no file."""
    pair("llama", tmp_path)
    save(tiny_llama(hidden_size=48), tmp_path / "wide")
    save(MODELS["gpt2"](), tmp_path / "gpt2")
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
    save(broken, tmp_path / "nan")
    if "in use" in message or "not empty" in message:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    base = None if start is None else str(tmp_path / start)
    with pytest.raises(trimtab.TrimtabError, match=message) as said:
        export_delta(find_update(str(tmp_path / end), base), tmp_path / "out", rank)
    assert "\n" not in str(said.value)
    assert sorted(tmp_path.rglob("*")) == before
