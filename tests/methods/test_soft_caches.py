"""A cache of keys and values belongs to the virtual tokens that it begins with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, tiny_llama, token_ids
from torch import Tensor, nn
from transformers import DynamicCache

import trimtab

CONFIGS = {"prompt": trimtab.PromptTuning(length=3), "prefix": trimtab.PrefixTuning(length=3)}


def call(model: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_that_another_began_is_refused(config: str) -> None:
    """Of the base alone, of another prompt of the same length, or from within disabled(); without any mask, too."""
    model, ids = tiny_llama().eval(), token_ids()
    old = [call(model, ids[:, :8], use_cache=True).past_key_values]
    adapter = trimtab.attach(model, CONFIGS[config])
    with adapter.disabled():
        old.append(call(model, ids[:, :8], use_cache=True).past_key_values)
    trimtab.attach(model, CONFIGS[config], name="other")
    old.append(call(model, ids[:, :8], use_cache=True).past_key_values)
    trimtab.activate(model, "default")
    for cache in old:
        with pytest.raises(trimtab.ConfigError, match=r"no mask: the cache was not made with the 3 virtual tokens"):
            call(model, ids[:, 8:], past_key_values=cache)


@pytest.mark.parametrize("given", ["none", "empty", "without use_cache"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_of_ones_own_goes_on(config: str, given: str) -> None:
    """Begun by the model or handed over empty, copied, reordered as beams are, cut: still the adapter's."""
    model, ids = tiny_llama().eval(), token_ids()
    trimtab.attach(model, CONFIGS[config])
    whole = call(model, ids).logits
    own = {} if given == "none" else {"past_key_values": DynamicCache(config=model.config)}
    cache = call(model, ids[:, :8], use_cache=given != "without use_cache", **own).past_key_values
    cache = copy.deepcopy(own.get("past_key_values", cache))
    cache.reorder_cache(torch.arange(len(ids)))
    cache.crop(-2)
    rest = call(model, ids[:, 6:], past_key_values=cache).logits
    assert torch.allclose(rest, whole[:, 6:], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("config", CONFIGS)
def test_beams_keep_their_cache(config: str, family: str) -> None:
    """Beam search, which reorders the cache, gives what it gives without one."""
    model, ids = MODELS[family]().eval(), token_ids(rows=2, length=6)
    trimtab.attach(model, CONFIGS[config])
    how = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=ids, **how), model.generate(input_ids=ids, use_cache=False, **how))
