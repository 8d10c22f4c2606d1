"""Seals: checksums inside the files themselves.

A zip archive (.pth) holds the SHA-256 of its content as the zip comment, which zip readers ignore; a JSON object holds
it as the entry "sha256".
"""

import hashlib
import io
import json
import os
import struct
from pathlib import Path

from utils.errors import Damaged, InputError
from utils.storage.files import sha256_of, write_text

MARK = b"sha256="
SEAL = len(MARK) + 64  # bytes


def seal(path: Path) -> str:
    """Appends the SHA-256 of a zip archive as its zip comment; returns the SHA-256 of the whole file."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEAL))  # the length of the comment is the last field of a zip file
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        end = MARK + digest.hexdigest().encode()
        file.seek(0, os.SEEK_END)
        file.write(end)
    digest.update(end)
    return digest.hexdigest()


def check_seal(file: io.BufferedReader) -> tuple[str, str]:
    """Verifies a sealed archive; returns (error message, empty if it is intact; SHA-256 of the whole file)."""
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
    return "" if end == expected else "its SHA-256 does not match", digest.hexdigest()


def write_sealed_json(path: Path, value: dict) -> None:
    """Writes a JSON object and its SHA-256 atomically."""
    write_text(path, _with_digest(value))


def read_sealed_json(path: Path) -> dict:
    """Reads a sealed JSON object. Raises InputError if there is no file, Damaged if any byte of it has changed."""
    try:
        content = path.read_bytes()
        value = json.loads(content)
        value.pop("sha256", None)
        if content == _with_digest(value).encode():
            return value
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (ValueError, AttributeError):  # not JSON, not an object
        pass
    raise Damaged(f"{path} is damaged (its SHA-256 does not match)")


def _with_digest(value: dict) -> str:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return json.dumps({**value, "sha256": digest}, indent=2) + "\n"
