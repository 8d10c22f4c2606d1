"""Conversion of lists of pairs to .bin and back, RFW's release, bad lists, and damaged .bin files."""

import argparse
import csv
import os
import pickle
import signal
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import encode, full_disk, noise
from tests.soak.trials import gadgets
from tests.unit.utils.data.test_pairs import python2_pickle
from utils.data.identities import read_identities
from utils.data.pairs import load_bin, read_bin
from utils.errors import InputError, NotWritten
from utils.prepare import __main__ as prepare
from utils.prepare import lists, pairs, rfw
from utils.prepare.lists import ENDINGS, Face, write_bin
from utils.prepare.rfw import identities_of_lists
from utils.prepare.work import in_processes
from utils.storage.locks import locked


def run(command, *words, processes: int = 1) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([*map(str, words), "--processes", str(processes)]))


def face(shade: int, extension: str = ".jpg") -> bytes:
    """Returns an image of one colour, different for every shade below 64."""
    return encode(np.full((112, 112, 3), 4 * (shade % 64), np.uint8), extension)


def write_faces(folder: Path, identities: dict[str, int], extension: str = ".jpg") -> None:
    """Writes images <identity>/<identity>_%04d, numbered from 1; `identities` gives their numbers."""
    shade = 0
    for name, count in identities.items():
        (folder / name).mkdir(parents=True)
        for k in range(1, count + 1):
            shade += 1
            (folder / name / f"{name}_{k:04d}{extension}").write_bytes(face(shade, extension))


def published(path: Path) -> tuple[list[bytes], list[bool]]:
    """Reads a .bin as the published evaluators do."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="bytes")


def contents(folder: Path, names: list[str]) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# RFW ------------------------------------------------------------------------------------------------------------------

IDENTITIES = {"m.0a": 3, "m.0b": 2, "m.0c_d": 4}
SAME = ([True] * 300 + [False] * 300) * 10


@cache
def rfw_pairs(seed: int) -> tuple[list[str], list[str]]:
    """Returns 6,000 lines, and the images that they name, in order."""
    random, ids = np.random.default_rng(seed), list(IDENTITIES)
    lines, images = [], []
    for same in SAME:
        one, other = (ids[k] for k in random.permutation(3)[:2])
        if same:
            n1, n2 = random.permutation(IDENTITIES[one])[:2] + 1
            lines.append(f"{one}\t{n1}\t{n2}")
            images += [f"{one}/{one}_000{n1}.jpg", f"{one}/{one}_000{n2}.jpg"]
        else:
            n1, n2 = (random.integers(IDENTITIES[name]) + 1 for name in (one, other))
            lines.append(f"{one}\t{n1}\t{other}\t{n2}")
            images += [f"{one}/{one}_000{n1}.jpg", f"{other}/{other}_000{n2}.jpg"]
    return lines, images


def write_list(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


FOLDERS = {"African": "images/African", "Asian": "images/data/Asian"}


@pytest.fixture
def release(tmp_path) -> Path:
    """Writes RFW's text release of two ethnicities, with the images of one of them in `data`."""
    for seed, (ethnicity, folder) in enumerate(FOLDERS.items()):
        write_list(tmp_path / "txts" / ethnicity / f"{ethnicity}_pairs.txt", rfw_pairs(seed)[0])
        write_list(tmp_path / "txts" / ethnicity / f"{ethnicity}_people.txt", ["m.0a\t3"])
        write_faces(tmp_path / folder, IDENTITIES)
    return tmp_path


def run_rfw(release: Path) -> None:
    run(rfw, "--release", release, "--images", release / "images", "--output", release / "bins")


def test_rfw_becomes_one_set_per_ethnicity_in_the_order_of_its_list(release, capsys):
    run_rfw(release)
    sets = [f"{name}_test{ending}" for name in ("African", "Asian") for ending in (".bin", "_identities.json")]
    assert files(release / "bins") == sets
    said = ""
    for seed, (ethnicity, folder) in enumerate(FOLDERS.items()):
        path = release / "bins" / f"{ethnicity}_test.bin"
        content = published(path)
        assert content == (contents(release / folder, rfw_pairs(seed)[1]), SAME)
        assert type(content) is tuple and [*map(type, content)] == [list, list]
        assert {*map(type, content[0])} == {bytes} and {*map(type, content[1])} == {bool}
        assert path.read_bytes().startswith(b"\x80\x02")
        assert path.stat().st_size < 100_000  # an image in several pairs is stored once
        said += f"Written to {path}: 6,000 pairs, 10 folds of 300 genuine + 300 impostor.\n"
    out, err = capsys.readouterr()
    assert out == f"{said}Next: python -m eval.evaluation --pairs {release / 'bins'}\n"
    assert "pairs" not in err


