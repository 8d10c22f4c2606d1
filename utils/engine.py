"""The one training loop and the one inference loop; both know nothing of the method that they run."""

import contextlib
import ctypes
import inspect
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config, Schedule
from utils.checkpoint import Run, find_weights
from utils.dataset import STEP, Column, Faces, in_order, stream
from utils.errors import InputError
from utils.files import write_text

Losses = Callable[..., dict[str, torch.Tensor]]
"""Named losses of a batch; the parameters are named after the columns that it reads (see utils.dataset)."""

GRADIENT = "gradient"
"""The name under which the norm of the gradient is kept beside the losses, to notice when it is not finite."""

Validate = Callable[[], tuple[dict[str, float], float]]
"""Scores to log, and the one that decides which epoch is best (higher is better)."""


def run(main: Callable[[Config], None]) -> None:
    """Calls a script's `main` with the settings of the command line; bad input is one sentence and exit status 2."""
    script = Path(sys.argv[0]).name
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main(Config.from_args())
    except (InputError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"{script}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def setup(cfg: Config) -> None:
    """Seeds the generators and sets up the CPU and the device; raises InputError for a device that is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but PyTorch finds no CUDA device here: set device to cpu or auto.")
    torch.manual_seed(cfg.seed)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # NumPy 1 measures denormals when first asked, and warns where they are flushed
    torch.set_flush_denormal(True)  # the header's gradient is full of denormals, which a CPU computes slowly
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32, as published
    _keep_freed_memory()
    cv2.setNumThreads(1)  # images are decoded in as many threads as there are cores already


def announce(cfg: Config, result: Path, script: str) -> None:
    """Says where a stage's result lies and which command comes next, with the settings `cfg`."""
    print(f"Written to {result}. Next: {cfg.command(script)}")


# Training -------------------------------------------------------------------------------------------------------------


def fit(
    losses: Losses,
    faces: Faces,
    folder: Path,
    cfg: Config,
    backbone: nn.Module,
    header: nn.Module | None = None,
    *,
    schedule: Schedule,
    validate: Validate | None = None,
) -> None:
    """Minimises the sum of the named losses by SGD over `backbone` and `header`, and keeps the run in `folder`.

    The learning rate follows `schedule`; gradients of the backbone are clipped to `cfg.max_grad_norm`. After every
    epoch `validate` scores it; without one the epoch with the lowest training loss is the best. An interrupted run
    continues where it was when it is started again, a finished one is left as it is.

    Raises InputError where `check_run` does, and where a loss or gradient is not finite.
    """
    run = check_run(faces, folder, cfg)
    state = run.load()
    if state is None and (given := find_weights(folder, "best") or find_weights(folder, "last")):
        print(f"{folder} holds {given.name} and no checkpoint of a run: used as it is, nothing to train.")
        return

    steps = len(faces) // cfg.batch_size
    device = _device(cfg)
    backbone.to(device, memory_format=torch.channels_last)
    modules = [backbone] if header is None else [backbone, header.to(device)]
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, schedule.base_lr, cfg.momentum, weight_decay=cfg.weight_decay)
    progress = _Progress(run, backbone, header, optimizer)
    if state is not None:
        progress.restore(state)
    if progress.epoch >= schedule.epochs:
        if find_weights(folder, cfg.weights) is None:
            raise InputError(
                f"{folder} is trained but has lost its {cfg.weights}_backbone.pth: move it away to train anew."
            )
        print(f"{folder} is already trained; move it away to train anew.")
        return
    if progress.epoch or progress.step:
        print(f"{folder}: continuing in epoch {progress.epoch + 1} after step {progress.step} of {steps}.")

    columns = {name: faces.columns[name] for name in inspect.signature(losses).parameters}
    with _StopSignals() as stop:
        while progress.epoch < schedule.epochs:
            epoch, first, started = progress.epoch, progress.step, time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(epoch)
            for module in modules:
                module.train()
            batches = stream(columns, faces.batches(epoch, first), device)
            with _Bar(f"epoch {epoch + 1}/{schedule.epochs}", steps * cfg.batch_size, first * cfg.batch_size) as bar:
                for batch in batches:
                    torch.manual_seed(_seed(STEP, cfg.seed, epoch, progress.step))  # margins and dropout
                    progress.add(_step(losses, batch, backbone, optimizer, cfg.max_grad_norm))
                    bar.update(cfg.batch_size)
                    if device.type == "cpu" or bar.due():  # reading a loss makes a GPU wait
                        bar.set_postfix_str(_listed(progress.means()), refresh=False)
                    if stop.received or progress.due(cfg.checkpoint_minutes):
                        progress.save()
                        stop.leave(f"stopped in epoch {epoch + 1} after step {progress.step} of {steps}")
            trained = time.monotonic()
            try:
                with stop.at_once():
                    scores, value = validate() if validate else ({}, -sum(progress.means().values()))
            except Interrupted:
                progress.save()
                raise
            line = progress.finish_epoch(schedule, scores, value)
            if steps > first:  # an epoch that was stopped while verifying has no steps left to measure
                seconds = (trained - started) / (steps - first)
                left = (schedule.epochs - epoch - 1) * (seconds * steps + time.monotonic() - trained)
                line += f"  {cfg.batch_size / seconds:,.0f} images/s, {_duration(left)} left"
            tqdm.write(line)
        stop.leave("stopped after the last epoch")


