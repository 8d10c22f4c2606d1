"""Inspection of a data folder: counts, duplicates, overlap and misplaced faces, without false reports."""

import argparse
import csv
import json
import pickle
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from config.config import Config
from tests.conftest import encode, noise, put, write_images, write_pairs
from tests.runs import ROOT
from utils.data import recordio
from utils.data.faces import Faces
from utils.data.index import scan
from utils.data.recordio import write_records
from utils.data.synthetic import MARKER
from utils.errors import InputError
from utils.prepare import inspect, likeness, rec, report
from utils.prepare.contents import Source, _digest, _look, form_of
from utils.prepare.likeness import fingerprint, near
from utils.prepare.placement import place
from utils.prepare.releases import RELEASES, compare, verdict

COUNTS = {"African": {"m.1": 3, "m.2": 1}, "Indian": {"m.3": 2, "m.4": 4, "m.5": 3}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Skips the pictures, which take most of the time."""
    monkeypatch.setattr(inspect, "draw_samples", lambda *_: None)
    monkeypatch.setattr(inspect, "draw_pairs", lambda *_: None)


def run(data: Path, *words, processes: int = 1) -> dict:
    """Runs the command and returns the report that it writes."""
    parser, output = argparse.ArgumentParser(), data.parent / "inspected"
    inspect.add_arguments(parser)
    given = ["--data", data, "--output", output, "--processes", processes, *words]
    inspect.run(parser.parse_args([*map(str, given)]))
    return json.loads((output / "inspect.json").read_text())


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return [*csv.reader(file)][1:]


def left_out(tmp_path: Path) -> list[str]:
    return (tmp_path / "inspected" / "leave_out.txt").read_text().splitlines()


def smooth(seed: int, size: int = 112) -> np.ndarray:
    """Returns an image without fine detail, like a photograph: unlike noise, it stays similar when encoded."""
    small = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def tree(tmp_path) -> Path:
    write_images(tmp_path / "data", COUNTS)
    return tmp_path / "data"


# Counts ---------------------------------------------------------------------------------------------------------------


def test_groups_are_found_and_counted(tree, tmp_path, capsys):
    for seed, name in enumerate(("m.3/0.jpg", "m.3/1.jpg", "m.4/2.jpg")):
        (tree / "Indian" / name).write_bytes(encode(noise(seed, 130)[:100]))
    facts = run(tree)
    assert facts == run(tree, "--ethnicities", "Indian,African")
    assert [*facts["groups"]] == ["African", "Indian"]
    one, other = facts["groups"].values()
    assert (one["images"], one["identities"], one["identities with one image"], one["unreadable"]) == (4, 2, 1, 0)
    assert (other["images"], other["identities"], other["identities with one image"]) == (9, 3, 0)
    assert one["images per identity"] == {"least": 1, "median": 2.0, "most": 3}
    assert other["images per identity"] == {"least": 2, "median": 3.0, "most": 4}
    assert one["sizes"] == {"112 x 112": 4}
    assert other["sizes"] == {"112 x 112": 6, "130 x 100": 3}
    assert (one["not 112 x 112"], other["not 112 x 112"]) == (0, 3)
    assert one["formats"] == {"JPEG": 4}
    assert one["bytes"] == sum(path.stat().st_size for path in (tree / "African").rglob("*.jpg"))
    assert facts["pairs"] is facts["release"] is None
    assert facts["warnings"] == [
        "Indian: 3 of 9 images are not 112 x 112, which stages refuse: python -m utils.prepare align --help"
    ]
    said = capsys.readouterr()
    assert (tmp_path / "inspected" / "inspect.md").read_text() in said.out
    assert "Indian: 3 of 9 images are not 112 x 112" in said.err
    assert not (tmp_path / "inspected" / "leave_out.txt").exists()


def test_several_processes_give_the_same(tmp_path):
    """Uses more images than one chunk of a process, some of them bad or duplicates."""
    write_images(tmp_path, {"data": {"a": 70, "b": 70}})
    (tmp_path / "data" / "b" / "7.jpg").write_bytes(b"")
    (tmp_path / "data" / "b" / "8.jpg").write_bytes((tmp_path / "data" / "a" / "3.jpg").read_bytes())
    facts = run(tmp_path / "data", processes=2)
    assert facts == run(tmp_path / "data")
    assert facts["unreadable"] == 1
    assert facts["duplicates"]["identities of one group"] == {"sets": 1, "images": 2}


def test_the_output_needs_a_separate_folder(tree, tmp_path):
    (tmp_path / "inspected").mkdir()
    (tmp_path / "inspected" / "leave_out.txt").write_text("African/m.1\n")
    (tmp_path / "inspected" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"inspected holds notes\.txt, which is not of this command"):
        run(tree)
    assert left_out(tmp_path) == ["African/m.1"]
    (tree.parent / "inspected" / "notes.txt").unlink()
    run(tree)
    with pytest.raises(InputError, match="lies in .*data: set --output"):
        run(tree, "--output", tree / "inspected")


def test_groups_that_stages_refuse_are_reported(tree):
    with pytest.raises(InputError, match="must be different names"):
        run(tree, "--ethnicities", "African,African")
    (tree / "African").rename(tree / "A|B")
    assert "Stages refuse the groups as they are: ethnicities" in run(tree)["warnings"][0]


def test_images_outside_the_groups_are_reported(tree):
    put(tree / "Loose" / "a.jpg", encode(noise(1)))
    put(tree / "b.jpg", encode(noise(2)))
    passed = run(tree)["passed over"]
    assert passed == [{"kind": ".jpg elsewhere", "count": 2, "example": "Loose/a.jpg"}]
    assert run(tree, "--ethnicities", "African,Indian")["passed over"] == []  # the requested groups


def test_a_folder_with_one_level_too_many_is_reported(tmp_path):
    write_images(tmp_path / "data", {f"id{k}": {"session": 1} for k in range(31)})
    assert "31 groups are many" in "".join(run(tmp_path / "data")["warnings"])


def test_less_frequent_sizes_are_summed(tmp_path):
    for side in range(20, 28):
        put(tmp_path / "data" / "a" / f"{side}.jpg", encode(noise(side, side)))
    group = run(tmp_path / "data")["groups"][""]
    assert len(group["sizes"]) == 5
    assert group["of other sizes"] == 3


def test_a_folder_without_groups(tmp_path):
    write_images(tmp_path, {"data": {"a": 2, "b": 3}})
    facts = run(tmp_path / "data")
    assert facts == run(tmp_path / "data", "--ethnicities", "")
    assert facts["groups"][""]["identities"] == 2
    assert "| all   |" in (tmp_path / "inspected" / "inspect.md").read_text()


def test_records_are_counted_as_the_folder_that_they_were_made_from(tree, tmp_path):
    groups = ("African", "Indian")
    rec.pack(tree, groups, tmp_path / "rec", 1)
    facts, of_tree = run(tmp_path / "rec"), run(tree)
    assert facts["groups"] == of_tree["groups"]
    labels = {"least": 0, "most": 4, "different": 5, "property": "5,112,112"}
    assert facts["labels"] == {**labels, "groups": {"1 (Indian)": 9, "3 (African)": 4}}
    assert of_tree["labels"] is None
    assert [*run(tmp_path / "rec", "--ethnicities", "Indian")["groups"]] == ["Indian"]
    assert [*run(tmp_path / "rec", "--ethnicities", "")["groups"]] == [""]


def test_records_are_read_once(tree, tmp_path, monkeypatch):
    rec.pack(tree, ("African", "Indian"), tmp_path / "rec", 1)
    read = Mock(wraps=recordio.read_index)
    monkeypatch.setattr(recordio, "read_index", read)
    run(tmp_path / "rec")
    read.assert_called_once_with(tmp_path / "rec")


def test_groups_of_records_without_a_name(tmp_path):
    write_records(tmp_path / "rec", [(encode(noise(1)), 0, 1), (encode(noise(2)), 4, 7)], 6)
    facts = run(tmp_path / "rec")
    assert [*facts["groups"]] == [""]
    assert facts["labels"]["groups"] == {"1 (Indian)": 1, "7": 1}
    assert (facts["labels"]["least"], facts["labels"]["most"], facts["labels"]["different"]) == (0, 4, 2)
    (tmp_path / "rec" / "property").unlink()
    write_records(tmp_path / "plain", [(encode(noise(1)), 0, -1)], 1)
    assert run(tmp_path / "plain")["labels"]["groups"] == {"none": 1}
    assert run(tmp_path / "rec")["labels"]["property"] is None


def test_known_releases_are_recognised():
    def counted(release: str, **more) -> dict:
        return {name: (count.images[0], count.identities) for name, count in RELEASES[release].items()} | more

    for release in RELEASES:
        best = compare(counted(release))
        assert best[0].release == release
        assert verdict(best) == f"The counts are those of {release}."
        assert len(best) == 4
    aligned = "BUPT-BalancedFace, MST-KD's aligned copy"
    for african, asian in ((324_106, 324_202), (324_202, 324_106)):
        assert verdict(compare(counted(aligned, African=(african, 7_000), Asian=(asian, 7_000)))).endswith(
            f"{aligned}."
        )
    off = counted("RFW", African=(10_400, 2_994))
    assert verdict(compare(off)) == "The counts are nearest to those of RFW: 15 images and 1 identities more or less."
    assert verdict(compare({"Asian": (325_493, 7_000)})) == "The counts are those of BUPT-BalancedFace, RecordIO."
    assert "none of the known" in verdict(compare({"Asian": (300_000, 7_000)}))
    assert "other groups" in verdict(compare({"A": (1, 1), "Asian": (325_493, 7_000)}))
    assert "other groups" in verdict(compare({}))
    assert sum(count.images[0] for count in RELEASES["BUPT-BalancedFace, JPG"].values()) == 1_251_430
    assert sum(count.images[0] for count in RELEASES["BUPT-BalancedFace, RecordIO"].values()) == 1_251_416
    assert sum(count.images[0] for count in RELEASES["RFW"].values()) == 40_607
    assert sum(count.identities for count in RELEASES[aligned].values()) == 27_997


def test_expected_counts_are_printed_beside_the_counts_found(tree, tmp_path):
    facts = run(tree)
    assert len(facts["counts"]["rows"]) == 8
    found = next(row for row in facts["counts"]["rows"] if (row["release"], row["group"]) == ("RFW", "Indian"))
    assert found["expected"] == {"images": [10_308], "identities": 2_984}
    assert (found["images"], found["identities"]) == (9, 3)
    assert "| RFW " in (tmp_path / "inspected" / "inspect.md").read_text()


# Bad files ------------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    content = bytearray(encode(noise(0), ".png"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def as_cmyk(jpeg: bytes) -> bytes:
    """Adds a fourth component to the header of a JPEG; its scan still has three."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 9] + b"\x04" + jpeg[at + 10 :]


def test_bad_and_unusual_files_are_named(tree, tmp_path):
    folder = tree / "African" / "m.1"
    put(folder / "0.jpg", b"")
    put(folder / "1.jpg", encode(noise(1))[:-700])
    put(folder / "2.jpg", b"no image")
    put(folder / "bomb.png", bomb())
    put(folder / "grey.jpg", encode(smooth(1)[..., 0]))
    put(folder / "grey.png", encode(smooth(2)[..., 0], ".png"))
    put(folder / "deep.png", encode(smooth(3).astype(np.uint16) * 257, ".png"))
    put(folder / "really.png", encode(smooth(4)))
    put(folder / "webp.jpg", encode(smooth(5), ".webp"))
    put(folder / "drawing.bmp", encode(smooth(6), ".bmp"))
    put(tree / "African" / "m.2" / "deeper" / "x.jpg", encode(smooth(7)))
    put(tree / "African" / "beside.jpg", encode(smooth(8)))
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    facts = run(tree)
    group = facts["groups"]["African"]
    assert group["formats"] == {"JPEG": 2, "JPEG grey": 1, "PNG 16-bit": 1, "PNG grey": 1, "WebP": 1}
    assert (group["images"], group["unreadable"], facts["unreadable"]) == (11, 5, 5)
    assert group["sizes"] == {"112 x 112": 6}
    reasons = dict(rows(tmp_path / "inspected" / "unreadable.csv"))
    assert reasons.pop("African/m.1/bomb.png").startswith("is 60000 x 60000, more than")
    assert reasons == {
        "African/m.1/0.jpg": "is empty",
        "African/m.1/1.jpg": "is a truncated JPEG",
        "African/m.1/2.jpg": "is no JPEG, PNG or WebP image",
        "African/m.1/gone.jpg": "cannot be read (No such file or directory)",
    }
    assert facts["passed over"] == [
        {"kind": ".jpg elsewhere", "count": 2, "example": "African/beside.jpg"},
        {"kind": ".bmp", "count": 1, "example": "African/m.1/drawing.bmp"},
    ]
    assert "5 images cannot be read: unreadable.csv says why." in facts["warnings"]
    assert "2 files (.jpg elsewhere) are passed over, such as African/beside.jpg." in facts["warnings"]


def test_formats_are_recognised_by_content():
    face = smooth(1)
    assert form_of(encode(face)) == "JPEG"
    assert form_of(as_cmyk(encode(face))) == "JPEG CMYK"
    assert form_of(encode(face, ".png")) == "PNG"
    assert form_of(encode(face[..., 0].astype(np.uint16), ".png")) == "PNG grey 16-bit"
    png = encode(face, ".png")
    control = b"\x00\x00\x00\x08acTL" + bytes(12)
    assert form_of(png[:33] + control + png[33:]) == "PNG animated"


def test_a_bad_record_is_named_by_its_key(tmp_path):
    write_records(tmp_path / "rec", [(encode(noise(1)), 0, -1), (b"no image", 0, -1)], 1)
    assert run(tmp_path / "rec")["unreadable"] == 1
    assert rows(tmp_path / "inspected" / "unreadable.csv") == [["00000000/2", "is no JPEG, PNG or WebP image"]]


def test_a_folder_of_nothing_but_bad_images(tmp_path):
    put(tmp_path / "data" / "a" / "0.jpg", b"no image")
    facts = run(tmp_path / "data")
    assert facts["groups"][""]["sizes"] == {}


def test_an_identity_in_two_groups_is_reported(tree):
    put(tree / "African" / "m.5" / "0.jpg", encode(noise(77)))
    facts = run(tree)
    assert facts["identities in several groups"] == ["m.5"]
    assert any("1 identities are in several groups, such as m.5" in text for text in facts["warnings"])


def test_bad_arguments_are_refused_before_work_starts(tree, tmp_path, monkeypatch):
    def looked(*_):
        raise AssertionError("an image was looked at")

    monkeypatch.setattr(inspect, "look_at_all", looked)
    for name in ("empty", "no pairs"):
        (tmp_path / name).mkdir()
    put(tmp_path / "damaged" / "A_test.bin", b"no pickle")
    put(tmp_path / "broken" / "A_test.bin", pickle.dumps(([encode(noise(1)), b"no image"], [True])))
    rec.pack(tree, (*COUNTS,), tmp_path / "rec", 1)
    put(tmp_path / "file", b"")
    for data, words, reason in (
        (tmp_path / "nowhere", (), "There is no folder .*nowhere"),
        (tmp_path / "empty", (), "empty holds no image"),
        (tree, ("--ethnicities", "African,Asian"), "no folder for Asian"),
        (tree, ("--pairs", tmp_path / "no pairs"), "no pairs holds no .bin"),
        (tree, ("--pairs", tmp_path / "damaged"), "A_test.bin is damaged or no set of pairs"),
        (tree, ("--pairs", tmp_path / "broken"), "A_test.bin: image 1 is no JPEG, PNG or WebP image"),
        (tree, ("--release", tmp_path / "empty"), "holds no txts"),
        (tmp_path / "rec", ("--release", tmp_path / "empty"), "names identities by numbers"),
        (tree, ("--output", tmp_path / "file"), "file is no folder"),
    ):
        with pytest.raises(InputError, match=reason):
            run(data, *words)
    assert not (tmp_path / "inspected").exists()


# Duplicates and overlap -----------------------------------------------------------------------------------------------


def test_images_with_equal_pixels_are_found(tmp_path):
    data, kept = tmp_path / "data", cv2.imdecode(np.frombuffer(encode(smooth(1)), np.uint8), cv2.IMREAD_COLOR)
    changed = kept.copy()
    changed[50, 50, 0] ^= 1
    for path, content in {
        "A/a/0.jpg": encode(smooth(1)),
        "A/a/1.png": encode(kept, ".png"),
        "A/a/2.png": encode(changed, ".png"),
        "A/a/3.jpg": encode(smooth(2)),
        "A/b/0.jpg": encode(smooth(2)),
        "A/b/1.jpg": encode(smooth(3)),
        "B/c/0.jpg": encode(smooth(3)),
        "B/c/1.jpg": encode(smooth(3)),
        "B/c/2.jpg": encode(smooth(4)),
        "B/d/0.png": encode(np.zeros((60, 112, 3), np.uint8), ".png"),
        "B/d/1.png": encode(np.zeros((112, 60, 3), np.uint8), ".png"),
    }.items():
        put(data / path, content)
    assert run(data)["duplicates"] == {
        "one identity": {"sets": 1, "images": 2},
        "identities of one group": {"sets": 1, "images": 2},
        "several groups": {"sets": 1, "images": 3},
    }
    assert rows(tmp_path / "inspected" / "duplicates.csv") == [
        ["1", "A/a/0.jpg"],
        ["1", "A/a/1.png"],
        ["2", "A/a/3.jpg"],
        ["2", "A/b/0.jpg"],
        ["3", "A/b/1.jpg"],
        ["3", "B/c/0.jpg"],
        ["3", "B/c/1.jpg"],
    ]


def resized(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), (112, 112))


