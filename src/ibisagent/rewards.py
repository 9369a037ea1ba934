"""The paper's reward of an episode (section 3.3): five pure functions of the recorded turns and their weighted sum.

Nothing here calls a model: every turn holds its masks. Where the paper's definitions leave a multi-turn episode open,
or leave it a hole, the rules are:

- A *step* is a turn that does more than stop. S_pseg is averaged over the steps, S_click over the clicks.
- No step, or no click: the score is 1 where nothing is to be segmented (absent objects, questions answered in words),
  else clicks score -1. (With 0, as in the paper, a weak policy learns never to click.)
- Absent objects: S_ans is 3 for a Stop that names the object absent while its mask is empty, else 0; the same Stop on
  an object that is there scores 0. Clicks on absent or not asked-for objects are misses.
- Several targets: S_ans and IoU are averaged over the targets and every other object that was given a mask, whose
  truth is empty.
- A box counts as a click: +1 if its IoU with the box around the missed region is at least `box_iou`, else -1.
- An Undo is a step, no click: its S_pseg is 1 if it raises the IoU.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ibisagent.clicks import bounding_box
from ibisagent.domain import Box, Case, Click, Episode, Mask, Masks, Prompt, Stop, Turn
from ibisagent.errors import DataError
from ibisagent.masks import iou


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """Weights of the five terms and their constants; the defaults are the paper's, where T_opt is the released code's.

    The total is the weighted sum divided by 5, so at most 1.4 by default.
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


PAPER = RewardWeights()


@dataclass(frozen=True, slots=True)
class TurnScore:
    """One turn's part: S_click of each of its clicks and boxes, S_pseg (None for a turn that only stops)."""

    well_formed: bool
    clicks: tuple[float, ...]
    progress: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """The terms S_ans, S_format, S_click, S_pseg (`progress`), S_len of an episode, their total, every turn's part."""

    answer: float
    format: float
    click: float
    progress: float
    length: float
    total: float
    turns: tuple[TurnScore, ...]


def score(episode: Episode, case: Case, weights: RewardWeights = PAPER) -> Score:
    """The reward of `episode`, judged by the truth of its `case`.

    DataError if the case is another one, or has neither targets nor an answer.
    """
    if episode.case_id != case.id:
        raise DataError(f"episode of case {episode.case_id} cannot be scored by case {case.id}; pair them by id")
    if not case.targets and case.answer is None:
        raise DataError(f"case {case.id}: has no truth to score by; give it targets or an answer")
    targets = case.targets or {}
    names = match_names(_names(episode), targets)
    turns = tuple(_turn_score(turn, targets, names, weights) for turn in episode.turns)
    clicks = [value for turn in turns for value in turn.clicks]
    progress = [turn.progress for turn in turns if turn.progress is not None]
    nothing_to_find = not any(mask.any() for mask in targets.values())
    terms = {
        "answer": answer_score(episode, case, names, weights),
        "format": float(bool(turns) and all(turn.well_formed for turn in turns)),
        "click": float(np.mean(clicks)) if clicks else 1.0 if nothing_to_find else -1.0,
        "progress": float(np.mean(progress)) if progress else float(nothing_to_find),
        "length": length_score(len(progress), weights),
    }
    total = sum(getattr(weights, name) * value for name, value in terms.items()) / 5
    return Score(**terms, total=total, turns=turns)


def answer_score(episode: Episode, case: Case, names: Mapping[str, str], weights: RewardWeights = PAPER) -> float:
    """S_ans in [0, 3]: by IoU for segmentation (mean over targets), exact match (0 or 1) for a closed question.

    names: truth's name of every name that the episode uses (see `match_names`).
    """
    if not case.targets:
        return float(_plain(episode.answer.answer) == _plain(case.answer or ""))
    masks, extra = _by_truth(episode.masks, names)
    called_absent = {names[said] for said in episode.answer.absent if said in names}
    values = [0.0] * len(extra)
    for name, truth in case.targets.items():
        mask = masks.get(name)
        if not truth.any():
            right = name in called_absent and (mask is None or not mask.any())
            values.append(weights.answer_steps[0][1] if right else 0.0)
        elif mask is None or name in called_absent:
            values.append(0.0)
        else:
            reached = iou(mask, truth)
            values.append(next((value for limit, value in weights.answer_steps if reached > limit), 0.0))
    return float(np.mean(values)) if values else 0.0


