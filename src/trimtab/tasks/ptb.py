"""Words as the MS-COCO caption scripts see them: Stanford's PTBTokenizer, lower-cased, less punctuation.

The scripts run `edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase` of CoreNLP 3.4.1 and drop what is
punctuation. Its rules for plain English are written anew here; who has the jar can have it run instead.
Of brackets the scripts drop none: their list has `-LRB-`, and by then the words are lower-cased.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from trimtab.errors import ConfigError
from trimtab.tasks.pairs import find_jar

_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "..."])

_SPELLED = str.maketrans({"‘": "`", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})  # fmt: skip
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"}
_WRITTEN |= {'"': "''", "½": "1/2", "¼": "1/4", "¾": "3/4"}

#: Short forms that keep their full stop, and those that do so before a number alone.
_SHORT = "mr|mrs|ms|dr|prof|st|ave|rd|blvd|mt|vs|etc|inc|ltd|co|corp|jr|sr|jan|feb|mar|apr|jun|jul|aug|sept?|oct"
_SHORT += r"|nov|dec|mon|tues?|wed|thurs?|fri|ph\.d"
_BEFORE_NUMBER = "nos?|pp?|vol|fig"

_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s"<>()]+                      # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | <[a-z/][^\s<>]*>                                    # a tag
    | \.{{3,}} | -{{2,}} | `` | '' | [?!]+
    | (?:{_SHORT})\.(?!\w)
    | (?:{_BEFORE_NUMBER})\.(?=\s?\d)
    | [^\W\d_](?:\.[^\W\d_])*\.(?!\w)                     # u.s.  p.m.  a.
    | \d+(?::\d\d)?(?=[ap]m\b)(?<=:\d\d)                  # 7:30 of 7:30pm
    | \d+(?:[.,:/-]\d+)*(?:-?[^\W\d_]+)*(?:-\w+)*         # 3.5  1,000  20-25  5/5  7pm  1-out-of-5
    | '(?:em|til|cause|n'|\d\ds?|s|m|d|ll|re|ve)(?!\w)
    | [^\W\d_]+(?:[.?!][^\W\d_]+)+(?!-)(?:'\w+)?          # a blank is missing: good.it's
    | (?-i:[A-Z]+&[A-Z]+)
    | \w+(?:['\-/]\w+)*                                   # kid-friendly  and/or  o'clock
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_TWO_WORDS = {word: (word[:-2], word[-2:]) for word in ("gonna", "gotta", "wanna", "gimme", "lemme")}
_TWO_WORDS |= {"cannot": ("can", "not"), "'tis": ("'t", "is")}


def tokenize(texts: Sequence[str], jar: str | None = None) -> list[list[str]]:
    """The words of each text, lower-cased, without punctuation.

    Args:
        texts: any.
        jar: path of stanford-corenlp-3.4.1.jar, which is then run (with Java) in place of the rules here.

    Raises:
        ConfigError: the jar does not exist, or Java cannot run it.
    """
    lines = [" ".join(text.split()) for text in texts]
    found = _run(lines, jar) if jar is not None else map(_tokens, lines)
    return [[word for word in words if word not in _PUNCTUATION] for words in found]


def _tokens(line: str) -> list[str]:
    found: list[str] = []
    for match in _TOKEN.finditer(line.translate(_SPELLED)):
        token = match.group().lower()
        if token in _TWO_WORDS:
            found += _TWO_WORDS[token]
        elif token[:2] == "..":
            found.append("...")
        elif token[:2] == "--":
            found.append("--")
        elif clitic := _CLITIC.match(token):
            found += clitic.groups()
        else:
            found.append(_WRITTEN.get(token, token))
    return found


def _run(lines: list[str], jar: str) -> list[list[str]]:
    path = find_jar(jar, "tokenizer_jar")
    command = ["java", "-cp", str(path), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8")
    found = [line.split() for line in done.stdout.split("\n")[: len(lines)]]
    if done.returncode or len(found) != len(lines):
        reason = (done.stderr.strip().splitlines() or ["it wrote no line for some texts"])[0]
        raise ConfigError(f"tokenizer_jar = {jar!r}: Java could not run Stanford's PTBTokenizer from it ({reason})")
    return found
