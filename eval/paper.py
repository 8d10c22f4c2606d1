"""Compares measured results with the rows printed in the papers: cell by cell, and MST-KD's conclusions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from config.config import Config
from config.registry import ADAPTORS
from eval.fairness import summary
from eval.published import PAIRS, SIC, Row, adadistill, every, fairness_ocfr, mst_kd
from eval.scores import Scored
from utils.data.synthetic import is_generated
from utils.errors import InputError
from utils.tables import Cell, Table

AGREES = 1.96  # standard errors: 95 of 100 differences between two equally good models are smaller
METHOD = (
    "Difference: here minus printed. Its standard error is sqrt(p1 (1 - p1) / n + p2 (1 - p2) / n) for accuracies p1 "
    "and p2 on n pairs; for the average, the root of the sum of the sets' squared standard errors, divided by the "
    f"number of sets. Agrees: the difference is at most {AGREES} standard errors. No standard error is given for STD "
    "and SER. Not accounted for: both models see the same pairs, which makes the true error smaller, and they have "
    "different seeds, which makes it larger."
)
CAUTION = (
    "The STD is not compared with that of the baseline's students: in all twelve printed comparisons the two STD "
    "differ by less than two standard errors of 6,000 pairs a group, so that one run of each cannot decide it."
)


def check(cfg: Config) -> None:
    """Raises InputError if `cfg.row` is in no table or contradicts other settings; reads no data."""
    if cfg.row is None:
        return
    if not cfg.checkpoint:
        raise InputError(f"row = {cfg.row!r} needs checkpoint, the file to compare: set it, or leave row out.")
    if cfg.teacher:
        raise InputError(f"row = {cfg.row!r}: the papers print no results of adaptors; leave out row or teacher.")
    if cfg.row not in every():
        listed = mst_kd() if cfg.of_groups else adadistill()
        raise InputError(f"row = {cfg.row!r} is in no table. Set row to one of: {', '.join(listed)}.")


def comparable(cfg: Config, pairs: dict[str, int]) -> dict[str, Row]:
    """Returns the printed rows that can be compared with results on these sets, by name.

    `pairs` is the number of pairs by set. Without `cfg.row` the rows are all of MST-KD's if groups and numbers of pairs
    are those of RFW, and none on other sets or on generated faces. With `cfg.row` it is this row alone; raises
    InputError if the results cannot be compared with it.
    """
    if cfg.row is None:
        return mst_kd() if is_rfw(cfg, pairs) else {}
    if _is_of_generated_faces(cfg):
        raise InputError(f"row = {cfg.row!r}: generated faces are not compared with printed results; leave row out.")
    row = every()[cfg.row]
    if pairs != PAIRS[row.paper]:
        wanted, found = (
            ", ".join(f"{name} ({count:,} pairs)" for name, count in sets.items()) for sets in (PAIRS[row.paper], pairs)
        )
        raise InputError(f"row = {cfg.row!r} is printed for {wanted}, not {found}: set pairs, ethnicities, pairs_sets.")
    return {row.name: row}


def is_rfw(cfg: Config, pairs: dict[str, int]) -> bool:
    """Returns whether groups and numbers of pairs (by set) are those of RFW, and the faces are not generated."""
    return cfg.of_groups and pairs == PAIRS["MST-KD"] and not _is_of_generated_faces(cfg)


def _is_of_generated_faces(cfg: Config) -> bool:
    return any(is_generated(Path(folder)) for folder in (cfg.pairs, *cfg.data_paths))


def compare(printed: dict[str, Row], scored: list[Scored], cfg: Config, notes: tuple[str, ...]) -> "Comparison | None":
    """Compares the models that have a row in `printed` with it; returns None if no model has one."""
    if cfg.row is None:
        found = {(one.setting, one.network, one.kind, one.name): one for one in scored}
        models = {row.name: found[row.key] for row in printed.values() if row.key in found}
    else:
        (model,) = scored
        models = {cfg.row: model}
    here = {name: _measured(printed[name], one) for name, one in models.items()}
    return Comparison(printed, here, (*notes, *_not_printed(scored))) if here else None


def _measured(row: Row, one: Scored) -> Row:
    average, std, ser = summary(one.accuracies)
    accuracies = dict(zip(one.distances, one.accuracies, strict=True))
    return replace(row, accuracies=accuracies, average=average, std=std, ser=ser, tar={})


def _not_printed(scored: list[Scored]) -> list[str]:
    """Returns notes on the models that have no row in the paper."""
    notes = []
    if any(one.kind == "adaptor" for one in scored):
        notes.append("The paper prints no rows of adaptors: those here are in the table of accuracy only.")
    stand_ins = {row.key: row for row in fairness_ocfr().values()}
    for one in scored:
        if (one.setting, one.kind) != ("standalone", "teacher"):
            continue
        notes.append(f"Not in the paper: {one.title}, trained on all identities without teachers.")
        if row := stand_ins.get((one.setting, one.network, one.kind, one.name)):
            figures = ", ".join(f"{group} {value:.2f}" for group, value in row.accuracies.items())
            notes[-1] += (
                f" The nearest published network, of the paper's laboratory ({row.paper}): {figures}, average "
                f"{row.average:.2f}, STD {row.std:g}, SER {row.ser:g}, derived from its published scores."
            )
    return notes


def variance(printed: float, here: float, pairs: int) -> float:
    """Returns the variance, in squared percentage points, of the difference of two accuracies in percent.

    Each accuracy is the binomial share p of right decisions on n = `pairs` pairs, with variance p (1 - p) / n. The two
    accuracies are taken as independent, and so are the pairs. The variance due to the choice of thresholds and to the
    seed is not included.
    """
    return sum(value * (100 - value) / pairs for value in (printed, here))


@dataclass(frozen=True)
class Comparison:
    """The printed rows of one paper's tables, and the measured rows, both by name."""

    printed: dict[str, Row]
    here: dict[str, Row]
    notes: tuple[str, ...]

    @property
    def sets(self) -> dict[str, int]:
        """The number of pairs by verification set, in the paper's order."""
        return PAIRS[self._paper]

    @property
    def panels(self) -> dict[str, list[tuple[Row, Row]]]:
        """The (printed, measured) rows by the title of the paper's table."""
        panels: dict[str, list[tuple[Row, Row]]] = {}
        for name, row in self.here.items():
            panels.setdefault(f"{row.table} of {row.paper}", []).append((self.printed[name], row))
        return panels

    def tables(self) -> dict[str, Table]:
        """Returns a comparison for each table of the paper, then the conclusions, by their names in results.json."""
        tables = {f"paper: {title}": self._cells(title, rows) for title, rows in self.panels.items()}
        if len(self.printed) > 1:  # a conclusion needs several rows
            tables["paper: conclusions"] = self._conclusions()
        return tables

    def forms(self) -> dict[str, str]:
        """Returns the texts of paper.md and paper.tex (all tables) and paper.csv (all cells), by extension."""
        cells, every_table = [self._cells(*panel) for panel in self.panels.items()], self.tables().values()
        return {
            "md": "\n".join(table.markdown() for table in every_table),
            "csv": replace(cells[0], rows=[row for table in cells for row in table.rows]).csv(),
            "tex": "\n".join(table.latex() for table in every_table),
        }

    @property
    def _paper(self) -> str:
        return next(iter(self.here.values())).paper

    def _cells(self, title: str, rows: list[tuple[Row, Row]]) -> Table:
        header = ("Row", "Figure", *self.sets, "Average", *(("STD", "SER") if self._paper == "MST-KD" else ()))
        sic = [
            f"{name}, {column}: {value} as printed, though the paper's other figures disagree."
            for (name, column), value in SIC.items()
            if name in {printed.name for printed, _ in rows}
        ]
        lines = [line for printed, here in rows for line in self._lines(printed, here)]
        notes = (*self.notes, METHOD, _agreement(rows, self.sets), *sic)
        return Table(f"{title}, as printed and here", header, lines, 2, notes, is_printed=len(self.here) == 1)

    def _lines(self, printed: Row, here: Row) -> list[tuple[Cell, ...]]:
        """Returns five lines: printed, here, difference, difference in standard errors, and whether they agree."""
        both = [*_both(printed, here, self.sets), (printed.average, here.average, _variance_of_average(printed, here))]
        if printed.paper == "MST-KD":
            both += [(printed.std, here.std, None), (printed.ser, here.ser, None)]
        differences = [None if before is None else after - before for before, after, _ in both]
        errors = [None if v is None else d / v**0.5 for d, (_, _, v) in zip(differences, both, strict=True)]
        lines = {
            "printed": [before for before, _, _ in both],
            "here": [after for _, after, _ in both],
            "difference": differences,
            "in standard errors": errors,
            "agrees": [None if z is None else abs(z) <= AGREES for z in errors],
        }
        return [(printed.name, what, *cells) for what, cells in lines.items()]

    def _conclusions(self) -> Table:
        networks = dict.fromkeys(row.key[1] for row in self.here.values())
        rows = [
            (claim.text, network, claim.of, claim.holds(self.printed), claim.holds(self.here))
            for network in networks
            for claim in _claims(network)
        ]
        every_row = [pair for rows_of_table in self.panels.values() for pair in rows_of_table]
        notes = (
            *self.notes,
            _agreement(every_row, self.sets),
            "Whether the paper's conclusions hold in its own numbers, and here; a dash where a model is missing here.",
            CAUTION,
        )
        return Table(
            f"Conclusions of {self._paper}", ("Conclusion", "Teachers", "Of", "Printed", "Here"), rows, 3, notes
        )


