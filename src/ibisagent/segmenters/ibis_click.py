"""`ibis-click`: our own click network as a segmenter. Opening an image computes its context features
(`context_features`), a small and quick embedding; prompts are pixels to the network."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ibisagent.domain import Box, Image, Mask, Prompt
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.files import one_line, reading
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.context_features import FEATURES, GRID, STRIDE, ContextEncoder, ContextFeatures, places_seen
from ibisagent.segmenters.letterbox import (
    CHANNELS,
    ClickNetworkConfig,
    Window,
    letterbox,
    letterbox_scale,
    letterbox_size,
    prompt_maps,
    unletterbox,
)
from ibisagent.segmenters.runtime import Network, choose_device, choose_runtime, load_network

if TYPE_CHECKING:
    from ibisagent.segmenters.click_network import ClickNetwork

PACKAGED_WEIGHTS = Path(__file__).parent.parent / "weights" / "ibis-click.safetensors"
LICENCE = "Apache-2.0"
CANVAS = 512  # pixels: longer side of the mask that is fed back
MARGIN, WIDER_MARGIN = 2.0, 2.6  # of the extent of mask and prompts: side of the window on them
SMALLEST = 0.12  # of the image's longer side: the smallest window
NOTHING = -12.0  # logit outside the window


@dataclass(frozen=True)
class ClickModel:
    """What every session predicts with. side: pixels a side of the network's input. context: the features of an image
    (FEATURES, GRID, GRID). quality: slope and shift of the predicted IoU's logit, fitted on held-out patients.
    """

    network: Network
    side: int
    context: ContextFeatures
    quality: tuple[float, float] = (1.0, 0.0)


class IbisClick:
    """The segmenter.

    weights: a .safetensors file as `training.click` writes it, with its .json beside it; None takes the packaged one.
    """

    def __init__(self, weights: Path | None = None, *, device: str = "auto", runtime: str = "auto") -> None:
        self.name = "ibis-click" if weights is None else f"ibis-click:{weights}"
        read = _Weights.read(PACKAGED_WEIGHTS if weights is None else weights)
        self._weights_sha256 = hashlib.sha256(read.content).hexdigest()
        device = choose_device(device)
        code = hashlib.sha256(Path(__file__).with_name("click_network.py").read_bytes()).hexdigest()
        side = read.config.side
        cells = side // STRIDE
        network = load_network(
            read.network,
            [
                np.zeros((1, CHANNELS, side, side), dtype=np.float32),
                np.zeros((1, FEATURES, GRID, GRID), dtype=np.float32),
                np.zeros((1, cells, cells, 2), dtype=np.float32),
            ],
            key=f"ibis-click-{self._weights_sha256[:16]}-{side}-{code[:8]}",
            runtime=choose_runtime(runtime, device),
            device=device,
            exact=False,  # trained in bfloat16; masks agree with those of float32 to an IoU of 0.99 (docs/results.md)
            batched=True,
        )
        self._model = ClickModel(network, side, ContextFeatures(ContextEncoder(runtime, device)), read.quality)

    def open(self, image: Image) -> IbisClickSession:
        """A session on `image`; its context features come from the cache where they are there."""
        return IbisClickSession(image, self._model)

    def describe(self) -> dict[str, str]:
        """Facts for records."""
        return {
            "segmenter": self.name,
            "runtime": self._model.network.runtime,
            "weights_sha256": self._weights_sha256,
            "licence": LICENCE,
        }


NetworkInput = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What the network is to see: planes (7, side, side), context features, places in them; see `ClickNetwork`."""


