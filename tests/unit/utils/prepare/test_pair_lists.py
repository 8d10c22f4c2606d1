"""Lists of pairs as other projects hand them out: each kind gives the same pairs, and says how it was understood."""

import unicodedata
from pathlib import Path

import pytest

from tests.unit.utils.prepare.test_pairs import contents, files, published, run, write_faces
from utils.errors import InputError
from utils.prepare import pairs
from utils.prepare.pair_lists import read_list

IDENTITIES = ("Ada", "Bo_Li", "Cy")
GENUINE = [(name, k, k + 1) for k in range(1, 5) for name in IDENTITIES][:10]
IMPOSTOR = [(IDENTITIES[k % 3], 1 + k % 5, IDENTITIES[(k + 1) % 3], 1 + k % 4) for k in range(10)]


def path(name: str, k: int) -> str:
    return f"{name}/{name}_{k:04}.jpg"


PATHS = [(path(name, a), path(name, b), True) for name, a, b in GENUINE]
PATHS += [(path(one, a), path(other, b), False) for one, a, other, b in IMPOSTOR]
PATHS = [PATHS[k + 10 * kind] for k in range(10) for kind in (0, 1)]  # alternately genuine and impostor
SAME = [True, False] * 10


@pytest.fixture
def faces(tmp_path) -> Path:
    write_faces(tmp_path / "faces", dict.fromkeys(IDENTITIES, 5))
    return tmp_path / "faces"


def made(faces: Path, text: str | bytes, name: str = "pairs.txt", *given: str) -> tuple[list[bytes], list[bool]]:
    """Writes a list and makes a .bin of it."""
    listed = faces.parent / name
    listed.write_bytes(text if isinstance(text, bytes) else text.encode())
    run(pairs, "--list", listed, "--images", faces, "--output", faces.parent / "out" / "x.bin", *given)
    return published(faces.parent / "out" / "x.bin")


def expected(faces: Path) -> tuple[list[bytes], list[bool]]:
    return contents(faces, [name for one, other, _ in PATHS for name in (one, other)]), SAME


def rows(form: str, true: str = "1", false: str = "0", ends: str = "\n") -> str:
    return "".join(form.format(a=a, b=b, s=true if same else false) + ends for a, b, same in PATHS)


FORMS = {
    "comma": (rows("{a},{b},{s}"), "comma separated, images in columns 1 and 2, label in column 3"),
    "comma and blank": (rows("{a}, {b}, {s}"), "comma separated, images in columns 1 and 2, label in column 3"),
    "semicolon": (rows("{a};{b};{s}"), "semicolon separated, images in columns 1 and 2, label in column 3"),
    "bar": (rows("{a}|{b}|{s}"), "bar separated, images in columns 1 and 2, label in column 3"),
    "True": (rows("{a} {b} {s}", "True", "False"), "blank separated, images in columns 1 and 2, label in column 3"),
    "yes": (rows("{a}\t{b}\t{s}", "yes", "NO"), "tab separated, images in columns 1 and 2, label in column 3"),
    "minus one": (rows("{a} {b} {s}", "1", "-1"), "label in column 3"),
    "plus one": (rows("{a} {b} {s}", "+1", "-1"), "label in column 3"),
    "decimals": (rows("{a} {b} {s}", "1.0", "0.0"), "label in column 3"),
    "words": (rows("{a},{b},{s}", "genuine", "imposter"), "label in column 3"),
    "match": (rows("{a},{b},{s}", "Match", "Non-Match"), "label in column 3"),
    "label first": (rows("{s} {a} {b}"), "images in columns 2 and 3, label in column 1"),
    "label between": (rows("{a},{s},{b}"), "images in columns 1 and 3, label in column 2"),
    "score behind": (rows("{a} {b} {s} 0.83"), "images in columns 1 and 2, label in column 3"),
    "index before": (rows("17,{a},{b},{s}"), "images in columns 2 and 3, label in column 4"),
    "quotes": (rows('"{a}","{b}","{s}"'), "comma separated, images in columns 1 and 2, label in column 3"),
    "quotes and blanks": (rows('"{a}" "{b}" {s}'), "blank separated, images in columns 1 and 2, label in column 3"),
    "known header": ("img1,img2,same\n" + rows("{a},{b},{s}"), "comma separated, with a header line, images in colu"),
    "unknown header": ("foto_a;foto_b;gleich\n" + rows("{a};{b};{s}"), "semicolon separated, with a header line, im"),
    "header decides": ("score,label,file_x,file_y\n" + rows("1,{s},{a},{b}"), "columns 3 and 4, label in column 2 (l"),
    "inverted header": ("p1,p2,different\n" + rows("{a},{b},{s}", "0", "1"), "label in column 3 (different)"),
    "comments": ("# mine\n" + rows("{a} {b} {s}") + "# end\n", "blank separated, 2 comment lines passed over, imag"),
    "CRLF": (rows("{a} {b} {s}", ends="\r\n"), "blank separated"),
    "old Mac": (rows("{a} {b} {s}", ends="\r"), "blank separated"),
    "byte order mark": ("\ufeff" + rows("{a},{b},{s}"), "comma separated"),
    "utf-16": (rows("{a}\t{b}\t{s}").encode("utf-16"), "tab separated"),
    "utf-16 without mark": (rows("{a},{b},{s}", ends="\r\n").encode("utf-16-le"), "comma separated"),
    "utf-16 big endian": (rows("{a},{b},{s}").encode("utf-16-be"), "comma separated"),
    "utf-32": (rows("{a},{b},{s}").encode("utf-32"), "comma separated"),
    "backslashes": (rows("{a} {b} {s}").replace("/", "\\"), "blank separated"),
    "drive": (rows("C:/faces/lfw/{a},C:/faces/lfw/{b},{s}").replace("/", "\\"), "comma separated"),
    "another root": (rows("/home/x/lfw/{a} /home/x/lfw/{b} {s}"), "blank separated"),
    "dots": (rows("./{a} ./{b} {s}"), "blank separated"),
    "no ending": (rows("{a} {b} {s}").replace(".jpg", ""), "blank separated"),
    "another ending": (rows("{a},{b},{s}").replace(".jpg", ".PNG"), "comma separated"),
}


