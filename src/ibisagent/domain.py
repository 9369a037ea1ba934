"""The vocabulary of the project: images, cases, actions, turns, episodes. Frozen, and each checks itself.

Conventions, everywhere outside `protocol`: coordinates are integer pixels, origin top left; points are (x, y), arrays
are indexed [row, column], sizes are (H, W). A `Mask` is a bool array of shape (H, W) on the image's own pixel grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ibisagent.errors import ConfigError, DataError

Mask: TypeAlias = np.ndarray
Masks: TypeAlias = Mapping[str, Mask]
StopReason = Literal["stopped", "max_turns", "malformed", "repeated", "open"]
"""Why an episode ended; "open": it is a user's session, in which nobody has said stop."""
MaskSelection = Literal["best", "last"]
"""Which masks of an episode are its answer: see `Episode.answer_masks`."""
MASK_SELECTION: MaskSelection = "best"

MAX_QUERY_CHARS = 2_000
MAX_NAME_CHARS = 200  # of an object
MAX_TARGETS = 8
MAX_PIXELS = 2**26  # larger images and masks are refused before they are decoded; 8192 x 8192, 200 MB as RGB


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
    """End the episode with a text answer; `absent` names the asked-for objects that the image does not show."""

    answer: str = ""
    absent: tuple[str, ...] = ()


Action: TypeAlias = Click | Box | Undo | Stop
Prompt: TypeAlias = Click | Box
Standing: TypeAlias = tuple[tuple[int, Prompt], ...]
"""Prompts that stand, oldest first, each with the number (from 0) of the turn that gave it."""


@dataclass(frozen=True, eq=False)
class Image:
    """An image as every part of the package sees it.

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


def check_choice(word: str, choices: object, what: str) -> Any:
    """`word`, one of the `choices` of a Literal type. ConfigError, which says `what` it is for, where it is none."""
    *others, last = get_args(choices)
    if word not in (*others, last):
        raise ConfigError(f"{what} '{word}': give {', '.join(others)} or {last}")
    return word


def check_mask_selection(word: str) -> MaskSelection:
    """`word` as a MaskSelection; ConfigError where it is none."""
    chosen: MaskSelection = check_choice(word, MaskSelection, "unknown mask selection")
    return chosen


def check_query(query: str) -> str:
    """The query without surrounding blanks.

    ConfigError if it has no letter, it is longer than MAX_QUERY_CHARS or it is no Unicode text.
    """
    query = query.strip()
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the query holds half a character, at place {error.start}: write it in Unicode") from error
    if not query:
        raise ConfigError("the query is empty: say what to segment, for example 'optic disc'")
    if not any(letter.isalpha() for letter in query):
        raise ConfigError(f"the query '{query[:40]}' has no letters: say what to segment, for example 'optic disc'")
    if len(query) > MAX_QUERY_CHARS:
        raise ConfigError(f"the query has {len(query)} characters, at most {MAX_QUERY_CHARS} are read: shorten it")
    return query


@dataclass(frozen=True, eq=False)
class Case:
    """One question about one image, with its ground truth where that is known.

    targets: ground truth by object name; an all-False mask says that the object is absent; None where no ground truth
    is known.
    start: masks to refine. answer: the ground truth of a closed question. meta: facts that no policy sees (modality,
    ...).
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
        if long := next((name for name in self.targets or {} if len(name) > MAX_NAME_CHARS), None):
            raise DataError(
                f"an object's name has {len(long)} characters, at most {MAX_NAME_CHARS} can be said; shorten it"
            )
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

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The clicks and boxes, up to a Stop: what comes after it is never done."""
        done = takewhile(lambda action: not isinstance(action, Stop), self.actions)
        return tuple(action for action in done if isinstance(action, Click | Box))


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy wrote, with what it cost. `tokens` is None where the policy does not count them.

    drafts: masks, by target, that a segmenter is to begin from, in place of all earlier prompts of the target.
    """

    text: str
    tokens: int | None = None
    seconds: float = 0.0
    drafts: Masks = field(default_factory=dict, compare=False)


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
    """All that a policy may see. `case_id` only tells episodes apart; it carries no ground truth."""

    case_id: str
    image: Image
    query: str
    masks: Masks = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished run of the loop.

    provenance: policy, segmenter, dialect, seed and versions that produced it. mask_selection: which of its masks are
    the answer, see `answer_masks`.
    """

    case_id: str
    query: str
    size: tuple[int, int]
    image_sha256: str
    image_source: str
    start: Masks
    turns: tuple[Turn, ...]
    stop: StopReason
    provenance: Mapping[str, str]
    mask_selection: MaskSelection = MASK_SELECTION

    @property
    def masks(self) -> Masks:
        """The final masks by target name; the start masks if no turn was taken."""
        return self.turns[-1].after if self.turns else self.start

    @property
    def human_turns(self) -> frozenset[int]:
        """Numbers (from 0) of the turns that a user took in a session; those of the agent are all others."""
        return frozenset(int(number) - 1 for number in self.provenance.get("people_turns", "").split())

    @property
    def answer_masks(self) -> Masks:
        """The masks that are the answer, (H, W) bool by target: what every face of the package hands out.

        There is one for each target that has a mask at the end, and an empty one for each object that the answer calls
        absent and that has none. "last": they are the masks at the end. "best": of each target it is the mask that the
        segmenter scored highest (`Turn.segmenter_score`; of two equals the later) among those that still stand:

        - all the prompts that led to it stand at the end, so nothing that was taken back is chosen;
        - all prompts that a user gave for the target, and that stand, are among them: a score never overrules a
          correction. What the agent builds on it counts;
        - the start mask is the answer where no prompt stands.
        """
        empty = np.zeros(self.size, dtype=bool)
        final = self.masks
        made = self.answer_turns if self.mask_selection == "best" else dict.fromkeys(final)
        masks = {name: final[name] if turn is None else self.turns[turn].after[name] for name, turn in made.items()}
        return {**dict.fromkeys(self.answer.absent, empty), **masks}

    @property
    def answer_score(self) -> float | None:
        """The segmenter's own estimate of the IoU of `answer_masks`, in [0, 1], mean over the targets that have one."""
        turns = [turn for turn in self.answer_turns.values() if turn is not None]
        scores = [score for turn in turns if (score := self.turns[turn].segmenter_score) is not None]
        return float(np.mean(scores)) if scores else None

    @property
    def answer_turns(self) -> dict[str, int | None]:
        """Of each target with a mask at the end, the turn (from 0) that made the answer; None: no prompt stands."""
        made: dict[str, int | None] = dict.fromkeys(self.masks)
        at_end = standing_by_turn(self.turns)
        human = self.human_turns
        kept = {name: {one for one in at_end if one[1].target == name} for name in made}
        needed = {name: {one for one in prompts if one[0] in human} for name, prompts in kept.items()}
        stand: Standing = ()
        for number, turn in enumerate(self.turns):
            before, stand = stand, stand_after(stand, number, turn.reply.actions)
            for name in made.keys() & turn.after.keys() if stand is not before else ():
                prompts = {one for one in stand if one[1].target == name}
                changed = prompts != {one for one in before if one[1].target == name}
                if changed and prompts and needed[name] <= prompts <= kept[name]:
                    earlier = made[name]
                    last_wins = earlier is None or self.mask_selection == "last"
                    if last_wins or self._score(number) >= self._score(earlier):
                        made[name] = number
        return made

    def _score(self, turn: int | None) -> float:
        score = None if turn is None else self.turns[turn].segmenter_score
        return -1.0 if score is None else score

    @property
    def undone_turns(self) -> frozenset[int]:
        """Turns (from 0) whose clicks and boxes were all taken back by an Undo: wrong ones, from which none learns."""
        at_end = {number for number, _ in standing_by_turn(self.turns)}
        undone = set[int]()
        stand: Standing = ()
        for number, turn in enumerate(self.turns):
            new = {*turn.reply.prompts}.difference(prompt for _, prompt in stand)
            if new and number not in at_end:
                undone.add(number)
            stand = stand_after(stand, number, turn.reply.actions)
        return frozenset(undone)

    @property
    def answer(self) -> Stop:
        """The final Stop; an empty one if the episode ended otherwise."""
        return (self.turns[-1].reply.stop if self.turns else None) or Stop()

    @property
    def clicks(self) -> int:
        """How many clicks and boxes were given, undone ones included."""
        return sum(isinstance(action, Click | Box) for turn in self.turns for action in turn.reply.actions)


