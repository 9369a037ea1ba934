"""One volume through the loop: the agent segments key slices, the segmenter carries the masks from slice to slice.

1. Key slices are given, or searched for: the agent is asked at FIRST_ASKED slices spread over the volume, then between
   them, until it sees an object or FINEST slices apart.
2. Between and beyond key slices, a segmenter with a memory (SAM 2, MedSAM2) follows the object from slice to slice. Any
   other is asked with the box and the mask that a slice's neighbours lead to expect: between two key slices that show
   the object their masks are interpolated, elsewhere the mask of the slice before is taken.
3. Every `recheck` slices, and where the segmenter is in doubt, the agent is asked again, with that mask to refine. What
   it calls absent ends there.

Masks lie in arrays that spill to disk (`volumes.grid.scratch`); images, turns and logits are of one slice at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np

from ibisagent.domain import MAX_TARGETS, Box, Case, Episode, Image, Mask, Masks, MaskSelection, Prompt, check_query
from ibisagent.environment import run_episodes, turn_limit
from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.imaging.clicks import bounding_box, distance_outside, interior_depth
from ibisagent.imaging.masks import iou
from ibisagent.policies.base import Policy
from ibisagent.query import target_of
from ibisagent.segmenters import Memory, Multimask, Prediction, Segmenter, SegmenterSession
from ibisagent.volumes import SliceView
from ibisagent.volumes.dicom import instance_numbers
from ibisagent.volumes.grid import DicomOrigin, release, scratch_mask

FIRST_ASKED = 8
FINEST = 4
RECHECK = 10
BOX_MARGIN = 0.05
"""How much wider than the expected mask its box is, on each side, as a share of its side; at least two pixels."""

DOUBTED_SCORE = 0.5
DOUBTED_OVERLAP = 0.5
"""A mask is in doubt when the segmenter's score (predicted IoU, or chance that the object is there) is below the first,
or it overlaps what was expected less than the second (IoU)."""

DOUBTED_LOOK = 0.4
"""... or when it looks less than this like the target did where the agent saw it, see `Look`. A segmenter that is given
a mask tends to give it back, and to trust it, where the object has ended."""

TOLD_BY_BRIGHTNESS = 0.3

_LEVELS = 32

Why = Literal["key", "search", "recheck", "doubt"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One episode of the agent: the slice, why it was asked, how the episode ended, turns, and what it found there."""

    slice: int
    why: Why
    stop: str
    turns: int
    found: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Carried:
    """One slice of a target that the segmenter was asked for, the IoU that it predicts, whether it was in doubt."""

    slice: int
    target: str
    score: float
    doubted: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """Turns of the policy, images opened by the segmenter, and masks predicted by it."""

    policy_calls: int
    encoder_calls: int
    predictions: int


@dataclass(frozen=True, slots=True, eq=False)
class VolumeSegmentation:
    """masks: (I, J, K) bool by target, on the grid of the volume. ignored: names beyond MAX_TARGETS, without a mask.

    recheck, max_turns: what it was made with.
    """

    masks: Mapping[str, np.ndarray]
    asked: tuple[Asked, ...]
    carried: tuple[Carried, ...]
    cost: Cost
    ignored: tuple[str, ...]
    recheck: int
    max_turns: int


