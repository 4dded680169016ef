"""The two programs that `finetune.py` compares: Trimtab, and transformers' Trainer with peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from finetune_data import Parts

import trimtab
from trimtab.config import LogConfig, OptimConfig
from trimtab.finetuneconfig import (
    ExamplesConfig,
    FinetuneConfig,
    TaskEvalConfig,
    TaskModelConfig,
    TaskScheduleConfig,
    TaskTrainConfig,
)
from trimtab.methods.registry import attach
from trimtab.optim.build import build_optimizer
from trimtab.tasks import parse_task
from trimtab.train.loop import Training, train
from trimtab.train.material import Material, prepare
from trimtab.train.signals import StopSignals

#: Where LoRA goes, by task: every linear layer of the blocks.
TARGETS = {
    "chat": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "pairs": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
}
#: The same for peft, whose endings would match the pooler's layer, too; it is trained in full on both sides.
PEFT_TARGETS = {"chat": list(TARGETS["chat"]), "pairs": r".*encoder.*\.(query|key|value|dense)"}
RATE = {"chat": 5e-4, "pairs": 1e-3}
RANK, ALPHA = 8, 16
SEQ_LEN = {"chat": 512, "pairs": 128}

THEIRS, GROUPED = "Trainer + peft", "Trainer + peft, grouped"
OURS, KEPT, PADDED, ALIKE = "trimtab", "trimtab, all kept", "trimtab, padded", "trimtab, grouped"
#: Ours without more packs the examples of causal models, and groups those of others.
ROWS = {"chat": (THEIRS, GROUPED, OURS, KEPT, PADDED, ALIKE), "pairs": (THEIRS, GROUPED, OURS, KEPT)}


@dataclass(frozen=True)
class Setup:
    """What is trained, and for how long."""

    task: str
    parts: Parts
    steps: int
    batch: int

    def material(self, row: str) -> Material:
        """The tokens and the batches of a row: the same examples for all rows, an epoch of them."""
        splits = {"train": str(self.parts.train), "validation": str(self.parts.validation)}
        named = {"name": "chat"} if self.task == "chat" else {"name": "classification", "pair": "pair"}
        config = FinetuneConfig(
            name="benchmark",
            device="cpu",
            dtype="bf16",
            model=TaskModelConfig(name=str(self.parts.model), selective_recompute=False if row == KEPT else None),
            task=parse_task({**named, **splits}),
            data=ExamplesConfig(
                seq_len=SEQ_LEN[self.task],
                packing=row in (OURS, KEPT),
                group_by_length=row in (GROUPED, ALIKE) or (row in (OURS, KEPT) and self.task == "pairs"),
            ),
            method=trimtab.LoRA(rank=RANK, alpha=ALPHA, targets=TARGETS[self.task]),
            optim=OptimConfig(lr=RATE[self.task]),
            schedule=TaskScheduleConfig(),
            train=TaskTrainConfig(steps=self.steps, batch=self.batch, clip=1.0),
            eval=TaskEvalConfig(),
            log=LogConfig(),
        )
        return prepare(config)


class _Unsaved:
    last = None

    def save(self, step: int) -> Path:
        return Path()


class _Losses:
    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        self.found.append(record["loss"])

    def event(self, record: dict[str, Any]) -> None:
        pass


def our_model(setup: Setup, material: Material) -> tuple[Any, Any]:
    model = material.model()
    return model, attach(model, material.method, dtype=torch.bfloat16)


class Ours:
    """Trimtab's loop as `trimtab finetune` runs it, without its files."""

    def __init__(self, setup: Setup, row: str) -> None:
        self.material = setup.material(row)
        config = self.material.config
        self.model, self.adapter = our_model(setup, self.material)
        groups = self.adapter.parameter_groups(config.optim.lr)
        self.optimizer = build_optimizer(config.optim, groups, "cpu")
        self.objective = self.material.objective(self.model)
        self.trainable = sum(entry.parameter.numel() for entry in self.adapter.trainable())
        batches, steps = self.material.batches, config.total_steps
        self.tokens = batches.tokens(steps)
        self.padding = batches.padding()

    def run(self, steps: int | None = None) -> float:
        """Train; the mean of the steps' losses."""
        config, log = self.material.config, _Losses()
        train(
            Training(
                model=self.model,
                adapter=self.adapter,
                optimizer=self.optimizer,
                schedule=config.multiplier(),
                objective=self.objective,
                batches=self.material.batches,
                saver=_Unsaved(),
                log=log,
                signals=StopSignals(),
                lr=config.optim.lr,
                clip=config.clip,
                stop_at=steps,
                selective_recompute=config.model.recomputes,
            )
        )
        return mean(log.found)


