"""Times functions, and the epochs of the training loop, for all benchmarks."""

import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

from config.config import Config
from utils.data.columns import Batch, Column
from utils.data.faces import Faces

REPEATS = 5
EPOCHS = REPEATS + 1


def wait() -> None:
    """Synchronises the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates(units: int, *ways: Callable[[], object]) -> list[float]:
    """Returns units per second of each way, as the median of REPEATS rounds after warm-up; the ways alternate.

    On a GPU a way is called repeatedly for at least 0.2 s per round, since kernels are launched asynchronously.
    """
    times, calls = [[] for _ in ways], [1] * len(ways)
    for repeat in range(-1, REPEATS + 1):
        for k, way in enumerate(ways):
            wait()
            started = time.perf_counter()
            for _ in range(calls[k]):
                way()
            wait()
            taken = (time.perf_counter() - started) / calls[k]
            if repeat == 0 and torch.cuda.is_available():
                calls[k] = math.ceil(0.2 / taken)
            elif repeat > 0:
                times[k].append(taken)
    return [units / statistics.median(taken) for taken in times]


def graphs() -> int:
    """Returns how many graphs torch.compile has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def adaptor_losses(adaptor: nn.Module, header: nn.Module) -> Callable:
    """Returns the loss function of an adaptor for `fit`."""

    def losses(embedding, label):
        return {"eaf": F.cross_entropy(header(F.normalize(adaptor(embedding)), label), label)}

    return losses


class Timed(Faces):
    """Measures how long the steps of each epoch of `fit` take, reader included; a training set made of arrays.

    Every row is seen `times` times per epoch. Pass `validate` and EPOCHS epochs to `fit`; the first epoch is for
    warm-up and compilation.
    """

    def __init__(self, cfg: Config, columns: dict[str, np.ndarray | tuple], flip: bool, times: int = 1):
        self.cfg, self.flip, self.times = cfg, flip, times
        self.sources, self.identities = {}, ()
        self.columns = {name: Column(v if isinstance(v, tuple) else (v,)) for name, v in columns.items()}
        self.rows = np.arange(len(self.columns["label"].arrays[0]))
        self.taken: list[float] = []

    def __len__(self) -> int:
        size = self.cfg.batch_size
        return self.times * (len(self.rows) // size) * size

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        self._started = time.perf_counter()
        for _ in range(self.times):
            yield from super().batches(epoch, first)

    def validate(self) -> tuple[dict[str, float], float]:
        wait()
        self.taken.append(time.perf_counter() - self._started)
        return {}, 0.0

    def rate(self) -> float:
        """Returns rows per second, as the median over all epochs except the first."""
        return len(self) / statistics.median(self.taken[1:])
