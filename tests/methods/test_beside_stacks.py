"""Which blocks a network stands beside: named, repeated, of one stack or two; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SwinConfig,
    SwinForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

import trimtab
from trimtab.nn.stacks import find_stacks

READ = trimtab.READ


def test_a_block_that_a_list_holds_several_times_is_read_each_time() -> None:
    """As torch's recurrence over what its calls give; the backbone gets no graph, and Ladder refuses."""
    model = tiny_llama(num_hidden_layers=3).eval()
    model.model.layers[1] = model.model.layers[2] = model.model.layers[0]
    ids, found = token_ids(), []
    handle = model.model.layers[0].register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    with pytest.raises(trimtab.ConfigError, match="runs a block 3 times"):
        trimtab.attach(model, trimtab.Ladder(reduction=4))
    adapter = trimtab.attach(model, READ(size=8, init="drawn", aggregate="mean"))
    own = {name.rpartition("read.")[2]: p.detach() for name, p in adapter.own().items()}
    layer = nn.RNN(32, 8, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").data.copy_(own[f"cells.0.{name}"])
    stacked = torch.stack(found, dim=2).flatten(0, 1)
    with torch.no_grad():
        h = layer(nn.functional.rms_norm(stacked, (32,), own["cells.0.norm_weight"], 1e-6))[0].mean(1)
        delta = (h @ own["output_weight"].t() + own["output_bias"]).view_as(found[-1])
        wanted = model.lm_head(model.model.norm(found[-1] + delta))
    inputs: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    answer = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)
    assert not any(states.requires_grad for states in inputs)


def test_a_whole_name_wins_over_an_ending() -> None:
    model = nn.Module()
    model.layers, model.sub = nn.ModuleList([nn.Linear(8, 8)]), nn.Module()
    model.sub.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    (stack,) = find_stacks(model, ("layers",))
    assert stack.name == "layers" and stack.calls == 1
    model.other = model.sub
    del model.layers
    model.more = nn.Module()
    model.more.layers = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(trimtab.ConfigError, match="fits 2 lists"):
        find_stacks(model, ("layers",))


NAMED = {
    "the encoder's alone": (("encoder.block",), {"joiner": "none"}, "no blocks of the decoder"),
    "the encoder's alone, joined": (("encoder.block",), {}, "no blocks of the decoder"),
    "the decoder's alone, joined": (("decoder.block",), {}, "no blocks of the encoder"),
    "both without a joiner": (("encoder.block", "decoder.block"), {"joiner": "none"}, "names encoder.block, beside"),
    "one twice": (("decoder.block", "decoder.block.0.layer"), {"joiner": "none"}, "could be any of"),
}


@pytest.mark.parametrize(("blocks", "settings", "message"), NAMED.values(), ids=NAMED.keys())
def test_named_stacks_of_an_encoder_decoder_are_those_that_are_found(
    blocks: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    model = tiny_t5()
    with pytest.raises(trimtab.ConfigError, match=f"blocks.*{message}"):
        trimtab.attach(model, READ(size=8, blocks=blocks, **settings))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("joiner", ["attention", "none"])
def test_named_stacks_may_come_in_any_order(joiner: Any) -> None:
    blocks = ("decoder.block", "encoder.block") if joiner == "attention" else ("decoder.block",)
    found = trimtab.attach(tiny_t5(), READ(size=8, joiner=joiner)).own()
    named = trimtab.attach(tiny_t5(), READ(size=8, joiner=joiner, blocks=blocks)).own()
    assert {name: p.shape for name, p in named.items()} == {name: p.shape for name, p in found.items()}


def test_an_encoder_of_a_model_without_its_decoder_is_a_stack_of_its_own() -> None:
    """As Whisper's for classification, whose config is that of an encoder-decoder."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=16, classifier_proj_size=16, num_labels=2)
    model = WhisperForAudioClassification(config)
    adapter = trimtab.attach(model, READ(size=8))
    features = torch.randn(2, 8, 32)
    model(input_features=features, labels=torch.tensor([0, 1])).loss.backward()
    assert all(e.parameter.grad is not None for e in adapter.trainable())


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, vocab_size=97)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def test_a_stack_with_blocks_behind_it_is_refused() -> None:
    """A vision tower's would need the language model's backward pass; the language model's is the last."""
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8]])
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    model = llava()
    adapter = trimtab.attach(model, READ(size=8, blocks=("language_model.layers",)))
    model(**batch).loss.backward()
    adapter.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    model = llava()
    trimtab.attach(model, READ(size=8, blocks=("vision_tower.encoder.layers",)))
    with pytest.raises(trimtab.ConfigError, match=r"blocks: .*language_model.layers.0 runs behind .*vision"):
        model(**batch)


WIDTHS = {"read": (READ(size=8), "width: block 0 gives .* 16 wide"), "ladder": (trimtab.Ladder(reduction=4), "Swin")}


@pytest.mark.parametrize(("method", "message"), WIDTHS.values(), ids=WIDTHS.keys())
def test_blocks_of_several_widths_are_refused(method: trimtab.Method, message: str) -> None:
    """Of a Swin Transformer a stage halves the tokens and doubles the width."""
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=2, num_labels=3
    )
    model = SwinForImageClassification(config)

    def run() -> None:
        trimtab.attach(model, method)
        model(pixel_values=torch.randn(1, 3, 32, 32))

    with pytest.raises(trimtab.ConfigError, match=message):
        run()


def test_a_module_of_the_networks_name_says_what_to_do() -> None:
    model = tiny_llama()
    model.model.read = nn.Linear(2, 2)
    with pytest.raises(trimtab.ConfigError, match=r"has a 'read' of its own.*rename"):
        trimtab.attach(model, READ(size=8))


def test_a_blocks_forward_that_is_patched_later_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are put into a class of layers when the model is there, also when it wears READ already."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = tiny_llama()
    trimtab.attach(model, trimtab.READ(size=8))
    calls, forward = [], LlamaDecoderLayer.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", patched)
    model(input_ids=token_ids())
    assert calls == list(model.model.layers)
