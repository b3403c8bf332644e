"""A network whose parameters are in three groups, and whose matrices have rows of norm 1 after each step."""

import torch
from torch import Tensor

from scalelong.model.backbone import ParameterGroup
from scalelong.model.uvit import UViT, UViTConfig
from scalelong.train.config import TrainConfig


class GroupedUViT(UViT):
    def parameter_groups(self) -> list[ParameterGroup]:
        names = [name for name, _ in self.named_parameters()]
        kinds = [
            [name for name in names if "blocks" not in name],
            [name for name in names if "blocks" in name and name.endswith("weight")],
            [name for name in names if "blocks" in name and not name.endswith("weight")],
        ]
        factors = [(1.0, 1.0), (0.25, 4.0, 1e5), (2.0, 0.0)]
        return [ParameterGroup(tuple(kind), *these) for kind, these in zip(kinds, factors, strict=True)]

    def after_step(self):
        return {name: unit_rows for name, p in self.named_parameters() if "blocks" in name and p.ndim == 2}


def unit_rows(weight: Tensor) -> Tensor:
    return weight / torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def grouped_uvit(config: TrainConfig) -> GroupedUViT:
    assert isinstance(config.model, UViTConfig)
    return GroupedUViT(config.model)
