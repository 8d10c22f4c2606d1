"""Starts and ends the process group of a script that runs under torchrun; in any other process nothing happens here.

PyTorch and torchrun do most of it: gloo raises an error as soon as a peer's connection is closed, and torchrun's agent
terminates the other ranks when one fails. This module adds what they lack: a sentence that names a rank that did not
start, one message instead of one per rank, and restarts on one machine.
"""

import dataclasses
import itertools
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from config.config import Config
from utils.distributed.collectives import require_same, set_cpu_group, wait_for_all
from utils.distributed.world import is_launched, world_size
from utils.errors import InputError

START_TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for all others to start."""

TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives. A killed rank is noticed at once; an unreachable machine only after this."""

CPU_TIMEOUT = timedelta(days=7)
"""Timeout of the CPU group's collectives, in which ranks also wait while rank 0 decodes millions of images."""

BY_MACHINE = ("data", "pairs", "cache", "num_threads", "num_workers", "device_cache_gb")
"""Settings that may differ between machines. The contents of `data` and `pairs` are compared instead."""

_store: dist.Store | None = None
_connections = itertools.count()  # of this process, which may run several scripts


def connect() -> None:
    """Connects to the ranks' store, and silences standard output and progress bars on all ranks but 0.

    Raises InputError if the store cannot be reached.
    """
    global _store
    if not is_launched() or _store is not None:
        return
    attempt = _attempt()
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(
            f"The store at {address} through which processes connect cannot be reached ({reason}): "
            "give torchrun another --master_port, or --standalone."
        ) from error
    _store = dist.PrefixStore(f"{attempt} {next(_connections)}", store)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # tqdm shows a bar only on a terminal


def _attempt() -> str:
    """Returns the number of torchrun's attempt, which separates its keys in the store from those of killed ranks.

    torchrun restarts all ranks on the same store, where gloo would find the addresses of killed ones (PyTorch 2.14).
    Machines do not agree on the number, so InputError is raised if several of them share a store and may restart.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise InputError(
            "On several machines --max-restarts needs --rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "the environment of torchrun."
        )
    return "0"


def join(cfg: Config, device: torch.device) -> None:
    """Initialises the default process group, with NCCL on GPUs and gloo on CPUs, and gloo's group of the CPUs.

    Raises InputError if a rank does not start or has no GPU, and if ranks have other settings or kinds of devices.
    """
    if _store is None:
        return
    if not dist.is_initialized():
        if device.type == "cuda":
            _set_gpu(int(os.environ.get("LOCAL_RANK", 0)), _store)
        place: dict[str, Any] = {
            "store": _store,
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
        }
        _wait_for_start(**place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **place)
        set_cpu_group(dist.new_group(backend="gloo", timeout=CPU_TIMEOUT))  # type: ignore[arg-type]
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in BY_MACHINE}
    require_same({**settings, "kind of device": device.type}, "Start all with the same settings.")


def _set_gpu(local: int, store: dist.Store) -> None:
    """Selects the GPU of process `local` of this machine: the only one that it sees, or the one with its number.

    Raises InputError if there is none, or if another process has it.
    """
    if not dist.is_nccl_available():
        raise InputError("device = 'cuda' under torchrun needs NCCL, which this PyTorch lacks: set device to cpu.")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else local  # schedulers such as SLURM may show each process its own GPU only
    if index >= count or store.add(f"processes on {torch.cuda.get_device_properties(index).uuid}", 1) > 1:
        raise InputError(
            f"Process {local} of this machine has no GPU of its own, it sees {count}: "
            "set torchrun's --nproc_per_node to as many, or device to cpu."
        )
    torch.cuda.set_device(index)


def _wait_for_start(store: dist.Store, rank: int, world_size: int) -> None:
    """Waits until all ranks have called this. Raises InputError that names the others after START_TIMEOUT.

    init_process_group would wait too, but it names no rank, and Python handles no signal meanwhile.
    """
    keys = [f"started {number}" for number in range(world_size)]
    store.set(keys[rank], "")
    end = time.monotonic() + START_TIMEOUT.total_seconds()
    while not store.check(keys):
        if store.check(["ended"]):
            sys.exit(1)  # another rank has ended and printed why
        if time.monotonic() > end:
            missing = ", ".join(str(number) for number, key in enumerate(keys) if not store.check([key]))
            raise InputError(f"Process {missing} has not started: see torchrun's log.")
        time.sleep(0.1)


def require_whole_batch(cfg: Config) -> None:
    """Raises InputError if the ranks cannot divide the global batch, or if one would normalise by a single image."""
    ranks, size = world_size(), cfg.batch_size
    if cfg.global_batch and (size % ranks or size < 2 * ranks):
        raise InputError(
            f"batch_size = {size} cannot be divided among {ranks} processes with global_batch: set it to a multiple of "
            f"{ranks}, {2 * ranks} or more."
        )


def close() -> None:
    """Waits for all ranks, so that none finds a connection closed while it still works, and destroys the groups."""
    global _store
    if dist.is_initialized():
        wait_for_all()
        dist.destroy_process_group()
    _store = None
    set_cpu_group(None)


def is_first_to_end() -> bool:
    """Returns True on the first rank that calls it, which prints why the run ends.

    Without a store it is the first rank of each machine.
    """
    if _store is None:
        return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    try:
        return _store.add("ended", 1) == 1
    except RuntimeError:  # the process that held the store has ended
        return True


def is_lost_peer(error: Exception) -> bool:
    """Whether gloo, NCCL or the store report by this error that another rank has ended."""
    words = ("by peer", "Broken pipe", "Connection refused", "likely closed", "remote process exited")
    return is_launched() and any(word in str(error) for word in words)
