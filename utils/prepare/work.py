"""Provides the commands with common options, checks of folders, a pool of processes and the list of failures."""

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import cv2
from tqdm import tqdm

from config.config import Config
from config.paths import expanded
from utils.data import images
from utils.data.listing import entries
from utils.errors import InputError
from utils.storage.files import write_csv
from utils.threads import map_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")
TOGETHER = 64  # items sent to a process at once


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the option --processes."""

    def whole_number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,4}", text):
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
        return int(text)

    words = "that decode images (0: as many as there are cores)"
    parser.add_argument("--processes", type=whole_number, default=0, metavar="N", help=words)


def path_of(text: str) -> Path:
    """Parses a path for `add_argument`, with ~ expanded.

    Refuses "", which an unset shell variable gives, since it would mean ".".
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    try:
        return Path(expanded(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def groups_of(text: str) -> tuple[str, ...]:
    """Parses a comma-separated list of groups. Raises InputError as the setting ethnicities does."""
    return Config(ethnicities=tuple(filter(None, map(str.strip, text.split(","))))).ethnicities


def new_folder(output: Path) -> Path:
    """Returns the absolute path of a folder to create ("." has no name). Raises InputError if it is not empty."""
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir()) or os.path.ismount(output)):
        raise InputError(f"{output} is there already: set --output to a new folder.")
    return output


def refuse_inside(output: Path, source: Path) -> None:
    """Raises InputError if the output folder is the source folder or lies inside it."""
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise InputError(f"{output} lies in {source}: set --output to a folder of its own.")


def refuse_filled(output: Path, names: Iterable[str]) -> None:
    """Raises InputError if a folder holds files other than these, hidden and partial ones."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder: set --output to a new one.")
    held = [entry.name for entry in entries(output)] if output.exists() else []
    if other := sorted(name for name in held if name not in names and not name.endswith(".partial")):
        raise InputError(f"{output} holds {other[0]}, which is not of this command: set --output to a new folder.")


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], total: int, title: str, processes: int = 0
) -> Iterator[Result]:
    """Maps `function` over the items in a pool of processes (0: one per core); yields the results in order.

    Shows a progress bar. Function and items must be picklable. Processes receive TOGETHER items at a time, and no more
    processes are started than there are such batches; a single batch is done in this process. Raises InputError if a
    process is killed.
    """
    processes = min(processes or os.cpu_count() or 1, math.ceil(total / TOGETHER))
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc=title, total=total, unit=" images", disable=None))
        if processes <= 1:
            results: Iterator[Result] = map(function, items)
        else:
            # Spawned, since forking a process that has threads can deadlock.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_initialize)
            stack.callback(pool.shutdown, cancel_futures=True)
            with _interrupts_blocked():  # new processes inherit it: Ctrl-C must not end one while it imports
                for _ in range(processes):
                    pool.submit(os.getpid)  # starts one, since none is idle yet
            lists = map_ahead(pool, functools.partial(_map, function), _batches(items), 4 * processes)
            results = chain.from_iterable(lists)
        try:
            for result in results:
                bar.update()
                yield result
        except BrokenProcessPool as error:
            raise InputError(
                "A process was killed, perhaps for want of memory: give the same command again, with fewer --processes."
            ) from error


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delays SIGINT until the end of the context, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(items: Iterable) -> Iterator[tuple]:
    left = iter(items)
    while batch := tuple(islice(left, TOGETHER)):
        yield batch


def _map(function: Callable[[Item], Result], items: tuple[Item, ...]) -> list[Result]:
    return [function(item) for item in items]


def _initialize() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    images.prepare_process()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: after a SIGKILL of the parent nothing else would."""
    multiprocessing.parent_process().join()
    os._exit(1)


def write_failures(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Writes failures as CSV. Without a failure, an existing file of an earlier run is reduced to its header."""
    if not rows and not path.exists():
        return
    write_csv(path, [header, *rows])
