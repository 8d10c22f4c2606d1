"""The training loop and the inference loop of all stages, independent of the method."""

import contextlib
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config
from utils.data.columns import Column, cache, cut, stream
from utils.data.faces import STEP, Faces
from utils.distributed import collectives
from utils.distributed.batchnorm import share_statistics
from utils.distributed.world import is_first, rank, total_batch, world_size
from utils.environment import device_of
from utils.errors import InputError
from utils.losses.sharded import ShardedHeader
from utils.process import Interrupted, StopSignals
from utils.storage.locks import locked, refuse_if_locked
from utils.training.checkpoint import CHECKPOINTS, Run
from utils.training.precision import (
    compiled,
    eagerly_if_compiling_fails,
    mixed_precision,
    timing_compilation,
    uncompiled,
)
from utils.training.start import freeze, read_by, start, start_sources
from utils.training.state import Losses, Progress, listed, tensorboard_events
from utils.weights import find_weights

Validate = Callable[[], tuple[dict[str, float], float]]
"""Returns the scores to log, and the score that selects the best epoch (higher is better)."""


# Training -------------------------------------------------------------------------------------------------------------


def fit(
    losses: Losses,
    faces: Faces,
    folder: Path,
    cfg: Config,
    backbone: nn.Module,
    header: nn.Module | None = None,
    *,
    kind: str,
    projection: nn.Module | None = None,
    measures: tuple[str, ...] = (),
    validate: Validate | None = None,
) -> None:
    """Minimises the sum of the named losses by SGD over `backbone` and `header`, and keeps the run in `folder`.

    A `projection` with parameters is trained too; it is kept in checkpoints only.

    The parameters of `losses` are columns of `faces` or `repeats` (see `Losses`); it returns a dict of scalar tensors.
    Those named in `measures` are logged only, all others are losses and summed.

    `kind` is "teacher", the name of an adaptor or the method of a student; any other kind uses the students' schedule.
    It selects the epochs and the learning rate (`cfg.schedule`), and the settings that may not change when the run is
    resumed (`cfg.decisive`).

    A step averages the gradients of `cfg.accumulate` batches. Gradients of the backbone are clipped to
    `cfg.max_grad_norm`. After every epoch `validate` scores it; without `validate`, the epoch with the lowest training
    loss is the best. If `fit` is called again, an interrupted run is resumed from its last checkpoint and a finished
    run is left unchanged.

    Raises InputError as `check_run` does; if a parameter of `losses` is no column; if a label is no class of the
    header; if a loss gets no gradient; if a measure is not returned; and if a loss or gradient is not finite, in which
    case that step is not taken.
    """
    columns = _columns_of(losses, faces)
    _require_batch(faces, folder, cfg, kind)
    _require_classes(columns, faces, header)
    with locked(folder) if is_first() else contextlib.nullcontext():  # only rank 0 writes
        run = _run_of(faces, folder, cfg, kind)
        if not run.has_checkpoint and is_given(folder):
            return
        progress = _progress(run, cfg, kind, backbone, header, projection, measures)
        if run.has_checkpoint:
            progress.restore(run.load())
        else:
            start(backbone, header, faces, cfg, kind)
        if progress.epoch >= progress.schedule.epochs:
            print(f"{folder} is already trained; move it away to train anew.")
            return
        print(cfg.described(kind))
        run.begin(progress.epoch, progress.step)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(mixed_precision(backbone, cfg.precision, device_of(cfg)))
            contexts.enter_context(tensorboard_events(cfg, progress))
            if cfg.compile:
                contexts.enter_context(compiled(backbone))
                losses = eagerly_if_compiling_fails(backbone, losses)
            _train(losses, columns, faces, cfg, progress, validate)


def _progress(
    run: Run,
    cfg: Config,
    kind: str,
    backbone: nn.Module,
    header: nn.Module | None,
    projection: nn.Module | None,
    measures: tuple[str, ...],
) -> Progress:
    """Moves the modules to the device, freezes layers, and returns the state of a run before its first step."""
    device, schedule = device_of(cfg), cfg.schedule(kind)
    backbone.to(device).to(memory_format=torch.channels_last)
    if cfg.sync_bn and world_size() > 1:
        share_statistics(backbone)
    frozen = freeze(backbone, read_by(cfg, kind, "freeze"))
    if projection is not None and not [*projection.parameters()]:
        projection = None  # the identity
    modules = [module.to(device) for module in (backbone, header, projection) if module is not None]
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    lr, decay = schedule.lr(0, total_batch(cfg)), cfg.weight_decay
    optimizer = torch.optim.SGD(parameters, lr, momentum=cfg.momentum, weight_decay=decay, fused=True)
    return Progress(run, backbone, header, optimizer, schedule, measures, frozen, projection, cfg.accumulate)


