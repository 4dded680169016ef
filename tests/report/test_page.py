"""The report page, and the reader behind it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakerun import PARAMETERS, config, make_run, metrics, spectrum, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from reportpage import Page, report

from trimtab.errors import ReportError
from trimtab.report.page import summary, write_report
from trimtab.report.runfolder import read_run
from trimtab.report.spectrum import MatrixSpectrum, Spectrum

TITLES = ["Loss", "Learning rate", "Throughput", "Gradient norm"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "relora-130m", steps=400, layers=2)


# -- a whole run -------------------------------------------------------------------------------


def test_page_has_each_section_of_a_finished_run(run: Path) -> None:
    """Curves, schedule, throughput, tables, spectrum, config and commands are there, and say what the files say."""
    page = report(run)
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert ids == ["summary", "curves", "memory", "spectrum", "config", "repeat"]
    assert set(TITLES) <= page.series().keys()
    final = metrics(config(400))[-1]
    for expected in (
        "relora-130m",
        "ReLoRA, rank 128",
        "2025-10-09 08:53 UTC",
        f"{final['loss']:.3f}",
        f"{final['perplexity']:.2f}",
        f"{final['bits_per_byte']:.3f}",
        "The run finished after 400 steps",
        "4 restarts, after steps 146, 212, 278, 344",
        "of at most 640 (4 restarts, r = 128 each)",
        "134,105,856",
        "71,584,512",
        "peak resident 3.00 GiB",
        "gate_proj",
        "r = 128",
        "(k + 1) r = 640",
        "restart_every: 66",
        "trimtab pretrain runs/relora-130m/config.yaml name=relora-130m-again",
        "torch 2.13.0",
        "nats/token",
        "tokens/s",
        "multiplier",
    ):
        assert expected in page.text, expected


def test_page_loads_nothing(run: Path) -> None:
    """No address, no external style, script, font or picture; and the policy forbids it."""
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"<script>.*?</script>", "", html, flags=re.S))
    assert "url(" not in html
    assert "@import" not in html
    for attribute in ("src", "srcset", "data", "action", "poster", "xlink:href"):
        assert [tag for tag, attrs in page.tags if attribute in attrs] == []
    assert all(target.startswith("#") for tag, attrs in page.tags if (target := attrs.get("href") or "#"))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "fetch" not in html.split("<script>")[1]


def test_policy_allows_the_pages_own_script_alone(run: Path) -> None:
    """The hash in the policy is the script's."""
    import base64
    import hashlib

    html = write_report(run).read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_same_run_gives_the_same_page_anywhere(run: Path, tmp_path: Path) -> None:
    """No clock, no absolute path and no random id is in the page."""
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere" / run.name)
    assert write_report(moved).read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_long_run_stays_small(tmp_path: Path) -> None:
    """100,000 logged steps, a 24-layer spectrum: under 1.5 MB, and one spike among them is still drawn."""
    folder = make_run(tmp_path / "long", steps=1000)
    tree = config(100_000)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    events = metrics(tree, every=1)
    spike = next(event for event in events if event["event"] == "step" and event["step"] == 70_003)
    spike["grad_norm"] = 77.0
    write_lines(folder / "metrics.jsonl", events)
    spectrum(layers=24).save(folder / "spectrum.json")
    page = report(folder)
    assert (folder / "report.html").stat().st_size < 1_500_000
    (norm,) = page.series()["Gradient norm"]
    assert norm["y"][norm["x"].index(70_003)] == 77.0


def test_no_temporary_file_stays(run: Path) -> None:
    """The page is written whole, and nothing beside it."""
    before = {path.name for path in run.iterdir()}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


# -- what is missing, torn or hostile ----------------------------------------------------------


def test_unfinished_run_says_so(run: Path) -> None:
    """No spectrum, no final evaluation: the page says where the run stands and how to go on."""
    (run / "spectrum.json").unlink()
    events = metrics(config(400), upto=150)
    write_lines(run / "metrics.jsonl", [*events, {"event": "stop", "step": 150, "time": 1.0, "reason": "Ctrl-C"}])
    text = report(run).text
    assert "has not finished: it stands at step 150 of 400" in text
    assert "It stopped: Ctrl-C" in text
    assert "spectrum of the update is computed when the run ends" in text
    assert "trimtab pretrain --resume runs/relora-130m" in text


@pytest.mark.parametrize("kept", [("config.yaml",), ("metrics.jsonl",)])
def test_page_of_a_run_with_one_file(run: Path, kept: tuple[str, ...]) -> None:
    """A config or metrics alone still make a page; what is missing is named."""
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()
    text = report(run).text
    assert ("config.yaml is missing" in text) == ("config.yaml" not in kept)
    assert ("metrics.jsonl is missing" in text) == ("metrics.jsonl" not in kept)


