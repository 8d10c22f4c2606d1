"""IJB-B and IJB-C: pooling and TAR against plain loops, the command on generated images, and bad input."""

import itertools
import json
import os
import signal
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import export
from backbones import build_backbone
from eval import ijb
from eval.identities import Ends
from eval.ijb import FARS, as_table, image_weights, pair_scores, pool, tar_at_far
from eval.ijb_files import Benchmark, load_benchmark
from eval.verification import normalize
from tests.conftest import noise
from utils.data.align import TEMPLATE, align
from utils.data.columns import to_network
from utils.errors import InputError
from utils.training import extract

# Pooling --------------------------------------------------------------------------------------------------------------


def plain_templates(features, detector_score, norm, template, media):
    """Computes the published protocol in plain loops; returns {template id: unit-length embedding}."""
    found = {}
    for one in sorted(set(template.tolist())):
        total = np.zeros(features.shape[1])
        for medium in sorted(set(media[template == one].tolist())):
            frames = []
            for k in np.flatnonzero((template == one) & (media == medium)):
                feature = features[k].astype(np.float64)
                if not norm:
                    feature = feature / np.sqrt(np.sum(feature**2))
                frames.append(feature if detector_score is None else feature * detector_score[k])
            total += np.sum(frames, 0) / len(frames)
        found[one] = total / np.sqrt(np.sum(total**2))
    return found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_templates_equal_the_plain_loop(norm, scored, monkeypatch):
    monkeypatch.setattr(ijb, "ROWS", 7)
    monkeypatch.setattr(ijb, "COLUMNS", 5)
    random = np.random.default_rng(0)
    features = (random.normal(size=(200, 12)) * random.uniform(0.1, 30, (200, 1))).astype(np.float32)
    template, media = random.integers(0, 40, 200) * 3 + 5, random.integers(0, 4, 200)  # unsorted, ids with gaps
    score = random.uniform(0.5, 1, 200) if scored else None
    found = normalize(pool(features, image_weights(features, score, norm), template, media))
    expected = plain_templates(features, score, norm, template, media)
    assert np.allclose(found, [*expected.values()], rtol=0, atol=1e-12)
    assert len(found) == len(expected) > 30


# A template of one photograph and two frames of a video.
FEATURES = np.array([[4.0, 0.0], [0.0, 1.0], [0.0, 3.0]], np.float32)
SCORES, TEMPLATE_ID, MEDIA = np.array([0.5, 1.0, 0.2]), np.array([7, 7, 7]), np.array([1, 2, 2])


@pytest.mark.parametrize(
    ("score", "norm", "expected"),
    [
        (None, True, (4, (1 + 3) / 2)),
        (SCORES, True, (0.5 * 4, (1 * 1 + 0.2 * 3) / 2)),
        (None, False, (1, (1 + 1) / 2)),
        (SCORES, False, (0.5, (1 + 0.2) / 2)),
    ],
)
def test_a_template_computed_by_hand(score, norm, expected):
    """Each option changes the result; frames of one media are averaged, media are summed."""
    found = pool(FEATURES, image_weights(FEATURES, score, norm), TEMPLATE_ID, MEDIA)
    assert np.allclose(found, [expected], rtol=0, atol=1e-7)  # float32 cannot represent 0.2


def test_frames_of_a_video_count_as_one_photograph():
    """A thousand equal frames have the weight of one; the same media id in another template is another media."""
    features = np.array([[1.0, 0.0], *[[0.0, 1.0]] * 1000, [1.0, 0.0]])
    template, media = np.array([1, *[1] * 1000, 2]), np.array([5, *[6] * 1000, 6])
    assert np.allclose(pool(features, np.ones(1002), template, media), [[1, 1], [1, 0]], rtol=0, atol=1e-12)


