"""Alignment by given and by detected landmarks; files that cannot be used are listed and do not stop the command."""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from multiprocessing.context import SpawnProcess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import encode, full_disk_at, noise, put
from utils.data import image_formats, images
from utils.data.align import TEMPLATE, align
from utils.errors import InputError, NotWritten
from utils.prepare import align as prepare
from utils.prepare.landmarks import MOSTLY_NO_FACES, OF_NO_FACE, Landmarks, match, read_landmarks, unlikeness
from utils.prepare.work import TOGETHER, in_processes

ROOT = Path(__file__).parents[4]
POINTS = (1.5 * TEMPLATE + (7, -4)).round(3)  # in a crop of 180 x 170; rounded as in files


def picture(seed: int, width: int = 180, height: int = 170) -> np.ndarray:
    """Returns a smooth image, which JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def line(path: str, points: np.ndarray = POINTS) -> str:
    """Returns a line in the form of RFW's lists."""
    return "\t".join([f"/test/data/{path}", "17", *(f"{value:.3f}" for value in np.ravel(points))]) + "\n"


def listed(folder: Path, *paths: str) -> list[str]:
    """Writes a file with the same landmarks for each path; returns the option of the command."""
    (folder / "marks.txt").write_text("".join(map(line, paths)), errors="surrogateescape")
    return ["--landmarks", str(folder / "marks.txt")]


def command(folder: Path, *given: str | Path, output: str = "out") -> list[tuple[str, ...]]:
    """Aligns <folder>/in and returns the rows of failures.csv."""
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    prepare.run(parser.parse_args(["--images", f"{folder}/in", "--output", f"{folder}/{output}", *map(str, given)]))
    return failures(folder / output)


def failures(output: Path, name: str = "failures.csv") -> list[tuple[str, ...]]:
    path = output / name
    rows = csv.reader(path.read_text().splitlines()) if path.exists() else [()]
    return [tuple(row) for row in rows][1:]


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix == ".jpg")


def expected(source: Path, points: np.ndarray = POINTS) -> bytes:
    face = align(cv2.imread(str(source), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION), points)
    return cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


# Faces ----------------------------------------------------------------------------------------------------------------


def test_faces_in_any_folder_are_aligned_by_their_landmarks(tmp_path, capsys):
    names = ("African/m.1/m.1_0001.jpg", "African/m.1/m.1_0002.PNG", "Asian/2/a/b/c.webp", "top.jpeg")
    points = {name: POINTS + k for k, name in enumerate(names)}
    for k, name in enumerate(names):
        put(tmp_path / "in" / name, encode(picture(k), os.path.splitext(name)[1]))
    put(tmp_path / "in" / "African" / "notes.txt", b"no image")
    (tmp_path / "marks.txt").write_text("".join(line(name, points[name].round(3)) for name in names))
    assert command(tmp_path, "--landmarks", f"{tmp_path}/marks.txt") == []
    assert tree(tmp_path / "out") == sorted(f"{os.path.splitext(name)[0]}.jpg" for name in names)
    for name in names:
        face = (tmp_path / "out" / f"{os.path.splitext(name)[0]}.jpg").read_bytes()
        assert face == expected(tmp_path / "in" / name, points[name].round(3))
    out = capsys.readouterr().out
    assert "1 files below" in out and "(.txt)" in out
    assert out.endswith("out: 4 images aligned, 0 kept, 0 failed.\n")
    made = ["African", "Asian", "acquisition.csv", "align.json", "top.jpg"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == made
    counts = (tmp_path / "out" / "acquisition.csv").read_text()
    assert counts == "group,images,failed\n,1,0\nAfrican,2,0\nAsian,1,0\n"


def test_file_names_need_not_be_valid_unicode(tmp_path):
    name = os.fsdecode(b"\xff d/\xfe.jpg")
    put(tmp_path / "in" / name, encode(picture(0)))
    put(tmp_path / "in" / os.fsdecode(b"\xff d/\xfd.jpg"), b"")
    assert command(tmp_path, *listed(tmp_path, name, os.fsdecode(b"\xff d/\xfd.jpg"))) == [
        ("\ufffd d/\ufffd.jpg", "is empty")
    ]
    assert (tmp_path / "out" / name).read_bytes() == expected_of_bytes(encode(picture(0)))


def expected_of_bytes(content: bytes) -> bytes:
    face = align(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), POINTS)
    return cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


# Image files ----------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


RGB = Image.fromarray(picture(3)[..., ::-1])
MOVING = {"save_all": True, "append_images": [RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}
CLEAR = RGB.copy()
CLEAR.putalpha(100)
WHOLE = {
    "jpeg": (saved(RGB, "jpeg", quality=95), 4),
    "progressive jpeg": (saved(RGB, "jpeg", quality=95, progressive=True), 4),
    "cmyk jpeg": (saved(RGB.convert("CMYK"), "jpeg", quality=95), 4),
    "jpeg with more behind it": (saved(RGB, "jpeg", quality=95) + bytes(5000), 4),
    "jpeg with another before its header": (saved(RGB, "jpeg", quality=95, exif=b"Exif\0\0" + encode(noise(0, 16))), 4),
    "exif orientation": (saved(RGB, "jpeg", quality=95, exif=orientation(6)), 4),
    "png": (saved(RGB, "png"), 0),
    "transparent png": (saved(CLEAR, "png"), 0),
    "16-bit png": (cv2.imencode(".png", picture(3).astype(np.uint16) * 257)[1].tobytes(), 0),
    "animated png": (saved(RGB, "png", **MOVING), 0),
    "webp": (saved(RGB, "webp", lossless=True), 0),
    "lossy webp": (saved(RGB, "webp", quality=95), 12),
    "transparent webp": (saved(CLEAR, "webp", lossless=True), 0),
    "animated webp": (saved(RGB, "webp", lossless=True, **MOVING), 0),
}


@pytest.mark.parametrize(("content", "tolerance"), WHOLE.values(), ids=WHOLE)
def test_images_of_every_kind_are_read(content, tolerance):
    found = images.decode(content, upright=False)
    assert (found.dtype, found.shape) == (np.uint8, (170, 180, 3))
    assert np.abs(found.astype(int) - picture(3)).mean() <= tolerance
    assert image_formats.size_of(content) == (180, 170)


def test_grey_images_have_three_equal_channels():
    for content in (saved(RGB.convert("L"), "jpeg"), saved(RGB.convert("LA"), "png"), saved(RGB.convert("1"), "png")):
        found = images.decode(content, upright=False)
        assert found.shape == (170, 180, 3)
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied_only_for_upright_images(value):
    content = saved(RGB, "jpeg", quality=95, exif=orientation(value))
    stored, upright = images.decode(content, False), images.decode(content, True)
    assert stored.shape == (170, 180, 3)
    turned = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.swapaxes(0, 1)]
    turned += [np.rot90(stored, -1), stored.swapaxes(0, 1)[::-1, ::-1], np.rot90(stored)]
    assert np.array_equal(upright, turned[value - 1])


