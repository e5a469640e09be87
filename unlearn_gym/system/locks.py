"""One writer for a folder: a lock that says who holds it, and that ends with the process that held it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from unlearn_gym.errors import FileError, LockError, error_line, shown

LOCK = ".lock"
MOST_BYTES = 4096
"""What is read of a lock's file, which has a hundred."""
MOST_ATTEMPTS = 1000
"""How often a folder may vanish while it is being locked, before it is taken for one that cannot be made."""


@dataclass(eq=False)
class _Hold:
    """A lock while its block runs. Copies of a context, as of tasks and forked processes, may keep it for longer."""

    place: Path
    pid: int
    ended: bool = False


_held: ContextVar[frozenset[_Hold]] = ContextVar("_held", default=frozenset())
"""What this thread has locked. Locking one of these folders again succeeds at once: a command and a function that it
calls may both lock it."""


class Holder(BaseModel):
    """What a lock's file says of the process that holds it."""

    model_config = ConfigDict(strict=True)

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} has been writing to it since {self.since}"


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let this thread alone write to ``folder``, which is made if need be, until the block ends.

    The lock is the operating system's, on ``folder/.lock``: it ends with its process, however that ends. Folders that
    were made and stayed empty are removed. A process forked within the block does not count as its holder and is
    refused, too; but it keeps the operating system's lock: should the holder be killed, the folder stays locked until
    the forked process ends.

    Raises :class:`LockError`, naming the holder, where another process or thread has the lock, and :class:`FileError`
    where there can be no such folder or file, or ``folder/.lock`` is a file of the user's own.
    """
    try:
        if b"\0" in os.fsencode(folder):
            raise ValueError("a name holds no null character")
        place = folder.resolve()  # the block may change the working directory
        missing = [one for one in (place, *place.parents) if not one.exists()]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that lead to each other
        raise FileError(
            f"cannot make the folder {shown(str(folder))} ({error_line(error)}); choose another --out"
        ) from None
    if any(hold.place == place and hold.pid == os.getpid() and not hold.ended for hold in _held.get()):
        yield
        return
    descriptor = _take(place, folder)
    key = _Hold(place, os.getpid())
    _held.set(_held.get() | {key})
    try:
        yield
    finally:
        key.ended = True
        _held.set(_held.get() - {key})  # resetting would fail where the block ends in another context
        _release(descriptor, key, missing)


def _release(descriptor: int, hold: _Hold, missing: list[Path]) -> None:
    """Undo what :func:`_take` did. What cannot be undone is left: the outcome of the block is what counts."""
    path, ours = hold.place / LOCK, hold.pid == os.getpid()  # a forked process leaves the lock to its parent
    with contextlib.suppress(OSError):
        if ours and _is_still(path, descriptor):  # else it is the file of another one, who locked the folder anew
            path.unlink()  # before it is released: whoever opened it sees that it is gone
    with contextlib.suppress(OSError):
        os.close(descriptor)
    with contextlib.suppress(OSError):
        for place in missing if ours else ():
            place.rmdir()  # refused where it is not empty


def _take(place: Path, folder: Path) -> int:
    """The descriptor of the locked file in ``place``, which the user calls ``folder``."""
    path = place / LOCK
    while True:
        descriptor = _open(path, folder)
        try:
            _lock(descriptor, folder)
            if _is_still(path, descriptor):
                _refuse_foreign(descriptor, folder)
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and our locking it


def _open(path: Path, folder: Path) -> int:
    """The lock's file in its folder, either of them made where it is missing."""
    attempt = 0
    while True:
        attempt += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # who held the lock may just have removed the folder, which was empty; that does not happen again and again
            if isinstance(error, FileNotFoundError | FileExistsError) and attempt < MOST_ATTEMPTS:
                continue
            what = "write to" if path.parent.is_dir() else "make"
            raise FileError(
                f"cannot {what} the folder {folder} ({error.strerror}); choose another --out or mend its permissions"
            ) from None


def _refuse_foreign(descriptor: int, folder: Path) -> None:
    """Refuse a file that no lock has left behind: a lock's file is overwritten, and removed in the end."""
    try:
        left = os.pread(descriptor, MOST_BYTES, 0)
        if left:  # a process that was killed as it took the lock leaves an empty one
            Holder.model_validate_json(left)
    except (OSError, ValidationError):  # OSError: a pipe or the like
        raise FileError(
            f"{folder / LOCK} is in the way: it is a file of another program, and the lock of this folder would have "
            "its name; move it elsewhere, or choose another --out"
        ) from None


def _write_holder(descriptor: int) -> None:
    """Say in the file who holds the lock; on a full disk it is held all the same."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=now)
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.model_dump_json().encode(), 0)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockError(
            f"{folder} is in use: {_holder(descriptor)}; wait until that has ended, or choose another --out"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder} is on a file system without locks ({error.strerror}): see to it that no second command writes "
            "to it",
            stacklevel=5,
        )


def _holder(descriptor: int) -> str:
    try:
        return str(Holder.model_validate_json(os.pread(descriptor, MOST_BYTES, 0)))
    except (OSError, ValidationError):
        return "another process or thread, which cannot be read from the lock, is writing to it"


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
