"""Run by test_killed_builds: builds one store in processes that are killed, each at another point.

Usage: killed_builds.py SOURCE FOLDER LOG. A forked child builds and kills itself (SIGKILL) at a set point; the next
takes it up. Writes one JSON line a child: where it was to die, how it ended, shards and tokens it found done.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from data_for_tests import config

import trimtab.data.build as build
from trimtab.data.build import Build
from trimtab.data.tokens import Progress, build_store

SMALL = 4000


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(source: str, folder: Path, point: str, log: Path) -> None:
    calls: dict[str, int] = {}
    write = build.write_whole

    def progress(now: Progress) -> None:
        calls[now.stage] = calls.get(now.stage, 0) + 1
        if now.stage == "tokenize" and calls[now.stage] == 1:
            with open(log, "a") as file:
                file.write(json.dumps({"point": point, "documents_done": now.documents}) + "\n")
        if point == f"{now.stage} {calls[now.stage]}":
            die()
        if point == "slow" and now.stage == "tokenize":
            time.sleep(0.2)

    if point == "before the manifest":
        build.write_whole = lambda path, data: die() if path.name == "manifest.json" else write(path, data)
    if point == "before the plan":
        build.write_whole = lambda path, data: die() if path.name == "plan.json" else write(path, data)
    if point == "before cleaning":
        Build.clean = die
    build_store(config(source, workers=2), 3, folder, progress, shard_bytes=SMALL)


def run(action: Callable[[], None]) -> int:
    """Fork; returns the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def main(source: str, folder: Path, log: Path) -> None:
    points = ["before the plan", "train tokenizer 1", "tokenize 2", "slow", "tokenize 4", "assemble 2"]
    for point in [*points, "before the manifest", "before cleaning", "never"]:
        pid = run(lambda point=point: child(source, folder, point, log))
        if point == "slow":  # killed from outside, somewhere between two steps
            had = len(list((folder / "shards").glob("*.safetensors")))
            while len(list((folder / "shards").glob("*.safetensors"))) <= had:
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            (folder / "shards" / "00000099.safetensors.1.tmp").write_bytes(b"half")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        expected = 0 if point == "never" else -signal.SIGKILL
        assert code == expected, (point, code)
    # Two at once, on one new store.
    both = folder.with_name("both")
    pids = [run(lambda i=i: child(source, both, f"twin {i}", log)) for i in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0, 0], codes


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
