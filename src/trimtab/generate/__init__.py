"""Writing with a model: a checkpoint or a run's folder, adapters on it, prompts and chats in, text out.

generator = open_generator("HuggingFaceTB/SmolLM2-135M-Instruct", {"mine": "runs/mine/adapter"})
print(generator.answer("What is a trim tab?", Sampling(temperature=0.7, seed=1)).text)
generator.use(None)  # the base alone
print(generator.answer([Message("user", "What is a trim tab?")]).text)
"""

from __future__ import annotations

from trimtab.generate.conversation import Conversation
from trimtab.generate.generator import Answer, Asked, Generator, Sampling
from trimtab.generate.open import find_base, open_generator
from trimtab.generate.prompts import Prompt, read_prompts
from trimtab.tasks.base import Message

__all__ = [
    "Answer",
    "Asked",
    "Conversation",
    "Generator",
    "Message",
    "Prompt",
    "Sampling",
    "find_base",
    "open_generator",
    "read_prompts",
]
