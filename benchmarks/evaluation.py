"""Times all that `python -m eval.evaluation --report` does once the scores are there, for 20 models on RFW.

The distances are generated. The models are those of Tables 1 to 3 of MST-KD, each with about its printed accuracies on
four groups of 6,000 pairs, so that all tables and pictures are made. The identities are as many as in RFW.

Reads   nothing
Writes  benchmarks/results/evaluation.md
Run     python -m benchmarks.evaluation
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.measuring import RESULTS, in_own_process, made_by
from config.config import Config
from eval import evaluation, figures, paper, report
from eval.published import PAIRS, Row, mst_kd
from eval.results import Results
from eval.scores import SAMPLE, Scored
from eval.verification import accuracy
from utils.data.pairs import Pairs, fold_of
from utils.environment import versions
from utils.storage.files import write_text
from utils.tables import Table

MODELS = 20
IDENTITIES = 2854  # a quarter of RFW's 11,416
SPREAD = 0.2  # of the squared distances of a kind
EPOCHS = 26
REST = "rest: printing, writing, numbering identities"
STEPS: tuple[tuple[str, Any, str], ...] = (
    ("draws of pairs or identities, intervals", evaluation, "Results"),
    ("impostors across groups", Results, "_impostors"),
    ("other tables of accuracies and rates", Results, "tables"),
    ("tables of the audit", evaluation, "_audit"),
    ("comparison with the paper", paper, "compare"),
    ("tables as Markdown, CSV and LaTeX", Table, "forms"),
    ("scores of each pair as CSV", evaluation, "_scores_csv"),
    ("curves of each model as PNG, SVG and PDF", evaluation, "draw_curves"),
    ("picture of accuracies", figures, "draw_accuracies"),
    ("picture of average against STD", figures, "draw_trade_off"),
    ("picture of the paper's results", figures, "draw_paper"),
    ("pictures of training", figures, "draw_training"),
    ("report page", report, "page"),
)
"""What is timed: a name, and the owner and name of a function. The time of a step is not part of the one around it."""

Times = dict[str, tuple[float, ...]]  # wall-clock and processor seconds by step


class Clock:
    """Adds up the seconds of functions, wall-clock and processor, without those of timed functions that they call."""

    def __init__(self) -> None:
        self._times: dict[str, np.ndarray] = {}
        self._inner = [np.zeros(2)]

    def timed(self, step: str, function: Callable) -> Callable:
        """Returns the function with its calls timed as `step`."""
        self._times.setdefault(step, np.zeros(2))

        def call(*given, **named):
            started = _now()
            self._inner.append(np.zeros(2))
            result = function(*given, **named)
            taken = _now() - started
            self._times[step] += taken - self._inner.pop()
            self._inner[-1] += taken
            return result

        return call

    @property
    def times(self) -> Times:
        return {step: tuple(both.tolist()) for step, both in self._times.items()}


def _now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    pairs, identities = (in_own_process(measure, MODELS, identified) for identified in (False, True))
    text = page(pairs, identities, made_by("benchmarks.evaluation", versions(Config())), os.getloadavg()[0])
    write_text(RESULTS / "evaluation.md", text)
    print(text)


def measure(models: int, identified: bool) -> Times:
    """Evaluates this number of models, on pairs with known identities or not; returns the seconds of each step."""
    rows = [*mst_kd().values()][:models]
    sets = {name: _pairs(name, count, identified) for name, count in PAIRS["MST-KD"].items()}
    scored = [_scored(row, sets, seed) for seed, row in enumerate(rows)]
    measured = evaluation.Measured(sets, scored, True, True, mst_kd(), ())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cfg = Config(output=folder, pairs=folder, report=True, device="cpu")
        for one in scored:
            _write_log(Path(folder, one.setting, one.network, one.kind, one.name.replace(" ", "-"), "log.jsonl"))
        stack.enter_context(patch.object(evaluation, "_measured", lambda *_: measured))
        for step, owner, name in STEPS:
            stack.enter_context(patch.object(owner, name, clock.timed(step, getattr(owner, name))))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            clock.timed(REST, evaluation.main)(cfg)
    return clock.times


def _pairs(group: str, count: int, identified: bool) -> Pairs:
    """Returns pairs without images, half of them genuine in each fold, in the order of RFW."""
    same = fold_of(count, 20) % 2 == 0
    one, other = np.random.default_rng(len(group)).integers(IDENTITIES, size=(2, count))
    numbers = np.stack([one, np.where(same, one, (one + 1 + other % (IDENTITIES - 1)) % IDENTITIES)], 1)
    names = np.char.add(f"{group} ", numbers.astype(str)) if identified else None
    return Pairs(np.empty((0, 112, 112, 3), np.uint8), np.empty(0, np.int64), same, "generated", names)


def _scored(row: Row, sets: dict[str, Pairs], seed: int) -> Scored:
    """Returns generated distances with about the accuracies of a printed row, and random embeddings."""
    random = np.random.default_rng(seed)
    distances, samples = {}, {}
    for name, pairs in sets.items():
        apart = 2 * SPREAD * NormalDist().inv_cdf(row.accuracies[name] / 100)
        distances[name] = np.clip(random.normal(1.8 - apart * pairs.same, SPREAD), 0, 4)
        drawn = random.normal(size=(SAMPLE, 512)).astype(np.float32)
        samples[name] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    accuracies = tuple(accuracy(distances[name], pairs.same) for name, pairs in sets.items())
    return Scored(*row.key, distances, samples, accuracies, (f"generated {seed}",))


def _write_log(path: Path) -> None:
    scores = dict.fromkeys((*PAIRS["MST-KD"], "average"), 90.0)
    entries = [
        {"epoch": k, "loss": {"eaf": 20 / k}, "scores": scores, "best": k == EPOCHS} for k in range(1, EPOCHS + 1)
    ]
    write_text(path, "\n".join(map(json.dumps, entries)) + "\n")


def page(pairs: Times, identities: Times, made: str, load: float) -> str:
    """Formats the seconds as Markdown: a line per step, the slowest first, by draws of pairs and of identities."""
    lines = [
        "# Evaluation of 20 models",
        "",
        "All that `python -m eval.evaluation --report` does once the scores are there: 1,000 draws, all tables, all",
        "pictures as PNG, SVG and PDF, and the report page, for 20 models on four groups of 6,000 pairs.",
        f"The distances are generated. Seconds; the load of the machine at the end was {load:.1f}.",
        "With other work on the cores, a step takes longer than its processor time.",
        made,
        "",
        "| step | pairs, wall clock | pairs, processor | identities, wall clock | identities, processor |",
        "|---|--:|--:|--:|--:|",
    ]
    both = {step: (*pairs[step], *identities[step]) for step in pairs}
    ordered = dict(sorted(both.items(), key=lambda one: -one[1][1]))
    ordered["all"] = tuple(map(sum, zip(*both.values(), strict=True)))
    lines += [f"| {step} | {' | '.join(f'{value:.1f}' for value in values)} |" for step, values in ordered.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
