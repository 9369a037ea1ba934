"""The network of `ibis-click`; `letterbox` has the encoding of its input.

A promptable segmenter of the RITM kind (Sofiiuk et al. 2022): prompts and the previous mask enter as image planes, so
the network follows every click and runs on any crop. What it looks at has pixels of its own and, coarser, the context
features of the whole image (see `context_features`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ibisagent.segmenters.context_features import FEATURES, STRIDE
from ibisagent.segmenters.letterbox import CHANNELS, ClickNetworkConfig

_LEVEL = STRIDE.bit_length() - 2  # of the stages, the one at STRIDE
_CONTEXT_WIDTH = 128


class _Block(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width_in) if width_in % 8 == 0 else nn.GroupNorm(1, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        same = width_in == width and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        both: torch.Tensor = self.conv2(F.relu(self.norm2(h))) + self.skip(x)
        return both


class ClickNetwork(nn.Module):
    """U-Net over (RGB, previous mask, prompts), with a head that predicts the IoU of its own mask."""

    def __init__(self, config: ClickNetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or ClickNetworkConfig()
        widths, depth = self.config.widths, self.config.depth
        self.stem = nn.Conv2d(4 * CHANNELS, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = [_Block(width, width) for _ in range(depth[level] - (level > 0))]
            if level > 0:
                blocks.insert(0, _Block(widths[level - 1], width, stride=2))
            self.down.append(nn.Sequential(*blocks))
        known = nn.Conv2d(_CONTEXT_WIDTH, widths[_LEVEL], 1)
        for part in known.parameters():
            nn.init.zeros_(part)  # the pixels come first
        self.context = nn.Sequential(nn.Conv2d(FEATURES, _CONTEXT_WIDTH, 1), nn.ReLU(), known)
        self.reduce = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 1) for i in range(len(widths) - 1))
        self.up = nn.ModuleList(_Block(widths[i], widths[i]) for i in range(len(widths) - 1))
        self.mask_head = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.ReLU(), nn.Conv2d(widths[0], 4, 1))
        self.quality_head = nn.Sequential(nn.Linear(widths[-1] + 2 * widths[0] + 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(
        self, x: torch.Tensor, features: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, 7, side, side) float; any side that 32 divides. features (B, FEATURES, GRID, GRID) of the whole
        images, places (B, side / STRIDE, side / STRIDE, 2): where in them the cells lie
        (`context_features.places_seen`).

        Returns mask logits (B, 1, side, side) and quality logits (B,), whose sigmoid is the predicted IoU.
        """
        rgb, rest = x[:, :3], x[:, 3:]
        h = self.stem(F.pixel_unshuffle(torch.cat([(rgb - 0.45) * 4, rest], dim=1), 2))
        skips = []
        for level, stage in enumerate(self.down):
            h = stage(h)
            if level == _LEVEL:
                known = self.context(F.layer_norm(features.movedim(1, -1), (FEATURES,)).movedim(-1, 1))
                h = h + F.grid_sample(known, places.to(known.dtype), align_corners=False)
            skips.append(h)
        bottleneck = h
        for level in reversed(range(len(self.up))):
            h = F.interpolate(self.reduce[level](h), scale_factor=2, mode="bilinear", align_corners=False)
            h = self.up[level](h + skips[level])
        half = self.mask_head(h)
        inside = half.mean(dim=1, keepdim=True).sigmoid().detach()
        area = inside.mean(dim=(2, 3))
        sharpness = (2 * inside - 1).abs().mean(dim=(2, 3))
        object_features = (h * inside).sum(dim=(2, 3)) / (inside.sum(dim=(2, 3)) + 1)
        summary = [bottleneck.mean(dim=(2, 3)), h.mean(dim=(2, 3)), object_features, area, sharpness]
        quality = self.quality_head(torch.cat(summary, dim=1).detach())
        return F.pixel_shuffle(half, 2), quality[:, 0]
