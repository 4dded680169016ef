"""Tasks: what a model is fine-tuned for and measured by. Importing this package fills the registry."""

from __future__ import annotations

from trimtab.tasks.base import Chat, Example, Labelled, Loaded, Message, Plain, Task, Written
from trimtab.tasks.classification import Classification
from trimtab.tasks.e2e import E2E
from trimtab.tasks.glue import GLUE
from trimtab.tasks.language import Language
from trimtab.tasks.registry import TaskField, parse_task, tasks
from trimtab.tasks.regression import Regression
from trimtab.tasks.seq2seq import Seq2Seq

__all__ = [
    "E2E",
    "GLUE",
    "Chat",
    "Classification",
    "Example",
    "Labelled",
    "Language",
    "Loaded",
    "Message",
    "Plain",
    "Regression",
    "Seq2Seq",
    "Task",
    "TaskField",
    "Written",
    "parse_task",
    "tasks",
]
