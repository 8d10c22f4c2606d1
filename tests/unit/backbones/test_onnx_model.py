"""Any network as .onnx: features, batches, input conventions, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones.onnx_model import OnnxNetwork
from config.config import Config
from utils.errors import InputError
from utils.weights import input_of, load_backbone, size_of

SIZE = 6
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def weights(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3 * 49, size)).astype(np.float32)


def make(
    path: Path,
    shape: tuple = ("batch", 3, 112, 112),
    metadata: dict | None = None,
    outputs: tuple[str, ...] = ("embedding",),
    kind: int = 1,  # of onnx.TensorProto: 1 float, 2 uint8, 10 float16
    fixed_inside: bool = False,
) -> Path:
    """Writes a network that pools images to 7 x 7 and multiplies them by a matrix."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, last = [], "image"
    if kind != 1:
        nodes.append(helper.make_node("Cast", [last], ["single"], to=1))
        last = "single"
    if shape[-1] == 3:
        nodes.append(helper.make_node("Transpose", [last], ["chw"], perm=[0, 3, 1, 2]))
        last = "chw"
    nodes.append(helper.make_node("AveragePool", [last], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]))
    rows = numpy_helper.from_array(np.array([1 if fixed_inside else -1, 147]), "rows")
    nodes.append(helper.make_node("Reshape", ["pooled", "rows"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", "matrix"], ["embedding"]))
    if "norm" in outputs:
        nodes.append(helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1], keepdims=1))
    if "copy" in outputs:
        nodes.append(helper.make_node("Identity", ["embedding"], ["copy"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [numpy_helper.from_array(weights(), "matrix"), rows],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain(image: torch.Tensor) -> torch.Tensor:
    pooled = image.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5))
    return pooled.flatten(1) @ torch.from_numpy(weights())


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({}, "any size"),
        ({"shape": (1, 3, 112, 112)}, "1"),
        ({"shape": (2, 3, 112, 112)}, "2"),
        ({"shape": (None, 3, None, None)}, "any size"),
        ({"shape": ("batch", 112, 112, 3)}, "any size"),
        ({"fixed_inside": True}, "1"),
        ({"outputs": ("norm", "embedding")}, "any size"),
    ],
)
def test_a_file_gives_its_features_in_batches_that_it_takes(options, batch, image, tmp_path):
    network = OnnxNetwork(make(tmp_path / "net.onnx", **options)).eval()
    assert network.embedding_size == SIZE
    assert f"batches of {batch}; 6 numbers" in network.described
    assert close(network(image), plain(image))
    assert close(network(image[:1].to(memory_format=torch.channels_last)), plain(image[:1]))


def test_half_precision_is_given_half_precision(image, tmp_path):
    assert close(OnnxNetwork(make(tmp_path / "net.onnx", kind=10))(image), plain(image), 1e-2)


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def imagenet(image: torch.Tensor) -> torch.Tensor:
    values = (image + 1) * 127.5
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("metadata", "given", "expected", "convention"),
    [
        ({}, {}, lambda x: x, ""),
        ({"channel_order": "BGR"}, {}, lambda x: x.flip(1), "BGR"),
        ({}, {"channel_order": "BGR"}, lambda x: x.flip(1), "BGR"),
        ({"channel_order": "RGB"}, {"channel_order": "BGR"}, lambda x: x, ""),
        ({"input_mean": "0", "input_std": "1"}, {}, lambda x: (x + 1) * 127.5, "mean 0 std 1"),
        ({}, {"input_mean": (0.0,), "input_std": (255.0,)}, lambda x: (x + 1) / 2, "mean 0 std 255"),
        (
            {},
            {"input_mean": MEAN, "input_std": STD},
            imagenet,
            "mean 123.675,116.28,103.53 std 58.395,57.12,57.375",
        ),
    ],
)
def test_channels_and_scaling_are_those_of_the_metadata_else_of_the_settings(
    metadata, given, expected, convention, image, tmp_path
):
    network = OnnxNetwork(make(tmp_path / "net.onnx", metadata=metadata), given)
    assert network.convention == convention
    assert close(network(image) / 255, plain(expected(image)) / 255)
    assert input_of(network) == ({"input": [convention]} if convention else {})
    source = "its metadata" if metadata else "settings" if given else "defaults"
    assert source in network.described


def test_settings_reach_the_file_and_its_size_is_its_own(image, tmp_path, capsys):
    path = make(tmp_path / "net.onnx")
    cfg = Config(onnx_channels="BGR", onnx_mean=(0.0,), onnx_std=(255.0,))
    network, digest = load_backbone("iresnet34", path, cfg)
    assert close(network(image), plain((image.flip(1) + 1) / 2))
    assert size_of(network, cfg) == SIZE and size_of(torch.nn.Identity(), cfg) == 512
    assert f"{path}: BGR, mean 0, std 255 (settings), batches of any size; 6 numbers." in capsys.readouterr().out
    path.with_name("net.onnx.data").write_bytes(b"weights beside the file")
    assert load_backbone("iresnet34", path, cfg)[1] != digest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": ("batch", 3, 160, 160)}, r"takes images of shape \(3, 160, 160\): faces here are 3 x 112 x 112"),
        ({"shape": ("batch", 1, 112, 112)}, r"takes images of shape \(1, 112, 112\)"),
        ({"kind": 2}, r"takes image tensor\(uint8\)"),
        ({"outputs": ("embedding", "copy")}, r"gives embedding \(2, 6\), copy \(2, 6\): expected one output"),
        ({"outputs": ("norm",)}, r"gives norm \(2, 1\)"),
        ({"metadata": {"channel_order": "GRB"}}, "channel_order is GRB: expected RGB or BGR"),
        ({"metadata": {"input_std": "0"}}, "input_std is '0': expected one number or three"),
        ({"metadata": {"input_mean": "1,2"}}, "input_mean is '1,2': expected one number or three"),
    ],
)
def test_what_takes_no_faces_or_gives_no_embedding_is_refused(options, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        OnnxNetwork(make(tmp_path / "net.onnx", **options))


def test_a_file_that_takes_no_images_is_refused(tmp_path):
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, 1, ("batch", 147)) for name in ("flat", "copy")]
    graph = helper.make_graph([helper.make_node("Identity", ["flat"], ["copy"])], "net", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"takes flat tensor\(float\) \['batch', 147\]: expected one image tensor"):
        OnnxNetwork(tmp_path / "net.onnx")


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_text("<html>")
    with pytest.raises(InputError, match=r"cannot read .*net.onnx"):
        OnnxNetwork(tmp_path / "net.onnx")


def test_a_missing_onnxruntime_is_named(tmp_path, monkeypatch):
    path = make(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        OnnxNetwork(path)
