"""The image features of the small networks: EfficientNet-Lite0 without its last stage, under a feature pyramid.

EfficientNet-Lite0 (Tan and Le, 2019; the Lite variants: Google, 2020) starts from ImageNet weights and is fine-tuned on
biomedical images by `training.backbone`: every image teaches all of its named objects at once, which a language model
that sees one question at a time would take far longer to. A top-down pyramid (Lin et al., 2017) brings its strides of
4 to 32 pixels together at stride 8.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from ibisagent.segmenters.backbone_sizes import GRID, WIDTH

_STAGES = {1: 24, 2: 40, 4: 112, 5: 192}
"""Stages that the pyramid reads, with their channels: strides 4, 8, 16, 32."""


class Residual(nn.Module):
    """Pre-activation 3x3 convolution with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) -> the same."""
        added: torch.Tensor = self.conv(F.gelu(self.norm(x)))
        return x + added


class Backbone(nn.Module):
    """Images (N, 3, SIDE, SIDE) in [0, 1] -> features (N, WIDTH, GRID, GRID).

    Batch normalisation always uses its running statistics: batches of single images and of mixed modalities are common.
    """

    def __init__(self) -> None:
        super().__init__()
        whole: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.stem = nn.Sequential(whole.conv_stem, whole.bn1)
        self.stages = nn.ModuleList(whole.blocks[: max(_STAGES) + 1])
        fine, *lateral = _STAGES.values()
        self.fine = nn.Conv2d(fine, WIDTH, 3, stride=2, padding=1)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in lateral)
        self.context = nn.Linear(lateral[-1], WIDTH)
        self.position = nn.Parameter(torch.zeros(WIDTH, GRID, GRID))
        self.merge = nn.ModuleList(Residual(WIDTH) for _ in lateral)
        self.last = Residual(WIDTH)

    def train(self, mode: bool = True) -> Backbone:
        """See `nn.Module`; batch normalisation stays in evaluation mode."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As the class says."""
        return self.merged(self.levels(images))

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What the stages of `_STAGES` see. Depthwise convolutions are slow in bfloat16 on a CPU."""
        x = self.stem((images * 2 - 1).contiguous(memory_format=torch.channels_last))
        levels = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in _STAGES:
                levels.append(x)
        return levels

    def merged(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """The pyramid's features of `levels`."""
        fine, *others = levels
        merged = self.context(others[-1].mean(dim=(2, 3)))[:, :, None, None]
        for level, lateral, merge in zip(others[::-1], reversed(self.lateral), self.merge, strict=True):
            sides = level.shape[-2:]
            if merged.shape[-1] > 1:
                merged = F.interpolate(merged, size=sides, mode="bilinear", align_corners=False)
            merged = merged + lateral(level)
            if sides[-1] == GRID:
                merged = merged + self.fine(fine) + self.position
            merged = merge(merged)
        return F.gelu(self.last(merged))
