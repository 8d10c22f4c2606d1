"""Results over seeds: hand-computed means and deviations, the coverage of the interval, and refused folders."""

import csv
import json

import numpy as np
import pytest

from eval.seeds import Seeds, over_both, read_training, write_tables
from eval.verification import accuracy
from tests.runs import run_script
from utils.errors import InputError

GROUPS = ("A", "B")
SAME = np.arange(400) // 20 % 2 == 0
ROWS = (("specialized", "iresnet34", "teacher", "Asian"), ("-", "iresnet34", "checkpoint", "x y"))


def write_evaluation(
    folder, seed: int, apart: tuple[float, float] = (0.9, 0.5), digest: str = "d", rows=ROWS, noise=0.3, same=None
):
    """Writes what `eval.evaluation` does; returns the accuracies (sets,) by row."""
    random, found, same = np.random.default_rng(seed), {}, same or dict.fromkeys(GROUPS, SAME)
    (folder / "scores").mkdir(parents=True)
    for row, gap in zip(rows, apart, strict=False):
        distances = {n: np.clip(random.normal(1.5, noise, len(one)) - gap * one, 0, 4) for n, one in same.items()}
        found[row] = [accuracy(one, same[name]) for name, one in distances.items()]
        lines = [f"{n},{k},{int(same[n][k])},{d!r}" for n, one in distances.items() for k, d in enumerate(one.tolist())]
        name = "-".join(part for part in row if part != "-").replace(" ", "-")
        text = "\n".join(["set,pair,same,squared distance", *lines]) + "\n"
        (folder / "scores" / f"{name}.csv").write_text(text)
    names = ("Setting", "Teachers", "Kind", "Model")
    results = {
        "sets": {name: {"sha256": digest} for name in same},
        "weights": {" ".join(row): [f"{seed} {row}"] for row in found},
        "tables": {"accuracy": {"rows": [dict(zip(names, row, strict=True)) for row in found]}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return found


def test_means_deviations_and_differences_over_seeds(tmp_path, capsys):
    every = [write_evaluation(tmp_path / f"seed{k}" / "evaluation", k) for k in range(3)]
    write_tables([tmp_path / f"seed{k}" for k in range(3)], tmp_path / "to")
    assert "## Seeds" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "to").iterdir()}
    assert files == {f"{n}.{e}" for n in ("seeds", "seeds_sd", "seeds_differences") for e in ("md", "csv", "tex")}
    means, spread, differences = (
        list(csv.DictReader((tmp_path / "to" / f"{name}.csv").read_text().splitlines()))
        for name in ("seeds", "seeds_sd", "seeds_differences")
    )
    for row, mean, deviation in zip(ROWS, means, spread, strict=True):
        assert tuple(mean.values())[:4] == row
        values = np.array([one[row] for one in every])  # (seeds, sets)
        columns = {"A": values[:, 0], "B": values[:, 1], "Average": values.mean(1), "STD": values.std(1, ddof=1)}
        for name, column in columns.items():
            assert float(mean[name]) == pytest.approx(column.mean())
            assert float(deviation[name]) == pytest.approx(column.std(ddof=1))
        low, high = float(mean["Average low"]), float(mean["Average high"])
        assert low < columns["Average"].mean() < high
    (row,) = differences
    assert (row["Model"], row["minus"]) == (" ".join(ROWS[0]), "iresnet34 checkpoint x y")
    gaps = [np.mean(one[ROWS[0]]) - np.mean(one[ROWS[1]]) for one in every]
    assert float(row["Average"]) == pytest.approx(np.mean(gaps))
    assert row["Sure"] == "True"


def test_intervals_end_where_accuracies_and_an_std_end(tmp_path):
    for k, gap in enumerate((1.1, 1.6)):  # far apart, and two seeds have the widest t
        write_evaluation(tmp_path / f"seed{k}", k, (gap, gap))
    seeds = Seeds([read_training(tmp_path / f"seed{k}") for k in range(2)], resamples=200)
    assert seeds.columns == ("A", "B", "Average", "STD")
    accuracies = [seeds.estimate(0, column) for column in range(3)]
    assert all(one.high == 100 and 0 <= one.low < one.value < 100 for one in accuracies)
    std = seeds.estimate(0, 3)
    assert std.low == 0 < std.value < std.high
    write_evaluation(tmp_path / "other", 5, (0.9, 0.9))
    write_evaluation(tmp_path / "another", 6, (0.9, 0.2))
    compared = Seeds([read_training(tmp_path / name) for name in ("other", "another")], resamples=200)
    assert compared.estimate(0, 3, minus=1).low < 0  # a difference may be negative


def test_a_model_that_not_all_folders_have_is_left_out_and_named(tmp_path):
    for k, rows in enumerate((ROWS, ROWS[:1])):
        write_evaluation(tmp_path / str(k), k, rows=rows)
    found = Seeds([read_training(tmp_path / str(k)) for k in range(2)], resamples=20)
    tables = found.tables()
    assert [*tables] == ["seeds", "seeds_sd"]
    assert tables["seeds"].notes[-1] == "Left out, since not all folders have them: iresnet34 checkpoint x y."


