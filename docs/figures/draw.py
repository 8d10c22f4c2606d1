"""Draws the figures of README.md: the method, and the demo's accuracies, each for a light and a dark browser.

Reads   benchmarks/results/demo_seeds.md
Writes  docs/figures/method-light.svg, method-dark.svg, demo-light.svg, demo-dark.svg
Run     python docs/figures/draw.py [folder]
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "demo_seeds.md"
GROUPS = ("African", "Asian", "Caucasian", "Indian")
PUBLISHED_ORDER = ("Asian", "African", "Caucasian", "Indian")  # in which the adaptor reads the teachers (paper 4.3)
MARKERS = "osD^"


@dataclass(frozen=True)
class Theme:
    name: str
    ink: str
    faint: str
    fill: str
    groups: dict[str, str]
    accent: str


# Okabe and Ito's colours; lighter ones where the page is dark.
LIGHT = Theme(
    "light",
    "#1f2328",
    "#818b98",
    "#f6f8fa",
    dict(zip(GROUPS, ("#0072B2", "#B87400", "#007a5a", "#C24E00"), strict=True)),
    "#8250df",
)
DARK = Theme(
    "dark",
    "#e6edf3",
    "#7d8590",
    "#161b22",
    dict(zip(GROUPS, ("#56B4E9", "#F0B429", "#3fcf9f", "#ff8c42"), strict=True)),
    "#c297ff",
)


def main(folder: Path = HERE) -> None:
    """Writes the four figures into `folder`."""
    with rc_context({"svg.hashsalt": "mst-kd", "svg.fonttype": "path", "font.size": 10}):
        for theme in (LIGHT, DARK):
            _save(draw_method(theme), folder / f"method-{theme.name}.svg")
            _save(draw_demo(theme, demo_rows(RESULTS.read_text(encoding="utf-8"))), folder / f"demo-{theme.name}.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


# The method ---------------------------------------------------------------------------------------------------------


def draw_method(theme: Theme) -> Figure:
    """Three panels: the teachers, the fused space, the student."""
    figure = Figure(figsize=(10, 4.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 43))
    axes.axis("off")
    _panel(axes, theme, 1, 25, "1  Teachers", "train.py")
    _panel(
        axes, theme, 28.5, 36.5, "2  Multi-teacher space", "extract_all.py, then fc_EArc.py or dual_layer_EAF-Fusion.py"
    )
    _panel(axes, theme, 67.5, 31.5, "3  Student", "KD_alone.py (a-KD) or KD_CEL.py (EAF-KD)")
    _draw_teachers(axes, theme)
    _draw_space(axes, theme)
    _draw_student(axes, theme)
    return figure


def _draw_teachers(axes: Axes, theme: Theme) -> None:
    for k, group in enumerate(GROUPS):
        y, colour = 28 - 7.5 * k, theme.groups[group]
        _box(axes, theme, 2.5, y, 9.5, 5, f"{group}\nfaces", edge=colour, dashed=True)
        _box(axes, theme, 15, y, 9.5, 5, f"teacher\n{group}", edge=colour)
        _arrow(axes, theme, (12, y + 2.5), (15, y + 2.5))
    axes.text(13.5, 2.9, "loss: ElasticArcFace", ha="center", color=theme.ink, size=9)


def _draw_space(axes: Axes, theme: Theme) -> None:
    _box(axes, theme, 29.8, 16.75, 6.7, 5, "all\nfaces", dashed=True)
    for k, group in enumerate(PUBLISHED_ORDER):
        y = 28 - 7.5 * k
        _box(axes, theme, 40, y, 8.6, 5, f"teacher\n{group}", edge=theme.groups[group])
        _arrow(axes, theme, (36.5, 19.25), (40, y + 2.5))
        _arrow(axes, theme, (48.6, y + 2.5), (52, 19.25 + 1.2 * (1.5 - k)))
    _box(axes, theme, 52, 14.5, 8.2, 9.5, "adaptor\n\nSL, DuL\nor DLDPO", edge=theme.accent)
    axes.text(56.1, 29.6, "4 embeddings,\nconcatenated", ha="center", color=theme.faint, size=8)
    axes.text(46.7, 2.9, "teachers frozen; adaptor's loss: ElasticArcFace", ha="center", color=theme.ink, size=9)


def _draw_student(axes: Axes, theme: Theme) -> None:
    _arrow(axes, theme, (60.2, 19.25), (84, 29.6), colour=theme.accent)
    axes.text(70.4, 26.2, "target $e_{mt}$", ha="center", color=theme.accent, size=10, rotation=23.5)
    _box(axes, theme, 69, 12.8, 6.7, 5, "all\nfaces", dashed=True)
    _box(axes, theme, 78.2, 12.8, 7.3, 5, "student", edge=theme.accent)
    _arrow(axes, theme, (75.7, 15.3), (78.2, 15.3))
    _box(axes, theme, 84, 27, 13.4, 5.6, "$L_{KD}$ = mean of\n$(e_{mt} - e_s)^2$")
    _box(axes, theme, 89.6, 12.8, 7.8, 5, "header")
    _arrow(axes, theme, (85.5, 15.3), (89.6, 15.3))
    _arrow(axes, theme, (87.6, 15.3), (87.6, 27))
    axes.text(88.3, 21.3, "$e_s$", color=theme.ink, size=10)
    axes.text(93.5, 10.3, "$L_{EAF}$", ha="center", color=theme.ink, size=10)
    axes.text(83.2, 6.1, r"a-KD:  $\lambda\,L_{KD}$", ha="center", color=theme.ink, size=10)
    axes.text(83.2, 2.9, r"EAF-KD:  $L_{EAF} + \lambda\,L_{KD}$", ha="center", color=theme.ink, size=10)


def _panel(axes: Axes, theme: Theme, x: float, width: float, title: str, script: str) -> None:
    shape = FancyBboxPatch((x, 1), width, 41, boxstyle="round,pad=0,rounding_size=1", fill=False, edgecolor=theme.faint)
    axes.add_patch(shape)
    axes.text(x + width / 2, 38.6, title, ha="center", color=theme.ink, size=12, weight="bold")
    axes.text(x + width / 2, 35.9, script, ha="center", color=theme.faint, size=7.8)


def _box(axes, theme, x, y, width, height, text, edge="", dashed=False) -> None:
    style = {"facecolor": theme.fill, "edgecolor": edge or theme.ink, "linestyle": "--" if dashed else "-"}
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.6", linewidth=1.3, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=theme.ink, size=9, linespacing=1.15)


def _arrow(axes, theme, start, end, colour="") -> None:
    style = {"arrowstyle": "-|>", "color": colour or theme.faint, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


# The demo's result --------------------------------------------------------------------------------------------------


def demo_rows(page: str) -> list[tuple[str, list[float]]]:
    """Each model of benchmarks/results/demo_seeds.md with its accuracy on each group, the mean of three seeds."""
    rows = []
    for kind, model, *cells in re.findall(r"\| ([\w-]+) \| ([\w ]+) " + r"\| ([\d.]+) ± [\d.]+ " * len(GROUPS), page):
        source = model.removesuffix(" iresnet_tiny")
        rows.append(
            (f"{kind} {model}" if source == model else f"{kind} from {source}", [float(cell) for cell in cells])
        )
    return rows


def draw_demo(theme: Theme, rows: list[tuple[str, list[float]]]) -> Figure:
    """A line per model: a marker per group, a bar for the average."""
    figure = Figure(figsize=(8.4, 4.3), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for y, (_, values) in zip(places, rows, strict=True):
        axes.plot([min(values), max(values)], [y, y], color=theme.faint, linewidth=1.2, zorder=1)
    for k, group in enumerate(GROUPS):
        style = {"color": theme.groups[group], "marker": MARKERS[k], "linestyle": "none", "markersize": 6.5}
        axes.plot([values[k] for _, values in rows], places, label=group, zorder=3, **style)
    averages = [sum(values) / len(values) for _, values in rows]
    axes.plot(averages, places, "|", color=theme.ink, markersize=15, markeredgewidth=2, label="average", zorder=2)
    axes.set_yticks(places, [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("verification accuracy on generated faces (%), mean of three seeds", color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(axis="x", color=theme.faint, alpha=0.25)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, labelcolor=theme.ink)
    return figure


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
