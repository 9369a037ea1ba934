"""`ibis-click`: our own click network as a segmenter. Prompts are pixels to it, so it needs no image embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ibisagent.domain import Image, Mask, Prompt
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.segmenters import Prediction, check_prior, check_prompts
from ibisagent.segmenters.frame import letterbox, letterbox_scale, prompt_maps, unletterbox
from ibisagent.segmenters.runtime import Network, choose_device, choose_runtime, first_line, load_network
from ibisagent.segmenters.tidy import fill_small_holes, keep_prompted

if TYPE_CHECKING:
    from ibisagent.segmenters.click_network import ClickNetwork, ClickNetworkConfig

PACKAGED_WEIGHTS = Path(__file__).parent.parent / "weights" / "ibis-click.safetensors"
LICENCE = "Apache-2.0"


class IbisClick:
    """The segmenter.

    weights: a .safetensors file as `training.click` writes it, with its .json beside it; None takes the packaged one.
    tidy: drop components that nobody asked for and fill small holes (see `tidy`); the network itself never sees that.
    Off by default: many targets have several parts, and it gained nothing on held-out patients (docs/log.md).
    """

    def __init__(
        self, weights: Path | None = None, *, tidy: bool = False, device: str = "auto", runtime: str = "auto"
    ) -> None:
        from ibisagent.segmenters import click_network

        kind = "ibis-click-tidy" if tidy else "ibis-click"
        self.name = kind if weights is None else f"{kind}:{weights}"
        self._tidy = tidy
        path = PACKAGED_WEIGHTS if weights is None else weights
        device = choose_device(device)
        content, config = _read(path)
        self._weights_sha256 = hashlib.sha256(content).hexdigest()
        self._side = config.side
        code = hashlib.sha256(Path(click_network.__file__).read_bytes()).hexdigest()
        self._network = load_network(
            lambda: _build(path, content, config),
            [np.zeros((1, click_network.CHANNELS, config.side, config.side), dtype=np.float32)],
            key=f"ibis-click-{self._weights_sha256[:16]}-{code[:8]}",
            runtime=choose_runtime(runtime, device),
            device=device,
        )

    def open(self, image: Image) -> IbisClickSession:
        """A session on `image`: only shrinks it."""
        return IbisClickSession(image, self._network, self._side, self._tidy)

    def describe(self) -> dict[str, str]:
        """Facts for records."""
        return {
            "segmenter": self.name,
            "runtime": self._network.runtime,
            "weights_sha256": self._weights_sha256,
            "licence": LICENCE,
        }


class IbisClickSession:
    """One image. Its logits are (2, side, side) float32: the network's mask logits, and the start mask as 0 or 1."""

    def __init__(self, image: Image, network: Network, side: int, tidy: bool) -> None:
        self._size = image.size
        self._network = network
        self._side = side
        self._tidy = tidy
        self._scale = letterbox_scale(image.size, side)
        self._rgb = letterbox(image.pixels, side).astype(np.float32).transpose(2, 0, 1) / 255

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`."""
        check_prompts(prompts, self._size)
        check_prior(prior, self._size, (2, self._side, self._side))
        start = np.zeros((self._side, self._side), dtype=np.float32)
        before = start
        if prior is not None and prior.dtype == np.bool_:
            before = start = (letterbox(prior.astype(np.float32), self._side) > 0.5).astype(np.float32)
        elif prior is not None:
            before, start = _sigmoid(prior[0]), prior[1].astype(np.float32)
        planes = np.concatenate([self._rgb, before[None], prompt_maps(prompts, self._side, self._scale)])
        logits, quality = self._network(planes[None])
        mask: Mask = unletterbox(logits[0, 0], self._size) > 0
        if self._tidy:
            given = unletterbox(start, self._size) > 0.5 if start.any() else None
            mask = fill_small_holes(keep_prompted(mask, prompts, given), prompts)
        return Prediction(mask, float(_sigmoid(quality)[0]), np.stack([logits[0, 0], start]))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    probability: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return probability.astype(np.float32)


def _read(path: Path) -> tuple[bytes, ClickNetworkConfig]:
    """The weights file as bytes, and the network's shape from the .json beside it."""
    from ibisagent.segmenters.click_network import ClickNetworkConfig

    description = path.with_suffix(".json")
    for file in (path, description):
        if not file.is_file():
            remedy = "reinstall ibisagent, or train: python -m ibisagent.training.click DATA -o OUT"
            raise ConfigError(f"{file}: the weights of ibis-click are not there: {remedy}")
    try:
        shape = json.loads(description.read_text())["network"]
        config = ClickNetworkConfig(side=int(shape["side"]), widths=tuple(shape["widths"]), depth=tuple(shape["depth"]))
        return path.read_bytes(), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SegmenterError(f"{description}: does not describe a click network ({first_line(error)})") from error


def _build(path: Path, content: bytes, config: ClickNetworkConfig) -> ClickNetwork:
    """The network with its weights, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from ibisagent.segmenters.click_network import ClickNetwork

    network = ClickNetwork(config)
    try:
        network.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        reason = first_line(error)
        raise SegmenterError(f"{path}: not the weights of this network ({reason}): get or train them again") from error
    return network
