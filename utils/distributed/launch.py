"""How the processes that torchrun has started find each other, and how one of them says why they end."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from config.config import Config
from utils.distributed.collectives import require_same, use_control, wait_for_all
from utils.distributed.world import is_launched, world_size
from utils.errors import InputError

ARRIVAL = 300.0  # seconds in which all have to come, once the first is there
RESTART = 30.0  # seconds in which one that has ended may have been started again
GRACE = 5.0  # seconds in which whoever can end by itself does, when another process has died


class Ended(Exception):
    """Another process has ended before all had met."""


class Meeting:
    """The store that torchrun keeps for its processes, and this process in it.

    The store outlives its processes, and machines count attempts apart: processes know each other by names that they
    choose afresh. Rank 0's name is that of the meeting. Raises InputError where the store cannot be reached or made.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
            self._store, self._name = dist.PrefixStore("meeting", store), uuid.uuid4().hex
            self._store.set(f"hello {self.rank}", self._name)
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise InputError(
                f"Processes cannot meet at {where} ({reason}): give torchrun another --master_port, or --standalone."
            ) from error
        self.store: dist.Store | None = None  # that of these processes only, when all are there

    def complete(self) -> None:
        """Waits for all. Raises Ended where one has ended, InputError where one does not come."""
        arrived, looked_at, ended_at = time.monotonic(), 0.0, None
        while (name := self._name_of_all()) is None:
            now = time.monotonic()
            if now - looked_at > 0.02 * self.world_size:  # it asks for all of them
                looked_at, ended_at = now, (ended_at or now) if self._has_ended() else None
            if ended_at and now > ended_at + RESTART:
                raise Ended
            if now > arrived + ARRIVAL:
                raise InputError(f"Process {self._missing()} has not come: see what torchrun says of it.")
            time.sleep(0.05)  # in Python, where a signal is heard
        self.store = dist.PrefixStore(name, self._store)

    def _missing(self) -> str:
        """Who has not answered rank 0, or to other ranks who has not come, or rank 0, which does not answer."""
        names = dict(enumerate(self._names()))
        if self.rank:
            missing = [rank for rank, name in names.items() if name is None] or [0]
        else:
            missing = [rank for rank, name in names.items() if rank and not self._has_answered(name)]
        return ", ".join(map(str, missing))

    def _name_of_all(self) -> str | None:
        """The meeting's name, as soon as all know it."""
        if self.rank:
            name = self._get(f"welcome {self._name}")
            if name is None:
                return None
            self._store.set(f"{name} has {self._name}", "")
            return name if self._get(f"{name} is complete") is not None else None
        names = self._names()
        for name in filter(None, names):
            self._store.set(f"welcome {name}", self._name)
        if not all(map(self._has_answered, names[1:])):
            return None
        self._store.set(f"{self._name} is complete", "")
        return self._name

    def _names(self) -> list[str | None]:
        """By rank the last that has come."""
        return [self._get(f"hello {rank}") for rank in range(self.world_size)]

    def _has_answered(self, name: str | None) -> bool:
        return name is not None and self._get(f"{self._name} has {name}") is not None

    def _has_ended(self) -> bool:
        return any(name and self._get(f"{name} has ended") is not None for name in self._names())

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def speaks(self) -> bool:
        """Whether this process is the first to say how the run ends; before all have met, the first of its machine."""
        store, key = self.store, "speaker"
        try:
            if store is None:
                self._store.set(f"{self._name} has ended", "")
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
                store, key = self._store, f"speaker of {os.environ.get('GROUP_RANK')} {os.getppid()} {attempt}"
            return store.compare_set(key, "", self._name).decode() == self._name
        except RuntimeError:  # it has ended with the process that kept it
            return True


class Lookout:
    """Threads that notice the end of another process where this one would wait: a GPU's wait hears no signal.

    Rank 0 watches all, and all watch rank 0. `on_loss` is called in a thread, after a time in which this process may
    have ended by itself.
    """

    def __init__(self, group: dist.ProcessGroup, on_loss: Callable[[Exception], None]):
        self._group, self._on_loss = group, on_loss
        self._others = [0] if dist.get_rank() else [*range(1, dist.get_world_size())]
        self._threads = [threading.Thread(target=self._look, args=(rank,), daemon=True) for rank in self._others]
        for thread in self._threads:
            thread.start()

    def _look(self, rank: int) -> None:
        try:
            dist.recv(torch.zeros(1), rank, self._group)  # a farewell
        except RuntimeError as error:
            time.sleep(GRACE)
            end_with(self._on_loss, error)

    def leave(self) -> None:
        """All ranks say farewell."""
        for rank in self._others:
            dist.send(torch.zeros(1), rank, self._group)
        for thread in self._threads:
            thread.join()


