"""All indices of fairness in one table: definition, fair value, source, and the counts below which they are not given.

`INDICES` is what the evaluation computes, what its report explains and what docs/evaluation.md prints.

Run     python -m eval.indices    (the table of docs/evaluation.md)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import rel_entr

from eval import rates
from eval.rates import ErrorRates
from utils.tables import Table

LEAST_PAIRS = 100  # genuine and impostor pairs of a group; no numbers are given for a smaller one
BINS = 100  # of the scores in [0, 1], for the distribution index
OF_SCORES = f"{LEAST_PAIRS} pairs of each kind in each group"
OF_RATES = "three errors in each rate"
RESTATED = "restated; the text of the paper was not at hand"

Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""The scores of genuine and of impostor pairs by group, 1 - (squared distance) / 4, in [0, 1]: (1 + cosine) / 2."""


def _not_given(*_: object) -> None:
    """Returns None: an index of scores has no value from rates, and one of rates none from scores."""


@dataclass(frozen=True)
class Index:
    """A number that says how equal groups are, for one model: from their scores, or from their error rates."""

    definition: str
    fair: str  # its value for equal groups
    least: str  # what is needed for it to be given
    source: str
    of_scores: Callable[[Scores], float | None] = _not_given
    of_rates: Callable[[Mapping[str, ErrorRates], float | None], float | None] = _not_given  # rates, target FMR


def scores_of(distance: np.ndarray) -> np.ndarray:
    """Converts squared distances of unit-length embeddings, in [0, 4], to scores in [0, 1]."""
    return 1 - np.asarray(distance, np.float64) / 4


def enough(groups: Scores) -> bool:
    """Returns whether every group, of at least two, has LEAST_PAIRS of each kind."""
    return len(groups) > 1 and all(len(part) >= LEAST_PAIRS for kinds in groups.values() for part in kinds)


def d_prime(genuine: np.ndarray, impostor: np.ndarray) -> float | None:
    """Returns the difference of the means divided by the root of the mean variance; None without any spread."""
    spread = np.sqrt((genuine.var(ddof=1) + impostor.var(ddof=1)) / 2)
    return float(abs(genuine.mean() - impostor.mean()) / spread) if spread > 0 else None


def ks_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the Kolmogorov-Smirnov distance: the largest difference of two empirical distribution functions."""
    values = np.concatenate([one, other])
    below = [np.searchsorted(np.sort(part), values, side="right") / len(part) for part in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


def separation(groups: Scores) -> float:
    """Returns 1 - (2 / K) sum_i |z_i - mean z|, z_i the distance of the means of genuine and impostor scores."""
    return _agreement([abs(genuine.mean() - impostor.mean()) for genuine, impostor in groups.values()])


def compactness(groups: Scores) -> float:
    """Returns 1 - (2 / K) sum_i |z_i - mean z|, z_i the sum of the standard deviations of both kinds of scores."""
    return _agreement([genuine.std() + impostor.std() for genuine, impostor in groups.values()])


def distribution(groups: Scores) -> float:
    """Returns 1 - sum_i KL(p_i, mean p) / (K log2 K), p_i the histogram of all scores of a group in BINS bins."""
    counts = [np.histogram(np.concatenate(kinds), BINS, (0, 1))[0] for kinds in groups.values()]
    shares = np.array([count / count.sum() for count in counts])
    return float(1 - rel_entr(shares, shares.mean(0)).sum() / (len(shares) * np.log(len(shares))))


def largest_ks(kind: int) -> Callable[[Scores], float]:
    """Returns a function for the largest KS distance of two groups' genuine (kind 0) or impostor (1) scores."""
    return lambda groups: max(ks_distance(one[kind], other[kind]) for one, other in combinations(groups.values(), 2))


def werm(found: Mapping[str, ErrorRates]) -> float | None:
    """Returns sqrt(max / geometric mean of FMR) sqrt(max / geometric mean of FNMR); None if a rate is not resolved."""
    values = rates.comparable(rates.fmr_and_fnmr(found))
    return None if values is None else float(np.sqrt(rates.max_over_geometric_mean(values).prod()))


def sedg(found: Mapping[str, ErrorRates]) -> np.ndarray | None:
    """Returns |1 - FMR_i / mean FMR| + |1 - FNMR_i / mean FNMR| of each group (G,); None if a rate is not resolved."""
    values = rates.comparable(rates.fmr_and_fnmr(found))
    return None if values is None else np.abs(1 - values / values.mean(1, keepdims=True)).sum(0)


def mape(found: Mapping[str, ErrorRates], target: float | None) -> float | None:
    """Returns 100 / K sum_i |FMR_i - target| / target; None without a target FMR, or if an FMR is not resolved."""
    values = rates.comparable(rates.fmr_and_fnmr(found)[:1])
    return None if values is None or target is None else float(100 * np.mean(np.abs(values - target) / target))


