"""What is chosen, what is reported, and every figure of the table, against figures worked out by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compare_parts import InProcess, write_project
from rich.console import Console

from trimtab.compare import runner
from trimtab.compare.page import Point, front
from trimtab.compare.plan import Plan, Run, make_plan
from trimtab.compare.table import Spread
from trimtab.errors import ReportError
from trimtab.loadconfig import dump_config

MIB = 1 << 20


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("table"))


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    made = InProcess()
    monkeypatch.setattr(runner, "Child", made)
    return made


def lay(
    run: Run,
    validation: float | None,
    test: float | None = None,
    *,
    name: str = "accuracy",
    rising: bool = True,
    **more: Any,
) -> None:
    """What a complete run leaves, with these scores."""
    run.folder.mkdir(parents=True)
    run.asked.write_text(dump_config(run.config))
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    (run.folder / "report.html").touch()
    scores = {"validation": {name: validation, "loss": 1.0}}
    if test is not None:
        scores["test"] = {name: test, "loss": 1.0}
    headline = {"name": name, "value": validation, "rising": rising}
    results = {"steps": 6, "kept_step": 3, "headline": headline, "scores": scores, **more.get("results", {})}
    (run.folder / "results.json").write_text(json.dumps(results))
    phases = [
        {
            "phase": "training",
            "from_step": 0,
            "total": 1000,
            "trainable": more.get("trainable", 250),
            "groups": {},
            "memory": {"weights": 4 * MIB, "gradients": MIB, "optimizer": 2 * MIB, "carry_host": 0},
        }
    ]
    measured = {"peak_resident": more.get("resident", 100 * MIB)}
    (run.folder / "parameters.json").write_text(json.dumps({"phases": phases, "measured": measured}))
    steps = [(2, 100, 50.0), (4, 220, 40.0)]  # 100 / 50 and 120 / 40 are 5 seconds of 4 steps: 7.5 of 6
    lines = [
        {"event": "step", "step": step, "time": 0, "loss": 1.0, "tokens": tokens, "tokens_per_second": rate}
        for step, tokens, rate in steps
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def all_of(plan: Plan) -> list[list[list[Run]]]:
    return [[list(runs) for runs in entry.grid] for entry in plan.entries]


def plan_of(project: Path, tmp_path: Path, **options: Any) -> Plan:
    return make_plan(project, [f"out={tmp_path}", *options.pop("words", [])], **options)


def written(plan: Plan) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((plan.folder / "comparison.json").read_text())
    return tree


def go(plan: Plan) -> str:
    console = Console(record=True, width=200)
    assert runner.compare(plan, console) == 0
    return console.export_text()


def test_settings_are_chosen_on_validation_and_test_is_reported(
    project: Path, tmp_path: Path, child: InProcess
) -> None:
    """Of two values the one with the better validation and the worse test; the mean is over the seeds with it."""
    plan = plan_of(project, tmp_path, methods=["bitfit"], seeds="3", sweeps=["optim.lr=1e-3,1e-2"])
    ((low, high),) = all_of(plan)
    lay(low[0], 0.6, 0.9)
    lay(high[0], 0.7, 0.5)
    lay(high[1], 0.1, 0.6)
    lay(high[2], 0.2, 0.8)
    (high[0].folder / "costs.json").write_text('{"peak_live": 1, "flops": 1, "steps": 6}')
    text = go(plan)
    assert child.calls == []  # the first value has no other seeds
    (method,) = written(plan)["methods"]
    assert method["chosen"] == {"optim.lr": 0.01}
    assert method["reported"]["values"] == [0.5, 0.6, 0.8]
    assert method["reported"]["mean"] == pytest.approx(1.9 / 3)
    assert method["reported"]["deviation"] == pytest.approx((0.07 / 3) ** 0.5)  # (n - 1)
    assert method["chosen_by"]["mean"] == pytest.approx(1.0 / 3)
    assert (written(plan)["chosen_on"], written(plan)["reported_on"]) == ("validation", "test")
    assert "0.6333 ± 0.1528" in text
    assert "Chosen by validation accuracy: the settings of each method (by seed 0)" in text
    assert "The figures of test have chosen nothing." in text


def test_without_a_test_split_the_table_says_what_it_shows(project: Path, tmp_path: Path, child: InProcess) -> None:
    """The figures are then of the examples that chose."""
    plan = plan_of(project, tmp_path, methods=["bitfit"])
    ((runs,),) = all_of(plan)
    lay(runs[0], 0.6)
    text = go(plan)
    assert "There is no test split" in text
    assert written(plan)["reported_on"] == "validation"
    assert written(plan)["methods"][0]["reported"] == {"mean": 0.6, "deviation": None, "values": [0.6]}


def test_less_is_better_where_the_headline_says_so(project: Path, tmp_path: Path, child: InProcess) -> None:
    """Equal figures: the first; no figure at all: never."""
    plan = plan_of(project, tmp_path, methods=["bitfit"], sweeps=["optim.lr=1,2,3,4"])
    (grid,) = all_of(plan)
    for (run,), value in zip(grid, [None, 2.0, 1.5, 1.5], strict=True):
        lay(run, value, name="loss", rising=False)
    go(plan)
    assert written(plan)["methods"][0]["chosen"] == {"optim.lr": 3}


def test_the_figures_are_those_of_the_runs(project: Path, tmp_path: Path, child: InProcess) -> None:
    """Costs are scaled to the steps that were taken; peaks are the largest of the seeds; times and steps are means."""
    plan = plan_of(project, tmp_path, methods=["bitfit"], seeds="2", words=["train.steps=12"])
    ((runs,),) = all_of(plan)
    lay(runs[0], 0.5, 0.5, resident=100 * MIB)
    lay(runs[1], 0.7, 0.7, resident=300 * MIB, results={"steps": 12, "kept_step": 12})
    (runs[0].folder / "costs.json").write_text(json.dumps({"peak_live": 9 * MIB, "flops": 24_000_000, "steps": 12}))
    go(plan)
    (method,) = written(plan)["methods"]
    assert method["flops"] == 24_000_000 * 9 / 12
    assert method["peak_live"] == 9 * MIB
    assert method["peak_resident"] == 300 * MIB
    assert method["seconds"]["values"] == [7.5, 15.0]
    assert method["parameters"] == {"trainable": 250, "total": 1000}
    assert (method["steps"], method["best_steps"]) == ([6, 12], [3, 12])
    row = next(line for line in (plan.folder / "comparison.md").read_text().splitlines() if "bitfit" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("bitfit", "0.6000 ± 0.1414", "0.6000 ± 0.1414", "2", "250 (25.0 %)", "4.00 MiB", "1.00 MiB", "2.00 MiB"),
        *("9.00 MiB", "300 MiB", "18.0 MFLOP", "11 s", "6, 12", "3, 12"),
    ]


def test_what_is_not_complete_is_in_no_mean(project: Path, tmp_path: Path) -> None:
    """A grid that is not through has no choice, and a seed that is missing is counted as missing."""
    plan = plan_of(project, tmp_path, methods=["bitfit,full"], seeds="2", sweeps=["full:optim.lr=1,2"])
    bitfit, full = all_of(plan)
    lay(bitfit[0][0], 0.6, 0.6)
    lay(full[0][0], 0.9, 0.9)
    found = runner.write(plan)
    assert not found.complete
    assert found.notes()[0] == "Not complete: 2 of 5 runs are done."
    one, other = written(plan)["methods"]
    assert one["reported"]["values"] == [0.6]
    assert (other["reported"], other["chosen"]) == (None, None)
    assert re.search(r"\| bitfit \|.*\| 1 of 2 \|", re.sub(" +", " ", (plan.folder / "comparison.md").read_text()))


def test_damaged_results_are_one_line(project: Path, tmp_path: Path) -> None:
    plan = plan_of(project, tmp_path, methods=["bitfit"])
    ((runs,),) = all_of(plan)
    lay(runs[0], 0.5)
    (runs[0].folder / "results.json").write_text('{"steps": 6}')
    with pytest.raises(ReportError, match=r"results\.json is damaged.*remove the folder"):
        runner.write(plan)


def test_deviations_have_the_digits_of_the_mean() -> None:
    texts = [Spread(values).text() for values in [(0.5, 0.6), (12.0, 14.0), (0.0, 0.0), (3e-7, 5e-7), (0.25,)]]
    assert texts == ["0.5500 ± 0.0707", "13.00 ± 1.41", "0 ± 0", "4e-7 ± 1.4e-7", "0.2500"]


def test_the_front_is_what_nothing_beats() -> None:
    points = [
        Point(name, cost, score, None) for name, cost, score in (("a", 1, 5), ("b", 2, 4), ("c", 2, 6), ("d", 3, 6))
    ]
    assert [point.name for point in front(points, rising=True)] == ["a", "c"]
    assert [point.name for point in front(points, rising=False)] == ["a", "b"]


class Page(HTMLParser):
    """What a page would fetch, where it leads, and the names beside the points."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.names: list[str] = []
        self._named = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("link", "img", "iframe", "script", "object", "embed"):
            self.fetched += [str(found[key]) for key in ("src", "href", "data") if key in found]
        if tag == "a":
            self.links.append(str(found["href"]))
        self._named = tag == "span" and found.get("class") == "name"

    def handle_data(self, data: str) -> None:
        if self._named:
            self.names.append(data)


