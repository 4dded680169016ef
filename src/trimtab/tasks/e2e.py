"""E2E NLG: a restaurant's attributes in, a sentence or two about it out; many references, five metrics.

Source: Novikova et al., "The E2E dataset: new challenges for end-to-end generation", arXiv 1706.09254; the form of the
sources, the decoding and the way of scoring are LoRA's (arXiv 2106.09685, github.com/microsoft/LoRA, examples/NLG).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import model_validator

from trimtab.data.readers import decode, opening
from trimtab.errors import ConfigError, DataError
from trimtab.settings import HubSource
from trimtab.tasks.base import Example, Form, Loaded, Prediction, Task, Written
from trimtab.tasks.meteor import NO_METEOR
from trimtab.tasks.nlg import score_generated
from trimtab.tasks.pairs import find_jar, need
from trimtab.tasks.rows import Row, Rows, read_rows, skippable, text_of

SourceForm = Literal["lora", "official"]

#: The official dataset; GEM/e2e_nlg is a cleaned one, whose scores stand beside no paper's of this field.
_HUB = "tuetschek/e2e_nlg"
#: The hub's own conversion of a dataset to Parquet: no script of the repository is run.
_PARQUET = "refs/convert/parquet"

_OFFICIAL = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}
#: Of the attributes and the text, in the official files and at the hub.
_FILE_COLUMNS, _HUB_COLUMNS = ("mr", "ref"), ("meaning_representation", "human_reference")
_LORA = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}

_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\]]*)\]\s*(?:,|$)")
_SPLIT = re.compile(r"([£-])")
_SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
#: What E2E's script repairs in the files it reads: characters that went through a wrong encoding.
_MENDED = {"Ł": "£", "Â£": "£", "Ã©": "é", "ã©": "é"}


class _Pair(NamedTuple):
    source: str
    reference: str


class E2E(Task):
    """E2E NLG (42,061 pairs to train on; 547 and 630 attribute lists with 4,672 and 4,693 references to score).

    Trained on are pairs of an attribute list and one reference; scored is one text for each distinct list against all
    its references, in the order of the file.

    Args:
        folder: a folder with the official files (trainset.csv, devset.csv, testset_w_refs.csv; columns mr, ref), or
            with those of LoRA's repository (train.txt, valid.txt, test.txt; lines `attributes||reference`, in which
            words are split from punctuation, references included: figures of the two are not the same).
        dataset: instead of a folder, a dataset of the hub with columns meaning_representation and human_reference.
            Without either, tuetschek/e2e_nlg in the hub's conversion to Parquet.
        source_form: "lora" writes `name[Blue Spice], priceRange[£20-25]` as LoRA's files do,
            `name : Blue Spice | price : £ 20 - 25`; "official" leaves it as it is.
        meteor_jar: path of meteor-1.5.jar, for the papers' METEOR; needs Java.
        tokenizer_jar: path of stanford-corenlp-3.4.1.jar, for the official words in METEOR, ROUGE-L and CIDEr; needs
            Java. Without it, Trimtab's own rules make them (the same in nearly all texts).
    """

    name: Literal["e2e"] = "e2e"
    folder: str | None = None
    dataset: HubSource | None = None
    source_form: SourceForm = "lora"
    meteor_jar: str | None = None
    tokenizer_jar: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> E2E:
        if self.folder is not None and self.dataset is not None:
            raise ConfigError(
                f"folder = {self.folder!r} and dataset = {self.dataset.dataset!r} exclude each other; set one to null"
            )
        return self

    @property
    def form(self) -> Form:
        """Text."""
        return "text"

    @property
    def decoding(self) -> Mapping[str, Any]:
        """LoRA's (Table 11): beam 10, length penalty 0.9, no 4-gram twice; 64 new tokens as in its commands.

        Its README has a length penalty of 0.8 instead. Its "no 4-gram twice" looks at the answer alone, where that of
        transformers sees a causal model's prompt, too.
        """
        return {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 64}

    def load(self, seed: int = 0, *, training: bool = True) -> Loaded:
        """Read the files; nothing is drawn.

        Raises:
            DataError: the folder or a file is missing, a row is damaged or lacks a column or a reference, attributes
                are not of the form `slot[value], ...`, a split is empty, the hub cannot be reached.
            ConfigError: a jar is missing, Java or a library of the extra `tasks` is not installed, LoRA's files are to
                be turned into the official form.
        """
        self._check_tools()
        splits: dict[str, Sequence[Example]] = {}
        skipped = {}
        for split in _OFFICIAL if training else list(_OFFICIAL)[1:]:
            pairs, skipped[split] = self._read(split)
            if split == "train":
                splits[split] = [Written(pair.source, (pair.reference,)) for pair in pairs]
            else:
                splits[split] = _grouped(pairs)
        notes = (NO_METEOR,) if self.meteor_jar is None else ()
        return Loaded(splits, skipped={name: n for name, n in skipped.items() if n}, notes=notes)

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """BLEU first; see `nlg.score_generated`."""
        texts = ["" if prediction is None else str(prediction) for prediction in predictions]
        references = [cast(Written, example).references for example in examples]
        return score_generated(texts, references, meteor_jar=self.meteor_jar, tokenizer_jar=self.tokenizer_jar)

    @property
    def places(self) -> tuple[str, ...]:
        return ("folder",)

    @property
    def asked_columns(self) -> tuple[str, ...]:
        """The attributes, as the official files and the hub call them."""
        return _FILE_COLUMNS[0], _HUB_COLUMNS[0]

    def as_source(self, text: str) -> str:
        """Attributes as the official files write them, or as LoRA's do (`name : Blue Spice | ...`), which stay so."""
        text = _mend(text)
        if self.source_form == "official" or not _SLOT.match(text):
            return text
        try:
            return _as_lora(text, "the attributes")
        except DataError as error:
            raise ConfigError(str(error)) from error

    def _check_tools(self) -> None:
        """Find out before training what scoring will need after it."""
        need("sacrebleu", "the task e2e")
        need("nltk", "the task e2e")
        for setting in ("meteor_jar", "tokenizer_jar"):
            if (jar := getattr(self, setting)) is not None:
                find_jar(jar, setting)

    def _read(self, split: str) -> tuple[list[_Pair], int]:
        """The pairs of a split, and how many bad rows were passed over."""
        bad = self.skip_bad_rows
        if self.folder is None:
            given = self.dataset or HubSource(dataset=_HUB, revision=_PARQUET)
            setting, place, columns = "task.dataset", given.dataset, _HUB_COLUMNS
            found = read_rows(given.model_copy(update={"split": split}), setting, skip_bad=bad, columns=columns)
            official = True
        else:
            path = _file(self.folder, split)
            setting, place, columns = "task.folder", str(path), _FILE_COLUMNS
            official = path.suffix == ".csv"
            found = read_rows(place, setting, skip_bad=bad, columns=columns) if official else _lines(path, bad)
            if not official and self.source_form == "official":
                raise ConfigError(
                    f"task.source_form = official: {path} has LoRA's form, which cannot be turned back; give a folder "
                    f"with {', '.join(_OFFICIAL.values())}, or task.source_form=lora"
                )
        pairs, skipped = [], found.skipped
        for row in found.rows:
            try:
                source, reference = (_mend(text_of(row, column, setting)) for column in columns)
                if official and self.source_form == "lora":
                    source = _as_lora(source, f"{setting}: {row.where}")
            except DataError as error:
                if not bad:
                    raise skippable(error) from error
                skipped += 1
            else:
                pairs.append(_Pair(source, reference))
        if not pairs:
            raise DataError(f"{setting}: {place}: the split {split!r} is empty")
        return pairs, skipped


