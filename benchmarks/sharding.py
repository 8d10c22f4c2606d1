"""A sharded header's step, forwards, backwards and SGD: its time, and the most memory that a rank needs for it.

Measured with gloo on the CPU, one thread a rank; where the memory of all ranks together is more than the machine has to
spare, it is computed and no time is given. The batch is per rank, as in training: a rank has the logits of all samples
and 1/N of the classes, which are as many for any N, while kernel, gradient and momentum fall as 1/N.

Reads   nothing
Writes  benchmarks/results/sharding_cpu.json and .md
Run     python -m benchmarks.sharding [--classes 28000] [--ranks 2] [--batch 128] [--results folder]
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from config.config import Config
from utils.checkpoint import versions
from utils.dataset import _free_memory
from utils.files import write_json, write_text
from utils.losses import ArcFace
from utils.sharding import margin_loss, sharded

CLASSES, RANKS, BATCH = (28_000, 100_000, 1_000_000, 10_000_000), (1, 2), 128
WIDTH, STEPS = 512, 5
SPARE = 0.8  # the part of the free memory that is used
RESULTS = Path("benchmarks/results")


def needed(classes: int, ranks: int, batch: int) -> int:
    """Bytes of a rank at the end of the backward pass, or in its middle for large batches."""
    centres = WIDTH * -(-classes // ranks)
    logits = ranks * batch * -(-classes // ranks)
    # Kernel, momentum and gradient beside the logits and two gradients of them; before the kernel's, another of these.
    return 4 * max(3 * centres + 3 * logits, 2 * centres + 4 * logits)


def measure(classes: int, ranks: int, batch: int) -> dict:
    """Median seconds of a step and bytes of the rank that needs most; without them where it does not fit."""
    row = {"classes": classes, "ranks": ranks, "batch": batch, "computed": needed(classes, ranks, batch)}
    if ranks * row["computed"] > SPARE * _free_memory():
        return {**row, "seconds": None, "measured": None}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (ranks, classes, batch, Path(folder)), ranks)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    seconds, measured = map(max, zip(*found, strict=True))
    return {**row, "seconds": seconds, "measured": measured}


def _work(rank: int, ranks: int, classes: int, batch: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    _steps(ranks, batch, 1)  # libraries, and what they set aside
    before = _resident("VmRSS")
    times = _steps(classes, batch, STEPS)
    (folder / f"{rank}.json").write_text(json.dumps((statistics.median(times), _resident("VmHWM") - before)))
    dist.destroy_process_group()


def _steps(classes: int, batch: int, count: int) -> list[float]:
    """Seconds of each step but the first, which makes the momentum."""
    embeddings, label = torch.randn(batch, WIDTH, requires_grad=True), torch.randint(classes, (batch,))
    header = sharded(ArcFace)(WIDTH, classes)
    optimizer = torch.optim.SGD(header.parameters(), 0.1, momentum=0.9, fused=True)
    times = []
    for _ in range(count + 1):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        margin_loss(header, embeddings, label).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times[1:]


def _resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure_all(classes: Sequence[int], ranks: Sequence[int], batch: int, results: Path) -> None:
    kept = {"versions": versions(Config(device="cpu")), "rows": []}
    for form in itertools.product(classes, ranks):
        kept["rows"].append(measure(*form, batch))
        print(_line(kept["rows"][-1]), flush=True)
        write_json(results / "sharding_cpu.json", kept)
        write_text(results / "sharding_cpu.md", report(kept))


def report(kept: dict) -> str:
    """The Markdown page of what was measured."""
    lines = [
        "# Steps of a sharded header",
        "",
        f"Made by `python -m benchmarks.sharding` ({', '.join(f'{k} {v}' for k, v in kept['versions'].items() if v)}).",
        f"ArcFace on {WIDTH} numbers in fp32, SGD with momentum, gloo, one thread a rank, median of {STEPS} steps.",
        "",
        "| classes | ranks | batch of a rank | s a step | GB of a rank, measured | computed |",
        "|--:|--:|--:|--:|--:|--:|",
        *map(_line, kept["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    measured = "does not fit | " if row["seconds"] is None else f"{row['seconds']:.3f} | {row['measured'] / 1e9:.2f}"
    return f"| {row['classes']:,} | {row['ranks']} | {row['batch']} | {measured} | {row['computed'] / 1e9:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of processes")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of each process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written to")
    given = parser.parse_args()
    measure_all(given.classes, given.ranks, given.batch, given.results)


if __name__ == "__main__":
    main()
