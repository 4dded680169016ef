"""A text, and one finished run over it, for the tests of whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from run_parts import config, quiet

from trimtab.config import PretrainConfig
from trimtab.train.run import RunResult, pretrain


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of made-up words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=60))}) + "\n" for _ in range(200)))
    return path


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, RunResult, str]:
    """One finished run in bf16, and what it printed."""
    asked = config(text, tmp_path_factory.mktemp("whole"))
    console = quiet()
    result = pretrain(asked, console=console)
    return asked, result, console.file.getvalue()  # type: ignore[attr-defined]
