from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from runs import CONFIG, environment, files_in, run, write_project
from test_loadconfig import FILES, MISTAKES

import trimtab
from trimtab import TrimtabError
from trimtab.errors import CheckpointError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with run.yaml and text.jsonl in it."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD_WORDS = {
    **{kind: ["run.yaml", word] for kind, (word, _) in MISTAKES.items()},
    "no config": [],
    "missing file": ["none.yaml"],
    "two files": ["run.yaml", "other.yaml"],
    "two files that are there": ["run.yaml", "text.jsonl"],
    "a setting without its value": ["run.yaml", "method.rank"],
    "unknown option": ["run.yaml", "--dri-run"],
    "option without its value": ["run.yaml", "--resume"],
    "resume of nothing": ["--resume", "runs/none"],
    "resume of what is no run": ["--resume", "."],
    "missing text": ["run.yaml", "data.sources=[none.txt]"],
    "missing tokenizer": ["run.yaml", "data.tokenizer={path: ./none}"],
    "unknown preset": ["run.yaml", "model.name=llama-9mm"],
    "missing model": ["run.yaml", "model.name=./none"],
    "rank above the model": ["run.yaml", "method.rank=999"],
    "targets that match nothing": ["run.yaml", "method.targets=[q_prj]"],
    "the same in a dry run": ["run.yaml", "method.targets=[q_prj]", "--dry-run"],
}


