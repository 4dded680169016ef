"""Making sure that no blocks run behind a stack whose output is changed.

What changes a stack's output requires gradients, so blocks behind it would be back-propagated through: a vision tower
before a language model, a stage of a model before the next. Which blocks run behind others shows in a forward alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.nn.stacks import Stack, is_block
from trimtab.nn.untraced import untraced


class NothingBehind:
    """Hooks on the blocks of a model that are no part of a stack; there are none in a model of one stack.

    Args:
        model: of the stack, without any network beside it.
        stack: whose output is changed.
    """

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self._model, self._stack = model, stack
        own = set(map(id, stack.blocks))
        inside = {id(module) for block in stack.blocks for module in block.modules()}
        self._others = {
            name: module
            for name, module in model.named_modules()
            if is_block(module) and id(module) not in inside and not own & set(map(id, module.modules()))
        }
        self._changed = False
        self._handles: list[Any] = []

    def put_on(self) -> None:
        """Hook the model, the stack's last block and the others."""
        if not self._others:
            return
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        self._handles.append(self._stack.blocks[-1].register_forward_hook(self._after_stack))
        for block in self._others.values():
            self._handles.append(block.register_forward_pre_hook(self._check, with_kwargs=True))

    def take_off(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._changed = False

    def _after_stack(self, block: nn.Module, args: Any, output: Any) -> None:
        self._changed = True

    @untraced
    def _check(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self._changed and torch.is_grad_enabled()):
            return
        if any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
            name = next((name for name, module in self._others.items() if module is block), type(block).__name__)
            raise ConfigError(
                f"blocks: {name} runs behind {self._stack.name}, whose output is corrected, and would be "
                f"back-propagated through; name the last blocks of {type(self._model).__name__} instead"
            )
