"""The vocabulary checks itself, and the small facts that episodes tell about themselves."""

import copy
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from ibisagent.domain import (
    MAX_QUERY_CHARS,
    MAX_TARGETS,
    Box,
    Case,
    Click,
    Completion,
    Episode,
    Image,
    Observation,
    Reply,
    Stop,
    Turn,
    Undo,
    check_query,
    kept_prompts,
    union,
)
from ibisagent.errors import ConfigError, DataError, IbisError, PolicyError, SegmenterError

SIZE = (61, 83)


def picture(value=7):
    return Image(np.full((*SIZE, 3), value, dtype=np.uint8), source="eye.png")


def mask(columns=3):
    drawn = np.zeros(SIZE, dtype=bool)
    drawn[:, :columns] = True
    return drawn


def turn(*actions, after=None):
    return Turn(Completion("text"), Reply("", actions), {}, {} if after is None else after)


def episode(*turns, start=None):
    return Episode("id", "disc", SIZE, "0" * 64, "eye.png", start or {}, turns, "stopped", {})


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros(SIZE, np.uint8),
        np.zeros((*SIZE, 4), np.uint8),
        np.zeros((*SIZE, 3), np.float32),
        np.zeros((0, 83, 3), np.uint8),
        np.zeros((61, 0, 3), np.uint8),
    ],
)
def test_an_image_is_rgb_bytes_with_pixels(pixels):
    with pytest.raises(DataError, match=r"eye\.png"):
        Image(pixels, source="eye.png")


def test_size_is_height_then_width():
    assert picture().size == SIZE


def test_the_hash_tells_pixels_and_shapes_apart():
    assert picture().sha256 == picture().sha256
    assert picture(7).sha256 != picture(8).sha256
    flat = np.zeros((2, 6, 3), np.uint8)
    assert Image(flat).sha256 != Image(flat.reshape(3, 4, 3)).sha256
    turned = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    assert Image(turned).sha256 == Image(np.ascontiguousarray(turned)).sha256


def test_boxes_have_area_and_undo_has_steps():
    for corners in ((5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9)):
        with pytest.raises(ConfigError, match="no area"):
            Box(*corners, "disc")
    for steps in (0, -1):
        with pytest.raises(ConfigError, match="1 or more"):
            Undo(steps)


def test_values_cannot_be_changed():
    for value, name in ((Click(1, 2, True, "a"), "x"), (Reply(), "thought"), (picture(), "source")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 3)


def test_queries_are_stripped_and_bounded():
    assert check_query("  the disc \n") == "the disc"
    assert check_query("x" * MAX_QUERY_CHARS)
    for query in ("", " \n\t", "x" * (MAX_QUERY_CHARS + 1), "x" * 10_000):
        with pytest.raises(ConfigError, match="query"):
            check_query(query)


def test_a_case_checks_its_query_and_masks():
    assert Case("id", picture(), "disc", {"disc": mask()}, {"disc": mask(0)}).start
    with pytest.raises(ConfigError, match="empty"):
        Case("id", picture(), " ")
    for wrong in (mask().T, mask().astype(np.uint8)):
        with pytest.raises(DataError, match="case id: mask 'disc'"):
            Case("id", picture(), "disc", {"disc": wrong})
        with pytest.raises(DataError, match="case id, start: mask 'disc'"):
            Case("id", picture(), "disc", start={"disc": wrong})
    with pytest.raises(DataError, match="at most 8"):
        Case("id", picture(), "organs", {str(number): mask() for number in range(MAX_TARGETS + 1)})


def test_cases_and_observations_can_be_copied_and_sent_to_other_processes():
    case = Case("id", picture(), "disc")
    for twin in (copy.deepcopy(case), pickle.loads(pickle.dumps(case))):
        assert twin.image.sha256 == case.image.sha256
    seen = Observation("id", picture(), "disc", turns=(turn(Click(1, 2, True, "a"), Stop("x", ("y",))),))
    assert pickle.loads(pickle.dumps(seen)).turns[0].reply == seen.turns[0].reply


def test_a_reply_knows_its_stop():
    stop = Stop("done", ("spleen",))
    assert Reply("", (Click(1, 2, True, "a"), stop)).stop == stop
    assert Reply("", (Undo(),)).stop is None


def test_an_episode_knows_its_end():
    first, last = {"disc": mask(1)}, {"disc": mask(2)}
    whole = episode(
        turn(Click(1, 2, True, "a"), Box(0, 0, 3, 3, "a"), after=first), turn(Undo(), Stop("done"), after=last)
    )
    assert whole.masks is last
    assert whole.answer == Stop("done")
    assert whole.clicks == 2
    empty = episode(start=first)
    assert empty.masks is first
    assert empty.answer == Stop()
    assert empty.clicks == 0
    assert episode(turn(Undo())).answer == Stop()


def test_the_mask_that_the_segmenter_liked_best_can_be_kept():
    small, large = mask(2), mask(5)
    turns = [
        Turn(Completion("a"), Reply(), {}, {"disc": small, "cup": small}, 0.9),
        Turn(Completion("b"), Reply(), {"disc": small, "cup": small}, {"disc": large, "cup": mask(2)}, 0.4),
        Turn(Completion("c"), Reply(), {"disc": large, "cup": small}, {"disc": large, "cup": small}, None),
    ]
    whole = episode(*turns)
    assert whole.kept("last") is whole.masks
    assert {name: int(best[0].sum()) for name, best in whole.kept("best").items()} == {"disc": 2, "cup": 2}
    assert np.array_equal(episode(*turns[1:]).kept("best")["disc"], large)
    start = {"disc": large}
    assert episode(start=start).kept("best") == start


def test_kept_prompts_are_those_that_no_undo_took_back():
    a, b, c, d = (Click(column, 0, True, "disc") for column in range(4))
    box = Box(0, 0, 2, 2, "cup")
    turns = (turn(a, b), turn(Undo()), turn(box, c), turn(Undo(2), d), turn(Stop()))
    assert kept_prompts(turns) == [a, d]
    assert kept_prompts((turn(a), turn(Undo(99)), turn(b))) == [b]
    assert kept_prompts(()) == []


def test_union_takes_missing_names_as_empty():
    masks = {"a": mask(2), "b": mask(5)}
    assert np.array_equal(union(masks, ["a", "b", "c"], SIZE), mask(5))
    assert not union(masks, ["c"], SIZE).any()
    assert union(masks, ["a"], SIZE) is not masks["a"]


def test_errors_are_caught_by_one_name_and_by_their_kind():
    for kind, builtin in (
        (DataError, ValueError),
        (ConfigError, ValueError),
        (SegmenterError, RuntimeError),
        (PolicyError, RuntimeError),
    ):
        assert issubclass(kind, IbisError)
        assert issubclass(kind, builtin)