def test_an_ethnicity_with_bad_images_is_not_written(release):
    output, folder = release / "bins", release / "images" / "African"
    output.mkdir()
    (output / "African_test.bin").write_bytes(b"of before")
    (folder / "m.0a" / "m.0a_0001.jpg").unlink()
    (folder / "m.0a" / "m.0a_0002.jpg").write_bytes(face(1)[:-50])
    (folder / "m.0b" / "m.0b_0001.jpg").write_bytes(b"")
    (folder / "m.0b" / "m.0b_0002.jpg").unlink()
    (folder / "m.0b" / "m.0b_0002.jpg").mkdir()
    with pytest.raises(InputError) as error:
        run_rfw(release)
    text, listed = str(error.value), release / "txts/African/African_pairs.txt"
    failures = output / "African_test_failures.csv"
    assert text.startswith(f"4 of the 9 images in {folder} that {listed} names cannot be used, which costs ")
    assert f" of 6,000 pairs (all listed in {failures}):\n  m.0" in text
    assert text.endswith(f"\nAdd or repair them.\n{output / 'African_test.bin'} is still that of an earlier run.")
    reasons = {
        "m.0a/m.0a_0001.jpg": "is not there",
        "m.0a/m.0a_0002.jpg": "is a truncated JPEG",
        "m.0b/m.0b_0001.jpg": "is empty",
        "m.0b/m.0b_0002.jpg": "is no file",
    }
    first_line = {name: str(rfw_pairs(0)[1].index(name) // 2 + 1) for name in reasons}
    with open(failures, newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["line", "image", "reason"]
    assert sorted(rows) == sorted([first_line[name], name, reason] for name, reason in reasons.items())
    assert all(f"\n  {name} {reason}\n" in text for name, reason in reasons.items())
    assert (output / "African_test.bin").read_bytes() == b"of before"
    assert published(output / "Asian_test.bin") == (contents(release / FOLDERS["Asian"], rfw_pairs(1)[1]), SAME)

    for path in (folder / "m.0a").iterdir():
        path.write_bytes(face(1))
    (folder / "m.0a" / "m.0a_0001.jpg").write_bytes(face(1))
    (folder / "m.0b" / "m.0b_0001.jpg").write_bytes(face(1))
    (folder / "m.0b" / "m.0b_0002.jpg").rmdir()
    (folder / "m.0b" / "m.0b_0002.jpg").write_bytes(face(1))
    run_rfw(release)
    assert failures.read_text() == "line,image,reason\n"
    assert published(output / "African_test.bin") == (contents(folder, rfw_pairs(0)[1]), SAME)


def test_a_missing_folder_of_images_is_named_and_others_are_written(release):
    (release / "images" / "African").rename(release / "images" / "Africa")
    folder = release / "images"
    with pytest.raises(
        InputError, match=f"There is no folder {folder}/African, nor {folder}/data/African: set --images"
    ):
        run_rfw(release)
    assert files(release / "bins") == ["Asian_test.bin", "Asian_test_identities.json"]


def swapped(lines: list[str]) -> list[str]:
    return [*lines[:299], lines[300], lines[299], *lines[301:]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: lines[:-1], "Asian_pairs.txt holds 5,999 pairs, expected 6,000"),
        (lambda lines: [*lines, lines[0]], "Asian_pairs.txt holds 6,001 pairs, expected 6,000"),
        (swapped, "Asian_pairs.txt, line 300: expected a genuine pair, since RFW's 10 folds have 300 genuine"),
        (lambda lines: lines[300:], "line 1: expected a genuine pair"),
        (lambda lines: [*lines[:300], *lines], "line 301: expected an impostor pair"),
        (lambda lines: ["10\t300", *lines], 'line 1: expected "id n1 n2" or "id1 n1 id2 n2", found \'10 300\''),
        (lambda lines: ["a.jpg\tb.jpg\t1", *lines[1:]], "line 1: expected .*, found 'a.jpg b.jpg 1'"),
        (lambda lines: [*lines[:7], "", "m.0a\t1", *lines[7:]], "line 9: expected .*, found 'm.0a 1'"),
        (lambda lines: [], "Asian_pairs.txt names no pair"),
    ],
)
def test_a_list_that_is_not_rfws_is_refused_before_anything_is_written(release, change, sentence):
    write_list(release / "txts/Asian/Asian_pairs.txt", change(rfw_pairs(1)[0]))
    with pytest.raises(InputError, match=sentence):
        run_rfw(release)
    assert not (release / "bins").exists()


def test_implausible_pairs_of_rfw_give_a_warning(release, capsys):
    lines, _ = rfw_pairs(1)
    path = write_list(release / "txts/Asian/Asian_pairs.txt", [*lines[:9], "m.0a\t1\t1", *lines[10:]])
    run_rfw(release)
    assert f"{path}: 1 genuine pairs show one image twice, first in line 10.\n" in capsys.readouterr().err


def test_a_folder_without_lists_is_refused(release, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/txts holds no txts/<ethnicity>/<ethnicity>_pairs.txt"):
        run(rfw, "--release", release / "txts", "--images", release, "--output", release / "bins")


def test_identities_of_rfws_lists(release):
    write_list(release / "txts/Asian/Asian_pairs.txt", ["x y\t1\t2", "m.1\t1\tm.2\t1", "m.1\t2\tm.3\t1"])
    assert identities_of_lists(release) == {"African": set(IDENTITIES), "Asian": {"x y", "m.1", "m.2", "m.3"}}


def test_an_ethnicity_without_its_list_is_reported(release):
    (release / "txts" / "Indian").mkdir()
    (release / "txts" / "Indian" / "indian_pairs.txt").write_text("m.1\t1\t2\n")
    for what in (lambda: identities_of_lists(release), lambda: run_rfw(release)):
        with pytest.raises(InputError, match=r"There is no file .*Indian_pairs\.txt: add it, or take the folder"):
            what()
    assert not (release / "bins").exists()


# Any list -------------------------------------------------------------------------------------------------------------

FACES = {"Ada": 3, "Bo_Li": 2, "Cy": 1}
LINES = ["Ada\t1\t3", "Bo_Li\t2\t1", "Ada\t2\tCy\t1", "Cy\t1\tBo_Li\t2"]
IMAGES = ["Ada/Ada_0001", "Ada/Ada_0003", "Bo_Li/Bo_Li_0002", "Bo_Li/Bo_Li_0001"]
IMAGES += ["Ada/Ada_0002", "Cy/Cy_0001", "Cy/Cy_0001", "Bo_Li/Bo_Li_0002"]


@pytest.fixture
def faces(tmp_path) -> Path:
    write_faces(tmp_path / "faces", FACES)
    return tmp_path / "faces"


def put_together(faces: Path, content: bytes, processes: int = 1) -> tuple[list[bytes], list[bool]]:
    path = faces.parent / "pairs.txt"
    path.write_bytes(content)
    output = faces.parent / "out" / "x.bin"
    run(pairs, "--list", path, "--images", faces, "--output", output, processes=processes)
    return published(output)


@pytest.mark.parametrize(
    "head",
    ["", "1\t2\n", "2\n", "4\n", "\ufeff", "\n \n"],
    ids=["none", "folds and pairs", "genuine pairs", "pairs", "byte order mark", "blank lines"],
)
@pytest.mark.parametrize("form", ["tabs", "spaces", "CRLF"])
def test_lfw_style_lists_are_read(faces, head, form, capsys):
    text = head + "\n".join(LINES)
    text = text.replace("\t", "  ") if form == "spaces" else text.replace("\n", "\r\n") if form == "CRLF" else text
    assert put_together(faces, text.encode()) == (
        contents(faces, [f"{name}.jpg" for name in IMAGES]),
        [True, True, False, False],
    )
    assert files(faces.parent / "out") == ["x.bin", "x_identities.json"]
    assert "announces" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "announced"), [("10\t300", "6,000"), ("3", "3 or 6"), ("1\t4", "8"), ("999999999 999999999", "1,9")]
)
def test_a_wrong_count_in_the_first_line_is_reported(faces, head, announced, capsys):
    put_together(faces, "\n".join([head, *LINES]).encode())
    assert f"pairs.txt: its first line announces {announced}" in capsys.readouterr().err


