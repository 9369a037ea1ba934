"""Policy x segmenter x cases: one row of measures per case, their means per modality, and the baselines beside them.

Measures of a case (absent from a row where they have no meaning):

| name | what |
|---|---|
| iou, dice | of the final masks, mean over the case's targets; an absent target wants an empty mask |
| turns, clicks, seconds | turns taken, clicks and boxes given, wall time (a batch's time shared out evenly) |
| first_hit | 1 if the first prompt is a positive click in the named object, or a box of IoU >= 0.5 with its own |
| answer_correct | 1 if the answer of a closed question is exact |
| prior_iou, prior_hit | one click where objects of that name usually lie, with the same segmenter, blind to the image |
| centre_iou, centre_hit | the one click on the image's centre, likewise |
| ellipse_iou | the ellipse inside the true bounding box: no segmenter at all, but the truth's box |
| oracle_iou_1 ... _10 | after that many clicks of an expert who sees the truth, with the same segmenter |

A case whose files, policy or segmenter fail is listed as a failure and counts nowhere; it is never scored 0.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from ibisagent.clicks import bounding_box, ellipse
from ibisagent.datasets import CaseSource
from ibisagent.domain import Box, Case, Click, Episode, Keep, Masks, StopReason
from ibisagent.environment import MAX_TURNS, SegmentationEnv, rollout
from ibisagent.errors import DataError, IbisError, PolicyError, SegmenterError
from ibisagent.masks import dice, iou
from ibisagent.policies.base import Policy
from ibisagent.policies.baselines import LocationPriorPolicy
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.rewards import answer_score, box_iou, match_names
from ibisagent.segmenters import Segmenter

ORACLE_CLICKS = (1, 2, 3, 5, 10)
FIRST_BOX_IOU = 0.5
MAX_FAILURES = 20
"""Failures in a row after which an evaluation gives up: then it is the machinery, not the cases."""

Judged = TypeVar("Judged")


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: who it is, how its episode ended, and its measures by name (see the module's text)."""

    case_id: str
    object: str
    modality: str
    dataset: str
    patient: str
    stop: StopReason
    measures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that could not be judged, and why, in one line."""

    case_id: str
    error: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over the cases of one group, each over the cases that have the measure.

    iou_interval: 95% interval of the mean IoU by resampling patients (images where no patient is known); None for
    fewer than two of them.
    """

    cases: int
    means: Mapping[str, float]
    iou_interval: tuple[float, float] | None
    stops: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results of one run, in the order of the cases."""

    made_by: Mapping[str, str]
    results: tuple[CaseResult, ...]
    failures: tuple[Failure, ...]

    def summaries(self, by: Literal["modality", "dataset", "object"] = "modality") -> dict[str, Summary]:
        """{"all": over every case, then one Summary per value of `by`}; where the value is not known: "unknown"."""
        groups: dict[str, list[CaseResult]] = {}
        for result in self.results:
            groups.setdefault(getattr(result, by) or "unknown", []).append(result)
        return {
            "all": summarise(self.results),
            **{name: summarise(groups[name]) for name in sorted(groups, key=str.casefold)},
        }

    def to_json(self, by: Literal["modality", "dataset", "object"] = "modality") -> dict[str, Any]:
        """Everything as plain JSON values: made_by, summaries, failures, one row per case."""
        return {
            "made_by": dict(self.made_by),
            "summaries": {name: asdict(summary) for name, summary in self.summaries(by).items()},
            "failures": [asdict(failure) for failure in self.failures],
            "cases": [asdict(result) for result in self.results],
        }


def summarise(results: Sequence[CaseResult], *, resamples: int = 2_000, seed: int = 0) -> Summary:
    """The means of `results`; an empty sequence gives no means."""
    names = dict.fromkeys(name for result in results for name in result.measures)
    means = {
        name: float(np.mean([result.measures[name] for result in results if name in result.measures])) for name in names
    }
    stops = Counter(result.stop for result in results)
    ious = [(f"{one.dataset}/{one.patient}", one.measures["iou"]) for one in results if "iou" in one.measures]
    interval = patient_interval(ious, resamples=resamples, seed=seed)
    return Summary(len(results), means, interval, dict(stops.most_common()))


def evaluate(
    cases: CaseSource,
    policy: Policy,
    segmenter: Segmenter,
    *,
    prior: Policy | None = None,
    centre: Policy | None = None,
    oracle: bool = True,
    max_turns: int = MAX_TURNS,
    keep: Keep = "best",
    batch_size: int = 16,
    made_by: Mapping[str, str] | None = None,
    on_case: Callable[[CaseResult | Failure], None] | None = None,
) -> Evaluation:
    """Run `policy` on every case, `batch_size` episodes together, and measure it beside the baselines.

    prior, centre: the blind one-click policies, each left out if None. oracle: whether to run the expert's clicks and
    the ellipse. keep: which mask of the policy's episode counts (`Episode.kept`). on_case: called after each case.
    Cases that fail are listed, not scored; after MAX_FAILURES failures in a row the last error is raised again.
    ConfigError (a dialect that does not fit, for example) is raised at once.
    """
    blind = {name: baseline for name, baseline in (("prior", prior), ("centre", centre)) if baseline is not None}
    results, failures = judge_cases(
        cases,
        lambda batch: _judge(batch, policy, segmenter, blind, oracle, max_turns, keep, made_by or {}),
        batch_size=batch_size,
        on_case=on_case,
    )
    facts = {"policy": policy.name, "segmenter": segmenter.name, "max_turns": str(max_turns), "keep": keep}
    facts |= made_by or {}
    return Evaluation(facts, tuple(results), tuple(failures))


def judge_cases(
    cases: CaseSource,
    judge: Callable[[Sequence[Case]], Sequence[Judged]],
    *,
    batch_size: int = 1,
    on_case: Callable[[Judged | Failure], None] | None = None,
) -> tuple[list[Judged], list[Failure]]:
    """(what `judge` says of every case that can be judged, the failures), both in the order of `cases`.

    judge: one judgement per case of a batch, in order; a batch for which it raises PolicyError or SegmenterError is
    judged again case by case. on_case: called after each case. After MAX_FAILURES failures in a row the last error is
    raised again; errors of other kinds are raised at once.
    """
    results: list[Judged] = []
    failures: list[Failure] = []
    in_a_row = 0

    def judged(batch: Sequence[Case]) -> Iterator[Judged | IbisError]:
        try:
            yield from judge(batch)
        except (PolicyError, SegmenterError) as error:
            if len(batch) == 1:
                yield error
            else:  # find out which of them it was
                for case in batch:
                    yield from judged([case])

    for start in range(0, len(cases), batch_size):
        rows = cases.rows[start : start + batch_size]
        outcomes: dict[str, Judged | IbisError] = {}
        batch: list[Case] = []
        for row in rows:
            try:
                batch.append(cases.decode(row))
            except DataError as error:
                outcomes[row.id] = error
        outcomes.update(zip((case.id for case in batch), judged(batch) if batch else (), strict=True))
        for row in rows:
            outcome = outcomes[row.id]
            if isinstance(outcome, IbisError):
                failures.append(Failure(row.id, str(outcome)))
                in_a_row += 1
                if in_a_row == MAX_FAILURES:
                    raise type(outcome)(f"{in_a_row} cases in a row failed, the last one: {outcome}") from outcome
            else:
                results.append(outcome)
                in_a_row = 0
            if on_case is not None:
                on_case(failures[-1] if isinstance(outcome, IbisError) else outcome)
    return results, failures


def location_prior(training: CaseSource, cases: CaseSource) -> LocationPriorPolicy | None:
    """The blind policy that has learned places from the rows of split "train" in `training`; None if there are none.

    It is told the modality of `cases`. Reads every training mask; raises DataError if one cannot be read.
    """
    if not any(row.split == "train" and row.mask is not None for row in training.rows):
        return None
    masks = training.filter(lambda row: row.split == "train").truths()
    learned = ((row.object, row.modality, truth) for row, truth in masks)
    return LocationPriorPolicy(learned, {row.id: row.modality for row in cases.rows})


def agreement(masks: Masks, case: Case) -> tuple[float, float]:
    """(IoU, Dice) of `masks` with the case's targets, mean over the targets; a missing mask counts as empty.

    Names are matched as `rewards.match_names` does. DataError if the case has no targets.
    """
    if not case.targets:
        raise DataError(f"case {case.id}: has no target to compare a mask with")
    names = match_names(masks, case.targets)
    found = {target: np.zeros(case.image.size, dtype=bool) for target in case.targets}
    for said, target in names.items():
        found[target] = found[target] | masks[said]
    pairs = [(found[target], truth) for target, truth in case.targets.items()]
    return float(np.mean([iou(*pair) for pair in pairs])), float(np.mean([dice(*pair) for pair in pairs]))


@dataclass(frozen=True, slots=True)
class OracleCurve:
    """An expert's prompts on one case: the IoU after each of them, and the segmenter's own estimate of it.

    Both are in [0, 1] and equally long. They end early where no wrong pixel is left to click.
    """

    ious: tuple[float, ...]
    scores: tuple[float, ...]

    def after(self, prompts: int) -> float:
        """The IoU after that many prompts (at least one); after the last one it stays as it is."""
        return self.ious[min(prompts, len(self.ious)) - 1]


def oracle_curves(
    cases: Sequence[Case],
    segmenter: Segmenter,
    *,
    prompts: int,
    box_first: bool = False,
    jitter: float = 0.0,
    seed: int = 0,
) -> list[OracleCurve]:
    """What an expert who sees the truth reaches with at most `prompts` prompts per target: a curve per case, in order.

    cases: with at least one object in each. box_first: the first prompt is the target's bounding box, all others are
    clicks. jitter, seed: see `OraclePolicy`. Raises SegmenterError when the segmenter fails.
    """
    expert = OraclePolicy(
        cases, iou_threshold=1.0, max_clicks=prompts, box_first=float(box_first), jitter=jitter, seed=seed
    )
    envs = [SegmentationEnv(case, segmenter, dialect=expert.dialect, max_turns=prompts) for case in cases]
    curves = []
    for case, episode in zip(cases, rollout(expert, envs), strict=True):
        turns = [(turn.after, turn.segmenter_score) for turn in episode.turns]
        prompted = [(agreement(masks, case)[0], score) for masks, score in turns if score is not None]
        curves.append(OracleCurve(tuple(reached for reached, _ in prompted), tuple(score for _, score in prompted)))
    return curves


def ellipse_iou(case: Case) -> float:
    """IoU of the ellipse inside the true bounding box of every target: what needs no segmenter, but the truth's box."""
    boxes = {name: bounding_box(truth, name) for name, truth in (case.targets or {}).items()}
    ellipses = {name: ellipse(box, case.image.size) for name, box in boxes.items() if box is not None}
    return agreement(ellipses, case)[0]


