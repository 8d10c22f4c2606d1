"""95 % intervals of error rates, their means, ratios and differences, for independent pairs and shared identities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import beta, gamma

from eval.identities import Ends
from utils.tables import Estimate, Rate

LOW, HIGH = 0.025, 0.975
Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Sampled:
    """An error rate with the factor by which shared identities raise its variance (design effect; 1: none, unknown)."""

    rate: Rate
    design_effect: float = 1.0

    @classmethod
    def of(cls, wrong: np.ndarray, ends: Ends | None) -> "Sampled":
        """Counts the decisions `wrong` (n,) bool; `ends` are the identities of these pairs, None if not known."""
        error = wrong - wrong.mean()
        return cls(Rate(int(wrong.sum()), len(wrong)), 1.0 if ends is None else ends.design_effect(error))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The Clopper-Pearson interval of the numbers of errors and pairs, both divided by the design effect.

        Sources: Clopper and Pearson, Biometrika 26(4), 1934; with a design effect: Korn and Graubard, Survey
        Methodology 24(2), 1998. Without an error no design effect can be seen, and the pairs count as independent.
        """
        errors, of = self.rate.errors / self.design_effect, self.rate.of / self.design_effect
        low = 0.0 if self.rate.errors == 0 else float(beta.ppf(LOW, errors, of - errors + 1))
        high = 1.0 if self.rate.errors == self.rate.of else float(beta.ppf(HIGH, errors + 1, of - errors))
        return low, high

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.rate.value, *self.interval)

    def over(self, other: "Sampled") -> Estimate | None:
        """Returns the ratio of this rate to another one of other pairs, with the interval of its logarithm.

        Source: Katz et al., Biometrics 34(3), 1978; each variance is multiplied by its design effect. Returns None if
        either rate has fewer than three errors: the ratio would be noise.
        """
        if not (self.rate.resolved and other.rate.resolved):
            return None
        value = self.rate.value / other.rate.value
        parts = (one.design_effect * (1 - one.rate.value) / one.rate.errors for one in (self, other))
        width = np.exp(Z * np.sqrt(sum(parts)))
        return Estimate(value, float(value / width), float(value * width))


def mean_of(rates: Sequence[Sampled]) -> Estimate:
    """Returns the mean of the rates of sets of any sizes, with its gamma interval.

    With sets of the same size it is the exact interval of a Poisson number. Source: Fay and Feuer, Statistics in
    Medicine 16, 1997, for directly standardised rates; errors and pairs are divided by the design effects, as in
    `Sampled.interval`.
    """
    weights = np.array([one.design_effect / one.rate.of for one in rates]) / len(rates)  # of an effective error
    errors = np.array([one.rate.errors / one.design_effect for one in rates])
    value, variance, most = errors @ weights, errors @ weights**2, weights.max()
    low = _gamma(LOW, value, variance) if value > 0 else 0.0
    return Estimate(float(value), low, min(_gamma(HIGH, value + most, variance + most**2), 1.0))


def _gamma(share: float, mean: float, variance: float) -> float:
    """Returns the quantile of the gamma distribution with this mean and variance."""
    return float(gamma.ppf(share, mean**2 / variance, scale=variance / mean))


def minus(one: Estimate, other: Estimate) -> tuple[float, float]:
    """Returns the interval of the difference of two independent values, from the interval of each.

    Source: Zou and Donner, Statistics in Medicine 27, 2008 (method of variance estimates recovery).
    """
    value = one.value - other.value
    low = value - np.hypot(one.value - one.low, other.high - other.value)
    return float(low), float(value + np.hypot(one.high - one.value, other.value - other.low))
