"""Evaluation: accuracy per ethnicity, average, STD and SER of every model that is in the output folder.

Reads   <pairs>, <output>: teachers, adaptors (through their teachers) and students, specialized and baseline
Writes  <output>/evaluation/: accuracy.csv, accuracy.md, accuracy.png; distances/, from which it goes on
Run     python -m eval.evaluation
"""

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from backbones import build_adaptor, load_backbone, load_weights
from config.config import ADAPTORS, NETWORKS, Config
from eval.fairness import summary
from eval.figures import draw_accuracies
from eval.verification import Pairs, accuracy, load_pairs, normalize, pair_distances, views
from utils.arrays import is_current, read, write
from utils.checkpoint import decided_by, find_weights, versions, weights_with_digest
from utils.dataset import Column
from utils.engine import infer, run, setup
from utils.errors import InputError
from utils.files import sha256, write_text
from utils.synthetic import is_generated

METHODS = ("a-KD", "EAF-KD")
KINDS = ("teacher", "adaptor", *METHODS)


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    setting: str  # specialized | baseline
    network: str  # of the teachers
    kind: str  # one of KINDS
    name: str  # teacher's group, adaptor, or adaptor and student network
    accuracies: tuple[float, ...]  # in percent, in order of cfg.ethnicities


def main(cfg: Config) -> None:
    setup(cfg)
    families = [family for family in _families(cfg) if _teachers(family) or _students(family)]
    if not families:
        raise InputError(
            f"{Path(cfg.output)} holds no trained model. Set output, or run first: {cfg.command('train.py')}"
        )
    pairs = load_pairs(cfg)
    rows = []
    for family in families:
        kept = _Distances(family, pairs)
        rows += [*_score_teachers(family, kept), *_score_students(family, kept)]
    rows.sort(key=lambda row: (row.setting != "specialized", NETWORKS.index(row.network), KINDS.index(row.kind)))

    note = "Generated faces, not photographs: the group names mean nothing." if is_generated(Path(cfg.pairs)) else ""
    folder = Path(cfg.output) / "evaluation"
    write_text(folder / "accuracy.csv", as_csv(rows, cfg.ethnicities))
    write_text(folder / "accuracy.md", as_table(rows, cfg.ethnicities, note) + "\n")
    draw_accuracies(rows, cfg.ethnicities, folder / "accuracy.png", note)
    print(as_table(rows, cfg.ethnicities, note))
    print(f"Written to {folder}: accuracy.csv, accuracy.md, accuracy.png.")


def _families(cfg: Config) -> list[Config]:
    """The settings of every teacher network, specialized and baseline, that has a folder."""
    both = (replace(cfg, is_teacher_baseline=baseline, network=name) for baseline in (False, True) for name in NETWORKS)
    return [family for family in both if family.network_dir.is_dir()]


def _teachers(cfg: Config) -> dict[str, Path]:
    """The weights of every teacher of this family, by name."""
    names = cfg.quarters if cfg.is_teacher_baseline else cfg.ethnicities  # in the order of the columns
    return {name: path for name in names if (path := find_weights(cfg.teacher_dir(name), cfg.weights))}


def _students(cfg: Config) -> list[tuple[Config, str, Path]]:
    """Settings, method and weights of every student of this family."""
    found = []
    for network in NETWORKS:
        for is_dual_layer, has_dropout in ((False, False), (True, False), (True, True)):
            student = replace(cfg, student_network=network, is_dual_layer=is_dual_layer, has_dropout=has_dropout)
            for method in METHODS:
                if path := find_weights(student.student_dir(method), cfg.weights):
                    found.append((student, method, path))
    return found


class _Distances:
    """Squared distances of all pairs, by model and group, kept on the disk: what is there is not computed again."""

    def __init__(self, cfg: Config, pairs: dict[str, Pairs]):
        self.cfg, self.pairs = cfg, pairs
        self._folder = Path(cfg.output) / "evaluation" / "distances" / f"{cfg.setting}-{cfg.network}"
        found = versions(cfg)
        self._conditions = {name: found[name] for name in ("torch", "device")}

    def read(self, model: str, weights: list[Path], group: str) -> np.ndarray | None:
        """Of one group's pairs, (P,), if they are those of the model that these weights make up."""
        path, made_from, form = self._entry(model, weights, group)
        return read(path, *form, checked=False) if is_current(path, *form, made_from) else None

    def write(self, model: str, weights: list[Path], group: str, distances: np.ndarray) -> np.ndarray:
        path, made_from, _ = self._entry(model, weights, group)
        write(path, distances, made_from)
        return distances

    def _entry(self, model: str, weights: list[Path], group: str) -> tuple[Path, dict, tuple]:
        one, digests = self.pairs[group], [sha256(path) for path in weights]
        made_from = {"pairs": one.digest, "weights": digests, **self._conditions}
        return self._folder / model / f"{group}.npy", made_from, (one.same.shape, np.float64)


