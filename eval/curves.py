"""Draws ROC, DET, FMR against the threshold, and the histograms of distances of one model, a curve per group."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.special import ndtr, ndtri

from eval import rates
from eval.pictures import COLOURS, LINES, MARKERS, legend_below, save, shape_of
from eval.scores import Scored

RARE = (*(digit * 10.0**-k for k in range(7, 1, -1) for digit in (1, 2, 5)), 0.1, 0.2, 0.4)
TICKS = (*RARE, 0.5, *(1 - tick for tick in reversed(RARE)))
APART = 0.14  # of the length of an axis of normal deviates: the least distance of two ticks, whose labels are long
BELOW_ONE_ERROR = 0.7  # of the rate of one error: where the axes end
EQUAL = 1e-9  # squared distance up to which an axis would have no length
LARGEST_START = 0.25  # largest start of an axis, for sets of a few pairs
SAME_PLACE = 0.015  # of the length of both axes: the distance within which a mark would hide another one
SIZE, RING = 6, 4  # of a mark in points, and by how much it grows for each mark that is drawn on it
LARGEST_GROWTH = 20
ALL_BEYOND = "At each threshold, the FMR or the FNMR\nof each group is 0: all curves\nare beyond these axes."
FILLED = {"markeredgecolor": "white", "markeredgewidth": 0.6}
HOLLOW = {"markerfacecolor": "white"}
Mark = tuple[float, float, dict[str, Any]]
"""The place of a mark, and how it looks."""


class Curve(NamedTuple):
    """FMR and FNMR (T,) of a group at its distinct thresholds, and its number of pairs of each kind."""

    thresholds: np.ndarray
    fmr: np.ndarray
    fnmr: np.ndarray
    impostors: int
    genuine: int

    @property
    def is_without_error(self) -> bool:
        """True if a threshold separates all genuine from all impostor pairs."""
        return bool(((self.fmr == 0) & (self.fnmr == 0)).any())

    def at(self, threshold: float) -> tuple[float, float]:
        """Returns FMR and FNMR at a threshold."""
        k = min(int(np.searchsorted(self.thresholds, threshold)), len(self.thresholds) - 1)
        return float(self.fmr[k]), float(self.fnmr[k])


def draw_curves(
    model: Scored, same: dict[str, np.ndarray], shared: dict[str, float], path: Path, note: str = ""
) -> str:
    """Draws four panels of one model into `path`; returns what they show as text.

    `same` (P,) bool per group says which pairs are genuine; thresholds `shared` by all groups, by name, are marked.
    """
    curves = {name: _curve(model.distances[name], labels) for name, labels in same.items()}
    figure = Figure(figsize=(9.6, 8.6), layout="constrained")
    (roc, det), (against, histogram) = figure.subplots(2, 2)
    fmr_ends, fnmr_ends = ends(curves, shared)
    _set_axes(roc, det, against, histogram, fmr_ends, fnmr_ends)
    against.set_xlim(*_thresholds_shown(curves, shared))
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": COLOURS[i % 8], "linestyle": LINES[shape_of(i)], "linewidth": 1.5}
        label = f"{name} (no error at its best threshold)" if curve.is_without_error else name
        _draw_group(roc, det, against, curve, (fmr_ends[0], fnmr_ends[0]), style | {"label": label})
        _histogram(histogram, model.distances[name], same[name], style)
    for k, (name, threshold) in enumerate(shared.items()):
        line = {"color": "0.45", "linewidth": 1, "linestyle": LINES[k % 8]}
        histogram.axvline(threshold, **line)
        against.axvline(threshold, **line)
        roc.plot([], [], marker=MARKERS[k % 8], label=f"shared: {name}", **line)
    marks = _marks(curves, shared)
    of_thresholds: list[Mark] = [
        (x, 1, {"marker": MARKERS[k % 8], "color": "0.45", **FILLED}) for k, x in enumerate(shared.values())
    ]
    of_roc: list[Mark] = [(x, 1 - y, look) for x, y, look in marks]
    nested = [draw_marks(*one) for one in ((roc, of_roc), (det, marks), (against, of_thresholds))]
    look: dict[str, Any] = {"color": "0.45", "marker": "o", "linestyle": "none", **HOLLOW}
    if any(0 in (x, y) for x, y, _ in marks):
        roc.plot([], [], label="hollow: a rate of 0", **look)
    if any(nested):
        roc.plot([], [], label="larger: another mark is on it", markersize=SIZE + RING, **look)
    if all(((curve.fmr == 0) | (curve.fnmr == 0)).all() for curve in curves.values()):
        for axes in (roc, det):
            axes.text(0.5, 0.5, ALL_BEYOND, transform=axes.transAxes, ha="center", va="center", color="0.35")
    legend_below(figure, *roc.get_legend_handles_labels())
    save(figure, path, f"{model.title}{'. ' + note if note else ''}")
    return _text(model, same, shared, [name for name, curve in curves.items() if curve.is_without_error])


def _draw_group(
    roc: Axes, det: Axes, against: Axes, curve: Curve, lows: tuple[float, float], style: dict[str, Any]
) -> None:
    """Draws the curves of one group as steps: between two thresholds that differ, no other rates can be had."""
    # What has no error lies beyond the ends `lows` of FMR and FNMR, where the line leaves the axes.
    fmr, fnmr = (np.clip(rate, 0.1 * low, 1 - 0.1 * low) for rate, low in zip(curve[1:3], lows, strict=True))
    roc.plot(fmr, 1 - fnmr, drawstyle="steps-post", **style)
    det.plot(fmr, fnmr, drawstyle="steps-post", **style)
    thresholds = np.append(curve.thresholds, max(curve.thresholds[-1], against.get_xlim()[1]))
    against.plot(thresholds, np.append(fmr, fmr[-1]), drawstyle="steps-pre", **style)


def _marks(curves: dict[str, Curve], shared: dict[str, float]) -> list[Mark]:
    """Returns FMR and FNMR of each group at each shared threshold; the mark of a rate of 0 is hollow."""
    marks: list[Mark] = []
    for i, curve in enumerate(curves.values()):
        for k, threshold in enumerate(shared.values()):
            rates_there = curve.at(threshold)
            edge = HOLLOW if 0 in rates_there else FILLED
            marks.append((*rates_there, {"color": COLOURS[i % 8], "marker": MARKERS[k % 8], **edge}))
    return marks


def draw_marks(axes: Axes, marks: list[Mark]) -> bool:
    """Draws marks, those beyond the axes at their ends; returns whether several are at the same place.

    Of these, those drawn first are larger, so that a ring of each can be seen. The limits of the axes must be final.
    """
    places = np.array([mark[:2] for mark in marks]).reshape(-1, 2)
    places = np.clip(places, *np.sort([axes.get_xlim(), axes.get_ylim()]).T)
    shown = (axes.transScale + axes.transLimits).transform(places)  # in shares of the axes
    hidden = np.triu(np.abs(shown[:, None] - shown).max(2) < SAME_PLACE, 1).sum(1)  # marks that are drawn on each mark
    growth = min(RING, LARGEST_GROWTH / max(1, *hidden))
    for (x, y), (*_, look), others in zip(places, marks, hidden, strict=True):
        axes.plot(x, y, markersize=SIZE + growth * others, clip_on=False, zorder=4, **look)
    return bool(hidden.any())


def ends(curves: dict[str, Curve], shared: dict[str, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the lowest and highest FMR, and FNMR, that the axes show.

    The lowest is just below one error in the largest group. The highest is the largest rate of a
    group where its other rate is one error, or at a shared threshold, so that the curves fill the panel.
    """
    low_fmr = min(BELOW_ONE_ERROR / max(curve.impostors for curve in curves.values()), LARGEST_START)
    low_fnmr = min(BELOW_ONE_ERROR / max(curve.genuine for curve in curves.values()), LARGEST_START)
    marks = [curve.at(threshold) for curve in curves.values() for threshold in shared.values()]
    high_fmr = max([float(c.fmr[(c.fnmr <= 1.5 * low_fnmr).argmax()]) for c in curves.values()] + [x for x, _ in marks])
    high_fnmr = max([float(c.fnmr[c.fmr <= 1.5 * low_fmr][-1]) for c in curves.values()] + [y for _, y in marks])
    fmr, fnmr = (
        (low, min(max(1.5 * high, 10 * low), 1 - low)) for low, high in ((low_fmr, high_fmr), (low_fnmr, high_fnmr))
    )
    return fmr, fnmr