def _train(
    losses: Losses,
    columns: dict[str, Column],
    faces: Faces,
    cfg: Config,
    progress: Progress,
    validate: Validate | None,
) -> None:
    """Trains from the position of `progress` to the last epoch."""
    epochs, batch_size, device = progress.schedule.epochs, total_batch(cfg), device_of(cfg)
    steps = len(faces) // batch_size
    captured = cfg.capture and device.type == "cuda" and world_size() == 1
    reader, losses = _Reader(columns, faces, cfg), _with_repeats(losses, faces, progress)
    # DistributedDataParallel averages gradients, but those of a sharded header differ between ranks.
    replicated = [module for module in progress.modules if not isinstance(module, ShardedHeader)]
    take_step = progress.stepper(collectives.averaging(losses, replicated), cfg.max_grad_norm, captured)
    if cfg.compile:
        take_step = timing_compilation(progress.backbone, take_step)
    agreement = collectives.Agreement()
    if progress.epoch or progress.step:
        print(f"{progress.run.folder}: continuing in epoch {progress.epoch + 1} after step {progress.step} of {steps}.")
    with StopSignals() as stop:
        while progress.epoch < epochs:
            first, started = progress.step, time.monotonic()
            progress.start_epoch()
            batches = reader.batches(progress.epoch, first)
            bar = _Bar(f"epoch {progress.epoch + 1}/{epochs}", steps * batch_size, first * batch_size)
            with contextlib.closing(batches), bar:  # closing ends the reader's threads, garbage collection may not
                for batch in batches:
                    progress.set_lr((progress.step + 1) / steps)
                    take_step(batch, _step_seed(cfg, progress))
                    progress.step += 1
                    bar.update(batch_size)
                    signal, due = agreement.after_step(stop.received, progress.due(cfg.checkpoint_minutes))
                    if device.type == "cpu" or bar.due():  # means() synchronises a GPU, and finds a NaN
                        bar.set_postfix_str(listed(progress.means()), refresh=False)
                    if signal or due:
                        progress.save()
                        where = f"epoch {progress.epoch + 1} after step {progress.step} of {steps}"
                        stop.leave(f"stopped in {where}", signal)
                        agreement.now(0)  # the all_reduce in flight still asks for the checkpoint that was just saved
            means = progress.means()  # synchronises a GPU, so the steps are timed whole
            trained = time.monotonic()
            scores, value = _validate(validate, means, progress, stop, agreement)
            line = progress.finish_epoch(means, scores, value)
            if steps > first:  # a run that was stopped while verifying has no steps left to time
                seconds = (trained - started - reader.seconds_caching) / (steps - first)
                left = (epochs - progress.epoch) * (seconds * steps + time.monotonic() - trained)
                line += f"  {batch_size / seconds:,.0f} images/s, {duration(left)} left"
            tqdm.write(line)
        stop.leave("stopped after the last epoch", agreement.now(stop.received))


class _Reader:
    """Reads the batches of a run, after its first step from the memory of the device (see `cache`).

    Only after a step is it known how much of that memory training needs.
    """

    def __init__(self, columns: dict[str, Column], faces: Faces, cfg: Config):
        self._columns, self._faces, self._cfg, self._is_cached = columns, faces, cfg, False
        self.seconds_caching = 0.0  # in the epoch that was read last

    def batches(self, epoch: int, first: int) -> Generator[dict[str, torch.Tensor], None, None]:
        """Yields the batches of an epoch from step `first` on."""
        device, self.seconds_caching = device_of(self._cfg), 0.0
        if not self._is_cached:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # else what an earlier run has freed is not counted as free
            only = itertools.islice(self._faces.batches(epoch, first), 1)
            for batch in [*stream(self._columns, only, device, 0)]:
                yield batch
                first, started = first + 1, time.monotonic()
                self._columns = cache(self._columns, self._faces.rows, device, self._cfg.device_cache_gb)
                self._is_cached, self.seconds_caching = True, time.monotonic() - started
        yield from stream(self._columns, self._faces.batches(epoch, first), device, self._cfg.num_workers)


