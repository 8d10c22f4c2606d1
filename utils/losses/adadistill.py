"""The headers of AdaDistill, whose class centres follow the teacher's embeddings, or stay."""

import math

import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.losses.margin import Header, MarginLogits, cos_of_sum


class AdaDistill(Header):
    """A margin softmax whose class centres follow the teacher's embeddings (Boutros et al., ECCV 2024, Eq. 6-8).

    Before the logits are computed, every sample of the batch moves the centre of its class: w = alpha * w +
    (1 - alpha) * f_t, where alpha is the cosine of student and teacher, `weighted` by that of centre and teacher
    (Eq. 8; without it Eq. 7), clipped to [0, 1]. Samples of one class move it one after another, in their order.

    `kernel` (D, C) holds the centres, a column per class, of any length. It is a buffer: no gradient reaches it, and in
    eval mode it stays as it is. `alpha` is the mean over the last batch. Raises InputError for another `margin`.
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
        self, student_embeddings: torch.Tensor, teacher_embeddings: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        """Both embeddings (B, D), labels (B,) int64 -> logits (B, C) of the student; all are normalised here."""
        student, column = F.normalize(student_embeddings), label.unsqueeze(1)
        if self.training:
            self.update(*map(self.of_all, (student.detach(), F.normalize(teacher_embeddings), label)))
        logits, _ = MarginLogits.apply(student, self.kernel, column, self.s, self.target_logit)
        return logits

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """The target's cosine (B, 1) with the margin in it: ArcFace's or CosFace's."""
        return cos_of_sum(target, self.m) if self.margin == "arc" else target - self.m

    @torch.no_grad()
    def update(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> None:
        """Moves the centres by unit-length embeddings (B, D) of all processes, in their order."""
        agreement = (student * teacher).sum(1)
        turn = (label.unsqueeze(1) == label).tril(-1).sum(1)  # how many samples of its class come before
        alpha = torch.zeros_like(agreement)
        for k in range(int(turn.max()) + 1):  # mostly once or twice
            centre = self.kernel[:, label].T
            weight = agreement * F.cosine_similarity(centre, teacher) if self.weighted else agreement
            alpha = torch.where(turn == k, weight.clamp(0, 1), alpha)
            # All others add nothing, exactly: no entry is written by two, so that CUDA too gives the same each time.
            step = torch.where(turn == k, 1 - alpha, 0).unsqueeze(1) * (teacher - centre)
            self.kernel.index_add_(1, label, step.T)
        self.alpha = alpha.mean()


class FrozenDistill(AdaDistill):
    """The same against class centres that the teacher has learned, and that stay (Eq. 4): alpha is 1."""

    def update(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> None:
        self.alpha = torch.ones((), device=label.device)


class ArcDistill(FrozenDistill):
    """With ArcFace's margin."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.45):
        super().__init__(in_features, out_features, s, m, "arc")


class CosDistill(FrozenDistill):
    """With CosFace's margin."""

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, m: float = 0.35):
        super().__init__(in_features, out_features, s, m, "cos")
