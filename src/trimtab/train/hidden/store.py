"""Records by key in a folder: appended once, read many times.

data.bin     the records' bytes, one after the other
index.txt    a line for each record: key, offset, bytes, tokens of each stack, CRC-32 of the bytes, CRC-32 of the line
meta.json    what the records are; written first
.lock        held by the process that writes, for as long as it may write more

A record is on the disk before its line is written, so that a crash leaves at most a tail without a line, or half a
line: both are dropped when the folder is next opened for writing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import CheckpointError, ConfigError

DATA, INDEX, META, LOCK = "data.bin", "index.txt", "meta.json", ".lock"
#: Bytes of the disk that are left for others.
RESERVE = 1 << 26


class Entry(NamedTuple):
    """Where a record is: offset, length in bytes, tokens of each stack, CRC-32."""

    offset: int
    length: int
    counts: tuple[int, ...]
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Store:
    """The records of a folder.

    Args:
        folder: which is made where it is not there.

    Attributes:
        entries: of the records, by key.
        counts: the tokens of all of them, of each stack; empty without any.
        meta: what meta.json says; None where there is none yet.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it cannot be made, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.counts: tuple[int, ...] = ()
        self._read_to = 0  # bytes of the index that were read
        self._end = 0  # of the data
        self._lock: int | None = None
        self._forbidden = ""  # why the lock's file could not be opened
        self._map: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = {path.name for path in folder.iterdir()}
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be used: {error.strerror or error}; give another folder") from error
        self.meta = _meta_in(folder, found)
        if self.meta is not None:
            if self._try_lock():
                self._recover()
                self._unlock()
            else:
                self._read_index()

    # -- reading -------------------------------------------------------------------------------

    def _read_index(self) -> bytes:
        """Take up the lines that came since, and give back what is left over: a line cut off, or nothing.

        Only a last line can be cut off; the data of the lines before it is whole, unless the file was cut.
        """
        path = self.folder / INDEX
        if not path.exists():
            return b""
        with open(path, "rb") as file:
            file.seek(self._read_to)
            text = file.read()
        size = self._data_size()
        while (at := text.find(b"\n")) >= 0:
            line, rest = text[:at], text[at + 1 :]
            entry = _parsed(line)
            if entry is None or entry[1].offset != self._end:
                if not rest:
                    return text
                raise CheckpointError(
                    f"{path} is damaged at byte {self._read_to}; delete {self.folder} to fill it anew"
                )
            if entry[1].end > size:
                return text
            self._add(*entry)
            self._end = entry[1].end
            self._read_to += len(line) + 1
            text = rest
        return text

    def read(self, key: str) -> NDArray[np.uint8]:
        """The bytes of a record, from the file's own memory.

        Raises:
            CheckpointError: they are not those that were written.
        """
        entry = self.entries[key]
        path = self.folder / DATA
        if entry.length and entry.end > len(self._map):
            self._refuse_gone()
            if self._data_size() < entry.end:
                raise CheckpointError(f"{path} was cut while it was in use; open the cache again to mend it")
            self._map = np.memmap(path, dtype=np.uint8, mode="r")
        record = self._map[entry.offset : entry.end]
        if zlib.crc32(record.data) != entry.checksum:
            raise CheckpointError(
                f"{path} is damaged: the checksum of bytes {entry.offset} to {entry.end} is wrong; delete "
                f"{self.folder}, and it is filled anew"
            )
        return record

    def _refuse_gone(self) -> None:
        """Raise CheckpointError where what was there is not there any more."""
        gone = [name for name in (META, DATA, INDEX) if not (self.folder / name).exists()]
        if not self.folder.is_dir() or (self._end and gone):
            what = f"{', '.join(gone)} in it" if self.folder.is_dir() else "it"
            raise CheckpointError(
                f"{self.folder}: the folder of the cached hidden states was in use, and {what} was deleted; open the "
                "cache again, and it is filled anew"
            )

    def _data_size(self) -> int:
        path = self.folder / DATA
        return path.stat().st_size if path.exists() else 0

    def _add(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry
        before = self.counts or (0,) * len(entry.counts)
        self.counts = tuple(a + b for a, b in zip(before, entry.counts, strict=True))

    def _sizes(self) -> tuple[int, int]:
        index = self.folder / INDEX
        return self._data_size(), index.stat().st_size if index.exists() else 0

    @property
    def size(self) -> int:
        """Bytes of the records and of the index."""
        return self._end + self._read_to

    # -- writing -------------------------------------------------------------------------------

    def begin_writing(self) -> None:
        """Become the one that writes, and see what others wrote.

        Raises:
            ConfigError: another process writes, or another cache of this process; the folder may only be read.
            CheckpointError: the folder is gone.
        """
        self._refuse_gone()
        if self._lock is not None:
            return
        if not self._try_lock():
            if self._forbidden:
                raise ConfigError(
                    f"{self.folder}: nothing can be written here ({self._forbidden}), and this would store examples "
                    "that are new; make the folder writable, or give another one"
                )
            raise ConfigError(
                f"{self.folder}: somebody else writes to this cache of hidden states; wait for them, or give another "
                "folder"
            )
        if self.meta is None and (self.folder / META).exists():
            self.meta = _meta_in(self.folder, {META})
        self._recover()

    def _try_lock(self) -> bool:
        import fcntl

        try:
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:  # a folder that may only be read
            self._forbidden = error.strerror or str(error)
            return False
        self._forbidden = ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:
            warnings.warn(
                f"{self.folder}: no locks on this file system ({error.strerror}); let no second process write to it",
                stacklevel=2,
            )
        self._lock = handle
        return True

    def _unlock(self) -> None:
        if self._lock is not None:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked process may hold the same lock open
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Drop what a crash left at the end of the files."""
        left = self._read_index()
        extra = self._data_size() - self._end
        if left or extra:
            warnings.warn(
                f"{self.folder}: the end of the cached hidden states was not written whole, and is dropped: "
                f"{len(left)} bytes of {INDEX} and {max(extra, 0)} of {DATA}; it will be computed again",
                stacklevel=2,
            )
            for name, size in ((INDEX, self._read_to), (DATA, self._end)):
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, size)
            self._map = np.zeros(0, dtype=np.uint8)

    def write_meta(self, meta: dict[str, Any]) -> None:
        """Say what the records are; before the first of them."""
        path = self.folder / META
        temporary = path.with_name(f"{META}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(meta, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
        self.meta = meta

    def append(self, records: Sequence[tuple[str, tuple[int, ...], bytes]]) -> None:
        """Write records (key, tokens of each stack, bytes) that are not there yet.

        Raises:
            ConfigError: the disk has no room for them.
            CheckpointError: they cannot be written.
        """
        self.begin_writing()
        if self._sizes() != (self._end, self._read_to):  # a write before failed half way
            self._recover()
        lines, offset = [], self._end
        for key, counts, data in records:
            entry = Entry(offset, len(data), counts, zlib.crc32(data))
            lines.append((key, entry, _line(key, entry)))
            offset = entry.end
        text = b"".join(line for _, _, line in lines)
        self.check_room(offset - self._end + len(text))
        try:
            with open(self.folder / DATA, "ab") as file:
                for _, _, data in records:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with open(self.folder / INDEX, "ab") as file:
                file.write(text)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written: {error.strerror or error}; what was stored before is kept"
            ) from error
        self._end, self._read_to = offset, self._read_to + len(text)
        for key, entry, _ in lines:
            self._add(key, entry)

    def check_room(self, needed: int) -> None:
        """Whether the disk has room for so many bytes, and a reserve.

        Raises:
            ConfigError: it has not.
            CheckpointError: the folder is gone.
        """
        self._refuse_gone()
        free = shutil.disk_usage(self.folder).free
        if needed > free - RESERVE:
            raise ConfigError(
                f"{self.folder}: the cached hidden states need {needed:,} bytes more, and the disk has {free:,} free, "
                f"of which {RESERVE:,} are left alone; free some space, give a folder on another disk, or store them "
                "in a smaller form (int8)"
            )

    def close(self) -> None:
        """Let go of the files and of the lock."""
        self._unlock()
        self._map = np.zeros(0, dtype=np.uint8)


def look_into(folder: Path) -> tuple[dict[str, Any] | None, int]:
    """What meta.json of a folder says, if there is one, and how large the data is; nothing is made or written.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it cannot be made or read, or is damaged.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        found = {path.name for path in place.iterdir()}
    except OSError as error:
        # As making the folder would say it.
        why = os.strerror(errno.EEXIST) if place == folder.absolute() and not place.is_dir() else error.strerror
        raise CheckpointError(f"{folder} cannot be used: {why or error}; give another folder") from error
    if place != folder.absolute():
        return None, 0
    data = folder / DATA
    return _meta_in(folder, found), data.stat().st_size if data.is_file() else 0


def _meta_in(folder: Path, found: set[str]) -> dict[str, Any] | None:
    """What meta.json says; None in a folder without anything."""
    if META not in found:
        if found - {LOCK, f"{META}.tmp"}:
            raise ConfigError(f"{folder} is not empty and holds no hidden states ({META} is missing); give another one")
        return None
    path = folder / META
    try:
        meta = json.loads(path.read_bytes())
        if isinstance(meta, dict):
            return meta
    except (OSError, ValueError):
        pass
    raise CheckpointError(f"{path} is damaged; delete the folder, and it is filled anew")


def _line(key: str, entry: Entry) -> bytes:
    counts = ",".join(map(str, entry.counts))
    text = f"{key} {entry.offset} {entry.length} {counts} {entry.checksum:08x}"
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _parsed(line: bytes) -> tuple[str, Entry] | None:
    """A line's key and entry; None if it is not as it was written."""
    text, _, checksum = line.rpartition(b" ")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        return None
    key, offset, length, counts, crc = text.decode().split(" ")
    return key, Entry(int(offset), int(length), tuple(map(int, counts.split(","))), int(crc, 16))
