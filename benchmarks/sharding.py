"""Three ways to train a header on several processes, side by side: the time of a step, and the most memory of a rank.

sharded        utils.losses.sharded: every rank holds its columns, and an exact softmax of our own goes over all
dense          every rank holds the whole kernel, and DistributedDataParallel averages its gradient
loss_parallel  every rank holds its columns, in PyTorch's own parts: plain operations, DTensor, loss_parallel

A step is forwards, backwards and SGD, with gloo on the CPU, one thread a rank. Where the memory of all ranks together
is more than the machine has to spare, it is computed and no time is given. The batch is per rank, as in training: the
logits of a rank are as many for any number N of ranks, of all samples and 1/N of the classes or, dense, of its own
samples and all classes, while kernel, gradient and momentum fall as 1/N unless they are dense.

Reads   nothing
Writes  benchmarks/results/sharding_cpu.json and .md
Run     python -m benchmarks.sharding [--classes 28000] [--ranks 2] [--batch 128] [--ways sharded] [--results folder]
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from config.config import Config
from utils.distributed.collectives import gathered
from utils.environment import versions
from utils.losses import ArcFace, margin_loss
from utils.losses.margin import cos_of_sum
from utils.losses.sharded import Gathered, columns_of, sharded
from utils.memory import free_memory
from utils.storage.files import write_json, write_text

CLASSES, RANKS, BATCH = (28_000, 100_000, 1_000_000, 10_000_000), (1, 2), 128
WAYS = ("sharded", "dense", "loss_parallel")
WIDTH, STEPS = 512, 5
SPARE = 0.8  # the part of the free memory that is used
RESULTS = Path("benchmarks/results")


def needed(way: str, classes: int, ranks: int, batch: int) -> int:
    """Bytes of a rank at the end of the backward pass, or in its middle for large batches."""
    columns, samples = (classes, batch) if way == "dense" else (-(-classes // ranks), ranks * batch)
    centres, logits = WIDTH * columns, samples * columns
    if way == "loss_parallel":  # the kernel's unit centres and their gradient, and more of what autograd keeps
        return 4 * (5 * centres + 4 * logits)
    # Kernel, momentum and gradient beside the logits and two gradients of them; before the kernel's, another of these.
    copies = 4 if way == "dense" and ranks > 1 else 3  # autograd's gradient, beside the bucket that it is copied into
    return 4 * max(copies * centres + 3 * logits, (copies - 1) * centres + 4 * logits)


class Parallel(nn.Module):
    """ArcFace over the columns of a rank, in PyTorch's own parts."""

    def __init__(self, classes: int, s: float = 64.0, m: float = 0.5):
        super().__init__()
        self.classes, self.s, self.m = classes, s, m
        self.own = columns_of(dist.get_rank(), classes)
        self.kernel = nn.Parameter(torch.empty(WIDTH, len(self.own)).normal_(0, 0.01))
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The mean loss of all ranks' samples; this and its backward pass are to be in `loss_parallel`."""
        label = gathered(label)
        cosine = F.normalize(Gathered.apply(embeddings)) @ F.normalize(self.kernel, dim=0)
        (rows,) = torch.where((label >= self.own.start) & (label < self.own.stop))
        places = rows, label[rows] - self.own.start
        logits = self.s * cosine.index_put(places, cos_of_sum(cosine[places].clamp(-1, 1), self.m))
        whole = DTensor.from_local(
            logits, self.mesh, [Shard(1)], shape=torch.Size((len(label), self.classes)), stride=(self.classes, 1)
        )
        return F.cross_entropy(whole, label)


def built(way: str, classes: int) -> tuple[nn.Parameter, Callable]:
    """A header's kernel, and the loss of a rank's embeddings and labels."""
    if way == "loss_parallel":
        header = Parallel(classes)
        return header.kernel, header
    header = (sharded(ArcFace) if way == "sharded" else ArcFace)(WIDTH, classes)
    if way == "sharded" or dist.get_world_size() == 1:
        return header.kernel, lambda *given: margin_loss(header, *given)
    wrapped = DistributedDataParallel(header, gradient_as_bucket_view=True)
    return header.kernel, lambda embeddings, label: F.cross_entropy(wrapped(embeddings, label), label)