def test_features_that_are_not_finite_are_refused():
    features = np.ones((3, 2), np.float32)
    features[1, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        image_weights(features, None, norm=True)


def test_a_feature_of_length_zero_adds_nothing():
    features = np.array([[0.0, 0.0], [0.0, 2.0]], np.float32)
    found = pool(features, image_weights(features, None, norm=False), np.array([0, 0]), np.array([0, 1]))
    assert found.tolist() == [[0, 1]]


def test_scores_are_cosines_of_the_pairs(monkeypatch):
    monkeypatch.setattr(ijb, "ROWS", 4)
    random = np.random.default_rng(1)
    embeddings = normalize(random.normal(size=(6, 5)))
    pairs = random.integers(0, 6, (11, 2))
    expected = [sum(embeddings[a] * embeddings[b]) for a, b in pairs]
    assert np.allclose(pair_scores(embeddings, pairs), expected, rtol=0, atol=1e-12)


# TAR ------------------------------------------------------------------------------------------------------------------


def plain_tar(genuine, impostors, far):
    """Tries every relevant threshold, lowest first, with exact fractions."""
    scores = np.unique(np.concatenate([genuine, impostors]))
    for threshold in sorted({*scores, *np.nextafter(scores, np.inf)}):
        if Fraction(int(np.sum(impostors >= threshold)), len(impostors)) <= Fraction(far):
            return np.mean(genuine >= threshold), threshold
    raise AssertionError


@pytest.mark.parametrize("decimals", [1, 2, 17])
@pytest.mark.parametrize("count", [30, 37, 300, 399])
def test_tar_equals_the_plain_loop(count, decimals):
    """Rounded scores give ties among impostors, and between impostors and genuine pairs."""
    random = np.random.default_rng(count)
    genuine, impostors = random.normal(0.5, 0.3, 60).round(decimals), random.normal(0, 0.3, count).round(decimals)
    found = tar_at_far(genuine, impostors)
    assert [far for far, point in found.items() if point] == ["1e-2", "1e-1"][count < 300 :]
    for far, point in found.items():
        if point:
            assert (point["tar"], point["threshold"]) == plain_tar(genuine, impostors, far)


def test_tar_with_ties_computed_by_hand():
    """Three of 30 impostors may be accepted at FAR 0.1."""
    genuine = np.array([0.95, 0.9, 0.8, 0.7])
    without = np.array([0.9, 0.8, 0.7, *[0.1] * 27])
    found = tar_at_far(genuine, without)["1e-1"]
    assert (found["tar"], found["threshold"]) == (1.0, np.nextafter(0.1, 1))
    assert found["interval"] == pytest.approx([0.025**0.25, 1])  # Clopper-Pearson of 4 in 4
    tied = np.array([0.9, 0.8, 0.7, 0.7, *[0.1] * 26])  # threshold 0.7 would accept four
    found = tar_at_far(genuine, tied)["1e-1"]
    assert (found["tar"], found["threshold"]) == (0.75, np.nextafter(0.7, 1))
    everywhere = np.full(30, 0.9)  # accepts all or none
    assert tar_at_far(genuine, everywhere)["1e-1"]["tar"] == 0.25


def test_pairs_of_one_person_count_as_one_in_the_interval():
    """Ten people with four equal pairs each are as sure as ten pairs of ten people."""
    genuine, impostors = np.array([0.9] * 7 + [0.1] * 3), np.linspace(-0.5, 0.5, 30)
    people = Ends(np.repeat(np.arange(10), 4), np.repeat(np.arange(10), 4), 10)
    alone = tar_at_far(genuine, impostors)["1e-1"]
    shared = tar_at_far(np.repeat(genuine, 4), impostors, people)["1e-1"]
    assert shared["tar"] == alone["tar"]
    assert shared["interval"] == pytest.approx(alone["interval"])
    assert alone["interval"] == pytest.approx([0.3475, 0.9333], abs=1e-4)  # Clopper-Pearson of 7 in 10
    independent = tar_at_far(np.repeat(genuine, 4), impostors)["1e-1"]["interval"]
    assert independent[0] > alone["interval"][0] + 0.1


def test_templates_that_genuine_pairs_connect_are_of_one_person():
    pairs = np.array([[0, 1], [1, 2], [3, 4], [0, 3], [5, 6]])
    same = np.array([True, True, True, False, True])
    one = np.arange(7)
    people = Benchmark("IJB-C", Path(), [], one, one, one, one, pairs, same, "").people()
    assert people.one.tolist() == people.other.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(("far", "one_in"), FARS.items())
def test_a_rate_needs_three_over_far_impostors(far, one_in):
    genuine = np.array([0.5, 1.5])
    assert tar_at_far(genuine, np.zeros(3 * one_in - 1))[far] is None
    impostors = np.zeros(3 * one_in)
    impostors[:3] = 1  # exactly the allowed number
    assert tar_at_far(genuine, impostors)[far]["tar"] == 1
    impostors[3] = 1
    assert tar_at_far(genuine, impostors)[far]["tar"] == 0.5


def test_the_table_shows_a_dash_and_a_note_only_where_a_rate_is_not_resolved():
    about = {"benchmark": "IJB-C", "detector score": True, "norm": False, "images": 1000, "templates": 9}
    about |= {"genuine pairs": 4, "impostor pairs": 30}
    points = {far: {"tar": 0.98765, "interval": [0.98, 0.99], "threshold": 0.1} for far in FARS}
    whole = as_table({"x": points}, about)
    assert "1,000 images" in whole
    assert "detector score on, norm off" in whole
    assert whole.count("98.77") == whole.count("[98.00, 99.00]") == 6
    assert "rule of three" not in whole
    part = as_table({"x": points, "y": {**points, "1e-6": None}}, about)
    assert next(line for line in part.splitlines() if line.startswith("| y ")).split("|")[2].strip() == "-"
    assert "below 1.0e-01 (rule of three)" in part


def test_the_printed_row_follows_its_checkpoint():
    about = {"benchmark": "IJB-C", "detector score": True, "norm": True, "images": 1000, "templates": 9}
    about |= {"genuine pairs": 4, "impostor pairs": 30, "row": "AdaArcDistill m=0.45"}
    points = {far: {"tar": 0.9, "interval": [0.8, 1.0], "threshold": 0.1} for far in FARS} | {"1e-5": None}
    lines = as_table({"x": points}, about, {"1e-5": 89.32, "1e-4": 93.27}).splitlines()
    assert [cell.strip() for cell in lines[6].split("|")[1:-1]] == ["printed", "", "89.32", "93.27", "", "", ""]
    assert [cell.strip() for cell in lines[7].split("|")[1:-1]] == ["difference", "", "", "-3.27", "", "", ""]
    assert "Printed: AdaDistill's AdaArcDistill m=0.45." in lines


# The whole command ----------------------------------------------------------------------------------------------------

COUNT = 20
OF_IMAGE = [(100 + k % 8, k // 4) for k in range(COUNT)]  # template and media: templates of two identities alternate
PAIR_LINES = [(100 + a, 100 + b, int(a // 2 == b // 2)) for a in range(8) for b in range(8) if a != b]


@pytest.fixture
def folder(tmp_path):
    """Writes 8 templates of 20 generated images, 8 genuine and 48 impostor pairs, in the layout of IJB-C."""
    folder, random = tmp_path / "IJBC", np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    points = []
    for k, (template, _) in enumerate(OF_IMAGE):
        image = cv2.resize(noise(template // 2, 12), (130 + k, 150), interpolation=cv2.INTER_NEAREST)
        landmarks = TEMPLATE * 1.2 + random.normal(scale=2, size=(5, 2))
        cv2.imwrite(str(folder / "loose_crop" / f"{k + 1}.jpg"), image)
        points.append(f"{k + 1}.jpg {' '.join(f'{v:.3f}' for v in landmarks.ravel())} {random.uniform(0.5, 1):.4f}")
    write(folder, "name_5pts_score", points)
    write(folder, "face_tid_mid", [f"{k + 1}.jpg {template} {media}" for k, (template, media) in enumerate(OF_IMAGE)])
    write(folder, "template_pair_label", [" ".join(map(str, pair)) for pair in PAIR_LINES])
    return folder


def path_of(folder, name):
    return folder / "meta" / f"ijbc_{name}.txt"


def write(folder, name, lines):
    path_of(folder, name).write_text("".join(f"{line}\n" for line in lines))


def change(folder, name, number, line):
    """Replaces line `number` of a file, counted from 1, or removes it if `line` is None."""
    lines = path_of(folder, name).read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    write(folder, name, lines)


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    network = build_backbone("iresnet_tiny", 16).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    return network


def run(folder, *more):
    place = folder.parent
    where = ["--folder", str(folder), "--checkpoint", str(place / "net.pth"), "--output", str(place / "out")]
    settings = ["--network", "iresnet_tiny", "--embedding_size", "16", "--device", "cpu", "--infer_batch_size", "8"]
    ijb.command([*where, *settings, *more])
    return next((place / "out" / "ijb").iterdir())


def test_an_onnx_file_gives_the_features_of_its_network(folder, network):
    for name in export.PACKAGES:
        pytest.importorskip(name)
    plain = np.load(run(folder) / "features.npy")
    path = folder.parent / "net.onnx"
    path.write_bytes(export.to_onnx(network, {}))
    given = ["--folder", str(folder), "--checkpoint", str(path), "--output", str(folder.parent / "other")]
    for options, equal in (([], True), (["--onnx_channels", "BGR"], False)):  # its size is not the setting's, 512
        ijb.command([*given, "--device", "cpu", *options])
        (place,) = (folder.parent / "other" / "ijb").iterdir()
        assert np.allclose(np.load(place / "features.npy"), plain, atol=1e-4) == equal
    assert json.loads((place / "tar.json").read_text())["network"] == "onnx"


def test_the_command_equals_a_plain_evaluation(folder, network, capsys):
    result = run(folder)
    assert result.name.startswith(f"IJB-C-{folder.parent.name}-net-")
    assert {path.name for path in result.iterdir()} == {"features.npy", "features.json", "tar.json", "tar.md"}

    expected, score = [], []
    for line in path_of(folder, "name_5pts_score").read_text().splitlines():
        name, *numbers = line.split()
        image = cv2.imread(str(folder / "loose_crop" / name))[..., ::-1]
        face = align(image, np.array(numbers[:10], float).reshape(5, 2))
        both = to_network(torch.from_numpy(np.stack([face, face[:, ::-1]])))
        expected.append(network(both).sum(0).detach().numpy())
        score.append(float(numbers[10]))
    features = np.load(result / "features.npy")
    assert np.allclose(features, expected, rtol=0, atol=1e-4)
    assert np.ptp(features, axis=0).max() > 0.01  # the features differ

    of_image = np.array(OF_IMAGE)
    embedding = plain_templates(features, np.array(score), True, *of_image.T)
    scores = np.array([embedding[a] @ embedding[b] for a, b, _ in PAIR_LINES])
    same = np.array([label for _, _, label in PAIR_LINES]) == 1
    tar, threshold = plain_tar(scores[same], scores[~same], "1e-1")
    report = json.loads((result / "tar.json").read_text())
    assert report["at FAR"]["1e-1"]["tar"] == tar
    assert report["at FAR"]["1e-1"]["threshold"] == pytest.approx(threshold, abs=1e-12)
    assert [far for far, point in report["at FAR"].items() if point is None] == [*FARS][:5]
    assert (report["genuine pairs"], report["impostor pairs"], report["templates"]) == (8, 48, 8)
    table = (result / "tar.md").read_text()
    assert table in capsys.readouterr().out
    assert f"{100 * tar:.2f} |" in table


def test_cached_features_give_the_results_again_without_the_network(folder, network, monkeypatch):
    result = run(folder)
    first = (result / "tar.json").read_bytes()
    for name in ("tar.json", "tar.md"):
        (result / name).unlink()

    def refuse(*_):
        raise AssertionError("the network ran")

    monkeypatch.setattr(extract, "infer", refuse)
    run(folder)
    assert (result / "tar.json").read_bytes() == first
    assert (result / "tar.md").exists()
    run(folder, "--no_norm", "--no_detector_score")
    other = json.loads((result / "tar-no_detector_score-no_norm.json").read_text())
    assert (other["norm"], other["detector score"]) == (False, False)
    assert other["at FAR"]["1e-1"]["threshold"] != json.loads(first)["at FAR"]["1e-1"]["threshold"]
    assert (result / "tar.json").read_bytes() == first
    change(folder, "name_5pts_score", 20, path_of(folder, "name_5pts_score").read_text().splitlines()[19] + "1")
    with pytest.raises(AssertionError, match="the network ran"):  # the landmarks file has changed
        run(folder)


def test_an_interrupted_run_resumes(folder, network, monkeypatch, capsys):
    monkeypatch.setattr(extract, "BLOCK", 8)
    image = folder / "loose_crop" / "19.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="2"):
        run(folder)
    assert f"{image} is a truncated JPEG: replace it" in capsys.readouterr().err
    image.write_bytes(whole)
    seen = []
    read_image = ijb.read_image
    monkeypatch.setattr(ijb, "read_image", lambda path: seen.append(path.name) or read_image(path))
    result = run(folder)
    assert sorted(seen) == ["17.jpg", "18.jpg", "19.jpg", "20.jpg"]
    resumed = np.load(result / "features.npy")
    (result / "features.npy").unlink()
    assert np.array_equal(np.load(run(folder) / "features.npy"), resumed)


def test_several_networks_share_a_table(folder, network, tmp_path, capsys):
    torch.save(build_backbone("iresnet_tiny", 16).state_dict(), tmp_path / "other.pth")
    run(folder, "--checkpoint", str(tmp_path / "net.pth"), str(tmp_path / "other.pth"))
    names = sorted(path.name for path in (tmp_path / "out" / "ijb").iterdir())
    assert len(names) == 2
    table = capsys.readouterr().out.split("IJB-C 1:1")[-1]
    assert all(name in table for name in names)


def test_a_row_is_compared_with_one_checkpoint(folder, network, capsys):
    result = run(folder, "--row", "AdaArcDistill m=0.45")
    assert "93.27" in (result / "tar.md").read_text()
    assert json.loads((result / "tar.json").read_text())["printed TAR in %"] == {"1e-4": 93.27, "1e-5": 89.32}
    capsys.readouterr()
    for more, sentence in (
        (["--row", "EAF-KD SL iresnet34 specialized"], "has no printed TAR on IJB-C. Set row to one of: ResNet50 teac"),
        (["--row", "MFN", "--checkpoint", "a.pth", "b.pth"], "is compared with one checkpoint: give one, not 2."),
    ):
        with pytest.raises(SystemExit) as stop:
            run(folder, *more)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


def test_ctrl_c_prints_the_command_that_resumes(folder, network, monkeypatch, capsys):
    calls = itertools.count()

    def read_image(_):
        if next(calls) == 3:  # only once: a later one would stop pytest
            os.kill(os.getpid(), signal.SIGINT)
        return noise(0)

    monkeypatch.setattr(ijb, "read_image", read_image)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        run(folder)
    assert "continue with: python" in capsys.readouterr().err


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "line", "sentence"),
    [
        ("face_tid_mid", 3, "3.jpg 102", "face_tid_mid.txt, line 3: expected <image name> <template id> <media id>"),
        ("face_tid_mid", 3, "3.jpg 102 x", "face_tid_mid.txt, line 3: expected"),
        ("face_tid_mid", 3, "3.jpg 102 0.5", "face_tid_mid.txt, line 3: expected"),
        ("face_tid_mid", 3, "3.jpg 102 99999999999999999999", "face_tid_mid.txt, line 3: expected"),
        ("face_tid_mid", 3, "", "face_tid_mid.txt, line 3: expected"),
        ("face_tid_mid", 3, "4.jpg 102 0", "face_tid_mid.txt, line 3: not the image in this line of .*5pts"),
        ("face_tid_mid", 20, None, r"face_tid_mid.txt has 19 lines, .*5pts_score.txt 20: expected one per image"),
        ("name_5pts_score", 20, None, r"face_tid_mid.txt has 20 lines, .*5pts_score.txt 19: expected one per image"),
        ("name_5pts_score", 2, "2.jpg 1 2 3 4 5 6 7 8 9 10", "5pts_score.txt, line 2: expected"),
        ("name_5pts_score", 2, "2.jpg 1 2 3 4 5 6 7 8 9 nan 1", "5pts_score.txt, line 2: a number is not finite"),
        ("name_5pts_score", 2, "2.jpg 1 2 1 2 1 2 1 2 1 2 1", "5pts_score.txt, line 2: all landmarks lie at one point"),
        ("template_pair_label", 9, "100 101", "pair_label.txt, line 9: expected"),
        ("template_pair_label", 9, "100 101 2", "pair_label.txt, line 9: the last number must be 1"),
        ("template_pair_label", 9, "100 99 1", "pair_label.txt, line 9: a template that is not in .*face_tid_mid.txt"),
        ("template_pair_label", 9, "108 100 1", "pair_label.txt, line 9: a template that is not in"),
    ],
)
def test_malformed_lines_are_named(name, number, line, sentence, folder):
    change(folder, name, number, line)
    with pytest.raises(InputError, match=sentence):
        load_benchmark(folder)


def test_an_empty_file_is_refused(folder):
    write(folder, "template_pair_label", [])
    with pytest.raises(InputError, match=r"template_pair_label.txt is empty"):
        load_benchmark(folder)


@pytest.mark.parametrize(("label", "lacking"), [(0, "genuine"), (1, "impostor")])
def test_pairs_of_one_kind_are_refused(label, lacking, folder):
    write(folder, "template_pair_label", [f"{a} {b} {label}" for a, b, _ in PAIR_LINES])
    with pytest.raises(InputError, match=f"holds no {lacking} pair"):
        load_benchmark(folder)


def test_missing_images_are_found_before_anything_is_computed(folder, network, monkeypatch, capsys):
    for name in ("7.jpg", "12.jpg"):
        (folder / "loose_crop" / name).unlink()
    monkeypatch.setattr(ijb, "extract", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match="2"):
        run(folder)
    assert "loose_crop lacks 2 of 20 images, the first 7.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"no image", "is no JPEG, PNG or WebP image")])
def test_an_image_that_cannot_be_read_is_named(content, reason, folder, network, capsys):
    (folder / "loose_crop" / "5.jpg").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run(folder)
    said = capsys.readouterr().err
    assert f"5.jpg {reason}: replace it" in said
    assert said.count("\n") == 1


def test_missing_files_are_named_in_one_sentence(folder, tmp_path):
    path_of(folder, "name_5pts_score").unlink()
    (folder / "loose_crop").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"Missing: \S+ijbc_name_5pts_score.txt, \S+loose_crop. Set --folder"):
        load_benchmark(folder)
    with pytest.raises(InputError, match=r"Missing: .*ijbc_face_tid_mid.txt.*\(or the same with ijbb_\)"):
        load_benchmark(tmp_path / "nowhere")


def test_the_set_is_recognised_by_its_files(folder):
    assert load_benchmark(folder).name == "IJB-C"
    for path in sorted((folder / "meta").iterdir()):
        path.rename(path.with_name(path.name.replace("ijbc", "ijbb")))
    assert load_benchmark(folder).name == "IJB-B"
    path_of(folder, "face_tid_mid").write_text("")
    with pytest.raises(InputError, match="both IJB-B and IJB-C"):
        load_benchmark(folder)


def test_a_checkpoint_of_another_network_is_refused_in_one_sentence(folder, network, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folder, "--network", "iresnet18")
    assert "net.pth does not fit this IResNet" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(folder, "--ntwork", "iresnet18")
    assert "unknown setting --ntwork: did you mean --network?" in capsys.readouterr().err


def test_scores_that_are_all_zero_give_tar_zero():
    """The smallest number above zero is denormal; a process that has called `setup` rounds it to zero."""
    torch.set_flush_denormal(True)
    try:
        assert tar_at_far(np.zeros(10), np.zeros(100))["1e-1"]["tar"] == 0
    finally:
        torch.set_flush_denormal(False)
