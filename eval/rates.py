"""Error rates of all groups at one shared threshold, and the measures of fairness that are made of them.

Groups are a dictionary name -> (distance, same): the squared distances (P,) float64 of the group's pairs, and whether
they are genuine (P,) bool. A pair is accepted where its distance is below the threshold. FMR, the false match rate, is
the share of impostor pairs that are accepted; FNMR, the false non-match rate, that of genuine pairs that are not.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.fairness import summary
from utils.data.columns import cut
from utils.errors import InputError
from utils.tables import RULE_OF_THREE, Rate

Groups = Mapping[str, tuple[np.ndarray, np.ndarray]]

WEIGHTS = np.array([0.5, 0.5])  # of FMR and FNMR in a measure of both: alpha and 1 - alpha
BLOCK = 1024  # images of a group that are compared at once with as many of another: 8 MB of distances


@dataclass(frozen=True)
class ErrorRates:
    """Of one group at one threshold."""

    fmr: Rate
    fnmr: Rate


def threshold_at_fmr(groups: Groups, fmr: float) -> float | None:
    """The largest threshold at which no more than `fmr`, in (0, 1), of the impostor pairs of all groups are accepted.

    None with fewer than 3 / fmr impostor pairs, which cannot show such a rate. Every pair counts the same, so that a
    group with more pairs weighs more. Raises InputError as `error_rates` does.
    """
    if not 0 < fmr < 1:
        raise InputError(f"A false match rate of {fmr} is not between 0 and 1.")
    _, impostors = _pool(groups)
    count = len(impostors)
    # Quotients are compared, here and below, since a product may miss its number: 0.29 * 100 is less than 29.
    if RULE_OF_THREE / count > fmr:
        return None
    allowed = np.searchsorted(np.arange(count + 1) / count, fmr, side="right") - 1
    # Accepts what is strictly nearer, thus no more than allowed; any larger threshold accepts this pair as well.
    return float(impostors[allowed])


def threshold_of_best_accuracy(groups: Groups) -> tuple[float, float]:
    """The threshold with most right decisions over the pairs of all groups, and the share of these, in [0, 1].

    Every threshold that makes a difference is tried; of equally good ones the lowest is taken. The threshold is chosen
    on the pairs it is scored on: its accuracy is a little above what new pairs would give. Raises InputError as
    `error_rates` does.
    """
    genuine, impostors = _pool(groups)
    thresholds = _thresholds(genuine, impostors)
    right = np.searchsorted(genuine, thresholds) + len(impostors) - np.searchsorted(impostors, thresholds)
    best = right.argmax()
    return float(thresholds[best]), float(right[best] / (len(genuine) + len(impostors)))


def error_rates(groups: Groups, threshold: float) -> dict[str, ErrorRates]:
    """FMR and FNMR of each group at a threshold that all share.

    Raises InputError that names the group whose distances are not finite or do not agree with `same` in number, or
    that has no genuine or no impostor pair.
    """
    rates = {}
    for name, pairs in groups.items():
        genuine, impostors = _parts(f"The set of {name}", *pairs)
        matches, accepted = (int(np.searchsorted(part, threshold)) for part in (impostors, genuine))
        rates[name] = ErrorRates(Rate(matches, len(impostors)), Rate(len(genuine) - accepted, len(genuine)))
    return rates


def roc(distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All thresholds that make a difference for one group, rising, and its exact FMR and FNMR at them, each (T,).

    These are the distinct distances, which begin at FMR 0 and FNMR 1, and one above them all, at FMR 1 and FNMR 0.
    Raises InputError as `error_rates` does.
    """
    genuine, impostors = _parts("This set", distance, same)
    thresholds = _thresholds(genuine, impostors)
    matches, accepted = (np.searchsorted(part, thresholds) for part in (impostors, genuine))
    return thresholds, matches / len(impostors), (len(genuine) - accepted) / len(genuine)


def just_above(value: float) -> float:
    """The next number, which is a normal one: `utils.process.setup` has processors take denormal ones for zero."""
    above = float(np.nextafter(value, np.inf))
    return above if abs(above) >= sys.float_info.min else sys.float_info.min


def fdr(rates: Mapping[str, ErrorRates]) -> float | None:
    """Fairness Discrepancy Rate: 1 - (alpha max|FMR_i - FMR_j| + (1 - alpha) max|FNMR_i - FNMR_j|), alpha 0.5.

    1 is fair. A difference between low rates is low: at a strict threshold FDR sees hardly more than FNMR. None for
    one group. Source: de Freitas Pereira and Marcel, Fairness in Biometrics, IEEE T-BIOM 2022.
    """
    if len(rates) < 2:
        return None
    return float(1 - WEIGHTS @ [np.ptp([rate.value for rate in kind]) for kind in _kinds(rates)])


