"""Compares trainings that differ in their seed only: mean, standard deviation, and intervals over seeds and pairs.

Reads   results.json and scores/ in <OUTPUT>/evaluation of each training, or in <OUTPUT> itself
Writes  seeds.*, seeds_sd.* and seeds_differences.* as .md, .csv and .tex into <to>
Run     python -m eval.seeds output/seed0 output/seed1 output/seed2 [--to FOLDER]
"""

import argparse
import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.fairness import std
from eval.few_errors import SMOOTHED, FewErrors
from eval.results import NAMES, file_name
from eval.uncertainty import FEWEST_PAIRS, RESAMPLES, fewest, interval, resampled, stds
from eval.verification import accuracy
from utils.data.pairs import lacking
from utils.errors import InputError
from utils.process import guarded
from utils.storage.files import read_json, write_text
from utils.tables import Cell, Estimate, Table

METHOD = (
    f"95 % intervals over seeds and pairs: 2.5th to 97.5th percentile of {RESAMPLES:,} draws. Each draw is the mean "
    "over the seeds on pairs resampled within fold and label, the same pairs for all seeds and models, plus the "
    "standard error over the seeds times a draw from Student's t with (number of seeds - 1) degrees of freedom. "
    f"Pairs are taken as independent of each other, also where their identities are known. {SMOOTHED}"
)
Key = tuple[str, ...]  # setting, teachers' network, kind and name of a model


@dataclass(frozen=True)
class Training:
    """The results of one seed: the sets, their SHA-256, and for each model its squared distances (P,) by set."""

    folder: Path
    digests: dict[str, str]
    same: dict[str, np.ndarray]  # (P,) bool per set
    weights: dict[Key, list[str]]
    distances: dict[Key, dict[str, np.ndarray]]