def _both(printed: Row, here: Row, pairs: dict[str, int]) -> list[tuple[float | None, float, float | None]]:
    """Returns (printed accuracy, measured accuracy, variance of the difference) per set; None where none is printed."""
    found = []
    for name, count in pairs.items():
        before, after = printed.accuracies.get(name), here.accuracies[name]
        found.append((before, after, None if before is None else variance(before, after, count)))
    return found


def _variance_of_average(printed: Row, here: Row) -> float | None:
    """Returns the variance of the difference of two averages over sets that are independent of each other."""
    pairs = PAIRS[printed.paper]
    if printed.average is None:
        return None
    return sum(v for _, _, v in _both(printed, here, pairs)) / len(pairs) ** 2


def _agreement(rows: list[tuple[Row, Row]], pairs: dict[str, int]) -> str:
    cells = [cell for printed, here in rows for cell in _both(printed, here, pairs) if cell[0] is not None]
    agree = sum(abs(after - before) <= AGREES * v**0.5 for before, after, v in cells)
    return (
        f"Of {len(cells)} accuracies here {agree} agree with the printed ones within {AGREES} standard errors; of "
        f"equally good models {0.95 * len(cells):.1f} would."
    )


# Conclusions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A conclusion that the paper draws from some of its rows."""

    text: str
    of: str  # the models that it is about
    rows: tuple[str, ...]  # names of the rows
    follows: Callable[..., bool]  # takes these rows, in this order

    def holds(self, known: dict[str, Row]) -> bool | None:
        """Returns whether the conclusion holds in the rows `known`, by name; None if one of its rows is missing."""
        if any(name not in known for name in self.rows):
            return None
        return self.follows(*(known[name] for name in self.rows))


