"""Margin headers: classifiers that see angles, and make the target class harder to reach while training.

All headers hold one parameter `kernel` of shape (D, C), a column per class, and turn embeddings (B, D) and labels (B,)
into scaled logits (B, C) for the cross-entropy. Neither input needs to be normalised: both are, here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import InputError


class MarginHeader(nn.Module):
    """Scaled cosines of embeddings and class centres; subclasses say what becomes of the target's cosine."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0):
        super().__init__()
        self.s = s
        self.kernel = nn.Parameter(torch.empty(in_features, out_features).normal_(0, 0.01))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D), labels (B,) int64 -> logits (B, C), s * cosine but for the target entry."""
        cosine = (F.normalize(embeddings) @ F.normalize(self.kernel, dim=0)).clamp(-1, 1)
        column = label.unsqueeze(1)
        target = cosine.gather(1, column)
        return self.s * self.other_logits(cosine, target).scatter(1, column, self.target_logit(target))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """The target's cosine (B, 1) with the margin in it."""
        raise NotImplementedError

    def other_logits(self, cosine: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The cosines (B, C) of the other classes, unchanged by most losses."""
        return cosine


class ArcFace(MarginHeader):
    """Target logit s * cos(theta + m) (Deng et al., CVPR 2019)."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.50):
        super().__init__(in_features, out_features, s)
        self.m = m

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return cos_of_sum(target, self.m)


class CosFace(MarginHeader):
    """Target logit s * (cos(theta) - m) (Wang et al., CVPR 2018)."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35):
        super().__init__(in_features, out_features, s)
        self.m = m

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return target - self.m


class ElasticHeader(MarginHeader):
    """A margin drawn afresh from N(m, std^2) for every sample and step, not clamped (Boutros et al., CVPRW 2022).

    With `plus` the drawn margins are dealt by difficulty: the sample with the lowest target cosine gets the largest.
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float, std: float, plus: bool):
        super().__init__(in_features, out_features, s)
        self.m, self.std, self.plus = m, std, plus

    def margins(self, target: torch.Tensor) -> torch.Tensor:
        """One margin per target cosine, both (B, 1)."""
        drawn = torch.normal(self.m, self.std, target.shape, device=target.device, dtype=target.dtype)
        if not self.plus:
            return drawn
        easiest_first = target.detach().argsort(0, descending=True)
        return torch.empty_like(drawn).scatter_(0, easiest_first, drawn.sort(0).values)


class ElasticArcFace(ElasticHeader):
    """Target logit s * cos(theta + m_i); published spreads: std 0.05, with `plus` 0.0175."""

    def __init__(self, in_features: int, out_features: int, s=64.0, m=0.50, std=0.05, plus=False):
        super().__init__(in_features, out_features, s, m, std, plus)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return cos_of_sum(target, self.margins(target))


class ElasticCosFace(ElasticHeader):
    """Target logit s * (cos(theta) - m_i); published spreads: std 0.05, with `plus` 0.02."""

    def __init__(self, in_features: int, out_features: int, s=64.0, m=0.35, std=0.05, plus=False):
        super().__init__(in_features, out_features, s, m, std, plus)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return target - self.margins(target)


class CurricularFace(MarginHeader):
    """ArcFace that weighs hard negatives more as training goes on (Huang et al., CVPR 2020, Eq. 4-10).

    A negative is hard where its cosine exceeds the target's cos(theta + m); its logit becomes s * cos * (t + cos), with
    t the running mean (momentum 0.99) of the target cosines. Beyond theta = pi - m the target keeps falling linearly.
    """

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.50):
        super().__init__(in_features, out_features, s)
        self.m = m
        self.register_buffer("t", torch.zeros(1))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        beyond = target - math.sin(math.pi - self.m) * self.m
        return torch.where(target > math.cos(math.pi - self.m), cos_of_sum(target, self.m), beyond)

    def other_logits(self, cosine: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hard = cosine > cos_of_sum(target, self.m)
            if self.training:
                self.t.lerp_(target.mean().to(self.t.dtype), 0.01)
        return torch.where(hard, cosine * (self.t + cosine), cosine)


def cos_of_sum(cosine: torch.Tensor, m: float | torch.Tensor) -> torch.Tensor:
    """cos(theta + m) from cos(theta), without arccos: its slope is infinite at +-1, here it is zero there."""
    # In fp32 the smallest (1 - c)(1 + c) above zero is 1e-7: the floor is only reached where the sine is exactly zero.
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(1e-14).sqrt()
    cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, torch.Tensor) else (math.cos(m), math.sin(m))
    return cosine * cos_m - sine * sin_m


def build_header(name: str, in_features: int, out_features: int, s: float, m: float, std: float) -> MarginHeader:
    """The header that the setting `loss` names; a '+' after an elastic one deals margins by difficulty."""
    known = (ElasticArcFace, ElasticCosFace, ArcFace, CosFace, CurricularFace)
    header = {kind.__name__: kind for kind in known}.get(name.removesuffix("+"))
    plus = name.endswith("+")
    if header is None or (plus and not issubclass(header, ElasticHeader)):
        names = ", ".join(kind.__name__ for kind in known)
        raise InputError(f"loss = {name!r} must be one of {names}, or an elastic one followed by '+'.")
    if issubclass(header, ElasticHeader):
        return header(in_features, out_features, s=s, m=m, std=std, plus=plus)
    return header(in_features, out_features, s=s, m=m)
