"""A curriculum of on-policy states, for a second, shorter training of `ibis-nano`.

Its first turns are its own, seen through a part of the backbone's channels, as it knows its training images by heart
but not those that it will be asked about. It sees its replies so far. What is right to do next is judged by its own map
of the object, of a pass without the mask, as a map made in sight of a mask follows it: a correction is taught where
that map speaks for it and it gains something, an undo after a click that was wrong and looks so. Everywhere else it is
taught to stop: what it cannot see it should not guess. First turns are seen with feature dropout too, but what is
absent is seen clearly: what looks unfamiliar is looked for, not denied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch

from ibisagent.domain import Action, Box, Click, Mask, Reply, Undo
from ibisagent.imaging.clicks import next_click
from ibisagent.imaging.masks import iou
from ibisagent.policies.one_by_one import TAKEN_BACK
from ibisagent.protocol import Size, recap
from ibisagent.query import target_of
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.training.click.states import corrupted
from ibisagent.training.images import TrainingImages
from ibisagent.training.nano.curriculum import CELL, SEGMENTER_SIDE, VIEW, Curriculum, Example, Pair

BLIND = 0.8  # most of the backbone's channels that are hidden
SURE = 0.85  # share that a map must give a pixel, or leave it, to speak for a correction there
GAIN = 0.02  # IoU that a correction must gain to be taught
BROUGHT, OWN = 0.2, 0.6
"""Shares of the masks that the user brought, and of the first turns that are the policy's own."""
FURTHER, WRONG, UNDONE = 0.8, 0.7, 0.2
"""Shares of the first turns that a click followed, of these clicks that were wrong, and of the last prompts that were
taken back."""
UNSEEN = 0.25
"""Share of the later turns whose mask is hidden: what a policy of two passes sees first."""

Believe = Callable[[Sequence[Example]], np.ndarray]


