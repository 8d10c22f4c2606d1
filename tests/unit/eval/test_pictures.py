"""Pictures of good and close models: axes, labels, markers, files, and what they say in words."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from eval import curves, figures, pictures, rates
from eval.curves import draw_curves, ends
from eval.pictures import label_apart
from eval.scores import Scored
from eval.verification import accuracy

GROUPS = ("A", "B", "C", "D")
PAIRS = 3000
SAME = {name: np.arange(PAIRS) // 150 % 2 == 0 for name in GROUPS}


def good(seed: int = 0, perfect: tuple[str, ...] = ("C",)) -> Scored:
    """Returns a model with an accuracy of about 99.7 %, and none of errors on the groups `perfect`."""
    random = np.random.default_rng(seed)
    distances = {}
    for name, same in SAME.items():
        drawn = np.where(same, random.normal(0.65, 0.22, PAIRS), random.normal(1.75, 0.18, PAIRS))
        if name in perfect:
            drawn = np.where(same, np.minimum(drawn, 1.0), np.maximum(drawn, 1.1))
        distances[name] = np.clip(drawn, 0, 4)
    accuracies = tuple(accuracy(distances[name], SAME[name]) for name in GROUPS)
    return Scored("specialized", "iresnet34", "a-KD", f"m{seed}", distances, {}, accuracies, ("",))


@pytest.fixture
def drawn(monkeypatch):
    """Returns the list of the figures that are drawn; none is written."""
    found: list[Figure] = []
    for module in (figures, curves):
        monkeypatch.setattr(module, "save", lambda figure, path, note="": found.append(figure))
    return found


def test_curves_of_a_good_model_fill_axes_that_end_at_one_error(drawn, tmp_path):
    model = good()
    assert 99.5 < np.mean(model.accuracies) < 99.9
    groups = {name: (model.distances[name], SAME[name]) for name in GROUPS}
    shared = {"FMR 0.01": rates.threshold_at_fmr(groups, 0.01)}
    alt = draw_curves(model, SAME, shared, tmp_path / "x.png")
    (figure,) = drawn
    roc, det, against, _ = figure.axes
    found = {name: curves.Curve(*rates.roc(*pair), 1500, 1500) for name, pair in groups.items()}
    fmr, fnmr = ends(found, shared)
    assert (fmr[0], fnmr[0]) == pytest.approx((0.7 / 1500, 0.7 / 1500))
    assert fmr[1] < 0.2
    assert fnmr[1] < 0.2
    assert det.get_xlim() == roc.get_xlim() == pytest.approx(fmr)
    assert det.get_ylim() == pytest.approx(fnmr)
    assert roc.get_ylim() == pytest.approx((1 - fnmr[1], 1 - fnmr[0]))
    assert (roc.get_xscale(), against.get_yscale()) == ("log", "log")
    # Normal deviates: equal steps of the deviate are equal steps in the picture.
    pixels = det.transData.transform([(0.0013499, 0.01), (0.0227501, 0.01), (0.1586553, 0.01)])[:, 0]
    assert pixels[1] - pixels[0] == pytest.approx(pixels[2] - pixels[1], rel=1e-3)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:4] == ["A", "B", "C (no error at its best threshold)", "D"]
    assert "hollow: a rate of 0" in labels
    assert "No error at the best threshold: C." in alt
    at = rates.error_rates(groups, shared["FMR 0.01"])
    assert f"A FMR {at['A'].fmr.text()}, FNMR {at['A'].fnmr.text()}; B FMR" in alt
    for axes in (roc, det):  # marks lie within the axes
        marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len(marks) == len(GROUPS)
        for line in marks:
            for value, (low, high) in zip(
                (line.get_xdata()[0], line.get_ydata()[0]), (axes.get_xlim(), axes.get_ylim()), strict=True
            ):
                assert low <= value <= high
    assert [line.get_markerfacecolor() == "white" for line in marks] == [at[name].fnmr.errors == 0 for name in GROUPS]


@pytest.mark.parametrize("pairs", [20, 2])
def test_curves_of_a_few_pairs_and_of_a_constant_model_are_drawn(drawn, tmp_path, pairs):
    same = {"A": np.arange(pairs) % 2 == 0}
    for distance in (np.zeros(pairs), np.linspace(0, 4, pairs)):
        model = Scored("", "x", "checkpoint", "c", {"A": distance}, {}, (50.0,), ("",))
        draw_curves(model, same, {"best accuracy": 1.0}, tmp_path / "x.png")
        drawn[-1].draw_without_rendering()


def test_labels_of_close_models_do_not_overlap():
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(99, 100), ylim=(0, 0.4))
    points = np.column_stack([np.full(12, 99.97) + np.arange(12) % 2 * 0.02, np.linspace(0.1, 0.12, 12)])
    label_apart(axes, points, [f"DLDPO iresnet34 {k}" for k in range(12)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 12
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def test_axes_of_accuracies_end_at_100(drawn, tmp_path):
    models = [good(k, GROUPS if k == 0 else ("C",)) for k in range(3)]
    assert models[0].accuracies == (100,) * 4
    intervals = np.stack([np.array(one.accuracies)[:, None] + (-0.2, 0.0) for one in models])
    alt = figures.draw_accuracies(models, GROUPS, intervals, tmp_path / "x.png")
    assert drawn[0].axes[0].get_xlim()[1] == 100
    a, b, c, d = models[1].accuracies
    assert f"specialized iresnet34 a-KD: m1: A {a:.2f}, B {b:.2f}, C {c:.2f}, D {d:.2f}." in alt
    alt = figures.draw_trade_off(models, (PAIRS,) * 4, tmp_path / "x.png")
    assert drawn[1].axes[0].get_xlim()[1] == 100
    assert "specialized iresnet34 a-KD: m0: 100.00, 0.00." in alt


def entries(epochs: int, measures: bool = False) -> list[dict]:
    added = {"measures": {"alpha": 0.5}} if measures else {}
    scores = {"A": 98.0, "average": 98.0}
    return [
        {"epoch": k, "loss": {"eaf": 20.0 / k}, "scores": scores, "best": k == epochs, **added}
        for k in range(1, epochs + 1)
    ]


def test_training_shows_single_epochs_and_alpha_on_its_own_axis(drawn, tmp_path):
    alt = figures.draw_training({"one": entries(1), "ada": entries(4, True)}, tmp_path / "x.png")
    one, ada = drawn[0].axes[:2]
    assert one.lines[0].get_marker() == "."
    assert one.get_xlim() == (0, 2)
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss", "loss", "accuracy (%)", "accuracy (%)", "alpha"]
    assert all(len(axes.lines[0].get_xdata()) == 4 for axes in (ada, *drawn[0].axes[3:]))
    assert alt.endswith("ada: epochs 1 to 4, loss eaf 20 to 5; best epoch 4 with A 98.00.")


def test_a_picture_is_the_same_png_svg_and_pdf_each_time(tmp_path):
    for name in ("one", "other"):
        figure = Figure()
        figure.subplots().plot([1, 2], [1, 2])
        pictures.save(figure, tmp_path / f"{name}.png", "Note.")
    for path in pictures.Picture("", "", tmp_path / "one.png", "").files:
        assert path.read_bytes() == path.with_name(f"other{path.suffix}").read_bytes()
    assert b"/FontFile2" in (tmp_path / "one.pdf").read_bytes()
    assert b"<text" not in (tmp_path / "one.svg").read_bytes()


def test_each_of_several_marks_at_one_place_has_a_ring(drawn, tmp_path):
    model = good(0, GROUPS)
    draw_curves(model, SAME, {"FMR 0.01": 1.05, "FMR 0.001": 1.05}, tmp_path / "x.png")
    roc, det, against, _ = drawn[0].axes
    for axes, count in ((roc, 8), (det, 8), (against, 2)):
        marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert len({tuple(line.get_xydata()[0]) for line in marks}) == 1
        sizes = [line.get_markersize() for line in marks]
        assert len(sizes) == count
        assert sizes == sorted({*sizes}, reverse=True)
        assert sizes[-1] == curves.SIZE
        assert max(sizes) <= curves.SIZE + curves.LARGEST_GROWTH
    assert "larger: another mark is on it" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert all(axes.texts[0].get_text() == curves.ALL_BEYOND for axes in (roc, det))


def test_marks_at_different_places_have_one_size(drawn, tmp_path):
    draw_curves(good(0, ()), {"A": SAME["A"]}, {"one": 1.1, "other": 1.4}, tmp_path / "x.png")
    marks = [line for axes in drawn[0].axes[:3] for line in axes.lines if len(line.get_xdata()) == 1]
    assert {line.get_markersize() for line in marks} == {curves.SIZE}
    assert not [text for axes in drawn[0].axes for text in axes.texts]


def test_curves_of_equal_distances_are_steps(drawn, tmp_path):
    """The share of accepted pairs does not change between two distances: a line of any other form is untrue."""
    same = np.array([True, False] * 10)
    distance = np.where(same, 0.5, 1.0)
    distance[:4] = 0.8  # two genuine and two impostor pairs
    model = Scored("", "x", "checkpoint", "c", {"A": distance}, {}, (90.0,), ("",))
    draw_curves(model, {"A": same}, {"best": 0.9}, tmp_path / "x.png")
    _, det, against, _ = drawn[0].axes
    assert (det.lines[0].get_drawstyle(), against.lines[0].get_drawstyle()) == ("steps-post", "steps-pre")
    x, y = against.lines[0].get_path().vertices.T
    assert np.interp(0.75, x, y) < against.get_ylim()[0]  # no false match
    assert np.interp([0.81, 0.9, 0.99], x, y).tolist() == pytest.approx([0.2, 0.2, 0.2])  # 2 of 10
    x, y = det.lines[0].get_path().vertices.T
    assert np.interp([0.05, 0.19], x, y).tolist() == pytest.approx([0.2, 0.2])


def test_a_legend_is_within_the_figure():
    for names in (["A"] * 3, ["A group with a long name (no error at its best threshold)"] * 8):
        figure = Figure(figsize=(9.6, 8.6), layout="constrained")
        axes = figure.subplots()
        for name in names:
            axes.plot([0, 1], label=name)
        pictures.legend_below(figure, *axes.get_legend_handles_labels())
        figure.draw_without_rendering()
        extent = figure.legends[0].get_window_extent()
        assert len(figure.legends) == 1
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.width


def test_names_of_close_models_leave_out_the_network_that_all_share(drawn, tmp_path):
    one, other = good(0), good(1)
    students = [Scored(**{**vars(one), "name": "SL iresnet34"}), Scored(**{**vars(other), "name": "DuL iresnet34"})]
    for models, names in (
        (students, {"SL", "DuL"}),
        (
            [*students, Scored(**{**vars(one), "name": "SL iresnet50"})],
            {"SL iresnet34", "DuL iresnet34", "SL iresnet50"},
        ),
    ):
        figures.draw_trade_off(models, (PAIRS,) * 4, tmp_path / "x.png")
        assert {text.get_text() for text in drawn[-1].axes[0].texts} - {""} == names


def test_sixteen_looks_differ():
    looks = {(pictures.COLOURS[k % 8], pictures.MARKERS[pictures.shape_of(k)]) for k in range(16)}
    assert len(looks) == 16
