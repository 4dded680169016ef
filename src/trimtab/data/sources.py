"""Where text comes from: files, folders, files inside installed packages, and datasets by name.

A configuration's sources are resolved into a flat, ordered list of inputs. Each has a name that does not depend
on where the machine keeps the file (its path within the source), so that a document's id, NAME#ROW, and with it
the choice of validation documents, is the same everywhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.config import DataConfig
from trimtab.errors import DataError
from trimtab.settings import HubSource

Kind = Literal["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "hub"]
Part = Literal["train", "validation", "split"]

_KINDS: tuple[tuple[str, Kind], ...] = (
    (".txt", "txt"),
    (".jsonl", "jsonl"),
    (".jsonl.gz", "jsonl.gz"),
    (".json.gz", "jsonl.gz"),  # as C4 names its files, which hold a JSON object a line
    (".jsonl.zst", "jsonl.zst"),
    (".parquet", "parquet"),
)
_ENDINGS = ", ".join(ending for ending, _ in _KINDS)


@dataclass(frozen=True)
class Input:
    """One file, or one dataset read as a stream.

    Attributes:
        kind: how it is read.
        name: the same on every machine; the stem of its documents' ids.
        part: where its documents go; "split" leaves that to the hash of each document's id.
        path: the file; for a dataset, its name.
        size: of the file, in bytes; None for a dataset.
        modified: when the file was last written, in nanoseconds; None for a dataset.
        subset: of a dataset.
        split: of a dataset.
        revision: of a dataset; the commit, where the hub told it.
    """

    kind: Kind
    name: str
    part: Part
    path: str
    size: int | None = None
    modified: int | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    def public(self) -> dict[str, Any]:
        """What identifies it in a manifest, without anything of this machine."""
        return {"name": self.name, "kind": self.kind, "part": self.part, "size": self.size, "revision": self.revision}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(config: DataConfig, pins: dict[str, str | None] | None = None) -> list[Input]:
    """All inputs in the order in which they are read: validation sources first, then the others.

    Args:
        config: names the sources.
        pins: revisions of datasets (by the name of the input) from an earlier call, so that a build that is
            taken up again reads the same data and does not ask the hub.

    Raises:
        DataError: a source is missing, of an unknown kind or an empty folder, or the hub cannot be asked.
    """
    validation = [i for s in config.validation_sources for i in _inputs(s, "validation", pins)]
    part: Part = "train" if config.validation_sources else "split"
    return validation + [i for s in config.sources for i in _inputs(s, part, pins)]


def is_validation(seed: int, document_id: str, share: float) -> bool:
    """Whether a document is held out: decided by a hash of (seed, id) alone, so other documents do not matter."""
    # Names of files need not be valid Unicode, hence surrogateescape.
    key = f"trimtab.validation:{seed}:{document_id}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") < share * 2.0**64


def _inputs(source: str | HubSource, part: Part, pins: dict[str, str | None] | None) -> Iterator[Input]:
    if isinstance(source, HubSource):
        yield _dataset(source, part, pins)
        return
    path = package_file(source, "data.sources") if source.startswith("package:") else Path(source).expanduser()
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            raise DataError(f"data.sources: {source!r} is no file of a known kind ({_ENDINGS})")
        yield _file(path, path.name, kind, part)
    elif path.is_dir():
        found = False
        for file in sorted(walk(path), key=lambda p: p.relative_to(path).as_posix()):
            kind = _kind(file)
            if kind is not None:
                found = True
                yield _file(file, file.relative_to(path).as_posix(), kind, part)
        if not found:
            raise DataError(f"data.sources: the folder {source!r} holds no file of a known kind ({_ENDINGS})")
    else:
        raise DataError(f"data.sources: {source!r} does not exist (a dataset by name is written {{dataset: NAME}})")


def walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterable[Path]:
    """Files below `folder`; nothing whose name begins with a dot, and no link back to a folder above."""
    here = folder.resolve()
    if here in above:
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from walk(entry, above | {here})
        elif entry.is_file():
            yield entry


def _kind(path: Path) -> Kind | None:
    return next((kind for ending, kind in _KINDS if path.name.lower().endswith(ending)), None)


def _file(path: Path, name: str, kind: Kind, part: Part) -> Input:
    status = path.stat()
    return Input(kind, name, part, str(path), size=status.st_size, modified=status.st_mtime_ns)


def package_file(source: str, setting: str) -> Path:
    """`package:NAME/PATH`, found without importing the package (its own imports may not be installed).

    Raises:
        DataError: there is no such package; the message begins with `setting`, which named it.
    """
    name, _, rest = source.removeprefix("package:").partition("/")
    found = package_path(name, rest)
    if found is None:
        raise DataError(f"{setting}: {source!r} needs the Python package {name!r}, which is not installed here")
    return found


def package_path(name: str, inside: str) -> Path | None:
    """A file or folder of an installed package, which is not imported; None where there is no such package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(roots[0]) / inside if roots else None


def _dataset(source: HubSource, part: Part, pins: dict[str, str | None] | None) -> Input:
    name = "/".join(x for x in (source.dataset, source.subset, source.split) if x)
    if pins is not None and name in pins:
        revision = pins[name]
    elif Path(source.dataset).exists():
        revision = source.revision  # a folder on this machine has no commits
    else:
        revision = _commit(source)
    return Input("hub", name, part, source.dataset, subset=source.subset, split=source.split, revision=revision)


def _commit(source: HubSource) -> str | None:
    """The commit that `revision` stands for now: a stream taken up tomorrow must be the same stream."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.dataset, revision=source.revision, timeout=30.0).sha
    except Exception as error:  # network, proxy, offline mode, unknown name: each has its own class
        raise hub_error(source.dataset, error) from error


def hub_error(
    dataset: str, error: BaseException, remedy: str = "run again (what is tokenized is kept), or give local files"
) -> DataError:
    """One line for whatever the hub's libraries raised."""
    lines = str(error).strip().splitlines()
    reason = type(error).__name__ + (f": {lines[0].strip()}" if lines else "")
    return DataError(
        f"dataset {dataset!r} could not be had from the Hugging Face hub ({reason}); check its name, subset, split "
        f"and the network and {remedy}"
    )