def test_the_evaluation_reads_what_was_written(faces):
    put_together(faces, "\n".join(LINES).encode())
    read = load_bin(faces.parent / "out" / "x.bin")
    assert read.same.tolist() == [True, True, False, False]
    shades = [1, 3, 5, 4, 2, 6, 6, 5]
    assert np.abs(read.images.reshape(8, -1).mean(1) - 4 * np.array(shades)).max() < 2


def test_identities_may_be_numbers(tmp_path):
    write_faces(tmp_path / "faces", {"7": 2, "08": 1})
    assert put_together(tmp_path / "faces", b"7 1 2\n7 2 08 1") == ([face(k) for k in (1, 2, 2, 3)], [True, False])


def test_images_are_found_with_any_ending_and_jpg_first(tmp_path):
    for shade, ending in enumerate(ENDINGS, 1):
        write_faces(tmp_path / "faces", {f"n{shade}": shade}, ending)
    write_faces(tmp_path / "more", {"n1": 1}, ".png")
    (tmp_path / "more/n1/n1_0001.png").rename(tmp_path / "faces/n1/n1_0001.png")
    images, _ = put_together(tmp_path / "faces", b"".join(b"n%d 1 %d\n" % (k, k) for k in range(1, 9)))
    assert ENDINGS == (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")
    assert images == [face(shade, ENDINGS[k - 1]) for k in range(1, 9) for shade in (1, k)]


def test_files_can_be_named_by_their_paths(faces, tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(face(9, ".png"))
    (faces / "of two words.jpg").write_bytes(face(10))
    text = f"Ada/Ada_0001.jpg\tCy/Cy_0001.jpg\t0\n{tmp_path}/elsewhere.png\tof two words.jpg\t1\nAda\t1\t2"
    images, same = put_together(faces, text.encode())
    assert same == [False, True, True]
    assert images == [face(1), face(6), face(9, ".png"), face(10), face(1), face(2)]


def test_names_may_contain_spaces_and_invalid_unicode(faces):
    odd = os.fsdecode(b"\xffda \xc3\xa9")
    for path in (faces / "Ada").iterdir():
        path.rename(path.with_name(path.name.replace("Ada", odd)))
    (faces / "Ada").rename(faces / odd)
    text = b"\xffda \xc3\xa9\t1\t3\nCy\t1\t\xffda \xc3\xa9\t2\n"
    assert put_together(faces, text) == ([face(1), face(3), face(6), face(2)], [True, False])
    (faces / odd / f"{odd}_0002.jpg").unlink()
    with pytest.raises(InputError, match="1 of the 4 images"):
        put_together(faces, text)
    assert "\n2,\ufffdda é/\ufffdda é_0002.jpg,is not there\n" in (faces.parent / "out/x_failures.csv").read_text()


def test_several_processes_give_the_same(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(lists, "in_processes", lambda *given: asked.append(given[-1]) or in_processes(*given))
    write_faces(tmp_path / "faces", {"a": 63, "b": 40})
    lines = [f"a {1 + k % 63} b {1 + k % 40}" for k in range(300)]
    alone = put_together(tmp_path / "faces", "\n".join(lines).encode())
    content = (tmp_path / "out/x.bin").read_bytes()
    assert alone == put_together(tmp_path / "faces", "\n".join(lines).encode(), processes=2)
    assert (tmp_path / "out/x.bin").read_bytes() == content
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("lines", "folds"),
    [
        (["a 1 2"] * 3 + ["a 1 b 1"] * 3 + ["a 1 2", "a 1 b 1"] * 7, "0 to 2 genuine + 0 to 2 impostor"),
        (["a 1 2", "a 1 b 1"] * 10, "1 genuine + 1 impostor"),
    ],
)
def test_the_resulting_folds_are_printed(tmp_path, lines, folds, capsys):
    write_faces(tmp_path / "faces", {"a": 2, "b": 1})
    put_together(tmp_path / "faces", "\n".join(lines).encode())
    assert f"x.bin: 20 pairs, 10 folds of {folds}.\n" in capsys.readouterr().out


def test_folds_that_cannot_be_scored_give_a_warning(tmp_path, capsys):
    write_faces(tmp_path / "faces", {"a": 2, "b": 1})
    put_together(tmp_path / "faces", "\n".join(["a 1 2"] * 6 + ["a 1 b 1"] * 14).encode())
    err = capsys.readouterr().err
    assert "pairs.txt: 7 of 10 folds hold no genuine pair and 3 of 10 folds hold no impostor pair: a fold is a" in err
    put_together(tmp_path / "faces", "\n".join(["a 1 2"] * 9).encode())
    assert "pairs.txt: 9 pairs are too few for the 10 folds of evaluation." in capsys.readouterr().err
    put_together(tmp_path / "faces", "\n".join(["a 1 2", "a 1 b 1"] * 10).encode())
    assert "fold" not in capsys.readouterr().err


def test_implausible_pairs_give_a_warning(faces, capsys):
    text = b"Ada 1 2\nAda 1 0001\nAda 1 Ada 2\nAda 2 Ada 2\nx/y.jpg x/y.jpg 1\nx/y.jpg z.jpg 0\nCy 1 Ada 1\n"
    (faces / "x").mkdir()
    (faces / "x" / "y.jpg").write_bytes(face(1))
    (faces / "z.jpg").write_bytes(face(1))
    assert len(put_together(faces, text)[1]) == 7
    err = capsys.readouterr().err
    assert "pairs.txt: 2 genuine pairs show one image twice, first in line 2.\n" in err
    assert "pairs.txt: 2 impostor pairs are of one identity, first in line 3.\n" in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "pairs.txt names no pair: expected lines"),
        (b"10\t300\n", "names no pair"),
        (b"Ada 1 2\n10 300\n", "line 2: expected .*, found '10 300'"),
        (b"Ada 1 2\nAda 1 x\n", 'line 2: expected "name n1 n2", "name1 n1 name2 n2" or "path1 path2 0|1", found'),
        (b"Ada 1 -2", "line 1: expected"),
        (b"Ada 1 2 3 4", "line 1: expected"),
        (b"Ada\t1\t2\n\n\nAda 1\t2", "line 4: expected .*, found 'Ada 1 2'"),
        (b"a.jpg\tb.jpg\t2", "line 1: expected"),
        (b"a.jpg\t\t1", "line 1: expected"),
        (b"Ada\t1\t\t2", "line 1: expected"),
        (b"Ada\t1\t" + b"9" * 5000, "line 1: expected"),
        ("Ada\t1\t٣".encode(), "line 1: expected"),  # an Arabic digit
        (b"Ada\0\t1\t2", r"line 1: expected .*, found 'Ada.x00 1 2'"),
        (face(1), "line 1: expected"),
    ],
)
def test_malformed_lines_are_named(faces, content, sentence):
    with pytest.raises(InputError, match=sentence):
        put_together(faces, content)
    assert not (faces.parent / "out").exists()


