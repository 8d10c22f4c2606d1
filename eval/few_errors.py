"""Intervals of models with few errors: resampling pairs cannot draw an error that did not occur."""

from collections.abc import Mapping, Sequence

import numpy as np

from eval.identities import Ends
from eval.intervals import Sampled, mean_of, minus
from eval.verification import wrong

FEW_ERRORS = 30  # errors of a set under which the percentile interval of resampled pairs is widened
SMOOTHED = f"In a set with fewer than {FEW_ERRORS} errors each draw has half an error more on average (Jeffreys)."
Bounds = tuple[float, float]


class FewErrors:
    """Widens percentile intervals of accuracies in percent to hold the exact ones, where a set has few errors.

    `wrong` holds for each model and each set which pairs are decided wrongly, (P,) bool; `ends` the identities of the
    pairs of each set, None if they are not known. Intervals without any set of fewer than FEW_ERRORS errors stay as
    they are. For differences of two models only the pairs that exactly one of them decides wrongly count.
    """

    def __init__(self, wrong: Sequence[Sequence[np.ndarray]], ends: Sequence[Ends | None]):
        self._wrong, self._ends = wrong, ends
        self._rates = [[self._rate(one, s) for s, one in enumerate(of_model)] for of_model in wrong]

    @classmethod
    def of(
        cls, distances: Sequence[Mapping[str, np.ndarray]], same: Mapping[str, np.ndarray], ends: Sequence[Ends | None]
    ) -> "FewErrors":
        """Counts the errors of ten folds, from the squared distances (P,) of each model by set, and the labels."""
        return cls([[wrong(one[name], labels) for name, labels in same.items()] for one in distances], ends)

    @property
    def are_many(self) -> bool:
        """Tells whether no model has few errors on a set."""
        return not any(_is_few(one) for row in self._rates for one in row)

    def smoothed(self, samples: np.ndarray) -> np.ndarray:
        """Returns the accuracies (resamples, models, sets) with half an error more on average in sets with few errors.

        In resamples of a set with k errors their number has mean and variance k, nearly. A draw from Gamma(1/2) makes
        both k + 1/2, as under the posterior of Jeffreys' prior, Gamma(k + 1/2). The draws are the same at each call.
        """
        size = np.array([[100 * one.design_effect / one.rate.of * _is_few(one) for one in row] for row in self._rates])
        added = size * np.random.default_rng(0).gamma(0.5, size=samples.shape)
        return np.maximum(samples - added, 0)

    def accuracy(self, model: int, group: int, bounds: Bounds) -> Bounds:
        """Returns the interval of the accuracy on one set, widened to the one of Clopper and Pearson."""
        one = self._rates[model][group]
        return _hull(bounds, [1 - bound for bound in one.interval]) if _is_few(one) else bounds

    def average(self, model: int, sets: Sequence[int], bounds: Bounds) -> Bounds:
        """Returns the interval of the mean accuracy over `sets`, widened to the one of Fay and Feuer."""
        rates = [self._rates[model][s] for s in sets]
        if not any(map(_is_few, rates)):
            return bounds
        mean = mean_of(rates)
        return _hull(bounds, [1 - mean.low, 1 - mean.high])

    def gap(self, model: int, low: int, high: int, bounds: Bounds) -> Bounds:
        """Returns the interval of the accuracy on the set `high` minus that on `low`, widened to the exact one."""
        one, other = self._rates[model][low], self._rates[model][high]
        return _hull(bounds, minus(one.estimate, other.estimate)) if _is_few(one) or _is_few(other) else bounds

    def difference(self, one: int, other: int, sets: Sequence[int], bounds: Bounds) -> Bounds:
        """Returns the interval of the mean accuracy over `sets` of one model minus that of another, widened."""
        both = [(self._wrong[one][s], self._wrong[other][s]) for s in sets]
        if all(np.count_nonzero(a != b) >= FEW_ERRORS for a, b in both):
            return bounds
        only_one = [self._rate(a & ~b, s) for (a, b), s in zip(both, sets, strict=True)]
        only_other = [self._rate(b & ~a, s) for (a, b), s in zip(both, sets, strict=True)]
        return _hull(bounds, minus(mean_of(only_other), mean_of(only_one)))

    def _rate(self, wrong: np.ndarray, group: int) -> Sampled:
        return Sampled.of(wrong, self._ends[group])


def _is_few(one: Sampled) -> bool:
    return one.rate.errors < FEW_ERRORS


def _hull(bounds: Bounds, shares: Sequence[float]) -> Bounds:
    """Returns the smallest interval in percent that holds `bounds` and the `shares`."""
    return min(bounds[0], *(100 * share for share in shares)), max(bounds[1], *(100 * share for share in shares))