def end_with(on_loss: Callable[[Exception], None], error: Exception) -> None:
    """Calls it, and ends this process where that takes long: the store may be held by a thread that waits."""
    last = threading.Timer(GRACE, os._exit, (1,))
    last.daemon = True
    last.start()
    on_loss(error)


@contextlib.contextmanager
def limited(on_loss: Callable[[Exception], None]) -> Iterator[None]:
    """Context that ends this process where it takes longer than ARRIVAL: in it no signal is heard."""
    late = threading.Timer(ARRIVAL, end_with, (on_loss, Ended("or does not come")))
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()


BY_MACHINE = ("data", "pairs", "cache", "num_threads", "num_workers", "device_cache_gb")
"""Settings that may differ from machine to machine; of `data` and `pairs` the content is compared."""

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another in a step; one that has died is noticed at once, by torchrun."""

LONG = timedelta(days=7)
"""The same where one rank works for all: it may decode millions of images."""

ALL_ALONG = timedelta(days=36_500)
"""The same for those on the lookout, who wait from the first step to the last."""

_meeting: Meeting | None = None
_lookout: Lookout | None = None


def meet() -> None:
    """Finds the place where the processes that torchrun has started meet; from here on one of them speaks for all.

    Raises InputError where it is taken or not given.
    """
    global _meeting
    if not is_launched() or _meeting is not None:
        return
    _meeting = Meeting()
    if _meeting.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        sys.stderr = _NoTerminal(sys.stderr)


class _NoTerminal:
    """A stream for messages only: progress bars are silent where there is no terminal."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False


def join(cfg: "Config", device: torch.device, on_loss: Callable[[Exception], None]) -> None:
    """Makes the processes that have met the default group, on `device`'s kind; `on_loss` is that of `Lookout`.

    Raises InputError where they have not the same settings or devices, or where one does not come.
    """
    global _lookout
    if _meeting is None:
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise InputError("device = 'cuda' under torchrun needs NCCL, which this PyTorch lacks: set device to cpu.")
        if local >= torch.cuda.device_count():
            raise InputError(
                f"Process {local} of this machine has no GPU, of which it has {torch.cuda.device_count()}: "
                "set torchrun's --nproc_per_node to as many, or device to cpu."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _meeting.complete()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        place: dict[str, Any] = {"store": _meeting.store, "rank": _meeting.rank, "world_size": _meeting.world_size}
        with limited(on_loss):
            dist.init_process_group(backend, timeout=PATIENCE, **place)
            use_control(dist.new_group(backend="gloo", timeout=LONG))  # type: ignore[arg-type]
            _lookout = Lookout(dist.new_group(backend="gloo", timeout=ALL_ALONG), on_loss)  # type: ignore[arg-type]
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in BY_MACHINE}
    require_same({**settings, "kind of device": device.type}, "Start all with the same settings.")


def require_whole_batch(cfg: "Config") -> None:
    """Raises InputError where the batch of all cannot be divided, or leaves a process one image to normalise by."""
    ranks, size = world_size(), cfg.batch_size
    if cfg.global_batch and (size % ranks or size < 2 * ranks):
        raise InputError(
            f"batch_size = {size} cannot be divided among {ranks} processes with global_batch: set it to a multiple of "
            f"{ranks}, {2 * ranks} or more."
        )


def leave() -> None:
    """Waits for the others, so that none sees an end before its own, and leaves the group."""
    global _meeting, _lookout
    if dist.is_initialized():
        wait_for_all()
        _lookout.leave()
        dist.destroy_process_group()
    _meeting = _lookout = None
    use_control(None)


def number() -> int | None:
    """The rank of this process, also before it has joined; None where it has met nobody."""
    return _meeting.rank if _meeting else None


def speaks() -> bool:
    """Whether this process is the first of all to say how the run ends; True once, for one.

    Where it has met nobody, the first of its machine does.
    """
    return _meeting.speaks() if _meeting else os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank has gone, as gloo, NCCL or the store say it."""
    words = ("by peer", "Broken pipe", "Connection refused", "likely closed", "remote process exited")
    return isinstance(error, Ended) or (world_size() > 1 and any(word in str(error) for word in words))
