"""Runs stages as the commands that a user would type: in order, or several at a time, each on its own device."""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.process import StopSignals
from utils.stages.paper import Stage
from utils.stages.work import makespan
from utils.storage.files import read_json, write_json
from utils.storage.locks import refuse_if_locked
from utils.training.engine import duration

POLL = 0.05  # seconds between checks of the running stages
TAIL = 8  # last lines of the log of a failed stage that are printed


class Record:
    """A file of finished stages, each with its settings and the size and time of the files that it read and wrote."""

    def __init__(self, path: Path, sources: dict):
        """Reads the file; `sources` is the state of the input data. Raises InputError if the file is corrupted."""
        self._path, self._sources = path, json.loads(json.dumps(sources))
        self._stages = read_json(path) if path.exists() else {}

    def holds(self, stage: Stage, needed: list[Stage]) -> bool:
        """Returns True if the stage was finished with these settings and its inputs and outputs are unchanged.

        `needed` are the stages whose results it reads.
        """
        state = self._state(stage, needed)
        return all(state["writes"].values()) and self._stages.get(_key(stage)) == state

    def note(self, stage: Stage, needed: list[Stage]) -> None:
        """Records, by an atomic write, that a stage is finished; `needed` are the stages whose results it reads."""
        self._stages[_key(stage)] = self._state(stage, needed)
        write_json(self._path, self._stages)

    def _state(self, stage: Stage, needed: list[Stage]) -> dict:
        read = [path for one in needed for path in one.results]
        state = {"settings": asdict(stage.cfg), "sources": self._sources}
        state |= {"reads": stamps(read), "writes": stamps(stage.results)}
        return json.loads(json.dumps(state))


def _key(stage: Stage) -> str:
    """Returns the key of a stage in the record, which stages of other teachers' networks may share."""
    return f"{stage.cfg.network} {stage.name}"


def stamps(paths: list[Path]) -> dict[str, list[int]]:
    """Returns size in bytes and modification time in nanoseconds of each file; an empty list if it does not exist."""
    found = {}
    for path in paths:
        found[str(path)] = []
        with contextlib.suppress(OSError):
            stat = path.stat()
            found[str(path)] = [stat.st_size, stat.st_mtime_ns]
    return found


@dataclass
class _Running:
    stage: Stage
    device: str
    log: Path | None
    process: subprocess.Popen | None = None  # None while another process has locked what the stage writes
    share_before: float = 0.0  # share of the stage's work that an earlier attempt has done
    started: float = 0.0
    wait_is_printed: bool = False


