"""Networks by name, with the published parameter names, and strict loading of published state dicts."""

from pathlib import Path

import torch
from torch import nn

from backbones.adaptors import DualLayerAdaptor, MultiTeacher, SingleLayerAdaptor
from backbones.iresnet import IResNet
from backbones.mobilefacenet import MobileFaceNet
from config.config import Config
from utils.checkpoint import load_with_digest
from utils.errors import Damaged, InputError, UnexpectedAdaptor

__all__ = [
    "DualLayerAdaptor",
    "MultiTeacher",
    "SingleLayerAdaptor",
    "build_adaptor",
    "build_backbone",
    "load_backbone",
    "load_weights",
]

IRESNETS = {
    "iresnet18": {"blocks": (2, 2, 2, 2)},
    "iresnet34": {"blocks": (3, 4, 6, 3)},
    "iresnet50": {"blocks": (3, 4, 14, 3), "dropout": 0.4},
    "iresnet100": {"blocks": (3, 13, 30, 3)},
    # For generated faces on a CPU. Never under 16 channels: see tests/test_backbones.py.
    "iresnet_tiny": {"blocks": (1, 1, 1, 1), "widths": (16, 16, 32, 64), "stem_stride": 2},
}

# The published dual-layer adaptor has these parameters, uses none of them, and still saves them.
UNUSED_IN_PUBLISHED_ADAPTOR = ("attention.", "key_vector", "value_vector")


def build_backbone(name: str, embedding_size: int = 512, **options) -> nn.Module:
    """A face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    The iresnets take the options `dropout` (default: as in the published training, 0.4 for iresnet50) and `use_se`.
    """
    if name in IRESNETS:
        return IResNet(embedding_size=embedding_size, **{**IRESNETS[name], **options})
    if name == "mobilefacenet":
        return MobileFaceNet(embedding_size, **options)
    raise InputError(f"There is no network {name!r}: choose {', '.join((*IRESNETS, 'mobilefacenet'))}.")


def build_adaptor(name: str, cfg: Config) -> nn.Module:
    """The adaptor SL, DuL or DLDPO for the embeddings of all teachers: (B, T * D) -> (B, D).

    Raises InputError for a standalone teacher, which needs none.
    """
    if cfg.setting == "standalone":
        raise InputError("A standalone teacher needs no adaptor: set is_standalone to False, or ada_source to teacher.")
    inputs = len(cfg.teachers) * cfg.embedding_size
    if name == "SL":
        return SingleLayerAdaptor(inputs, cfg.embedding_size)
    return DualLayerAdaptor(inputs, cfg.middle_layer_size, cfg.embedding_size, 0.2 if name == "DLDPO" else 0.0)


def load_weights(module: nn.Module, path: Path) -> str:
    """Loads a published or own state dict strictly, and gives the SHA-256 of the file.

    Only the published dual-layer adaptor's unused parameters may be left over. Raises InputError, which says what does
    not fit, and leaves the module as it was.
    """
    try:
        state, digest = load_with_digest(Path(path))
    except Damaged as error:
        raise InputError(f"{error}: start its training again, which writes it anew if it can.") from error
    if isinstance(state, dict) and "decided_by" in state:
        raise InputError(f"{path} is the checkpoint of a run: its weights are in best_backbone.pth beside it.")
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is no state dict: expected the parameters of one network.")
    if isinstance(module, DualLayerAdaptor):
        state = {name: value for name, value in state.items() if not name.startswith(UNUSED_IN_PUBLISHED_ADAPTOR)}
    expected = module.state_dict()
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:2])})" for what, names in wrong.items() if names]
    if found:
        shapes = [
            f"{n} is {tuple(state[n].shape)}, not {tuple(expected[n].shape)}" for n in wrong["of another shape"][:1]
        ]
        text = "; ".join([f"parameters {', '.join(found)}", *shapes])
        is_adaptor = _is_adaptor(state) and not isinstance(module, SingleLayerAdaptor | DualLayerAdaptor)
        error = UnexpectedAdaptor if is_adaptor else InputError
        raise error(f"{path} does not fit this {type(module).__name__}: {text}. {_looks_like(state)}")
    module.load_state_dict(state)
    return digest


def _looks_like(state: dict[str, torch.Tensor]) -> str:
    """A sentence on which network a state dict is of, going by the names and shapes of its parameters."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    size = next((shape[0] for shape in reversed(shapes.values()) if shape), 0)  # every network ends with its embedding
    known = [(name, {}) for name in (*IRESNETS, "mobilefacenet")] + [(name, {"use_se": True}) for name in IRESNETS]
    for name, options in known:
        with torch.device("meta"):
            expected = build_backbone(name, size, **options).state_dict()
        if shapes == {key: tuple(value.shape) for key, value in expected.items()}:
            return f"It looks like {name}{' with SE blocks' if options else ''}, embeddings of {size} numbers."
    if _is_adaptor(state) and "fc.weight" in shapes:
        return f"It looks like a single-layer adaptor from {shapes['fc.weight'][1]} to {size} numbers."
    if _is_adaptor(state):
        out, into = shapes["fc2.weight"][0], shapes["fc1.weight"][1]  # a published one has more parameters after these
        return f"It looks like a dual-layer adaptor from {into} to {out} numbers."
    if len(shapes.get("kernel", ())) == 2:
        return f"It looks like the header of {shapes['kernel'][1]} identities."
    return "It looks like none of the networks here."


def _is_adaptor(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == {"fc.weight", "fc.bias"} or {"fc1.weight", "fc2.weight"} <= state.keys()


def load_backbone(name: str, path: Path, cfg: Config) -> tuple[nn.Module, str]:
    """A trained network in eval mode, and the SHA-256 of the file that it was loaded from."""
    backbone = build_backbone(name, cfg.embedding_size)
    digest = load_weights(backbone, path)
    return backbone.eval(), digest
