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
    vocab_size, notes = data_notes(config)
    for note in notes:
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


def data_notes(config: PretrainConfig) -> tuple[int, list[str]]:
    """The number of words to count with, and lines on the text and the tokenizer.

    Raises:
        ConfigError: the tokenizer is a folder that is not there.
        DataError: a local source, the tokenizer or the store is missing or damaged.
    """
    from trimtab.data.sources import resolve
    from trimtab.data.store import MANIFEST, TokenStore
    from trimtab.data.tokens import store_folder

    folder = store_folder(config.data, config.seed, config.out)
    if (folder / MANIFEST).exists():
        store = TokenStore.open(folder, verify=False)
        size, tokens = store.tokenizer.vocab_size, store.train.n_tokens
        epochs = config.train.steps * config.train.batch_tokens / tokens
        return size, [
            f"text: {tokens:,} tokens in {folder}; the run reads them {epochs:.2f} times",
            f"vocabulary: {size:,}",
        ]
    local = tuple(source for source in config.data.sources if isinstance(source, str))
    held_out = tuple(source for source in config.data.validation_sources if isinstance(source, str))
    files = resolve(config.data.model_copy(update={"sources": local, "validation_sources": held_out}))
    names = [
        source.dataset
        for source in (*config.data.sources, *config.data.validation_sources)
        if not isinstance(source, str)
    ]
    parts = [f"{len(files):,} files, {sum(file.size or 0 for file in files) / 1e6:,.1f} MB"] if files else []
    parts += [f"the dataset {name} (not looked at)" for name in dict.fromkeys(names)]
    size, note = vocabulary(config)
    return size, [f"text: {' and '.join(parts)}, to be tokenized into {folder}", note]


def vocabulary(config: PretrainConfig) -> tuple[int, str]:
    """The number of words of the tokenizer that will be used, and a line that says where it comes from."""
    tokenizer = config.data.tokenizer
    if tokenizer.path is None:
        assert tokenizer.bpe_vocab_size is not None
        return tokenizer.bpe_vocab_size, f"vocabulary: {tokenizer.bpe_vocab_size:,}, a BPE to be trained on the text"
    folder = Path(tokenizer.path).expanduser()
    if folder.exists():
        from trimtab.data.tokenizer import load_tokenizer

        size = load_tokenizer(tokenizer.path).vocab_size
        return size, f"vocabulary: {size:,}, from {folder}"
    if tokenizer.path.startswith(("/", ".", "~")) or tokenizer.path.count("/") > 1:
        raise ConfigError(f"data.tokenizer.path: there is no folder {tokenizer.path}")
    return PAPER_VOCABULARY, (
        f"vocabulary: {PAPER_VOCABULARY:,} is assumed: {tokenizer.path} is on a hub, and a dry run downloads nothing"
    )


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
