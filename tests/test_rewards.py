"""Every reward term on hand-made episodes, whose masks are drawn so that the right value can be told by eye."""

from __future__ import annotations

import numpy as np
import pytest

from ibisagent.domain import Action, Box, Case, Click, Completion, Episode, Image, Mask, Masks, Reply, Stop, Turn, Undo
from ibisagent.errors import DataError
from ibisagent.rewards import RewardWeights, box_iou, length_score, match_names, score

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


def test_absent_objects() -> None:
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


def test_several_targets() -> None:
    both = case({"spleen": SPLEEN, "liver": LIVER})
    one = {"spleen": SPLEEN}
    two = {**one, "liver": LIVER}
    result = score(play((click(15, 15), one), (click(45, 15, target="liver"), two), (STOP, two)), both)
    assert result.total == pytest.approx(1.4)
    assert score(play((click(15, 15), one), (STOP, one)), both).answer == 1.5
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


def test_every_term_varies() -> None:
    """No term is a constant: each differs between a good and a bad episode."""
    whole, bad = {"spleen": SPLEEN}, {"spleen": area(0, 0, 3, 3)}
    good = score(play((click(15, 15), whole), (STOP, whole)), case())
    poor = score(play(("what?", {}), *[(click(1, 1), bad)] * 7, (STOP, bad)), case())
    for term in ("answer", "format", "click", "progress", "length", "total"):
        assert getattr(good, term) > getattr(poor, term)


def test_cases_that_cannot_score() -> None:
    with pytest.raises(DataError, match="pair them by id"):
        score(play((STOP, {})), Case("other", IMAGE, "?", {"spleen": SPLEEN}))
    with pytest.raises(DataError, match="has no truth"):
        score(play((STOP, {})), Case("id", IMAGE, "?"))


def test_box_iou() -> None:
    a = Box(0, 0, 4, 4, "")
    assert box_iou(a, Box(2, 0, 6, 4, "")) == pytest.approx(8 / 24)
    assert box_iou(a, Box(4, 0, 8, 4, "")) == 0
    assert box_iou(a, a) == 1


def test_names() -> None:
    assert match_names(["Left  Lung.", "liver"], ["left lung", "liver", "spleen"]) == {
        "Left  Lung.": "left lung",
        "liver": "liver",
    }
    assert match_names(["disc"], ["optic disc"]) == {"disc": "optic disc"}
    assert match_names(["disc", "cup"], ["optic disc", "optic cup"]) == {}
    assert match_names(["disc", "optic disc"], ["optic disc"]) == {"optic disc": "optic disc"}
    assert match_names([], ["spleen"]) == {}