@pytest.fixture
def overlapping(tmp_path) -> Path:
    """Returns data of which three images are in the pairs: unchanged, encoded again, and resized."""
    write_images(tmp_path / "data", COUNTS)
    put(tmp_path / "data" / "African/m.1/0.jpg", encode(smooth(1)))
    put(tmp_path / "data" / "Indian/m.3/0.jpg", encode(smooth(2)))
    put(tmp_path / "data" / "Indian/m.5/1.jpg", encode(smooth(3)))
    again = cv2.imencode(".jpg", smooth(2), [cv2.IMWRITE_JPEG_QUALITY, 40])[1].tobytes()
    images = [encode(noise(501)), encode(smooth(1)), encode(smooth(4)), encode(smooth(1)), again, encode(noise(502))]
    put(tmp_path / "pairs" / "African_test.bin", pickle.dumps((images, [True, False, True]), 2))
    more = [encode(resized(smooth(3), 90)), encode(noise(503))]
    put(tmp_path / "pairs" / "Indian_test.bin", pickle.dumps((more, [False]), 2))
    return tmp_path / "data"


def test_images_that_are_in_the_pairs_are_found(overlapping, tmp_path, capsys):
    facts = run(overlapping, "--pairs", tmp_path / "pairs")
    counts = facts["pairs"]
    assert counts["images of pairs"] == 7
    assert (counts["images of the same pixels"], counts["other images of the same photograph"]) == (1, 2)
    assert counts["identities that these show"] == 3
    assert facts["left out"] == {"identities": 0, "images": 3}
    found = [(*row[:3], row[4]) for row in rows(tmp_path / "inspected" / "overlap.csv")]
    african, indian = (str(tmp_path / "pairs" / f"{name}_test.bin") for name in ("African", "Indian"))
    assert found == [
        ("African/m.1/0.jpg", african, "1", "yes"),
        ("Indian/m.3/0.jpg", african, "4", "no"),
        ("Indian/m.5/1.jpg", indian, "0", "no"),
    ]
    assert left_out(tmp_path) == ["African/m.1/0.jpg", "Indian/m.3/0.jpg", "Indian/m.5/1.jpg"]
    said = capsys.readouterr().out
    assert "names 0 identities and 3 images" in said
    assert f"--leave_out {tmp_path / 'inspected' / 'leave_out.txt'}" in said


