"""The training loop: equal to a plain one, repeatable, and the same whether or not it was interrupted."""

import dataclasses
import gc
import inspect
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones import build_backbone
from config.config import Config
from config.registry import ADA_LOSSES, LOSSES
from tests.conftest import write_images
from tests.runs import Linear, checkpoint, difference, train
from utils.data.columns import Column
from utils.data.faces import FLIPS, ORDER, STEP, Faces
from utils.environment import allow_tf32, computed_in, versions
from utils.errors import InputError
from utils.losses import AdaDistill, ArcFace, CurricularFace, ElasticArcFace, build_header
from utils.process import Interrupted, run, setup
from utils.storage.arrays import Filling
from utils.storage.tensors import load, save
from utils.training.cuda_graph import CapturedStep
from utils.training.engine import _seed, fit, infer
from utils.training.extract import BlockWriter
from utils.training.precision import compiled, eagerly_if_compiling_fails, mixed_precision, uncompiled
from utils.training.state import FiniteCheck, Progress


def assert_equal_runs(cfg, other, name="T"):
    assert difference(cfg.teacher_dir(name), other.teacher_dir(name)) == ""


def test_equals_a_plain_loop(cfg):
    """SGD written out, one image after another gathered, flipped and normalised by hand."""
    network, header = train(cfg, epochs=2)

    torch.manual_seed(cfg.seed)
    faces = Faces(cfg)
    images, labels = faces.columns["image"].arrays[0], faces.columns["label"].arrays[0]
    plain, plain_header = Linear(), ElasticArcFace(16, faces.num_classes, s=8.0)
    parameters = [*plain.parameters(), *plain_header.parameters()]
    momentum = [torch.zeros_like(p) for p in parameters]
    for epoch in range(2):
        lr = 0.1 * cfg.batch_size / 512 * (0.1 if epoch == 1 else 1)  # two epochs: one drop, at 2
        order = np.random.default_rng((ORDER, cfg.seed, epoch)).permutation(20)
        for step in range(5):
            rows = order[4 * step : 4 * step + 4]
            flips = np.random.default_rng((FLIPS, cfg.seed, epoch, step)).random(4) < 0.5
            batch = [images[r][:, ::-1] if f else images[r] for r, f in zip(rows, flips, strict=True)]
            x = torch.stack([torch.from_numpy(i.copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in batch])
            y = torch.from_numpy(labels[rows])
            torch.manual_seed(_seed(STEP, cfg.seed, epoch, step))
            for p in parameters:
                p.grad = None
            F.cross_entropy(plain_header(plain(x), y), y).backward()
            norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
            for p in plain.parameters():
                p.grad *= min(1, cfg.max_grad_norm / (norm + 1e-6))
            with torch.no_grad():
                for p, m in zip(parameters, momentum, strict=True):
                    m.mul_(cfg.momentum).add_(p.grad + cfg.weight_decay * p)
                    p -= lr * m
    assert torch.allclose(network.fc.weight, plain.fc.weight, rtol=1e-5, atol=1e-7)
    assert torch.allclose(header.kernel, plain_header.kernel, rtol=1e-5, atol=1e-7)


def test_a_repeated_run_gives_equal_weights_and_another_seed_others(cfg):
    train(cfg)
    again = replace(cfg, output=cfg.output + "2")
    train(again)
    assert_equal_runs(cfg, again)
    other = replace(cfg, output=cfg.output + "3", seed=1)
    train(other)
    assert not torch.equal(checkpoint(cfg)["header"]["kernel"], checkpoint(other)["header"]["kernel"])


@pytest.mark.parametrize("step", [1, 4, 5, 6, 13])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(cfg, step, number):
    """Five steps an epoch: stops inside, at the end and at the beginning of one."""
    train(cfg)

    def stop(call):
        if call == step:
            os.kill(os.getpid(), number)

    stopped, threads = replace(cfg, output=cfg.output + "2"), set(threading.enumerate())
    with pytest.raises(Interrupted, match="continue with: python") as error:
        train(stopped, before_step=stop)
    assert error.value.signal == number
    new = set(threading.enumerate()) - threads  # the compiler's threads of another test may be there
    assert not [thread for thread in new if thread.name.startswith("ThreadPool")]
    assert checkpoint(stopped)["step"] == (step % 5 or 5)
    train(stopped)
    assert_equal_runs(cfg, stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training_ends_in_a_sentence(number, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["extract_all.py", "--seed", "3"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(lambda cfg: os.kill(os.getpid(), number))
    assert stop.value.code == 128 + number
    error = capsys.readouterr().err
    assert error.startswith("extract_all.py: interrupted, files that were finished are kept; continue with: python")
    assert error.count("\n") == 1
    assert signal.getsignal(number) is before


def test_a_run_stopped_while_verifying_does_not_train_the_epoch_again(cfg):
    steps = []

    def validate_and_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this")

    with pytest.raises(Interrupted, match="while verifying"):
        train(cfg, epochs=1, validate=validate_and_stop, before_step=steps.append)
    train(cfg, epochs=1, validate=lambda: ({"A": 50.0}, 50.0), before_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]
    assert checkpoint(cfg)["log"][0]["scores"] == {"A": 50.0}


def test_a_crash_continues_from_the_last_checkpoint(cfg):
    train(cfg)

    def crash(call):
        if call == 8:
            raise RuntimeError("power loss")

    crashed = replace(cfg, output=cfg.output + "2")
    with pytest.raises(RuntimeError, match="power loss"):
        train(crashed, before_step=crash)
    train(crashed)
    assert_equal_runs(cfg, crashed)


def test_checkpoints_are_written_inside_an_epoch_when_it_is_time(cfg):
    def crash(call):
        if call == 4:
            raise RuntimeError("power loss")

    with pytest.raises(RuntimeError, match="power loss"):
        train(replace(cfg, checkpoint_minutes=0.0), before_step=crash)
    assert checkpoint(cfg)["step"] == 3


def test_best_and_last_are_kept_and_the_log_has_one_line_per_epoch(cfg):
    values = iter([60.0, 70.0, 65.0])
    seen = []

    def validate():
        value = next(values)
        seen.append(value)
        return {"A": value}, value

    train(cfg, validate=validate)
    folder = cfg.teacher_dir("T")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["best"] for line in lines] == [True, True, False]
    assert [line["scores"]["A"] for line in lines] == [60.0, 70.0, 65.0]
    assert all(line["loss"]["margin"] > 0 for line in lines)
    final = checkpoint(cfg)
    best, last = (torch.load(folder / f"{w}_backbone.pth", weights_only=True) for w in ("best", "last"))
    assert torch.equal(last["fc.weight"], final["backbone"]["fc.weight"])
    assert not torch.equal(best["fc.weight"], last["fc.weight"])
    assert set(torch.load(folder / "best_header.pth", weights_only=True)) == {"kernel"}
    assert (folder / "identities.txt").read_text().split() == ["A/a1", "A/a2", "A/a3", "B/b1", "B/b2"]


def test_without_verification_the_lowest_training_loss_is_best(cfg):
    train(cfg)
    log = checkpoint(cfg)["log"]
    totals = [line["loss"]["margin"] for line in log]
    assert [line["best"] for line in log] == [total == min(totals[: i + 1]) for i, total in enumerate(totals)]


def test_a_finished_run_is_left_alone(cfg, capsys):
    train(cfg)
    before = {path.name: path.stat().st_mtime_ns for path in cfg.teacher_dir("T").iterdir()}
    train(cfg, before_step=lambda call: pytest.fail("trained again"))
    assert "is already trained" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in cfg.teacher_dir("T").iterdir()} == before


def test_a_released_file_is_used_as_it_is(cfg, capsys):
    cfg.teacher_dir("T").mkdir(parents=True)
    torch.save(Linear().state_dict(), cfg.teacher_dir("T") / "22896backbone.pth")
    train(cfg, before_step=lambda call: pytest.fail("trained"))
    said = capsys.readouterr().out
    assert "22896backbone.pth and no checkpoint of a run: used as it is" in said
    assert "set init_from to it" in said
    assert len(list(cfg.teacher_dir("T").iterdir())) == 1


def test_a_run_of_other_settings_or_images_is_refused(cfg):
    train(cfg)
    with pytest.raises(InputError, match=r"other settings or data \(lr was 0.1, now 0.2; std was 0.05, now 0.1\)"):
        train(replace(cfg, lr=0.2, std=0.1, loss_lambda=5.0, std_fc=0.5))
    image = os.path.join(cfg.data, "A", "a1", "0.jpg")
    os.unlink(image)
    with pytest.raises(InputError, match=r"\(images changed\)"):
        train(cfg)


def test_a_run_from_before_a_setting_existed_acts_as_with_its_default(cfg):
    @dataclasses.dataclass(frozen=True)
    class Extended(Config):
        label_smoothing: float = 0.0

    train(cfg, epochs=1)
    extended = Extended(**dataclasses.asdict(cfg))
    train(extended, epochs=1)
    with pytest.raises(InputError, match=r"\(label_smoothing was 0.0, now 0.1\)"):
        train(replace(extended, label_smoothing=0.1), epochs=1)


def test_a_run_from_before_every_setting_took_part_goes_on(cfg):
    train(cfg, epochs=2)
    path = cfg.teacher_dir("T") / "checkpoint.pth"
    state = load(path)
    del state["decided_by"]["kind"]
    state["decided_by"]["settings"] = {
        "seed": 0,
        "batch_size": 4,
        "sync_bn": False,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "max_grad_norm": 5.0,
        "embedding_size": 16,
        "s": 64.0,
        "precision": "fp32",
        "network": "iresnet_tiny",
        "loss": "ElasticArcFace",
        "m": 0.5,
        "std": 0.05,
        "num_epoch": 2,
        "milestones": [],
        "lr": 0.1,
    }
    save(path, state)
    train(cfg, epochs=2)
    with pytest.raises(InputError, match=r"\(m was 0.5, now 0.35\)"):
        train(replace(cfg, m=0.35), epochs=2)
    with pytest.raises(InputError, match=r"\(milestones was \[2\], now \[\]\)"):
        train(replace(cfg, milestones=()), epochs=2)


def test_a_folder_of_another_kind_of_run_is_refused(cfg):
    network, header = train(cfg, epochs=1)
    with pytest.raises(InputError, match="it trains teacher, not EAF-KD"):
        fit(lambda image: {}, Faces(cfg, flip=True), cfg.teacher_dir("T"), cfg, network, header, kind="EAF-KD")


def test_a_parameter_that_is_no_column_is_refused_before_anything_starts(cfg):
    def losses(img, label):
        pytest.fail("called")

    setup(cfg)
    sentence = "The loss function has the parameter 'img', which is no column: the columns are image, label."
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        fit(losses, Faces(cfg), cfg.teacher_dir("T"), cfg, Linear(), kind="teacher")
    assert not Path(cfg.output).exists()


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        ((), "No gradient reaches the loss 'norm': list it in the measures of fit if it is only logged."),
        (("norm", "x"), "measures lists 'x', which the loss function does not return: it returns kd, norm."),
        (("norm", "kd"), "The loss function returns no loss: it returns kd, norm, measures lists all."),
    ],
)
def test_losses_and_measures_that_disagree_with_what_is_returned_are_refused(cfg, measures, sentence):
    setup(cfg)
    network, calls = Linear(), []

    def losses(image):
        calls.append(1)
        norm = network(image).norm()
        return {"kd": norm**2, "norm": norm.detach()}

    before = network.fc.weight.clone()
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}$"):
        fit(losses, Faces(cfg), cfg.teacher_dir("T"), cfg, network, kind="teacher", measures=measures)
    assert len(calls) == 1
    assert torch.equal(network.fc.weight, before)


