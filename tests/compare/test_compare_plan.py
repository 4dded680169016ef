"""What a comparison's words mean, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare_parts import write_project
from rich.console import Console

from trimtab.cli import main
from trimtab.compare.plan import Plan, make_plan
from trimtab.compare.runner import check, show_plan
from trimtab.errors import ConfigError


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("plan"))


def names(plan: Plan) -> list[list[str]]:
    """Of each method, the folders of its grid by point and seed."""
    return [[str(run.folder.relative_to(plan.folder)) for runs in entry.grid for run in runs] for entry in plan.entries]


def test_each_combination_has_a_folder_of_its_own(project: Path) -> None:
    plan = make_plan(
        project,
        methods=["full,{name: lora, rank: 2}", "{name: lora, targets: [query, value]}"],
        seeds="2",
        sweeps=["optim.lr=1e-3,1e-2", "lora:train.batch=4,8"],
    )
    full, small, aimed = names(plan)
    assert full == [f"full/optim.lr-{lr}-seed{seed}" for lr in (0.001, 0.01) for seed in (0, 1)]
    assert small == [
        f"lora-rank-2/optim.lr-{lr}-train.batch-{batch}-seed{seed}"
        for lr in (0.001, 0.01)
        for batch in (4, 8)
        for seed in (0, 1)
    ]
    assert {Path(name).parent.name[:13] for name in aimed} == {"lora-targets-"}
    assert plan.size == 2 + 4 + 4 + 3
    run = plan.entries[1].grid[3][1]
    config = run.config
    assert (config.method.name, config.optim.lr, config.train.batch, config.seed) == ("lora", 0.01, 8, 1)
    assert run.sweep == {"optim.lr": 0.01, "train.batch": 8}
    assert plan.entries[2].grid[0][0].config.method.model_dump()["targets"] == ("query", "value")


def test_a_methods_own_values_take_the_place_of_those_for_all(project: Path) -> None:
    sweeps = ["optim.lr=1e-3,1e-2", "lora:optim.lr=1e-1"]
    full, lora = make_plan(project, methods=["full, lora"], sweeps=sweeps).entries
    assert [run.config.optim.lr for run in full.first] == [0.001, 0.01]
    assert [run.config.optim.lr for run in lora.first] == [0.1]


def test_the_name_of_a_folder_does_not_depend_on_other_runs(project: Path) -> None:
    """So that what was run stays when more is asked for."""
    few = names(make_plan(project, methods=["lora"], sweeps=["optim.lr=1e-3"]))[0]
    many = names(make_plan(project, methods=["full,lora"], seeds="0,5", sweeps=["optim.lr=1e-2,0.001"]))[1]
    assert set(few) < set(many)


def test_folders_of_values_that_no_name_can_hold_are_told_apart(project: Path) -> None:
    words = ["{name: lora, targets: 'a?b'},{name: lora, targets: 'a*b'}"]
    first, second = make_plan(project, methods=words).entries
    assert first.folder != second.folder
    assert all(len(entry.folder.name) < 90 for entry in (first, second))


def test_the_configurations_method_keeps_its_settings(project: Path) -> None:
    own = ["method={name: lora, rank: 3}"]
    for methods in ([], ["vera,lora"]):
        entry = make_plan(project, own, methods=methods, seeds="2").entries[-1]
        assert (entry.label, entry.grid[0][0].config.method.model_dump()["rank"]) == ("lora", 3)


def test_seeds_are_a_number_or_a_list(project: Path) -> None:
    def seeds(text: str | None) -> tuple[int, ...]:
        return make_plan(project, ["seed=7"], methods=["full"], seeds=text).seeds

    assert [seeds(None), seeds("3"), seeds("4,0"), seeds("0,")] == [(7,), (7, 8, 9), (4, 0), (0,)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "full,lroa"], "no method is called 'lroa'; did you mean lora?"),
        (["--methods", "[full]"], "is neither a method's name"),
        (["--methods", "{rank: 3}"], "is neither a method's name"),
        (["--methods", "{name: lora, rnk: 3}"], "did you mean method.rank"),
        (["--methods", "full,{name: lora"], "is not valid YAML"),
        (["--methods", ""], "the list is empty"),
        (["--methods", "full,full"], "full is given twice"),
        (["--seeds", "2"], "the configuration has no method either"),
        (["--methods", "full", "--seeds", "0"], "--seeds 0: at least one seed is needed"),
        (["--methods", "full", "--seeds", "1.5"], "1.5 is not a whole number"),
        (["--methods", "full", "--seeds", "1,1"], "a seed is given twice"),
        (["--methods", "full", "--sweep", "optim.rate=1"], "optim.rate: unknown key"),
        (["--methods", "full", "--sweep", "optim.lr"], "is not of the form key=v1,v2"),
        (["--methods", "full", "--sweep", "optim.lr="], "optim.lr: has no values"),
        (["--methods", "full", "--sweep", "optim.lr=1e-3,fast"], "optim.lr: 'fast' is not a number"),
        (["--methods", "full", "--sweep", "optim.lr=1,1.0"], "1.0 is given twice"),
        (["--methods", "full", "--sweep", "optim.lr=1", "--sweep", "optim.lr=2"], "is given twice"),
        (["--methods", "lora,full", "--sweep", "loar:optim.lr=1"], "no loar is compared; did you mean lora?"),
        (["--methods", "full", "--sweep", "seed=1,2"], "seeds are given with --seeds"),
        (["--methods", "full", "--sweep", "method.name=lora"], "methods are given with --methods"),
        (["--methods", "full", "--sweep", "task.max_train=1,2"], "cannot be swept"),
        (["--methods", "full,lora", "--sweep", "method.rank=1,2"], "is a setting of"),
        (["--methods", "full", "train.stop_at=2"], "train.stop_at = 2"),
        (["--methods", "full", "--resume", "x"], "leave --resume out"),
        (["--dry-run", "method={name: full}"], "give --methods, --seeds or --sweep"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    project: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["finetune", str(project), *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert told in said
    assert said.count("\n") == 1
    assert not (project.parent / "runs").exists()


@pytest.mark.parametrize(
    ("methods", "sweeps", "told"),
    [
        ("full,{name: lora, targets: [nothing]}", [], r"method lora targets=.*nothing"),
        ("full,{name: lora, rank: 2}", ["lora:method.rank=2,999"], r"method lora rank=2: .*999"),
        ("full", ["schedule.warmup_steps=1,999"], r"method full: schedule.warmup_steps"),
    ],
)
def test_a_method_that_does_not_fit_is_named_before_anything_runs(
    project: Path, methods: str, sweeps: list[str], told: str
) -> None:
    """Also in the last point of the grid, and where only the number of steps shows it."""
    words = ["train.steps=null", "train.epochs=1"]
    with pytest.raises(ConfigError, match=told):
        check(make_plan(project, words, methods=[methods], sweeps=sweeps))


def test_the_folder_of_a_single_run_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is the folder of a single run"):
        make_plan(project, [f"out={tmp_path}", "name=one"], methods=["full"])


def test_a_dry_run_lists_the_runs_and_writes_nothing(project: Path) -> None:
    console = Console(record=True, width=160)
    show_plan(make_plan(project, methods=["full,bitfit"], seeds="2", sweeps=["full:optim.lr=1e-3,1e-2"]), console)
    text = console.export_text()
    for name in ("full/optim.lr-0.001-seed0", "full/optim.lr-0.01-seed0", "the best of 2", "bitfit/seed1"):
        assert name in text
    assert "5 runs" in text
    assert not (project.parent / "runs").exists()
