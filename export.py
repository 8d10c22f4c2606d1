"""Trained models for other runtimes: as ONNX, checked in onnxruntime, and as safetensors; both say what they hold.

Reads   CHECKPOINT, the weights of a teacher or student, or with --teacher of an adaptor on top of these, as
        eval.evaluation reads them; config.json beside those that we wrote
Writes  <output>/<stem of CHECKPOINT>.onnx and .safetensors: images (B, 3, 112, 112) to embeddings (B, D)
Run     python export.py CHECKPOINT --network iresnet50 [--output FOLDER] [--raw]
        python export.py ADAPTOR --network iresnet34 --teacher asian.pth,african.pth,caucasian.pth,indian.pth
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from backbones import MultiTeacher, build_adaptor, build_backbone
from config.config import Config
from eval.models import Model, model_of_files
from utils.data.store import SIZE
from utils.errors import InputError
from utils.prepare.work import path_of
from utils.process import guarded
from utils.storage.files import read_json, replaced
from utils.storage.tensors import OURS

PACKAGES = ("onnx", "onnxruntime", "onnxscript", "safetensors")
"""What requirements.txt does not ask for: only an export needs them."""
BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
"""Largest difference between onnxruntime and PyTorch, as a share of the largest number of each output."""
ONNX_LIMIT = 2**31 - 2**24
"""Bytes of weights: an ONNX file is one message of Protocol Buffers, which ends at 2 GiB; the rest is for the graph."""


class Embedder(nn.Module):
    """A network and the step to unit length: images (B, 3, 112, 112) in [-1, 1] -> embeddings (B, embedding_size)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.network(image))


def _with_output(network: nn.Module, raw: bool) -> nn.Module:
    return (network if raw else Embedder(network)).eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=path_of, metavar="CHECKPOINT", help="a file of weights")
    parser.add_argument("--network", required=True, metavar="NAME", help="what it is, or with --teacher they are")
    size = {"type": int, "metavar": "N"}
    parser.add_argument("--embedding_size", **size, default=Config.embedding_size, help="its dimensions [%(default)s]")
    words = "files of the teachers below an adaptor, in its order"
    parser.add_argument("--teacher", type=_names, default=(), metavar="a,b,...", help=words)
    words = "the groups of these teachers, where they are others than BUPT-BalancedFace's"
    parser.add_argument("--ethnicities", type=_names, default=Config.ethnicities, metavar="a,b,...", help=words)
    parser.add_argument("--is_dual_layer", action="store_true", help="the adaptor is dual-layer (DuL, DLDPO), not SL")
    words = "dimensions between its layers [%(default)s]"
    parser.add_argument("--middle_layer_size", **size, default=Config.middle_layer_size, help=words)
    parser.add_argument("--output", type=path_of, metavar="FOLDER", help="where to write [the checkpoint's folder]")
    parser.add_argument("--raw", action="store_true", help="features as the network gives them, not of unit length")
    given = parser.parse_args(argv)
    guarded(lambda: run(given))


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def run(given: argparse.Namespace) -> None:
    """Exports what the command line names; raises InputError for what it cannot, and then leaves no file behind."""
    need(*PACKAGES)
    cfg = Config(
        checkpoint=str(given.checkpoint),
        teacher=given.teacher,
        ethnicities=given.ethnicities,
        network=given.network,
        embedding_size=given.embedding_size,
        is_dual_layer=given.is_dual_layer,
        middle_layer_size=given.middle_layer_size,
    )
    model = model_of_files(cfg)
    as_onnx, as_safetensors = _outputs(given.output or given.checkpoint.parent, given.checkpoint.stem)
    network = MultiTeacher([*model.networks], model.adaptor) if model.adaptor else model.networks[0]
    about = description(cfg, model, given.raw)
    exported = _with_output(network, given.raw)
    with replaced(as_onnx) as partial:
        partial.write_bytes(to_onnx(exported, about))
        difference = check(partial, exported)
        with replaced(as_safetensors) as other_partial:
            other_partial.write_bytes(to_safetensors(network, about))
    print(
        f"Written to {as_onnx} and {as_safetensors.name}: onnxruntime differs from PyTorch by at most {difference:.0e} "
        f"(batches of {', '.join(map(str, BATCHES))})."
    )


def need(*packages: str) -> None:
    """Raises InputError with the command that installs what is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"An export needs what is not there: pip install {' '.join(missing)}")


def _outputs(folder: Path, stem: str) -> list[Path]:
    """The two files to be written; raises InputError where they cannot be, or another model could be lost."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder: set --output to one.")
    paths = [folder / f"{stem}.{kind}" for kind in ("onnx", "safetensors")]
    if there := [str(path) for path in paths if path.exists()]:
        raise InputError(f"{' and '.join(there)} exist: delete what is old, or set --output to another folder.")
    return paths


# What a file says of itself -------------------------------------------------------------------------------------------