class Runner:
    """Runs each stage as soon as all stages that it needs are finished, one at a time on each of `devices`.

    If a stage fails, all stages that do not need it still run. Ctrl-C and SIGTERM are forwarded to the running stages,
    which save and exit. Stages in `record` are skipped. Each stage writes to <logs>/<stage>.log, or to the terminal if
    `logs` is None. With `work`, the amount of work by stage in any common unit, the progress is printed after each
    stage; `share_done` returns the share of a stage's work that an interrupted attempt has done.
    """

    def __init__(
        self,
        stages: list[Stage],
        devices: tuple[str, ...] = ("",),
        record: Record | None = None,
        logs: Path | None = None,
        work: dict[str, float] | None = None,
        share_done: Callable[[Stage], float] = lambda _: 0.0,
    ):
        self._stages = {stage.name: stage for stage in stages}
        self._devices, self._record, self._logs = devices, record, logs
        self._work, self._share_done = work or {}, share_done
        self._waiting, self._running, self._finished = [*stages], [], set()
        self._done_here = 0.0  # work done since this process started
        self.seconds: dict[str, float] = {}  # run time by the stage's name
        self.failed: dict[str, str] = {}  # reason by the stage's name

    def run(self) -> bool:
        """Runs the stages; returns True if all are finished, else prints what failed and what was not started.

        Raises Interrupted on Ctrl-C and SIGTERM, after all running stages have exited.
        """
        with StopSignals() as stop:
            try:
                while self._waiting or self._running:
                    if stop.received:
                        self._stop_all(stop.received)
                        stop.leave("stopped, what was finished or saved is kept", stop.received)
                    self._start_ready()
                    if not self._running:
                        break
                    time.sleep(POLL)
                    for running in [*self._running]:
                        self._check_on(running)
            finally:
                self._stop_all(signal.SIGTERM)
        self._report_failures()
        return not self.failed

    def _needed(self, stage: Stage) -> list[Stage]:
        return [self._stages[name] for name in stage.needs]

    def _pass_over_finished(self) -> None:
        """Skips the stages that are finished; a stage follows those that it needs, so that one pass is enough."""
        for stage in [*self._waiting]:
            is_ready = self._finished.issuperset(stage.needs)
            if is_ready and self._record and self._record.holds(stage, self._needed(stage)):
                print(f"{stage.name} is finished: passed over.", flush=True)
                self._waiting.remove(stage)
                self._finished.add(stage.name)

    def _start_ready(self) -> None:
        self._pass_over_finished()
        for stage in [*self._waiting]:
            if not self._finished.issuperset(stage.needs):
                continue
            if free := [name for name in self._devices if name not in {one.device for one in self._running}]:
                self._waiting.remove(stage)
                log = self._logs / f"{stage.name}.log" if self._logs else None
                self._running.append(_Running(stage, free[0], log))
                self._start(self._running[-1])

    def _start(self, running: _Running) -> None:
        """Starts a stage, unless its outputs are locked: an earlier attempt may outlive the runner that started it."""
        stage = running.stage
        try:
            for path in stage.writes:
                refuse_if_locked(path)
        except InputError as error:
            if not running.wait_is_printed:
                print(f"{stage.name} waits: {error}", flush=True)
            running.wait_is_printed = True
            return
        running.started, running.share_before = time.monotonic(), self._share_done(stage)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if running.device:
            environment["CUDA_VISIBLE_DEVICES"] = running.device
        where = f"  ({running.device and f'device {running.device}, '}{running.log})" if running.log else ""
        print(f"\n$ {stage.command}{where}", flush=True)
        with contextlib.ExitStack() as files:
            options: dict[str, Any] = {}
            if running.log:
                running.log.parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(open(running.log, "a", encoding="utf-8"))
                print(f"$ {stage.command}", file=file, flush=True)
                options = {"stdout": file, "stderr": subprocess.STDOUT}
            command = [sys.executable, *stage.arguments]
            # In a process group of its own a stage gets Ctrl-C once, from `_stop_all`, and not from the terminal too.
            if os.name == "posix":
                options |= {"process_group": 0, "preexec_fn": _terminate_with_parent()}
            running.process = subprocess.Popen(command, env=environment, **options)

    def _check_on(self, running: _Running) -> None:
        if running.process is None:
            self._start(running)
            return
        status = running.process.poll()
        if status is None:
            return
        stage = running.stage
        self._running.remove(running)
        self.seconds[stage.name] = time.monotonic() - running.started
        if status:
            reason = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
            self.failed[stage.name] = f"{reason}; the last lines of {running.log}:" if running.log else f"{reason}."
            print(f"{stage.name} failed: {reason}.", flush=True)
            return
        self._finished.add(stage.name)
        if self._record:
            self._record.note(stage, self._needed(stage))
        if self._work:
            self._done_here += self._work[stage.name] * (1 - running.share_before)
            print(f"{stage.name} took {duration(self.seconds[stage.name])}. {self._progress()}", flush=True)

    def _progress(self) -> str:
        """Returns the share of all work that is done, and the remaining time at the rate of the stages run so far."""
        done = sum(self._work[name] for name in self._finished)
        share = f"{done / sum(self._work.values()):.1%} of the whole is done"
        if not self._done_here or len(self._finished) == len(self._stages):
            return f"{share}."
        spent = sum(seconds for name, seconds in self.seconds.items() if name in self._finished)
        pace = spent / self._done_here
        left = {
            stage.name: self._work[stage.name] * (1 - self._share_done(stage)) * pace
            for stage in (*(one.stage for one in self._running), *self._waiting)
        }
        stages = [self._stages[name] for name in left]
        rest = duration(makespan(left, stages, len(self._devices)))
        return f"{share}; the rest takes about {rest} at the rates seen so far."

    def _stop_all(self, number: int) -> None:
        """Sends signal `number` to all running stages, and waits until they have saved and exited."""
        processes = [running.process for running in self._running if running.process]
        for process in processes:
            process.send_signal(number)
        for process in processes:
            process.wait()
        self._running = []

    def _report_failures(self) -> None:
        if not self.failed:
            return
        print()
        names_by_tail: dict[tuple[str, ...], list[str]] = {}  # one damaged image ends many stages in the same way
        for name in self.failed:
            ending = _tail(self._logs / f"{name}.log") if self._logs else [name]
            names_by_tail.setdefault(tuple(ending), []).append(name)
        for tail, names in names_by_tail.items():
            print(f"{', '.join(names)} failed: {self.failed[names[0]]}", *(tail if self._logs else ()), sep="\n    ")
        if self._waiting:
            print(f"Not started, since they need what failed: {', '.join(stage.name for stage in self._waiting)}.")
        print(f"{len(self._finished)} of {len(self._stages)} stages are finished.")


def _tail(log: Path) -> list[str]:
    return re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").rstrip())[-TAIL:]


def _terminate_with_parent() -> Callable[[], None] | None:
    """Returns a function for the child process that, on Linux, lets it get SIGTERM when its parent is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def request() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return request
