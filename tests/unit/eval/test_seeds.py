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
    folder, seed: int, apart: tuple[float, float] = (0.9, 0.5), digest: str = "d", rows=ROWS, noise=0.3
):
    """Writes what `eval.evaluation` does; returns the accuracies (sets,) by row."""
    random, found = np.random.default_rng(seed), {}
    (folder / "scores").mkdir(parents=True)
    for row, gap in zip(rows, apart, strict=False):
        distances = {name: np.clip(random.normal(1.5, noise, 400) - gap * SAME, 0, 4) for name in GROUPS}
        found[row] = [accuracy(one, SAME) for one in distances.values()]
        lines = [f"{n},{k},{int(SAME[k])},{d!r}" for n, one in distances.items() for k, d in enumerate(one.tolist())]
        name = "-".join(part for part in row if part != "-").replace(" ", "-")
        text = "\n".join(["set,pair,same,squared distance", *lines]) + "\n"
        (folder / "scores" / f"{name}.csv").write_text(text)
    names = ("Setting", "Teachers", "Kind", "Model")
    results = {
        "sets": {name: {"sha256": digest} for name in GROUPS},
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
