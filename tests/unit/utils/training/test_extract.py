"""The precision of embeddings and of scores: recorded in their provenance, and checked by those who read them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.models import Model
from eval.scores import Scores
from tests.runs import Linear, write_embeddings
from utils.data.columns import Column
from utils.data.embeddings import in_precision
from utils.data.faces import Faces
from utils.data.pairs import load_pairs
from utils.errors import InputError
from utils.storage import arrays
from utils.training.extract import Output, embed_all


@pytest.fixture
def embed(cfg):
    """Returns a function that embeds ten rows in a precision and returns the embeddings and their provenance."""
    torch.manual_seed(0)
    network, path = torch.nn.Linear(64, cfg.embedding_size), cfg.teacher_embeddings("A")
    rows = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)

    def embedded(precision: str) -> tuple[np.ndarray, dict]:
        output = Output(path, {"weights": "w"}, lambda embedding: network(embedding))
        columns = {"embedding": Column((rows,))}
        embed_all([output], network, columns, replace(cfg, infer_precision=precision))
        return np.load(path), arrays.about(path)["made from"]

    return embedded


def test_embeddings_of_another_precision_are_made_again(embed, capsys):
    whole, made_from = embed("tf32")
    assert made_from == {"weights": "w"}  # on a CPU in fp32, as in files from before there was another precision
    capsys.readouterr()
    embed("fp32")
    assert "is up to date" in capsys.readouterr().out
    rounded, made_from = embed("bf16")
    assert made_from == {"weights": "w", "precision": "bf16"}
    assert not np.array_equal(rounded, whole)
    assert np.allclose(rounded, whole, atol=0.05)
    assert "was made from something else than there is now" in capsys.readouterr().out
    assert np.array_equal(embed("tf32")[0], whole)


def test_embeddings_of_a_gpu_in_tf32_are_kept_on_a_cpu_but_not_where_fp32_is_set(cfg, embed, capsys):
    whole, made_from = embed("tf32")
    arrays.write(cfg.teacher_embeddings("A"), whole, in_precision(made_from, "tf32"))
    assert embed("tf32")[1]["precision"] == "tf32"
    assert "precision" not in embed("fp32")[1]


def test_a_reader_refuses_embeddings_of_another_precision(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    for accepted in ("fp32", "tf32"):
        Faces(replace(cfg, infer_precision=accepted), inputs=cfg.teachers)
    with pytest.raises(
        InputError,
        match="A.npy was computed in fp32, but infer_precision is bf16: set it to fp32, or run again: python extract",
    ):
        Faces(replace(cfg, infer_precision="bf16"), inputs=cfg.teachers)
    path = cfg.teacher_embeddings("A")
    arrays.write(path, np.load(path), in_precision(arrays.about(path)["made from"], "tf32"))
    faces = Faces(cfg, inputs=cfg.teachers)
    assert faces.sources["embedding A"]["precision"] == "tf32"
    with pytest.raises(InputError, match="A.npy was computed in tf32, but infer_precision is fp32"):
        Faces(replace(cfg, infer_precision="fp32"), inputs=cfg.teachers)


def test_scores_of_another_precision_are_computed_again(cfg, tmp_path):
    torch.manual_seed(0)
    model, sets = Model("teacher", "A", ("w",), (Linear(),)), load_pairs(cfg)

    def distances(precision):
        scores = Scores(replace(cfg, infer_precision=precision), sets, tmp_path / "distances")
        return scores.of([model])[0].distances["A"]

    plain, rounded = distances("tf32"), distances("bf16")
    assert not np.array_equal(plain, rounded)
    assert np.allclose(plain, rounded, atol=0.05)
    path = tmp_path / "distances" / "teacher A" / "A.npy"
    assert arrays.about(path)["made from"]["precision"] == "bf16"
    assert np.array_equal(distances("fp32"), plain)
    assert "precision" not in arrays.about(path)["made from"]
