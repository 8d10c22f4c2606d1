"""Pictures of results."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.files import replaced

# Okabe and Ito's colours, told apart with every form of colour vision; markers tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKERS = "osD^vP*X"


def draw_accuracies(rows: list, ethnicities: tuple[str, ...], path: Path, note: str) -> None:
    """One line per model (`eval.evaluation.Row`), one marker per group, a bar for their average.

    The markers of one line stand at slightly different heights, so that equal accuracies do not hide each other.
    """
    labels = [f"{row.setting} {row.kind}: {row.name}" for row in rows]
    values = np.array([row.accuracies for row in rows])
    figure = Figure(figsize=(9, 1.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    axes.hlines(places, values.min(1), values.max(1), color="0.75", linewidth=3, zorder=1)
    axes.plot(values.mean(1), places, "|", color="black", markersize=15, markeredgewidth=2, label="average", zorder=2)
    heights = np.linspace(-0.18, 0.18, len(ethnicities))
    for i, name in enumerate(ethnicities):
        style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8]}
        axes.plot(values[:, i], places + heights[i], linestyle="none", markersize=7, label=name, zorder=3, **style)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("verification accuracy (%), ten folds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    if note:
        axes.set_title(note, fontsize=10)
    with replaced(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
