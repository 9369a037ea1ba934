"""What `ibis-nano` is taught: turns about a view of an image, each with a question, a state and the right reply.

Masks of later turns come from the segmenter that the policy will work with, after right and wrong clicks, and from
corrupted ground truths. Questions are those of the data factory (`generation.teacher.phrasings`), without those kept
for evaluation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from ibisagent.datasets import CaseRow
from ibisagent.domain import Action, Box, Click, Episode, Mask, Masks, Reply, Stop
from ibisagent.generation.teacher.phrasings import DESCRIPTIONS, SHARES, Absences, is_abnormal, phrasings, with_article
from ibisagent.imaging.clicks import bounding_box, interior_depth, next_click
from ibisagent.imaging.masks import iou
from ibisagent.policies.nano_input import LOCATIONS
from ibisagent.policies.one_by_one import (
    ABSENT_HERE,
    DONE,
    FIRST_THOUGHT,
    LEAKED,
    MISSED,
    NOT_THERE,
    SEGMENTED,
    TAKEN_BACK,
    TEXT_ONLY,
)
from ibisagent.protocol import START_LINE, escape, write
from ibisagent.segmenters.backbone_sizes import SIDE, WIDTH
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.segmenters.context_features import places_seen
from ibisagent.segmenters.letterbox import prompt_maps
from ibisagent.training.click.states import corrupted, jittered_box
from ibisagent.training.images import TrainingImages, balanced_weights, closer, random_turn, recolored

VIEW = (SIDE, SIDE)
CELL = SIDE // LOCATIONS
GOOD_ENOUGH = 0.8  # IoU at which the right reply is to stop
SEGMENTER_SIDE = 192  # pixels a side of the segmenter's input

WORDS, ABSENT, FIRST = 0.05, 0.17, 0.53
"""Shares of the examples that ask for words, for an absent object, for a first turn; the rest are later turns."""
QUESTIONS = 3  # asked of each view
CLOSER = 0.25  # share of the views that are enlarged around the object

ANYTHING = ("object", "structure", "target", "lesion", "region of interest", "abnormality", "finding", "area")
SYLLABLES = (
    *("ba", "co", "de", "fi", "gu", "hy", "ka", "lo", "mi"),
    *("nu", "pe", "ra", "si", "to", "ve", "xo", "cyte", "oma"),
)
KINDS = (
    "referring",
    "existence",
    "reasoning",
    "abnormality",
    "refinement",
    "modality",
    "organ",
    "side",
    "size",
    "which",
)


@dataclass(frozen=True, eq=False)
class Pair:
    """One mask of one training image.

    number: of the pair, image: of its image, in the `TrainingImages`. present: names of all objects of the image.
    """

    number: int
    image: int
    row: CaseRow
    present: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the object."""
        return self.row.object

    @property
    def absent(self) -> bool:
        """Whether the image is known not to show it."""
        return self.row.mask is None


def pairs_of(images: TrainingImages) -> list[Pair]:
    """All pairs, in order."""
    names = {
        image: tuple(images.rows[pair].object for pair in pairs if images.rows[pair].mask is not None)
        for image, pairs in images.present.items()
    }
    return [
        Pair(number, int(image), row, names[int(image)])
        for number, (image, row) in enumerate(zip(images.image, images.rows, strict=True))
    ]


@dataclass(eq=False)
class Example:
    """One turn to learn. places: for each location token of the reply, its (LOCATIONS, LOCATIONS) distribution.

    image: the number of the training image. turn: the (2, 3) affine map of SIDE x SIDE pixels that pixels and ground
    truth have had. ground truth is None where the question is not about a region. kept (WIDTH,) float32: factors of the
    backbone's features. recap: the replies so far, as `protocol.recap` tells them; "" for none.
    """

    image: int
    pixels: np.ndarray
    ground_truth: Mask | None
    turn: np.ndarray = field(default_factory=lambda: np.eye(2, 3, dtype=np.float32))
    query: str = ""
    recap: str = ""
    reply: str = ""
    current: Mask = field(default_factory=lambda: np.zeros(VIEW, bool))
    places: list[np.ndarray] = field(default_factory=list)
    kept: np.ndarray = field(default_factory=lambda: np.ones(WIDTH, np.float32))

    @property
    def prompt(self) -> str:
        """What `protocol.render` shows of the query and the replies so far."""
        return escape(self.query) + (f"\n{self.recap}" if self.recap else "")

    def answer(self, thought: str, *actions: Action) -> None:
        """Set the reply."""
        self.reply = write(Reply(thought, actions), VIEW, dialect="ibis")


