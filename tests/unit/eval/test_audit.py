"""The tables of the audit, cell by cell from hand-made distances, and the failures to acquire."""

from dataclasses import replace

import numpy as np
import pytest

from eval import acquisition, rates
from eval.audit import Audit
from eval.indices import INDICES, d_prime, ks_distance
from eval.intervals import Sampled
from eval.operating import Identified, at
from eval.results import Results
from tests.unit.eval.test_results import GROUPS, SAME, scored
from utils.errors import InputError
from utils.prepare.acquisition import read, write
from utils.tables import Estimate, Rate


@pytest.fixture(scope="module")
def results():
    models = [scored("fair", 1, {"A": 0.8, "B": 0.8}), scored("unfair", 2, {"A": 1.0, "B": 0.4})]
    return Results(models, SAME, True, ("Note.",))


def test_one_threshold_is_that_of_all_pairs(results):
    table, model = Audit(results).tables()["one_threshold"], results.models[1]
    threshold = table.rows[1][4]
    right = [(model.distances[name] < threshold) == SAME[name] for name in GROUPS]
    assert table.rows[1][5:] == pytest.approx((100 * right[0].mean(), 100 * right[1].mean(), 100 * np.mean(right)))


def test_operating_points_have_their_rates_and_ratios(results):
    table = Audit(results, "A", 1.0).tables()["operating"]
    model = results.models[1]
    groups = {name: (model.distances[name], SAME[name]) for name in GROUPS}
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows if row[3] == "unfair"]
    for row in rows:
        found = at(groups, row["Threshold"], Identified(SAME, {}))
        name = row["Group"].split()[0]
        assert (row["FMR"], row["FNMR"]) == (found[name].fmr.estimate, found[name].fnmr.estimate)
        expected = None if name == "A" else found[name].fnmr.over(found["A"].fnmr)
        assert row["FNMR / reference"] == expected
    assert {row["Threshold"] for row in rows if row["Threshold from"] == "given"} == {1.0}
    assert {row["Group"] for row in rows} == {"A (reference)", "B"}
    note = (
        "Too few impostor pairs for: reference group at FMR 0.001, worst group at FMR 0.001, all groups at FMR 0.0001, "
    )
    assert table.notes[-1].startswith(note)
    assert table.notes[-1].endswith(
        ". The impostor pairs needed for a threshold are 3,000 for FMR 0.001, 30,000 for FMR 0.0001."
    )
    assert any("since the identities are not known" in note for note in table.notes)


def every(step):
    """Returns the results of one model on every `step`-th pair."""
    one = scored("short", 1, {"A": 0.8, "B": 0.8})
    one = replace(one, distances={name: one.distances[name][::step] for name in GROUPS})
    return Results([one], {name: labels[::step] for name, labels in SAME.items()}, True)


def test_a_threshold_that_no_pair_resolves_is_said_with_the_pairs_that_it_needs():
    operating = Audit(every(20)).tables()["operating"]
    assert not operating.rows
    assert operating.notes[-1] == (
        "The impostor pairs needed for a threshold are 300 for FMR 0.01, 3,000 for FMR 0.001, 30,000 for FMR 0.0001; "
        "there are 200: give one with --threshold."
    )
    assert {row[4] for row in Audit(every(20), threshold=1.0).tables()["operating"].rows} == {"given"}


def test_few_pairs_get_thresholds_at_a_larger_rate():
    results = every(5)  # 400 impostor pairs of each group
    operating = Audit(results, "B").tables()["operating"]
    assert {row[4] for row in operating.rows} == {f"{who} at FMR 0.01" for who in ("all groups", "B", "worst group")}
    rates = results.tables()["rates_FMR_0.001"]
    assert rates.notes[-1] == "A dash: 3,000 impostor pairs are needed to set this threshold."
    assert not any("A dash" in note for note in results.tables()["rates_FMR_0.01"].notes)


def test_a_single_set_is_compared_with_nothing():
    same = {"A": SAME["A"]}
    one = scored("one", 1, {"A": 0.8, "B": 0.8})
    one = replace(one, distances={"A": one.distances["A"]}, accuracies=one.accuracies[:1])
    tables = Audit(Results([one], same, False), threshold=1.0).tables()
    assert list(tables) == ["one_threshold", "operating", "score_shifts"]
    assert [row[4] for row in tables["operating"].rows] == ["FMR 0.01", "given"]
    for table in tables.values():
        text = table.markdown()
        assert "reference" not in text and "groups" not in text
        assert all(len(row) == len(table.header) for row in table.rows)


