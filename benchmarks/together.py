"""Trains several networks on one device at the same time, each in its own process, for `benchmarks.gpu`."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config.config import Config
from utils.data.store import ImageStore

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds, after which a run is killed


def trained_together(count: int, cfg: Config, work: Path) -> str:
    """Starts `count` runs of train.py at the same time and returns how they ended; they write below `work`.

    Each trains the network All for two epochs and is verified after each. A run must end well or with one sentence. Any
    other end is FAILED in the result, and what the run has printed is printed to standard error.
    """
    names = ("data", "pairs", "cache", "device", "network", "batch_size")
    options = [f"--{name}={getattr(cfg, name)}" for name in names]
    command = [sys.executable, "train.py", "--is_standalone", *options, "--num_epoch=2", "--evaluation_groups=Asian"]

    def run(number: int) -> subprocess.CompletedProcess:
        whole = [*command, f"--output={work / str(number)}"]
        return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)

    with ThreadPoolExecutor(count) as pool:
        runs = [*pool.map(run, range(count))]
    rates = [re.findall(r"([\d,]+) images/s", run.stdout)[-1] for run in runs if run.returncode == 0]
    together, steps = sum(int(rate.replace(",", "")) for rate in rates), len(ImageStore(cfg).images) // cfg.batch_size
    said = f"{len(rates)} of {count} ended well, at {together:,} images/s together in an epoch of {steps} steps"
    return "; ".join([said, *(ending(run) for run in runs if run.returncode)])


def ending(run: subprocess.CompletedProcess) -> str:
    """Returns the sentence that a run of a script has ended with, FAILED and its last line if that is none."""
    last = run.stderr.strip().rpartition("\n")[2]
    if run.returncode == 2 and "Traceback" not in run.stderr:
        return last
    print(run.stderr, file=sys.stderr)
    return f"FAILED with status {run.returncode}: {last}"
