"""Networks: published names and shapes, published outputs, strict loading."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import backbones
from backbones import DualLayerAdaptor, MultiTeacher, SingleLayerAdaptor, build_adaptor, build_backbone
from backbones.iresnet import SqueezeExcitation
from config.config import Config
from utils.errors import InputError
from utils.losses import ArcFace, CosFace, ElasticArcFace, ElasticCosFace
from utils.storage.tensors import save
from utils.weights import load_weights

PUBLISHED = json.loads((Path(__file__).parents[2] / "published_state_dicts.json").read_text())
UNUSED = ("attention.", "key_vector", "value_vector")

both_ways = pytest.mark.parametrize("load", [backbones.load_weights, load_weights])
"""Loaders of any state dict, and of one with a SHA-256, which is checked."""


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["iresnet18", "iresnet34", "iresnet50", "iresnet100", "mobilefacenet"])
def test_published_names_and_shapes(name):
    with torch.device("meta"):
        ours = shapes(build_backbone(name))
    assert list(ours) == list(PUBLISHED[name])
    assert ours == PUBLISHED[name]


def test_published_names_and_shapes_with_squeeze_and_excitation():
    assert shapes(build_backbone("iresnet34", use_se=True)) == PUBLISHED["iresnet34_se"]


def test_published_names_and_shapes_of_the_headers():
    assert PUBLISHED["header"] == {"kernel": [512, "C"]}
    for header in (ElasticArcFace, ElasticCosFace, ArcFace, CosFace):
        assert shapes(header(512, 7)) == {"kernel": [512, 7]}


def test_squeeze_and_excitation_scales_each_channel():
    block = SqueezeExcitation(32)
    x = torch.randn(2, 32, 3, 4)
    state = block.state_dict()
    squeezed = x.mean((2, 3)) @ state["fc1.weight"][:, :, 0, 0].T
    scale = torch.sigmoid(squeezed.clamp_min(0) @ state["fc2.weight"][:, :, 0, 0].T)
    assert torch.allclose(block(x), x * scale[:, :, None, None], atol=1e-6)


def test_published_names_and_shapes_of_the_adaptors():
    assert shapes(build_adaptor("SL", Config())) == PUBLISHED["adaptor_single_layer"]
    used = {k: v for k, v in PUBLISHED["adaptor_dual_layer_published"].items() if not k.startswith(UNUSED)}
    for name in ("DuL", "DLDPO"):
        assert shapes(build_adaptor(name, Config())) == used


@pytest.mark.parametrize(("name", "count"), [("iresnet34", 34_139_328), ("iresnet50", 43_590_848)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(name).parameters()) == count


def test_mobilefacenet_takes_any_embedding_size():
    assert sum(p.numel() for p in build_backbone("mobilefacenet").parameters()) == 1_199_488
    assert build_backbone("mobilefacenet", 128).eval()(torch.zeros(2, 3, 112, 112)).shape == (2, 128)


def test_only_iresnet50_trains_with_dropout():
    with torch.device("meta"):
        rates = {n: build_backbone(n).dropout.p for n in ("iresnet18", "iresnet34", "iresnet50", "iresnet100")}
        assert build_backbone("iresnet50", dropout=0.0).dropout.p == 0
    assert rates == {"iresnet18": 0, "iresnet34": 0, "iresnet50": 0.4, "iresnet100": 0}


def with_random_statistics(module: torch.nn.Module) -> torch.nn.Module:
    """Fills every parameter and buffer with different numbers, so that a swapped layer changes the output."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if name.endswith("running_var") or value.dim() == 1 else (noise - 0.5) * 0.2)
    return module.eval()


def batch_norm(state, name, x):
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)


