"""The expert's episodes of one image, which its questions then share: the only stage that asks the segmenter.

Every prediction is made once: a mistake that is taken back, multiple targets at once and a wrong instruction reuse the
masks of the plain episode, since the environment restores exact states and predicts each target on its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from ibisagent.domain import Box, Case, Click, Completion, Episode, Image, Mask, Prompt, Reply, Stop, Turn, Undo
from ibisagent.environment import SegmentationEnv
from ibisagent.generation.config import FactoryConfig
from ibisagent.imaging.clicks import bounding_box, deepest_pixel
from ibisagent.imaging.masks import CORRUPTIONS, corrupt, dice, iou
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.protocol import DIALECTS, write
from ibisagent.segmenters import Prediction, Segmenter, SegmenterSession

NO_GAIN = 0.005
HOPELESS = 0.2  # below the wanted IoU: where clicks alone reach no more, refining is not tried
TRIAL_CLICKS, FAR_OFF = 5, 0.25  # so far below the wanted IoU after so many turns, nobody will get there
CORRECTIONS = 6  # clicks at most where a mask is given
MOST_TOGETHER = 4
WRONG_TRIES = 3


class RecallingSegmenter:
    """A segmenter that remembers every prediction on the image opened last. `calls` counts the real ones."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self.name = segmenter.name
        self.calls = 0
        self._last: tuple[str, _RecallingSession] | None = None

    def open(self, image: Image) -> SegmenterSession:
        """The session on `image`; the same one as long as no other image is opened."""
        if self._last is None or self._last[0] != image.sha256:
            self._last = image.sha256, _RecallingSession(self._segmenter.open(image), self)
        return self._last[1]

    def describe(self) -> dict[str, str]:
        """As the segmenter."""
        return self._segmenter.describe()


class _RecallingSession:
    def __init__(self, session: SegmenterSession, owner: RecallingSegmenter) -> None:
        self._session, self._owner = session, owner
        self._kept: dict[tuple[object, ...], tuple[Prediction, np.ndarray | None]] = {}

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        nameless = tuple(replace(prompt, target="") for prompt in prompts)
        # logits come from earlier predictions, which are kept, so that they are told apart by identity
        is_mask = prior is not None and prior.dtype == np.bool_
        before = hashlib.sha256(prior.tobytes()).digest() if is_mask and prior is not None else id(prior)
        key = (nameless, None if prior is None else before)
        if key not in self._kept:
            self._owner.calls += 1
            self._kept[key] = self._session.predict(prompts, prior), prior
        return self._kept[key][0]


def expert_episodes(
    cases: Sequence[Case], segmenter: RecallingSegmenter, config: FactoryConfig, provenance: dict[str, str]
) -> tuple[list[Episode], dict[str, Any]]:
    """Episodes of the cases of one image, and the facts of each pair. Ids are "<case id>|<variant>".

    Variants: "plain"; "start" refines a corrupted mask; "unrelated" is given a mask of something else;
    "self_correcting" takes a mistake back; "multiple" segments objects together (under the first one's id).
    """
    maker = _Maker(segmenter, config, provenance)
    episodes: list[Episode] = []
    facts: dict[str, Any] = {}
    plain: list[tuple[Case, Episode]] = []
    for case in cases:
        name, ground_truth = next(iter((case.targets or {}).items()), ("", None))
        if ground_truth is None or not ground_truth.any():
            facts[case.id] = {"present": False}
            continue
        made = {"plain": maker.plain(replace(case, id=f"{case.id}|plain"))}
        good = iou(_mask(made["plain"], name, ground_truth), ground_truth) >= config.min_iou
        if good:
            plain.append((case, made["plain"]))
            if config.random(case.id, "correct?").random() < config.self_correction and DIALECTS[config.dialect].undo:
                made |= _named("self_correcting", maker.self_correcting(case, made["plain"]))
        if config.refinement and _reached(made["plain"], name, ground_truth) >= config.min_iou - HOPELESS:
            made |= _named(
                "start", maker.started(case, "start", corrupted(ground_truth, config.random(case.id, "start")))
            )
        if good and config.random(case.id, "unrelated?").random() < config.inconsistency:
            others = [t for other in cases for t in (other.targets or {}).values() if other.id != case.id]
            mask = unrelated(ground_truth, others, config.random(case.id, "unrelated"))
            made |= _named("unrelated", maker.started(case, "unrelated", mask))
        episodes += made.values()
        facts[case.id] = measured(name, case.image, ground_truth) | {
            "episodes": {variant: _reached(episode, name, ground_truth) for variant, episode in made.items()}
        }
    chosen = _apart(plain)
    if len(chosen) > 1 and config.multiple and DIALECTS[config.dialect].multiple:
        episode = maker.together(chosen)
        episodes.append(episode)
        worst = [_reached(episode, n, t) for case, _ in chosen for n, t in (case.targets or {}).items()]
        facts[chosen[0][0].id]["episodes"]["multiple"] = min(worst)
        facts[chosen[0][0].id]["multiple"] = [case.id for case, _ in chosen]
    return episodes, facts


