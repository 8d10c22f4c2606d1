"""Which of how many processes this one is, asked without importing PyTorch: those that only read images do without."""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from config.config import Config


def is_launched() -> bool:
    """Whether torchrun, or whoever sets the environment as it does, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    return _group().get_rank() if _group() else 0


def is_first() -> bool:
    return rank() == 0


def total_batch(cfg: Config) -> int:
    """Images (or rows) a step, of all processes together."""
    return cfg.batch_size if cfg.global_batch else cfg.batch_size * world_size()


def _group() -> ModuleType | None:
    """torch.distributed, where this process is in its default group."""
    module = sys.modules.get("torch.distributed")
    return module if module and module.is_initialized() else None


def launcher() -> str:
    """What starts as many processes as there are, before a script's name; where the machines meet is left out."""
    if not is_launched():
        return "python"
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    where = ["--standalone"] if machines == "1" else ["--nnodes", machines]
    # Without the dashes it takes settings that begin as its own do for its own.
    return " ".join(["torchrun", *where, "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "--"])


def share_of_cores() -> int:
    """This process's share of the cores that its machine gives, where torchrun allows it one; 0: nothing to change.

    That one may be a user's own wish cannot be seen: there is the setting num_threads.
    """
    if not is_launched() or os.environ.get("OMP_NUM_THREADS") != "1":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def first_of_machine_before() -> Iterator[bool]:
    """The first process of each machine goes through the block before the others; yields whether this is one."""
    if world_size() == 1:
        yield True
        return
    from utils.distributed.collectives import wait_for_all

    is_one = os.environ.get("LOCAL_RANK", "0") == "0"
    if not is_one:
        wait_for_all()
    yield is_one
    if is_one:
        wait_for_all()
