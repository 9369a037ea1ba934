"""The one loop: a policy writes, `SegmentationEnv` reads it and asks the segmenter (paper, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from types import MappingProxyType

import numpy as np

from ibisagent import protocol
from ibisagent.domain import (
    MAX_TARGETS,
    OUR_RULES,
    Action,
    Box,
    Case,
    Completion,
    Episode,
    Image,
    Mask,
    Masks,
    MaskSelection,
    Observation,
    Prompt,
    Reply,
    Standing,
    StopReason,
    Turn,
    stand_after,
)
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.imaging.masks import expected_iou, iou
from ibisagent.policies.base import Knowing, Policy, Proposal, proposals
from ibisagent.query import target_of
from ibisagent.segmenters import Multimask, Prediction, Segmenter, SegmenterSession

MAX_TURNS = 20
"""Most turns of an episode where the policy states no limit of its own, as in the paper; see `turn_limit`."""


@cache
def package_version() -> str:
    """The version of this package, for records."""
    try:
        return version("ibisagent")
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "source tree"


def turn_limit(policy: object, query: str = "") -> int:
    """Most turns of an episode of `policy` where the caller names none: its own `max_turns`, else MAX_TURNS.

    query: what is asked; as often as that, and a turn for the answer, where the policy is asked for one object after
    another. ConfigError where it does not settle what is asked for.
    """
    own: int | None = getattr(policy, "max_turns", None)
    vocabulary = policy.vocabulary if isinstance(policy, Knowing) else None
    limit, count = MAX_TURNS if own is None else own, vocabulary.count(query) if vocabulary and query else 1
    return limit * count + (count > 1)


def mask_choice(policy: Policy, wanted: MaskSelection | None) -> MaskSelection:
    """Which masks of an episode of `policy` are its answer: those `wanted`, None as is usual for its dialect."""
    return wanted or protocol.DIALECTS[policy.dialect].rules.mask_selection


@dataclass(frozen=True, slots=True, eq=False)
class _Object:
    """One target as it stands: all its prompts, its mask, and what the segmenter wants back as prior."""

    prompts: tuple[Prompt, ...]
    mask: Mask
    prior: np.ndarray
    score: float | None


_Objects = Mapping[str, _Object]


LEAD = 0.4
"""How much more another reply must be worth than a policy's first one; see `PromptState.take_best`."""
KEPT_STATES = 4  # of a prompt state, the latest


