"""Lessons in going on from what the policy itself would have done, for a second, shorter training of `ibis-nano`.

Its first turns are its own, seen through a part of the glance's channels, as it knows its training pictures by
heart but not those that it will be asked about. It sees its replies so far. A correction is taught only where its
own map of the object speaks for it, a click that did harm is undone where that map shows the harm, and everywhere else
it is taught to stop: what it cannot see it should not guess. Nor is a correction taught that gains nothing. First turns
are seen through the veil too, but what is absent is seen clearly: what looks unfamiliar is looked for, not denied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch

from ibisagent.clicks import next_click
from ibisagent.domain import Action, Box, Click, Mask, Reply, Undo
from ibisagent.masks import iou
from ibisagent.policies.nano import LOCATIONS
from ibisagent.protocol import Size, recap, target_of
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.training.click_states import spoilt
from ibisagent.training.lessons import CELL, LOOK_SIDE, TAKEN_BACK, VIEW, Example, Lessons, Pair, turned_features
from ibisagent.training.views import Bank

BLIND = 0.8  # most of the glance's channels that are hidden
SURE = 0.85  # share that a map must give a pixel, or leave it, to speak for a correction there
HARM = 0.01  # IoU that a click must have cost to be undone
GAIN = 0.02  # IoU that a correction must gain to be taught
BROUGHT, OWN = 0.2, 0.6
"""Shares of the masks that the user brought, and of the first turns that are the policy's own."""
FURTHER, WRONG, UNDONE = 0.8, 0.7, 0.2
"""Shares of the first turns that a click followed, of these clicks that were wrong, and that were undone."""

Believe = Callable[[Sequence[Example]], np.ndarray]


class OwnTurns(Lessons):
    """Draws examples whose later turns go on from the policy's own."""

    def __init__(
        self, pairs: Sequence[Pair], bank: Bank, segmenter: ClickNetwork, seed: int, *, believe: Believe
    ) -> None:
        """believe: where the policy takes the objects to be, (N, LOCATIONS, LOCATIONS) in [0, 1]."""
        super().__init__(pairs, bank, segmenter, seed)
        self._believe = believe

    def _veil(self, example: Example) -> None:
        """Hide a part of the glance's channels."""
        hidden = self._random.random(len(example.features)) < self._random.uniform(0, BLIND)
        example.features = np.where(hidden[:, None, None], 0, example.features)

    def _first_turn(self, example: Example, pair: Pair) -> None:
        self._veil(example)
        super()._first_turn(example, pair)

    def _later_turns(self, unseen: Sequence[tuple[Example, Pair]]) -> None:
        examples = [example for example, _ in unseen]
        planes, features = self._looks(examples), turned_features(examples)
        asked = []
        for example, pair in unseen:
            self._veil(example)
            kind, example.query, name = self._question(pair)
            asked.append((kind, name))
        first = self._believe(examples)
        prompts = [self._opening(*of) for of in zip(examples, first, strict=True)]
        begun, before = self._predict(planes, features, prompts), planes[:, 3].copy()
        further = [self._further(*of) for of in zip(examples, first, begun, prompts, strict=True)]
        clicked = self._predict(planes, features, [[*p, *f] for p, f in zip(prompts, further, strict=True)])

        harmed = []
        for number, (example, pair) in enumerate(unseen):
            given, clicks, (kind, name) = prompts[number], further[number], asked[number]
            assert example.truth is not None
            undone = bool(clicks) and self._random.random() < UNDONE
            stands = bool(clicks) and not undone
            harmed.append(stands and _did_harm(example.truth, first[number], begun[number], clicked[number]))
            if given:
                example.current = clicked[number] if stands else begun[number]
                example.query += "\n" + told(example.query, [given, clicks, [Undo()] if undone else []], VIEW)
            else:
                example.current = spoilt(example.truth, self._random)
                before[number] = cv2.resize(example.current.astype(np.float32), (LOOK_SIDE, LOOK_SIDE))
                self._show_as_brought(example, kind, name, pair)
            if stands:
                given += clicks
            else:
                planes[number, 3] = before[number]

        goals = self._goals(examples, planes, features, prompts)
        for example, goal, harm, (kind, name) in zip(examples, goals, harmed, asked, strict=True):
            if harm:
                example.answer(TAKEN_BACK, Undo())
            else:
                self._go_on(example, goal, kind, name)

    def _goals(
        self, examples: Sequence[Example], planes: np.ndarray, features: torch.Tensor, prompts: list[list[Click | Box]]
    ) -> list[Mask]:
        """What the masks are to become: what of the truths the policy is sure of, if a click towards it gains anything;
        else what they are. `planes` and `prompts` are those of the masks as they stand."""
        goals, beliefs = [], self._believe(examples)
        for example, belief, given in zip(examples, beliefs, prompts, strict=True):
            assert example.truth is not None
            goals.append(sure_part(example.truth, example.current, belief))
            if click := next_click(goals[-1], example.current, ""):
                given.append(click)
        corrected = self._predict(planes, features, prompts)
        return [
            goal if not e.current.any() or _gains(corrected_, e) else e.current
            for e, goal, corrected_ in zip(examples, goals, corrected, strict=True)
        ]

    def _opening(self, example: Example, belief: np.ndarray) -> list[Click | Box]:
        """The prompts of a first turn, the policy's own or an expert's imperfect ones; none for a mask that the user
        brought."""
        assert example.truth is not None
        dice = self._random.random()
        if dice < BROUGHT:
            return []
        if dice < BROUGHT + OWN and (belief > 0.5).any():
            return own_first_turn(belief)
        return [Click(*self._spot(example.truth), True, ""), self._loose_box(example.truth)]

    def _further(self, example: Example, belief: np.ndarray, mask: Mask, prompts: Sequence[Click | Box]) -> list[Click]:
        """One more click, a right one, or one against a part of the mask that is right and looks so; often none."""
        assert example.truth is not None
        if not prompts or self._random.random() >= FURTHER:
            return []
        if self._random.random() < WRONG:
            inside = cv2.resize(belief, VIEW, interpolation=cv2.INTER_LINEAR) > 0.5
            right = (mask == example.truth) & (mask == inside)
            if right.any():
                x, y = self._spot(right)
                return [Click(x, y, not mask[y, x], "")]
        click = next_click(example.truth, mask, "")
        return [click] if click else []


