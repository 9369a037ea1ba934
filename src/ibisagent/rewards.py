"""The paper's reward of an episode (section 3.3): five pure functions of the recorded turns and their weighted sum.

Nothing here calls a model: every turn holds its masks. Where the paper's definitions leave a multi-turn episode open,
or leave it a hole, the rules are:

- A *step* is a turn that does more than stop. S_pseg is averaged over the steps, S_click over the clicks.
- No step, or no click: the score is 1 where nothing was to be done (absent objects, questions answered as text, a
  start mask that already earns the best S_ans), else clicks score -1. (With 0, as in the paper, a weak policy learns
  never to click.)
- Absent objects: S_ans is 3 for a Stop that names the object absent while its mask is empty, else 0; the same Stop on
  an object that is there scores 0. Clicks on absent or not asked-for objects are misses, but for negative ones that
  take away a mask that they were given.
- S_ans and IoU judge what the episode hands out (`Episode.answer_masks`), all else judges the masks turn by turn.
- Multiple targets: S_ans and IoU are averaged over the targets and every other object that was given a mask, whose
  ground truth is empty.
- A box counts as a click: +1 if its IoU with the box around the missed region is at least `box_iou`, else -1.
- An Undo is a step, no click: its S_pseg is 1 if it raises the IoU. Clicks of the same reply are judged by the masks
  that the Undo restores, as those are what they correct.

Three more terms are off unless they are given a weight; they are not the paper's (docs/reference/rewards.md):

- `border_progress`: S_pseg that does not see what happens within a few pixels of the true border.
- `predicted_quality`: what the segmenter itself thinks that the steps have gained; needs no ground truth.
- `turns`: a price for every step, from the first on.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import cv2
import numpy as np
from pydantic import ValidationError

from ibisagent.config import Recipe, first_fault
from ibisagent.domain import (
    Box,
    Case,
    Click,
    Episode,
    Mask,
    Masks,
    Prompt,
    Stop,
    Turn,
    Undo,
    stand_after,
    standing_by_turn,
)
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.clicks import bounding_box
from ibisagent.imaging.masks import iou

PAPER_TERMS = ("answer", "format", "click", "progress", "length")
MORE_TERMS = ("border_progress", "predicted_quality", "turns")


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """Weights of the terms and their constants; the defaults are the paper's, where T_opt is the released code's.

    The total is the weighted sum divided by 5, so at most 1.4 by default. turn_cost: of S_len, for each step beyond
    `optimal_turns`. border_pixels: how far from the true border `border_progress` looks away.
    """

    answer: float = 1.0
    format: float = 1.0
    click: float = 1.0
    progress: float = 1.0
    length: float = 1.0
    answer_steps: tuple[tuple[float, float], ...] = ((0.80, 3.0), (0.70, 2.0), (0.50, 1.0))  # (IoU above, S_ans)
    optimal_turns: int = 5
    turn_cost: float = 0.2
    box_iou: float = 0.5
    border_progress: float = 0.0
    predicted_quality: float = 0.0
    turns: float = 0.0
    border_pixels: int = 2

    def __post_init__(self) -> None:
        if not self.answer_steps:
            raise ConfigError("answer_steps is empty: give pairs of an IoU and the S_ans above it, the best one first")
        if self.border_pixels < 1:
            raise ConfigError(f"border_pixels is {self.border_pixels}: give 1 or more")

    @property
    def terms(self) -> dict[str, float]:
        """The terms that count and their weights."""
        return {name: weight for name in PAPER_TERMS + MORE_TERMS if (weight := getattr(self, name))}


PAPER = RewardWeights()


class _Table(Recipe):
    rewards: RewardWeights


def weights_of(table: object, where: str) -> RewardWeights:
    """The weights in a table `rewards` of settings from `where`, {} for the paper's. ConfigError for any other."""
    try:
        return _Table.model_validate({"rewards": table}).rewards
    except ValidationError as error:
        raise first_fault(error, where) from error