def _step_seed(cfg: Config, progress: Progress) -> int:
    """Returns the seed of a step's elastic margins and dropout: equal in a resumed run, different on each rank."""
    return _seed(STEP, cfg.seed, progress.epoch, progress.step, *(() if is_first() else (rank(),)))


def _validate(
    validate: Validate | None,
    means: dict[str, float],
    progress: Progress,
    stop: StopSignals,
    agreement: collectives.Agreement,
) -> tuple[dict[str, float], float]:
    """Returns the scores of the epoch and the score that selects the best one; a signal saves and raises Interrupted.

    Buffers, such as the statistics of batch normalisation, may differ between ranks: those of rank 0 are saved, so all
    ranks validate with them.
    """
    try:
        if world_size() > 1:
            for value in progress.backbone.buffers():
                collectives.from_first(value)
        with _stopping_together(stop, agreement) if world_size() > 1 else stop.at_once():
            return validate() if validate else ({}, -progress.loss(means))
    except Interrupted:
        progress.save()
        raise


# `validate` takes no arguments, so the hook cannot be an argument of `infer`.
_after_batch: ContextVar[Callable[[], None]] = ContextVar("after_batch", default=lambda: None)
"""`infer` calls it after each batch."""


@contextlib.contextmanager
def _stopping_together(stop: StopSignals, agreement: collectives.Agreement) -> Iterator[None]:
    """Makes a signal that one rank receives in this context end `infer` on all ranks, after the same batch."""

    def leave(what: str = "stopped while verifying") -> None:
        stop.leave(what, agreement.now(stop.received))

    leave("stopped before verifying")
    before = _after_batch.set(leave)
    try:
        yield
    finally:
        _after_batch.reset(before)


def check_run(faces: Faces, folder: Path, cfg: Config, kind: str) -> None:
    """Raises InputError if it is already known that training of this `kind` (see `fit`) cannot begin.

    Another process may be working on the folder, the folder may hold a run of other settings or data, or the images may
    be fewer than one batch. A script that trains several networks calls it for all of them before it trains the first.
    """
    _require_batch(faces, folder, cfg, kind)
    collectives.on_first(lambda: refuse_if_locked(folder))
    _run_of(faces, folder, cfg, kind)


def _run_of(faces: Faces, folder: Path, cfg: Config, kind: str) -> Run:
    return Run(folder, cfg, kind, faces.sources | start_sources(cfg, kind), faces.identities)


def is_given(folder: Path) -> bool:
    """Returns True, and prints a line, if a run folder holds weights but no checkpoint, as a released model does."""
    given = collectives.on_first(lambda: _name_of_given(folder))
    if given:
        print(
            f"{folder} holds {given} and no checkpoint of a run: used as it is, nothing to train. "
            "To train from these weights, move the file to another place and set init_from to it."
        )
    return bool(given)


def _name_of_given(folder: Path) -> str:
    given = find_weights(folder, "best") or find_weights(folder, "last")
    return "" if given is None or any((folder / name).exists() for name in CHECKPOINTS) else given.name


def _columns_of(losses: Losses, faces: Faces) -> dict[str, Column]:
    """Returns the columns that the parameters of `losses` name. Raises InputError if one is no column."""
    names = [name for name in inspect.signature(losses).parameters if name != "repeats"]
    if unknown := [name for name in names if name not in faces.columns]:
        raise InputError(
            f"The loss function has the parameter {unknown[0]!r}, which is no column: "
            f"the columns are {', '.join(faces.columns)}."
        )
    return {name: faces.columns[name] for name in names}


def _with_repeats(losses: Losses, faces: Faces, progress: Progress) -> Losses:
    """Returns `losses` with the `repeats` of the epoch (see `Losses`), if that is one of its parameters."""
    if "repeats" not in inspect.signature(losses).parameters:
        return losses
    repeats = functools.lru_cache(1)(faces.repeats)
    return lambda **batch: losses(**batch, repeats=repeats(progress.epoch))


