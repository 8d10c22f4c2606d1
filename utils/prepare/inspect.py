"""Reports what a data folder holds, what it should hold, and what it shares with the pairs.

Reads   <data>/<ethnicity>/<identity>/<image>, <data>/<identity>/<image> or <data>/train.rec, every image once
        <pairs>/*.bin
        <release>/txts/<ethnicity>/<ethnicity>_pairs.txt, as RFW has them
Writes  <output>/inspect.md and inspect.json, the report: for each group images, identities, sizes, formats and whether
          the faces look aligned; the counts beside those of BUPT-BalancedFace and RFW; duplicates; overlap with the
          pairs
        <output>/samples.png, a few faces of each group
        <output>/unreadable.csv, duplicates.csv, overlap.csv and overlap.png, if there is something to list
        <output>/leave_out.txt with --pairs or --release: pass it as the setting leave_out to train without the overlap
Run     python -m utils.prepare inspect --data data/BUPT-BalancedFace --pairs data/RFW --release RFW --output inspected

Without --ethnicities the groups are detected; give the option if you give it to the stages, since names in
leave_out.txt are valid for the same groups only.

Duplicates are images of the same pixels. With --pairs two kinds of overlap are searched: images of the same pixels, and
re-encoded, resized or brightened copies of the same photograph, found by perceptual hashes (see
utils/prepare/likeness.py). A photograph with another crop is not found. With --release identities are compared by name.
"""

import argparse
import math
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from config.config import Config
from utils.data import recordio
from utils.data.index import GROUPS_OF_RECORDS
from utils.data.store import SIZE
from utils.data.synthetic import MARKER
from utils.errors import InputError
from utils.prepare.contents import (
    Contents,
    Seen,
    decoded,
    list_images,
    look_at_all,
    pixel_digests,
    shared_names,
    strays,
)
from utils.prepare.likeness import NEAR
from utils.prepare.overlap import Match, PairsImages, candidates, duplicates, equal_images, matches, read_pairs
from utils.prepare.placement import FEWEST, SAMPLE, place
from utils.prepare.releases import compare, verdict
from utils.prepare.report import as_markdown, draw_pairs, draw_samples
from utils.prepare.rfw import identities_of_lists
from utils.prepare.work import (
    add_processes,
    groups_of,
    path_of,
    refuse_filled,
    refuse_inside,
    write_failures,
)
from utils.storage.files import printable, replaced, write_json, write_text

REPORT, FACTS = "inspect.md", "inspect.json"
SAMPLES, OVERLAP_PICTURE = "samples.png", "overlap.png"
UNREADABLE, DUPLICATES, OVERLAP, LEAVE_OUT = "unreadable.csv", "duplicates.csv", "overlap.csv", "leave_out.txt"
WRITTEN = (REPORT, FACTS, SAMPLES, OVERLAP_PICTURE, UNREADABLE, DUPLICATES, OVERLAP, LEAVE_OUT)

MOST_FREQUENT = 5  # image sizes listed per group
SHOWN = 10  # faces of a group in samples.png
PICTURED = 20  # matches in overlap.png
DRAWN = 30  # most groups in samples.png: drawing hundreds takes minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=path_of, required=True, metavar="FOLDER", help="the images that stages train on")
    parser.add_argument(
        "--ethnicities", metavar="A,B", help='the groups, separated by commas; "" for <data>/<identity>/<image>'
    )
    parser.add_argument(
        "--nested_images", action="store_true", help="with --ethnicities: read images in subfolders of identities too"
    )
    parser.add_argument("--pairs", type=path_of, metavar="FOLDER", help="verification sets, *.bin")
    parser.add_argument("--release", type=path_of, metavar="FOLDER", help="RFW's folder, which holds txts")
    parser.add_argument("--output", type=path_of, required=True, metavar="FOLDER", help="folder of the report")
    add_processes(parser)


def run(given: argparse.Namespace) -> None:
    """Inspects a folder. Raises InputError for unusable folders and verification sets before any image is decoded."""
    groups = None if given.ethnicities is None else groups_of(given.ethnicities)
    refuse_inside(given.output, given.data)
    refuse_filled(given.output, WRITTEN)
    if given.nested_images and groups is None:
        raise InputError('--nested_images goes with --ethnicities, "" for none: with subfolders groups cannot be told.')
    contents = list_images(given.data, groups, given.nested_images)
    if given.release and contents.in_records:
        raise InputError(
            f"{given.data} names identities by numbers, which are not compared with names: leave --release out."
        )
    named = identities_of_lists(given.release) if given.release else {}
    pairs = read_pairs(given.pairs) if given.pairs else None

    with replaced(given.output / REPORT) as probe:  # fails now, not after the long work, if it is not writable
        probe.touch()
    (given.output / REPORT).unlink()
    seen = look_at_all(contents, given.processes)
    equal, near = equal_images(seen), candidates(seen, pairs) if pairs else []
    digests = pixel_digests(contents, np.union1d(equal, [row for row, *_ in near]).astype(np.int64), given.processes)
    same = duplicates(equal, digests)
    shared = matches(near, pairs, digests) if pairs else []
    identities = _identities_named(contents, named)

    held = {name: _group(contents, seen, k) for k, name in enumerate(contents.groups or ("",))}
    facts = {
        "data": printable(given.data),
        "groups": held,
        "unreadable": len(seen.reasons),
        "passed over": [vars(stray) for stray in strays(contents)],
        "identities in several groups": shared_names(contents),
        "labels": _labels(contents) if contents.in_records else None,
        "counts": _counts(held),
        "duplicates": _duplicates(contents, same),
        "pairs": _overlap(contents, pairs, shared) if pairs else None,
        "release": _names(contents, identities) if given.release else None,
    }
    facts["warnings"] = [*filter(None, [contents.hidden]), *_warnings(facts)]
    _write(given.output, contents, seen, same, pairs, shared, identities, facts)


