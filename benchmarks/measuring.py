"""Times functions, reads the memory of a process and writes results, for all benchmarks."""

import contextlib
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo

from utils.storage.files import write_json, write_text

REPEATS = 5
RESULTS = Path("benchmarks/results")


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


@contextlib.contextmanager
def compiling(is_expected: bool, what: str) -> Iterator[None]:
    """Raises RuntimeError at the end if torch.compile was expected to compile a graph in this context and did not."""
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    yield
    if is_expected and counts["unique_graphs"] == before:
        raise RuntimeError(f"{what} was not compiled.")


def memory(field: str) -> int:
    """Returns a field of /proc/self/status in bytes (Linux only): VmRSS now, VmHWM at the peak."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_own_process(function: Callable, *arguments):
    """Calls a function in a new process and returns its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def made_by(module: str, versions: dict[str, str]) -> str:
    """Returns the line of a results page that names its command and the versions."""
    return (
        f"Made by `python -m {module}` ({', '.join(f'{name} {value}' for name, value in versions.items() if value)})."
    )


def write(path: Path, kept: dict, page: str) -> None:
    """Writes results as JSON, and as a Markdown page beside it."""
    write_json(path, kept)
    write_text(path.with_suffix(".md"), page)
