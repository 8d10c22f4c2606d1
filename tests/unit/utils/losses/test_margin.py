"""Margin headers against frozen numbers from the formulas, and at +-1, where the slope of arc cosine is infinite."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config.config import Config
from config.registry import LOSSES
from tests.make_golden import LABEL, MARGINS, S, inputs
from utils import losses
from utils.errors import InputError
from utils.losses import build_header
from utils.losses.margin import cos_of_sum

GOLDEN = json.loads((Path(__file__).parents[3] / "golden_heads.json").read_text())
MARGIN = {"ElasticArcFace": 0.5, "ElasticCosFace": 0.35, "ArcFace": 0.5, "CosFace": 0.35, "CurricularFace": 0.5}


def head_in_float64(name: str) -> torch.nn.Module:
    """Returns the header with the golden kernel; elastic headers get the golden margins instead of random ones."""
    _, kernel = inputs()
    head = getattr(losses, name)(5, 6, s=S).double()
    head.kernel.data = torch.from_numpy(kernel)
    if name.startswith("Elastic"):
        head.margins = lambda target: torch.tensor(MARGINS, dtype=target.dtype).unsqueeze(1)
    return head


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_logits_loss_and_gradients_equal_the_formula(name):
    embeddings = torch.from_numpy(inputs()[0]).requires_grad_()
    label = torch.tensor(LABEL)
    head = head_in_float64(name)
    logits = head(embeddings, label)
    loss = F.cross_entropy(logits, label)
    loss.backward()
    wanted = {key: torch.tensor(value, dtype=torch.float64) for key, value in GOLDEN[name].items()}
    assert torch.allclose(logits, wanted["logits"], rtol=0, atol=1e-8)
    assert torch.allclose(loss, wanted["loss"], rtol=0, atol=1e-8)
    assert torch.allclose(embeddings.grad, wanted["embeddings_gradient"], rtol=0, atol=2e-6)
    assert torch.allclose(head.kernel.grad, wanted["kernel_gradient"], rtol=0, atol=2e-6)


def test_the_golden_inputs_reach_every_branch():
    embeddings, kernel = inputs()
    cosine = embeddings @ kernel / np.outer(np.linalg.norm(embeddings, axis=1), np.linalg.norm(kernel, axis=0))
    target = cosine[range(4), LABEL]
    hard = cosine > np.cos(np.arccos(target) + 0.5)[:, None]
    hard[range(4), LABEL] = False
    assert not hard[0].any()
    assert hard[1].any()
    assert target[3] < math.cos(math.pi - 0.5) < target[1]


@pytest.mark.parametrize("name", sorted(GOLDEN))
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_boundary_gives_finite_loss_and_gradient_in_fp32(name, cosine):
    head = getattr(losses, name)(8, 3)
    centre = torch.zeros(8)
    centre[0] = 1
    head.kernel.data[:, 1] = centre
    embeddings = (cosine * centre).repeat(4, 1).requires_grad_()
    label = torch.ones(4, dtype=torch.long)
    loss = F.cross_entropy(head(embeddings, label), label)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.kernel.grad).all()


def test_cos_of_sum_close_to_the_boundary_keeps_its_precision():
    theta = torch.tensor([1e-3, 0.01, 0.1, 1.0, 3.0, math.pi - 0.01], dtype=torch.float64)
    ours = cos_of_sum(theta.cos().float(), 0.5).double()
    assert torch.allclose(ours, (theta + 0.5).cos(), rtol=0, atol=2e-4)
    assert torch.allclose(cos_of_sum(theta.cos(), 0.5), (theta + 0.5).cos(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ElasticArcFace", "ElasticCosFace"])
def test_elastic_margins_are_normal_and_not_clamped(name):
    torch.manual_seed(0)
    head = getattr(losses, name)(4, 3, m=0.4, std=0.05)
    margins = head.margins(torch.zeros(200_000, 1))
    assert margins.mean().item() == pytest.approx(0.4, abs=5e-4)
    assert margins.std().item() == pytest.approx(0.05, abs=5e-4)
    assert margins.min() < 0.4 - 4 * 0.05
    assert margins.max() > 0.4 + 4 * 0.05


def test_published_defaults():
    arc, cos = losses.ElasticArcFace(4, 3), losses.ElasticCosFace(4, 3)
    assert (arc.s, arc.m, arc.std, arc.plus) == (64.0, 0.50, 0.05, False)
    assert (cos.s, cos.m, cos.std, cos.plus) == (64.0, 0.35, 0.05, False)
    assert arc.kernel.shape == (4, 3)
    assert losses.ElasticArcFace(512, 2000).kernel.std().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_in_place_header_equals_the_plain_formula_up_to_rounding(name):
    """Compares with normalised copies and autograd, for many classes; labels repeat, and one centre is short."""
    torch.manual_seed(4)
    head = getattr(losses, name)(64, 3000).double().train()
    head.kernel.data[:, 7] *= 1e-4
    embeddings, label = torch.randn(32, 64, dtype=torch.float64), torch.randint(3000, (32,))
    label[:4] = 7

    def gradients(logits, given):
        head.kernel.grad = None
        loss = F.cross_entropy(logits, label)
        loss.backward()
        return loss.detach(), given.grad, head.kernel.grad

    def plain(given):
        cosine = (F.normalize(given) @ F.normalize(head.kernel, dim=0)).clamp(-1, 1)
        column = label.unsqueeze(1)
        target = cosine.gather(1, column)
        logits = head.s * cosine.scatter(1, column, head.target_logit(target))
        return head.adjusted(logits, column, target.detach())

    found = []
    for function in (lambda given: head(given, label), plain):
        if name == "CurricularFace":
            head.t.zero_()
        given = embeddings.clone().requires_grad_()
        torch.manual_seed(5)
        found.append(gradients(function(given), given))
    (loss, given, kernel), (plain_loss, plain_given, plain_kernel) = found
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-12)
    assert (given - plain_given).norm() <= 1e-12 * plain_given.norm()
    difference = (kernel - plain_kernel).norm(
        dim=0
    )  # per class, since the gradient of the short centre is by far the largest
    assert (difference <= 1e-12 * plain_kernel.norm(dim=0)).all()


def test_a_frozen_kernel_gets_no_gradient():
    head = losses.ArcFace(16, 5)
    head.kernel.requires_grad_(False)
    embeddings = torch.randn(8, 16, requires_grad=True)
    head(embeddings, torch.zeros(8, dtype=torch.long)).sum().backward()
    assert head.kernel.grad is None
    assert embeddings.grad.norm() > 0


def test_plus_headers_give_harder_samples_larger_margins():
    torch.manual_seed(1)
    head = losses.ElasticArcFace(4, 3, std=0.1, plus=True)
    target = torch.rand(64, 1) * 2 - 1
    by_difficulty = head.margins(target)[target.flatten().argsort()].flatten()  # hardest first
    assert (by_difficulty.diff() < 0).all()


def test_elastic_headers_without_spread_equal_the_plain_ones():
    torch.manual_seed(2)
    embeddings, label = torch.randn(8, 16), torch.randint(5, (8,))
    for elastic, plain in (("ElasticArcFace", "ArcFace"), ("ElasticCosFace", "CosFace")):
        one, other = getattr(losses, elastic)(16, 5, std=0.0), getattr(losses, plain)(16, 5)
        other.kernel.data.copy_(one.kernel)
        assert torch.equal(one(embeddings, label), other(embeddings, label))


def test_curricular_mean_changes_in_training_only():
    torch.manual_seed(3)
    head = losses.CurricularFace(16, 5)
    embeddings, label = torch.randn(8, 16), torch.randint(5, (8,))
    target = (F.normalize(embeddings) * F.normalize(head.kernel, dim=0).T[label]).sum(1).mean()
    head.eval()(embeddings, label)
    assert head.t.item() == 0
    head.train()(embeddings, label)
    assert head.t.item() == pytest.approx(0.01 * target.item(), rel=1e-5)


def test_curricular_target_is_linear_beyond_pi_minus_m():
    head = losses.CurricularFace(4, 3, m=0.5)
    target = torch.tensor([[-0.95]], dtype=torch.float64)
    assert head.target_logit(target).item() == pytest.approx(-0.95 - 0.5 * math.sin(0.5))


def test_headers_are_built_by_name():
    cfg = Config(loss="ElasticCosFace+", embedding_size=8, s=30.0, m=0.2)
    header = build_header(cfg.loss, 3, cfg, "teacher")
    assert isinstance(header, losses.ElasticCosFace)
    assert (header.s, header.m, header.std, header.plus) == (30.0, 0.2, 0.02, True)
    assert header.kernel.shape == (8, 3)
    with pytest.raises(InputError, match=r"no loss 'ArcFace\+': choose ElasticArcFace, .*config/registry.py"):
        build_header("ArcFace+", 3, cfg, "teacher")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_the_registry_trains_with_its_own_margin(name):
    header = build_header(name, 3, Config(loss=name, embedding_size=8), "teacher")
    assert header.m == LOSSES[name].m and getattr(header, "std", 0.0) == LOSSES[name].std
    header.loss(torch.eye(8)[:3], torch.arange(3)).backward()
    assert header.kernel.grad.abs().sum() > 0


def test_a_method_trains_with_the_margin_of_the_loss_that_it_names():
    header = build_header("CosFace", 3, Config(embedding_size=8), "EAF-KD")
    assert header.m == 0.35
    assert build_header("ElasticCosFace+", 3, Config(embedding_size=8), "mine").std == 0.02
