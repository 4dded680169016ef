"""Errors a user can act on. Each message names the setting, its value and the way out."""

from __future__ import annotations


class TrimtabError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them as one line."""


class ConfigError(TrimtabError, ValueError):
    """A setting is unknown, out of range, or does not go with another one."""


class DataError(TrimtabError):
    """A source, a tokenizer or a token store is missing, empty, damaged or does not fit the model."""


class CheckpointError(TrimtabError):
    """A checkpoint is missing, incomplete or damaged, could not be written, or does not fit this run."""


class NonFiniteError(TrimtabError):
    """A loss or a gradient is not finite; the message names the step and the last good checkpoint."""


class TargetError(TrimtabError, ValueError):
    """A method's targets match nothing that can be adapted; the message lists the closest names."""


class CannotMerge(TrimtabError):
    """The method, in this state, has no merged form; the message says why."""


class CannotDetach(TrimtabError):
    """The base was written into and cannot be given back; the message names what changed and the way out."""


class CannotSave(TrimtabError):
    """The adapter alone would not describe what was trained; the message says what to save instead."""


class ReportError(TrimtabError):
    """A run folder, or a file in it that a report needs, is missing or damaged, or the report could not be written."""
