"""Several processes under torchrun, with gloo on the CPU, against one."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from config.config import Config
from tests.conftest import small_config, write_images
from tests.runs import GROUPS, arguments, difference, run_script, torchrun
from tests.runs import train as train_small
from tests.worlds import (
    CASES,
    EXACT,
    FROM_ONE,
    Layers,
    folder_of,
    inference,
    published,
    settings,
    train,
    train_and_stop,
)
from utils.distributed import collectives, launch
from utils.distributed.batchnorm import CpuSyncBatchNorm, share_statistics
from utils.distributed.world import launcher, share_of_cores
from utils.errors import InputError
from utils.process import Interrupted
from utils.storage.tensors import save
from utils.training.engine import infer

DIVIDED = ("--global_batch", "--sync_bn", "--header_sharding")


def weights(folder: Path, which: str = "best_backbone") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{which}.pth", weights_only=True)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    assert one.keys() == other.keys()
    pairs = [(one[name].double(), other[name].double()) for name in one]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)


# Every stage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two(faces, trained, tmp_path_factory) -> Path:
    """The output of all stages by two processes."""
    output = tmp_path_factory.mktemp("by two")
    shutil.copytree(trained[0].split_dir, output / "baseline" / "split")
    status, said = torchrun(2, "tests.worlds", "stages", *arguments(faces, output), *DIVIDED)
    assert status == 0, said
    return output


@pytest.fixture(scope="module")
def by_one(trained, tmp_path_factory) -> Path:
    """The output of all stages by one process, with the student that only the other one has."""
    cfg, given = trained
    output = tmp_path_factory.mktemp("by one") / "output"
    shutil.copytree(cfg.output, output)
    run_script("KD_CEL.py", [*given, "--output", str(output), "--is_dual_layer"])
    return output


@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        *((f"teachers/{group}", 1e-3) for group in GROUPS),
        ("adaptors/SL", 1e-3),
        ("adaptors/DuL", 1e-3),
        ("students/iresnet_tiny/SL-a-KD", 5e-2),
        ("students/iresnet_tiny/DuL-EAF-KD", 5e-2),
        ("students/iresnet_tiny/SL-AdaArcDistill", 5e-2),
    ],
)
def test_two_processes_train_what_one_does(by_one, by_two, run, tolerance):
    """But for rounding, which 16 steps with clipped gradients amplify, and targets that are rounded already."""
    one, two = (output / "specialized" / "iresnet_tiny" / run for output in (by_one, by_two))
    files = sorted(path.name for path in one.glob("*.pth"))
    assert files == sorted(path.name for path in two.glob("*.pth"))
    for which in ("last_backbone", "last_header") if "last_header.pth" in files else ("last_backbone",):
        assert apart(weights(one, which), weights(two, which)) < tolerance
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
    for here, there in zip(*logs, strict=True):
        assert here["lr"] == there["lr"]
        assert {**here["loss"], **here["measures"]} == pytest.approx({**there["loss"], **there["measures"]}, rel=1e-3)
        assert here["scores"].keys() == there["scores"].keys()


def test_two_processes_extract_what_one_does(by_one, by_two):
    arrays = sorted(path.relative_to(by_one) for path in by_one.rglob("*.npy") if "evaluation" not in path.parts)
    assert len(arrays) == 2 * len(GROUPS) + 4
    for path in arrays:
        if "DLDPO" not in path.parts:  # has dropout, which is drawn otherwise
            assert np.abs(np.load(by_one / path) - np.load(by_two / path)).max() < 1e-3, path


def test_a_stage_of_two_processes_is_read_by_one(by_two, faces, tmp_path, capsys):
    """Files are those of one process: it finds the embeddings up to date, and the teachers trained."""
    output = tmp_path / "output"
    shutil.copytree(by_two, output)
    given = [*arguments(faces, output), *DIVIDED, "--flip_targets"]
    run_script("train.py", given)
    run_script("extract_all.py", given)
    said = capsys.readouterr().out
    assert said.count("is already trained") == len(GROUPS)
    assert said.count("is up to date") == 2 * len(GROUPS)


# A process that dies --------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_processes_were_killed(by_two, faces, tmp_path):
    given = [*arguments(faces, tmp_path), *DIVIDED, "--ethnicity", "Asian", "--checkpoint_minutes", "0"]
    status, said = torchrun(2, "tests.worlds", "kills", "1:4,0:1", *given, options=("--max-restarts", "2"))
    assert status == 0, said
    told = re.findall(r"train.py: another process of this run has ended \(.*by peer.*\); what was saved", said)
    assert len(told) == 2
    assert said.count("continuing in epoch 2 after step 0 of 2") == 2
    base = Path("specialized/iresnet_tiny/teachers/Asian")
    assert difference(by_two / base, tmp_path / base) == ""


def test_a_rank_that_waited_for_a_gpu_says_that_another_was_killed(faces, tmp_path):
    """It handles torchrun's SIGTERM late. `make soak` has a wait so long that torchrun kills the rank."""
    given = [*arguments(faces, tmp_path), *DIVIDED, "--ethnicity", "Asian", "--checkpoint_minutes", "0"]
    status, said = torchrun(2, "tests.worlds", "waits", "3", *given)
    assert status == 1
    lines = [line for line in said.splitlines() if line.startswith("train.py")]
    assert len(lines) == 1
    assert re.match(r"train.py: another process of this run has ended \(.*by peer.*\); what was saved", lines[0])
    assert weights(tmp_path / "specialized/iresnet_tiny/teachers/Asian", "checkpoint")["epoch"] == 1


