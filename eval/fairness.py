"""Figures of fairness from the accuracies of the groups."""

from collections.abc import Sequence

import numpy as np


def summary(accuracies: Sequence[float]) -> tuple[float, float, float]:
    """Average, STD and SER of the groups' accuracies in percent.

    STD is the sample standard deviation (ddof 1), SER (skewed error ratio) is (100 - lowest) / (100 - highest): the
    paper's figures, in all 40 rows of its Tables 1 to 6.
    SER is 1 where all groups are without error, and infinite where only the best is.
    """
    values = np.asarray(accuracies, np.float64)
    errors = 100 - values
    if errors.max() == 0:
        return 100.0, 0.0, 1.0
    ser = float(errors.max() / errors.min()) if errors.min() > 0 else float("inf")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0, ser
