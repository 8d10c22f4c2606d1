"""Draws the pictures of all models: accuracies, the paper's beside them, average against STD, and training.

Each function writes PNG, SVG and PDF files and returns what the picture shows as text, with its numbers.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.fairness import std
from eval.pictures import COLOURS, LINES, MARKERS, label_apart, legend_below, limit_to_percent, save, shape_of
from eval.published import Row
from eval.scores import Scored
from eval.uncertainty import by_chance

RUNS = 8  # panels of one picture of training: as many as a page of A4 shows


def draw_accuracies(
    models: list[Scored],
    sets: Sequence[str],
    intervals: np.ndarray,
    path: Path,
    note: str = "",
    whole: np.ndarray | slice = slice(None),
) -> str:
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
        axes.plot(
            values[:, i], place, MARKERS[shape_of(i)], color=colour, markersize=6, label=name, zorder=3, clip_on=False
        )
    limit_to_percent(axes)
    axes.set_yticks(places, [model.title for model in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("verification accuracy (%), ten folds, with 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, *axes.get_legend_handles_labels(), columns=5)
    save(figure, path, note)
    return "Verification accuracy in percent. " + " ".join(_accuracies(model, sets) for model in models)


def _accuracies(model: Scored, sets: Sequence[str]) -> str:
    of_sets = ", ".join(f"{name} {value:.2f}" for name, value in zip(sets, model.accuracies, strict=True))
    return f"{model.title}: {of_sets}."


def draw_paper(panels: dict[str, list[tuple[Row, Row]]], pairs: dict[str, int], path: Path, note: str = "") -> str:
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
    legend_below(figure, *every[0, 0].get_legend_handles_labels(), columns=len(pairs))
    save(figure, path, note)
    return "Accuracy in percent, printed and here. " + " ".join(
        _both(*rows) for title in titles for rows in panels[title]
    )


def _both(printed: Row, here: Row) -> str:
    cells = [f"{name} {value:.2f} and {here.accuracies[name]:.2f}" for name, value in printed.accuracies.items()]
    return f"{printed.name}: {', '.join(cells)}."


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
                height,
                np.maximum(value - half, 0),
                np.minimum(value + half, 100),
                color=style["color"],
                linestyle=line,
                linewidth=1.3,
                zorder=2,
            )
            style |= {"markerfacecolor": face, "label": f"{name}, {which}"}
            axes.plot(value, height, linestyle="none", zorder=3, clip_on=False, **style)
    limit_to_percent(axes)
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
) -> str:
    """Draws average against STD, one dot per model; the STD of 95 % of perfectly fair models is in the shaded area.

    `pairs` (G,) are the numbers of pairs of the groups that `whole` selects, those that are part of averages.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    accuracies = np.array([model.accuracies for model in models])[:, whole]
    averages, stds = accuracies.mean(1), std(accuracies)
    margin = max(0.1 * np.ptp(averages), min(0.5, 0.5 * (100 - averages.mean())), 0.1)
    along = np.linspace(max(0, averages.min() - margin), min(100, averages.max() + margin), 12)
    chance = [by_chance(float(average), pairs).std_95 for average in along]
    axes.fill_between(along, 0, chance, color="0.9", label="perfectly fair, by chance (95 %)")
    looks = {key: k for k, key in enumerate(dict.fromkeys((model.setting, model.kind) for model in models))}
    for (setting, kind), k in looks.items():
        of_look = [i for i, model in enumerate(models) if (model.setting, model.kind) == (setting, kind)]
        marker, label = MARKERS[shape_of(k)], f"{setting} {kind}".strip()
        look: dict[str, Any] = {"color": COLOURS[k % 8], "markersize": 9, "clip_on": False, "zorder": 3}
        axes.plot(averages[of_look], stds[of_look], marker, label=label, **look)
    axes.ticklabel_format(useOffset=False)
    axes.set_xlabel("average accuracy (%): further right is better")
    axes.set_ylabel("STD of the groups (points): lower is fairer")
    axes.set_xlim(along[0], along[-1])
    axes.set_ylim(0, 1.12 * max(stds.max(), max(chance), 0.01))
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, *axes.get_legend_handles_labels())
    if note:
        figure.suptitle(note, fontsize=10)  # takes room, and thus decides where the labels are
    label_apart(axes, np.column_stack([averages, stds]), _short_names(models))
    save(figure, path, note)
    cells = zip(models, averages, stds, strict=True)
    return "Average accuracy and STD of the groups, in percent. " + " ".join(
        f"{model.title}: {average:.2f}, {spread:.2f}." for model, average, spread in cells
    )


