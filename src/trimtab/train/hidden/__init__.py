"""What a network beside a frozen backbone reads, kept on disk: see `HiddenCache`."""

from trimtab.train.hidden.cache import HiddenCache

__all__ = ["HiddenCache"]