@pytest.mark.parametrize("returned", [lambda loss: loss, lambda loss: {"kd": loss.repeat(2)}, lambda loss: {"kd": 1.0}])
def test_losses_that_are_no_dict_of_scalars_are_refused(cfg, returned):
    setup(cfg)
    network = Linear()

    def losses(image):
        return returned(network(image).norm())

    with pytest.raises(InputError, match="^The loss function must return a dict of scalar tensors by name"):
        fit(losses, Faces(cfg), cfg.teacher_dir("T"), cfg, network, kind="teacher")


def test_a_parameter_of_a_header_that_would_never_be_trained_is_refused(cfg):
    class Learned(ArcFace):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            self.learned = torch.nn.Parameter(torch.tensor(0.3))

        def target_logit(self, target):
            return target - self.learned

    setup(cfg)
    network, header = Linear(), Learned(16, 5)

    def losses(image, label):
        return {"margin": header.loss(network(image), label)}

    with pytest.raises(InputError, match="^No gradient reaches the header's parameter 'learned': use it in the losses"):
        fit(losses, Faces(cfg), cfg.teacher_dir("T"), cfg, network, header, kind="teacher")


def killed_at(network: torch.nn.Module, stop_at: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]:
    """Returns a function of images, the mean square of the network's outputs, and the list of its calls.

    Its call `stop_at` sends SIGTERM to this process.
    """
    calls: list[int] = []

    def size(image: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return network(image).square().mean()

    return size, calls


def test_a_folder_and_kind_of_ones_own_are_trained_and_resumed(cfg, tmp_path, capsys):
    """A kind that config does not know has the schedule of a student; a measure may have a gradient."""

    def mine(folder, stop_at=0, cfg=cfg):
        setup(cfg)
        network = Linear()
        size_of, calls = killed_at(network, stop_at)

        def losses(image):
            size = size_of(image)
            return {"size": size, "logged": 1000 * size}

        fit(losses, Faces(cfg), folder, cfg, network, kind="mine", measures=("logged",))
        return len(calls)

    whole, stopped = tmp_path / "anywhere" / "mine", tmp_path / "elsewhere" / "mine"
    assert mine(whole) == 10  # two epochs of five steps
    with pytest.raises(Interrupted):
        mine(stopped, stop_at=7)
    assert mine(stopped) == 3
    for name in ("best_backbone.pth", "last_backbone.pth", "log.jsonl", "identities.txt"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert line["lr"] == cfg.schedule("EAF-KD").lr(0, cfg.batch_size)
    assert line["measures"]["logged"] == pytest.approx(1000 * line["loss"]["size"])
    assert json.loads((whole / "config.json").read_text())["kind"] == "mine"
    capsys.readouterr()
    assert mine(whole) == 0
    assert "is already trained" in capsys.readouterr().out
    with pytest.raises(InputError, match="lr was 0.1, now 0.2"):
        mine(whole, cfg=replace(cfg, lr=0.2))


def test_a_checkpoint_with_and_without_measures_is_resumed(cfg):
    """Checkpoints list the measures of their time, those of early versions none: what counts is what `fit` is given."""

    def measured(cfg, stop_at=0):
        setup(cfg)
        network = Linear()
        size_of, _ = killed_at(network, stop_at)

        def losses(image):
            size = size_of(image)
            return {"size": size, "norm": size.detach().sqrt()}

        fit(losses, Faces(cfg), cfg.teacher_dir("T"), cfg, network, kind="teacher", measures=("norm",))

    measured(cfg)
    for k, change in enumerate((lambda state: None, lambda state: state.pop("measures"))):
        stopped = replace(cfg, output=f"{cfg.output}{k}")
        with pytest.raises(Interrupted):
            measured(stopped, stop_at=7)
        path = stopped.teacher_dir("T") / "checkpoint.pth"
        state = load(path)
        assert state["measures"] == ["norm"]
        change(state)
        save(path, state)
        measured(stopped)
        one, other = (run.teacher_dir("T") / "log.jsonl" for run in (cfg, stopped))
        assert one.read_bytes() == other.read_bytes()


class NoSlope(torch.autograd.Function):
    """Gives back its input, and not a number as its gradient."""

    @staticmethod
    def forward(_, value):
        return value

    @staticmethod
    def backward(_, grad):
        return grad * float("nan")


@pytest.mark.parametrize("what", ["loss 'bad'", "gradient of the network", "gradient of the header"])
@pytest.mark.parametrize("noticed_late", [False, True], ids=["at once", "late"])
def test_a_step_that_is_not_finite_is_not_taken(cfg, monkeypatch, what, noticed_late):
    """On a GPU the numbers are looked at now and then: no step after the bad one may be taken either."""
    setup(cfg)
    faces, network, header, before = Faces(cfg), Linear(), ElasticArcFace(16, 5, s=8.0), []
    if noticed_late:
        plain = FiniteCheck.failure
        monkeypatch.setattr(FiniteCheck, "failure", lambda self: plain(self) if len(before) % 5 == 0 else None)

    def losses(image, label):
        before.append([value.clone() for module in (network, header) for value in module.state_dict().values()])
        embedding = network(image)
        if len(before) == 7 and what == "gradient of the network":
            embedding = NoSlope.apply(embedding)
        if len(before) == 7 and what == "gradient of the header":
            header.kernel.register_hook(lambda grad: grad * float("inf"))
        bad = embedding.square().mean() * (float("nan") if len(before) == 7 and what.startswith("loss") else 0)
        return {"margin": F.cross_entropy(header(embedding, label), label), "bad": bad}

    folder = cfg.teacher_dir("N")
    sentence = f"The {what} is (nan|inf) in epoch 2, step 2, which was not taken: .*, whose last checkpoint is good"
    with pytest.raises(InputError, match=sentence):
        fit(losses, faces, folder, cfg, network, header, kind="teacher")
    assert len(before) == (10 if noticed_late else 7)
    now = [*network.state_dict().values(), *header.state_dict().values()]
    assert all(torch.equal(value, old) for value, old in zip(now, before[6], strict=True))
    kept = checkpoint(cfg, "N")
    assert (kept["epoch"], kept["step"]) == (1, 0)
    assert torch.equal(kept["backbone"]["fc.weight"], before[5][0])
    assert not torch.equal(before[6][0], before[5][0])


def test_a_run_that_failed_before_its_first_checkpoint_claims_no_folder(cfg):
    def crash(call):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        train(cfg, before_step=crash)
    train(replace(cfg, lr=0.05))
    assert (cfg.teacher_dir("T") / "config.json").exists()


def test_a_kill_between_the_first_weights_and_their_checkpoint_loses_nothing(cfg, monkeypatch):
    """Weights without a checkpoint count as a finished model: they must never come first."""
    train(cfg)
    killed = replace(cfg, output=cfg.output + "2")

    def kill(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("utils.training.checkpoint.Run.save_weights", kill)
        train(killed)
    train(killed)
    assert_equal_runs(cfg, killed)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(cfg, capsys):
    """Of either kind, damaged while the run stood still; the end is the same to the last bit."""
    train(cfg)
    folder = replace(cfg, output=cfg.output + "2").teacher_dir("T")

    def crash(call):
        if call == 8:
            raise RuntimeError("power loss")

    for damage, reason in (
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "it has no SHA-256 at its end"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "it has no SHA-256 at its end"),
        (lambda path: torch.save({"fc.weight": torch.zeros(2)}, path), "it has no SHA-256 at its end"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "its SHA-256 does not match"),
        (lambda path: save(path, {"fc.weight": torch.zeros(2)}), "is no checkpoint of a run"),
        (lambda path: path.unlink(), ""),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        stopped = replace(cfg, output=cfg.output + "2")
        with pytest.raises(RuntimeError, match="power loss"):
            train(replace(stopped, checkpoint_minutes=0.0), before_step=crash)
        capsys.readouterr()
        damage(folder / "checkpoint.pth")
        train(stopped)
        out = capsys.readouterr().out
        assert ("going on from previous_checkpoint.pth" in out) == bool(reason)
        assert reason in out
        assert "continuing in epoch 2 after step 1 of 5" in out
        assert_equal_runs(cfg, stopped)


def test_with_both_checkpoints_damaged_nothing_is_trained(cfg):
    train(cfg)
    for name in ("checkpoint.pth", "previous_checkpoint.pth"):
        path = cfg.teacher_dir("T") / name
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"/checkpoint.pth is damaged .*, and no older one is good: move .* away"):
        train(cfg, before_step=lambda _: pytest.fail("trained"))


def test_a_signal_while_a_checkpoint_is_read_does_not_call_it_damaged(cfg, monkeypatch):
    train(cfg, epochs=1)

    def interrupted(*_, **__):
        raise Interrupted("interrupted", signal.SIGTERM)

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Interrupted):
        train(cfg)


def test_a_finished_run_without_its_best_weights_is_refused(cfg):
    values = iter([60.0, 70.0, 65.0])
    train(cfg, validate=lambda: ({}, next(values)))
    (cfg.teacher_dir("T") / "best_backbone.pth").unlink()
    with pytest.raises(InputError, match="best_backbone.pth is missing: set weights to last, or move"):
        train(cfg)
    train(replace(cfg, weights="last"))


def test_weights_that_were_lost_are_written_anew_where_they_can_be(cfg, capsys):
    scores = [60.0, 70.0, 65.0]
    values = list(scores)
    train(cfg, validate=lambda: ({}, values.pop(0)))
    folder = cfg.teacher_dir("T")
    whole = torch.load(folder / "last_header.pth", weights_only=True)
    (folder / "last_header.pth").write_bytes(b"x" * 100)
    train(cfg)
    assert "last_header.pth is damaged (it has no SHA-256 at its end): written anew" in capsys.readouterr().out
    assert torch.equal(torch.load(folder / "last_header.pth", weights_only=True)["kernel"], whole["kernel"])

    def power_loss():
        if not values:
            raise RuntimeError("power loss")
        return {}, values.pop(0)

    stopped, values = replace(cfg, output=cfg.output + "2"), scores[:2]
    with pytest.raises(RuntimeError, match="power loss"):  # while the third epoch is verified
        train(stopped, validate=power_loss)
    lost = stopped.teacher_dir("T") / "best_backbone.pth"
    whole = lost.read_bytes()
    lost.unlink()
    values = scores[2:]
    train(stopped, validate=power_loss)
    assert "best_backbone.pth is missing: written anew from the checkpoint" in capsys.readouterr().out
    assert lost.read_bytes() == whole  # of the second epoch, where the checkpoint was

    again, values = replace(cfg, output=cfg.output + "3"), [70.0, 60.0]
    with pytest.raises(RuntimeError, match="power loss"):
        train(again, validate=power_loss)
    (again.teacher_dir("T") / "best_backbone.pth").unlink()
    values = [65.0]
    train(again, validate=power_loss)
    assert "best_backbone.pth is missing: the best of the epochs to come takes its place" in capsys.readouterr().out
    assert [line["best"] for line in checkpoint(again)["log"]] == [True, False, True]


def test_who_worked_on_a_run_is_kept_and_a_change_is_said(cfg, monkeypatch, capsys):
    def crash(call):
        if call == 8:
            raise RuntimeError("power loss")

    with pytest.raises(RuntimeError, match="power loss"):
        train(cfg, before_step=crash)
    plain = versions(cfg)
    monkeypatch.setattr("utils.training.checkpoint.versions", lambda _: {**plain, "torch": "9.9"})
    train(cfg)
    assert (
        f"goes on under other conditions, last bits may differ: torch {plain['torch']} -> 9.9."
        in capsys.readouterr().out
    )
    about = json.loads((cfg.teacher_dir("T") / "config.json").read_text())
    first, second = about["sessions"]
    assert (first["epochs done"], first["steps done"]) == (0, 0)
    assert (second["epochs done"], second["steps done"], second["versions"]["torch"]) == (1, 0, "9.9")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", first["versions"]["commit"])
    assert about["all settings"]["loss_lambda"] == cfg.loss_lambda
    assert set(about["sources"]) == {"images", "identities"}


def test_a_run_from_cached_columns_is_the_same_run(cfg, monkeypatch):
    train(cfg)
    plain, streamed = Column.gather, []
    monkeypatch.setattr(Column, "gather", lambda self, *batch: streamed.append(1) or plain(self, *batch))
    cached = replace(cfg, output=cfg.output + "2", device_cache_gb=1.0)
    steps = []
    train(cached, before_step=lambda call: steps.append(len(streamed)))
    assert steps == [2] * 15  # the images and labels of the first step
    assert_equal_runs(cfg, cached)


def test_bf16_stays_close_to_fp32_and_leaves_the_network_as_it_was(cfg):
    train(cfg)
    rounded = replace(cfg, output=cfg.output + "2", precision="bf16")
    network, _ = train(rounded)
    assert not network._forward_hooks and not network._forward_pre_hooks
    one, other = checkpoint(cfg), checkpoint(rounded)
    assert not torch.equal(one["backbone"]["fc.weight"], other["backbone"]["fc.weight"])
    for line, there in zip(one["log"], other["log"], strict=True):
        assert there["loss"]["margin"] == pytest.approx(line["loss"]["margin"], rel=5e-3)
    assert other["backbone"]["fc.weight"].dtype == torch.float32
    with pytest.raises(InputError, match="precision was 'bf16', now 'fp32'"):
        train(replace(rounded, precision="fp32"))


def graphs() -> int:
    """Returns how many graphs have been compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_run_is_captured_and_stopped_and_goes_on_alike(cfg, monkeypatch, capsys):
    def stop(call):
        if call == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, stopped = (replace(cfg, output=f"{cfg.output}{k}", compile=True) for k in (2, 3))
    train(whole)
    assert capsys.readouterr().out.count("compile: the first step, in which the network is compiled, took") == 1
    with pytest.raises(Interrupted):
        train(stopped, before_step=stop)
    train(stopped)
    assert_equal_runs(whole, stopped)
    captured = replace(whole, output=f"{cfg.output}4")
    with monkeypatch.context() as patch:
        capture_with(patch, graph_in_python)
        train(captured)
    assert_equal_runs(whole, captured)
    network, images = Small().eval(), torch.randn(4, 3, 112, 112)
    plain = network(images)
    with compiled(network):
        assert torch.allclose(network(images), plain, rtol=1e-4, atol=1e-5)
        before = graphs()
        with uncompiled(network):
            assert torch.equal(network(images[:3]), network.forward(images[:3]))
        assert graphs() == before > 0
    assert torch.equal(network(images), plain)
    assert "without compilation" not in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_bf16_is_compiled_too(cfg, capsys):
    torch.manual_seed(0)
    network, images = Small(), torch.randn(4, 3, 112, 112)
    with mixed_precision(network, "bf16", torch.device("cpu")):
        eager = network(images)
        with compiled(network):
            before = graphs()
            given = network(images)
            given.sum().backward()
            assert graphs() > before
    assert given.dtype == torch.float32
    assert torch.allclose(given, eager, rtol=0.05, atol=0.05)
    assert "without compilation" not in capsys.readouterr().out


class NoCompiler(TorchDynamoException):
    pass


def _fails_in_the_first_call(_, **__):
    def forward(*_):
        raise NoCompiler("no compiler here.")

    return forward


def _fails_at_once(_, **__):
    raise RuntimeError("no compiler here.")


@pytest.mark.parametrize("compiler", [_fails_in_the_first_call, _fails_at_once])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_compiler_a_run_is_eager(cfg, monkeypatch, capsys, compiler, precision):
    cfg = replace(cfg, precision=precision)
    train(cfg)
    monkeypatch.setattr(torch, "compile", compiler)
    failing = replace(cfg, output=cfg.output + "2", compile=True)
    train(failing)
    printed = capsys.readouterr().out
    assert printed.count("compile: no compiler here. Training without compilation.\n") == 1
    assert "compile: the first step" not in printed
    assert_equal_runs(cfg, failing)


def test_an_error_in_the_network_ends_autocast():
    network = torch.nn.Linear(3, 2)
    with mixed_precision(network, "bf16", torch.device("cpu")):
        with pytest.raises(RuntimeError):
            network(torch.ones(1, 4))
        assert not torch.is_autocast_enabled("cpu")


def test_an_error_in_the_losses_is_not_taken_for_one_of_the_compiler():
    def losses(image):
        raise RuntimeError("sizes do not match")

    wrapped = eagerly_if_compiling_fails(torch.nn.Linear(3, 2), losses)
    assert [*inspect.signature(wrapped).parameters] == ["image"]
    with pytest.raises(RuntimeError, match="sizes do not match"):
        wrapped(image=None)


def test_embeddings_are_computed_in_their_own_precision_however_the_network_is_trained(cfg):
    network = torch.nn.Linear(64, 32)
    columns = {"embedding": Column((np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32),))}

    def embed(precision="tf32"):
        given = replace(cfg, infer_precision=precision)
        return infer(lambda embedding: network(embedding), network, columns, given, "test")

    plain, rounded = embed(), embed("bf16")
    assert np.array_equal(embed("fp32"), plain)  # on a CPU
    assert not np.array_equal(rounded, plain)
    assert np.allclose(rounded, plain, atol=0.05)
    with mixed_precision(network, "bf16", torch.device("cpu")):
        assert np.array_equal(embed(), plain)
        assert np.array_equal(embed("bf16"), rounded)
        lowered = network(torch.from_numpy(columns["embedding"].arrays[0]))
        assert lowered.dtype == torch.float32
        assert not np.array_equal(lowered.detach().numpy(), plain)
        product = torch.randn(8, 8) @ torch.randn(8, 8)
        assert product.dtype == torch.float32  # outside the network nothing is in bf16
    assert not network._forward_hooks and not network._forward_pre_hooks


@pytest.mark.parametrize("infer_precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_allowed_where_it_is_set(cfg, infer_precision):
    network, seen, before = torch.nn.Linear(4, 2), [], torch.backends.cudnn.allow_tf32
    columns = {"embedding": Column((np.ones((3, 4), np.float32),))}

    def embedding(embedding):
        seen.append(torch.backends.cudnn.allow_tf32)
        return network(embedding)

    with mixed_precision(network, "tf32", torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        infer(embedding, network, columns, replace(cfg, infer_precision=infer_precision), "test")
        assert torch.backends.cudnn.allow_tf32
    assert seen == [infer_precision == "tf32"]
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("owner", ["torch.backends", "torch.backends.cudnn", "torch.backends.cudnn.conv"])
def test_tf32_is_allowed_where_it_is_set_whatever_a_user_has_set_by_the_newer_api(cfg, owner):
    """`torch.backends.cudnn.allow_tf32` is PyTorch's older API, which raises RuntimeError if the two disagree."""
    user = pkgutil.resolve_name(owner)
    before, user.fp32_precision = user.fp32_precision, "tf32"
    try:
        setup(cfg)
        for precision in ("tf32", "fp32"):
            with mixed_precision(torch.nn.Identity(), precision, torch.device("cpu")):
                allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
                assert allowed == torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        user.fp32_precision = before
        allow_tf32(False)


def graph_in_python(function):
    """Called twice before, as by `capture`; its replay is another call, with the learning rate of now."""
    function()
    function()
    rates = [group["lr"] for group in _RUNNING[-1].optimizer.param_groups]

    def replay():
        now = [group["lr"] for group in _RUNNING[-1].optimizer.param_groups]
        for group, rate in zip(_RUNNING[-1].optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        function()
        for group, rate in zip(_RUNNING[-1].optimizer.param_groups, now, strict=True):
            group["lr"] = rate

    return replay


_RUNNING = []  # the progress of the run whose step is captured


def graph_that_forgets(function):
    function()
    return lambda: None


def capture_with(monkeypatch, graph):
    """Makes runs on a CPU capture their steps with `graph` in place of CUDA's."""
    plain = Progress.stepper

    def stepper(self, losses, max_grad_norm, _):
        _RUNNING.append(self)
        return plain(self, losses, max_grad_norm, True)

    monkeypatch.setattr(Progress, "stepper", stepper)
    monkeypatch.setattr("utils.training.cuda_graph.capture", graph)


@pytest.mark.parametrize(
    ("graph", "said"),
    [(graph_in_python, ""), (graph_that_forgets, "The captured step gives other numbers: its kernels are launched")],
)
def test_a_captured_step_is_the_plain_step_and_goes_on_after_a_stop(cfg, monkeypatch, capsys, graph, said):
    """On a GPU the graph is CUDA's; here it is in Python, and everything around it is the same."""
    train(cfg)
    capture_with(monkeypatch, graph)
    captured, stopped = replace(cfg, output=cfg.output + "2"), replace(cfg, output=cfg.output + "3")
    train(captured)
    assert_equal_runs(cfg, captured)
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.count("other numbers") == bool(said)
    with pytest.raises(Interrupted):
        train(stopped, before_step=lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 10 else None)
    train(stopped)
    assert_equal_runs(cfg, stopped)


@pytest.mark.parametrize("stop_at", [(0, 3), (1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("settings", "captured"),
    [({"warmup_epochs": 1}, [1, 2]), ({"batch_size": 2, "accumulate": 2}, [0, 1, 2])],
    ids=["warm-up", "accumulated batches"],
)
def test_a_captured_run_is_the_plain_one_and_goes_on_after_a_stop(cfg, monkeypatch, settings, captured, stop_at):
    cfg, epochs, plain_due = replace(cfg, **settings), [], Progress.due
    train(cfg)

    def graph(function):
        epochs.append(_RUNNING[-1].epoch)
        return graph_in_python(function)

    capture_with(monkeypatch, graph)
    whole, stopped = replace(cfg, output=cfg.output + "2"), replace(cfg, output=cfg.output + "3")
    train(whole)
    assert epochs == captured
    assert_equal_runs(cfg, whole)

    def due(self, minutes):
        if (self.epoch, self.step) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain_due(self, minutes)

    monkeypatch.setattr(Progress, "due", due)
    with pytest.raises(Interrupted):
        train(stopped)
    train(stopped)
    assert_equal_runs(cfg, stopped)


def test_a_captured_step_is_freed_with_its_run(cfg, monkeypatch):
    """On a GPU its graph holds the memory of a whole step, which the next teacher needs."""
    steps = []

    def captured_step(*given):
        step = CapturedStep(*given)
        steps.append(weakref.ref(step))
        return step

    capture_with(monkeypatch, graph_that_forgets)
    monkeypatch.setattr("utils.training.state.CapturedStep", captured_step)
    gc.disable()  # nothing may be left to it: it runs when Python objects are many, whatever memory they hold
    try:
        train(cfg, epochs=1)
        assert steps[0]() is None
    finally:
        gc.enable()


def test_a_captured_step_moves_the_centres_of_adadistill_and_counts_the_repeats_of_every_epoch(cfg, monkeypatch):
    def train_student(cfg):
        setup(cfg)
        faces, network = Faces(cfg, flip=True), Linear()
        header, counts = AdaDistill(16, faces.num_classes, s=8.0), []

        def losses(image, label, repeats):
            counts.append(repeats)
            return {"ada": header.loss(F.normalize(network(image)), image.flatten(1)[:, :16], label, repeats=repeats)}

        cfg = replace(cfg, num_epoch=3)
        fit(losses, faces, cfg.teacher_dir("T"), cfg, network, header, kind="teacher")
        return [faces.repeats(epoch) for epoch in range(3)], counts

    cfg = replace(cfg, seed=1)
    wanted, counts = train_student(cfg)
    assert wanted == [3, 2, 3]
    assert counts == [count for count in wanted for _ in range(5)]
    captured = replace(cfg, output=cfg.output + "2")
    capture_with(monkeypatch, graph_in_python)
    train_student(captured)
    assert_equal_runs(cfg, captured)


@pytest.mark.parametrize("name", [*LOSSES, *ADA_LOSSES])
def test_no_step_waits_for_a_number_of_the_device(cfg, name):
    """A tensor without values raises an error where the host reads it; such a read could not be captured."""
    is_distilled = name in ADA_LOSSES
    cfg = replace(cfg, ada_loss=name) if is_distilled else replace(cfg, loss=name)
    with FakeTensorMode():
        network = build_backbone("iresnet_tiny", 16)
        header = build_header(name, 5, cfg, name if is_distilled else "teacher")
        optimizer = torch.optim.SGD([*network.parameters(), *header.parameters()], 0.1, momentum=0.9, fused=True)

        def losses(image, label, target):
            others = {"repeats": 2} if is_distilled else {}
            return {"loss": header.loss(F.normalize(network(image)), *[target] * is_distilled, label, **others)}

        step = Progress(None, network, header, optimizer, cfg.schedule("teacher")).stepper(losses, 5.0, captured=False)
        for seed in range(2):
            step({"image": torch.ones(4, 3, 112, 112), "label": torch.arange(4), "target": torch.ones(4, 16)}, seed)


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            RuntimeError("operation not permitted\nwhile capturing"),
            InputError,
            r"^The training step could not be captured .* \(operation not permitted\): set capture to False.$",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "CUDA out of memory"),
    ],
)
def test_a_capture_that_fails_ends_the_run_which_goes_on_without(cfg, monkeypatch, error, kind, sentence):
    def failing_graph(function):
        function()
        raise error

    train(cfg)
    failed = replace(cfg, output=cfg.output + "2", checkpoint_minutes=0.0)
    with monkeypatch.context() as patch:
        capture_with(patch, failing_graph)
        with pytest.raises(kind, match=sentence):
            train(failed)
    assert checkpoint(failed)["step"] == 1
    train(replace(failed, capture=False))
    assert_equal_runs(cfg, failed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("of_images", [False, True])
def test_a_run_captured_on_a_gpu_is_the_plain_run_and_goes_on_after_a_stop(tmp_path, monkeypatch, of_images):
    random = np.random.default_rng(0)
    columns = {"embedding": random.normal(size=(80, 32)).astype(np.float32), "label": random.integers(0, 50, 80)}
    columns["image"] = random.integers(0, 256, (80, 112, 112, 3), np.uint8)

    def fitted(name: str, stop_at: int = -1) -> Path:
        cfg = Config(batch_size=8, device="cuda", output=str(tmp_path / name), num_epoch_fc=3)
        setup(cfg)
        layers = [Small()] if of_images else [torch.nn.Linear(32, 16), torch.nn.BatchNorm1d(16)]
        network = torch.nn.Sequential(*layers, torch.nn.Dropout(0.4))
        header, faces = ElasticArcFace(16, 50, std=0.0125), Faces.__new__(Faces)
        faces.cfg, faces.flip, faces.rows, faces.sources, faces.identities = cfg, False, np.arange(80), {}, ()
        faces.columns = {name: Column((values,)) for name, values in columns.items()}
        plain, seen, steps = Progress.due, [], []

        def captured_step(*given):
            steps.append(CapturedStep(*given))
            return steps[-1]

        def due(self, minutes):
            seen.append(self.step)
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(self, minutes)

        def losses(embedding, label):
            return {"eaf": header.loss(F.normalize(network(embedding)), label)}

        def losses_of_images(image, label):
            return losses(image, label)

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "due", due)
            patch.setattr("utils.training.state.CapturedStep", captured_step)
            try:
                given = losses_of_images if of_images else losses
                fit(given, faces, cfg.adaptor_dir("SL"), cfg, network, header, kind="SL")
            except Interrupted:
                fitted(name)
        assert name == "plain" or steps[-1]._replay
        return cfg.adaptor_dir("SL")

    whole, stopped = fitted("whole"), fitted("stopped", stop_at=14)
    assert difference(whole, stopped) == ""
    plainly = Progress.stepper
    monkeypatch.setattr(Progress, "stepper", lambda self, losses, norm, _: plainly(self, losses, norm, False))
    one, other = (torch.load(folder / "last_header.pth") for folder in (whole, fitted("plain")))
    assert torch.allclose(one["kernel"], other["kernel"], rtol=1e-4, atol=1e-5)


def test_events_for_tensorboard_are_those_of_the_log(cfg, monkeypatch):
    """The package is optional: a stand-in notes what it is given."""
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written.append("closed")

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    cfg = replace(cfg, tensorboard=True)
    train(cfg, epochs=2, validate=lambda: ({"A": 50.0}, 50.0))
    log = [json.loads(line) for line in (cfg.teacher_dir("T") / "log.jsonl").read_text().splitlines()]
    wanted = []
    for line in log:
        wanted += [("loss/margin", line["loss"]["margin"], line["epoch"]), ("accuracy/A", 50.0, line["epoch"])]
        wanted += [("lr", line["lr"], line["epoch"])]
    assert written == [*wanted, "closed"]
    assert opened == [(str(cfg.teacher_dir("T") / "tensorboard"), 1)]


def test_tensorboard_that_is_not_installed_is_said_at_once(cfg, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="tensorboard = True, but the package is not there: pip install tensorboard"):
        setup(replace(cfg, tensorboard=True))


def test_memory_that_runs_out_is_one_sentence(monkeypatch, capsys):
    def main(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    advice = "lower batch_size, infer_batch_size or device_cache_gb, or set capture to False"
    assert capsys.readouterr().err == f"train.py: CUDA out of memory: {advice}.\n"


def test_convolutions_repeat_unless_they_may_be_timed(cfg):
    for timed in (True, False):
        setup(replace(cfg, cudnn_benchmark=timed))
        assert torch.backends.cudnn.benchmark is timed
        assert torch.backends.cudnn.deterministic is not timed


def test_inference_fills_what_is_missing_in_any_of_several_arrays(tmp_path, cfg):
    rows, network, calls = np.arange(20, dtype=np.float32).reshape(10, 2), torch.nn.Identity(), []
    forms = [(tmp_path / f"{k}.npy", (10, 2), np.float32, {"k": k}, 3) for k in range(2)]
    for form, done in zip(forms, ([0, 3], [0, 1]), strict=True):
        with pytest.raises(KeyboardInterrupt), Filling(*form) as filling:
            for block in done:
                part = filling.rows(block)
                filling.array[part.start : part.stop] = rows[part.start : part.stop] * (form[3]["k"] + 1)
                filling.finish(block, filling.digest(block))
            raise KeyboardInterrupt

    def both(embedding):
        calls.append(embedding[:, 0].tolist())
        return torch.stack([network(embedding), 2 * network(embedding)], 1)

    with Filling(*forms[0]) as one, Filling(*forms[1]) as other:
        given = replace(cfg, infer_batch_size=3)
        writer = BlockWriter()
        infer(both, network, {"embedding": Column((rows,))}, given, "test", writer.open([one, other]), writer.receive)
    assert calls == [rows[3:6, 0].tolist(), rows[6:9, 0].tolist(), rows[9:, 0].tolist()]
    assert np.array_equal(np.load(forms[0][0]), rows)
    assert np.array_equal(np.load(forms[1][0]), 2 * rows)


def test_a_precision_that_makes_nothing_faster_is_said(cfg, monkeypatch, capsys):
    setup(cfg)
    setup(replace(cfg, precision="bf16", infer_precision="bf16"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("utils.process._has_bf16", lambda _: False)
    setup(replace(cfg, precision="bf16"))
    assert capsys.readouterr().out.startswith("precision = 'bf16': this device has no bf16 units")
    setup(replace(cfg, precision="bf16", infer_precision="bf16"), trains=False)
    assert capsys.readouterr().out.startswith("infer_precision = 'bf16': this device has no bf16 units")


def test_a_run_in_fp32_is_resumed_in_tf32_where_that_is_fp32(cfg, monkeypatch, capsys):
    assert cfg.precision == "tf32"
    whole = replace(cfg, output=cfg.output + "2")
    train(whole)
    with pytest.raises(Interrupted):
        train(
            replace(cfg, precision="fp32"), before_step=lambda call: call == 7 and os.kill(os.getpid(), signal.SIGTERM)
        )
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.checkpoint.computed_in", lambda precision, _: precision)  # as on a GPU
        with pytest.raises(InputError, match=r"\(precision was 'fp32', now 'tf32'\)"):
            train(cfg)
    train(cfg)
    assert "other conditions" not in capsys.readouterr().out
    one, other = (checkpoint(given)["backbone"] for given in (cfg, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tf32_is_fp32_without_its_units(monkeypatch):
    device = torch.device("cuda")
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "tf32"), ((9, 0), "tf32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert computed_in("tf32", device) == expected
    assert computed_in("tf32", torch.device("cpu")) == computed_in("fp32", device) == "fp32"
    assert computed_in("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_stopped_on_a_gpu_goes_on_as_if_it_had_not_been(cfg):
    cfg = replace(cfg, device="cuda")
    train(cfg)
    for step in (2, 5, 8):
        stopped = replace(cfg, output=f"{cfg.output}{step}")
        with pytest.raises(Interrupted):
            train(stopped, before_step=lambda call, step=step: call == step and os.kill(os.getpid(), signal.SIGTERM))
        train(stopped)
        assert_equal_runs(cfg, stopped)


def test_weights_newer_than_the_checkpoint_gone_back_to_are_put_back(cfg, capsys):
    values = [60.0, 70.0, 65.0]
    train(cfg, validate=lambda: ({}, values.pop(0)))
    folder = cfg.teacher_dir("T")
    for name in ("checkpoint.pth", "log.jsonl"):
        (folder / name).write_bytes(b"")  # the one before is of the second epoch, as the best weights are
    whole = (folder / "best_backbone.pth").read_bytes()
    (folder / "best_backbone.pth").write_bytes((folder / "last_backbone.pth").read_bytes())
    values = [65.0]
    train(cfg, validate=lambda: ({}, values.pop(0)))
    assert "best_backbone.pth is of another epoch: written anew from the checkpoint" in capsys.readouterr().out
    assert (folder / "best_backbone.pth").read_bytes() == whole
    assert (folder / "damaged_checkpoint.pth").exists()


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_given_up(cfg, monkeypatch):
    train(cfg, epochs=2)
    before = sorted((path.name, path.read_bytes()) for path in cfg.teacher_dir("T").iterdir())

    def fails(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fails)
        with pytest.raises(OSError, match="Too many open files"):
            train(cfg)
    assert sorted((path.name, path.read_bytes()) for path in cfg.teacher_dir("T").iterdir()) == before


def test_a_disk_that_is_full_is_reported_and_the_old_checkpoint_kept(cfg):
    train(cfg, epochs=1)
    before = (cfg.teacher_dir("T") / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(InputError, match=r"could not be written"):
            train(cfg, name="U", epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert (cfg.teacher_dir("T") / "checkpoint.pth").read_bytes() == before
    assert not list(cfg.teacher_dir("U").glob("*.pth*"))


class Small(torch.nn.Module):
    """Convolution and batch normalisation: their statistics have to be resumed too."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 7, stride=16)
        self.bn = torch.nn.BatchNorm2d(16)

    def forward(self, image):
        return self.bn(self.conv(image)).relu().mean((2, 3))


def test_batch_statistics_and_the_buffers_of_the_header_are_resumed(cfg):
    def train_small(cfg, stop_at=0):
        setup(cfg)
        faces, network, calls = Faces(cfg, flip=True), Small(), []
        header = CurricularFace(16, faces.num_classes, s=8.0)

        def losses(image, label):
            calls.append(1)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"margin": F.cross_entropy(header(network(image), label), label)}

        fit(losses, faces, cfg.teacher_dir("T"), cfg, network, header, kind="teacher")

    train_small(cfg)
    stopped = replace(cfg, output=cfg.output + "2")
    with pytest.raises(Interrupted):
        train_small(stopped, stop_at=7)
    train_small(stopped)
    assert_equal_runs(cfg, stopped)
    assert checkpoint(cfg)["header"]["t"] != 0


def test_fewer_rows_than_a_batch_are_refused(cfg):
    with pytest.raises(InputError, match="^Teacher T: 20 images are fewer than one batch: set batch_size to 20 or"):
        train(replace(cfg, batch_size=32))


def test_one_identity_is_refused_before_it_trains_with_loss_0(cfg):
    one = replace(cfg, data=f"{cfg.data}/one", ethnicities=())
    write_images(Path(one.data), {".": {"x": 6}})
    with pytest.raises(InputError, match="^Teacher T: all 6 images are of one identity, x, and a classifier needs two"):
        train(one)
    assert not one.teacher_dir("T").exists()


def test_cuda_is_refused_where_there_is_none(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device = 'cuda', but PyTorch finds no CUDA device"):
        setup(replace(cfg, device="cuda"))


def test_inference_reads_all_rows_in_order_and_in_eval_mode(cfg):
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    network = torch.nn.Dropout(0.5).train()
    columns = {"embedding": Column((rows[:, :1], rows[:, 1:]))}
    result = infer(lambda embedding: network(embedding), network, columns, replace(cfg, infer_batch_size=4), "test")
    assert np.array_equal(result, rows)
    assert network.training


def train_linear(cfg, loss):
    """Trains a linear layer; returns it, the header and the log."""
    setup(cfg)
    faces, network = Faces(cfg, flip=True), torch.nn.Linear(3 * 112 * 112, 16)
    header = build_header(loss, faces.num_classes, replace(cfg, s=8.0), "teacher")

    def losses(image, label):
        assert len(label) == cfg.batch_size
        embedding = F.normalize(network(image.flatten(1) / 100))
        return {"margin": header.loss(embedding, label), "cosine": embedding.detach().mean()}

    fit(losses, faces, cfg.teacher_dir("T"), cfg, network, header, kind="teacher", measures=("cosine",))
    log = (cfg.teacher_dir("T") / "log.jsonl").read_text().splitlines()
    return network, header, [json.loads(line) for line in log]


@pytest.mark.parametrize("loss", ["ArcFace", "CosFace"])
def test_accumulated_batches_make_the_steps_of_a_larger_batch(cfg, loss):
    """Losses in which each sample counts by itself, and a network without batch normalisation."""
    network, header, log = train_linear(cfg, loss)
    parts = replace(cfg, batch_size=2, accumulate=2, output=f"{cfg.output} in parts")
    other_network, other_header, other_log = train_linear(parts, loss)
    assert torch.allclose(network.weight, other_network.weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(header.kernel, other_header.kernel, rtol=1e-4, atol=1e-6)
    for line, other in zip(log, other_log, strict=True):
        assert line["lr"] == other["lr"]
        for kind, name in (("loss", "margin"), ("measures", "cosine")):
            assert line[kind][name] == pytest.approx(other[kind][name], rel=1e-4)


def test_a_run_of_accumulated_batches_is_stopped_and_resumed(cfg):
    """With dropout and elastic margins, which every batch of a step draws anew."""
    cfg = replace(cfg, batch_size=2, accumulate=2)
    other = replace(cfg, output=cfg.output + " stopped")
    train(cfg)
    with pytest.raises(Interrupted):
        train(other, before_step=lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 13 else None)
    train(other)
    assert_equal_runs(cfg, other)
    with pytest.raises(InputError, match="20 images are fewer than one batch: set batch_size to 4 or less"):
        train(replace(cfg, batch_size=8, accumulate=5), "large")


def test_the_learning_rate_rises_linearly_step_by_step_and_the_run_is_resumed(cfg, monkeypatch):
    cfg, seen, take = replace(cfg, warmup_epochs=2, milestones=(3,)), [], Progress._take_step

    def keep(self, *given):
        seen.append(self.optimizer.param_groups[0]["lr"])
        take(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "_take_step", keep)
        train(cfg, epochs=3)
    full = 0.1 * 4 / 512
    assert seen == pytest.approx([*(full * k / 10 for k in range(1, 11)), *[0.1 * full] * 5])
    log = [json.loads(line)["lr"] for line in (cfg.teacher_dir("T") / "log.jsonl").read_text().splitlines()]
    assert log == pytest.approx([full / 2, full, 0.1 * full])
    other = replace(cfg, output=cfg.output + " stopped")
    with pytest.raises(Interrupted):
        train(other, before_step=lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 3 else None)
    train(other, epochs=3)
    assert_equal_runs(cfg, other)
    assert cfg.schedule("SL").warmup == 0


def test_an_epoch_whose_score_is_nan_is_not_the_best(cfg, capsys):
    scores = iter([float("nan"), 2.0, 1.0])
    train(cfg, validate=lambda: ({"x": (score := next(scores))}, score))
    log = [json.loads(line) for line in (cfg.teacher_dir("T") / "log.jsonl").read_text().splitlines()]
    assert [line["best"] for line in log] == [False, True, False]
    said = capsys.readouterr().out.splitlines()
    first, second = (next(line for line in said if line.startswith(f"epoch {k}/3")) for k in (1, 2))
    assert "(the score that selects the best epoch is NaN, so this one is not the best)" in first
    assert "(best so far)" in second
