"""EleutherAI's lm-evaluation-harness on a model of ours, through its own Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.errors import ConfigError
from trimtab.finetuneconfig import ScoreConfig
from trimtab.models.taskmodel import task_tokenizer
from trimtab.train.score import build


def run_harness(config: ScoreConfig, tasks: Sequence[str]) -> dict[str, Any]:
    """The harness's results by task, for a language model with its adapter.

    Raises:
        ConfigError: the harness is not installed, or one of the tasks is none of its own.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"--lm-eval needs the package lm-eval: pip install 'trimtab[lm-eval]' ({error})") from error
    manager = TaskManager()
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ConfigError(f"--lm-eval {','.join(tasks)}: the harness has no task {unknown[0]!r}")
    model = HFLM(pretrained=build(config), tokenizer=task_tokenizer(config.model), batch_size=config.eval.batch)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=config.eval.examples)
    results: dict[str, Any] = found["results"]
    return results