class Theirs:
    """transformers' Trainer on peft's LoRA: dynamic padding, fused AdamW, no logging, no saving, no checkpointing.

    The model is held in bf16 and called under bf16 autocast, as usual; its adapter, which peft holds in fp32, starts
    from the values that ours starts from, as does a new head. Its batches are made of the same tokens in the same order
    as ours; `grouped` are those of similar length, as `group_by_length` (now `train_sampling_strategy`) makes them.
    """

    def __init__(self, setup: Setup, row: str) -> None:
        import peft
        from transformers import PrinterCallback, Trainer, TrainingArguments, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        material = setup.material(row)
        batches, config = material.batches, material.config
        data = batches.data
        order = np.concatenate([batches.batch(step).rows for step in range(config.total_steps)])
        rows = [_row(data, int(number)) for number in order]
        self.tokens, self.padding = batches.tokens(config.total_steps), batches.padding()
        task = "CAUSAL_LM" if setup.task == "chat" else "SEQ_CLS"
        whole = None if setup.task == "chat" else ["pooler", "classifier"]
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS[setup.task], modules_to_save=whole, task_type=task
        )
        base = _plain_model(setup, material)
        base.config.use_cache = False
        self.model = peft.get_peft_model(base, lora)
        _start_alike(self.model, *our_model(setup, material))
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

        class InOrder(Trainer):
            def _get_train_sampler(self, *arguments: Any, **settings: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

        def trainer(steps: int) -> Any:
            arguments = TrainingArguments(
                output_dir="runs/unused",
                per_device_train_batch_size=setup.batch,
                max_steps=steps,
                learning_rate=config.optim.lr,
                weight_decay=0.0,
                max_grad_norm=1.0,
                lr_scheduler_type="linear",
                bf16=True,
                use_cpu=True,
                optim="adamw_torch_fused",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
            )
            collate = _Pad(material.tokenizer.pad_token_id)
            made = InOrder(self.model, arguments, train_dataset=rows, data_collator=collate)
            made.remove_callback(PrinterCallback)
            return made

        self._trainer, self.steps = trainer, config.total_steps

    def run(self, steps: int | None = None) -> float:
        """Train; the mean of the steps' losses."""
        found: float = self._trainer(steps or self.steps).train().training_loss
        return found


def _plain_model(setup: Setup, material: Material) -> Any:
    """The model as transformers loads it, in bf16."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if setup.task == "chat" else AutoModelForSequenceClassification
    return kind.from_pretrained(setup.parts.model, dtype=torch.bfloat16, **material.settings)


def _start_alike(theirs: Any, model: Any, adapter: Any) -> None:
    """Give peft's model the values that train in ours, by name."""
    own = dict(theirs.named_parameters())
    for entry in adapter.trainable():
        place, _, leaf = entry.name.rpartition(".")
        ending = f"{place}.{leaf}.default.weight" if leaf.startswith("lora_") else None
        if ending is None:
            module, _, rest = entry.name.rpartition(".")
            names = [n for n in own if n.endswith(f".{rest}") and ".modules_to_save.default" in n]
            names = [n for n in names if n.replace(".modules_to_save.default", "").endswith(f"{module}.{rest}")]
        else:
            names = [n for n in own if n.endswith(ending)]
        assert len(names) == 1, (entry.name, names)
        with torch.no_grad():
            own[names[0]].copy_(entry.parameter)


def _row(data: Any, number: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(data.ids[number].astype(np.int64))
    row = {"input_ids": ids}
    if data.types is not None:
        row["token_type_ids"] = torch.from_numpy(data.types[number].astype(np.int64))
    if data.labels is None:
        row["labels"] = torch.where(torch.from_numpy(data.learned[number]), ids, -100)
    else:
        row["labels"] = torch.tensor(int(data.labels[number]))
    return row


class _Pad:
    """Pads a batch on the right to its longest example."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        from torch.nn.utils.rnn import pad_sequence

        batch = {"attention_mask": pad_sequence([torch.ones_like(r["input_ids"]) for r in rows], batch_first=True)}
        for name, fill in (("input_ids", self.pad_id), ("token_type_ids", 0), ("labels", -100)):
            found = [row[name] for row in rows if name in row]
            if found:
                whole = found[0].dim() == 0
                batch[name] = torch.stack(found) if whole else pad_sequence(found, True, fill)
        return batch


def make(setup: Setup, row: str) -> Ours | Theirs:
    """A row's program, ready to run."""
    return Theirs(setup, row) if row in (THEIRS, GROUPED) else Ours(setup, row)
