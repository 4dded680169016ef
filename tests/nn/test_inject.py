"""Targets: what is found, what is refused, and that a typing mistake gets its nearest names."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import MODELS, VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5, token_ids
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import trimtab
from trimtab.errors import TargetError
from trimtab.nn.inject import find_targets, parameter_roles

COUNTS = {"llama": 14, "gpt2": 8, "bert": 12, "t5": 2 * 6 + 2 * 10, "mlp": 2, "encoder": 4}


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_takes_the_blocks_and_not_the_head(family: str) -> None:
    """Every linear of the blocks and nothing else; in a model without a known head, every linear."""
    found = find_targets(MODELS[family](), "all-linear")
    assert len(found) == COUNTS[family]
    assert not any(part in name for name in found for part in ("lm_head", "classifier", "pooler"))


def test_a_list_is_of_endings_and_a_string_is_a_pattern() -> None:
    """Endings match whole name parts; a pattern matches whole names."""
    model = tiny_llama()
    assert len(find_targets(model, ["q_proj", "mlp.up_proj"])) == 4
    assert list(find_targets(model, r".*\.0\.self_attn\.[qv]_proj")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    assert list(find_targets(model, ["lm_head"])) == ["lm_head"]
    assert len(find_targets(model, "all-linear", exclude=["down_proj", "layers.0.self_attn.q_proj"])) == 11


@pytest.mark.parametrize("targets", [["qproj"], "qproj", ["proj"], ["q_prj", "v_proj"]])
def test_no_match_lists_the_closest_names(targets: str | list[str]) -> None:
    """An ending that matches nothing is an error even when another one matches; q_proj is offered."""
    with pytest.raises(TargetError, match=r"the closest names are .*_proj"):
        find_targets(tiny_llama(), targets)


def test_other_mistakes_are_named() -> None:
    """Not linear, not a pattern, an empty list, everything excluded, nothing there, a tied head."""
    model = tiny_llama()
    for targets, exclude, message in [
        (["embed_tokens"], (), "a Embedding|an Embedding|Embedding, which is no nn.Linear"),
        ("(q_proj", (), "not a regular expression"),
        ([], (), "empty list"),
        (["q_proj"], ("q_proj",), "leaves none"),
        ("all-linear", ("proj",), "exclude: 'proj' matches no linear layer"),
    ]:
        with pytest.raises(TargetError, match=message):
            find_targets(model, targets, exclude)
    with pytest.raises(TargetError, match="no linear layers"):
        find_targets(nn.Sequential(nn.Conv2d(1, 1, 1)), "all-linear")
    with pytest.raises(TargetError, match="tied"):
        find_targets(tiny_gpt2(), ["lm_head"])


def test_roles() -> None:
    """Embeddings, norms, heads and the rest; a tied tensor once, with both roles."""
    llama = parameter_roles(tiny_llama())
    assert llama["model.embed_tokens.weight"] == {"embedding"}
    assert llama["model.norm.weight"] == {"norm"}
    assert llama["lm_head.weight"] == {"head"}
    assert llama["model.layers.1.mlp.up_proj.weight"] == {"base"}
    gpt2 = parameter_roles(tiny_gpt2())
    assert gpt2["transformer.wte.weight"] == {"embedding", "head"} and "lm_head.weight" not in gpt2
    bert = parameter_roles(tiny_bert())
    assert bert["bert.embeddings.LayerNorm.weight"] == {"norm"}
    assert bert["classifier.bias"] == {"head"}
    assert parameter_roles(tiny_mlp())["norm.bias"] == {"norm"}


def resized_t5() -> nn.Module:
    model = tiny_t5()
    model.resize_token_embeddings(VOCAB + 7)
    return model


def resized_bart() -> nn.Module:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    parts = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 48))
    }
    model = BartForConditionalGeneration(BartConfig(**sizes, **parts))
    model.resize_token_embeddings(VOCAB + 7)
    return model


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.again = self.first
        self.own = nn.Linear(8, VOCAB)
        self.lm_head = self.own

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.again(self.first(self.embed(input_ids))))


def test_a_module_under_several_names_has_its_roles() -> None:
    """T5 and BART share the module of their embeddings once it was resized; a role is that of any of the names."""
    for make, embedding in ((resized_t5, "shared.weight"), (resized_bart, "model.shared.weight")):
        roles = parameter_roles(make())
        assert "embedding" in roles[embedding]
        assert not any("embed_tokens" in name for name in roles)
    roles = parameter_roles(Twice())
    assert roles["first.1.weight"] == {"norm"} and roles["own.weight"] == {"head"}
    assert not any(name.startswith(("again.", "lm_head.")) for name in roles)
    assert "own" not in find_targets(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), Twice()), "all-linear")


@pytest.mark.parametrize("make", [resized_t5, resized_bart, Twice])
def test_a_model_with_a_module_under_several_names_trains(make: type[nn.Module]) -> None:
    """An adapter goes on, trains what shares a module once, and comes off again."""
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = "all-linear" if make is not Twice else ("embed",)
    adapter = trimtab.attach(
        model, trimtab.LoRA(rank=4, targets=targets, train_also=("norms", "head")), keep_base="host"
    )
    ids, extra = token_ids(), {} if make is Twice else {"decoder_input_ids": token_ids()}
    out = model(input_ids=ids, **extra)
    (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
    trained = [entry.parameter for entry in adapter.trainable()]
    assert len({id(p) for p in trained}) == len(trained) and all(p.grad is not None for p in trained)
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
