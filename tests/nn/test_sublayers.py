"""Which layers end a block's sublayers."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    OPTConfig,
    OPTModel,
)

import trimtab
from trimtab.nn.sublayers import sublayer_outputs

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def ends(model: nn.Module, *, attention: bool = True) -> list[str]:
    return list(sublayer_outputs(model, attention=attention))


def test_every_family_of_the_tests_has_one_of_each_a_block() -> None:
    """LLaMA, GPT-2, BERT and T5, whose cross-attention is left out."""
    assert [n.partition("layers.0.")[2] for n in ends(tiny_llama())[:2]] == ["self_attn.o_proj", "mlp.down_proj"]
    assert [n.partition("h.1.")[2] for n in ends(tiny_gpt2())[2:]] == ["attn.c_proj", "mlp.c_proj"]
    assert [n.partition("layer.0.")[2] for n in ends(tiny_bert())[:2]] == ["attention.output.dense", "output.dense"]
    t5 = ends(tiny_t5())
    assert t5[4:6] == ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.2.DenseReluDense.wo"]
    assert len(t5) == 8
    assert ends(tiny_t5(), attention=False) == [name for name in t5 if name.endswith(".wo")]
    assert ends(tiny_encoder(), attention=False) == ["encoder.layers.0.linear2", "encoder.layers.1.linear2"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: OPTModel(OPTConfig(**SIZES, ffn_dim=24)), ["self_attn.out_proj", "fc2"]),
        (lambda: GPTNeoXModel(GPTNeoXConfig(**SIZES, intermediate_size=24)), ["attention.dense", "mlp.dense_4h_to_h"]),
        (
            lambda: DistilBertModel(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=11)),
            ["attention.out_lin", "ffn.lin2"],
        ),
        (
            lambda: BartModel(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=11)).decoder,
            ["self_attn.out_proj", "fc2"],
        ),
    ],
)
def test_further_families(model: object, expected: list[str]) -> None:
    """Names that other libraries' models have for the two projections."""
    with torch.device("meta"):
        found = ends(model())  # type: ignore[operator]
    assert sorted(name.split(".0.", 1)[1] for name in found) == sorted(expected)


def test_what_cannot_be_told_is_an_error() -> None:
    """No blocks, a block without its attention's projection, two candidates: each names the way out."""
    with pytest.raises(trimtab.TargetError, match=r"Mlp has no blocks.*targets="):
        sublayer_outputs(tiny_mlp(), attention=False)
    with pytest.raises(trimtab.TargetError, match=r"encoder.layers.0 has 0 layers .* self-attention's .*linear1"):
        sublayer_outputs(tiny_encoder(), attention=True)
    model = tiny_llama()
    model.model.layers[1].mlp.add_module("fc2", nn.Linear(4, 4))
    with pytest.raises(trimtab.TargetError, match=r"layers.1 has 2 layers .* feed-forward's .*mlp.down_proj, mlp.fc2"):
        sublayer_outputs(model, attention=True)
    assert list(sublayer_outputs(tiny_llama(), attention=True, exclude=["o_proj"])) == ends(
        tiny_llama(), attention=False
    )
