"""Bootstrap over identities, for pairs that share them, and the variance that shared identities add to a rate.

A pair has two ends. Two pairs depend on each other if they share an identity at any end. Drawing pairs as if they were
independent then gives intervals that are too narrow.

Draws: N identities are drawn with replacement. A pair counts as often as its identity was drawn, or, with two
identities, the product of both counts (pigeonhole bootstrap: Owen, Annals of Applied Statistics 1(2), 2007; for pairs
within one set of units: Davezies, D'Haultfoeuille and Guyonvarch, Annals of Statistics 49(2), 2021).

Width: the product of two counts varies three times as much as the count of a pair that is drawn by itself, so that the
draws are too wide where most identities are in few pairs, as in RFW. The deviations of the draws from their mean are
therefore scaled to the variance of a sum over pairs that share identities (Aronow, Samii and Assenova, Political
Analysis 23(4), 2015), or of independent pairs if that is larger, and set around the value on the original pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix

from eval.verification import THRESHOLDS, Counts, first_above, wrong
from utils.data.columns import cut
from utils.data.pairs import FOLDS, fold_of

BLOCK = 32  # resamples that are computed at once
UNIT = 2.0**-20  # of a scaled count: sums of multiples of it are exact, so that equally good thresholds stay equal


@dataclass(frozen=True)
class Ends:
    """The identities of both ends of P pairs, as numbers."""

    one: np.ndarray  # (P,) int64, in 0 ... count - 1
    other: np.ndarray  # (P,) int64
    count: int

    @classmethod
    def of(cls, identities: np.ndarray) -> "Ends":
        """Numbers the names (P, 2)."""
        names, numbers = np.unique(identities.astype(str), return_inverse=True)
        numbers = numbers.reshape(-1, 2)
        return cls(numbers[:, 0], numbers[:, 1], len(names))

    @classmethod
    def joined(cls, sets: Sequence["Ends"]) -> "Ends":
        """Joins the pairs of several sets; an identity of one set is a different one from all those of other sets."""
        first = np.cumsum([0, *(one.count for one in sets)])
        one, other = (
            np.concatenate([numbers + start for numbers, start in zip(of_sets, first, strict=False)])
            for of_sets in ([part.one for part in sets], [part.other for part in sets])
        )
        return cls(one, other, int(first[-1]))

    def __getitem__(self, which: np.ndarray) -> "Ends":
        """Returns the ends of the pairs that `which` (P,) bool selects."""
        return Ends(self.one[which], self.other[which], self.count)

    @cached_property
    def _two(self) -> np.ndarray:
        """(P,) bool, the pairs with two identities."""
        return self.one != self.other

    @cached_property
    def _couple(self) -> np.ndarray:
        """(P',) int64, a number for each couple of identities of the pairs with two."""
        low, high = np.minimum(self.one, self.other)[self._two], np.maximum(self.one, self.other)[self._two]
        return np.unique(low * self.count + high, return_inverse=True)[1]

    def variances(self, error: np.ndarray) -> tuple[float, float, float]:
        """Returns the variance of the sum of the terms `error` (P,), whose mean is zero, in three ways.

        The first takes the pairs as independent. The second counts every product of two pairs that share an identity
        once. The third is that of the draws of `weights`, in which a pair with two identities counts three times.
        """
        both = np.bincount(self.one, error, self.count) + np.bincount(
            self.other[self._two], error[self._two], self.count
        )
        couples = np.bincount(self._couple, error[self._two])
        ends, twice = float(both @ both), float(couples @ couples)
        return float(error @ error), ends - twice, ends + twice

    def design_effect(self, error: np.ndarray) -> float:
        """Returns by what factor shared identities raise the variance of the sum of `error` (P,); at least 1."""
        alone, shared, _ = self.variances(error)
        return max(1.0, shared / alone) if alone > 0 else 1.0

    def weights(self, random: np.random.Generator, draws: int) -> np.ndarray:
        """Returns how often each pair counts (draws, P) float64, in draws of identities with replacement."""
        drawn = random.integers(self.count, size=(draws, self.count)) + self.count * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        return np.where(self._two, times[:, self.one] * times[:, self.other], times[:, self.one])


def resampled(
    distances: list[np.ndarray], same: np.ndarray, ends: Ends, random: np.random.Generator, draws: int
) -> np.ndarray:
    """Returns ten-fold accuracies in percent (draws, models) on resampled identities, thresholds chosen again for each.

    `distances` holds the squared distances (P,) of each model. Every draw has the same identities for all models. Each
    fold keeps its numbers of genuine and of impostor pairs: their counts are scaled to them.
    """
    stratum = 2 * fold_of(len(same)) + same
    sizes = np.bincount(stratum, minlength=2 * FOLDS)
    strata = _indicator(stratum, 2 * FOLDS)
    cells = [_cells(one, stratum) for one in distances]
    result = np.empty((draws, len(distances)))
    for part in cut(range(draws), BLOCK):
        weights = ends.weights(random, len(part))
        total = (strata @ weights.T).T
        weights *= np.divide(sizes, total, out=np.zeros(total.shape), where=total > 0)[:, stratum]
        weights = np.round(weights / UNIT) * UNIT
        for m, of_model in enumerate(cells):
            result[part.start : part.stop, m] = _accuracies(of_model @ weights.T, sizes)
    for m, one in enumerate(distances):
        result[:, m] = _scaled(result[:, m], one, same, stratum, sizes, ends)
    return result


def _cells(distance: np.ndarray, stratum: np.ndarray) -> csr_matrix:
    """Returns the matrix that sums values of pairs by first threshold above their distance and stratum.

    Thresholds below or above all distances are left out: they decide as the lowest or the highest that is kept.
    """
    first = first_above(distance)
    lowest = max(int(first.min()) - 1, 0)
    kept = min(int(first.max()), len(THRESHOLDS) - 1) - lowest + 1
    return _indicator((first - lowest) * 2 * FOLDS + stratum, 2 * FOLDS * (kept + 1))


def _indicator(cell: np.ndarray, cells: int) -> csr_matrix:
    """Returns the matrix (cells, P) that sums values of pairs by cell."""
    return csr_matrix((np.ones(len(cell)), (cell, np.arange(len(cell)))), shape=(cells, len(cell)))


def _accuracies(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the ten-fold accuracies in percent (draws,) from weighted counts (cells, draws), which it overwrites."""
    by_threshold = counts.reshape(-1, 2 * FOLDS, counts.shape[1])
    for before, here in pairwise(by_threshold):  # many times faster than cumsum along the first axis
        here += before
    accepted = by_threshold[:-1].reshape(-1, FOLDS, 2, counts.shape[1]).transpose(3, 1, 2, 0)
    impostors, genuine = sizes.reshape(FOLDS, 2, 1).transpose(1, 0, 2)
    return 100 * Counts(accepted[:, :, 1], accepted[:, :, 0], genuine, impostors).accuracies().mean(1)


def _scaled(
    draws: np.ndarray, distance: np.ndarray, same: np.ndarray, stratum: np.ndarray, sizes: np.ndarray, ends: Ends
) -> np.ndarray:
    """Returns the accuracies `draws` (draws,) in percent around that of the original pairs, with the right spread."""
    right = (~wrong(distance, same)).astype(np.float64)
    share = np.bincount(stratum, right, 2 * FOLDS) / np.maximum(sizes, 1)
    fold, of_fold = stratum // 2, sizes.reshape(-1, 2).sum(1)
    error = (right - share[stratum]) / of_fold[fold] / FOLDS
    alone, shared, drawn = ends.variances(error)
    factor = np.sqrt(max(alone, shared) / drawn) if drawn > 0 else 1.0
    accuracy = 100 * (np.bincount(fold, right) / of_fold).mean()
    return np.clip(accuracy + factor * (draws - draws.mean()), 0, 100)
