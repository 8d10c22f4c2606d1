"""Computes the squared distances of all pairs for each model, and keeps them on disk for the next evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from backbones.onnx_model import OnnxNetwork
from config.config import Config
from eval.models import Model
from eval.verification import accuracy, embed, normalize, squared_distances, views
from utils.data.columns import Column
from utils.data.embeddings import in_precision
from utils.data.pairs import Pairs
from utils.environment import computed_in, device_of, numerics
from utils.errors import InputError
from utils.storage.arrays import outdated, read, write
from utils.training.engine import infer
from utils.weights import input_of, size_of

SAMPLE = 1000  # distinct images per set whose embeddings are kept, for impostor pairs across groups


@dataclass(frozen=True)
class Scored:
    """A model, and its distances and accuracy on each verification set."""

    setting: str  # one of config.config.SETTINGS; empty for a file given by --checkpoint
    network: str  # of the teachers; "onnx" for a file given by --checkpoint that is one
    kind: str  # one of `eval.models.KINDS`
    name: str  # teacher, adaptor, or a student's source and network
    distances: dict[str, np.ndarray]  # per set (P,) float64, squared
    samples: dict[str, np.ndarray]  # per set (K, D) float32, unit-length embeddings of evenly spread distinct images
    accuracies: tuple[float, ...]  # in percent, in order of the sets
    weights: tuple[str, ...]  # SHA-256 of its files
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)  # per set (U, D) of `Pairs.distinct`, if kept

    @property
    def title(self) -> str:
        return " ".join(part for part in (self.setting, self.network, f"{self.kind}:", self.name) if part)


class Scores:
    """Computes the distances of one family's models on verification sets, and keeps them below the folder `kept`."""

    def __init__(self, cfg: Config, sets: dict[str, Pairs], kept: Path):
        self._cfg, self._sets, self._kept = cfg, sets, kept
        self._conditions = numerics(cfg) | ({"adaptor input": "as published"} if cfg.published_adaptor_input else {})

    def of(self, models: list[Model]) -> list[Scored]:
        """Returns the distances and accuracies of these models; a network that several share embeds each image once.

        Raises InputError if an embedding is not finite.
        """
        found = {model: {} for model in models}
        for name, pairs in self._sets.items():
            features: dict[nn.Module, np.ndarray] = {}
            for model in models:
                found[model][name] = self._of_set(model, name, pairs, features)
        return [self._scored(model, of_sets) for model, of_sets in found.items()]

    def _scored(self, model: Model, of_sets: dict[str, list[np.ndarray]]) -> Scored:
        is_file = model.kind == "checkpoint"
        return Scored(
            "" if is_file else self._cfg.setting,
            "onnx" if is_file and isinstance(model.networks[0], OnnxNetwork) else self._cfg.network,
            model.kind,
            model.name,
            {name: arrays[0] for name, arrays in of_sets.items()},
            {name: arrays[1] for name, arrays in of_sets.items()},
            tuple(accuracy(arrays[0], self._sets[name].same) for name, arrays in of_sets.items()),
            model.weights,
            {name: arrays[2] for name, arrays in of_sets.items() if len(arrays) > 2},
        )

    def _of_set(self, model: Model, name: str, pairs: Pairs, features: dict[nn.Module, np.ndarray]) -> list[np.ndarray]:
        """Returns distances (P,) and sample (K, D) of a model on one set; reuses and extends `features`, by network.

        With `cfg.corrections` also the embeddings (U, D) of all images, which corrections after training need.
        """
        folder = self._kept / f"{model.kind} {model.name}"
        made_from = {"pairs": pairs.digest, "weights": [*model.weights], "conditions": self._conditions}
        made_from |= input_of(*model.networks)
        made_from = in_precision(made_from, computed_in(self._cfg.infer_precision, device_of(self._cfg)))
        size = size_of(model.adaptor or model.networks[0], self._cfg)
        # Places in the .bin would count an image once for each of its pairs.
        which = np.unique(np.linspace(0, len(pairs.distinct) - 1, SAMPLE).astype(np.int64))
        of_sample = made_from | {"sample": "distinct images"}  # earlier versions sampled places
        forms = [
            (folder / f"{name}.npy", (len(pairs.same),), np.float64, made_from),
            (folder / f"{name}.sample.npy", (len(which), size), np.float32, of_sample),
        ]
        if self._cfg.corrections:
            forms.append((folder / f"{name}.embeddings.npy", (len(pairs.distinct), size), np.float32, made_from))
        if any(outdated(*form) is not None for form in forms):
            for network in set(model.networks) - features.keys():
                title = f"{name} pairs, {model.kind} {model.name}"
                features[network] = views(network, pairs.distinct, self._cfg, title)
            seen = [features[network] for network in model.networks]
            both = fuse(model.adaptor, seen, self._cfg) if model.adaptor else seen[0]
            embeddings = embed(both)
            try:
                write(forms[0][0], squared_distances(embeddings[pairs.rows]), made_from)
            except InputError as error:
                raise InputError(f"{model.kind} {model.name} on the pairs of {name}: {error}") from error
            write(forms[1][0], embeddings[which].astype(np.float32), of_sample)
            for path, *_ in forms[2:]:
                write(path, embeddings.astype(np.float32), made_from)
        return [read(*form[:3], checked=False) for form in forms]


def fuse(adaptor: nn.Module, features: list[np.ndarray], cfg: Config) -> np.ndarray:
    """Returns the adaptor's features (N, 2, D) from the features (N, 2, D) of each teacher.

    Its inputs are the teachers' embeddings (unit length), as in training, or with `cfg.published_adaptor_input` their
    raw features.
    """
    count = len(features[0])
    flat = [feature.reshape(2 * count, -1) for feature in features]
    inputs = flat if cfg.published_adaptor_input else [normalize(feature) for feature in flat]
    columns = {"embedding": Column(tuple(inputs))}
    return infer(lambda embedding: adaptor(embedding), adaptor, columns, cfg, "adaptor").reshape(count, 2, -1)
