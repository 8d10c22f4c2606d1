"""RecordIO files of every layout, against a plain reader and MXNet, and the refusal of damaged files."""

import errno
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from utils.data import recordio
from utils.data.recordio import Records, image_of, read_index, write_records
from utils.errors import InputError, NotWritten

MAGIC = bytes.fromhex("0a23d7ce")
FACES = [(b"\xff\xd8one\xff\xd9", 0, -1), (b"\xff\xd8second\xff\xd9", 0, -1), (b"\xff\xd8the third\xff\xd9", 2, -1)]
GROUPED = [(image, identity, 3 * k) for k, (image, identity, _) in enumerate(FACES)]
CUT = {  # images, and the number of parts into which their magic numbers divide a record
    "no magic": (b"\xff\xd8abcdefgh\xff\xd9", 1),
    "aligned": (b"abcd" + MAGIC + b"efg", 2),
    "unaligned": (b"abc" + MAGIC + b"defg", 1),
    "at the start": (MAGIC + b"abcde", 2),
    "at the end": (b"abcd" + MAGIC, 2),
    "nothing else": (MAGIC, 2),
    "repeated": (MAGIC * 3, 4),
    "repeated with others between": (b"abcd" + MAGIC + b"abcd" + MAGIC * 2 + b"a", 4),
    "aligned after unaligned": (b"a" + MAGIC + b"abc" + MAGIC + b"ab", 2),
    "half of one": (MAGIC[:2] + MAGIC + MAGIC[2:] + b"abcd" + MAGIC[:3], 1),
}


def part(kind: int, content: bytes) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(content)) + content + bytes(-len(content) % 4)


def content(image: bytes, *labels: float, key: int = 0, vector: bool = True, unused: int = 77) -> bytes:
    if not vector:
        return struct.pack("<IfQQ", 0, *labels, key, unused) + image
    return struct.pack(f"<IfQQ{len(labels)}f", len(labels), unused, key, unused, *labels) + image


def write(folder: Path, contents: dict[int, bytes], index: bool = True) -> Path:
    """Writes complete records, in this order."""
    data, lines = b"", ""
    for key, value in contents.items():
        lines += f"{key}\t{len(data)}\n"
        data += part(0, value)
    folder.mkdir(exist_ok=True)
    (folder / "train.rec").write_bytes(data)
    if index:
        (folder / "train.idx").write_text(lines, newline="\n")
    return folder


def insightface(faces: list, header_first: bool = True, unused: int = 77) -> dict[int, bytes]:
    """Returns records in insightface's layout of three identities, the second without an image."""
    images = {}
    for key, (image, identity, group) in enumerate(faces, 1):
        labels = (identity,) if group < 0 else (identity, group)
        images[key] = content(image, *labels, key=key, vector=group >= 0, unused=unused)
    ranges = {4: (1, 3), 5: (3, 3), 6: (3, 4)}
    identities = {key: content(b"", *labels, key=key, unused=unused) for key, labels in ranges.items()}
    header = {0: content(b"", 4, 7, unused=unused)}
    return header | images | identities if header_first else images | header | identities


def fetch(records: Records) -> list[bytes]:
    with open(records.path, "rb") as file:
        where = zip(records.lengths.tolist(), records.offsets.tolist(), strict=True)
        return [os.pread(file.fileno(), *place) for place in where]


def faces_of(records: Records) -> list[tuple[bytes, int, int]]:
    images = map(image_of, fetch(records))
    return list(zip(images, records.identity.tolist(), records.group.tolist(), strict=True))


# Plain readers --------------------------------------------------------------------------------------------------------


def plain_record(data: bytes, offset: int) -> tuple[bytes, int]:
    """Returns the content of a record, and the offset of the next one."""
    parts, kind = [], None
    while kind not in (0, 3):
        magic, word = struct.unpack_from("<4sI", data, offset)
        kind, length = word >> 29, word & 0x1FFFFFFF
        assert magic == MAGIC and kind in ((2, 3) if parts else (0, 1))
        parts.append(data[offset + 8 : offset + 8 + length])
        assert len(parts[-1]) == length
        offset += 8 + length + -length % 4
        assert offset <= len(data)
    return MAGIC.join(parts), offset


