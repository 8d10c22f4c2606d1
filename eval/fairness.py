"""Average, STD and SER of the groups' accuracies."""

from collections.abc import Sequence

import numpy as np


def summary(accuracies: Sequence[float]) -> tuple[float, float, float]:
    """Returns average, STD and SER of the groups' accuracies (G,) in percent.

    STD is computed by `std`. SER (skewed error ratio) is (100 - lowest) / (100 - highest), Eq. 7 of the MST-KD paper.
    It is 1 if no group has an error, and infinite if only some groups have errors.
    """
    values = np.asarray(accuracies, np.float64)
    errors = 100 - values
    ser = 1.0 if errors.max() == 0 else float("inf") if errors.min() == 0 else float(errors.max() / errors.min())
    return float(values.mean()), float(std(values)), ser


def std(accuracies: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the sample standard deviation (ddof 1) of the groups' accuracies along `axis`; NaN for a single group.

    All 40 rows of the MST-KD paper's six tables use ddof 1.
    """
    values = np.asarray(accuracies, np.float64)
    if values.shape[axis] == 1:
        return np.full_like(values.mean(axis), np.nan)  # NumPy returns NaN as well, but warns
    return values.std(axis, ddof=1)
