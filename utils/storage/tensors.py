"""Tensors and plain values in .pth files.

Files that this project writes (names in `OURS`) are ordinary PyTorch files with a SHA-256 as the zip comment. It is
verified on every read.
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
"""Names of the files that this project writes and seals; files with other names come from elsewhere."""


def save(path: Path, value: Any, previous: Path | None = None) -> str:
    """Writes and seals a file atomically and returns its SHA-256; keeps the replaced file as `previous`, if given.

    Tensors are written from the CPU (see `on_cpu`).
    """
    value = on_cpu(value)
    with replaced(path, previous) as partial:
        try:
            # Given a path, torch.save hides why a write failed and stores the path in the file.
            with open(partial, "wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # after a failed write, closing the archive fails too and hides the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return seal(partial)


def on_cpu(value: Any) -> Any:
    """Returns nested dicts with their tensors on the CPU, and state dicts with their `_metadata`.

    Files of such values have the same bytes whatever device the tensors were on, and load where there is no GPU.
    """
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if not isinstance(value, dict):
        return value
    moved = type(value)((key, on_cpu(one)) for key, one in value.items())
    if hasattr(value, "_metadata"):
        moved._metadata = value._metadata  # type: ignore[attr-defined]  # where PyTorch keeps the versions of modules
    return moved


def load(path: Path) -> Any:
    """Loads a file of tensors and plain values to the CPU; anything else is refused, so no file can execute code.

    Raises InputError if the file does not exist or holds anything else, Damaged if a sealed file is corrupted.
    """
    return load_with_digest(path)[0]


def load_with_digest(path: Path) -> tuple[Any, str]:
    """Loads a file as `load` does and returns (value, SHA-256 of the bytes that were read).

    The SHA-256 is right even if the file is replaced in the meantime.
    """
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
            # EINVAL is not a read error: in a truncated archive, PyTorch seeks to a negative position.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            # torch.load raises many kinds of exceptions for a corrupted file. Its message on a refused name is replaced
            # because it advises the user to allow that name.
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            refused = f"it asks for {asked[1]}" if asked else "it holds more than tensors and plain values"
            reason = refused if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0]
            reason = "it ends too early" if isinstance(error, OSError | EOFError) else reason
            advice = "save the state_dict() of the network instead" if asked else "replace it"
            raise InputError(f"{path} is damaged or no checkpoint ({reason.rstrip('.')}): {advice}.") from error