def _require_classes(columns: dict[str, Column], faces: Faces, header: nn.Module | None) -> None:
    """Raises InputError if a label is no class of the header; a GPU would end the process by an assertion."""
    kernel = getattr(header, "kernel", None)
    if kernel is None or "label" not in columns:
        return
    label = columns["label"].arrays[0][faces.rows]
    classes = header.classes if isinstance(header, ShardedHeader) else kernel.shape[1]
    if label.min() < 0 or label.max() >= classes:
        raise InputError(f"The labels are {label.min()} to {label.max()}, but the header has {classes} classes.")


def _require_batch(faces: Faces, folder: Path, cfg: Config, kind: str) -> None:
    """Raises InputError for fewer rows than one batch, for one identity only, and if ranks have different data."""
    collectives.require_same(faces.sources, "Give all processes the same data, pairs and output.")
    who = f"Teacher {folder.name}" if kind == "teacher" else folder.name
    if len(faces) < total_batch(cfg):
        each = len(faces) // (cfg.accumulate * (1 if cfg.global_batch else world_size()))
        raise InputError(f"{who}: {len(faces)} images are fewer than one batch: set batch_size to {each} or less.")
    if len(faces.identities) == 1:
        raise InputError(
            f"{who}: all {len(faces):,} images are of one identity, {faces.identities[0]}, and a classifier needs two "
            f"or more: set data, or label its images."
        )


# Inference ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def infer(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    cfg: Config,
    title: str,
    parts: Sequence[range] | None = None,
    receive: Callable[[range, np.ndarray], None] | None = None,
) -> np.ndarray | None:
    """Applies `function` to all rows of `columns` in order, with `network` in eval mode: returns (N, ...) float32.

    Computes in `cfg.infer_precision`, so embeddings and scores do not depend on the precision of training. With
    `parts`, only those ranges of rows are computed. With `receive`, it is called with the rows and the results of each
    batch, in order, and nothing is returned. Several ranks share the batches, and each gets all results.
    """
    device = device_of(cfg)
    count = len(next(iter(columns.values())).arrays[0])
    parts = [range(count)] if parts is None else parts
    batches = [rows for part in parts for rows in cut(part, cfg.infer_batch_size)]
    ranks, out = world_size(), None
    mine = batches[rank() :: ranks]
    if len(mine) * ranks < len(batches):
        mine.append(batches[-1])  # other ranks have one batch more, and every rank takes part in its all_gather
    was_training = network.training
    network.to(device).to(memory_format=torch.channels_last).eval()
    try:
        loaded = stream(columns, ((np.asarray(rows), None) for rows in mine), device, cfg.num_workers)
        bar = _Bar(title, count, count - sum(map(len, parts)))
        precision = mixed_precision(network, cfg.infer_precision, device, training=False)
        with uncompiled(network), precision, contextlib.closing(loaded), bar:
            for k, batch in enumerate(loaded):
                results = _gathered(function(**batch).float(), cfg.infer_batch_size).cpu().numpy()
                for rows, result in zip(batches[k * ranks : (k + 1) * ranks], np.split(results, ranks), strict=False):
                    result = result[: len(rows)]  # without the padding of `_gathered`
                    if receive:
                        receive(rows, result)
                    else:
                        out = np.empty((count, *result.shape[1:]), np.float32) if out is None else out
                        out[rows.start : rows.stop] = result
                    bar.update(len(rows))
                _after_batch.get()()
    finally:
        network.train(was_training)
    return out


def _gathered(result: torch.Tensor, size: int) -> torch.Tensor:
    """All-gathers results: (b, ...), b at most `size`, padded with zeros to `size` -> (ranks * size, ...).

    With one rank, returns (b, ...) unchanged.
    """
    if world_size() == 1:
        return result
    return collectives.gathered(torch.cat((result, result.new_zeros(size - len(result), *result.shape[1:]))))


# Progress -------------------------------------------------------------------------------------------------------------


class _Bar(tqdm):
    """Progress bar that counts images; shows nothing if the output is not a terminal."""

    def __init__(self, title: str, total: int, initial: int = 0):
        super().__init__(desc=title, total=total, initial=initial, unit=" images", leave=False, disable=None)
        self._shown = 0.0

    def due(self) -> bool:
        """Returns True at most every half second; every minute if the bar is not shown."""
        now = time.monotonic()
        if now - self._shown < (60 if self.disable else 0.5):
            return False
        self._shown = now
        return True


def _seed(*words: int) -> int:
    """Returns a seed of 63 bits that depends on all words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def duration(seconds: float) -> str:
    """Formats seconds as "3 h 07 min" or "7 min 03 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
