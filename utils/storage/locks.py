"""Locks (flock) on the files and folders that a process writes."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.errors import InputError
from utils.storage.files import UNSUPPORTED, fcntl, not_written

NO_LOCKS = "{} cannot be locked on this system: start no second process on it."


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Context manager that locks a file or folder for this process. The system releases the lock if the process dies.

    If another process holds the lock, waits for it with `wait`; otherwise raises InputError that names the process.
    Where the system has no locks, a line is printed and the block runs unlocked.
    """
    if fcntl is None:
        print(NO_LOCKS.format(path))
        yield
        return
    lock = _lock_path(path)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock_file = _acquire(lock, path, wait)
    except OSError as error:
        raise not_written(path, error) from error
    with lock_file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # a waiting process notices and creates a new lock file


def refuse_if_locked(path: Path) -> None:
    """Raises InputError if another process has locked the file or folder."""
    if _lock_path(path).exists():
        with locked(path):
            pass


def _lock_path(path: Path) -> Path:
    path = path.resolve()  # one lock for a folder, even if it is reached through symbolic links
    return path.with_name(f"{path.name}.lock")


def _acquire(lock: Path, path: Path, wait: bool) -> IO:
    """Locks the lock file and returns it open; closing it releases the lock."""
    while True:
        file = open(lock, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                file.close()
                raise InputError(f"{path} is in use by {holder}: wait for it, or stop it.") from None
            print(f"{path} is in use by {holder}: waiting for it.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(NO_LOCKS.format(path), flush=True)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
        file.close()  # the previous holder has deleted this lock file: try the new one