def _curve(distance: np.ndarray, same: np.ndarray) -> Curve:
    return Curve(*rates.roc(distance, same), int((~same).sum()), int(same.sum()))


def _histogram(axes: Axes, distance: np.ndarray, same: np.ndarray, style: dict[str, Any]) -> None:
    largest = float(distance.max())
    count = int(np.clip(2 * np.sqrt(same.sum()), 10, 60))
    bins = np.linspace(0, largest if largest > EQUAL else 0.01, count).tolist()
    axes.hist(distance[same], bins, histtype="step", density=True, **style)
    axes.hist(distance[~same], bins, histtype="stepfilled", density=True, color=style["color"], alpha=0.12)
    axes.hist(distance[~same], bins, histtype="step", density=True, alpha=0.7, **style)


def _set_axes(
    roc: Axes, det: Axes, against: Axes, histogram: Axes, fmr: tuple[float, float], fnmr: tuple[float, float]
) -> None:
    roc.set(xscale="log", xlim=fmr, xlabel="false match rate", ylabel="true match rate (normal deviates)", title="ROC")
    _plain(roc.xaxis)
    _normal_deviates(roc, "y", (1 - fnmr[1], 1 - fnmr[0]))
    det.set(xlabel="false match rate (normal deviates)", ylabel="false non-match rate (normal deviates)", title="DET")
    _normal_deviates(det, "x", fmr)
    _normal_deviates(det, "y", fnmr)
    against.set(yscale="log", ylim=(fmr[0], 1), xlabel="threshold on the squared distance", ylabel="false match rate")
    against.set_title("FMR against the threshold")
    against.locator_params(axis="x", nbins=8)
    _plain(against.yaxis)
    histogram.set(xlabel="squared distance", ylabel="density", title="genuine (line) and impostor (shaded) pairs")
    for axes in (roc, det, against, histogram):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(axes.get_title(), y=1.02)  # above the marks at the end of an axis


