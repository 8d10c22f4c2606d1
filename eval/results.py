"""Tables from the distances of all models: accuracy, intervals, differences, error rates at shared thresholds."""

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np

from eval import rates
from eval.fairness import summary
from eval.few_errors import FewErrors
from eval.identities import Ends
from eval.indices import INDICES
from eval.scores import Scored
from eval.uncertainty import (
    EXACT,
    FEWEST_PAIRS,
    NARROW_PAIRS,
    by_chance,
    difference,
    fewest,
    interval,
    is_within_chance,
    method,
    resampled,
    stds,
)
from eval.verification import collapsed
from utils.data.pairs import lacking
from utils.tables import RULE_OF_THREE, Cell, Estimate, Table

FMR = {"FMR 0.01": 1e-2, "FMR 0.001": 1e-3}  # the strictest last
BEST = "best accuracy"
NAMES = ("Setting", "Teachers", "Kind", "Model")
MEASURES = ("FDR", "IR", "GARBE", "max/geomean FMR")  # the indices of fairness beside the error rates


class Results:
    """Results of all models on the same verification sets; with `of_groups` these are ethnicities.

    `same` holds for each set (P,) bool, which pairs are genuine; `identities` the names (P, 2) of both ends of each
    pair, None or no entry if they are not known; `of_rfw` says that the sets are RFW. The attribute `ends` holds these
    identities as numbers.
    """

    def __init__(
        self,
        models: list[Scored],
        same: dict[str, np.ndarray],
        of_groups: bool,
        notes: tuple[str, ...] = (),
        identities: Mapping[str, np.ndarray | None] = MappingProxyType({}),
        of_rfw: bool = False,
    ):
        self.models, self.same, self.notes, self.of_rfw = models, same, notes, of_rfw
        self.ends = {name: None if (one := identities.get(name)) is None else Ends.of(one) for name in same}
        self.of_groups = of_groups and len(same) > 1
        self.accuracies = np.array([one.accuracies for one in models])
        distances = [one.distances for one in models]
        self._few_errors = FewErrors.of(distances, same, [*self.ends.values()])
        drawn = resampled(distances, same, ends=self.ends)
        self._samples = self._few_errors.smoothed(drawn)  # (resamples, models, sets)
        self.intervals = np.array([self._intervals_of(m) for m in range(len(models))])  # (models, sets, 2)
        self.lacking = {name: reason for name, labels in same.items() if (reason := lacking(labels))}
        self.few = [name for name, labels in same.items() if fewest(labels) < FEWEST_PAIRS]
        self.intervals[:, [name in self.few for name in same]] = np.nan
        self.whole = np.array([name not in self.lacking for name in same])  # (sets,) bool: part of averages

    def _intervals_of(self, model: int) -> list[tuple[float, float]]:
        samples = self._samples[:, model].T
        return [self._few_errors.accuracy(model, s, interval(one)) for s, one in enumerate(samples)]

    @property
    def pairs(self) -> tuple[int, ...]:
        """The numbers of pairs of the sets that are part of averages."""
        return tuple(len(labels) for name, labels in self.same.items() if name not in self.lacking)

    @property
    def has_few(self) -> bool:
        """Tells whether a set that is part of averages has too few pairs for intervals and verdicts."""
        return any(name not in self.lacking for name in self.few)

    @property
    def has_spread(self) -> bool:
        """Tells whether at least two groups are part of averages, so that there is an STD, an SER and a verdict."""
        return self.of_groups and np.count_nonzero(self.whole) > 1

    def _whole(self, one: Scored) -> tuple[float, ...]:
        """Returns the accuracies of a model that are part of averages."""
        return tuple(np.array(one.accuracies)[self.whole].tolist())

    @property
    def _columns(self) -> tuple[str, ...]:
        """The names of the sets; those that are left out of averages are marked by a star."""
        return tuple(f"{name} *" if name in self.lacking else name for name in self.same)

    @property
    def of_one_kind(self) -> list[str]:
        """The sets without genuine or without impostor pairs, which have no error rates."""
        return [name for name, labels in self.same.items() if labels.all() or not labels.any()]

    @cached_property
    def shared(self) -> list[dict[str, float | None]]:
        """For each model the thresholds shared by all groups, by name; empty if there is a set in `of_one_kind`.

        A threshold is None if the pairs are too few for its FMR.
        """
        return [self._shared(one) for one in self.models]

    def _shared(self, one: Scored) -> dict[str, float | None]:
        if self.of_one_kind:
            return {}
        groups = self.groups(one)
        found = {name: rates.threshold_at_fmr(groups, fmr) for name, fmr in FMR.items()}
        return {**found, BEST: rates.threshold_of_best_accuracy(groups)[0]}

    def groups(self, one: Scored) -> rates.Groups:
        """Returns the distances and labels of a model by set."""
        return {name: (one.distances[name], labels) for name, labels in self.same.items()}

    def gap(self, model: int, low: int, high: int) -> Estimate:
        """Returns the accuracy of set `high` minus that of `low`, in points, for the model with this index."""
        samples, values = self._samples[:, model], self.accuracies[model]
        bounds = interval(samples[:, high] - samples[:, low])
        return Estimate(float(values[high] - values[low]), *self._few_errors.gap(model, low, high, bounds))

    def tables(self) -> dict[str, Table]:
        """Returns all tables by file name, without extension."""
        tables = {"accuracy": self._accuracy(), "intervals": self._intervals()}
        if self.has_spread:
            tables["chance"] = self._chance()
        if len(self.models) > 1:
            tables["differences"] = self._differences()
        if self.of_groups and any(self.shared):
            for name in self.shared[0]:
                tables[f"rates_{name.replace(' ', '_')}"] = self._rates(name)
            if self.models[0].samples:
                tables["impostors"] = self._impostors()
        return tables

    def _accuracy(self) -> Table:
        """Returns the paper's columns, and whether differences between groups could be chance."""
        rows, header = [], (*NAMES, *self._columns, "Average")
        notes = ["Accuracy in percent: mean of ten folds, threshold from the nine others, of each set by itself."]
        if self.has_spread:
            header += ("STD", "SER", "Within chance")
            notes.append(
                "STD has ddof 1. Within chance, yes: these pairs show no unfairness (see the table of chance)."
            )
        for one in self.models:
            average, std, ser = summary(self._whole(one))
            if said := self.collapsed(one):
                notes.append(f"{one.title} {said}")
            spread: tuple[Cell, ...] = ()
            if self.has_spread:
                is_known = not (self.has_few or said)
                spread = (std, ser, is_within_chance(self._whole(one), self.pairs) if is_known else None)
            rows.append((*names_of(one), *one.accuracies, average, *spread))
        return Table("Accuracy", header, rows, len(NAMES), self._notes(*notes))

    def collapsed(self, one: Scored) -> str:
        """Returns the note on a collapsed model, "" for others."""
        return collapsed(one.distances, self.same)

    def _chance(self) -> Table:
        rows = []
        for one in self.models:
            average, std, ser = summary(self._whole(one))
            chance = by_chance(average, self.pairs)
            mean, std_95, ser_95 = (None,) * 3 if self.has_few else (chance.std_mean, chance.std_95, chance.ser_95)
            rows.append((*names_of(one), average, std, mean, std_95, ser, ser_95, average - std))
        note = (
            "By chance: the STD that perfectly fair models of the same average show on as many pairs, on average, and "
            "the STD and SER that 95 of 100 of them do not exceed. Pairs count as independent."
        )
        header = (*NAMES, "Average", "STD", "STD by chance", "STD 95 of 100", "SER", "SER 95 of 100", "AVG - STD")
        return Table("Chance", header, rows, len(NAMES), self._notes(note), is_printed=False)

    def _intervals(self) -> Table:
        rows = []
        for m, one in enumerate(self.models):
            samples = self._samples[:, m, self.whole]
            cells = [Estimate(a, *i) for a, i in zip(one.accuracies, self.intervals[m].tolist(), strict=True)]
            average, std, _ = summary(self._whole(one))
            bounds = self._few_errors.average(m, np.flatnonzero(self.whole).tolist(), interval(samples.mean(1)))
            cells.append(self._estimate(average, bounds))
            if self.has_spread:
                cells.append(self._estimate(std, interval(stds(samples))))
            rows.append((*names_of(one), *cells))
        header = (*NAMES, *self._columns, "Average", *(("STD",) if self.has_spread else ()))
        counts = [fewest(labels) for name, labels in self.same.items() if name not in self.few]
        notes = [method(self.ends)] if counts else []
        if counts and not self._few_errors.are_many:
            notes.append(EXACT)
        if counts and (count := min(counts)) < NARROW_PAIRS:
            notes.append(f"Too narrow: a fold has only {count} pairs of a kind to draw from.")
        if self.has_spread and not self.has_few:
            notes.append("STD: the variance that resampling pairs adds on average is subtracted.")
        return Table("95 % intervals", header, rows, len(NAMES), self._notes(*notes))

    def _differences(self) -> Table:
        """Returns the difference of every two models, the one with the better average first."""
        accuracies, samples = self.accuracies[:, self.whole], self._samples[:, :, self.whole]
        order, places = np.argsort(-accuracies.mean(1), kind="stable"), np.flatnonzero(self.whole).tolist()
        rows = []
        for i, one in enumerate(order):
            for other in order[i + 1 :]:
                found = difference(one, other, accuracies, samples)
                bounds = self._few_errors.difference(one, other, places, found.average_interval)
                cells = self._compared(found.average, bounds)
                if self.has_spread:
                    cells += self._compared(found.std, found.std_interval)
                rows.append((self.models[one].title, self.models[other].title, *cells))
        of_groups = ("STD", "STD sure") if self.has_spread else ()
        header = ("Model", "minus", "Average", "Sure", *of_groups)
        note = (
            "Sure: zero is outside the 95 % interval of the difference, on the same pairs for both models. For STD "
            "this is conservative: the difference of two fair models is sure in at most 1 of 100 cases."
        )
        return Table("Differences", header, rows, 2, self._notes(note, method(self.ends), EXACT), is_printed=False)

    def _estimate(self, value: float, bounds: tuple[float, float]) -> Estimate:
        """Returns a value over all sets with its interval; without one if a set has too few pairs."""
        return Estimate(value, np.nan, np.nan) if self.has_few else Estimate(value, *bounds)

    def _compared(self, value: float, bounds: tuple[float, float]) -> list[Cell]:
        """Returns a difference with its interval, and whether it is sure; without both if pairs are too few."""
        found = self._estimate(value, bounds)
        return [found, None if self.has_few else found.excludes_zero]

    def _rates(self, name: str) -> Table:
        """Returns FMR and FNMR of each group at the shared threshold `name`, and the measures computed from them."""
        rows = []
        for one, shared in zip(self.models, self.shared, strict=True):
            threshold, cells = shared[name], list[Cell]()
            if threshold is None:
                cells = [None] * (1 + 2 * len(self.same) + len(MEASURES))
            else:
                found = rates.error_rates(self.groups(one), threshold)
                cells = [threshold, *(rate.fmr for rate in found.values()), *(rate.fnmr for rate in found.values())]
                cells += [INDICES[measure].of_rates(found, FMR.get(name)) for measure in MEASURES]
            rows.append((*names_of(one), *cells))
        header = (*NAMES, "Threshold", *(f"FMR {n}" for n in self.same), *(f"FNMR {n}" for n in self.same), *MEASURES)
        note = (
            "One threshold on the squared distance for all groups. A rate of fewer than three errors is given as less "
            "than 3 / pairs. IR, GARBE and max/geomean need at least three errors per rate; FDR uses any rate."
        )
        notes = [note]
        if any(shared[name] is None for shared in self.shared):
            notes.append(f"A dash: {RULE_OF_THREE / FMR[name]:,.0f} impostor pairs are needed to set this threshold.")
        title = f"Error rates at the shared threshold of {name}"
        return Table(title, header, rows, len(NAMES), self._notes(*notes), digits=3, is_printed=False)

    def _impostors(self) -> Table:
        """Returns the FMR between images of every two groups, at the strictest threshold that the pairs resolve."""
        rows: list[tuple[Cell, ...]] = []
        for one, shared in zip(self.models, self.shared, strict=True):
            name = next(name for name in (*reversed(FMR), BEST) if shared[name] is not None)
            own = {group: one.distances[group][~labels] for group, labels in self.same.items()}
            matrix = rates.impostor_matrix(one.samples, own, shared[name])
            rows += [(one.title, name, group, *row) for group, row in zip(self.same, matrix, strict=True)]
        counts = ", ".join(f"{len(sample)} of {group}" for group, sample in self.models[0].samples.items())
        note = (
            f"False match rates between distinct images of two groups: {counts}. On the diagonal: those of the group's "
            f"own impostor pairs{', which RFW selected to be hard' if self.of_rfw else ''}. An identity that is in two "
            "groups counts as an impostor."
        )
        header = ("Model", "Threshold", "Group", *self.same)
        return Table("Impostors across groups", header, rows, 3, self._notes(note), is_printed=False)

    def _notes(self, *notes: str) -> tuple[str, ...]:
        left_out = [f"* {name}: {reason}. Left out of averages, STD and SER." for name, reason in self.lacking.items()]
        if few := [name for name in self.few if name not in self.lacking]:
            left_out.append(
                f"No interval and no verdict where a set has fewer than {FEWEST_PAIRS} genuine or impostor pairs in a "
                f"fold: {', '.join(few)}."
            )
        return (*self.notes, *notes, *left_out)


def names_of(one: Scored) -> tuple[Cell, ...]:
    """Returns the cells of NAMES."""
    return one.setting or "-", one.network or "-", one.kind, one.name


def file_name(names: tuple[Cell, ...]) -> str:
    """Returns the name, without ending, of the files of the model with these cells of NAMES."""
    return "-".join(str(name) for name in names if name != "-").replace(" ", "-")
