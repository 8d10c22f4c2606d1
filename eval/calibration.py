"""Corrections of scores after training, as baselines of fairness: fitted on nine folds, applied to the tenth.

none        the scores as they are
per group   beta calibration of each group's scores (Kull, Silva Filho and Flach, AISTATS 2017), for known groups
clusters    FairCal (Salvador et al., ICLR 2022): k-means of the embeddings, without labels of groups; beta calibration
            of the pairs of each cluster; a pair's score is the mean of those of its faces' clusters, by their pairs
cohort      symmetric normalisation: a score minus the mean of a face's scores with a cohort of images, divided by
            their standard deviation, mean of both faces (Auckenthaler et al., Digital Signal Processing 10, 2000)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression

from eval import rates
from eval.fairness import std
from eval.indices import scores_of
from eval.results import NAMES, Results, names_of
from eval.scores import Scored
from utils.data.pairs import FOLDS, fold_of
from utils.tables import Rate, Table

CLUSTERS = 100  # as FairCal
ROUNDS, INITIAL = 5, 2000  # passes of k-means over the images, and images that it starts from
PAIRS_OF_CLUSTER = 20  # of each kind; a cluster with fewer is calibrated by all pairs
COHORT = 300  # images
TARGET = 1e-2  # FMR of all groups together on nine folds
EDGE = 1e-6  # scores are kept this far from 0 and 1, whose logarithms calibration uses
NOTE = (
    "One threshold for all groups. Correction and threshold are from nine folds of all groups, applied to the tenth. "
    f"Accuracy in percent, at the threshold of best accuracy; FMR at that of FMR {TARGET:g}. none: uncorrected. "
    "per group: needs the group of a face. clusters: without groups (FairCal). cohort: by scores with other images."
)


@dataclass(frozen=True)
class Pooled:
    """The P pairs of all groups of one model."""

    score: np.ndarray  # (P,) in (0, 1)
    same: np.ndarray  # (P,) bool
    group: np.ndarray  # (P,) int64
    fold: np.ndarray  # (P,) int64
    embeddings: np.ndarray | None = None  # (U, D) unit length, of all images
    images: np.ndarray | None = None  # (P, 2) rows of `embeddings`


Correction = Callable[[Pooled, np.ndarray], np.ndarray]
"""Fits on the pairs that (P,) bool selects and returns corrected scores of all pairs (P,), larger for more alike."""


def pooled(one: Scored, same: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> Pooled:
    """Joins the groups of one model; `rows` (2P,) are the images of each group's pairs in `one.embeddings`."""
    score = np.concatenate([scores_of(one.distances[name]) for name in same]).clip(EDGE, 1 - EDGE)
    group = np.repeat(np.arange(len(same)), [len(labels) for labels in same.values()])
    fold = np.concatenate([fold_of(len(labels)) for labels in same.values()])
    labels = np.concatenate(list(same.values()))
    if not one.embeddings:
        return Pooled(score, labels, group, fold)
    counts = np.cumsum([0, *(len(one.embeddings[name]) for name in same)])
    images = [rows[name].reshape(-1, 2) + start for name, start in zip(same, counts, strict=False)]
    embeddings = np.concatenate([one.embeddings[name] for name in same])
    return Pooled(score, labels, group, fold, embeddings, np.concatenate(images))


def none(pairs: Pooled, fitted: np.ndarray) -> np.ndarray:
    """Returns the scores as they are."""
    return pairs.score


def per_group(pairs: Pooled, fitted: np.ndarray) -> np.ndarray:
    """Calibrates the scores of each group by its own pairs."""
    result = np.empty(len(pairs.score))
    for group in np.unique(pairs.group):
        here = pairs.group == group
        result[here] = beta_calibration(pairs.score[here & fitted], pairs.same[here & fitted])(pairs.score[here])
    return result