def patient_interval(
    values: Iterable[tuple[str, float]], *, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float] | None:
    """95% interval of the mean of `values`, pairs of (patient, value); None for fewer than two patients.

    Percentile bootstrap over patients: images of one patient are no independent evidence.
    """
    by_patient: dict[str, list[float]] = {}
    for patient, value in values:
        by_patient.setdefault(patient, []).append(value)
    if len(by_patient) < 2:
        return None
    sums = np.array([sum(values) for values in by_patient.values()])
    counts = np.array([len(values) for values in by_patient.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def first_action_hits(episode: Episode, case: Case) -> bool | None:
    """Whether the episode's first click or box meets the object it names; None if there is no object to meet.

    A positive click must lie on the object; a box must have IoU >= FIRST_BOX_IOU with its bounding box. An episode
    without any prompt misses.
    """
    targets = case.targets or {}
    if not any(truth.any() for truth in targets.values()):
        return None
    prompts = (action for turn in episode.turns for action in turn.reply.actions if isinstance(action, Click | Box))
    prompt = next(prompts, None)
    truth = None if prompt is None else targets.get(match_names([prompt.target], targets).get(prompt.target, ""))
    if prompt is None or truth is None:
        return False
    if isinstance(prompt, Click):
        return prompt.positive and bool(truth[prompt.y, prompt.x])
    box = bounding_box(truth, prompt.target)
    return box is not None and box_iou(prompt, box) >= FIRST_BOX_IOU


def _judge(
    batch: Sequence[Case],
    policy: Policy,
    segmenter: Segmenter,
    blind: Mapping[str, Policy],
    oracle: bool,
    max_turns: int,
    keep: Keep,
    made_by: Mapping[str, str],
) -> list[CaseResult]:
    """One CaseResult per case of `batch`, in order. Raises PolicyError or SegmenterError for the whole batch."""

    def run(who: Policy, cases: Sequence[Case], turns: int) -> list[Episode]:
        return rollout(
            who,
            [SegmentationEnv(case, segmenter, dialect=who.dialect, max_turns=turns, made_by=made_by) for case in cases],
        )

    started = time.perf_counter()
    episodes = run(policy, batch, max_turns)
    seconds = (time.perf_counter() - started) / len(batch)
    rows: list[dict[str, float]] = []
    for case, episode in zip(batch, episodes, strict=True):
        row = {"turns": float(len(episode.turns)), "clicks": float(episode.clicks), "seconds": seconds}
        if case.targets:
            row["iou"], row["dice"] = agreement(episode.kept(keep), case)
        elif case.answer is not None:
            row["answer_correct"] = answer_score(episode, case, {})
        hit = first_action_hits(episode, case)
        if hit is not None:
            row["first_hit"] = float(hit)
        rows.append(row)

    visible = [
        (case, row)
        for case, row in zip(batch, rows, strict=True)
        if case.targets and any(truth.any() for truth in case.targets.values())
    ]
    seen = [case for case, _ in visible]
    for name, baseline in blind.items():
        for (case, row), episode in zip(visible, run(baseline, seen, 1), strict=True):
            row[f"{name}_iou"] = agreement(episode.masks, case)[0]
            row[f"{name}_hit"] = float(bool(first_action_hits(episode, case)))
    if oracle:
        curves = oracle_curves(seen, segmenter, prompts=max(ORACLE_CLICKS))
        for (case, row), curve in zip(visible, curves, strict=True):
            row["ellipse_iou"] = ellipse_iou(case)
            row |= {f"oracle_iou_{count}": curve.after(count) for count in ORACLE_CLICKS}
    return [
        CaseResult(
            case.id,
            case.meta.get("object", ", ".join(case.targets or {})),
            case.meta.get("modality", ""),
            case.meta.get("dataset", ""),
            case.patient or case.image.sha256,
            episode.stop,
            row,
        )
        for case, episode, row in zip(batch, episodes, rows, strict=True)
    ]
