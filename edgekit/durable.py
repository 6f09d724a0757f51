"""Writes that a kill or a power cut leaves whole or undone. Knows nothing of what is written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgekit.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator


MIB = 2**20
BAD_BLOCK = (errno.EIO, errno.EBADMSG, errno.ENODATA, getattr(errno, "EUCLEAN", errno.EIO))
"""What flash that is worn out answers: the bytes are lost, as if they had changed."""


def no_room(folder: Path, what: str, needed: int = MIB, error: BaseException | None = None) -> ResourceError | None:
    """Return the error of a disk that has fewer than ``needed`` bytes left, or of which ``error`` says so.

    ``folder`` need not be there yet; ``what`` says what has no room.
    """
    place = folder.resolve()
    place = next(one for one in (place, *place.parents) if one.exists())
    free = shutil.disk_usage(place).free
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if free >= needed and not told:
        return None
    size = f"{needed / MIB:.1f} MiB are needed, " if needed > MIB else ""
    is_temporary = place.is_relative_to(Path(tempfile.gettempdir()).resolve())
    other = "let TMPDIR name a folder on another disk" if is_temporary else "choose a folder on another disk"
    return ResourceError(
        f"the disk of {place} has no room for {what}: {size}{free / MIB:.1f} MiB are free",
        f"free space there, or {other}: nothing was half-written",
    )


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` in one step: write aside, fsync, rename, fsync the folder."""
    with new_file(path, mode) as file:
        file.write(data)


@contextmanager
def new_file(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Give a file to write that replaces ``path`` in one step when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``target`` that becomes it when the block ends well, and vanishes otherwise.

    A folder that was there is replaced: on Linux the two are exchanged in one step, so that a kill leaves the old or
    the new one; elsewhere it may leave none, but never half of one.
    Scratch folders that earlier kills left behind are swept first; those of others that still write are left alone, and
    whoever ends last stays.
    """
    target = target.resolve()  # through a link, so that what it points to is replaced, and not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if not _is_in_use(stale):
            shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    with _used(scratch):
        try:
            yield scratch
            sync_tree(scratch)
            scratch.chmod(0o755)
            _swap_in(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    sync_folder(target.parent)


@contextmanager
def _used(scratch: Path) -> Iterator[None]:
    """Hold a lock on a folder itself; the system frees that of a process which dies."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there two runs at once may sweep each other's scratch
        yield
        return
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(scratch: Path) -> bool:
    try:
        import fcntl

        descriptor = os.open(scratch, os.O_RDONLY)
    except (ImportError, OSError):  # gone meanwhile, or nobody can tell
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def sync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder`` survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def _swap_in(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    if _exchange(scratch, target):
        return
    retired = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    target.rename(retired / "old")
    scratch.rename(target)
    shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (renameat2 of Linux); say False where the system or the disk cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of fcntl.h and linux/fs.h
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
