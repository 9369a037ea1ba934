"""Context features of an image: what LiteMedSAM's frozen encoder sees of all of it at 112 pixels.

`ibis-click` is too small to learn what objects look like from a few thousand images; these features are what it knows
about medicine. At 112 pixels they cost a seventh of the full encoder and are worth nearly as much
(docs/experiments): its 28 x 28 tokens fill its attention windows of 7 and 14 without padding, those of 128 pixels would
not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from ibisagent.domain import Image
from ibisagent.errors import ConfigError
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.litemedsam import SIDE as FULL_SIDE
from ibisagent.segmenters.litemedsam import WEIGHTS_SHA256, litemedsam_network
from ibisagent.segmenters.runtime import choose_device, choose_runtime, load_network

if TYPE_CHECKING:
    from torch import nn

SIDE = 112  # pixels of the square that images are squashed to
GRID = 28
FEATURES = 256
STRIDE = 8  # pixels of a click network's view that share features

_KEY = f"context-{WEIGHTS_SHA256[:16]}-1"  # the last number counts changes of `_encoder`


def context_input(pixels: np.ndarray) -> np.ndarray:
    """(3, SIDE, SIDE) float32 in [0, 1] of an image (H, W, 3) uint8 RGB, squashed."""
    shrinks = min(pixels.shape[:2]) > SIDE
    square = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.ascontiguousarray(square.transpose(2, 0, 1), dtype=np.float32) / 255


class ContextEncoder:
    """The encoder: squashed images in, frozen features out."""

    def __init__(self, runtime: str = "auto", device: str = "cpu") -> None:
        device = choose_device(device)
        self._network = load_network(
            _encoder,
            [np.zeros((1, 3, SIDE, SIDE), dtype=np.float32)],
            key=_KEY,
            runtime=choose_runtime(runtime, device),
            device=device,
            exact=False,  # the networks that read the features were trained on bfloat16 ones
            batched=True,
        )
        self.runtime = self._network.runtime

    def embed(self, squares: np.ndarray) -> np.ndarray:
        """Features (N, FEATURES, GRID, GRID) float16 of (N, 3, SIDE, SIDE) float32, as `context_input` makes them."""
        if squares.ndim != 4 or squares.shape[1:] != (3, SIDE, SIDE):
            raise ConfigError(f"context features are of (N, 3, {SIDE}, {SIDE}) images, got {squares.shape}")
        return self._network(np.ascontiguousarray(squares, dtype=np.float32))[0].astype(np.float16)


class ContextFeatures:
    """Context features of images, kept by content."""

    def __init__(self, encoder: ContextEncoder) -> None:
        self._encoder = encoder
        self._cache = EmbeddingCache()

    def __call__(self, image: Image) -> np.ndarray:
        """(FEATURES, GRID, GRID) float16."""

        def embed() -> tuple[np.ndarray]:
            return (self._encoder.embed(context_input(image.pixels)[None])[0],)

        return self._cache.fetch(self._encoder.runtime, image.sha256, embed)[0]


def places_seen(to_image: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """Where in the context features the cells of a view lie: (side / STRIDE, side / STRIDE, 2) float32, x and y from -1
    to 1.

    to_image: (2, 3) affine map from pixels of the (side, side) view to those of the (H, W) image; cells outside the
    image get places outside [-1, 1].
    """
    centres = (np.arange(side // STRIDE) + 0.5) * STRIDE - 0.5
    grid = np.stack([*np.meshgrid(centres, centres), np.ones((len(centres),) * 2)], axis=-1)
    places: np.ndarray = (grid @ to_image.T + 0.5) / [size[1], size[0]] * 2 - 1
    return places.astype(np.float32)


def _encoder() -> nn.Module:
    """LiteMedSAM's image encoder for SIDE x SIDE images; it comes set for FULL_SIDE."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = litemedsam_network().image_encoder
            for part in self.whole.modules():
                if hasattr(part, "input_resolution"):
                    part.input_resolution = tuple(n * SIDE // FULL_SIDE for n in part.input_resolution)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.whole.patch_embed(images)
            for layer in self.whole.layers:
                tokens = layer(tokens)
            features: torch.Tensor = self.whole.neck(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)))
            return features

    return Encoder()
