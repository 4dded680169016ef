"""A decoder's frozen cross-attention, applied to values of our own.

Legend: B sequences, Tq tokens of the decoder in a call, Tk of the encoder, j number of a decoder block.

A cross-attention of transformers looks its implementation up by name, `self.config._attn_implementation`, and calls
it with queries, keys, values and mask. While a `Crossing` is put on, a module's `config` is, from the start of its
forward until that look-up, a view of itself that gives another name. What is registered under that name calls the
implementation that the config names, as the module would have done, and returns what it returned; then it calls the
same one again with the same queries, keys and mask, and our values:

    c_j = P_j V'      (B, Tq, heads * head_dim), with a gradient to V' alone (see `probabilities`)

So no family of models is known here, no probabilities are formed that the implementation does not form, and the
cache is neither read nor written: keys arrive as the module has put them together. Nothing about the change lasts
beyond a module's forward: masks, `generate()`, `save_pretrained()` and copies see the model's own config, and
`set_attn_implementation()` works at any time. What lasts are two hooks on each module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.probabilities import Implementation, attend
from trimtab.nn.weights import is_conv1d

#: V' (B, Tk, width) for the states (B, Tk, d) that a cross-attention was called with, or None for no tap in this call.
Values = Callable[[Tensor], Tensor | None]
#: Takes the number of a block and its c (B, Tq, result_width).
Sink = Callable[[int, Tensor], None]

#: The name in transformers' registry.
NAME = "trimtab_crossing"
WAY_OUT = "use READ(joiner='none'), which leaves the cross-attention alone"

#: What tells a cross-attention from a block's self-attention: part of its name within the block, or of its class's.
_CROSS = ("cross", "encdec", "encoder_attn", "encoder_decoder")
#: Arguments that hand a cross-attention the encoder's states.
_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
#: Projections to the values, and those to keys and values in one.
_VALUE = ("v", "v_proj", "value", "value_proj", "v_lin", "linear_v", "wv")
_FUSED = ("c_attn", "kv", "kv_proj")


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable` at the first call: it imports the compiler, which is there once a model is."""
    made: list[Callable[..., Any]] = []
    disable: Any = torch.compiler.disable

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(disable(function))
        return made[0](*args, **kwargs)

    return call


