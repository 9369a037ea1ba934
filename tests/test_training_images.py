"""What the small networks learn from: drawn in balance, seen from nearby, all named objects of an image at once."""

from pathlib import Path

import cv2
import numpy as np
import torch

from ibisagent.datasets import CaseRow
from ibisagent.segmenters.backbone import Backbone
from ibisagent.segmenters.backbone_sizes import GRID, SIDE, WIDTH
from ibisagent.training.backbone import imagenet_weights
from ibisagent.training.images import balanced_weights, closer, random_turn, recolored


def row(dataset, name, patient, modality="CT"):
    return CaseRow("x", Path("x"), None, name, "", dataset=dataset, modality=modality, patient=patient)


def test_a_thousand_radiographs_do_not_drown_ten_pancreases():
    many = [row("lungs", "lung", f"l{n}", "X-Ray") for n in range(1000)]
    few = [row("pancreases", "pancreas", f"p{n}") for n in range(10)]
    weights = balanced_weights([*many, *few])
    assert abs(weights.sum() - 1) < 1e-9
    assert 0.2 < weights[1000:].sum() < 0.3  # of 1% of the rows
    assert weights[:1000].min() == weights[:1000].max()


def test_the_tiles_of_one_slide_do_not_drown_the_others():
    weights = balanced_weights([*[row("tiles", "gland", "one")] * 100, row("tiles", "gland", "two")])
    assert abs(weights[100] - 1 / 11) < 1e-9


def test_a_closer_view_shows_the_whole_object_larger():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[100:120, 30:40] = True
    random = np.random.default_rng(0)
    for _ in range(20):
        turn = closer(np.eye(2, 3, dtype=np.float32), mask, random)
        seen = cv2.warpAffine(mask.astype(np.float32), turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
        scale = np.sqrt(np.linalg.det(turn[:, :2]))
        assert 1.2 <= scale <= 3.01
        assert abs(seen.sum() / (200 * scale**2) - 1) < 0.12


def test_left_and_right_are_never_exchanged_where_they_have_names():
    random = np.random.default_rng(0)
    assert all(np.linalg.det(random_turn("CT", random)[:, :2]) > 0 for _ in range(50))
    assert any(np.linalg.det(random_turn("fundus", random)[:, :2]) < 0 for _ in range(50))


def test_other_colours_keep_the_image_in_range():
    view = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    seen = [recolored(view, np.random.default_rng(seed)) for seed in range(20)]
    assert all(one.shape == view.shape and one.dtype == np.uint8 for one in seen)
    assert not any(np.array_equal(one, view) for one in seen)


def test_the_backbone_starts_from_imagenet_and_ignores_what_else_is_in_the_batch():
    weights = imagenet_weights()
    assert weights["conv_stem.weight"].shape == (32, 3, 3, 3)
    backbone = Backbone().train()
    with torch.inference_mode():
        both = backbone(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
        alone = backbone(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))[:1])
    assert both.shape == (2, WIDTH, GRID, GRID)
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)
