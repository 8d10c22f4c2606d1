"""Attributes of the people in the pairs, such as ethnicity, gender and age, from a table beside the .bin.

`<name>_attributes.csv` beside `<name>.bin` has one row per pair, in the order of the .bin. An attribute is a column
(`gender`) or one column for each end (`gender_1`, `gender_2`; BFW's `e1`, `e2` are ethnicity, `g1`, `g2` gender,
`att1`, `att2` its eight groups). A column `same` (or BFW's `label`) is compared with the .bin.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.storage.files import read_csv

ATTRIBUTES = ("ethnicity", "gender", "age")
GROUP = "group"
ENDS = {"ethnicity": ("e1", "e2"), "gender": ("g1", "g2"), "age": ("age1", "age2"), GROUP: ("att1", "att2")}
SAME_COLUMNS = ("same", "label", "y_true")
LABELS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}  # texts in SAME_COLUMNS: genuine 1, impostor 0
MIXED = ""  # the value of a pair whose ends differ, or for which none is given


def table_of(path: Path) -> Path:
    """Returns the path of the table of attributes beside a .bin."""
    return path.with_name(f"{path.stem}_attributes.csv")


def read_attributes(path: Path, same: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the attributes of the pairs of the .bin `path`: (P,) values by name; empty if there is no table.

    Raises InputError if the table cannot be read, has no attribute, or contradicts `same` (P,) bool.
    """
    file = table_of(path)
    if not file.exists():
        return {}
    header, rows = read_csv(file, "correct or delete it")
    if len(rows) != len(same) or any(len(row) != len(header) for row in rows):
        raise InputError(f"{file} must have a row of {len(header)} columns for each of the {len(same):,} pairs.")
    columns = columns_of(file, header, rows)
    for name in SAME_COLUMNS:
        labels = np.array([LABELS.get(text.lower()) == 1 for text in columns.get(name, [])])
        wrong = np.flatnonzero(labels != same) if name in columns else []
        if len(wrong):
            raise InputError(f"{file}, line {wrong[0] + 2:,}: {name} contradicts {path.name}: correct or delete it.")
    found = attributes_of(columns)
    if not found:
        raise InputError(f"{file} has no column of {', '.join(ATTRIBUTES)}, alone or with _1 and _2: add one.")
    return found


def attributes_of(columns: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """Returns the value (P,) of each pair by attribute; MIXED where its ends differ."""
    found = {name: values_of(columns, name) for name in ATTRIBUTES}
    return {name: values for name, values in found.items() if values is not None}


def values_of(columns: Mapping[str, list[str]], name: str) -> np.ndarray | None:
    """Returns the value (P,) of each pair of the attribute `name`, MIXED where its ends differ; None if not given."""
    for ends in ((f"{name}_1", f"{name}_2"), ENDS.get(name, (name,))):
        if {*ends} <= columns.keys():
            one, other = (np.array(columns[end], object) for end in (ends[0], ends[-1]))
            return np.where(one == other, one, MIXED)
    return np.array(columns[name], object) if name in columns else None


def columns_of(file: Path, header: list[str], rows: list[list[str]]) -> dict[str, list[str]]:
    """Returns the columns by name, without spaces around texts. Raises InputError if two columns have one name."""
    names = [name.strip() for name in header]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{file} has two columns {twice}: keep one.")
    return {name: [row[k].strip() for row in rows] for k, name in enumerate(names)}