class Crossing:
    """Taps the cross-attention of a decoder's blocks.

    A copy (or a pickle) of a model with taps on has taps of its own. They call copies of `values` and `sink` where
    these are methods of objects, which are copied along; plain functions are not copied, and would be called for
    both models, so take the taps off first.

    Args:
        blocks: the decoder's blocks, in order.
        describe: what the model is called in messages.

    Attributes:
        modules: the cross-attention of each block.
        width: of the values, heads * head_dim (of keys and values, where these are fewer): what V' must have.
        result_width: of c_j, heads * head_dim of the queries; equal to `width` without grouped queries.

    Raises:
        ConfigError: a block has no cross-attention or several, or one that cannot be tapped.
    """

    width: int
    result_width: int

    def __init__(self, blocks: Sequence[nn.Module], describe: str) -> None:
        self.modules: list[nn.Module] = []
        self._places: list[str] = []
        self._handles: list[Any] = []
        widths: dict[tuple[int, int], str] = {}
        for j, block in enumerate(blocks):
            name, module = _cross_attention(block, f"{describe}: decoder block {j}")
            place = f"{describe}: {name} of decoder block {j}"
            self.modules.append(module)
            self._places.append(place)
            widths.setdefault(_widths(module, place), place)
        if len(widths) != 1:
            found = ", ".join(f"{place} has {wide[0]}" for wide, place in widths.items())
            raise ConfigError(f"{describe}: cross-attention of one width is needed ({found or 'no blocks'}); {WAY_OUT}")
        self.width, self.result_width = next(iter(widths))

    def put_on(self, values: Values, sink: Sink) -> None:
        """Hand c_j to a sink whenever a block's cross-attention runs.

        Args:
            values: called with the very tensor of encoder states (B, Tk, d) that the cross-attention was called
                with, gradients enabled; gives V' (B, Tk, width) with its graph, or None for no tap in this call. A
                V' that needs no gradient makes c_j without a graph, which is what `generate()` wants.
            sink: called with the block's number and c_j (B, Tq, result_width), gradients as they are in the block.

        Raises:
            ConfigError: taps are on already, or a model's implementation of attention cannot be tapped.
        """
        for module, place in zip(self.modules, self._places, strict=True):
            if any(isinstance(getattr(hook, "__self__", None), _Tap) for hook in module._forward_pre_hooks.values()):
                raise ConfigError(f"{place} is tapped already; take those taps off first")
            _implementation(module, place, next((p.device.type for p in module.parameters()), "cpu"))
        _register()
        for j, (module, place) in enumerate(zip(self.modules, self._places, strict=True)):
            names = _parameters(type(module))
            tap = _Tap(j, place, names, (self.width, self.result_width), values, sink)
            self._handles.append(module.register_forward_pre_hook(tap.before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(tap.after, always_call=True))

    def take_off(self) -> None:
        """Give the modules back as they were; nothing happens where no taps are on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.modules:
            _restore(module)


class _Renamed:
    """A view of a config that gives another name of the implementation of attention, and says whose tap it is for."""

    def __init__(self, config: Any, tap: _Tap, states: Tensor) -> None:
        self.__dict__.update(trimtab_config=config, trimtab_tap=tap, trimtab_states=states, _attn_implementation=NAME)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies and pickles ask an empty object for
            raise AttributeError(name)
        return getattr(self.__dict__["trimtab_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["trimtab_config"], name, value)


def _restore(module: nn.Module) -> _Renamed | None:
    """Give a module its own config back; the view that it had in its place, if any."""
    config = module.__dict__["config"]
    if not isinstance(config, _Renamed):
        return None
    module.__dict__["config"] = config.trimtab_config
    return config


class _Tap:
    """The hooks on the cross-attention of block `j`, and what happens at its look-up."""

    def __init__(
        self, j: int, place: str, names: Sequence[str], widths: tuple[int, int], values: Values, sink: Sink
    ) -> None:
        self.j, self.place, self.names, self.widths = j, place, names, widths
        self.values, self.sink = values, sink

    @_untraced
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _restore(module)  # should an interrupt have kept `after` from it
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states = next((call[name] for name in _STATES if call.get(name) is not None), None)
        if not isinstance(states, Tensor):
            raise ConfigError(
                f"{self.place} was called without the encoder's states ({' or '.join(_STATES)}), so it is no "
                f"cross-attention here; {WAY_OUT}"
            )
        module.__dict__["config"] = _Renamed(module.__dict__["config"], self, states)

    @_untraced
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        # An output of None is that of a forward that failed, with an error of its own.
        if _restore(module) is not None and output is not None:
            raise ConfigError(
                f"{self.place} did not look its implementation of attention up in transformers' registry; {WAY_OUT}"
            )

    def attend(
        self,
        module: nn.Module,
        states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """What the module's own implementation returns; c goes to the sink."""
        implementation, broadcasts = _implementation(module, self.place, query.device.type)
        if kwargs.get("cache") is not None:
            raise ConfigError(f"{self.place} runs with a paged cache, which a second call would write to; {WAY_OUT}")
        result = implementation(module, query, key, value, mask, **kwargs)
        with torch.enable_grad():
            ours = self.values(states)
            if ours is None:
                return result
            heads = self._split(ours, key, value)
            plain = {**kwargs, "dropout": 0.0} if "dropout" in kwargs else kwargs
            c = attend(implementation, module, query, key, heads, mask, plain, broadcasts=broadcasts).flatten(2)
        if c.shape != (*query.shape[:1], query.shape[2], self.widths[1]):
            raise ConfigError(
                f"{self.place}: attention gave {tuple(c.shape)} for queries {tuple(query.shape)}, and "
                f"{self.widths[1]} was to be its width; {WAY_OUT}"
            )
        self.sink(self.j, c)
        return result

    def _split(self, ours: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """V' (B, Tk, width) in heads like the module's own values (B, heads, Tk, head_dim), and of their dtype."""
        B, heads, Tk, head_dim = value.shape
        if ours.shape != (B, Tk, heads * head_dim) or key.shape[2] != Tk:
            raise ConfigError(
                f"{self.place} attends to values {tuple(value.shape)}, which take ours as {(B, Tk, heads * head_dim)}; "
                f"they are {tuple(ours.shape)}; {WAY_OUT}"
            )
        return ours.to(value.dtype).view(B, Tk, heads, head_dim).transpose(1, 2)


@_untraced
def _tapped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """What is registered: the module's own implementation, and a tap."""
    seen = _restore(module)
    if seen is None:
        raise ConfigError(f"attn_implementation={NAME!r} is trimtab's own; set the one to compute with, such as 'sdpa'")
    tap: _Tap = seen.trimtab_tap
    return tap.attend(module, seen.trimtab_states, query, key, value, attention_mask, kwargs)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _tapped)


# -- finding -----------------------------------------------------------------------------------------


def _cross_attention(block: nn.Module, where: str) -> tuple[str, nn.Module]:
    """The one module of a block that looks its attention up and is called a cross-attention, and its name.

    Both kinds of attention of a block are often of one class and differ in what they are called with, which is not
    known before the first forward, while the widths must be: so names tell them apart, and every call checks it.
    """
    named = [(name, module) for name, module in block.named_modules() if name and _is_cross(name, module)]
    found = [(name, module) for name, module in named if _looks_up(type(module))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{where} has {len(found)} cross-attentions ({', '.join(name for name, _ in found)}), not one; {WAY_OUT}"
        )
    if attentions := [name for name, module in named if "attention" in type(module).__name__.lower()]:
        raise ConfigError(
            f"{where}: {attentions[-1]} does not look its implementation of attention up in transformers' registry "
            f"by its config, so that nothing can be put in there; {WAY_OUT}"
        )
    raise ConfigError(
        f"{where} has no cross-attention that can be told by its name (one of {', '.join(_CROSS)}); {WAY_OUT}"
    )


def _is_cross(name: str, module: nn.Module) -> bool:
    return any(word in called.lower() for word in _CROSS for called in (name, type(module).__name__))


def _forward(cls: type[nn.Module]) -> Any:
    """The function that looks up: the first forward of a class's ancestry that names the registry, or None.

    Classes may be wrapped by subclasses that call on, and functions by decorators.
    """
    for ancestor in cls.__mro__:
        function = inspect.unwrap(ancestor.__dict__.get("forward", len))
        names = getattr(getattr(function, "__code__", None), "co_names", ())
        if "ALL_ATTENTION_FUNCTIONS" in names and "_attn_implementation" in names:
            return function
    return None


def _looks_up(cls: type[nn.Module]) -> bool:
    function = _forward(cls)
    return function is not None and any(name in _parameters(cls) for name in _STATES)


def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    return tuple(inspect.signature(_forward(cls)).parameters)[1:]


def _widths(module: nn.Module, place: str) -> tuple[int, int]:
    """Width of the values that a cross-attention projects to, and of what it makes of them."""
    if not hasattr(module.__dict__.get("config"), "_attn_implementation"):
        raise ConfigError(f"{place} has no config with an implementation of attention; {WAY_OUT}")
    for names, parts in ((_VALUE, 1), (_FUSED, 2)):
        for name, child in module.named_children():
            wide = getattr(child, "nf", None) if is_conv1d(child) else getattr(child, "out_features", None)
            if name in names and isinstance(wide, int):
                # Groups are what the implementations themselves read off the module.
                return wide // parts, wide // parts * (getattr(module, "num_key_value_groups", None) or 1)
    raise ConfigError(f"{place} has no projection to its values (one of {', '.join(_VALUE + _FUSED)}); {WAY_OUT}")


def _implementation(module: nn.Module, place: str, device: str) -> tuple[Implementation, bool]:
    """The implementation that a module's config names, and whether it is transformers' "sdpa".

    Raises:
        ConfigError: it cannot be called a second time, or the module would act in another way under another name.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name, function = str(module.__dict__["config"]._attn_implementation), _forward(type(module))
    where = f"{place} runs with attn_implementation={name!r}"
    other = "model.set_attn_implementation('sdpa') gives it another"
    if name in _constants(function):
        raise ConfigError(f"{where} and asks for it by name; {other}, or {WAY_OUT}")
    if name.startswith("paged|"):
        raise ConfigError(f"{where}, which writes to its cache; {other}, or {WAY_OUT}")
    if name == "flex_attention" and device == "cpu":
        raise ConfigError(f"{where}, which has no gradient on a CPU; {other}, or {WAY_OUT}")
    eager = function.__globals__.get("eager_attention_forward")
    if name == "eager" and (eager is None or "eager_attention_forward" not in function.__code__.co_names):
        raise ConfigError(f"{where}, and its file has no eager_attention_forward; {other}, or {WAY_OUT}")
    try:
        found = function.__globals__["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)
    except KeyError:
        raise ConfigError(f"{where}, which is not registered; {other}, or {WAY_OUT}") from None
    return found, found is sdpa_attention_forward


def _constants(function: Any) -> set[Any]:
    """The constants in a function's code, those in tuples and sets among them."""
    constants: set[Any] = set()
    for value in function.__code__.co_consts:
        constants.update(value if isinstance(value, tuple | frozenset) else (value,))
    return constants
