"""A trial of reproduce.py: it is killed twice, resumes, and must end with all tables.

Run     python -m tests.soak.reproduction <stages> <settings>   (reproduce.py with only some of its stages)
"""

import contextlib
import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import reproduce
from config.config import Config
from config.registry import ADAPTORS
from tests.soak.trials import ROOT, Result
from utils.data.identities import sidecar_of
from utils.data.synthetic import generate
from utils.process import guarded
from utils.stages.paper import Stage, paper

GROUPS = ("African", "Asian", "Caucasian", "Indian")
SMALL = (
    "--network iresnet_tiny --student_network iresnet_tiny --embedding_size 32 --middle_layer_size 32 --batch_size 4 "
    "--num_epoch 1 --num_epoch_fc 1 --s 16 --m 0.2 --num_threads 1 --device cpu"
)
EVERY = "every"
TABLES = ("accuracy.md", "accuracy.csv", "accuracy.tex", "intervals.md", "differences.md", "chance.md", "report.html")


def settings(work: Path, groups: tuple[str, ...] = GROUPS) -> list[str]:
    """Returns the settings of all stages as a command line, for a tiny network on the CPU."""
    faces = work / "faces"
    places = f"--data {faces}/train --pairs {faces}/pairs --output {work}/output --cache {work}/cache"
    return [*places.split(), "--ethnicities", ",".join(groups), *SMALL.split()]


def generate_faces(faces: Path, groups: tuple[str, ...], pairs: int) -> None:
    """Generates faces with `pairs` pairs a group: 20 different pairs, repeated."""
    generate(faces, groups, identities=4, images=3, pairs=20, seed=7)
    for group in groups:
        path = faces / "pairs" / f"{group}_test.bin"
        images, same = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps((images * (pairs // 20), same * (pairs // 20)), protocol=2))
        sidecar_of(path).unlink()  # it names the identities of 20 pairs


def kills(
    work: Path, at: dict[signal.Signals, int], names: str = EVERY, groups: tuple[str, ...] = GROUPS, pairs: int = 20
) -> Result:
    """Runs reproduce.py in two slots, sends it each signal after so many stages, then gives the same command twice.

    `at` maps each signal to the number of finished stages after which it is sent; SIGKILL goes to the process group.
    `names` are the stages to run, separated by commas, or EVERY. A case passes if SIGTERM ends with the command that
    resumes, if the result has a row for every model and all tables, and if the last command skips every stage.
    """
    generate_faces(work / "faces", groups, pairs)
    given, result, random = settings(work, groups), Result(), np.random.default_rng(0)
    stages = only(paper(Config.from_args(given)), names)
    script = ["reproduce.py"] if names == EVERY else ["-m", "tests.soak.reproduction", names]
    command = [sys.executable, *script, "--devices", "0,1", *given]
    for number, count in at.items():
        status, text = _run(command, work, number, count, float(random.uniform(0, 1)))
        wanted = (143, r".*: stopped, .* kept; continue with: python .*") if number == signal.SIGTERM else (-9, "")
        said = re.search(wanted[1], text)
        failure = "" if status == wanted[0] and said else f"{number.name}: status {status}: {text[-500:]}"
        result.add(failure, f"{number.name} to reproduce.py", said[0] if said else "")
    status, text = _run(command, work)
    failure = f"status {status}: {text[-500:]}" if status else missing(work / "output" / "evaluation", stages)
    result.add(failure, "", "")
    status, text = _run(command, work)
    passed = text.count("is finished: passed over.")
    right = status == 0 and passed == len(stages) and "$ python" not in text
    result.add("" if right else f"{passed} of {len(stages)} were skipped: {text[-500:]}", "", "")
    return result


def _run(command: list[str], work: Path, number: int = 0, count: int = 0, later: float = 0.0) -> tuple[int, str]:
    """Runs a command and returns its exit status and output.

    Sends it the signal `number`, if not 0, `later` seconds after `count` stages are finished.
    """
    log = work / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        out = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment, "start_new_session": True}
        process = subprocess.Popen(command, **out)
    if number:
        while process.poll() is None and _finished(work / "output" / "reproduce.json") < count:
            time.sleep(0.02)
        time.sleep(later)
        if process.poll() is None:  # else its own end is the failure
            (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
    return process.wait(600), log.read_text()


def _finished(record: Path) -> int:
    with contextlib.suppress(OSError):
        return len(json.loads(record.read_text()))
    return 0


def missing(folder: Path, stages: list[Stage]) -> str:
    """Returns what the evaluation of the models of these stages lacks; "" if it is complete."""
    if absent := [name for name in TABLES if not (folder / name).is_file()]:
        return f"{absent} are missing"
    wanted = set()
    for stage in stages:
        cfg, name = stage.cfg, stage.writes[0].name
        if stage.kind == "teacher" or stage.kind in ADAPTORS:
            wanted.add((cfg.setting, cfg.network, "adaptor" if stage.kind in ADAPTORS else "teacher", name))
        elif stage.kind in ("a-KD", "EAF-KD"):
            wanted.add((cfg.setting, cfg.network, stage.kind, f"{cfg.adaptor} {cfg.student_network}"))
    rows = csv.DictReader((folder / "accuracy.csv").read_text(encoding="utf-8").splitlines())
    found = {(row["Setting"], row["Teachers"], row["Kind"], row["Model"]) for row in rows}
    return f"rows: {sorted(found ^ wanted)}" if found != wanted else ""


def only(stages: list[Stage], names: str) -> list[Stage]:
    """Returns the stages with these names; each needs only those of its needs that are among them."""
    if names == EVERY:
        return stages
    kept = names.split(",")
    return [
        replace(stage, needs=tuple(name for name in stage.needs if name in kept))
        for stage in stages
        if stage.name in kept
    ]


def main() -> None:
    names = sys.argv.pop(1)
    reproduce.paper = lambda cfg: only(paper(cfg), names)
    guarded(reproduce.main)


if __name__ == "__main__":
    main()
