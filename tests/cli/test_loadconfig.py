from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CONFIG, write_project

from trimtab.config import PretrainConfig
from trimtab.errors import ConfigError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import dump_config, load_config, load_tree, unused_settings
from trimtab.methods import ReLoRA
from trimtab.settings import HubSource


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_project(tmp_path)


def test_a_file_and_words_make_a_config(path: Path) -> None:
    """Words change what the file says, the last one wins, and a value is read as YAML."""
    words = [
        "optim.lr=1e-3",
        "train.steps=50",
        "train.steps=60",
        "train.clip=null",
        "data.sources=[a.txt, {dataset: d}]",
    ]
    config = load_config(path, words)
    assert (config.optim.lr, config.train.steps, config.train.clip) == (1e-3, 60, None)
    assert config.data.sources == ("a.txt", HubSource(dataset="d"))
    assert isinstance(config.method, ReLoRA)
    assert config.restarts() == (10, 20, 30, 40, 50)


def test_words_alone_are_enough() -> None:
    """No file is needed when the words give all that has no default."""
    words = ["model.name=llama-9m", "data={sources: [a], tokenizer: {path: t}}", "method={name: full}"]
    config = load_config(None, [*words, "train.steps=1", "train.batch_tokens=256"])
    assert config.method.name == "full"


def test_yaml_is_read_as_a_person_means_it(path: Path) -> None:
    """1e-3 is a number, and no, on and a date are words."""
    config = load_config(path, ["optim.lr=2e-3", "optim.eps=1.e-8", "name=2024-01-01", "data.text_field=no"])
    assert (config.optim.lr, config.optim.eps, config.name, config.data.text_field) == (2e-3, 1e-8, "2024-01-01", "no")
    assert load_config(path, ["data.max_tokens=1_000_000"]).data.max_tokens == 1_000_000


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("{text}: {text} # {text}", "{text}: {text} # {text}"),
        ("{text} Answer: ", "{text} Answer: "),
        ("{text}\nLabel:", "{text}\nLabel:"),
        ("[{text}", "[{text}"),
        ("{text} it's", "{text} it's"),
        ("'tis {text}:", "'tis {text}:"),
        ("'it''s {text}' #1", "'it''s {text}' #1"),
        ("'it''s {text}'", "it's {text}"),
        (' "{text}\\nLabel:" ', "{text}\nLabel:"),
        ("'{text}' or \"{text}\"", "'{text}' or \"{text}\""),
        ("null", None),
        ("", None),
        ("~", None),
    ],
)
def test_a_text_is_taken_as_it_stands(typed: str, text: str | None) -> None:
    """Whatever YAML would make of it; quotes around all of it are YAML's. The task may be named later."""
    task = "task={name: classification, train: a.csv}"
    words = ["model.name=m", "method={name: lora}", f"task.prompt={typed}"]
    for order in ([*words[:2], task, words[2]], [*words, "task.name=classification", "task.train=a.csv"]):
        assert load_tree(FinetuneConfig, None, order).task.prompt == text  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["7", "true", "2024-01-01", "1e-3", "'null'", "'7'"])
def test_what_looks_like_something_else_is_a_text(path: Path, word: str) -> None:
    """So are paths; what can be a list, too, is read as YAML."""
    config = load_config(path, [f"data.text_field={word}", f"out={word}", "method={name: lora}", "method.targets=[a]"])
    assert (config.data.text_field, config.out) == (word.strip("'"), Path(word.strip("'")))
    assert config.method.targets == ("a",)  # type: ignore[attr-defined]


def test_a_section_without_keys_is_a_section_of_defaults(path: Path) -> None:
    """`optim:` with all its keys commented out is read as null, and means the defaults."""
    path.write_text(CONFIG + "optim:\n  # lr: 1\n")
    assert load_config(path, []) == load_config(path, ["optim.lr=1e-3"])