def test_leave_out_uses_the_names_of_the_stages(overlapping, tmp_path):
    rec.pack(overlapping, (*COUNTS,), tmp_path / "rec", 1)
    for groups in ((*COUNTS,), ()):
        run(tmp_path / "rec", "--pairs", tmp_path / "pairs", "--ethnicities", ",".join(groups))
        assert len(left_out(tmp_path)) == 3
        assert {*left_out(tmp_path)} <= {*scan(tmp_path / "rec", groups).paths}


def test_training_leaves_out_what_is_listed(overlapping, tmp_path):
    """Uses names that end with a space or contain characters that some readers treat as line ends."""
    (overlapping / "Indian/m.3").rename(overlapping / "Indian/m.3 ")
    (overlapping / "Indian/m.5").rename(overlapping / "Indian/m\u20285")
    run(overlapping, "--pairs", tmp_path / "pairs")
    cfg = Config(data=str(overlapping), cache=str(tmp_path / "cache"), ethnicities=(*COUNTS,))
    whole, less = Faces(cfg), Faces(replace(cfg, leave_out=str(tmp_path / "inspected" / "leave_out.txt")))
    paths = whole.store.index.paths
    gone = [paths[row] for row in sorted({*whole.rows} - {*less.rows})]
    assert len(gone) == 3
    assert {"Indian/m.3 /0.jpg", "Indian/m\u20285/1.jpg"} < {*gone}


