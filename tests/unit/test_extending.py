"""The diffs of docs/extending.md: they apply to this tree, and their network, loss, method and data set work."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, arguments

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TITLES = ("network", "loss", "distillation method", "data set")
DIFFS = {title: re.search(rf"## Add a {title}\n.*?```diff\n(.*?)```", PAGE, re.DOTALL)[1] for title in TITLES}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Returns a copy of the code with all four diffs applied."""
    folder = tmp_path_factory.mktemp("extended") / "code"
    folder.mkdir()
    for name in ("config", "backbones", "utils", "eval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for diff in DIFFS.values():
        _apply(folder, diff)
    return folder


def _apply(folder: Path, diff: str, *options: str) -> None:
    """Runs `git apply` in a folder outside any repository."""
    command = ["git", "apply", "--unidiff-zero", *options]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, input=diff, text=True, capture_output=True)
    assert not done.returncode, done.stderr


def _run(tree: Path, script: str, given: list[str]) -> str:
    what = [script] if script.endswith(".py") else ["-m", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *what, *given], cwd=tree, env=environment, text=True, capture_output=True, timeout=300
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("title", TITLES)
def test_a_change_takes_at_most_30_lines(title):
    assert len(DIFFS[title].splitlines()) <= 30


def test_the_network_and_the_loss_train_a_teacher(tree, faces, tmp_path):
    given = [*arguments(faces, tmp_path), "--ethnicity", "African", "--num_epoch", "1"]
    _run(tree, "train.py", [*given, "--network", "plain", "--loss", "HalfArcFace"])
    folder = tmp_path / "specialized" / "plain" / "teachers" / "African"
    assert (folder / "best_backbone.pth").exists()
    assert '"loss": "HalfArcFace"' in (folder / "config.json").read_text()


def test_the_method_trains_a_student_that_the_evaluation_finds(tree, trained, tmp_path):
    cfg, given = trained
    output = tmp_path / "output"
    shutil.copytree(cfg.output, output)
    given = [*given, "--output", str(output), "--num_epoch", "1"]
    assert "In use for Relations: num_epoch 1, milestones none" in (said := _run(tree, "KD_relations.py", given))
    assert "ada_m" not in said
    student = output / "specialized" / "iresnet_tiny" / "students" / "iresnet_tiny" / "SL-Relations"
    alone = tmp_path / "alone"
    shutil.copytree(student, alone / student.relative_to(output))
    printed = _run(tree, "eval.evaluation", [*given, "--output", str(alone)])
    assert "Relations" in printed and "SL iresnet_tiny" in printed and "is left out" not in printed
    student.rename(student.with_name("SL-Other"))
    shutil.copytree(student.with_name("SL-Other"), alone / student.relative_to(output).with_name("SL-Other"))
    printed = _run(tree, "eval.evaluation", [*given, "--output", str(alone)])
    assert "students/iresnet_tiny/SL-Other is left out: add its network and method to config/registry.py" in printed


def test_the_data_set_is_trained_on(tree, faces, tmp_path):
    source = tmp_path / "flat"
    source.mkdir()
    with (source / "list.csv").open("w", newline="") as file:
        for image in sorted((faces / "train").glob("African/*/*.jpg")):
            shutil.copy(image, source)
            csv.writer(file).writerow(["G", image.parent.name, image.name])
    _run(tree, "from_list.py", [str(source / "list.csv"), str(tmp_path / "data")])
    (tmp_path / "pairs").mkdir()
    shutil.copy(faces / "pairs" / "African_test.bin", tmp_path / "pairs" / "G_test.bin")
    paths = ["--data", str(tmp_path / "data"), "--pairs", str(tmp_path / "pairs"), "--cache", str(tmp_path / "cache")]
    given = [*arguments(faces, tmp_path / "output"), *paths, "--ethnicities", "G", "--num_epoch", "1"]
    assert "16 images of 4 identities" in _run(tree, "train.py", given)
