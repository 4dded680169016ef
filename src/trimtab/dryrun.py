"""What a run would be, told before anything is paid for it: nothing is read but configs, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from trimtab.config import DTYPES, PretrainConfig
from trimtab.data.tokens import store_folder
from trimtab.loadconfig import dump_config, unused_settings
from trimtab.methods.base import Adapter
from trimtab.models.presets import PAPER_VOCABULARY, PRESETS
from trimtab.preflight import check_method, complete_store, known_vocabulary, local_inputs, shadow
from trimtab.report.terminal import draws_braille, schedule_picture, terminal_width
from trimtab.train.cached import check_cache, look_ahead, room_is_short, told
from trimtab.train.memory import predict_phases, size_text
from trimtab.train.run import phase_table


def dry_run(config: PretrainConfig, console: Console) -> None:
    """Print the resolved config, parameters and memory of each phase, the restarts and the schedule.

    Raises:
        ConfigError: the model or its fit to the method is wrong, as far as shapes show it.
        CheckpointError: the folder of the cache cannot be used, or is of other stacks or another form.
    """

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    config = config.model_copy(update={"method": config.method.for_pretraining(config.seed)})
    say(dump_config(config))
    for caution in config.cautions():
        say(f"warning: {caution}")
    if config.device == "cuda" and not torch.cuda.is_available():
        say("warning: device = cuda, and torch sees no GPU here: on this machine the run would be refused")
    for note in unused_settings(config):
        say(f"note: {note}")
    vocab_size, notes = data_notes(config)
    for note in notes:
        say(note)
    if config.model.name not in PRESETS and not Path(config.model.name).expanduser().is_dir():
        say(f"{config.model.name} is read from the local cache alone; nothing is downloaded in a dry run")
    model = shadow(config, vocab_size, offline=True)
    phases = predict_phases(model, config.method, config.optim, dtype=DTYPES[config.dtype], pure=config.pure)
    adapter = check_method(config, model)
    say()
    console.print(phase_table(phases))
    if len(phases) > 1:
        say("The peak is that of the warm start, in which everything trains.")
    say()
    say(batch_line(config))
    say(restart_line(config.restarts()))
    for note in cache_notes(config, adapter):
        say(note)
    say()
    say(schedule_picture(config, width=terminal_width(console.file), braille=draws_braille(console.file)))
    say()
    say("Dry run: nothing was trained and nothing was written.")


def data_notes(config: PretrainConfig) -> tuple[int | None, list[str]]:
    """The number of words, if it is known, and lines on the text and the tokenizer.

    Raises:
        ConfigError: the tokenizer is a folder that is not there.
        DataError: a local source, the tokenizer or the store is missing or damaged.
    """
    store = complete_store(config)
    if store is not None:
        size, tokens = store.tokenizer.vocab_size, store.train.n_tokens
        epochs = config.train.steps * config.train.batch_tokens / tokens
        text = f"text: {tokens:,} tokens in {store.folder}; the run reads them {epochs:.2f} times"
        return size, [text, f"vocabulary: {size:,}"]
    files = local_inputs(config.data)
    sources = (*config.data.sources, *config.data.validation_sources)
    names = dict.fromkeys(source.dataset for source in sources if not isinstance(source, str))
    megabytes = sum(file.size or 0 for file in files) / 1e6
    parts = [f"{len(files):,} file{'s' * (len(files) > 1)} of {megabytes:,.1f} MB"] if files else []
    parts += [f"the dataset {name} (not looked at)" for name in names]
    folder = store_folder(config.data, config.seed, config.out)
    text = f"text: {' and '.join(parts)}, to be tokenized into {folder}"
    vocab_size, path = known_vocabulary(config), config.data.tokenizer.path
    if vocab_size is None:
        note = f"vocabulary: {PAPER_VOCABULARY:,} is assumed: {path} is on a hub, and a dry run downloads nothing"
    elif path is None:
        note = f"vocabulary: {vocab_size:,}, a BPE to be trained on the text"
    else:
        note = f"vocabulary: {vocab_size:,}, from {path}"
    return vocab_size, [text, note]


def cache_notes(config: PretrainConfig, adapter: Adapter) -> Iterator[str]:
    """What the cache of hidden states will take, if the run asks for one."""
    if config.train.cache_hidden is None:
        return
    folder, store, each = config.train.cache_hidden.expanduser(), complete_store(config), check_cache(config, adapter)
    chunks = None if store is None else store.train.n_chunks(config.data.seq_len)
    there = look_ahead(config, adapter, folder)
    yield from told(config, folder, each, chunks)
    if there:
        yield (
            f"hidden states: {folder} holds {size_text(there)} already; a dry run does not look which of the run's "
            "sequences these are, nor whether they are of this very checkpoint"
        )
    if chunks is not None and room_is_short(config, folder, each, chunks):
        yield "warning: train.cache_hidden: the disk has no room for that: on this machine the run would be refused"


def batch_line(config: PretrainConfig) -> str:
    """What one step is made of."""
    sequences = config.train.batch_tokens // config.data.seq_len
    micro = config.train.micro_batch or sequences
    total = config.train.batch_tokens * config.train.steps
    return (
        f"tokens a step: {config.train.batch_tokens:,} = {sequences:,} sequences of {config.data.seq_len:,}, "
        f"in {sequences // micro:,} micro-batch{'es' * (sequences // micro > 1)} of {micro:,}; "
        f"in all {config.train.steps:,} steps and {total:,} tokens"
    )


def restart_line(restarts: tuple[int, ...], shown: int = 12) -> str:
    """The steps after which a restart happens; of a long list the beginning and the end."""
    if not restarts:
        return "restarts: none"
    numbers = [f"{n:,}" for n in restarts]
    if len(numbers) > shown:
        numbers = [*numbers[: shown - 2], "...", numbers[-1]]
    return f"restarts: {len(restarts)}, after the steps {' '.join(numbers)}"
