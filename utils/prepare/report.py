"""Formats the report of `inspect` as Markdown, and draws its pictures."""

from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from utils.data.pairs import decode_image, read_bin
from utils.data.store import SIZE
from utils.prepare.contents import Contents, decoded
from utils.prepare.overlap import Match, PairsImages
from utils.storage.files import printable, replaced
from utils.tables import Table

NAMED = 20  # identities of the overlap that are listed by name
KNOWN_OVERLAP = (
    "An audit of the downloads found 3 identities of BUPT-BalancedFace (177 images) in RFW (11 images of them)."
)


# Markdown -------------------------------------------------------------------------------------------------------------


def as_markdown(facts: dict) -> str:
    """Formats the facts of inspect.json: warnings first, then a table for each subject."""
    tables = [
        _held(facts),
        _labels(facts),
        _sizes(facts),
        _placements(facts),
        _expected(facts),
        _duplicates(facts),
        _overlap(facts),
        _names(facts),
    ]
    warnings = "".join(f"- {line}\n" for line in facts["warnings"])
    texts = [one if isinstance(one, str) else one.markdown() for one in tables if one]
    return "\n".join([f"# {facts['data']}\n", *filter(None, [warnings]), *texts])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _named(name: str) -> str:
    return printable(name) or "all"


def _held(facts: dict) -> Table:
    keys = ("images", "unreadable", "identities")
    header = ("group", *keys, "least", "median", "most", "with one image", "MB")
    rows = [
        (
            _named(name),
            *(_number(group[key]) for key in keys),
            *map(_number, group["images per identity"].values()),
            _number(group["identities with one image"]),
            f"{group['bytes'] / 1e6:,.1f}",
        )
        for name, group in facts["groups"].items()
    ]
    return Table("What it holds", header, rows, 1, ("Least, median and most: images of an identity.",))


def _labels(facts: dict) -> Table | None:
    labels = facts["labels"]
    if not labels:
        return None
    rows = [
        ("least label of an identity", _number(labels["least"])),
        ("most", _number(labels["most"])),
        ("different labels", _number(labels["different"])),
        ("property", labels["property"] or "-"),
        *((f"images of group {name}", _number(count)) for name, count in labels["groups"].items()),
    ]
    return Table("Labels in train.rec", ("", "value"), rows, 1)


def _sizes(facts: dict) -> Table:
    rows = []
    for name, group in facts["groups"].items():
        sizes = [f"{size}: {count:,}" for size, count in group["sizes"].items()]
        sizes += [f"others: {group['of other sizes']:,}"] if group["of other sizes"] else []
        forms = [f"{form}: {count:,}" for form, count in group["formats"].items()]
        rows.append((_named(name), "; ".join(sizes), "; ".join(forms)))
    return Table("Sizes and formats", ("group", "pixels, most frequent first", "formats"), rows, 3)


def _placements(facts: dict) -> Table:
    rows = []
    for name, group in facts["groups"].items():
        found = group["placement"]
        if "unknown" in found:
            rows.append((_named(name), "-", "-", "-", f"not measured: {found['unknown']}"))
        else:
            verdict = "does not look aligned" if found["doubts"] else "no sign of misalignment"
            cells = (_number(found["images"]), f"{found['distance']:.1f}", f"{found['agreement']:.2f}", verdict)
            rows.append((_named(name), *cells))
    notes = (
        "Distance: pixels from eyes and mouth of the mean of these faces to ArcFace's template. Agreement: 1 where "
        "they lie in one place in all.",
        "Shifts of 5 pixels, scales of 0.8 and 1.25 and turns of 15 degrees are noticed where most faces have them; "
        "less may not be: see docs/data.md.",
    )
    return Table("Are the faces aligned?", ("group", "faces", "distance", "agreement", ""), rows, 1, notes)


