"""Locks on the files and folders that a process is writing."""

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
    """Holds a file or folder for this process while the block runs. A lock dies with its process.

    Another process waits for it, or without `wait` is refused: an InputError names the process that holds it.
    """
    if fcntl is None:
        print(NO_LOCKS.format(path))
        yield
        return
    lock = _lock_of(path)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _held(lock, path, wait)
    except OSError as error:
        raise not_written(path, error) from error
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # whoever waits for it sees that it is gone and makes another


def refuse_if_locked(path: Path) -> None:
    """Raises InputError where another process holds the file or folder."""
    if _lock_of(path).exists():
        with locked(path):
            pass


def _lock_of(path: Path) -> Path:
    path = path.resolve()  # a folder that is reached by two ways has one lock
    return path.with_name(f"{path.name}.lock")


def _held(lock: Path, path: Path, wait: bool) -> IO:
    """The open lock file, which this process holds until it is closed."""
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
        file.close()  # the one that held it has removed it
