"""`trimtab finetune` on a base in 4 bits: what is held so, what is left, what is refused, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chatmodel_for_tests import save_chat_model, save_chats
from encoder_for_tests import save_encoder
from rich.console import Console
from safetensors.torch import load_file

from trimtab.errors import CheckpointError, ConfigError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.generate import open_generator
from trimtab.loadconfig import load_tree
from trimtab.models import taskmodel
from trimtab.nn.nf4layer import NF4Linear
from trimtab.train.finetune import finetune
from trimtab.train.material import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model with chats, and an encoder with labelled texts."""
    folder = tmp_path_factory.mktemp("parts")
    save_chat_model(folder / "chat-model", dtype=torch.bfloat16)
    save_chats(folder / "chats.jsonl", 24)
    save_chats(folder / "held-out.jsonl", 6, start=24)
    save_encoder(folder / "encoder", ["good", "bad", *(f"w{n}" for n in range(9))])
    rows = [f"w{n % 9} {'good' if n % 2 else 'bad'} w{n // 9},{'yes' if n % 2 else 'no'}" for n in range(60)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def config(folder: Path, out: Path, *words: str, chat: bool = True) -> FinetuneConfig:
    """A few steps of LoRA on NF4, unless the words say another thing."""
    splits = f"train: {folder}/chats.jsonl, validation: {folder}/held-out.jsonl"
    task = f"{{name: chat, {splits}}}" if chat else f"{{name: classification, train: {folder}/texts.csv}}"
    name = folder / ("chat-model" if chat else "encoder")
    given = [f"model.name={name}", f"task={task}", f"out={out}", "device=cpu", "data.seq_len=32", "train.steps=6"]
    given += ["train.batch=8", "model.quantize=nf4", "method={name: lora, rank: 4}", "optim.lr=0.01", "eval.every=3"]
    return load_tree(FinetuneConfig, None, [*given, *words])


QUICKLY = ("eval.every=10", "log.every=1", "optim.lr=0.1")


def run(settings: FinetuneConfig, resume: Path | None = None) -> Any:
    return finetune(settings, resume=resume, console=Console(quiet=True))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that runs have built, as they were built."""
    models: list[Any] = []

    def build(*arguments: Any) -> Any:
        model, new = taskmodel.build_task_model(*arguments)
        models.append(model)
        return model, new

    monkeypatch.setattr("trimtab.train.material.build_task_model", build)
    return models


def in_four_bits(model: Any) -> list[NF4Linear]:
    return [layer for layer in model.modules() if isinstance(layer, NF4Linear)]


@pytest.mark.parametrize(
    "method", ["{name: lora, rank: 4}", "{name: vera, rank: 8}", "{name: read, size: 8}", "bitfit"]
)
@pytest.mark.parametrize("chat", [True, False], ids=["causal", "encoder"])
def test_methods_train_on_a_base_in_four_bits(
    folder: Path, tmp_path: Path, chat: bool, method: str, built: list[Any]
) -> None:
    """All linear layers of the blocks are, heads are not; what is foretold of the weights shows it; the loss falls."""
    rate = "optim.lr=0.02" if "lora" in method else "optim.lr=0.05"
    steps = f"train.steps={20 if chat else 60}"
    if method == "bitfit":
        method = "{name: bitfit, add_bias: true}"
    done = run(config(folder, tmp_path, f"method={method}", steps, "seed=1", *QUICKLY, rate, chat=chat))
    assert done.finished
    assert built[0].config.num_hidden_layers * (7 if chat else 6) <= len(in_four_bits(built[0]))
    events = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.05
    (row,) = json.loads((done.folder / "parameters.json").read_text())["phases"]
    linear = sum(layer.in_features * layer.out_features for layer in in_four_bits(built[0]))
    assert row["memory"]["weights"] < 4 * (row["total"] - linear) + linear
    assert row["total"] > linear


def test_scales_are_quantised_unless_it_says_single(folder: Path, tmp_path: Path, built: list[Any]) -> None:
    """ "nf4" is what trimtab.quantize does by default, "nf4-single" leaves the scales as they are."""
    for kind, doubly in (("nf4", True), ("nf4-single", False)):
        run(config(folder, tmp_path, f"model.quantize={kind}", f"name={kind}", "train.steps=1"))
        assert {layer.doubly for layer in in_four_bits(built[-1])} == {doubly}


def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """Its adapter and its scores are those of a run that was not stopped."""
    whole = run(config(folder, tmp_path, "name=whole"))
    stopped = run(config(folder, tmp_path, "name=parts", "train.stop_at=4"))
    assert not stopped.finished
    again = run(load_tree(FinetuneConfig, stopped.folder / "config.yaml", []), resume=stopped.folder)
    assert again.scores.splits == whole.scores.splits
    ours, theirs = (load_file(done.folder / "adapter" / "adapter_model.safetensors") for done in (again, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ConfigError, match=r"^model.quantize: the run was computed with 'nf4'"):
        run(load_tree(FinetuneConfig, again.folder / "config.yaml", ["model.quantize=null"]), resume=again.folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_merged_is_a_plain_model_in_the_dtype_of_the_run(folder: Path, tmp_path: Path, dtype: str) -> None:
    """transformers loads it, and it has the loss that was reported of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run(config(folder, tmp_path, f"dtype={dtype}", "save=merged", "eval.report=official"))
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "model")
    total, due = 0.0, 0
    for line in (folder / "held-out.jsonl").read_text().splitlines():
        chat = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        start = len(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
        labels = ids.clone()
        labels[:, :start] = labels[:, -1] = -100  # the line break behind the end of the turn is not learned
        count = int((labels >= 0).sum())
        with torch.no_grad():
            total, due = total + count * float(model(input_ids=ids, labels=labels).loss), due + count
    assert total / due == pytest.approx(done.scores.splits["validation"]["loss"], rel=1e-4 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            "{name: full}",
            r"^method.name = full: model\..*.*4 bits and cannot train.* leaves it frozen \(model.quantize = nf4\)$",
        ),
        ("{name: lora, init: pissa}", r"4 bits.*\(model.quantize = nf4\)$"),
        ("{name: lora, warm_start_steps: 2}", r"4 bits.*\(model.quantize = nf4\)$"),
    ],
)
def test_methods_that_train_or_rewrite_the_base_are_refused_before_a_folder_is_made(
    folder: Path, tmp_path: Path, method: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(config(folder, tmp_path, f"method={method}"))
    assert not (tmp_path / "run").exists()


def test_a_file_that_lacks_a_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    """As with a dense base, no weight is drawn in its place."""
    import shutil

    from safetensors.torch import save_file

    broken = shutil.copytree(folder / "chat-model", tmp_path / "chat-model")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not store model\.norm\.weight"):
        run(config(folder, tmp_path, f"model.name={broken}"))


def test_a_checkpoint_in_the_dtype_of_the_run_is_held_in_no_more(
    folder: Path, tmp_path: Path, built: list[Any]
) -> None:
    """bf16 files in a bf16 run stay bf16, so no carry is kept of them; in an fp32 run they are widened."""
    for dtype, held in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        run(config(folder, tmp_path, f"dtype={dtype}", f"name={dtype}", "model.quantize=null", "train.steps=1"))
        assert {p.dtype for p in built[-1].parameters() if not p.requires_grad} == {held}
        (row,) = json.loads((tmp_path / dtype / "parameters.json").read_text())["phases"]
        assert row["memory"]["carry_host"] == 0


def test_what_stays_frozen_is_in_the_dtype_of_the_run_and_what_trains_is_exact(folder: Path, tmp_path: Path) -> None:
    """fp32 files in a bf16 run: no carry beside them, but the head's tensors are the files' own."""
    plain = ["model.quantize=null", "dtype=bf16"]
    settings = config(folder, tmp_path, *plain, chat=False)
    model, files = prepare(settings).model(), load_file(folder / "encoder" / "model.safetensors")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {name for name in dtypes if "pooler" in name or "classifier" in name}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert torch.equal(model.bert.pooler.dense.weight, files["pooler.dense.weight"])
    run(settings)
    (row,) = json.loads((tmp_path / "run" / "parameters.json").read_text())["phases"]
    assert row["memory"]["carry_host"] == 0


def test_a_method_that_writes_into_the_base_later_gets_all_of_it(folder: Path, tmp_path: Path) -> None:
    """Restarts and full-rank steps: the files' fp32 stays."""
    for method in (
        "{name: relora, rank: 4, restart_every: 2}",
        "{name: lora, rank: 4, warm_start_steps: 2}",
        "{name: full}",
    ):
        settings = config(
            folder,
            tmp_path,
            "model.quantize=null",
            "dtype=bf16",
            f"method={method}",
            "schedule.rewarm_steps=1",
            chat=False,
        )
        assert {parameter.dtype for parameter in prepare(settings).model().parameters()} == {torch.float32}


def test_what_was_trained_on_4_bits_writes_on_4_bits(folder: Path, tmp_path: Path) -> None:
    """`trimtab generate RUN` holds the base as the run did, on which its adapter was trained."""
    run(config(folder, tmp_path, "name=a"))
    generator = open_generator(str(tmp_path / "a"))
    assert sum(isinstance(module, NF4Linear) for module in generator.model.modules()) > 0
    assert generator.adapters == ["run"]
