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
from utils.checkpoint import Run, find_released, load, save
from utils.dataset import Column, Faces, in_order, stream
from utils.errors import InputError
from utils.files import write_text

Losses = Callable[..., dict[str, torch.Tensor]]
"""Named losses of a batch; the parameters are named after the columns that it reads (see utils.dataset)."""

Validate = Callable[[], tuple[dict[str, float], float]]
"""Scores to log, and the one that decides which epoch is best (higher is better)."""


def run(main: Callable[[Config], None]) -> None:
    """Calls a script's `main` with the settings of the command line; bad input is one sentence and exit status 2."""
    script = Path(sys.argv[0]).name
    try:
        main(Config.from_args())
    except InputError as error:
        sys.exit(_complain(f"{script}: {error}", 2))
    except Interrupted as stop:
        sys.exit(_complain(f"{script}: {stop}", 128 + stop.signal))
    except KeyboardInterrupt:
        sys.exit(_complain(f"{script}: interrupted, nothing is half-written; continue with: {_this_command()}", 130))


def setup(cfg: Config) -> torch.device:
    """Seeds the generators, sets the CPU threads and gives the device; raises InputError for one that is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but PyTorch finds no CUDA device here: set device to cpu or auto.")
    torch.manual_seed(cfg.seed)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    torch.set_flush_denormal(True)  # the header's gradient is full of denormals, which a CPU computes slowly
    torch.backends.cudnn.deterministic = True
    _keep_freed_memory()
    cv2.setNumThreads(1)  # images are decoded in as many threads as there are cores already
    return _device(cfg)


def announce(cfg: Config, result: Path, script: str) -> None:
    """Says where a stage's result lies and which command comes next."""
    changed = cfg.changed
    if "--ethnicity" in changed:
        at = changed.index("--ethnicity")
        del changed[at : at + 2]
    print(f"Written to {result}. Next: python {script} {shlex.join(changed)}".rstrip())


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

    Raises InputError where the folder holds a run of other settings, where there are fewer rows than one batch, and
    where a loss is not finite.
    """
    steps = len(faces) // cfg.batch_size
    if steps == 0:
        raise InputError(f"{len(faces)} images are fewer than one batch: set batch_size to {len(faces)} or less.")
    if (released := find_released(folder)) is not None:
        print(f"{folder} holds {released.name}, which is not ours: used as it is, nothing to train.")
        return
    progress = _Progress(Run(folder, cfg, faces.sources, faces.identities), backbone, header)
    device = _device(cfg)
    backbone.to(device, memory_format=torch.channels_last)
    modules = [backbone] if header is None else [backbone, header.to(device)]
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, schedule.base_lr, cfg.momentum, weight_decay=cfg.weight_decay)
    progress.restore(optimizer)
    if progress.epoch >= schedule.epochs:
        print(f"{folder} is already trained; move it away to train anew.")
        return
    if progress.epoch or progress.step:
        print(f"{folder}: continuing in epoch {progress.epoch + 1}, step {progress.step + 1} of {steps}.")

    columns = {name: faces.columns[name] for name in inspect.signature(losses).parameters}
    with _StopSignals() as stop:
        while progress.epoch < schedule.epochs:
            epoch, started, first = progress.epoch, time.monotonic(), progress.step
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(epoch)
            for module in modules:
                module.train()
            batches = stream(columns, faces.batches(cfg, epoch, first), device)
            with _bar(f"epoch {epoch + 1}/{schedule.epochs}", steps, first, cfg.batch_size) as bar:
                for batch in batches:
                    torch.manual_seed(_seed(cfg.seed, epoch, progress.step))  # margins and dropout
                    optimizer.zero_grad()
                    named = losses(**batch)
                    sum(named.values()).backward()
                    nn.utils.clip_grad_norm_(backbone.parameters(), cfg.max_grad_norm)
                    optimizer.step()
                    progress.add(named)
                    bar.update(cfg.batch_size)
                    if bar.due():
                        bar.set_postfix_str(_listed(progress.means()), refresh=False)
                    if stop.received or progress.due(cfg.checkpoint_minutes):
                        progress.save(optimizer)
                        stop.leave(f"stopped in epoch {epoch + 1} after step {progress.step} of {steps}")
            rate = (progress.step - first) * cfg.batch_size / (time.monotonic() - started)
            means = progress.means()

            try:
                with stop.at_once():
                    scores, value = validate() if validate else ({}, -sum(means.values()))
            except Interrupted:
                progress.save(optimizer)
                raise
            best = progress.finish_epoch(schedule.lr(epoch), scores, value, rate, optimizer)
            left = (schedule.epochs - epoch - 1) * (time.monotonic() - started) * steps / max(1, steps - first)
            tqdm.write(
                f"epoch {epoch + 1}/{schedule.epochs}  {_listed(means)}  {_listed(scores)}  "
                f"{rate:,.0f} images/s, {_duration(left)} left{'  (best so far)' if best else ''}"
            )


class _Progress:
    """Where a run stands: position, summed losses of the epoch, log and best score; saved with the weights."""

    def __init__(self, run: Run, backbone: nn.Module, header: nn.Module | None):
        self.run, self.backbone, self.header = run, backbone, header
        self.epoch = self.step = 0
        self.best = -math.inf
        self.sums: dict[str, torch.Tensor] = {}
        self.log: list[dict] = []
        self.saved_at = time.monotonic()

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.run.checkpoint.exists():
            return
        state = load(self.run.checkpoint)
        self.epoch, self.step, self.best, self.log = state["epoch"], state["step"], state["best"], state["log"]
        device = next(self.backbone.parameters()).device
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.backbone.load_state_dict(state["backbone"])
        if self.header is not None:
            self.header.load_state_dict(state["header"])
        optimizer.load_state_dict(state["optimizer"])

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        self.means()  # a checkpoint with numbers that are not finite would be no good
        state = {"epoch": self.epoch, "step": self.step, "best": self.best, "log": self.log, "sums": self.sums}
        state["backbone"] = self.backbone.state_dict()
        state["header"] = self.header.state_dict() if self.header is not None else {}
        state["optimizer"] = optimizer.state_dict()
        save(self.run.checkpoint, state)
        self.saved_at = time.monotonic()

    def due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at > 60 * minutes

    def add(self, named: dict[str, torch.Tensor]) -> None:
        for name, value in named.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()
        self.step += 1

    def means(self) -> dict[str, float]:
        """Mean of each loss over the epoch so far; raises InputError where one is not finite."""
        means = {name: total.item() / self.step for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise InputError(
                    f"The loss {name!r} is {mean} in epoch {self.epoch + 1}, by step {self.step}: lower the learning "
                    f"rate; {self.run.folder} keeps the last good checkpoint."
                )
        return means

    def finish_epoch(self, lr: float, scores: dict, value: float, rate: float, optimizer) -> bool:
        """Logs the epoch and writes its files; whether it is the best so far."""
        is_best = value > self.best
        entry = {"epoch": self.epoch + 1, "lr": lr, "loss": self.means(), "scores": scores, "best": is_best}
        self.log.append({**entry, "images_per_second": round(rate, 1)})
        self.best = max(self.best, value)
        if is_best:
            self.run.save_weights("best", self.backbone, self.header)
        self.run.save_weights("last", self.backbone, self.header)
        # The log is written as a whole: an epoch that is repeated after a crash does not appear twice.
        write_text(self.run.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.log))
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.save(optimizer)
        return is_best


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
        with _bar(title, count, 0, 1, leave=False) as bar:
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


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved; the message says how to continue."""

    def __init__(self, what: str, received: int):
        super().__init__(f"{what}; continue with: {_this_command()}")
        self.signal = received


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


class _bar(tqdm):
    """Progress of images with named numbers behind it; silent where the output is no terminal."""

    def __init__(self, title: str, steps: int, first: int, batch_size: int, leave: bool = False):
        total, initial = steps * batch_size, first * batch_size
        super().__init__(desc=title, total=total, initial=initial, unit=" images", leave=leave, disable=None)
        self._shown = 0.0

    def due(self) -> bool:
        """Twice a second: reading a loss makes the device wait, so it is done no more often."""
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


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence((*numbers, 2)).generate_state(1, np.uint64)[0]) >> 1


def _listed(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _this_command() -> str:
    return "python " + shlex.join(sys.argv)


def _complain(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status
