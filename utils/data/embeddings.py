"""Embeddings of all images by one model: an array (N, D) float32 in index order, and its provenance (`made_from`)."""

from pathlib import Path

import numpy as np

from utils.errors import Damaged, InputError
from utils.storage.arrays import about, read
from utils.weights import digest_of, find_weights

FAR_APART = 0.1
"""Mean squared distance of two images' embeddings below which they are collapsed: ten steps of the threshold grid."""
SAMPLE = 10_000  # embeddings, evenly spaced, of which the mean squared distance is computed


def mean_distance(embeddings: np.ndarray) -> float:
    """Returns the mean squared distance, in [0, 2], of two random ones of the embeddings (N, D), scaled to unit length.

    It is 2 (1 - |mean|^2): about 2 for identities in all directions, 0 where all embeddings are equal.
    """
    rows = np.unique(np.linspace(0, len(embeddings) - 1, SAMPLE).astype(np.int64))
    sample = np.asarray(embeddings[rows], np.float64)
    sample /= np.maximum(np.linalg.norm(sample, axis=1, keepdims=True), 1e-12)
    return float(2 * np.square(sample - sample.mean(0)).sum(1).mean())


def say_if_collapsed(path: Path, embeddings: np.ndarray) -> None:
    """Prints a line if the embeddings (N, D) in `path` are too close together for the grid of thresholds."""
    if (distance := mean_distance(embeddings)) < FAR_APART:
        print(
            f"{path} is collapsed: the mean squared distance of two images is {distance:.2g}, of separated identities "
            "about 2. What learns from it learns little: train its model longer, or with other settings."
        )


def origin(images: str, weights: str, flipped: bool, inputs: dict[str, dict] | None = None) -> dict:
    """Returns the provenance (`made_from`) of embeddings, to which `embed_all` adds the precision.

    `images` and `weights` are the SHA-256 digests of the image store and of the weights. For an adaptor, `inputs` maps
    each teacher, in order, to the `made_from` of its embeddings.
    """
    made_from = {"images": images, "weights": weights, "flipped": flipped}
    return made_from if inputs is None else {**made_from, "inputs": inputs}


def in_precision(made_from: dict, precision: str) -> dict:
    """Returns `made_from` with the precision of the computation; fp32 is not named, as in files of earlier versions."""
    return made_from if precision == "fp32" else {**made_from, "precision": precision}


def accepted(infer_precision: str) -> tuple[str, ...]:
    """Returns the precisions of files that serve where `infer_precision` is set.

    tf32 is fp32 on devices without TF32 units, so files of both may be moved between devices.
    """
    return ("tf32", "fp32") if infer_precision == "tf32" else (infer_precision,)


def read_embeddings(
    path: Path, shape: tuple[int, int | None], images: str, flipped: bool, infer_precision: str, command: str
) -> tuple[np.ndarray, dict]:
    """Memory-maps embeddings (N, D) float32 read-only; returns them and their `made_from`.

    D may be None: any size. `command` is the command that makes them, for error messages. Raises InputError if the
    array is missing, corrupted, of another shape, or made from other images, the other view or in a precision that is
    not `accepted`.
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
    precision = found["made from"].get("precision", "fp32")
    if precision not in accepted(infer_precision):
        raise InputError(
            f"{path} was computed in {precision}, but infer_precision is {infer_precision}: set it to {precision}, "
            f"or run again: {command}"
        )
    count, size = shape
    whole = (count, found["shape"][-1] if size is None else size)
    if found["shape"] != [*whole]:
        raise InputError(
            f"{path} is of shape {tuple(found['shape'])}, expected {whole}: set embedding_size, or run again: {command}"
        )
    try:
        return read(path, whole, np.float32), found["made from"]
    except Damaged as error:
        raise InputError(f"{error}. Run again: {command}") from error


def check_weights(path: Path, digest: str, run: Path, which: str, command: str) -> None:
    """Raises InputError if the weights in the run folder differ from those (SHA-256 `digest`) that made `path`.

    A run folder without weights passes: embeddings may be copied without them.
    """
    weights = find_weights(run, which)
    if weights and digest_of(weights) != digest:
        raise InputError(f"{path} was made by other weights than {weights}. Run again: {command}")
