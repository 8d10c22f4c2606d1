"""Scores of others in, and ours out: CSV of FaVFA, long CSV for fairlearn's MetricFrame, five columns of bob.bio.

Forms, recognised by the first line:

FaVFA      img_1,img_2,dist                    dist: cosine distance, in [0, 2]
fairlearn  y_true,y_score,<group>              y_score: similarity, larger is more alike; y_true: 1 genuine, 0 impostor
bob.bio    <claimed identity> <reference> <real identity> <probe> <similarity>, without a header, separated by spaces

A CSV may have further columns: `group` (or `set`, `ethnicity`, `sensitive_feature`), `same` (1 genuine, 0 impostor),
`identity_1` and `identity_2`, and attributes (`utils.data.attributes`). A group may have one column for each end
(`group_1`, `group_2`): pairs across groups are left out. BFW's names of all these are known. Without `same`, FaVFA's
names tell the identities: the folder of a path, else the name up to the last underscore. A similarity in [-1, 1] counts
as a cosine; others are mapped linearly to [0, 4].
"""

import csv
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.scores import Scored
from eval.verification import accuracy
from utils.data.attributes import GROUP, LABELS, MIXED, SAME_COLUMNS, attributes_of, columns_of, values_of
from utils.data.identities import checked
from utils.data.pairs import FOLDS, Pairs, fold_of, lacking
from utils.errors import InputError
from utils.storage.files import sha256

ALL = "all"  # the set of scores without a group
GROUP_COLUMNS = (GROUP, "set", "ethnicity", "sensitive_feature")
SCORE_COLUMNS = ("y_score", "score")
IDENTITY_COLUMNS = (("identity_1", "identity_2"), ("id1", "id2"))
DEALT = "Pairs are dealt to the ten folds in turn, since the order of the file leaves folds without a kind of pair."


@dataclass(frozen=True)
class Theirs:
    """Scores of a model that is not at hand, as the evaluation uses them."""

    scored: Scored
    sets: dict[str, Pairs]  # without images
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Lines:
    """The columns of a file of P scores."""

    distance: np.ndarray  # (P,) squared distance
    same: np.ndarray  # (P,) bool
    identities: np.ndarray | None  # (P, 2)
    group: np.ndarray  # (P,) names; MIXED for a pair of no group
    note: str
    attributes: dict[str, np.ndarray] = field(default_factory=dict)  # (P,) by attribute
    images: np.ndarray | None = None  # (P, 2) names, if the form has them