def test_one_process_says_for_all_what_is_wrong(faces, tmp_path):
    status, said = torchrun(2, "train.py", *arguments(faces, tmp_path), "--pairs", "nowhere")
    assert status == 1
    assert said.count("train.py: Missing: nowhere/African_test.bin") == 1
    assert "another process" not in said
    assert said.count("Traceback") == 1  # torchrun's own, that a process has ended


# Small runs on one, two and three processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Config:
    """Settings of runs that one, two and three processes have finished, and that have moved between them."""
    folder = tmp_path_factory.mktemp("worlds")
    small_config(folder)
    write_images(folder / "data 2", {"A": {"a1": 8}, "B": {"b1": 8}})
    cfg = settings(folder)
    for case in CASES:
        train(cfg, "one", *case)
    for case in FROM_ONE:
        train_and_stop(cfg, "from one", *case)
    train(published(cfg, 6), "published one", network=Layers)
    for program, processes in (("two", 2), ("three", 3)):
        status, said = torchrun(processes, "tests.worlds", program, str(folder))
        assert status == 0, said
    return cfg


@pytest.mark.parametrize(
    ("name", "header", "sharding"),
    [(name, *case) for name in ("two", "moved") for case in CASES] + [("from one", *case) for case in FROM_ONE],
)
def test_a_run_is_the_same_on_any_number_of_processes(worlds, name, header, sharding):
    """`two` is that of two processes, `from one` was stopped on one, `moved` on two and went on on three."""
    one, other = (folder_of(worlds, which, header, sharding) for which in ("one", name))
    for which in ("last_backbone", "last_header"):
        assert apart(weights(one, which), weights(other, which)) < 1e-5
    here, there = (weights(folder, "checkpoint") for folder in (one, other))
    assert here["epoch"] == there["epoch"] == 2
    momentum = [{str(k): own["momentum_buffer"] for k, own in s["optimizer"]["state"].items()} for s in (here, there)]
    assert apart(*momentum) < 1e-5
    for one_epoch, other_epoch in zip(here["log"], there["log"], strict=True):
        assert one_epoch["loss"] == pytest.approx(other_epoch["loss"], rel=1e-5)
        assert one_epoch["measures"] == pytest.approx(other_epoch["measures"], rel=1e-5)


