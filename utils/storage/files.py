"""Atomic writes: a file is written beside its target, flushed to disk with fsync, then renamed."""

import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError, NotWritten

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Error numbers of file systems that do not support flock, or fsync of a folder."""


@contextlib.contextmanager
def replaced(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Context manager for an atomic write: yields the path of a partial file and renames it to `path` at the end.

    If the block raises, the partial file is deleted and `path` stays as it was. The replaced file is kept as
    `previous`, if given. Raises NotWritten, an InputError, if the disk is full or the folder is read-only.
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
    """Converts an OSError into the NotWritten that names the file."""
    return NotWritten(f"{path} could not be written ({error.strerror or error}).")


def remove_leftovers(path: Path) -> None:
    """Deletes the partial files of `path` that killed processes left behind."""
    if fcntl is None:  # os.kill(pid, 0) would kill the process on Windows
        return
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        try:
            os.kill(int(leftover.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            leftover.unlink(missing_ok=True)
        except PermissionError:  # the process is alive, under another user
            continue


def _flush_folder(folder: Path) -> None:
    """Flushes a folder, so that a rename in it survives a power loss, on systems that can open a folder."""
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
    """Hard-links `path` as `kept`, so that its content survives the replacement of `path`."""
    link = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
    remove_leftovers(kept)
    try:
        os.link(path, link)
        os.replace(link, kept)
    except OSError:  # the file system has no hard links
        os.replace(path, kept)
    finally:
        link.unlink(missing_ok=True)  # os.replace does nothing if both names are hard links to one file


# Text and JSON --------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically, with Unix line endings."""
    with replaced(path) as partial:
        # The text may contain file names, which need not be valid UTF-8.
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def printable(name: object) -> str:
    """Returns a file name as printable text: bytes that are not valid UTF-8 are replaced."""
    return os.fsencode(str(name)).decode(errors="replace")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Reads a JSON object. Raises InputError if the file cannot be read or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it to have it made again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: delete it to have it made again.")
    return value


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file atomically; bytes of names that are not valid UTF-8 are replaced."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, printable(text.getvalue()))


def read_csv(path: Path, advice: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a CSV file in UTF-8.

    Raises InputError if it is empty or cannot be read, with `advice` on what to do.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): {advice}.") from error
    return header, rows


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as a hex string."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file: io.BufferedReader) -> str:
    """Returns the SHA-256 of a whole open file as a hex string; moves its position to the end."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
