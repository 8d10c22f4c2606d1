"""Error rates of all groups at one shared threshold, and measures of fairness computed from them.

`Groups` maps the name of a group to (distance, same): the squared distances (P,) float64 of its pairs, and whether they
are genuine (P,) bool. A pair is accepted if its distance is below the threshold. FMR, the false match rate, is the
share of impostor pairs that are accepted. FNMR, the false non-match rate, is the share of genuine pairs that are
rejected.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.columns import cut
from utils.errors import InputError
from utils.tables import RULE_OF_THREE, Rate

Groups = Mapping[str, tuple[np.ndarray, np.ndarray]]

WEIGHTS = np.array([0.5, 0.5])  # of FMR and FNMR in a measure of both: alpha and 1 - alpha
BLOCK = 1024  # images per group that are compared at once: 8 MB of float64 distances


@dataclass(frozen=True)
class ErrorRates:
    """FMR and FNMR of one group at one threshold."""

    fmr: Rate
    fnmr: Rate


def threshold_at_fmr(groups: Groups, fmr: float) -> float | None:
    """Returns the largest threshold at which the FMR over the pairs of all groups is at most `fmr`, in (0, 1).

    Returns None with fewer than 3 / fmr impostor pairs, too few to resolve such a rate. All pairs have the same weight,
    so that a group with more pairs weighs more. Raises InputError as `error_rates` does, and for another `fmr`.
    """
    if not 0 < fmr < 1:
        raise InputError(f"A false match rate of {fmr} is not between 0 and 1.")
    _, impostors = _pool(groups)
    count = len(impostors)
    # Compare quotients, here and below: a product may be rounded down, 0.29 * 100 is less than 29.
    if RULE_OF_THREE / count > fmr:
        return None
    allowed = np.searchsorted(np.arange(count + 1) / count, fmr, side="right") - 1
    # Accepts only pairs below this distance, thus at most `allowed`; any larger threshold accepts this pair as well.
    return float(impostors[allowed])


def threshold_of_best_accuracy(groups: Groups) -> tuple[float, float]:
    """Returns the threshold with the best accuracy over the pairs of all groups, and this accuracy, in [0, 1].

    All distinct thresholds are tried; of equally good ones the lowest is chosen. Threshold and accuracy come from the
    same pairs, so that the accuracy is a little above that on new pairs. Raises InputError as `error_rates` does.
    """
    return best_of_sorted(*_pool(groups))


def best_of_sorted(genuine: np.ndarray, impostors: np.ndarray) -> tuple[float, float]:
    """Returns what `threshold_of_best_accuracy` does, from sorted distances; one of both kinds may have no pairs."""
    thresholds = _thresholds(genuine, impostors)
    right = np.searchsorted(genuine, thresholds) + len(impostors) - np.searchsorted(impostors, thresholds)
    best = right.argmax()
    return float(thresholds[best]), float(right[best] / (len(genuine) + len(impostors)))


def error_rates(groups: Groups, threshold: float) -> dict[str, ErrorRates]:
    """Returns FMR and FNMR of each group at a threshold on the squared distance that all groups share.

    Raises InputError, with the name of the group, if distances are not finite, if `distance` and `same` differ in
    length, or if a group has no genuine or no impostor pair.
    """
    rates = {}
    for name, pairs in groups.items():
        genuine, impostors = _split(f"The set of {name}", *pairs)
        matches, accepted = (int(np.searchsorted(part, threshold)) for part in (impostors, genuine))
        rates[name] = ErrorRates(Rate(matches, len(impostors)), Rate(len(genuine) - accepted, len(genuine)))
    return rates


def roc(distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all distinct thresholds of one group in ascending order, and its exact FMR and FNMR at them, each (T,).

    The thresholds are the distinct distances, the lowest with FMR 0 and FNMR 1, and one above all distances, with FMR 1
    and FNMR 0. Raises InputError as `error_rates` does.
    """
    genuine, impostors = _split("This set", distance, same)
    thresholds = _thresholds(genuine, impostors)
    matches, accepted = (np.searchsorted(part, thresholds) for part in (impostors, genuine))
    return thresholds, matches / len(impostors), (len(genuine) - accepted) / len(genuine)


def just_above(value: float) -> float:
    """Returns the next larger float64 that is not denormal, since `utils.process.setup` flushes denormals to zero."""
    above = float(np.nextafter(value, np.inf))
    return above if abs(above) >= sys.float_info.min else sys.float_info.min


def fmr_and_fnmr(rates: Mapping[str, ErrorRates]) -> list[list[Rate]]:
    """Returns the FMR of all groups, and the FNMR of all groups."""
    return [[rate.fmr for rate in rates.values()], [rate.fnmr for rate in rates.values()]]


def comparable(kinds: Sequence[Sequence[Rate]]) -> np.ndarray | None:
    """Returns the rates of G groups (kinds, G) as numbers; None for a single group, or if a rate is not resolved."""
    if len(kinds[0]) < 2 or not all(rate.resolved for kind in kinds for rate in kind):
        return None
    return np.array([[rate.value for rate in kind] for kind in kinds])


def max_over_geometric_mean(values: np.ndarray) -> np.ndarray:
    """Returns the ratio (kinds,) of the largest to the geometric mean of the rates (kinds, G)."""
    return values.max(1) / np.exp(np.log(values).mean(1))


def fdr(rates: Mapping[str, ErrorRates]) -> float | None:
    """Fairness Discrepancy Rate: 1 - (alpha max|FMR_i - FMR_j| + (1 - alpha) max|FNMR_i - FNMR_j|), alpha 0.5.

    1 is fair. Low rates have small differences, so that at a strict threshold FDR depends almost only on the FNMR.
    Returns None for a single group. Source: de Freitas Pereira and Marcel, Fairness in Biometrics, IEEE T-BIOM 2022.
    """
    if len(rates) < 2:
        return None
    return float(1 - WEIGHTS @ [np.ptp([rate.value for rate in kind]) for kind in fmr_and_fnmr(rates)])


