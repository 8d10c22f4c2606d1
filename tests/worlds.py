"""Programs that the tests of several processes run under torchrun: the first argument names one of PROGRAMS."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config.config import Config
from tests.runs import FEATURES, run_script
from utils.data.columns import Column
from utils.data.faces import Faces
from utils.distributed import collectives
from utils.distributed.world import rank, world_size
from utils.errors import InputError
from utils.losses import AdaDistill, build_header
from utils.process import Interrupted, guarded, setup
from utils.training.engine import fit, infer
from utils.training.extract import Output, embed_all
from utils.training.state import Progress

HEADERS = ("ElasticArcFace", "ElasticArcFace+", "CurricularFace", "AdaDistill", "ArcDistill")
CASES = [(header, sharding) for header in HEADERS for sharding in (False, True)]
FROM_ONE = [case for case in CASES if case[0] in ("ElasticArcFace", "AdaDistill")]
EXACT = [("ElasticArcFace", False), ("ElasticArcFace", True)]
STOPPED_AFTER = 2  # steps, of three in an epoch
DATA = ("data", "pairs", "cache")


def stages(given: list[str]) -> list[tuple[str, list[str]]]:
    """Returns scripts and arguments of the stages that train or extract, in order."""
    both, dual = [*given, "--flip_targets"], [*given, "--is_dual_layer"]
    return [
        ("train.py", given),
        ("extract_all.py", both),
        ("fc_EArc.py", both),
        ("dual_layer_EAF-Fusion.py", given),
        ("dual_layer_EAF-Fusion.py", [*given, "--has_dropout"]),
        ("KD_alone.py", given),
        ("KD_CEL.py", dual),
        ("KD_AdaDistill.py", given),
        ("train.py", [*given, "--is_teacher_baseline", "--ethnicity", "quarter2"]),
    ]


def run_stages(*given: str) -> None:
    for script, arguments in stages([*given]):
        run_script(script, arguments)


def run_with_kills(plan: str, *given: str) -> None:
    """Runs train.py and kills one process in each attempt, before a step of that attempt.

    The plan "1:4,0:3" kills rank 1 before step 4 of the first attempt, and rank 0 before step 3 of the second.
    """
    take, taken, attempt = Progress._take_step, [], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    killed_rank, step = [*plan.split(","), *[":"] * 99][attempt].split(":")

    def take_or_kill(self, *values):
        taken.append(self)
        if (os.environ["RANK"], str(len(taken))) == (killed_rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, *values)

    Progress._take_step = take_or_kill
    run_script("train.py", [*given])


def run_while_one_waits(seconds: str, *given: str) -> None:
    """Runs train.py. Before step 3 rank 1 is killed, and rank 0 handles no signal, as if it waited for a GPU."""
    take, taken = Progress._take_step, []

    def take_wait_or_kill(self, *values):
        taken.append(self)
        if len(taken) == 3:
            if rank():
                os.kill(os.getpid(), signal.SIGKILL)
            until = time.monotonic() + float(seconds)
            while time.monotonic() < until:
                time.sleep(0.1)
        take(self, *values)

    Progress._take_step = take_wait_or_kill
    run_script("train.py", [*given])


# Small runs ----------------------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    """A network whose outputs depend on the whole batch."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(FEATURES, 16, bias=False)  # a bias before BatchNorm has no effect
        self.bn = nn.BatchNorm1d(16)

    def forward(self, image):
        return self.bn(self.fc(image.flatten(1) / 100))


def settings(folder: str | Path) -> Config:
    """Returns settings for the files that `tests.conftest.small_config` has written into `folder`."""
    paths = {name: f"{folder}/{name}" for name in (*DATA, "output")}
    small = {"ethnicities": ("A", "B"), "embedding_size": 16, "batch_size": 6, "device": "cpu", "s": 8.0, "m": 0.2}
    return Config(**paths, **small, global_batch=True, sync_bn=True, infer_batch_size=3)


def folder_of(cfg: Config, name: str, header: str, sharding: bool) -> Path:
    return cfg.teacher_dir(f"{name} {header}{' sharded' if sharding else ''}")