def png_of_size(width: int, height: int) -> bytes:
    content = bytearray(encode(picture(0), ".png"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def jpeg_of_size(width: int, height: int) -> bytes:
    content = bytearray(encode(picture(0)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_of_size(width: int, height: int) -> bytes:
    content = bytearray(saved(CLEAR, "webp", quality=90))
    assert content[12:16] == b"VP8X"
    content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def animated_png(kind: int) -> bytes:
    """Returns a black PNG of 112 x 112 that claims two frames; one row has the filter `kind`, all others 0."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(bytes([kind if row == 50 else 0]) + bytes(3 * 112) for row in range(112))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 112, 112, 8, 2, 0, 0, 0),
        b"acTL": struct.pack(">II", 2, 0),
        b"fcTL": struct.pack(">IIIIIHHBB", 0, 112, 112, 0, 0, 1, 1, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    return image_formats.PNG + b"".join(map(chunk, chunks, chunks.values()))


def larger(webp: bytes) -> bytes:
    """Returns an animation larger than its frames, for which OpenCV 4.11 reads out of bounds."""
    return webp[:24] + (2000).to_bytes(3, "little") + webp[27:]


BIG = "100,000,000 pixels"
BAD = {
    "nothing": (b"", "is empty"),
    "text": (b"What is this?", "is no JPEG, PNG or WebP image"),
    "gif": (saved(RGB, "gif", **MOVING), "is no JPEG, PNG or WebP image"),
    "one byte": (b"\xff", "is no JPEG, PNG or WebP image"),
    "half a jpeg": (encode(noise(0))[:5000], "is a truncated JPEG"),
    "head of a jpeg": (encode(noise(0))[:50], "is a truncated JPEG"),
    "half a jpeg with a whole one in its header": (
        saved(RGB, "jpeg", exif=b"Exif\0\0" + encode(noise(0, 16)))[:-900],
        "is a truncated JPEG",
    ),
    "half a png": (encode(noise(0), ".png")[:5000], "is a truncated PNG"),
    "head of a png": (encode(noise(0), ".png")[:16] + b"IEND", "ends in its header"),
    "half a webp": (saved(RGB, "webp")[:-900], "is a truncated WebP"),
    "head of an animated webp": (b"RIFF\x08\0\0\0WEBPVP8X", "is no readable image"),
    "head of a webp": (b"RIFF\4\0\0\0WEBP", "ends in its header"),
    "damaged png": (png_of_size(180, 170).replace(b"IDAT", b"iDAT"), "is no readable image"),
    "damaged apng": (animated_png(9), "is no readable image"),  # OpenCV 4.11 crashes on this file
    "animated webp of another size": (larger(saved(RGB, "webp", lossless=True, **MOVING)), "is an animation whose"),
    "huge png": (png_of_size(20_000, 20_000), f"is 20000 x 20000, more than {BIG}"),
    "huge jpeg": (jpeg_of_size(20_000, 5_001), f"is 20000 x 5001, more than {BIG}"),
    "huge webp": (webp_of_size(16_000, 16_000), f"is 16000 x 16000, more than {BIG}"),
    "long png": (png_of_size(32_767, 1), "is 32767 x 1, more than"),
    "png of impossible size": (png_of_size(2**31, 2**31), f"is {2**31} x {2**31}, more than {BIG}"),
}


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_damaged_images_and_other_files_are_refused(content, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        images.decode(content, upright=False)


def test_mutated_images_are_decoded_or_refused():
    random = np.random.default_rng(0)
    whole = [encode(picture(0, 40, 30), ending) for ending in (".jpg", ".png", ".webp")]
    whole += [saved(RGB, "png", **MOVING), saved(RGB, "webp", lossless=True, **MOVING), animated_png(0)]
    refused = 0
    for k in range(600):
        content = bytearray(whole[k % len(whole)])
        for _ in range(random.integers(1, 4)):
            content[random.integers(min(len(content), 100))] = random.integers(256)
        try:
            image = images.decode(bytes(content[: random.integers(len(content) // 2, 2 * len(content))]), bool(k % 2))
            assert image.dtype == np.uint8 and image.shape[2:] == (3,)
        except ValueError:
            refused += 1
    assert 200 < refused < 600


def test_bad_files_are_listed_and_the_others_aligned(tmp_path, monkeypatch, capsys):
    names = [f"{name.replace(' ', '_')}.jpg" for name in (*BAD, *WHOLE)]
    for name, (content, _) in zip(names, (BAD | WHOLE).values(), strict=True):
        put(tmp_path / "in" / name, content)
    (tmp_path / "in" / "zz.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "in" / "folder.jpg").mkdir()
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    put(tmp_path / "in" / "photo.heic", b"ftypheic")
    monkeypatch.setattr(images, "MOST_BYTES", 1_000_000)
    put(tmp_path / "in" / "large.png", bytes(1_000_001))
    rows = command(tmp_path, *listed(tmp_path, *names, "zz.jpg", "photo.heic", "large.png"))
    found = dict(rows)
    assert len(found) == len(rows) == len(BAD) + 3
    for name, (_, reason) in BAD.items():
        assert found[f"{name.replace(' ', '_')}.jpg"].startswith(reason)
    assert found["zz.jpg"] == "cannot be read (No such file or directory)"
    assert found["photo.heic"] == "is no JPEG, PNG or WebP image"
    assert found["large.png"].startswith("has 1,000,001 bytes")
    assert tree(tmp_path / "out") == sorted(f"{name.replace(' ', '_')}.jpg" for name in WHOLE)
    out = capsys.readouterr().out
    assert f"{len(WHOLE)} images aligned, 0 kept, {len(BAD) + 3} failed ({tmp_path}/out/failures.csv)." in out


def test_the_exit_status_is_not_0_if_no_image_can_be_aligned(tmp_path):
    put(tmp_path / "in" / "a.jpg", b"")
    with pytest.raises(InputError, match=r"None of the 1 images could be aligned: .*failures\.csv says why"):
        command(tmp_path, *listed(tmp_path, "a.jpg"))
    assert failures(tmp_path / "out") == [("a.jpg", "is empty")]


def test_the_second_of_two_images_with_the_same_output_name_fails(tmp_path):
    for k, name in enumerate(("b/a.jpg", "b/a.png", "c/a.png")):
        put(tmp_path / "in" / name, encode(picture(k), name[-4:]))
    rows = command(tmp_path, *listed(tmp_path, "b/a.jpg", "b/a.png", "c/a.png"))
    assert rows == [("b/a.png", "would be written over b/a.jpg")]
    assert (tmp_path / "out/b/a.jpg").read_bytes() == expected(tmp_path / "in/b/a.jpg")


def test_a_face_whose_output_name_is_a_folder_fails(tmp_path):
    put(tmp_path / "in" / "a.png", encode(picture(0), ".png"))
    put(tmp_path / "in" / "a.jpg" / "b.jpg", encode(picture(1)))
    rows = command(tmp_path, *listed(tmp_path, "a.png", "a.jpg/b.jpg"))
    assert rows == [("a.png", "has no place: a face has the name of its folder, or a folder its name")]
    assert tree(tmp_path / "out") == ["a.jpg", "a.jpg/b.jpg"]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (np.add(POINTS, (0, 400)), "has landmarks that lie far outside its 180 x 170 pixels"),
        (1e300 * TEMPLATE, "has landmarks that lie far outside"),
        (np.full((5, 2), 50.0), "All landmarks lie at one point"),
        (np.where(np.arange(10).reshape(5, 2) == 3, np.nan, POINTS), "Some landmarks are not finite"),
    ],
)
def test_impossible_landmarks_are_a_failure(tmp_path, points, reason):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    put(tmp_path / "in" / "b.jpg", encode(picture(0)))
    (tmp_path / "marks.txt").write_text(line("a.jpg", points) + line("b.jpg") + line("c.jpg"))
    rows = command(tmp_path, "--landmarks", f"{tmp_path}/marks.txt")
    assert [path for path, _ in rows] == ["a.jpg", "/test/data/c.jpg"]
    assert rows[0][1].startswith(reason)


# Files of landmarks ---------------------------------------------------------------------------------------------------


def plain(values: np.ndarray, separator: str = " ") -> str:
    return separator.join(f"{value:.3f}" for value in np.ravel(values))


FORMS = {
    "rfw": line("m.1/a.jpg"),
    "spaces": f"data/m.1/a.jpg {plain(POINTS)}\n",
    "commas": f"data/m.1/a.jpg,{plain(POINTS, ', ')},\n",
    "columns": f"data/m.1/a.jpg 1 {plain(POINTS.T)}\n",
    "other fields": f"data/m.1/a.jpg 1 0.99 10 20 30 40 {plain(POINTS)}\n",
    "windows": f"D:\\data\\m.1\\a.jpg\t{plain(POINTS)}\r\n",
    "mark of unicode": f"\ufeff/data/m.1/a.jpg\t{plain(POINTS)}\n\n",
    "no end of line": f"m.1/a.jpg {plain(POINTS)}",
    "quotes": f'"data/m.1/a.jpg",{plain(POINTS, ",")}\n',
    "exponents": "m.1/a.jpg " + " ".join(f"{value:+.6e}" for value in POINTS.ravel()),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_landmarks_are_read_in_every_format(tmp_path, text):
    (tmp_path / "marks.txt").write_bytes(text.encode())
    found = read_landmarks(tmp_path / "marks.txt")
    assert [path.endswith("m.1/a.jpg") for path in found.paths] == [True]
    assert (found.lines, found.strays) == ([f"line 1 of {tmp_path}/marks.txt"], [])
    assert found.points.shape == (1, 5, 2)
    assert np.allclose(found.points[0], POINTS, rtol=0, atol=1e-3)


NUMBERS = plain(POINTS, ",")
FLAGGED = " ".join(f"{x:.3f} {y:.3f} 0.0" for x, y in POINTS)
RETINA = f"# m.1/a.jpg\n449 330 12 14 {FLAGGED} 0.82\n"
SMALLER = " ".join(f"{x / 3:.3f} {y / 3:.3f} 0.0" for x, y in POINTS)
NAMED = dict(zip(("left_eye", "right_eye", "nose", "mouth_left", "mouth_right"), POINTS.tolist(), strict=True))
PERSONS_OWN = dict(zip(("right_eye", "left_eye", "nose", "mouth_right", "mouth_left"), POINTS.tolist(), strict=True))
OTHERS = {
    "VGGFace2": (f'NAME_ID,{",".join(f"P{k}X,P{k}Y" for k in range(1, 6))}\n"m.1/a",{NUMBERS}\n', "1 names without en"),
    "CelebA": (
        "1\nlefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y\n"
        f"m.1/a.jpg  {plain(POINTS, '  ')}\n",
        "1 faces, lines, x1 y1 ... x5 y5",
    ),
    "CelebA on Kaggle": (
        "image_id,lefteye_x,lefteye_y,righteye_x,righteye_y,nose_x,nose_y,leftmouth_x,leftmouth_y,rightmouth_x,r_y\n"
        f"m.1/a.jpg,{NUMBERS}\n",
        "1 faces, lines, x1 y1 ... x5 y5",
    ),
    "lst": (f"0\tdata/m.1/a.jpg\t17\t1\t2\t3\t4\t{plain(POINTS.T, chr(9))}\n", "lines, x1 ... x5 y1 ... y5"),
    "semicolons": (f"m.1/a.jpg;{plain(POINTS, ';')}\n", "1 faces, lines, x1 y1 ... x5 y5"),
    "score behind": (f"m.1/a.jpg {plain(POINTS)} 0.998\n", "x1 y1 ... x5 y5 with 1 numbers behind"),
    "score behind columns": (f"m.1/a.jpg,{plain(POINTS.T, ',')},0.998\n", "x1 ... x5 y1 ... y5 with 1 numbers behind"),
    "box before, two numbers behind": (f"m.1/a.jpg 9 8 70 60 {plain(POINTS)} 0.9 1\n", "with 2 numbers behind"),
    "RetinaFace": (RETINA, "1 faces, a label file as of RetinaFace, x1 y1 ... x5 y5"),
    "RetinaFace, two faces": (
        RETINA + f"4 3 1 1 {SMALLER} 0.8\n# m.1/b.jpg\n1 2 3 4 {'-1.0 -1.0 -1.0 ' * 5}0.1\n",
        "1 images show several faces, of which the largest is taken",
    ),
    "utf-16": (line("m.1/a.jpg").encode("utf-16"), "1 faces, lines"),
    "old Mac": (line("m.1/a.jpg").replace("\n", "\r"), "1 faces, lines"),
    "json by path": (json.dumps({"data/m.1/a.jpg": POINTS.tolist()}), "1 faces, JSON, x1 y1 ... x5 y5"),
    "json of ten numbers": (json.dumps({"m.1/a": POINTS.T.ravel().tolist()}), "JSON, x1 ... x5 y1 ... y5"),
    "json with scores": (json.dumps({"m.1/a.jpg": np.c_[POINTS, np.ones(5)].tolist()}), "1 faces, JSON"),
    "json of entries": (json.dumps([{"file": "m.1/a.jpg", "score": 0.9, "kps": POINTS.tolist()}]), "1 faces, JSON"),
    "json of names": (json.dumps({"images": [{"path": "m.1/a.jpg", "keypoints": NAMED}]}), "1 faces, JSON"),
    "json of the person's own": (
        json.dumps({"m.1/a.jpg": {"face_1": {"score": 0.9, "facial_area": [1, 2, 3, 4], "landmarks": PERSONS_OWN}}}),
        "1 faces, JSON",
    ),
    "json lines": (json.dumps({"image": "m.1/a.jpg", "landmarks": POINTS.tolist()}) + "\n", "1 faces, JSON"),
}


@pytest.mark.parametrize(("text", "said"), OTHERS.values(), ids=OTHERS)
def test_landmarks_of_other_projects_are_read(tmp_path, text, said, capsys):
    for name in ("a", "b"):
        put(tmp_path / "in" / "m.1" / f"{name}.jpg", encode(picture(0)))
    put(tmp_path / "marks", text if isinstance(text, bytes) else text.encode())
    found = read_landmarks(tmp_path / "marks")
    assert (len(found.paths), found.strays) == (1, [])
    assert np.allclose(found.points[0], POINTS, rtol=0, atol=1e-3)
    assert said in found.text
    assert command(tmp_path, "--landmarks", tmp_path / "marks") == [("m.1/b.jpg", "has no landmarks")]
    assert (tmp_path / "out/m.1/a.jpg").read_bytes() == expected(tmp_path / "in/m.1/a.jpg")
    assert f"marks: {found.text}." in capsys.readouterr().out


def test_names_without_ending_that_fit_two_images_are_none_of_theirs():
    points, without, strays = matched(["1/a.jpg", "1/a.png", "1/b.jpg", "1/c.webp"], ["1/a", "1/b", "1/c.jpg"])
    assert points == {"1/b.jpg": 1, "1/c.webp": 2}
    assert [*without] == ["1/a.jpg", "1/a.png"] and strays == [("1/a", "line 0 fits several images")]


@pytest.mark.parametrize("text", ["{", "[1, 2, 3]", '{"a.jpg": [1, 2]}', '{"a": 1}\n{"b"'])
def test_json_without_landmarks_is_refused(tmp_path, text):
    put(tmp_path / "marks", text.encode())
    with pytest.raises(InputError, match="marks (is damaged or no JSON|has no line of a path)"):
        read_landmarks(tmp_path / "marks")


@pytest.mark.parametrize("text", ["my photo, again.jpg 3 {}", "my photo, again.jpg\t{}", "my photo, again.jpg,{}"])
def test_paths_may_hold_separators(tmp_path, text):
    (tmp_path / "marks.txt").write_text(text.format(plain(POINTS)))
    assert read_landmarks(tmp_path / "marks.txt").paths == ["my photo, again.jpg"]


def test_most_lines_decide_the_order_of_the_coordinates(tmp_path):
    """Lines that would fit the other order better are read in the order of the file: a lying face, for example."""
    lying = POINTS[:, ::-1] * (1, -1) + (0, 170)
    for values in (lambda points: points, lambda points: points.T):
        text = "".join(f"{k}.jpg {plain(values(points))}\n" for k, points in enumerate([lying, POINTS, POINTS]))
        (tmp_path / "marks.txt").write_text(text)
        found = read_landmarks(tmp_path / "marks.txt").points
        assert np.allclose(found, [lying, POINTS, POINTS], rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", [[1, 0, 2, 4, 3], [2, 3, 4, 0, 1], [0, 1, 3, 2, 4]])
def test_landmarks_in_another_order_are_refused(tmp_path, order):
    (tmp_path / "marks.txt").write_text("\n" + line("a.jpg") + 2 * line("b.jpg", POINTS[order]))
    with pytest.raises(InputError, match=r"The numbers in line 3 of .*marks\.txt, as in most, are neither"):
        read_landmarks(tmp_path / "marks.txt")


@pytest.mark.parametrize("size", [(400, 400), (178, 218), (1080, 1920)])
def test_the_order_of_the_coordinates_is_found_for_any_position(tmp_path, size):
    """In both orders the eyes can be above the mouth, and left before right; only the shape differs."""
    random = np.random.default_rng(0)
    for k in range(100):
        scale = random.uniform(0.5, min(size) / 112)
        points = 0.8 * scale * TEMPLATE + random.uniform(0, 1, 2) * (np.array(size) - 90 * scale)
        points = points + random.normal(0, 2 * scale, (5, 2))
        for values in (points, points.T):
            (tmp_path / "marks.txt").write_text(f"{k}.jpg {plain(values)}\n")
            assert np.allclose(read_landmarks(tmp_path / "marks.txt").points[0], points, rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", [[1, 0, 2, 4, 3], [2, 3, 4, 0, 1], [3, 4, 2, 0, 1]])
def test_a_line_with_landmarks_in_another_order_fails_alone(tmp_path, order):
    for name in "abc":
        put(tmp_path / "in" / f"{name}.jpg", encode(picture(0)))
    (tmp_path / "marks.txt").write_text(line("a.jpg") + line("b.jpg", POINTS[order]) + line("c.jpg"))
    rows = command(tmp_path, "--landmarks", f"{tmp_path}/marks.txt")
    assert rows == [("b.jpg", "has landmarks that do not lie as those of a face do")]
    assert tree(tmp_path / "out") == ["a.jpg", "c.jpg"]


def test_rotated_heads_are_accepted():
    """Projects points of a head in three dimensions, from the front view to the profile."""
    head = np.array([(-17.6, -23, 0), (17.6, -23, 0), (0, -3, 18), (-14.6, 17, 3), (14.6, 17, 3)])
    found = []
    for degrees in (0, 30, 60, 90):
        x, z = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        found.append(float(unlikeness(np.column_stack([head[:, 0] * x + head[:, 2] * z, head[:, 1]]))))
    assert found == sorted(found)
    assert found[2] < MOSTLY_NO_FACES
    assert found[3] < OF_NO_FACE


def test_lines_without_landmarks_are_listed(tmp_path):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    (tmp_path / "marks.txt").write_text("path x1 y1\n\na.jpg 1 2 3\n1 2 3 4 5 6 7 8 9 10\n" + line("a.jpg"))
    rows = command(tmp_path, "--landmarks", f"{tmp_path}/marks.txt")
    reason = "is no path with ten numbers at the end"
    assert rows == [(f"line {number} of {tmp_path}/marks.txt", reason) for number in (1, 3, 4)]


@pytest.mark.parametrize("content", [b"", b"\n", b"a.jpg 1 2 3\n", bytes(range(256)), encode(noise(0))])
def test_files_without_landmarks_are_refused(tmp_path, content):
    (tmp_path / "marks.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"marks\.txt has no line of a path with ten numbers"):
        read_landmarks(tmp_path / "marks.txt")


def matched(paths: list[str], *files: list[str], name: str = "marks.txt"):
    """Returns the line of each image, the reasons of images without a line, and the number of unused lines."""
    marks, count = [], 0
    for lines in files:
        points = np.arange(count, count + len(lines))[:, None, None] + np.zeros((1, 5, 2))
        marks.append(Landmarks(lines, [f"line {k}" for k in range(len(lines))], points, []))
        count += len(lines)
    points, without, strays = match(paths, marks)
    return {path: int(value[0, 0]) for path, value in points.items()}, without, strays


def test_lines_are_matched_by_the_longest_suffix_of_their_path():
    paths = ["African/1/a.jpg", "Asian/1/a.jpg", "Asian/2/a.jpg", "Indian/3/b.jpg"]
    lines = ["/x/Asian/1/a.jpg", "/x/African/1/a.jpg", "2/a.jpg", "y/3/b.jpg"]
    assert matched(paths, lines) == ({paths[1]: 0, paths[0]: 1, paths[2]: 2, paths[3]: 3}, {}, [])


def test_a_line_that_matches_several_images_is_not_used():
    paths = ["African/1/a.jpg", "Asian/1/a.jpg"]
    points, without, strays = matched(paths, ["1/a.jpg", "a.jpg"])
    assert points == {}
    assert without == dict.fromkeys(paths, "has no landmarks")
    assert strays == [("1/a.jpg", "line 0 fits several images"), ("a.jpg", "line 1 fits several images")]


def test_a_file_name_alone_matches_only_without_a_longer_match():
    assert matched(["1/a.jpg"], ["a.jpg"])[0] == {"1/a.jpg": 0}
    assert matched(["a.jpg"], ["/x/1/a.jpg"])[0] == {"a.jpg": 0}
    points, without, strays = matched(["1/a.jpg"], ["2/a.jpg"])
    assert (points, without) == ({}, {"1/a.jpg": "has no landmarks"})
    assert strays == [("2/a.jpg", "line 0 fits no image")]


def test_of_two_lines_the_one_with_the_longer_match_is_used():
    """This occurs if an identity is in two groups, and only one of them is in the folder."""
    points, without, strays = matched(["Asian/1/a.jpg"], ["African/1/a.jpg", "Asian/1/a.jpg", "Indian/1/a.jpg"])
    assert (points, without) == ({"Asian/1/a.jpg": 1}, {})
    assert strays == [("African/1/a.jpg", "line 0 fits no image"), ("Indian/1/a.jpg", "line 2 fits no image")]


def test_two_lines_for_one_image_must_be_equal():
    file = Landmarks(["1/a.jpg"] * 2, ["line 1", "line 2"], np.array([POINTS, POINTS]), [])
    assert list(match(["1/a.jpg"], [file])[0]) == ["1/a.jpg"]
    points, without, _ = matched(["1/a.jpg"], ["1/a.jpg"], ["1/a.jpg"])
    assert (points, without) == ({}, {"1/a.jpg": "has different landmarks in line 0 and line 0"})


def test_the_group_may_be_in_the_files_name(tmp_path):
    for name in ("African", "Asian"):
        (tmp_path / f"{name}_lmk.txt").write_text(f"1/a.jpg {plain(POINTS)}\n")
    files = [read_landmarks(tmp_path / f"{name}_lmk.txt") for name in ("African", "Asian")]
    points, without, strays = match(["African/1/a.jpg", "Asian/1/a.jpg"], files)
    assert (len(points), without, strays) == (2, {}, [])


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """Returns a folder with three aligned images, and their landmarks."""
    for k in range(3):
        put(tmp_path / "in" / "1" / f"{k}.jpg", encode(picture(k)))
    marks = listed(tmp_path, *(f"1/{k}.jpg" for k in range(3)))
    command(tmp_path, *marks)
    return tmp_path, marks


def later(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_finished_faces_are_kept(three, capsys):
    folder, marks = three
    before = {name: later(folder / "out" / name) for name in tree(folder / "out")}
    assert len(before) == 3
    assert command(folder, *marks) == []
    assert {name: later(folder / "out" / name) for name in tree(folder / "out")} == before
    assert capsys.readouterr().out.endswith("out: 0 images aligned, 3 kept, 0 failed.\n")


def test_a_face_is_made_again_after_its_image_has_changed(three, capsys):
    folder, marks = three
    changed = put(folder / "in/1/1.jpg", encode(picture(9)))
    os.utime(folder / "out/1/0.jpg", (1, 1))  # older than its image
    old = put(folder / "in/1/2.jpg", encode(picture(8)))
    os.utime(old, (1, 1))  # as unpacking tools do
    assert command(folder, *marks) == []
    assert "3 images aligned, 0 kept" in capsys.readouterr().out
    for path in (changed, old):
        assert (folder / "out/1" / path.name).read_bytes() == expected(path)


@pytest.mark.parametrize("left", [lambda face: b"", lambda face: face[:-40], lambda face: bytes(len(face))])
def test_files_damaged_by_a_power_cut_are_made_again(three, capsys, left):
    folder, marks = three
    face = (folder / "out/1/1.jpg").read_bytes()
    put(folder / "out/1/1.jpg", left(face))
    put(folder / "out" / "123.partial", b"left by a kill")
    assert command(folder, *marks) == []
    assert (folder / "out/1/1.jpg").read_bytes() == face
    assert not (folder / "out" / "123.partial").exists()
    assert "1 images aligned, 2 kept" in capsys.readouterr().out


def test_the_face_of_an_image_that_became_unreadable_is_removed(three):
    folder, marks = three
    put(folder / "in/1/1.jpg", b"")
    assert command(folder, *marks) == [("1/1.jpg", "is empty")]
    assert tree(folder / "out") == ["1/0.jpg", "1/2.jpg"]
    put(folder / "in/1/1.jpg", encode(picture(1)))
    assert command(folder, *marks) == []
    assert len(tree(folder / "out")) == 3


def test_the_face_of_a_deleted_image_is_kept(three):
    folder, _ = three
    gone = prepare.Aligner(str(folder / "unplugged"), str(folder / "out"))
    assert gone(("1/1.jpg", POINTS.tolist())) == ("failed", "cannot be read (No such file or directory)")
    assert len(tree(folder / "out")) == 3


def test_a_folder_of_other_faces_is_refused(three):
    folder, marks = three
    with pytest.raises(InputError, match=r"out holds faces of other --images, --landmarks, --detector or --score"):
        command(folder, *listed(folder, "1/0.jpg"))
    listed(folder, *(f"1/{k}.jpg" for k in range(3)))
    command(folder, *marks)
    (folder / "in").rename(folder / "moved")
    put(folder / "in/1/0.jpg", encode(picture(0)))
    (folder / "in").rename(folder / "other")
    (folder / "in").symlink_to("other")
    with pytest.raises(InputError, match=r"out holds faces of other --images"):
        command(folder, *marks)
    put(folder / "mine" / "a.jpg", b"dear to me")
    with pytest.raises(InputError, match=r"mine holds files, but no align\.json of this command"):
        command(folder, *marks, output="mine")
    assert (folder / "mine" / "a.jpg").read_bytes() == b"dear to me"


def test_bad_arguments_are_refused_before_work_starts(tmp_path):
    marks = listed(tmp_path, "a.jpg")
    with pytest.raises(InputError, match="There is no folder .*in: set --images"):
        command(tmp_path, *marks)
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="in holds no image"):
        command(tmp_path, *marks)
    put(tmp_path / "in" / "b.jpg", encode(picture(0)))
    with pytest.raises(
        InputError,
        match=r"no line for any image of .*in, such as b\.jpg, which has no landmarks: set another",
    ):
        command(tmp_path, *marks)
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    for output in ("in", "in/out", "."):
        with pytest.raises(InputError, match="lie in each other"):
            command(tmp_path, *marks, output=output)
    with pytest.raises(InputError, match=r"nothing\.txt cannot be read \(No such file"):
        command(tmp_path, "--landmarks", f"{tmp_path}/nothing.txt")
    for more in (("--processes", "-1"), ("--detector", "x.onnx")):
        with pytest.raises(SystemExit):
            command(tmp_path, *marks, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "marks.txt"]


def test_a_full_disk_ends_the_command_and_keeps_finished_faces(tmp_path, monkeypatch, capsys):
    for k in range(3):
        put(tmp_path / "in" / f"{k}.jpg", encode(picture(k)))
    marks = listed(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    with (
        monkeypatch.context() as patch,
        pytest.raises(NotWritten, match=r"1\.jpg could not be written \(No space left"),
    ):
        patch.setattr(os, "replace", full_disk_at("1.jpg"))
        command(tmp_path, *marks)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.jpg", "align.json"]
    assert command(tmp_path, *marks) == []
    assert "2 images aligned, 1 kept" in capsys.readouterr().out


def test_few_items_start_no_process():
    """A lambda cannot be pickled, so it would fail in another process."""
    for count in (0, 1, TOGETHER):
        assert [*in_processes(lambda item: -item, range(count), count, "negate", 2)] == [*range(0, -count, -1)]


def test_every_process_starts_with_interrupts_blocked(monkeypatch):
    """Ctrl-C while a process imports would end it with a traceback."""
    plain, blocked, count = SpawnProcess.start, [], 4 * TOGETHER

    def start(process):
        blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        plain(process)

    monkeypatch.setattr(SpawnProcess, "start", start)
    list(in_processes(abs, range(count), count, "abs", 3))
    assert blocked == [True] * 3


def test_a_killed_process_ends_the_command_with_a_message():
    count = 100 * TOGETHER
    results = in_processes(time.sleep, [0.002] * count, count, "sleep", 2)
    for _ in range(
        3 * TOGETHER
    ):  # both are running: Python 3.11 does not detect the death of a process that is starting
        next(results)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(InputError, match="A process was killed, perhaps for want of memory: give the same command"):
        list(results)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes as Linux lists them")
def test_no_process_survives_a_kill_of_its_parent():
    code = """
import time
from utils.prepare.work import in_processes
if __name__ == "__main__":
    list(in_processes(time.sleep, [600] * 1000, 1000, "sleep", 2))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(others := children(process.pid)) < 3:  # both, and the resource tracker
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)  # both are at work
    process.kill()
    process.wait()
    before = time.monotonic()
    while left := [other for other in others if Path(f"/proc/{other}").exists()]:
        assert time.monotonic() < before + 60, left
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_the_face_of_a_deleted_image_is_listed(tmp_path):
    for name in "ab":
        put(tmp_path / "in" / "1" / f"{name}.jpg", encode(picture(0)))
    marks = listed(tmp_path, "1/a.jpg", "1/b.jpg")
    assert command(tmp_path, *marks) == []
    (tmp_path / "in" / "1" / "a.jpg").unlink()
    assert ("1/a.jpg", "is a face of no image any more: delete it") in command(tmp_path, *marks)
    assert tree(tmp_path / "out") == ["1/a.jpg", "1/b.jpg"]


def test_a_link_to_itself_does_not_stop_the_command(tmp_path):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    (tmp_path / "in" / "b.jpg").symlink_to("b.jpg")
    rows = command(tmp_path, *listed(tmp_path, "a.jpg", "b.jpg"))
    assert rows == [("b.jpg", "cannot be read (Too many levels of symbolic links)")]


def test_output_that_cannot_be_a_folder_or_is_damaged_is_refused(tmp_path):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    marks = listed(tmp_path, "a.jpg")
    put(tmp_path / "file", b"")
    with pytest.raises(InputError, match=r"file is no folder: set --output to a new one"):
        command(tmp_path, *marks, output="file")
    put(tmp_path / "out" / "align.json", b"{")
    with pytest.raises(InputError, match=r"align\.json is damaged: delete .*out, or set --output to a new folder"):
        command(tmp_path, *marks)


def test_ctrl_c_and_resume(tmp_path):
    """Runs the command with two worker processes; as in a terminal, all get the signal."""
    count = 12 * TOGETHER
    first = put(tmp_path / "in" / "1" / "0.jpg", encode(picture(0, 800, 800)))
    for k in range(1, count):
        os.link(first, tmp_path / "in" / "1" / f"{k}.jpg")
    marks = listed(tmp_path, *(f"1/{k}.jpg" for k in range(count)))
    given = ["--images", f"{tmp_path}/in", "--output", f"{tmp_path}/out", *marks, "--processes", "2"]
    start = [sys.executable, "-m", "utils.prepare", "align", *given]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(tree(tmp_path / "out")) < TOGETHER + 8:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupted, files that were finished are kept; continue with: python -m utils.prepare" in said
    assert "Traceback" not in said
    finished = {name: later(tmp_path / "out" / name) for name in tree(tmp_path / "out")}
    assert TOGETHER < len(finished) < count
    assert not [*(tmp_path / "out").glob("*.partial")]
    assert command(tmp_path, *marks) == []
    assert len(tree(tmp_path / "out")) == count
    assert finished.items() <= {name: later(tmp_path / "out" / name) for name in tree(tmp_path / "out")}.items()
    face = expected(first)
    assert all((tmp_path / "out" / name).read_bytes() == face for name in tree(tmp_path / "out"))


# Detected landmarks ---------------------------------------------------------------------------------------------------


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Encodes numbered fields as in ONNX files (Protocol Buffers)."""
    content = b""
    for number, value in fields:
        if isinstance(value, int):
            content += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            content += varint(number << 3 | 2) + varint(len(value)) + value
    return content


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def tensor(name: str, values: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[values.dtype.name]
    return message(*((1, size) for size in values.shape), (2, kind), (8, name), (9, values.tobytes()))


def node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> bytes:
    lists = [message((1, name), *((8, value) for value in values), (20, 7)) for name, values in attributes.items()]
    return message(*((1, name) for name in inputs), (2, output), (4, kind), *((5, one) for one in lists))


def shaped(name: str, *shape: int) -> bytes:
    dimensions = message(*((1, message((1, size))) for size in shape))
    return message((1, name), (2, message((1, message((1, 1), (2, dimensions))))))


def network(nodes: list[bytes], constants: list[bytes], outputs: list[bytes]) -> bytes:
    graph = [(1, one) for one in nodes] + [(2, "g")] + [(5, one) for one in constants]
    graph += [(11, shaped("input", 1, 3, 640, 640))] + [(12, one) for one in outputs]
    return message((1, 8), (7, message(*graph)), (8, message((2, 11))))


WIDTH = {8: 48.0, 16: 1.0, 32: 96.0}  # of the faces that each stride of the network detects
FIVE = TEMPLATE / 112 - 0.5  # the landmarks of a face of width 1 around its centre


@pytest.fixture(scope="session")
def yunet(tmp_path_factory) -> Path:
    """Writes a network with the inputs and outputs of YuNet, which detects faces in the squares of `scene`.

    It detects a small face in every red square of 8 x 8 pixels on the grid of its cells, and a large face in every blue
    square of 32 x 32 pixels.
    """
    nodes, constants, outputs = [], [], []
    for stride, width in WIDTH.items():
        box = [0.5, 0.5, np.log(width / stride), np.log(width / stride)]
        points = 0.5 + FIVE.ravel() * width / stride
        for part, bias in (("cls", [0.0]), ("obj", [0.0]), ("bbox", box), ("kps", points)):
            name, size = f"{part}_{stride}", len(bias)
            weights = np.zeros((size, 3, stride, stride), np.float32)
            if size == 1 and stride != 16:
                weights[0, {8: 2, 32: 0}[stride]] = 1 / (255 * stride**2)
            constants += [tensor(f"{name}w", weights), tensor(f"{name}b", np.array(bias, np.float32))]
            constants += [tensor(f"{name}s", np.array([1, -1, size], np.int64))]
            square = [stride, stride]
            nodes.append(
                node("Conv", ["input", f"{name}w", f"{name}b"], f"{name}c", kernel_shape=square, strides=square)
            )
            nodes.append(node("Transpose", [f"{name}c"], f"{name}t", perm=[0, 2, 3, 1]))
            nodes.append(node("Reshape", [f"{name}t", f"{name}s"], name))
            outputs.append(shaped(name, 1, (640 // stride) ** 2, size))
    return put(tmp_path_factory.mktemp("yunet") / "yunet.onnx", network(nodes, constants, outputs))


def scene(*squares: tuple[str, int, int], size: tuple[int, int] = (320, 192)) -> np.ndarray:
    """Returns a black image with squares at these columns and rows of cells: "red" small faces, "blue" large ones."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for colour, column, row in squares:
        stride, channel = (8, 2) if colour == "red" else (32, 0)
        image[row * stride :, column * stride :, channel][:stride, :stride] = 255
    return image


def landmarks(colour: str, column: int, row: int) -> np.ndarray:
    stride = 8 if colour == "red" else 32
    return np.array([column + 0.5, row + 0.5]) * stride + FIVE * WIDTH[stride]


def test_a_face_is_detected_and_aligned(tmp_path, yunet):
    put(tmp_path / "in" / "1" / "a.png", encode(scene(("red", 25, 9)), ".png"))
    put(tmp_path / "in" / "1" / "b.png", encode(scene(), ".png"))
    assert command(tmp_path, "--detector", yunet) == [("1/b.png", "shows no face that the detector finds")]
    found, note = prepare.detect(scene(("red", 25, 9)), prepare.load_detector(yunet))
    assert np.allclose(found, landmarks("red", 25, 9), rtol=0, atol=1e-3) and note == ""
    assert (tmp_path / "out/1/a.jpg").read_bytes() == expected(tmp_path / "in/1/a.png", found)
    assert not (tmp_path / "out" / "several_faces.csv").exists()


def test_a_face_needs_the_score(tmp_path, yunet, capsys):
    """The network gives a face of half the red a score of half as much, since the score is the mean of two parts."""
    faint = scene(("red", 25, 9)).astype(float)
    put(tmp_path / "in" / "a.png", encode((0.88 * faint).round().astype(np.uint8), ".png"))
    put(tmp_path / "in" / "b.png", encode(scene(("red", 25, 9)), ".png"))
    assert prepare.SCORE == 0.85
    assert command(tmp_path, "--detector", yunet, output="default") == []
    rows = command(tmp_path, "--detector", yunet, "--score", 0.9, output="strict")
    assert rows == [("a.png", "shows no face that the detector finds")]
    with pytest.raises(InputError, match="holds faces of other .* or --score"):
        command(tmp_path, "--detector", yunet, "--score", 0.8, output="default")
    with pytest.raises(InputError, match="--score goes with --detector"):
        command(tmp_path, *listed(tmp_path, "a.png"), "--score", 0.8)
    for wrong in ("0", "1.5", "high", "nan"):
        with pytest.raises(SystemExit):
            command(tmp_path, "--detector", yunet, "--score", wrong)


def test_a_pointer_in_place_of_the_detector_is_named(tmp_path):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    put(tmp_path / "yunet.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"yunet\.onnx is a pointer of Git LFS, not the file itself: git lfs pull"):
        command(tmp_path, "--detector", tmp_path / "yunet.onnx")


SHARED = ROOT.parent / "shared"
DETECTOR = SHARED / "yunet" / "face_detection_yunet_2023mar.onnx"
SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"


@pytest.mark.skipif(not (DETECTOR.is_file() and (SHARED / "data").is_dir()), reason="YuNet or photographs are not here")
def test_yunet_finds_the_faces_of_photographs(tmp_path):
    """Aligned photographs of LFW, padded, are aligned again: their landmarks lie where the template has them."""
    assert hashlib.sha256(DETECTOR.read_bytes()).hexdigest() == SHA256
    assert SHA256 in (ROOT / "docs" / "data.md").read_text()
    photographs = sorted((SHARED / "data" / "lfw112" / "train").glob("*/*/*.jpg"))[::100]
    detector, pad, off = prepare.load_detector(DETECTOR), 56, []
    for k, path in enumerate(photographs):
        image = cv2.copyMakeBorder(cv2.imread(str(path)), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        put(tmp_path / "in" / f"{k}.png", encode(image, ".png"))
        found, _ = prepare.detect(image, detector)
        off.append(np.linalg.norm(found - pad - TEMPLATE, axis=1).mean())
    assert len(photographs) >= 20 and np.mean(off) < 4  # 3.2 here, 3.4 and 3.6 on other samples of these photographs
    assert command(tmp_path, "--detector", DETECTOR) == []
    faces = [cv2.imread(str(tmp_path / "out" / f"{k}.jpg")) for k in range(len(photographs))]
    both = zip(faces, photographs, strict=True)
    differences = [np.abs(face.astype(float) - cv2.imread(str(path))).mean() for face, path in both]
    assert np.median(differences) < 20


def test_large_images_are_scaled_down_for_detection(yunet):
    large = cv2.resize(scene(("red", 25, 9)), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    assert large.shape[1] == 1280 == 2 * prepare.DETECTED_AT
    half = scene(("blue", 3, 2), size=(640, 320))
    doubled = cv2.resize(half, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, _ = prepare.detect(doubled, prepare.load_detector(yunet))
    assert np.allclose(found, 2 * landmarks("blue", 3, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("squares", "taken"),
    [
        ([("red", 2, 2), ("red", 22, 12)], 1),  # of equal size, the most central
        ([("red", 22, 12), ("red", 38, 20)], 0),
        ([("red", 19, 11), ("blue", 3, 2)], 1),  # the largest, unless it is far from the centre
        ([("red", 19, 11), ("blue", 9, 5)], 0),
    ],
)
def test_of_several_faces_the_large_and_central_one_is_chosen(tmp_path, yunet, squares, taken):
    put(tmp_path / "in" / "a.png", encode(scene(*squares), ".png"))
    found, note = prepare.detect(scene(*squares), prepare.load_detector(yunet))
    assert np.allclose(found, landmarks(*squares[taken]), rtol=0, atol=1e-3)
    assert note.startswith("2 found, the one taken is at ")


def test_a_choice_is_listed_as_long_as_its_face_is_kept(tmp_path, yunet, capsys):
    put(tmp_path / "in" / "a.png", encode(scene(("red", 2, 2), ("red", 22, 12)), ".png"))
    put(tmp_path / "in" / "b.png", encode(scene(("red", 22, 12)), ".png"))
    rows = [("a.png", "2 found, the one taken is at 156 76, 48 x 48")]
    for done in ("2 images aligned, 0 kept", "0 images aligned, 2 kept"):
        assert command(tmp_path, "--detector", yunet) == []
        assert failures(tmp_path / "out", "several_faces.csv") == rows
        assert done in (out := capsys.readouterr().out)
        assert "1 images show several faces" in out
        (tmp_path / "out" / "several_faces.csv").unlink()
    assert images.read(tmp_path / "out" / "a.jpg", False).shape == (112, 112, 3)


def test_faces_are_detected_in_upright_images(tmp_path, yunet):
    upright = scene(("red", 15, 18), size=(192, 320))
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)[..., ::-1]))
    options = {"quality": 100, "subsampling": 0}
    put(tmp_path / "in" / "a.jpg", saved(stored, "jpeg", exif=orientation(6), **options))
    assert command(tmp_path, "--detector", yunet) == []
    face = cv2.imread(str(tmp_path / "out" / "a.jpg"))
    assert np.abs(face.astype(int) - align(upright, landmarks("red", 15, 18))).mean() < 4
    assert align(upright, landmarks("red", 15, 18)).mean() > 2


def test_other_networks_than_yunet_are_refused(tmp_path, yunet):
    put(tmp_path / "in" / "a.jpg", encode(picture(0)))
    with pytest.raises(InputError, match=r"There is no file .*none\.onnx: set --detector"):
        command(tmp_path, "--detector", f"{tmp_path}/none.onnx")
    put(tmp_path / "noise.onnx", noise(0).tobytes())
    put(tmp_path / "half.onnx", yunet.read_bytes()[:5000])
    other = [node("Relu", ["input"], "y")]
    put(tmp_path / "other.onnx", network(other, [], [shaped("y", 1, 3, 640, 640)]))
    for name in ("noise", "half", "other"):
        with pytest.raises(InputError, match=rf"{name}\.onnx is no YuNet that OpenCV [\d.]+ can read"):
            command(tmp_path, "--detector", f"{tmp_path}/{name}.onnx")
    assert not (tmp_path / "out").exists()