def run_volume(
    view: SliceView,
    query: str,
    policy: Policy,
    segmenter: Segmenter,
    *,
    keys: Sequence[int] | None = None,
    recheck: int = RECHECK,
    max_turns: int | None = None,
    mask_selection: MaskSelection | None = None,
    start: Mapping[str, np.ndarray] | None = None,
    provenance: Mapping[str, str] | None = None,
    on_episode: Callable[[int, Why, Episode, Image], None] | None = None,
    on_slice: Callable[[int], None] | None = None,
) -> VolumeSegmentation:
    """Segment what `query` names in the volume of `view`.

    keys: slices that the agent is asked about; None searches, or takes some of those that `start` shows. recheck: how
    many slices the segmenter goes on alone; 0 never asks again. max_turns: of one slice, default the policy's own
    limit. mask_selection: which masks of a slice's episode are its answer (`Episode.answer_masks`). start: masks
    (I, J, K) to refine on key slices.
    on_episode: called with each finished episode and its image; on_slice: with each slice that was carried.
    Raises ConfigError for an empty query or slices that are not there, PolicyError and SegmenterError when their
    machinery fails.
    """
    query = check_query(query)
    if recheck < 0:
        raise ConfigError(f"recheck every {recheck} slices: give 0 (never) or more")
    wrong = [key for key in keys or () if not 0 <= key < view.count]
    if wrong or (keys is not None and not keys):
        raise ConfigError(f"{view.volume.name}: has slices 0 to {view.count - 1}, not {wrong[0] if wrong else 'none'}")
    turns = turn_limit(policy, query) if max_turns is None else max_turns
    agent = _VolumeAgent(
        view, query, policy, _Counted(segmenter), turns, mask_selection, recheck, provenance or {}, on_episode, on_slice
    )
    if keys is None and start:
        keys = _spread_keys(view, start, recheck or RECHECK)
    if keys is None:
        agent.search()
    else:
        for key in sorted(set(keys)):
            agent.ask(key, "key", agent.start_masks(start or {}, key))
    agent.fill()
    return agent.result()


def _spread_keys(view: SliceView, start: Mapping[str, np.ndarray], apart: int) -> list[int]:
    """The first, the last and each `apart`-th of the slices that show a start mask; DataError if none does."""
    shown = [index for index in range(view.count) if any(view.voxels_of(mask, index).any() for mask in start.values())]
    if not shown:
        raise DataError(f"{view.volume.name}: its start mask is empty, there is nothing to refine; leave it out")
    return sorted({*shown[::apart], shown[-1]})


def parse_slices(text: str, count: int) -> list[int]:
    """The slices that a user means: "12,40,77", "10:90:5" or "::10" as in Python, or a mix; -1 is the last.

    Raises ConfigError for anything else, or slices outside 0 to count - 1.
    """
    found: set[int] = set()
    for part in text.split(","):
        try:
            numbers = [int(number) if number.strip() else None for number in part.split(":")]
            if len(numbers) == 1 and numbers[0] is not None:
                chosen: Iterable[int] = [range(count)[numbers[0]]]
            elif 2 <= len(numbers) <= 3:
                chosen = range(count)[slice(*numbers)]
            else:
                raise ValueError("no slices")
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f"slices '{text[:40]}': give 0 to {count - 1}, such as 12,40,77 or 10:90:5 or ::10"
            ) from error
        found.update(chosen)
    if not found:
        raise ConfigError(f"slices '{text[:40]}': names none of the slices 0 to {count - 1}")
    return sorted(found)


def choose_slices(view: SliceView, text: str) -> list[int]:
    """The slices of a view that a user means: numbers as for `parse_slices`, or "instance 12,40:60" as viewers count.

    After the word "instance" (or "im"), numbers and ranges are those of DICOM's InstanceNumber; of one file with
    multiple frames, of the frames from 1. Raises ConfigError for a view that is not along the source's slices.
    """
    word, _, rest = text.strip().partition(" ")
    if word.casefold() not in ("instance", "instances", "im"):
        return parse_slices(text, view.count)
    if not isinstance(view.volume.origin, DicomOrigin) or view.voxel_axis != 2:
        raise ConfigError(f"slices '{text[:40]}': only slices of a DICOM series, as they were taken, have such numbers")
    numbers = instance_numbers(view.volume)
    chosen = set(parse_slices(rest, max(numbers, default=0) + 1))
    found = [k for k, number in enumerate(numbers) if number in chosen]
    if not found:
        shown = f"{min(numbers)} to {max(numbers)}" if numbers else "none"
        raise ConfigError(f"slices '{text[:40]}': none has such an instance number, {view.volume.name} has {shown}")
    return found


