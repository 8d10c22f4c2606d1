"""Face verification as published: f(x) + f(flip x) scaled to unit length, ten folds, threshold from the other nine."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config
from eval.rates import best_of_sorted
from utils.data.columns import Column, cut
from utils.data.pairs import FOLDS, Pairs, fold_of, lacking
from utils.data.pairs import load_bin as load_bin
from utils.distributed.world import is_first
from utils.errors import InputError
from utils.training.engine import Validate, infer

BLOCK_NUMBERS = 1 << 15  # numbers in a block that fits a processor's cache
THRESHOLDS = np.arange(0, 4, 0.01)
"""(400,) thresholds on the squared distance of unit vectors, which lies in [0, 4]."""


@dataclass(frozen=True)
class TenFold:
    """Accuracy and threshold of each fold, and the ROC curve, as `ten_fold` returns them."""

    accuracy: np.ndarray  # (folds,) share of right decisions in each fold, in [0, 1]
    threshold: np.ndarray  # (folds,) best threshold on the other folds, applied to this one
    tpr: np.ndarray  # (400,) share of genuine pairs accepted at each of THRESHOLDS, mean over the folds
    fpr: np.ndarray  # (400,) share of impostor pairs accepted at each of THRESHOLDS, mean over the folds


def ten_fold(embeddings: np.ndarray, same: np.ndarray, folds: int = FOLDS) -> TenFold:
    """Returns the verification accuracy of unit-length embeddings (2P, D); pair k is rows 2k and 2k + 1.

    `same` (P,) bool says which pairs are genuine. Raises InputError as `squared_distances` and `ten_fold_of` do.
    """
    return ten_fold_of(squared_distances(embeddings), same, folds)


def squared_distances(embeddings: np.ndarray) -> np.ndarray:
    """Returns the squared distances (P,) float64 of the pairs of rows 2k and 2k + 1 of `embeddings` (2P, D).

    Raises InputError if the number of rows is odd or an embedding is not finite.
    """
    embeddings = np.asarray(embeddings, np.float64)
    if len(embeddings) % 2:
        raise InputError(f"{len(embeddings)} embeddings do not make pairs.")
    one, other = embeddings[0::2], embeddings[1::2]
    distance = np.empty(len(one))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in cut(range(len(one)), max(1, BLOCK_NUMBERS // one.shape[1])):
            apart = one[part.start : part.stop] - other[part.start : part.stop]
            np.square(apart, out=apart).sum(1, out=distance[part.start : part.stop])
    if not np.isfinite(distance).all():
        raise InputError("Some embeddings are not finite: the network gives NaN or infinity for some images.")
    return distance


def ten_fold_of(distance: np.ndarray, same: np.ndarray, folds: int = FOLDS) -> TenFold:
    """Returns the verification accuracy of pairs with squared distances `distance` (P,) and labels `same` (P,) bool.

    Folds are consecutive, not shuffled. A pair is accepted if its squared distance is below the threshold; of equally
    good thresholds the lowest is chosen. The result equals that of the published loop.

    Raises InputError if `distance` and `same` differ in length, or if there are fewer pairs than folds.
    """
    same = np.asarray(same, bool)
    if len(distance) != len(same):
        raise InputError(f"{len(distance)} distances are not those of {len(same)} pairs.")
    if len(same) < folds:
        raise InputError(f"{len(same)} pairs cannot be cut into {folds} folds.")

    fold = fold_of(len(same), folds)
    counted = Counts.of(first_above(distance)[None], fold, same, folds)
    return TenFold(
        counted.accuracies()[0],
        THRESHOLDS[counted.best()[0]],
        _mean_share(counted.genuine_accepted[0], counted.genuine),
        _mean_share(counted.impostors_accepted[0], counted.impostors),
    )


def wrong(distance: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Returns which pairs (P,) bool are decided wrongly at the threshold of their fold, as `ten_fold_of` chooses it."""
    return (distance < ten_fold_of(distance, same).threshold[fold_of(len(same))]) != same


def first_above(distance: np.ndarray) -> np.ndarray:
    """Returns the index (P,) of the first of THRESHOLDS above each distance, 400 if there is none."""
    return np.searchsorted(THRESHOLDS, distance, side="right")


