"""Files that are either whole or not there.

A file is written beside its target, flushed to disk, then renamed.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import InputError, NotWritten

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""How file systems say that they cannot lock a file or flush a folder."""


@contextlib.contextmanager
def replaced(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yields the path of a partial file, which takes the place of `path` when the block ends without an exception.

    The file that it replaces is kept as `previous`, if that is given. Raises InputError where it cannot be written: a
    full disk, a folder that may not be written to.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            _keep_as(path, previous)
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> NotWritten:
    return NotWritten(f"{path} could not be written ({error.strerror or error}).")


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
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(handle)


def _keep_as(path: Path, kept: Path) -> None:
    """Gives a file a second name, under which its content stays when the first comes to name another."""
    link = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
    remove_leftovers(kept)
    try:
        os.link(path, link)
        os.replace(link, kept)
    except OSError:  # a file system without hard links
        os.replace(path, kept)
    finally:
        link.unlink(missing_ok=True)  # renaming one name of a file to another name of it does nothing


# Text and JSON --------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    with replaced(path) as partial:
        # Names of files need not be text.
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def printable(name: object) -> str:
    """A name of a file, which need not be text, with its odd bytes replaced."""
    return os.fsencode(str(name)).decode(errors="replace")


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
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """Of an open file, from its beginning."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
