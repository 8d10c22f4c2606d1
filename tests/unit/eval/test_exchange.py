"""Scores of others are read in three forms, ours are written in them, and what is wrong with a file is one sentence."""

import csv
from pathlib import Path

import numpy as np
import pytest

from eval.exchange import DEALT, read_scores, written
from eval.verification import ten_fold_of
from tests.runs import run_script
from utils.errors import InputError

PAIRS = 200
SAME = np.arange(PAIRS) % 2 == 0
COSINES = np.clip(np.random.default_rng(0).normal(0.2 + 0.4 * SAME, 0.15), -1, 1)
NAMES = [(f"p{k % 30}", f"p{k % 30}" if same else f"q{k % 20}") for k, same in enumerate(SAME)]


def favfa() -> str:
    rows = [
        f"{one}_0001.jpg,{other}_0002.jpg,{1 - cosine!r}"
        for (one, other), cosine in zip(NAMES, COSINES.tolist(), strict=True)
    ]
    return "\n".join(["img_1,img_2,dist", *rows]) + "\n"


def fairlearn() -> str:
    rows = [
        f"{int(same)},{cosine!r},{'A' if k < 100 else 'B'}"
        for k, (same, cosine) in enumerate(zip(SAME, COSINES.tolist(), strict=True))
    ]
    return "\n".join(["y_true,y_score,group", *rows]) + "\n"


def bob(scale: float = 1) -> str:
    rows = [
        f"{one} model{k} {other} probe{k} {scale * cosine!r}"
        for k, ((one, other), cosine) in enumerate(zip(NAMES, COSINES.tolist(), strict=True))
    ]
    return "\n".join(rows) + "\n"


def read(tmp_path: Path, text: str):
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    return read_scores(path)


@pytest.mark.parametrize("text", [favfa(), bob()])
def test_scores_are_read_with_their_identities(tmp_path, text):
    theirs = read(tmp_path, text)
    pairs, distance = theirs.sets["all"], theirs.scored.distances["all"]
    assert pairs.same.tolist() == SAME.tolist()
    assert list(map(tuple, pairs.identities)) == NAMES
    assert distance == pytest.approx(2 - 2 * COSINES)
    assert theirs.scored.accuracies == (100 * ten_fold_of(distance, SAME).accuracy.mean(),)
    assert theirs.scored.name == "theirs"


def test_groups_become_sets(tmp_path):
    theirs = read(tmp_path, fairlearn())
    assert list(theirs.sets) == ["A", "B"]
    assert theirs.scored.distances["B"] == pytest.approx(2 - 2 * COSINES[100:])
    assert theirs.sets["A"].identities is None


BFW = "fold,p1,p2,label,id1,id2,att1,att2,a1,a2,g1,g2,e1,e2,score"  # the columns of BFW's table, without other scores


