"""Models of other projects from their own files: to the fairness table in one command, as teachers, on IJB."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
from backbones import build_backbone
from config.config import Config
from eval.verification import accuracy, pair_distances, views
from tests.runs import GROUPS, arguments, run_script
from utils.data.columns import to_network
from utils.data.pairs import load_pairs
from utils.data.store import ImageStore

pytestmark = pytest.mark.usefixtures("blank_pictures")


def with_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """Gives an untrained network the statistics that it produces: its numbers grow from layer to layer otherwise."""
    image = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(9)) * 2 - 1
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    network.train()(image)
    return network.eval().requires_grad_(False)


def table(given: list[str], capsys) -> tuple[dict[str, str], Path, str]:
    """Runs the evaluation; returns the row of the table of accuracy, the folder, and what was printed."""
    run_script("eval.evaluation", given)
    printed = capsys.readouterr().out
    folder = Path(printed.split("Written to ")[1].split(": accuracy.md")[0])
    (row,) = csv.DictReader((folder / "accuracy.csv").read_text().splitlines())
    return row, folder, printed


def distances(folder: Path) -> np.ndarray:
    (path,) = (folder / "scores").iterdir()
    return np.array([float(line["squared distance"]) for line in csv.DictReader(path.read_text().splitlines())])


@pytest.fixture
def given(faces, tmp_path) -> list[str]:
    return arguments(faces, tmp_path / "output")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A small network, and its raw features as .onnx; whoever tests with requirements.txt alone goes without."""
    for name in export.PACKAGES:
        pytest.importorskip(name)
    torch.manual_seed(3)
    network = with_statistics(build_backbone("iresnet_tiny", 24))
    path = tmp_path_factory.mktemp("foreign") / "net.onnx"
    path.write_bytes(export.to_onnx(network, {}))
    torch.save(network.state_dict(), path.with_suffix(".pth"))
    return network, path


@pytest.mark.parametrize(
    ("name", "wrap", "said"),
    [
        ("mbf", lambda s: {"module." + k: v for k, v in s.items()}, "prefix 'module.' taken off"),
        (
            "adaface_ir_18",
            lambda s: {"state_dict": {**{"model." + k: v for k, v in s.items()}, "head.kernel": torch.ones(32, 5)}},
            "its state_dict; prefix 'model.' taken off; left out: head.kernel",
        ),
    ],
)
def test_a_public_model_goes_from_its_own_file_to_the_fairness_table(name, wrap, said, given, tmp_path, capsys):
    """With random weights. The accuracies are those of the network, which gets the channels that it takes."""
    torch.manual_seed(1)
    network = with_statistics(build_backbone(name, 32))
    path = tmp_path / "weights.ckpt"
    torch.save(wrap(network.state_dict()), path)
    given = [*given, "--ethnicities", "African,Asian", "--checkpoint", str(path), "--network", name]
    row, folder, printed = table(given, capsys)
    assert f"Loaded {path}: {said}." in printed
    cfg = Config.from_args(given)
    plain = build_backbone("tface_ir_18", 32) if name == "adaface_ir_18" else network
    if plain is not network:  # takes RGB: its first layer gets the weights in reverse
        state = network.state_dict()
        state["input_layer.0.weight"] = state["input_layer.0.weight"].flip(1)
        plain.load_state_dict(state)
    found = []
    for pairs in load_pairs(cfg).values():
        found.append(pair_distances(views(plain.eval(), pairs.distinct, cfg, ""), pairs.rows))
        assert float(row[cfg.ethnicities[len(found) - 1]]) == pytest.approx(accuracy(found[-1], pairs.same))
    assert np.allclose(distances(folder), np.concatenate(found), atol=1e-4)
    assert float(row["STD"]) >= 0 and row["SER"] and row["Kind"] == "checkpoint"


def test_an_onnx_file_scores_as_its_network(given, exported, capsys):
    _, path = exported
    one = table([*given, "--checkpoint", str(path.with_suffix(".pth")), "--embedding_size", "24"], capsys)
    row, folder, printed = table([*given, "--checkpoint", str(path)], capsys)  # its size is 24, the setting 32
    assert f"{path}: RGB, mean 127.5, std 127.5 (defaults), batches of any size; 24 numbers." in printed
    assert (row["Teachers"], row["Model"]) == ("onnx", "net.onnx")
    assert [row[group] for group in GROUPS] == [one[0][group] for group in GROUPS]
    assert np.allclose(distances(folder), distances(one[1]), atol=1e-4)
    # Another input gives other distances, although the file is the same.
    row, folder, printed = table([*given, "--checkpoint", str(path), "--onnx_channels", "BGR"], capsys)
    assert row["Model"] == "net.onnx BGR" and "BGR, mean 127.5" in printed
    assert not np.allclose(distances(folder), distances(one[1]), atol=1e-2)


def test_onnx_teachers_are_extracted_from_files_and_from_run_folders(given, exported, capsys):
    network, path = exported
    given = [*given, "--embedding_size", "24"]
    cfg = Config.from_args(given)
    run_script("extract_all.py", [*given, "--teacher", ",".join([str(path)] * 4)])
    printed = capsys.readouterr().out
    assert "--teacher" not in printed.split("Next: ")[1]
    stored = {name: np.load(cfg.teacher_embeddings(name)) for name in cfg.teachers}
    images = np.array(ImageStore(cfg).images)
    expected = F.normalize(network(to_network(torch.from_numpy(images)))).numpy()
    assert all(np.allclose(values, expected, atol=1e-5) for values in stored.values())
    folder = cfg.teacher_dir("African")
    folder.mkdir(parents=True)
    (folder / "released.onnx").write_bytes(path.read_bytes())
    run_script("extract_all.py", [*given, "--ethnicity", "African"])
    assert f"{cfg.teacher_embeddings('African')} is up to date." in capsys.readouterr().out
    run_script("extract_all.py", [*given, "--ethnicity", "African", "--onnx_channels", "BGR"])
    assert "made from something else" in capsys.readouterr().out
    assert not np.allclose(np.load(cfg.teacher_embeddings("African")), stored["African"], atol=1e-2)
    assert json.loads(cfg.teacher_embeddings("African").with_suffix(".json").read_text())["made from"]["input"] == [
        "BGR"
    ]
    row, *_ = table(given, capsys)
    assert (row["Kind"], row["Model"]) == ("teacher", "African")


@pytest.mark.parametrize(
    ("script", "options", "sentence"),
    [
        ("extract_all.py", ["--teacher", "a.pth"], "There is no file a.pth: set teacher to files of weights."),
        ("extract_all.py", ["--teacher", __file__], "teacher names 1 files: expected those of Asian, African"),
        ("eval.evaluation", ["--teacher", "a.pth"], "teacher names files below an adaptor: set checkpoint"),
    ],
)
def test_teachers_that_are_not_there_are_refused(script, options, sentence, given, capsys):
    run_script(script, [*given, *options], expect=2)
    assert sentence in capsys.readouterr().err


def test_an_onnx_file_is_not_exported_again(exported, capsys):
    with pytest.raises(SystemExit):
        export.main([str(exported[1]), "--network", "iresnet_tiny"])
    assert "is ONNX already" in capsys.readouterr().err