def _expected(facts: dict) -> Table | str:
    counts = facts["counts"]
    rows = [
        (
            row["release"],
            row["group"],
            " or ".join(map(_number, row["expected"]["images"])),
            _number(row["images"]),
            _number(row["expected"]["identities"]),
            _number(row["identities"]),
        )
        for row in counts["rows"]
    ]
    if not rows:
        return f"## Known releases\n\n{counts['verdict']}\n"
    header = ("release", "group", "images expected", "found", "identities expected", "found")
    return Table("Known releases", header, rows, 2, (counts["verdict"],))


def _duplicates(facts: dict) -> Table:
    rows = [
        (f"of {kind}", _number(found["sets"]), _number(found["images"])) for kind, found in facts["duplicates"].items()
    ]
    return Table("Images of the same pixels", ("", "sets", "images in them"), rows, 1)


def _overlap(facts: dict) -> Table | None:
    found = facts["pairs"]
    if not found:
        return None
    rows = [(key, _number(value)) for key, value in found.items() if key != "bits at most"]
    note = (
        f"The same photograph: fingerprints that differ in no more than {found['bits at most']} of 256 bits. "
        "One that was cut otherwise is not found."
    )
    return Table("Also in the pairs", ("", "count"), rows, 1, (note,))


def _names(facts: dict) -> Table | None:
    found = facts["release"]
    if not found:
        return None
    identities = found["identities"]
    rows = [("identities of the same name", _number(len(identities))), ("their images", _number(found["images"]))]
    shown = [f"{printable(name)} ({', '.join(map(printable, groups))})" for name, groups in identities.items()]
    more = ", ..." * (len(shown) > NAMED)
    notes = [f"And where the release names them: {', '.join(shown[:NAMED])}{more}."] if shown else []
    if facts["counts"]["rows"]:
        notes.append(KNOWN_OVERLAP)
    return Table("Also in the release", ("", "count"), rows, 1, tuple(notes))


# Pictures -------------------------------------------------------------------------------------------------------------


def draw_samples(contents: Contents, samples: list[list[int]], path: Path) -> None:
    """Draws a row of faces for each group: the rows of `contents` in `samples`."""
    names = [_named(name) for name in contents.groups or ("",)]
    _draw([(name, [decoded(contents, row) for row in rows]) for name, rows in zip(names, samples, strict=False)], path)


def draw_pairs(contents: Contents, shared: list[Match], pairs: PairsImages, path: Path) -> None:
    """Draws a row for each match: the image of the data, and that of the pairs."""
    files: dict[Path, list[bytes]] = {}
    rows = []
    for match in shared:
        file, number = pairs.places[match.other]
        if file not in files:
            files[file] = read_bin(file)[0]
        label = f"{printable(contents.paths[match.row])}\n{file.name} {number}\n{match.bits} bits"
        rows.append((label, [decoded(contents, match.row), decode_image(file, files[file], number)[..., ::-1]]))
    _draw(rows, path)


def _draw(rows: list[tuple[str, list[np.ndarray]]], path: Path) -> None:
    """Draws rows of BGR images (H, W, 3) uint8, each with its label beside it, and writes them as PNG."""
    columns = max(1, *(len(faces) for _, faces in rows))
    figure = Figure(figsize=(2.5 + 0.9 * columns, 0.3 + 0.9 * len(rows)), layout="constrained")
    for axes, (name, faces) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows, strict=True):
        strip = np.full((SIZE, columns * SIZE, 3), 255, np.uint8)
        for k, face in enumerate(faces):
            _paste(strip[:, k * SIZE : (k + 1) * SIZE], face)
        axes.imshow(strip[..., ::-1])
        axes.text(-10, SIZE / 2, name, ha="right", va="center", fontsize=8, parse_math=False)
        axes.set_axis_off()
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130, format="png", bbox_inches="tight")


def _paste(cell: np.ndarray, face: np.ndarray) -> None:
    """Scales a face to fit a cell (112, 112, 3) and pastes it into the middle, in place."""
    scale = SIZE / max(face.shape[:2])
    height, width = (max(1, round(scale * side)) for side in face.shape[:2])
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    cell[top : top + height, left : left + width] = cv2.resize(face, (width, height), interpolation=cv2.INTER_AREA)