def test_uniform_images_are_not_reported_as_copies(tree, tmp_path):
    black, grey = (encode(np.full((112, 112, 3), value, np.uint8)) for value in (0, 90))
    put(tree / "African/m.1/black.jpg", black)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "A_test.bin").write_bytes(pickle.dumps(([grey, encode(noise(1))], [True])))
    assert run(tree, "--pairs", tmp_path / "pairs")["pairs"]["other images of the same photograph"] == 0


def test_an_identity_in_two_groups_of_records_is_reported(tmp_path):
    write_records(tmp_path / "rec", [(encode(noise(k)), 7, k % 2) for k in range(4)], 8)
    facts = run(tmp_path / "rec")
    assert facts["identities in several groups"] == ["00000007"]
    assert [group["images"] for group in facts["groups"].values()] == [2, 2]


def test_pairs_without_overlap_give_an_empty_list(tree, tmp_path):
    write_pairs(tmp_path / "pairs" / "A_test.bin", 10, seed=5)
    facts = run(tree, "--pairs", tmp_path / "pairs")
    assert facts["left out"] == {"identities": 0, "images": 0}
    assert left_out(tmp_path) == []
    assert not (tmp_path / "inspected" / "overlap.csv").exists()


def write_list(release: Path, group: str, *lines: str) -> None:
    put(release / "txts" / group / f"{group}_pairs.txt", "".join(f"{line}\n" for line in lines).encode())


