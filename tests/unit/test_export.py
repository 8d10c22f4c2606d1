"""Export: onnxruntime and safetensors give what PyTorch gives, the files say what they hold, bad input is refused."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export
from backbones import MultiTeacher, build_adaptor, build_backbone
from config.config import Config
from eval.models import model_of_files
from tests.conftest import encode
from tests.runs import run_script
from utils.data.columns import to_network
from utils.data.store import decode
from utils.errors import InputError
from utils.storage.files import sha256, write_json
from utils.storage.tensors import save

SIZE = 16
TINY = ["--network", "iresnet_tiny", "--embedding_size", str(SIZE)]


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def network(name: str, seed: int = 0) -> torch.nn.Module:
    """Returns a network with random weights and matching BatchNorm statistics, so that its outputs stay finite."""
    torch.manual_seed(seed)
    made = build_backbone(name, SIZE)
    for module in made.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    made.train()(images(4, seed=99))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teachers() -> list[torch.nn.Module]:
    """Returns teachers with features of different lengths, so that raw features would change the adaptor's output."""
    made = [network("iresnet_tiny", seed) for seed in range(4)]
    for k, teacher in enumerate(made):
        teacher.features.weight.mul_(5**k)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teachers) -> Path:
    """Writes a.pth to d.pth, the teachers, and SL.pth and DuL.pth, adaptors of these teachers."""
    folder = tmp_path_factory.mktemp("weights")
    for name, teacher in zip("abcd", teachers, strict=True):
        torch.save(teacher.state_dict(), folder / f"{name}.pth")
    for name in ("SL", "DuL"):
        torch.save(build_adaptor(name, Config(embedding_size=SIZE)).state_dict(), folder / f"{name}.pth")
    return folder


def on_teachers(folder: Path, names: str = "abcd") -> list[str]:
    return ["--teacher", ",".join(str(folder / f"{name}.pth") for name in names)]


def onnx_outputs(path: Path, image: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["output"], {"image": image.numpy()})[0])


def need_packages() -> None:
    """Skips the test without the packages of export, which `make test` installs but requirements.txt does not."""
    for name in export.PACKAGES:
        pytest.importorskip(name)


def metadata(path: Path) -> dict[str, str]:
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def agree(path: Path, expected) -> None:
    """Compares outputs for several batch sizes with `expected`: ONNX to 1e-4, safetensors to the last bit."""
    restored = export.load_exported(path.with_suffix(".safetensors"))
    for count in (1, 2, 7, 3):
        image = images(count, seed=count)
        with torch.no_grad():
            assert torch.allclose(onnx_outputs(path, image), expected(image), rtol=0, atol=1e-4)
            assert torch.equal(restored(image), expected(image))


# Exported files -------------------------------------------------------------------------------------------------------


def test_both_files_give_the_embeddings_of_the_network(folder, teachers, tmp_path, capsys):
    need_packages()
    import onnx

    shutil.copy(folder / "a.pth", tmp_path / "295672backbone.pth")
    run_script("export.py", [str(tmp_path / "295672backbone.pth"), *TINY])
    path = tmp_path / "295672backbone.onnx"
    agree(path, lambda image: F.normalize(teachers[0](image)))
    said = capsys.readouterr().out
    assert f"Written to {path} and 295672backbone.safetensors: onnxruntime differs" in said
    assert "(batches of 1, 2, 7)" in said
    model = onnx.load(path)
    assert model.opset_import[0].version >= 20  # the default of PyTorch's exporter from 2.11 on
    assert {entry.key: entry.value for entry in model.metadata_props} == metadata(path.with_suffix(".safetensors"))
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert shapes == [["batch", 3, 112, 112]]
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes()  # no path of this machine
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        f"{path.stem}.{kind}" for kind in ("onnx", "pth", "safetensors")
    ]


def test_a_raw_file_gives_the_features_of_the_network(tmp_path):
    need_packages()
    made = network("mobilefacenet")
    torch.save(made.state_dict(), tmp_path / "m.pth")
    words = ["--network", "mobilefacenet", "--embedding_size", str(SIZE), "--raw", "--output", str(tmp_path / "new")]
    export.main([str(tmp_path / "m.pth"), *words])
    path = tmp_path / "new" / "m.onnx"
    assert metadata(path.with_suffix(".safetensors"))["normalisation"] == "none"
    assert (made(images(2)).norm(dim=1) > 2).all()
    agree(path, made)


@pytest.fixture(scope="module")
def fused(folder, tmp_path_factory) -> Path:
    need_packages()
    output = tmp_path_factory.mktemp("fused")
    export.main([str(folder / "SL.pth"), *TINY, *on_teachers(folder), "--output", str(output)])
    return output / "SL.onnx"