def measured(name: str, image: Image, ground_truth: Mask) -> dict[str, Any]:
    """What text-only questions need: share of the image, centre in [0, 1], pieces (0 where unclear)."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(ground_truth.astype(np.uint8))
    areas = sorted((int(area) for area in stats[1:, cv2.CC_STAT_AREA]), reverse=True)
    large = [area for area in areas if area >= 0.15 * areas[0]]
    clear = len(large) <= 5 and sum(areas) - sum(large) <= 0.02 * sum(areas)
    rows, columns = np.nonzero(ground_truth)
    return {
        "present": True,
        "name": name,
        "area": round(float(ground_truth.mean()), 6),
        "centre": [
            round(float(columns.mean()) / ground_truth.shape[1], 4),
            round(float(rows.mean()) / ground_truth.shape[0], 4),
        ],
        "extent": [
            round(float(v), 4) for v in (columns.min() / ground_truth.shape[1], columns.max() / ground_truth.shape[1])
        ],
        "pieces": len(large) if clear else 0,
        "tone": round(float(image.pixels[ground_truth].mean()), 2),
    }


def corrupted(ground_truth: Mask, random: np.random.Generator) -> Mask | None:
    """A start mask that needs work: eroded, dilated, shifted, leaking or with a part cut off; IoU 0.3 to 0.85."""
    size = float(np.sqrt(np.count_nonzero(ground_truth)))
    rows, columns = np.nonzero(ground_truth)
    for number in random.permutation(len(CORRUPTIONS)):
        for strength in (0.2, 0.12, 0.3, 0.06):
            radius = max(1, round(size * strength))
            chosen = int(random.integers(columns.size))
            angle = random.uniform(0, 2 * np.pi)
            move = radius * np.cos(angle), radius * np.sin(angle)
            at = int(columns[chosen]), int(rows[chosen])
            mask = corrupt(ground_truth, CORRUPTIONS[number], radius, at, move)
            if 0.3 <= iou(mask, ground_truth) <= 0.85:
                return mask
    return None


def unrelated(ground_truth: Mask, others: Sequence[Mask], random: np.random.Generator) -> Mask | None:
    """A mask of something that is not `ground_truth`: another object's, else the same shape elsewhere; IoU below
    0.05."""
    candidates = [other for other in others if not (other & ground_truth).any()]
    if candidates:
        return candidates[int(random.integers(len(candidates)))]
    box = bounding_box(ground_truth, "")
    height, width = ground_truth.shape
    if box is None or (box.x1 - box.x0) > 0.5 * width or (box.y1 - box.y0) > 0.5 * height:
        return None
    for _ in range(20):
        x, y = (
            int(random.integers(0, width - (box.x1 - box.x0) + 1)),
            int(random.integers(0, height - (box.y1 - box.y0) + 1)),
        )
        moved = np.zeros_like(ground_truth)
        moved[y : y + box.y1 - box.y0, x : x + box.x1 - box.x0] = ground_truth[box.y0 : box.y1, box.x0 : box.x1]
        if not (moved & ground_truth).any():
            return moved
    return None


def _named(variant: str, episode: Episode | None) -> dict[str, Episode]:
    return {variant: episode} if episode is not None else {}


def _mask(episode: Episode, name: str, ground_truth: Mask) -> Mask:
    return episode.masks.get(name, np.zeros_like(ground_truth))


def _reached(episode: Episode, name: str, ground_truth: Mask) -> float:
    return round(iou(_mask(episode, name, ground_truth), ground_truth), 4)


def _apart(plain: Sequence[tuple[Case, Episode]]) -> list[tuple[Case, Episode]]:
    """Pairs of one image that can be asked for together: different objects that hardly overlap."""
    chosen: list[tuple[Case, Episode]] = []
    for case, episode in plain:
        ground_truth = next(iter((case.targets or {}).values()))
        if all(dice(ground_truth, t) < 0.1 for other, _ in chosen for t in (other.targets or {}).values()):
            chosen.append((case, episode))
    return chosen[:MOST_TOGETHER]


class _Maker:
    def __init__(self, segmenter: RecallingSegmenter, config: FactoryConfig, provenance: dict[str, str]) -> None:
        self._segmenter, self._config, self._provenance = segmenter, config, provenance

    def _open(self, case: Case) -> SegmentationEnv:
        turns = 3 * self._config.max_clicks + 8
        return SegmentationEnv(
            case,
            self._segmenter,
            dialect=self._config.dialect,
            max_turns=turns,
            mask_selection="last",  # the expert sees the ground truth: the mask that it stops at is its answer
            provenance=self._provenance,
        )

    def _say(self, env: SegmentationEnv, reply: Reply) -> Turn:
        text = write(reply, env.observation.image.size, dialect=self._config.dialect)
        return env.step(Completion(text))

    def _play(self, case: Case, replies: Sequence[Reply]) -> Episode:
        env = self._open(case)
        for reply in replies:
            self._say(env, reply)
        return replace(env.episode(), provenance={"policy": "oracle", **env.episode().provenance})

    def plain(self, case: Case, first: Reply | None = None) -> Episode:
        """Clicks until the goal, as long as they help, and no longer than up to the best mask."""
        config = self._config
        ground_truths = case.targets or {}
        boxes = config.box_first if DIALECTS[config.dialect].boxes else 0.0
        oracle = OraclePolicy(
            [case],
            dialect=config.dialect,
            iou_threshold=config.goal_iou,
            max_clicks=min(config.max_clicks, CORRECTIONS) if case.start else config.max_clicks,
            jitter=config.jitter,
            box_first=boxes,
            seed=config.seed,
        )
        env = self._open(case)
        replies: list[Reply] = []
        reached: list[float] = []
        while not env.done:
            reply = first if first is not None and not replies else oracle.reply(env.observation)
            if reply.stop is not None:
                break
            turn = self._say(env, reply)
            replies.append(reply)
            reached.append(float(np.mean([iou(turn.after.get(n, t & False), t) for n, t in ground_truths.items()])))
            if len(reached) >= TRIAL_CLICKS and max(reached) < config.min_iou - FAR_OFF:
                break
            if len(reached) > config.patience and max(reached[-config.patience :]) <= (
                max(reached[: -config.patience]) + NO_GAIN
            ):
                break
        best = int(np.argmax(reached)) + 1 if reached else 0
        return self._play(case, [*replies[:best], Reply("", (Stop("It is segmented."),))])

    def started(self, case: Case, variant: str, start: Mask | None) -> Episode | None:
        """An episode that begins with the mask `start` of the object; None where there is no such mask."""
        if start is None:
            return None
        name, ground_truth = next(iter((case.targets or {}).items()))
        begun = replace(case, id=f"{case.id}|{variant}", start={name: start})
        first = (
            _discard(name, ground_truth, start, DIALECTS[self._config.dialect].multiple)
            if variant == "unrelated"
            else None
        )
        episode = self.plain(begun, first)
        return episode if len(episode.turns) > 1 else None  # nothing was done: no example of refining

    def self_correcting(self, case: Case, plain: Episode) -> Episode | None:
        """`plain` with one wrong turn that is seen to be wrong and taken back; None where no mistake does harm."""
        random = self._config.random(case.id, "err")
        name, ground_truth = next(iter((case.targets or {}).items()))
        replies = [turn.reply for turn in plain.turns]
        at = int(random.integers(len(replies) - 1)) if len(replies) > 1 else 0
        if len(replies) < 2:
            return None
        case = replace(case, id=f"{case.id}|self_correcting")
        for _ in range(WRONG_TRIES):
            env = self._open(case)
            for reply in replies[:at]:
                self._say(env, reply)
            before = env.observation.masks.get(name, ground_truth & False)
            wrong = _wrong_prompt(name, ground_truth, before, DIALECTS[self._config.dialect].boxes, random)
            if wrong is None:
                return None
            if any(wrong in reply.actions for reply in replies):
                continue
            after = self._say(env, Reply("", (wrong,))).after.get(name, ground_truth & False)
            harm = iou(before, ground_truth) - iou(after, ground_truth)
            spilt = np.count_nonzero(after & ~ground_truth) > 0.5 * np.count_nonzero(after)
            if not env.done and (harm > 0.03 if before.any() else spilt and after.any()):
                return self._play(case, [*replies[:at], Reply("", (wrong,)), Reply("", (Undo(1),)), *replies[at:]])
        return None

    def together(self, chosen: Sequence[tuple[Case, Episode]]) -> Episode:
        """The plain episodes of multiple objects in one: turn k holds the k-th action of each."""
        targets = {name: ground_truth for case, _ in chosen for name, ground_truth in (case.targets or {}).items()}
        case = replace(chosen[0][0], id=f"{chosen[0][0].id}|multiple", targets=targets)
        actions = [[a for turn in episode.turns for a in turn.reply.actions[:1]][:-1] for _, episode in chosen]
        longest = max(map(len, actions))
        replies = [Reply("", tuple(given[step] for given in actions if step < len(given))) for step in range(longest)]
        return self._play(case, [*replies, Reply("", (Stop("They are segmented."),))])


def _discard(name: str, ground_truth: Mask, start: Mask, multiple: bool) -> Reply | None:
    wrong, right = deepest_pixel(start & ~ground_truth), deepest_pixel(ground_truth)
    if wrong is None or right is None:
        return None
    clicks = (Click(*wrong, False, name), Click(*right, True, name))
    return Reply("", clicks if multiple else clicks[:1])


def _wrong_prompt(
    name: str, ground_truth: Mask, before: Mask, boxes: bool, random: np.random.Generator
) -> Click | Box | None:
    """A prompt that does harm: a click or box beside the object, or a negative click in its midst."""
    outside = cv2.erode((~ground_truth & ~before).astype(np.uint8), np.ones((5, 5), np.uint8))
    rows, columns = np.nonzero(outside)
    hit = deepest_pixel(ground_truth & before)
    if before.any() and hit is not None and random.random() < 0.4:
        return Click(*hit, False, name)
    if not rows.size:
        return None
    at = int(random.integers(rows.size))
    x, y = int(columns[at]), int(rows[at])
    box = bounding_box(ground_truth, name)
    if boxes and box is not None and not before.any() and random.random() < 0.4:
        half_x, half_y = max(2, (box.x1 - box.x0) // 2), max(2, (box.y1 - box.y0) // 2)
        height, width = ground_truth.shape
        made = Box(max(0, x - half_x), max(0, y - half_y), min(width, x + half_x), min(height, y + half_y), name)
        inside = ground_truth[made.y0 : made.y1, made.x0 : made.x1]
        return made if np.count_nonzero(inside) < 0.3 * np.count_nonzero(ground_truth) else None
    return Click(x, y, True, name)