def plain_read(folder: Path) -> list[tuple[int, bytes, int, int]]:
    """Returns key, image, identity and group of all images."""
    data, found, offset = (folder / "train.rec").read_bytes(), {}, 0
    if (folder / "train.idx").exists():
        for line in (folder / "train.idx").read_text().splitlines():
            key, where = line.split("\t")
            found[int(key)] = plain_unpacked(plain_record(data, int(where))[0])
    else:
        walked = []
        while offset < len(data):
            record, offset = plain_record(data, offset)
            walked.append(plain_unpacked(record))
        ids = [key for key, *_ in walked]
        found = dict(zip(ids if len({*ids}) == len(ids) and max(ids) < 2**63 else range(len(ids)), walked, strict=True))
    keys = sorted(found)
    if keys[0] == 0 and not found[0][1] and found[0][3]:
        keys = range(1, int(found[0][2][0]))
    return [
        (key, image, labels[0], labels[1] if is_vector and len(labels) > 1 else -1)
        for key, (_, image, labels, is_vector) in ((key, found[key]) for key in keys)
    ]


def plain_unpacked(record: bytes) -> tuple[int, bytes, tuple[float, ...], bool]:
    flag, label, key, _ = struct.unpack_from("<IfQQ", record)
    labels = struct.unpack_from(f"<{flag}f", record, 24) if flag else (label,)
    return key, record[24 + 4 * flag :], labels, flag > 0


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
@pytest.mark.parametrize("index", [True, False])
def test_records_are_read_as_they_were_written(tmp_path, monkeypatch, chunk, index):
    monkeypatch.setattr(recordio, "CHUNK", chunk)
    random = np.random.default_rng(0)
    faces = [(random.bytes(k % 13), k // 5, k % 3 - 1) for k in range(40)]
    faces += [(image, 8, 0) for image, _ in CUT.values()]
    write_records(tmp_path, faces, num_classes=12)
    assert sorted(os.listdir(tmp_path)) == ["property", "train.idx", "train.rec"]
    if not index:
        (tmp_path / "train.idx").unlink()
    records = read_index(tmp_path)
    assert records.path == tmp_path / "train.rec"
    assert records.keys.tolist() == [*range(1, len(faces) + 1)]
    assert faces_of(records) == faces
    arrays = (records.offsets, records.lengths, records.keys, records.identity, records.group)
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert {array.shape for array in arrays} == {(len(faces),)}


@pytest.mark.parametrize("faces", [FACES, GROUPED])
def test_files_are_in_insightfaces_layout_to_the_byte(tmp_path, faces):
    write_records(tmp_path / "ours", iter(faces), num_classes=3)
    write(tmp_path / "plain", insightface(faces, unused=0))
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert (tmp_path / "ours" / "property").read_bytes() == b"3,112,112\n"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("header_first", [True, False])
@pytest.mark.parametrize("faces", [FACES, GROUPED])
def test_identity_records_are_not_images(tmp_path, faces, header_first, index):
    write(tmp_path, insightface(faces, header_first), index)
    records = read_index(tmp_path)
    assert records.keys.tolist() == [1, 2, 3]
    assert faces_of(records) == faces


@pytest.mark.parametrize("labels", [(4,), (4, 9), (4, 9, 0.5, -1)])
def test_without_a_header_record_all_records_are_images(tmp_path, labels):
    """This holds also if key 0 has a vector label, like a header record."""
    write(tmp_path, {key: content(b"image %d" % key, *labels) for key in (7, 0, 3)})
    records = read_index(tmp_path)
    assert records.keys.tolist() == [0, 3, 7]
    group = 9 if len(labels) > 1 else -1
    assert faces_of(records) == [(b"image 0", 4, group), (b"image 3", 4, group), (b"image 7", 4, group)]


def test_only_an_empty_image_at_key_0_with_a_vector_label_is_a_header_record(tmp_path):
    write(tmp_path, {0: content(b"", 2, vector=False), 1: content(b"one", 1, vector=False)})
    assert faces_of(read_index(tmp_path)) == [(b"", 2, -1), (b"one", 1, -1)]
    write(tmp_path, {1: content(b"", 2, 3), 2: content(b"two", 1, 3)})
    assert faces_of(read_index(tmp_path)) == [(b"", 2, 3), (b"two", 1, 3)]


@pytest.mark.parametrize(
    ("ids", "keys", "places"),
    [
        ((8, 2, 5), [2, 5, 8], [1, 2, 0]),
        ((4, 4, 5), [0, 1, 2], [0, 1, 2]),
        ((0, 0, 0), [0, 1, 2], [0, 1, 2]),
        ((3, 1 << 63, 4), [0, 1, 2], [0, 1, 2]),
    ],
)
def test_without_an_index_valid_ids_are_the_keys(tmp_path, ids, keys, places):
    contents = {place: content(b"%d" % place, place, key=key) for place, key in enumerate(ids)}
    records = read_index(write(tmp_path, contents, index=False))
    assert records.keys.tolist() == keys
    assert faces_of(records) == [(b"%d" % place, place, -1) for place in places]


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), str.rstrip])
def test_index_lines_may_end_with_crlf_and_the_last_without_newline(tmp_path, change):
    index = write(tmp_path, insightface(FACES)) / "train.idx"
    index.write_bytes(change(index.read_text()).encode())
    assert faces_of(read_index(tmp_path)) == FACES