def adaptor_of(path: Path, name: str) -> torch.nn.Module:
    adaptor = build_adaptor(name, Config(embedding_size=SIZE))
    adaptor.load_state_dict(torch.load(path, weights_only=True))
    return adaptor.eval()


def test_teachers_and_adaptor_are_fused_into_one_file(fused, folder, teachers):
    adaptor = adaptor_of(folder / "SL.pth", "SL")

    def expected(image: torch.Tensor) -> torch.Tensor:
        return F.normalize(adaptor(torch.cat([F.normalize(teacher(image)) for teacher in teachers], 1)))

    agree(fused, expected)
    raw = torch.cat([teacher(images(2)) for teacher in teachers], 1)
    assert (F.normalize(adaptor(raw)) - expected(images(2))).abs().max() > 0.01  # otherwise the test could not fail


def test_a_dual_layer_adaptor_is_restored(folder, teachers, tmp_path):
    pytest.importorskip("safetensors")
    files = tuple(str(folder / f"{name}.pth") for name in "abcd")
    given = {"checkpoint": str(folder / "DuL.pth"), "teacher": files, "is_dual_layer": True}
    cfg = Config(network="iresnet_tiny", embedding_size=SIZE, **given)
    model = MultiTeacher(teachers, adaptor_of(folder / "DuL.pth", "DuL"))
    about = export.description(cfg, model_of_files(cfg), raw=True)
    (tmp_path / "DuL.safetensors").write_bytes(export.to_safetensors(model, about))
    restored = export.load_exported(tmp_path / "DuL.safetensors")
    assert not restored.training
    assert torch.equal(restored(images(2)), model(images(2)))


# Metadata -------------------------------------------------------------------------------------------------------------


def test_the_metadata_gives_the_order_of_the_channels(fused, folder, teachers):
    """Compares a face read with OpenCV and the metadata with the same face read as in the stages."""
    face = np.zeros((112, 112, 3), np.uint8)
    face[..., 2], face[:60, :, 1] = 200, 90  # red for OpenCV
    encoded = encode(face, ".png")
    about = metadata(fused.with_suffix(".safetensors"))
    channels = ["BGR".index(channel) for channel in about["channel_order"]]
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[None, ..., channels]
    image = torch.from_numpy((image / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2).copy())
    expected = to_network(torch.from_numpy(decode(encoded))[None])
    assert torch.allclose(image, expected, atol=1e-6)
    model = MultiTeacher(teachers, adaptor_of(folder / "SL.pth", "SL"))
    found = onnx_outputs(fused, image)
    assert torch.allclose(found, F.normalize(model(expected)), rtol=0, atol=1e-4)
    assert (found - F.normalize(model(expected.flip(1)))).abs().max() > 0.01


def test_made_from_lists_files_digests_and_settings(folder, teachers, tmp_path):
    """Settings are listed for files of our run folders only, and without paths of this machine."""
    run = tmp_path / "African"
    save(run / "best_backbone.pth", teachers[0].state_dict())
    about = {
        "settings": {"lr": 0.1, "network": "iresnet_tiny"},
        "all settings": {"data": "a place of this machine"},
        "sessions": [],
    }
    for place in (run, folder):
        write_json(place / "config.json", about)
    files = [run / "best_backbone.pth", *(folder / f"{name}.pth" for name in "bcd")]
    cfg = Config(
        network="iresnet_tiny",
        embedding_size=SIZE,
        checkpoint=str(folder / "SL.pth"),
        teacher=tuple(map(str, files)),
    )
    found = export.description(cfg, model_of_files(cfg), raw=False)
    assert found["normalisation"] == "unit length"
    made_from = [
        {"file": f"{path.parent.name}/{path.name}", "sha256": sha256(path)} for path in (folder / "SL.pth", *files)
    ]
    made_from[1]["settings"] = {"lr": 0.1, "network": "iresnet_tiny"}
    assert json.loads(found["made_from"]) == made_from
    expected = {"network": "iresnet_tiny", "embedding_size": "16", "teachers": "4", "adaptor": "SL"}
    assert expected.items() <= found.items()


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.pth", "--network", "resnet50"], "network = 'resnet50' must be one of iresnet18"),
        (["a.pth", "--network", "iresnet18", "--embedding_size", "16"], "It looks like iresnet_tiny, embeddings of 16"),
        (["nowhere.pth", *TINY], "There is no file nowhere.pth"),
        (["SL.pth", *TINY], "Name the teachers below it, in its order: --teacher a.pth,b.pth,..."),
        (["DuL.pth", *TINY], "to 16 numbers. Name the teachers below it, in its order: --teacher a.pth"),
        (["SL.pth", *TINY, "--teacher", "a.pth,b.pth"], "fc.weight is (16, 64), not (16, 32). It looks like"),
        (["SL.pth", *TINY, "--teacher", "a.pth,b.pth,c.pth,e.pth"], "There is no file e.pth"),
        (["SL.pth", *TINY, "--teacher", "a.pth,b.pth,c.pth,SL.pth"], "adaptor from 64 to 16 numbers.\n"),
        (["SL.pth", *TINY, "--is_dual_layer", "--teacher", "a.pth,b.pth,c.pth,d.pth"], "does not fit this DualLayer"),
        (["a.pth", *TINY, "--output", "b.pth"], "b.pth is no folder: set --output to one."),
        (["a.pth", *TINY, "--output", "old"], "old/a.safetensors exist: delete what is old, or set --output"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(words, sentence, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "PACKAGES", ())  # refused before the packages are used
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.safetensors").write_text("of another model")
    for path in folder.glob("*.pth"):
        (tmp_path / path.name).symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        export.main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_packages_are_named_before_any_work(monkeypatch, capsys):
    there = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if "onnx" in name else there(name) or 1)
    with pytest.raises(SystemExit):
        export.main(["nowhere.pth", "--network", "iresnet_tiny"])
    advice = "pip install onnx onnxruntime onnxscript\n"
    assert capsys.readouterr().err.endswith(f"Export needs packages that are not installed: {advice}")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install safetensors"):
        export.load_exported(Path("nowhere.safetensors"))


