"""Groups by attributes: their pairs and rates by plain counts, tables beside the .bin, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from eval import attributes as by_attribute
from eval.exchange import read_scores
from eval.results import Results
from tests.unit.eval.test_results import GROUPS, SAME, scored
from utils.data.attributes import attributes_of, read_attributes
from utils.data.pairs import load_pairs
from utils.errors import InputError


def test_groups_and_crossings_have_their_rates():
    results = Results([scored("one", 1, {"A": 0.8, "B": 0.6})], SAME, True, ("Note.",))
    index = np.arange(4000)
    gender = np.where(index % 3 == 0, "f", "m").astype(object)
    gender[:10] = ""
    age = np.where(index < 3900, "young", "old").astype(object)  # 100 pairs of a kind at most
    table = by_attribute.table(results, {name: {"gender": gender, "age": age} for name in GROUPS})
    rows = {(row[5], row[6]): row for row in table.rows}
    assert set(rows) == {("gender", "f"), ("gender", "m"), ("age", "young"), ("gender x age", "f / young")} | {
        ("gender x age", "m / young")
    }
    threshold = results.shared[0]["FMR 0.01"]
    together = np.concatenate([results.models[0].distances[name] for name in GROUPS])
    same = np.concatenate([SAME[name] for name in GROUPS])
    here = np.tile((gender == "f") & (age == "young"), 2)
    row = rows["gender x age", "f / young"]
    assert row[7:9] == (str(np.sum(here & same)), str(np.sum(here & ~same)))
    assert row[9].value == np.mean(together[here & ~same] < threshold)
    assert row[10].value == np.mean(together[here & same] >= threshold)
    assert "Too small to be reported (below 100 pairs of a kind): 3 of 8 groups." in table.notes
    assert any(note.startswith("Smallest group: ") and "0 genuine" in note for note in table.notes)
    without = 2 * int(np.sum(SAME["A"][:10]))
    assert (
        f"{without} of {same.sum():,} genuine pairs have no gender, or two: they are in no group of it." in table.notes
    )
    assert not any("no age, or two" in note for note in table.notes)
    assert any("Clopper-Pearson intervals of independent pairs." in note for note in table.notes)
    people = np.array(
        [(f"p{k // 4}", f"p{k // 4}" if one else f"q{k // 4}") for k, one in enumerate(SAME["A"])], object
    )
    known = Results(results.models, SAME, True, identities=dict.fromkeys(GROUPS, people))
    said = by_attribute.table(known, {name: {"age": age} for name in GROUPS}).notes[0]
    assert "Clopper-Pearson intervals; identities that pairs share lower the effective numbers." in said
    assert by_attribute.table(results, {"A": {}, "B": {}}) is None
    partly = by_attribute.table(results, {"A": {"gender": gender}, "B": {}})
    assert not partly.rows
    assert partly.notes[-1] == "No attribute is known for all of A, B: add it to the tables of the others."


def test_the_ends_of_a_pair_must_agree():
    found = attributes_of({"gender_1": ["f", "f"], "gender_2": ["f", "m"], "e1": ["A", "B"], "e2": ["A", "B"]})
    assert {name: values.tolist() for name, values in found.items()} == {"ethnicity": ["A", "B"], "gender": ["f", ""]}


def test_a_table_beside_the_bin_is_read(cfg):
    pairs = load_pairs(cfg)["A"]
    rows = [f"{int(same)},f,f" for same in pairs.same]
    path = cfg.pairs_file("A").with_name("A_test_attributes.csv")
    path.write_text("\n".join(["same,gender_1,gender_2", *rows]) + "\n")
    assert load_pairs(cfg)["A"].attributes["gender"].tolist() == ["f"] * len(rows)
    assert load_pairs(cfg)["B"].attributes == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("same,gender\n1,f\n1,f\n", "line 3: same contradicts x.bin"),
        ("label,gender\n0,f\n0,f\n", "line 2: label contradicts x.bin"),
        ("gender\nf\n", "must have a row of 1 columns for each of the 2 pairs"),
        ("gender,age\nf,1\nf\n", "must have a row of 2 columns"),
        ("gender,gender\nf,f\nf,m\n", "has two columns gender: keep one"),
        ("hair\nf\nf\n", "has no column of ethnicity, gender, age"),
        ("", "cannot be read"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, text, sentence):
    (tmp_path / "x_attributes.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_attributes(tmp_path / "x.bin", np.array([True, False]))


def test_attributes_and_identities_of_bfw_are_read(tmp_path):
    lines = [f"{k % 2},p{k // 2},{'p' if k % 2 else 'q'}{k // 2},0.{k % 9},F,F,B,{'BW'[k % 3 == 0]}" for k in range(40)]
    (tmp_path / "bfw.csv").write_text("\n".join(["label,id1,id2,score,g1,g2,e1,e2", *lines]))
    theirs = read_scores(tmp_path / "bfw.csv")
    pairs = theirs.sets["B"]
    assert list(theirs.sets) == ["B"] and len(pairs.same) == 26
    assert theirs.notes[1] == "Left out: 14 of 40 pairs, across groups or without a group."
    assert set(pairs.attributes["gender"].tolist()) == {"F"}
    assert set(pairs.attributes["ethnicity"].tolist()) == {"B"}
    assert (pairs.identities[:, 0] == pairs.identities[:, 1]).tolist() == pairs.same.tolist()