@dataclass(frozen=True, slots=True)
class TurnScore:
    """One turn's part: S_click of each of its clicks and boxes, S_pseg (None for a turn that only stops).

    border_progress: as `progress`; None too where that term is off.
    """

    well_formed: bool
    clicks: tuple[float, ...]
    progress: float | None
    border_progress: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The terms S_ans, S_format, S_click, S_pseg (`progress`), S_len of an episode, their total, every turn's part.

    iou: mean IoU of the answer's masks over the targets and every other object with a mask; 1 if there are neither.
    more: the terms that are not the paper's, of those that are on.
    """

    answer: float
    format: float
    click: float
    progress: float
    length: float
    total: float
    iou: float
    turns: tuple[TurnScore, ...]
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, float]:
        """Every term by name, without the total."""
        return {name: getattr(self, name) for name in PAPER_TERMS} | dict(self.more)


def score(episode: Episode, case: Case, weights: RewardWeights = PAPER) -> Score:
    """The reward of `episode`, judged by the ground truth of its `case`.

    DataError if the case is another one, or has neither targets nor an answer.
    """
    if episode.case_id != case.id:
        raise DataError(f"episode of case {episode.case_id} cannot be scored by case {case.id}; pair them by id")
    if not case.targets and case.answer is None:
        raise DataError(f"case {case.id}: has no ground truth to score by; give it targets or an answer")
    targets = case.targets or {}
    names = match_names(_names(episode), targets)
    built_on = [_built_on(episode, number) for number in range(len(episode.turns))]
    turns = tuple(
        _turn_score(turn, before, targets, names, weights) for turn, before in zip(episode.turns, built_on, strict=True)
    )
    clicks = [value for turn in turns for value in turn.clicks]
    progress = [turn.progress for turn in turns if turn.progress is not None]
    done = nothing_to_do(episode.start, targets, names, weights)
    terms = {
        "answer": answer_score(episode, case, names, weights),
        "format": float(bool(turns) and all(turn.well_formed for turn in turns)),
        "click": float(np.mean(clicks)) if clicks else 1.0 if done else -1.0,
        "progress": float(np.mean(progress)) if progress else float(done),
        "length": length_score(len(progress), weights),
    }
    more: dict[str, float] = {}
    if weights.border_progress:
        seen = [turn.border_progress for turn in turns if turn.border_progress is not None]
        more["border_progress"] = float(np.mean(seen)) if seen else float(done)
    if weights.predicted_quality:
        more["predicted_quality"] = predicted_quality_score(episode.turns)
    if weights.turns:
        more["turns"] = turns_score(len(progress))
    total = sum(weight * {**terms, **more}[name] for name, weight in weights.terms.items()) / 5
    return Score(**terms, total=total, iou=_agreement(episode.answer_masks, targets, names), turns=turns, more=more)


def answer_score(episode: Episode, case: Case, names: Mapping[str, str], weights: RewardWeights = PAPER) -> float:
    """S_ans in [0, 3]: by IoU for segmentation (mean over targets), exact match (0 or 1) for a closed question.

    names: ground truth's name of every name that the episode uses (see `match_names`).
    """
    if not case.targets:
        return float(_plain(episode.answer.answer) == _plain(case.answer or ""))
    masks, extra = _by_ground_truth(episode.answer_masks, names)
    called_absent = {names[said] for said in episode.answer.absent if said in names}
    values = [0.0] * len(extra)
    for name, ground_truth in case.targets.items():
        mask = masks.get(name)
        if not ground_truth.any():
            right = name in called_absent and (mask is None or not mask.any())
            values.append(weights.answer_steps[0][1] if right else 0.0)
        elif mask is None or name in called_absent:
            values.append(0.0)
        else:
            reached = iou(mask, ground_truth)
            values.append(next((value for limit, value in weights.answer_steps if reached > limit), 0.0))
    return float(np.mean(values)) if values else 0.0


def click_score(
    prompt: Prompt, before: Masks, targets: Masks, names: Mapping[str, str], weights: RewardWeights = PAPER
) -> float:
    """S_click of one click or box on the masks `before` it: 1 if it corrects an error, else -1."""
    ground_truth = targets.get(names.get(prompt.target, ""))
    if ground_truth is None:
        return -1.0
    current, _ = _by_ground_truth(before, names)
    mask = current.get(names[prompt.target], np.zeros_like(ground_truth))
    missed, leaked = ground_truth & ~mask, mask & ~ground_truth
    if isinstance(prompt, Click):
        hit = bool((missed if prompt.positive else leaked)[prompt.y, prompt.x])
    else:
        wanted = bounding_box(missed, prompt.target)
        hit = wanted is not None and box_iou(prompt, wanted) >= weights.box_iou
    return 1.0 if hit else -1.0


def progress_score(turn: Turn, targets: Masks, names: Mapping[str, str]) -> float:
    """S_pseg of one step: 1 if the masks agree better with the ground truth after it than before, else 0."""
    return float(_agreement(turn.after, targets, names) > _agreement(turn.before, targets, names))


def length_score(steps: int, weights: RewardWeights = PAPER) -> float:
    """S_len: 1 up to `optimal_turns` steps, then minus `turn_cost` for each step beyond."""
    beyond = steps - weights.optimal_turns
    return 1.0 if beyond <= 0 else -weights.turn_cost * beyond


def border_progress_score(
    turn: Turn, targets: Masks, names: Mapping[str, str], weights: RewardWeights = PAPER
) -> float:
    """`progress_score` that leaves out the pixels within `border_pixels` of the border of each ground truth.

    So a step earns nothing by moving the border to and fro where people who draw it would not agree either.
    """
    edges = {name: _border(ground_truth, weights.border_pixels) for name, ground_truth in targets.items()}
    before, after = (_agreement(masks, targets, names, edges) for masks in (turn.before, turn.after))
    return float(after > before)


def predicted_quality_score(turns: Sequence[Turn]) -> float:
    """What the segmenter itself thinks the steps have gained: its estimate of the IoU at the end, in [0, 1].

    Each mask has the estimate of the last turn that changed it, a given one 0, and the mean over the masks is taken; 0
    without any. As the sum of all steps' gains it cannot be raised by going to and fro. It is as good as the
    segmenter's calibration.
    """
    quality: dict[str, float] = {}
    for turn in turns:
        quality = {
            name: quality.get(name, 0.0)
            if name in turn.before and np.array_equal(mask, turn.before[name])
            else turn.segmenter_score or 0.0
            for name, mask in turn.after.items()
        }
    return float(np.mean([*quality.values()])) if quality else 0.0


def turns_score(steps: int) -> float:
    """The price of an episode: -1 for each step, from the first on."""
    return -float(steps)


def nothing_to_do(start: Masks, targets: Masks, names: Mapping[str, str], weights: RewardWeights = PAPER) -> bool:
    """Whether an episode that begins with the masks `start` can end at once: each object has the IoU of the best S_ans.

    So it is for objects that are absent and have no mask, and for questions without any target.
    """
    return not targets or min(_ious(start, targets, names)) > weights.answer_steps[0][0]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    shared = max(0, width) * max(0, height)
    return shared / ((a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - shared)


def match_names(said: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """{name a policy used: name of the ground truth it means}; names without a partner are left out.

    Names agree when they are equal but for case, blanks and punctuation at the ends. If one ground truth and one said
    name are then left over, they belong together: a question need not tell the object's name.
    """
    said, targets = list(dict.fromkeys(said)), list(targets)
    by_plain = {_plain(target): target for target in targets}
    names = {name: by_plain[_plain(name)] for name in said if _plain(name) in by_plain}
    lonely_said = [name for name in said if name not in names]
    lonely_targets = [target for target in targets if target not in names.values()]
    if len(lonely_said) == 1 and len(lonely_targets) == 1:
        names[lonely_said[0]] = lonely_targets[0]
    return names


def _plain(text: str) -> str:
    """Text as compared: case, repeated blanks and surrounding punctuation do not count."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def _names(episode: Episode) -> list[str]:
    """Every object name that the episode gave a mask, a prompt or called absent."""
    prompted = [prompt.target for turn in episode.turns for prompt in turn.reply.prompts]
    return [*episode.start, *prompted, *episode.answer.absent]


