"""The papers' printed results: their consistency, and the comparison of trained models with them."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.config import Config
from eval import figures, paper, published
from eval.fairness import summary
from eval.published import PAIRS, adadistill, fairness_ocfr, mst_kd
from eval.scores import Scored
from tests.runs import GROUPS, run_script
from utils.data.synthetic import MARKER
from utils.errors import InputError

RFW = PAIRS["MST-KD"]
STUDENT = "EAF-KD SL iresnet34 specialized"
CFG = Config(data="no data", pairs="no pairs")


def scored(key, accuracies, sets=GROUPS):
    """Returns a model with these accuracies; its distances are not used."""
    return Scored(*key, dict.fromkeys(sets, np.zeros(0)), {}, tuple(accuracies), ("0" * 64,))


def as_printed(row, order=GROUPS):
    return scored(row.key, [row.accuracies[group] for group in order], order)


def compared(models, cfg=CFG, notes=()):
    return paper.compare(paper.comparable(cfg, RFW), models, cfg, notes)


def conclusions(models):
    """Returns {(conclusion, model): (printed, here)} of the iresnet34 teachers and their students."""
    table = compared(models).tables()["paper: conclusions"]
    return {(row[0], row[2]): row[3:] for row in table.rows if row[1] == "iresnet34"}


# Printed numbers ------------------------------------------------------------------------------------------------------


def test_all_forty_rows_follow_from_their_accuracies():
    rows = mst_kd()
    assert len(rows) == 40
    assert [sum(row.table == f"Table {k}" for row in rows.values()) for k in range(1, 7)] == [8, 6, 6, 8, 6, 6]
    for row in rows.values():
        values = [row.accuracies[group] for group in GROUPS]
        mean = sum(values) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        found = (mean, std, (100 - min(values)) / (100 - max(values)))
        assert found == pytest.approx((row.average, row.std, row.ser), abs=0.0051)
    off = [(name, group) for name, row in rows.items() for group in GROUPS if not is_of_6000(row.accuracies[group])]
    assert off == [("EAF-KD DLDPO iresnet50 specialized", "Asian")]


def is_of_6000(accuracy):
    return any(f"{100 * right / 6000:.2f}" == f"{accuracy:.2f}" for right in range(4000, 6001))


def test_rows_of_adadistill_follow_from_their_accuracies():
    rows = adadistill()
    whole = [row for row in rows.values() if row.average is not None]
    assert (len(rows), len(whole)) == (39, 35)
    off = [row.name for row in whole if abs(sum(row.accuracies.values()) / 5 - row.average) > 0.0101]
    assert off == ["AdaArcDistill m=0.45"]
    assert rows["AdaArcDistill"].tar[("IJB-B", "1e-5")] == 84.13
    assert "calfw" not in rows["SFTN"].accuracies


def test_published_rows_of_standalone_networks_are_read():
    rows = fairness_ocfr()
    assert [row.average for row in rows.values()] == [93.80, 94.53]


@pytest.mark.parametrize(
    ("read", "name", "line", "before", "after", "sentence"),
    [
        (mst_kd, "mst_kd.csv", 7, "89.82,78.32", "89.92,78.32", "average 85.25 does not follow"),
        (mst_kd, "mst_kd.csv", 8, "7.69", "6.66", "STD 6.66 does not follow .* give 7.68"),
        (mst_kd, "mst_kd.csv", 9, "3.46", "3.47", "SER 3.47 does not follow"),
        (mst_kd, "mst_kd.csv", 9, "92.77", "92.76", "Caucasian 92.76 is no share of 6,000 pairs"),
        (mst_kd, "mst_kd.csv", 46, "90.42", "", "could not convert"),
        (mst_kd, "mst_kd.csv", 46, ",1.51", "", "float"),
        (mst_kd, "mst_kd.csv", 8, ",Asian,", ",African,", "teacher African iresnet34 specialized stands twice|average"),
        (adadistill, "adadistill.csv", 11, "99.52", "98.52", "average 94.01 does not follow"),
        (adadistill, "adadistill.csv", 11, "94.01", "", "the average must stand where all accuracies do"),
    ],
)
def test_an_edited_file_is_refused_by_name_and_line(read, name, line, before, after, sentence, tmp_path):
    lines = (published.FOLDER / name).read_text().splitlines()
    assert before in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(before, after, 1)
    path = tmp_path / name
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"{name}, line {line}: .*({sentence}).*; restore the file"):
        read(path)


def test_a_duplicate_row_and_a_missing_column_are_refused(tmp_path):
    text = (published.FOLDER / "mst_kd.csv").read_text()
    (tmp_path / "twice.csv").write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(InputError, match="twice.csv, line 47: EAF-KD DLDPO iresnet50 baseline stands twice"):
        mst_kd(tmp_path / "twice.csv")
    (tmp_path / "without.csv").write_text(text.replace(",SER\n", ",ser\n"))
    with pytest.raises(InputError, match="without.csv, line 7: no column 'SER'"):
        mst_kd(tmp_path / "without.csv")


def test_no_printed_difference_in_std_is_larger_than_its_noise():
    """Checks the note of the table of conclusions by the delta method: d STD / d a = (a - average) / (3 STD)."""
    averages, stds = [], []
    for row in mst_kd().values():
        other = mst_kd().get(row.name.replace("specialized", "baseline"))
        if row.name.startswith("teacher") or other in (None, row):
            continue
        of_average = of_std = 0.0
        for one in (row, other):
            for value in one.accuracies.values():
                variance = value * (100 - value) / 6000
                of_average += variance / 16
                of_std += variance * ((value - one.average) / (3 * one.std)) ** 2
        averages.append((row.average - other.average) / math.sqrt(of_average))
        stds.append((row.std - other.std) / math.sqrt(of_std))
    assert len(stds) == 12
    assert (sum(z > 0 for z in averages), sum(z > 2 for z in averages)) == (11, 6)
    assert (sum(z < 0 for z in stds), sum(abs(z) > 2 for z in stds)) == (8, 0)


# Comparison -----------------------------------------------------------------------------------------------------------


def test_every_row_finds_its_model_whatever_the_order_of_the_groups():
    order = ("Indian", "African", "Caucasian", "Asian")
    models = [as_printed(row, order) for row in mst_kd().values()]
    found = compared([scored(("specialized", "iresnet100", "teacher", "Asian"), (90,) * 4, order), *reversed(models)])
    assert list(found.here) == list(mst_kd())
    for name, row in found.here.items():
        assert row.accuracies == mst_kd()[name].accuracies
        assert row.std == pytest.approx(mst_kd()[name].std, abs=0.0051)
    assert list(found.panels) == [f"Table {k} of MST-KD" for k in range(1, 7)]
    assert ("baseline", "iresnet50", "teacher", "quarter3") in {row.key for row in found.here.values()}
    assert ("baseline", "iresnet50", "a-KD", "DLDPO iresnet34") in {row.key for row in found.here.values()}


def test_cells_of_a_hand_made_model():
    row = mst_kd()[STUDENT]  # 92.12, 93.07, 95.33, 93.93
    here = (91.0, 93.2, 95.33, 95.0)
    found = compared([scored(row.key, here)], notes=("Weights of the last epoch.",))
    table = found.tables()["paper: Table 3 of MST-KD"]
    assert table.title == "Table 3 of MST-KD, as printed and here"
    assert table.header == ("Row", "Figure", *GROUPS, "Average", "STD", "SER")
    lines = {line[1]: line[2:] for line in table.rows}
    assert {line[0] for line in table.rows} == {STUDENT}
    assert lines["printed"] == (92.12, 93.07, 95.33, 93.93, 93.61, 1.36, 1.69)
    assert lines["here"] == (*here, *summary(here))
    assert lines["difference"][:5] == pytest.approx((-1.12, 0.13, 0, 1.07, 0.0225), abs=1e-9)
    assert lines["difference"][5:] == pytest.approx((summary(here)[1] - 1.36, summary(here)[2] - 1.69))
    assert lines["in standard errors"][:4] == pytest.approx((-2.2072, 0.2816, 0, 2.5637), abs=5e-5)
    of_average = math.sqrt(sum(p * (100 - p) for p in (*row.accuracies.values(), *here)) / 6000) / 4
    assert lines["in standard errors"][4] == pytest.approx(0.0225 / of_average)
    assert lines["in standard errors"][5:] == (None, None)
    assert lines["agrees"] == (False, True, True, False, True, None, None)
    assert table.notes[0] == "Weights of the last epoch."
    assert any("Of 4 accuracies here 2 agree" in note and "3.8 would" in note for note in table.notes)


def test_all_tables_are_in_one_file_of_each_form():
    found = compared([as_printed(row) for row in mst_kd().values()])
    forms = found.forms()
    assert forms["md"].count("## Table ") == 6
    assert forms["md"].count("## Conclusions of MST-KD") == 1
    assert forms["tex"].count(r"\begin{table}") == 7
    rows = list(csv.DictReader(forms["csv"].splitlines()))
    assert len(rows) == 40 * 5
    assert {row["Row"] for row in rows} == set(mst_kd())
    assert "EAF-KD DLDPO iresnet50 specialized, Asian: 91.71 as printed" in forms["md"]
    json.dumps([table.as_dict() for table in found.tables().values()])


def test_a_group_without_errors_gives_no_division_by_zero():
    row = mst_kd()[STUDENT]
    lines = compared([scored(row.key, (100.0, 93.0, 95.0, 94.0))]).tables()["paper: Table 3 of MST-KD"].rows
    assert lines[1][-1] == float("inf")
    assert lines[4][2] is False


def test_conclusions_hold_fail_or_lack_a_model():
    rows = [row for row in mst_kd().values() if row.key[1] == "iresnet34"]
    holds = conclusions([as_printed(row) for row in rows])
    assert len(holds) == 1 + 6 + 4 + 6
    assert all(cells == (True, True) for cells in holds.values())

    worse = {"teacher Asian iresnet34 specialized": (70.85, 78.0, 81.1, 79.85), STUDENT: (92.0, 80.0, 95.0, 92.0)}
    changed = conclusions([scored(row.key, worse[row.name]) if row.name in worse else as_printed(row) for row in rows])
    failed = [key for key, cells in changed.items() if cells == (True, False)]
    assert failed == [
        ("Each specialised teacher is the best of them on its own group", "teachers"),
        ("The student's average is above that of the baseline's student", "EAF-KD SL"),
        ("The student of SL has the best average of the three adaptors", "EAF-KD specialized"),
        ("The student's STD is below that of every specialised teacher", "EAF-KD SL"),
    ]

    without = conclusions([as_printed(row) for row in rows if row.name not in worse])
    left_open = [key for key, cells in without.items() if cells == (True, None)]
    assert len(left_open) == 1 + 1 + 1 + 6
    assert all(cells[1] in (True, None) for cells in without.values())


def test_conclusions_that_fail_in_the_printed_numbers():
    table = compared([as_printed(row) for row in mst_kd().values()]).tables()["paper: conclusions"]
    failed = [row[:3] for row in table.rows if row[3] is False]
    assert failed == [
        ("The student's average is above that of the baseline's student", "iresnet50", "EAF-KD DuL"),
        ("The student of SL has the best average of the three adaptors", "iresnet50", "a-KD specialized"),
    ]
    assert any("in all twelve printed comparisons" in note for note in table.notes)


def test_models_that_the_paper_does_not_print_are_named():
    standalone = scored(("standalone", "iresnet34", "teacher", "All"), (92, 93, 95, 94))
    adaptor = scored(("specialized", "iresnet34", "adaptor", "SL"), (92, 93, 95, 94))
    notes = " ".join(compared([as_printed(mst_kd()[STUDENT]), standalone, adaptor]).notes)
    assert "prints no rows of adaptors" in notes
    assert "Not in the paper: standalone iresnet34 teacher: All" in notes
    assert "African 92.20, Asian 93.02, Caucasian 95.92, Indian 94.07, average 93.80" in notes
    other = scored(("standalone", "iresnet100", "teacher", "All"), (92, 93, 95, 94))
    assert compared([as_printed(mst_kd()[STUDENT]), other]).notes[-1].endswith("on all identities without teachers.")


def test_models_without_a_row_are_not_compared():
    assert compared([scored(("specialized", "iresnet34", "adaptor", "SL"), (92, 93, 95, 94))]) is None
    assert compared([scored(("specialized", "iresnet34", "a-KD", "Asian iresnet34"), (92, 93, 95, 94))]) is None
    assert compared([scored(("", "iresnet34", "checkpoint", "x.pth iresnet34"), (92, 93, 95, 94))]) is None


@pytest.mark.parametrize(
    "pairs",
    [
        dict.fromkeys(GROUPS, 300),
        {**RFW, "Indian": 5999},
        dict.fromkeys(("A", "B", "C", "D"), 6000),
        dict.fromkeys(GROUPS[:3], 6000),
        {**RFW, "Other": 6000},
    ],
)
def test_other_sets_are_not_compared(pairs):
    assert paper.comparable(CFG, pairs) == {}
    with pytest.raises(InputError, match=r"is printed for African \(6,000 pairs\), .*, not .* set pairs"):
        paper.comparable(replace(CFG, checkpoint="x.pth", row=STUDENT), pairs)


@pytest.mark.parametrize("which", ["data", "pairs"])
def test_generated_faces_are_not_compared(which, tmp_path):
    (tmp_path / MARKER).touch()
    cfg = replace(CFG, **{which: str(tmp_path)})
    assert paper.comparable(cfg, RFW) == {}
    with pytest.raises(InputError, match="generated faces are not compared"):
        paper.comparable(replace(cfg, checkpoint="x.pth", row=STUDENT), RFW)


# A named row ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_compared_with_the_named_row():
    cfg = replace(CFG, checkpoint="x.pth", row="teacher BT-1 iresnet34 baseline")
    paper.check(cfg)
    found = compared([scored(("", "iresnet34", "checkpoint", "x.pth iresnet34"), (85, 87, 90, 88))], cfg)
    assert list(found.tables()) == ["paper: Table 1 of MST-KD"]
    assert found.tables()["paper: Table 1 of MST-KD"].is_printed


def test_a_row_of_adadistill_is_compared_on_its_five_sets():
    sets = PAIRS["AdaDistill"]
    cfg = replace(CFG, checkpoint="x.pth", row="AdaArcDistill m=0.45", pairs_sets=tuple(sets))
    paper.check(cfg)
    model = scored(("", "iresnet34", "checkpoint", "x"), (99.5, 95.0, 96.0, 95.5, 90.0), tuple(sets))
    table = paper.compare(paper.comparable(cfg, sets), [model], cfg, ()).tables()["paper: Ablation of AdaDistill"]
    assert table.header == ("Row", "Figure", *sets, "Average")
    lines = {line[1]: line[2:] for line in table.rows}
    deviation = math.sqrt((95.24 * 4.76 + 95.0 * 5.0) / 7000)  # CFP-FP has 7,000 pairs
    assert lines["in standard errors"][1] == pytest.approx(-0.24 / deviation)
    assert lines["agrees"] == (True, True, False, True, True, True)
    assert any("average: 95.47 as printed" in note for note in table.notes)
    with pytest.raises(InputError, match=r"is printed for lfw \(6,000 pairs\), cfp_fp \(7,000 pairs\)"):
        paper.comparable(cfg, {**sets, "cfp_fp": 6000})


def test_a_row_with_printed_gaps_has_dashes(tmp_path):
    sets = PAIRS["AdaDistill"]
    cfg = replace(CFG, checkpoint="x.pth", row="SFTN", pairs_sets=tuple(sets))
    model = scored(("", "iresnet34", "checkpoint", "x"), (99.5, 95.0, 96.0, 95.5, 90.0), tuple(sets))
    compared = paper.compare(paper.comparable(cfg, sets), [model], cfg, ())
    alt = figures.draw_paper(compared.panels, compared.sets, tmp_path / "paper.png")
    assert alt.endswith(
        "SFTN: "
        + ", ".join(
            f"{n} {v:.2f} and {compared.here['SFTN'].accuracies[n]:.2f}"
            for n, v in compared.printed["SFTN"].accuracies.items()
        )
        + "."
    )
    (table,) = compared.tables().values()
    assert [line[5:] for line in table.rows] == [(None,) * 3, (95.5, 90.0, pytest.approx(95.2)), *[(None,) * 3] * 3]


def test_an_unknown_row_is_refused_with_the_list_of_rows():
    cfg = replace(CFG, checkpoint="x.pth", row="EAF-KD SL iresnet34")
    with pytest.raises(InputError, match="row = 'EAF-KD SL iresnet34' is in no table. Set row to one of: ") as error:
        paper.check(cfg)
    assert str(error.value).split("one of: ")[1] == ", ".join(mst_kd()) + "."
    with pytest.raises(InputError, match="one of: ResNet50 teacher, MFN alone, .*AdaCosDistill.$"):
        paper.check(replace(cfg, pairs_sets=("lfw",)))


def test_a_row_needs_a_single_checkpoint():
    with pytest.raises(InputError, match="needs checkpoint"):
        paper.check(replace(CFG, row=STUDENT))
    with pytest.raises(InputError, match="print no results of adaptors"):
        paper.check(replace(CFG, row=STUDENT, checkpoint="x.pth", teacher=("a.pth",)))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_if_rfw(monkeypatch, printed_for_tiny):
    """Treats generated sets of 20 pairs as RFW."""
    published.fairness_ocfr()  # reads and checks the rows, once, with the real numbers of pairs
    monkeypatch.setitem(PAIRS, "MST-KD", dict.fromkeys(GROUPS, 20))


@pytest.mark.usefixtures("blank_pictures")
def test_the_evaluation_writes_tables_picture_and_report(trained, tmp_path, as_if_rfw, capsys):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    folder = output / "evaluation"
    before = {path.name for path in folder.iterdir()}
    assert not any(name.startswith("paper") for name in before)
    run_script("eval.evaluation", [*given, "--output", str(output), "--report"])
    printed = capsys.readouterr().out
    assert "## Conclusions of MST-KD" in printed
    assert "paper.md, .csv, .tex" in printed
    new = {path.name for path in folder.iterdir()} - before
    assert new == {*(f"paper.{extension}" for extension in ("md", "csv", "tex", "png", "svg", "pdf")), "report.html"}
    rows = list(csv.DictReader((folder / "paper.csv").read_text().splitlines()))
    accuracy = list(csv.DictReader((folder / "accuracy.csv").read_text().splitlines()))
    here = {row["Row"]: row for row in rows if row["Figure"] == "here"}
    assert len(here) == 4 + 1 + 2  # teachers of both settings, students of SL and of DLDPO
    (student,) = (row for row in accuracy if row["Kind"] == "a-KD" and row["Model"] == "SL iresnet_tiny")
    columns = (*GROUPS, "Average", "STD", "SER")
    assert [here["a-KD SL iresnet_tiny specialized"][name] for name in columns] == [student[name] for name in columns]
    text = (folder / "paper.md").read_text()
    assert "The paper prints no rows of adaptors" in text
    assert "Table 1 of MST-KD" in json.dumps(json.loads((folder / "results.json").read_text())["tables"])
    page = (folder / "report.html").read_text()
    assert "Conclusions of MST-KD" in page
    assert "Printed accuracies and those here" in page
    assert (folder / "paper.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("blank_pictures")
def test_an_evaluation_without_a_row_removes_the_old_comparison(trained, tmp_path, monkeypatch, as_if_rfw):
    cfg, given = trained
    student = str(cfg.network_dir / "students" / "iresnet_tiny" / "SL-a-KD" / "best_backbone.pth")
    command = [*given, "--output", str(tmp_path), "--checkpoint", student]
    run_script("eval.evaluation", [*command, "--row", "a-KD SL iresnet_tiny specialized"])
    (folder,) = Path(tmp_path, "evaluation").iterdir()
    assert (folder / "paper.md").read_text().startswith("## Table 2 of MST-KD, as printed and here")
    assert (folder / "paper.png").is_file()
    run_script("eval.evaluation", command)
    assert not list(folder.glob("paper*"))


def test_bad_rows_are_refused_in_one_sentence(trained, tmp_path, capsys):
    cfg, given = trained
    student = str(cfg.network_dir / "students" / "iresnet_tiny" / "SL-a-KD" / "best_backbone.pth")
    command = [*given, "--output", str(tmp_path)]
    for options, sentence in (
        (["--row", STUDENT], "needs checkpoint"),
        (["--checkpoint", student, "--row", "SL"], "row = 'SL' is in no table. Set row to one of: teacher African"),
        (["--checkpoint", student, "--row", STUDENT], "generated faces are not compared"),
    ):
        run_script("eval.evaluation", [*command, *options], expect=2)
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