@pytest.mark.parametrize(("header", "sharding"), EXACT)
def test_a_run_of_three_that_was_stopped_has_the_bits_of_one_that_was_not(worlds, header, sharding):
    """Sums of three are rounded otherwise in another order, as those of two are not."""
    assert difference(*(folder_of(worlds, name, header, sharding) for name in ("three", "three stopped"))) == ""


def test_as_published_each_process_has_a_batch(worlds, capsys):
    cfg = published(worlds, 6)
    one, two = (folder_of(cfg, name, "ElasticArcFace", False) for name in ("published one", "published"))
    assert apart(weights(one, "last_backbone"), weights(two, "last_backbone")) < 1e-5
    rates = [[json.loads(line)["lr"] for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
    assert rates[0] == rates[1]
    train(cfg, "published", network=Layers)
    assert "is already trained" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"batch_size of all processes was 6, now 3\)"):
        train(published(cfg, 3), "published", network=Layers)


def test_as_published_each_process_has_its_statistics_and_dropout(worlds):
    one, two = (torch.load(Path(worlds.output) / f"published {rank}.pth", weights_only=True) for rank in range(2))
    assert not torch.equal(one["kept"], two["kept"])
    assert apart(one["verified"], two["verified"]) == 0  # rank 0's, for both
    own, shared = (one[name]["bn.running_mean"] for name in ("verified", "shared"))
    assert (own - shared).abs().max() > 0.1 * shared.abs().max()
    assert apart(one["shared"], two["shared"]) == 0


def test_a_signal_while_verifying_stops_all_with_the_epoch_saved(worlds):
    state = weights(folder_of(worlds, "verified", "ElasticArcFace", False), "checkpoint")
    assert (state["epoch"], state["step"], state["log"]) == (0, 3, [])
    for rank in range(2):
        said = torch.load(Path(worlds.output) / f"published {rank}.pth", weights_only=True)["said"]
        assert said.startswith("stopped while verifying; continue with: torchrun --standalone --nproc_per_node 2 -- ")


def test_a_number_that_is_not_finite_on_one_process_ends_all_before_that_step(worlds):
    one, two = (torch.load(Path(worlds.output) / f"spoilt {rank}.pth", weights_only=True) for rank in range(2))
    assert one[0] == two[0]
    assert "The loss 'margin' is nan in epoch 1, step 2, which was not taken" in one[0]
    assert torch.equal(one[1], one[2])
    assert torch.equal(one[2], two[2])


def test_a_checkpoint_that_was_due_is_saved_once(worlds):
    """A step late, then after each epoch; before the first weights there must be a checkpoint, and there is."""
    for rank in range(2):
        assert json.loads((Path(worlds.output) / f"due {rank}.json").read_text()) == [[0, 2], [1, 0], [2, 0]]


def test_the_processes_of_a_run_are_noted(worlds):
    about = json.loads((folder_of(worlds, "moved", "ElasticArcFace", False) / "config.json").read_text())
    assert [session["versions"]["processes"] for session in about["sessions"]] == ["2", "3"]


@pytest.mark.parametrize(("world", "processes"), [("two", 2), ("three", 3)])
def test_inference_is_shared_and_gives_the_same_bits(worlds, world, processes):
    for count in (20, 2):  # batches of three rows: as many for all but one process, and fewer than processes
        wanted = infer(**inference(count), cfg=worlds, title="test")
        for rank in range(processes):
            assert np.array_equal(np.load(Path(worlds.output) / f"{world} {rank}.npz")[str(count)], wanted)
    wanted = infer(**inference(20), cfg=worlds, title="test")
    for k in range(2):
        assert np.array_equal(np.load(Path(worlds.output) / f"{world}{k}.npy"), wanted)


def test_what_differs_between_processes_is_refused_by_all(worlds):
    said = [(Path(worlds.output) / f"said {rank}.txt").read_text().splitlines() for rank in range(3)]
    assert said[0] == said[1] == said[2]
    wanted = [
        "lr is 0.1 on process 0 and 0.2 on process 2. Start all with the same settings.",
        "batch_size = 4 cannot be divided among 3 processes with global_batch: set it to a multiple of 3, 6 or more.",
        "batch_size = 3 cannot be divided among 3 processes with global_batch: set it to a multiple of 3, 6 or more.",
        "images is '[0-9a-f]{64}' on process 0 and '[0-9a-f]{64}' on process 2. Give all processes the same data, .*",
        r".*/x.npy is \{'weights': 0\} on process 0 and \{'weights': 1\} on process 1. Give .* the same data.",
        "rank 0 is not content",
    ]
    for line, pattern in zip(said[0], wanted, strict=True):
        assert re.fullmatch(pattern, line)


# Start and end of the process group -----------------------------------------------------------------------------------


@pytest.fixture
def connect(monkeypatch) -> Iterator[Callable[..., dist.Store]]:
    """A function that connects a rank and returns its store; the server is the same for all, as torchrun's is."""
    server, opened = dist.HashStore(), []
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def connected(rank: int = 0, **environment: str) -> dist.Store:
        monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(server, rank, 3)]))
        for name, value in {"RANK": str(rank), "WORLD_SIZE": "3", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launch, "_store", None)
        monkeypatch.setattr(launch, "_connections", itertools.count())
        launch.connect()
        opened.extend([sys.stdout] if rank else [])
        return launch._store

    yield connected
    for stream in opened:
        stream.close()


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        ([["a", "b", "c"]] * 3, [0, 1, 2]),
        ([["a"], ["b"], ["c"]], [0, 0, 0]),  # each process sees its own GPU only
        ([["a"]] * 3, [0, None, None]),
        ([["a", "b"]] * 3, [0, 1, None]),
    ],
)
def test_every_process_has_a_gpu_of_its_own(connect, monkeypatch, seen, chosen):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    for local, (names, wanted) in enumerate(zip(seen, chosen, strict=True)):
        found = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda names=names: len(names))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index, names=names: SimpleNamespace(uuid=names[index])
        )
        monkeypatch.setattr(torch.cuda, "set_device", found.append)
        if wanted is not None:
            launch._set_gpu(local, connect(local))
            assert found == [wanted]
            continue
        with pytest.raises(InputError, match=f"^Process {local} of this machine has no GPU of its own, it sees"):
            launch._set_gpu(local, connect(local))


