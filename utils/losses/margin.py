"""Margin headers: classifiers that see angles, and make the target class harder to reach while training.

All headers hold `kernel` of shape (D, C), a column per class, and turn embeddings (B, D) and labels (B,) into scaled
logits (B, C) for the cross-entropy. It is a parameter; those of AdaDistill hold a buffer that follows the teacher's
embeddings, which they take too. Nothing needs to be normalised: embeddings and centres are, here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils.distributed import collectives
from utils.errors import InputError
from utils.losses.sharded import spread


class Header(nn.Module):
    """What is common to all: of several processes each has b samples of a batch, B in all, and the whole `kernel`."""

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Those of this process's samples (b, ...) -> those of all (B, ...), for what depends on all."""
        return collectives.gathered(values)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """This process's (b, ...) of all (B, ...)."""
        return collectives.own(values)

    def set_centres(self, kernel: torch.Tensor) -> None:
        """Takes the class centres (D, C)."""
        with torch.no_grad():
            self.kernel.copy_(kernel)


class MarginHeader(Header):
    """Scaled cosines of embeddings and class centres; subclasses say what becomes of the target's cosine."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0):
        super().__init__()
        self.s = s
        self.kernel = nn.Parameter(torch.empty(in_features, out_features).normal_(0, 0.01))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D), labels (B,) int64 -> logits (B, C), s * cosine but for the target entry."""
        column = label.unsqueeze(1)
        logits, target = MarginLogits.apply(F.normalize(embeddings), self.kernel, column, self.s, self.target_logit)
        return self.adjusted(logits, column, target)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """The target's cosine (B, 1) with the margin in it; each entry depends on its own cosine only."""
        raise NotImplementedError

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The logits (B, C) as they are returned, unchanged by most losses; `target` (B, 1) is the target's cosine."""
        return logits


class MarginLogits(torch.autograd.Function):
    """Logits with the margin in the target entries, and the target's cosines, without a normalised copy of the kernel.

    The lengths of the class centres are divided out of the product, where there are B * C numbers and not D * C, and
    everything is done in place: the one tensor of that size that lives until the backward pass is the result.
    """

    @staticmethod
    def forward(ctx, embeddings, kernel, column, s, target_logit):
        """`embeddings` (B, D) are of unit length, `column` (B, 1) holds the labels."""
        # On a CPU half the time of torch.linalg.vector_norm, along this dimension. The floor is that of F.normalize.
        scale = s / kernel.square().sum(0).sqrt_().clamp_min_(1e-12)
        logits = (embeddings @ kernel).mul_(scale)
        target = (logits.gather(1, column) / s).clamp_(-1, 1)
        with torch.enable_grad():
            cosine = target.clone().requires_grad_()
            margin = target_logit(cosine)
            (slope,) = torch.autograd.grad(margin.sum(), cosine)
        logits.scatter_(1, column, s * margin.detach())
        ctx.save_for_backward(embeddings, kernel, column, scale, logits, target, slope)
        ctx.s = s
        ctx.mark_non_differentiable(target)
        return logits, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        embeddings, kernel, column, scale, logits, target, slope = ctx.saved_tensors
        grad = grad * scale
        grad.scatter_(1, column, grad.gather(1, column) * slope)
        if not ctx.needs_input_grad[1]:
            return grad @ kernel.T, None, None, None, None
        # A centre's gradient is orthogonal to it: what lies along it, sum over B of grad * logit, is taken away. The
        # target's logit before the margin stands in for the one after it.
        along = (grad * logits).scatter_(1, column, grad.gather(1, column) * target * ctx.s).sum(0)
        kernel_grad = (kernel * (along * scale / -(ctx.s**2))).addmm_(embeddings.T, grad)
        return grad @ kernel.T, kernel_grad, None, None, None


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
        """One margin per target cosine, both (B, 1); they are drawn, and dealt, for the samples of all processes."""
        target = self.of_all(target.detach())
        drawn = torch.normal(self.m, self.std, target.shape, device=target.device, dtype=target.dtype)
        drawn = collectives.from_first(drawn)  # the others' generators may have made more of dropout
        if self.plus:
            easiest_first = target.argsort(0, descending=True)
            drawn = torch.empty_like(drawn).scatter_(0, easiest_first, drawn.sort(0).values)
        return self.own(drawn)


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

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hard = (logits > self.s * cos_of_sum(target, self.m)).scatter_(1, column, False)
            if self.training:
                self.t.lerp_(self.of_all(target).mean().to(self.t.dtype), 0.01)
        return torch.where(hard, logits * (self.t + logits / self.s), logits)


def cos_of_sum(cosine: torch.Tensor, m: float | torch.Tensor) -> torch.Tensor:
    """cos(theta + m) from cos(theta), without arccos: its slope is infinite at +-1, here it is zero there."""
    # In fp32 the smallest (1 - c)(1 + c) above zero is 1e-7: the floor is only reached where the sine is exactly zero.
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(1e-14).sqrt()
    cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, torch.Tensor) else (math.cos(m), math.sin(m))
    return cosine * cos_m - sine * sin_m


def build_header(
    name: str, in_features: int, out_features: int, s: float, m: float, std: float, sharding: bool = False
) -> MarginHeader:
    """The header that the setting `loss` names; a '+' after an elastic one deals margins by difficulty.

    With `sharding` its classes are spread over the processes, if there are several.
    """
    known = (ElasticArcFace, ElasticCosFace, ArcFace, CosFace, CurricularFace)
    header = {kind.__name__: kind for kind in known}.get(name.removesuffix("+"))
    plus = name.endswith("+")
    if header is None or (plus and not issubclass(header, ElasticHeader)):
        names = ", ".join(kind.__name__ for kind in known)
        raise InputError(f"loss = {name!r} must be one of {names}, or an elastic one followed by '+'.")
    settings = {"std": std, "plus": plus} if issubclass(header, ElasticHeader) else {}
    return spread(header, sharding)(in_features, out_features, s=s, m=m, **settings)
