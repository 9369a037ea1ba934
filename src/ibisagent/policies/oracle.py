"""The policy that sees the ground truth: what an expert would do next. It makes trajectories and ceilings, never
results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from ibisagent import protocol
from ibisagent.domain import (
    Action,
    Box,
    Case,
    Click,
    Completion,
    Mask,
    Observation,
    Prompt,
    Reply,
    Stop,
    Turn,
    Undo,
    standing,
)
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.imaging.clicks import bounding_box, interior_depth, moved_box, next_click
from ibisagent.imaging.masks import iou
from ibisagent.policies.base import random_of

IOU_THRESHOLD = 0.9
MAX_CLICKS = 20
BOX_JITTER = 0.2  # an edge of a box moves by at most this share of the box's side, times `jitter`
_GROUND_TRUTHS_KEPT = 256  # ground truths of the newest cases, so that a lazy mapping need not decode one at every turn


class OraclePolicy:
    """Clicks the deepest point of the largest error of every target until all reach an IoU, then stops.

    It answers from the observation and the case alone: whatever was asked before, and in whatever batch, the same
    observation gets the same reply. Absent objects are refused, closed questions answered, both without any click.
    With `mistakes`, a turn is wrong on purpose now and then, and the next one takes it back.
    """

    def __init__(
        self,
        cases: Mapping[str, Case] | Iterable[Case],
        *,
        dialect: str = "ibis",
        iou_threshold: float = IOU_THRESHOLD,
        max_clicks: int = MAX_CLICKS,
        box_first: float = 0.0,
        jitter: float = 0.0,
        mistakes: float = 0.0,
        seed: int = 0,
        name: str = "oracle",
    ) -> None:
        """cases: those it may be asked about, by id; a mapping may be lazy.

        iou_threshold: in (0, 1], where a target is good enough. max_clicks: clicks and boxes per target, mistakes
        included. box_first: share of the cases, in [0, 1], that begin with boxes. jitter: 0 clicks the deepest
        pixel of the error region, 1 any of its pixels; boxes move with it. mistakes: chance in [0, 1) that a click
        turn is wrong. seed: the draws depend on it, the case's id and the turn only. name: for records. Raises
        ConfigError for values out of range, and for boxes or mistakes in a dialect that has no Box or Undo.
        """
        ranges = {
            "iou_threshold": 0 < iou_threshold <= 1,
            "max_clicks": max_clicks >= 1,
            "box_first": 0 <= box_first <= 1,
            "jitter": 0 <= jitter <= 1,
            "mistakes": 0 <= mistakes < 1,
        }
        if wrong := [name for name, fits in ranges.items() if not fits]:
            raise ConfigError(f"oracle: {wrong[0]} is out of its range; see OraclePolicy")
        speech = protocol.dialect_of(dialect)
        if (box_first and not speech.boxes) or (mistakes and not speech.undo):
            raise ConfigError(f"oracle: dialect '{dialect}' has no Box or no Undo; leave box_first and mistakes at 0")
        self.name = name
        self.dialect = dialect
        self._cases = cases if isinstance(cases, Mapping) else {case.id: case for case in cases}
        self._iou_threshold = iou_threshold
        self._max_clicks = max_clicks
        self._box_first = box_first
        self._jitter = jitter
        self._mistakes = mistakes
        self._seed = seed
        self._ground_truths: dict[str, tuple[Mapping[str, Mask] | None, str | None]] = {}

    @property
    def max_turns(self) -> int:
        """How many turns an episode may need: every click, an Undo after each, and the Stop."""
        return (2 if self._mistakes else 1) * self._max_clicks + 1

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """The expert's next replies. PolicyError for a case that it does not know, or that has no ground truth."""
        return [Completion(self._write(observation)) for observation in observations]

    def _write(self, observation: Observation) -> str:
        return protocol.write(self.reply(observation), observation.image.size, dialect=self.dialect)

    def reply(self, observation: Observation) -> Reply:
        """The expert's next reply, before it is written in the dialect."""
        targets, answer = self._ground_truth(observation.case_id)
        if targets is None:
            return Reply("This question needs no pixels.", (Stop(answer or ""),))
        size, turns = observation.image.size, observation.turns
        if turns and self._erred(observation.case_id, turns, len(turns) - 1):
            steps = len(turns[-1].reply.prompts)
            return Reply("My last action was wrong; I take it back.", (Undo(steps),))
        absent = tuple(name for name, ground_truth in targets.items() if not ground_truth.any())
        given = [prompt for turn in turns for prompt in turn.reply.prompts]
        actions: list[Action] = []
        thoughts = []
        for name, ground_truth in targets.items():
            current = observation.masks.get(name, np.zeros(size, dtype=bool))
            spent = sum(prompt.target == name for prompt in given)
            if name in absent or spent >= self._max_clicks or iou(current, ground_truth) >= self._iou_threshold:
                continue
            prompt = self._next_prompt(observation, name, ground_truth, current)
            if prompt is not None:
                actions.append(prompt)
                thoughts.append(_thought(prompt, first=not current.any()))
        if not actions:
            return Reply(self._last_thought(observation, targets, absent), (Stop(_answer(targets, absent), absent),))
        if not protocol.DIALECTS[self.dialect].multiple:
            del actions[1:], thoughts[1:]
        return Reply(" ".join(thoughts), tuple(actions))

    def _ground_truth(self, case_id: str) -> tuple[Mapping[str, Mask] | None, str | None]:
        if case_id not in self._ground_truths:
            try:
                case = self._cases[case_id]
            except KeyError:
                message = f"the oracle knows no case '{case_id}'; give it the cases that it is asked about"
                raise PolicyError(message) from None
            if not case.targets and case.answer is None:
                raise PolicyError(
                    f"case {case_id}: has no ground truth that the oracle could see; give targets or an answer"
                )
            self._ground_truths[case_id] = (case.targets or None, case.answer)
            if len(self._ground_truths) > _GROUND_TRUTHS_KEPT:
                del self._ground_truths[next(iter(self._ground_truths))]
        return self._ground_truths[case_id]

    def _erred(self, case_id: str, turns: Sequence[Turn], index: int) -> bool:
        """Whether turn `index` (0-based) was wrong on purpose: it was drawn so and gave prompts."""
        return self._self_corrects(case_id, index) and bool(turns[index].reply.prompts)

    def _self_corrects(self, case_id: str, index: int) -> bool:
        return bool(self._mistakes) and random_of(self._seed, case_id, index, "mistake").random() < self._mistakes

    def _next_prompt(self, observation: Observation, name: str, ground_truth: Mask, current: Mask) -> Prompt | None:
        case_id, index = observation.case_id, len(observation.turns)
        kept = [prompt for prompt in standing(observation.turns) if prompt.target == name]
        clicks = [prompt for prompt in kept if isinstance(prompt, Click)]
        right = next_click(ground_truth, current, name, clicks)
        if right is None:
            return None
        random = random_of(self._seed, case_id, index, name)
        if self._self_corrects(case_id, index):
            return _wrong_click(right, ground_truth, current, clicks, random)
        if (
            not kept
            and name not in observation.masks
            and random_of(self._seed, case_id, "box").random() < self._box_first
        ):
            return self._box(ground_truth, name, random)
        return self._moved(right, ground_truth, current, clicks, random)

    def _last_thought(self, observation: Observation, targets: Mapping[str, Mask], absent: Sequence[str]) -> str:
        present = [name for name in targets if name not in absent]
        if not present:
            return f"I see no {_listed(absent)}."
        nothing = np.zeros(observation.image.size, dtype=bool)
        reached = [iou(observation.masks.get(name, nothing), targets[name]) for name in present]
        if min(reached) >= self._iou_threshold:
            return f"The {' and the '.join(present)} {_are(present)} covered."
        return "More clicks would not help."

    def _moved(
        self, click: Click, ground_truth: Mask, current: Mask, past: Sequence[Click], random: np.random.Generator
    ) -> Click:
        """`click`, moved within its connected error region to a pixel at least (1 - jitter) as deep."""
        if not self._jitter:
            return click
        error = ground_truth & ~current if click.positive else current & ~ground_truth
        _, parts = cv2.connectedComponents(error.astype(np.uint8), connectivity=4)
        depth = interior_depth(error)
        near = (parts == parts[click.y, click.x]) & (depth >= (1 - self._jitter) * depth[click.y, click.x])
        for other in past:
            near[other.y, other.x] = False
        rows, columns = np.nonzero(near)
        chosen = int(random.integers(rows.size))
        return Click(int(columns[chosen]), int(rows[chosen]), click.positive, click.target)

    def _box(self, ground_truth: Mask, name: str, random: np.random.Generator) -> Box:
        box = bounding_box(ground_truth, name)
        if box is None:
            raise PolicyError(f"the oracle was asked to box '{name}', which is not there")
        sides = np.array([box.x1 - box.x0, box.y1 - box.y0] * 2)
        shifts = random.uniform(-1, 1, size=4) * self._jitter * BOX_JITTER * sides
        return moved_box(box, shifts, (int(ground_truth.shape[0]), int(ground_truth.shape[1])))


def _wrong_click(
    right: Click, ground_truth: Mask, current: Mask, past: Sequence[Click], random: np.random.Generator
) -> Click:
    """A click to be taken back: a positive one beside the object, or, but for the first, a wrong sign."""
    rows, columns = np.nonzero(~ground_truth & ~current)
    if rows.size and (not past or random.random() < 0.5):
        chosen = int(random.integers(rows.size))
        wrong = Click(int(columns[chosen]), int(rows[chosen]), True, right.target)
        if wrong not in past:
            return wrong
    return Click(right.x, right.y, not right.positive, right.target)


def _thought(prompt: Prompt, *, first: bool) -> str:
    if first:
        return f"I look for the {prompt.target}."
    if isinstance(prompt, Click) and not prompt.positive:
        return f"The mask leaks beyond the {prompt.target}."
    return f"The mask misses a part of the {prompt.target}."


def _answer(targets: Mapping[str, Mask], absent: Sequence[str]) -> str:
    present = [name for name in targets if name not in absent]
    sentences = [f"The {' and the '.join(present)} {_are(present)} segmented."] if present else []
    sentences += [f"No {_listed(absent)} here."] if absent else []
    return " ".join(sentences)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    return " and no ".join(names)
