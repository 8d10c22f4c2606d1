"""Embeddings of all images by one model: an array (N, D) float32 in index order, and what it was made from."""

from pathlib import Path

import numpy as np

from utils.errors import Damaged, InputError
from utils.storage.arrays import about, read
from utils.storage.files import sha256
from utils.weights import find_weights


def origin(images: str, weights: str, flipped: bool, inputs: dict[str, dict] | None = None) -> dict:
    """What decides the embeddings that weights give to an image store, both named by their digests.

    `inputs` are, per teacher in order, the origins of the embeddings that the weights were applied to, if they were not
    applied to images.
    """
    made_from = {"images": images, "weights": weights, "flipped": flipped}
    return made_from if inputs is None else {**made_from, "inputs": inputs}


def read_embeddings(
    path: Path, shape: tuple[int, int], images: str, flipped: bool, command: str
) -> tuple[np.ndarray, dict]:
    """The mapped array (N, D) and what it was made from.

    Raises InputError where it is missing, damaged or made for other images or the other view; `command` makes it.
    """
    try:
        found = about(path)
    except Damaged as error:
        raise InputError(f"{error}. Run again: {command}") from error
    if found is None:
        raise InputError(f"{path} is missing or not finished. Run first: {command}")
    if found["made from"].get("images") != images:
        raise InputError(f"{path} was made for other images than data holds now. Run again: {command}")
    if found["made from"].get("flipped") != flipped:
        raise InputError(f"{path} is of the images {'as they are' if flipped else 'flipped'}. Run again: {command}")
    if found["shape"] != [*shape]:
        raise InputError(
            f"{path} is of shape {tuple(found['shape'])}, expected {shape}: set embedding_size, or run again: {command}"
        )
    try:
        return read(path, shape, np.float32), found["made from"]
    except Damaged as error:
        raise InputError(f"{error}. Run again: {command}") from error


def check_weights(path: Path, digest: str, run: Path, which: str, command: str) -> None:
    """Raises InputError where the run folder holds other weights than those with which `path` was made.

    A run folder without weights is no contradiction: embeddings may be handed on without them.
    """
    weights = find_weights(run, which)
    if weights and sha256(weights) != digest:
        raise InputError(f"{path} was made by other weights than {weights}. Run again: {command}")
