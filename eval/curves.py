"""Draws ROC, DET, FMR against the threshold, and the histograms of distances of one model, a curve per group."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from eval import rates
from eval.pictures import COLOURS, LINES, MARKERS, save
from eval.scores import Scored

RARE = (*(digit * 10.0**-k for k in range(7, 1, -1) for digit in (1, 2, 5)), 0.1, 0.2, 0.4)
TICKS = (*RARE, 0.5, *(1 - tick for tick in reversed(RARE)))
MOST_TICKS = 6  # of an axis of normal deviates
BELOW_ONE_ERROR = 0.7  # of the rate of one error: where the axes end
LARGEST_START = 0.25  # largest start of an axis, for sets of a few pairs


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
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": COLOURS[i % 8], "linestyle": LINES[i % 8], "linewidth": 1.5}
        label = f"{name} (no error at its best threshold)" if curve.is_without_error else name
        # What has no error lies beyond the ends, where the line leaves the axes.
        fmr, fnmr = (
            np.clip(v, 0.1 * low, 1 - 0.1 * low) for v, (low, _) in ((curve.fmr, fmr_ends), (curve.fnmr, fnmr_ends))
        )
        roc.plot(fmr, 1 - fnmr, label=label, **style)
        det.plot(fmr, fnmr, **style)
        against.plot(curve.thresholds, fmr, **style)
        for k, threshold in enumerate(shared.values()):
            x, y = curve.at(threshold)
            _mark(roc, x, 1 - y, (x, y), fmr_ends, (1 - fnmr_ends[1], 1 - fnmr_ends[0]), i, k)
            _mark(det, x, y, (x, y), fmr_ends, fnmr_ends, i, k)
        _histogram(histogram, model.distances[name], same[name], style)
    for k, (name, threshold) in enumerate(shared.items()):
        line = {"color": "0.45", "linewidth": 1, "linestyle": LINES[k % 8]}
        histogram.axvline(threshold, **line)
        against.axvline(threshold, **line, marker=MARKERS[k % 8], markevery=[1], clip_on=False, markersize=6)
        roc.plot(
            [], [], color="0.45", marker=MARKERS[k % 8], linestyle=LINES[k % 8], linewidth=1, label=f"shared: {name}"
        )
    if any(0 in curve.at(threshold) for curve in curves.values() for threshold in shared.values()):
        roc.plot(
            [], [], color="0.45", marker="o", markerfacecolor="white", linestyle="none", label="hollow: a rate of 0"
        )
    _finish(roc, det, against, histogram, fmr_ends, fnmr_ends)
    against.set_xlim(*_thresholds_shown(curves, shared))
    figure.legend(*roc.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path, f"{model.title}{'. ' + note if note else ''}")
    return _text(model, same, shared, [name for name, curve in curves.items() if curve.is_without_error])


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


def _mark(
    axes: Axes,
    x: float,
    y: float,
    errors: tuple[float, float],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    group: int,
    threshold: int,
) -> None:
    """Marks a group's rates at a shared threshold; a rate of 0 is marked at the end of the axis, and hollow."""
    face = "white" if 0 in errors else COLOURS[group % 8]
    look: dict[str, Any] = {
        "color": COLOURS[group % 8],
        "marker": MARKERS[threshold % 8],
        "markersize": 7,
        "markerfacecolor": face,
    }
    axes.plot(np.clip(x, *x_ends), np.clip(y, *y_ends), **look, clip_on=False, zorder=4)


def _histogram(axes: Axes, distance: np.ndarray, same: np.ndarray, style: dict[str, Any]) -> None:
    bins = np.linspace(0, max(distance.max(), 0.01), int(np.clip(2 * np.sqrt(same.sum()), 10, 60)))
    axes.hist(distance[same], bins, histtype="step", density=True, **style)
    axes.hist(distance[~same], bins, histtype="stepfilled", density=True, color=style["color"], alpha=0.12)
    axes.hist(distance[~same], bins, histtype="step", density=True, alpha=0.7, **style)


def _finish(
    roc: Axes, det: Axes, against: Axes, histogram: Axes, fmr: tuple[float, float], fnmr: tuple[float, float]
) -> None:
    roc.set(xscale="log", xlim=fmr, xlabel="false match rate", ylabel="true match rate (normal deviates)", title="ROC")
    roc.xaxis.set_minor_formatter(NullFormatter())
    _normal_deviates(roc, "y", (1 - fnmr[1], 1 - fnmr[0]))
    det.set(xlabel="false match rate (normal deviates)", ylabel="false non-match rate (normal deviates)", title="DET")
    _normal_deviates(det, "x", fmr)
    _normal_deviates(det, "y", fnmr)
    against.set(yscale="log", ylim=(fmr[0], 1), xlabel="threshold on the squared distance", ylabel="false match rate")
    against.set_title("FMR against the threshold")
    histogram.set(xlabel="squared distance", ylabel="density", title="genuine (line) and impostor (shaded) pairs")
    for axes in (roc, det, against, histogram):
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _normal_deviates(axes: Axes, which: str, limits: tuple[float, float]) -> None:
    """Scales the axis "x" or "y" by the inverse of the normal distribution, as the DET curve of Martin et al., 1997."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    getattr(axes, f"set_{which}scale")("function", functions=(_deviate, _share))
    axes.set(**{f"{which}lim": limits})
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // MOST_TICKS) or 1]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _deviate(share: np.ndarray) -> np.ndarray:
    return torch.special.ndtri(torch.as_tensor(np.clip(share, 1e-12, 1 - 1e-12), dtype=torch.float64)).numpy()


def _share(deviate: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.as_tensor(np.asarray(deviate), dtype=torch.float64)).numpy()


def _thresholds_shown(curves: dict[str, Curve], shared: dict[str, float]) -> tuple[float, float]:
    """Returns a range of thresholds: from the first false match to an FMR of 0.5 in all groups, and the shared ones."""
    first = min(float(c.thresholds[(c.fmr > 0).argmax()]) for c in curves.values())
    half = max(float(c.thresholds[(c.fmr >= 0.5).argmax()]) for c in curves.values())
    low, high = min([first, *shared.values()]), max([half, *shared.values()])
    margin = 0.04 * (high - low) or 0.01
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
