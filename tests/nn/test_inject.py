"""Targets: what is found, what is refused, and that a typing mistake gets its nearest names."""

from __future__ import annotations

import warnings

import pytest
import torch
from models_for_tests import MODELS, VOCAB, tiny_bert, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5, token_ids
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

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


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("embed_token", r"embed_tokens, "),
        ("head_embed", r"lm_head(?!.*embed)"),
    ],
)
def test_embeddings_are_offered_where_they_are_meant(wanted: str, near: str) -> None:
    with pytest.raises(TargetError, match=rf"the closest names are {near}"):
        find_targets(tiny_llama(), [wanted], embeddings=True)


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


def tiny_falcon() -> nn.Module:
    """Its linear layers are of a subclass of nn.Linear, all but the output head."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, bos_token_id=0, eos_token_id=0))


def tiny_mixtral() -> nn.Module:
    """Its experts are two parameters of three dimensions in each block."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=64))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all-linear", "only linear layers are the output head"),
        (r".*query_key_value", "matches no linear layer"),
        (["query_key_value"], "matches transformer.h.0.self_attention.query_key_value"),
        (["qkv"], "matches no linear layer"),
    ],
)
def test_a_subclass_of_linear_that_is_passed_over_is_named(targets: str | list[str], message: str) -> None:
    """The errors say that such layers are there, which class they are of, and why they are not taken."""
    said = rf"(?s){message}.*query_key_value.* FalconLinear, a subclass of nn\.Linear.*forward"
    with pytest.raises(TargetError, match=said):
        find_targets(tiny_falcon(), targets)
    if targets == "all-linear":
        model = tiny_falcon()
        model.lm_head = nn.Identity()  # type: ignore[assignment]
        with pytest.raises(TargetError, match=r"no linear layers to adapt.* FalconLinear, a subclass of nn\.Linear"):
            find_targets(model, targets)
        with pytest.raises(TargetError, match=r"can be quantised.* FalconLinear, a subclass of nn\.Linear"):
            trimtab.quantize(tiny_falcon())


def test_a_layer_that_computes_otherwise_is_no_subclass_that_is_passed_over() -> None:
    """A layer that wears an adapter or a cast is of a class of ours: no message calls it a subclass."""
    model = tiny_mlp()
    trimtab.attach(model, trimtab.Full(), dtype=torch.bfloat16)
    with pytest.raises(TargetError) as caught:
        find_targets(model, ["frist"])
    assert "subclass" not in str(caught.value)


def test_all_linear_says_when_it_leaves_most_of_a_model() -> None:
    """A mixture of experts holds its experts outside of linear layers: attach says the share and the largest left."""
    said = (
        r"all-linear.*hold 14 % of .*MixtralForCausalLM.*mlp\.experts\.gate_up_proj \(4, 96, 32\).*experts\.down_proj"
    )
    with pytest.warns(UserWarning, match=said):
        trimtab.attach(tiny_mixtral(), trimtab.LoRA(rank=4))
    with pytest.warns(UserWarning, match=r"quantize.*hold 14 % of .*mlp\.experts\.gate_up_proj.*stays? as it is"):
        trimtab.quantize(tiny_mixtral())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mlp"])
def test_nothing_is_said_of_a_model_of_linear_layers(family: str) -> None:
    """Whatever is excluded or skipped by its name; layers that are named themselves say nothing either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = MODELS[family]()
        name = list(find_targets(model, "all-linear"))[-1]
        if len(find_targets(model, "all-linear")) > 2:
            trimtab.attach(model, trimtab.LoRA(rank=4, exclude=(name.rpartition(".")[2],))).detach()
        trimtab.attach(model, trimtab.LoRA(rank=4)).detach()
        trimtab.attach(tiny_mixtral(), trimtab.LoRA(rank=4, targets=("q_proj",)))
        trimtab.quantize(model)
        trimtab.attach(model, trimtab.LoRA(rank=4))