def _claims(network: str) -> list[Claim]:
    """Returns the paper's conclusions on the teachers of this network and on their students."""
    groups = tuple(PAIRS["MST-KD"])
    teachers = tuple(f"teacher {group} {network} specialized" for group in groups)
    each_best = Claim("Each specialised teacher is the best of them on its own group", "teachers", teachers, _each_best)
    averages, stds, best_adaptors = [], [], []
    for method in ("a-KD", "EAF-KD"):
        for adaptor in ADAPTORS:
            of = f"{method} {adaptor}"
            ours, baseline = (f"{of} {network} {setting}" for setting in ("specialized", "baseline"))
            text = "The student's average is above that of the baseline's student"
            averages.append(Claim(text, of, (ours, baseline), _has_best_average))
            text = "The student's STD is below that of every specialised teacher"
            stds.append(Claim(text, of, (ours, *teachers), _has_least_std))
        for setting in ("specialized", "baseline"):
            rows = tuple(f"{method} {adaptor} {network} {setting}" for adaptor in ADAPTORS)  # SL is the first
            text = "The student of SL has the best average of the three adaptors"
            best_adaptors.append(Claim(text, f"{method} {setting}", rows, _has_best_average))
    return [each_best, *averages, *best_adaptors, *stds]


def _each_best(*teachers: Row) -> bool:
    """Returns whether each teacher, in the order of the groups, is better on its own group than all other teachers."""
    return all(
        teacher.accuracies[group] > other.accuracies[group]
        for group, teacher in zip(PAIRS["MST-KD"], teachers, strict=True)
        for other in teachers
        if other is not teacher
    )


def _has_best_average(one: Row, *others: Row) -> bool:
    return all(one.average > other.average for other in others)


def _has_least_std(one: Row, *others: Row) -> bool:
    return all(one.std < other.std for other in others)