def test_missing_images_are_counted_and_the_first_twenty_named(faces):
    lines = [f"Nobody {k} {k + 1}" for k in range(1, 30)]
    with pytest.raises(InputError) as error:
        put_together(faces, "\n".join(lines).encode())
    text = str(error.value)
    assert text.startswith(f"30 of the 30 images in {faces} that")
    assert [line for line in text.splitlines() if line.startswith("  ")] == [
        *(f"  Nobody/Nobody_{k:04d}.jpg is not there" for k in range(1, 21)),
        "  ...",
    ]
    advice = "Set --images to the folder in which Nobody/Nobody_0001.jpg lies."
    assert "cannot be used, which costs 29 of 29 pairs (all listed in" in text
    assert text.endswith(f"\n{advice} {faces} holds Ada/Ada_0001.jpg, for example.")
    assert len((faces.parent / "out" / "x_failures.csv").read_text().splitlines()) == 31
    assert files(faces.parent / "out") == ["x_failures.csv"]


def test_the_advice_depends_on_the_error(tmp_path):
    write_faces(tmp_path / "faces", {"Ada": 1, "Bo": 1})
    (tmp_path / "faces" / "Cy").write_bytes(b"a file where a folder should be")
    with pytest.raises(InputError, match="1 of the 3 .*\n  Cy/Cy_0001.jpg is not there\nAdd or repair them.$"):
        put_together(tmp_path / "faces", b"Ada 1 Bo 1\nAda 1 Cy 1")
    for name in ("Ada", "Bo"):
        (tmp_path / "faces" / name / f"{name}_0001.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="2 of the 2 .*\n.* is empty\n.* is empty\nAdd or repair them.$"):
        put_together(tmp_path / "faces", b"Ada 1 Bo 1")


def test_images_of_another_size_need_alignment(faces):
    (faces / "Cy" / "Cy_0001.jpg").write_bytes(encode(noise(0, 250)))
    with pytest.raises(InputError) as error:
        put_together(faces, "\n".join(LINES).encode())
    assert "\n  Cy/Cy_0001.jpg is 250 x 250, not 112 x 112\n" in str(error.value)
    assert str(error.value).endswith("\nAlign the faces to 112 x 112 first: python -m utils.prepare align --help")


def test_missing_files_and_folders_are_named(faces, tmp_path):
    with pytest.raises(InputError, match=r"none.txt cannot be read \(No such file"):
        run(pairs, "--list", tmp_path / "none.txt", "--images", faces, "--output", tmp_path / "x.bin")
    with pytest.raises(InputError, match=f"There is no folder {tmp_path}/none: set --images"):
        run(pairs, "--list", tmp_path / "none.txt", "--images", tmp_path / "none", "--output", tmp_path / "x.bin")
    with pytest.raises(InputError, match=f"There is no file {tmp_path}/none.bin: set --bin"):
        run(pairs, "--bin", tmp_path / "none.bin", "--output", tmp_path / "x")


def test_the_two_directions_need_different_arguments(faces):
    with pytest.raises(InputError, match="--list goes with --images"):
        run(pairs, "--list", "x", "--output", "y")
    with pytest.raises(InputError, match="leave --images out"):
        run(pairs, "--bin", "x", "--images", faces, "--output", "y")
    for words in (["--output", "y"], ["--list", "x", "--bin", "x", "--output", "y"]):
        with pytest.raises(SystemExit):
            run(pairs, *words)
    for wrong in (-1, "x"):
        with pytest.raises(SystemExit):
            run(pairs, "--bin", "x", "--output", "y", processes=wrong)


def test_a_missing_column_is_refused(faces, tmp_path):
    for line in (b"7\t1\t8\t", b"\t1\t2", b"\t1\tAda\t2", b"\tAda/Ada_0001.jpg\t1"):
        with pytest.raises(InputError, match="line 2: expected"):
            put_together(faces, b"Ada\t1\t3\n" + line + b"\n")


@pytest.mark.parametrize("output", [".", "/", "faces", "set", "pairs.txt", "new/"])
def test_an_unsuitable_output_is_refused(faces, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Path("pairs.txt").write_text("Ada 1 3\n")
    with pytest.raises(InputError, match=r"is no name of a \.bin: set --output to one"):
        run(pairs, "--list", "pairs.txt", "--images", faces, "--output", output)


def test_a_pipe_is_refused_without_waiting(faces, tmp_path):
    os.mkfifo(faces / "pipe.jpg")
    with pytest.raises(InputError, match="pipe.jpg is no file"):
        put_together(faces, b"pipe.jpg Ada/Ada_0001.jpg 1")


def test_the_command_ends_with_one_sentence(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "COMMANDS", dict.fromkeys(("rfw", "pairs"), ""))
    with pytest.raises(SystemExit) as stop:
        prepare.main(["pairs", "--list", str(tmp_path / "no"), "--images", str(faces), "--output", f"{tmp_path}/x.bin"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f": {tmp_path}/no cannot be read (No such file or directory).\n")
    with pytest.raises(SystemExit) as stop:
        prepare.main(["rfw", "--release", str(faces), "--images", str(faces), "--output", str(tmp_path)])
    assert stop.value.code == 2


# And back -------------------------------------------------------------------------------------------------------------

STORED = [face(1), face(2, ".png"), face(1), face(3), face(4), face(4)]
SAID = [True, False, True]


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps((STORED, SAID), protocol) for protocol in range(6)),
        python2_pickle(STORED, SAID),
        pickle.dumps([tuple(STORED), [1, 0, 1]]),
        *(pickle.dumps(([np.frombuffer(x, np.uint8) for x in STORED], np.array(SAID)), p) for p in (2, 5)),
    ],
)
def test_an_unpacked_and_packed_bin_is_equal(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")
    assert files(tmp_path / "parts") == [
        "images/000000.jpg",
        "images/000001.png",
        "images/000003.jpg",
        "images/000004.jpg",
        "pairs.txt",
    ]
    assert (tmp_path / "parts/pairs.txt").read_bytes() == (
        b"images/000000.jpg\timages/000001.png\t1\nimages/000000.jpg\timages/000003.jpg\t0\n"
        b"images/000004.jpg\timages/000004.jpg\t1\n"
    )
    listed = tmp_path / "parts" / "pairs.txt"
    run(pairs, "--list", listed, "--images", tmp_path / "parts", "--output", tmp_path / "again.bin")
    assert published(tmp_path / "again.bin") == (STORED, SAID)


def test_file_endings_follow_the_content(tmp_path):
    stored = [face(1, extension) for extension in (".webp", ".png", ".jpg", ".jpg")]
    write_bin(tmp_path / "x.bin", stored, [True, False])
    run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")
    names = ["images/000000.webp", "images/000001.png", "images/000002.jpg"]
    assert files(tmp_path / "parts") == [*names, "pairs.txt"]
    assert contents(tmp_path / "parts", names) == stored[:3]


def test_a_folder_with_files_is_refused(tmp_path):
    write_bin(tmp_path / "x.bin", STORED, SAID)
    (tmp_path / "parts").mkdir()
    run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")  # an empty one is accepted
    for output in ("parts", "x.bin"):
        with pytest.raises(InputError, match=f"{output} is there already: set --output to a new folder"):
            run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / output)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    write_bin(tmp_path / "x.bin", STORED, SAID)
    with locked(tmp_path / "parts"), pytest.raises(InputError, match="parts is in use by process"):
        run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")


