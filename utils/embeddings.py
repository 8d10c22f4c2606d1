"""Embeddings of all images by one model: an array (N, D) float32 in index order, and what it was made from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.checkpoint import find_weights
from utils.errors import InputError
from utils.files import new_array, read_json, replaced, sha256, write_json


def sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def origin(images: str, weights: Path, flipped: bool, inputs: dict[str, dict] | None = None) -> dict:
    """What decides the embeddings that `weights` gives to the image store with the id `images`.

    `inputs` are, per teacher in order, the origins of the embeddings that the weights were applied to, if they were not
    applied to images.
    """
    made_from = {"images": images, "weights": sha256(weights), "flipped": flipped}
    return made_from if inputs is None else {**made_from, "inputs": inputs}


@contextlib.contextmanager
def new_embeddings(path: Path, shape: tuple[int, int], made_from: dict) -> Iterator[np.ndarray]:
    """Yields the mapped array to fill; file and sidecar appear when the block ends without an exception."""
    sidecar(path).unlink(missing_ok=True)
    with replaced(path) as partial:
        array = new_array(partial, shape, np.float32)
        yield array
        array.flush()
    write_json(sidecar(path), made_from)


def is_current(path: Path, shape: tuple[int, int], made_from: dict) -> bool:
    """Whether the embeddings are there, whole, and were made from exactly this."""
    if not (path.exists() and sidecar(path).exists()):
        return False
    try:
        array = np.load(path, mmap_mode="r")
        return array.shape == shape and array.dtype == np.float32 and read_json(sidecar(path)) == made_from
    except (OSError, ValueError, EOFError):  # damaged, which is an InputError too
        return False


def read_embeddings(path: Path, shape: tuple[int, int], images: str, command: str) -> tuple[np.ndarray, dict]:
    """The mapped array (N, D) and what it was made from.

    Raises InputError where it is missing, damaged or made for other images; `command` makes it.
    """
    if not (path.exists() and sidecar(path).exists()):
        raise InputError(f"{path} is missing. Run first: {command}")
    made_from = read_json(sidecar(path))
    if made_from.get("images") != images:
        raise InputError(f"{path} was made for other images than data holds now. Run again: {command}")
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}). Run again: {command}") from error
    if array.shape != shape or array.dtype != np.float32:
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected float32 of {shape}: "
            f"set embedding_size, or run again: {command}"
        )
    return array, made_from


def check_weights(path: Path, digest: str, run: Path, which: str, command: str) -> None:
    """Raises InputError where the run folder holds other weights than those with which `path` was made.

    A run folder without weights is no contradiction: embeddings may be handed on without them.
    """
    weights = find_weights(run, which)
    if weights and sha256(weights) != digest:
        raise InputError(f"{path} was made by other weights than {weights}. Run again: {command}")
