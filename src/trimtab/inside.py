"""Files of a folder that someone else made: only what really lies in it is read."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import CheckpointError


def inside(folder: Path, name: str) -> Path:
    """A file of a folder that really lies in it, whether it is there or not.

    The hub's cache holds a snapshot as links into `blobs` beside all snapshots; those are its own files.

    Raises:
        CheckpointError: the name or a link leads elsewhere, or no file can have that name.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: {shown!r} can be no file's name: {reason}") from None
    snapshots = next((above for above in home.parents if above.name == "snapshots"), None)
    roots = [home, *([snapshots.parent / "blobs"] if snapshots is not None else [])]
    if Path(name).name != name or not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{folder}: {name!r} leads out of the folder, so it is not read; put the file itself there"
        )
    return path
