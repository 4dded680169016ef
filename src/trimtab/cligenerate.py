"""`trimtab generate`: parse, call, print. What it does is done in `trimtab.generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from trimtab.clierrors import one_line_errors
from trimtab.cliparts import interrupted
from trimtab.errors import ConfigError, TrimtabError
from trimtab.words import many

if TYPE_CHECKING:
    from trimtab.generate import Asked, Generator, Prompt, Sampling

GENERATE = """Write with a model: answer prompts, or chat with it on the terminal.

\b
ARGUMENTS
  BASE  a causal or an encoder-decoder model (a folder, or a name on the Hugging Face hub), or the
        folder of a run, which stands for its model and its adapter (called run)
  -     read one prompt, to its end, from standard input

\b
EXAMPLES
  trimtab generate HuggingFaceTB/SmolLM2-135M-Instruct
  trimtab generate runs/demo --prompt 'The state of the Union is' --temperature 0.8
  trimtab generate base --adapter a=runs/a/adapter --adapter b=runs/b/adapter
  trimtab generate base --adapter runs/a/adapter --file questions.jsonl --out answers.jsonl
  git diff | trimtab generate base - --system 'Say in a line what this changes.'

\b
WHAT IS ASKED
  --prompt, --file or - ; without any, on a terminal, a chat begins. /help lists its commands:
  /adapter NAME or none, /adapters, /system TEXT, /reset, /quit. Ctrl-C ends an answer, Ctrl-D the
  chat. A chat that outgrows the model's positions loses its oldest turns, and says so.
  A file is .txt with a prompt a line, or .jsonl (.json, .csv, .parquet) with a column prompt, or
  messages: [{role, content}]; for the run of a task also with the task's own column (text, source).

\b
HOW IT IS ASKED
  A model with a chat template is given a prompt as the user's message in it; --no-chat leaves the
  template out. The run of a task with sources (seq2seq, e2e, labels in words) is given a prompt as
  the source: in the run's own prompt template, as in training, and in no chat template; --raw gives
  it as it stands. The run of the task chat has its task.system, unless --system or the chat itself
  brings another. Any other model goes on from the prompt as it stands.

\b
HOW TOKENS ARE CHOSEN
  What no option says is the model's own generation_config.json's; where that says nothing, the
  likeliest token is taken each time, and at most 256 of them. --temperature, --top-p or --top-k
  draw; --temperature 0 never does.

\b
FILES
  --out gets an object a line, as they are made: prompt or messages, answer, stop (end, or what cut
  it: length, positions) and tokens.

\b
EXIT STATUS
  0    all is answered
  1    a fault of the program, with a traceback; please report it
  2    something is wrong that you can mend: one line on standard error says what
  130  Ctrl-C; what is in --out by then stays
"""


class GenerateCommand(TyperCommand):
    """`generate`, with a usage line of words; what they mean stands in the help text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["BASE", "[-]", "[OPTIONS]"]


class WeightDtype(str, Enum):  # noqa: UP042  (typer shows the members of a str enum)
    """A dtype to compute in, on the command line."""

    FP32 = "fp32"
    BF16 = "bf16"


def _whole(word: str) -> int:
    """A whole number on the command line."""
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is not a whole number") from None