def test_the_reference_is_the_best_group_unless_named(results):
    table = Audit(results).tables()["score_shifts"]
    reference = {row[3]: row[4] for row in table.rows if "reference" in row[4]}
    assert reference["unfair"] == "A (reference)"
    with pytest.raises(InputError, match="reference_group = 'D'"):
        Audit(results, "D")


def test_score_shifts_are_the_plain_moments(results):
    model = results.models[0]
    found = {
        row[4].split()[0]: row[5:] for row in Audit(results, "B").tables()["score_shifts"].rows if row[3] == "fair"
    }
    scores = {name: 1 - model.distances[name] / 4 for name in GROUPS}
    genuine, impostor = scores["A"][SAME["A"]], scores["A"][~SAME["A"]]
    moments = (genuine.mean(), genuine.std(ddof=1), impostor.mean(), impostor.std(ddof=1))
    ks = ks_distance(genuine, scores["B"][SAME["B"]]), ks_distance(impostor, scores["B"][~SAME["B"]])
    assert found["A"] == pytest.approx((d_prime(genuine, impostor), *moments, *ks))
    assert found["B"][5:] == (None, None)


def test_every_index_is_in_its_column(results):
    tables = Audit(results).tables()
    table, model = tables["indices"], results.models[1]
    rows = {row[4]: dict(zip(table.header, row, strict=True)) for row in table.rows if row[3] == "unfair"}
    groups = {name: (model.distances[name], SAME[name]) for name in GROUPS}
    found = rates.error_rates(groups, results.shared[1]["FMR 0.01"])
    assert rows["FMR 0.01"]["WERM [1]"] == INDICES["WERM"].of_rates(found, 0.01)
    assert rows["FMR 0.01"]["MAPE [0]"] == INDICES["MAPE"].of_rates(found, 0.01)
    assert rows["best accuracy"]["MAPE [0]"] is None
    assert rows["all"]["SFI [1]"] < 1 and rows["FMR 0.01"]["SFI [1]"] is None
    fair = next(row for row in table.rows if row[3] == "fair")
    assert fair[table.header.index("SFI [1]")] > rows["all"]["SFI [1]"]
    assert [row[0] for row in tables["definitions"].rows] == list(INDICES)


def test_identities_are_said_to_be_known(results):
    names = {"A": np.array([[f"{k}", f"{k}" if same else f"{k} other"] for k, same in enumerate(SAME["A"])]), "B": None}
    known = Results(results.models[:1], SAME, True, (), names)
    notes = Audit(known).tables()["operating"].notes
    assert any("identities of A that pairs share" in note for note in notes)
    assert "Pairs instead of identities for B." in known.tables()["intervals"].notes[0]


def test_failures_to_acquire_are_counted_by_group(tmp_path):
    assert acquisition.table(tmp_path, ["A"], ()) is None
    other = "acquisition.csv counts images of A, B, not of these sets."
    paths = [*(f"A/{k}.jpg" for k in range(200)), *(f"B/x/{k}.jpg" for k in range(50)), "loose.jpg"]
    write(tmp_path, paths, {"A/3.jpg", "A/4.jpg", "A/5.jpg", "B/x/1.jpg"})
    assert read(tmp_path / "acquisition.csv") == {"": (1, 0), "A": (200, 3), "B": (50, 1)}
    table = acquisition.table(tmp_path, ["A", "B", "C"], ("Note.",))
    low, high = Sampled(Rate(3, 200)).interval
    assert table.rows[0] == ("A", "200", Rate(3, 200), Estimate(0.015, low, high))
    assert [row[0] for row in table.rows] == ["A", "B"]
    assert table.notes[:2] == ("Note.", "acquisition.csv has no count of C.")
    assert len(acquisition.table(tmp_path, ["A", "B"], ()).notes) == 1
    assert acquisition.table(tmp_path, ["C"], ()).notes == (other,)
    for text, sentence in (
        ("group,images\n", "must have the columns group,images,failed"),
        ("group,images,failed\nA,3,4\n", "line 2: expected"),
        ("group,images,failed\nA,3,-1\n", "line 2: expected"),
        ("", "cannot be read"),
    ):
        (tmp_path / "acquisition.csv").write_text(text)
        with pytest.raises(InputError, match=sentence):
            read(tmp_path / "acquisition.csv")
