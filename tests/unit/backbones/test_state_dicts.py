"""Weights as other tools save them: what is taken off is said, what is ambiguous or does not fit is refused."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import backbones
from backbones import build_adaptor, build_backbone
from backbones.safetensors import read_safetensors
from config.config import Config
from utils.errors import InputError
from utils.storage.files import sha256
from utils.weights import find_weights, load_weights, weights_with_digest


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_backbone("iresnet_tiny", 16).state_dict()


def under(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((prefix + name, value) for name, value in state.items())


HEAD = torch.ones(7, 16)
WRAPPED = {
    "DataParallel": (lambda s: under("module.", s), "prefix 'module.' taken off"),
    "compiled": (lambda s: under("_orig_mod.", s), "prefix '_orig_mod.' taken off"),
    "compiled in DDP": (lambda s: under("module._orig_mod.", s), "prefix 'module._orig_mod.' taken off"),
    "any prefix": (lambda s: under("net.backbone.", s), "prefix 'net.backbone.' taken off"),
    "timm": (lambda s: {"state_dict": s, "epoch": 3, "arch": "x"}, "its state_dict"),
    "torchvision": (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "its model"),
    "nested twice": (lambda s: {"ckpt": {"net": under("module.", s)}}, "its ckpt.net; prefix 'module.' taken off"),
    "arcface_torch": (
        lambda s: {"epoch": 20, "state_dict_backbone": s, "state_dict_softmax_fc": {"weight": HEAD}},
        "its state_dict_backbone",
    ),
    "Lightning": (
        lambda s: {
            "state_dict": OrderedDict([*under("model.", s).items(), ("head.kernel", HEAD.T), ("head.t", HEAD[0])])
        },
        "its state_dict; prefix 'model.' taken off; left out: head.kernel, head.t",
    ),
    "head beside": (lambda s: {**s, "head.weight": HEAD, "head.bias": HEAD[0]}, "left out: head.weight, head.bias"),
    "head in the wrapper": (
        lambda s: under("module.", {**s, "classifier.weight": HEAD}),
        "prefix 'module.' taken off; left out: module.classifier.weight",
    ),
    "another network beside": (
        lambda s: {**under("student.", s), "teacher.conv1.weight": torch.ones(4, 3, 3, 3)},
        "prefix 'student.' taken off; left out: teacher.conv1.weight",
    ),
    "no counters": (
        lambda s: {name: value for name, value in s.items() if not name.endswith("num_batches_tracked")},
        "19 counters (num_batches_tracked) are missing and not needed",
    ),
    "the same twice": (lambda s: {"model": s, "ema": {k: v.clone() for k, v in s.items()}}, "its model"),
    "half": (lambda s: {name: value.half() if value.is_floating_point() else value for name, value in s.items()}, ""),
    "plain": (lambda s: s, ""),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_state_dict_is_found_and_what_was_taken_off_is_said(name, state, tmp_path, capsys):
    make, said = WRAPPED[name]
    path = tmp_path / "weights.pth"
    torch.save(make(state), path)
    network = build_backbone("iresnet_tiny", 16)
    assert load_weights(network, path) == sha256(path)
    assert capsys.readouterr().out == (f"Loaded {path}: {said}.\n" if said else "")
    tolerance = 1e-3 if name == "half" else 0
    for key, value in network.state_dict().items():
        assert torch.allclose(value, state[key], atol=tolerance), key
    other = build_backbone("iresnet_tiny", 16)
    assert backbones.load_weights(other, path) == said
    assert torch.equal(other.fc.weight, network.fc.weight)


REFUSED = {
    "two that differ": (
        lambda s: {"state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}},
        r"several state dicts that fit this IResNet \(state_dict, state_dict_ema\): save the one you mean",
    ),
    "two prefixes": (
        lambda s: {**under("model.", s), **under("ema_model.", {k: v + 1 for k, v in s.items()})},
        r"\(the file under 'model.', the file under 'ema_model.'\)",
    ),
    "a layer more": (lambda s: {**s, "layer5.0.conv1.weight": torch.ones(2, 2, 3, 3)}, "1 unknown"),
    "more of a layer": (lambda s: {**s, "layer4.1.bn1.weight": torch.ones(64)}, "1 unknown"),
    "a parameter less, wrapped": (
        lambda s: {"state_dict": under("module.", {k: v for k, v in s.items() if k != "fc.bias"})},
        r"parameters 1 missing \(fc.bias\)",
    ),
    "another size": (
        lambda s: {"model": under("module.", {**s, "fc.bias": torch.ones(17)})},
        r"fc.bias is \(17,\), not \(16,\)",
    ),
    "numbers only": (lambda s: {"epoch": 3, "nothing": {}}, "is no state dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_or_does_not_fit_is_refused_and_changes_nothing(name, state, tmp_path):
    make, sentence = REFUSED[name]
    torch.save(make(state), tmp_path / "weights.pth")
    network = build_backbone("iresnet_tiny", 16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError, match=sentence):
        load_weights(network, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("tface_ir_18", 512, "It looks like tface_ir_18 or adaface_ir_18, embeddings of 512 numbers."),
        ("evolve_ir_se_50", 512, "It looks like evolve_ir_se_50, embeddings of 512 numbers."),
        ("mbf", 128, "It looks like mbf, embeddings of 128 numbers."),
    ],
)
def test_wrapped_weights_of_another_project_are_told_what_they_look_like(name, size, sentence, tmp_path):
    made = under("model.", build_backbone(name, size).state_dict())
    torch.save({"state_dict": {**made, "head.kernel": torch.ones(size, 9)}}, tmp_path / "x.ckpt")
    with pytest.raises(InputError) as error:
        load_weights(build_backbone("iresnet_tiny", 16), tmp_path / "x.ckpt")
    assert sentence in str(error.value)


def test_adaptors_are_read_in_wrappers_too(tmp_path):
    cfg = Config(embedding_size=16, middle_layer_size=16)
    for name in ("SL", "DuL"):
        made, other = build_adaptor(name, cfg), build_adaptor(name, cfg)
        torch.save({"state_dict": under("module.", made.state_dict())}, tmp_path / "adaptor.pth")
        load_weights(other, tmp_path / "adaptor.pth")
        assert all(torch.equal(value, made.state_dict()[key]) for key, value in other.state_dict().items())


def test_code_in_a_file_is_refused_with_what_to_do_instead(tmp_path):
    torch.save({"net": build_backbone("iresnet_tiny", 16)}, tmp_path / "whole.pth")
    with pytest.raises(
        InputError, match=r"asks for backbones.iresnet.IResNet\): save the state_dict\(\) of the network"
    ):
        load_weights(build_backbone("iresnet_tiny", 16), tmp_path / "whole.pth")


# safetensors ----------------------------------------------------------------------------------------------------------


def as_safetensors(state: dict[str, torch.Tensor], metadata: dict | None = None) -> bytes:
    """Writes the format from its description."""
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": metadata} if metadata else {}, b""
    for name, value in state.items():
        content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes()
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": types[value.dtype], "shape": [*value.shape], "data_offsets": offsets}
        body += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_load_with_and_without_metadata_and_prefix(metadata, state, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(as_safetensors(under("backbone.", state), metadata))
    network = build_backbone("iresnet_tiny", 16)
    assert load_weights(network, path) == sha256(path)
    assert "prefix 'backbone.' taken off" in capsys.readouterr().out
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_package_writes_what_is_read_here():
    save = pytest.importorskip("safetensors.torch").save
    made = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7), "d": torch.empty(0, 2)}
    read = read_safetensors(save(made), Path("x"))
    assert read.keys() == made.keys()
    assert all(torch.equal(read[name], made[name]) and read[name].dtype == made[name].dtype for name in made)


@pytest.mark.parametrize("cut", [lambda c: c[:-1], lambda c: c[:40], lambda c: b"", lambda c: b"<html>" + c])
def test_damaged_safetensors_are_refused(cut, state, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(cut(as_safetensors(state)))
    with pytest.raises(InputError, match="is damaged or no safetensors file"):
        load_weights(build_backbone("iresnet_tiny", 16), path)


# Run folders ----------------------------------------------------------------------------------------------------------


def test_a_released_file_of_any_format_is_found_in_a_run_folder(tmp_path):
    assert find_weights(tmp_path / "none", "best") is None
    for name in ("295672backbone.pth", "adaface_ir50.ckpt", "model.safetensors", "model.pt", "w600k_r50.onnx"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(name.encode())
        (folder / "295672header.pth").write_bytes(b"")
        assert find_weights(folder, "best") == folder / name
        assert weights_with_digest(folder, sha256(folder / name)) == folder / name


def test_exported_copies_do_not_count_and_two_models_are_refused(tmp_path):
    for name in ("best_backbone.pth", "last_backbone.pth", "best_backbone.onnx", "best_backbone.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert find_weights(tmp_path, "last") == tmp_path / "last_backbone.pth"
    (tmp_path / "other.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds best_backbone.pth, last_backbone.pth, other.onnx: keep the one"):
        find_weights(tmp_path, "last")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (lambda value: (100 * value).to(torch.int8), "as int8: save the weights as dense"),
        (lambda value: value.to_sparse(), "as sparse_coo: save the weights as dense"),
        (lambda value: value / 0, "numbers in .* that are not finite"),
    ],
)
def test_weights_that_would_be_converted_without_a_word_are_refused(changed, sentence, state, tmp_path):
    found = {name: changed(value) if value.ndim == 2 else value for name, value in state.items()}
    torch.save(found, tmp_path / "x.pth")
    with pytest.raises(InputError, match=sentence):
        load_weights(build_backbone("iresnet_tiny", 16), tmp_path / "x.pth")
