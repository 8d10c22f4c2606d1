"""What None stands for in a setting: schedules as published. Margins are in config/registry.py."""

from dataclasses import dataclass

MILESTONES = {52: (16, 28, 40, 50), 26: (8, 14, 20, 25), 60: (40, 48, 52)}
"""Milestones by number of epochs: of MST-KD's teachers (paper 4.6), of its students and adaptors, of AdaDistill."""

STD_FC = 0.0125
"""Standard deviation of the margin in the adaptors' header: the released code's default; the paper names 0.05 only."""


@dataclass(frozen=True)
class Schedule:
    """Epochs and learning rates of a run. `base_lr` is for 512 images a step; each milestone divides it by 10."""

    epochs: int
    base_lr: float
    milestones: tuple[int, ...]
    warmup: int = 0  # epochs in which the learning rate rises linearly from 0

    def lr(self, epoch: int, batch_size: int, done: float = 1.0) -> float:
        """Returns the learning rate of the 0-based `epoch` for a total batch of `batch_size` images over all ranks.

        The drop at milestone m applies after m - 1 finished epochs. During warm-up, `done` is the share of the epoch's
        steps up to this one, in (0, 1].
        """
        rate = self.base_lr * batch_size / 512 * 0.1 ** sum(epoch + 1 >= m for m in self.milestones)
        return rate * (epoch + done) / self.warmup if epoch < self.warmup else rate


def scaled_milestones(epochs: int) -> tuple[int, ...]:
    """Returns the published milestones for 52, 26 and 60 epochs, else those of 26 epochs, scaled and rounded.

    Milestones that are rounded to the same epoch count once. A milestone at epoch 1 is dropped, so that every run
    starts at its full learning rate.
    """
    if epochs in MILESTONES:
        return MILESTONES[epochs]
    scaled = {int(m * epochs / 26 + 0.5) for m in MILESTONES[26]}
    return tuple(sorted(m for m in scaled if m > 1))