MISTAKES = {
    "unknown key": ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
    "unknown key of the method": ("method.rnk=3", "method.rnk: unknown key; did you mean method.rank?"),
    "key of another section": ("steps=3", "steps: unknown key; did you mean train.steps?"),
    "unknown section": ("zebra.lr=1", "zebra: unknown key; a config has name, out, seed"),
    "unknown key of a source": ("data.sources=[{datset: c4}]", "data.sources[0].datset: unknown key; did you mean"),
    "unknown method": ("method.name=rilora", "method.name: no method is called 'rilora'; did you mean relora?"),
    "method without keys of the old one": ("method.name=lora", "'method={name: lora, rank: 4}'"),
    "method that is no section": ("method=full", "method: 'full' is not a section"),
    "method without a name": (
        "method={rank: 3}",
        "method.name: is missing; the methods are adalora, bitfit, bottleneck, full, ",
    ),
    "number for a table": ("method.rank_pattern=4", "method.rank_pattern: 4 is not a table; write {name: value}"),
    "start below the rank": (
        "method={name: adalora, rank: 20}",
        "method.init_rank: 12 is below rank = 20; give init_rank, too, at least 20",
    ),
    "rank of zero": ("method.rank=0", "method.rank: 0 is too small; it must be at least 1"),
    "word for a number": ("optim.lr=fast", "optim.lr: 'fast' is not a number"),
    "not a number": ("train.clip=.nan", "train.clip: nan is not a finite number"),
    "half a step": ("train.steps=1.5", "train.steps: 1.5 is not a whole number"),
    "a switch for a number": ("train.steps=true", "train.steps: true is not a number"),
    "neither true nor false": ("loss.chunked=perhaps", "loss.chunked: 'perhaps' is neither true nor false"),
    "not a choice": ("dtype=fp16", "dtype: 'fp16' is not one of fp32, bf16"),
    "nothing for a word": ("name=null", "name: null is not text"),
    "taken name": ("name=tokens", "name: 'tokens' is the folder of the token stores"),
    "seed beyond 63 bits": ("seed=99999999999999999999", "seed: 99999999999999999999 is too large"),
    "bad name": ("name=a/b", "name: 'a/b' may hold letters"),
    "too large": ("data.validation_share=0.7", "data.validation_share: 0.7 is too large; it must be less than 0.5"),
    "word for a list": ("data.sources=a.txt", "data.sources: 'a.txt' is not a list; write [a.txt]"),
    "no sources": ("data.sources=[]", "data.sources: [] is too short"),
    "value for a section": ("optim=3", "optim: 3 is not a section"),
    "key below a value": ("train.steps.x=3", "train.steps is a value, not a section"),
    "item of a list": ("data.sources.0=a", "data.sources is a list; give the whole list"),
    "no equals sign": ("train", "'train' is not of the form section.key=value"),
    "broken YAML": ("train.steps=[1", "is not valid YAML"),
    "two tokenizers": ("data.tokenizer.path=t", "data.tokenizer.path: 't' and bpe_vocab_size = 300 exclude each other"),
    "no tokenizer": ("data.tokenizer={}", "data.tokenizer.path: give a tokenizer's folder or name"),
    "batch below a sequence": ("train.batch_tokens=8", "train.batch_tokens: 8 is not a multiple of data.seq_len = 16"),
    "batch that does not fit": ("train.batch_tokens=70", "the nearest is 64 or 80"),
    "micro-batch that does not fit": ("train.micro_batch=3", "train.micro_batch: 3 does not divide the 4 sequences"),
    "stop beyond the end": ("train.stop_at=41", "train.stop_at: 41 lies beyond train.steps = 40"),
    "warm start longer than the run": ("method.warm_start_steps=40", "method.warm_start_steps: 40 leaves nothing"),
    "restart longer than the run": ("method.restart_every=40", "method.restart_every: 40 is longer than the run"),
    "re-warm longer than a cycle": ("schedule.rewarm_steps=11", "schedule.rewarm_steps: 11 is longer than the cycle"),
    "warm-up longer than a cycle": ("schedule.warmup_steps=11", "schedule.warmup_steps: 11 is longer than the stretch"),
}