def click_score(
    prompt: Prompt, before: Masks, targets: Masks, names: Mapping[str, str], weights: RewardWeights = PAPER
) -> float:
    """S_click of one click or box on the masks `before` it: 1 if it corrects an error, else -1."""
    truth = targets.get(names.get(prompt.target, ""))
    if truth is None:
        return -1.0
    current, _ = _by_truth(before, names)
    mask = current.get(names[prompt.target], np.zeros_like(truth))
    missed, leaked = truth & ~mask, mask & ~truth
    if isinstance(prompt, Click):
        hit = bool((missed if prompt.positive else leaked)[prompt.y, prompt.x])
    else:
        wanted = bounding_box(missed, prompt.target)
        hit = wanted is not None and box_iou(prompt, wanted) >= weights.box_iou
    return 1.0 if hit else -1.0


def progress_score(turn: Turn, targets: Masks, names: Mapping[str, str]) -> float:
    """S_pseg of one step: 1 if the masks agree better with the truth after it than before, else 0."""
    return float(_agreement(turn.after, targets, names) > _agreement(turn.before, targets, names))


def length_score(steps: int, weights: RewardWeights = PAPER) -> float:
    """S_len: 1 up to `optimal_turns` steps, then minus `turn_cost` for each step beyond."""
    beyond = steps - weights.optimal_turns
    return 1.0 if beyond <= 0 else -weights.turn_cost * beyond


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    shared = max(0, width) * max(0, height)
    return shared / ((a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - shared)


def match_names(said: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """{name a policy used: name of the truth it means}; names without a partner are left out.

    Names agree when they are equal but for case, blanks and punctuation at the ends. If one truth and one said name
    are then left over, they belong together: a question need not tell the object's name.
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
    prompted = [prompt.target for turn in episode.turns for prompt in _prompts(turn)]
    return [*episode.start, *prompted, *episode.answer.absent]


def _prompts(turn: Turn) -> list[Prompt]:
    return [action for action in turn.reply.actions if isinstance(action, Click | Box)]


def _is_step(turn: Turn) -> bool:
    return not turn.reply.actions or not isinstance(turn.reply.actions[0], Stop)


def _by_truth(masks: Masks, names: Mapping[str, str]) -> tuple[dict[str, Mask], list[Mask]]:
    """(masks by the truth's names, non-empty masks of objects that the truth does not know)."""
    known: dict[str, Mask] = {}
    extra = []
    for name, mask in masks.items():
        if name in names:
            known[names[name]] = known[names[name]] | mask if names[name] in known else mask
        elif mask.any():
            extra.append(mask)
    return known, extra


def _agreement(masks: Masks, targets: Masks, names: Mapping[str, str]) -> float:
    """Mean IoU over the targets and every other object that has a mask; 1 if there are neither."""
    known, extra = _by_truth(masks, names)
    values = [iou(known.get(name, np.zeros_like(truth)), truth) for name, truth in targets.items()]
    values += [0.0] * len(extra)
    return float(np.mean(values)) if values else 1.0


def _turn_score(turn: Turn, targets: Masks, names: Mapping[str, str], weights: RewardWeights) -> TurnScore:
    return TurnScore(
        turn.reply.problem is None,
        tuple(click_score(prompt, turn.before, targets, names, weights) for prompt in _prompts(turn)),
        progress_score(turn, targets, names) if _is_step(turn) else None,
    )
