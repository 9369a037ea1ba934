"""The vocabulary of the project: images, cases, actions, turns, episodes. Frozen, and each checks itself.

Conventions, everywhere outside `protocol`: coordinates are integer pixels, origin top left; points are (x, y), arrays
are indexed [row, column], sizes are (H, W). A `Mask` is a bool array of shape (H, W) on the image's own pixel grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from ibisagent.errors import ConfigError, DataError

Mask: TypeAlias = np.ndarray
Masks: TypeAlias = Mapping[str, Mask]
StopReason = Literal["stopped", "max_turns", "malformed", "repeated", "open"]
"""Why an episode ended; "open": it is a person's session, in which nobody has said stop."""
Keep = Literal["last", "best"]
"""Which mask of an episode is handed out: see `Episode.kept`."""

MAX_QUERY_CHARS = 2_000
MAX_TARGETS = 8
MAX_PIXELS = 2**26  # larger pictures and masks are refused before they are decoded; 8192 x 8192, 200 MB as RGB


@dataclass(frozen=True, slots=True)
class Click:
    """One point prompt: pixel column `x`, row `y`; positive means "this belongs to `target`"."""

    x: int
    y: int
    positive: bool
    target: str


@dataclass(frozen=True, slots=True)
class Box:
    """One box prompt around `target`, half-open: x0 <= x < x1 and y0 <= y < y1, in pixels."""

    x0: int
    y0: int
    x1: int
    y1: int
    target: str

    def __post_init__(self) -> None:
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise ConfigError(f"box {self.x0},{self.y0},{self.x1},{self.y1} has no area: give x0 < x1 and y0 < y1")


@dataclass(frozen=True, slots=True)
class Undo:
    """Take back the last `steps` clicks or boxes, over all targets, newest first."""

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Undo of {self.steps} steps: give 1 or more")


@dataclass(frozen=True, slots=True)
class Stop:
    """End the episode with an answer in words; `absent` names the asked-for objects that the image does not show."""

    answer: str = ""
    absent: tuple[str, ...] = ()


Action: TypeAlias = Click | Box | Undo | Stop
Prompt: TypeAlias = Click | Box


@dataclass(frozen=True, eq=False)
class Image:
    """A picture as every part of the package sees it.

    pixels: (H, W, 3) uint8 RGB. spacing_mm: (row, column) distance of pixel centres, or None where unknown.
    source: the file or URL it came from, for messages and records only.
    """

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise DataError(f"{self.source or 'image'}: expected (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
        if 0 in pixels.shape:
            raise DataError(f"{self.source or 'image'}: has no pixels ({pixels.shape[1]} x {pixels.shape[0]})")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return int(self.pixels.shape[0]), int(self.pixels.shape[1])

    @cached_property
    def sha256(self) -> str:
        """Hash of shape and pixels: the key of every cache, and what a record names."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()


def check_masks(masks: Masks, size: tuple[int, int], where: str) -> None:
    """Raise DataError unless every mask is bool and of `size` (H, W), and there are at most MAX_TARGETS."""
    if len(masks) > MAX_TARGETS:
        raise DataError(f"{where}: {len(masks)} targets, at most {MAX_TARGETS} can be told apart; split the case")
    for name, mask in masks.items():
        if mask.dtype != np.bool_ or mask.shape != size:
            raise DataError(f"{where}: mask '{name}' is {mask.shape} {mask.dtype}, expected {size} bool")


def check_query(query: str) -> str:
    """The query without surrounding blanks; ConfigError if nothing is left or it is longer than MAX_QUERY_CHARS."""
    query = query.strip()
    if not query:
        raise ConfigError("the query is empty: say what to segment, for example 'optic disc'")
    if len(query) > MAX_QUERY_CHARS:
        raise ConfigError(f"the query has {len(query)} characters, at most {MAX_QUERY_CHARS} are read: shorten it")
    return query


@dataclass(frozen=True, eq=False)
class Case:
    """One question about one image, with its truth where that is known.

    targets: truth by object name; an all-False mask says that the object is absent; None where no truth is known.
    start: masks to refine. answer: the truth of a closed question. meta: facts that no policy sees (modality, ...).
    """

    id: str
    image: Image
    query: str
    targets: Masks | None = None
    start: Masks = field(default_factory=dict)
    answer: str | None = None
    patient: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_query(self.query)
        check_masks(self.targets or {}, self.image.size, f"case {self.id}")
        check_masks(self.start, self.image.size, f"case {self.id}, start")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a completion means. `problem` says why it could not be read; then `actions` is empty."""

    thought: str = ""
    actions: tuple[Action, ...] = ()
    problem: str | None = None

    @property
    def stop(self) -> Stop | None:
        """The stop among the actions, if there is one."""
        return next((action for action in self.actions if isinstance(action, Stop)), None)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy wrote, with what it cost. `tokens` is None where the policy does not count them."""

    text: str
    tokens: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One step of the loop, with the masks before and after it, so that nobody needs a model to judge it.

    segmenter_score: the segmenter's own mean IoU estimate of the masks it changed, in [0, 1]; None if it changed none.
    """

    completion: Completion
    reply: Reply
    before: Masks
    after: Masks
    segmenter_score: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """All that a policy may see. `case_id` only tells episodes apart; it carries no truth."""

    case_id: str
    image: Image
    query: str
    masks: Masks = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished run of the loop. made_by: policy, segmenter, dialect, seed and versions that produced it."""

    case_id: str
    query: str
    size: tuple[int, int]
    image_sha256: str
    image_source: str
    start: Masks
    turns: tuple[Turn, ...]
    stop: StopReason
    made_by: Mapping[str, str]

    @property
    def masks(self) -> Masks:
        """The final masks by target name; the start masks if no turn was taken."""
        return self.turns[-1].after if self.turns else self.start

    def kept(self, keep: Keep) -> Masks:
        """The masks to hand out. "last": the final ones. "best": of each target the mask that the segmenter itself
        thought best, by `Turn.segmenter_score` of the turns that changed it (of two equals the later)."""
        if keep == "last":
            return self.masks
        best = dict(self.masks)
        scores = dict.fromkeys(best, -1.0)
        for turn in self.turns:
            for name, mask in turn.after.items():
                changed = name not in turn.before or not np.array_equal(mask, turn.before[name])
                score = -1.0 if turn.segmenter_score is None else turn.segmenter_score
                if name in best and changed and score >= scores[name]:
                    best[name], scores[name] = mask, score
        return best

    @property
    def answer(self) -> Stop:
        """The final Stop; an empty one if the episode ended otherwise."""
        return (self.turns[-1].reply.stop if self.turns else None) or Stop()

    @property
    def clicks(self) -> int:
        """How many clicks and boxes were given, undone ones included."""
        return sum(isinstance(action, Click | Box) for turn in self.turns for action in turn.reply.actions)


def union(masks: Masks, names: Sequence[str], size: tuple[int, int]) -> Mask:
    """Pixels that belong to any of `names`; missing names count as empty. Shape `size`."""
    merged = np.zeros(size, dtype=bool)
    for name in names:
        if name in masks:
            merged |= masks[name]
    return merged


def kept_prompts(turns: Sequence[Turn]) -> list[Prompt]:
    """The clicks and boxes of `turns` that no Undo took back, oldest first."""
    kept: list[Prompt] = []
    for turn in turns:
        for action in turn.reply.actions:
            if isinstance(action, Undo):
                del kept[max(0, len(kept) - action.steps) :]
            elif isinstance(action, Click | Box):
                kept.append(action)
    return kept
