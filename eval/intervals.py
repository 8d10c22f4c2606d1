"""Exact 95 % intervals of error rates, and of ratios of two rates, for independent pairs and for shared identities."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import beta

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
