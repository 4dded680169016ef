"""Where an adapter stands: on a model, under a name, at work or not, until it is merged or detached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from trimtab.methods.attached import Attached, record_of


class Placed:
    """Something that is attached to a model.

    Attributes:
        model: the edited model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._closed = ""  # how it ended

    @property
    def record(self) -> Attached:
        """What is attached to the model, this adapter among it."""
        self._require_open("record")
        record = record_of(self.model)
        assert record is not None
        return record

    @property
    def attached_name(self) -> str:
        """The name under which the adapter is attached."""
        return next(name for name, adapter in self.record.adapters.items() if adapter is self)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what the base computes, whichever adapter was at work.

        Raises:
            CannotDetach: something was written into the base, and no copy of it is kept.
        """
        self._require_open("disabled()")
        record = self.record
        before = record.active
        record.switch("")
        try:
            yield
        finally:
            # Inside, adapters may have been detached, or another one made active: then that stays.
            if before in record.adapters and not record.active:
                record.switch(before)

    def _alone(self) -> bool:
        return len(self.record.adapters) == 1

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise ValueError(f"{call}: this adapter was {self._closed}; attach a new one to go on")

    def _close(self, how: str) -> None:
        """The adapter's end: its name is free, and with the last adapter the model."""
        self.record.remove(self.model, self.attached_name)
        self._closed = how
