"""The tables of results, checked cell by cell on hand-made distances, and what they omit for other sets."""

from dataclasses import replace

import numpy as np
import pytest

from eval import rates
from eval.results import Results
from eval.scores import Scored
from eval.uncertainty import by_chance
from eval.verification import accuracy
from utils.tables import Estimate

GROUPS = ("A", "B")
SAME = {name: np.arange(4000) // 200 % 2 == 0 for name in GROUPS}


def scored(name, seed, apart):
    random = np.random.default_rng(seed)
    distances = {
        group: np.clip(random.normal(1.5, 0.25, 4000) - gap * SAME[group], 0, 4) for group, gap in apart.items()
    }
    samples = {group: random.normal(size=(50, 8)).astype(np.float32) for group in GROUPS}
    samples = {group: values / np.linalg.norm(values, axis=1, keepdims=True) for group, values in samples.items()}
    accuracies = tuple(100 * rates.threshold_of_best_accuracy({g: (distances[g], SAME[g])})[1] for g in GROUPS)
    return Scored("specialized", "iresnet34", "teacher", name, distances, samples, accuracies, ("0" * 64,))


@pytest.fixture(scope="module")
def results():
    return Results(
        [scored("fair", 1, {"A": 0.8, "B": 0.8}), scored("unfair", 2, {"A": 1.0, "B": 0.4})], SAME, True, ("Note.",)
    )


def cells(table):
    """Returns {column: cell} for each model."""
    return {row[table.names - 1]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_every_table_has_the_right_numbers_in_its_columns(results):
    tables = results.tables()
    assert list(tables) == [
        "accuracy",
        "intervals",
        "chance",
        "differences",
        "rates_FMR_0.01",
        "rates_FMR_0.001",
        "rates_best_accuracy",
        "impostors",
    ]
    assert all(table.notes[0] == "Note." for table in tables.values())
    assert all(len(set(table.header)) == len(table.header) for table in tables.values())
    for m, model in enumerate(results.models):
        accuracy, chance = cells(tables["accuracy"])[model.name], cells(tables["chance"])[model.name]
        assert (accuracy["A"], accuracy["B"]) == model.accuracies
        assert accuracy["STD"] == pytest.approx(np.std(model.accuracies, ddof=1))
        assert accuracy["Within chance"] is (model.name == "fair")
        assert chance["STD 95 of 100"] == by_chance(round(np.mean(model.accuracies), 2), (4000, 4000)).std_95
        assert chance["AVG - STD"] == pytest.approx(np.mean(model.accuracies) - np.std(model.accuracies, ddof=1))
        interval = cells(tables["intervals"])[model.name]["B"]
        assert (interval.low, interval.high) == tuple(results.intervals[m, 1])
        assert interval.low < interval.value < interval.high

        groups = {name: (model.distances[name], SAME[name]) for name in GROUPS}
        for name, threshold in (
            ("FMR_0.01", rates.threshold_at_fmr(groups, 0.01)),
            ("FMR_0.001", rates.threshold_at_fmr(groups, 0.001)),
            ("best_accuracy", rates.threshold_of_best_accuracy(groups)[0]),
        ):
            found, row = rates.error_rates(groups, threshold), cells(tables[f"rates_{name}"])[model.name]
            assert row["Threshold"] == threshold
            for group in GROUPS:
                assert (row[f"FMR {group}"], row[f"FNMR {group}"]) == (found[group].fmr, found[group].fnmr)
            assert (row["FDR"], row["IR"], row["GARBE"]) == (
                rates.fdr(found),
                rates.inequity_rate(found),
                rates.garbe(found),
            )
            assert row["max/geomean FMR"] == rates.max_fmr_over_geometric_mean(found)
    (row,) = tables["differences"].rows
    averages = [np.mean(model.accuracies) for model in results.models]
    assert row[0] == results.models[int(np.argmax(averages))].title
    assert isinstance(row[2], Estimate)
    assert row[2].value == pytest.approx(max(averages) - min(averages))
    assert row[5] is True  # one model is fair, the other is not
    impostors = [row for row in tables["impostors"].rows if row[0] == results.models[1].title]
    assert [row[2] for row in impostors] == list(GROUPS)
    assert impostors[0][4] == impostors[1][3]
    assert impostors[0][4].of == 50 * 50


def test_a_set_of_one_kind_of_pair_has_accuracies_and_no_error_rates():
    same = {"A": SAME["A"], "B": np.ones(4000, bool)}
    results = Results([scored("one", 1, {"A": 0.8, "B": 0.8})], same, True)
    assert results.of_one_kind == ["B"]
    assert list(results.tables()) == ["accuracy", "intervals", "chance"]


def test_sets_that_are_not_groups_have_no_std():
    results = Results([scored("one", 1, {"A": 0.8, "B": 0.8})], SAME, False)
    tables = results.tables()
    assert list(tables) == ["accuracy", "intervals"]
    assert tables["accuracy"].header[4:] == ("A", "B", "Average")


def test_a_collapsed_model_has_a_note_and_no_verdict_of_fairness(results):
    fair, _ = results.models
    point = replace(fair, name="point", distances={name: one / 1000 for name, one in fair.distances.items()})
    point = replace(point, accuracies=tuple(accuracy(point.distances[name], SAME[name]) for name in GROUPS))
    table = Results([fair, point], SAME, True).tables()["accuracy"]
    assert cells(table)["fair"]["Within chance"] is True
    assert cells(table)["point"]["Within chance"] is None
    (note,) = (note for note in table.notes if "collapsed" in note)
    assert note.startswith("specialized iresnet34 teacher: point is collapsed")
    best = rates.threshold_of_best_accuracy({"B": (fair.distances["B"], SAME["B"])})[1]
    assert f"accuracy 50.00, {100 * best:.2f})" in note