class Seeds:
    """Accuracies (seeds, models, columns) of models that all trainings have; columns are the sets, average and STD.

    Raises InputError for fewer than two trainings, for trainings on other pairs, and for the same weights twice.
    """

    def __init__(self, trainings: list[Training], resamples: int = RESAMPLES):
        _check(trainings)
        self.count = len(trainings)
        first, *others = trainings
        self.models = [key for key in first.distances if all(key in one.distances for one in others)]
        self.left_out = sorted({_title(key) for one in trainings for key in one.distances if key not in self.models})
        if not self.models:
            raise InputError("The folders have no model in common: give evaluations of the same plan.")
        self.sets = [*first.same]
        self.lacking = {name: reason for name, labels in first.same.items() if (reason := lacking(labels))}
        if len(self.lacking) == len(self.sets):
            raise InputError("No set has genuine and impostor pairs in every fold: evaluate other sets.")
        self._whole = np.array([name not in self.lacking for name in self.sets])
        self.columns = (*self.sets, "Average", *(("STD",) if np.count_nonzero(self._whole) > 1 else ()))
        few = np.array([fewest(labels) < FEWEST_PAIRS for labels in first.same.values()])
        self._has_interval = [*~few, *[not few[self._whole].any()] * 2]  # by column
        by_seed = [[one.distances[key] for key in self.models] for one in trainings]
        every = [one for of_seed in by_seed for one in of_seed]
        shape = (self.count, len(self.models), len(self.sets))
        accuracies = np.array([[accuracy(one[name], first.same[name]) for name in self.sets] for one in every])
        accuracies = accuracies.reshape(shape)
        self.values = self._with_summary(accuracies, std(accuracies[..., self._whole]))
        drawn = resampled(every, first.same, resamples=resamples).reshape(resamples, *shape)
        # By seed, since the same errors may occur in all seeds: half an error of its own for each would average out.
        few_errors = [FewErrors.of(of_seed, first.same, [None] * len(self.sets)) for of_seed in by_seed]
        drawn = np.stack([one.smoothed(drawn[:, k]) for k, one in enumerate(few_errors)], 1)
        spread = np.stack(
            [stds(one) for one in drawn[..., self._whole].reshape(resamples, len(every), -1).swapaxes(0, 1)]
        )
        self._drawn = self._with_summary(drawn, spread.T.reshape(resamples, *shape[:2]))
        self._t = np.random.default_rng(0).standard_t(self.count - 1, resamples)

    def _with_summary(self, accuracies: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """Appends the average and, for several sets, the STD `spread` to accuracies (..., sets)."""
        added = np.stack([accuracies[..., self._whole].mean(-1), spread], -1)
        return np.concatenate([accuracies, added], -1)[..., : len(self.columns)]

    def estimate(self, model: int, column: int, minus: int | None = None) -> Estimate:
        """Returns the mean over the seeds with its interval over seeds and pairs; with `minus`, of the difference.

        The two models of a seed are compared with each other: they may share teachers. The interval is NaN where sets
        have too few pairs (FEWEST_PAIRS).
        """
        values, drawn = self.values[:, model, column], self._drawn[:, :, model, column]
        if minus is not None:
            values, drawn = values - self.values[:, minus, column], drawn - self._drawn[:, :, minus, column]
        bounds = over_both(values, drawn, self._t) if self._has_interval[column] else (np.nan, np.nan)
        if minus is None:  # t has heavy tails for few seeds: bounds may lie beyond what an accuracy or an STD can be
            low, high = np.clip(bounds, 0, np.inf if self.columns[column] == "STD" else 100).tolist()
            bounds = low, high
        return Estimate(float(values.mean()), *bounds)

    def tables(self) -> dict[str, Table]:
        """Returns all tables by file name, without extension."""
        every = range(len(self.models))
        notes = (f"Mean over {self.count} seeds.", METHOD, *self._notes())
        means: list[tuple[Cell, ...]] = [
            (*self.models[m], *(self.estimate(m, c) for c in range(len(self.columns)))) for m in every
        ]
        spread: list[tuple[Cell, ...]] = [
            (*self.models[m], *map(float, self.values[:, m].std(0, ddof=1))) for m in every
        ]
        note = f"Standard deviation (ddof 1) of each column over {self.count} seeds, in percentage points."
        tables = {
            "seeds": Table("Seeds", (*NAMES, *self.columns), means, len(NAMES), notes),
            "seeds_sd": Table("Spread over seeds", (*NAMES, *self.columns), spread, len(NAMES), (note, *self._notes())),
        }
        if len(self.models) > 1:
            tables["seeds_differences"] = self._differences()
        return tables

    def _notes(self) -> tuple[str, ...]:
        notes = [f"{name}: {reason}. Left out of average and STD." for name, reason in self.lacking.items()]
        if not all(self._has_interval):
            notes.append(f"No interval where a set has fewer than {FEWEST_PAIRS} genuine or impostor pairs in a fold.")
        if self.left_out:
            notes.append(f"Left out, since not all folders have them: {', '.join(self.left_out)}.")
        return tuple(notes)

    def _differences(self) -> Table:
        order = np.argsort(-self.values[:, :, len(self.sets)].mean(0), kind="stable").tolist()
        columns = range(len(self.sets), len(self.columns))
        rows: list[tuple[Cell, ...]] = []
        for i, one in enumerate(order):
            for other in order[i + 1 :]:
                cells: list[Cell] = []
                for column in columns:
                    found = self.estimate(one, column, other)
                    cells += [found, found.excludes_zero if self._has_interval[column] else None]
                rows.append((_title(self.models[one]), _title(self.models[other]), *cells))
        header = ("Model", "minus", "Average", "Sure", *(("STD", "STD sure") if len(columns) > 1 else ()))
        note = (
            "Sure: zero is outside the interval of the difference over seeds and pairs, of the two models of each seed."
        )
        return Table("Differences over seeds", header, rows, 2, (note, METHOD, *self._notes()), is_printed=False)


def _title(key: Key) -> str:
    return " ".join(part for part in key if part != "-")


def over_both(values: np.ndarray, drawn: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval over seeds and pairs of the mean of `values` (S,), one for each seed.

    `drawn` (resamples, S) are the values on resampled pairs, the same pairs for all seeds; `t` (resamples,) is drawn
    from Student's t with S - 1 degrees of freedom. Drawing few seeds with replacement instead varies too little.
    """
    low, high = interval(drawn.mean(1) + values.std(ddof=1) / np.sqrt(len(values)) * t)
    return min(low, float(values.mean())), max(high, float(values.mean()))


def read_training(output: Path) -> Training:
    """Reads the results and scores of one evaluation; raises InputError if there are none or they are incomplete."""
    folder = output if (output / "results.json").is_file() else output / "evaluation"
    if not (folder / "results.json").is_file():
        raise InputError(f"{folder} holds no results.json: run python -m eval.evaluation --output {output} first.")
    results = read_json(folder / "results.json")
    keys = [tuple(row[name] for name in NAMES) for row in results["tables"]["accuracy"]["rows"]]
    same, distances = {}, {}
    for key in keys:
        distances[key], same = _read_scores(folder / "scores" / f"{file_name(key)}.csv")
    digests = {name: one["sha256"] for name, one in results["sets"].items()}
    return Training(folder, digests, same, dict(zip(keys, results["weights"].values(), strict=True)), distances)


def _read_scores(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the squared distances, and whether pairs are genuine, (P,) per set."""
    distances: dict[str, list[float]] = {}
    same: dict[str, list[bool]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                distances.setdefault(row["set"], []).append(float(row["squared distance"]))
                same.setdefault(row["set"], []).append(row["same"] == "1")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): run the evaluation again.") from error
    return {name: np.array(one) for name, one in distances.items()}, {name: np.array(one) for name, one in same.items()}


def _check(trainings: list[Training]) -> None:
    if len(trainings) < 2:
        raise InputError("Give the output folders of at least two seeds: one seed has no spread.")
    first = trainings[0]
    for k, one in enumerate(trainings):
        if one.digests != first.digests:
            raise InputError(
                f"{one.folder} and {first.folder} were evaluated on other pairs: seeds need the same pairs."
            )
        for before in trainings[:k]:
            for key, weights in one.weights.items():
                if before.weights.get(key) == weights:
                    raise InputError(
                        f"{before.folder} and {one.folder} hold the same weights of {_title(key)}: give two seeds."
                    )


def write_tables(outputs: list[Path], to: Path) -> None:
    """Writes and prints the tables over the trainings in `outputs`."""
    for name, table in Seeds([read_training(output) for output in outputs]).tables().items():
        for extension, text in table.forms().items():
            write_text(to / f"{name}.{extension}", text)
        if table.is_printed:
            print(table.markdown())
    print(f"Written to {to}: seeds, seeds_sd and seeds_differences as .md, .csv, .tex.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("outputs", nargs="+", type=Path, help="output folders, one for each seed")
    parser.add_argument("--to", type=Path, help="folder of the tables; by default seeds, beside the output folders")
    given = parser.parse_args()
    beside = Path(os.path.commonpath([path.absolute().parent for path in given.outputs]))
    write_tables(given.outputs, given.to or beside / "seeds")


if __name__ == "__main__":
    guarded(main)