class PromptState:
    """Masks as a pure function of the start masks and the prompts of every turn, with Undo.

    `_batches[i]` are the prompts of one turn that stand and lead from `_states[i]` to `_states[i + 1]`. An Undo that
    takes back part of a turn leaves what that turn would have done without them. States hold a segmenter's logits, half
    a megabyte and more: only the first and the latest are kept, and an Undo that goes back further has the others made
    again.
    """

    def __init__(self, image: Image, segmenter: Segmenter, start: Masks, dialect: str = "") -> None:
        """dialect: whose ways of prompting are followed (`protocol.Dialect`); "" or an unknown one has none."""
        speech = protocol.DIALECTS.get(dialect)
        self._image = image
        rules = speech.rules if speech else OUR_RULES
        multimask = rules.multimask and isinstance(segmenter, Multimask)
        self._segmenter = segmenter.with_multimask() if multimask else segmenter  # type: ignore[attr-defined]
        self._repeats = rules.repeats
        self._session: SegmenterSession | None = None
        self._said: tuple[tuple[Action, ...], ...] = ()  # the actions of every turn
        self._drafts: tuple[Masks, ...] = ()  # of every turn, see `Completion`
        self._standing: Standing = ()
        self._states: list[_Objects | None] = [{name: _Object((), mask, mask, None) for name, mask in start.items()}]

    @property
    def masks(self) -> Masks:
        """The masks as they stand, by target."""
        return MappingProxyType({name: thing.mask for name, thing in self._objects.items()})

    @property
    def _objects(self) -> _Objects:
        latest = self._states[-1]
        assert latest is not None  # noqa: S101 - the latest states are kept
        return latest

    def open(self) -> None:
        """Let the segmenter see the image now, once for all copies."""
        if self._session is None:
            self._session = self._segmenter.open(self._image)

    def copy(self) -> PromptState:
        """A prompt state that goes its own way from here; what both have in common is shared."""
        twin = copy(self)
        twin._states = list(self._states)
        return twin

    def apply_reply(self, completion: Completion, reply: Reply) -> tuple[Turn, bool]:
        """Apply a reply that was read from `completion`: the turn, and whether it said anything new (see `apply`).

        Raises SegmenterError and ConfigError as the segmenter does; then nothing has changed.
        """
        before, objects = self.masks, self._objects
        names = {*objects, *(prompt.target for prompt in reply.prompts)}
        if len(names) > MAX_TARGETS:
            reply = replace(reply, actions=(), problem=f"names more than {MAX_TARGETS} objects")
        is_new = self.apply(reply.actions, completion.drafts)
        scores = [
            thing.score
            for name, thing in self._objects.items()
            if thing is not objects.get(name) and thing.score is not None
        ]
        return Turn(completion, reply, before, self.masks, float(np.mean(scores)) if scores else None), is_new

    def take_best(
        self, proposal: Proposal, read: Callable[[Completion], tuple[Completion, Reply]]
    ) -> tuple[Turn, bool]:
        """Take the best of multiple replies for one turn; returns as `apply_reply`. read: see `read_reply`.

        Each that prompts the segmenter is tried. A turn is worth the segmenter's own score, and with a belief
        (`policies.base.Proposal`) the IoU that its masks would have if that was right: the segmenter knows whether a
        mask has an object's outline, the policy whether it is the object that was asked for. As both can be wrong,
        another reply than the first one has to be worth LEAD more. Without a belief it is the mean IoU of its masks
        with those of the others that counts: what multiple prompts lead to is more likely right. The first reply is
        taken where it does not prompt (it stops, or cannot be read), or where there is no other one. Raises as
        `apply_reply`.
        """
        replies = [read(completion) for completion in proposal.completions]
        tried = [one for one in replies if one[1].prompts]
        if not replies[0][1].prompts or len(tried) < 2:
            return self.apply_reply(*replies[0])
        self.open()
        trials = [self._try(*one) for one in tried]
        turns = [trial.turn for trial in trials]
        if proposal.belief is None:
            worth = [_agreed(turn, [other for other in turns if other is not turn]) for turn in turns]
        else:
            worth = [_expected(turn, proposal.belief) for turn in turns]
            worth[0] += LEAD
        scores = [turn.segmenter_score or 0.0 for turn in turns]
        best = trials[int(np.argmax(np.add(scores, worth)))]
        left = best.left
        self._said, self._drafts, self._standing, self._states = left._said, left._drafts, left._standing, left._states
        return best.turn, best.is_new

    def _try(self, completion: Completion, reply: Reply) -> _Trial:
        left = self.copy()
        return _Trial(left, *left.apply_reply(completion, reply))

    def apply(self, actions: Sequence[Action], drafts: Masks = MappingProxyType({})) -> bool:
        """Apply one reply's actions as `domain.stand_after` says; False if it has prompts, and yet nothing changes.

        Each target is predicted once for all its new prompts, from its draft where there is one (`Completion`). Nothing
        changes if the segmenter raises.
        """
        said, all_drafts = (*self._said, tuple(actions)), (*self._drafts, drafts)
        again = len({*said[-self._repeats :]}) > 1 or len(said) < self._repeats
        standing = stand_after(self._standing, len(self._said), actions, again=again)
        batches, old = _batches(standing), _batches(self._standing)
        same = next((i for i, pair in enumerate(zip(batches, old, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(batches), len(old)) if same is None else same
        known = next(i for i in range(same, -1, -1) if self._states[i] is not None)
        states = self._states[: known + 1]
        for batch in batches[known:]:
            states.append(self._predict(states[-1] or {}, batch, all_drafts))
        for index in range(1, len(states) - KEPT_STATES):
            states[index] = None
        is_new = standing is not self._standing or not Reply("", tuple(actions)).prompts
        self._said, self._drafts, self._standing, self._states = said, all_drafts, standing, states
        return is_new

    def _predict(self, state: _Objects, batch: Standing, drafts: Sequence[Masks]) -> _Objects:
        self.open()  # the costly part: an episode without any prompt never embeds its image
        assert self._session is not None  # noqa: S101 - open
        objects = dict(state)
        draft = drafts[batch[0][0]]
        for target in dict.fromkeys(prompt.target for _, prompt in batch):
            begun = draft.get(target)
            old = state.get(target) if begun is None else None
            new = [prompt for _, prompt in batch if prompt.target == target]
            prompts = (*(old.prompts if old else ()), *new)
            prior = old.prior if old else begun if begun is not None and begun.any() else None
            if not (old and old.prompts) and any(isinstance(prompt, Box) for prompt in new):
                prior = None  # a box says where all of the object is: a start mask would only hold it elsewhere
            prediction = self._session.predict(prompts, prior)
            _check_prediction(prediction, self._image.size, self._segmenter.name)
            objects[target] = _Object(prompts, prediction.mask, prediction.logits, prediction.score)
        return objects


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """A reply that was tried: the prompt state that it left, and what `PromptState.apply_reply` gave."""

    left: PromptState
    turn: Turn
    is_new: bool


def _batches(standing: Standing) -> list[Standing]:
    """What stands, turn by turn, of each turn of which any prompt stands."""
    return [tuple(batch) for _, batch in groupby(standing, key=lambda one: one[0])]


def _check_prediction(prediction: Prediction, size: tuple[int, int], segmenter: str) -> None:
    mask, score = prediction.mask, prediction.score
    if mask.shape != size or mask.dtype != np.bool_ or not (math.isfinite(score) and 0 <= score <= 1):
        raise SegmenterError(
            f"segmenter {segmenter}: gave a mask {mask.shape} {mask.dtype} with score {score},"
            f" expected {size} bool and a score in [0, 1]; check its weights and version"
        )


def read_reply(
    completion: Completion, size: tuple[int, int], dialect: str, default_target: str
) -> tuple[Completion, Reply]:
    """What a policy wrote, fit to be stored, and what it means on an image of `size` (H, W). Never raises for text."""
    text = completion.text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be stored
    return replace(completion, text=text), protocol.parse(text, size, dialect=dialect, default_target=default_target)


def stop_reason(turns: Sequence[Turn], is_new: bool, dialect: str) -> StopReason | None:
    """Why a policy's run ends with the last of `turns`, the number of turns aside; is_new: it said anything new."""
    unreadable = protocol.DIALECTS[dialect].rules.unreadable
    if turns[-1].reply.stop is not None:
        return "stopped"
    if not is_new:
        return "repeated"
    last = turns[-unreadable:]
    malformed = len(last) == unreadable and all(turn.reply.problem is not None for turn in last)
    return "malformed" if malformed else None


class SegmentationEnv:
    """One case, one episode, then discard. It never looks at the case's ground truth.

    - Actions of one reply apply in order; each target is predicted once per turn, from all its prompts so far and the
      segmenter's previous logits. A start mask is the first prior.
    - Undo takes back the newest prompts over all targets and restores the exact earlier state.
    - A reply that cannot be read, or that names more than MAX_TARGETS objects, changes nothing; the second in a row
      ends the episode ("malformed"). A turn whose prompts change nothing, as they stand already, ends it ("repeated"),
      so does turn number `max_turns` ("max_turns") and a Stop ("stopped"). A dialect may have other rules
      (`protocol.Dialect`).
    """

    def __init__(
        self,
        case: Case,
        segmenter: Segmenter,
        *,
        dialect: str,
        max_turns: int = MAX_TURNS,
        mask_selection: MaskSelection | None = None,
        provenance: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """dialect: name in `protocol.DIALECTS`. max_turns: for a policy's own limit give `turn_limit(policy)`.

        mask_selection: which masks are the episode's answer; None as is usual for the dialect. provenance: more facts
        for the record, such as seed, weights and runtime.

        Raises ConfigError for an unknown dialect or max_turns < 1.
        """
        rules = protocol.dialect_of(dialect).rules
        if max_turns < 1:
            raise ConfigError(f"max_turns is {max_turns}; give 1 or more")
        self.dialect = dialect
        self.max_turns = max_turns
        self._mask_selection = mask_selection or rules.mask_selection
        self._case_id, self._image, self._query, self._start = case.id, case.image, case.query, dict(case.start)
        self._default_target = target_of(case.query)
        self._prompt_state = PromptState(case.image, segmenter, self._start, dialect)
        self._provenance = {
            "segmenter": segmenter.name,
            "dialect": dialect,
            "max_turns": str(max_turns),
            "ibisagent": package_version(),
            **provenance,
        }
        self._turns: list[Turn] = []
        self._stop: StopReason | None = None

    @property
    def observation(self) -> Observation:
        """What the policy may see now."""
        return Observation(self._case_id, self._image, self._query, self._prompt_state.masks, tuple(self._turns))

    @property
    def done(self) -> bool:
        """Whether the episode has ended."""
        return self._stop is not None

    def step(self, completion: Completion) -> Turn:
        """Read one completion, apply its actions and record the turn.

        Raises SegmenterError when the segmenter fails (the environment is as it was before the step) and ConfigError
        when the episode has already ended. Whatever the completion says never raises.
        """
        return self._record(*self._prompt_state.apply_reply(*self._read(completion)))

    def _read(self, completion: Completion) -> tuple[Completion, Reply]:
        if self._stop is not None:
            raise ConfigError(f"case {self._case_id}: the episode has ended ({self._stop}); open a new environment")
        return read_reply(completion, self._image.size, self.dialect, self._default_target)

    def _record(self, turn: Turn, is_new: bool) -> Turn:
        self._turns.append(turn)
        limit: StopReason | None = "max_turns" if len(self._turns) >= self.max_turns else None
        self._stop = stop_reason(self._turns, is_new, self.dialect) or limit
        return turn

    @property
    def has_start(self) -> bool:
        """Whether a mask was brought."""
        return any(mask.any() for mask in self._start.values())

    def step_best(self, proposal: Proposal) -> Turn:
        """Take the best of multiple completions for one turn (`PromptState.take_best`), and record that turn alone.

        Raises as `step`.
        """
        return self._record(*self._prompt_state.take_best(proposal, self._read))

    def truncate(self) -> None:
        """End the episode here, as "max_turns": for callers with another limit, such as a trainer's context length.

        One that has ended stays as it is.
        """
        self._stop = self._stop or "max_turns"

    def episode(self) -> Episode:
        """The finished episode; ConfigError while it still runs."""
        if self._stop is None:
            raise ConfigError(f"case {self._case_id}: the episode has not ended yet; step until `done`")
        image = self._image
        return Episode(
            self._case_id,
            self._query,
            image.size,
            image.sha256,
            image.source,
            self._start,
            tuple(self._turns),
            self._stop,
            self._provenance,
            self._mask_selection,
        )


def rollout(
    policy: Policy,
    envs: Sequence[SegmentationEnv],
    *,
    on_turn: Callable[[int, Turn], None] | None = None,
    refine: bool = True,
) -> list[Episode]:
    """Run all `envs` to their end and return their episodes in order; `provenance` names the policy.

    All live environments are answered in one batch per turn; what a `Proposer` offers is tried, and the best taken
    (`SegmentationEnv.step_best`). on_turn: called with the environment's index and its new turn.
    refine: whether a `Knowing` policy begins anew from masks that were brought; else it may leave them as they are, as
    suits masks that are likely right.

    Raises PolicyError and SegmenterError when machinery fails, ConfigError when an environment reads another dialect
    than the policy writes.
    """
    for env in envs:
        if env.dialect != policy.dialect:
            raise ConfigError(f"policy {policy.name} writes dialect {policy.dialect}, its environment {env.dialect}")
    if refine and isinstance(policy, Knowing):
        _refine(policy, envs, on_turn)
    while live := [index for index, env in enumerate(envs) if not env.done]:
        offered = proposals(policy, [envs[index].observation for index in live])
        for index, proposal in zip(live, offered, strict=True):
            turn = envs[index].step_best(proposal)
            if on_turn is not None:
                on_turn(index, turn)
    episodes = [env.episode() for env in envs]
    return [replace(episode, provenance={"policy": policy.name, **episode.provenance}) for episode in episodes]


def run_episodes(
    policy: Policy,
    segmenter: Segmenter,
    cases: Iterable[Case],
    *,
    max_turns: int,
    mask_selection: MaskSelection | None = None,
    provenance: Mapping[str, str] = MappingProxyType({}),
    on_turn: Callable[[int, Turn], None] | None = None,
    refine: bool = True,
) -> list[Episode]:
    """One episode of `policy` on each case, in order: a `SegmentationEnv` for each, then `rollout`, and raises as they
    do."""
    envs = [
        SegmentationEnv(
            case,
            segmenter,
            dialect=policy.dialect,
            max_turns=max_turns,
            mask_selection=mask_selection,
            provenance=provenance,
        )
        for case in cases
    ]
    return rollout(policy, envs, on_turn=on_turn, refine=refine)


def _refine(policy: Knowing, envs: Sequence[SegmentationEnv], on_turn: Callable[[int, Turn], None] | None) -> None:
    """The best of multiple first turns, for those of `envs` that a mask was brought to."""
    for index, env in enumerate(envs):
        if env.has_start and not env.done and not env.observation.turns:
            completions = policy.refine(env.observation)
            if completions:
                turn = env.step_best(Proposal(completions))
                if on_turn is not None:
                    on_turn(index, turn)


def _expected(turn: Turn, belief: np.ndarray) -> float:
    """The mean expected IoU of the masks that a turn prompted."""
    prompted = {prompt.target for prompt in turn.reply.prompts} & turn.after.keys()
    return float(np.mean([expected_iou(turn.after[name], belief) for name in prompted])) if prompted else 0.0


def _agreed(turn: Turn, others: Sequence[Turn]) -> float:
    """The mean IoU of a turn's masks with those of other turns."""
    return float(np.mean([_agreement(turn.after, other.after) for other in others]))


def _agreement(masks: Masks, others: Masks) -> float:
    """The mean IoU of masks with others of the same targets; a target that only one of them has agrees in nothing."""
    names = {*masks, *others}
    return float(np.mean([iou(masks[name], others[name]) if name in masks and name in others else 0 for name in names]))