@dataclass(frozen=True)
class Counts:
    """Numbers of pairs accepted at each threshold, for each fold of R sets with folds of the same sizes.

    They are counted in one pass over the pairs, instead of one pass for each threshold.
    """

    genuine_accepted: np.ndarray  # (R, folds, 400)
    impostors_accepted: np.ndarray  # (R, folds, 400)
    genuine: np.ndarray  # (folds, 1) accepted or not
    impostors: np.ndarray  # (folds, 1) accepted or not

    @classmethod
    def of(cls, first: np.ndarray, fold: np.ndarray, same: np.ndarray, folds: int) -> "Counts":
        """Counts pairs by their `first_above` (R, P), fold (P,) and label `same` (P,)."""
        shape = (len(first), folds, len(THRESHOLDS) + 1)
        cells = (np.arange(len(first))[:, None] * folds + fold) * shape[2] + first

        def accepted(which: np.ndarray) -> np.ndarray:
            counts = np.bincount(cells[:, which].ravel(), minlength=np.prod(shape)).reshape(shape)
            return counts.cumsum(2)[..., :-1]

        totals = (np.bincount(fold[which], minlength=folds)[:, None] for which in (same, ~same))
        return cls(accepted(same), accepted(~same), *totals)

    def right(self) -> np.ndarray:
        """Returns the numbers (R, folds, 400) of right decisions."""
        return self.genuine_accepted + self.impostors - self.impostors_accepted

    def best(self) -> np.ndarray:
        """Returns the index (R, folds) of the best threshold on the other folds, the lowest of equally good ones."""
        right = self.right()
        return (right.sum(1, keepdims=True) - right).argmax(2)

    def accuracies(self) -> np.ndarray:
        """Returns the share (R, folds) of right decisions in each fold at the best threshold of the other folds."""
        right = np.take_along_axis(self.right(), self.best()[..., None], 2)
        return (right / (self.genuine + self.impostors))[..., 0]


def _mean_share(accepted: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Returns the mean over folds of `accepted` / `of`; a fold without such pairs counts as 0, as published."""
    return np.divide(accepted, of, out=np.zeros(accepted.shape), where=of > 0).mean(0)


def views(network: nn.Module, images: np.ndarray, cfg: Config, title: str) -> np.ndarray:
    """Returns the features (N, 2, D) of all images (N, 112, 112, 3) uint8 and of the flipped images.

    `title` is shown by the progress bar.
    """

    def both(image: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(image), network(image.flip(-1))], 1)

    return infer(both, network, {"image": Column((images,))}, cfg, title)


def pair_distances(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the squared distances (P,) of pairs, from features (U, 2, D) of `Pairs.distinct`, and `Pairs.rows`."""
    return squared_distances(embed(features)[rows])


def embed(features: np.ndarray) -> np.ndarray:
    """Returns embeddings (N, D): sums of the features (N, 2, D) of image and flipped image, scaled to unit length."""
    with np.errstate(invalid="ignore", over="ignore"):  # `squared_distances` refuses non-finite values
        return normalize(features.sum(1, dtype=np.float64))


def normalize(features: np.ndarray) -> np.ndarray:
    """Scales features (N, D) to unit length; a feature of length zero stays zero."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length == 0, 1, length)


def accuracy(distance: np.ndarray, same: np.ndarray) -> float:
    """Returns the mean accuracy of the ten folds in percent, from `distance` and `same` (P,)."""
    return 100 * float(ten_fold_of(distance, same).accuracy.mean())


def collapsed(distances: dict[str, np.ndarray], same: dict[str, np.ndarray]) -> str:
    """Returns the rest of a sentence on a model whose embeddings are collapsed on one of the sets, else "".

    They are if the middle 90 % of the squared distances span fewer than ten steps of THRESHOLDS: the grid is then too
    coarse for the protocol's accuracy. `distances` and `same` hold the squared distances and labels (P,) of each set.
    """
    found = []
    for name, distance in distances.items():
        low, high = np.percentile(distance, (5, 95))
        if high - low < 10 * THRESHOLDS[1]:
            genuine, impostors = (np.sort(distance[which]) for which in (same[name], ~same[name]))
            grid, exact = accuracy(distance, same[name]), 100 * best_of_sorted(genuine, impostors)[1]
            found.append(f"{name}: distances {low:.2g} to {high:.2g}, accuracy {grid:.2f}, {exact:.2f}")
    if not found:
        return ""
    return (
        "is collapsed, its distances are closer together than the protocol's thresholds (5th to 95th percentile of "
        f"the squared distances, accuracy by the protocol, and at the exact best threshold: {'; '.join(found)})."
    )


def validator(network: nn.Module, sets: dict[str, Pairs], cfg: Config, best_on: str = "") -> Validate:
    """Returns a function that verifies `network` on all sets, for `utils.training.engine.fit`.

    It returns the accuracies in percent by set, with their average, and the score that selects the best epoch: the
    accuracy on the set `best_on`, or the average if `best_on` is empty. Sets without both kinds of pairs in every fold
    are left out of the average, and select no epoch.
    """
    whole = [name for name, pairs in sets.items() if not lacking(pairs.same)]

    def validate() -> tuple[dict[str, float], float]:
        scores, distances, same = {}, {}, {name: pairs.same for name, pairs in sets.items()}
        for name, pairs in sets.items():
            distances[name] = pair_distances(views(network, pairs.distinct, cfg, f"verify {name}"), pairs.rows)
            scores[name] = round(accuracy(distances[name], pairs.same), 4)
        if is_first() and (said := collapsed(distances, same)):
            tqdm.write(f"The network {said}")
        scores["average"] = round(sum(scores[name] for name in whole) / len(whole), 4)
        return scores, scores[best_on if best_on in whole else "average"]

    return validate
