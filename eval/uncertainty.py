"""Confidence intervals of accuracies, and the STD and SER that a perfectly fair model shows by chance."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from eval import identities
from eval.fairness import std, summary
from eval.few_errors import SMOOTHED
from eval.identities import BLOCK, Ends
from eval.verification import Counts, first_above
from utils.data.columns import cut
from utils.data.pairs import FOLDS, fold_of

RESAMPLES = 1000
DRAWS = 100_000
FEWEST_PAIRS = 5
"""Pairs of each kind in a fold, 100 pairs in a set, under which a set has no interval, and its table no verdict.

Resamples of a stratum of n pairs have (n - 1) / n of the variance of new pairs: with 5 intervals are 11 % too narrow,
with 2 (a set of 40 pairs) 29 %, and with 1 (a set of 20) they have no width at all.
"""
NARROW_PAIRS = 10  # of each kind in a fold, under which a note says that intervals are too narrow: by 5 % with 10
TOLERANCE = 1e-9  # equal values that are computed in two ways differ by rounding
EXACT = (
    f"{SMOOTHED} Intervals then hold the exact ones too: of a set (Clopper-Pearson), of the average (Fay-Feuer), of "
    "differences of two models from the pairs that one of them decides wrongly (Zou-Donner)."
)
METHOD = (
    f"95 % intervals: 2.5th to 97.5th percentile of {RESAMPLES:,} accuracies on pairs resampled with replacement, "
    "within each fold and separately for genuine and impostor pairs, with thresholds chosen again for each. Pairs are "
    "taken as independent of each other, since the sets do not contain identities."
)
METHOD_OF_IDENTITIES = (
    f"95 % intervals: 2.5th to 97.5th percentile of {RESAMPLES:,} accuracies on resampled identities, both ends of a "
    "pair, with thresholds chosen again for each; the spread is that of sums over pairs that share identities."
)


def method(ends: Mapping[str, Ends | None]) -> str:
    """Returns the note that says what the intervals draw, from the identities by set (None: not known)."""
    without = [name for name, known in ends.items() if known is None]
    if len(without) == len(ends):
        return METHOD
    return METHOD_OF_IDENTITIES + (f" Pairs instead of identities for {', '.join(without)}." if without else "")


def resampled(
    distances: list[dict[str, np.ndarray]],
    same: dict[str, np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
    ends: Mapping[str, Ends | None] = MappingProxyType({}),
) -> np.ndarray:
    """Returns ten-fold accuracies in percent (resamples, models, sets) on pairs resampled with replacement.

    `distances` holds for each model the squared distances (P,) of each set, `same` (P,) bool of each set which pairs
    are genuine. A resample has the same pairs for all models (paired bootstrap: Efron and Tibshirani, An Introduction
    to the Bootstrap, 1993). Where `ends` holds the identities of a set's pairs, identities are drawn instead
    (`eval.identities`).
    """
    result = np.empty((resamples, len(distances), len(same)))
    for k, (name, labels) in enumerate(same.items()):
        of_set, known, random = [one[name] for one in distances], ends.get(name), np.random.default_rng((seed, k))
        if known is None:
            result[:, :, k] = _resampled_pairs(of_set, labels, random, resamples)
        else:
            result[:, :, k] = identities.resampled(of_set, labels, known, random, resamples)
    return result


def _resampled_pairs(
    distances: list[np.ndarray], same: np.ndarray, random: np.random.Generator, draws: int
) -> np.ndarray:
    """Returns ten-fold accuracies in percent (draws, models) of one set on resampled pairs.

    Pairs are drawn within their fold and label: a pair in two folds would be decided at a threshold that it helped to
    choose.
    """
    fold = fold_of(len(same))
    order, first, size = _strata(fold, same)
    fold, same = fold[order], same[order]
    thresholds = [first_above(one) for one in distances]
    result = np.empty((draws, len(distances)))
    for part in cut(range(draws), BLOCK):
        drawn = order[first + (random.random((len(part), len(order))) * size).astype(np.int64)]
        for m, above in enumerate(thresholds):
            counted = Counts.of(above[drawn], fold, same, FOLDS)
            result[part.start : part.stop, m] = 100 * counted.accuracies().mean(1)
    return result


def fewest(same: np.ndarray) -> int:
    """Returns the size of the smallest stratum (fold and label) of a set; resamples of few pairs vary too little."""
    return int(_strata(fold_of(len(same)), same)[2].min())


def _strata(fold: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders pairs by fold and label; returns the order, and for each place in it the start and size of its stratum."""
    stratum = 2 * fold + same
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum)
    starts = np.cumsum(sizes) - sizes
    return order, starts[stratum[order]], sizes[stratum[order]]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5th and 97.5th percentile of the values (resamples,)."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def stds(samples: np.ndarray) -> np.ndarray:
    """Returns the STD (resamples,) over sets of the accuracies (resamples, sets), corrected for the resampling noise.

    Resampling adds the noise of the pairs to the accuracies a second time. This noise is independent between sets, so
    that on average it raises the sample variance over sets (ddof 1) by the mean over sets of the variance between
    resamples. That mean is subtracted, so that the values lie around the STD of the original pairs. NaN for a single
    set.
    """
    added = samples.var(0).mean()
    return np.sqrt(np.maximum(std(samples) ** 2 - added, 0))


