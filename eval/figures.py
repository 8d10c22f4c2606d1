"""Draws the pictures of an evaluation as PNG files."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.fairness import std
from eval.published import Row
from eval.rates import roc
from eval.scores import Scored
from eval.uncertainty import by_chance
from utils.storage.files import replaced

# Okabe and Ito's palette is safe for colour-blind readers; markers and line styles keep groups distinct in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))


def draw_accuracies(
    models: list[Scored],
    sets: Sequence[str],
    intervals: np.ndarray,
    path: Path,
    note: str = "",
    whole: np.ndarray | slice = slice(None),
) -> None:
    """Draws one row per model: a marker with its interval per verification set, and a bar for the average.

    `intervals` (models, sets, 2) are in percent; `whole` selects the sets that are part of the average. The markers of
    a row are shifted vertically, so that equal accuracies do not hide each other.
    """
    values = np.array([model.accuracies for model in models])
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(models)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(models))
    axes.plot(
        values[:, whole].mean(1),
        places,
        "|",
        color="black",
        markersize=17,
        markeredgewidth=2,
        label="average",
        zorder=4,
    )
    heights = np.linspace(-0.27, 0.27, len(sets)) if len(sets) > 1 else [0.0]
    for i, name in enumerate(sets):
        colour = COLOURS[i % 8]
        axes.hlines(places + heights[i], *intervals[:, i].T, color=colour, linewidth=1.5, alpha=0.6, zorder=2)
        place = places + heights[i]
        axes.plot(values[:, i], place, MARKERS[i % 8], color=colour, markersize=6, label=name, zorder=3)
    axes.set_yticks(places, [model.title for model in models])
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("verification accuracy (%), ten folds, with 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    _save(figure, axes, path, note)


def draw_paper(panels: dict[str, list[tuple[Row, Row]]], pairs: dict[str, int], path: Path, note: str = "") -> None:
    """Draws a panel per table of a paper, with a hollow (printed) and a filled (measured) marker per row and set.

    `panels` holds (printed, measured) rows by the title of their table, `pairs` the number of pairs by set. The bars
    are binomial 95 % intervals, dotted for printed accuracies.
    """
    columns = 1 if len(panels) <= 3 else 2
    lines = -(-len(panels) // columns)
    titles = list(panels)
    heights = [max(len(panels[title]) for title in titles[k::lines]) for k in range(lines)]
    size = (8.5 * columns, 1.4 + sum(0.75 + 0.62 * height for height in heights))
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False, height_ratios=[1 + height for height in heights])
    for axes, title in itertools.zip_longest(every.T.flat, titles):
        if title is None:
            axes.set_visible(False)
        else:
            _draw_panel(axes, title, panels[title], pairs)
    handles, labels = every[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(pairs), frameon=False)
    _save(figure, None, path, note)


def _draw_panel(axes: Axes, title: str, rows: list[tuple[Row, Row]], pairs: dict[str, int]) -> None:
    places = np.linspace(-0.34, 0.34, 2 * len(pairs)) if len(pairs) > 1 else np.array([-0.1, 0.1])
    for i, (name, count) in enumerate(pairs.items()):
        style: dict[str, Any] = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 6}
        looks = (("printed", LINES[3], "white"), ("here", LINES[0], style["color"]))
        for k, (which, line, face) in enumerate(looks):
            found = [(y, row[k].accuracies[name]) for y, row in enumerate(rows) if name in row[k].accuracies]
            height, value = np.array(found).reshape(-1, 2).T  # a paper may print none of this set
            half = 1.96 * np.sqrt(value * (100 - value) / count)
            height = height + places[2 * i + k]
            axes.hlines(
                height, value - half, value + half, color=style["color"], linestyle=line, linewidth=1.3, zorder=2
            )
            style |= {"markerfacecolor": face, "label": f"{name}, {which}"}
            axes.plot(value, height, linestyle="none", zorder=3, **style)
    axes.set_yticks(range(len(rows)), [printed.name for printed, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for boundary in range(1, len(rows)):
        axes.axhline(boundary - 0.5, color="0.85", linewidth=0.8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("verification accuracy (%), with binomial 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)


def draw_trade_off(
    models: list[Scored],
    pairs: tuple[int, ...],
    path: Path,
    note: str = "",
    whole: np.ndarray | slice = slice(None),
) -> None:
    """Draws average against STD, one dot per model; the STD of 95 % of perfectly fair models is in the shaded area.

    `pairs` (G,) are the numbers of pairs of the groups that `whole` selects, those that are part of averages.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    accuracies = np.array([model.accuracies for model in models])[:, whole]
    averages, stds = accuracies.mean(1), std(accuracies)
    margin = max(0.5, 0.08 * np.ptp(averages))
    along = np.linspace(averages.min() - margin, min(100, averages.max() + margin), 12)
    chance = [by_chance(round(float(average), 2), pairs).std_95 for average in along]
    axes.fill_between(along, 0, chance, color="0.9", label="perfectly fair, by chance (95 %)")
    looks = {key: k for k, key in enumerate(dict.fromkeys((model.setting, model.kind) for model in models))}
    for (setting, kind), k in looks.items():
        of_look = [i for i, model in enumerate(models) if (model.setting, model.kind) == (setting, kind)]
        # The ninth look reuses the first colour, with another marker.
        marker, label = MARKERS[(k + k // 8) % 8], f"{setting} {kind}".strip()
        axes.plot(averages[of_look], stds[of_look], marker, color=COLOURS[k % 8], markersize=9, label=label)
    for average, spread, model in zip(averages, stds, models, strict=True):
        name = model.name if len({one.network for one in models}) == 1 else f"{model.network} {model.name}"
        axes.annotate(name, (average, spread), (5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("average accuracy (%): further right is better")
    axes.set_ylabel("STD of the groups (points): lower is fairer")
    axes.set_xlim(along[0], along[-1] + 0.12 * np.ptp(along))  # room for the names
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, axes, path, note)


def draw_curves(
    model: Scored, same: dict[str, np.ndarray], shared: dict[str, float], path: Path, note: str = ""
) -> None:
    """Draws ROC, DET and histograms of squared distances of one model, a curve per group.

    `same` (P,) bool per group says which pairs are genuine; thresholds `shared` by all groups, by name, are marked.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, (name, labels) in enumerate(same.items()):
        distance = model.distances[name]
        thresholds, fmr, fnmr = roc(distance, labels)
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 8], "linewidth": 1.5}
        left.plot(fmr, 1 - fnmr, label=name, **style)
        middle.plot(fmr, fnmr, label=name, **style)
        for k, threshold in enumerate(shared.values()):
            at = min(int(np.searchsorted(thresholds, threshold)), len(thresholds) - 1)
            dot = {"color": COLOURS[i % 8], "marker": MARKERS[k % 8], "markersize": 7}
            left.plot(fmr[at], 1 - fnmr[at], **dot)
            middle.plot(fmr[at], fnmr[at], **dot)
        bins = np.linspace(0, max(distance.max(), 0.01), int(np.clip(2 * np.sqrt(labels.sum()), 10, 60)))
        right.hist(distance[labels], bins, histtype="step", density=True, **style)
        right.hist(distance[~labels], bins, histtype="stepfilled", density=True, color=COLOURS[i % 8], alpha=0.12)
        right.hist(distance[~labels], bins, histtype="step", density=True, alpha=0.7, **style)
    for k, (name, threshold) in enumerate(shared.items()):
        right.axvline(threshold, color="0.3", linewidth=1, linestyle=LINES[k % 8])
        middle.plot([], [], color="0.3", marker=MARKERS[k % 8], linestyle="none", label=f"shared: {name}")
    least = 1 / max(int((~labels).sum()) for labels in same.values())
    left.set(xscale="log", xlim=(least, 1), xlabel="false match rate", ylabel="true match rate", title="ROC")
    middle.set(xscale="log", yscale="log", xlabel="false match rate", ylabel="false non-match rate", title="DET")
    middle.set_xlim(least, 1)
    right.set(xlabel="squared distance", ylabel="density", title="genuine (line) and impostor (shaded) pairs")
    middle.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, None, path, f"{model.title}{'. ' + note if note else ''}")


def draw_training(logs: dict[str, list[dict]], path: Path, note: str = "") -> None:
    """Draws losses, measures and scores per epoch, a panel per run; `logs` holds the entries of each log.jsonl."""
    columns = 3
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    handles: dict = {}
    styles: dict[str, int] = {}  # of each loss and measure
    for (title, log), axes in zip(logs.items(), every, strict=False):
        epochs = [entry["epoch"] for entry in log]
        for name in (*log[0]["loss"], *log[0].get("measures", ())):  # older logs have no measures
            values = [{**entry["loss"], **entry.get("measures", {})}[name] for entry in log]
            label = f"loss {name}" if name in log[0]["loss"] else name
            style = LINES[styles.setdefault(name, len(styles)) % 8]
            axes.plot(epochs, values, color="0.25", linestyle=style, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        handles |= {line.get_label(): line for line in axes.get_lines()}
        scores = [name for name in log[0]["scores"] if name != "average"]
        if scores:
            other = axes.twinx()
            for k, name in enumerate(scores):
                values = [entry["scores"][name] for entry in log]
                other.plot(epochs, values, color=COLOURS[k % 8], marker=MARKERS[k % 8], markersize=3, label=name)
            other.set_ylabel("accuracy (%)")
            handles |= {line.get_label(): line for line in other.get_lines()}
        best = [entry["epoch"] for entry in log if entry["best"]]
        handles["best epoch"] = axes.axvline(best[-1], color="0.7", linewidth=1, zorder=0)
    for axes in list(every):
        axes.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False)
    _save(figure, None, path, note)


def _save(figure: Figure, axes: Axes | None, path: Path, note: str) -> None:
    if note:
        axes.set_title(note, fontsize=10) if axes else figure.suptitle(note, fontsize=10)
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
