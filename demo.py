"""Every stage of MST-KD on generated faces: the commands that a user types, one after another, then the result table.

Writes  demo/ (demo-<seed>/): generated faces, run folders, and in output/evaluation tables, pictures and report.html
Run     python demo.py [--seed 1]   (or: make demo)
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import InputError
from utils.synthetic import generate

GROUPS = ("African", "Asian", "Caucasian", "Indian")
"""Names only: the scripts look for folders of these names. The faces are generated and show nobody."""

# A narrow network on a few faces learns with a softer margin and a larger learning rate than a wide one on a million.
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
    ("-m eval.evaluation", "--report"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides the generated faces and the training")
    seed = parser.parse_args().seed
    if seed < 0:
        parser.error("seed must be 0 or more.")
    folder = Path("demo" if seed == 0 else f"demo-{seed}")
    faces, output = folder / "faces", folder / "output"
    paths = f"--data {faces}/train --pairs {faces}/pairs --output {output} --cache {folder}/cache --seed {seed}"

    print(f"Drawing generated faces in {faces}: not photographs, and the group names mean nothing.", flush=True)
    started = time.monotonic()
    generate(faces, GROUPS, identities=60, images=16, pairs=300, seed=seed)
    times = [("drawing the faces", time.monotonic() - started)]
    for script, own in STAGES:
        command = f"{script} {paths} {SMALL} {own}".strip()
        print(f"\n$ python {command}", flush=True)
        started = time.monotonic()
        status = run_stage(command)
        if status:
            sys.exit(status)
        times.append((f"{script} {own}".strip(), time.monotonic() - started))

    print("\nSeconds per stage")
    for name, seconds in [*times, ("together", sum(seconds for _, seconds in times))]:
        print(f"  {seconds:6.0f}  {name}")
    print(f"\nAll tables and pictures on one page: {output}/evaluation/report.html")
    print("For real data, edit config/config.py and run the same scripts in the same order, beginning with")
    print("  python train.py --data data/BUPT-BalancedFace --pairs data/RFW")


def run_stage(command: str) -> int:
    """Runs a stage and waits for its end, also when a signal comes: the stage saves what it has, then it ends."""
    processes = []
    # Ctrl-C reaches the stage from the terminal by itself; SIGTERM has to be handed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: [process.send_signal(number) for process in processes])
    processes.append(subprocess.Popen([sys.executable, *shlex.split(command)]))
    return processes[0].wait()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"demo.py: {error}")
