"""One calibrated score per mask: how good it probably is, without knowing the ground truth.

Up to five signals of an episode, each in [0, 1]:

| signal | what |
|---|---|
| quality | the segmenter's own estimate of the IoU of the masks that are handed out |
| stability | their mean IoU with the masks from the same prompts moved a little, JITTERS times |
| convergence | the smallest mean IoU of the masks after one turn with those after the next: did it have to mend much? |
| belief | the IoU that they would have if the policy's own map of the object was right; only where it has one |
| agreement | their mean IoU with those of further episodes of the policy, drawn at random; only where asked for |

`Reliability` turns them into an expected IoU: a logistic regression on their log odds whose target is the measured IoU
itself (Papke and Wooldridge, Econometric Methods for Fractional Response Variables, 1996), pulled towards the score
without any case, so that 20 to 40 labelled cases are enough. That score is the belief, which is an expected IoU as it
is, and where there is none, the plain mean of the signals. `fit` makes a calibration; a taught agent brings its own,
from the cases of its self-check.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import Action, Case, Click, Episode, Image, Masks, MaskSelection, Stop, Turn, Undo
from ibisagent.environment import PromptState, mask_choice, run_episodes, turn_limit
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation import agreement as overlap_with
from ibisagent.evaluation.calibration import calibration
from ibisagent.files import csv_text, reading, write_json, write_whole
from ibisagent.imaging.clicks import moved_box
from ibisagent.imaging.masks import expected_iou, iou
from ibisagent.inference.image import run_case
from ibisagent.policies.base import Calibrated, Knowing, Policy
from ibisagent.segmenters import Segmenter

FREE_SIGNALS = ("quality", "stability", "convergence")  # that every episode has
SIGNALS = (*FREE_SIGNALS, "belief", "agreement")
JITTERS = 3
JITTER = 0.05  # of the mask's mean side: how far a click, or an edge of a box, is moved at most
SAMPLING_TEMPERATURE = 0.8
MIN_CASES = 10
PULL = 10.0  # of each weight towards what holds without any case
BELIEF_PULL, MEAN_PULL = 2.0, 0.1  # of the bias, likewise: the belief is right on the average, the mean is far too sure
USUAL = 0.75  # most of the cases in which a signal may have one and the same value
_EDGE = 0.01  # log odds of signals are those of values clipped to [_EDGE, 1 - _EDGE]
KIND = "ibisagent reliability 3"  # 2 called the convergence otherwise, 1 cut the log odds elsewhere
Signals = Mapping[str, float]
log = logging.getLogger(__name__)


def signals(
    episode: Episode,
    image: Image,
    segmenter: Segmenter,
    *,
    others: Sequence[Episode] = (),
    beliefs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The signals of an episode that `segmenter` drew on `image`; all 0 where it handed out nothing.

    others: further episodes of the same case, for the agreement; without any it is left out. beliefs: see
    `beliefs_of`; the belief is left out without them. seed: of the jitter. Raises SegmenterError.
    """
    kept = _shown(episode.answer_masks)
    left_out = {"belief": beliefs is None, "agreement": not others}
    found = {name: 0.0 for name in SIGNALS if not left_out.get(name)}
    if not kept:
        return found
    found["quality"] = episode.answer_score or 0.0
    key = hashlib.sha256(f"{seed}:{episode.case_id}:{episode.image_sha256}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(key[:8], "little"))
    moved = [_replayed(episode, image, segmenter, kept, random) for _ in range(JITTERS)]
    found["stability"] = float(np.mean([_likeness(kept, masks) for masks in moved]))
    steps = [(before.after, after.after) for before, after in pairwise(episode.turns) if after.after]
    found["convergence"] = min((_likeness(after, before) for before, after in steps), default=1.0)
    if beliefs:
        anyhow = next(iter(beliefs.values()))  # a mask that was brought has a name of its own
        found["belief"] = float(np.mean([expected_iou(mask, beliefs.get(name, anyhow)) for name, mask in kept.items()]))
    if others:
        found["agreement"] = float(np.mean([_likeness(kept, _shown(other.answer_masks)) for other in others]))
    return found


def beliefs_of(policy: Policy | None, image: Image, query: str) -> Mapping[str, np.ndarray] | None:
    """Where `policy` believes the objects of a query to be, see `Knowing.believe`; None where it never says so."""
    return policy.believe(image, query) if isinstance(policy, Knowing) and policy.vocabulary is not None else None


@dataclass(frozen=True, slots=True)
class Reviewer:
    """Scores the episodes of one policy with one segmenter.

    samples: further episodes for the agreement, drawn at SAMPLING_TEMPERATURE; 0 leaves it out. mask_selection:
    which masks of them are their answer. max_turns: default the policy's own limit. seed: of the jitter.
    Raises ConfigError if samples are asked of a policy that does not draw its text.
    """

    policy: Policy
    segmenter: Segmenter
    mask_selection: MaskSelection | None = None
    samples: int = 0
    max_turns: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples and not hasattr(self.policy, "temperature"):
            raise ConfigError(f"policy {self.policy.name} draws nothing, so its samples agree: leave --samples at 0")

    @property
    def identity(self) -> dict[str, str]:
        """What a calibration holds for: names and hashes of policy and segmenter, and what is handed out."""
        own = _hashes(getattr(self.policy, "describe", dict)())
        return {"policy": self.policy.name, **own, **self.made_with}

    @property
    def made_with(self) -> dict[str, str]:
        """That part of the identity which is not the policy's."""
        return _made_with(self.policy, self.segmenter, self.mask_selection)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the signals that it gives."""
        believes = isinstance(self.policy, Knowing) and self.policy.vocabulary is not None
        return (*FREE_SIGNALS, *(["belief"] if believes else []), *(["agreement"] if self.samples else []))

    def signals(self, episode: Episode, case: Case) -> dict[str, float]:
        """The signals of an episode of `case`. Raises PolicyError and SegmenterError."""
        others: list[Episode] = []
        if self.samples:
            drawing = copy(self.policy)  # shares the model
            drawing.temperature = SAMPLING_TEMPERATURE  # type: ignore[attr-defined]
            limit = self.max_turns or turn_limit(drawing)
            again = [case] * self.samples
            others = run_episodes(drawing, self.segmenter, again, max_turns=limit, mask_selection=self.mask_selection)
        believed = beliefs_of(self.policy, case.image, case.query)
        return signals(episode, case.image, self.segmenter, others=others, beliefs=believed, seed=self.seed)

    def measured(self, case: Case) -> tuple[dict[str, float], float]:
        """(signals, IoU) of an episode of the policy on a labelled case. Raises PolicyError and SegmenterError."""
        episode = run_case(
            case, self.policy, self.segmenter, max_turns=self.max_turns, mask_selection=self.mask_selection
        )
        return self.signals(episode, case), overlap_with(episode.answer_masks, case)[0]


@dataclass(frozen=True, slots=True)
class Reliability:
    """How signals become a score. weights: by signal, on log odds, and bias. cases: how many it was fitted on.

    provenance: `Reviewer.identity`, which must be the same where it is used. error, kept_gain: each case scored without
    it: expected calibration error, and what dropping the worst 20% adds to the mean IoU.
    """

    weights: Mapping[str, float]
    bias: float
    cases: int = 0
    error: float | None = None
    kept_gain: float | None = None
    provenance: Mapping[str, str] | None = None

    @classmethod
    def plain(cls, names: Sequence[str]) -> Reliability:
        """Fitted on nothing: the belief, where it is one of these signals, else their mean log odds."""
        return cls(_plain_weights(names), 0.0)

    def score(self, found: Signals) -> float:
        """The expected IoU in [0, 1]; 0 for nothing handed out. ConfigError if a signal is missing."""
        if missing := [name for name in self.weights if name not in found]:
            raise ConfigError(f"the calibration needs the signal {missing[0]}: give --samples as for 'eval calibrate'")
        if not any(found.values()):
            return 0.0
        total = self.bias + sum(weight * float(_log_odds(found[name])) for name, weight in self.weights.items())
        return float(1 / (1 + np.exp(-total)))

    def write(self, path: Path) -> None:
        """Write it as a small JSON file, whole or not at all."""
        write_json({"kind": KIND, **asdict(self)}, path)

    @classmethod
    def read(cls, path: Path) -> Reliability:
        """What `write` wrote. DataError for anything else."""
        with reading(path, "'ibisagent eval calibrate' makes a calibration"):
            loaded = json.loads(path.read_bytes())
            if loaded.pop("kind") != KIND:
                raise ValueError("it is of another kind")
            found = cls(**loaded)
            return replace(found, weights={str(name): float(value) for name, value in found.weights.items()})

    def check(self, provenance: Mapping[str, str]) -> None:
        """ConfigError if it was fitted with another policy or segmenter, or other weights of them."""
        for name, value in (self.provenance or {}).items():
            if provenance.get(name, value) != value:
                raise ConfigError(f"the calibration was made with {name} {value}, this run has {provenance[name]}")


def brought_by(
    policy: Policy, image: Image, query: str, segmenter: Segmenter, mask_selection: MaskSelection | None = None
) -> Reliability | None:
    """The calibration that `policy` brings for masks of what a query asks for, made by these; None where it has none.

    One for another segmenter or mask selection is not used, and a warning says so, once. DataError for a damaged one.
    """
    path = policy.calibration(image, query) if isinstance(policy, Calibrated) else None
    return None if path is None else _read_for(path, tuple(_made_with(policy, segmenter, mask_selection).items()))


@cache
def _read_for(path: Path, made_with: tuple[tuple[str, str], ...]) -> Reliability | None:
    found = Reliability.read(path)
    try:
        found.check(dict(made_with))
    except ConfigError as error:
        log.warning("%s: not used, scores are as without any: %s", path, error)
        return None
    return found


def expected_iou_of(episode: Episode, image: Image, query: str, policy: Policy | None, segmenter: Segmenter) -> float:
    """The score of an episode that answered `query`: by the calibration that `policy` brings, else
    `Reliability.plain`. Raises SegmenterError, and PolicyError where the policy looks again."""
    found = signals(episode, image, segmenter, beliefs=beliefs_of(policy, image, query))
    own = None if policy is None else brought_by(policy, image, query, segmenter)
    return (own or Reliability.plain(tuple(found))).score(found)


class Queue:
    """The masks of a batch with their scores, to be reviewed worst first."""

    def __init__(self, reviewer: Reviewer, reliability: Reliability | None = None) -> None:
        """reliability: None takes what the policy brings, else `Reliability.plain`. ConfigError if it was
        made for something else."""
        self._reviewer, self._given = reviewer, reliability
        if reliability is not None:
            reliability.check(reviewer.identity)
            if unknown := set(reliability.weights) - set(reviewer.names):
                raise ConfigError(
                    f"the calibration needs the signal {min(unknown)}: give --samples as for 'eval calibrate'"
                )
        self._plain = Reliability.plain(reviewer.names)
        self._entries: list[dict[str, Any]] = []
        self._uncalibrated = 0

    @property
    def calibrated(self) -> bool:
        """Whether all scores so far are expected IoUs, rather than means of the signals."""
        return bool(self._entries) and not self._uncalibrated

    def add(self, image: str, episode: Episode, case: Case) -> float:
        """Score an episode; the score. Raises PolicyError and SegmenterError."""
        return self._add(image, self._reviewer.signals(episode, case), case)

    def _add(self, image: str, found: Signals, case: Case | None) -> float:
        """case: one of those that the signals are of; None where nothing was found."""
        reliability = self._given
        if reliability is None and case is not None:
            who = self._reviewer
            reliability = brought_by(who.policy, case.image, case.query, who.segmenter, who.mask_selection)
        self._uncalibrated += not (reliability or self._plain).cases
        score = (reliability or self._plain).score(found)
        rounded = {name: round(value, 4) for name, value in found.items()}
        self._entries.append({"image": image, "score": round(score, 4), **rounded})
        return score

    def add_volume(self, image: str, episodes: Iterable[tuple[Episode, Case]]) -> float:
        """Score a volume by the mean signals of the slices on which the agent found something; the score.

        Slices that the segmenter was carried through are not scored. A volume in which nothing was found has 0 in each
        signal. Raises PolicyError and SegmenterError.
        """
        found, asked = [], None
        for episode, case in episodes:
            if any(mask.any() for mask in episode.answer_masks.values()):
                found.append(self._reviewer.signals(episode, case))
                asked = case
        means = {name: float(np.mean([one[name] for one in found])) if found else 0.0 for name in self._reviewer.names}
        return self._add(image, means, asked)

    @property
    def worst_first(self) -> list[dict[str, Any]]:
        """{"image", "score", and the signals} of all, lowest score first."""
        return sorted(self._entries, key=lambda entry: (entry["score"], entry["image"]))

    def write(self, folder: Path) -> None:
        """Write review.csv and review.json to a folder that exists, or is made."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = self.worst_first
        columns = ["image", "score", *SIGNALS]
        table = csv_text([columns, *([entry.get(column, "") for column in columns] for entry in entries)])
        write_whole(table.encode(), folder / "review.csv")
        content = {"calibrated": self.calibrated, "worst_first": entries}
        write_json(content, folder / "review.json")


def fit(found: Sequence[Signals], ious: Sequence[float], provenance: Mapping[str, str] | None = None) -> Reliability:
    """The calibration of measured `ious` (N,) in [0, 1] by their signals, all with the same names.

    A signal that is the same in more than USUAL of the cases is left out: of a policy that nearly always stops after
    its first masks, convergence says nothing, and its sure 1 would be believed as the mean of the signals is.

    Raises DataError for fewer than MIN_CASES, or what does not fit together.
    """
    if len(found) != len(ious) or len(found) < MIN_CASES:
        raise DataError(f"{len(found)} cases to calibrate on: give at least {MIN_CASES}, 20 to 40 are enough")
    names = list(found[0])
    if any(list(one) != names for one in found):
        raise DataError("calibration: the cases have different signals; use one number of samples")
    values = np.array([[one[name] for name in names] for one in found])
    usual = [np.unique(column, return_counts=True)[1].max() for column in values.T]
    if saying := [index for index, count in enumerate(usual) if count <= USUAL * len(found)]:
        names, values = [names[index] for index in saying], values[:, saying]
    values = _log_odds(values)
    targets = np.asarray(ious, dtype=float)
    coefficients = _regress(values, targets, names)
    left_out = []
    for index in range(len(targets)):
        rest = np.arange(len(targets)) != index
        left_out.append(float(_sigmoid(_with_one(values[[index]]) @ _regress(values[rest], targets[rest], names))[0]))
    return Reliability(
        dict(zip(names, coefficients[:-1].tolist(), strict=True)),
        float(coefficients[-1]),
        len(targets),
        calibration(left_out, targets.tolist()).expected_error,
        gain_of_dropping(left_out, targets.tolist()),
        dict(provenance or {}),
    )


def gain_of_dropping(scores: Sequence[float], ious: Sequence[float], share: float = 0.2) -> float:
    """What leaving out the `share` of cases with the lowest scores adds to the mean IoU."""
    kept = np.argsort(np.asarray(scores), kind="stable")[round(share * len(scores)) :]
    measured = np.asarray(ious, dtype=float)
    return float(measured[kept].mean() - measured.mean())


def _made_with(policy: Policy, segmenter: Segmenter, selection: MaskSelection | None) -> dict[str, str]:
    hashes = _hashes(segmenter.describe())
    return {"segmenter": segmenter.name, "mask_selection": mask_choice(policy, selection), **hashes}


def _hashes(facts: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if name.endswith("sha256")}


def _log_odds(values: Any) -> np.ndarray:
    clipped = np.clip(np.asarray(values, dtype=float), _EDGE, 1 - _EDGE)
    odds: np.ndarray = np.log(clipped / (1 - clipped))
    return odds


def _sigmoid(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-values))
    return result


