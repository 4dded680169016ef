from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trimtab.config import PretrainConfig, TokenizerConfig
from trimtab.configerrors import section_model
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_config, load_tree
from trimtab.methods import Method, registry
from trimtab.settings import HubSource
from trimtab.tasks import tasks

ROOT = Path(__file__).parents[2]


def documented(page: str = "config") -> dict[str, dict[str, str]]:
    """Of a page of docs/: heading -> key -> default."""
    sections: dict[str, dict[str, str]] = {}
    for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines():
        if line.startswith("##"):
            heading = line.lstrip("# ")
        elif match := re.match(r"\| `(\w+)` \| (.*?) \|", line):
            sections.setdefault(heading, {})[match[1]] = match[2].strip("`")
    return sections


def models() -> dict[str, type[BaseModel]]:
    """Of the code: heading -> settings class."""
    sections: dict[str, type[BaseModel]] = {"data.tokenizer": TokenizerConfig, "data.sources[]": HubSource}
    for name, field in PretrainConfig.model_fields.items():
        model = section_model(field.annotation)
        if model is not None and model is not Method:
            sections[name] = model
    return sections | {f"method: {name}": cls for name, cls in registry().items()}


def finetune_models() -> dict[tuple[str, str], type[BaseModel]]:
    """Of the code, for fine-tuning: page and heading -> settings class."""
    sections: dict[tuple[str, str], type[BaseModel]] = {}
    for name, field in FinetuneConfig.model_fields.items():
        model = section_model(field.annotation)
        if model is not None and name in ("model", "data", "train", "eval"):
            sections["finetune", name] = model
    return sections | {("tasks", f"task: {name}"): cls for name, cls in tasks().items()}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("heading", [*(("config", heading) for heading in models()), *finetune_models()])
def test_every_key_is_documented_with_its_default(heading: tuple[str, str]) -> None:
    """The pages have exactly the keys of the code, and their defaults."""
    page, section = heading
    known = models()[section] if page == "config" else finetune_models()[heading]
    keys, fields = documented(page)[section], known.model_fields
    assert sorted(keys) == sorted(fields)
    for name, field in fields.items():
        if field.default is PydanticUndefined:
            assert keys[name] == "required", name
        elif plain(field.default) != (shown := yaml.safe_load(keys[name])):
            assert field.default == float(shown), name  # PyYAML takes 1e-08 for a word


def test_the_top_level_is_documented() -> None:
    """The keys outside all sections, and a heading for each section."""
    sections = documented()
    singles = {name: f for name, f in PretrainConfig.model_fields.items() if section_model(f.annotation) is None}
    assert list(sections["Top level"]) == list(singles)
    assert {name: plain(field.default) for name, field in singles.items()} == {
        name: yaml.safe_load(default) for name, default in sections["Top level"].items()
    }
    assert set(sections) == {*models(), "Top level"}
    told = documented("finetune")["Top level"]
    assert told == {
        name: yaml.safe_dump(plain(f.default)).split("\n")[0]
        for name, f in FinetuneConfig.model_fields.items()
        if section_model(f.annotation) is None
    }


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_config(example: Path) -> None:
    """Every example loads; those of pre-training have a warm start and at least four restarts."""
    if example.name.startswith("finetune-"):
        assert load_tree(FinetuneConfig, example).method.name == "lora"
        return
    config = load_config(example, [])
    assert config.method.switch_step > 0
    assert len(config.restarts()) >= 4


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_readmes_config_is_that_of_the_example(tmp_path: Path) -> None:
    """The short config of the README is the example's, but for what only says how fast and how often."""
    path = tmp_path / "run.yaml"
    path.write_text(blocks("yaml")[0])
    words = ["data.workers=8", "checkpoint.every=1000", "eval.final_tokens=10_000_000"]
    assert load_config(path, words) == load_config(ROOT / "examples" / "llama-60m-c4.yaml", [])


def test_the_readmes_loop_runs() -> None:
    """The snippet of the README trains, restarts and merges a small model, word for word but for its sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    ids = torch.arange(8).unsqueeze(0)
    code = blocks("python")[0]
    for old, new in (
        ("rank=128", "rank=2"),
        ("restart_every=1000", "restart_every=3"),
        ("10_000", "10"),
        ("100", "2"),
        ("=500", "=2"),
    ):
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {"model": model, "batches": [{"input_ids": ids, "labels": ids}] * 10}
    exec(code, names)
    assert names["schedule"].restarts == (3, 6)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_the_readme_shows_the_two_commands_first() -> None:
    """make demo and make test come before any other block."""
    text = (ROOT / "README.md").read_text()
    first = text.split("```")[1]
    assert re.findall(r"^make \w+", first, flags=re.MULTILINE) == ["make demo", "make test"]


def test_every_link_of_the_pages_leads_somewhere() -> None:
    """Relative links of README.md and of the pages written here."""
    for page in (ROOT / "README.md", ROOT / "docs" / "cli.md", ROOT / "docs" / "config.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_manuals_name_all_methods_statuses_and_folders() -> None:
    """`trimtab --help`, the commands' pages and docs/cli.md agree with what there is."""
    from trimtab import cli, cliexport, cligenerate

    words = {
        "adalora": "AdaLoRA",
        "bottleneck": "bottleneck",
        "ia3": "(IA)3",
        "vera": "VeRA",
        "full": "in full",
        "read": "READ",
    }
    words |= {"bitfit": "BitFit", "lora": "LoRA", "prefix": "prefix", "prompt": "prompt", "relora": "ReLoRA"}
    words |= {"ladder": "Ladder"}
    assert set(words) == set(registry())
    assert all(word in cli._MANUAL for word in words.values())
    for page in (cli._MANUAL, cli._PRETRAIN, cli._TOKENIZE, cliexport.MERGE, cliexport.EXPORT, cligenerate.GENERATE):
        assert re.search(r"\n  1    a fault of the program", page)
    assert "runs/NAME/adapter/" in cli._PRETRAIN
    assert "| `adapter/` |" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_blocks_with_imports_import_all_that_they_name(page: Path) -> None:
    """A Python block that imports anything is meant to be run as it stands."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        try:
            tree = ast.parse(block)
        except SyntaxError:  # a sketch with parts left out
            continue
        imported = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        missing = names & {"trimtab", "torch", "Path"} - imported
        assert not imported or not missing, block


def test_patterns_in_the_docs_are_yaml() -> None:
    """The example of rank_pattern reads as written."""
    text = (ROOT / "docs" / "methods" / "lora.md").read_text()
    (pattern,) = re.findall(r"`(rank_pattern: .*?)`", text)
    assert yaml.safe_load(pattern) == {"rank_pattern": {r"layers\.0\..*": 16, "q_proj": 4}}
