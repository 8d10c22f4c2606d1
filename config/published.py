"""What None stands for in a setting: schedules as published. Margins are in config/registry.py."""

from dataclasses import dataclass

MILESTONES = {52: (16, 28, 40, 50), 26: (8, 14, 20, 25), 60: (40, 48, 52)}
"""By number of epochs: MST-KD's teachers (paper 4.6), its students and adaptors, AdaDistill on CASIA-WebFace."""

STD_FC = 0.0125
"""Standard deviation of the margin in the adaptors' header: the released code's default; the paper names 0.05 only."""


@dataclass(frozen=True)
class Schedule:
    """Epochs and learning rates of one run: `base_lr` for 512 images a step, a tenth of it from each milestone on."""

    epochs: int
    base_lr: float
    milestones: tuple[int, ...]

    def lr(self, epoch: int, batch_size: int) -> float:
        """The learning rate of the 0-based `epoch` with `batch_size` images a step, of all processes together.

        A drop at m applies after m - 1 finished epochs.
        """
        return self.base_lr * batch_size / 512 * 0.1 ** sum(epoch + 1 >= m for m in self.milestones)


def scaled_milestones(epochs: int) -> tuple[int, ...]:
    """The published milestones for 52, 26 and 60 epochs; for other numbers those of 26, scaled and rounded.

    Milestones that fall on the same epoch count once. One that falls on epoch 1 is dropped: no run starts below its
    learning rate.
    """
    if epochs in MILESTONES:
        return MILESTONES[epochs]
    scaled = {int(m * epochs / 26 + 0.5) for m in MILESTONES[26]}
    return tuple(sorted(m for m in scaled if m > 1))