def test_ranks_that_do_not_start_are_named(connect, monkeypatch):
    monkeypatch.setattr(launch, "START_TIMEOUT", timedelta(seconds=0.1))
    for rank, missing in ((1, "0, 2"), (0, "2")):
        with pytest.raises(InputError, match=f"^Process {missing} has not started: see torchrun's log.$"):
            launch._wait_for_start(connect(rank), rank, 3)
    launch._wait_for_start(connect(2), 2, 3)


def test_a_rank_does_not_wait_for_one_that_has_ended(connect):
    connect(1)
    assert launch.is_first_to_end()
    with pytest.raises(SystemExit):
        launch._wait_for_start(connect(0), 0, 3)


def test_a_restart_sees_no_keys_of_killed_ranks(connect):
    connect(1).set("started 1", "")
    assert connect(0).check(["started 1"])
    assert not connect(0, TORCHELASTIC_RESTART_COUNT="1").check(["started 1"])


def test_restarts_on_several_machines_need_a_new_store(connect):
    connect(1, GROUP_WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT="1").set("x", "")  # machines count failures apart
    assert connect(0, TORCHELASTIC_RESTART_COUNT="0").check(["x"])
    connect(0, TORCHELASTIC_MAX_RESTARTS="3", TORCHELASTIC_USE_AGENT_STORE="False")
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        connect(0, TORCHELASTIC_USE_AGENT_STORE="True")