def test_a_damaged_bin_is_refused(tmp_path):
    write_bin(tmp_path / "x.bin", [*STORED[:3], face(1)[:-40], *STORED[4:]], SAID)
    with pytest.raises(InputError, match="x.bin: image 3 is a truncated JPEG"):
        run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")
    assert files(tmp_path) == ["x.bin"]


# Full disks and kills -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_set_as_it_was(faces, monkeypatch):
    before = put_together(faces, "\n".join(LINES).encode())

    def dump(value, file, protocol):
        file.write(pickle.dumps(value, protocol)[:1000])
        file.flush()
        full_disk()

    monkeypatch.setattr(lists.pickle, "dump", dump)
    with pytest.raises(NotWritten, match=r"x.bin could not be written \(No space left on device\)"):
        put_together(faces, LINES[0].encode())
    assert files(faces.parent / "out") == ["x.bin"]
    assert published(faces.parent / "out" / "x.bin") == before


@pytest.mark.parametrize("stop", [full_disk, lambda *_: os.kill(os.getpid(), signal.SIGINT)], ids=["full", "Ctrl-C"])
def test_a_folder_appears_only_when_it_is_complete(tmp_path, monkeypatch, stop):
    write_bin(tmp_path / "x.bin", STORED, SAID)
    write, written = Path.write_bytes, []

    def write_bytes(path, content):
        assert not (tmp_path / "parts").exists()
        written.append(path)
        return stop() if len(written) == 3 else write(path, content)

    with monkeypatch.context() as patch, pytest.raises((NotWritten, KeyboardInterrupt)):
        patch.setattr(Path, "write_bytes", write_bytes)
        run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")
    assert files(tmp_path) == ["x.bin"]
    (tmp_path / "parts.partial" / "images").mkdir(parents=True)  # left by a kill
    (tmp_path / "parts.partial" / "images" / "000005.jpg").write_bytes(b"half")
    run(pairs, "--bin", tmp_path / "x.bin", "--output", tmp_path / "parts")
    assert len(files(tmp_path / "parts")) == 5 and not (tmp_path / "parts.partial").exists()


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from utils.prepare import lists
def dump(value, file, protocol):
    file.write(pickle.dumps(value, protocol)[:1000])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
