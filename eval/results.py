"""What follows from the scores of all models: the paper's table, intervals, differences, rates at one threshold."""

from dataclasses import asdict
from functools import cached_property

import numpy as np

from eval import rates
from eval.fairness import summary
from eval.rates import ErrorRates
from eval.scores import Scored
from eval.tables import Cell, Estimate, Table
from eval.uncertainty import METHOD, by_chance, difference, interval, is_within_chance, resampled

FMR = (1e-2, 1e-3)
BEST = "best accuracy"
NAMES = ("Setting", "Teachers", "Kind", "Model")
MEASURES = {
    "FDR": rates.fdr,
    "IR": rates.inequity_rate,
    "GARBE": rates.garbe,
    "max/geomean FMR": rates.max_fmr_over_geometric_mean,
}


class Results:
    """Figures of all models on the same verification sets, which with `of_groups` are groups to be fair to."""

    def __init__(self, models: list[Scored], same: dict[str, np.ndarray], of_groups: bool, note: str):
        self.models, self.same, self.note = models, same, note
        self.of_groups = of_groups and len(same) > 1
        self.pairs = tuple(len(labels) for labels in same.values())
        self.accuracies = np.array([one.accuracies for one in models])
        self._samples = resampled([one.distances for one in models], same)  # (resamples, models, sets)
        self.intervals = np.percentile(self._samples, (2.5, 97.5), axis=0).transpose(1, 2, 0)  # (models, sets, 2)

    @cached_property
    def shared(self) -> list[dict[str, float | None]]:
        """Per model the thresholds that all groups share, by name; none where a set lacks a kind of pair."""
        return [self._shared(one) for one in self.models]

    def _shared(self, one: Scored) -> dict[str, float | None]:
        if not all(labels.any() and not labels.all() for labels in self.same.values()):
            return {}
        groups = self._groups(one)
        found = {f"FMR {fmr:g}": rates.threshold_at_fmr(groups, fmr) for fmr in FMR}
        return {**found, BEST: rates.threshold_of_best_accuracy(groups)[0]}

    def _groups(self, one: Scored) -> rates.Groups:
        return {name: (one.distances[name], labels) for name, labels in self.same.items()}

    def tables(self) -> dict[str, Table]:
        """By the name of the file."""
        tables = {"accuracy": self._accuracy(), "intervals": self._intervals()}
        if len(self.models) > 1:
            tables["differences"] = self._differences()
        if self.of_groups and any(self.shared):
            for name in self.shared[0]:
                tables[f"rates_{name.replace(' ', '_')}"] = self._rates(name)
            tables["impostors"] = self._impostors()
        return tables

    def _accuracy(self) -> Table:
        """The paper's columns; whether the spread could be chance."""
        rows, header = [], (*NAMES, *self.same, "Average")
        if self.of_groups:
            header += ("STD", "SER", "STD by chance", "SER by chance", "Within chance", "AVG - STD")
        for one in self.models:
            average, std, ser = summary(one.accuracies)
            row = (*_names(one), *one.accuracies, average)
            if self.of_groups:
                chance = by_chance(round(average, 2), self.pairs)
                within = is_within_chance(one.accuracies, self.pairs)
                row += (std, ser, chance.std_95, chance.ser_95, within, rates.average_minus_std(one.accuracies))
            rows.append(row)
        notes = ["Accuracy in percent: mean of ten folds, threshold from the nine others, of each set by itself."]
        if self.of_groups:
            notes.append(
                "By chance: what 95 of 100 perfectly fair models of the same average show at most on as many pairs. "
                "Where STD and SER are within chance, these pairs show no unfairness."
            )
        return Table("Accuracy", header, rows, len(NAMES), self._notes(*notes))

    def _intervals(self) -> Table:
        rows = []
        for m, one in enumerate(self.models):
            samples = self._samples[:, m]
            cells = [Estimate(a, *i) for a, i in zip(one.accuracies, self.intervals[m].tolist(), strict=True)]
            average, std, _ = summary(one.accuracies)
            cells.append(Estimate(average, *interval(samples.mean(1))))
            if self.of_groups:
                cells.append(Estimate(std, *interval(samples.std(1))))
            rows.append((*_names(one), *cells))
        header = (*NAMES, *self.same, "Average", *(("STD",) if self.of_groups else ()))
        notes = [METHOD]
        if self.of_groups:
            notes.append(
                "Drawing pairs anew adds chance to STD: its interval lies high, and may begin above the figure."
            )
        return Table("95 % intervals", header, rows, len(NAMES), self._notes(*notes))

    def _differences(self) -> Table:
        """Of each model from every other one; the better average first."""
        order = np.argsort(-self.accuracies.mean(1), kind="stable")
        rows = []
        for i, one in enumerate(order):
            for other in order[i + 1 :]:
                found = difference(one, other, self.accuracies, self._samples)
                row = (
                    self.models[one].title,
                    self.models[other].title,
                    Estimate(found.average, *found.average_interval),
                )
                row += (_is_sure(found.average_interval),)
                if self.of_groups:
                    row += (Estimate(found.std, *found.std_interval), _is_sure(found.std_interval))
                rows.append(row)
        header = ("Model", "minus", "Average", "Sure")
        header += ("STD", "STD sure") if self.of_groups else ()
        note = "Sure: zero is outside the 95 % interval of the difference, over pairs that both models see alike."
        return Table("Differences", header, rows, 2, self._notes(note, METHOD), is_printed=False)

    def _rates(self, name: str) -> Table:
        """FMR and FNMR of each group at a threshold that all share, and what is made of them."""
        rows = []
        for one, shared in zip(self.models, self.shared, strict=True):
            threshold = shared[name]
            if threshold is None:
                cells = (None,) * (1 + 2 * len(self.same) + len(MEASURES))
            else:
                found = rates.error_rates(self._groups(one), threshold)
                cells = (threshold, *(rate.fmr for rate in found.values()), *(rate.fnmr for rate in found.values()))
                cells += tuple(measure(found) for measure in MEASURES.values())
            rows.append((*_names(one), *cells))
        header = (*NAMES, "Threshold", *(f"FMR {n}" for n in self.same), *(f"FNMR {n}" for n in self.same), *MEASURES)
        note = (
            "One threshold on the squared distance for all groups. A rate of fewer than three errors is given as less "
            "than 3 / pairs; a measure that needs such a rate cannot be said."
        )
        title = f"Error rates at the shared threshold of {name}"
        return Table(title, header, rows, len(NAMES), self._notes(note), digits=3, is_printed=False)

    def _impostors(self) -> Table:
        """FMR between images of every two groups, of each model at the strictest threshold that the pairs resolve."""
        rows = []
        for one, shared in zip(self.models, self.shared, strict=True):
            name = next(n for n in (*(f"FMR {fmr:g}" for fmr in reversed(FMR)), BEST) if shared[n] is not None)
            own = {group: one.distances[group][~labels] for group, labels in self.same.items()}
            matrix = rates.impostor_matrix(one.samples, own, shared[name])
            rows += [(one.title, name, group, *row) for group, row in zip(self.same, matrix, strict=True)]
        note = (
            "False match rates of pairs of images of two groups, 1,000 images of each; on the diagonal those of the "
            "group's own impostor pairs, which are chosen to be hard."
        )
        header = ("Model", "Threshold", "Group", *self.same)
        return Table("Impostors across groups", header, rows, 3, self._notes(note), is_printed=False)

    def _notes(self, *notes: str) -> tuple[str, ...]:
        return (self.note, *notes) if self.note else notes

    def as_dict(self) -> dict:
        """Everything with all digits, for JSON."""
        return {"note": self.note, "intervals by": METHOD, "models": [self._model(m) for m in range(len(self.models))]}

    def _model(self, m: int) -> dict:
        one = self.models[m]
        average, std, ser = summary(one.accuracies)
        found = dict(zip(("setting", "teachers", "kind", "model"), _names(one), strict=True))
        found["accuracy"] = dict(zip(self.same, one.accuracies, strict=True))
        found["accuracy interval"] = dict(zip(self.same, self.intervals[m].tolist(), strict=True))
        found |= {"average": average, "average interval": interval(self._samples[:, m].mean(1))}
        if not self.of_groups:
            return found
        found |= {"std": std, "std interval": interval(self._samples[:, m].std(1)), "ser": ser}
        found["by chance"] = asdict(by_chance(round(average, 2), self.pairs))
        found["shared thresholds"] = {
            name: None if threshold is None else self._at(one, threshold) for name, threshold in self.shared[m].items()
        }
        return found

    def _at(self, one: Scored, threshold: float) -> dict:
        found = rates.error_rates(self._groups(one), threshold)
        measures = {name: measure(found) for name, measure in MEASURES.items()}
        return {"threshold": threshold, **{name: _as_dict(rate) for name, rate in found.items()}, **measures}


def _names(one: Scored) -> tuple[Cell, ...]:
    return one.setting or "-", one.network, one.kind, one.name


def _is_sure(bounds: tuple[float, float]) -> bool:
    return bounds[0] > 0 or bounds[1] < 0


def _as_dict(found: ErrorRates) -> dict:
    return {"FMR": asdict(found.fmr), "FNMR": asdict(found.fnmr)}