def plainly(episode: Episode) -> Episode:
    """The same actions with the thoughts and answers of this curriculum, and without the name of an only target.

    Replies that could not be read stay as they are.
    """
    dialect = episode.provenance.get("dialect", "ibis")
    turns = []
    for turn in episode.turns:
        if turn.reply.problem is None:
            reply = _plain_reply(turn.reply, turn.before, " and the ".join(episode.masks))
            text = write(reply, episode.size, dialect=dialect)
            turn = replace(turn, reply=reply, completion=replace(turn.completion, text=text))
        turns.append(turn)
    return replace(episode, turns=tuple(turns))


def _plain_reply(reply: Reply, before: Masks, names: str) -> Reply:
    stop, prompts = reply.stop, [action for action in reply.actions if isinstance(action, Click | Box)]
    if stop is not None and stop.absent:
        absent = " and no ".join(stop.absent)
        return Reply(NOT_THERE.format(absent), (*reply.actions[:-1], Stop(ABSENT_HERE.format(absent), stop.absent)))
    if stop is not None:
        said = (DONE.format(names), Stop(SEGMENTED.format(names))) if names else (TEXT_ONLY, stop)
        return Reply(said[0], (*reply.actions[:-1], said[1]))
    if not prompts:
        return Reply(TAKEN_BACK, reply.actions)
    first, targets = prompts[0], {prompt.target for prompt in prompts}
    started = first.target in before and before[first.target].any()
    thought = FIRST_THOUGHT if not started else LEAKED if isinstance(first, Click) and not first.positive else MISSED
    actions = [replace(action, target="") if isinstance(action, Click | Box) else action for action in reply.actions]
    return Reply(thought.format(first.target), tuple(actions) if len(targets) == 1 else reply.actions)


def depth_distribution(region: Mask, power: float = 1.0) -> np.ndarray:
    """(LOCATIONS, LOCATIONS) float32 that sums to 1: places in `region`, deep ones more."""
    depth = interior_depth(region) ** power
    cells = depth.reshape(LOCATIONS, CELL, LOCATIONS, CELL).mean(axis=(1, 3))
    return (cells / max(float(cells.sum()), 1e-9)).astype(np.float32)


def region_target(mask: Mask | None) -> np.ndarray:
    """(LOCATIONS, LOCATIONS) float32: the share of each cell that is object; -1 where the object is unknown."""
    if mask is None:
        return np.full((LOCATIONS, LOCATIONS), -1, np.float32)
    return cv2.resize(mask.astype(np.float32), (LOCATIONS, LOCATIONS), interpolation=cv2.INTER_AREA)


def corner_distribution(x: float, y: float, spread: float = 0.7) -> np.ndarray:
    """(LOCATIONS, LOCATIONS) float32 that sums to 1: a bump of `spread` cells around view pixel (x, y)."""
    row, column = np.mgrid[:LOCATIONS, :LOCATIONS] + 0.5
    bump = np.exp(-((column - x / CELL) ** 2 + (row - y / CELL) ** 2) / (2 * spread**2))
    return (bump / bump.sum()).astype(np.float32)


def _square(turn: np.ndarray) -> np.ndarray:
    """A (2, 3) affine map as a (3, 3) matrix."""
    return np.vstack([turn, [0, 0, 1]])