def _agreement(values: list[float]) -> float:
    return float(1 - 2 * np.abs(np.array(values) - np.mean(values)).mean())


def _of(function: Callable) -> Callable:
    """Adapts a function of the rates alone to the signature of `Index.of_rates`."""
    return lambda found, _: function(found)


def _sedg(reduce: Callable[[np.ndarray], float], least: int = 2) -> Callable:
    """Returns a function for `reduce` of `sedg`, None with fewer than `least` groups."""

    def of(found: Mapping[str, ErrorRates], _: float | None) -> float | None:
        values = sedg(found)
        return None if values is None or len(values) < least else float(reduce(values))

    return of


MASSEY = "Massey, JASA 46(253), 1951"
GROTHER = "Grother, NISTIR 8429, 2022"
KOTWAL = f"Kotwal and Marcel, Fairness Index Measures, ICPR workshops 2022 (arXiv 2306.10919); {RESTATED}"
ELOBAID = f"Elobaid et al., Sum of Group Error Differences, FG 2024 (arXiv 2404.15385); {RESTATED}"
INDICES = {
    "SFI": Index(
        "separation fairness index: 1 - 2 x mean of abs(z - mean z), z = mean genuine - mean impostor score",
        "1",
        OF_SCORES,
        KOTWAL,
        of_scores=separation,
    ),
    "CFI": Index(
        "compactness fairness index: 1 - 2 x mean of abs(z - mean z), z = sd of genuine + sd of impostor scores",
        "1",
        OF_SCORES,
        KOTWAL,
        of_scores=compactness,
    ),
    "DFI": Index(
        "distribution fairness index: 1 - sum of KL(p, mean p) / (K log2 K) for K groups, p = histogram of all scores "
        f"of a group in {BINS} bins",
        "1",
        OF_SCORES,
        KOTWAL,
        of_scores=distribution,
    ),
    "KS genuine": Index(
        "largest Kolmogorov-Smirnov distance of two groups' genuine scores",
        "0",
        OF_SCORES,
        MASSEY,
        of_scores=largest_ks(0),
    ),
    "KS impostor": Index(
        "largest Kolmogorov-Smirnov distance of two groups' impostor scores",
        "0",
        OF_SCORES,
        MASSEY,
        of_scores=largest_ks(1),
    ),
    "FDR": Index(
        "fairness discrepancy rate: 1 - ((max FMR - min FMR) + (max FNMR - min FNMR)) / 2",
        "1",
        "any rate",
        "de Freitas Pereira and Marcel, IEEE T-BIOM 2022",
        of_rates=_of(rates.fdr),
    ),
    "IR": Index(
        "inequity rate: sqrt((max FMR / min FMR) x (max FNMR / min FNMR))",
        "1",
        OF_RATES,
        GROTHER,
        of_rates=_of(rates.inequity_rate),
    ),
    "GARBE": Index(
        "Gini aggregation rate for biometric equitability: mean of the Gini coefficients of FMR and of FNMR, each "
        "x K / (K - 1) for K groups",
        "0",
        OF_RATES,
        "Howard et al., ICPR workshops 2022 (arXiv 2203.05051)",
        of_rates=_of(rates.garbe),
    ),
    "max/geomean FMR": Index(
        "max FMR / geometric mean of FMR",
        "1",
        OF_RATES,
        GROTHER,
        of_rates=_of(rates.max_fmr_over_geometric_mean),
    ),
    "WERM": Index(
        "sqrt((max FMR / geometric mean of FMR) x (max FNMR / geometric mean of FNMR))",
        "1",
        OF_RATES,
        "Linghu et al., IJCB 2024 (arXiv 2407.14087), by its code, without the 1e-5 that it adds",
        of_rates=_of(werm),
    ),
    "SEDG": Index(
        "sum of group error differences: mean of abs(1 - FMR / mean FMR) + abs(1 - FNMR / mean FNMR)",
        "0",
        OF_RATES,
        ELOBAID,
        of_rates=_sedg(np.mean),
    ),
    "SEDG sd": Index(
        "standard deviation over the groups of the sum in SEDG, which is the same for both of two groups",
        "0",
        "three groups, three errors in each rate",
        ELOBAID,
        of_rates=_sedg(np.std, least=3),
    ),
    "MAPE": Index(
        "mean absolute percentage error: 100 x mean of abs(FMR - target) / target, where the threshold has a target",
        "0",
        "three errors in each FMR",
        f"Villalobos, Mery and Bowyer, IEEE Access 10, 2022; {RESTATED}",
        of_rates=mape,
    ),
}


def definitions() -> Table:
    """Returns the table of all indices."""
    rows = [(name, one.definition, one.fair, one.least, one.source) for name, one in INDICES.items()]
    header = ("Index", "Definition, over the groups", "Fair", "Given from", "Source")
    return Table("Indices of fairness", header, rows, 5, is_printed=False)


if __name__ == "__main__":
    print(definitions().markdown(), end="")