def _with_one(values: np.ndarray) -> np.ndarray:
    return np.hstack([values, np.ones((len(values), 1))])


def _plain_weights(names: Sequence[str]) -> dict[str, float]:
    """What the signals weigh before any case."""
    if "belief" in names:
        return {name: float(name == "belief") for name in names}
    return dict.fromkeys(names, 1 / len(names))


def _regress(values: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Weights of the signals `names` and bias (last) by Newton's method, pulled to `_plain_weights` and 0.

    A step that goes too far is halved: full steps do not converge where the start is overconfident by far.
    """
    inputs = _with_one(values)
    start = np.array([*_plain_weights(names).values(), 0.0])
    pull = np.array([PULL] * len(names) + [BELIEF_PULL if "belief" in names else MEAN_PULL])

    def loss(at: np.ndarray) -> float:
        total = inputs @ at
        return float((np.logaddexp(0, total) - targets * total).sum() + pull @ (at - start) ** 2 / 2)

    at = start
    for _ in range(50):
        chance = _sigmoid(inputs @ at)
        slope = inputs.T @ (chance - targets) + pull * (at - start)
        curve = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + np.diag(pull)
        step = np.linalg.solve(curve, slope)
        while loss(at - step) > loss(at) and np.abs(step).max() > 1e-9:
            step = step / 2
        at = at - step
        if np.abs(step).max() < 1e-9:
            break
    return at


def _shown(masks: Masks) -> Masks:
    return {name: mask for name, mask in masks.items() if mask.any()}


def _likeness(kept: Masks, others: Masks) -> float:
    """Mean IoU over the names of `kept`; a name that the others lack counts 0."""
    return float(np.mean([iou(mask, others[name]) if name in others else 0.0 for name, mask in kept.items()]))


def _replayed(episode: Episode, image: Image, segmenter: Segmenter, kept: Masks, random: np.random.Generator) -> Masks:
    """What the episode hands out when every click and box is moved a little; turns and undos stay as they are."""
    prompt_state = PromptState(image, segmenter, episode.start, episode.provenance.get("dialect", ""))
    turns: list[Turn] = []
    for turn in episode.turns:
        actions = tuple(_moved(action, kept, image.size, random) for action in turn.reply.actions)
        turns.append(prompt_state.apply_reply(turn.completion, replace(turn.reply, actions=actions))[0])
    return replace(episode, turns=tuple(turns)).answer_masks


def _moved(action: Action, kept: Masks, size: tuple[int, int], random: np.random.Generator) -> Action:
    if isinstance(action, Stop | Undo):
        return action
    mask = kept.get(action.target)
    reach = JITTER * float(np.sqrt(mask.sum() if mask is not None else size[0] * size[1] / 16))
    reach = max(1.0, reach)
    height, width = size
    if isinstance(action, Click):
        shift = random.uniform(-reach, reach, 2)
        x = int(np.clip(round(action.x + shift[0]), 0, width - 1))
        y = int(np.clip(round(action.y + shift[1]), 0, height - 1))
        crosses = mask is not None and mask[action.y, action.x] != mask[y, x]  # would say something else
        return action if crosses else Click(x, y, action.positive, action.target)
    return moved_box(action, random.uniform(-reach, reach, 4), size)