@pytest.mark.parametrize(("text", "said"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_pairs_and_says_how_it_was_read(faces, text, said, capsys):
    assert made(faces, text) == expected(faces)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "separated" in line)
    assert line.startswith(f"{faces.parent}/pairs.txt: ") and said in line


TWO_LINES = "".join(f"{name}_{k}.jpg {{}}\n" for name, a, b in GENUINE for k in (a, b))
NOT_SAME = "".join(f"{one}_{a}.jpg 0\n{other}_{b}.jpg 0\n" for one, a, other, b in IMPOSTOR)


@pytest.mark.parametrize("labels", [["1"] * 20, [str(1 + k // 2) for k in range(20)]], ids=["CPLFW", "CALFW"])
def test_two_lines_a_pair_become_ten_folds_of_both_kinds(tmp_path, labels, capsys):
    write_faces(tmp_path / "kept", dict.fromkeys(IDENTITIES, 5))
    flat = tmp_path / "faces"
    flat.mkdir()
    for name in IDENTITIES:
        for k in range(1, 6):
            (flat / f"{name}_{k}.jpg").write_bytes((tmp_path / "kept" / path(name, k)).read_bytes())
    assert made(flat, TWO_LINES.format(*labels) + NOT_SAME) == expected(tmp_path / "kept")
    out = capsys.readouterr().out
    assert "two lines a pair as in CALFW and CPLFW, label in column 2; written in 10 folds" in out
    assert "20 pairs, 10 folds of 1 genuine + 1 impostor." in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.jpg 1\nb.jpg 1\nc.jpg 1\n", "line 3: expected two lines a pair, and its second"),
        ("a.jpg 1\nb.jpg 0\n", "line 2: expected two lines a pair with the label 1"),
        ("a.jpg 11\nb.jpg 11\n", "line 2: expected two lines a pair with the label 11, at most 10"),
        ("a.jpg b.jpg 1\nc.jpg d.jpg 2\n", "line 2: expected"),
        ("a.jpg,b.jpg,0\nc.jpg,d.jpg,-1\n", "line 1: expected"),
        ("a.jpg b.jpg 0.31\n", "line 1: expected"),
        ("a_1.jpg 0\na_2.jpg 0\nb_1.jpg 1\nb_2.jpg 1\n", "a list of images with the number of their identity"),
        ("a.jpg b.jpg 1 0\nc.jpg d.jpg 1 1\n", r"two ways: label in column 3 \(2 gen.* column 4 \(1 gen"),
        ("a.jpg,b.jpg,1\nc.jpg,1\n", "line 2: expected"),
    ],
)
def test_what_is_no_list_is_refused_by_its_line(tmp_path, text, sentence):
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_list(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        (
            "a.jpg b.jpg 1 0\nc.jpg d.jpg 0 0\ne.jpg f.jpg 1 1\n",
            ["label in column 3 (2 gen", "label in column 4 (1 gen"],
        ),
        ("1 12 13\n0 14 15\n", ["a name and the numbers of two images", "the label in column 1"]),
        ("12 13 1\n14 15 0\n", ["a name and the numbers of two images", "the label in column 3"]),
    ],
)
def test_two_readings_are_both_named(tmp_path, text, readings):
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError, match="can be read in two ways") as error:
        read_list(tmp_path / "x")
    assert all(one in str(error.value) for one in readings)


def test_a_web_page_a_pointer_and_an_archive_are_named(tmp_path):
    for content, sentence in {
        b"<!DOCTYPE html><html>": "is a web page instead",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a pointer of Git LFS",
        b"PK\3\4": "is a zip archive: unpack it",
    }.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(InputError, match=f"x {sentence}"):
            read_list(tmp_path / "x")


@pytest.mark.parametrize("sign", ["\t", " "])
def test_names_of_several_words(faces, sign, capsys):
    for name in IDENTITIES:
        for k in range(1, 6):
            (faces / path(name, k)).rename(faces / name / f"Dr {name} Doe_{k:04}.jpg")
        (faces / name).rename(faces / f"Dr {name} Doe")
    lines = [f"Dr {name} Doe{sign}{a}{sign}{b}" for name, a, b in GENUINE]
    lines += [f"Dr {one} Doe{sign}{a}{sign}Dr {other} Doe{sign}{b}" for one, a, other, b in IMPOSTOR]
    _, same = made(faces, "\n".join(lines))
    assert same == [True] * 10 + [False] * 10
    named = rows("{a} {b} {s}")
    for name in IDENTITIES:
        named = named.replace(f"{name}/{name}", f"Dr {name} Doe/Dr {name} Doe")
    images, same = made(faces, named)
    assert same == SAME and len(images) == 40


LAYOUTS = {
    "{name}/{name}_{k:04}_0.png": "as MTCNN writes faces",
    "{name}/{name}_{k}.jpg": "without zeros",
    "{name}/{k:04}.webp": "number in a folder",
    "{name}/{k}.jpg": "number without zeros",
    "{name}_{k:04}.jpg": "flat",
    "{name}_{k}.JPG": "flat without zeros",
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.values())
def test_numbers_are_found_in_every_usual_layout(faces, layout, capsys):
    want = expected(faces)
    for name in IDENTITIES:
        for k in range(1, 6):
            (faces / path(name, k)).rename(faces / layout.format(name=name, k=k))
    numbered = [f"{name} {a} {b}" for name, a, b in GENUINE]
    numbered += [f"{one} {a} {other} {b}" for one, a, other, b in IMPOSTOR]
    assert made(faces, "\n".join(numbered[k + 10 * kind] for k in range(10) for kind in (0, 1))) == want
    assert f"Ada/Ada_0001 is found as {layout.format(name='Ada', k=1)}, and so are others" in capsys.readouterr().out


def test_images_that_are_found_in_two_ways_are_refused(faces):
    (faces / "Ada" / "Ada_0001.jpg").rename(faces / "Ada_1.jpg")
    with pytest.raises(InputError, match=r"found in two ways, such as .*: set --images to one folder"):
        made(faces, "Ada 1 2\nAda 2 Cy 1\n")
    assert "x.bin" not in files(faces.parent / "out")


def test_letters_of_other_systems_are_found(faces):
    (faces / "Ada").rename(faces / unicodedata.normalize("NFD", "José"))  # as macOS writes it
    text = "José/Ada_0001.jpg,Cy/Cy_0001.jpg,0\n"
    want = contents(faces, [unicodedata.normalize("NFD", "José") + "/Ada_0001.jpg", "Cy/Cy_0001.jpg"])
    for encoding in ("utf-8", "cp1252", "utf-16"):
        assert made(faces, text.encode(encoding)) == (want, [False])


# BFW ------------------------------------------------------------------------------------------------------------------

GROUPS = ["asian_females", "white males"]


def bfw() -> str:
    """A table as BFW has it: of each group all pairs, those of fold 2 first, and one pair across groups."""
    head = "fold,p1,p2,label,id1,id2,att1,att2,vgg16\n"
    lines = [
        f"{fold},{a},{b},{int(same)},{a[:2]},{b[:2]},{group},{group},0.3"
        for group in GROUPS
        for fold in (2, 1)
        for a, b, same in sorted(PATHS[10 * (fold - 1) : 10 * fold], key=lambda row: row[2])
    ]
    return head + "\n".join([*lines, f"1,{PATHS[1][0]},{PATHS[1][1]},0,Ad,Bo,{GROUPS[0]},{GROUPS[1]},0.3"])


def test_a_table_with_folds_and_groups_becomes_a_set_of_each_group(faces, capsys):
    (faces.parent / "bfw.csv").write_text(bfw())
    run(pairs, "--list", faces.parent / "bfw.csv", "--images", faces, "--output", faces.parent / "out")
    written = [f"{group}_test{ending}" for group in sorted(GROUPS) for ending in (".bin", "_identities.json")]
    assert files(faces.parent / "out") == written
    out = capsys.readouterr().out
    assert "images in columns 2 and 3, label in column 4 (label)" in out
    assert "1 pairs are of images of two groups, and belong to no set." in out
    assert "20 pairs, 10 folds of 1 genuine + 1 impostor, in the order of the 2 folds in column fold." in out
    assert out.endswith(f"--pairs {faces.parent}/out --ethnicities 'asian_females,white males'\n")
    for group in GROUPS:
        images, same = published(faces.parent / "out" / f"{group}_test.bin")
        assert same == SAME
        assert (images, same) == expected(faces)


def test_one_set_of_all_groups_and_folds_of_other_sizes(faces, capsys):
    _, same = made(faces, bfw(), "bfw.csv")
    assert len(same) == 41 and sum(same) == 20
    out = capsys.readouterr().out
    assert "Columns att1 and att2 name groups: give a folder as --output for a set of each group." in out
    assert "of 20 to 21 pairs, whose bounds move" in out
    assert sum(same[:21]) == 10  # fold 1, which has the pair across groups


def test_groups_of_other_columns(faces):
    table = bfw().replace("att1,att2,vgg16", "att1,att2,kind")
    (faces.parent / "bfw.csv").write_text(table.replace(",0.3", ",one"))
    given = ["--list", faces.parent / "bfw.csv", "--images", faces]
    run(pairs, *given, "--output", faces.parent / "out", "--groups", "kind")
    assert files(faces.parent / "out") == ["one_test.bin", "one_test_identities.json"]
    with pytest.raises(InputError, match=r"bfw.csv has no column 'race' \(fold, p1, .*\): set --groups"):
        run(pairs, *given, "--output", faces.parent / "out", "--groups", "race")
    with pytest.raises(InputError, match="--groups goes with a folder as --output"):
        run(pairs, *given, "--output", faces.parent / "x.bin", "--groups", "att1,att2")
    (faces.parent / "plain.txt").write_text(rows("{a} {b} {s}"))
    with pytest.raises(InputError, match=r"out2 is no name of a \.bin"):
        run(pairs, "--list", faces.parent / "plain.txt", "--images", faces, "--output", faces.parent / "out2")


def test_two_columns_of_labels_that_disagree_are_refused(faces):
    lines = [f"{one},{other},{k % 3 == 0:d},{same:d}" for k, (one, other, same) in enumerate(PATHS)]
    with pytest.raises(InputError, match=r"two ways: label in column 3 \(7 genuine pairs\); or label in column 4 \(10"):
        made(faces, "\n".join(["file1,file2,decision,label", *lines]), "two.csv")


@pytest.mark.parametrize("name", ["non_match", "not_same", "distance", "imposter"])
def test_columns_that_say_the_opposite_are_inverted(faces, name):
    lines = [f"{one},{other},{not same:d}" for one, other, same in PATHS]
    assert made(faces, "\n".join([f"p1,p2,{name}", *lines]), "inverted.csv")[1] == SAME


def test_images_may_be_called_by_numbers_under_a_header(tmp_path):
    (tmp_path / "x").write_text("img1,img2,label\n1,2,1\n1,3,0\n")
    assert [(pair.one.places[0], pair.same) for pair in read_list(tmp_path / "x").pairs] == [("1", True), ("1", False)]