@pytest.mark.parametrize("words", BAD_WORDS.values(), ids=BAD_WORDS.keys())
def test_a_users_error_is_one_line_and_leaves_no_file(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Status 2, one line on standard error without a traceback, and not a file is written."""
    before = sorted(project.rglob("*"))
    ended = run(capsys, "pretrain", *words)
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("trimtab: ")
    assert "Traceback" not in ended.err
    assert sorted(project.rglob("*")) == before


def test_words_that_are_neither_file_nor_setting_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A forgotten `=` is told from a second file, and no config at all from both, by either command."""
    said = run(capsys, "pretrain", "run.yaml", "method.rank").err
    assert "method.rank: is no file, and a setting is written method.rank=value" in said
    assert "one config file is read, and 2 are given" in run(capsys, "pretrain", "run.yaml", "text.jsonl").err
    for command in ("pretrain", "tokenize"):
        assert "no config file is given; name one" in run(capsys, command).err


def test_an_empty_text_is_one_line_and_leaves_no_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty corpus is a user's error, too, and no run begins."""
    (project / "empty.txt").write_text("")
    ended = run(capsys, "pretrain", "run.yaml", "data.sources=[empty.txt]")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert not (project / "runs" / "small").exists()


@pytest.mark.parametrize("text", [text for text, _ in FILES.values()], ids=FILES.keys())
def test_a_broken_file_is_one_line(project: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Whatever is wrong with the file, `pretrain` and `tokenize` say it in one line with status 2."""
    (project / "run.yaml").write_text(text)
    before = files_in(project)
    for command in ("pretrain", "tokenize"):
        ended = run(capsys, command, "run.yaml")
        assert (ended.status, ended.err.count("\n"), ended.out) == (2, 1, "")
    assert files_in(project) == before


def test_help_is_a_manual_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The pages name the commands, the exit statuses, the files and examples, and keep their lines."""
    page = run(capsys, "--help")
    assert page.status == 0
    for words in ("EXAMPLES\n", "EXIT STATUS\n", "pretrain", "tokenize", "  130  Ctrl-C", "--version"):
        assert words in page.out
    page = run(capsys, "pretrain", "--help")
    assert page.status == 0
    assert page.out.startswith("Usage: trimtab pretrain [CONFIG.yaml] [section.key=value ...] [OPTIONS]\n")
    for words in ("ARGUMENTS\n", "EXAMPLES\n", "FILES\n", "EXIT STATUS\n", "--dry-run", "--resume RUN", "report.html"):
        assert words in page.out
    assert run(capsys, "tokenize", "-h").out.startswith("Usage: trimtab tokenize [CONFIG.yaml]")


def test_no_command_shows_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    """`trimtab` alone is `trimtab --help`."""
    assert run(capsys).out == run(capsys, "--help").out


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints it; an unknown command is a user's error."""
    assert run(capsys, "--version").out == f"trimtab {trimtab.__version__}\n"
    ended = run(capsys, "pretrian")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "pretrian" in ended.err


def test_resume_reads_the_runs_own_config(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a config file, --resume takes that of the run, changed by the words; its status is handed on."""
    (project / "runs" / "a").mkdir(parents=True)
    (project / "runs" / "a" / "config.yaml").write_text(CONFIG)
    seen = []

    class Result:
        exit_status = 130

    def pretrain(config: object, *, resume: object, console: object) -> Result:
        seen.append((config, resume))
        return Result()

    monkeypatch.setattr("trimtab.train.run.pretrain", pretrain)
    assert run(capsys, "pretrain", "--resume", "runs/a", "optim.lr=5e-4").status == 130
    ((config, resume),) = seen
    assert (config.name, config.optim.lr, resume) == ("small", 5e-4, Path("runs/a"))


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (CheckpointError("a line\nand another"), 2, "trimtab: a line and another\n"),
        (PermissionError(13, "Permission denied", "runs/a"), 2, "trimtab: runs/a: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "trimtab: No space left on device\n"),
        (
            KeyboardInterrupt(),
            130,
            "trimtab: interrupted; no step was taken, so that the run can begin anew under its name\n",
        ),
    ],
    ids=["trimtab", "permission", "full disk", "ctrl-c"],
)
def test_what_a_user_can_mend_is_told_from_a_fault(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    error: BaseException, status: int, words: str,
) -> None:  # fmt: skip
    """Errors of ours, of files and of the disk are one line; Ctrl-C is 130."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("trimtab.train.run.pretrain", fail)
    ended = run(capsys, "pretrain", "run.yaml")
    assert (ended.status, ended.err) == (status, words)


def test_nobody_is_told_to_remove_what_no_run_has_left(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of somebody's under the run's name, or behind --resume; or none at all."""
    (project / "runs" / "small").mkdir(parents=True)
    (project / "runs" / "small" / "thesis.tex").write_text("a year of work")

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.train.run.pretrain", stop)
        assert run(capsys, "pretrain", "run.yaml").err == "trimtab: interrupted\n"
    said = run(capsys, "pretrain", "run.yaml", "--resume", "runs/small").err
    assert said == "trimtab: --resume runs/small: there is no checkpoint in it; leave --resume out\n"
    assert run(capsys, "pretrain", "run.yaml", "--resume", "runs/smal").err == (
        "trimtab: --resume runs/smal: there is no such folder\n"
    )


def test_an_interrupted_run_says_how_to_go_on(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        (project / "runs" / "small" / "checkpoints" / "step-00000001").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.train.run.pretrain", stop)
    ended = run(capsys, "pretrain", "run.yaml")
    assert (ended.status, ended.err.count("\n")) == (130, 1)
    assert ended.err.startswith(
        "trimtab: interrupted; the run goes on from its newest checkpoint with --resume runs/small"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ImportError("torn")], ids=["ctrl-c", "lost"])
def test_an_interrupt_is_told_however_it_ends(
    error: BaseException, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the configuration is known there is no folder to speak of; some imports swallow it, and fail."""
    signals: list[int] = []
    monkeypatch.setattr("trimtab.cliparts.interrupted", signals)

    def fail(*args: object, **kwargs: object) -> None:
        signals.append(signal.SIGINT)
        raise error

    lost = isinstance(error, ImportError)
    monkeypatch.setattr("trimtab.train.run.pretrain" if lost else "trimtab.loadconfig.load_config", fail)
    ended = run(capsys, "pretrain", "run.yaml")
    more = "no step was taken, so that the run can begin anew under its name" if lost else "nothing was done"
    assert (ended.status, ended.err) == (130, f"trimtab: interrupted; {more}\n")


def test_a_warning_is_a_line_without_its_place_in_the_program(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trimtab's own; those of others are shown as Python shows them."""
    import trimtab.nn.stacks

    class Result:
        exit_status = 0

    def pretrain(*args: object, **kwargs: object) -> Result:
        warnings.warn_explicit("two\nlines", UserWarning, trimtab.nn.stacks.__file__, 7)
        warnings.warn_explicit("of another", UserWarning, "/elsewhere/torch.py", 7)
        return Result()

    monkeypatch.setattr("trimtab.train.run.pretrain", pretrain)
    with pytest.warns(UserWarning, match="of another") as others:
        ended = run(capsys, "pretrain", "run.yaml")
    assert (ended.err, len(others)) == ("trimtab: warning: two lines\n", 1)


def test_a_fault_of_the_program_keeps_its_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no user can mend is not dressed up as one."""

    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trimtab.train.run.pretrain", fail)
    with pytest.raises(ZeroDivisionError):
        trimtab_main("pretrain", "run.yaml")
    assert not issubclass(ZeroDivisionError, TrimtabError)


def trimtab_main(*words: str) -> None:
    from trimtab.cli import main

    main(words)


def test_help_does_not_wait_for_torch() -> None:
    """A help page imports neither torch nor transformers."""
    code = (
        "import sys; from trimtab.cli import main\n"
        "try: main(['pretrain', '--help'])\n"
        "except SystemExit: sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`trimtab --help | head -1` ends without a traceback."""
    command = f"{sys.executable} -m trimtab.cli --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert done.stdout.startswith("Usage:")
    assert done.stderr == ""


def test_a_console_without_a_reader_falls_silent() -> None:
    """Training goes on when nobody reads its output any more."""
    code = (
        "import sys, os, signal\n"
        "from trimtab.cliparts import open_console\n"
        "console = open_console()\n"
        "for n in range(3000): console.print('x' * 100)\n"
        "print('still there', file=sys.stderr)"
    )
    command = f'{sys.executable} -c "{code}" | head -n 1'
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert done.stderr == "still there\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_its_status(project: Path, number: signal.Signals, status: int) -> None:
    """Ctrl-C and SIGTERM in a real process: a last checkpoint, then 130 and 143."""
    words = ["pretrain", "run.yaml", "train.steps=100000", "dtype=fp32", "log.every=1", "eval.tokens=64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    process.communicate()
    assert process.returncode == status
    assert list((project / "runs" / "small" / "checkpoints").glob("step-*"))