def plain_iresnet18(state: dict, x: torch.Tensor) -> torch.Tensor:
    """Computes the published network in plain functions."""
    x = F.prelu(batch_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1)), state["prelu.weight"])
    for block in [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]:
        stride = 2 if block.endswith("0") else 1
        out = batch_norm(state, f"{block}.bn1", x)
        out = batch_norm(state, f"{block}.bn2", F.conv2d(out, state[f"{block}.conv1.weight"], padding=1))
        out = F.prelu(out, state[f"{block}.prelu.weight"])
        out = F.conv2d(out, state[f"{block}.conv2.weight"], stride=stride, padding=1)
        out = batch_norm(state, f"{block}.bn3", out)
        if stride == 2:
            x = batch_norm(state, f"{block}.downsample.1", F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=2))
        x = out + x
    x = batch_norm(state, "bn2", x).flatten(1)
    return batch_norm(state, "features", F.linear(x, state["fc.weight"], state["fc.bias"]))


def test_iresnet_computes_the_published_function():
    network = with_random_statistics(build_backbone("iresnet18", 16).double())
    image = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(network(image), plain_iresnet18(network.state_dict(), image), rtol=1e-9)


def plain_mobilefacenet(state: dict, x: torch.Tensor) -> torch.Tensor:
    """Computes the published network in plain functions; a depthwise layer has as many groups as output channels."""

    def block(name, x, stride=1, padding=0):
        weight = state[f"{name}.conv.weight"]
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        x = batch_norm(state, f"{name}.bn", F.conv2d(x, weight, stride=stride, padding=padding, groups=groups))
        return F.prelu(x, state[f"{name}.prelu.weight"]) if f"{name}.prelu.weight" in state else x

    def bottleneck(name, x, stride):
        return block(f"{name}.project", block(f"{name}.conv_dw", block(f"{name}.conv", x), stride, 1))

    x = block("conv2_dw", block("conv1", x, 2, 1), 1, 1)
    for down, stage, depth in (("conv_23", "conv_3", 4), ("conv_34", "conv_4", 6), ("conv_45", "conv_5", 2)):
        x = bottleneck(down, x, 2)
        for i in range(depth):
            x = x + bottleneck(f"{stage}.model.{i}", x, 1)
    x = block("output_layer.conv_6_dw", block("conv_6_sep", x)).flatten(1)
    return batch_norm(state, "output_layer.bn", F.linear(x, state["output_layer.linear.weight"]))


def test_mobilefacenet_computes_the_published_function():
    network = with_random_statistics(build_backbone("mobilefacenet", 16).double())
    image = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(network(image), plain_mobilefacenet(network.state_dict(), image), rtol=1e-9)


def test_the_tiny_network_trains_in_channels_last():
    """With fewer than 16 channels, the strided 1x1 shortcut crashes the process on some versions of torch."""
    network = build_backbone("iresnet_tiny", 32).to(memory_format=torch.channels_last)
    assert all(m.in_channels >= 16 or m.in_channels == 3 for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    network(torch.randn(4, 3, 112, 112).to(memory_format=torch.channels_last)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


def test_dual_layer_adaptor_drops_before_its_activation():
    adaptor = DualLayerAdaptor(6, 2000, 5, dropout=0.2)
    x = torch.randn(3, 6)
    seen = []
    adaptor.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    adaptor.eval()(x)
    assert torch.equal(seen[0], F.leaky_relu(adaptor.fc1(x), 0.01))
    adaptor.train()(x)
    dropped = seen[1] == 0
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.03)
    kept = F.leaky_relu(adaptor.fc1(x) / 0.8, 0.01)
    assert torch.allclose(seen[1][~dropped], kept[~dropped])


def test_multi_teacher_passes_unit_length_embeddings_to_the_adaptor_in_order():
    torch.manual_seed(0)
    teachers = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)) for _ in range(3)]
    adaptor = SingleLayerAdaptor(12, 5)
    image = torch.randn(2, 3, 2, 2)
    parts = [teacher(image) / teacher(image).norm(dim=1, keepdim=True) for teacher in teachers]
    assert torch.allclose(MultiTeacher(teachers, adaptor)(image), adaptor(torch.cat(parts, 1)), atol=1e-6)


# Loading --------------------------------------------------------------------------------------------------------------