def test_what_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    """A wrong path is one clear line."""
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"neither config\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_torn_last_line_is_silent_and_a_torn_middle_is_told(run: Path) -> None:
    """A kill tears the last line, which is no news; damage before it is."""
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"event": "step", "st')
    assert read_run(run).notices == []
    lines = whole.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:3], b'{"torn\n', b"[1]\n", *lines[3:]]))
    assert read_run(run).notices == ["metrics.jsonl: lines 4, 5 could not be read and left out (2 in all)."]
    assert "lines 4, 5" in report(run).text


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["config.yaml", "metrics.jsonl", "parameters.json", "spectrum.json"]),
    junk=st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["event", "step", "loss", "time", "phases", "total", "format", "lr"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries(
            {"event": st.sampled_from(["step", "eval", "restart", "resume", "run", "switch", "stop"])},
            optional=dict.fromkeys(
                ("step", "loss", "time", "lr", "tokens", "reason", "grad_norm", "perplexity", "final"),
                st.none() | st.booleans() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=5),
            ),
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_no_content_of_a_file_breaks_the_page(tmp_path_factory: pytest.TempPathFactory, name: str, junk: bytes) -> None:
    """Whatever stands in one of the files, the page is written and well formed."""
    run = tmp_path_factory.mktemp("r") / "junk"
    make_run(run, steps=60, layers=1)
    (run / name).write_bytes(junk + b"\n" + ((run / name).read_bytes() if name == "metrics.jsonl" else b""))
    assert "What this run shows" in report(run).text


def test_nothing_of_the_run_becomes_markup(tmp_path: Path) -> None:
    """Names, settings, reasons and types with markup in them stay text, on the page and under the cross-hair."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&"
    folder = make_run(tmp_path / "<b onclick=alert(1)>x&'\"", steps=60)
    tree = config(60)
    tree["data"]["sources"] = [evil]
    tree["model"]["name"] = evil
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    events = metrics(tree, upto=40)
    events[0]["device"] = evil
    write_lines(folder / "metrics.jsonl", [*events, {"event": "stop", "step": 40, "reason": evil}])
    matrix = MatrixSpectrum(evil, evil, (2, 2), (1.0, 0.5), 2, 1.1, 1.0)
    Spectrum((matrix,), rank=1, restarts=0).save(folder / "spectrum.json")
    parameters = json.loads(json.dumps(PARAMETERS))
    parameters["phases"][0] |= {"phase": evil, "groups": {evil: 1}, "memory": {evil: 10}}
    (folder / "parameters.json").write_text(json.dumps(parameters))
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert html.count("<script") == 1
    assert not {"img", "b onclick"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if any(key.startswith("on") for key in attrs)]
    assert evil in page.text


@pytest.mark.parametrize("value", ["1e308", "-1e308", "9" * 400, "NaN", "Infinity", "null", "true", '"x"', "[]"])
def test_values_that_are_no_sensible_numbers_are_left_out(run: Path, value: str) -> None:
    """Every logged number may be nonsense: the page stands, and a loss that is not finite is told."""
    keys = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "epoch", "time", "perplexity", "bits_per_byte")
    body = ", ".join(f'"{key}": {value}' for key in keys)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"event": "step", "step": 401, {body}}}\n{{"event": "eval", "step": 401, {body}}}\n')
        file.write(f'{{"event": "step", "step": {value}, "loss": 1}}\n')
    page = report(run)
    assert "The loss was not a finite number at step 401" in page.text
    assert 401 not in page.series()["Throughput"][0]["x"]


@pytest.mark.parametrize("value", ["-1", "9" * 400, "NaN", "1e400", "null", '"many"', "{}"])
def test_a_damaged_parameter_table_is_left_out_and_told(run: Path, value: str) -> None:
    """Counts that are none leave the table out, with a notice."""
    (run / "parameters.json").write_text(f'{{"phases": [{{"phase": "x", "total": {value}, "trainable": 1}}]}}')
    assert "parameters.json could not be read" in report(run).text


def test_parameters_of_which_there_are_none_have_no_column(run: Path) -> None:
    phase = json.loads(json.dumps(PARAMETERS["phases"][1]))
    (run / "parameters.json").write_text(json.dumps({"phases": [phase]}))
    assert {"in adapter", "in head", "carry (host memory)"} <= set(report(run).words)
    phase["groups"] |= {"head": 0}
    phase["memory"] |= {"carry_host": 0}
    (run / "parameters.json").write_text(json.dumps({"phases": [phase]}))
    there = set(report(run).words)
    assert "in adapter" in there and not {"in base", "in head", "carry (host memory)"} & there


def test_a_chart_below_a_table_stands_apart_from_it(run: Path) -> None:
    """The table of scores is followed by the loss, with the space that two charts have between them."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["event"] == "eval"
    lines[-1] = json.dumps(last | {"scores": {"validation": {"accuracy": 0.5}}})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    html = write_report(run).read_text(encoding="utf-8")
    assert '</table></div><figure class="chart">' in html
    apart = re.search(r"([^{}]*)\{margin-top:1\.7rem\}", html)
    assert apart is not None
    assert {".chart+.chart", ".scroll+.chart", ".chart+.scroll"} <= set(apart[1].strip().split(","))


# -- resumed runs ------------------------------------------------------------------------------


def test_steps_that_a_resume_took_back_are_left_out(run: Path) -> None:
    """Killed at 300, resumed from 200: each step once, restarts once, and the time of both sessions counts."""
    before, after = metrics(config(400), upto=300), metrics(config(400))
    for event in before:
        if event["event"] == "step" and event["step"] > 200:
            event["loss"] = 99.0
    later = [dict(event, time=event["time"] + 5000) for event in after if event["step"] > 200]
    resume = [
        {"event": "run", "step": 0, "time": later[0]["time"], "device": "cuda"},
        {"event": "resume", "step": 200, "time": later[0]["time"]},
    ]
    write_lines(run / "metrics.jsonl", [*before, *resume, *later])
    found = read_run(run)
    x, y = found.series("loss")
    assert x.tolist() == [1, *range(10, 401, 10)]
    assert y.max() < 99
    assert found.restarts == [146, 212, 278, 344]
    assert (found.resumes, found.sessions, found.machine["device"]) == ([200], 2, "cuda")
    assert found.seconds == pytest.approx(300 * 0.25 + (400 * 0.25 + 4 - later[0]["time"] + 1_760_005_000), abs=1e-3)
    assert found.final is not None


def test_a_run_that_goes_on_after_its_end_is_unfinished(run: Path) -> None:
    """More steps after a final evaluation: it is not the final one any more, and an old stop is forgotten."""
    events = [*metrics(config(400)), {"event": "stop", "step": 400, "reason": "done", "time": 1.0}]
    more = {"event": "step", "step": 410, "time": 2.0, "loss": 3.0}
    write_lines(run / "metrics.jsonl", [*events, {"event": "resume", "step": 400, "time": 1.5}, more])
    found = read_run(run)
    assert found.final is None
    assert found.stop is None
    assert "gone on since this spectrum" in report(run).text
    assert summary(found, None)[0].startswith("The run has not finished: it stands at step 410")


# -- what the figures say ----------------------------------------------------------------------


def test_planned_rate_is_the_schedule(run: Path) -> None:
    """The planned line is peak x multiplier at completed steps, with both sides of every jump; points lie on it."""
    planned, logged = report(run).series()["Learning rate"]
    parsed = read_run(run).config
    assert parsed is not None
    plan = parsed.multiplier()
    for x, y in zip(planned["x"], planned["y"], strict=True):
        peak = 5e-4 if x <= 80 else 1e-3
        assert y == pytest.approx(peak * plan(int(x) - 1), rel=1e-4)
    for restart in plan.restarts:
        assert {restart, restart + 1, restart + plan.rewarm_steps} <= set(planned["x"])
    assert np.interp(logged["x"], planned["x"], planned["y"]) == pytest.approx(logged["y"], rel=1e-3)


def test_restarts_and_switch_are_marked_on_every_curve(run: Path) -> None:
    """Each of the four curves over steps has one upright line a restart, at the restart's step."""
    page = report(run)
    paths = [str(attrs["d"]) for tag, attrs in page.tags if tag == "path" and "mark restart" in str(attrs.get("class"))]
    expected = "".join(f"M{1000 * step / 400:g} 0V1000" for step in (146, 212, 278, 344))
    assert paths.count(expected) == 4
    assert sum("mark switch" in str(attrs.get("class")) for _, attrs in page.tags) >= 4


@pytest.mark.parametrize(
    ("rank", "restarts", "ranks", "expected"),
    [
        (4, 2, [8, 12], "rank 8 to 12 (median 10), of at most 12 (2 restarts, r = 4 each). Every one is above r"),
        (4, 2, [3, 12], "1 of them are above r"),
        (4, 0, [4, 4], "rank 4, of at most 4: one adapter, never restarted"),
        (4, 1, [9, 5], "cannot come from the adapters"),
        (None, None, [9, 5], "counting singular values above 0.01 of the largest"),
    ],
)
def test_rank_sentence(run: Path, rank: int | None, restarts: int | None, ranks: list[int], expected: str) -> None:
    """The verdict on the rank follows from r, k and the ranks alone."""
    matrices = tuple(MatrixSpectrum(f"l.{i}.q", "q", (16, 16), (1.0,), n, 1.0, 1.0) for i, n in enumerate(ranks))
    lines = summary(read_run(run), Spectrum(matrices, rank=rank, restarts=restarts))
    assert any(expected in line for line in lines)


def test_spectrum_without_hints_takes_them_from_the_run(run: Path) -> None:
    """r comes from the config and k from the restarts that happened."""
    made = spectrum(layers=2)
    Spectrum(made.matrices).save(run / "spectrum.json")
    assert "of at most 640 (4 restarts, r = 128 each)" in report(run).text


def test_full_training_has_no_rank_lines(run: Path) -> None:
    """A method without a rank has nothing to compare with."""
    tree = config(400)
    tree["method"] = {"name": "full"}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    Spectrum(spectrum(layers=2).matrices).save(run / "spectrum.json")
    text = report(run).text
    assert "plain LoRA" not in text
    assert "r = " not in text