def _plain(axis: Axis) -> None:
    """Labels the powers of ten of a logarithmic axis as 0.001: mathematical text takes much longer to draw."""
    axis.set_major_formatter(FuncFormatter(_label))
    axis.set_tick_params(which="minor", label1On=False)


def _label(value: float, _) -> str:
    return f"{value:.6g}"


def _normal_deviates(axes: Axes, which: str, limits: tuple[float, float]) -> None:
    """Scales the axis "x" or "y" by the inverse of the normal distribution, as the DET curve of Martin et al., 1997."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    getattr(axes, f"set_{which}scale")("function", functions=(_deviate, ndtr))
    axes.set(**{f"{which}lim": limits})
    ticks: list[float] = []
    apart = APART * np.ptp(_deviate(np.array(limits)))
    for tick in TICKS:
        if limits[0] <= tick <= limits[1] and (not ticks or np.ptp(_deviate(np.array([ticks[-1], tick]))) >= apart):
            ticks.append(tick)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_label))


def _deviate(share: np.ndarray) -> np.ndarray:
    return ndtri(np.clip(share, 1e-12, 1 - 1e-12))


def _thresholds_shown(curves: dict[str, Curve], shared: dict[str, float]) -> tuple[float, float]:
    """Returns a range of thresholds: from the first false match to an FMR of 0.5 in all groups, and the shared ones."""
    first = min(float(c.thresholds[(c.fmr > 0).argmax()]) for c in curves.values())
    half = max(float(c.thresholds[(c.fmr >= 0.5).argmax()]) for c in curves.values())
    low, high = min([first, *shared.values()]), max([half, *shared.values()])
    margin = 0.04 * (high - low) if high - low > EQUAL else 0.01
    return max(low - margin, 0), high + margin


def _text(model: Scored, same: dict[str, np.ndarray], shared: dict[str, float], without: list[str]) -> str:
    groups = {name: (model.distances[name], labels) for name, labels in same.items()}
    sentences = [f"ROC, DET, false match rate against the threshold, and distances of {model.title}."]
    for title, threshold in shared.items():
        found = rates.error_rates(groups, threshold)
        cells = "; ".join(f"{name} FMR {one.fmr.text()}, FNMR {one.fnmr.text()}" for name, one in found.items())
        sentences.append(f"At the shared threshold of {title} ({threshold:.3f}): {cells}.")
    if without:
        sentences.append(f"No error at the best threshold: {', '.join(without)}.")
    return " ".join(sentences)