def clusters(pairs: Pooled, fitted: np.ndarray) -> np.ndarray:
    """Calibrates by clusters of embeddings, as FairCal."""
    seen = np.unique(pairs.images[fitted])
    count = min(CLUSTERS, max(1, len(seen) // PAIRS_OF_CLUSTER))
    options = {"batch_size": 4096, "max_iter": ROUNDS, "init_size": max(INITIAL, 3 * count), "n_init": 1}
    means = MiniBatchKMeans(count, random_state=0, **options).fit(pairs.embeddings[seen])
    cluster = means.predict(pairs.embeddings)[pairs.images]  # (P, 2)
    by_all = beta_calibration(pairs.score[fitted], pairs.same[fitted])(pairs.score)
    total, weight = np.zeros(len(pairs.score)), np.zeros(len(pairs.score))
    for k in range(count):
        touches = cluster == k
        here = touches.any(1)
        known = here & fitted
        kinds = np.bincount(pairs.same[known], minlength=2)
        calibrated = by_all[here]
        if kinds.min() >= PAIRS_OF_CLUSTER:
            calibrated = beta_calibration(pairs.score[known], pairs.same[known])(pairs.score[here])
        share = max(kinds.sum(), 1) * touches[here].sum(1)
        total[here] += share * calibrated
        weight[here] += share
    return total / weight


def cohort(pairs: Pooled, fitted: np.ndarray) -> np.ndarray:
    """Normalises by the scores of each face with a cohort of evenly spread images of the pairs that are fitted."""
    seen = np.unique(pairs.images[fitted])
    others = pairs.embeddings[seen[np.unique(np.linspace(0, len(seen) - 1, COHORT).astype(np.int64))]]
    scores = (1 + pairs.embeddings @ others.T) / 2
    mean, spread = scores.mean(1)[pairs.images], scores.std(1)[pairs.images]
    return ((pairs.score[:, None] - mean) / np.maximum(spread, EDGE)).mean(1)


def beta_calibration(score: np.ndarray, same: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits P(genuine) = 1 / (1 + exp(-(a ln s - b ln(1 - s) + c))) with a, b >= 0; scores (n,) lie in (0, 1).

    A negative coefficient is set to zero and the other fitted again, as by Kull et al. Pairs of one kind only are
    returned unchanged.
    """
    if same.all() or not same.any():
        return lambda values: values
    used = [0, 1]
    while True:
        model = LogisticRegression(C=1e6, solver="newton-cholesky").fit(_terms(score)[:, used], same)
        if (model.coef_[0] >= 0).all() or len(used) == 1:
            return lambda values: model.predict_proba(_terms(values)[:, used])[:, 1]
        used = [used[int(np.argmax(model.coef_[0]))]]


def _terms(score: np.ndarray) -> np.ndarray:
    return np.stack([np.log(score), -np.log1p(-score)], 1)


CORRECTIONS: dict[str, Correction] = {
    "none": none,
    "per group": per_group,
    "clusters": clusters,
    "cohort": cohort,
}
OF_EMBEDDINGS = ("clusters", "cohort")


@dataclass(frozen=True)
class Corrected:
    """Results of one correction on held-out folds."""

    accuracies: np.ndarray  # (G,) in percent, mean over the folds
    fmr: list[Rate] | None  # of each group; None if the pairs of some nine folds do not resolve TARGET


def evaluate(pairs: Pooled, correction: Correction) -> Corrected:
    """Fits `correction` and one threshold for all groups on nine folds, and decides the tenth, for each fold."""
    groups = np.unique(pairs.group)
    right, matches, resolved = np.zeros((FOLDS, len(groups))), np.zeros(len(groups), np.int64), True
    for fold in range(FOLDS):
        fitted = pairs.fold != fold
        apart = -correction(pairs, fitted)  # a distance: smaller for more alike
        known = {"all": (apart[fitted], pairs.same[fitted])}
        best, _ = rates.threshold_of_best_accuracy(known)
        strict = rates.threshold_at_fmr(known, TARGET)
        resolved = resolved and strict is not None
        for k, group in enumerate(groups):
            here = ~fitted & (pairs.group == group)
            right[fold, k] = np.mean((apart[here] < best) == pairs.same[here])
            if strict is not None:
                matches[k] += np.count_nonzero((apart[here] < strict) & ~pairs.same[here])
    totals = [int(np.count_nonzero((pairs.group == group) & ~pairs.same)) for group in groups]
    fmr = [Rate(int(m), t) for m, t in zip(matches, totals, strict=True)] if resolved else None
    return Corrected(100 * right.mean(0), fmr)


def table(results: Results, rows: dict[str, np.ndarray]) -> Table:
    """Returns a row per model and correction; `rows` (2P,) are the images of each group's pairs."""
    lines = []
    for one in results.models:
        pairs = pooled(one, results.same, rows)
        for name, correction in CORRECTIONS.items():
            if name in OF_EMBEDDINGS and pairs.embeddings is None:
                continue
            found = evaluate(pairs, correction)
            fmr = found.fmr or [None] * len(results.same)
            values = rates.comparable([found.fmr]) if found.fmr else None
            ratio = None if values is None else float(rates.max_over_geometric_mean(values)[0])
            accuracies = found.accuracies.tolist()
            spread = float(found.accuracies.mean()), float(std(found.accuracies))
            lines.append((*names_of(one), name, *accuracies, *spread, *fmr, ratio))
    groups = [*results.same]
    header = (*NAMES, "Correction", *groups, "Average", "STD", *(f"FMR {name}" for name in groups), "max/geomean FMR")
    notes = (*results.notes, NOTE)
    return Table("Corrections after training", header, lines, len(NAMES) + 1, notes, is_printed=False)