def _file(given: str, split: str) -> Path:
    """The file of a split, in whichever of the two layouts the folder has."""
    folder = Path(given).expanduser()
    official, lora = (", ".join(layout.values()) for layout in (_OFFICIAL, _LORA))
    wanted = f"it should hold {official} (the official files), or {lora} (LoRA's)"
    if not folder.is_dir():
        raise DataError(f"task.folder = {given!r}: no such folder; {wanted}")
    there = [layout for layout in (_OFFICIAL, _LORA) if any((folder / name).is_file() for name in layout.values())]
    if len(there) != 1:
        what = "files of both layouts" if there else "none of the files of E2E NLG"
        raise DataError(f"task.folder = {given!r} holds {what}; {wanted}")
    path = folder / there[0][split]
    if not path.is_file():
        raise DataError(f"task.folder = {given!r}: {path.name} is missing; {wanted}")
    return path


def _lines(path: Path, skip_bad: bool) -> Rows:
    """LoRA's lines `attributes||reference`; blank ones are passed over."""
    with opening(str(path)):
        data = path.read_bytes()
    rows, skipped = [], 0
    for number, line in enumerate(decode(data, str(path), 0, first=True).split("\n")):
        parts = line.split("||")
        if len(parts) == 2:
            rows.append(Row(f"{path}:{number + 1}", dict(zip(("mr", "ref"), parts, strict=True))))
        elif line.strip():
            if not skip_bad:
                raise skippable(
                    DataError(
                        f"task.folder: {path}:{number + 1}: this line is not `attributes||reference`: it has "
                        f"{len(parts) - 1} times `||`, not once"
                    )
                )
            skipped += 1
    return Rows(rows, skipped)


def _mend(text: str) -> str:
    for wrong, right in _MENDED.items():
        text = text.replace(wrong, right)
    return " ".join(text.split())


def _as_lora(attributes: str, where: str) -> str:
    """`name[Blue Spice], priceRange[£20-25]` as `name : Blue Spice | price : £ 20 - 25`."""
    slots, end = [], 0
    while end < len(attributes) and (found := _SLOT.match(attributes, end)):
        name, value = found.groups()
        words = " ".join(_SPLIT.sub(r" \1 ", value).split())
        slots.append(f"{_SLOT_NAMES.get(name, name)} : {words}")
        end = found.end()
    if end < len(attributes):
        raise DataError(
            f"{where}: {attributes[end:]!r} is no list of `slot[value], ...` (task.source_form=official takes any text)"
        )
    return " | ".join(slots)


def _grouped(pairs: Sequence[_Pair]) -> list[Written]:
    """One example for each source, in the order in which they first come, with all its references."""
    references: dict[str, list[str]] = {}
    for source, reference in pairs:
        references.setdefault(source, []).append(reference)
    return [Written(source, tuple(texts)) for source, texts in references.items()]
