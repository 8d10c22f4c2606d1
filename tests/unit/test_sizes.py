"""Teachers whose embeddings have another size than the student's: adaptors, projections, and the evaluation."""

import csv
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones import build_backbone
from config.config import Config
from tests.runs import arguments, equal, run_script
from utils.data.faces import Faces
from utils.errors import InputError
from utils.storage.tensors import load
from utils.training.start import Projection
from utils.training.state import Progress
from utils.weights import load_backbone

SIZES = {"African": 16, "Asian": 24, "Caucasian": 16, "Indian": 48}


@pytest.fixture(scope="module")
def released(faces, tmp_path_factory):
    """Released teachers of several sizes, and their embeddings; students have 32 dimensions."""
    given = arguments(faces, tmp_path_factory.mktemp("sizes") / "output")
    cfg = Config.from_args(given)
    torch.manual_seed(0)
    for name, size in SIZES.items():
        cfg.teacher_dir(name).mkdir(parents=True)
        torch.save(build_backbone("iresnet_tiny", size).state_dict(), cfg.teacher_dir(name) / "100backbone.pth")
    run_script("extract_all.py", [*given, "--flip_targets"])
    return cfg, given


def test_the_size_of_a_teacher_is_that_of_its_file(released):
    cfg, _ = released
    for name, size in SIZES.items():
        embeddings = np.load(cfg.teacher_embeddings(name))
        assert embeddings.shape == (64, size)
        assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    network, _ = load_backbone(
        "iresnet_tiny", cfg.teacher_dir("Indian") / "100backbone.pth", replace(cfg, embedding_size=512)
    )
    assert network(torch.zeros(1, 3, 112, 112)).shape == (1, 48)


@pytest.mark.usefixtures("blank_pictures")
def test_adaptors_map_the_sum_of_the_sizes_and_are_evaluated(released, tmp_path, capsys):
    cfg, given = released
    shutil.copytree(cfg.output, tmp_path / "output")
    given = [*given, "--output", str(tmp_path / "output")]
    cfg = replace(cfg, output=str(tmp_path / "output"))
    run_script("fc_EArc.py", given)
    run_script("dual_layer_EAF-Fusion.py", given)
    assert load(cfg.adaptor_dir("SL") / "best_backbone.pth")["fc.weight"].shape == (32, sum(SIZES.values()))
    assert load(cfg.adaptor_dir("DuL") / "best_backbone.pth")["fc1.weight"].shape == (32, sum(SIZES.values()))
    assert np.load(cfg.adaptor_embeddings("SL")).shape == (64, 32)
    run_script("KD_alone.py", given)
    # The evaluation reads every size from the files.
    run_script("eval.evaluation", [*given, "--embedding_size", "512", "--middle_layer_size", "512"])
    table = (tmp_path / "output" / "evaluation" / "accuracy.csv").read_text().splitlines()
    kinds = [(row["Kind"], row["Model"]) for row in csv.DictReader(table)]
    assert kinds == [
        *(("teacher", name) for name in SIZES),
        ("adaptor", "SL"),
        ("adaptor", "DuL"),
        ("a-KD", "SL iresnet_tiny"),
    ]


@pytest.mark.parametrize(
    ("script", "method", "options"),
    [
        ("KD_alone.py", "a-KD", []),
        ("KD_CEL.py", "EAF-KD", []),
        ("KD_AdaDistill.py", "AdaArcDistill", ["--header_sharding"]),
    ],
)
def test_a_student_is_projected_to_one_teacher_of_another_size(
    released, tmp_path, monkeypatch, script, method, options
):
    cfg, given = released
    given = [*given, "--ada_source", "teacher", "--ethnicity", "Asian", *options]
    folders, take = [], Progress._take_step
    for name in ("whole", "stopped"):
        output = tmp_path / name
        shutil.copytree(cfg.output, output)
        here = replace(cfg, output=str(output), ada_source="teacher", ethnicity="Asian")
        folders.append(here.student_dir(method))
        if name == "stopped":
            steps = []

            def take_and_stop(self, *values, steps=steps):
                take(self, *values)
                steps.append(1)
                if len(steps) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            monkeypatch.setattr(Progress, "_take_step", take_and_stop)
            run_script(script, [*given, "--output", str(output)], expect=128 + signal.SIGTERM)
            monkeypatch.undo()
        run_script(script, [*given, "--output", str(output)])
    whole, stopped = ({**load(folder / "checkpoint.pth"), "sessions": []} for folder in folders)
    assert equal(whole, stopped)
    assert whole["projection"]["fc.weight"].shape == (24, 32)
    assert load(folders[0] / "last_backbone.pth").keys() == build_backbone("iresnet_tiny", 32).state_dict().keys()
    if method == "AdaArcDistill":  # the centres are in the teacher's space
        assert load(folders[0] / "last_header.pth")["kernel"].shape == (24, 16)


def test_a_projection_is_linear_and_of_unit_length():
    torch.manual_seed(0)
    projection, x = Projection(6, 4), F.normalize(torch.randn(5, 6))
    plain = x @ projection.fc.weight.T
    assert torch.allclose(projection(x), plain / plain.norm(dim=1, keepdim=True))


def test_an_adaptors_embeddings_of_another_size_are_refused(released, tmp_path):
    cfg, given = released
    shutil.copytree(cfg.output, tmp_path / "output")
    given = [*given, "--output", str(tmp_path / "output")]
    run_script("fc_EArc.py", given)
    with pytest.raises(InputError, match=r"is of shape \(64, 32\), expected \(64, 20\): set embedding_size"):
        Faces(Config.from_args([*given, "--embedding_size", "20"]), target=True)
