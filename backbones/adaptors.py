"""Adaptors: they map the concatenated embeddings of the teachers to one multi-teacher feature."""

import torch
import torch.nn.functional as F
from torch import nn


class SingleLayerAdaptor(nn.Module):
    """SL-EAF-Fusion, a single linear layer with bias: (B, in_features) -> (B, out_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc = nn.Linear(in_features, out_features)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.fc(embedding)


class DualLayerAdaptor(nn.Module):
    """DuL-EAF-Fusion, or DLDPO-EAF-Fusion with `dropout` 0.2: (B, in_features) -> (B, out_features).

    The dropout is between the first layer and the LeakyReLU (slope 0.01), as in the published network.
    """

    def __init__(self, in_features: int, middle_features: int, out_features: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(in_features, middle_features)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(middle_features, out_features)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.leaky_relu(self.dropout(self.fc1(embedding)), 0.01))


class MultiTeacher(nn.Module):
    """Teachers and adaptor as one face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, out_features).

    As in training, the adaptor gets the unit-length embeddings of the teachers, concatenated in order.
    """

    def __init__(self, teachers: list[nn.Module], adaptor: nn.Module):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.adaptor = adaptor

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.adaptor(torch.cat([F.normalize(teacher(image)) for teacher in self.teachers], 1))
