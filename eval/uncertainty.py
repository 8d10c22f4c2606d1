"""How sure an accuracy is, and how unfair a perfectly fair model would look by chance."""

import functools
from dataclasses import dataclass

import numpy as np

from eval.fairness import std, summary
from eval.verification import Counts, first_above
from utils.data.columns import cut
from utils.data.pairs import FOLDS, fold_of

RESAMPLES = 1000
AT_ONCE = 32  # resamples
DRAWS = 100_000
ROUNDING = 1e-9  # few pairs give few different figures, which are computed in two ways
METHOD = (
    f"95 % intervals: the middle of {RESAMPLES:,} accuracies on pairs drawn anew with replacement, within each fold, "
    "genuine and impostor pairs apart, with thresholds chosen anew. Pairs count as independent of each other: the sets "
    "do not say whose faces they show."
)


def resampled(
    distances: list[dict[str, np.ndarray]], same: dict[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Ten-fold accuracies in percent (resamples, models, sets) on pairs drawn anew.

    `distances` holds per model the squared distances (P,) of each set, `same` (P,) whether a pair is genuine. All see
    the same pairs, so that their differences can be compared pair by pair (paired bootstrap: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993). They are drawn within each fold and label: a pair that were in two folds would
    be decided at a threshold that it helped to choose.
    """
    result = np.empty((resamples, len(distances), len(same)))
    for k, (name, labels) in enumerate(same.items()):
        random = np.random.default_rng((seed, k))
        fold = fold_of(len(labels))
        order, first, size = _strata(fold, labels)
        fold, labels = fold[order], labels[order]
        thresholds = [first_above(one[name]) for one in distances]
        for part in cut(range(resamples), AT_ONCE):
            drawn = order[first + (random.random((len(part), len(order))) * size).astype(np.int64)]
            for m, above in enumerate(thresholds):
                counted = Counts.of(above[drawn], fold, labels, FOLDS)
                result[part.start : part.stop, m, k] = 100 * counted.accuracies().mean(1)
    return result


def fewest(same: dict[str, np.ndarray]) -> int:
    """The number of pairs that the smallest stratum of any set has: with few, pairs drawn anew differ too little."""
    return min(int(_strata(fold_of(len(labels)), labels)[2].min()) for labels in same.values())


def _strata(fold: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs ordered by fold and label; per place in that order, where its stratum begins, and how many pairs it has."""
    stratum = 2 * fold + same
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum)
    starts = np.cumsum(sizes) - sizes
    return order, starts[stratum[order]], sizes[stratum[order]]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the values of all resamples."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def stds(samples: np.ndarray) -> np.ndarray:
    """STD of the sets' accuracies (resamples, sets) in each resample, without what drawing pairs anew adds to it.

    Drawing pairs anew spreads the sets' accuracies by the noise of the pairs a second time. The noise of one set is
    independent of another's: it adds to the sample variance (ddof 1) of the sets, on average, the mean over the sets of
    the variance between resamples. This is subtracted, so that the figures lie around the STD of the original pairs.
    NaN for a single set.
    """
    added = samples.var(0).mean()
    return np.sqrt(np.maximum(std(samples) ** 2 - added, 0))


@dataclass(frozen=True)
class Difference:
    """One model's average and STD minus another's, with intervals over the resamples, which both share.

    The STD and its interval are NaN for a single set.
    """

    average: float
    average_interval: tuple[float, float]
    std: float
    std_interval: tuple[float, float]


def difference(one: int, other: int, accuracies: np.ndarray, samples: np.ndarray) -> Difference:
    """Of two models, from `accuracies` (models, sets) and those of `resampled` (resamples, models, sets)."""
    average = samples[:, one].mean(1) - samples[:, other].mean(1)
    return Difference(
        float(accuracies[one].mean() - accuracies[other].mean()),
        interval(average),
        float(std(accuracies[one]) - std(accuracies[other])),
        interval(stds(samples[:, one]) - stds(samples[:, other])),
    )


@dataclass(frozen=True)
class ByChance:
    """STD and SER of a model that is equally good in all groups, as a finite number of pairs shows them."""

    std_mean: float
    std_95: float  # 95 of 100 such models show no more
    ser_95: float


@functools.lru_cache
def by_chance(average: float, pairs: tuple[int, ...]) -> ByChance:
    """Of a perfectly fair model with this average accuracy in percent, on so many pairs in each group.

    Simulated: in each group the right decisions are binomial with the same probability.
    """
    random = np.random.default_rng(0)
    counts = np.array(pairs)
    accuracies = 100 * random.binomial(counts, min(1.0, average / 100), (DRAWS, len(counts))) / counts
    spread = std(accuracies)
    errors = 100 - accuracies
    with np.errstate(divide="ignore", invalid="ignore"):
        ser = np.where(errors.max(1) == 0, 1.0, errors.max(1) / errors.min(1))  # as `summary`: it may be infinite
    return ByChance(float(spread.mean()), *(float(np.quantile(one, 0.95, method="higher")) for one in (spread, ser)))


def is_within_chance(accuracies: tuple[float, ...], pairs: tuple[int, ...]) -> bool:
    """Whether STD and SER are no larger than 95 of 100 perfectly fair models would show."""
    average, spread, ser = summary(accuracies)
    chance = by_chance(round(average, 2), pairs)
    return spread <= chance.std_95 + ROUNDING and ser <= chance.ser_95 + ROUNDING