def _score_teachers(cfg: Config, kept: _Distances) -> list[Row]:
    """All teachers, and the adaptors on top of those that they were trained on; each network sees each image once."""
    models = {("teacher", name): ([path], None, [path]) for name, path in _teachers(cfg).items()}
    for name in ADAPTORS:
        if found := _adaptor(cfg, name):
            adaptor, weights, inputs = found
            models["adaptor", name] = ([weights, *inputs], adaptor, inputs)
    networks = {
        path: load_backbone(cfg.network, path, cfg) for path in sorted({p for m in models.values() for p in m[2]})
    }

    scores: dict[tuple[str, str], list[float]] = {}
    for group, one in kept.pairs.items():
        features = {}
        for (kind, name), (weights, adaptor, inputs) in models.items():
            distances = kept.read(f"{kind} {name}", weights, group)
            if distances is None:
                for path in set(inputs) - features.keys():
                    title = f"{group} pairs, teacher {path.parent.name}"
                    features[path] = views(networks[path], one.images, cfg, title)
                seen = [features[path] for path in inputs]
                both = fuse(adaptor, seen, cfg) if adaptor else seen[0]
                distances = kept.write(f"{kind} {name}", weights, group, pair_distances(both))
            scores.setdefault((kind, name), []).append(accuracy(distances, one.same))
    return [Row(cfg.setting, cfg.network, *model, tuple(values)) for model, values in scores.items()]


def _adaptor(cfg: Config, name: str) -> tuple[nn.Module, Path, list[Path]] | None:
    """An adaptor, its weights and those of its teachers in its order, or None with a line why it is left out.

    One of ours goes with the teachers whose embeddings it was trained on, be they the best or the last; one of which
    that is not known, a released one, with those that `cfg.weights` selects.
    """
    folder = cfg.adaptor_dir(name)
    weights = find_weights(folder, cfg.weights)
    if weights is None:
        return None
    digests = {}
    if decided := decided_by(folder):
        trained_on = tuple(decided["settings"]["teachers"])
        if trained_on != cfg.teachers:
            print(
                f"{folder} is left out: it was trained on {', '.join(trained_on)}, in this order; set ethnicities so."
            )
            return None
        digests = {name: decided["sources"][f"embedding {name}"]["weights"] for name in cfg.teachers}
    inputs = []
    for teacher in cfg.teachers:
        run_folder = cfg.teacher_dir(teacher)
        digest = digests.get(teacher)
        inputs.append(weights_with_digest(run_folder, digest) if digest else find_weights(run_folder, cfg.weights))
    missing = [teacher for teacher, path in zip(cfg.teachers, inputs, strict=True) if path is None]
    if missing:
        print(f"{folder} is left out: the teachers it was trained on are not there any more: {', '.join(missing)}.")
        return None
    adaptor = build_adaptor(name, cfg)
    load_weights(adaptor, weights)
    return adaptor, weights, inputs


def _score_students(cfg: Config, kept: _Distances) -> list[Row]:
    rows = []
    for settings, method, path in _students(cfg):
        student, scores = load_backbone(settings.student_network, path, cfg), []
        name = f"{settings.adaptor} {settings.student_network}"
        for group, one in kept.pairs.items():
            distances = kept.read(f"{method} {name}", [path], group)
            if distances is None:
                both = views(student, one.images, cfg, f"{group} pairs, {settings.adaptor}-{method}")
                distances = kept.write(f"{method} {name}", [path], group, pair_distances(both))
            scores.append(accuracy(distances, one.same))
        rows.append(Row(cfg.setting, cfg.network, method, name, tuple(scores)))
    return rows


def fuse(adaptor, features: list[np.ndarray], cfg: Config) -> np.ndarray:
    """The adaptor's features (N, 2, D) from those of each teacher (N, 2, D), which it sees at unit length."""
    count = len(features[0])
    flat = [feature.reshape(2 * count, -1) for feature in features]
    columns = {"embedding": Column(tuple(normalize(feature) for feature in flat))}
    return infer(lambda embedding: adaptor(embedding), adaptor, columns, cfg, "adaptor").reshape(count, 2, -1)


# Tables ---------------------------------------------------------------------------------------------------------------


def _cells(row: Row) -> list[str]:
    """The accuracies, average, STD and SER as printed; the last three are computed before rounding."""
    average, std, ser = summary(row.accuracies)
    return [*(f"{value:.2f}" for value in row.accuracies), f"{average:.2f}", f"{std:.2f}", f"{ser:.2f}"]


def as_csv(rows: list[Row], ethnicities: tuple[str, ...]) -> str:
    """One line per model with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "network", "kind", "model", *ethnicities, "average", "std", "ser"])
    for row in rows:
        writer.writerow([row.setting, row.network, row.kind, row.name, *row.accuracies, *summary(row.accuracies)])
    return text.getvalue()


def as_table(rows: list[Row], ethnicities: tuple[str, ...], note: str) -> str:
    """Aligned Markdown table, accuracies in percent."""
    header = ["Setting", "Teachers", "Kind", "Model", *ethnicities, "Average", "STD", "SER"]
    body = [[row.setting, row.network, row.kind, row.name, *_cells(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: list[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:4], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(cells[4:], widths[4:], strict=True)]
        return f"| {' | '.join(left + right)} |"

    rule = (
        "|" + "|".join("-" * (width + 2) if i < 4 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join([*([note, ""] if note else []), line(header), rule, *map(line, body)])


if __name__ == "__main__":
    run(main)
