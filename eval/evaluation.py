"""Evaluation: accuracy per ethnicity, average, STD and SER of every model that is in the output folder.

Reads   <pairs>, <output>: teachers, adaptors (through their teachers) and students, specialized and baseline
Writes  <output>/evaluation/: accuracy.csv, accuracy.md, accuracy.png; distances/, from which it goes on
Run     python -m eval.evaluation
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from backbones import build_adaptor, load_backbone, load_weights
from config.config import ADAPTORS, NETWORKS, Config
from eval.fairness import summary
from eval.figures import draw_accuracies
from eval.verification import Pairs, accuracy, load_pairs, normalize, pair_distances, views
from utils.arrays import outdated, read, write
from utils.checkpoint import decided_by, find_weights, numerics, weights_with_digest
from utils.dataset import Column
from utils.engine import infer
from utils.errors import InputError
from utils.files import write_text
from utils.process import run, setup
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
        rows += kept.rows(_teacher_models(family))
        for student in _student_models(family):
            rows += kept.rows([student])
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


@dataclass(frozen=True)
class Model:
    """A trained model: a teacher, a student, or an adaptor with the teachers that it was trained on."""

    kind: str  # one of KINDS
    name: str
    weights: tuple[str, ...]  # digests of the files that it was loaded from
    networks: tuple[nn.Module, ...]
    adaptor: nn.Module | None = None


class _Distances:
    """Squared distances of all pairs, by model and group, kept on the disk: what is there is not computed again."""

    def __init__(self, cfg: Config, pairs: dict[str, Pairs]):
        self.cfg, self.pairs = cfg, pairs
        self._folder = Path(cfg.output) / "evaluation" / "distances" / f"{cfg.setting}-{cfg.network}"
        self._conditions = numerics(cfg)

    def rows(self, models: list[Model]) -> list[Row]:
        """A row for each of the models; where they share networks, each sees each image once."""
        scores: dict[Model, list[float]] = {model: [] for model in models}
        for group, one in self.pairs.items():
            features: dict[nn.Module, np.ndarray] = {}
            for model in models:
                path = self._folder / f"{model.kind} {model.name}" / f"{group}.npy"
                made_from = {"pairs": one.digest, "weights": [*model.weights], "conditions": self._conditions}
                form = (one.same.shape, np.float64)
                if outdated(path, *form, made_from) is not None:
                    for network in set(model.networks) - features.keys():
                        title = f"{group} pairs, {model.kind} {model.name}"
                        features[network] = views(network, one.images, self.cfg, title)
                    seen = [features[network] for network in model.networks]
                    both = fuse(model.adaptor, seen, self.cfg) if model.adaptor else seen[0]
                    write(path, pair_distances(both), made_from)
                scores[model].append(accuracy(read(path, *form), one.same))
        names = self.cfg.setting, self.cfg.network
        return [Row(*names, model.kind, model.name, tuple(values)) for model, values in scores.items()]


def _teacher_models(cfg: Config) -> list[Model]:
    """All teachers, and the adaptors on top of those that they were trained on."""
    teachers, models = _teachers(cfg), []
    loaded = {path: load_backbone(cfg.network, path, cfg) for path in teachers.values()}
    for name, path in teachers.items():
        network, digest = loaded[path]
        models.append(Model("teacher", name, (digest,), (network,)))
    for name in ADAPTORS:
        if found := _adaptor(cfg, name):
            weights, inputs = found
            adaptor = build_adaptor(name, cfg)
            digest = load_weights(adaptor, weights)
            loaded |= {path: load_backbone(cfg.network, path, cfg) for path in inputs if path not in loaded}
            networks, digests = zip(*(loaded[path] for path in inputs), strict=True)
            models.append(Model("adaptor", name, (digest, *digests), networks, adaptor))
    return models


def _adaptor(cfg: Config, name: str) -> tuple[Path, list[Path]] | None:
    """The weights of an adaptor and of its teachers in its order, or None with a line that says why it is left out.

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
    return weights, inputs


def _student_models(cfg: Config) -> Iterator[Model]:
    """One at a time: they share nothing."""
    for settings, method, path in _students(cfg):
        network, digest = load_backbone(settings.student_network, path, cfg)
        yield Model(method, f"{settings.adaptor} {settings.student_network}", (digest,), (network,))


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