def read_scores(path: Path) -> Theirs:
    """Reads a file of scores in one of the forms above.

    Raises InputError if the file has another form, a score is not finite, a group has one kind of pair only or fewer
    pairs than folds, a genuine pair has two identities, or columns contradict each other.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: set scores to a file of scores.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): save it as UTF-8.") from error
    if not text.strip():
        raise InputError(f"{path} is empty: set scores to a file of scores.")
    lines, digest = _parsed(path, text), sha256(path)
    if lines.same.any() and not lines.same.all():
        genuine, impostor = (np.median(lines.distance[which]) for which in (lines.same, ~lines.same))
        if genuine > impostor:
            raise InputError(
                f"{path}: genuine pairs are less alike than impostor pairs: dist must be a distance, "
                "y_score and score a similarity."
            )
    sets, distances, notes = {}, {}, [lines.note]
    if alike := _impostors_of_one_identity(lines):
        notes.append(f"Impostor pairs of one identity: {alike:,} of {int(np.sum(~lines.same)):,}, kept as impostors.")
    if without := int(np.sum(lines.group == MIXED)):
        notes.append(f"Left out: {without:,} of {len(lines.group):,} pairs, across groups or without a group.")
    for name in dict.fromkeys(lines.group[lines.group != MIXED].tolist()):
        which = np.flatnonzero(lines.group == name)
        _check(f"{path}, group {name}" if name != ALL else str(path), lines.same[which])
        order = _order(lines.same[which])
        if (order != np.arange(len(order))).any() and DEALT not in notes:
            notes.append(DEALT)
        which = which[order]
        identities = None if lines.identities is None else lines.identities[which]
        attributes = {attribute: values[which] for attribute, values in lines.attributes.items()}
        empty = np.empty((0, 112, 112, 3), np.uint8)
        known = [part[which] for part in (lines.same, lines.identities, lines.images) if part is not None]
        sets[name] = Pairs(empty, np.empty(0, np.int64), known[0], _digest(known), identities, attributes)
        distances[name] = lines.distance[which]
    if all(lacking(pairs.same) for pairs in sets.values()):
        raise InputError(
            f"{path}: no group has {FOLDS} genuine and {FOLDS} impostor pairs, one for each fold: add pairs."
        )
    accuracies = tuple(accuracy(distances[name], pairs.same) for name, pairs in sets.items())
    scored = Scored("", "", "scores", path.stem, distances, {}, accuracies, (digest,))
    return Theirs(scored, sets, tuple(notes))


def _parsed(path: Path, text: str) -> _Lines:
    first = text.partition("\n")[0]
    if "," not in first and len(first.split()) == 5:
        return _five_columns(path, text)
    try:
        header, *rows = csv.reader(io.StringIO(text), strict=True)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} is no table of scores ({error}).") from error
    if short := next((k for k, row in enumerate(rows, 2) if len(row) != len(header)), 0):
        raise InputError(
            f"{path}, line {short:,}: expected {len(header)} columns, separated by commas, not {len(rows[short - 2])}."
        )
    columns = columns_of(path, header, rows)
    if {"img_1", "img_2", "dist"} <= columns.keys():
        names = np.array([columns["img_1"], columns["img_2"]], object).T.reshape(-1, 2)
        distance = 2 * _numbers(path, columns["dist"], "dist")
        if len(distance) and not (distance.min() >= 0 and distance.max() <= 4):
            raise InputError(f"{path}: dist must be a cosine distance, in [0, 2], not up to {distance.max() / 2:g}.")
        images, identities, note = names, _known(path, columns), "dist is read as cosine distance."
        labels = _labels(path, columns, required=False)
        if labels is None:
            identities = np.array([[_identity(name) for name in pair] for pair in names], object).reshape(-1, 2)
            labels = identities[:, 0] == identities[:, 1]
    elif score := next((name for name in SCORE_COLUMNS if name in columns), ""):
        images, labels, identities = None, _labels(path, columns, required=True), _known(path, columns)
        distance, note = _from_similarity(_numbers(path, columns[score], score))
    else:
        raise InputError(
            f"{path}: expected columns img_1,img_2,dist, or y_true,y_score, separated by commas, or five columns as of "
            f"bob.bio, separated by spaces; found {', '.join(header)[:80]}."
        )
    named = (values_of(columns, name) for name in GROUP_COLUMNS)
    group = next((values for values in named if values is not None), np.full(len(rows), ALL, object))
    if identities is not None:
        checked(path, identities, labels)
    return _Lines(distance, labels, identities, group, note, attributes_of(columns), images)


def _five_columns(path: Path, text: str) -> _Lines:
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if short := next((k for k, row in enumerate(rows, 1) if len(row) != 5), 0):
        raise InputError(f"{path}, line {short:,}: expected 5 columns.")
    identities = np.array([(row[0], row[2]) for row in rows], object)
    distance, note = _from_similarity(_numbers(path, [row[4] for row in rows], "the score", first=1))
    group = np.array([ALL] * len(rows), object)
    return _Lines(distance, identities[:, 0] == identities[:, 1], identities, group, note)


def _numbers(path: Path, texts: list[str], what: str, first: int = 2) -> np.ndarray:
    values = np.empty(len(texts))
    for k, text in enumerate(texts):
        try:
            values[k] = float(text)
        except ValueError:
            values[k] = np.nan
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        line = wrong[0] + first
        raise InputError(f"{path}, line {line:,}: {what} is {texts[wrong[0]] or 'empty'}, not a finite number.")
    return values


def _labels(path: Path, columns: dict[str, list[str]], required: bool) -> np.ndarray | None:
    found: dict[str, np.ndarray] = {}
    for name in SAME_COLUMNS:
        if name in columns:
            values = np.array([LABELS.get(text.lower(), -1) for text in columns[name]])
            if len(wrong := np.flatnonzero(values < 0)):
                raise InputError(f"{path}, line {wrong[0] + 2:,}: {name} must be 1 (genuine) or 0 (impostor).")
            for other, before in found.items():
                if len(wrong := np.flatnonzero(values != before)):
                    raise InputError(f"{path}, line {wrong[0] + 2:,}: {name} contradicts {other}: keep the right one.")
            found[name] = values
    if required and not found:
        raise InputError(f"{path} has no column y_true, 1 for genuine and 0 for impostor pairs: add it.")
    return next((values == 1 for values in found.values()), None)


def _known(path: Path, columns: dict[str, list[str]]) -> np.ndarray | None:
    ends = next((two for two in IDENTITY_COLUMNS if {*two} <= columns.keys()), None)
    for end in ends or ():
        if "" in columns[end]:  # would make all people without a name one person
            line = columns[end].index("") + 2
            raise InputError(f"{path}, line {line:,}: {end} is empty: name it, or leave out the column.")
    return ends and np.array([columns[end] for end in ends], object).T.reshape(-1, 2)


def _impostors_of_one_identity(lines: _Lines) -> int:
    if lines.identities is None:
        return 0
    return int(np.sum(~lines.same & (lines.identities[:, 0] == lines.identities[:, 1])))


def _identity(name: str) -> str:
    folder, _, file = name.replace("\\", "/").rpartition("/")
    return folder or file.rpartition("_")[0] or file


def _from_similarity(score: np.ndarray) -> tuple[np.ndarray, str]:
    """Converts similarities to squared distances in [0, 4]; returns them and the note that says how."""
    if len(score) == 0 or (score.min() >= -1 and score.max() <= 1):
        return 2 - 2 * score, "Scores are read as cosines."
    low, high = score.min(), score.max()
    note = f"Scores from {low:g} to {high:g} are mapped linearly to squared distances from 4 to 0."
    return 4 * (high - score) / max(high - low, np.finfo(float).tiny), note


def _digest(known: list[np.ndarray]) -> str:
    """Returns the SHA-256 of what is known of the pairs: equal for the scores of several models on the same pairs."""
    return hashlib.sha256(json.dumps([part.tolist() for part in known]).encode()).hexdigest()


def _check(what: str, same: np.ndarray) -> None:
    if len(same) < FOLDS:
        raise InputError(f"{what} has {len(same)} pairs, too few for {FOLDS} folds: add pairs, or leave the group out.")
    if same.all() or not same.any():
        raise InputError(f"{what} has no {'impostor' if same.all() else 'genuine'} pair: both kinds are needed.")


def _order(same: np.ndarray) -> np.ndarray:
    """Returns the order (P,) that gives every fold both kinds; the given order if it does so already."""
    fold = fold_of(len(same))
    if all(np.bincount(fold[which], minlength=FOLDS).all() for which in (same, ~same)):
        return np.arange(len(same))
    place = np.empty(len(same))
    for which in (same, ~same):
        place[which] = np.arange(which.sum()) / which.sum()
    return np.argsort(place, kind="stable")


# Ours, in these forms -------------------------------------------------------------------------------------------------


def written(form: str, one: Scored, sets: dict[str, Pairs], threshold: float | None) -> str:
    """Returns the scores of a model in a form of SCORE_FORMS; `threshold` decides y_pred, which fairlearn needs."""
    text, known = io.StringIO(), all(pairs.identities is not None for pairs in sets.values())
    names = ["identity_1", "identity_2"] if known else []
    if form == "bob":
        table = csv.writer(text, delimiter=" ", lineterminator="\n")
    else:
        table = csv.writer(text, lineterminator="\n")
        first = ["img_1", "img_2", "dist", "same"] if form == "favfa" else ["y_true", "y_pred", "y_score"]
        table.writerow([*first, "group", *names])
    for group, pairs in sets.items():
        for k, (same, distance) in enumerate(zip(pairs.same.tolist(), one.distances[group].tolist(), strict=True)):
            who = [str(name) for name in pairs.identities[k]] if known else []
            rows = pairs.rows[2 * k : 2 * k + 2] if len(pairs.rows) else (2 * k, 2 * k + 1)
            images = [f"{group}/{row:06}" for row in rows]
            if form == "favfa":
                table.writerow([*images, repr(distance / 2), int(same), group, *who])
            elif form == "fairlearn":
                decision = "" if threshold is None else int(distance < threshold)
                table.writerow([int(same), decision, repr(1 - distance / 2), group, *who])
            else:
                one_, other = who or (f"{group}{k}", f"{group}{k}" if same else f"{group}{k}-other")
                fields = (one_, images[0], other, images[1])
                table.writerow([*("_".join(field.split()) for field in fields), repr(1 - distance / 2)])
    return text.getvalue()
