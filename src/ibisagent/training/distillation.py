"""What LiteMedSAM knows about pictures, as a second task for `ibis-click`: to predict its features.

The encoder is too slow for a click, but its features can be learned: after the same number of states a network that was
made to predict them follows clicks better than one that was not (docs/log.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ibisagent.segmenters.click_network import ClickNetwork

GRID, CHANNELS = 32, 256
STRIDE = 8  # of the click network, where features are predicted
LEVEL = STRIDE.bit_length() - 2  # of its stages
CLIPPED = 4.0  # standard deviations


class TeacherFeatures:
    """Features (N, CHANNELS, GRID, GRID) float16 of N pictures, letterboxed, in a file named after the pictures."""

    def __init__(self, pictures: Sequence[np.ndarray], folder: Path) -> None:
        """pictures: each (H, W, 3) uint8. folder: where the file is, or is made: half a second a picture and core."""
        from ibisagent.segmenters.litemedsam import LiteMedSamEncoder, encoder_input

        self._sizes = [picture.shape[:2] for picture in pictures]
        shape = (len(pictures), CHANNELS, GRID, GRID)
        file = folder / feature_file(pictures)
        if not file.exists():
            encoder = LiteMedSamEncoder(exact=False)
            fresh = file.with_suffix(".tmp")
            features = np.memmap(fresh, dtype=np.float16, mode="w+", shape=shape)
            for index, picture in enumerate(pictures):
                fine = encoder.embed(encoder_input(picture)[None])[0]
                factor = fine.shape[1] // GRID
                features[index] = fine.reshape(CHANNELS, GRID, factor, GRID, factor).mean(axis=(2, 4))
            features.flush()
            fresh.rename(file)
        self._features = np.memmap(file, dtype=np.float16, mode="r", shape=shape)
        some = self._features[:: max(1, len(pictures) // 64)].astype(np.float32)
        self._mean = some.mean(axis=(0, 2, 3))[:, None, None]
        self._spread = some.std(axis=(0, 2, 3))[:, None, None] + 1e-3

    def seen(self, picture: int, turn: np.ndarray, side: int) -> np.ndarray:
        """(CHANNELS + 1, side / STRIDE, side / STRIDE) float16: standardised features of a view, then 1 where it shows
        the picture and 0 where it shows nothing.

        turn: (2, 3) affine map from pixels of the picture to those of the (side, side) view.
        """
        height, width = self._sizes[picture]
        scale = GRID / max(height, width)
        centres = (np.arange(side // STRIDE) + 0.5) * STRIDE - 0.5
        grid = np.stack([*np.meshgrid(centres, centres), np.ones((len(centres),) * 2)], axis=-1)
        x, y = np.moveaxis(grid @ cv2.invertAffineTransform(turn).T, -1, 0) + 0.5
        inside = (x > 0) & (x < width) & (y > 0) & (y < height)
        places = torch.from_numpy(np.stack([x, y], axis=-1).astype(np.float32) * (2 * scale / GRID) - 1)
        plain = torch.from_numpy((self._features[picture].astype(np.float32) - self._mean) / self._spread)
        warped = F.grid_sample(plain[None], places[None], padding_mode="border", align_corners=False)[0]
        return np.concatenate([warped.clamp(-CLIPPED, CLIPPED).numpy(), inside[None]]).astype(np.float16)


def feature_file(pictures: Sequence[np.ndarray]) -> str:
    """The name of the file with the features of `pictures`."""
    content = hashlib.sha256()
    for picture in pictures:
        content.update(picture.tobytes())
    return f"features-{content.hexdigest()[:16]}.f16"


class FeatureHead(nn.Module):
    """Predicts the features from the click network's decoder at STRIDE; dropped after training."""

    def __init__(self, network: ClickNetwork) -> None:
        super().__init__()
        width = network.config.widths[LEVEL]
        self.layers = nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, CHANNELS, 1))
        self._decoded: torch.Tensor | None = None
        network.up[LEVEL].register_forward_hook(self._remember)

    def _remember(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._decoded = output

    def loss(self, wanted: torch.Tensor) -> torch.Tensor:
        """Mean squared error inside the picture, after a pass of the network. wanted (B, CHANNELS + 1, h, w)."""
        assert self._decoded is not None
        known = wanted[:, CHANNELS:]
        error = (self.layers(self._decoded.float()) - wanted[:, :CHANNELS]).square().mean(dim=1, keepdim=True)
        return (error * known).sum() / known.sum().clamp(min=1)
