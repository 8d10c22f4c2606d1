"""Face verification as published: f(x) + f(flip x), unit length, ten folds, threshold from the other nine."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config.config import Config
from utils.dataset import Column
from utils.engine import Validate, infer
from utils.errors import InputError
from utils.store import decode

THRESHOLDS = np.arange(0, 4, 0.01)
"""On the squared distance of unit vectors, which lies in [0, 4]."""


@dataclass(frozen=True)
class Pairs:
    """A verification set of P pairs: pair k is images 2k and 2k + 1."""

    images: np.ndarray  # (2P, 112, 112, 3) uint8, RGB
    same: np.ndarray  # (P,) bool


@dataclass(frozen=True)
class TenFold:
    """Result of `ten_fold`."""

    accuracy: np.ndarray  # (folds,) share of right decisions in each fold, in [0, 1]
    threshold: np.ndarray  # (folds,) the threshold it was decided at, the best of the other folds
    tpr: np.ndarray  # (400,) share of genuine pairs accepted at each of THRESHOLDS, mean over the folds
    fpr: np.ndarray  # (400,) share of impostor pairs accepted, likewise


def load_bin(path: Path) -> Pairs:
    """Reads a verification set in the format of RFW and insightface: a pickle of (encoded images, same or not).

    Raises InputError for whatever else the file may be. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: set pairs to the folder of the <ethnicity>_test.bin files.")
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle can raise nearly anything.
        raise InputError(f"{path} is damaged or no set of pairs ({error}).") from error
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise InputError(f"{path} is no set of pairs: expected (images, same or not).")
    encoded, same = content
    if not all(isinstance(part, (list, tuple, np.ndarray)) for part in (encoded, same)):
        raise InputError(f"{path} is no set of pairs: expected two lists.")
    if len(encoded) == 0 or len(encoded) != 2 * len(same):
        raise InputError(f"{path} holds {len(encoded)} images for {len(same)} pairs: expected two for each.")
    if not all(isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1) for value in same):
        raise InputError(f"{path}: whether a pair is the same must be True or False.")

    def decode_item(k: int) -> np.ndarray:
        try:
            return decode(bytes(encoded[k]) if isinstance(encoded[k], (bytes, np.ndarray)) else b"")
        except ValueError as error:
            raise InputError(f"{path}: image {k} {error}.") from error

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(decode_item, range(len(encoded)))))
    return Pairs(images, np.array([bool(value) for value in same]))


class _Unpickler(pickle.Unpickler):
    """Lists, tuples, numbers, bytes and NumPy arrays; every other name that a pickle may ask for is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            return _latin1
        # How NumPy writes arrays and numbers: under another module name in each of its major versions.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            for value in (np.empty(0), np.int64(0)):
                if (rebuild := value.__reduce__()[0]).__name__ == name:
                    return rebuild
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which is not read")
    return text.encode("latin1")


def ten_fold(embeddings: np.ndarray, same: np.ndarray, folds: int = 10) -> TenFold:
    """Verification accuracy of unit-length embeddings (2P, D); pair k is rows 2k and 2k + 1, `same` is (P,) bool.

    Folds are consecutive, not shuffled. A pair is accepted where its squared distance is below the threshold; of
    equally good thresholds the lowest is taken. Counts of pairs per threshold stand in for a pass over all pairs for
    each threshold: the result is that of the published loop.

    Raises InputError where an embedding is not finite, or where there are fewer pairs than folds.
    """
    embeddings, same = np.asarray(embeddings, np.float64), np.asarray(same, bool)
    if len(embeddings) != 2 * len(same):
        raise InputError(f"{len(embeddings)} embeddings do not make {len(same)} pairs.")
    if len(same) < folds:
        raise InputError(f"{len(same)} pairs cannot be cut into {folds} folds.")
    if not np.isfinite(embeddings).all():
        raise InputError("Some embeddings are not finite: the network gives NaN or infinity for some images.")
    distance = np.square(embeddings[0::2] - embeddings[1::2]).sum(1)

    # accepted[f, t]: pairs of fold f, genuine or impostor, with a distance below threshold t.
    fold = np.repeat(np.arange(folds), [len(part) for part in np.array_split(distance, folds)])
    first = np.searchsorted(THRESHOLDS, distance, side="right")  # the first threshold above the distance
    shape = (folds, len(THRESHOLDS) + 1)

    def accepted(which: np.ndarray) -> np.ndarray:
        cells = fold[which] * shape[1] + first[which]
        return np.bincount(cells, minlength=folds * shape[1]).reshape(shape).cumsum(1)[:, :-1]

    genuine, impostors = (np.bincount(fold[which], minlength=folds)[:, None] for which in (same, ~same))
    genuine_accepted, impostors_accepted = accepted(same), accepted(~same)
    right = genuine_accepted + impostors - impostors_accepted

    best = (right.sum(0) - right).argmax(1)  # on the other folds
    accuracy = right[np.arange(folds), best] / np.bincount(fold)
    return TenFold(
        accuracy,
        THRESHOLDS[best],
        _mean_share(genuine_accepted, genuine),
        _mean_share(impostors_accepted, impostors),
    )


def _mean_share(accepted: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Mean over the folds; a fold without such pairs counts as 0, as published."""
    return np.divide(accepted, of, out=np.zeros(accepted.shape), where=of > 0).mean(0)


def views(network: nn.Module, images: np.ndarray, cfg: Config, title: str) -> np.ndarray:
    """Features (N, 2, D) of all images (N, 112, 112, 3) uint8 as they are and flipped, not normalised."""

    def both(image: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(image), network(image.flip(-1))], 1)

    return infer(both, network, {"image": Column((images,))}, cfg, title)


def embed(features: np.ndarray) -> np.ndarray:
    """The embeddings (N, D) that are verified: the sum of both views' features (N, 2, D), scaled to unit length."""
    return normalize(features.sum(1, dtype=np.float64))


def normalize(features: np.ndarray) -> np.ndarray:
    """Features (N, D) scaled to unit length; one of length zero stays zero."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length == 0, 1, length)


def load_pairs(cfg: Config) -> dict[str, Pairs]:
    """The verification sets of all groups; raises InputError that names all that are missing."""
    missing = [str(cfg.pairs_file(name)) for name in cfg.ethnicities if not cfg.pairs_file(name).is_file()]
    if missing:
        raise InputError(f"Missing: {', '.join(missing)}. Set pairs to the folder of the <ethnicity>_test.bin files.")
    return {name: load_bin(cfg.pairs_file(name)) for name in cfg.ethnicities}


def validator(network: nn.Module, cfg: Config, best_on: str = "") -> Validate:
    """Verification accuracy in percent on every group's pairs; the best epoch is that of the group `best_on`, else of
    the average. The pairs are read at once, so that a missing file is found before training."""
    sets = load_pairs(cfg)

    def validate() -> tuple[dict[str, float], float]:
        scores = {}
        for name, pairs in sets.items():
            features = views(network, pairs.images, cfg, f"verify {name}")
            scores[name] = round(100 * float(ten_fold(embed(features), pairs.same).accuracy.mean()), 4)
        scores["average"] = round(sum(scores.values()) / len(scores), 4)
        return scores, scores[best_on or "average"]

    return validate