@dataclass(frozen=True)
class Difference:
    """Average and STD of one model minus those of another, with 95 % intervals over resamples of the same pairs.

    The STD and its interval are NaN for a single set.
    """

    average: float
    average_interval: tuple[float, float]
    std: float
    std_interval: tuple[float, float]


def difference(one: int, other: int, accuracies: np.ndarray, samples: np.ndarray) -> Difference:
    """Compares the models with indices `one` and `other`.

    `accuracies` (models, sets) are those on the original pairs, `samples` (resamples, models, sets) from `resampled`.
    """
    average = samples[:, one].mean(1) - samples[:, other].mean(1)
    return Difference(
        float(accuracies[one].mean() - accuracies[other].mean()),
        interval(average),
        float(std(accuracies[one]) - std(accuracies[other])),
        interval(stds(samples[:, one]) - stds(samples[:, other])),
    )


@dataclass(frozen=True)
class ByChance:
    """STD and SER that a model with the same true accuracy in all groups shows on a finite number of pairs."""

    std_mean: float
    std_95: float  # 95 % quantile over such models
    ser_95: float


@functools.lru_cache
def by_chance(average: float, pairs: tuple[int, ...]) -> ByChance:
    """Simulates perfectly fair models with this `average` accuracy in percent, on `pairs` (G,) pairs per group.

    In each group the number of right decisions is binomial with the same probability.
    """
    random = np.random.default_rng(0)
    counts = np.array(pairs)
    accuracies = 100 * random.binomial(counts, min(1.0, average / 100), (DRAWS, len(counts))) / counts
    spread = std(accuracies)
    errors = 100 - accuracies
    with np.errstate(divide="ignore", invalid="ignore"):
        ser = np.where(errors.max(1) == 0, 1.0, errors.max(1) / errors.min(1))  # infinite as in `summary`
    return ByChance(float(spread.mean()), *(float(np.quantile(one, 0.95, method="higher")) for one in (spread, ser)))


def is_within_chance(accuracies: tuple[float, ...], pairs: tuple[int, ...]) -> bool:
    """Returns whether STD and SER are at most the 95 % quantiles of perfectly fair models.

    `accuracies` (G,) are in percent, `pairs` (G,) the numbers of pairs of the groups.
    """
    average, spread, ser = summary(accuracies)
    chance = by_chance(average, pairs)
    return spread <= chance.std_95 + TOLERANCE and ser <= chance.ser_95 + TOLERANCE