# Facts ----------------------------------------------------------------------------------------------------------------


def _group(contents: Contents, seen: Seen, group: int) -> dict:
    """Counts images, identities, sizes and formats of a group."""
    rows = contents.rows_of(group)
    usable = rows[seen.usable[rows]]
    per_identity = np.unique(contents.identity[rows], return_counts=True)[1]
    sizes = Counter(map(tuple, seen.sides[usable].tolist()))
    forms = Counter(seen.forms[k] for k in seen.form[usable].tolist())
    return {
        "images": len(rows),
        "unreadable": len(rows) - len(usable),
        "identities": len(per_identity),
        "images per identity": {
            "least": int(per_identity.min()),
            "median": float(np.median(per_identity)),
            "most": int(per_identity.max()),
        },
        "identities with one image": int((per_identity == 1).sum()),
        "bytes": int(seen.size[usable].sum()),
        "sizes": {f"{width} x {height}": count for (width, height), count in sizes.most_common(MOST_FREQUENT)},
        "of other sizes": sum(count for _, count in sizes.most_common()[MOST_FREQUENT:]),
        f"not {SIZE} x {SIZE}": len(usable) - sizes[SIZE, SIZE],
        "formats": dict(forms.most_common()),
        "placement": _placement(contents, seen, usable),
    }


def _placement(contents: Contents, seen: Seen, usable: np.ndarray) -> dict:
    """Measures the placement of faces in a sample of 112 x 112 images, or tells why it is unknown."""
    rows = usable[(seen.sides[usable] == SIZE).all(1)]
    if (contents.folder / MARKER).exists():
        return {"unknown": "faces are drawn"}
    if len(rows) < FEWEST:
        return {"unknown": f"fewer than {FEWEST} images of {SIZE} x {SIZE}"}
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)]
    grey = [cv2.cvtColor(decoded(contents, row), cv2.COLOR_BGR2GRAY) for row in chosen]
    found = place(np.stack(grey))
    return {**asdict(found), "doubts": found.doubts}


def _labels(contents: Contents) -> dict:
    """Describes the labels in train.rec, those of other groups included."""
    numbers, groups = np.unique(contents.records.identity), Counter(contents.records.group.tolist())
    path = contents.folder / recordio.PROPERTY
    return {
        "least": int(numbers[0]),
        "most": int(numbers[-1]),
        "different": len(numbers),
        "property": path.read_text(errors="replace").strip()[:80] if path.exists() else None,
        "groups": {_group_name(label): count for label, count in sorted(groups.items())},
    }


def _group_name(label: int) -> str:
    if label < 0:
        return "none"
    return f"{label} ({GROUPS_OF_RECORDS[label]})" if label < len(GROUPS_OF_RECORDS) else str(label)


def _counts(groups: dict[str, dict]) -> dict:
    """Compares the counts with those of known releases; there are no rows for data without groups."""
    compared = compare({name: (group["images"], group["identities"]) for name, group in groups.items() if name})
    rows = [
        {"release": one.release, "group": group, "expected": expected._asdict(), "images": images, "identities": of}
        for one in compared
        for group, expected, images, of in one.rows
    ]
    return {"verdict": verdict(compared), "rows": rows}


def _duplicates(contents: Contents, same: list[list[int]]) -> dict:
    """Counts sets of images of equal pixels, and their images: within an identity, within a group, across groups."""
    kinds = {kind: {"sets": 0, "images": 0} for kind in ("one identity", "identities of one group", "several groups")}
    for rows in same:
        groups, identities = (len(np.unique(of[rows])) for of in (contents.group, contents.identity))
        kind = "several groups" if groups > 1 else "identities of one group" if identities > 1 else "one identity"
        kinds[kind]["sets"] += 1
        kinds[kind]["images"] += len(rows)
    return kinds


def _identities_named(contents: Contents, named: dict[str, set[str]]) -> dict[str, list[str]]:
    """Maps each identity whose name occurs in the release's lists to the groups of these lists."""
    found = {}
    for identity in contents.identities:
        name = identity.split("/")[-1]
        if groups := sorted(group for group, names in named.items() if name in names):
            found[identity] = groups
    return found


