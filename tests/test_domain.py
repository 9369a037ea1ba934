"""The vocabulary checks itself, and the small facts that episodes tell about themselves."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

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
    check_mask_selection,
    check_query,
    stand_after,
    standing,
    standing_by_turn,
    union,
)
from ibisagent.errors import ConfigError, DataError, IbisError, PolicyError, SegmenterError

SIZE = (61, 83)


def image(value=7):
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
    assert image().size == SIZE


def test_the_hash_tells_pixels_and_shapes_apart():
    assert image().sha256 == image().sha256
    assert image(7).sha256 != image(8).sha256
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
    for value, name in ((Click(1, 2, True, "a"), "x"), (Reply(), "thought"), (image(), "source")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 3)


def test_queries_are_stripped_and_bounded():
    assert check_query("  the disc \n") == "the disc"
    assert check_query("x" * MAX_QUERY_CHARS)
    for query in ("", " \n\t", "x" * (MAX_QUERY_CHARS + 1), "x" * 10_000):
        with pytest.raises(ConfigError, match="query"):
            check_query(query)


def test_a_case_checks_its_query_and_masks():
    assert Case("id", image(), "disc", {"disc": mask()}, {"disc": mask(0)}).start
    with pytest.raises(ConfigError, match="empty"):
        Case("id", image(), " ")
    for wrong in (mask().T, mask().astype(np.uint8)):
        with pytest.raises(DataError, match="case id: mask 'disc'"):
            Case("id", image(), "disc", {"disc": wrong})
        with pytest.raises(DataError, match="case id, start: mask 'disc'"):
            Case("id", image(), "disc", start={"disc": wrong})
    with pytest.raises(DataError, match="at most 8"):
        Case("id", image(), "organs", {str(number): mask() for number in range(MAX_TARGETS + 1)})


def test_cases_and_observations_can_be_copied_and_sent_to_other_processes():
    case = Case("id", image(), "disc")
    for twin in (copy.deepcopy(case), pickle.loads(pickle.dumps(case))):
        assert twin.image.sha256 == case.image.sha256
    seen = Observation("id", image(), "disc", turns=(turn(Click(1, 2, True, "a"), Stop("x", ("y",))),))
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


A, B, C, D = (Click(column, 0, True, "disc") for column in range(4))
CUP = Box(0, 0, 2, 2, "cup")


def played(*turns, start=None, selection="best", users=""):
    """An episode of turns (actions, widths of the masks after them by name, score)."""
    made, before = [], start or {}
    for actions, widths, score in turns:
        after = {name: mask(width) for name, width in widths.items()}
        made.append(Turn(Completion("x"), Reply("", actions), before, after, score))
        before = after
    return replace(episode(*made, start=start), mask_selection=selection, provenance={"people_turns": users})


def widths(masks):
    return {name: int(drawn[0].sum()) for name, drawn in masks.items()}


def test_the_answer_is_the_mask_that_the_segmenter_scored_best_or_the_last():
    turns = [
        ((A,), {"disc": 1}, 0.5),
        ((B,), {"disc": 2}, 0.9),
        ((C,), {"disc": 3}, 0.4),
        ((Stop(),), {"disc": 3}, None),
    ]
    whole = played(*turns)
    assert (widths(whole.answer_masks), whole.answer_score) == ({"disc": 2}, 0.9)
    last = played(*turns, selection="last")
    assert (widths(last.answer_masks), last.answer_score) == ({"disc": 3}, 0.4)
    assert widths(whole.masks) == {"disc": 3}
    equals = played(((A,), {"disc": 1}, 0.5), ((B,), {"disc": 2}, 0.5))
    assert widths(equals.answer_masks) == {"disc": 2}  # of two equals the later
    assert Episode("id", "?", SIZE, "", "", {}, (), "stopped", {}).mask_selection == "best"
    assert (episode().answer_masks, episode().answer_score) == ({}, None)


def test_a_mask_that_was_taken_back_is_never_the_answer():
    good, bad = ((A,), {"disc": 1}, 0.5), ((B,), {"disc": 2}, 0.9)
    undone = played(good, bad, ((Undo(),), {"disc": 1}, 0.5), ((C,), {"disc": 3}, 0.4))
    assert (widths(undone.answer_masks), undone.answer_score) == ({"disc": 1}, 0.5)
    in_one_reply = played(good, bad, ((Undo(), C), {"disc": 3}, 0.4))
    assert widths(in_one_reply.answer_masks) == {"disc": 1}
    partly = played(((A, B), {"disc": 2}, 0.9), ((Undo(),), {"disc": 1}, 0.3))
    assert (widths(partly.answer_masks), partly.answer_score) == ({"disc": 1}, 0.3)
    given_again = played(good, bad, ((Undo(),), {"disc": 1}, 0.5), ((B,), {"disc": 2}, 0.9), ((C,), {"disc": 3}, 0.4))
    assert widths(given_again.answer_masks) == {"disc": 2}
    everything = played(good, bad, ((Undo(9),), {}, None), ((Stop("", ("disc",)),), {}, None))
    assert (widths(everything.answer_masks), everything.answer_score) == ({"disc": 0}, None)


def test_a_start_mask_is_the_answer_where_nothing_else_stands():
    start = {"disc": mask(7)}
    assert episode(start=start).answer_masks == start
    undone = played(((A,), {"disc": 1}, 0.9), ((Undo(),), {"disc": 7}, None), start=start)
    assert widths(undone.answer_masks) == {"disc": 7}
    edited = played(((A,), {"disc": 1}, 0.2), ((Stop(),), {"disc": 1}, None), start=start)
    assert widths(edited.answer_masks) == {"disc": 1}
    other = played(
        ((CUP,), {"disc": 7, "cup": 2}, 0.9), ((Stop("", ("disc",)),), {"disc": 7, "cup": 2}, None), start=start
    )
    assert widths(other.answer_masks) == {"disc": 7, "cup": 2}  # called absent, but nobody took it away


def test_targets_are_chosen_apart():
    whole = played(
        ((A, CUP), {"disc": 1, "cup": 2}, 0.8),
        ((B,), {"disc": 2, "cup": 2}, 0.3),
        ((Undo(3),), {}, None),
        ((CUP,), {"cup": 2}, 0.7),
        ((A,), {"disc": 1, "cup": 2}, 0.6),
        ((C,), {"disc": 3, "cup": 2}, 0.1),
    )
    assert (widths(whole.answer_masks), whole.answer_score) == ({"disc": 1, "cup": 2}, pytest.approx(0.65))


def test_what_a_user_corrects_is_never_overruled_by_a_score():
    agent, user = [((A,), {"disc": 1}, 0.9), ((B,), {"disc": 2}, 0.5)], ((C,), {"disc": 3}, 0.1)
    assert widths(played(*agent, user, users="3").answer_masks) == {"disc": 3}
    later = ((D,), {"disc": 4}, 0.4)
    assert widths(played(*agent, user, later, users="3").answer_masks) == {"disc": 4}  # builds on the correction
    taken_back = ((Undo(),), {"disc": 2}, 0.5)
    assert widths(played(*agent, user, taken_back, users="3 4").answer_masks) == {"disc": 1}
    elsewhere = ((CUP,), {"disc": 2, "cup": 5}, 0.2)
    assert widths(played(*agent, elsewhere, users="3").answer_masks) == {"disc": 1, "cup": 5}
    assert widths(played(*agent, ((Stop(),), {"disc": 2}, None), users="3").answer_masks) == {"disc": 1}  # accepted


def test_standing_prompts_are_those_that_no_undo_took_back():
    turns = (turn(A, B), turn(Undo()), turn(CUP, C), turn(Undo(2), D), turn(Stop()))
    assert standing(turns) == [A, D]
    assert standing_by_turn(turns) == ((0, A), (3, D))
    assert standing((turn(A), turn(Undo(99)), turn(B))) == [B]
    assert standing(()) == []
    assert standing((turn(A), turn(A), turn(B, A, B))) == [A, B]  # what stands already says nothing new
    assert standing((turn(A), turn(B), turn(Undo(), A))) == [A]
    assert standing((turn(A, Stop(), B),)) == [A]


def test_an_undo_that_is_put_right_in_the_same_reply_changes_nothing():
    stand = standing_by_turn((turn(A), turn(B)))
    assert stand_after(stand, 2, (Undo(), B)) is stand
    assert stand_after(stand, 2, (A,)) is stand
    assert stand_after(stand, 2, (Undo(2), B, A)) == ((2, B), (2, A))


def test_undone_turns_are_those_of_which_nothing_stands():
    assert episode(turn(A), turn(B, C), turn(Undo()), turn(D), turn(Undo(2)), turn(Stop())).undone_turns == {1, 3}
    assert episode(turn(A), turn(A), turn(Undo(), A), turn(Stop())).undone_turns == set()  # only said again
    assert episode(turn(A, Undo()), turn(Stop(), B)).undone_turns == {0}


def test_mask_selections_are_two_words():
    assert [check_mask_selection(word) for word in ("best", "last")] == ["best", "last"]
    with pytest.raises(ConfigError, match="mask selection 'first': give best or last"):
        check_mask_selection("first")


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