def told(query: str, said: Sequence[Sequence[Action]], size: Size) -> str:
    """What `render` says, after `query`, of the replies so far; `said`: their actions, without the target's name."""
    name = target_of(query)
    replies = [
        Reply("", tuple(replace(a, target=name) if isinstance(a, Click | Box) else a for a in actions))
        for actions in said
        if actions
    ]
    return recap(replies, size, dialect="ibis")


def own_first_turn(belief: np.ndarray) -> list[Click | Box]:
    """Click and box of a map (LOCATIONS, LOCATIONS): its peak, and around all that is above one half of it.

    ValueError where nothing is.
    """
    row, column = np.unravel_index(belief.argmax(), belief.shape)
    rows, columns = np.nonzero(belief > 0.5)
    x0, y0, x1, y1 = (int(n) * CELL for n in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    half = CELL // 2
    return [Click(int(column) * CELL + half, int(row) * CELL + half, True, ""), Box(x0, y0, x1, y1, "")]


def sure_part(truth: Mask, mask: Mask, belief: np.ndarray) -> Mask:
    """`truth` where `belief`, (LOCATIONS, LOCATIONS) in [0, 1], is SURE of it, or where there is no mask yet; elsewhere
    `mask`."""
    inside = cv2.resize(belief, VIEW, interpolation=cv2.INTER_LINEAR)
    sure = np.where(truth, inside, 1 - inside) >= SURE
    return np.where(sure | ~mask.any(), truth, mask)


def _gains(mask: Mask, example: Example) -> bool:
    assert example.truth is not None
    return iou(mask, example.truth) >= iou(example.current, example.truth) + GAIN


def _did_harm(truth: Mask, belief: np.ndarray, before: Mask, after: Mask) -> bool:
    """Whether `after` is worse than `before`, and looks so to a policy with this map of the object."""
    if iou(after, truth) > iou(before, truth) - HARM:
        return False
    small = [cv2.resize(m.astype(np.float32), (LOCATIONS,) * 2, interpolation=cv2.INTER_AREA) for m in (before, after)]
    expected_before, expected_after = (np.minimum(belief, m).sum() / np.maximum(belief, m).sum() for m in small)
    return bool(expected_after < expected_before - HARM)
