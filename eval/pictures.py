"""What all pictures of an evaluation share: colours, the three files of a picture, and labels that do not overlap."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.storage.files import replaced

# Okabe and Ito's palette is safe for colour-blind readers; markers and line styles keep groups distinct in grey. Olive
# is in the place of its yellow, of which lines are hardly seen on white and, inverted, on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999933", "#000000")
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
DPI = 130  # of the PNG files
EXTENSIONS: dict[str, dict[str, Any]] = {
    "png": {"dpi": DPI},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""The files of a picture, with the options that make them equal each time."""

# Embeds TrueType fonts in PDF files and writes the text of SVG files as outlines: LaTeX needs no font for either.
FONTS: Any = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "mst-kd"}
REACH = (10, 17, 25, 34, 44, 56, 70, 86, 104)
"""Distances of a label from its point that are tried, in pixels at 100 dpi."""

DIRECTIONS = 16  # around a point


@dataclass(frozen=True)
class Picture:
    """A picture in a report: pictures of one section are shown together. `path` is its PNG file."""

    section: str
    title: str
    path: Path
    alt: str  # what the picture shows, with its numbers, for those who cannot see it

    @property
    def files(self) -> list[Path]:
        """The PNG, SVG and PDF files."""
        return [self.path.with_suffix(f".{extension}") for extension in EXTENSIONS]


def save(figure: Figure, path: Path, note: str = "") -> None:
    """Writes a figure as PNG to `path`, and as SVG and PDF beside it, with `note` above it."""
    if note:
        figure.suptitle(note, fontsize=10)
    with rc_context(FONTS):
        lay_out(figure)
        figure.set_layout_engine(None)  # with one, each file would be drawn twice and laid out again
        for extension, options in EXTENSIONS.items():
            with replaced(path.with_suffix(f".{extension}")) as partial:
                figure.savefig(partial, format=extension, **options)


def shape_of(k: int) -> int:
    """Returns the index of the marker or line style of look k: the ninth look reuses the first colour with another."""
    return (k + k // 8) % 8


def lay_out(figure: Figure) -> None:
    """Computes the places of all axes, which drawing would do first."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)


def legend_below(figure: Figure, handles: Iterable[Artist], labels: Iterable[str], *, columns: int = 4) -> None:
    """Adds a legend below the panels, of as many columns as fit in the width of the figure, at most `columns`."""
    handles, labels = [*handles], [*labels]
    for count in range(columns, 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=count, frameon=False)
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def limit_to_percent(axes: Axes) -> None:
    """Ends the x axis at 0 and 100 where it would go beyond."""
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0), min(high, 100))


def label_apart(axes: Axes, points: np.ndarray, names: list[str]) -> None:
    """Writes each name near its point, of `points` (N, 2) in data coordinates, without overlap where there is room.

    The nearest of the places around a point is taken that overlaps no other name, no point, and no edge of the axes; a
    line leads to a name that is not next to its point. The limits of the axes must be final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    lay_out(figure)  # and thus decides on the pixel of each point
    frame = np.array(axes.bbox.extents)
    pixels = axes.transData.transform(points)
    taken = [_box(x, y, 12, 12) for x, y in pixels]
    for (x, y), point, name in sorted(zip(pixels, points, names, strict=True), key=lambda one: (-one[0][1], one[0][0])):
        text = axes.annotate(
            name, tuple(point), (0, 0), textcoords="offset pixels", fontsize=8, ha="center", va="center"
        )
        text.set_in_layout(False)
        extent = text.get_window_extent()
        box, far = _free_place(x, y, extent.width + 2, extent.height + 2, taken, frame)
        taken.append(box)
        offset = (box[:2] + box[2:]) / 2 - (x, y)
        # In points, since the files have different resolutions.
        text.set_position(tuple(offset * 72 / figure.dpi))
        text.anncoords = "offset points"
        if far:
            end = (np.clip((x, y), box[:2], box[2:]) - (x, y)) * 72 / figure.dpi  # the nearest point of the box
            line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", tuple(point), tuple(end), textcoords="offset points", arrowprops=line).set_in_layout(
                False
            )


def _free_place(
    x: float, y: float, width: float, height: float, taken: list[np.ndarray], frame: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Returns the box of a label of this size near the pixel (x, y), and whether it is far from it."""
    others, best = np.array(taken), (np.inf, np.empty(4), False)
    angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    for reach, angle in itertools.product(REACH, angles):
        # The edge of the box, not its centre, is at this distance.
        box = _box(x + np.cos(angle) * (reach + width / 2), y + np.sin(angle) * (reach + height / 2), width, height)
        shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
        outside = np.maximum(frame[:2] - box[:2], 0).sum() + np.maximum(box[2:] - frame[2:], 0).sum()
        cost = np.maximum(shared, 0).prod(1).sum() + 100 * outside
        if cost < best[0]:
            best = (cost, box, reach > REACH[0])
        if cost == 0:
            break
    return best[1], best[2]


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    """Returns left, bottom, right and top of a box around (x, y)."""
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
