import json
import os
import subprocess
import sys
from pathlib import Path

from data_for_tests import config, contents, rows, write_jsonl

from trimtab.data.tokens import build_store


def test_a_build_killed_at_every_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL before the plan, in and between all stages and after the manifest; then two builds at once.

    Each next process takes up what the one before it had done. The bytes are those of a build that nobody
    disturbed, no temporary file is left, and of two builds at once one does the work.
    """
    write_jsonl(tmp_path / "x" / "a.jsonl", rows(160))
    write_jsonl(tmp_path / "x" / "b.jsonl", rows(80, first=160))
    here = Path(__file__).parent
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, str(here / "killed_builds.py"), str(tmp_path / "x"), str(tmp_path / "s"), str(log)],
        env={**os.environ, "PYTHONPATH": str(here.parents[1] / "src")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    build_store(config(tmp_path / "x"), 3, tmp_path / "fresh", shard_bytes=4000)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "both") == contents(tmp_path / "fresh")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    taken_up = {line["point"]: line["documents_done"] for line in lines}
    assert "train tokenizer 1" not in taken_up
    assert 0 == taken_up["tokenize 2"] < taken_up["slow"] <= taken_up["tokenize 4"] < taken_up["assemble 2"] < 240
    assert taken_up["before the manifest"] == 240
    assert "never" not in taken_up  # the manifest was there: nothing left to do but to clean
    assert sum(point.startswith("twin") for point in taken_up) == 1