def test_only_rank_0_prints_and_shows_progress(connect, capsys):
    connect(1)
    print("a result")
    assert capsys.readouterr().out == ""
    assert not sys.stderr.isatty()


def test_the_first_rank_that_ends_prints_why(connect, monkeypatch):
    assert [connect(rank) and launch.is_first_to_end() for rank in (2, 0, 1)] == [True, False, False]
    monkeypatch.setattr(launch, "_store", None)  # before the store is reached, the first rank of each machine does
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.is_first_to_end()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not launch.is_first_to_end()


def test_a_rank_whose_store_is_gone_prints_why(connect, monkeypatch):
    connect(1)

    def fail(*_):
        raise dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")

    monkeypatch.setattr(dist.PrefixStore, "add", fail)
    assert launch.is_first_to_end()


# Alone ----------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_in_use_is_said(monkeypatch, capsys, faces, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        run_script("train.py", arguments(faces, tmp_path), expect=2)
    said = capsys.readouterr().err
    assert said.startswith(
        f"train.py: The store at 127.0.0.1:{port} through which processes connect cannot be reached ("
    )
    assert said.rstrip().endswith("give torchrun another --master_port, or --standalone.")


def test_work_of_one_process_is_refused_under_torchrun(monkeypatch, capsys, faces, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "start it with python, not with torchrun."), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        for script in ("baseline_data_split.py", "eval.evaluation"):
            run_script(script, arguments(faces, tmp_path), expect=2)
            heard = capsys.readouterr().err.rstrip()
            assert heard.endswith(said) if said else heard == ""


def test_alone_there_is_nobody_to_tell():
    numbers = torch.arange(3.0)
    assert collectives.gathered(numbers) is collectives.own(numbers) is collectives.averaged(numbers) is numbers
    assert collectives.Agreement().after_step(15, 0) == [15, 0]
    assert launcher() == "python"
    assert share_of_cores() == 0


def test_torchruns_processes_share_the_cores_unless_somebody_has_said_how(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12), raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert share_of_cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert share_of_cores() == 0
    assert launcher() == "torchrun --standalone --nproc_per_node 4 --"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert launcher() == "torchrun --nnodes 2 --nproc_per_node 4 --"


def test_a_run_from_before_there_were_several_processes_goes_on(cfg, capsys):
    with pytest.raises(Interrupted):
        train_small(cfg, before_step=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    path = cfg.teacher_dir("T") / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    del state["decided_by"]["settings"]["sync_bn"]
    for session in state["sessions"]:
        del session["versions"]["processes"]
    save(path, state)
    train_small(cfg)
    said = capsys.readouterr().out
    assert "continuing in epoch 1 after step 3" in said
    assert "goes on under other conditions" not in said


def test_shared_batch_normalisation_counts_in_fp32():
    x = torch.randn(6, 5, dtype=torch.bfloat16)
    plain, shared = (nn.Sequential(nn.BatchNorm1d(5)) for _ in range(2))
    share_statistics(shared)
    one, other = plain(x), shared(x)
    assert one.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(plain[0].running_var, shared[0].running_var)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 3)])
def test_shared_batch_normalisation_of_one_process_is_pytorchs(shape, affine):
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    plain, shared = (nn.Sequential(kind(5, affine=affine).double(), nn.PReLU().double()) for _ in range(2))
    before = {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
    share_statistics(shared)
    assert isinstance(shared[0], CpuSyncBatchNorm)
    assert {**dict(shared.named_parameters()), **dict(shared.named_buffers())} == before  # the same tensors
    for _ in range(2):
        x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [network(one) for network, one in zip((plain, shared), inputs, strict=True)]
        for output in outputs:
            (output * weight).sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(plain.state_dict(), shared.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(plain.eval()(x), shared.eval()(x))