def measure(way: str, classes: int, ranks: int, batch: int) -> dict:
    """Median seconds of a step and bytes of the rank that needs most; without them where it does not fit."""
    row = {"way": way, "classes": classes, "ranks": ranks, "batch": batch}
    row["computed"] = needed(way, classes, ranks, batch)
    if ranks * row["computed"] > SPARE * free_memory():
        return {**row, "seconds": None, "measured": None}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (way, ranks, classes, batch, Path(folder)), ranks)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    seconds, measured = map(max, zip(*found, strict=True))
    return {**row, "seconds": seconds, "measured": measured}


def _work(rank: int, way: str, ranks: int, classes: int, batch: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    _steps(way, ranks, batch, 1)  # libraries, and what they set aside
    before = _resident("VmRSS")
    times = _steps(way, classes, batch, STEPS)
    (folder / f"{rank}.json").write_text(json.dumps((statistics.median(times), _resident("VmHWM") - before)))
    dist.destroy_process_group()


def _steps(way: str, classes: int, batch: int, count: int) -> list[float]:
    """Seconds of each step but the first, which makes the momentum."""
    embeddings, label = torch.randn(batch, WIDTH, requires_grad=True), torch.randint(classes, (batch,))
    kernel, loss = built(way, classes)
    optimizer = torch.optim.SGD([kernel], 0.1, momentum=0.9, fused=True)
    times = []
    for _ in range(count + 1):
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        with loss_parallel() if way == "loss_parallel" else nullcontext():
            loss(embeddings, label).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times[1:]


def _resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure_all(
    classes: Sequence[int], ranks: Sequence[int], batch: int, results: Path, ways: Sequence[str] = WAYS
) -> None:
    kept = {"versions": versions(Config(device="cpu")), "rows": []}
    for number, processes, way in itertools.product(classes, ranks, ways):
        kept["rows"].append(measure(way, number, processes, batch))
        print(_line(kept["rows"][-1], kept["rows"]), flush=True)
        write_json(results / "sharding_cpu.json", kept)
        write_text(results / "sharding_cpu.md", report(kept))


def report(kept: dict) -> str:
    """The Markdown page of what was measured."""
    lines = [
        "# Steps of a header on several processes",
        "",
        f"Made by `python -m benchmarks.sharding` ({', '.join(f'{k} {v}' for k, v in kept['versions'].items() if v)}).",
        f"ArcFace on {WIDTH} numbers in fp32, SGD with momentum, gloo, one thread a rank, median of {STEPS} steps.",
        "Times is the step's time divided by the sharded one's.",
        "",
        "| classes | ranks | batch of a rank | way | s a step | times | GB of a rank, measured | computed |",
        "|--:|--:|--:|---|--:|--:|--:|--:|",
        *(_line(row, kept["rows"]) for row in kept["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict, rows: list[dict]) -> str:
    form = [row[name] for name in ("classes", "ranks", "batch")]
    ours = [
        one["seconds"] for one in rows if one["way"] == "sharded" and form == [one[name] for name in list(row)[1:4]]
    ]
    measured = "does not fit | |"
    if row["seconds"] is not None:
        times = f"{row['seconds'] / ours[0]:.2f}" if ours and ours[0] else ""
        measured = f"{row['seconds']:.3f} | {times} | {row['measured'] / 1e9:.2f}"
    return f"| {form[0]:,} | {form[1]} | {form[2]} | {row['way']} | {measured} | {row['computed'] / 1e9:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of processes")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of each process")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="some ways instead of all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written to")
    given = parser.parse_args()
    measure_all(given.classes, given.ranks, given.batch, given.results, given.ways)


if __name__ == "__main__":
    main()