def bfw() -> str:
    """300 pairs of three of BFW's groups; every fifth impostor pair has its second face in another group."""
    rows, groups = [], ("asian_females", "black_males", "white_females")
    for k in range(300):
        one, same = groups[k // 2 % 3], k % 2 == 0
        other = groups[(k // 2 + 1) % 3] if k % 10 == 5 else one
        ends = f"{one}{k % 40}", f"{one if same else other}{k % 40 if same else 'x'}"
        short = [name[0].upper() + name.split("_")[1][0].upper() for name in (one, other)]
        letters = (*short, short[0][1], short[1][1], short[0][0], short[1][0])
        images = f"{one}/n{k}/1.jpg", f"{other}/n{k}/2.jpg"
        rows.append(",".join(map(str, (k % 5, *images, int(same), *ends, one, other, *letters, COSINES[k % PAIRS]))))
    return "\n".join([BFW, *rows]) + "\n"


def test_the_groups_of_bfw_are_those_of_pairs_whose_ends_are_of_one_group(tmp_path):
    theirs = read(tmp_path, bfw())
    assert {name: len(pairs.same) for name, pairs in theirs.sets.items()} == dict.fromkeys(
        ("asian_females", "black_males", "white_females"), 90
    )
    assert "Left out: 30 of 300 pairs, across groups or without a group." in theirs.notes
    for name, pairs in theirs.sets.items():
        kept = [k for k in range(300) if k // 2 % 3 == list(theirs.sets).index(name) and k % 10 != 5]
        assert sorted(theirs.scored.distances[name]) == pytest.approx(sorted(2 - 2 * COSINES[k % PAIRS] for k in kept))
        assert set(pairs.attributes["ethnicity"]) == {name[0].upper()}
        assert {str(end).rstrip("0123456789x") for end in pairs.identities.ravel()} == {name}


def test_labels_as_pandas_writes_them_are_read(tmp_path):
    theirs = read(tmp_path, fairlearn().replace("\n1,", "\n1.0,").replace("\n0,", "\n0.0,"))
    assert theirs.sets["A"].same.tolist() == SAME[:100].tolist()


def test_scores_of_any_scale_are_mapped_in_order(tmp_path):
    theirs = read(tmp_path, bob(scale=50))
    assert (np.argsort(theirs.scored.distances["all"]) == np.argsort(-COSINES)).all()
    assert any("mapped linearly" in note for note in theirs.notes)
    assert (theirs.scored.distances["all"].min(), theirs.scored.distances["all"].max()) == (0, 4)


def test_pairs_sorted_by_kind_are_dealt_to_the_folds(tmp_path):
    order = np.argsort(~SAME, kind="stable")
    lines = bob().splitlines()
    theirs = read(tmp_path, "\n".join(lines[k] for k in order))
    same = theirs.sets["all"].same
    assert [int(part.sum()) for part in np.array_split(same, 10)] == [10] * 10
    assert DEALT in theirs.notes
    assert DEALT not in read(tmp_path, bob()).notes
    assert sorted(theirs.scored.distances["all"]) == pytest.approx(sorted(2 - 2 * COSINES))


@pytest.mark.parametrize("form", ["favfa", "fairlearn", "bob"])
@pytest.mark.parametrize("source", [fairlearn(), favfa()])
def test_what_is_written_is_read_back(tmp_path, form, source):
    theirs = read(tmp_path, source)
    again = read(tmp_path, written(form, theirs.scored, theirs.sets, 1.2))
    before, after = (np.concatenate([*one.scored.distances.values()]) for one in (theirs, again))
    assert after == pytest.approx(before, abs=1e-12)
    assert np.concatenate([one.same for one in again.sets.values()]).tolist() == SAME.tolist()
    if form != "bob":
        assert list(again.sets) == list(theirs.sets)


def test_fairlearn_gets_decisions(tmp_path):
    theirs = read(tmp_path, fairlearn())
    rows = list(csv.DictReader(written("fairlearn", theirs.scored, theirs.sets, 1.2).splitlines()))
    assert [row["y_pred"] == "1" for row in rows] == (2 - 2 * COSINES < 1.2).tolist()
    assert [row["group"] for row in rows] == ["A"] * 100 + ["B"] * 100


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (favfa().replace(favfa().splitlines()[3].split(",")[2], "nan"), r"line 4: dist is nan, not a finite number"),
        (bob().replace(bob().split()[4], "x", 1), "line 1: the score is x, not a finite number"),
        (
            "\n".join(fairlearn().splitlines()[:60:2]).replace("\n0", "\n1"),
            "group A has no impostor pair: both kinds are needed",
        ),
        ("\n".join(favfa().splitlines()[:5]), "has 4 pairs, too few for 10 folds"),
        (
            favfa().replace("dist", "distance"),
            "expected columns img_1,img_2,dist, or y_true,y_score, separated by commas, or five",
        ),
        (fairlearn().replace("y_true", "truth"), "has no column y_true"),
        (fairlearn().replace("\n1,", "\n2,", 1), "line 2: y_true must be 1"),
        (favfa() + "a_1.jpg,b_1.jpg\n", "line 202: expected 3 columns"),
        (favfa() + "a_1.jpg,b_1.jpg,7\n", r"dist must be a cosine distance, in \[0, 2\], not up to 7"),
        (
            "y_true,y_score,identity_1,identity_2\n1,0.5,a,b\n",
            "pair 0 is genuine, but has the identities a and b",
        ),
        ("y_true,y_score,identity_1,identity_2\n1,0.5,a,a\n0,0.1,a,\n", "line 3: identity_2 is empty: name it"),
        ("", "is empty: set scores to a file of scores"),
        ("y_true,y_score\n", "no group has 10 genuine and 10 impostor pairs"),
        ("y_true,y_score\n" + 5 * "1,0.9\n" + 50 * "0,0.1\n", "no group has 10 genuine and 10 impostor pairs"),
        (fairlearn().replace("y_score,group", "y_score,y_score"), "has two columns y_score: keep one"),
        (fairlearn().replace(",", ";"), "separated by commas, or five columns as of bob.bio"),
        (fairlearn().replace(".", ","), "line 2: expected 3 columns, separated by commas, not 4"),
        (fairlearn().replace(",B", ',"B', 1), "is no table of scores"),
        ("y_true,label,y_score\n1,1,0.5\n0,1,0.5\n", "line 3: y_true contradicts label: keep the right one"),
        (fairlearn() + 5 * "1,0.5,C\n", "group C has 5 pairs, too few for 10 folds: add pairs, or leave the group out"),
        (
            "y_true,y_score\n" + 10 * "1,0.1\n0,0.9\n",
            "genuine pairs are less alike than impostor pairs: dist must be a distance",
        ),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, text)


def test_impostor_pairs_of_one_identity_are_counted(tmp_path):
    rows = [f"{k % 2},{0.9 if k % 2 else 0.1},a{k},{f'b{k}' if k % 2 == 0 and k > 4 else f'a{k}'}" for k in range(40)]
    theirs = read(tmp_path, "\n".join(["y_true,y_score,identity_1,identity_2", *rows]))
    assert "Impostor pairs of one identity: 3 of 20, kept as impostors." in theirs.notes
    assert not any("of one identity" in note for note in read(tmp_path, favfa()).notes)


def test_scores_of_several_models_on_the_same_pairs_have_one_digest(tmp_path):
    one, other = read(tmp_path, favfa()), read(tmp_path, favfa().replace(",0.", ",1."))
    assert one.scored.weights != other.scored.weights
    assert one.sets["all"].digest == other.sets["all"].digest
    assert one.sets["all"].digest != read(tmp_path, favfa().replace("p3_0001", "p3_0009")).sets["all"].digest
    assert one.sets["all"].digest != read(tmp_path, bob()).sets["all"].digest


def test_line_ends_quotes_and_a_mark_of_utf_8_do_not_matter(tmp_path):
    (tmp_path / "theirs.csv").write_bytes(b"\xef\xbb\xbf" + fairlearn().replace("\n", "\r\n").encode())
    theirs = read_scores(tmp_path / "theirs.csv")
    assert theirs.scored.distances["A"] == pytest.approx(2 - 2 * COSINES[:100])
    quoted = read(tmp_path, "\n".join('"' + line.replace(",", '","') + '"' for line in fairlearn().splitlines()))
    assert list(quoted.sets) == ["A", "B"]
    (tmp_path / "latin.csv").write_bytes(fairlearn().replace(",A", ",\xfc").encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_scores(tmp_path / "latin.csv")


@pytest.mark.usefixtures("blank_pictures")
def test_the_evaluation_gives_its_tables_of_their_scores(tmp_path, capsys):
    path, output = tmp_path / "theirs.csv", ["--output", str(tmp_path / "output")]
    path.write_text(favfa())
    run_script("eval.evaluation", ["--scores", str(path), *output, "--score_forms", "favfa,bob"])
    (folder,) = (tmp_path / "output" / "evaluation").iterdir()
    best = max(np.mean((t > 2 - 2 * COSINES) == SAME) for t in [*(2 - 2 * COSINES), 5])
    row = next(csv.DictReader((folder / "one_threshold.csv").read_text().splitlines()))
    assert float(row["All pairs"]) == pytest.approx(100 * best)
    assert "resampled identities" in (folder / "intervals.md").read_text()
    assert {one.name for one in (folder / "scores").iterdir()} == {
        f"scores-theirs.{ending}" for ending in ("csv", "favfa.csv", "bob.txt")
    }
    assert not (folder / "operating.md").exists()
    page = capsys.readouterr().out
    assert "No table operating: The impostor pairs needed for a threshold are 300 for FMR 0.01, 3,000 for" in page
    assert "there are 100: give one with --threshold." in page
    run_script("eval.evaluation", ["--scores", str(path), *output, "--corrections", "true", "--report"])
    said = "No table corrections: it compares groups, and there is a single set."
    assert said in capsys.readouterr().out
    assert said in (folder / "report.html").read_text()
    path.write_text(fairlearn())
    run_script("eval.evaluation", ["--scores", str(path), *output, "--reference_group", "B", "--threshold", "1.2"])
    assert "B (reference)" in (folder / "operating.md").read_text()
    assert not (folder / "scores" / "scores-theirs.favfa.csv").exists()
    assert "No table impostors: pairs across groups need images" in capsys.readouterr().out
    run_script("eval.evaluation", ["--scores", str(path), *output, "--reference_group", "C"], expect=2)
    run_script("eval.evaluation", ["--scores", str(path), *output, "--threshold", "3.99"], expect=2)
    run_script("eval.evaluation", ["--scores", str(path), "--checkpoint", "x.pth"], expect=2)
    said = capsys.readouterr()
    for sentence in ("none of the groups: set it to one of A, B", "decides every pair alike", "left out where"):
        assert sentence in said.out + said.err
