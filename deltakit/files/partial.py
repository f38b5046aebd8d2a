"""Folders in which a save prepares its files, beside the place where they go. A killed save leaves its folder behind.

A save must never remove what another one is still writing, and a process id does not tell: other machines and containers have
the same ones. So each save locks a file in its folder. The operating system frees the lock when the process ends, however it
ends.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

if sys.platform != "win32":
    import fcntl

_LOCK = "lock"
_NAME = re.compile(r"\.delta-[0-9a-f]{32}\.partial")
# deltakit 0.1 wrote such files into the folder itself. No running save writes them now.
_OLD_NAME = re.compile(r"\.(delta_model\.safetensors|delta_config\.json|README\.md)\.[0-9a-f]{32}\.partial")


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder inside a folder, on the same disk, and removes it afterwards, also after an exception.

    The outer folder is created if needed, and removed again if nothing was put into it. What killed saves have left in it is
    removed.

    Raises:
        OSError: if a folder cannot be created.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        if _OLD_NAME.fullmatch(left.name):
            left.unlink(missing_ok=True)
        elif _NAME.fullmatch(left.name):
            _remove_if_dead(left)
    own, lock = _create(folder)
    try:
        yield own
    finally:
        _remove(own, lock)
        if is_new:
            # It cannot be removed if there is something in it, as after every save that succeeded.
            with suppress(OSError):
                folder.rmdir()


def is_saving(folder: Path) -> bool:
    """Returns whether a save is at work in a folder, or was killed there."""
    return any(_NAME.fullmatch(entry.name) for entry in folder.iterdir())


def _create(folder: Path) -> tuple[Path, int | None]:
    for _ in range(3):
        own = folder / f".delta-{uuid4().hex}.partial"
        own.mkdir()
        lock = _locked(own)
        if lock is not None:
            return own, lock
        # Another save took it for a dead one, in the moment between its creation and the lock.
        shutil.rmtree(own, ignore_errors=True)
    # Three times is no accident: this file system has no locks. Then no other save can find the folder dead either.
    own.mkdir()
    return own, None


def _locked(own: Path) -> int | None:
    """Returns the descriptor that holds the lock of a partial folder; None if it cannot be had."""
    if sys.platform == "win32":
        return None
    try:
        lock = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (own / _LOCK).stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove_if_dead(left: Path) -> None:
    lock = _locked(left)
    if lock is not None:
        _remove(left, lock)


def _remove(own: Path, lock: int | None) -> None:
    # Closed first: network file systems keep open files, and then the folder could not be removed.
    if lock is not None:
        os.close(lock)
    shutil.rmtree(own, ignore_errors=True)
