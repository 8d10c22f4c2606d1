"""Margin headers: cosine classifiers that make the target class harder to reach during training.

Every header holds `kernel` (D, C), one column per class, and maps embeddings (B, D) and labels (B,) to scaled logits
(B, C) for the cross-entropy. `kernel` is a parameter; in the headers of AdaDistill it is a buffer that follows the
teacher's embeddings, which are a further input. Headers normalise the embeddings and the class centres themselves.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from utils.distributed import collectives


class Header(nn.Module):
    """Base class of all headers. Each rank holds b of the B samples of a global batch, and the whole `kernel`."""

    def loss(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        """Returns the mean cross-entropy of this rank's samples.

        `inputs` are those of `forward`: embeddings (b, D), one or two, then labels (b,) int64. Its other parameters are
        given by name.
        """
        return F.cross_entropy(self(*inputs, **options), inputs[-1])

    kernel: torch.Tensor

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        """All-gathers values along the batch dimension: (b, ...) -> (B, ...)."""
        return collectives.gathered(values)

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Selects this rank's samples of the global batch: (B, ...) -> (b, ...)."""
        return collectives.own(values)

    def set_centres(self, kernel: torch.Tensor) -> None:
        """Copies the class centres (D, C) into `kernel`."""
        with torch.no_grad():
            self.kernel.copy_(kernel)


class MarginHeader(Header):
    """Base class of the trained headers: scaled cosines, with the margin that a subclass applies to the target."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0):
        super().__init__()
        self.s = s
        self.kernel = nn.Parameter(torch.empty(in_features, out_features).normal_(0, 0.01))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Maps embeddings (B, D) and labels (B,) int64 to logits (B, C): s * cosine, except for the target entry."""
        column = label.unsqueeze(1)
        logits, target = MarginLogits.apply(F.normalize(embeddings), self.kernel, column, self.s, self.target_logit)
        return self.adjusted(logits, column, target)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """Applies the margin to the target cosines (B, 1), element by element: it is differentiated by them only."""
        raise NotImplementedError

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adjusts the logits (B, C) of the other classes; returns them unchanged unless overridden.

        `column` (B, 1) holds the labels, `target` (B, 1) the target cosines without the margin.
        """
        return logits


class MarginLogits(torch.autograd.Function):
    """Computes the logits (B, C) with the margin at the target, and the target cosines (B, 1).

    It never makes a normalised copy of the kernel: the (B, C) product is divided by the norms of the centres, in place.
    The result is the only (B, C) tensor that is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, embeddings, kernel, column, s, target_logit):
        """Takes unit-length embeddings (B, D), kernel (D, C) and labels `column` (B, 1)."""
        # Twice as fast as torch.linalg.vector_norm along this dimension on a CPU. The minimum is that of F.normalize.
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
        # The gradient of a centre is orthogonal to the centre, so its component along the centre is subtracted: the sum
        # over B of grad * logit, with the target's logit before the margin.
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
    """Draws a new margin from N(m, std^2) for every sample and step, not clamped (Boutros et al., CVPRW 2022).

    With `plus`, the drawn margins are sorted: the sample with the lowest target cosine gets the largest margin.
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float, std: float, plus: bool):
        super().__init__(in_features, out_features, s)
        self.m, self.std, self.plus = m, std, plus

    def margins(self, target: torch.Tensor) -> torch.Tensor:
        """Draws one margin per target cosine, both (b, 1); draws and sorts them over the global batch."""
        target = self.of_all(target.detach())
        drawn = torch.normal(self.m, self.std, target.shape, device=target.device, dtype=target.dtype)
        drawn = collectives.from_first(drawn)  # generators of the other ranks may differ: dropout draws from them too
        if self.plus:
            easiest_first = target.argsort(0, descending=True)
            drawn = torch.empty_like(drawn).scatter_(0, easiest_first, drawn.sort(0).values)
        return self.own(drawn)


class ElasticArcFace(ElasticHeader):
    """Target logit s * cos(theta + m_i). The published std is 0.05, with `plus` 0.0175."""

    def __init__(self, in_features: int, out_features: int, s=64.0, m=0.50, std=0.05, plus=False):
        super().__init__(in_features, out_features, s, m, std, plus)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return cos_of_sum(target, self.margins(target))


class ElasticCosFace(ElasticHeader):
    """Target logit s * (cos(theta) - m_i). The published std is 0.05, with `plus` 0.02."""

    def __init__(self, in_features: int, out_features: int, s=64.0, m=0.35, std=0.05, plus=False):
        super().__init__(in_features, out_features, s, m, std, plus)

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        return target - self.margins(target)


class CurricularFace(MarginHeader):
    """ArcFace with a weight on hard negatives that grows during training (Huang et al., CVPR 2020, Eq. 4-10).

    A negative is hard if its cosine exceeds the target's cos(theta + m). Its logit becomes s * cos * (t + cos), where t
    is the running mean (momentum 0.99) of the target cosines. Beyond theta = pi - m the target logit falls linearly.
    """

    t: torch.Tensor

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.50):
        super().__init__(in_features, out_features, s)
        self.m = m
        self.register_buffer("t", torch.zeros(1))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """Applies the margin of ArcFace; beyond theta = pi - m the result is linear in the cosine."""
        linear = target - math.sin(math.pi - self.m) * self.m
        return torch.where(target > math.cos(math.pi - self.m), cos_of_sum(target, self.m), linear)

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weights the hard negatives among the logits (B, C); updates `t` in training mode."""
        with torch.no_grad():
            hard = (logits > self.s * cos_of_sum(target, self.m)).scatter_(1, column, False)
            if self.training:
                self.t.lerp_(self.of_all(target).mean().to(self.t.dtype), 0.01)
        return torch.where(hard, logits * (self.t + logits / self.s), logits)


def cos_of_sum(cosine: torch.Tensor, m: float | torch.Tensor) -> torch.Tensor:
    """Returns cos(theta + m) for cos(theta), without arccos, whose gradient is infinite at +-1; here it is zero."""
    # In fp32 the smallest (1 - c)(1 + c) above zero is 1e-7: the floor only applies where the sine is exactly zero.
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(1e-14).sqrt()
    cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, torch.Tensor) else (math.cos(m), math.sin(m))
    return cosine * cos_m - sine * sin_m
