"""Exports a trained model as ONNX, checked in onnxruntime, and as safetensors, both with metadata.

Reads   CHECKPOINT, the weights of a teacher or student, or with --teacher of an adaptor on top of these teachers;
        config.json of the run folders, for weights trained here
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
"""Packages that are not in requirements.txt, since only an export needs them."""
BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
"""Largest allowed difference between onnxruntime and PyTorch, relative to the largest number of each output."""
ONNX_LIMIT = 2**31 - 2**24
"""Largest size of weights in bytes: an ONNX file is one Protocol Buffers message of at most 2 GiB, with the graph."""


class Embedder(nn.Module):
    """A network with normalised output: images (B, 3, 112, 112) in [-1, 1] -> embeddings (B, embedding_size)."""

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
    parser.add_argument(
        "--network", required=True, metavar="NAME", help="architecture of CHECKPOINT, or of its teachers"
    )
    size: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--embedding_size", **size, default=Config.embedding_size, help="dimension of the embedding [%(default)s]"
    )
    words = "weights of the teachers of an adaptor, in its order"
    parser.add_argument("--teacher", type=_names, default=(), metavar="a,b,...", help=words)
    words = "groups of these teachers, if they are not those of BUPT-BalancedFace"
    parser.add_argument("--ethnicities", type=_names, default=Config.ethnicities, metavar="a,b,...", help=words)
    parser.add_argument("--is_dual_layer", action="store_true", help="the adaptor is dual-layer (DuL, DLDPO), not SL")
    words = "width of its hidden layer [%(default)s]"
    parser.add_argument("--middle_layer_size", **size, default=Config.middle_layer_size, help=words)
    parser.add_argument("--output", type=path_of, metavar="FOLDER", help="where to write [the checkpoint's folder]")
    parser.add_argument("--raw", action="store_true", help="export raw features instead of embeddings of unit length")
    given = parser.parse_args(argv)
    guarded(lambda: run(given))


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def run(given: argparse.Namespace) -> None:
    """Exports the model that the command line names; raises InputError if it cannot, without leaving a file."""
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
    if onnx := [path for path in (cfg.checkpoint, *cfg.teacher) if path.endswith(".onnx")]:
        raise InputError(f"{', '.join(onnx)} is ONNX already: export needs weights of a network here.")
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
    """Raises InputError with the command that installs missing packages."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"Export needs packages that are not installed: pip install {' '.join(missing)}")


def _outputs(folder: Path, stem: str) -> list[Path]:
    """Returns the paths of both files; raises InputError if `folder` is no folder or a file exists already."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder: set --output to one.")
    paths = [folder / f"{stem}.{kind}" for kind in ("onnx", "safetensors")]
    if there := [str(path) for path in paths if path.exists()]:
        raise InputError(f"{' and '.join(there)} exist: delete what is old, or set --output to another folder.")
    return paths


# Metadata -------------------------------------------------------------------------------------------------------------


def description(cfg: Config, model: Model, raw: bool) -> dict[str, str]:
    """Returns the metadata of both files: architecture, input, output, and provenance (`made_from`).

    `made_from` is a JSON list of the files of weights, an adaptor before its teachers. For privacy it contains no full
    paths, and of the settings only those that affect the trained weights.
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
        "input_mean": "127.5",
        "input_std": "127.5",
        "normalisation": "none" if raw else "unit length",
        "made_from": json.dumps([_origin(Path(path), digest) for path, digest in files]),
    }


def _origin(path: Path, digest: str) -> dict[str, Any]:
    """Returns folder and name of a file of weights, its SHA-256, and its training settings if it was trained here."""
    origin = {"file": "/".join(path.absolute().parts[-2:]), "sha256": digest}
    about = path.with_name("config.json")
    if OURS.fullmatch(path.name) and about.is_file():  # beside a released file, config.json belongs to another run
        origin["settings"] = read_json(about).get("settings", {})
    return origin


# ONNX -----------------------------------------------------------------------------------------------------------------


def to_onnx(network: nn.Module, about: dict[str, str]) -> bytes:
    """Converts a network in eval mode to ONNX: `image` (batch, 3, 112, 112) -> `output` (batch, embedding_size).

    The opset is the default of PyTorch's exporter. `about` becomes the metadata. Raises InputError if the weights are
    too large for one file.
    """
    import onnx

    if sum(value.nbytes for value in network.state_dict().values()) > ONNX_LIMIT:
        raise InputError("The weights are more than the 2 GB that one ONNX file can hold: fuse smaller teachers.")
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, SIZE, SIZE),),  # the exporter would specialise a batch of 1 to a constant
        input_names=["image"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    for part in (model.graph, *model.graph.node):
        del part.metadata_props[:]  # source paths, which contain the user's home folder
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@torch.no_grad()
def check(path: Path, network: nn.Module) -> float:
    """Returns the largest relative difference, see TOLERANCE, between onnxruntime and PyTorch on random images.

    Raises InputError if it exceeds TOLERANCE, if the output is not finite, or if onnxruntime cannot read the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
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
        if not difference <= TOLERANCE:  # also refuses NaN
            raise InputError(
                f"onnxruntime differs from PyTorch by {difference:.0e} (batch {batch}), more than {TOLERANCE:.0e}: "
                f"nothing is written; newer packages may agree: pip install --upgrade {' '.join(PACKAGES)}"
            )
        worst = max(worst, difference)
    return worst


# safetensors ----------------------------------------------------------------------------------------------------------


def to_safetensors(network: nn.Module, about: dict[str, str]) -> bytes:
    """Converts the state dict of a network to safetensors, names and bits unchanged, with `about` as metadata."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in network.state_dict().items()}, about)


def load_exported(path: Path) -> nn.Module:
    """Loads the model in a safetensors file of export.py, in eval mode; its outputs are bit-identical to the original.

    Images (B, 3, 112, 112), RGB in [-1, 1] -> embeddings (B, embedding_size), or features if exported with --raw.
    Raises InputError if safetensors is not installed, or if the file is missing, corrupted or not from export.py.
    """
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            # Cloned into memory that PyTorch allocates: the last bits of a product depend on the operands' alignment.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        with torch.device("meta"):  # no memory, no initialisation: all weights are replaced
            network = _build(about)
        network.load_state_dict(state, assign=True)
        return _with_output(network, about["normalisation"] == "none")
    except KeyError as error:
        raise InputError(f"{path} is not from export.py: its metadata lacks {error.args[0]}.") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is corrupted or not from export.py ({reason}): export it again.") from error


def _build(about: dict[str, str]) -> nn.Module:
    """Builds the network that the metadata `about` describes."""
    size, teachers = int(about["embedding_size"]), range(int(about["teachers"]))
    if not teachers:
        return build_backbone(about["network"], size)
    middle = int(about["middle_layer_size"] or Config.middle_layer_size)
    groups = tuple(f"teacher{k}" for k in teachers)  # arbitrary names: the adaptor depends only on their number
    cfg = Config(embedding_size=size, middle_layer_size=middle, ethnicities=groups)
    networks = [build_backbone(about["network"], size) for _ in teachers]
    return MultiTeacher(networks, build_adaptor(about["adaptor"], cfg))


if __name__ == "__main__":
    main()
