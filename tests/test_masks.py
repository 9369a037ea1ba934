"""Measures on masks, and the run-length codec, damaged input included."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from ibisagent.domain import MAX_PIXELS
from ibisagent.errors import DataError
from ibisagent.imaging.masks import decode_rle, dice, encode_rle, iou

shapes = arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)
masks = shapes.flatmap(lambda shape: arrays.arrays(bool, shape))


def draw(size=(61, 83)):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (columns - 30) ** 2 + (rows - 20) ** 2 < 150


@given(mask=masks)
def test_what_is_encoded_is_decoded(mask):
    decoded = decode_rle(encode_rle(mask))
    assert decoded.dtype == bool
    assert np.array_equal(decoded, mask)


def test_the_format_is_cocos():
    rle = encode_rle(draw())
    assert rle["size"] == [61, 83]
    assert isinstance(rle["counts"], str)
    assert coco.area({"size": rle["size"], "counts": rle["counts"].encode()}) == np.count_nonzero(draw())
    bare = {"size": [3, 2], "counts": "132"}  # runs 1, 3, 2, column by column
    assert decode_rle(bare).tolist() == [[False, True], [True, False], [True, False]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 83), (61, 1), (2048, 3), (3, 4099)])
@pytest.mark.parametrize("value", [True, False])
def test_long_runs_and_thin_masks(shape, value):
    mask = np.full(shape, value)
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)
    mask[-1, -1] = not value
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)


def test_the_largest_mask_is_decoded():
    mask = np.zeros((8192, 8192), dtype=bool)
    mask[0, 1::2] = True  # differences between runs change sign
    mask[4000:, 4000:] = True
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)


@settings(max_examples=300)
@given(mask=masks, data=st.data())
def test_damaged_counts_never_crash(mask, data):
    rle = encode_rle(mask)
    counts = rle["counts"]
    start = data.draw(st.integers(0, len(counts)))
    stop = data.draw(st.integers(start, len(counts)))
    damaged = counts[:start] + data.draw(st.text(max_size=5)) + counts[stop:]
    with contextlib.suppress(DataError):
        assert decode_rle({"size": rle["size"], "counts": damaged}).shape == mask.shape


@given(
    size=st.tuples(st.integers(-3, 50), st.integers(-3, 50)),
    counts=st.one_of(
        st.text(max_size=30), st.text(st.sampled_from([chr(code) for code in range(48, 112)]), max_size=30)
    ),
)
def test_random_counts_never_crash(size, counts):
    with contextlib.suppress(DataError):
        assert decode_rle({"size": list(size), "counts": counts}).shape == size


@pytest.mark.parametrize(
    "rle",
    [
        {},
        None,
        [],
        {"size": [61, 83]},
        {"counts": "1"},
        {"size": [61], "counts": "1"},
        {"size": [61, 83, 1], "counts": "1"},
        {"size": 61, "counts": "1"},
        {"size": [61.0, 83.0], "counts": "1"},
        {"size": ["61", "83"], "counts": "1"},
        {"size": [float("inf"), 1], "counts": "1"},
        {"size": [10**5000, 1], "counts": "1"},
        {"size": [0, 0], "counts": ""},
        {"size": [-1, -4], "counts": "4"},
        {"size": [2, 2], "counts": None},
        {"size": [2, 2], "counts": [4]},
        {"size": [2, 2], "counts": b"4"[0]},
        {"size": [2, 2], "counts": "é"},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": "3"},
        {"size": [2, 2], "counts": "5"},
        {"size": [2, 2], "counts": "Q"},
        {"size": [2, 2], "counts": "o" * 1000},
        {"size": [2, 2], "counts": "P" * 6 + "0"},
        {"size": [MAX_PIXELS, 2], "counts": "0"},
    ],
)
def test_what_is_no_run_length_mask_is_a_data_error(rle):
    with pytest.raises(DataError, match="run-length mask"):
        decode_rle(rle)


@pytest.mark.parametrize("mask", [draw().astype(np.uint8), draw()[None], np.zeros((0, 5), dtype=bool)])
def test_only_masks_are_encoded(mask):
    with pytest.raises(DataError, match="bool mask"):
        encode_rle(mask)


pairs = shapes.flatmap(lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape)))


@given(pairs)
def test_overlap_measures_agree(pair):
    a, b = pair
    overlap, agreement = iou(a, b), dice(a, b)
    assert 0 <= overlap <= agreement <= 1
    assert overlap == iou(b, a)
    assert agreement == pytest.approx(2 * overlap / (1 + overlap))
    assert (overlap == 1) == np.array_equal(a, b)


def test_overlap_of_known_masks():
    a, b = np.zeros((5, 7), dtype=bool), np.zeros((5, 7), dtype=bool)
    assert iou(a, b) == dice(a, b) == 1
    a[:2], b[1:3] = True, True
    assert iou(a, b) == pytest.approx(1 / 3)
    assert dice(a, b) == pytest.approx(1 / 2)
    assert iou(a, ~a) == 0


def test_masks_of_different_size_are_refused():
    for measure in (iou, dice):
        with pytest.raises(DataError, match="different size"):
            measure(draw(), draw((83, 61)))