def _is_step(turn: Turn) -> bool:
    return not turn.reply.actions or not isinstance(turn.reply.actions[0], Stop)


def _built_on(episode: Episode, number: int) -> Masks:
    """The masks that the clicks of turn `number` correct: those before it, or those to which its Undo leads back.

    The latter are found at the newest moment at which the same clicks stood. An Undo of a part of a turn leads to masks
    that were never seen on their own; then it is those before the turn.
    """
    turn, earlier = episode.turns[number], episode.turns[:number]
    done = list(takewhile(lambda action: not isinstance(action, Stop), turn.reply.actions))
    if any(isinstance(action, Undo) for action in done):
        before = standing_by_turn(earlier)
        restored = [one for one in stand_after(before, number, done) if one in before]
        for count in range(number, -1, -1):
            if [*standing_by_turn(earlier[:count])] == restored:
                return earlier[count - 1].after if count else episode.start
    return turn.before


def _by_ground_truth(masks: Masks, names: Mapping[str, str]) -> tuple[dict[str, Mask], list[Mask]]:
    """(masks by the ground truth's names, non-empty masks of objects that the ground truth does not know)."""
    known: dict[str, Mask] = {}
    extra = []
    for name, mask in masks.items():
        if name in names:
            known[names[name]] = known[names[name]] | mask if names[name] in known else mask
        elif mask.any():
            extra.append(mask)
    return known, extra


