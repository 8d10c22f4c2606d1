"""The report: the three sentences on hand-made accuracies, definitions, links, and what the page does not tell."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.config import Config
from eval import acquisition, attributes, calibration, paper, report
from eval.answer import answer
from eval.audit import Audit
from eval.definitions import DEFINITIONS, Definition, anchors, defined
from eval.indices import INDICES, definitions
from eval.pictures import Picture
from eval.published import PAIRS as PRINTED
from eval.published import mst_kd
from eval.results import Results
from eval.scores import Scored
from eval.seeds import Seeds, Training
from eval.uncertainty import by_chance
from tests.runs import ROOT
from utils.prepare.acquisition import write
from utils.tables import Table

PAIRS = 2000
GROUPS = ("A", "B", "C")
NAMES_ONLY = {
    *("Setting", "Teachers", "Kind", "Model", "minus", "Row"),  # which model
    *("Conclusion", "Of"),  # sentences
    *definitions().header,
}
"""Headers that need no definition: their cells are names or sentences."""

SAME = {name: np.arange(PAIRS) // 100 % 2 == 0 for name in GROUPS}


def scored(name: str, errors: dict[str, int]) -> Scored:
    """Returns a model that decides all but `errors` genuine pairs of each set correctly."""
    distances = {}
    for group, count in errors.items():
        distances[group] = np.where(SAME[group], 0.5, 2.0)
        # As many wrong pairs in each fold as possible, so that the best threshold is the same in all.
        distances[group][np.flatnonzero(SAME[group])[:: PAIRS // 2 // max(count, 1)][:count]] = 3.0
    accuracies = tuple(100 - 100 * count / PAIRS for count in errors.values())
    samples = {group: np.eye(4, dtype=np.float32) for group in errors}
    return Scored("specialized", "iresnet34", "teacher", name, distances, samples, accuracies, (name,))


def results(*errors: dict[str, int], of_groups: bool = True) -> Results:
    return Results([scored(f"m{k}", one) for k, one in enumerate(errors)], SAME, of_groups)


def test_an_unfair_model_is_named_with_its_worst_group_gap_and_chance():
    found = results({"A": 20, "B": 100, "C": 10}, {"A": 90, "B": 100, "C": 110})
    who, how_much, chance = answer(found)
    assert who == (
        "Worst off is B: specialized iresnet34 teacher: m0, the model of the best average, decides 95.00 % of its "
        "pairs correctly, the least of all groups; the same holds for 1 of all 2 models."
    )
    gap = found.gap(0, 1, 2)
    assert gap.value == pytest.approx(4.5)
    assert 3.3 < gap.low < 4.5 < gap.high < 5.7
    assert how_much == (
        f"That is 4.50 points below C, the best-off group (95 % interval {gap.low:.2f} to {gap.high:.2f}, for these "
        "two, which were chosen as the extremes), and 10.00 times as many errors."
    )
    limit = by_chance(97 + 5 / 6, (PAIRS,) * 3)
    assert chance == (
        f"This is more than chance: of 100 perfectly fair models of the same average, 95 have an STD up to "
        f"{limit.std_95:.2f} and 95 an SER up to {limit.ser_95:.2f} on as many independent pairs; this one has "
        f"{np.std([99, 95, 99.5], ddof=1):.2f} and 10.00; more than chance is seen in 1 of 2 models."
    )


def test_a_single_model_within_chance_with_a_group_without_errors():
    who, how_much, chance = answer(results({"A": 1, "B": 2, "C": 0}))
    assert who.startswith("Worst off is B: specialized iresnet34 teacher: m0 decides 99.90 % of its pairs correctly")
    assert who.endswith("the least of all groups.")
    assert how_much.endswith("and errors where C has none.")
    assert chance.startswith("This can be chance: ")
    assert "SER up to infinity" in chance
    assert chance.endswith("and infinity.")


def test_groups_that_are_equally_bad_or_all_equal():
    assert answer(results({"A": 50, "B": 50, "C": 0}))[0].startswith("Worst off are A and B: ")
    who, how_much, chance = answer(results({"A": 0, "B": 0, "C": 0}))
    assert who == (
        "No group is worse off than another: specialized iresnet34 teacher: m0 decides 100.00 % of the pairs of each "
        "group correctly."
    )
    assert how_much == "The difference between the groups' accuracies is 0.00 points."
    low = 100 * 0.025 ** (1 / PAIRS)  # Clopper and Pearson, of no error
    assert chance == (
        "Equal accuracies do not prove that the model is fair: each is known only within its 95 % interval, and these "
        f"reach from {low:.2f} to 100.00 %."
    )
    assert answer(results({"A": 50, "B": 50, "C": 50}, {"A": 90, "B": 100, "C": 300}))[2].endswith(
        " %; more than chance is seen in 1 of 2 models."
    )


def test_of_a_collapsed_model_nothing_follows():
    one = scored("point", {"A": 0, "B": 0, "C": 0})
    one = replace(one, distances={name: np.full(PAIRS, 1.0) for name in GROUPS}, accuracies=(50.0, 50.0, 50.0))
    chance = answer(Results([one], SAME, True))[2]
    assert chance.startswith("The model is collapsed (see the note under the accuracies)")


def test_a_single_set_is_not_said_to_be_no_group():
    one = scored("m0", {"A": 20})
    for of_groups in (True, False):
        sentences = answer(Results([one], {"A": SAME["A"]}, of_groups))
        assert sentences[1:] == (
            "There is one set of pairs and nothing to compare it with: it does not tell who is worse off.",
        )


def test_sets_that_are_not_groups_answer_nothing_about_fairness():
    sentences = answer(results({"A": 20, "B": 100, "C": 10}, of_groups=False))
    assert sentences[1] == "Its lowest accuracy is 95.00 %, on B."
    sentence = "These sets are not groups of people: their accuracies do not tell whether the model is fair."
    assert sentences[2] == sentence


def test_a_column_is_defined_by_its_first_words():
    assert defined("FMR African", DEFINITIONS) == "FMR"
    assert defined("STD by chance", DEFINITIONS) == "STD by chance"
    assert defined("STDs", DEFINITIONS) is None
    assert defined("Threshold from", DEFINITIONS) == "Threshold from"
    assert anchors(("Model", "Asian", "Indian *", "SER"), ["Asian", "Indian"], DEFINITIONS) == {
        "Asian": "definition-accuracy",
        "Indian *": "definition-accuracy",
        "SER": "definition-ser",
    }


def every_table(tmp_path) -> dict[str, Table]:
    """Returns all tables that an evaluation can write, by the module of eval that makes them."""
    found = results({"A": 20, "B": 100, "C": 10}, {"A": 9, "B": 10, "C": 11})
    write(tmp_path, ["A/1.jpg", "B/1.jpg"], {"A/1.jpg"})
    gender = {name: {"gender": np.full(PAIRS, "f", object)} for name in GROUPS}
    row = next(iter(mst_kd().values()))
    compared = paper.Comparison({"one": row, "two": row}, {"one": row}, ())
    distances = {("s", "t", "k", one.name): one.distances for one in found.models}
    trained = [
        Training(Path(str(seed)), {}, SAME, {key: [f"{key[-1]} {seed}"] for key in distances}, distances)
        for seed in (0, 1)
    ]
    return {
        "results": found.tables(),
        "audit": {name: table for name, table in Audit(found).tables().items() if name != "definitions"},
        "indices": {"definitions": definitions()},
        "attributes": {"attributes": attributes.table(found, gender)},
        "acquisition": {"acquisition": acquisition.table(tmp_path, ["A", "B"], ())},
        "calibration": {"corrections": calibration.table(found, dict.fromkeys(GROUPS, np.empty(0, np.int64)))},
        "paper": compared.tables(),
        "seeds": Seeds(trained, resamples=10).tables(),
    }


def test_every_column_of_every_table_has_a_definition(tmp_path):
    by_module = every_table(tmp_path)
    writing = {path.stem for path in (ROOT / "eval").glob("*.py") if " Table(" in path.read_text(encoding="utf-8")}
    assert writing == by_module.keys(), "add the tables of the new module above"
    for tables in by_module.values():
        for name, table in tables.items():
            assert table.rows, name
            known = anchors(table.header, [*GROUPS, *PRINTED["MST-KD"]], DEFINITIONS).keys() | NAMES_ONLY
            assert known >= {*table.header}, (name, {*table.header} - known)


def test_the_docs_name_every_file_in_one_table(tmp_path):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    files = page.split("## All files")[1].split("\n## ")[0]
    for tables in every_table(tmp_path).values():
        for name in tables:
            assert re.search(rf"`(seeds/)?{re.escape(name.split(':')[0])}`", files), name


def test_an_index_is_defined_once():
    for name, index in INDICES.items():
        text = DEFINITIONS[name].text
        assert text.lower().startswith(index.definition.lower()) and index.least in text
        assert (DEFINITIONS[name].fair, DEFINITIONS[name].source) == (index.fair, index.source)


@pytest.fixture
def page(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    pictures = [
        Picture("One", "", tmp_path / "a.png", 'A 99.00, "B" 95.00.'),
        *(Picture("Several", f"model {k}", tmp_path / "a.png", f"alt {k}") for k in range(2)),
    ]
    tables = {
        "new": Table("New & own", ("Model", "GARBE [0]", "Own"), [("m", 0.25, 1.0)], 1, ("A note.",), is_printed=False),
        "main": Table("Main", ("Model", "A", "STD"), [("m", 99.0, None)], 1),
    }
    cfg = Config(data="/home/me/BUPT", pairs="/home/me/RFW", output="/home/me/run7", cache="/home/me/c", lr=0.2)
    terms = {**DEFINITIONS, "Own": Definition("Something <new>.", "1", "us")}
    return report.page(("An STD & more.",), tables, pictures, cfg, GROUPS, ("Generated.",), terms)


def test_the_page_begins_with_the_answer_and_orders_its_sections(page):
    places = [page.index(part) for part in ("<h1>", 'class="answer"', "<p>Generated.</p>", "<nav", "<main>")]
    assert places == sorted(places)
    assert re.findall(r"<h2>(.+?)</h2>", page) == ["Main", "One", "New &amp; own", "Several", "Definitions"]
    assert 'An <a href="#definition-std">STD</a> &amp; more.' in page


def test_tables_of_any_kind_link_to_definitions_of_which_only_the_used_ones_are_shown(page):
    assert '<a href="#definition-garbe">GARBE [0]</a>' in page
    assert '<dt id="definition-own">Own</dt><dd>Something &lt;new&gt;. Fair: 1. Source: us.</dd>' in page
    assert re.findall(r'<dt id="definition-([^"]+)"', page) == ["accuracy", "std", "garbe", "own"]
    assert {*re.findall(r'href="#([^"]+)"', page)} <= {*re.findall(r' id="([^"]+)"', page)}


def test_pictures_have_their_numbers_as_text(page):
    assert 'alt="A 99.00, &quot;B&quot; 95.00."' in page
    assert page.count("<figcaption>") == 2
    assert page.count('src="data:image/png;base64,cG5n"') == 3


def test_the_page_names_no_path_of_the_machine_and_needs_no_network(page):
    assert "/home/me" not in page
    assert "Evaluation of run7" in page
    assert "settings: --data BUPT --pairs RFW --lr 0.2." in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "@import" not in page
    assert "url(" not in page