def test_identities_named_in_the_release_are_found(overlapping, tmp_path):
    write_list(tmp_path / "RFW", "African", "m.1\t1\t2", "m.9\t1\tm.8\t1")
    write_list(tmp_path / "RFW", "Asian", "m.7\t1\tm.4\t2", "m.1\t1\t2")
    facts = run(overlapping, "--release", tmp_path / "RFW")
    assert facts["release"]["identities"] == {"African/m.1": ["African", "Asian"], "Indian/m.4": ["Asian"]}
    assert facts["release"]["images"] == 7
    assert facts["pairs"] is None
    assert left_out(tmp_path) == ["African/m.1", "Indian/m.4"]
    # An image is not listed if its identity is.
    facts = run(overlapping, "--release", tmp_path / "RFW", "--pairs", tmp_path / "pairs")
    assert left_out(tmp_path) == ["African/m.1", "Indian/m.4", "Indian/m.3/0.jpg", "Indian/m.5/1.jpg"]
    assert facts["left out"] == {"identities": 2, "images": 2}
    assert "African/m.1 (African, Asian)" in (tmp_path / "inspected" / "inspect.md").read_text()


def test_files_of_an_earlier_call_are_removed(overlapping, tmp_path):
    (overlapping / "African/m.2/0.jpg").write_bytes(b"")
    put(overlapping / "African/m.1/copy.jpg", encode(smooth(1)))
    run(overlapping, "--pairs", tmp_path / "pairs")
    both = ["inspect.json", "inspect.md"]
    names = sorted(path.name for path in (tmp_path / "inspected").iterdir())
    assert names == sorted([*both, "duplicates.csv", "leave_out.txt", "overlap.csv", "unreadable.csv"])
    (overlapping / "African/m.2/0.jpg").write_bytes(encode(noise(99)))
    (overlapping / "African/m.1/copy.jpg").unlink()
    run(overlapping)
    assert sorted(path.name for path in (tmp_path / "inspected").iterdir()) == both


