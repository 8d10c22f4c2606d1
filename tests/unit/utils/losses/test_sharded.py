"""Sharded headers on 1, 2 and 3 processes against the dense header on the whole batch.

All processes of a world size are started once, run every case and save their results to one file each. After its own
three steps, each world also takes the third step from the state that the next smaller world saved after two; world 1
uses the state of the dense header.
"""

import functools
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from utils.losses import (
    AdaDistill,
    ArcDistill,
    ArcFace,
    CosDistill,
    CosFace,
    CurricularFace,
    ElasticArcFace,
    ElasticCosFace,
)
from utils.losses.sharded import ShardedHeader, columns_of, sharded


class Harder(CosFace):
    """A header that only this test has: negatives above their target get a larger weight."""

    def adjusted(self, logits, column, target):
        return logits + (logits > self.s * target).scatter(1, column, False)


WORLDS = (1, 2, 3)
BATCH, WIDTH, CLASSES, STEPS = 12, 4, 11, 3
KINDS = {
    "ArcFace": functools.partial(ArcFace),
    "CosFace": functools.partial(CosFace),
    "ElasticArcFace": functools.partial(ElasticArcFace),
    "ElasticArcFace+": functools.partial(ElasticArcFace, std=0.0175, plus=True),
    "ElasticCosFace": functools.partial(ElasticCosFace),
    "ElasticCosFace+": functools.partial(ElasticCosFace, std=0.02, plus=True),
    "CurricularFace": functools.partial(CurricularFace, s=20.0),
    "Harder": functools.partial(Harder),
    "AdaDistill arc weighted": functools.partial(AdaDistill),
    "AdaDistill arc": functools.partial(AdaDistill, weighted=False),
    "AdaDistill cos weighted": functools.partial(AdaDistill, m=0.35, margin="cos"),
    "AdaDistill cos": functools.partial(AdaDistill, m=0.35, margin="cos", weighted=False),
    "ArcDistill": functools.partial(ArcDistill),
    "CosDistill": functools.partial(CosDistill),
}
CASES = [(name, CLASSES, dtype) for name in KINDS for dtype in (torch.float32, torch.float64)]
CASES += [
    (name, 4, torch.float32) for name in ("ArcFace", "CurricularFace", "AdaDistill arc")
]  # the third rank has no class
RESUMED = [case for case in CASES if case[2] == torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def build(name: str, classes: int, dtype: torch.dtype, as_kind: Callable[[type], type]) -> nn.Module:
    torch.manual_seed(1)
    kind = KINDS[name]
    return as_kind(kind.func)(WIDTH, classes, **kind.keywords).to(dtype)


def batches(name: str, classes: int, dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Yields embeddings, the teacher's if the header needs them, and labels of all ranks, with repeated classes."""
    random = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        teacher = torch.randn(BATCH, WIDTH, generator=random, dtype=dtype)
        student = teacher + torch.randn(BATCH, WIDTH, generator=random, dtype=dtype)
        label = torch.randint(classes, (BATCH,), generator=random)
        label[::5] = classes - 1
        yield [student, teacher, label] if "Distill" in name else [student, label]


class Training:
    """A header, its optimizer, and the results of each step, gathered on rank 0."""

    def __init__(self, header: nn.Module):
        self.header, self.found = header, []
        parameters = list(header.parameters())
        self.optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1) if parameters else None

    def step(self, batch: list[torch.Tensor], seed: int) -> None:
        rank, ranks = place(self.header)
        student, *others = (one.chunk(ranks)[rank] for one in batch)
        student = student.clone().requires_grad_()
        torch.manual_seed(seed)
        loss = self.header.loss(student, *others)
        loss.backward()
        found = {"loss": loss.detach(), "gradient": student.grad / ranks}
        if self.optimizer:
            found["kernel gradient"] = self.whole(self.header.kernel.grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if isinstance(self.header, AdaDistill):
            found["alpha"] = self.header.alpha
        self.found.append(found)

    def whole(self, columns: torch.Tensor) -> torch.Tensor | None:
        return self.header.gather(columns) if isinstance(self.header, ShardedHeader) else columns.clone()

    def state(self) -> dict[str, torch.Tensor] | None:
        """Returns the content of a checkpoint on rank 0, None on other ranks."""
        is_sharded = isinstance(self.header, ShardedHeader)
        state = deepcopy(self.header.dense_state_dict() if is_sharded else self.header.state_dict())
        momentum = self.optimizer and self.whole(self.optimizer.state[self.header.kernel]["momentum_buffer"])
        return state if momentum is None or state is None else {**state, "momentum": momentum}

    def restore(self, state: dict[str, torch.Tensor] | None) -> None:
        momentum = state and state.pop("momentum", None)
        self.header.load_dense_state_dict(state)
        if self.optimizer:
            mine = torch.empty_like(self.header.kernel)
            self.header.scatter(momentum, mine)
            self.optimizer.state[self.header.kernel]["momentum_buffer"] = mine


def place(header: nn.Module) -> tuple[int, int]:
    """Returns the index of the part of the batch that a header gets, and the number of parts."""
    return (dist.get_rank(), dist.get_world_size()) if isinstance(header, ShardedHeader) else (0, 1)


def train(training: Training, case: tuple) -> dict:
    """Takes three steps; returns their results, and the states after two steps and at the end."""
    for step, batch in enumerate(batches(*case)):
        before = training.state() if step == STEPS - 1 else None
        training.step(batch, step)
    return {"steps": training.found, "second": before, "third": training.state(), "t": getattr(training.header, "t", 0)}


def resume(training: Training, state: dict | None, case: tuple) -> dict | None:
    """Restores the state after two steps, and returns the state after the third."""
    training.restore(state)
    *_, batch = batches(*case)
    training.step(batch, STEPS - 1)
    return training.state()


def work(rank: int, world: int, folder: Path) -> None:
    """Runs all cases on one rank, and saves its results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store {world}", rank=rank, world_size=world)
    saved = torch.load(folder / f"{world - 1} 0.pt") if rank == 0 else None
    found = {}
    for case in CASES:
        found[case] = train(Training(build(*case, sharded)), case)
        if case in RESUMED:
            found[case]["resumed"] = resume(Training(build(*case, sharded)), saved and saved[case]["second"], case)
    for function in (averaged, built, widest, unknown, refused):
        found[function.__name__] = function()
    torch.save(found, folder / f"{world} {rank}.pt")
    dist.destroy_process_group()


def averaged() -> torch.Tensor:
    """Returns a backbone's gradient, averaged by DistributedDataParallel, with a second loss beside the margin loss."""
    return gradient_of_backbone(DistributedDataParallel, build("ArcFace", CLASSES, torch.float64, sharded))


def gradient_of_backbone(wrap: Callable, header: nn.Module) -> torch.Tensor:
    rank, ranks = place(header)
    image, target, label = (one.chunk(ranks)[rank] for one in next(batches("Distill", CLASSES, torch.float64)))
    torch.manual_seed(3)
    layer = nn.Linear(WIDTH, WIDTH).double()
    backbone = wrap(layer)
    embedding = F.normalize(backbone(image))
    (header.loss(embedding, label) + F.mse_loss(embedding, target)).backward()
    return layer.weight.grad


def built() -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """Returns newly built kernels with many classes, and the state of the random generator after that."""
    found = []
    for kind in (ArcFace, AdaDistill):
        torch.manual_seed(4)
        header = sharded(kind)(40, CLASSES, 30.0, m=0.2)
        found.append((header.gather(header.kernel), torch.get_rng_state()))
        assert (header.s, header.m) == (30.0, 0.2)
    return found


class Widths(TorchDispatchMode):
    """Records the size of the last dimension of every matrix that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2:
            self.seen.add(result.shape[-1])
        return result


def widest() -> tuple[int, torch.Size]:
    """Returns the largest matrix width in a step of CurricularFace with 100 classes, and the kernel's shape."""
    header = build("CurricularFace", 100, torch.float32, sharded)
    rank, ranks = place(header)
    embeddings, label = (one.chunk(ranks)[rank] for one in next(batches("", 100, torch.float32)))
    with Widths() as widths:
        header.loss(embeddings.requires_grad_(), label).backward()
    return max(widths.seen), header.kernel.shape


def unknown() -> torch.Tensor:
    """Returns the loss of a label without a class."""
    header = build("ArcFace", CLASSES, torch.float32, sharded)
    return header.loss(torch.ones(2, WIDTH), torch.tensor([0, CLASSES])).detach()


def refused() -> str:
    """Returns the error of rank 0 for a state dict with fewer classes, before any collective."""
    header = build("ArcFace", CLASSES, torch.float32, sharded)
    if dist.get_rank():
        return ""
    with pytest.raises(RuntimeError) as caught:
        header.load_dense_state_dict(ArcFace(WIDTH, CLASSES - 1).state_dict())
    return str(caught.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """Returns the results of each rank for each world size; 0 is the dense header."""
    folder = tmp_path_factory.mktemp("worlds")
    torch.save({case: train(Training(build(*case, lambda kind: kind)), case) for case in CASES}, folder / "0 0.pt")
    mp.set_forkserver_preload([__name__])  # imports take longer than the tests
    for world in WORLDS:
        mp.start_processes(work, (world, folder), world, start_method="forkserver")
    return {
        world: [torch.load(folder / f"{world} {rank}.pt") for rank in range(max(1, world))] for world in (0, *WORLDS)
    }


def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max().clamp_min(1)


def assert_same(found: dict, wanted: dict, dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradients_equal_the_dense_header(found, world, case):
    for step, wanted in enumerate(found[0][0][case]["steps"]):
        ranks = [rank[case]["steps"][step] for rank in found[world]]
        assert all(torch.equal(rank["loss"], ranks[0]["loss"]) for rank in ranks)
        whole = ranks[0] | {"gradient": torch.cat([rank["gradient"] for rank in ranks])}
        assert_same(whole, wanted, case[2])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
@pytest.mark.parametrize("world", WORLDS)
def test_a_header_equals_the_dense_one_after_three_steps(found, world, case):
    before, wanted = (found[0][0][case][when] for when in ("second", "third"))
    assert not torch.equal(before["kernel"], wanted["kernel"]) or case[0] in ("ArcDistill", "CosDistill")
    assert_same(found[world][0][case]["third"], wanted, case[2])
    assert all(rank[case]["t"] == found[world][0][case]["t"] for rank in found[world])


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case[0])
@pytest.mark.parametrize("world", WORLDS)
def test_a_header_can_be_resumed_from_fewer_ranks(found, world, case):
    assert_same(found[world][0][case]["resumed"], found[0][0][case]["third"], case[2])


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_averaged_over_ranks_equal_those_of_the_whole_batch(found, world):
    wanted = gradient_of_backbone(lambda layer: layer, build("ArcFace", CLASSES, torch.float64, lambda kind: kind))
    for rank in found[world]:
        assert_close(rank["averaged"], wanted, torch.float64)


@pytest.mark.parametrize("world", WORLDS)
def test_a_sharded_header_is_initialised_as_the_dense_one(found, world):
    for kind, *ranks in zip((ArcFace, AdaDistill), *(rank["built"] for rank in found[world]), strict=True):
        torch.manual_seed(4)
        assert torch.equal(ranks[0][0], kind(40, CLASSES).kernel)
        assert all(torch.equal(state, torch.get_rng_state()) for _, state in ranks)


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_computes_no_matrix_wider_than_its_columns_and_one(found, world):
    for rank, columns in zip(found[world], {1: [100], 2: [50, 50], 3: [34, 34, 32]}[world], strict=True):
        assert rank["widest"] == (columns + 1, (WIDTH, columns + 1))


@pytest.mark.parametrize("world", WORLDS)
def test_a_label_without_a_class_gives_an_infinite_loss(found, world):
    assert all(rank["unknown"] == torch.inf for rank in found[world])


@pytest.mark.parametrize("world", WORLDS)
def test_a_state_dict_of_other_classes_is_refused(found, world):
    assert "torch.Size([4, 11])" in found[world][0]["refused"]


def test_classes_are_divided_without_gap(monkeypatch):
    for ranks in (1, 2, 3, 8):
        monkeypatch.setattr("utils.losses.sharded.world_size", lambda ranks=ranks: ranks)
        for classes in (1, 4, 7, 16, 17):
            parts = [columns_of(rank, classes) for rank in range(ranks)]
            assert [k for part in parts for k in part] == list(range(classes))
            assert max(map(len, parts)) == -(-classes // ranks)


def test_a_dense_header_uses_the_mean_cross_entropy():
    header, label = CosFace(WIDTH, CLASSES), torch.tensor([3, 1])
    embeddings = torch.randn(2, WIDTH)
    assert torch.equal(header.loss(embeddings, label), F.cross_entropy(header(embeddings, label), label))