def _ious(masks: Masks, targets: Masks, names: Mapping[str, str], ignored: Masks | None = None) -> list[float]:
    """IoU of every target, and 0 for every other object that has a mask. ignored: pixels left out, by target."""
    known, extra = _by_ground_truth(masks, names)
    values = []
    for name, ground_truth in targets.items():
        mask = known.get(name, np.zeros_like(ground_truth))
        if ignored is not None:
            mask, ground_truth = mask & ~ignored[name], ground_truth & ~ignored[name]
        values.append(iou(mask, ground_truth))
    return values + [0.0] * len(extra)


def _agreement(masks: Masks, targets: Masks, names: Mapping[str, str], ignored: Masks | None = None) -> float:
    """Mean of `_ious`; 1 if there are no objects at all."""
    values = _ious(masks, targets, names, ignored)
    return float(np.mean(values)) if values else 1.0


def _border(ground_truth: Mask, pixels: int) -> Mask:
    """The pixels within `pixels` of the border of `ground_truth`, inside and outside; none if that is the whole of a
    thin one.

    The edge of the image is no border.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    drawn = ground_truth.astype(np.uint8)
    core = cv2.erode(drawn, disc).astype(bool)
    border: Mask = cv2.dilate(drawn, disc).astype(bool) & ~core
    return border if core.any() else np.zeros_like(ground_truth)


def _turn_score(
    turn: Turn, before: Masks, targets: Masks, names: Mapping[str, str], weights: RewardWeights
) -> TurnScore:
    """before: the masks that its clicks correct."""
    step = _is_step(turn)
    return TurnScore(
        turn.reply.problem is None,
        tuple(click_score(prompt, before, targets, names, weights) for prompt in turn.reply.prompts),
        progress_score(turn, targets, names) if step else None,
        border_progress_score(turn, targets, names, weights) if step and weights.border_progress else None,
    )
