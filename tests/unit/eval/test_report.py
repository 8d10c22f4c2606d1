"""The report: the three sentences on hand-made accuracies, definitions, links, and what the page does not tell."""

import re

import numpy as np
import pytest

from config.config import Config
from eval import report
from eval.answer import answer
from eval.definitions import DEFINITIONS, Definition, anchors, defined
from eval.pictures import Picture
from eval.results import Results
from eval.scores import Scored
from eval.uncertainty import by_chance
from utils.tables import Table

PAIRS = 2000
GROUPS = ("A", "B", "C")
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
    assert chance.startswith("This can be chance")


def test_sets_that_are_not_groups_answer_nothing_about_fairness():
    sentences = answer(results({"A": 20, "B": 100, "C": 10}, of_groups=False))
    assert sentences[1] == "Its lowest accuracy is 95.00 %, on B."
    sentence = "These sets are not groups of people: their accuracies do not tell whether the model is fair."
    assert sentences[2] == sentence


def test_a_column_is_defined_by_its_first_words():
    assert defined("FMR African", DEFINITIONS) == "FMR"
    assert defined("STD by chance", DEFINITIONS) == "STD by chance"
    assert defined("STDs", DEFINITIONS) is None
    assert anchors(("Model", "Asian", "SER"), ["Asian"], DEFINITIONS) == {
        "Asian": "definition-accuracy",
        "SER": "definition-ser",
    }


def test_every_number_of_the_tables_has_a_definition():
    for name, table in results({"A": 20, "B": 100, "C": 10}, {"A": 9, "B": 10, "C": 11}).tables().items():
        numbers = {column for column in table.header[table.names :] if column != "Group"}
        assert numbers <= anchors(table.header, GROUPS, DEFINITIONS).keys(), name


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
