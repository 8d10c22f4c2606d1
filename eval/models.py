"""Finds and loads the trained models in the output folder, or a model from given files."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from backbones.onnx_model import OnnxNetwork
from backbones.state_dicts import UnexpectedAdaptor
from config.config import Config
from config.registry import ADAPTORS, METHODS, NETWORKS
from utils.errors import InputError
from utils.training.checkpoint import decided_by
from utils.weights import find_weights, load_adaptor, load_backbone, size_of, weights_in, weights_with_digest

KINDS = ("teacher", "adaptor", *METHODS, "checkpoint")


@dataclass(frozen=True)
class Model:
    """A trained model: a teacher, a student, or an adaptor with the teachers on which it was trained."""

    kind: str  # one of KINDS
    name: str
    weights: tuple[str, ...]  # SHA-256 of the files from which it was loaded
    networks: tuple[nn.Module, ...]
    adaptor: nn.Module | None = None
    folder: Path | None = None  # its run folder


def families(cfg: Config) -> list[Config]:
    """Returns one Config for each setting and teacher network (a family) with a trained model in `cfg.output`."""
    # Data without groups has only standalone models: it can be divided neither by group nor into quarters.
    kinds = [(False, False), (True, False), (False, True)] if cfg.ethnicities else [(False, True)]
    every = (
        replace(cfg, is_teacher_baseline=baseline, is_standalone=standalone, network=name)
        for baseline, standalone in kinds
        for name in NETWORKS
    )
    return [family for family in every if family.network_dir.is_dir() and (_teachers(family) or _students(family))]


def models_of(family: Config) -> Iterator[list[Model]]:
    """Yields all models of a family in lists; the models of a list share networks."""
    if teachers := _teacher_models(family):
        yield teachers
    for settings, method, path in _students(family):
        network, digest = load_backbone(settings.student_network, path, family)
        name = f"{settings.source} {settings.student_network}"
        yield [Model(method, name, (digest,), (network,), folder=path.parent)]


def left_out(cfg: Config, used: Collection[Path | None]) -> list[str]:
    """Returns the run folders in `cfg.output` with weights, relative to it, except those in `used`."""
    output = Path(cfg.output)
    kinds = ("teachers/*", "adaptors/*", "students/*/*")
    found = {folder for kind in kinds for folder in output.glob(f"*/*/{kind}") if weights_in(folder)}
    return [folder.relative_to(output).as_posix() for folder in sorted(found.difference(used))]


def model_of_files(cfg: Config) -> Model:
    """Loads the network in `cfg.checkpoint`; with `cfg.teacher`, loads the adaptor in it on top of these teachers.

    Raises InputError for a missing file, or weights that do not fit the network or these teachers.
    """
    paths = [Path(path) for path in (cfg.checkpoint, *cfg.teacher)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"There is no file {', '.join(missing)}: set checkpoint and teacher to files of weights.")
    path, *teachers = paths
    if not teachers:
        try:
            network, digest = load_backbone(cfg.network, path, cfg)
        except UnexpectedAdaptor as error:
            raise InputError(f"{error} Name the teachers below it, in its order: --teacher a.pth,b.pth,...") from error
        return Model("checkpoint", f"{path.name} {_called(network, cfg)}".strip(), (digest,), (network,))
    loaded = [load_backbone(cfg.network, teacher, cfg) for teacher in teachers]
    below = _called(loaded[0][0], cfg) or "onnx"
    return _on_teachers("checkpoint", f"{path.name} on {below}", path, loaded, cfg)


def _called(network: nn.Module, cfg: Config) -> str:
    """Returns what the name of a model says of its network: the definition, of an .onnx file an unusual input."""
    return network.convention if isinstance(network, OnnxNetwork) else cfg.network


def _on_teachers(kind: str, name: str, path: Path, teachers: list[tuple[nn.Module, str]], cfg: Config) -> Model:
    """Loads the adaptor in `path` on top of `teachers`, which are pairs of a network and the digest of its weights.

    The adaptor is `name`; that of a file is DuL with `is_dual_layer`, else SL. Raises InputError if it was not trained
    on so many teachers of these sizes.
    """
    networks, digests = zip(*teachers, strict=True)
    adaptor_name = name if kind == "adaptor" else "DuL" if cfg.is_dual_layer else "SL"
    adaptor, digest = load_adaptor(adaptor_name, path, sum(size_of(network, cfg) for network in networks), cfg)
    return Model(kind, name, (digest, *digests), networks, adaptor)


def _teachers(cfg: Config) -> dict[str, Path]:
    """Returns the files of weights of this family's teachers, by the teacher's name."""
    names = cfg.ethnicities if cfg.setting == "specialized" else cfg.teachers  # in the order of the columns
    return {name: path for name in names if (path := find_weights(cfg.teacher_dir(name), cfg.weights))}


def _students(cfg: Config) -> list[tuple[Config, str, Path]]:
    """Returns (settings, method, file of weights) of every student of this family."""
    shapes = ((False, False), (True, False), (True, True))
    adaptors = [{"ada_source": "adaptor", "is_dual_layer": dual, "has_dropout": dropout} for dual, dropout in shapes]
    teachers = [{"ada_source": "teacher", "ethnicity": name} for name in cfg.teachers]
    students = [
        (replace(cfg, student_network=network, ada_student_network=network, **source), method)
        for network in NETWORKS
        for source in ([] if cfg.setting == "standalone" else adaptors) + teachers
        for method in METHODS
    ]
    found = [(student, method, find_weights(student.student_dir(method), cfg.weights)) for student, method in students]
    return [(student, method, path) for student, method, path in found if path]


def _teacher_models(cfg: Config) -> list[Model]:
    """Loads all teachers, and the adaptors on top of the teachers on which they were trained."""
    teachers, models = _teachers(cfg), []
    loaded = {path: load_backbone(cfg.network, path, cfg) for path in teachers.values()}
    for name, path in teachers.items():
        network, digest = loaded[path]
        models.append(Model("teacher", name, (digest,), (network,), folder=path.parent))
    for name in ADAPTORS:
        if found := _adaptor(cfg, name):
            weights, inputs = found
            loaded |= {path: load_backbone(cfg.network, path, cfg) for path in inputs if path not in loaded}
            teachers_below = [loaded[path] for path in inputs]
            model = _on_teachers("adaptor", name, weights, teachers_below, cfg)
            models.append(replace(model, folder=weights.parent))
    return models


def _adaptor(cfg: Config, name: str) -> tuple[Path, list[Path]] | None:
    """Returns the files of weights of an adaptor and of its teachers, in its order; None if one of them is missing.

    An adaptor trained here is combined with the teachers whose embeddings it was trained on, whether these are the best
    or the last weights. For a released adaptor, whose teachers' digests are unknown, `cfg.weights` selects them. Prints
    why an adaptor that exists is left out.
    """
    folder = cfg.adaptor_dir(name)
    weights = find_weights(folder, cfg.weights)
    if weights is None:
        return None
    digests = {}
    if decided := decided_by(folder):
        trained_on = tuple(decided["settings"]["teachers"])
        if trained_on != cfg.teachers:
            print(f"{folder} is left out: it was trained on {', '.join(trained_on)}; set ethnicities in this order.")
            return None
        digests = {name: decided["sources"][f"embedding {name}"]["weights"] for name in cfg.teachers}
    inputs = []
    for teacher in cfg.teachers:
        run_folder = cfg.teacher_dir(teacher)
        digest = digests.get(teacher)
        inputs.append(weights_with_digest(run_folder, digest) if digest else find_weights(run_folder, cfg.weights))
    missing = [teacher for teacher, path in zip(cfg.teachers, inputs, strict=True) if path is None]
    if missing:
        print(f"{folder} is left out: the teachers it was trained on are not there any more: {', '.join(missing)}.")
        return None
    return weights, inputs
