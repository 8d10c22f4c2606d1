"""Runs a script as a process: command line, settings of the libraries, signals, and the sentence that it ends with."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import shlex
import signal
import sys
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
from utils.environment import allow_tf32, device_of
from utils.errors import InputError
from utils.memory import keep_freed_memory
from utils.storage.files import read_json

ALONE = ("baseline_data_split.py", "-m eval.evaluation")
"""Scripts that run as one process, without torchrun."""


def run(main: Callable[[Config], None], argv: list[str] | None = None, alone: bool = False) -> None:
    """Calls a script's `main` with the settings of the command line, or of `argv`, as `guarded` does.

    With `alone`, raises InputError under torchrun.
    """
    guarded(lambda: main(Config.from_args(argv)), alone)


def guarded(work: Callable[[], None], alone: bool = True) -> None:
    """Calls `work`, and ends the process with one sentence after bad input (status 2), Ctrl-C or SIGTERM.

    Under torchrun all ranks end, and the first one prints the sentence. With `alone`, torchrun itself is bad input.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no valid text
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if alone and is_launched():
            raise InputError("This is the work of one process: start it with python, not with torchrun.")
        if not alone:
            launch.connect()
        work()
        launch.close()
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        _end(2, f"{reason}: lower batch_size, infer_batch_size or device_cache_gb, or set capture to False.")
    except (InputError, OSError) as error:
        _end(2, str(error))
    except Interrupted as stop:
        _end(128 + stop.signal, str(stop))
    except Exception as error:
        if not is_launched():
            raise
        if launch.is_lost_peer(error):
            _end_without_peer(error)
        traceback.print_exc()
        _end(1, f"process {os.environ['RANK']} ended by the error above.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(status: int, sentence: str) -> NoReturn:
    """Prints the sentence, on several ranks only on the first that ends, and ends this process."""
    if is_launched():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # torchrun sends one as soon as another rank has ended
    with contextlib.suppress(OSError):  # the terminal or pipe may be closed
        if launch.is_first_to_end():
            script = Path(sys.argv[0]).name
            print(f"{_module_name() if script == '__main__.py' else script}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if world_size() > 1:
        os._exit(status)  # destroying the group would wait for ranks that may wait for this one
    sys.exit(status)


def _end_without_peer(error: Exception) -> NoReturn:
    """Ends this process because a collective failed when another rank ended."""
    # gloo's text is "[source file] What has happened. What may be the cause."; the second part is kept.
    text = re.sub(r"^\[[^]]*\] ", "", str(error).split("\n")[0]).split(". ")[0][:200]
    what = f"another process of this run has ended{text and f' ({text})'}; what was saved last is kept"
    _end(1, f"{what}; continue with: {this_command()}")


def setup(cfg: Config, trains: bool = True) -> None:
    """Initialises the process group under torchrun, and sets up PyTorch, NumPy and OpenCV for the device.

    With `trains`, also seeds PyTorch's generators.

    Raises InputError if the device does not exist or ranks have different settings; with `trains`, also if the ranks
    cannot divide the batch, or if TensorBoard is asked for and not installed.
    """
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but PyTorch finds no CUDA device here: set device to cpu or None.")
    launch.join(cfg, device_of(cfg))
    if trains:
        launch.require_whole_batch(cfg)
        if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError("tensorboard = True, but the package is not there: pip install tensorboard, or set False.")
        torch.manual_seed(cfg.seed)
    settings = ("precision", "infer_precision") if trains else ("infer_precision",)
    for name in settings:
        if getattr(cfg, name) == "bf16" and not _has_bf16(device_of(cfg)):
            print(f"{name} = 'bf16': this device has no bf16 units, which makes it no faster than fp32 here.")
    if threads := cfg.num_threads or share_of_cores():
        torch.set_num_threads(threads)
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # NumPy 1 measures denormals at the first call, and warns if they are flushed by then
    torch.set_flush_denormal(True)  # the header's gradient has many denormals, with which a CPU computes slowly
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    torch.backends.cudnn.deterministic = not cfg.cudnn_benchmark
    # Networks allow TF32 in their convolutions where it is set (utils.training.precision), as PyTorch does by default.
    allow_tf32(False)
    torch.backends.cuda.matmul.allow_tf32 = False  # sets the newer torch.backends.cuda.matmul.fp32_precision too
    keep_freed_memory()
    cv2.setNumThreads(1)  # images are decoded by one thread per core already


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


def announce(cfg: Config, result: Path, script: str) -> None:
    """Prints where a stage's result lies and the command of the next stage, with the settings `cfg`."""
    print(f"Written to {result}. Next: {command(cfg, script)}")


class Interrupted(BaseException):
    """Raised for Ctrl-C and SIGTERM after the run's state was saved; the message says how to continue."""

    def __init__(self, what: str, number: int):
        super().__init__(f"{what}; continue with: {this_command()}")
        self.signal = number


def _interrupt(number: int, _) -> None:
    raise Interrupted("interrupted, files that were finished are kept", number)


class StopSignals:
    """Context that defers Ctrl-C and SIGTERM until `leave` is called; inside `at_once` they raise Interrupted."""

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
        """Raises Interrupted if `number` is a signal; 0 is no signal."""
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
    """Returns the command of another stage with the settings `cfg`, for all ethnicities or the one of the teacher."""
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
    """Returns the command line that started this process, as a user types it."""
    module = _module_name()
    script = ["-m", module] if module else [sys.argv[0]]
    return f"{launcher()} {shlex.join([*script, *sys.argv[1:]])}"


def _module_name() -> str:
    """Returns the module that was started by `python -m`; an empty string for a script."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else ""
