"""The click simulator: where the expert clicks, that it ends, and that it is fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from phantoms import SIZE, disc

from ibisagent.domain import Box, Click
from ibisagent.imaging.clicks import bounding_box, deepest_pixel, ellipse, interior_depth, next_click
from ibisagent.imaging.masks import iou

shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=17)
masks = shapes.flatmap(lambda shape: arrays.arrays(bool, shape))
pairs = shapes.flatmap(lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape)))


def slow_depth(region):
    """Distance to the nearest outside pixel, the frame around the image being outside, pixel by pixel."""
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    depth = np.zeros(padded.shape)
    for row, column in np.argwhere(padded):
        depth[row, column] = np.sqrt(((outside - (row, column)) ** 2).sum(axis=1).min())
    return depth[1:-1, 1:-1]


@given(masks)
def test_depth_is_the_distance_to_the_outside(region):
    exact = np.sqrt(np.rint(slow_depth(region) ** 2)).astype(np.float32)
    assert np.array_equal(interior_depth(region), exact)  # to the last bit, wherever the array lies in memory


@given(masks)
def test_the_deepest_pixel_is_deepest(region):
    point = deepest_pixel(region)
    depth = slow_depth(region)
    if point is None:
        assert not region.any()
    else:
        assert depth[point[1], point[0]] == pytest.approx(depth.max(), abs=1e-3)


def test_the_first_click_is_the_centre_of_the_target():
    assert next_click(disc(50, 20, 13), np.zeros(SIZE, bool), "disc") == Click(50, 20, True, "disc")


def test_the_border_counts_as_outside():
    assert deepest_pixel(np.ones((11, 21), dtype=bool)) == (5, 5)
    ground_truth = np.zeros(SIZE, dtype=bool)
    ground_truth[:21, :21] = True
    assert next_click(ground_truth, np.zeros(SIZE, bool), "corner") == Click(10, 10, True, "corner")


def test_a_leak_is_clicked_negative():
    ground_truth, leak = disc(25, 30, 15), disc(70, 30, 9)
    assert next_click(ground_truth, ground_truth | leak, "disc") == Click(70, 30, False, "disc")


def test_deeper_and_larger_are_different_rules():
    ground_truth = np.zeros(SIZE, dtype=bool)
    ground_truth[5:45, 5:45] = True
    current = ground_truth.copy()
    current[5:45, 5:10] = False  # missed: 5 wide, 200 pixels
    current |= disc(70, 30, 7)  # leaked: 15 wide, 149 pixels
    deeper, larger = (next_click(ground_truth, current, "a", region=rule) for rule in ("deeper", "larger"))
    assert deeper == Click(70, 30, False, "a")
    assert larger is not None
    assert (larger.x, larger.positive) == (7, True)


def test_larger_takes_the_other_error_when_every_pixel_of_the_larger_was_clicked():
    ground_truth, current = np.zeros((5, 7), dtype=bool), np.zeros((5, 7), dtype=bool)
    ground_truth[0, :2], current[4, 6] = True, True
    past = [Click(0, 0, True, "a"), Click(1, 0, True, "a")]
    assert next_click(ground_truth, current, "a", past, region="larger") == Click(6, 4, False, "a")


def test_nothing_is_left_to_click_on_a_perfect_mask():
    assert next_click(disc(20, 20, 9), disc(20, 20, 9), "disc") is None
    assert deepest_pixel(np.zeros(SIZE, dtype=bool)) is None


@pytest.mark.parametrize("rule", ["deeper", "larger"])
@settings(max_examples=60)
@given(pair=pairs)
def test_every_wrong_pixel_is_clicked_once_with_its_sign(rule, pair):
    ground_truth, current = pair
    past = []
    while (click := next_click(ground_truth, current, "a", past, region=rule)) is not None:
        assert ground_truth[click.y, click.x] == click.positive
        assert current[click.y, click.x] != click.positive
        past.append(click)
    assert len({(click.x, click.y) for click in past}) == len(past) == np.count_nonzero(ground_truth ^ current)


def test_the_same_state_gives_the_same_click():
    ground_truth, current = disc(30, 30, 20), disc(36, 28, 19)
    first = next_click(ground_truth, current, "a")
    assert first is not None
    assert all(next_click(ground_truth.copy(), current.copy(), "a") == first for _ in range(3))
    assert next_click(ground_truth, current, "a", [first]) != first


def test_a_click_takes_less_than_a_millisecond():
    size = (256, 256)
    states = [
        (disc(128, 120, 90, size), np.zeros(size, dtype=bool)),
        (disc(128, 120, 90, size), disc(140, 128, 85, size)),
    ]
    for ground_truth, current in states:
        times = []
        for _ in range(30):
            started = time.perf_counter()
            next_click(ground_truth, current, "a")
            times.append(time.perf_counter() - started)
        assert min(times) < 1e-3


@given(masks)
def test_the_bounding_box_is_tight(mask):
    box = bounding_box(mask, "a")
    if box is None:
        assert not mask.any()
        return
    inside = np.zeros_like(mask)
    inside[box.y0 : box.y1, box.x0 : box.x1] = True
    assert not (mask & ~inside).any()
    assert mask[box.y0 : box.y1, [box.x0, box.x1 - 1]].any(axis=0).all()
    assert mask[[box.y0, box.y1 - 1], box.x0 : box.x1].any(axis=1).all()


@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 23), st.integers(1, 21))
def test_the_ellipse_fills_its_box(x0, y0, width, height):
    box = Box(x0, y0, x0 + width, y0 + height, "a")
    drawn = ellipse(box, (61, 83))
    inside = drawn[box.y0 : box.y1, box.x0 : box.x1]
    assert np.count_nonzero(drawn) == np.count_nonzero(inside) > 0
    assert np.array_equal(inside, inside[::-1, ::-1])
    if width % 2 and height % 2:
        assert bounding_box(drawn, "a") == box


def test_a_large_ellipse_has_the_area_of_an_ellipse():
    drawn = ellipse(Box(3, 5, 73, 55, "a"), SIZE)
    assert np.count_nonzero(drawn) == pytest.approx(np.pi * 35 * 25, rel=0.01)
    assert iou(ellipse(Box(0, 0, 61, 61, "a"), SIZE), disc(30, 30, 30.5)) == 1
