"""Tasks: what a model is fine-tuned for and measured by. Importing this package fills the registry."""

from __future__ import annotations

from trimtab.tasks.base import Chat, Example, Labelled, Loaded, Message, Plain, Task, Written
from trimtab.tasks.e2e import E2E
from trimtab.tasks.registry import TaskField, parse_task, tasks

__all__ = [
    "E2E",
    "Chat",
    "Example",
    "Labelled",
    "Loaded",
    "Message",
    "Plain",
    "Task",
    "TaskField",
    "Written",
    "parse_task",
    "tasks",
]