class Layers(nn.Module):
    """Layers used in another order than defined, with dropout and without BatchNorm; `kept` holds the dropout masks."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.last, self.first = nn.Linear(64, 16), nn.Linear(FEATURES, 64)
        self.middle = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
        self.dropout, self.kept = nn.Dropout(dropout), []

    def forward(self, image):
        hidden = self.dropout(F.relu(self.middle(self.first(image.flatten(1) / 100))) + 0.1)
        self.kept.append((hidden != 0).detach())
        return self.last(hidden)


def train(
    cfg: Config,
    name: str,
    kind: str = "ElasticArcFace",
    sharding: bool = False,
    before_step: Callable[[int], None] | None = None,
    network: Callable[[], nn.Module] = Normalised,
    validate: Callable[[nn.Module], float] | None = None,
    spoil: Callable[[int], float] = lambda _: 1.0,
) -> tuple[nn.Module, nn.Module]:
    """Trains two epochs of three steps in a run folder; returns the network and the header.

    `before_step` is called with the number of the step, from 1, and the margin loss is multiplied by `spoil` of it.
    """
    setup(cfg)
    faces, network = Faces(cfg, flip=True), network()
    calls: list[torch.Tensor] = []
    given = replace(cfg, header_sharding=sharding, s=8.0)
    if kind == "AdaDistill":
        header = build_header("AdaArcDistill", faces.num_classes, given, "AdaArcDistill")
    elif kind == "ArcDistill":
        header = build_header("ArcDistill", faces.num_classes, given, "ArcDistill")
        header.set_centres(torch.randn(16, faces.num_classes, generator=torch.Generator().manual_seed(1)))
    else:
        header = build_header(kind, faces.num_classes, replace(given, loss=kind, m=0.2, std=0.05), "teacher")

    def losses(image, label):
        calls.append(label)
        if before_step:
            before_step(len(calls))
        embedding = F.normalize(network(image))
        teacher = F.normalize(image.flatten(1)[:, :16])
        teachers = [teacher] if isinstance(header, AdaDistill) else []
        margin = spoil(len(calls)) * header.loss(embedding, *teachers, label)
        loss = {"margin": margin, "kd": F.mse_loss(embedding, teacher)}
        return loss | ({"alpha": header.alpha} if kind == "AdaDistill" else {})

    validated = (lambda: ({}, validate(network))) if validate else None
    folder, cfg = folder_of(cfg, name, kind, sharding), replace(cfg, num_epoch=2, lr=0.5)
    measures = ("alpha",) if kind == "AdaDistill" else ()
    fit(losses, faces, folder, cfg, network, header, kind="teacher", measures=measures, validate=validated)
    return network, header


def train_and_stop(cfg: Config, name: str, kind: str, sharding: bool, **options) -> None:
    """Sends a signal to the last rank only; all ranks must stop after the same step."""

    def stop(number: int) -> None:
        late = world_size() > 1  # the other ranks learn of it one step later
        if rank() == world_size() - 1 and number == STOPPED_AFTER - late:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(cfg, name, kind, sharding, stop, **options)
    except Interrupted as stopped:
        assert f"after step {STOPPED_AFTER} of 3" in str(stopped), stopped
        return
    raise AssertionError("it was not stopped")


def two(folder: str) -> None:
    cfg = settings(folder)
    for case in CASES:
        train(cfg, "two", *case)
        train_and_stop(cfg, "moved", *case)
    for case in FROM_ONE:
        train(cfg, "from one", *case)
    _infer(cfg, "two")
    _as_published(cfg)
    _spoilt(cfg)
    _saved_when_due(cfg)


def three(folder: str) -> None:
    cfg = settings(folder)
    for case in CASES:
        train(cfg, "moved", *case)
    for case in EXACT:
        train(cfg, "three", *case, network=Layers)
        train_and_stop(cfg, "three stopped", *case, network=Layers)
        train(cfg, "three stopped", *case, network=Layers)
    _infer(cfg, "three")
    _refusals(cfg)


def _as_published(cfg: Config) -> None:
    """Trains as published: each process has its own batch, BatchNorm statistics and dropout.

    Rank 1 gets a signal while all ranks verify.
    """
    cfg = published(cfg, 3)
    found = {}
    train(cfg, "published", network=Layers)
    network, _ = train(cfg, "dropout", network=lambda: Layers(0.5))
    found["kept"] = network.kept[0]

    def validate(network: nn.Module) -> float:
        found["verified"] = {name: value.clone() for name, value in network.state_dict().items()}
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        infer(**inference(20), cfg=cfg, title="test")
        return 1.0

    def keep(network: nn.Module) -> float:
        found.setdefault("shared", {name: value.clone() for name, value in network.state_dict().items()})
        return 1.0

    train(replace(cfg, sync_bn=True), "shared", validate=keep)
    try:
        train(cfg, "verified", validate=validate)
    except Interrupted as stopped:
        found["said"] = str(stopped)
    torch.save(found, Path(cfg.output) / f"published {rank()}.pth")


def published(cfg: Config, batch_size: int) -> Config:
    return replace(cfg, global_batch=False, sync_bn=False, batch_size=batch_size)


def _spoilt(cfg: Config) -> None:
    """Trains with a loss that is NaN on rank 1 in the second step; saves the error and the kernels."""
    kernels = []

    def spoil(step: int) -> float:
        return float("nan") if step == 2 and rank() else 1.0

    def keep(self, *given):
        take(self, *given)
        kernels.append(self.header.kernel.detach().clone())

    take = Progress._take_step
    Progress._take_step = keep
    try:
        train(cfg, "spoilt", spoil=spoil)
    except InputError as error:
        torch.save([str(error), *kernels], Path(cfg.output) / f"spoilt {rank()}.pth")
    finally:
        Progress._take_step = take


def _saved_when_due(cfg: Config) -> None:
    """Records where a run is saved if a checkpoint is due in the first step, and none is due after that."""
    saves, due, save = [], Progress.due, Progress.save

    def saved(self):
        saves.append([self.epoch, self.step])
        self.is_saved = True
        save(self)

    Progress.save, Progress.due = saved, lambda self, _: not hasattr(self, "is_saved")
    try:
        train(cfg, "due")
    finally:
        Progress.save, Progress.due = save, due
    (Path(cfg.output) / f"due {rank()}.json").write_text(json.dumps(saves))


def _infer(cfg: Config, world: str) -> None:
    """Saves what each rank gets from `infer`, and writes arrays on rank 0."""
    output, found = Path(cfg.output), {}
    for count in (20, 2):
        found[str(count)] = infer(**inference(count), cfg=cfg, title="test")
    np.savez(output / f"{world} {rank()}.npz", **found)
    given = inference(20)
    outputs = [Output(output / f"{world}{k}.npy", {"images": world}, given["function"]) for k in range(2)]
    embed_all(outputs, given["network"], given["columns"], cfg)


def inference(count: int) -> dict:
    """Returns arguments of `infer`: a network and `count` rows."""
    torch.manual_seed(0)
    network = nn.Linear(5, 16)
    rows = np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)
    return {"function": lambda x: network(x), "network": network, "columns": {"x": Column((rows,))}}


def _refusals(cfg: Config) -> None:
    """Saves the errors of each rank where settings or data of one rank differ."""
    here, said = rank(), []
    moved = replace(cfg, data=cfg.data if here < 2 else f"{cfg.data} 2", cache=f"{cfg.cache} {here}")
    columns = inference(20)["columns"]
    attempts = [
        lambda: setup(replace(cfg, lr=0.2 if here == 2 else 0.1)),
        lambda: setup(replace(cfg, batch_size=4)),
        lambda: setup(replace(cfg, batch_size=3)),
        lambda: setup(replace(cfg, batch_size=3), trains=False),
        lambda: train(moved, "refused"),
        lambda: embed_all([Output(Path(cfg.output) / "x.npy", {"weights": here}, None)], nn.Linear(1, 1), columns, cfg),
        lambda: collectives.on_first(lambda: (_ for _ in ()).throw(InputError("rank 0 is not content"))),
    ]
    for attempt in attempts:
        try:
            attempt()
        except InputError as error:
            said.append(str(error))
    (Path(cfg.output) / f"said {here}.txt").write_text("\n".join(said))


PROGRAMS = {"stages": run_stages, "kills": run_with_kills, "waits": run_while_one_waits, "two": two, "three": three}


if __name__ == "__main__":
    guarded(lambda: PROGRAMS[sys.argv[1]](*sys.argv[2:]), alone=False)