@dataclass(frozen=True, eq=False)
class _State:
    """Where an episode stands. said: the actions of its replies. prompts: those of them that stand. mask: what they
    give, prior (SEGMENTER_SIDE, SEGMENTER_SIDE) as the segmenter takes it. before: the mask without the last prompt;
    None where nothing is to be taken back."""

    said: Sequence[Sequence[Action]]
    prompts: Sequence[Click | Box]
    mask: Mask
    prior: np.ndarray
    before: Mask | None

    def last_was_wrong(self, ground_truth: Mask | None, belief: np.ndarray) -> bool:
        """Whether the last prompt was a click on the wrong side of the object's border, and of the border that a policy
        with this map of the object sees, and gained nothing. A box is never called wrong (docs/experiments)."""
        last = self.prompts[-1] if self.prompts else None
        if self.before is None or not isinstance(last, Click):
            return False
        assert ground_truth is not None
        inside = belief[last.y // CELL, last.x // CELL]
        seems_wrong = inside < 0.5 if last.positive else inside > 0.5
        is_wrong = ground_truth[last.y, last.x] != last.positive
        return bool(is_wrong and seems_wrong and iou(self.mask, ground_truth) <= iou(self.before, ground_truth))


class OnPolicyStates(Curriculum):
    """Draws examples whose later turns go on from the policy's own."""

    def __init__(
        self,
        images: TrainingImages,
        pairs: Sequence[Pair],
        segmenter: ClickNetwork,
        context: np.ndarray,
        seed: int,
        *,
        believe: Believe,
    ) -> None:
        """believe: where the policy takes the objects to be, (N, LOCATIONS, LOCATIONS) in [0, 1]."""
        super().__init__(images, pairs, segmenter, context, seed)
        self._believe = believe

    def _drop_features(self, example: Example) -> None:
        """Hide a part of the backbone's channels."""
        hidden = self._random.random(len(example.kept)) < self._random.uniform(0, BLIND)
        example.kept = np.where(hidden, 0, example.kept).astype(np.float32)

    def _first_turn(self, example: Example, pair: Pair) -> None:
        self._drop_features(example)
        super()._first_turn(example, pair)

    def _later_turns(self, unseen: Sequence[tuple[Example, Pair]]) -> None:
        examples = [example for example, _ in unseen]
        planes, features = self._blank_inputs(examples), self._contexts(examples)
        asked = []
        for example, pair in unseen:
            self._drop_features(example)
            kind, example.query, name = self._question(pair)
            asked.append((kind, name))
        states = self._reached(examples, planes, features)
        for (example, pair), state, (kind, name) in zip(unseen, states, asked, strict=True):
            if state.said:
                example.recap = recap_of(example.query, state.said, VIEW)
            else:
                self._show_as_brought(example, kind, name, pair)
        beliefs = self._believe(examples)  # without the masks, as in its own first pass
        for example, state, plane in zip(examples, states, planes, strict=True):
            example.current, plane[3] = state.mask, state.prior
        goals = self._goals(examples, beliefs, planes, features, [list(state.prompts) for state in states])
        hidden = self._random.random(len(examples)) < UNSEEN
        for number, (example, state, (kind, name)) in enumerate(zip(examples, states, asked, strict=True)):
            if hidden[number]:
                example.current = np.zeros(VIEW, bool)
                self._begin(example, name)
            elif state.last_was_wrong(example.ground_truth, beliefs[number]):
                example.answer(TAKEN_BACK, Undo())
            else:
                self._go_on(example, goals[number], kind, name)

    def _reached(self, examples: Sequence[Example], planes: np.ndarray, features: torch.Tensor) -> list[_State]:
        """Where the episodes stand after a first turn, often a further click, and sometimes an undo."""
        priors = planes[:, 3].copy()

        def played(prompts: Sequence[list[Click | Box]]) -> list[tuple[Mask, np.ndarray]]:
            return list(zip(self._predict(planes, features, prompts), planes[:, 3].copy(), strict=True))

        beliefs = self._believe(examples)
        openings = [self._opening(*of) for of in zip(examples, beliefs, strict=True)]
        clicked = played([opening[:1] for opening in openings])
        planes[:, 3] = priors
        boxed = played(openings)
        begun = [mask for mask, _ in boxed]
        further = [self._further(*of) for of in zip(examples, beliefs, begun, openings, strict=True)]
        prompts = [[*opening, *clicks] for opening, clicks in zip(openings, further, strict=True)]
        corrected = played(prompts)
        states = []
        for number, (example, opening, clicks) in enumerate(zip(examples, openings, further, strict=True)):
            assert example.ground_truth is not None
            if opening:
                said: list[Sequence[Action]] = [opening, clicks]
                reached = [clicked[number], boxed[number], *([corrected[number]] if clicks else [])]
                if self._random.random() < UNDONE:
                    said.append([Undo()])
                    prompts[number].pop()
                    reached.pop()
                states.append(_State(said, prompts[number], *reached[-1], reached[-2][0] if reached[1:] else None))
            else:
                mask = corrupted(example.ground_truth, self._random)
                states.append(
                    _State([], [], mask, cv2.resize(mask.astype(np.float32), (SEGMENTER_SIDE, SEGMENTER_SIDE)), None)
                )
        return states

    def _goals(
        self,
        examples: Sequence[Example],
        beliefs: np.ndarray,
        planes: np.ndarray,
        features: torch.Tensor,
        prompts: list[list[Click | Box]],
    ) -> list[Mask]:
        """What the masks are to become: what of the ground truths the policy is sure of, if a click towards it gains
        anything; else what they are. `planes` and `prompts` are those of the masks as they stand."""
        goals = []
        for example, belief, given in zip(examples, beliefs, prompts, strict=True):
            assert example.ground_truth is not None
            goals.append(sure_part(example.ground_truth, example.current, belief))
            if click := next_click(goals[-1], example.current, ""):
                given.append(click)
        corrected = self._predict(planes, features, prompts)
        return [
            goal if not e.current.any() or _gains(corrected_, e) else e.current
            for e, goal, corrected_ in zip(examples, goals, corrected, strict=True)
        ]

    def _opening(self, example: Example, belief: np.ndarray) -> list[Click | Box]:
        """The prompts of a first turn, the policy's own or an expert's corrupted ones; none for a mask that the user
        brought."""
        assert example.ground_truth is not None
        dice = self._random.random()
        if dice < BROUGHT:
            return []
        if dice < BROUGHT + OWN and (belief > 0.5).any():
            return first_turn_of(belief)
        return [Click(*self._spot(example.ground_truth), True, ""), self._loose_box(example.ground_truth)]

    def _further(self, example: Example, belief: np.ndarray, mask: Mask, prompts: Sequence[Click | Box]) -> list[Click]:
        """One more click, a right one, or one against a part of the mask that is right and looks so; often none."""
        assert example.ground_truth is not None
        if not prompts or self._random.random() >= FURTHER:
            return []
        if self._random.random() < WRONG:
            inside = cv2.resize(belief, VIEW, interpolation=cv2.INTER_LINEAR) > 0.5
            right = (mask == example.ground_truth) & (mask == inside)
            if right.any():
                x, y = self._spot(right)
                return [Click(x, y, not mask[y, x], "")]
        click = next_click(example.ground_truth, mask, "")
        return [click] if click else []


def recap_of(query: str, said: Sequence[Sequence[Action]], size: Size) -> str:
    """What `render` says, after `query`, of the replies so far; `said`: their actions, without the target's name."""
    name = target_of(query)
    replies = [
        Reply("", tuple(replace(a, target=name) if isinstance(a, Click | Box) else a for a in actions))
        for actions in said
        if actions
    ]
    return recap(replies, size, dialect="ibis")


def first_turn_of(belief: np.ndarray) -> list[Click | Box]:
    """Click and box of a map (LOCATIONS, LOCATIONS): its peak, and around all that is above one half of it.

    ValueError where nothing is.
    """
    row, column = np.unravel_index(belief.argmax(), belief.shape)
    rows, columns = np.nonzero(belief > 0.5)
    x0, y0, x1, y1 = (int(n) * CELL for n in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    half = CELL // 2
    return [Click(int(column) * CELL + half, int(row) * CELL + half, True, ""), Box(x0, y0, x1, y1, "")]


def sure_part(ground_truth: Mask, mask: Mask, belief: np.ndarray) -> Mask:
    """`ground_truth` where `belief`, (LOCATIONS, LOCATIONS) in [0, 1], is SURE of it, or where there is no mask yet;
    elsewhere `mask`."""
    inside = cv2.resize(belief, VIEW, interpolation=cv2.INTER_LINEAR)
    sure = np.where(ground_truth, inside, 1 - inside) >= SURE
    return np.where(sure | ~mask.any(), ground_truth, mask)


def _gains(mask: Mask, example: Example) -> bool:
    assert example.ground_truth is not None
    return iou(mask, example.ground_truth) >= iou(example.current, example.ground_truth) + GAIN
