"""Files of a run folder that are whole or absent, and the rule that no run overwrites another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import CheckpointError, ConfigError


def refuse_used_folder(folder: Path) -> None:
    """A new run needs a folder of its own.

    Raises:
        ConfigError: it exists and holds something.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        checkpoints = folder / "checkpoints"
        resumable = checkpoints.is_dir() and any(checkpoints.iterdir())
        way_out = f"continue that run with --resume {folder}" if resumable else "it has no checkpoint, so remove it"
        raise ConfigError(f"name: {folder} exists and is not empty; {way_out}, or choose another name")


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder with model and tokenizer, under a temporary name first.

    Raises:
        CheckpointError: it could not be written; nothing is left of it then, and an older one is as it was.
    """
    temporary, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    try:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        with _no_bars():
            model.save_pretrained(temporary)
        tokenizer.save(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the model could not be written to {folder}: {error.strerror or error}; the last checkpoint stands, "
            "so free some space and continue with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