@pytest.mark.parametrize(("word", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_on_the_command_line_is_one_line(path: Path, word: str, message: str) -> None:
    """Every kind of mistake is one line that names the place, the key and the way out."""
    with pytest.raises(ConfigError) as error:
        load_config(path, [word])
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert text.startswith("command line: ") or "run.yaml:" in text


def test_checkpointing_that_does_not_go_with_the_method(path: Path) -> None:
    """It is refused with the configuration, by the name of its setting; other methods have it."""
    on = "model.gradient_checkpointing=true"
    with pytest.raises(ConfigError, match=r"model.gradient_checkpointing: true: prefix tuning does not go with"):
        load_config(path, [on, "method={name: prefix}"])
    assert load_config(path, [on, "method={name: prompt}"]).model.gradient_checkpointing


def test_selective_recomputation_is_the_default_unless_blocks_are_checkpointed(path: Path) -> None:
    on, chosen = "model.gradient_checkpointing=true", "model.selective_recompute="
    assert load_config(path, []).model.recomputes
    assert not load_config(path, [on]).model.recomputes
    assert not load_config(path, [f"{chosen}false"]).model.recomputes
    with pytest.raises(ConfigError, match=r"model.selective_recompute: true: with model.gradient_checkpointing whole"):
        load_config(path, [on, f"{chosen}true"])


FILES = {
    "unknown key": (
        CONFIG.replace("steps", "stepz"),
        "run.yaml:15: train.stepz: unknown key; did you mean train.steps?",
    ),
    "value": (CONFIG.replace("rank: 4", "rank: -4"), "run.yaml:12: method.rank: -4 is too small"),
    "number for a word": (CONFIG.replace("small", "7"), "run.yaml:1: name: 7 is not text; write it in quotes: '7'"),
    "several": (CONFIG.replace("rank", "rnk").replace("steps: 40", "stps: 40"), "(also wrong: train.stps)"),
    "missing": (CONFIG.replace("  steps: 40\n", ""), "train.steps: is missing; it has no default"),
    "twice": (CONFIG + "train: {}\n", "run.yaml:17: train: is given twice"),
    "twice below": (CONFIG + "  steps: 3\n", "run.yaml:17: train.steps: is given twice"),
    "syntax": (CONFIG + "  x: [\n", "run.yaml:18: is not valid YAML"),
    "tab": ("train:\n\tsteps: 1\n", "run.yaml:2: is not valid YAML: found character '\\t'"),
    "alias": ("a: &x 1\nb: *x\n", "run.yaml:2: is not valid YAML: anchors and aliases are not read here"),
    "object": ("a: !!python/object:os.system {}\n", "run.yaml:1: is not valid YAML"),
    "a list": ("- a\n", "must hold sections"),
    "empty": ("# nothing\n", "is empty"),
    "two documents": (CONFIG + "---\n" + CONFIG, "is not valid YAML"),
    "deep": ("[" * 3000, "is nested too deeply"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES.keys())
def test_a_mistake_in_the_file_names_file_and_line(path: Path, text: str, message: str) -> None:
    """A mistake in the file is one line with the file's name, and the line where there is one."""
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder, a run's folder and a binary file each have their own line."""
    run = tmp_path / "runs"
    run.mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml", [])
    with pytest.raises(ConfigError, match=r"is a folder, not a config file$"):
        load_config(run, [])
    (run / "config.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match="--resume"):
        load_config(run, [])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "b.yaml", [])


def test_dump_is_read_back_to_an_equal_config(path: Path, tmp_path: Path) -> None:
    """load(dump(config)) == config, with every default written out."""
    words = ["optim.lr=1e-5", "method.train_also=[norms]", "data.sources=[a, {dataset: no, subset: '1e3'}]", "name='7'"]
    config = load_config(path, words)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again, []) == config
    assert set(PretrainConfig.model_fields) == {
        line.split(":")[0] for line in dump_config(config).splitlines() if not line.startswith((" ", "-"))
    }


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_text_survives_dump_and_load(text: str) -> None:
    """No word that looks like a number, a switch or YAML is read back as something else."""
    import tempfile

    config = load_config(None, WORDS)
    config = config.model_copy(update={"data": config.data.model_copy(update={"text_field": text})})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path, []).data.text_field == text


WORDS = (
    "model.name=llama-9m",
    "data={sources: [a], tokenizer: {path: t}}",
    "method={name: full}",
    "train={steps: 10, batch_tokens: 256}",
)


def test_settings_without_effect_are_told(path: Path) -> None:
    """A setting that does nothing in this run is named; one that works, or is at its default, is not."""
    assert unused_settings(load_config(path, ["schedule.rewarm_steps=2", "loss.chunk=8"])) == []
    words = ["schedule.rewarm_steps=2", "optim.warm_start_lr=1e-3", "schedule.shape=constant", "schedule.floor=0.5"]
    notes = unused_settings(
        load_config(None, [*WORDS, *words, "loss={chunked: false, chunk: 8}", "pure=true", "dtype=fp32"])
    )
    assert [note.split()[0] for note in notes] == [
        "optim.warm_start_lr",
        "schedule.rewarm_steps",
        "schedule.floor",
        "loss.chunk",
        "pure",
    ]


def test_a_resolved_config_has_no_notes(path: Path, tmp_path: Path) -> None:
    """Reading back a dump, which spells out every default, does not complain about the defaults."""
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(load_config(None, WORDS)))
    assert unused_settings(load_config(again, [])) == []
