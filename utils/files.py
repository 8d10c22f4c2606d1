"""Files that are either whole or not there, with a checksum where it matters, and locks on what is being written.

A file is written beside its target, flushed to disk, then renamed. A sealed one carries the SHA-256 of its content: a
zip archive (.pth) as its comment, which readers of zip files pass over, a JSON object as its entry "sha256".
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from utils.errors import Damaged, InputError, NotWritten

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""How file systems say that they cannot lock a file or flush a folder."""

NO_LOCKS = "{} cannot be locked on this system: start no second process on it."


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


# Locks ----------------------------------------------------------------------------------------------------------------


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


# Seals ----------------------------------------------------------------------------------------------------------------

MARK = b"sha256="
SEAL = len(MARK) + 64  # bytes


def seal(path: Path) -> str:
    """Ends a zip archive with a comment that holds the SHA-256 of all bytes before it; gives that of the whole file."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEAL))  # the length of the comment is the archive's last field
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        end = MARK + digest.hexdigest().encode()
        file.seek(0, os.SEEK_END)
        file.write(end)
    digest.update(end)
    return digest.hexdigest()


def check_seal(file: BinaryIO) -> tuple[str, str]:
    """What is wrong with a sealed archive, or nothing, and the SHA-256 of the whole file."""
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - SEAL
    if left < 0:
        return "it ends too early", sha256_of(file)
    file.seek(0)
    while chunk := file.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    end, expected = file.read(), MARK + digest.hexdigest().encode()
    digest.update(end)
    if not end.startswith(MARK):
        return "it has no SHA-256 at its end", digest.hexdigest()
    return "" if end == expected else "its SHA-256 is another", digest.hexdigest()


def write_sealed_json(path: Path, value: dict) -> None:
    write_text(path, _sealed(value))


def read_sealed_json(path: Path) -> dict:
    """Raises InputError where there is no file, Damaged where it is not, to the last byte, what was written."""
    try:
        content = path.read_bytes()
        value = json.loads(content)
        value.pop("sha256", None)
        if content == _sealed(value).encode():
            return value
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, AttributeError):  # not JSON, not an object
        pass
    raise Damaged(f"{path} is damaged (it is not what its SHA-256 was made of)")


def _sealed(value: dict) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=2) + "\n"


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
