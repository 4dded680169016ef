"""What is given wrong is refused at once, by its name, with advice that can be followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_for_tests import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

import trimtab

LLAMA = ["q_proj", "v_proj"]


def peft_folder(model: Any, folder: Path, **settings: Any) -> Path:
    peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)).save_pretrained(str(folder))
    return folder


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(trimtab.CheckpointError) as said:
        trimtab.load_adapter(model, folder)
    text = str(said.value)
    assert text.startswith(f"{folder}: ") and "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whose", ["ours", "peft"])
def test_an_adapter_of_another_architecture(whose: str, tmp_path: Path) -> None:
    """The folder, that it is of another base, and where names tell it the first missing layer; no inner pattern."""
    folder = tmp_path / "a"
    if whose == "peft":
        peft_folder(tiny_llama(), folder, target_modules=LLAMA)
    else:
        trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(folder)
    for other in (tiny_gpt2(), tiny_bert()):
        text = refusal(other, folder)
        assert "the adapter is of another base" in text
        assert whose == "ours" or f"{type(other).__name__} has no layer model.layers.0.self_attn.q_proj" in text
    text = refusal(tiny_llama(num_hidden_layers=1), folder)
    assert "of another base" in text and (whose == "ours" or "has no layer model.layers.1.self_attn.q_proj" in text)
    assert trimtab.adapters(other) == {}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_tied_side(tmp_path: Path) -> None:
    """T5's table cannot be parted, so nothing is advised that would be refused."""
    text = refusal(tiny_t5(), peft_folder(tiny_t5(), tmp_path / "a", target_modules=["shared", "q"]))
    assert "shared.weight" in text and "PEFT" in text and "untie" not in text and "exclude" not in text


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_alone(tmp_path: Path) -> None:
    """It is named as what it is, with the way to convert it; a run's folder names the adapter's."""
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=LLAMA))
    model.save_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/adapter_model.bin")
    with pytest.raises(trimtab.CheckpointError, match=r"adapter_model.bin is a pickle.*never loaded.*peft.*save_pretr"):
        trimtab.load_adapter(tiny_llama(), tmp_path / "a")
    trimtab.attach(tiny_llama(), trimtab.Bottleneck(size=4)).save(tmp_path / "run" / "adapter")
    with pytest.raises(trimtab.CheckpointError, match=r"a run's folder, and its adapter is .*run/adapter$"):
        trimtab.load_adapter(tiny_llama(), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": True}, "LoRA: rank = True: give a number"),
        ({"rank": "8"}, "LoRA: rank = '8': give a number"),
        ({"alpha": "16"}, "alpha = '16': give a number"),
        ({"dora": "no"}, "dora = 'no': give True or False"),
        ({"dora": 1}, "dora = 1: give True or False"),
        ({"lora_plus": "16"}, "lora_plus = '16': give a number"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern = .*give a number in it"),
        ({"train_also": "head"}, r"train_also = 'head': give a list or a tuple, such as \('head',\)"),
    ],
)
def test_settings_are_of_their_kind(settings: dict[str, Any], message: str) -> None:
    """No value is turned into another kind, whether a class or a mapping is given."""
    with pytest.raises(trimtab.ConfigError, match=message):
        trimtab.LoRA(**settings)
    with pytest.raises(trimtab.ConfigError, match=message):
        trimtab.attach(tiny_llama(), {"name": "lora", **settings})


def test_settings_of_the_right_kind_pass() -> None:
    """Whole numbers for others, lists for tuples, words and None where a field has them."""
    config = trimtab.LoRA(rank=4, alpha=8, train_also=["norms"], targets=["q_proj"], seed=None, lora_plus=2)
    assert (config.alpha, config.lora_plus, config.train_also) == (8.0, 2.0, ("norms",))
    assert trimtab.BitFit(biases="all").biases == "all" and trimtab.BitFit(biases=["query"]).biases == ("query",)
    assert trimtab.PromptTuning(length=2, init="text", text=[1, 2]).text == (1, 2)
    assert trimtab.LoRA(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 1}).alpha_pattern == {"q_proj": 1.0}


def test_calls_with_the_wrong_kind(tmp_path: Path) -> None:
    """Names for models, None for folders, words for numbers."""
    with pytest.raises(trimtab.ConfigError, match=r"model='base': give a torch\.nn\.Module"):
        trimtab.load_adapter("base", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="path=None: give the adapter's folder"):
        trimtab.load_adapter(tiny_llama(), None)  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="name is missing; the methods are"):
        trimtab.attach(tiny_llama(), {"rank": 3})
    with pytest.raises(trimtab.ConfigError, match="pure='no': give True or False"):
        trimtab.attach(tiny_llama(), trimtab.LoRA(), pure="no")  # type: ignore[arg-type]
    for config in (trimtab.LoRA(rank=2), trimtab.ReLoRA(rank=2, restart_every=3), trimtab.AdaLoRA()):
        adapter = trimtab.attach(tiny_llama(), config)
        for total, rewarm in (("10", 0), (10, "3"), (True, 0), (10, -1)):
            with pytest.raises(trimtab.ConfigError, match=r"(total|rewarm)_steps = .*: give a whole number"):
                adapter.restarts(total, rewarm)  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="path=None: give the folder to write"):
        adapter.save(None)  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="double = 'no': give True or False"):
        trimtab.quantize(tiny_llama(), double="no")  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match="double = 'no': give True or False"):
        trimtab.load_quantized(tmp_path, double="no")  # type: ignore[arg-type]
    with pytest.raises(trimtab.ConfigError, match=r"^load_quantized: (nope is|there is) no folder"):
        trimtab.load_quantized("nope")
    with pytest.raises(trimtab.ConfigError, match=r"^load_quantized: there is no folder llama-9n, and"):
        trimtab.load_quantized("llama-9n")
    with pytest.raises(trimtab.ConfigError, match=r"load_quantized: the folder .* has no config\.json"):
        trimtab.load_quantized(tmp_path)


def test_parameter_groups_are_of_a_live_adapter() -> None:
    """Rates are numbers, at least 0; what was merged or detached has nothing that trains."""
    adapter = trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2))
    for wrong in ({"lr": "x"}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": 1e-3, "weight_decay": None}):
        with pytest.raises(trimtab.ConfigError, match=r"parameter_groups: (lr|weight_decay) = .*give a number"):
            adapter.parameter_groups(**wrong)  # type: ignore[arg-type]
    assert adapter.parameter_groups(lr=torch.tensor(1e-3))[0]["lr"] == torch.tensor(1e-3)  # type: ignore[arg-type]
    adapter.detach()
    with pytest.raises(ValueError, match=r"parameter_groups\(\): this adapter was detached"):
        adapter.parameter_groups(lr=1e-3)
    adapter = trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2))
    with pytest.raises(trimtab.ConfigError, match="compute in the dtype that each weight has; leave dtype out"):
        trimtab.attach(adapter.model, trimtab.LoRA(rank=2), name="b", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (trimtab.READ, {"size": 10**7}, "size = 10000000"),
        (trimtab.READ, {"blocks": ()}, "blocks = ()"),
        (trimtab.Ladder, {"blocks": ()}, "blocks = ()"),
    ],
)
def test_a_network_beside_nothing_or_beyond_all_memory(method: Any, settings: dict[str, Any], said: str) -> None:
    """Before a model is asked for."""
    with pytest.raises(trimtab.ConfigError) as error:
        method(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)