def test_the_page_names_every_method_and_fetches_nothing(project: Path, tmp_path: Path) -> None:
    """Each figure has each method; every run's report is linked; what a user wrote is escaped."""
    methods = ["bitfit,full,{name: lora, targets: '<b>.*'}"]
    plan = plan_of(project, tmp_path, methods=methods, seeds="2", words=["name=all"], command=["trimtab", "<i>"])
    for number, grid in enumerate(all_of(plan)):
        for seed, run in enumerate(grid[0]):
            lay(run, 0.5 + 0.1 * number, 0.5 + 0.1 * number + 0.01 * seed, trainable=10 ** (number + 1))
        costs = {"peak_live": 9 * MIB * (number + 1), "flops": 10**9 * (3 - number), "steps": 6}
        (grid[0][0].folder / "costs.json").write_text(json.dumps(costs))
    runner.write(plan)
    text = (plan.folder / "comparison.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")
    assert sorted(page.names) == sorted(["bitfit", "full", "lora targets=<b>.*"] * 4)
    assert len(re.findall(r'<path class="line" style="stroke:var\(--train\)"', text)) == 3 * 4  # error bars
    reports = [link for link in page.links if not link.startswith("#")]
    assert len(reports) == 6
    assert all((plan.folder / link).is_file() for link in reports)
    assert "<b>" not in re.sub(r'<div class="card">.*?</div>', "", text)
    assert "<i>" not in text


def test_a_method_without_costs_is_left_out_of_a_figure_by_name(project: Path, tmp_path: Path) -> None:
    plan = plan_of(project, tmp_path, methods=["bitfit,full"])
    for grid in all_of(plan):
        lay(grid[0][0], 0.5, 0.5)
    runner.write(plan)
    text = (plan.folder / "comparison.html").read_text()
    assert text.count("<figcaption>Not drawn, for want of figures: bitfit, full.<") == 2  # memory, computation
    assert sorted(Page(text).names) == ["bitfit", "bitfit", "full", "full"]


def test_a_page_of_nothing_can_be_written(project: Path, tmp_path: Path) -> None:
    plan = plan_of(project, tmp_path, methods=["bitfit,full"])
    plan.folder.mkdir(parents=True)
    runner.write(plan)
    assert "No method has a score yet." in (plan.folder / "comparison.html").read_text()
