"""Compares three ways to train a header on several ranks: time of a step, and peak memory of a rank.

sharded        utils.losses.sharded: every rank holds a shard of the columns; our exact softmax over all shards
dense          every rank holds the whole kernel; DistributedDataParallel averages its gradient
loss_parallel  every rank holds a shard of the columns; plain operations, DTensor and PyTorch's loss_parallel

A step is forward, backward and SGD, with gloo on the CPU, one thread per rank. If all ranks together need more memory
than is free, only the computed memory is reported. The batch is per rank, as in training, so the logits of a rank have
the same size for any number N of ranks: all samples x 1/N of the classes or, dense, its own samples x all classes.
Kernel, gradient and momentum shrink as 1/N, except dense.

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

from benchmarks.measuring import RESULTS, made_by, memory, write
from config.config import Config
from utils.distributed.collectives import gathered
from utils.environment import versions
from utils.losses import ArcFace
from utils.losses.margin import cos_of_sum
from utils.losses.sharded import Gathered, columns_of, sharded
from utils.memory import free_memory

CLASSES, RANKS, BATCH = (28_000, 100_000, 1_000_000, 10_000_000), (1, 2), 128
WAYS = ("sharded", "dense", "loss_parallel")
WIDTH, STEPS = 512, 5
SPARE = 0.8  # share of the free memory that may be used


def needed(way: str, classes: int, ranks: int, batch: int) -> int:
    """Computes the peak bytes of a rank: at the end of the backward pass, or within it for large batches."""
    columns, samples = (classes, batch) if way == "dense" else (-(-classes // ranks), ranks * batch)
    centres, logits = WIDTH * columns, samples * columns
    if way == "loss_parallel":  # also the normalised kernel, its gradient, and more tensors saved by autograd
        return 4 * (5 * centres + 4 * logits)
    # Kernel, momentum and gradient, with the logits and two gradients of them. Before the kernel's gradient exists,
    # there is a third gradient of the logits.
    copies = 4 if way == "dense" and ranks > 1 else 3  # DDP also has the bucket that the gradient is copied into
    return 4 * max(copies * centres + 3 * logits, (copies - 1) * centres + 4 * logits)


class Parallel(nn.Module):
    """Computes ArcFace with one shard of the classes per rank, by PyTorch's DTensor and loss_parallel."""

    def __init__(self, classes: int, s: float = 64.0, m: float = 0.5):
        super().__init__()
        self.classes, self.s, self.m = classes, s, m
        self.own = columns_of(dist.get_rank(), classes)
        self.kernel = nn.Parameter(torch.empty(WIDTH, len(self.own)).normal_(0, 0.01))
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss over the samples of all ranks, from embeddings (b, 512) and labels (b,) of this rank.

        Forward and backward pass must run within the context `loss_parallel`.
        """
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
    """Returns the kernel of a header, and the function from embeddings (b, 512) and labels (b,) to the loss."""
    if way == "loss_parallel":
        header = Parallel(classes)
        return header.kernel, header
    header = (sharded(ArcFace) if way == "sharded" else ArcFace)(WIDTH, classes)
    if way == "sharded" or dist.get_world_size() == 1:
        return header.kernel, header.loss
    wrapped = DistributedDataParallel(header, gradient_as_bucket_view=True)
    return header.kernel, lambda embeddings, label: F.cross_entropy(wrapped(embeddings, label), label)


def measure(way: str, classes: int, ranks: int, batch: int) -> dict:
    """Measures the median seconds of a step and the largest peak bytes of a rank; None if it does not fit."""
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
    _steps(way, ranks, batch, 1)  # loads the libraries and their buffers before memory is measured
    before = memory("VmRSS")
    times = _steps(way, classes, batch, STEPS)
    (folder / f"{rank}.json").write_text(json.dumps((statistics.median(times), memory("VmHWM") - before)))
    dist.destroy_process_group()


def _steps(way: str, classes: int, batch: int, count: int) -> list[float]:
    """Returns the seconds of each step except the first, which allocates the momentum."""
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


def measure_all(
    classes: Sequence[int], ranks: Sequence[int], batch: int, results: Path, ways: Sequence[str] = WAYS
) -> None:
    """Measures all combinations, and writes the results after each."""
    kept = {"versions": versions(Config(device="cpu")), "rows": []}
    for number, processes, way in itertools.product(classes, ranks, ways):
        kept["rows"].append(measure(way, number, processes, batch))
        print(_line(kept["rows"][-1], kept["rows"]), flush=True)
        write(results / "sharding_cpu.json", kept, report(kept))


def report(kept: dict) -> str:
    """Formats the measurements as a Markdown page."""
    lines = [
        "# Steps of a header on several processes",
        "",
        made_by("benchmarks.sharding", kept["versions"]),
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
