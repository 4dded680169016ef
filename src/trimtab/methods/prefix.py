"""Prefix tuning (arXiv 2101.00190): p trained keys and values before those of the batch, in every layer.

They enter as the beginning of the KV cache, so they cost no queries and no feed-forward network, and the batch keeps
its length. Grouped-query attention has fewer of them: p * 2 * layers * kv_heads * head_dim numbers. With
`projection` a small network makes them in training; a saved file holds what it makes, and it is gone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.base import Method
from trimtab.methods.soft import SoftPrompt, SoftPromptAdapter
from trimtab.nn.draw import stable_generator
from trimtab.nn.inject import is_linear
from trimtab.nn.precision import compute_dtype_of
from trimtab.nn.residence import Residence
from trimtab.nn.stacks import is_encoder_decoder, part
from trimtab.nn.virtual import VirtualTokens, backbone, name_of, named_arguments, read_shape
from trimtab.nn.weights import shape_of

#: Kinds of layers that keep keys and values of every head.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class PrefixTuning(SoftPrompt):
    """Trained keys and values before the batch's, in every layer.

    Args:
        init: "random": a normal distribution of deviation 1, PEFT's default; "zero": keys and values of zero.
        projection: train embeddings (p, d) and a network d -> `projection_size` -> tanh -> keys and values instead.
        projection_size: width of that network; None is d.
    """

    abstract = False
    name: Literal["prefix"] = "prefix"
    init: Literal["random", "zero"] = "random"
    projection: bool = False
    projection_size: Annotated[int, Field(ge=1)] | None = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_fields: ClassVar[frozenset[str]] = frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"})

    def idle_settings(self) -> dict[str, str]:
        if self.projection or self.projection_size is None:
            return {}
        return {"projection_size": "projection is false"}

    @property
    def no_merge(self) -> str:
        return "a prefix lies in the cache of keys and values and is no part of any weight"

    @property
    def no_checkpointing(self) -> str:
        return _REFUSED

    def _attach(self, model: nn.Module, residence: Residence) -> PrefixTuningAdapter:
        return PrefixTuningAdapter(model, self, residence)

    @classmethod
    def _plain(cls, length: int) -> Method:
        return cls(length=length)


class Geometry:
    """Layers, heads of keys and values, their width, and the width of the hidden states.

    `pairs` says which pair of keys and values each layer reads: its own. In encoder-decoder models PEFT counts the
    pairs in fours, of which the cross-attention's two are dropped, so that layer l of L reads pair 2 l mod L; files
    can be exchanged only if we do so, too.
    """

    def __init__(self, config: Any) -> None:
        paired = bool(getattr(config, "is_encoder_decoder", False))
        count = getattr(config, "decoder_layers", None) if paired else None
        self.layers: int = count or config.num_hidden_layers
        self.pairs = [2 * layer % self.layers if paired else layer for layer in range(self.layers)]
        queries: int = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        self.heads: int = getattr(config, "num_key_value_heads", None) or queries
        self.hidden: int = config.hidden_size
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        self.width: int = width or self.hidden // queries

    @property
    def size(self) -> int:
        """Numbers a virtual token."""
        return 2 * self.layers * self.heads * self.width


class PrefixTuningAdapter(SoftPromptAdapter):
    """Trained keys and values at work on a model."""

    config: PrefixTuning

    def _find_host(self) -> tuple[str, nn.Module]:
        if is_encoder_decoder(self.model):
            host = part(self.model, "decoder")
            name = name_of(self.model, host)
        else:
            name, host = backbone(self.model)
        if "past_key_values" not in inspect.signature(host.forward).parameters:
            raise ConfigError(f"{type(host).__name__} takes no past_key_values, which prefix tuning needs")
        if (switched := _checkpointed(host)) is not None:
            raise ConfigError(f"{_REFUSED}: {switched}; {_WAY_OUT}")
        self.geometry = _geometry(host)
        return name, host

    def _drawn(self) -> dict[str, Tensor]:
        length, size, hidden = self.config.length, self.geometry.size, self.geometry.hidden
        generator = stable_generator(self.config.seed or 0, "prefix")
        zero = self.config.init == "zero"
        if not self.config.projection:
            shape = (length, size)
            return {"prefix": torch.zeros(shape) if zero else torch.randn(shape, generator=generator, device="cpu")}

        def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
            """Weight and bias as torch's nn.Linear draws them."""
            bound = 1.0 / math.sqrt(width)
            drawn = torch.empty(out, width + 1, device="cpu").uniform_(-bound, bound, generator=generator)
            return drawn[:, :-1].clone(), drawn[:, -1].clone()

        embedding = torch.randn(length, hidden, generator=generator, device="cpu")
        middle, middle_bias = linear(inner := self.config.projection_size or hidden, hidden)
        last, last_bias = linear(size, inner)
        if zero:
            last.zero_()
            last_bias.zero_()
        return {
            "prefix_embedding": embedding,
            "prefix_middle": middle,
            "prefix_middle_bias": middle_bias,
            "prefix_last": last,
            "prefix_last_bias": last_bias,
        }

    def _hook(self) -> None:
        fill = _Fill(self._virtual, self.geometry, self._compute_dtype())
        self._before(self.host, fill.before)
        self._after(self.host, fill.after)
        if not is_encoder_decoder(self.model):
            for layer, block in enumerate(_blocks(self.host, self.geometry.layers)):
                self._before(block, _Hand(fill, layer).before)

    def prompt(self) -> Tensor:
        with torch.no_grad():
            return prefix_of(self.host)

    def load(self, saved: Any) -> None:
        if self.config.projection:
            raise CheckpointError("a file holds the keys and values, from which a projection cannot be found again")
        super().load(saved)

    def _checked(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        for key, ours in (("num_attention_heads", self.geometry.heads), ("num_layers", self.geometry.layers)):
            if config.get(key) not in (None, ours):
                raise CheckpointError(
                    f"the adapter is of another base: its {key} is {config[key]}, and the model's keys and values "
                    f"have {ours}"
                )
        return tensor

    def _peft_fields(self) -> dict[str, Any]:
        return {
            "token_dim": self.geometry.heads * self.geometry.width,
            "num_attention_heads": self.geometry.heads,
            "num_layers": self.geometry.layers,
            "num_transformer_submodules": 2 if is_encoder_decoder(self.model) else 1,
            "prefix_projection": False,
            "encoder_hidden_size": self.geometry.hidden,
        }


def prefix_of(host: Any) -> Tensor:
    """The keys and values (p, 2 * layers * kv_heads * head_dim) of a host's parameters."""
    if "prefix" in host._parameters:
        plain: Tensor = host.prefix
        return plain
    h = torch.tanh(F.linear(host.prefix_embedding, host.prefix_middle, host.prefix_middle_bias))
    return F.linear(h, host.prefix_last, host.prefix_last_bias)


def _geometry(host: nn.Module) -> Geometry:
    """What keys and values a model's layers hold.

    Raises:
        ConfigError: the layers differ, or hold something else.
    """
    config: Any = host.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    odd = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    different = getattr(config, "global_head_dim", None)
    latent, one = getattr(config, "kv_lora_rank", None), getattr(config, "multi_query", False)
    if odd or shared or different or latent or one:
        raise ConfigError(
            f"{type(host).__name__}: its layers do not all hold keys and values of one shape, so a prefix has no "
            "one shape for them; use prompt tuning"
        )
    geometry = Geometry(config)
    for name, module in host.named_modules():
        inner = name.rpartition(".")[2] in ("k_proj", "k", "key") and "cross" not in name.lower()
        if inner and is_linear(module) and shape_of(module)[0] != geometry.heads * geometry.width:
            raise ConfigError(
                f"{name} makes keys of {shape_of(module)[0]} numbers, and the model's config says "
                f"{geometry.heads} heads of {geometry.width}; use prompt tuning"
            )
    return geometry


_REFUSED = "prefix tuning does not go with activation checkpointing, under which blocks drop their past keys and values"
_WAY_OUT = "switch it off (model.gradient_checkpointing_disable()), or use prompt tuning"


def _checkpointed(host: nn.Module) -> str | None:
    """The module of a model that is computed twice, if there is one."""
    for name, module in host.named_modules():
        if getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper":
            return f"it is on for {name or type(module).__name__}"
    return None


def _blocks(host: nn.Module, layers: int) -> list[nn.Module]:
    """The blocks of a model: the only list of that many modules in it; none if that is not clear."""
    lists = [m for m in host.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return list(lists[0]) if len(lists) == 1 else []


class _Fill:
    """Begins each cache with the prefix.

    Args:
        dtype: of the keys and values, outside of autocast.
    """

    def __init__(self, virtual: VirtualTokens, geometry: Geometry, dtype: torch.dtype) -> None:
        self.virtual = virtual
        self.geometry = geometry
        self.dtype = dtype
        self._expected = 0
        self._drop = False
        self._cache: Any = None
        self.fresh: Any = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._expected, self._drop, self._cache, self.fresh = 0, False, None, None
        call = named_arguments(module, args, kwargs)
        shape = read_shape(call)
        if shape is None:
            return args, kwargs
        if module.training and (switched := _checkpointed(module)) is not None:
            raise ConfigError(f"{_REFUSED}: {switched}; {_WAY_OUT}")
        sequences, tokens = shape
        self.virtual.check_call(call)
        held = self.virtual.cached(call, tokens)
        self.virtual.check_length((held or self.virtual.length) + tokens)
        if held == 0:
            if call.get("past_key_values") is None:
                config: Any = module.config
                use = call.get("use_cache")
                self._drop = not (use if use is not None else getattr(config, "use_cache", False))
                call["past_key_values"] = _empty_cache(module)
            self._fill(module, call["past_key_values"], sequences)
            self._expected = self.virtual.length + tokens
            self.fresh = call["past_key_values"]
        if call.get("attention_mask") is not None:
            call["attention_mask"] = self.virtual.mask(call["attention_mask"], rows=False)
        if call.get("position_ids") is not None:
            call["position_ids"] = self.virtual.positions(call["position_ids"], rows=False)
        self._cache = call["past_key_values"]
        return (), call

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Make sure that the blocks read the prefix, and give no cache to a caller who wants none."""
        cache, self._cache, self.fresh = self._cache, None, None
        if not self._expected:
            return output
        if int(cache.get_seq_length()) != self._expected:
            raise ConfigError(
                f"{type(module).__name__} did not use the past keys and values that it was given, so the prefix had "
                f"no effect: {_REFUSED}; {_WAY_OUT}"
            )
        if self._drop and getattr(output, "past_key_values", None) is not None:
            output["past_key_values"] = None
        return output

    def _fill(self, module: nn.Module, cache: Any, sequences: int) -> None:
        g, p = self.geometry, self.virtual.length
        flat = prefix_of(module)
        states = flat.view(p, 2 * g.layers, g.heads, g.width).permute(1, 2, 0, 3)  # (2 L, heads, p, head_dim)
        dtype = compute_dtype_of(flat, _dtype_now(module, self.dtype))
        own = getattr(cache, "self_attention_cache", cache)
        for layer, pair in enumerate(g.pairs):
            # Cast after the expansion, so that the sum over the sequences of the gradient is taken in fp32.
            key, value = (s.expand(sequences, -1, -1, -1).to(dtype) for s in states[2 * pair : 2 * pair + 2])
            own.update(key, value, layer)
        self.virtual.begin(cache)


def _dtype_now(host: nn.Module, attached: torch.dtype) -> torch.dtype:
    """What the host computes in: the dtype of a frozen tensor, which `model.to(dtype)` may have changed since.

    What trains is held in fp32 whatever computes, so where nothing is frozen it is the dtype at attach.
    """
    frozen = (p.dtype for p in host.parameters() if p.is_floating_point() and not p.requires_grad)
    return next(frozen, attached)


class _Hand:
    """Hands a block its own layer of a cache that was just begun, in the place of the whole.

    A compiled block would otherwise be compiled anew for each layer, since its guards know how far the cache's other
    layers are.
    """

    def __init__(self, fill: _Fill, layer: int) -> None:
        self.fill = fill
        self.layer = layer

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = self.fill.fresh
        if cache is None or getattr(cache, "offloading", False):
            return args, kwargs
        own = _LayerOfCache(cache, self.layer)
        named = {name: own if value is cache else value for name, value in kwargs.items()}
        return tuple(own if value is cache else value for value in args), named


class _LayerOfCache:
    """One layer of a cache, with the methods of a cache that attention calls."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache = cache
        self.own = cache.layers[layer]

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self.own.update(key, value, *args, **kwargs)
        return both

    def get_seq_length(self, layer: int = 0) -> int:
        return int(self.own.get_seq_length())

    def __getattr__(self, name: str) -> Any:
        if name in ("cache", "own"):
            raise AttributeError(name)
        return getattr(self.cache, name)


def _empty_cache(module: nn.Module) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    config: Any = module.config
    own = DynamicCache(config=config)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return EncoderDecoderCache(own, DynamicCache(config=config))
    return own