QUERY_PLACE = "{query}"
"""Stands for the query in the texts of a `Wording`."""


@dataclass(frozen=True, slots=True)
class Wording:
    """What a policy is told: in the system prompt, in the first turn, and in later ones."""

    system: str
    first: str
    refine: str


@dataclass(frozen=True, slots=True)
class LoopRules:
    """How an episode goes, where the weights were made in another loop than ours; the defaults are ours.

    repeats: so many turns in a row with the same prompts end it; 1: any prompt that stands already ends it, and is not
    given again. unreadable: so many unreadable replies in a row end it. mask_selection: which masks are its answer.
    multimask: the segmenter is asked for more than one mask at every prompt, where it can be. max_pixels: area that
    images are shrunk to.
    """

    repeats: int = 1
    unreadable: int = 2
    mask_selection: MaskSelection = MASK_SELECTION
    multimask: bool = False
    max_pixels: int | None = None


OUR_RULES = LoopRules()


def union(masks: Masks, names: Sequence[str], size: tuple[int, int]) -> Mask:
    """Pixels that belong to any of `names`; missing names count as empty. Shape `size`."""
    merged = np.zeros(size, dtype=bool)
    for name in names:
        if name in masks:
            merged |= masks[name]
    return merged


def same_masks(a: Masks, b: Masks) -> bool:
    """Whether both hold the same targets with the same pixels."""
    return a.keys() == b.keys() and all(mask is b[name] or np.array_equal(mask, b[name]) for name, mask in a.items())


def stand_after(standing: Standing, turn: int, actions: Sequence[Action], *, again: bool = False) -> Standing:
    """What stands once the actions of turn number `turn` are done: the one place that says what an Undo takes back.

    Actions count in order, up to a Stop. An Undo takes back the newest prompts over all targets, of this turn or
    earlier ones, all where there are fewer. A prompt that stands already says nothing new and is dropped, unless it
    counts `again`. The very same tuple comes back where the same prompts stand in the end, whatever was undone and
    given again on the way.
    """
    after = list(standing)
    for action in actions:
        if isinstance(action, Stop):
            break
        if isinstance(action, Undo):
            del after[max(0, len(after) - action.steps) :]
        elif again or all(action != prompt for _, prompt in after):
            after.append((turn, action))
    same = [prompt for _, prompt in after] == [prompt for _, prompt in standing]
    return standing if same else tuple(after)


def standing_by_turn(turns: Sequence[Turn]) -> Standing:
    """The clicks and boxes of `turns` that no Undo took back, oldest first, each with the number of its turn."""
    stand: Standing = ()
    for number, turn in enumerate(turns):
        stand = stand_after(stand, number, turn.reply.actions)
    return stand


def standing(turns: Sequence[Turn]) -> list[Prompt]:
    """The clicks and boxes of `turns` that no Undo took back, oldest first."""
    return [prompt for _, prompt in standing_by_turn(turns)]
