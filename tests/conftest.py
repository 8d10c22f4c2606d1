"""Small data sets that tests share. Their images are noise, because these tests do not depend on what they show."""

import contextlib
import dataclasses
import errno
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config.config import Config
from config.readers import called
from eval.pictures import EXTENSIONS
from eval.published import mst_kd
from tests.runs import GROUPS, arguments, run_script
from utils.data.synthetic import generate

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)
# `nohup make test &` would pass on to all of them that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def encode(image: np.ndarray, extension: str = ".jpg") -> bytes:
    return cv2.imencode(extension, image)[1].tobytes()


def noise(seed: int, size: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def full_disk(*_) -> None:
    """Stands in for a function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_at(ending: str) -> Callable:
    """Stands in for os.replace, for which the disk is full where the target ends so."""
    plain = os.replace
    return lambda source, target: (full_disk if str(target).endswith(ending) else plain)(source, target)


def write_images(data: Path, counts: dict[str, dict[str, int]]) -> None:
    """Writes images of noise; `counts` gives their number for each identity of each group."""
    seed = 0
    for group, identities in counts.items():
        for identity, count in identities.items():
            (data / group / identity).mkdir(parents=True)
            for k in range(count):
                seed += 1
                (data / group / identity / f"{k}.jpg").write_bytes(encode(noise(seed)))


def write_pairs(path: Path, pairs: int = 20, seed: int = 0) -> None:
    faces = [encode(noise(1000 * seed + k)) for k in range(2 * pairs)]
    put(path, pickle.dumps((faces, [k % 2 == 0 for k in range(pairs)]), protocol=2))


def small_config(tmp_path: Path) -> Config:
    """Writes two groups of 3 and 2 identities with 4 images each, and a .bin of each; returns fast settings."""
    names = {"A": {"a1": 4, "a2": 4, "a3": 4}, "B": {"b1": 4, "b2": 4}}
    write_images(tmp_path / "data", names)
    for seed, group in enumerate(names):
        write_pairs(tmp_path / "pairs" / f"{group}_test.bin", seed=seed)
    return Config(
        data=str(tmp_path / "data"),
        pairs=str(tmp_path / "pairs"),
        output=str(tmp_path / "output"),
        cache=str(tmp_path / "cache"),
        ethnicities=("A", "B"),
        network="iresnet_tiny",
        student_network="iresnet_tiny",
        embedding_size=16,
        middle_layer_size=16,
        batch_size=4,
        num_epoch=2,
        num_epoch_fc=2,
        device="cpu",
    )


@pytest.fixture
def cfg(tmp_path) -> Config:
    return small_config(tmp_path)


@pytest.fixture
def blank_pictures(monkeypatch) -> None:
    """Writes blank pictures, for tests of tables: drawing takes most of an evaluation's time."""

    def save(figure, path: Path, note: str = "") -> None:
        for extension in EXTENSIONS:
            put(path.with_suffix(f".{extension}"), encode(np.zeros((1, 1, 3), np.uint8), ".png"))

    monkeypatch.setattr("eval.figures.save", save)
    monkeypatch.setattr("eval.curves.save", save)


@pytest.fixture
def printed_for_tiny(monkeypatch) -> None:
    """Compares generated faces with the paper's rows of iresnet34 as if iresnet_tiny were that network."""
    rows = {}
    for row in mst_kd().values():
        name = row.name.replace("iresnet34", "iresnet_tiny")
        key = tuple(part.replace("iresnet34", "iresnet_tiny") for part in row.key)
        rows[name] = dataclasses.replace(row, name=name, key=key)
    monkeypatch.setattr("eval.paper.is_generated", lambda _: False)
    for name in ("mst_kd", "every"):
        monkeypatch.setattr(f"eval.paper.{name}", lambda: rows)


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "faces"
    generate(folder, GROUPS, identities=4, images=4, pairs=20, seed=3)
    return folder


COPYING = ("__post_init__", "_check", "_check_data_sets", "changed", "decisive", "described", "in_use")
"""Methods of Config that read a setting without using its value for the work of the script."""


@contextlib.contextmanager
def recorded_reads() -> Iterator[dict[str, set[str]]]:
    """Context that records the settings that each script reads, by the name of the script."""
    names, found = {field.name for field in dataclasses.fields(Config)}, {}

    def read(cfg: Config, name: str):
        if name in names:
            callers = sys._getframe(1).f_code, sys._getframe(2).f_code
            methods = [code.co_qualname.split(".")[1:2] for code in callers if code.co_qualname.startswith("Config.")]
            is_copy = Path(callers[0].co_filename).name in ("dataclasses.py", "<string>")  # replace, asdict, ==
            is_reported = callers[0].co_name in ("versions", "command")
            if not is_copy and not is_reported and not any(method[0] in COPYING for method in methods):
                found.setdefault(called(sys.argv[0]), set()).add(name)
        return object.__getattribute__(cfg, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "__getattribute__", read)
        yield found


@pytest.fixture(scope="session")
def trained(trained_and_reads) -> tuple[Config, list[str]]:
    return trained_and_reads[:2]


@pytest.fixture(scope="session")
def trained_and_reads(faces, tmp_path_factory) -> tuple[Config, list[str], dict[str, set[str]]]:
    """Runs all stages of the specialised setting, then one teacher of the baseline, then the evaluation.

    Returns the settings, the command line, and the settings that each script has read.
    """
    given = arguments(faces, tmp_path_factory.mktemp("output"))
    with recorded_reads() as reads:
        _run_all(given)
    return Config.from_args(given), given, reads


def _run_all(given: list[str]) -> None:
    run_script("baseline_data_split.py", given)
    run_script("train.py", given)
    run_script("extract_all.py", [*given, "--flip_targets"])
    # fc_EArc.py must train a single-layer adaptor even with --is_dual_layer.
    run_script("fc_EArc.py", [*given, "--flip_targets", "--is_dual_layer"])
    run_script("dual_layer_EAF-Fusion.py", given)
    run_script("dual_layer_EAF-Fusion.py", [*given, "--has_dropout"])
    run_script("KD_alone.py", given)
    run_script("KD_CEL.py", [*given, "--is_dual_layer", "--has_dropout"])
    run_script("KD_AdaDistill.py", given)
    run_script("train.py", [*given, "--is_teacher_baseline", "--ethnicity", "quarter2"])
    run_script("eval.evaluation", given)