def _short_names(models: list[Scored]) -> list[str]:
    """Returns the names of models without the network of the students or of the teachers that all of them share."""
    names = [model.name for model in models]
    if len(models) > 1 and len({name.partition(" ")[2] for name in names} - {""}) == 1:
        names = [name.partition(" ")[0] for name in names]
    several = len({one.network for one in models}) > 1
    return [f"{one.network} {name}" if several else name for one, name in zip(models, names, strict=True)]


def draw_training(logs: dict[str, list[dict]], path: Path, note: str = "") -> str:
    """Draws losses, measures and scores per epoch, a panel per run; `logs` holds the entries of each log.jsonl."""
    columns = min(2, len(logs))
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.9 * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).flat
    handles: dict = {}
    styles: dict[str, int] = {}  # of each loss and measure
    for (title, log), axes in zip(logs.items(), every, strict=False):
        _draw_run(axes, title, log, handles, styles)
    for axes in list(every):
        axes.set_visible(False)
    legend_below(figure, handles.values(), handles, columns=5)
    save(figure, path, note)
    return "Losses and accuracies per epoch. " + " ".join(_run_text(*run) for run in logs.items())


def _draw_run(axes: Axes, title: str, log: list[dict], handles: dict, styles: dict[str, int]) -> None:
    """Draws one run; adds the lines to `handles` by label, and to `styles` a number for each new loss and measure."""
    epochs = [entry["epoch"] for entry in log]
    scores = [name for name in log[0]["scores"] if name != "average"]
    measures = [*log[0].get("measures", ())]  # older logs have none

    def draw(where: Axes, label: str, values: list[float], **style: Any) -> None:
        (line,) = where.plot(epochs, values, **style)  # markers show a run of one epoch
        handles[label] = line

    for name in log[0]["loss"]:
        style = LINES[styles.setdefault(name, len(styles)) % 8]
        values = [entry["loss"][name] for entry in log]
        draw(axes, f"loss {name}", values, color="0.25", linestyle=style, marker=".")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    if scores:
        other = axes.twinx()
        for k, name in enumerate(scores):
            values = [entry["scores"][name] for entry in log]
            draw(other, name, values, color=COLOURS[k % 8], marker=MARKERS[shape_of(k)], markersize=3)
        other.set_ylabel("accuracy (%)")
        if len(epochs) == 1:
            other.margins(y=0.3)  # else the dots of losses and accuracies hide each other
        low, high = other.get_ylim()
        other.set_ylim(max(low, 0), min(high, 100))
    if measures:  # such as alpha, whose scale is that of neither losses nor accuracies
        third = axes.twinx()
        third.spines.right.set_position(("outward", 40 if scores else 0))
        for name in measures:
            style = LINES[styles.setdefault(name, len(styles)) % 8]
            values = [entry["measures"][name] for entry in log]
            draw(third, name, values, color="#8a2be2", linestyle=style, marker=".")
        third.set_ylabel(", ".join(measures))
    best = [entry["epoch"] for entry in log if entry["best"]]
    handles["best epoch"] = axes.axvline(best[-1], color="0.7", linewidth=1, zorder=0)


def _run_text(title: str, log: list[dict]) -> str:
    best = [entry for entry in log if entry["best"]][-1]
    losses = [f"loss {name} {log[0]['loss'][name]:.4g} to {log[-1]['loss'][name]:.4g}" for name in log[0]["loss"]]
    scores = [f"{name} {value:.2f}" for name, value in best["scores"].items() if name != "average"]
    return (
        f"{title}: epochs {log[0]['epoch']} to {log[-1]['epoch']}, {', '.join(losses)}; best epoch {best['epoch']}"
        + (f" with {', '.join(scores)}." if scores else ".")
    )