def inequity_rate(rates: Mapping[str, ErrorRates]) -> float | None:
    """Inequity Rate: (max FMR / min FMR)^alpha (max FNMR / min FNMR)^(1 - alpha), alpha 0.5.

    1 is fair, more is not. None for one group, or where the FMR or FNMR of a group is not resolved: the ratio to a
    rate that may be zero says nothing. Source: Grother, NISTIR 8429, 2022.
    """
    values = _comparable(_kinds(rates))
    return None if values is None else float(np.prod((values.max(1) / values.min(1)) ** WEIGHTS))


def garbe(rates: Mapping[str, ErrorRates]) -> float | None:
    """Gini Aggregation Rate for Biometric Equitability: alpha G(FMR) + (1 - alpha) G(FNMR), alpha 0.5.

    G(x) = n / (n - 1) * sum_ij |x_i - x_j| / (2 n^2 mean(x)) is the Gini coefficient of the n groups' rates, with the
    factor that lets it reach 1 for few groups. 0 is fair, 1 is not. None as for `inequity_rate`. Source: Howard et
    al., Evaluating Proposed Fairness Models for Face Recognition Algorithms, 2022.
    """
    values = _comparable(_kinds(rates))
    return None if values is None else float(WEIGHTS @ [_gini(row) for row in values])


def max_fmr_over_geometric_mean(rates: Mapping[str, ErrorRates]) -> float | None:
    """The worst group's FMR over the geometric mean of all groups' FMR.

    1 is fair, more is not. None for one group, or where the FMR of a group is not resolved. Source: Grother, NISTIR
    8429, 2022.
    """
    values = _comparable(_kinds(rates)[:1])
    return None if values is None else float(values.max() / np.exp(np.log(values).mean()))


def average_minus_std(accuracies: Sequence[float]) -> float:
    """AVG - STD of the groups' accuracies in percent, as in `eval.fairness.summary`: high is accurate and fair.

    NaN for a single group.
    """
    average, std, _ = summary(accuracies)
    return average - std


def impostor_matrix(
    embeddings: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], threshold: float
) -> list[list[Rate]]:
    """FMR between each two of G groups, (G, G) and symmetric, in the order of `embeddings`.

    `embeddings` are those of each group's images (K, D), of unit length; all pairs across two groups are impostors,
    not independent where they share an image: such a rate is less sure than its count suggests. A .bin file does not
    say who is who, so that images of one group cannot be paired anew: on the diagonal are the group's own impostor
    pairs, with the squared distances `own` (n,), which RFW chose to be hard. Raises InputError that names the group
    without images or impostor pairs, or with values that are not finite.
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
    """Number of pairs of a row of `one` and a row of `other` whose squared distance is below the threshold."""
    count = 0
    for rows in cut(range(len(one)), BLOCK):
        for columns in cut(range(len(other)), BLOCK):
            a = np.asarray(one[rows.start : rows.stop], np.float64)
            b = np.asarray(other[columns.start : columns.stop], np.float64)
            # 2 - 2 cosine, but also right for the embedding of length zero that `eval.verification.normalize` leaves.
            distance = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
            # Rounding puts equal embeddings a little below zero, where a threshold of zero would accept them.
            count += int(np.count_nonzero(np.maximum(distance, 0) < threshold))
    return count


def _parts(who: str, distance: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the genuine and of the impostor pairs, sorted: searchsorted counts those below a threshold."""
    distance, same = np.asarray(distance, np.float64), np.asarray(same, bool)
    if len(distance) != len(same):
        raise InputError(f"{who} has {len(distance)} distances for {len(same)} pairs.")
    if not np.isfinite(distance).all():
        raise InputError(f"{who} has distances that are NaN or infinite.")
    if same.all() or not same.any():
        raise InputError(f"{who} has no {'impostor' if same.any() else 'genuine'} pair.")
    return np.sort(distance[same]), np.sort(distance[~same])


def _pool(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the genuine and of the impostor pairs of all groups together, sorted."""
    genuine, impostors = zip(*(_parts(f"The set of {name}", *pairs) for name, pairs in groups.items()), strict=True)
    return np.sort(np.concatenate(genuine)), np.sort(np.concatenate(impostors))


def _thresholds(genuine: np.ndarray, impostors: np.ndarray) -> np.ndarray:
    """The distinct distances, at which the pair itself is not accepted, and one at which all pairs are."""
    distinct = np.unique(np.concatenate([genuine, impostors]))
    return np.append(distinct, just_above(distinct[-1]))


def _kinds(rates: Mapping[str, ErrorRates]) -> list[list[Rate]]:
    """The groups' FMR, and the groups' FNMR."""
    return [[rate.fmr for rate in rates.values()], [rate.fnmr for rate in rates.values()]]


def _comparable(kinds: list[list[Rate]]) -> np.ndarray | None:
    """(kinds, G) the rates; None where there is one group, or where a rate cannot be told from zero."""
    if len(kinds[0]) < 2 or not all(rate.resolved for kind in kinds for rate in kind):
        return None
    return np.array([[rate.value for rate in kind] for kind in kinds])


def _gini(rates: np.ndarray) -> float:
    count = len(rates)
    return count / (count - 1) * np.abs(rates[:, None] - rates).sum() / (2 * count**2 * rates.mean())