def inequity_rate(rates: Mapping[str, ErrorRates]) -> float | None:
    """Inequity Rate: (max FMR / min FMR)^alpha (max FNMR / min FNMR)^(1 - alpha), alpha 0.5.

    1 is fair, larger is less fair. Returns None for a single group, or if the FMR or FNMR of a group is not resolved: a
    ratio to a rate that may be zero is meaningless. Source: Grother, NISTIR 8429, 2022.
    """
    values = comparable(fmr_and_fnmr(rates))
    return None if values is None else float(np.prod((values.max(1) / values.min(1)) ** WEIGHTS))


def garbe(rates: Mapping[str, ErrorRates]) -> float | None:
    """Gini Aggregation Rate for Biometric Equitability: alpha G(FMR) + (1 - alpha) G(FNMR), alpha 0.5.

    G(x) = n / (n - 1) * sum_ij |x_i - x_j| / (2 n^2 mean(x)) is the Gini coefficient of the n groups' rates; the factor
    n / (n - 1) lets it reach 1 for any n. 0 is fair, 1 is the least fair. Returns None as `inequity_rate` does. Source:
    Howard et al., Evaluating Proposed Fairness Models for Face Recognition Algorithms, 2022.
    """
    values = comparable(fmr_and_fnmr(rates))
    return None if values is None else float(WEIGHTS @ [_gini(row) for row in values])


def max_fmr_over_geometric_mean(rates: Mapping[str, ErrorRates]) -> float | None:
    """Ratio of the largest FMR to the geometric mean of all groups' FMR.

    1 is fair, larger is less fair. Returns None for a single group, or if the FMR of a group is not resolved. Source:
    Grother, NISTIR 8429, 2022.
    """
    values = comparable(fmr_and_fnmr(rates)[:1])
    return None if values is None else float(max_over_geometric_mean(values)[0])


def impostor_matrix(
    embeddings: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], threshold: float
) -> list[list[Rate]]:
    """Returns the FMR between every two of G groups, (G, G) and symmetric, in the order of `embeddings`.

    `embeddings` (K, D) of each group are of unit length. Every pair of images of two groups counts as an impostor pair.
    Pairs that share an image are not independent, so that such a rate is less certain than its count suggests.

    The diagonal is computed from the squared distances `own` (n,) of the group's own impostor pairs, which RFW
    selected to be hard: a .bin file does not contain identities, so that its other impostor pairs are unknown.

    Raises InputError, with the name of the group, if it has no images or no impostor pairs, or values that are not
    finite.
    """
    for name in embeddings:
        for what, values in (("images", embeddings[name]), ("impostor pairs", own[name])):
            if len(values) == 0:
                raise InputError(f"The set of {name} has no {what}.")
            if not np.isfinite(values).all():
                raise InputError(f"The set of {name} has {what} with NaN or infinite values.")
    names = list(embeddings)
    matrix = {(name, name): Rate(int(np.sum(own[name] < threshold)), len(own[name])) for name in names}
    for i, one in enumerate(names):
        for other in names[:i]:
            count = _count_across(embeddings[one], embeddings[other], threshold)
            rate = Rate(count, len(embeddings[one]) * len(embeddings[other]))
            matrix[one, other] = matrix[other, one] = rate
    return [[matrix[one, other] for other in names] for one in names]


def _count_across(one: np.ndarray, other: np.ndarray, threshold: float) -> int:
    """Counts the pairs of a row of `one` and a row of `other` whose squared distance is below the threshold."""
    count = 0
    for rows in cut(range(len(one)), BLOCK):
        for columns in cut(range(len(other)), BLOCK):
            a = np.asarray(one[rows.start : rows.stop], np.float64)
            b = np.asarray(other[columns.start : columns.stop], np.float64)
            # Not 2 - 2 cosine: `eval.verification.normalize` leaves an embedding of length zero as it is.
            distance = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
            # Rounding may make the distance of equal embeddings negative, which a threshold of zero would accept.
            count += int(np.count_nonzero(np.maximum(distance, 0) < threshold))
    return count


def _split(who: str, distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distances of genuine and of impostor pairs, sorted, so that searchsorted counts accepted pairs."""
    distance, same = np.asarray(distance, np.float64), np.asarray(same, bool)
    if len(distance) != len(same):
        raise InputError(f"{who} has {len(distance)} distances for {len(same)} pairs.")
    if not np.isfinite(distance).all():
        raise InputError(f"{who} has distances that are NaN or infinite.")
    if same.all() or not same.any():
        raise InputError(f"{who} has no {'impostor' if same.any() else 'genuine'} pair.")
    return np.sort(distance[same]), np.sort(distance[~same])


def _pool(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted distances of all groups' genuine pairs, and of all groups' impostor pairs."""
    genuine, impostors = zip(*(_split(f"The set of {name}", *pairs) for name, pairs in groups.items()), strict=True)
    return np.sort(np.concatenate(genuine)), np.sort(np.concatenate(impostors))


def _thresholds(genuine: np.ndarray, impostors: np.ndarray) -> np.ndarray:
    """Returns the distinct distances, and one threshold above them, since a pair is rejected at its own distance."""
    distinct = np.unique(np.concatenate([genuine, impostors]))
    return np.append(distinct, just_above(distinct[-1]))


def _gini(rates: np.ndarray) -> float:
    count = len(rates)
    return count / (count - 1) * np.abs(rates[:, None] - rates).sum() / (2 * count**2 * rates.mean())