@both_ways
def test_weights_load_what_was_saved(load, tmp_path):
    one, other = build_backbone("iresnet_tiny", 16), build_backbone("iresnet_tiny", 16)
    torch.save(one.state_dict(), tmp_path / "11000backbone.pth")
    load(other, tmp_path / "11000backbone.pth")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@both_ways
def test_the_published_adaptor_loads_without_its_unused_parameters(load, tmp_path):
    published = {k: torch.randn(v) for k, v in PUBLISHED["adaptor_dual_layer_published"].items()}
    torch.save(published, tmp_path / "adaptor.pth")
    adaptor = build_adaptor("DuL", Config())
    load(adaptor, tmp_path / "adaptor.pth")
    assert torch.equal(adaptor.fc2.weight, published["fc2.weight"])


@both_ways
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("fc.bias"), r"1 missing \(fc.bias\)"),
        (lambda s: s.update({"attention.in_proj_bias": torch.zeros(3)}), r"1 unknown \(attention.in_proj_bias\)"),
        (
            lambda s: s.update({"fc.bias": torch.zeros(7)}),
            r"1 of another shape \(fc.bias\); fc.bias is \(7,\), not \(16,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, sentence, load, tmp_path):
    network = build_backbone("iresnet_tiny", 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = build_backbone("iresnet_tiny", 16).state_dict()
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=sentence):
        load(network, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Gadget:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_files_without_weights_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = build_backbone("iresnet_tiny", 16)
    torch.save({"fc.weight": Gadget()}, "gadget.pth")
    torch.save(network.state_dict(), "whole.pth")
    Path("short.pth").write_bytes(Path("whole.pth").read_bytes()[:-1000])
    Path("text.pth").write_text("not a checkpoint")
    torch.save([1, 2], "list.pth")
    Path("start.pth").write_bytes(Path("whole.pth").read_bytes()[:10_000])
    Path("empty.pth").touch()
    save(Path("checkpoint.pth"), {"networks": [network.state_dict()], "decided_by": {}})
    for name, reason in {
        "gadget.pth": "it asks for getattr",
        "short.pth": "failed finding central directory",
        "start.pth": "it ends too early",
        "empty.pth": "it ends too early",
        "text.pth": "is damaged or no checkpoint",
        "list.pth": "is no state dict: expected the parameters of one network",
        "checkpoint.pth": "is the checkpoint of a run: its weights are in best_backbone.pth beside it",
        "none.pth": "There is no file",
    }.items():
        with pytest.raises(InputError) as error:
            load_weights(network, Path(name))
        assert name in str(error.value)
        assert reason in str(error.value)
    assert not Path("executed").exists()


def test_an_unknown_network_is_refused():
    with pytest.raises(InputError, match="There is no network 'resnet50': choose iresnet18"):
        build_backbone("resnet50")


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: build_backbone("iresnet50"), "It looks like iresnet50, embeddings of 512 numbers."),
        (lambda: build_backbone("iresnet18", use_se=True), "It looks like iresnet18 with SE blocks, embeddings of 512"),
        (lambda: build_backbone("iresnet34", 256), "It looks like iresnet34, embeddings of 256 numbers."),
        (lambda: build_backbone("mobilefacenet"), "It looks like mobilefacenet, embeddings of 512 numbers."),
        (lambda: SingleLayerAdaptor(2048, 512), "It looks like a single-layer adaptor from 2048 to 512 numbers."),
        (lambda: DualLayerAdaptor(2048, 300, 512, 0.0), "It looks like a dual-layer adaptor from 2048 to 512 numbers."),
        (lambda: ArcFace(16, 70), "It looks like the header of 70 identities."),
        (lambda: torch.nn.Conv2d(3, 4, 3), "It looks like none of the networks here."),
    ],
)
def test_the_message_names_the_network_that_the_weights_look_like(made, sentence, tmp_path):
    torch.save(made().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError) as error:
        load_weights(build_backbone("iresnet34"), tmp_path / "weights.pth")
    assert sentence in str(error.value)