class IbisClickSession:
    """One image. Its logits are (2, h, w) float32 on a canvas, the image at a longer side of at most CANVAS: the mask's
    logits, and the start mask as 0 or 1.

    A prediction takes one to three passes: where nothing but clicks is known yet, the whole image first; then a window
    on what was found, the box and the clicks, so that a small object gets as many pixels as a large one (FocalClick,
    Chen et al. 2022); and a wider window where the mask ran into the border of that one.
    """

    def __init__(self, image: Image, model: ClickModel) -> None:
        self._size = image.size
        self._pixels = image.pixels
        self.model = model
        self._side = model.side
        self._features = model.context(image).astype(np.float32)
        self._zoom = min(1.0, letterbox_scale(image.size, CANVAS))
        self._canvas = letterbox_size(image.size, CANVAS) if self._zoom < 1 else image.size
        self._seen: dict[Window, np.ndarray] = {}

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`."""
        check_prompts(prompts, self._size)
        check_prior(prior, self._size, (2, *self._canvas))
        start = np.zeros(self._canvas, dtype=np.float32)
        before: np.ndarray | None = None
        if prior is not None and prior.dtype == np.bool_:
            before = start = (_resized(prior.astype(np.uint8) * 255, self._canvas) > 127).astype(np.float32)
        elif prior is not None:
            before, start = _sigmoid(prior[0]), prior[1].astype(np.float32)
        if before is None and not any(isinstance(prompt, Box) for prompt in prompts):
            window = Window.whole(self._size)
            logits, _ = self._pass(window, prompts, before)
            before = _sigmoid(self._painted(logits, window))
        window = self._window(before, prompts, MARGIN)
        logits, quality = self._pass(window, prompts, before)
        if window.truncates(unletterbox(logits, window.size) > 0, self._size):
            before = _sigmoid(self._painted(logits, window))
            window = self._window(before, prompts, WIDER_MARGIN)
            logits, quality = self._pass(window, prompts, before)
        mask: Mask = np.zeros(self._size, dtype=np.bool_)
        window.crop(mask)[:] = unletterbox(logits, window.size) > 0
        slope, shift = self.model.quality
        return Prediction(
            mask, float(_sigmoid(np.array(slope * quality + shift))), np.stack([self._painted(logits, window), start])
        )

    def _window(self, before: np.ndarray | None, prompts: Sequence[Prompt], margin: float) -> Window:
        """Where to look: around the mask so far (on the canvas), the box, all positive clicks and the newest prompt."""
        columns: list[float] = []
        rows: list[float] = []
        if before is not None:
            x, y, width, height = cv2.boundingRect((before > 0.5).astype(np.uint8))
            if width:
                columns += [x / self._zoom, (x + width) / self._zoom]
                rows += [y / self._zoom, (y + height) / self._zoom]
        for prompt in prompts:
            if isinstance(prompt, Box):
                columns += [prompt.x0, prompt.x1]
                rows += [prompt.y0, prompt.y1]
            elif prompt.positive or prompt is prompts[-1]:
                columns += [prompt.x, prompt.x + 1]
                rows += [prompt.y, prompt.y + 1]
        extent = Window(int(min(columns)), int(min(rows)), math.ceil(max(columns)), math.ceil(max(rows)))
        return Window.around(extent, self._size, margin, SMALLEST)

    def _pass(self, window: Window, prompts: Sequence[Prompt], before: np.ndarray | None) -> tuple[np.ndarray, float]:
        """Mask logits (side, side) and quality logit of what the network sees in `window`."""
        logits, quality = self.model.network(*(one[None] for one in self._input(window, prompts, before)))
        return logits[0, 0], float(quality[0])

    def _input(self, window: Window, prompts: Sequence[Prompt], before: np.ndarray | None) -> NetworkInput:
        """What the network sees in `window`."""
        colours = self._seen.get(window)
        if colours is None:
            colours = letterbox(window.crop(self._pixels), self._side).astype(np.float32).transpose(2, 0, 1) / 255
            whole = Window.whole(self._size)
            kept = {seen: planes for seen, planes in self._seen.items() if seen == whole}
            self._seen = kept | {window: colours}  # replaced, never changed: other threads may be reading it
        scale = letterbox_scale(window.size, self._side)
        mask = np.zeros((self._side, self._side), dtype=np.float32)
        if before is not None:
            rows, columns = letterbox_size(window.size, self._side)
            part = window.scaled(self._zoom, self._canvas)
            mask[:rows, :columns] = _resized(part.crop(before), (rows, columns))
        maps = prompt_maps(window.moved(prompts), self._side, scale)
        step = 1 / scale
        to_image = np.array([[step, 0, step / 2 - 0.5 + window.x0], [0, step, step / 2 - 0.5 + window.y0]])
        places = places_seen(to_image, self._size, self._side)
        return np.concatenate([colours, mask[None], maps]), self._features, places

    def _painted(self, logits: np.ndarray, window: Window) -> np.ndarray:
        """(side, side) logits of a window on the canvas: nothing is there outside the window."""
        canvas = np.full(self._canvas, NOTHING, dtype=np.float32)
        part = window.scaled(self._zoom, self._canvas)
        rows, columns = letterbox_size(window.size, self._side)
        part.crop(canvas)[:] = _resized(logits[:rows, :columns], part.size)
        return canvas


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An (H, W) array on another grid."""
    shrinks = plane.shape[0] > size[0]
    resized: np.ndarray = cv2.resize(plane, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    probability: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return probability.astype(np.float32)


@dataclass(frozen=True)
class _Weights:
    """A weights file as bytes, and what the .json beside it says: shape, and slope and shift of the quality."""

    path: Path
    content: bytes
    config: ClickNetworkConfig
    quality: tuple[float, float]

    @classmethod
    def read(cls, path: Path) -> _Weights:
        description = path.with_suffix(".json")
        for file in (path, description):
            if not file.is_file():
                remedy = "reinstall ibisagent, or train: ibisagent train click RECIPE"
                raise ConfigError(f"{file}: the weights of ibis-click are not there: {remedy}")
        with reading(description, "copy the weights again", SegmenterError):
            said = json.loads(description.read_text())
            shape, (slope, shift) = said["network"], said["quality"]
            config = ClickNetworkConfig(int(shape["side"]), tuple(shape["widths"]), tuple(shape["depth"]))
            return cls(path, path.read_bytes(), config, (float(slope), float(shift)))

    def network(self) -> ClickNetwork:
        """The network with its weights, in float32."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from ibisagent.segmenters.click_network import ClickNetwork

        network = ClickNetwork(self.config)
        try:
            network.load_state_dict(load(self.content))
        except (SafetensorError, RuntimeError) as error:
            reason = one_line(error, 300)
            raise SegmenterError(
                f"{self.path}: not the weights of this network ({reason}): train them again"
            ) from error
        return network


def read_click_network(weights: Path) -> ClickNetwork:
    """The network of a .safetensors file with its .json beside it, in float32, to train or to look into."""
    return _Weights.read(weights).network()
