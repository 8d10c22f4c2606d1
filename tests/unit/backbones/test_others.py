"""Networks of other projects: equal to the original definitions, with the channels that their weights expect."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones import build_backbone
from backbones.ir import IR
from config.config import Config
from config.registry import NETWORKS
from utils.weights import size_of

ORIGINAL = {
    "tface_ir_18": [-0.0051576, -0.0120067, -0.0179749, -0.1107914],
    "adaface_ir_18": [-0.027316, 0.1029465, 0.0282446, -0.0985606],
    "tface_ir_se_50": [0.0647989, 0.1032641, 0.0017447, -0.024408],
    "curricularface_ir_50": [0.011733, -0.0336418, -0.014493, 0.0225511],
    "evolve_ir_se_50": [-0.0102855, -0.0349839, 0.0095976, -0.0252474],
    "mbf": [0.0143296, -0.0080423, 0.0091522, -0.014881],
    "mbf_large": [-0.0365596, 0.0485802, -0.043474, 0.0174043],
}
"""First numbers of the embedding that the published code of each project gives for `image` with the weights of `fill`.

Computed with that code, which got BGR where it is AdaFace's. All other networks of the registry were compared likewise.
"""


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Gives parameters and buffers numbers that depend only on their names and shapes."""
    generator = np.random.default_rng(0)
    for name, value in sorted(module.state_dict().items()):
        shape = tuple(value.shape)
        if not value.is_floating_point():
            continue
        if value.ndim > 1:
            numbers = generator.standard_normal(shape, np.float32) / np.sqrt(value[0].numel())
        elif name.endswith(("bias", "running_mean")):
            numbers = 0.1 * generator.standard_normal(shape, np.float32)
        else:
            numbers = 0.5 + generator.random(shape, np.float32)
        value.copy_(torch.from_numpy(np.float32(numbers)))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 112, 112))[:1]
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_network_computes_what_the_original_definition_computes(name, image):
    embedding = F.normalize(fill(build_backbone(name))(image))
    assert embedding[0, :4].tolist() == pytest.approx(ORIGINAL[name], abs=1e-5)


def norm(state, name, x):
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)


def plain_ir(state: dict, x: torch.Tensor, blocks: tuple, bottleneck: bool, middle_bn: bool) -> torch.Tensor:
    """The published network, written out from the parameter names."""
    x = norm(state, "input_layer.1", F.conv2d(x, state["input_layer.0.weight"], padding=1))
    x = F.prelu(x, state["input_layer.2.weight"])
    strides = [2 if i == 0 else 1 for count in blocks for i in range(count)]
    for k, stride in enumerate(strides):
        res, kernels = f"body.{k}.res_layer", (1, 3, 1) if bottleneck else (3, 3)
        out, layer = norm(state, f"{res}.0", x), 1
        for i, kernel in enumerate(kernels):
            last = i == len(kernels) - 1
            out = F.conv2d(out, state[f"{res}.{layer}.weight"], stride=stride if last else 1, padding=kernel // 2)
            layer += 1
            if middle_bn or last:
                out = norm(state, f"{res}.{layer}", out)
                layer += 1
            if not last:
                out = F.prelu(out, state[f"{res}.{layer}.weight"])
                layer += 1
        se = f"{res}.{'se_block' if middle_bn else layer}"
        if f"{se}.fc1.weight" in state:
            hidden = F.relu(F.conv2d(F.adaptive_avg_pool2d(out, 1), state[f"{se}.fc1.weight"]))
            out = out * torch.sigmoid(F.conv2d(hidden, state[f"{se}.fc2.weight"]))
        shortcut = f"body.{k}.shortcut_layer"
        if f"{shortcut}.0.weight" in state:
            x = norm(state, f"{shortcut}.1", F.conv2d(x, state[f"{shortcut}.0.weight"], stride=stride))
        else:
            x = F.max_pool2d(x, 1, stride)
        x = out + x
    x = norm(state, "output_layer.0", x).flatten(1)
    return norm(state, "output_layer.4", F.linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"]))


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize(("middle_bn", "affine"), [(True, False), (False, True)])
@pytest.mark.parametrize("use_se", [False, True])
def test_every_option_of_ir_computes_the_plain_function(bottleneck, middle_bn, affine, use_se, image):
    blocks = (2, 1, 1, 1)
    options = {"bottleneck": bottleneck, "middle_bn": middle_bn, "affine": affine, "use_se": use_se}
    network = fill(IR(blocks, 8, **options))
    found = network(image)
    expected = plain_ir(network.state_dict(), image, blocks, bottleneck, middle_bn)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


PARAMETERS = {
    "tface_ir_34": 34_134_080,
    "tface_ir_101": 65_150_912,
    "tface_ir_152": 109_636_736,
    "tface_ir_200": 114_138_240,
    "adaface_ir_101": 65_150_912,
    "curricularface_ir_101": 65_128_768,
    "evolve_ir_50": 43_574_976,
    "evolve_ir_152": 70_737_600,
    "mbf": 2_059_520,
    "mbf_large": 6_314_880,
}
"""Counted in the originals."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_originals(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build_backbone(name).parameters()) == PARAMETERS[name]


def test_parameters_have_the_published_names():
    with torch.device("meta"):
        tface, evolve, mbf = (build_backbone(n).state_dict() for n in ("tface_ir_se_50", "evolve_ir_se_50", "mbf"))
    first = ["input_layer.0.weight", "input_layer.1.weight"]
    assert list(tface)[:2] == list(evolve)[:2] == first
    assert "body.0.res_layer.se_block.fc1.weight" in tface and "body.0.res_layer.5.fc1.weight" in evolve
    assert "body.3.shortcut_layer.0.weight" in tface and "body.0.shortcut_layer.0.weight" not in tface
    assert "output_layer.4.weight" in evolve and "output_layer.4.weight" not in tface
    assert "layers.1.layers.0.weight" in mbf and tuple(mbf["layers.1.layers.0.weight"].shape) == (128, 2, 3, 3)
    assert "layers.3.layers.0.layers.1.layers.2.weight" in mbf and "features.layers.0.layers.1.bias" in mbf


def test_networks_of_adaface_take_bgr_and_all_others_rgb(image):
    """Everything gives them RGB: they reverse it, in training too, and the parameter names stay as they are."""
    assert {name for name, network in NETWORKS.items() if network.channels == "BGR"} == {
        name for name in NETWORKS if name.startswith("adaface_")
    }
    bgr, rgb = fill(build_backbone("adaface_ir_18", 8)), fill(build_backbone("tface_ir_18", 8))
    assert list(bgr.state_dict()) == list(rgb.state_dict())
    assert torch.equal(bgr(image), rgb(image.flip(1)))
    assert not torch.allclose(bgr(image), rgb(image), rtol=0.1)
    images = torch.cat([image, image.flip(-1)])
    bgr.output_layer[1].p = rgb.output_layer[1].p = 0.0
    assert torch.equal(bgr.train()(images), rgb.train()(images.flip(1)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_embedding_size_of_every_network_is_known_from_its_layers(name):
    with torch.device("meta"):
        assert size_of(build_backbone(name, 96), Config()) == 96