def check_run(faces: Faces, folder: Path, cfg: Config) -> Run:
    """The run of these settings in `folder`.

    Raises InputError where the folder holds a run of other settings or data, and where there are fewer rows than one
    batch. A script that trains several networks calls it for all of them before it trains the first.
    """
    if len(faces) < cfg.batch_size:
        raise InputError(f"{len(faces)} images are fewer than one batch: set batch_size to {len(faces)} or less.")
    return Run(folder, cfg, faces.sources, faces.identities)


def _step(losses: Losses, batch: dict, backbone: nn.Module, optimizer, max_grad_norm: float) -> dict[str, torch.Tensor]:
    """One step of the optimizer; gives the named losses, and the norm of the backbone's gradient before clipping."""
    optimizer.zero_grad()
    named = losses(**batch)
    sum(named.values()).backward()
    norm = nn.utils.clip_grad_norm_(backbone.parameters(), max_grad_norm)
    optimizer.step()
    return {**named, GRADIENT: norm}


class _Progress:
    """Where a run stands: position, summed losses of the epoch, log and best score; saved with the weights."""

    def __init__(self, run: Run, backbone: nn.Module, header: nn.Module | None, optimizer: torch.optim.Optimizer):
        self.run, self.backbone, self.header, self.optimizer = run, backbone, header, optimizer
        self.epoch = self.step = 0
        self.best = -math.inf
        self.sums: dict[str, torch.Tensor] = {}
        self.log: list[dict] = []
        self.saved_at = time.monotonic()

    def restore(self, state: dict) -> None:
        device = next(self.backbone.parameters()).device
        try:
            self.epoch, self.step, self.best, self.log = state["epoch"], state["step"], state["best"], state["log"]
            self.sums = {name: value.to(device) for name, value in state["sums"].items()}
            self.backbone.load_state_dict(state["backbone"])
            if self.header is not None:
                self.header.load_state_dict(state["header"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.run.checkpoint} is not of this version ({error}): move {self.run.folder} away to train anew."
            ) from error

    def save(self) -> None:
        self.means()  # a checkpoint with numbers that are not finite would be no good
        state = {"epoch": self.epoch, "step": self.step, "best": self.best, "log": self.log, "sums": self.sums}
        state["backbone"] = self.backbone.state_dict()
        state["header"] = self.header.state_dict() if self.header is not None else {}
        self.run.save({**state, "optimizer": self.optimizer.state_dict()})
        self.saved_at = time.monotonic()

    def due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at > 60 * minutes

    def add(self, named: dict[str, torch.Tensor]) -> None:
        for name, value in named.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        self.step += 1

    def means(self) -> dict[str, float]:
        """Mean of each loss over the epoch so far; raises InputError where one, or the gradient, is not finite."""
        means = {name: total.item() / self.step for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                what = "gradient" if name == GRADIENT else f"loss {name!r}"
                advice = "lower the learning rate or s"
                if self.run.checkpoint.exists():
                    advice += f" and move {self.run.folder} away, whose last checkpoint is good"
                raise InputError(f"The {what} is {mean} in epoch {self.epoch + 1}, by step {self.step}: {advice}.")
        return {name: mean for name, mean in means.items() if name != GRADIENT}

    def finish_epoch(self, schedule: Schedule, scores: dict, value: float) -> str:
        """Logs the epoch and writes its files; gives the line that says how it went."""
        if not self.run.checkpoint.exists():
            self.save()  # weights without a checkpoint are a finished model that was put there
        is_best, means = value > self.best, self.means()
        entry = {"epoch": self.epoch + 1, "lr": schedule.lr(self.epoch), "loss": means, "scores": scores}
        self.log.append({**entry, "best": is_best})
        self.best = max(self.best, value)
        line = f"epoch {self.epoch + 1}/{schedule.epochs}  {_listed(means)}  {_listed(scores)}"
        if is_best:
            self.run.save_weights("best", self.backbone, self.header)
        self.run.save_weights("last", self.backbone, self.header)
        # The log is written as a whole: an epoch that is repeated after a crash does not appear twice.
        write_text(self.run.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.save()
        return f"{line} (best so far)" if is_best else line


# Inference ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def infer(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    cfg: Config,
    title: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """`function` of all rows in order, with `network` in eval mode: array (N, ...) float32, in `out` if given.

    Like the losses of `fit`, `function` names the columns that it reads by its parameters.
    """
    device = _device(cfg)
    read = {name: columns[name] for name in inspect.signature(function).parameters}
    count = len(next(iter(read.values())).arrays[0])
    was_training = network.training
    network.to(device).eval()
    try:
        with _Bar(title, count) as bar:
            done = 0
            for batch in stream(read, in_order(count, cfg.infer_batch_size), device):
                result = function(**batch).float().cpu().numpy()
                if out is None:
                    out = np.empty((count, *result.shape[1:]), np.float32)
                out[done : done + len(result)] = result
                done += len(result)
                bar.update(len(result))
    finally:
        network.train(was_training)
    return out


# Signals and progress -------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, with everything saved that there was to save; the message says how to continue."""

    def __init__(self, what: str, number: int):
        super().__init__(f"{what}; continue with: {_this_command()}")
        self.signal = number


def _interrupt(number: int, _) -> None:
    raise Interrupted("interrupted, nothing is half-written", number)


class _StopSignals:
    """Holds Ctrl-C and SIGTERM back until `leave` is called, or raises Interrupted at once inside `at_once`."""

    def __enter__(self) -> "_StopSignals":
        self.received, self._at_once = 0, False
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _) -> None:
        self.received = number
        if self._at_once:
            self.leave("stopped while verifying")

    def leave(self, what: str) -> None:
        """Raises Interrupted if a signal has come."""
        if self.received:
            raise Interrupted(what, self.received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self._at_once = True
        try:
            self.leave("stopped before verifying")
            yield
        finally:
            self._at_once = False


class _Bar(tqdm):
    """Progress of images with named numbers behind it; silent where the output is no terminal."""

    def __init__(self, title: str, total: int, initial: int = 0):
        super().__init__(desc=title, total=total, initial=initial, unit=" images", leave=False, disable=None)
        self._shown = 0.0

    def due(self) -> bool:
        """Whether half a second has gone by since the last time."""
        now = time.monotonic()
        if now - self._shown < 0.5:
            return False
        self._shown = now
        return True


def _keep_freed_memory() -> None:
    """Tells glibc to keep large blocks for the next step instead of giving them back to the kernel.

    Fetching every activation anew from the kernel takes longer than small convolutions: without this, iresnet_tiny's
    forward pass at batch 256 is 2.3 to 3 times slower on two cores. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: larger blocks than this are mapped apart
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free memory at the top that is kept


def _device(cfg: Config) -> torch.device:
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def _listed(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _this_command() -> str:
    module = sys.modules["__main__"].__spec__
    script = ["-m", module.name] if module else [sys.argv[0]]
    return "python " + shlex.join([*script, *sys.argv[1:]])