def _number(word: str) -> float:
    """A number on the command line."""
    try:
        return float(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is not a number") from None


@one_line_errors
def generate(
    base: Annotated[str, typer.Argument(metavar="BASE", hidden=True)],
    standard_input: Annotated[str | None, typer.Argument(metavar="-", hidden=True)] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="[NAME=]PATH",
            help="An adapter folder, of trimtab or PEFT; in a chat several, the first of which answers at first. "
            "[default NAME: the folder's, or that of the run it is in]",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Answer this; may be repeated.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="F", help="Answer what is in this file; - is standard input.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.jsonl", help="Write the answers to this new file, not to the terminal."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template. [default: where it has one]"),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Give prompts as they stand: in no chat template, and not as a source of the run's task."
        ),
    ] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt for chats.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", metavar="N", parser=_whole, help="Of an answer. [default: the model's, or 256]"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", metavar="T", parser=_number, help="0 takes the likeliest token. [default: the model's]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            parser=_number,
            help="Draw from the likeliest with this share. [default: the model's]",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", metavar="K", parser=_whole, help="Draw from the K likeliest; 0: from all. [default: the model's]"
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty", metavar="X", parser=_number, help="Above 1: repeat less. [default: the model's]"
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option("--beams", metavar="N", parser=_whole, help="Of a beam search. [default: the model's, or 1]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            parser=_whole,
            help="Draw from this seed, anew for each answer. [default: another each time]",
        ),
    ] = None,
    dtype: Annotated[
        WeightDtype | None,
        typer.Option("--dtype", help="Of the weights. [default: bf16 on a GPU, fp32 on a CPU]", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="D", help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> int:
    """Write; the help text above is what a user reads."""
    words = [
        name for name, given in (("--prompt", prompt), ("--file", file), ("-", standard_input)) if given is not None
    ]
    if standard_input not in (None, "-"):
        raise ConfigError(f"{standard_input}: a prompt is given as --prompt TEXT; the second word can only be -")
    if raw and chat:
        raise ConfigError("--raw and --chat exclude each other; give one of them")
    if len(words) > 1:
        raise ConfigError(f"{' and '.join(words)} exclude each other; give one of them")
    talk = not words
    if talk and not sys.stdin.isatty():
        raise ConfigError(
            "a chat needs a terminal; give --prompt TEXT, --file F, - for one prompt from standard input, or --file - "
            "for one a line"
        )
    if talk and out is not None:
        raise ConfigError("--out is for the answers to --prompt, --file or -")
    folders = _named_folders(adapter or [])
    if len(folders) > 1 and not talk:
        raise ConfigError("several adapters are for a chat, where /adapter NAME switches; answer prompts with one")
    from trimtab.generate import Sampling, find_base, open_generator, read_prompts

    with _as_options():
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            beams=beams,
            seed=seed,
        )
    task = find_base(base).task
    prompts = (
        read_prompts(file, task.asked_columns if task else ())
        if file is not None
        else _given(prompt, standard_input, raw=raw)
    )
    if out is not None:
        _check_new(out)
    with _as_options():
        generator = open_generator(base, folders, dtype=_torch_dtype(dtype), device=device, raw=raw, sampling=sampling)
    if interrupted:  # a Ctrl-C during the imports can get lost in a callback of theirs
        raise KeyboardInterrupt
    if talk:
        from trimtab.generate import Conversation

        with contextlib.suppress(ImportError):  # with it, a line can be edited, and earlier ones called back
            import readline  # noqa: F401
        Conversation(generator, sampling, read=input, write=_show, system=system, chat=chat).run()
        return 0
    asked = [_with_system(generator, p, system, chat) for p in prompts]
    if out is None:
        _print_all(generator, sampling, asked, chat)
    else:
        _write_all(generator, sampling, asked, chat, out)
    return 0


@contextlib.contextmanager
def _as_options() -> Iterator[None]:
    """Within, errors name the options of this command, where the library speaks of its settings."""
    from trimtab.generate import Sampling

    names = [field.name for field in dataclasses.fields(Sampling)]
    # Those of one word are settings only where they have a value.
    unmistakable = "|".join(name for name in names if "_" in name)
    setting = rf"(?<![\w/.-])(?:(?:{'|'.join(names)})(?= = )|(?:{unmistakable})(?![\w/.-]))"
    try:
        yield
    except ConfigError as error:
        text = re.sub(setting, lambda found: f"--{found[0].replace('_', '-')}", str(error))
        raise ConfigError(text) from error


def _check_new(out: Path) -> None:
    """See that a file can be made."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a new file, such as {out / 'answers.jsonl'}")
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; name a new file, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}")


def _given(texts: list[str] | None, standard_input: str | None, *, raw: bool) -> list[Prompt]:
    from trimtab.generate import Prompt

    if standard_input is not None:
        text = sys.stdin.read()
        return [Prompt("standard input", text if raw else text.rstrip("\n"))]
    return [Prompt("--prompt", text) for text in texts or []]


def _named_folders(words: Iterable[str]) -> dict[str, Path]:
    """The adapter folders of the command line by their names."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        path = Path(word if not equals or Path(word).exists() else rest).expanduser()
        if not equals or Path(word).exists():
            whole = path.resolve()
            name = whole.parent.name if whole.name == "adapter" else whole.name
        if not name:
            raise ConfigError(f"--adapter {word}: an adapter's name is a text that is not empty")
        if name in found:
            raise ConfigError(f"--adapter: two are called {name!r}; give them names, NAME=PATH")
        found[name] = path
    return found


def _torch_dtype(dtype: WeightDtype | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype.value if dtype else None]


def _with_system(generator: Generator, prompt: Prompt, system: str | None, chat: bool | None) -> Prompt:
    """A prompt with the system prompt before it; whatever is wrong with it is found before any is answered."""
    from trimtab.generate import Message

    asked: Asked = prompt.asked
    if system is not None:
        if not (generator.chats if chat is None else chat):
            raise ConfigError("--system has its place in a chat template, and none is in use; put it into the prompt")
        turns = [Message("user", asked)] if isinstance(asked, str) else list(asked)
        asked = turns if turns[0].role == "system" else [Message("system", system), *turns]
    try:
        generator.room(generator.encode(asked, chat=chat))
    except TrimtabError as error:
        raise type(error)(f"{prompt.where}: {error}") from error
    return prompt._replace(asked=asked)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_all(generator: Generator, sampling: Sampling, prompts: list[Prompt], chat: bool | None) -> None:
    """Each answer as it is made; of several, each below what was asked."""
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            asked = prompt.asked if isinstance(prompt.asked, str) else prompt.asked[-1].content
            _show(f"{'' if number == 0 else chr(10)}> {asked}\n")
        generator.answer(prompt.asked, sampling, chat=chat, write=_show)
        _show("\n")


def _write_all(generator: Generator, sampling: Sampling, prompts: list[Prompt], chat: bool | None, out: Path) -> None:
    """Each answer as a line of a file, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    with out.open("x", encoding="utf-8") as file:
        for prompt in track(prompts, "answering", console=console, transient=True, disable=not console.is_terminal):
            answer = generator.answer(prompt.asked, sampling, chat=chat)
            asked: dict[str, Any] = (
                {"prompt": prompt.asked}
                if isinstance(prompt.asked, str)
                else {"messages": [message._asdict() for message in prompt.asked]}
            )
            line = asked | {"answer": answer.text, "stop": answer.stop, "tokens": answer.tokens}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    typer.echo(f"{out}: {many(len(prompts), 'answer')}")
