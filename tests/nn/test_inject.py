"""Targets: what is found, what is refused, and that a typing mistake gets its nearest names."""

from __future__ import annotations

import pytest
from models_for_tests import MODELS, tiny_bert, tiny_gpt2, tiny_llama, tiny_mlp
from torch import nn

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
