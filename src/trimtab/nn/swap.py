"""Swapping a module's class in place, for a subclass made on the fly.

The module keeps its identity, its parameters and their names, its hooks and its tied tensors; what changes is
the code that runs. Swaps nest: the innermost class is the module's own, and the last one on comes off first.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Swapped:
    """Root of the mixins that a class is swapped for.

    `label` goes before the plain class's name. Without one the class keeps the plain one's full name, by which
    transformers knows what a model can hand out (`output_hidden_states` and `output_attentions`).
    """

    label: ClassVar[str] = "Swapped"
    swap_mixin: ClassVar[type[Swapped]]
    swap_plain: ClassVar[type[nn.Module]]

    def __reduce__(self) -> tuple[Any, ...]:
        """Classes made on the fly have no name to pickle, so a pickle says what they are made of."""
        return _blank, _recipe(type(self)), self.__dict__


_CLASSES: dict[tuple[type[nn.Module], type[Swapped]], type[nn.Module]] = {}


def _swapped_class(plain: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    """One subclass for each pair, so that modules of one class stay of one class."""
    if (plain, mixin) not in _CLASSES:
        named = mixin if mixin.label else plain
        body = {"__module__": named.__module__, "swap_mixin": mixin, "swap_plain": plain}
        if not mixin.label:
            body["__qualname__"] = plain.__qualname__
        made: Any = type(mixin.label + plain.__name__, (mixin, plain), body)
        if "forward" in vars(made) and not hasattr(mixin, "forward"):
            # transformers gives subclasses of its layers a copy; what is put into the class itself later must run, too.
            del made.forward
        _CLASSES[plain, mixin] = made
    return _CLASSES[plain, mixin]


def _recipe(cls: type[Any]) -> tuple[type[Any], ...]:
    """The plain class, then the mixins from the outermost to the innermost."""
    mixins = []
    while issubclass(cls, Swapped):
        mixins.append(cls.swap_mixin)
        cls = cls.swap_plain
    return cls, *mixins


def _blank(plain: type[nn.Module], *mixins: type[Swapped]) -> nn.Module:
    """An empty instance of a swapped class, for unpickling and copying."""
    for mixin in reversed(mixins):
        plain = _swapped_class(plain, mixin)
    return plain.__new__(plain)


def put_on(module: nn.Module, mixin: type[Swapped]) -> None:
    """Let `module` run the code of `mixin` on top of its own."""
    module.__class__ = _swapped_class(type(module), mixin)


def take_off(module: nn.Module, mixin: type[Swapped]) -> None:
    """Undo the last `put_on` of a module, which was of `mixin`."""
    cls: Any = type(module)
    assert issubclass(cls, mixin) and issubclass(cls.swap_mixin, mixin), f"{cls.__name__} does not wear {mixin}"
    module.__class__ = cls.swap_plain
