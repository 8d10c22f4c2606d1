"""Rank and world size of this process. Imports no PyTorch, since processes that only read images need none."""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from config.config import Config


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same environment variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    return _group().get_rank() if _group() else 0


def is_first() -> bool:
    return rank() == 0


def total_batch(cfg: Config) -> int:
    """Returns the number of images or rows per step of all ranks and accumulated batches together."""
    return cfg.batch_size * cfg.accumulate * (1 if cfg.global_batch else world_size())


def _group() -> ModuleType | None:
    """Returns torch.distributed if its default process group is initialised."""
    module = sys.modules.get("torch.distributed")
    return module if module and module.is_initialized() else None


def launcher() -> str:
    """Returns the start of a command line with the present number of processes, without the address of the machines."""
    if not is_launched():
        return "python"
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    where = ["--standalone"] if machines == "1" else ["--nnodes", machines]
    # Without the two dashes torchrun would read settings such as --s as abbreviations of its own options.
    return " ".join(["torchrun", *where, "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "--"])


def share_of_cores() -> int:
    """Returns this process's share of the machine's cores if OMP_NUM_THREADS is 1, torchrun's default; otherwise 0.

    A user who wants one thread sets num_threads, because a 1 of the user looks like torchrun's.
    """
    if not is_launched() or os.environ.get("OMP_NUM_THREADS") != "1":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def first_of_machine_before() -> Iterator[bool]:
    """Context that the first process of each machine enters before the others; yields whether this process is first."""
    if world_size() == 1:
        yield True
        return
    from utils.distributed.collectives import wait_for_all

    is_local_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_local_first:
        wait_for_all()
    yield is_local_first
    if is_local_first:
        wait_for_all()