def test_an_index_may_name_some_of_the_records(tmp_path):
    index = write(tmp_path, {key: content(b"image %d" % key, key) for key in range(5)}) / "train.idx"
    index.write_text("".join(index.read_text().splitlines(True)[i] for i in (3, 1)))
    assert faces_of(read_index(tmp_path)) == [(b"image 1", 1, -1), (b"image 3", 3, -1)]


# Keys that a label cannot represent exactly ---------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch):
    """Makes labels exact only below 2^11, as in float16, so that small files reach inexact labels."""
    monkeypatch.setattr(recordio, "LABEL", np.float16)
    monkeypatch.setattr(recordio, "EXACT", 1 << 11)


def large(end: int, group: int = -1) -> dict[int, bytes]:
    """Returns images with keys below `end`, four per identity, in insightface's layout, with rounded keys in labels."""
    bounds = [*range(1, end, 4), end]
    labels = {key: ((key - 1) // 4, group)[: 1 + (group >= 0)] for key in range(1, end)}
    images = {key: content(b"%d" % key, *label, key=key, vector=group >= 0) for key, label in labels.items()}
    ranges = [content(b"", *map(np.float16, bounds[k : k + 2]), key=end + k) for k in range(len(bounds) - 1)]
    header = content(b"", np.float16(end), np.float16(end + len(ranges)))
    return {0: header} | images | dict(enumerate(ranges, end))


@pytest.mark.parametrize("number", [2, 3, 4, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 4, 2**25, 2**26, 42_474_558])
def test_the_numbers_with_equal_float32(number):
    said = float(np.float32(number))
    found = [near for near in range(number - 20, number + 20) if np.float32(near) == said]
    assert recordio._integers_rounded_to(said) == (found[0], found[-1])
    assert number in found
    assert (len(found) == 1) == (number < recordio.EXACT)


def test_webface42m_would_be_read_two_keys_too_far():
    """Its 42,474,557 images end before a key that float32 cannot represent."""
    assert int(np.float32(42_474_558)) == 42_474_560
    assert recordio._integers_rounded_to(42_474_560.0) == (42_474_558, 42_474_562)


@pytest.mark.parametrize("group", [-1, 2])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("end", [2047, 2048, 2049, 2050, 2051, 4096, *range(4098, 4107), 4201])
def test_the_records_decide_where_images_end(tmp_path, half, end, index, group):
    write(tmp_path, large(end, group=group), index)
    records = read_index(tmp_path)
    assert records.keys.tolist() == [*range(1, end)]
    assert records.identity.tolist() == [(key - 1) // 4 for key in range(1, end)]
    assert faces_of(records)[-1] == (b"%d" % (end - 1), (end - 2) // 4, group)


def test_an_empty_image_with_one_label_precedes_the_identities(tmp_path, half):
    write(tmp_path, large(4104) | {4103: content(b"", 7, vector=False)})
    assert faces_of(read_index(tmp_path))[-2:] == [(b"4102", 1025, -1), (b"", 7, -1)]


def test_files_of_im2rec_are_read_to_the_last_key(tmp_path, half):
    """All records are images with one label, in any order, including key 0."""
    keys = np.random.default_rng(0).permutation(3000).tolist()
    write(tmp_path, {key: content(b"%d" % key, key % 1000, key=key, vector=False) for key in keys})
    assert faces_of(read_index(tmp_path)) == [(b"%d" % key, key % 1000, -1) for key in range(3000)]


# Records of many parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [-1, 1])
@pytest.mark.parametrize("name", CUT)
def test_records_are_divided_at_aligned_magic_numbers(tmp_path, name, group):
    image, parts = CUT[name]
    write_records(tmp_path, [(image, 0, group), (b"next", 1, group)], num_classes=2)
    records = read_index(tmp_path)
    assert faces_of(records) == [(image, 0, group), (b"next", 1, group)]
    record = fetch(records)[0]
    assert plain_record(record, 0)[1] == len(record)
    words = struct.unpack(f"<{len(record) // 4}I", record)
    assert words.count(0xCED7230A) == parts
    kinds = [words[i + 1] >> 29 for i, word in enumerate(words) if word == 0xCED7230A]
    assert kinds == ([0] if parts == 1 else [1] + [2] * (parts - 2) + [3])
    assert (tmp_path / "train.rec").read_bytes().count(record) == 1


@pytest.mark.parametrize("index", [True, False])
def test_labels_with_magic_numbers_are_read(tmp_path, index):
    """Both halves of id, and the second half of id2, are magic numbers."""
    plain = struct.pack("<If", 2, 77) + MAGIC * 2 + bytes(4) + MAGIC + struct.pack("<2f", 4, 1) + b"abcd" + MAGIC + b"e"
    cut = part(1, plain[:8]) + part(2, b"") + part(2, plain[16:20]) + part(2, plain[24:36]) + part(3, b"e")
    assert plain_record(cut, 0) == (plain, len(cut))
    whole = part(0, content(b"next", 5))
    (tmp_path / "train.rec").write_bytes(cut + whole)
    if index:
        (tmp_path / "train.idx").write_text(f"0\t0\n1\t{len(cut)}\n")
    records = read_index(tmp_path)
    assert records.lengths.tolist() == [len(cut), len(whole)]
    assert faces_of(records) == [(plain[32:], 4, 1), (b"next", 5, -1)]


def test_a_part_of_any_length_is_padded():
    parts = part(1, content(b"abc", 1)) + part(2, b"de") + part(3, b"f")
    assert image_of(parts) == plain_record(parts, 0)[0][28:] == b"abc" + MAGIC + b"de" + MAGIC + b"f"


# MXNet ----------------------------------------------------------------------------------------------------------------


# In a separate process, so that the libraries that MXNet loads do not affect other tests.
MXNET = """
import pickle, sys
import numpy
numpy.bool = numpy.bool_  # MXNet 1.9 uses this removed name
from mxnet import recordio

folder, contents, other = pickle.load(sys.stdin.buffer)
file = recordio.MXIndexedRecordIO(folder + "/train.idx", folder + "/train.rec", "w")
for key, (image, label) in contents.items():
    file.write_idx(key, recordio.pack(recordio.IRHeader(0, label, key, 0), image))
file.close()
file = recordio.MXIndexedRecordIO(other + "/train.idx", other + "/train.rec", "r")
found = {}
for key in file.keys:
    header, image = recordio.unpack(file.read_idx(key))
    found[key] = image, list(header.label) if header.flag else header.label
file.reset()
with open(other + "/read", "wb") as out:
    pickle.dump((found, sum(1 for _ in iter(file.read, None))), out)
"""


def many_faces(seed: int = 0, count: int = 60) -> list[tuple[bytes, int, int]]:
    """Returns four images per identity, most of them with magic numbers."""
    random = np.random.default_rng(seed)
    pieces = [MAGIC, MAGIC, MAGIC[:2], b"a", b"bcde", random.bytes(50)]
    return [
        (b"".join(pieces[piece] for piece in random.integers(0, len(pieces), k % 9)), k // 4, k % 3 - 1)
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def mxnet(tmp_path_factory):
    """Returns {key: (image, label)} to write, the folders that we and MXNet wrote, and what MXNet read from ours."""
    if find_spec("mxnet") is None:
        pytest.skip("MXNet is not installed")
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    faces = many_faces()
    write_records(ours, faces, num_classes=16)
    contents = {0: (b"", [61, 77])}
    for key, (image, identity, group) in enumerate(faces, 1):
        contents[key] = (image, identity if group < 0 else [identity, group])
    for identity in range(16):
        contents[61 + identity] = (b"", [1 + 4 * identity, 5 + 4 * identity if identity < 15 else 61])
    subprocess.run([sys.executable, "-c", MXNET], input=pickle.dumps((str(theirs), contents, str(ours))), check=True)
    return contents, ours, theirs, pickle.loads((ours / "read").read_bytes())


def test_mxnet_writes_the_same_bytes(mxnet):
    _, ours, theirs, _ = mxnet
    for name in ("train.rec", "train.idx"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert faces_of(read_index(theirs)) == many_faces()


def test_mxnet_reads_our_files(mxnet):
    contents, _, _, (found, in_sequence) = mxnet
    assert found == contents
    assert in_sequence == len(contents) == 77


# Refusals -------------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_index(folder)
    message = str(caught.value)
    assert str(folder) in message and message.endswith(".") and "\n" not in message
    return message.replace(f"{folder}{os.sep}", "")


def change(path: Path, at: int, new: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:at] + new + data[at + len(new) :])


AGAIN = ": get the file again, with its train.idx."


def test_missing_and_unreadable_files_are_named(tmp_path):
    assert refusal(tmp_path) == "There is no file train.rec: set data to the folder that holds train.rec."
    (tmp_path / "train.rec").mkdir()
    assert refusal(tmp_path) == "train.rec cannot be read (Is a directory)."
    (tmp_path / "train.rec").rmdir()
    (tmp_path / "train.rec").touch()
    assert refusal(tmp_path) == "train.rec is empty: get it again."
    write(tmp_path, insightface(FACES), index=False)
    (tmp_path / "train.idx").mkdir()
    assert refusal(tmp_path) == "train.idx cannot be read (Is a directory)."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("\n", 'has a line, 1, that is not "key<tab>offset"'),
        ("0\t0\n1 48\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\t48\n\n", 'has a line, 3, that is not "key<tab>offset"'),
        ("0\t0\n1\t48\t3\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\n48\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\n", 'has a line, 1, that is not "key<tab>offset"'),
        ("0\t", 'has a line, 1, that is not "key<tab>offset"'),
        ("0\t0\n-1\t48\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\t-48\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\t4e1\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\t9999999999999999999\n", 'has a line, 2, that is not "key<tab>offset"'),
        ("0\t0\n1\t48\n0\t100\n", "holds key 0 twice"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path, text, reason):
    write(tmp_path, insightface(FACES))
    (tmp_path / "train.idx").write_bytes(text.encode())
    assert refusal(tmp_path) == f"train.idx {reason}: get it again, or delete it to have train.rec walked through."


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (999_999_999_999_999_999, "is beyond its end"),
        (40 + 44 + 48, "is beyond its end"),
        (40 + 44 + 48 - 4, "is beyond its end"),
        (41, "is no record"),
        (44, "is no record"),
        (0, "is in train.idx twice"),
        (40, "is in train.idx twice"),
    ],
)
def test_invalid_offsets_are_refused(tmp_path, offset, reason):
    write(tmp_path, {0: content(b"", 3, 3), 1: content(b"12345678", 0), 2: content(b"123456789", 0)})
    assert (tmp_path / "train.rec").stat().st_size == 40 + 44 + 48
    (tmp_path / "train.idx").write_text(f"0\t0\n1\t40\n2\t{offset}\n")
    assert refusal(tmp_path) == f"train.rec: what lies at byte {offset:,} {reason}{AGAIN}"


IMAGES = {1: content(b"12345678", 0, key=1), 2: content(b"12345678", 1, key=2), 3: content(b"12345678", 2, key=3)}
"""Offsets in a file of three records of 44 bytes."""


TOO_SHORT = "is a record too short for its labels"


@pytest.mark.parametrize(
    ("at", "word", "place", "reason", "place_walked", "reason_walked"),
    [
        (0, 0xCED7230B, 0, "is no record", 0, "is no record"),
        (44, 0xCED7230B, 44, "is no record", 44, "is no record"),
        (4, 3 << 29 | 36, 0, "is no record", 0, "is no record"),
        (48, 1 << 29 | 36, 44, "is no record", 44, "is no record"),
        (48, 2 << 29 | 36, 44, "is no record", 44, "is no record"),
        (48, 7 << 29 | 36, 44, "is no record", 44, "is no record"),
        (48, 37, 44, "is a record that no other follows", 92, "is no record"),
        (48, 23, 44, "is a record that no other follows", 76, "is no record"),
        (48, 85, 44, "is a truncated record", 44, "is a truncated record"),
        (48, 0x1FFFFFFF, 44, "is a truncated record", 44, "is a truncated record"),
        (92, 0x1FFFFFFF, 88, "is a truncated record", 88, "is a truncated record"),
        (92, 37, 88, "is a truncated record", 88, "is a truncated record"),
        (92, 1 << 29 | 36, 88, "is a truncated record", 88, "is a truncated record"),
        (52, 4, 44, TOO_SHORT, 44, TOO_SHORT),
        (52, 0xFFFFFFFF, 44, TOO_SHORT, 44, TOO_SHORT),
    ],
)
def test_invalid_records_are_refused(tmp_path, at, word, place, reason, place_walked, reason_walked):
    write(tmp_path, IMAGES)
    change(tmp_path / "train.rec", at, struct.pack("<I", word))
    assert refusal(tmp_path) == f"train.rec: what lies at byte {place} {reason}{AGAIN}"
    (tmp_path / "train.idx").unlink()
    assert refusal(tmp_path) == f"train.rec: what lies at byte {place_walked} {reason_walked}{AGAIN}"


def test_a_record_must_not_overlap_the_next(tmp_path):
    """Only the index shows the overlap."""
    write(tmp_path, IMAGES)
    change(tmp_path / "train.rec", 4, struct.pack("<I", 80))
    assert refusal(tmp_path) == f"train.rec: what lies at byte 0 is a record that reaches into the next{AGAIN}"
    (tmp_path / "train.idx").unlink()
    assert read_index(tmp_path).keys.tolist() == [1, 3]


def test_a_record_must_be_followed_by_another_even_if_it_is_not_in_the_index(tmp_path):
    write(tmp_path, IMAGES)
    (tmp_path / "train.idx").write_text("1\t0\n3\t88\n")
    change(tmp_path / "train.rec", 48, struct.pack("<I", 2 << 29 | 36))
    assert refusal(tmp_path) == f"train.rec: what lies at byte 0 is a record that no other follows{AGAIN}"


@pytest.mark.parametrize("index", [True, False])
def test_a_truncated_file_is_refused(tmp_path, index):
    data = (write(tmp_path, IMAGES, index) / "train.rec").read_bytes()
    for size in range(1, len(data)):
        if index or size % 44:
            (tmp_path / "train.rec").write_bytes(data[:size])
            assert AGAIN in refusal(tmp_path)
    for more in (b"\0", b"\0" * 8, MAGIC, part(2, b"")):
        (tmp_path / "train.rec").write_bytes(data + more)
        assert AGAIN in refusal(tmp_path)


def test_a_record_of_many_parts_must_be_complete(tmp_path):
    first, last = part(1, content(b"", 3)), part(3, b"end")
    for parts in (first, first + first + last, first + part(2, b"") + part(0, b"") + last, first + part(2, b"")):
        for index in (True, False):
            (tmp_path / "train.rec").write_bytes(parts)
            (tmp_path / "train.idx").write_text("0\t0\n") if index else (tmp_path / "train.idx").unlink()
            assert "what lies at byte 0 is" in refusal(tmp_path)


@pytest.mark.parametrize("value", [-1.0, 0.5, -0.25, 2.0**24, 1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["identity", "identity in a vector", "group"])
def test_labels_that_are_not_whole_numbers_are_refused(tmp_path, name, value):
    labels = (1, value) if name == "group" else (value,)
    bad = content(b"image", *labels, vector=name != "identity")
    write(tmp_path, {5: content(b"image", 2), 9: bad})
    expected = f"train.rec: key 9 has {value:g} for its {name.split()[0]}: label images with whole numbers from 0 to"
    assert refusal(tmp_path) == f"{expected} 16,777,215."


def test_a_signalling_nan_is_refused_as_a_label(tmp_path):
    write(tmp_path, {5: struct.pack("<IIQQ", 0, 0x7F800001, 0, 0)})
    assert "key 5 has nan for its identity" in refusal(tmp_path)


@pytest.mark.parametrize("end", [-5, 0, 1, 3.5, 1e30, np.inf, np.nan])
def test_a_header_record_without_a_count_is_refused(tmp_path, end):
    write(tmp_path, insightface(FACES) | {0: content(b"", end, end + 3)})
    said = f"train.rec: its header record says that images end at key {end:g}: get the file again."
    assert refusal(tmp_path) == said


def test_images_that_the_header_record_counts_must_be_there(tmp_path):
    contents = insightface(FACES)
    del contents[2]
    write(tmp_path, contents)
    assert refusal(tmp_path) == "train.rec: 2 of the 3 images of its header record are there" + AGAIN
    for end in (1 << 23, 1 << 24):
        write(tmp_path, insightface(FACES) | {0: content(b"", end, end)})
        assert refusal(tmp_path) == f"train.rec: 6 of the {end - 1:,} images of its header record are there" + AGAIN


IMAGE = content(b"image", 3, vector=False)


@pytest.mark.parametrize(
    ("missing", "more"),
    [
        (range(4104, 6000), {}),  # all identities are missing
        (range(4104, 4107), {}),  # all possible first identities are missing
        ([4104], {}),  # the first identity, which could be an image
        ([4103], {}),  # the last image, which could be an identity
        ([], {4105: IMAGE}),  # an image among the identities
        ([], {4104: IMAGE, 4105: IMAGE, 4106: IMAGE}),  # more images than the header record allows
        ([], {4105: content(b"", 9, 3)}),  # keys that end before their start
        ([], {4103: content(b"", 500, 3)}),  # an empty image, or an identity
    ],
)
def test_an_ambiguous_end_of_the_images_is_refused(tmp_path, half, missing, more):
    write(tmp_path, {key: value for key, value in (large(4104) | more).items() if key not in missing})
    assert refusal(tmp_path) == (
        "train.rec: its header record says that images end at a key from 4,102 to 4,106, and the records of these keys "
        "do not tell which: get the file again, with its train.idx."
    )


@pytest.mark.parametrize("key", [1, 2000, 4101, 4102])
def test_an_image_missing_before_a_rounded_end_is_detected(tmp_path, half, key):
    write(tmp_path, {k: value for k, value in large(4104).items() if k != key})
    said = (
        "train.rec: 4,102 of the 4,103 images of its header record are there: get the file again, with its train.idx."
    )
    assert refusal(tmp_path) == said


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"", "is a truncated record"),
        (part(0, content(b"image", 1))[:-4], "is a truncated record"),
        (part(0, content(b"image", 1))[:-1], "is a truncated record"),
        (part(0, content(b"image", 1))[:7], "is a truncated record"),
        (part(1, content(b"image", 1)), "is a truncated record"),
        (part(0, content(b"image", 1)) + bytes(4), "is more than one record"),
        (part(0, content(b"image", 1)) * 2, "is more than one record"),
        (part(1, content(b"", 1)) + part(1, b"image"), "is no record"),
        (part(1, content(b"", 1)) + part(0, b"image"), "is no record"),
        (part(2, content(b"image", 1)), "is no record"),
        (part(3, content(b"image", 1)), "is no record"),
        (b"\xff\xd8" + bytes(60), "is no record"),
        (MAGIC + b"\xff\xff\xff\x1f" + bytes(60), "is a truncated record"),
        (part(0, content(b"image", 1)[:23]), "is a record too short for its labels"),
        (part(0, content(b"", 1, 2)[:31]), "is a record too short for its labels"),
        (part(0, b"\xff\xff\xff\xff" + bytes(40)), "is a record too short for its labels"),
        (part(0, b""), "is a record too short for its labels"),
    ],
)
def test_invalid_record_bytes_are_refused(record, reason):
    with pytest.raises(ValueError) as caught:
        image_of(record)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("faces", "reason"),
    [
        ([], "there is no image to be written."),
        ([FACES[2], FACES[0]], "image 2 is of identity 0 after one of 2: sort images by identity."),
        ([(b"", 0, -1), (b"", 3, -1)], "image 2 is of identity 3 of 3: number identities from 0."),
        ([(b"", -1, -1)], "image 1 is of identity -1 of 3: number identities from 0."),
        ([(b"", 0, -2)], "image 1 is of group -2: number groups from 0, or give -1 for none."),
        ([(b"", 0, 1 << 24)], "image 1 is of group 16777216: number groups from 0, or give -1 for none."),
        ([(bytes(70), 0, -1)], "image 1 has 70 bytes: a record holds no more than 100."),
    ],
)
def test_images_that_cannot_be_written_are_refused(tmp_path, monkeypatch, faces, reason):
    monkeypatch.setattr(recordio, "LONGEST", 100)
    write_records(tmp_path, FACES, num_classes=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for folder, left in ((tmp_path, before), (tmp_path / "new", {})):
        with pytest.raises(InputError) as caught:
            write_records(folder, iter(faces), num_classes=3)
        assert str(caught.value) == f"{folder / 'train.rec'}: {reason}"
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == left


def test_labels_beyond_float32_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "EXACT", 6)
    write_records(tmp_path, FACES[:2], num_classes=3)
    assert faces_of(read_index(tmp_path)) == FACES[:2]
    with pytest.raises(InputError, match="image 3 is one too many with 3 identities: .* must be fewer than 6"):
        write_records(tmp_path, FACES, num_classes=3)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_write_interrupted_between_its_files_leaves_no_wrong_index(tmp_path, monkeypatch, renamed):
    write_records(tmp_path, FACES, num_classes=3)
    replace, calls = os.replace, []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > renamed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(NotWritten, match="could not be written"):
        write_records(tmp_path, GROUPED[:2], num_classes=1)
    assert {path.name for path in tmp_path.iterdir()} == {"train.rec", "property"}
    assert faces_of(read_index(tmp_path)) == (GROUPED[:2] if renamed else FACES)


# Fuzz -----------------------------------------------------------------------------------------------------------------

EXTREMES = (0, 1, 3, 4, 7, 8, 28, 0x1FFFFFFF, 0x20000000, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xCED7230A, 0xFFFFFFFF)
NUMBERS = (b"", b"-1", b"0", b"1", b"4", b"x", b"1.5", b"99999999", b"9" * 18, b"9" * 19, b"9" * 400, b"\xff")
CASES = 1500  # per layout


def mutated(random: np.random.Generator, data: bytes) -> bytes:
    at, more, to = (int(number) for number in random.integers(0, len(data) + 1, 3))
    size = int(random.integers(1, 60))
    match random.integers(0, 8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + random.bytes(size) + data[at:]
        case 2:  # copies a piece to another place
            return data[:to] + data[at : at + size] + data[to:]
        case 3:
            return data[: min(at, more)] + data[max(at, more) :]
        case 4 | 5:
            at -= at % 4
            return data[:at] + struct.pack("<I", EXTREMES[random.integers(len(EXTREMES))]) + data[at + 4 :]
        case 6:
            return data + data
        case _:
            flipped = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                flipped[place] ^= 1 << random.integers(8)
            return bytes(flipped)


def mutated_index(random: np.random.Generator, text: bytes) -> bytes:
    if random.integers(2):
        return mutated(random, text)
    numbers = re.split(rb"([\t\n])", text)
    numbers[random.integers(len(numbers))] = NUMBERS[random.integers(len(NUMBERS))]
    return b"".join(numbers)


def outcome(folder: Path) -> str:
    """Returns refused or read; asserts that what is read equals the result of the plain reader."""
    try:
        records = read_index(folder)
    except InputError as error:
        assert str(folder) in str(error) and str(error).endswith(".") and "\n" not in str(error)
        return "refused"
    assert records.lengths.min() >= 32 and records.lengths.sum() <= records.path.stat().st_size
    found = [(key, *face) for key, face in zip(records.keys.tolist(), faces_of(records), strict=True)]
    assert found == plain_read(folder)
    return "read"


@pytest.mark.parametrize("layout", ["insightface", "no header record"])
def test_a_mutated_file_is_refused_or_read_as_the_plain_reader_does(tmp_path, layout):
    faces = many_faces(seed=2, count=9)
    write_records(tmp_path, faces, num_classes=4)
    if layout == "no header record":
        first, end = (int(read_index(tmp_path).offsets[i]) for i in (0, -1))
        end = plain_record((tmp_path / "train.rec").read_bytes(), end)[1]
        (tmp_path / "train.rec").write_bytes((tmp_path / "train.rec").read_bytes()[first:end])
        lines = [f"{key}\t{at - first}\n" for key, at in enumerate(read_offsets(tmp_path / "train.idx")[1:10])]
        (tmp_path / "train.idx").write_text("".join(lines), newline="\n")
    data, text = (tmp_path / "train.rec").read_bytes(), (tmp_path / "train.idx").read_bytes()
    assert faces_of(read_index(tmp_path)) == faces

    outcomes, failures = {"refused": 0, "read": 0}, []
    for case in range(CASES):
        random = np.random.default_rng([case, len(layout)])
        kind = case % 3  # mutates records with an index, records without one, or the index
        (tmp_path / "train.rec").write_bytes(data if kind == 2 else mutated(random, data))
        (tmp_path / "train.idx").write_bytes(mutated_index(random, text) if kind == 2 else text)
        if kind == 1:
            (tmp_path / "train.idx").unlink()
        try:
            outcomes[outcome(tmp_path)] += 1
        except Exception as error:
            failures.append((case, repr(error)))
    assert failures == []
    assert min(outcomes.values()) > CASES / 10, outcomes


def read_offsets(path: Path) -> list[int]:
    return [int(line.split("\t")[1]) for line in path.read_text().splitlines()]


def test_a_corrupted_number_allocates_no_memory(tmp_path):
    write_records(tmp_path, many_faces(seed=3, count=9), num_classes=4)
    data = (tmp_path / "train.rec").read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="too short for its labels"):
            image_of(part(0, struct.pack("<I", 0x7FFFFFFF) + bytes(40)))
        for at in range(0, len(data), 4):
            for value in (0x1FFFFFFF, 0x3FFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
                (tmp_path / "train.rec").write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
                outcome(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # bytes
    finally:
        tracemalloc.stop()
