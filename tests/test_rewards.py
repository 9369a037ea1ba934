"""Every reward term on hand-made episodes, whose masks are drawn so that the right value can be told by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ibisagent.domain import Action, Box, Case, Click, Completion, Episode, Image, Mask, Masks, Reply, Stop, Turn, Undo
from ibisagent.errors import ConfigError, DataError
from ibisagent.rewards import (
    PAPER,
    RewardWeights,
    border_progress_score,
    box_iou,
    length_score,
    match_names,
    predicted_quality_score,
    score,
    turns_score,
    weights_of,
)
from ibisagent.training.finetune.recipes import RlRecipe

RECIPES = Path(__file__).parent.parent / "recipes"
SIZE = (40, 60)
IMAGE = Image(np.zeros((*SIZE, 3), dtype=np.uint8))


def area(x0: int, y0: int, x1: int, y1: int) -> Mask:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


SPLEEN = area(10, 10, 30, 30)  # 400 pixels
LIVER = area(40, 10, 50, 20)
NONE = np.zeros(SIZE, dtype=bool)


def share(part: float) -> Mask:
    """The left part of the spleen: its IoU with the whole is `part`."""
    return area(10, 10, 10 + round(20 * part), 30)


def case(targets: Masks | None = None, answer: str | None = None) -> Case:
    return Case(
        "id",
        IMAGE,
        "Segment the spleen.",
        {"spleen": SPLEEN} if targets is None and answer is None else targets,
        answer=answer,
    )


def play(*steps: tuple[tuple[Action, ...] | str, Masks], start: Masks | None = None) -> Episode:
    """An episode of (actions or what is wrong with the reply, masks after it)."""
    masks = start or {}
    turns = []
    for actions, after in steps:
        reply = Reply(problem=actions) if isinstance(actions, str) else Reply("", actions)
        turns.append(Turn(Completion(""), reply, masks, after))
        masks = after
    stop = "stopped" if turns and turns[-1].reply.stop else "max_turns"
    return Episode("id", "Segment the spleen.", SIZE, "", "", start or {}, tuple(turns), stop, {})


def click(x: int, y: int, positive: bool = True, target: str = "spleen") -> tuple[Click]:
    return (Click(x, y, positive, target),)


STOP = (Stop("Done."),)


def test_the_papers_maximum() -> None:
    whole = {"spleen": SPLEEN}
    result = score(play((click(15, 15), whole), (STOP, whole)), case())
    assert (result.answer, result.format, result.click, result.progress, result.length) == (3, 1, 1, 1, 1)
    assert result.total == pytest.approx(1.4)
    assert result.iou == 1


@pytest.mark.parametrize(("part", "value"), [(0.5, 0), (0.55, 1), (0.7, 1), (0.75, 2), (0.8, 2), (0.85, 3), (1.0, 3)])
def test_answer_follows_the_iou_in_steps(part: float, value: float) -> None:
    masks = {"spleen": share(part)}
    assert score(play((click(15, 15), masks), (STOP, masks)), case()).answer == value


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (click(25, 15), 1),  # positive in the missed part
        (click(15, 15), -1),  # positive in the part already found
        (click(35, 15), -1),  # positive in the leak
        (click(35, 15, False), 1),  # negative in the leak
        (click(25, 15, False), -1),  # negative in the missed part
        (click(5, 35, False), -1),  # negative where nothing is wrong
        (click(25, 15, True, "liver"), 1),  # the one wrong name can only mean the one target
    ],
)
def test_click_is_judged_by_the_masks_before_it(at: tuple[Click], value: float) -> None:
    before = {at[0].target: share(0.5) | area(32, 10, 38, 20)}
    result = score(play((at, before), (STOP, before), start=before), case())
    assert result.click == value
    assert result.turns[0].clicks == (value,)


def test_clicks_are_averaged_over_the_episode() -> None:
    half, whole = {"spleen": share(0.5)}, {"spleen": SPLEEN}
    steps = play((click(15, 15), half), (click(12, 12), half), ((*click(25, 15), *click(26, 20)), whole), (STOP, whole))
    result = score(steps, case())
    assert [turn.clicks for turn in result.turns] == [(1,), (-1,), (1, 1), ()]
    assert result.click == pytest.approx(0.5)
    assert [turn.progress for turn in result.turns] == [1, 0, 1, None]
    assert result.progress == pytest.approx(2 / 3)


@pytest.mark.parametrize(("box", "value"), [((20, 10, 30, 30), 1), ((21, 10, 30, 26), 1), ((10, 10, 30, 29), -1)])
def test_box_is_judged_by_the_box_of_the_missed_region(box: tuple[int, int, int, int], value: float) -> None:
    half = {"spleen": share(0.5)}
    assert score(play(((Box(*box, "spleen"),), half), (STOP, half), start=half), case()).click == value


def test_undo_is_a_step_without_click() -> None:
    good, bad = {"spleen": share(0.9)}, {"spleen": share(0.3)}
    result = score(play((click(15, 15), good), (click(35, 35), bad), ((Undo(),), good), (STOP, good)), case())
    assert [turn.progress for turn in result.turns] == [1, 0, 1, None]
    assert result.click == 0


def test_clicks_beside_an_undo_are_judged_by_what_it_restores() -> None:
    good, bad, whole = {"spleen": share(0.5)}, {"spleen": share(0.5) | area(25, 10, 40, 30)}, {"spleen": SPLEEN}
    begin = ((click(15, 15), good), (click(35, 35), bad))
    again = score(play(*begin, ((Undo(), *click(28, 15)), whole), (STOP, whole)), case())
    assert again.turns[2].clicks == (1,)  # in the leak of `bad`, but missing from `good`
    beside = score(play(*begin, ((Undo(), *click(28, 15, False)), good), (STOP, good)), case())
    assert beside.turns[2].clicks == (-1,)
    from_start = score(play(*begin, ((Undo(2), *click(12, 15)), whole), (STOP, whole)), case())
    assert from_start.turns[2].clicks == (1,)
    own = score(play(*begin, ((*click(35, 15, False), Undo(1), *click(35, 15, False)), good), (STOP, good)), case())
    assert own.turns[2].clicks == (1, 1)  # it takes back its own click only, so `bad` stays


def test_an_undo_of_half_a_turn_is_judged_by_the_masks_before_it() -> None:
    half, leaky = {"spleen": share(0.5)}, {"spleen": share(0.5) | area(32, 10, 38, 20)}
    two = ((*click(15, 15), *click(35, 15)), leaky)
    result = score(play(two, ((Undo(1), *click(35, 12, False)), half), (STOP, half)), case())
    assert result.turns[1].clicks == (1,)


def test_what_follows_a_stop_counts_for_nothing() -> None:
    whole = {"spleen": SPLEEN}
    result = score(play((click(15, 15), whole), ((*STOP, *click(50, 35)), whole)), case())
    assert result.total == pytest.approx(1.4)


def test_segmenting_without_any_click_costs() -> None:
    result = score(play((STOP, {})), case())
    assert (result.answer, result.format, result.click, result.progress, result.length) == (0, 1, -1, 0, 1)


def test_a_bad_click_is_not_worse_than_none() -> None:
    bad = {"spleen": area(0, 0, 5, 5)}
    assert score(play((click(2, 2), bad), (STOP, bad)), case()).total >= score(play((STOP, {})), case()).total


def test_malformed_turns_cost_the_format_and_are_steps() -> None:
    whole = {"spleen": SPLEEN}
    result = score(play(("no action", {}), (click(15, 15), whole), (STOP, whole)), case())
    assert result.format == 0
    assert result.progress == 0.5
    assert [turn.well_formed for turn in result.turns] == [False, True, True]


def test_length_counts_steps_not_the_stop() -> None:
    assert [length_score(steps) for steps in (0, 5, 6, 8)] == pytest.approx([1, 1, -0.2, -0.6])
    masks = [{"spleen": share(n / 6)} for n in range(1, 7)]
    five = play(*((click(29, 29), after) for after in masks[:5]), (STOP, masks[4]))
    six = play(*((click(29, 29), after) for after in masks), (STOP, masks[5]))
    assert score(five, case()).length == 1
    assert score(six, case()).length == pytest.approx(-0.2)


def test_an_absent_object_is_to_be_called_absent() -> None:
    absent = case({"spleen": NONE})
    named = (Stop("No spleen here.", ("Spleen",)),)
    right = score(play((named, {})), absent)
    assert right.total == pytest.approx(1.4)
    assert score(play((STOP, {})), absent).answer == 0  # it did not say so
    masks = {"spleen": area(0, 0, 9, 9)}
    clicked = score(play((click(4, 4), masks), (named, masks)), absent)
    assert (clicked.answer, clicked.click, clicked.progress) == (0, -1, 0)
    taken_back = score(play((click(4, 4), masks), ((Undo(),), {}), (named, {})), absent)
    assert (taken_back.answer, taken_back.click, taken_back.progress) == (3, -1, 0.5)
    whole = {"spleen": SPLEEN}
    assert score(play((click(15, 15), whole), (named, whole)), case()).answer == 0  # it is there


def test_a_given_mask_that_is_right_needs_no_click() -> None:
    fits, poor = {"spleen": share(0.9)}, {"spleen": share(0.7)}
    assert score(play((STOP, fits), start=fits), case()).total == pytest.approx(1.4)
    stopped = score(play((STOP, poor), start=poor), case())
    assert (stopped.answer, stopped.click, stopped.progress) == (1, -1, 0)
    both = case({"spleen": SPLEEN, "liver": LIVER})
    assert score(play((STOP, fits), start=fits), both).click == -1  # the liver is still missing


def test_a_given_mask_of_what_is_absent_is_to_be_taken_away() -> None:
    absent, unrelated = case({"spleen": NONE}), {"spleen": LIVER}
    named = (Stop("No spleen here.", ("spleen",)),)
    kept = score(play((named, unrelated), start=unrelated), absent)
    assert (kept.answer, kept.click, kept.progress) == (0, -1, 0)
    removed = score(play((click(45, 15, False), {"spleen": NONE}), (named, {"spleen": NONE}), start=unrelated), absent)
    assert removed.total == pytest.approx(1.4)


def test_every_target_counts() -> None:
    both = case({"spleen": SPLEEN, "liver": LIVER})
    one = {"spleen": SPLEEN}
    two = {**one, "liver": LIVER}
    result = score(play((click(15, 15), one), (click(45, 15, target="liver"), two), (STOP, two)), both)
    assert result.total == pytest.approx(1.4)
    missing = score(play((click(15, 15), one), (STOP, one)), both)
    assert (missing.answer, missing.iou) == (1.5, 0.5)
    swapped = {"spleen": LIVER, "liver": SPLEEN}
    assert score(play((click(15, 15), swapped), (STOP, swapped)), both).answer == 0
    mixed = case({"spleen": SPLEEN, "kidney": NONE})
    stop = (Stop("", ("kidney",)),)
    assert score(play((click(15, 15), one), (stop, one)), mixed).total == pytest.approx(1.4)


def test_objects_that_nobody_asked_for() -> None:
    extra = {"spleen": SPLEEN, "liver": LIVER}
    result = score(play(((*click(15, 15), *click(45, 15, target="liver")), extra), (STOP, extra)), case())
    assert result.answer == 1.5
    assert result.click == 0
    assert score(play((click(15, 15), {"spleen": SPLEEN, "liver": NONE})), case()).answer == 3


def test_closed_questions() -> None:
    question = case(answer="Yes, left lung")
    right = score(play(((Stop(" yes,  LEFT lung. "),), {})), question)
    assert (right.answer, right.total) == (1, pytest.approx(1.0))
    assert score(play(((Stop("no"),), {})), question).answer == 0
    masks = {"lung": SPLEEN}
    clicked = score(play((click(15, 15, target="lung"), masks), ((Stop("Yes, left lung"),), masks)), question)
    assert (clicked.answer, clicked.click, clicked.progress) == (1, -1, 0)


def test_weights_and_constants() -> None:
    whole = {"spleen": SPLEEN}
    episode = play((click(15, 15), whole), (STOP, whole))
    assert score(episode, case(), RewardWeights(answer=0, length=2)).total == pytest.approx(1.0)
    assert score(episode, case(), RewardWeights(optimal_turns=0, turn_cost=0.5)).length == -0.5


def test_the_other_terms_are_off_until_they_are_weighed() -> None:
    whole = {"spleen": SPLEEN}
    episode = play((click(15, 15), whole), (STOP, whole))
    assert score(episode, case()).terms.keys() == {"answer", "format", "click", "progress", "length"}
    result = score(episode, case(), RewardWeights(border_progress=1, predicted_quality=2, turns=0.5))
    assert result.more == {"border_progress": 1, "predicted_quality": 0, "turns": -1}
    assert result.total == pytest.approx(1.4 + (1 + 0 - 0.5) / 5)
    assert result.turns[-1].border_progress is None
    assert score(play((STOP, whole), start=whole), case(), RewardWeights(border_progress=1)).total == pytest.approx(1.6)


def test_border_progress_does_not_see_the_border() -> None:
    def step(before: Mask, after: Mask, ground_truth: Mask = SPLEEN, pixels: int = 2) -> float:
        turn = Turn(Completion(""), Reply("", click(15, 15)), {"spleen": before}, {"spleen": after})
        return border_progress_score(
            turn, {"spleen": ground_truth}, {"spleen": "spleen"}, RewardWeights(border_pixels=pixels)
        )

    inner = area(11, 11, 29, 29)
    assert step(NONE, share(0.5)) == 1
    assert step(share(0.5), inner) == 1
    assert step(inner, SPLEEN) == 0  # one pixel all around
    assert step(area(6, 6, 34, 34), inner) == 1  # four pixels
    assert step(area(8, 8, 32, 32), inner) == 1  # only the corners, which are farther than two pixels
    assert step(SPLEEN | area(40, 10, 45, 20), SPLEEN) == 1  # a leak far away
    thin = area(10, 10, 50, 12)
    assert step(area(10, 10, 30, 12), thin, thin) == 1  # nothing would be left of it, so all of it counts
    edge = area(0, 0, 20, 20)
    assert step(area(2, 0, 20, 20), edge, edge) == 1  # the image's edge is no border


def test_predicted_quality_is_the_sum_of_what_the_steps_gained() -> None:
    def quality(*steps: tuple[float | None, Masks], start: Masks | None = None) -> float:
        before, turns = start or {}, []
        for value, after in steps:
            turns.append(Turn(Completion(""), Reply("", click(1, 1)), before, after, value))
            before = after
        return predicted_quality_score(turns)

    half, whole = {"spleen": share(0.5)}, {"spleen": SPLEEN}
    assert quality() == 0
    assert quality((0.4, half), (0.9, whole)) == 0.9
    assert quality((0.9, whole), (0.4, half), (None, half)) == 0.4
    assert quality((0.9, whole), (None, {})) == 0
    assert quality((0.9, whole), (None, half), start=half) == 0  # an Undo back to the given mask, which has no estimate
    assert quality((0.8, whole), (0.4, {**whole, "liver": LIVER})) == pytest.approx(0.6)
    assert quality((0.8, whole), (0.4, {**whole, "liver": LIVER}), (None, whole)) == 0.8


def test_turns_cost_from_the_first_on() -> None:
    assert [turns_score(steps) for steps in (0, 1, 4)] == [0, -1, -4]


def test_weights_come_from_the_table_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "rl.toml"
    path.write_text("[rewards]\nclick = 0\nturns = 0.1\nanswer_steps = [[0.9, 3], [0.5, 1]]\n")
    expected = RewardWeights(click=0, turns=0.1, answer_steps=((0.9, 3.0), (0.5, 1.0)))
    assert RlRecipe.read_one(path, "rewards") == expected
    assert list(expected.terms) == ["answer", "format", "progress", "length", "turns"]
    path.write_text("max_turns = 7\n")
    assert RlRecipe.read_one(path, "rewards") == PAPER
    for text, message in (
        ("[rewards]\nclik = 0", r"rewards\.clik: there is no such setting"),
        ("[reward]\nclick = 0", "reward: there is no such setting"),
        ("[rewards]\n[other]\nx = 1", "other: there is no such setting"),
        ("[rewards]\nclick = 'much'", r"rewards\.click"),
        ("[rewards]\nborder_pixels = 0", "border_pixels is 0"),
        ("[rewards]\nanswer_steps = []", "answer_steps is empty"),
        ("rewards = 1", "rewards: .*dictionary"),
        ("max_turns = 'many'", "max_turns"),
        ("rewards = ", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            RlRecipe.read_one(path, "rewards")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        RlRecipe.read_one(tmp_path / "none.toml", "rewards")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("rl-*.toml")), ids=lambda path: path.name)
def test_a_run_and_its_check_read_the_same_weights(path: Path) -> None:
    assert RlRecipe.read_one(path, "rewards") == RlRecipe.read(path).rewards
    assert (RlRecipe.read(path).rewards.length == 0) == (path.name == "rl-nano.toml")


def test_weights_of_a_table() -> None:
    assert weights_of({}, "here") == PAPER
    assert weights_of({"click": 0}, "here") == RewardWeights(click=0)
    with pytest.raises(ConfigError, match=r"here: rewards\.clik: there is no such setting"):
        weights_of({"clik": 0}, "here")


def test_every_term_varies() -> None:
    """No term is a constant: each differs between a good and a bad episode."""
    whole, bad = {"spleen": SPLEEN}, {"spleen": area(0, 0, 3, 3)}
    good = score(play((click(15, 15), whole), (STOP, whole)), case())
    poor = score(play(("what?", {}), *[(click(1, 1), bad)] * 7, (STOP, bad)), case())
    for term in ("answer", "format", "click", "progress", "length", "total"):
        assert getattr(good, term) > getattr(poor, term)


def test_cases_that_cannot_score() -> None:
    with pytest.raises(DataError, match="pair them by id"):
        score(play((STOP, {})), Case("other", IMAGE, "the spleen", {"spleen": SPLEEN}))
    with pytest.raises(DataError, match="has no ground truth"):
        score(play((STOP, {})), Case("id", IMAGE, "the spleen"))


def test_box_iou() -> None:
    a = Box(0, 0, 4, 4, "")
    assert box_iou(a, Box(2, 0, 6, 4, "")) == pytest.approx(8 / 24)
    assert box_iou(a, Box(4, 0, 8, 4, "")) == 0
    assert box_iou(a, a) == 1


def test_names_of_answers_meet_those_of_targets() -> None:
    assert match_names(["Left  Lung.", "liver"], ["left lung", "liver", "spleen"]) == {
        "Left  Lung.": "left lung",
        "liver": "liver",
    }
    assert match_names(["disc"], ["optic disc"]) == {"disc": "optic disc"}
    assert match_names(["disc", "cup"], ["optic disc", "optic cup"]) == {}
    assert match_names(["disc", "optic disc"], ["optic disc"]) == {"optic disc": "optic disc"}
    assert match_names([], ["spleen"]) == {}
