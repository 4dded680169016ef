"""What a run would be, told before anything is paid for it: nothing is read but configs, nothing is written."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trimtab.config import PretrainConfig
from trimtab.errors import ConfigError
from trimtab.loadconfig import dump_config, unused_settings
from trimtab.models.load import shadow_model
from trimtab.models.presets import PAPER_VOCABULARY, PRESETS
from trimtab.report.terminal import draws_braille, schedule_picture, terminal_width
from trimtab.train.memory import predict_phases
from trimtab.train.run import DTYPES, phase_table


def dry_run(config: PretrainConfig, console: Console) -> None:
    """Print the resolved config, parameters and memory of each phase, the restarts and the schedule.

    Raises:
        ConfigError: the model or its fit to the method is wrong, as far as shapes show it.
    """

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    config = config.model_copy(update={"method": config.method.for_pretraining(config.seed)})
    say(dump_config(config))
    for note in unused_settings(config):
        say(f"note: {note}")
    vocab_size, note = vocabulary(config)
    say(note)
    if config.model.name not in PRESETS and not Path(config.model.name).expanduser().is_dir():
        say(f"{config.model.name} is read from the local cache alone; nothing is downloaded in a dry run")
    model = shadow_model(config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, offline=True)
    phases = predict_phases(model, config.method, config.optim, dtype=DTYPES[config.dtype], pure=config.pure)
    say()
    console.print(phase_table(phases))
    if len(phases) > 1:
        say("The peak is that of the warm start, in which everything trains.")
    say()
    say(batch_line(config))
    say(restart_line(config.restarts()))
    say()
    say(schedule_picture(config, width=terminal_width(console.file), braille=draws_braille(console.file)))
    say()
    say("Dry run: nothing was trained and nothing was written.")


def vocabulary(config: PretrainConfig) -> tuple[int, str]:
    """The number of words to count with, and a line that says where it comes from."""
    tokenizer = config.data.tokenizer
    if tokenizer.path is None:
        assert tokenizer.bpe_vocab_size is not None
        size = tokenizer.bpe_vocab_size
        return size, f"vocabulary: {size:,} words, a BPE to be trained on the text"
    folder = Path(tokenizer.path).expanduser()
    if folder.exists():
        from trimtab.data.tokenizer import load_tokenizer

        size = load_tokenizer(tokenizer.path).vocab_size
        return size, f"vocabulary: {size:,} words, from {folder}"
    if tokenizer.path.startswith(("/", ".", "~")) or tokenizer.path.count("/") > 1:
        raise ConfigError(f"data.tokenizer.path: there is no folder {tokenizer.path}")
    size = PAPER_VOCABULARY
    return size, (f"vocabulary: {size:,} words, assumed: {tokenizer.path} is a hub's, and a dry run downloads nothing")


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
