"""Evaluation: accuracy per ethnicity, average, STD and SER of every model that is in the output folder.

Reads   <pairs>, <output>: teachers, adaptors (through their teachers) and students, specialized and baseline
Writes  <output>/evaluation/: accuracy.csv, accuracy.md, accuracy.png
Run     python -m eval.evaluation
"""

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backbones import build_adaptor, load_backbone, load_weights
from config.config import ADAPTORS, NETWORKS, Config
from eval.fairness import summary
from eval.figures import draw_accuracies
from eval.verification import Pairs, embed, load_pairs, normalize, ten_fold, views
from utils.checkpoint import find_weights, need_weights
from utils.dataset import Column
from utils.engine import infer, run, setup
from utils.errors import InputError
from utils.files import write_text
from utils.synthetic import is_generated

KINDS = ("teacher", "adaptor", "a-KD", "EAF-KD")


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
        raise InputError(f"{Path(cfg.output)} holds no trained model: run python train.py first, or set output.")
    pairs = load_pairs(cfg)
    rows = [row for family in families for row in (*_score_teachers(family, pairs), *_score_students(family, pairs))]
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


def _teachers(cfg: Config) -> list[str]:
    names = cfg.quarters if cfg.is_teacher_baseline else cfg.ethnicities  # in the order of the columns
    return [name for name in names if find_weights(cfg.teacher_dir(name), cfg.weights)]


def _students(cfg: Config) -> list[tuple[Config, str]]:
    """Settings and method of every student of this family."""
    found = []
    for student in NETWORKS:
        for is_dual_layer, has_dropout in ((False, False), (True, False), (True, True)):
            one = replace(cfg, student_network=student, is_dual_layer=is_dual_layer, has_dropout=has_dropout)
            found += [(one, method) for method in KINDS[2:] if find_weights(one.student_dir(method), cfg.weights)]
    return found


def _score_teachers(cfg: Config, pairs: dict[str, Pairs]) -> list[Row]:
    """All teachers, and if none is missing the adaptors on top of them; each teacher sees each image once."""
    teachers = {name: load_backbone(cfg.network, cfg.teacher_dir(name), cfg)[0] for name in _teachers(cfg)}
    adaptors = {}
    if len(teachers) == len(cfg.teachers):
        for name in ADAPTORS:
            if find_weights(cfg.adaptor_dir(name), cfg.weights):
                adaptors[name] = build_adaptor(name, cfg)
                load_weights(adaptors[name], need_weights(cfg.adaptor_dir(name), cfg.weights))

    scores: dict[tuple[str, str], list[float]] = {}
    for ethnicity, one in pairs.items():
        features = {}
        for name, teacher in teachers.items():
            features[name] = views(teacher, one.images, cfg, f"{ethnicity} pairs, teacher {name}")
            scores.setdefault(("teacher", name), []).append(_accuracy(features[name], one))
        for name, adaptor in adaptors.items():
            fused = fuse(adaptor, [features[teacher] for teacher in cfg.teachers], cfg)
            scores.setdefault(("adaptor", name), []).append(_accuracy(fused, one))
    return [Row(cfg.setting, cfg.network, *model, tuple(values)) for model, values in scores.items()]


def _score_students(cfg: Config, pairs: dict[str, Pairs]) -> list[Row]:
    rows = []
    for one, method in tqdm(_students(cfg), "students", disable=None, leave=False):
        student, _ = load_backbone(one.student_network, one.student_dir(method), cfg)
        title = f"{one.adaptor}-{method}"
        scores = [_accuracy(views(student, s.images, cfg, f"{name} pairs, {title}"), s) for name, s in pairs.items()]
        rows.append(Row(cfg.setting, cfg.network, method, f"{one.adaptor} {one.student_network}", tuple(scores)))
    return rows


def fuse(adaptor, features: list[np.ndarray], cfg: Config) -> np.ndarray:
    """The adaptor's features (N, 2, D) from those of each teacher (N, 2, D), which it sees at unit length."""
    count = len(features[0])
    flat = [feature.reshape(2 * count, -1) for feature in features]
    columns = {"embedding": Column(tuple(normalize(feature) for feature in flat))}
    return infer(lambda embedding: adaptor(embedding), adaptor, columns, cfg, "adaptor").reshape(count, 2, -1)


def _accuracy(features: np.ndarray, pairs: Pairs) -> float:
    return 100 * float(ten_fold(embed(features), pairs.same).accuracy.mean())


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
    """Aligned Markdown table, accuracies in percent, a rule between kinds of models."""
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
