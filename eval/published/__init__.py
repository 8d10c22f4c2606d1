"""Reads and checks the printed results of MST-KD and AdaDistill, from the CSV files in this folder."""

import csv
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eval.fairness import summary
from utils.errors import InputError

FOLDER = Path(__file__).parent
PAIRS = {  # numbers of pairs of the verification sets on which a paper prints accuracies
    "MST-KD": {"African": 6000, "Asian": 6000, "Caucasian": 6000, "Indian": 6000},
    "AdaDistill": {"lfw": 6000, "cfp_fp": 7000, "agedb_30": 6000, "calfw": 6000, "cplfw": 6000},
}
FARS = {"IJB-C": ("1e-4", "1e-5"), "IJB-B": ("1e-4", "1e-5")}  # false accept rates at which AdaDistill prints a TAR
SIC = {  # printed cells that contradict the rest of their row
    ("EAF-KD DLDPO iresnet50 specialized", "Asian"): 91.71,
    ("AdaArcDistill m=0.45", "average"): 95.47,
}
ROUNDING = 0.0051  # largest rounding error of two decimals, plus that of floating point
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Row:
    """One row of a table: accuracies, average and STD in percent, as printed or as measured here."""

    name: str  # value of the setting `row`
    paper: str  # MST-KD | AdaDistill | FairnessOCFR
    table: str
    accuracies: dict[str, float]  # by verification set; sets without a printed accuracy are absent
    average: float | None
    std: float | None = None
    ser: float | None = None
    tar: dict[tuple[str, str], float] = field(default_factory=dict)  # in percent, by benchmark and FAR
    key: Key | None = None  # setting, teachers' network, kind and name of this model in `eval.scores.Scored`


@functools.cache
def mst_kd(path: Path = FOLDER / "mst_kd.csv") -> dict[str, Row]:
    """Reads the 40 rows of MST-KD's Tables 1 to 6, by name: `<method> <model> <teachers' network> <setting>`.

    Raises InputError with file and line if average, STD (ddof 1) or SER do not follow from the accuracies, or if an
    accuracy is not a share of 6,000 pairs.
    """
    return _read(path, functools.partial(_mst_kd_row, paper="MST-KD"))


@functools.cache
def fairness_ocfr(path: Path = FOLDER / "fairness_ocfr.csv") -> dict[str, Row]:
    """Reads standalone networks of MST-KD's laboratory, whose accuracies come from its published scores.

    Raises InputError as `mst_kd` does.
    """
    return _read(path, functools.partial(_mst_kd_row, paper="FairnessOCFR"))


@functools.cache
def adadistill(path: Path = FOLDER / "adadistill.csv") -> dict[str, Row]:
    """Reads the rows of AdaDistill's tables, by name.

    Raises InputError with file and line if an average does not follow from the accuracies.
    """
    return _read(path, _adadistill_row)


def every() -> dict[str, Row]:
    """Returns all rows that the setting `row` may name, by name."""
    return {**mst_kd(), **adadistill()}


def _read(path: Path, to_row: Callable[[dict[str, str]], Row]) -> dict[str, Row]:
    lines = path.read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    reader = csv.DictReader(line for _, line in numbered)
    rows: dict[str, Row] = {}
    for (number, _), cells in zip(numbered[1:], reader, strict=True):
        try:
            row = to_row(cells)
            if row.name in rows:
                raise ValueError(f"{row.name} stands twice in this file")
        except KeyError as error:
            raise InputError(f"{path}, line {number}: no column {error}; restore the file.") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}; restore the file.") from error
        rows[row.name] = row
    return rows


def _mst_kd_row(cells: dict[str, str], paper: str) -> Row:
    setting, network, method, model = (cells[name] for name in ("setting", "network", "method", "model"))
    pairs = PAIRS["MST-KD"]
    accuracies = {group: float(cells[group]) for group in pairs}
    figures = {name: float(cells[name]) for name in ("average", "STD", "SER")}
    name = f"{method} {model} {network} {setting}"
    for group, value in accuracies.items():
        step = 100 / pairs[group]
        if abs(round(value / step) * step - value) > ROUNDING and SIC.get((name, group)) != value:
            raise ValueError(f"{group} {value} is no share of {pairs[group]:,} pairs")
    for (column, value), found in zip(figures.items(), summary([*accuracies.values()]), strict=True):
        _check(name, column, value, found, ROUNDING)
    # Baseline teachers are called quarter1, quarter2, ... here, and BT-1, BT-2, ... in the paper.
    of_model = model.replace("BT-", "quarter") if method == "teacher" else f"{model} {cells['student_network']}"
    key = (setting, network, method, of_model)
    table = f"Table {cells['table']}" if paper == "MST-KD" else cells["table"]
    return Row(name, paper, table, accuracies, figures["average"], figures["STD"], figures["SER"], key=key)


def _adadistill_row(cells: dict[str, str]) -> Row:
    name, sets = cells["name"], PAIRS["AdaDistill"]
    accuracies = {one: float(cells[one]) for one in sets if cells[one]}
    average = float(cells["average"]) if cells["average"] else None
    if (average is None) != (accuracies.keys() != sets.keys()):
        raise ValueError("the average must stand where all accuracies do, and only there")
    if average is not None:
        # The paper averaged accuracies before rounding them.
        _check(name, "average", average, sum(accuracies.values()) / len(accuracies), 2 * ROUNDING)
    columns = {(benchmark, far): f"{benchmark} {far}" for benchmark, fars in FARS.items() for far in fars}
    tar = {key: float(cells[column]) for key, column in columns.items() if cells[column]}
    return Row(name, "AdaDistill", cells["table"], accuracies, average, tar=tar)


def _check(row: str, column: str, printed: float, found: float, rounding: float) -> None:
    if not abs(printed - found) <= rounding and SIC.get((row, column)) != printed:
        raise ValueError(f"{column} {printed} does not follow from the accuracies, which give {found:.3f}")