class Curriculum:
    """Draws examples: a view of a pair, a question, a state, and the right reply to it."""

    words, absent, first, questions = WORDS, ABSENT, FIRST, QUESTIONS

    def __init__(
        self,
        images: TrainingImages,
        pairs: Sequence[Pair],
        segmenter: ClickNetwork | None,
        context: np.ndarray,
        seed: int,
    ) -> None:
        """pairs: those to draw from. segmenter: makes the masks of later turns; None leaves them out. context: what it
        knows of the images (`images.context_features`)."""
        self._images, self._pairs, self._segmenter, self._context = images, pairs, segmenter, context
        self._random = np.random.default_rng(seed)
        self._weights = balanced_weights([pair.row for pair in pairs])
        self._of_image: dict[int, list[int]] = {}
        for index, pair in enumerate(pairs):
            self._of_image.setdefault(pair.image, []).append(index)
        self._absences = Absences([pair.row for pair in pairs])
        self._asked_for: dict[str, float] = defaultdict(float)
        for pair, weight in zip(pairs, self._weights, strict=True):
            self._asked_for[pair.name] += float(weight)
        self._offered = {kind: [text for _, text in phrasings(kind, held_out=False)] for kind in KINDS}

    def draw(self, count: int) -> list[Example]:
        """`count` fresh examples, more than one of each view, about other objects of it where there are any."""
        examples: list[Example] = []
        unseen: list[tuple[Example, Pair]] = []
        for index in self._random.choice(len(self._pairs), -(-count // self.questions), p=self._weights):
            pixels, turn = self._view(self._pairs[index])
            others = [other for other in self._of_image[self._pairs[index].image] if other != index]
            for number in range(min(self.questions, count - len(examples))):
                pair = self._pairs[self._pick(others) if number and others else index]
                mask = self._images.mask(pair.number).astype(np.uint8)
                ground_truth = cv2.warpAffine(mask, turn, VIEW, flags=cv2.INTER_NEAREST) > 0
                example = Example(pair.image, pixels, ground_truth, turn)
                examples.append(example)
                kind = self._random.random()
                if pair.absent:
                    self._ask_for_absent(example, pair.name)
                elif not ground_truth.any() or kind < self.words:
                    self._ask_for_words(example, pair)
                elif kind < self.words + self.absent and (absent := self._absent(pair)):
                    self._ask_for_absent(example, absent)
                elif kind < self.words + self.absent + self.first or self._segmenter is None:
                    self._first_turn(example, pair)
                else:
                    unseen.append((example, pair))
        if unseen:
            self._later_turns(unseen)
        return examples

    def _pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self._random.integers(len(choices)))]

    def _view(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """A view of the pair's image, and the affine map that made it."""
        turn = random_turn(pair.row.modality, self._random)
        if self._random.random() < CLOSER:
            turn = closer(turn, self._images.mask(pair.number), self._random)
        pixels = cv2.warpAffine(self._images.pixels[pair.image], turn, VIEW, flags=cv2.INTER_LINEAR)
        return recolored(pixels, self._random), turn

    def _phrase(self, kind: str, name: str, **words: str) -> str:
        return self._pick(self._offered[kind]).format(name=name, a_name=with_article(name), **words)

    def _question(self, pair: Pair) -> tuple[str, str, str]:
        """(kind, text, name to use for the object) of a question about an object that is there."""
        name, dice = pair.name, self._random.random()
        if dice < 0.07:  # an unknown word still means the thing that stands out
            made_up = "".join(self._pick(SYLLABLES) for _ in range(self._random.integers(2, 5)))
            name = self._pick(ANYTHING) if self._random.random() < 0.5 else made_up
            return "referring", self._phrase("referring", name, modality=pair.row.modality), name
        if dice < 0.22 and pair.name in DESCRIPTIONS:
            return "reasoning", self._phrase("reasoning", name, description=self._pick(DESCRIPTIONS[name])), name
        if dice < 0.26 and len(pair.present) == 1 and is_abnormal(name):
            return "abnormality", self._phrase("abnormality", name), name
        if dice < 0.4:
            return "existence", self._phrase("existence", name), name
        return "referring", self._phrase("referring", name, modality=pair.row.modality or "medical"), name

    def _ask_for_words(self, example: Example, pair: Pair) -> None:
        row, ground_truth = pair.row, example.ground_truth
        ways: list[tuple[str, str, dict[str, str]]] = [("modality", row.modality, {}), ("organ", row.site, {})]
        if ground_truth is not None and ground_truth.any():
            columns = np.flatnonzero(ground_truth.any(axis=0))
            if columns[-1] < 0.48 * SIDE or columns[0] > 0.52 * SIDE:
                ways.append(("side", "left" if columns[0] < SIDE / 2 else "right", {}))
            share = self._pick(list(SHARES))
            if not 0.75 * SHARES[share] < ground_truth.mean() < 1.3 * SHARES[share]:
                ways.append(("size", "yes" if ground_truth.mean() > SHARES[share] else "no", {"share": share}))
            if (near := self._absences.near(row, pair.present)) and not is_abnormal(pair.name):
                both = list(self._random.permutation([pair.name, self._pick(near)]))
                ways.append(("which", pair.name, {"first": both[0], "second": both[1]}))
        ways = [way for way in ways if way[1]] or [("modality", "unknown", {})]
        kind, answer, words = ways[int(self._random.integers(len(ways)))]
        example.query, example.ground_truth = self._phrase(kind, pair.name, **words), None
        example.answer(TEXT_ONLY, Stop(answer))

    def _absent(self, pair: Pair) -> str:
        """The name of an object that the pair's image does not show; "" where none is known."""
        near, far = self._absences.near(pair.row, pair.present), self._absences.far(pair.row, pair.present)
        choice = near if near and self._random.random() < 0.5 else far or near
        if not choice:
            return ""
        # As often as they are asked for where they are there: else rare objects would mostly be denied.
        weights = np.array([self._asked_for[name] for name in choice])
        return choice[int(self._random.choice(len(choice), p=weights / weights.sum()))]

    def _ask_for_absent(self, example: Example, name: str) -> None:
        kind = self._pick(("existence", "referring"))
        example.query, example.ground_truth = self._phrase(kind, name, modality="medical"), np.zeros(VIEW, bool)
        example.answer(NOT_THERE.format(name), Stop(ABSENT_HERE.format(name), (name,)))

    def _first_turn(self, example: Example, pair: Pair) -> None:
        _, example.query, name = self._question(pair)
        self._begin(example, name)

    def _begin(self, example: Example, name: str) -> None:
        assert example.ground_truth is not None
        box = bounding_box(example.ground_truth, "")
        click = next_click(example.ground_truth, np.zeros(VIEW, bool), "")
        assert box is not None  # `draw` skips empty ground truths
        assert click is not None
        example.answer(FIRST_THOUGHT.format(name), click, box)
        corners = [corner_distribution(box.x0, box.y0), corner_distribution(box.x1, box.y1)]
        example.places = [depth_distribution(example.ground_truth), *corners]

    def _later_turns(self, unseen: Sequence[tuple[Example, Pair]]) -> None:
        prompts = [self._earlier_prompts(example.ground_truth) for example, _ in unseen]
        for (example, pair), mask in zip(unseen, self._masks(unseen, prompts), strict=True):
            assert example.ground_truth is not None
            example.current = mask
            kind, example.query, name = self._question(pair)
            if self._random.random() < 0.2:
                self._show_as_brought(example, kind, name, pair)
            self._go_on(example, example.ground_truth, kind, name)

    def _show_as_brought(self, example: Example, kind: str, name: str, pair: Pair) -> None:
        """Say what `render` says of a mask that the user brought."""
        if kind == "referring" and name == pair.name:
            example.query = self._phrase("refinement", name)
        example.query += "\n" + START_LINE

    def _go_on(self, example: Example, goal: Mask, kind: str, name: str) -> None:
        """Answer with the correction that brings the mask nearer to `goal`, or with a stop where it is good enough."""
        mask, ground_truth = example.current, example.ground_truth
        assert ground_truth is not None
        click = next_click(goal, mask, "")
        if click is None or iou(mask, ground_truth) >= GOOD_ENOUGH:
            seen = f"Yes, the {name} is visible and segmented."
            example.answer(DONE.format(name), Stop(seen if kind == "existence" else SEGMENTED.format(name)))
        elif not mask.any():
            self._begin(example, name)
        else:
            example.answer((MISSED if click.positive else LEAKED).format(name), click)
            wrong = goal & ~mask if click.positive else mask & ~goal
            example.places = [depth_distribution(wrong, power=1.5)]

    def _earlier_prompts(self, ground_truth: Mask | None) -> list[Click | Box]:
        """What a corrupted first turn may have asked for; empty for "a corrupted ground truth instead"."""
        assert ground_truth is not None
        kind, prompts = self._random.random(), list[Click | Box]()
        if kind < 0.2:
            return prompts
        region = ground_truth if kind < 0.85 else np.ones(VIEW, bool)
        prompts.append(Click(*self._spot(region), True, ""))
        if kind < 0.7:
            prompts.append(self._loose_box(ground_truth))
        return prompts

    def _spot(self, region: Mask) -> tuple[int, int]:
        """(x, y) of any pixel of `region`, which has one."""
        rows, columns = np.nonzero(region)
        index = self._random.integers(rows.size)
        return int(columns[index]), int(rows[index])

    def _loose_box(self, ground_truth: Mask) -> Box:
        return jittered_box(ground_truth, self._random, self._random.choice([0.05, 0.15, 0.3]))

    def _masks(self, unseen: Sequence[tuple[Example, Pair]], prompts: Sequence[list[Click | Box]]) -> list[Mask]:
        """Masks that the segmenter gives for `prompts`, some after one more click, right or wrong; or corrupted ground
        truths."""
        examples = [example for example, _ in unseen]
        planes, features = self._blank_inputs(examples), self._contexts(examples)
        masks = self._predict(planes, features, prompts)
        further = []
        for number, (example, given, mask) in enumerate(zip(examples, prompts, masks, strict=True)):
            assert example.ground_truth is not None
            click = next_click(example.ground_truth, mask, "") if given and self._random.random() < 0.5 else None
            if click is not None and self._random.random() < 0.3:
                x, y = (int(number) for number in self._random.integers(SIDE, size=2))
                click = Click(x, y, not mask[y, x], "")
            if click is not None:
                given.append(click)
                further.append(number)
            elif not given:
                masks[number] = corrupted(example.ground_truth, self._random)
        if further:
            corrected = self._predict(planes[further], features[further], [prompts[number] for number in further])
            for number, mask in zip(further, corrected, strict=True):
                masks[number] = mask
        return masks

    def _contexts(self, examples: Sequence[Example]) -> torch.Tensor:
        """The segmenter's context features (B, C, GRID, GRID) of the views: those of the images, turned likewise."""
        to_unit = np.array([[2 / SIDE, 0, 1 / SIDE - 1], [0, 2 / SIDE, 1 / SIDE - 1], [0, 0, 1]])
        from_unit = np.linalg.inv(to_unit)
        maps = [(to_unit @ np.linalg.inv(_square(example.turn)) @ from_unit)[:2] for example in examples]
        features = torch.from_numpy(self._context[[example.image for example in examples]].astype(np.float32))
        grid = F.affine_grid(torch.from_numpy(np.stack(maps)).float(), list(features.shape), align_corners=False)
        return F.grid_sample(features, grid, align_corners=False)

    @staticmethod
    def _blank_inputs(examples: Sequence[Example]) -> np.ndarray:
        """The segmenter's input (N, 7, SEGMENTER_SIDE, SEGMENTER_SIDE) for images without prompts and masks."""
        planes = np.zeros((len(examples), 7, SEGMENTER_SIDE, SEGMENTER_SIDE), np.float32)
        for plane, example in zip(planes, examples, strict=True):
            small = cv2.resize(example.pixels, (SEGMENTER_SIDE, SEGMENTER_SIDE), interpolation=cv2.INTER_AREA)
            plane[:3] = small.transpose(2, 0, 1).astype(np.float32) / 255
        return planes

    def _predict(
        self, planes: np.ndarray, features: torch.Tensor, prompts: Sequence[Sequence[Click | Box]]
    ) -> list[Mask]:
        """One pass of the segmenter; `planes` keeps the mask probabilities for the next one."""
        assert self._segmenter is not None
        step = SIDE / SEGMENTER_SIDE
        to_view = np.array([[step, 0, step / 2 - 0.5], [0, step, step / 2 - 0.5]])
        places = torch.from_numpy(places_seen(to_view, VIEW, SEGMENTER_SIDE)).expand(len(planes), -1, -1, -1)
        for plane, given in zip(planes, prompts, strict=True):
            plane[4:] = prompt_maps(given, SEGMENTER_SIDE, 1 / step)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self._segmenter(torch.from_numpy(planes), features, places)[0][:, 0].float()
        planes[:, 3] = logits.sigmoid().numpy()
        return [cv2.resize(one, VIEW, interpolation=cv2.INTER_LINEAR) > 0 for one in logits.numpy()]
