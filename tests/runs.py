"""Helpers shared by tests: run scripts, train a small run, write random embeddings, compare two runs."""

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.embeddings import origin
from utils.data.faces import Faces
from utils.data.store import ImageStore
from utils.losses import ElasticArcFace
from utils.process import setup
from utils.storage import arrays
from utils.storage.files import sha256
from utils.storage.tensors import save
from utils.training.engine import fit

ROOT = Path(__file__).parents[1]
GROUPS = ("African", "Asian", "Caucasian", "Indian")
FEATURES = 3 * 112 * 112


def run_script(script: str, arguments: list[str], expect: int = 0) -> None:
    """Runs a script or module in this process with a command line, and checks its exit status."""
    before, sys.argv = sys.argv, [script, *arguments]
    threads = torch.get_num_threads()  # --num_threads must not affect other tests
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            sys.modules.pop(script, None)
            runpy.run_module(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    assert status == expect, f"{script} ended with {status}"


def torchrun(processes: int, *command: str, options: tuple[str, ...] = (), **environment: str) -> tuple[int, str]:
    """Runs a module or script with its arguments under torchrun; returns the exit status and the output.

    Raises subprocess.TimeoutExpired after ten minutes.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    what = list(command) if command[0].endswith(".py") else ["-m", *command]
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*start, *options, "--", *what], cwd=ROOT, env=given, timeout=600, **captured)
    return done.returncode, done.stdout


def arguments(faces: Path, output: Path) -> list[str]:
    """Returns the settings of all stages as a command line: a tiny network on `faces`, with the cache beside them.

    The device is the CPU, whose numbers most tests compare with; tests/unit/test_gpu.py trains on a GPU.
    """
    paths = ["--data", f"{faces}/train", "--pairs", f"{faces}/pairs", "--output", str(output)]
    paths += ["--cache", str(faces.parent / "cache")]
    networks = "--network iresnet_tiny --student_network iresnet_tiny --ada_student_network iresnet_tiny"
    small = "--embedding_size 32 --middle_layer_size 32"
    short = "--batch_size 8 --num_epoch 2 --num_epoch_fc 2 --s 16 --m 0.2 --device cpu"
    return [*paths, *f"{networks} {small} {short}".split()]


class Linear(torch.nn.Module):
    """A network with dropout, so that its outputs depend on the random numbers."""

    def __init__(self, size: int = 16):
        super().__init__()
        self.fc = torch.nn.Linear(FEATURES, size)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, image):
        return self.dropout(self.fc(image.flatten(1) / 100))


def train(cfg, name="T", epochs=3, before_step=None, validate=None, flip=True):
    """Trains a small network in the run folder `name`; calls `before_step` with the number of the step, from 1."""
    setup(cfg)
    faces = Faces(cfg, flip=flip)
    network, header = Linear(), ElasticArcFace(16, faces.num_classes, s=8.0)
    calls = []

    def losses(image, label):
        calls.append(label)
        if before_step:
            before_step(len(calls))
        return {"margin": F.cross_entropy(header(network(image), label), label)}

    cfg = replace(cfg, num_epoch=epochs)
    fit(losses, faces, cfg.teacher_dir(name), cfg, network, header, kind="teacher", validate=validate)
    return network, header


def write_embeddings(cfg, teacher, flipped=False, images=None):
    """Writes random embeddings (20, 16) of all images, as if made by the teacher's weights in its run folder."""
    weights = cfg.teacher_dir(teacher) / "best_backbone.pth"
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        save(weights, {"name": torch.tensor(list(teacher.encode()))})
    made_from = origin(images or ImageStore(cfg).digest, sha256(weights), flipped)
    values = np.random.default_rng((flipped, *teacher.encode())).normal(size=(20, 16)).astype(np.float32)
    arrays.write(cfg.teacher_embeddings(teacher, flipped), values, made_from)
    return values


def write_targets(cfg, inputs):
    """Writes embeddings of the adaptor SL, as if made from the teachers' embeddings `inputs`."""
    folder = cfg.adaptor_dir("SL")
    folder.mkdir(parents=True)
    save(folder / "best_backbone.pth", {"fc.bias": torch.zeros(1)})
    made_from = origin(ImageStore(cfg).digest, sha256(folder / "best_backbone.pth"), False, inputs)
    arrays.write(cfg.adaptor_embeddings("SL"), np.ones((20, 16), np.float32), made_from)


def checkpoint(cfg, name="T"):
    return torch.load(cfg.teacher_dir(name) / "checkpoint.pth", weights_only=True)


def difference(one: Path, other: Path) -> str:
    """Returns what differs between two finished run folders (weights, optimizer, position, log), or ""."""
    for name in ("checkpoint.pth", "best_backbone.pth", "best_header.pth", "last_backbone.pth", "last_header.pth"):
        here, there = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        if name == "checkpoint.pth":  # processes and machines of the sessions may differ
            here, there = ({key: value for key, value in state.items() if key != "sessions"} for state in (here, there))
        if not equal(here, there):
            return f"{name} differs"
    for name in ("best_backbone.pth", "last_header.pth", "log.jsonl", "identities.txt"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            return f"{name} differs"
    if left := [path.name for path in other.parent.rglob("*") if path.name.endswith((".partial", ".lock"))]:
        return f"{left} is left behind"
    return ""


def equal(one, other) -> bool:
    """Compares nested dicts and lists of tensors and plain values, to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