def description(cfg: Config, model: Model, raw: bool) -> dict[str, str]:
    """The metadata of both files: how to feed the network, what comes out, and what its weights are.

    `made_from` is a JSON list of the files, an adaptor before its teachers. It holds no paths and none of the settings
    that do not decide what was trained: they would tell strangers of the machine.
    """
    files = zip((cfg.checkpoint, *cfg.teacher), model.weights, strict=True)
    return {
        "network": cfg.network,
        "embedding_size": str(cfg.embedding_size),
        "teachers": str(len(cfg.teacher)),
        "adaptor": ("DuL" if cfg.is_dual_layer else "SL") if cfg.teacher else "",  # DLDPO is DuL after training
        "middle_layer_size": str(cfg.middle_layer_size) if cfg.teacher and cfg.is_dual_layer else "",
        "input": f"float32 (batch, 3, {SIZE}, {SIZE}), value / 127.5 - 1: in [-1, 1]",
        "channel_order": "RGB",
        "normalisation": "none" if raw else "unit length",
        "made_from": json.dumps([_origin(Path(path), digest) for path, digest in files]),
    }


def _origin(path: Path, digest: str) -> dict[str, Any]:
    """A file of weights; where it is ours and its run folder says so, also the settings that decided its training."""
    origin = {"file": "/".join(path.absolute().parts[-2:]), "sha256": digest}
    about = path.with_name("config.json")
    if OURS.fullmatch(path.name) and about.is_file():  # beside a released file it is somebody else's
        origin["settings"] = read_json(about).get("settings", {})
    return origin


# ONNX -----------------------------------------------------------------------------------------------------------------


def to_onnx(network: nn.Module, about: dict[str, str]) -> bytes:
    """A network in eval mode with its metadata: `image` (batch, 3, 112, 112) -> `output` (batch, embedding_size).

    The opset is the one that PyTorch's exporter takes by itself. Raises InputError where one file cannot hold it.
    """
    import onnx

    if sum(value.nbytes for value in network.state_dict().values()) > ONNX_LIMIT:
        raise InputError("The weights are more than the 2 GB that one ONNX file can hold: fuse smaller teachers.")
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, SIZE, SIZE),),  # not one image: the exporter would take that for a constant
        input_names=["image"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    for part in (model.graph, *model.graph.node):
        del part.metadata_props[:]  # where in whose home folder each line of code lies
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@torch.no_grad()
def check(path: Path, network: nn.Module) -> float:
    """The largest difference between onnxruntime and PyTorch on random images, as TOLERANCE counts it.

    Raises InputError where it is larger than that, the network gives NaN or infinity, or onnxruntime is too old.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class of their own in common
        reason = " ".join(str(error).split())
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} cannot read what PyTorch wrote ({reason}): "
            f"pip install --upgrade {' '.join(PACKAGES)}"
        ) from error
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        image = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
        expected = network(image)
        if not expected.isfinite().all():
            raise InputError("The network gives NaN or infinity for random images: nothing is written.")
        found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        difference = ((found - expected).abs() / expected.abs().amax(1, keepdim=True)).max().item()
        if not difference <= TOLERANCE:  # nor where it is not a number
            raise InputError(
                f"onnxruntime differs from PyTorch by {difference:.0e} (batch {batch}), more than {TOLERANCE:.0e}: "
                f"nothing is written; newer packages may agree: pip install --upgrade {' '.join(PACKAGES)}"
            )
        worst = max(worst, difference)
    return worst


# safetensors ----------------------------------------------------------------------------------------------------------


def to_safetensors(network: nn.Module, about: dict[str, str]) -> bytes:
    """The state dict of a network, names and bits unchanged, with its metadata."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in network.state_dict().items()}, about)


def load_exported(path: Path) -> nn.Module:
    """The model in a safetensors file of ours, in eval mode; it computes what was exported, to the last bit.

    Images (B, 3, 112, 112), RGB in [-1, 1] -> embeddings (B, embedding_size), with --raw features. Raises InputError
    where safetensors is not installed, or the file is not there or not of ours.
    """
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # Copied to where PyTorch would lay it: the last bits of a product depend on how its factors are aligned.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced
            network = _build(about)
        network.load_state_dict(state, assign=True)
        return _with_output(network, about["normalisation"] == "none")
    except KeyError as error:
        raise InputError(f"{path} is not of export.py: it does not say its {error.args[0]}.") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged or not of export.py ({reason}): export it again.") from error


def _build(about: dict[str, str]) -> nn.Module:
    """The network that metadata tell of, with no weights of its own yet."""
    size, teachers = int(about["embedding_size"]), range(int(about["teachers"]))
    if not teachers:
        return build_backbone(about["network"], size)
    middle = int(about["middle_layer_size"] or Config.middle_layer_size)
    groups = tuple(f"teacher{k}" for k in teachers)  # any names: only how many there are decides the adaptor's shape
    cfg = Config(embedding_size=size, middle_layer_size=middle, ethnicities=groups)
    networks = [build_backbone(about["network"], size) for _ in teachers]
    return MultiTeacher(networks, build_adaptor(about["adaptor"], cfg))


if __name__ == "__main__":
    main()