# Fingerprints ---------------------------------------------------------------------------------------------------------


def as_rows(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.frombuffer(fingerprint(image), np.uint8) for image in images])


def test_only_copies_have_near_fingerprints():
    images = [smooth(seed) for seed in range(40)]
    copies = [cv2.imdecode(np.frombuffer(encode(image), np.uint8), cv2.IMREAD_COLOR) for image in images]
    copies = [resized(image, 80) if k % 2 else image // 2 for k, image in enumerate(copies)]
    found, other, bits = near(as_rows(images), as_rows(copies))
    assert found.tolist() == other.tolist() == [*range(40)]
    assert 0 < bits.max() <= likeness.NEAR
    apart = near(as_rows(images), as_rows(images), likeness.BITS)[2].reshape(40, 40)
    assert 100 < apart[~np.eye(40, dtype=bool)].mean() < 150


def test_fingerprints_do_not_depend_on_the_size_of_a_picture():
    found = as_rows([smooth(1), smooth(1, 448)])
    assert near(found[:1], found[1:])[2][0] <= 4


def test_a_uniform_image_sets_no_bit():
    assert all(fingerprint(np.full((112, 112, 3), shade, np.uint8)) == bytes(32) for shade in (0, 1, 100, 255))


@pytest.mark.parametrize("at_most", [0, 31, 32, 96, 110])
def test_near_fingerprints_equal_those_of_a_plain_loop(at_most, monkeypatch):
    monkeypatch.setattr(likeness, "BLOCK", 7)
    random = np.random.default_rng(0)
    other = random.integers(0, 256, (23, 32), np.uint8)
    one = other[random.integers(0, 23, 31)].copy()
    for row in range(31):  # differs in `row` bits at random positions
        flipped = np.unpackbits(one[row])
        flipped[random.permutation(256)[: 4 * row]] ^= 1
        one[row] = np.packbits(flipped)
    bits = np.unpackbits(one[:, None] ^ other, axis=2).sum(2)
    expected = [(row, column, bits[row, column]) for row, column in np.argwhere(bits <= at_most)]
    assert [*zip(*(part.tolist() for part in near(one, other, at_most)), strict=True)] == expected
    assert expected


def test_empty_arrays_have_no_near_fingerprints():
    assert [len(part) for part in near(np.empty((0, 32), np.uint8), np.zeros((3, 32), np.uint8))] == [0, 0, 0]
    assert [len(part) for part in near(np.zeros((3, 32), np.uint8), np.empty((0, 32), np.uint8))] == [0, 0, 0]


def test_arguments_of_processes_can_be_pickled(tree):
    source = Source(str(tree), False)
    for function in (partial(_look, source), partial(_digest, source)):
        again = pickle.loads(pickle.dumps(function))
        assert again("African/m.1/0.jpg") == function("African/m.1/0.jpg")


# Placement ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def portraits(faces) -> np.ndarray:
    """Returns generated faces (64, 112, 112) uint8, grey, approximately aligned to ArcFace's template."""
    return np.stack([cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted((faces / "train").rglob("*.jpg"))])


def moved(image: np.ndarray, x: float = 0, y: float = 0, scale: float = 1, turn: float = 0) -> np.ndarray:
    matrix = np.add(cv2.getRotationMatrix2D((56.0, 71.9), -turn, scale), ((0, 0, x), (0, 0, y)))
    return cv2.warpAffine(image, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE)


def test_the_position_of_faces_is_measured(portraits):
    there = place(portraits)
    assert there.distance < 6
    for change in ({"x": 10}, {"y": -9}, {"scale": 0.7}, {"turn": 16}):
        found = place(np.stack([moved(image, **change) for image in portraits]))
        assert abs(found.shift[0] - there.shift[0] - change.get("x", 0)) <= 4
        assert abs(found.shift[1] - there.shift[1] - change.get("y", 0)) <= 4
        assert abs(found.scale / there.scale - change.get("scale", 1)) <= 0.08
        assert abs(found.turn - there.turn - change.get("turn", 0)) <= 4
        assert found.distance > 6
        assert "from the template's" in found.doubts
        assert abs(found.agreement - there.agreement) < 0.15


def test_faces_at_random_positions_do_not_agree(portraits):
    random = np.random.default_rng(0)
    there = place(portraits)
    scattered = [moved(image, *random.normal(0, 8, 2), turn=random.normal(0, 10)) for image in portraits]
    found = place(np.stack(scattered))
    assert found.agreement < 0.6 * there.agreement
    assert "do not lie in one place" in found.doubts
    assert place(np.stack([noise(seed)[..., 0] for seed in range(50)])).agreement < 0.2
    assert place(np.zeros((50, 112, 112), np.uint8)).doubts


def test_placement_is_reported_if_it_was_measured(faces, tmp_path, portraits):
    data = tmp_path / "data"
    for k, image in enumerate(portraits):
        put(data / "A" / f"a{k % 4}" / f"{k}.png", encode(moved(image, 12), ".png"))
        if k < 49:
            put(data / "B" / f"b{k % 4}" / f"{k}.png", encode(image, ".png"))
    facts = run(data)
    found = facts["groups"]["A"]["placement"]
    assert found["images"] == 64
    assert found["distance"] > 8
    assert any(
        text.startswith("A: does not look aligned: eyes and mouth of the mean of 64") for text in facts["warnings"]
    )
    assert facts["groups"]["B"]["placement"] == {"unknown": "fewer than 50 images of 112 x 112"}
    put(data / MARKER, b"")
    facts = run(data)
    assert facts["groups"]["A"]["placement"] == {"unknown": "faces are drawn"}
    assert facts["warnings"] == []


# Pictures -------------------------------------------------------------------------------------------------------------


def test_the_pictures_show_faces_of_each_group(overlapping, tmp_path, monkeypatch):
    drawn = []
    for name in ("draw_samples", "draw_pairs"):
        monkeypatch.setattr(inspect, name, getattr(report, name))
    monkeypatch.setattr(report, "_draw", lambda rows, path: drawn.append(rows))
    (overlapping / "African/m.2/0.jpg").write_bytes(b"")
    put(overlapping / "African/m.2/1.jpg", encode(noise(5, 200)))
    run(overlapping, "--pairs", tmp_path / "pairs")
    samples, shared = drawn
    assert [(name, len(images)) for name, images in samples] == [("African", 2), ("Indian", 3)]
    assert samples[0][1][1].shape == (200, 200, 3)
    assert np.array_equal(samples[0][1][0], cv2.imread(str(overlapping / "African/m.1/0.jpg")))
    assert [name.split("\n")[0] for name, _ in shared] == ["African/m.1/0.jpg", "Indian/m.3/0.jpg", "Indian/m.5/1.jpg"]
    assert np.array_equal(*shared[0][1])


def test_a_picture_is_drawn_for_any_names_and_sizes(tmp_path):
    rows = [("$\\frac$", [noise(1), noise(2, 400)[:90]]), ("\udcff".encode(errors="replace").decode(), [])]
    report._draw(rows, tmp_path / "picture.png")
    assert cv2.imread(str(tmp_path / "picture.png")).shape[2] == 3


def test_processes_that_read_images_do_not_import_pytorch():
    """The import takes seconds and hundreds of megabytes in each process."""
    modules = "utils.prepare.contents, utils.prepare.align, utils.prepare.rec"
    run = [sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(run, cwd=ROOT, check=False).returncode == 0