def _overlap(contents: Contents, pairs: PairsImages, shared: list[Match]) -> dict:
    """Counts images and identities that the data shares with the pairs."""
    images = {match.row for match in shared}
    exact = {match.row for match in shared if match.same_pixels}
    return {
        "images of pairs": len(pairs.places),
        "images of the same pixels": len(exact),
        "other images of the same photograph": len(images - exact),
        "bits at most": NEAR,
        "identities that these show": len(np.unique(contents.identity[[*images]])),
    }


def _names(contents: Contents, identities: dict[str, list[str]]) -> dict:
    """Lists identities that the data shares with the release's lists, and counts their images."""
    is_named = np.array([name in identities for name in contents.identities])
    return {"identities": identities, "images": int(is_named[contents.identity].sum())}


def _warnings(facts: dict) -> list[str]:
    """Returns one sentence for each finding that the user should check."""
    found = []
    if facts["unreadable"]:
        found.append(f"{facts['unreadable']:,} images cannot be read: {UNREADABLE} says why.")
    for stray in facts["passed over"]:
        kind, example = printable(stray["kind"]), printable(stray["example"])
        found.append(f"{stray['count']:,} files ({kind}) are passed over, such as {example}.")
    if shared := facts["identities in several groups"]:
        found.append(
            f"{len(shared):,} identities are in several groups, such as {printable(shared[0])}: stages refuse that, "
            "give them different names, or remove one of each."
        )
    if len(facts["groups"]) > DRAWN:
        found.append(
            f"{len(facts['groups']):,} groups are many: are they groups of identities, each with images in it? "
            f"{SAMPLES} shows {DRAWN} of them."
        )
    try:
        Config(ethnicities=tuple(filter(None, facts["groups"])))
    except InputError as error:
        found.append(f"Stages refuse the groups as they are: {error}")
    for name, group in facts["groups"].items():
        of = f"{printable(name)}: " if name else ""
        if other := group[f"not {SIZE} x {SIZE}"]:
            found.append(
                f"{of}{other:,} of {group['images']:,} images are not {SIZE} x {SIZE}, which stages refuse: "
                "python -m utils.prepare align --help"
            )
        if doubts := group["placement"].get("doubts"):
            found.append(f"{of}does not look aligned: {doubts}. See {SAMPLES}.")
    return found


# Write ----------------------------------------------------------------------------------------------------------------


def _write(
    output: Path,
    contents: Contents,
    seen: Seen,
    same: list[list[int]],
    pairs: PairsImages | None,
    shared: list[Match],
    identities: dict[str, list[str]],
    facts: dict,
) -> None:
    """Deletes the files of an earlier run, then writes all files, the report last."""
    for name in WRITTEN:
        (output / name).unlink(missing_ok=True)
    paths = contents.paths
    write_failures(output / UNREADABLE, ("image", "reason"), [(paths[row], why) for row, why in seen.reasons.items()])
    sets = [(number, paths[row]) for number, rows in enumerate(same, 1) for row in rows]
    write_failures(output / DUPLICATES, ("set", "image"), sets)
    lines = [(paths[one.row], *pairs.places[one.other], one.bits, "yes" if one.same_pixels else "no") for one in shared]
    write_failures(output / OVERLAP, ("image", "pairs", "image of pairs", "bits", "same pixels"), lines)
    draw_samples(contents, _samples(contents, seen)[:DRAWN], output / SAMPLES)
    if shared:
        draw_pairs(contents, shared[:: math.ceil(len(shared) / PICTURED)], pairs, output / OVERLAP_PICTURE)
    if facts["pairs"] or facts["release"]:
        left_out = sorted(identities) + sorted(
            {paths[one.row] for one in shared if contents.identities[contents.identity[one.row]] not in identities}
        )
        if broken := [line for line in left_out if "\n" in line]:
            facts["warnings"].append(f"{LEAVE_OUT} cannot name {broken[0]!r}, whose name has more than one line.")
        left_out = [line for line in left_out if line not in broken]
        write_text(output / LEAVE_OUT, "".join(f"{line}\n" for line in left_out))
        facts["left out"] = {"identities": len(identities), "images": len(left_out) - len(identities)}
    report = as_markdown(facts)
    write_text(output / REPORT, report)
    write_json(output / FACTS, facts)
    print(report)
    for warning in facts["warnings"]:
        print(warning, file=sys.stderr)
    written = ", ".join(name for name in WRITTEN if (output / name).exists())
    print(f"Written to {output}: {written}.")
    counts = facts.get("left out", {})
    if any(counts.values()):
        print(
            f"{output / LEAVE_OUT} names {counts['identities']:,} identities and {counts['images']:,} images: "
            f"give --leave_out {shlex.quote(str(output / LEAVE_OUT))} to every stage to train without them."
        )


def _samples(contents: Contents, seen: Seen) -> list[list[int]]:
    """Selects rows for samples.png: for each group the first images of evenly spaced identities."""
    usable, found = seen.usable, []
    for group in range(len(contents.groups) or 1):
        rows = contents.rows_of(group)
        rows = rows[usable[rows]]
        first = rows[np.unique(contents.identity[rows], return_index=True)[1]]
        found.append(first[np.linspace(0, len(first) - 1, min(len(first), SHOWN)).astype(int)].tolist())
    return found
