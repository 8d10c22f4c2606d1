"""Tensors and plain values in .pth files.

Those of the names that we write (`OURS`) are plain PyTorch files whose zip comment is a SHA-256, checked whenever they
are read.
"""

import errno
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from utils.errors import Damaged, InputError
from utils.storage.files import replaced, sha256_of
from utils.storage.seals import check_seal, seal

OURS = re.compile(r"((best|last)_(backbone|header)|(previous_)?checkpoint)\.pth")
"""The names of files that we write, and seal; files of other names come from elsewhere."""


def save(path: Path, value: Any, previous: Path | None = None) -> str:
    """Writes and seals a file, and gives its SHA-256; the one that it replaces is kept as `previous`, if given."""
    with replaced(path, previous) as partial:
        try:
            # Given a path, PyTorch would not say why it cannot write, and would put the path into the file.
            with open(partial, "wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # PyTorch closes its archive after a write has failed, which fails in turn
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return seal(partial)


def load(path: Path) -> Any:
    """Reads tensors and plain values to the CPU; refuses whatever else a file holds, so that none can run code.

    Raises InputError where the file is not there or holds anything else, Damaged where it is one of ours and not as it
    was written.
    """
    return load_with_digest(path)[0]


def load_with_digest(path: Path) -> tuple[Any, str]:
    """Like `load`; also the SHA-256 of the file that was read, even if another takes its place in the meantime."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    with file:
        if OURS.fullmatch(path.name):
            reason, digest = check_seal(file)
            if reason:
                raise Damaged(f"{path} is damaged ({reason})")
        else:
            digest = sha256_of(file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True), digest
        except MemoryError:
            raise
        except Exception as error:
            # EINVAL is no failed read: in a short archive PyTorch looks for the end before the file begins.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            # torch.load has no exception of its own: what it raises depends on what is wrong where. Its own words on
            # what is not allowed advise to allow it.
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            refused = f"it asks for {asked[1]}" if asked else "it holds more than tensors and plain values"
            reason = refused if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0]
            reason = "it ends too early" if isinstance(error, OSError | EOFError) else reason
            raise InputError(f"{path} is damaged or no checkpoint ({reason.rstrip('.')}): replace it.") from error
