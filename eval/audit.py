"""Tables of a fairness audit beyond the paper's: operating points, score shifts, and all indices of fairness."""

import numpy as np

from eval import rates
from eval.indices import INDICES, LEAST_PAIRS, d_prime, definitions, enough, ks_distance, scores_of
from eval.operating import (
    RATIO_NOTE,
    THRESHOLD_NOTE,
    Identified,
    Point,
    at,
    check_reference,
    points,
    reference_of,
    too_few,
)
from eval.results import FMR, NAMES, Results, names_of
from eval.scores import Scored
from utils.tables import Cell, Table


class Audit:
    """Computes the tables for all models; the sets must be groups, or a single set, with both kinds of pairs each.

    `reference` is the group with which others are compared, None for the group with the best accuracy of each model;
    `threshold` a further operating point on the squared distance. Raises InputError for an unknown group.
    """

    def __init__(self, results: Results, reference: str | None = None, threshold: float | None = None):
        check_reference([*results.same], reference)
        self._results, self._wanted, self._threshold = results, reference, threshold
        self._identified = Identified(results.same, results.ends)
        self._compares = len(results.same) > 1

    def tables(self) -> dict[str, Table]:
        """Returns all tables by file name, without extension; without a row, a table's last note says why."""
        found = {
            "one_threshold": self._one_threshold(),
            "operating": self._operating(),
            "score_shifts": self._score_shifts(),
        }
        if self._compares:
            found |= {"indices": self._indices(), "definitions": definitions()}
        return found

    def _reference(self, one: Scored) -> str:
        return reference_of(dict(zip(self._results.same, one.accuracies, strict=True)), self._wanted)

    def _one_threshold(self) -> Table:
        """Returns the accuracy of each group, and of all pairs, at the threshold that is best for all of them."""
        rows = []
        for one in self._results.models:
            threshold, accuracy = rates.threshold_of_best_accuracy(self._results.groups(one))
            right = [(one.distances[name] < threshold) == same for name, same in self._results.same.items()]
            each = [100 * float(of_group.mean()) for of_group in right]
            rows.append((*names_of(one), threshold, *(each if len(each) > 1 else ()), 100 * accuracy))
        names = [*self._results.same] if len(self._results.same) > 1 else []
        note = (
            "Accuracy in percent at one threshold on the squared distance for all pairs: the best for these same "
            "pairs, so that the accuracy is a little above that on new pairs."
        )
        header = (*NAMES, "Threshold", *names, "All pairs")
        printed = not self._results.of_groups
        return Table("Accuracy at one threshold", header, rows, len(NAMES), self._notes(note), is_printed=printed)

    def _operating(self) -> Table:
        """Returns FMR and FNMR of each group at each operating point, with ratios to the reference group."""
        rows, missing = [], dict[str, None]()
        for one in self._results.models:
            groups, reference = self._results.groups(one), self._reference(one)
            for point in points(groups, reference, self._threshold):
                if point.threshold is None:
                    missing[point.name.replace(f"{reference} at", "reference group at")] = None  # once for all models
                else:
                    rows += self._rows_at(one, groups, point, reference)
        ratios = ("FMR / reference", "FNMR / reference") if self._compares else ()
        header = (*NAMES, "Threshold from", "Group", "Threshold", "FMR", "FNMR", *ratios)
        notes = [*([RATIO_NOTE] if self._compares else ()), THRESHOLD_NOTE, self._drawn()]
        if missing:
            impostors = sum(int(np.sum(~same)) for same in self._results.same.values())
            notes.append(too_few(missing, None if rows else impostors))
        return Table("Operating points", header, rows, len(NAMES) + 2, self._notes(*notes), 4, is_printed=False)

    def _rows_at(self, one: Scored, groups: rates.Groups, point: Point, reference: str) -> list[tuple[Cell, ...]]:
        found = at(groups, point.threshold, self._identified)
        rows = []
        for name, here in found.items():
            ratios: list[Cell] = [None, None] if self._compares else []
            if name != reference:
                ratios = [here.fmr.over(found[reference].fmr), here.fnmr.over(found[reference].fnmr)]
            names = (*names_of(one), point.name, self._shown(name, reference))
            rows.append((*names, point.threshold, here.fmr.estimate, here.fnmr.estimate, *ratios))
        return rows

    def _shown(self, name: str, reference: str) -> str:
        return f"{name} (reference)" if self._compares and name == reference else name

    def _drawn(self) -> str:
        known = [name for name, ends in self._results.ends.items() if ends is not None]
        if not known:
            return "Rates: Clopper-Pearson intervals of independent pairs, since the identities are not known."
        where = "" if len(known) == len(self._results.same) else f" of {', '.join(known)}"
        return f"Rates: Clopper-Pearson intervals; identities{where} that pairs share lower the effective numbers."

    def _scores(self, one: Scored) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        scores = {name: scores_of(one.distances[name]) for name in self._results.same}
        return {name: (scores[name][same], scores[name][~same]) for name, same in self._results.same.items()}

    def _score_shifts(self) -> Table:
        """Returns mean and spread of the scores of each group, d', and KS distances to the reference group."""
        rows = []
        for one in self._results.models:
            scores, reference = self._scores(one), self._reference(one)
            for name, kinds in scores.items():
                if min(map(len, kinds)) < LEAST_PAIRS:
                    rows.append((*names_of(one), name, *[None] * (7 if self._compares else 5)))
                    continue
                other = scores[reference]
                compared = name != reference and min(map(len, other)) >= LEAST_PAIRS
                ks = [ks_distance(kinds[k], other[k]) if compared else None for k in (0, 1)] if self._compares else []
                moments = [float(value) for kind in kinds for value in (kind.mean(), kind.std(ddof=1))]
                rows.append((*names_of(one), self._shown(name, reference), d_prime(*kinds), *moments, *ks))
        moments_of = ("Genuine mean", "Genuine sd", "Impostor mean", "Impostor sd")
        ks_of = ("Reference KS genuine", "Reference KS impostor") if self._compares else ()
        header = (*NAMES, "Group", "d'", *moments_of, *ks_of)
        notes = ["Scores are 1 - (squared distance) / 4, in [0, 1]."]
        if self._compares:
            notes.append("KS: Kolmogorov-Smirnov distance to the reference group. Fair: equal rows.")
        notes.append(f"Not given for a group with fewer than {LEAST_PAIRS} genuine or impostor pairs.")
        return Table("Score shifts", header, rows, len(NAMES) + 1, self._notes(*notes), 4, is_printed=False)

    def _indices(self) -> Table:
        """Returns all of INDICES: those of scores once for each model, those of rates at each shared threshold."""
        rows = []
        for one, shared in zip(self._results.models, self._results.shared, strict=True):
            scores, groups = self._scores(one), self._results.groups(one)
            of_scores = [index.of_scores(scores) if enough(scores) else None for index in _INDICES]
            rows.append((*names_of(one), "all", *of_scores))
            for name, threshold in shared.items():
                found = None if threshold is None else rates.error_rates(groups, threshold)
                of_rates = [index.of_rates(found, FMR.get(name)) if found else None for index in _INDICES]
                rows.append((*names_of(one), name, *of_rates))
        header = (*NAMES, "Threshold", *(f"{name} [{index.fair}]" for name, index in INDICES.items()))
        note = (
            "In brackets the value for equal groups. Threshold: shared by all groups; all: for indices of scores. "
            "The table of definitions says what each index is, from which counts it is given, and where it is from."
        )
        return Table("Indices", header, rows, len(NAMES) + 1, self._notes(note), 3, is_printed=False)

    def _notes(self, *notes: str) -> tuple[str, ...]:
        return (*self._results.notes, *notes)


_INDICES = tuple(INDICES.values())
