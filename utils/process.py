"""The process that a script is: its command line, the libraries' settings, signals, and what it says last."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
import torch

from config.config import Config
from config.readers import CHANGES_NO_NUMBER, reads, script_that_trains
from utils.distributed import launch
from utils.distributed.world import is_launched, launcher, share_of_cores, world_size
from utils.environment import device_of
from utils.errors import InputError
from utils.memory import keep_freed_memory
from utils.storage.files import read_json

ALONE = ("baseline_data_split.py", "-m eval.evaluation")
"""Scripts that are the work of one process."""


def run(main: Callable[[Config], None], argv: list[str] | None = None, alone: bool = False) -> None:
    """Calls a script's `main` with the settings of the command line or `argv`, `guarded`.

    One that is to be `alone` is refused under torchrun.
    """
    guarded(lambda: main(Config.from_args(argv)), alone)


def guarded(work: Callable[[], None], alone: bool = True) -> None:
    """Calls `work`; bad input ends in one sentence and status 2, Ctrl-C and SIGTERM in one that says how to go on.

    Of several processes the first that ends so says why, and all end; work that is to be `alone` is refused there.
    """
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if alone and is_launched():
            raise InputError("This is the work of one process: start it with python, not with torchrun.")
        if not alone:
            launch.meet()
        work()
        launch.leave()
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        _end(2, f"{reason}: lower batch_size, infer_batch_size or device_cache_gb.")
    except (InputError, OSError) as error:
        _end(2, str(error))
    except Interrupted as stop:
        _end(128 + stop.signal, str(stop))
    except Exception as error:
        if launch.number() is None:
            raise
        if launch.is_lost(error):
            _end_without(error)
        traceback.print_exc()
        _end(1, f"process {launch.number()} ended by the error above.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(status: int, sentence: str) -> NoReturn:
    if launch.number() is not None and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # torchrun sends one as soon as another process has left
    with contextlib.suppress(OSError):  # nobody may be listening
        if launch.speaks():
            script = Path(sys.argv[0]).name
            print(f"{_module_name() if script == '__main__.py' else script}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if world_size() > 1:
        os._exit(status)  # leaving the group would wait for the others, who may be waiting for this process
    sys.exit(status)


def _end_without(error: Exception) -> NoReturn:
    """Ends this process because another one has."""
    # Of gloo's text: [where it was compiled] what has happened. What may be the cause.
    text = re.sub(r"^\[[^]]*\] ", "", str(error).split("\n")[0]).split(". ")[0][:200]
    what = f"another process of this run has ended{text and f' ({text})'}; what was saved last is kept"
    _end(1, f"{what}; continue with: {this_command()}")


def setup(cfg: Config, trains: bool = True) -> None:
    """Joins the other processes, if any, and sets up the CPU and the device; seeds the generators if it `trains`.

    Raises InputError for a device that does not exist and for processes of one run that have different settings; for a
    script that `trains` also where the processes cannot divide a batch and where TensorBoard is asked for and missing.
    """
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but PyTorch finds no CUDA device here: set device to cpu or None.")
    launch.join(cfg, device_of(cfg), _end_without)
    if trains:
        launch.require_whole_batch(cfg)
        if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError("tensorboard = True, but the package is not there: pip install tensorboard, or set False.")
        if reason := _lacks(cfg.precision, device_of(cfg)):
            print(f"precision = {cfg.precision!r}: {reason}, which makes it no faster than fp32 here.")
        torch.manual_seed(cfg.seed)
    if threads := cfg.num_threads or share_of_cores():
        torch.set_num_threads(threads)
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # NumPy 1 measures denormals when first asked, and warns where they are flushed
    torch.set_flush_denormal(True)  # the header's gradient is full of denormals, which a CPU computes slowly
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    torch.backends.cudnn.deterministic = not cfg.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32, as published
    keep_freed_memory()
    cv2.setNumThreads(1)  # images are decoded in as many threads as there are cores already


def _lacks(precision: str, device: torch.device) -> str:
    """What a precision needs that the device does not have, or nothing."""
    if precision == "tf32" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0)):
        return "this device computes in fp32 only"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this device has no bf16 units"
    return ""


def announce(cfg: Config, result: Path, script: str) -> None:
    """Says where a stage's result lies and which command comes next, with the settings `cfg`."""
    print(f"Written to {result}. Next: {command(cfg, script)}")


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, with everything saved that there was to save; the message says how to continue."""

    def __init__(self, what: str, number: int):
        super().__init__(f"{what}; continue with: {this_command()}")
        self.signal = number


def _interrupt(number: int, _) -> None:
    raise Interrupted("interrupted, files that were finished are kept", number)


class StopSignals:
    """Holds Ctrl-C and SIGTERM back until `leave` is called, or raises Interrupted at once inside `at_once`."""

    def __enter__(self) -> "StopSignals":
        self.received, self._at_once = 0, False
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        self.received = number
        if self._at_once:
            self.leave("stopped while verifying", number)

    def leave(self, what: str, number: int) -> None:
        """Raises Interrupted by this signal; 0 is none."""
        if number:
            raise Interrupted(what, number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self._at_once = True
        try:
            self.leave("stopped before verifying", self.received)
            yield
        finally:
            self._at_once = False


def command(cfg: Config, script: str) -> str:
    """The command that runs another stage with the settings `cfg`, on all ethnicities unless one is the source."""
    ethnicity = "All" if cfg.ada_source == "adaptor" else cfg.ethnicity
    start = "python" if script in ALONE else launcher()
    return f"{start} {script} {shlex.join(dataclasses.replace(cfg, ethnicity=ethnicity).changed)}".rstrip()


def command_of_run(cfg: Config, script: str, folder: Path | None = None) -> str:
    """Returns the command that makes what is missing, with the settings that the stage `script` reads.

    They are those with which the run in `folder` was started, so that it is resumed, or those of `cfg` if it was not.
    Paths, and other settings that change no number, are those of `cfg`.
    """
    path = folder and folder / "config.json"
    if path and path.exists():
        about = read_json(path)
        stored, trained_by = about.get("all settings", {}), script_that_trains(about.get("kind", ""))
        # What is missing may be the flipped view, which the run was started without.
        names = {*stored} - CHANGES_NO_NUMBER - {"flip_targets"}
        names = {field.name for field in dataclasses.fields(cfg) if field.name in names}
        names = {name for name in names if reads(trained_by, name)}
        with contextlib.suppress(InputError):  # settings of another version
            cfg = dataclasses.replace(cfg, **{name: stored[name] for name in names})
    start, settings = command(cfg, script).split(script, 1)
    words = shlex.split(settings)
    kept = [
        word
        for name, value in zip(words[::2], words[1::2], strict=True)
        if reads(script, name.removeprefix("--"))
        for word in (name, value)
    ]
    return f"{start}{script} {shlex.join(kept)}".rstrip()


def this_command() -> str:
    """The command line that started this process, as a user types it."""
    module = _module_name()
    script = ["-m", module] if module else [sys.argv[0]]
    return f"{launcher()} {shlex.join([*script, *sys.argv[1:]])}"


def _module_name() -> str:
    """What was called with `python -m`, or nothing."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else ""
