"""Runs every stage of MST-KD on generated faces, with the commands that a user types, and prints the result table.

Writes  demo/ (demo-<seed>/): generated faces, run folders, and in output/evaluation tables, pictures and report.html
Run     python demo.py [--seed 1]   (or: make demo)
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from config.config import Config
from utils.data.synthetic import generate
from utils.process import guarded
from utils.stages.paper import Stage
from utils.stages.runner import Runner

GROUPS = ("African", "Asian", "Caucasian", "Indian")
"""Names of folders that the scripts expect. The faces in them are generated, and show no person."""

# A narrow network on few faces needs a smaller margin and a larger learning rate than a wide one on a million faces.
SMALL = (
    "--network iresnet_tiny --student_network iresnet_tiny --ada_student_network iresnet_tiny --batch_size 32 --lr 0.3 "
    "--s 16 --m 0.2 --std 0.02 --num_epoch 12 --num_epoch_fc 20"
)
STAGES = (
    ("baseline_data_split.py", ""),
    ("train.py", ""),
    ("extract_all.py", "--flip_targets"),
    ("fc_EArc.py", "--flip_targets"),
    ("dual_layer_EAF-Fusion.py", ""),
    ("dual_layer_EAF-Fusion.py", "--has_dropout"),
    ("KD_alone.py", "--num_epoch 14"),
    ("KD_CEL.py", "--num_epoch 14"),
    ("KD_AdaDistill.py", "--num_epoch 14"),
    ("-m eval.evaluation", "--report --corrections"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated faces and of the training")
    seed = parser.parse_args().seed
    if seed < 0:
        parser.error("seed must be 0 or more.")
    folder = Path("demo" if seed == 0 else f"demo-{seed}")
    faces = folder / "faces"
    print(f"Drawing generated faces in {faces}: not photographs, and the group names mean nothing.", flush=True)
    started = time.monotonic()
    generate(faces, GROUPS, identities=60, images=16, pairs=300, seed=seed)
    drawn = time.monotonic() - started
    runner = Runner(stages(folder, seed))
    if not runner.run():
        sys.exit(1)

    times = {"drawing the faces": drawn, **runner.seconds}
    print("\nSeconds per stage")
    for name, seconds in [*times.items(), ("together", sum(times.values()))]:
        print(f"  {seconds:6.0f}  {name}")
    print(f"\nAll tables and pictures on one page: {folder}/output/evaluation/report.html")
    print("For real data, edit config/config.py and run the same scripts in the same order, beginning with")
    print("  python train.py --data data/BUPT-BalancedFace --pairs data/RFW")


def stages(folder: Path, seed: int) -> list[Stage]:
    """Returns all stages in order; each needs the one before it."""
    faces = folder / "faces"
    paths = f"--data {faces}/train --pairs {faces}/pairs --output {folder}/output --cache {folder}/cache --seed {seed}"
    found: list[Stage] = []
    for script, own in STAGES:
        cfg = Config.from_args(shlex.split(f"{paths} {SMALL} {own}"))
        needs = tuple(stage.name for stage in found[-1:])
        found.append(Stage(f"{script} {own}".strip(), script, cfg, needs))
    return found


if __name__ == "__main__":
    guarded(main)
