"""Headers of AdaDistill: the class centres follow the teacher's embeddings, or are the teacher's own and frozen."""

import math

import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.losses.margin import Header, MarginLogits, cos_of_sum


class AdaDistill(Header):
    """A margin softmax whose class centres follow the teacher's embeddings (Boutros et al., ECCV 2024, Eq. 6-8).

    Before the logits are computed, every sample of the batch moves the centre of its class: w = alpha * w +
    (1 - alpha) * f_t. Here alpha is the cosine of student and teacher clipped to [0, 1] (Eq. 7); with `weighted` it is
    first multiplied by the cosine of centre and teacher (Eq. 8). Samples of one class move the centre one after
    another, in batch order.

    `kernel` (D, C) holds the centres, one column per class, not normalised. It is a buffer: it gets no gradient, and in
    eval mode it does not change. `alpha` is the mean over the last batch. Raises InputError if `margin` is not arc or
    cos.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        s: float = 64.0,
        m: float = 0.45,
        margin: str = "arc",
        weighted: bool = True,
    ):
        super().__init__()
        if margin not in ("arc", "cos"):
            raise InputError(f"margin = {margin!r} must be arc or cos.")
        self.s, self.m, self.margin, self.weighted = s, m, margin, weighted
        self.register_buffer("kernel", torch.empty(in_features, out_features).normal_(0, 0.01))
        self.alpha = torch.tensor(math.nan)

    def forward(
        self,
        student_embeddings: torch.Tensor,
        teacher_embeddings: torch.Tensor,
        label: torch.Tensor,
        repeats: int | None = None,
    ) -> torch.Tensor:
        """Maps both embeddings (B, D) and labels (B,) int64 to the student's logits (B, C); normalises them.

        No class may occur more than `repeats` times in the global batch. With None it is counted, for which the host
        waits for a GPU, and the step cannot be captured.
        """
        student, column = F.normalize(student_embeddings), label.unsqueeze(1)
        if self.training:
            teacher = F.normalize(teacher_embeddings)
            self.update(self.of_all(student.detach()), self.of_all(teacher), self.of_all(label), repeats)
        logits, _ = MarginLogits.apply(student, self.kernel, column, self.s, self.target_logit)
        return logits

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """Applies the margin of ArcFace or CosFace to the target cosines (B, 1)."""
        return cos_of_sum(target, self.m) if self.margin == "arc" else target - self.m

    @torch.no_grad()
    def update(
        self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor, repeats: int | None = None
    ) -> None:
        """Moves the centres by unit-length embeddings (B, D) of the global batch, in order; labels (B,) int64."""
        cosine = (student * teacher).sum(1)
        position = (label.unsqueeze(1) == label).tril(-1).sum(1)  # number of earlier samples of the same class
        position = position.masked_fill(~self.is_held(label), -1)
        alpha = torch.zeros_like(cosine)
        for k in range(int(position.max()) + 1 if repeats is None else repeats):
            centre = self.kernel[:, label].T
            weight = cosine * F.cosine_similarity(centre, teacher) if self.weighted else cosine
            alpha = torch.where(position == k, weight.clamp(0, 1), alpha)
            # In each call only one sample per class adds a non-zero step, so index_add_ is deterministic on CUDA too.
            step = torch.where(position == k, 1 - alpha, 0).unsqueeze(1) * (teacher - centre)
            self.kernel.index_add_(1, label, step.T)
        self.alpha = self.mean_of_all(alpha)

    def is_held(self, label: torch.Tensor) -> torch.Tensor:
        """Returns a mask (B,) bool of the samples whose class this rank holds: all, unless the header is sharded."""
        return torch.ones_like(label, dtype=torch.bool)

    def mean_of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean of values (B,) that are zero where the class is not held on this rank."""
        return values.mean()


class FrozenDistill(AdaDistill):
    """A margin softmax against the teacher's own class centres, which are frozen (Eq. 4), so alpha is 1."""

    def update(
        self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor, repeats: int | None = None
    ) -> None:
        """Leaves the centres unchanged and sets `alpha` to 1."""
        self.alpha = torch.ones((), device=label.device)


class ArcDistill(FrozenDistill):
    """Frozen class centres with the margin of ArcFace."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.45):
        super().__init__(in_features, out_features, s, m, "arc")


class CosDistill(FrozenDistill):
    """Frozen class centres with the margin of CosFace."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35):
        super().__init__(in_features, out_features, s, m, "cos")
