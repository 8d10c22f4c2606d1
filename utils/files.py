"""Files that are either whole or not there: written beside the target, flushed to disk, then renamed."""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the path of a partial file, which takes the place of `path` when the block ends without an exception.

    Raises InputError where it cannot be written: a full disk, a folder that may not be written to.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Deletes partial files of `path` whose process was killed."""
    if fcntl is None:  # on Windows asking after a process can end it
        return
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        try:
            os.kill(int(leftover.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            leftover.unlink(missing_ok=True)
        except PermissionError:  # it runs, under another user
            continue


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power loss, where the system lets a folder be opened."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process: another one waits until the block ends. A lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder} is in use by another process: waiting for it.", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def new_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A mapped .npy file whose place on the disk is taken at once: writing into a map that finds no place is fatal."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def write_text(path: Path, text: str) -> None:
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files need not be text


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Raises InputError where the file holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it to have it made again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: delete it to have it made again.")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