def test_a_file_with_other_outputs_is_not_written(fused, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "to_onnx", lambda *_: fused.read_bytes())  # a file of another network
    with pytest.raises(SystemExit):
        export.main([str(folder / "b.pth"), *TINY, "--output", str(tmp_path / "new")])
    assert "onnxruntime differs from PyTorch by " in capsys.readouterr().err
    assert not [*(tmp_path / "new").iterdir()]


def test_an_error_of_a_thousandth_is_refused(fused):
    network = export.load_exported(fused.with_suffix(".safetensors"))

    class Off(torch.nn.Module):
        def forward(self, image):
            return network(image) * torch.tensor([1.001, *[1.0] * (SIZE - 1)])

    assert export.check(fused, network) < 1e-5
    with pytest.raises(InputError, match=r"onnxruntime differs from PyTorch by .*, more than 1e-04"):
        export.check(fused, Off())


def test_a_file_that_onnxruntime_cannot_read_is_refused(fused, teachers, tmp_path):
    """An old onnxruntime cannot read the format of a new exporter."""
    import onnx

    model = onnx.load(fused)
    model.ir_version = 1000
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(InputError, match="cannot read what PyTorch wrote .*IR version.*pip install --upgrade onnx"):
        export.check(tmp_path / "new.onnx", teachers[0])


def test_a_file_with_a_fixed_batch_size_is_refused(fused, teachers, tmp_path):
    import onnx

    model = onnx.load(fused)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(Exception, match="Got invalid dimensions for input: image"):
        export.check(tmp_path / "fixed.onnx", teachers[0])


def test_outputs_that_are_not_finite_are_refused(fused):
    lost = network("iresnet_tiny")
    lost.fc.bias[3] = torch.nan
    with pytest.raises(InputError, match="gives NaN or infinity"):
        export.check(fused, lost)


def test_a_network_above_the_onnx_limit_is_refused(teachers, monkeypatch):
    need_packages()
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    with pytest.raises(InputError, match="more than the 2 GB"):
        export.to_onnx(teachers[0], {})


def test_damaged_and_other_safetensors_are_refused(teachers, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    about = {"network": "iresnet_tiny", "embedding_size": "16", "teachers": "0", "normalisation": "none"}
    whole, state = tmp_path / "whole", teachers[0].state_dict()
    save_file(state, whole, about)
    assert torch.equal(export.load_exported(whole)(images(1)), teachers[0](images(1)))
    (tmp_path / "short").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text").write_text("no safetensors")
    save_file(state, tmp_path / "foreign")
    save_file(state, tmp_path / "other", about | {"network": "mobilefacenet"})
    save_file(state, tmp_path / "unknown", about | {"network": "resnet50"})
    for name, sentence in (
        ("nowhere", "There is no file"),
        ("short", "short is corrupted or not from export.py"),
        ("text", "text is corrupted or not from export.py"),
        ("foreign", "foreign is not from export.py: its metadata lacks embedding_size"),
        ("other", "other is corrupted .*Missing key"),
        ("unknown", "unknown is corrupted .*There is no network 'resnet50'"),
    ):
        with pytest.raises(InputError, match=sentence):
            export.load_exported(tmp_path / name)
