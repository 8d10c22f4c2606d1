"""The tables of results, checked cell by cell on hand-made distances, and what they omit for other sets."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eval import rates
from eval.answer import answer
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
        assert chance["STD 95 of 100"] == by_chance(float(np.mean(model.accuracies)), (4000, 4000)).std_95
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
    assert not any("RFW" in note for note in tables["impostors"].notes)


def test_impostors_of_rfw_are_said_to_be_hard():
    rfw = Results([scored("one", 1, {"A": 0.8, "B": 0.8})], SAME, True, of_rfw=True)
    assert "own impostor pairs, which RFW selected to be hard." in " ".join(rfw.tables()["impostors"].notes)


def test_a_set_of_one_kind_of_pair_has_accuracies_and_no_error_rates():
    same = {"A": SAME["A"], "B": np.ones(4000, bool)}
    results = Results([scored("one", 1, {"A": 0.8, "B": 0.8})], same, True)
    assert results.of_one_kind == ["B"]
    tables = results.tables()
    assert list(tables) == ["accuracy", "intervals"]
    assert tables["accuracy"].header[4:] == ("A", "B *", "Average")
    assert answer(results)[1] == (
        "Only A holds genuine and impostor pairs in every fold: its accuracy does not tell whether the model is fair."
    )


def test_a_set_without_both_kinds_in_every_fold_is_marked_and_left_out_of_averages():
    labels = SAME["A"].copy()
    labels[:400] = True  # the first of ten folds holds no impostor pair
    same = {**SAME, "C": labels}
    models = [scored("one", 1, {"A": 0.8, "B": 0.6}), scored("two", 2, {"A": 0.7, "B": 0.7})]
    with_c = [
        replace(
            one,
            distances={**one.distances, "C": one.distances["A"]},
            samples={**one.samples, "C": one.samples["A"]},
            accuracies=(*one.accuracies, 30.0),
        )
        for one in models
    ]
    results, without = Results(with_c, same, True), Results(models, SAME, True)
    assert results.lacking == {"C": "1 of 10 folds hold no impostor pair"} and without.lacking == {}
    tables, expected = results.tables(), without.tables()
    note = "* C: 1 of 10 folds hold no impostor pair. Left out of averages, STD and SER."
    for name in ("accuracy", "intervals", "chance", "differences"):
        assert tables[name].notes[-1] == note
        for found, row in zip(tables[name].rows, expected[name].rows, strict=True):
            found = dict(zip(tables[name].header, found, strict=True))
            marked = found.pop("C *", None)
            assert found == dict(zip(expected[name].header, row, strict=True))
            assert marked is None or (marked if name == "accuracy" else marked.value) == 30.0
    assert tables["accuracy"].header[4:8] == ("A", "B", "C *", "Average")


def few(pairs):
    """Results of two models on sets of so many pairs of each group, alternately genuine and impostor."""
    same = {name: np.arange(pairs) % 2 == 0 for name in GROUPS}
    models = [scored("one", 1, {"A": 0.8, "B": 0.8}), scored("two", 2, {"A": 1.0, "B": 0.4})]
    return Results(
        [replace(one, distances={n: 1.0 - 0.9 * same[n] for n in GROUPS}, accuracies=(100.0, 95.0)) for one in models],
        same,
        True,
    )


@pytest.mark.parametrize("pairs", [20, 40, 80, 98])
def test_few_pairs_have_no_interval_and_no_verdict(pairs):
    tables = few(pairs).tables()
    for row in tables["accuracy"].rows:
        assert row[-1] is None and row[4:7] == (100.0, 95.0, 97.5)
    for row in tables["intervals"].rows:
        assert all(np.isnan((cell.low, cell.high)).all() for cell in row[4:])
    assert {row[k] for row in tables["differences"].rows for k in (3, 5)} == {None}
    assert {row[k] for row in tables["chance"].rows for k in (6, 7, 9)} == {None}
    assert "| 100.00 | 95.00 |" in tables["intervals"].markdown() and "nan" not in tables["intervals"].markdown()
    assert json.dumps(tables["intervals"].as_dict(), allow_nan=False)
    for name in ("accuracy", "intervals", "chance", "differences"):
        assert "fewer than 5 genuine or impostor pairs in a fold: A, B." in tables[name].notes[-1]


def test_a_hundred_pairs_are_enough():
    tables = few(100).tables()
    assert all(isinstance(row[-1], bool) for row in tables["accuracy"].rows)
    assert not any(np.isnan(cell.low) for row in tables["intervals"].rows for cell in row[4:])
    assert not any("No interval" in note for note in tables["accuracy"].notes)


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


def test_the_interval_of_a_model_without_errors_has_a_width():
    """With no error in 4,000 pairs the exact interval ends at 1 - 0.025 ** (1 / 4000): Clopper and Pearson."""
    models = [replace(scored("one", 1, {"A": 9.0, "B": 9.0}), accuracies=(100.0, 100.0))]
    models = [replace(one, distances={name: 1.0 - 0.9 * SAME[name] for name in GROUPS}) for one in models]
    results = Results(models, SAME, True)
    low, high = results.intervals[0, 0]
    assert low == pytest.approx(100 * 0.025 ** (1 / len(SAME["A"])), abs=1e-6) and high == 100.0
    row = cells(results.tables()["intervals"])["one"]
    assert (row["Average"].low, row["Average"].high) == pytest.approx((100 - 100 * 3.6888795 / 8000, 100))
    assert (row["STD"].low, row["STD"].value) == (0, 0) and 0.01 < row["STD"].high < 0.1
    gap = results.gap(0, 0, 1)
    assert (gap.low, gap.high) == pytest.approx((low - 100, 100 - low))


def test_a_difference_of_two_models_without_errors_is_not_known_to_be_zero():
    perfect = {name: 1.0 - 0.9 * SAME[name] for name in GROUPS}
    one = replace(scored("one", 1, {"A": 9.0, "B": 9.0}), accuracies=(100.0, 100.0), distances=perfect)
    (row,) = Results([one, replace(one, name="two")], SAME, True).tables()["differences"].rows
    difference, sure, of_std, std_sure = row[2:]
    assert (difference.value, of_std.value, sure, std_sure) == (0, 0, False, False)
    assert (difference.low, difference.high) == pytest.approx((-100 * 3.6888795 / 8000, 100 * 3.6888795 / 8000))
    assert of_std.low < -0.01 and of_std.high > 0.01