lists.pickle = type("", (), {"dump": dump})
lists.write_bin(Path(sys.argv[1]), [bytes(3000), b"x"], [True])
"""


def test_a_kill_leaves_the_set_as_it_was(tmp_path):
    path = tmp_path / "x.bin"
    write_bin(path, STORED, SAID)
    killed = subprocess.run([sys.executable, "-c", KILLED, path], cwd=Path(__file__).parents[4])
    assert killed.returncode == -signal.SIGKILL
    assert len(files(tmp_path)) == 2
    assert published(path) == (STORED, SAID)
    write_bin(path, STORED[:2], [True])
    assert files(tmp_path) == ["x.bin"]
    assert published(path) == (STORED[:2], [True])


# Damaged files --------------------------------------------------------------------------------------------------------

CASES = 2600
EXTREMES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63]


def whole_bins(marker: Path) -> list[bytes]:
    """Returns sets of two pairs in all formats that can be read, and files that would run code."""
    images, same = [face(1), face(2), face(1, ".png"), face(3)], [True, False]
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    hostile = b"".join(gadgets(marker)[name] for name in ("os.system", "numpy.memmap", "STACK_GLOBAL"))
    return [
        *(pickle.dumps((images, same), protocol) for protocol in (0, 2, 4)),
        *(pickle.dumps((arrays, np.array(same)), protocol) for protocol in (0, 2, 4)),
        pickle.dumps((arrays, [np.bool_(value) for value in same]), 2),
        pickle.dumps((np.stack([arrays[0]] * 4), same), 2),
        python2_pickle(images, same),
        b"\x80\x02((l" + hostile + b"lI01\nat.",
    ]


def mutated(random: np.random.Generator, data: bytes) -> bytes:
    # Half of the changes are near an end, where names and numbers are instead of images.
    at, to = (int(random.choice([random.integers(len(data)), random.integers(60), len(data) - 60])) for _ in range(2))
    size = int(random.integers(1, 60))
    match random.integers(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + random.bytes(size) + data[at:]
        case 2:  # copies a piece to another place
            return data[:to] + data[at : at + size] + data[to:]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            size, order = 1 << int(random.integers(4)), ("little", "big")[random.integers(2)]
            number = EXTREMES[random.integers(len(EXTREMES))] % (1 << 8 * size)
            return data[:at] + number.to_bytes(size, order) + data[at + size :]
        case _:
            flipped = bytearray(data)
            for place in [at, *random.integers(0, len(data), random.integers(3))]:
                flipped[place] ^= 1 << random.integers(8)
            return bytes(flipped)


def test_a_mutated_bin_is_read_or_refused_and_runs_no_code(tmp_path):
    path, whole = tmp_path / "x.bin", whole_bins(tmp_path / "executed")
    outcomes, failures = {"read": 0, "refused": 0}, []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for case in range(CASES):
            random = np.random.default_rng(case)
            path.write_bytes(mutated(random, whole[case % len(whole)]))
            try:
                read = load_bin(path)
                assert read.images.shape == (2 * len(read.same), 112, 112, 3)
                outcomes["read"] += 1
            except InputError as error:
                assert str(error).startswith(str(path))
                outcomes["refused"] += 1
            except BaseException as error:
                failures.append((case, repr(error)))
    assert failures == []
    assert [str(one.message) for one in warned] == []
    assert files(tmp_path) == ["x.bin"]
    assert min(outcomes.values()) > CASES / 20, outcomes


def test_a_mutated_list_is_read_or_refused(tmp_path):
    path, text = tmp_path / "pairs.txt", "\n".join(["10\t300", *LINES, "a b.jpg\tc.png\t1", "Bo 1 2"]).encode()
    outcomes = {"read": 0, "refused": 0}
    for case in range(400):
        path.write_bytes(mutated(np.random.default_rng(case), text))
        try:
            for pair in pairs.read_list(path).pairs:
                assert {*map(type, pair[1:3])} == {Face}
                lists.read_image(tmp_path, pair.one)
            outcomes["read"] += 1
        except InputError as error:
            assert str(error).startswith(str(path))
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 40, outcomes


# Identities -----------------------------------------------------------------------------------------------------------


def test_identities_are_written_where_the_list_tells_them(tmp_path):
    write_faces(tmp_path / "faces", {"a": 2, "b": 1})
    one, two, b = (f"{name}/{name}_000{k}.jpg" for name, k in (("a", 1), ("a", 2), ("b", 1)))
    known = [f"{one}\t{two}\t1", f"{one}\t{b}\t0"]
    for lines, names in (
        (["a\t1\t2", "a\t1\tb\t1"], [["a", "a"], ["a", "b"]]),
        (known, [["a", "a"], ["a", "b"]]),
        ([*known, f"{one}\t{two}\t0"], None),  # the folders are not the identities
    ):
        output, path = tmp_path / "out" / "x.bin", write_list(tmp_path / "pairs.txt", lines)
        run(pairs, "--list", path, "--images", tmp_path / "faces", "--output", output)
        found = read_bin(output)
        identities = read_identities(output, found[1], found[2])
        assert (identities if identities is None else identities.tolist()) == names
