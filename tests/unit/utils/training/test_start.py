"""Training from given weights: what is loaded, what is frozen, and what a resumed run must share."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_backbone
from config.config import Config
from tests.runs import Linear, difference
from utils.data.faces import Faces
from utils.errors import InputError
from utils.losses import build_header
from utils.process import Interrupted, setup
from utils.training.engine import fit
from utils.training.start import freeze


def train(cfg: Config, name: str = "T", network=Linear, before_step=lambda *_: None, **settings):
    """Trains two epochs in the run folder `name`; calls `before_step` with the number of the step and both modules."""
    cfg = replace(cfg, num_epoch=2, loss="ArcFace", s=8.0, **settings)
    setup(cfg)
    faces, backbone, calls = Faces(cfg, flip=True), network(), []
    header = build_header("ArcFace", faces.num_classes, cfg, "teacher")

    def losses(image, label):
        calls.append(label)
        before_step(len(calls), backbone, header)
        return {"margin": header.loss(F.normalize(backbone(image)), label)}

    fit(losses, faces, cfg.teacher_dir(name), cfg, backbone, header, kind="teacher")
    return backbone, header


def tiny() -> nn.Module:
    return build_backbone("iresnet_tiny", 16)


def weights(tmp_path: Path, network: nn.Module, name: str = "weights.pth") -> str:
    torch.save(network.state_dict(), tmp_path / name)
    return str(tmp_path / name)


def test_a_run_starts_from_a_file_that_is_compared_by_its_digest(cfg, tmp_path, capsys):
    torch.manual_seed(5)
    given = Linear()
    path, seen = weights(tmp_path, given), []
    train(cfg, init_from=path, before_step=lambda _, network, __: seen.append(network.fc.weight.clone()))
    assert torch.equal(seen[0], given.fc.weight)
    assert not torch.equal(seen[1], given.fc.weight)
    assert f"The network starts from {path}." in capsys.readouterr().out
    shutil.move(path, tmp_path / "moved.pth")
    train(cfg, init_from=str(tmp_path / "moved.pth"), before_step=lambda *_: pytest.fail("trained again"))
    assert "starts from" not in capsys.readouterr().out
    for other in (weights(tmp_path, Linear()), None):
        with pytest.raises(InputError, match=r"other settings or data \(init_from changed\)"):
            train(cfg, init_from=other)
    with pytest.raises(InputError, match="There is no file nowhere.pth: set init_from to a file of weights"):
        train(cfg, "U", init_from="nowhere.pth")
    with pytest.raises(InputError, match="does not fit this Linear"):
        train(cfg, "U", init_from=weights(tmp_path, tiny()))
    assert not cfg.teacher_dir("U").joinpath("config.json").exists()


def test_the_centres_start_at_the_mean_embeddings_of_the_identities(cfg, tmp_path):
    path, seen = weights(tmp_path, Linear()), []

    def keep(_, network, header):
        seen.append(header.kernel.detach().clone())

    train(cfg, init_from=path, init_header="means", before_step=keep)
    train(cfg, "new", init_from=path, before_step=keep)
    faces, network = Faces(cfg), Linear().eval()
    network.load_state_dict(torch.load(path))
    images, labels = faces.columns["image"].arrays[0], faces.columns["label"].arrays[0]
    with torch.no_grad():
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        embeddings = F.normalize(network(x))
    means = torch.stack([embeddings[torch.from_numpy(labels) == k].mean(0) for k in range(faces.num_classes)], 1)
    assert torch.allclose(seen[0], means, atol=1e-6)
    assert not torch.allclose(seen[-1], means, atol=0.1)


def test_the_centres_of_some_groups_are_those_of_their_images(cfg, tmp_path):
    """The rows of one teacher do not begin with the first image, and images that are left out interrupt them."""
    path, seen = weights(tmp_path, Linear()), []
    setup(cfg)
    faces = Faces(cfg, teacher="B", flip=True)
    faces.rows = np.delete(faces.rows, [1, 2])
    header = build_header("ArcFace", faces.num_classes, cfg, "teacher")
    network = Linear()

    def losses(image, label):
        seen.append(header.kernel.detach().clone())
        return {"margin": header.loss(F.normalize(network(image)), label)}

    given = replace(cfg, init_from=path, init_header="means", batch_size=2, num_epoch=1)
    fit(losses, faces, cfg.teacher_dir("T"), given, network, header, kind="teacher")
    fresh = Linear().eval()
    fresh.load_state_dict(torch.load(path))
    x = faces.columns["image"].gather(faces.rows, None).permute(0, 3, 1, 2).float() / 127.5 - 1
    embeddings, labels = F.normalize(fresh(x)), faces.columns["label"].gather(faces.rows, None)
    means = torch.stack([embeddings[labels == k].mean(0) for k in range(faces.num_classes)], 1)
    assert torch.allclose(seen[0], means, atol=1e-6)


@pytest.mark.parametrize("which", ["features", "bn"])
def test_frozen_layers_keep_their_values_and_a_stopped_run_is_resumed(cfg, tmp_path, which):
    path = weights(tmp_path, tiny())
    before = torch.load(path)

    def stop(step, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    network, _ = train(cfg, "whole", tiny, init_from=path, freeze=which)
    after = network.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    is_bn = {name.rpartition(".")[0] for name in before if name.endswith("running_mean")}
    if which == "features":
        assert {name.split(".")[0] for name in changed} == {"fc", "features"}
    else:
        expected = {name for name, _ in network.named_parameters() if name.rpartition(".")[0] not in is_bn}
        assert changed == expected
    with pytest.raises(Interrupted):
        train(cfg, "stopped", tiny, stop, init_from=path, freeze=which)
    train(cfg, "stopped", tiny, init_from=path, freeze=which)
    assert difference(cfg.teacher_dir("whole"), cfg.teacher_dir("stopped")) == ""
    with pytest.raises(InputError, match=rf"\(freeze was '{which}', now ''\)"):
        train(cfg, "whole", tiny, init_from=path)


def test_only_the_layers_of_the_embedding_are_trained_in_every_network():
    expected = {
        "mobilefacenet": {"output_layer.linear"},
        "iresnet18": {"fc", "features"},
        "adaface_ir_18": {"output_layer.3"},  # defined before the body
        "evolve_ir_se_50": {"output_layer.3", "output_layer.4"},
        "mbf": {"features.layers.2", "features.layers.3"},
    }
    for name, trained in expected.items():
        network = build_backbone(name, 8)
        freeze(network, "features")
        names = {key.rpartition(".")[0] for key, value in network.named_parameters() if value.requires_grad}
        assert names == trained
    with pytest.raises(InputError, match="freeze = 'bn' finds no such layers in Linear"):
        freeze(Linear(), "bn")


def test_settings_of_a_start_need_weights_to_start_from():
    for settings in ({"freeze": "bn"}, {"init_header": "means"}):
        with pytest.raises(InputError, match="where there is no init_from"):
            Config(**settings)
    with pytest.raises(InputError, match="freeze = 'all' must be features, bn or"):
        Config(freeze="all", init_from="x.pth")
