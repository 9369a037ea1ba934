"""Measures against numbers worked out by hand, and against independent libraries on 1,000 random pairs of masks."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from ibisagent.domain import Mask
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation import metrics
from ibisagent.evaluation.metrics import quotient
from ibisagent.evaluation.results import CaseResult, shares
from ibisagent.imaging.masks import Overlap, overlap

PAIRS = 1_000
SIZE = (23, 31)
SPACING = (0.7, 1.3)


Pairs = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """(masks, targets), each (PAIRS, H, W): blobs, noise, copies, moved copies; one in ten empty on a side or both."""
    rng = np.random.default_rng(0)

    def one() -> Mask:
        if rng.random() < 0.1:
            return np.zeros(SIZE, dtype=bool)
        field = rng.random(SIZE)
        if rng.random() < 0.8:
            field = cv2.GaussianBlur(field, (0, 0), float(rng.uniform(0.8, 3)))
        return np.asarray(field > np.quantile(field, rng.uniform(0.3, 0.97)))

    masks, targets = [], []
    for _ in range(PAIRS):
        target, kind = one(), rng.random()
        targets.append(target)
        masks.append(target if kind < 0.1 else np.roll(target, 2, axis=1) if kind < 0.4 else one())
    empties = [(mask.any(), target.any()) for mask, target in zip(masks, targets, strict=True)]
    assert all(empties.count(kind) >= 5 for kind in itertools.product((True, False), repeat=2))
    return np.stack(masks), np.stack(targets)


@pytest.fixture(scope="module")
def counts(pairs: Pairs) -> list[Overlap]:
    return [overlap(*pair) for pair in zip(*pairs, strict=True)]


def metric(name: str, overlaps: Iterable[Overlap], rule: metrics.EmptyRule = metrics.EMPTY_RULE) -> float | None:
    """The metric of that name over cases with these overlaps, as an evaluation has it."""
    cases = [CaseResult("", "", "", "", "", None, {"iou": one.iou, "dice": one.dice}, one) for one in overlaps]
    return quotient(shares(case, rule).get(name) for case in cases)


@pytest.fixture(scope="module")
def monai() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("monai.metrics", reason="monai is not installed")


def test_overlaps_equal_scikit_learn(pairs: Pairs, counts: list[Overlap]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    masks, targets = (part.reshape(PAIRS, -1).T for part in pairs)  # one column per pair, as labels are
    jaccard = sklearn.jaccard_score(targets, masks, average=None, zero_division=1.0)
    f1 = sklearn.f1_score(targets, masks, average=None, zero_division=1.0)
    np.testing.assert_allclose([one.iou for one in counts], jaccard, atol=1e-6, rtol=0)
    np.testing.assert_allclose([one.dice for one in counts], f1, atol=1e-6, rtol=0)
    assert metric("iou", counts) == pytest.approx(jaccard.mean(), abs=1e-6)
    assert metric("dice", counts) == pytest.approx(f1.mean(), abs=1e-6)
    presence = sklearn.f1_score(targets.any(axis=0), masks.any(axis=0))
    assert metric("presence_f1", counts) == pytest.approx(presence, abs=1e-6)
    positive = targets.any(axis=0)
    expected = sklearn.jaccard_score(targets[:, positive], masks[:, positive], average="macro")
    assert metric("positive_iou", counts) == pytest.approx(expected, abs=1e-6)


def test_metrics_equal_torchmetrics(pairs: Pairs, counts: list[Overlap]) -> None:
    classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    import torch

    tensors = [torch.from_numpy(part.reshape(PAIRS, -1).astype(int)) for part in pairs]
    pooled = float(classification.BinaryJaccardIndex()(*tensors))
    assert metric("ciou", counts) == pytest.approx(pooled, abs=1e-6)
    each = classification.BinaryF1Score(multidim_average="samplewise", zero_division=1)(*tensors)
    np.testing.assert_allclose([one.dice for one in counts], each.numpy(), atol=1e-6, rtol=0)


def test_dice_equals_surface_distance(pairs: Pairs, counts: list[Overlap]) -> None:
    other = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    for mask, target, found in zip(*pairs, counts, strict=True):
        if mask.any() or target.any():  # it has no value for two empty masks
            assert found.dice == pytest.approx(other.compute_dice_coefficient(target, mask), abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # MONAI's own, and about empty masks
def test_surfaces_equal_monai(pairs: Pairs, counts: list[Overlap], monai: Any) -> None:
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    tolerance = 1.3
    tensors = [torch.from_numpy(part[:, None].astype(np.float32)) for part in pairs]
    options = {"include_background": True, "spacing": SPACING}
    nsd = monai.compute_surface_dice(*tensors, class_thresholds=[tolerance], **options)[:, 0].numpy()
    iou = monai.compute_iou(*tensors)[:, 0].numpy()
    single = monai.compute_hausdorff_distance(*(part[:100] for part in tensors), percentile=95, **options)[:, 0]
    for number, (mask, target) in enumerate(zip(*pairs, strict=True)):
        found = metrics.surfaces(mask, target, SPACING, tolerance)
        if mask.any() and target.any():
            _, directed, _ = get_edge_surface_distance(
                *(torch.from_numpy(part) for part in (mask, target)), spacing=SPACING, symmetric=True
            )
            # MONAI interpolates between its distances in single precision
            expected = max(np.percentile(part.numpy().astype(float), 95) for part in directed)
            assert found.hd95 == pytest.approx(expected, rel=1e-6, abs=1e-6)
            if number < 100:
                assert found.hd95 == pytest.approx(float(single[number]), rel=1e-5, abs=1e-5)
            assert found.nsd == pytest.approx(nsd[number], abs=1e-6)
            assert counts[number].iou == pytest.approx(iou[number], abs=1e-6)
        elif mask.any() or target.any():
            assert found.hd95 == pytest.approx(math.hypot(SIZE[0] * SPACING[0], SIZE[1] * SPACING[1]))
            assert found.nsd == nsd[number] == 0
        else:
            assert found == metrics.Surfaces(0, 1)
            assert math.isnan(nsd[number])  # MONAI has no rule


@pytest.mark.filterwarnings("ignore")
def test_surfaces_of_volumes(monai: Any) -> None:
    import torch

    rng = np.random.default_rng(1)
    mask, target = (cv2.GaussianBlur(rng.random((9, 14, 11)), (0, 0), 1.5) > 0.5 for _ in range(2))
    spacing = (3.0, 0.5, 0.8)
    found = metrics.surfaces(mask, target, spacing, 1.0)
    tensors = [torch.from_numpy(array[None, None].astype(np.float32)) for array in (mask, target)]
    options = {"include_background": True, "spacing": spacing}
    assert found.hd95 == pytest.approx(
        float(monai.compute_hausdorff_distance(*tensors, percentile=95, **options)), rel=1e-6
    )
    assert found.nsd == pytest.approx(float(monai.compute_surface_dice(*tensors, class_thresholds=[1.0], **options)))


def test_surfaces_by_hand() -> None:
    target = np.zeros((20, 30), dtype=bool)
    target[5:10, 8] = True  # a line: every pixel is border
    mask = np.roll(target, 3, axis=1)
    found = metrics.surfaces(mask, target, (1.0, 0.5), tolerance=1.5)
    assert found == metrics.Surfaces(1.5, 1.0)  # 3 columns of 0.5 mm
    assert metrics.surfaces(mask, target, (1.0, 0.5), tolerance=1.49).nsd == 0
    mask[15, 20] = True  # one outlier of 6: the percentile does not forget it at this number
    assert metrics.surfaces(mask, target, (1.0, 0.5)).hd95 > 1.5


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, float("nan")), (1.0, 1.0, 1.0)])
def test_surfaces_refuse_spacing(spacing: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="spacing"):
        metrics.surfaces(np.ones((3, 4), bool), np.ones((3, 4), bool), spacing)


CASES = [
    Overlap(6, 8, 10),  # IoU 0.5
    Overlap(9, 9, 10),  # 0.9
    Overlap(0, 4, 0),  # found what is not there
    Overlap(0, 0, 5),  # missed
    Overlap(0, 0, 0),  # rightly nothing
]


@pytest.mark.parametrize(
    ("rule", "giou", "at_50", "at_90"), [("one", 0.48, 0.6, 0.4), ("zero", 0.28, 0.4, 0.2), ("skip", 0.35, 0.5, 0.25)]
)
def test_metrics_by_hand(rule: metrics.EmptyRule, giou: float, at_50: float, at_90: float) -> None:
    assert metric("iou", CASES, rule) == pytest.approx(giou)
    assert metric("precision_50", CASES, rule) == pytest.approx(at_50)
    assert metric("precision_90", CASES, rule) == pytest.approx(at_90)
    assert metric("positive_iou", CASES, rule) == pytest.approx(1.4 / 3)  # whatever the rule
    assert metric("ciou", CASES) == pytest.approx(15 / (12 + 10 + 4 + 5))
    assert metric("presence_f1", CASES) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metric("match_f1", CASES) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert quotient(metrics.match_share(one, 0.6) for one in CASES) == pytest.approx(2 * 1 / (2 * 1 + 2 + 2))


def test_metrics_without_a_part() -> None:
    assert quotient([]) is None
    assert quotient([metrics.ciou_share(Overlap(0, 0, 0)), None]) is None
    assert quotient([metrics.presence_share(Overlap(0, 0, 0))]) is None
    assert Overlap(1, 2, 3) + Overlap(4, 5, 6) == Overlap(5, 7, 9)
    with pytest.raises(ConfigError, match="maybe"):
        metrics.check_empty_rule("maybe")
    with pytest.raises(DataError, match="different size"):
        overlap(np.ones((3, 4), bool), np.ones((4, 3), bool))


def test_noise_by_hand() -> None:
    target = np.zeros((20, 30), dtype=bool)
    target[2:6, 2:12] = True
    mask = target.copy()
    assert metrics.noise(mask, target) == metrics.Noise(0, 0)
    mask[6, 12] = True  # touches by a corner
    assert metrics.noise(mask, target).extra_components == 0
    mask[10, 10:14] = mask[15, 20] = True
    assert metrics.noise(mask, target) == metrics.Noise(2, 5 / 46)
    target[15, 3] = True  # an object of two parts may have a mask of two parts
    assert metrics.noise(mask, target) == metrics.Noise(1, 1 / 46)
    assert metrics.noise(target & False, target) == metrics.Noise(0, 0)


def test_clicks_to_a_goal() -> None:
    assert metrics.clicks_to(0.8, [0.5, 0.8, 0.7], 20) == (2, False)
    assert metrics.clicks_to(0.9, [0.5, 0.8, 0.7], 20) == (20, True)
    assert metrics.clicks_to(0.8, [0.5, 0.8], 1) == (1, True)


def test_targets_are_resized_by_nearest_neighbour() -> None:
    target = np.array([[1, 0, 0], [0, 0, 1]], dtype=bool)
    assert np.array_equal(metrics.resize_target(target, (4, 9)), target.repeat(2, 0).repeat(3, 1))
    assert np.array_equal(metrics.resize_target(target.repeat(3, 0).repeat(3, 1), (2, 3)), target)


def test_size_classes() -> None:
    classes = [metrics.size_class(area) for area in (0, 0.004999, 0.005, 0.05, 0.0501)]
    assert classes == ["area < 0.5%"] * 2 + ["area 0.5% to 5%"] * 2 + ["area > 5%"]