def slice_id(view: SliceView, index: int) -> str:
    """The case id of a slice, by which an oracle finds its ground truth."""
    return f"{view.volume.name}/{view.axis}/{index}"


class SliceCases(Mapping[str, Case]):
    """The slices of a volume as cases with ground truth, made when asked for: what an oracle policy needs.

    ground_truths: (I, J, K) bool by target, on the grid of the view's volume.
    """

    def __init__(self, view: SliceView, query: str, ground_truths: Mapping[str, np.ndarray]) -> None:
        self._view, self._query, self._ground_truths = view, query, ground_truths
        self._index = {slice_id(view, index): index for index in range(view.count)}

    def __getitem__(self, case_id: str) -> Case:
        index = self._index[case_id]
        masks = {name: self._view.read_mask(ground_truth, index) for name, ground_truth in self._ground_truths.items()}
        return Case(case_id, self._view.image(index), self._query, masks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(eq=False)
class _VolumeAgent:
    """The state of one run."""

    _view: SliceView
    _query: str
    _policy: Policy
    _segmenter: _Counted
    _max_turns: int
    _mask_selection: MaskSelection | None
    _recheck: int
    _provenance: Mapping[str, str]
    _on_episode: Callable[[int, Why, Episode, Image], None] | None
    _on_slice: Callable[[int], None] | None
    _masks: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _asked: list[Asked] = field(default_factory=list, init=False)
    _carried: list[Carried] = field(default_factory=list, init=False)
    _ignored: dict[str, None] = field(default_factory=dict, init=False)
    _policy_calls: int = field(default=0, init=False)

    def result(self) -> VolumeSegmentation:
        """What was found."""
        cost = Cost(self._policy_calls, self._segmenter.counts["opened"], self._segmenter.counts["predicted"])
        asked = sorted(self._asked, key=lambda asked: asked.slice)
        carried = sorted(self._carried, key=lambda carried: (carried.slice, carried.target))
        return VolumeSegmentation(
            dict(self._masks), tuple(asked), tuple(carried), cost, tuple(self._ignored), self._recheck, self._max_turns
        )

    def start_masks(self, start: Mapping[str, np.ndarray], index: int) -> dict[str, Mask]:
        """The masks to refine that slice `index` shows."""
        masks = {name: self._view.read_mask(mask, index) for name, mask in start.items()}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def ask(self, index: int, why: Why, start: Masks) -> dict[str, Mask]:
        """One episode on slice `index`: its masks by target, where not empty. They are kept in the volume; targets of
        `start` that are not found any more, or are called absent, are emptied there, others stay."""
        image = self._view.image(index)
        case = Case(slice_id(self._view, index), image, self._query, start=start)
        [episode] = run_episodes(
            self._policy,
            self._segmenter,
            [case],
            max_turns=self._max_turns,
            mask_selection=self._mask_selection,
            provenance=self._provenance,
            refine=why == "key",
        )
        self._policy_calls += len(episode.turns)
        if self._on_episode is not None:
            self._on_episode(index, why, episode, image)
        absent = {_plain(name) for name in episode.answer.absent}
        known = {_plain(target): target for target in self._masks}
        found: dict[str, Mask] = {}
        for name, mask in episode.answer_masks.items():
            if not mask.any() or _plain(name) in absent:
                continue
            target = known.setdefault(_plain(name), name)
            if target not in self._masks and len({*self._masks, *found}) >= MAX_TARGETS:
                self._ignored[target] = None
            else:
                found[target] = found[target] | mask if target in found else mask
        for target, mask in found.items():
            self._keep(target, index, mask)
        for target in start.keys() & self._masks.keys() - found.keys():
            self._keep(target, index, np.zeros(self._view.size, bool))
        self._asked.append(Asked(index, why, episode.stop, len(episode.turns), tuple(found)))
        return found

    def search(self) -> None:
        """Ask coarse to fine, from the middle outwards, until the agent sees something; at worst 1 in FINEST slices."""
        count, asked = self._view.count, set[int]()
        places = min(FIRST_ASKED, count)
        while True:
            spread = {int((place + 0.5) * count / places) for place in range(places)}
            fresh = sorted(spread - asked, key=lambda index: abs(index - count / 2))
            seen = [bool(self.ask(index, "search", {})) for index in fresh]
            asked |= spread
            if any(seen) or 2 * places * FINEST > count:
                return
            places *= 2

    def fill(self) -> None:
        """Carry masks through every gap between asked slices, and beyond the outermost."""
        asked = sorted({asked.slice for asked in self._asked})
        bounds = [-1, *asked, self._view.count]
        for low, high in pairwise(bounds):
            if high - low > 1:
                self._fill_gap(low, high)

    def _fill_gap(self, low: int, high: int) -> None:
        """The slices strictly between `low` and `high`, which the agent saw, unless they lie outside the volume."""
        below, above = self._shown(low), self._shown(high)
        middle = (low + high) // 2
        both = below.keys() & above.keys()
        known = low >= 0 and high < self._view.count
        gaps = {
            target: _Gap(low, high, below.get(target), above.get(target))
            for target in below.keys() | above.keys()
            if known
        }
        self._sweep(low, {target: middle + 1 if target in both else high for target in below}, below, gaps)
        self._sweep(high, {target: middle if target in both else low for target in above}, above, gaps)

    def _sweep(
        self, origin: int, stops: Mapping[str, int], masks: Mapping[str, Mask], gaps: Mapping[str, _Gap]
    ) -> None:
        """Carry `masks` of slice `origin` on, each target to its slice in `stops`, which is not touched any more."""
        if not masks:
            return
        index, alone = origin, 0
        looks, memory = self._looks(origin, masks), self._segmenter.memory()
        if memory is not None:
            memory.remember(self._view.image(origin), masks)
        step = 1 if any(stop > origin for stop in stops.values()) else -1
        while True:
            index += step
            masks = {
                target: mask for target, mask in masks.items() if mask.any() and (stops[target] - index) * step > 0
            }
            if not masks:
                return
            expected = {
                target: gaps[target].expected(index, mask) if target in gaps else mask for target, mask in masks.items()
            }
            guesses = self._predict(index, expected, looks, memory)
            alone += 1
            doubt = any(guess.doubt for guess in guesses.values())
            if self._recheck and (doubt or alone >= self._recheck):
                start = {
                    target: guess.mask if guess.mask.any() else expected[target] for target, guess in guesses.items()
                }
                found = self.ask(index, "doubt" if doubt else "recheck", start)
                masks, alone = {target: found[target] for target in masks if target in found}, 0
                looks = self._looks(index, masks)
                if memory is not None and masks:
                    memory.remember(self._view.image(index), masks)
                gaps = {
                    target: gaps[target].narrowed(index, mask, upward=step > 0)
                    for target, mask in masks.items()
                    if target in gaps
                }
            else:
                masks = {target: guess.settled(expected[target]) for target, guess in guesses.items()}
                for target, mask in masks.items():
                    self._keep(target, index, mask)
            if self._on_slice is not None:
                self._on_slice(index)

    def _looks(self, index: int, masks: Mapping[str, Mask]) -> dict[str, Look]:
        """How the targets look on a slice that the agent saw."""
        image = self._view.image(index)
        return {target: Look(image, mask) for target, mask in masks.items()}

    def _predict(
        self, index: int, expected: Mapping[str, Mask], looks: Mapping[str, Look], memory: Memory | None
    ) -> dict[str, _Guess]:
        """The segmenter's masks on slice `index` where `expected` are the best guesses, none of them empty."""
        image = self._view.image(index)
        predictions = self._prompted(index, image, expected) if memory is None else memory.predict(image)
        guesses = {}
        for target, mask in expected.items():
            prediction = predictions[target]
            lost = (
                prediction.score < DOUBTED_SCORE
                or not prediction.mask.any()
                or looks[target].kept(image, prediction.mask) < DOUBTED_LOOK
            )
            guess = _Guess(prediction.mask, lost, iou(prediction.mask, mask) < DOUBTED_OVERLAP)
            guesses[target] = guess
            self._carried.append(Carried(index, target, prediction.score, guess.doubt))
        return guesses

    def _prompted(self, index: int, image: Image, expected: Mapping[str, Mask]) -> dict[str, Prediction]:
        """What a segmenter without a memory makes of the boxes and masks that are expected."""
        session, predictions = self._segmenter.open(image), {}
        for target, mask in expected.items():
            box = bounding_box(mask, target)
            if box is None:
                raise SegmenterError(f"slice {index}: nothing is expected of '{target}', so nothing can be asked")
            predictions[target] = session.predict([_wider(box, mask.shape)], mask)
        return predictions

    def _shown(self, index: int) -> dict[str, Mask]:
        """The masks of slice `index` that are not empty; none outside the volume."""
        if not 0 <= index < self._view.count:
            return {}
        masks = {target: self._view.read_mask(mask, index) for target, mask in self._masks.items()}
        return {target: mask for target, mask in masks.items() if mask.any()}

    def _keep(self, target: str, index: int, mask: Mask) -> None:
        if target not in self._masks:
            self._masks[target] = scratch_mask(self._view.volume.shape)
        self._view.write_mask(self._masks[target], index, mask)
        release(self._masks[target])


class Look:
    """The grey levels by which a target stands out from its surroundings on one slice."""

    def __init__(self, image: Image, mask: Mask) -> None:
        """mask: (H, W), not empty."""
        levels = _levels(image)
        reach = max(3, round(0.3 * float(np.sqrt(np.count_nonzero(mask)))))
        around = (distance_outside(~mask) <= reach) & ~mask
        inside, outside = (np.bincount(levels[part], minlength=_LEVELS) + 1.0 for part in (mask, around))
        self._like = inside / inside.sum() > outside / outside.sum()
        self._outside = float(self._like[levels[around]].mean()) if around.any() else 1.0
        self._inside = float(self._like[levels[mask]].mean())

    def kept(self, image: Image, mask: Mask) -> float:
        """How much a mask on another slice looks so: about 1 as the target did, 0 as its surroundings did.

        1 where brightness does not tell them apart: then nothing is known.
        """
        difference = self._inside - self._outside
        if difference < TOLD_BY_BRIGHTNESS or not mask.any():
            return 1.0
        return (float(self._like[_levels(image)[mask]].mean()) - self._outside) / difference


def _levels(image: Image) -> np.ndarray:
    """(H, W): the smoothed brightness in _LEVELS steps."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY), (0, 0), 1.0)
    return grey // (256 // _LEVELS)


@dataclass(frozen=True, slots=True, eq=False)
class _Gap:
    """Two slices that the agent saw, with nothing known between; None where it saw no target."""

    low: int
    high: int
    below: Mask | None
    above: Mask | None

    def expected(self, index: int, neighbour: Mask) -> Mask:
        """The shape on slice `index`: interpolated, or vanishing towards the slice that does not show it."""
        share = (index - self.low) / (self.high - self.low)
        if self.below is not None and self.above is not None:
            mask = between(self.below, self.above, share)
            return mask if mask.any() else neighbour
        shown = self.above if self.below is None else self.below
        away = share if self.below is not None else 1 - share
        return neighbour if shown is None else vanishing(shown, away)

    def narrowed(self, index: int, mask: Mask, *, upward: bool) -> _Gap:
        """What is left of the gap, going up or down, once the agent has seen the target on slice `index`."""
        return replace(self, low=index, below=mask) if upward else replace(self, high=index, above=mask)


@dataclass(frozen=True, slots=True, eq=False)
class _Guess:
    """A mask of the segmenter; `lost`: it finds nothing or does not trust it; `unlike`: not what was expected."""

    mask: Mask
    lost: bool
    unlike: bool

    @property
    def doubt(self) -> bool:
        """Whether somebody should look."""
        return self.lost or self.unlike

    def settled(self, expected: Mask) -> Mask:
        """What is kept where nobody looks: a lost target ends, a mask unlike the expected one gives way to it."""
        return np.zeros_like(expected) if self.lost else expected if self.unlike else self.mask


def _plain(name: str) -> str:
    """A target's name as compared between slices: "The liver." is "liver"."""
    return target_of(name).casefold()


def between(below: Mask, above: Mask, share: float) -> Mask:
    """The shape that is `share` of the way from one (H, W) mask to the other, by their signed distances."""
    return np.asarray((1 - share) * _signed_depth(below) + share * _signed_depth(above) > 0)


def vanishing(mask: Mask, share: float) -> Mask:
    """The (H, W) mask without an outer layer of `share` of its greatest depth: whole at 0, gone at 1."""
    depth = interior_depth(mask)
    return np.asarray(mask & (depth > share * depth.max()))


def _signed_depth(mask: Mask) -> np.ndarray:
    depth: np.ndarray = interior_depth(mask) - distance_outside(~mask)
    return depth


def _wider(box: Box, size: tuple[int, ...]) -> Box:
    margin_x = max(2, round(BOX_MARGIN * (box.x1 - box.x0)))
    margin_y = max(2, round(BOX_MARGIN * (box.y1 - box.y0)))
    return replace(
        box,
        x0=max(0, box.x0 - margin_x),
        y0=max(0, box.y0 - margin_y),
        x1=min(size[1], box.x1 + margin_x),
        y1=min(size[0], box.y1 + margin_y),
    )


class _Counted:
    """A segmenter that counts what it is asked."""

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self.name = segmenter.name
        self.counts = Counter[str]()

    def open(self, image: Image) -> _CountedSession:
        """See `Segmenter`."""
        self.counts["opened"] += 1
        return _CountedSession(self, self._segmenter.open(image))

    def with_multimask(self) -> _Counted:
        """See `segmenters.Multimask`; counts on here. The same segmenter where it has no such way."""
        twin = copy(self)
        if isinstance(self._segmenter, Multimask):
            twin._segmenter = self._segmenter.with_multimask()
        return twin

    def memory(self) -> _CountedMemory | None:
        """An empty memory, where the segmenter has one."""
        remembers = getattr(self._segmenter, "memory", None)
        memory = remembers() if remembers is not None else None
        return None if memory is None else _CountedMemory(self, memory)

    def describe(self) -> dict[str, str]:
        """See `Segmenter`."""
        return self._segmenter.describe()


class _CountedSession:
    def __init__(self, owner: _Counted, session: SegmenterSession) -> None:
        self._owner, self._session = owner, session

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        """See `SegmenterSession`."""
        self._owner.counts["predicted"] += 1
        return self._session.predict(prompts, prior)


class _CountedMemory:
    def __init__(self, owner: _Counted, memory: Memory) -> None:
        self._owner, self._memory = owner, memory

    def remember(self, image: Image, masks: Masks) -> None:
        """See `segmenters.Memory`."""
        self._owner.counts["opened"] += 1
        self._memory.remember(image, masks)

    def predict(self, image: Image) -> dict[str, Prediction]:
        """See `segmenters.Memory`."""
        self._owner.counts["opened"] += 1
        predictions = self._memory.predict(image)
        self._owner.counts["predicted"] += len(predictions)
        return predictions