def test_seeds_without_an_error_have_an_interval_with_a_width(tmp_path):
    """The 97.5 % quantile of Gamma(1/2) is 2.51 errors, of Gamma(1), the sum over both sets, 3.69."""
    for k in range(2):
        write_evaluation(tmp_path / str(k), k, apart=(1.0, 1.0), noise=0)
    found = Seeds([read_training(tmp_path / str(k)) for k in range(2)])
    for column, errors, pairs in ((0, 2.51, 400), (2, 3.69, 800)):
        value = found.estimate(0, column)
        assert (value.value, value.high) == (100, 100)
        assert 100 - value.low == pytest.approx(100 * errors / pairs, rel=0.2)
    spread, difference = found.estimate(0, 3), found.estimate(0, 2, 1)
    assert (spread.value, spread.low) == (0, 0) and spread.high > 0.05
    assert difference.low < -0.2 and difference.high > 0.2


def of_two_seeds(folder, same):
    every = [write_evaluation(folder / str(k), k, same=same) for k in range(2)]
    return every, Seeds([read_training(folder / str(k)) for k in range(2)], resamples=50).tables()


def test_sets_that_lack_a_kind_of_pair_are_left_out_of_averages(tmp_path):
    every, tables = of_two_seeds(tmp_path, {"A": SAME, "B": np.ones(400, bool), "C": SAME})
    cells = dict(zip(tables["seeds"].header, tables["seeds"].rows[0], strict=True))
    whole = np.array([one[ROWS[0]] for one in every])[:, [0, 2]]
    assert cells["Average"].value == pytest.approx(whole.mean())
    assert cells["STD"].value == pytest.approx(whole.std(1, ddof=1).mean())
    note = "B: 10 of 10 folds hold no impostor pair. Left out of average and STD."
    assert all(note in table.notes for table in tables.values())
    _, tables = of_two_seeds(tmp_path / "one", {"A": SAME, "B": np.ones(400, bool)})
    assert tables["seeds"].header[-1] == "Average"
    with pytest.raises(InputError, match="evaluate other sets"):
        of_two_seeds(tmp_path / "none", {"B": np.ones(400, bool)})


def test_sets_of_few_pairs_have_no_interval_and_no_verdict_over_seeds(tmp_path):
    """Twenty pairs have one genuine and one impostor pair in a fold: all resamples are the same."""
    _, tables = of_two_seeds(tmp_path, {"A": SAME, "B": np.arange(20) % 2 == 0})
    cells = dict(zip(tables["seeds"].header, tables["seeds"].rows[0], strict=True))
    assert cells["A"].low < cells["A"].high
    assert np.isnan([cells[name].low for name in ("B", "Average", "STD")]).all()
    (row,) = tables["seeds_differences"].rows
    assert row[3] is None and row[5] is None
    assert all(any("fewer than 5" in note for note in table.notes) for table in tables.values())


@pytest.mark.parametrize(("pairs", "seeds", "both"), [(0.3, 0.3, 0.1), (0.1, 0.4, 0.1), (0.3, 0.0, 0.2)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_covers_the_mean_over_seeds_and_pairs(pairs, seeds, both, count):
    """Accuracies are sums of normal errors of pairs, of seeds, and of both; 600 trials, whose error is 1 point."""
    random, covered = np.random.default_rng(count), 0
    for _ in range(600):
        values = random.normal(0, pairs) + random.normal(0, seeds, count) + random.normal(0, both, count)
        drawn = values + random.normal(0, pairs, (300, 1)) + random.normal(0, both, (300, count))
        low, high = over_both(values, drawn, random.standard_t(count - 1, 300))
        covered += low < 0 < high
    assert 0.925 <= covered / 600 <= 1


def test_bad_folders_are_refused_in_one_sentence(tmp_path, capsys):
    write_evaluation(tmp_path / "one", 0)
    write_evaluation(tmp_path / "same", 0)
    write_evaluation(tmp_path / "pairs", 1, digest="other")
    write_evaluation(tmp_path / "torn", 2)
    write_evaluation(tmp_path / "models", 3, rows=(("baseline", "x", "teacher", "quarter1"),))
    next((tmp_path / "torn" / "scores").iterdir()).write_text("set,pair\n1,2\n")
    for names, sentence in (
        (["one"], "at least two seeds"),
        (["one", "none"], "holds no results.json: run python -m eval.evaluation --output"),
        (["one", "same"], "hold the same weights of specialized iresnet34 teacher Asian: give two seeds."),
        (["one", "pairs"], "were evaluated on other pairs"),
        (["one", "torn"], "cannot be read"),
        (["one", "models"], "have no model in common"),
    ):
        run_script("eval.seeds", [str(tmp_path / name) for name in names], expect=2)
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    with pytest.raises(InputError, match="at least two seeds"):
        Seeds([read_training(tmp_path / "one")])


def test_tables_are_written_beside_the_folders(tmp_path, capsys):
    for k in range(2):
        write_evaluation(tmp_path / "out" / f"seed{k}" / "evaluation", k)
    run_script("eval.seeds", [str(tmp_path / "out" / f"seed{k}") for k in range(2)])
    assert f"Written to {tmp_path}/out/seeds: " in capsys.readouterr().out
    assert (tmp_path / "out" / "seeds" / "seeds.md").is_file()
