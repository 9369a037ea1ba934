"""Policy x segmenter x cases: one row of measures per case, and the baselines beside them.

Measures of a case (absent from a row where they have no meaning; definitions in `metrics`):

| name | what |
|---|---|
| iou, dice | of the masks handed out, mean over the case's targets; an absent target wants an empty mask |
| hd95_mm, nsd_2mm | distances of the borders, where the image's spacing is known, else hd95_px, nsd_2px in pixels |
| extra_components, speck_share | noise of the masks handed out |
| turns, clicks | turns taken; clicks and boxes given |
| stop_gap | best IoU after any turn, less the IoU handed out: what is lost by stopping or choosing wrongly |
| redundant_clicks | clicks and boxes of turns after which the IoU is no higher than before |
| raising_corrections | share of the turns after the first that prompt or undo, after which the IoU is higher |
| parse_failures | turns whose reply could not be read |
| seconds, tokens | wall time (a batch's time shared out evenly); tokens written, where the policy counts them |
| first_hit | 1 if the first prompt is a positive click in the named object, or a box of IoU >= 0.5 with its own |
| answer_correct | 1 if the answer of a closed question is exact |
| prior_iou, prior_hit | one click where objects of that name usually lie, with the same segmenter, blind to the image |
| centre_iou, centre_hit | the one click on the image's centre, likewise |
| ellipse_iou | the ellipse inside the true bounding box: no segmenter at all, but the ground truth's box |
| oracle_iou_1 ... _10 | after that many clicks of an expert who sees the ground truth, with the same segmenter |

A case whose files, policy or segmenter fail is listed as a failure and counts nowhere; it is never scored 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ibisagent.datasets import CaseSource, split_kind
from ibisagent.domain import Box, Case, Click, Episode, Mask, Masks, MaskSelection, Stop
from ibisagent.environment import mask_choice, run_episodes, turn_limit
from ibisagent.errors import DataError
from ibisagent.evaluation import metrics
from ibisagent.evaluation.results import CaseResult, Evaluation, Size
from ibisagent.imaging.clicks import bounding_box, ellipse
from ibisagent.imaging.masks import Overlap, overlap
from ibisagent.inference.cases import Failure, judge_cases
from ibisagent.policies.base import Policy
from ibisagent.policies.baselines import LocationPriorPolicy
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.rewards import answer_score, box_iou, match_names
from ibisagent.segmenters import Segmenter

ORACLE_CLICKS = (1, 2, 3, 5, 10)
FIRST_BOX_IOU = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A case with its result, and the episode that was judged."""

    case: Case
    episode: Episode
    result: CaseResult


@dataclass(frozen=True, slots=True)
class Judge:
    """Runs a policy with a segmenter on cases, beside baselines. blind: one-click policies by name; see `evaluate`."""

    policy: Policy
    segmenter: Segmenter
    blind: Mapping[str, Policy]
    oracle: bool
    max_turns: int
    mask_selection: MaskSelection
    provenance: Mapping[str, str]

    def __call__(self, batch: Sequence[Case]) -> list[Judged]:
        """Judge the cases of `batch`, in order. Raises PolicyError or SegmenterError for the whole batch."""
        started = time.perf_counter()
        episodes = self._run(self.policy, batch, self.max_turns)
        seconds = (time.perf_counter() - started) / len(batch)
        rows = [{**_measures(case, episode), "seconds": seconds} for case, episode in zip(batch, episodes, strict=True)]
        shown = [
            (case, row)
            for case, row in zip(batch, rows, strict=True)
            if any(ground_truth.any() for ground_truth in (case.targets or {}).values())
        ]
        seen = [case for case, _ in shown]
        for name, baseline in self.blind.items():
            for (case, row), episode in zip(shown, self._run(baseline, seen, 1), strict=True):
                row[f"{name}_iou"] = agreement(episode.answer_masks, case)[0]
                row[f"{name}_hit"] = float(bool(first_action_hits(episode, case)))
        if self.oracle:
            curves = oracle_curves(seen, self.segmenter, prompts=max(ORACLE_CLICKS))
            for (case, row), curve in zip(shown, curves, strict=True):
                row["ellipse_iou"] = ellipse_iou(case)
                row |= {f"oracle_iou_{count}": curve.after(count) for count in ORACLE_CLICKS}
        return [
            Judged(case, episode, _result(case, episode, row))
            for case, episode, row in zip(batch, episodes, rows, strict=True)
        ]

    def _run(self, who: Policy, cases: Sequence[Case], turns: int) -> list[Episode]:
        return run_episodes(
            who,
            self.segmenter,
            cases,
            max_turns=turns,
            mask_selection=self.mask_selection,
            provenance=self.provenance,
        )


def evaluate(
    cases: CaseSource,
    policy: Policy,
    segmenter: Segmenter,
    *,
    prior: Policy | None = None,
    centre: Policy | None = None,
    oracle: bool = True,
    max_turns: int | None = None,
    mask_selection: MaskSelection | None = None,
    batch_size: int = 16,
    provenance: Mapping[str, str] | None = None,
    on_case: Callable[[CaseResult | Failure], None] | None = None,
) -> Evaluation:
    """Run `policy` on every case, `batch_size` episodes together, and measure it beside the baselines.

    prior, centre: the blind one-click policies, each left out if None. oracle: whether to run the expert's clicks and
    the ellipse. max_turns: default the policy's own limit. mask_selection: which masks of an episode are its answer, by
    which it is judged (`Episode.answer_masks`). on_case: called after each case.
    Cases that fail are listed, not scored; broken machinery ends it (`judge_cases`).
    ConfigError (a dialect that does not fit, for example) is raised at once.
    """
    blind = {name: baseline for name, baseline in (("prior", prior), ("centre", centre)) if baseline is not None}
    turns = turn_limit(policy) if max_turns is None else max_turns
    chosen = mask_choice(policy, mask_selection)
    judge = Judge(policy, segmenter, blind, oracle, turns, chosen, provenance or {})
    results, failures = judge_cases(
        cases, lambda batch: [one.result for one in judge(batch)], batch_size=batch_size, on_case=on_case
    )
    facts = {"policy": policy.name, "segmenter": segmenter.name, "max_turns": str(turns)}
    facts |= {"mask_selection": chosen, **(provenance or {})}
    return Evaluation(facts, tuple(results), tuple(failures))


def prior_cases(everything: CaseSource) -> CaseSource | None:
    """The cases that a location prior learns from: those for training that show an object; None if there are none."""
    rows = [row for row in everything.rows if split_kind(row.split) == "train" and row.mask is not None]
    return CaseSource(rows, everything.where) if rows else None


def location_prior(everything: CaseSource, cases: CaseSource) -> LocationPriorPolicy | None:
    """The blind policy that has learned places from the `prior_cases` of `everything`; None if there are none.

    It is told the modality of `cases`. Reads every mask it learns from; raises DataError if one cannot be read.
    """
    learned = prior_cases(everything)
    if learned is None:
        return None
    masks = ((row.object, row.modality, ground_truth) for row, ground_truth in learned.ground_truths())
    return LocationPriorPolicy(masks, {row.id: row.modality for row in cases.rows})


def matched(masks: Masks, case: Case) -> list[tuple[Mask, Mask]]:
    """(mask, ground truth) of each of the case's targets; a missing mask is empty, names as `rewards.match_names` has
    it.

    DataError if the case has no targets.
    """
    if not case.targets:
        raise DataError(f"case {case.id}: has no target to compare a mask with")
    found = {target: np.zeros(case.image.size, dtype=bool) for target in case.targets}
    for said, target in match_names([name for name, mask in masks.items() if mask.any()], case.targets).items():
        found[target] = found[target] | masks[said]
    return [(found[target], ground_truth) for target, ground_truth in case.targets.items()]


def agreement(masks: Masks, case: Case) -> tuple[float, float]:
    """(IoU, Dice) of `masks` with the case's targets, mean over the targets; see `matched`."""
    overlaps = [overlap(*pair) for pair in matched(masks, case)]
    return float(np.mean([one.iou for one in overlaps])), float(np.mean([one.dice for one in overlaps]))


def mask_measures(pairs: Sequence[tuple[Mask, Mask]], spacing_mm: Sequence[float] | None) -> dict[str, float]:
    """iou, dice, HD95, NSD and noise (see the module's text) of (mask, ground truth) pairs, mean over them."""
    overlaps = [overlap(*pair) for pair in pairs]
    unit, spacing = ("px", (1.0,) * pairs[0][0].ndim) if spacing_mm is None else ("mm", tuple(spacing_mm))
    borders = [metrics.surfaces(*pair, spacing) for pair in pairs]
    noises = [metrics.noise(*pair) for pair in pairs]
    return {
        "iou": float(np.mean([one.iou for one in overlaps])),
        "dice": float(np.mean([one.dice for one in overlaps])),
        f"hd95_{unit}": float(np.mean([one.hd95 for one in borders])),
        f"nsd_{metrics.TOLERANCE_MM:g}{unit}": float(np.mean([one.nsd for one in borders])),
        "extra_components": float(np.mean([one.extra_components for one in noises])),
        "speck_share": float(np.mean([one.speck_share for one in noises])),
    }


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
    """What an expert who sees the ground truth reaches with at most `prompts` prompts per target: a curve per case, in
    order.

    cases: with at least one object in each. box_first: the first prompt is the target's bounding box, all others are
    clicks. jitter, seed: see `OraclePolicy`. Raises SegmenterError when the segmenter fails.
    """
    expert = OraclePolicy(
        cases, iou_threshold=1.0, max_clicks=prompts, box_first=float(box_first), jitter=jitter, seed=seed
    )
    curves = []
    for case, episode in zip(cases, run_episodes(expert, segmenter, cases, max_turns=prompts), strict=True):
        turns = [(turn.after, turn.segmenter_score) for turn in episode.turns]
        prompted = [(agreement(masks, case)[0], score) for masks, score in turns if score is not None]
        curves.append(OracleCurve(tuple(reached for reached, _ in prompted), tuple(score for _, score in prompted)))
    return curves


def ellipse_iou(case: Case) -> float:
    """IoU of the ellipse inside the true bounding box of every target: what needs no segmenter, but the ground truth's
    box."""
    boxes = {name: bounding_box(ground_truth, name) for name, ground_truth in (case.targets or {}).items()}
    ellipses = {name: ellipse(box, case.image.size) for name, box in boxes.items() if box is not None}
    return agreement(ellipses, case)[0]


def first_action_hits(episode: Episode, case: Case) -> bool | None:
    """Whether the episode's first click or box meets the object it names; None if there is no object to meet.

    A positive click must lie on the object; a box must have IoU >= FIRST_BOX_IOU with its bounding box. An episode
    without any prompt misses.
    """
    targets = case.targets or {}
    if not any(ground_truth.any() for ground_truth in targets.values()):
        return None
    prompts = (action for turn in episode.turns for action in turn.reply.actions if isinstance(action, Click | Box))
    prompt = next(prompts, None)
    ground_truth = None if prompt is None else targets.get(match_names([prompt.target], targets).get(prompt.target, ""))
    if prompt is None or ground_truth is None:
        return False
    if isinstance(prompt, Click):
        return prompt.positive and bool(ground_truth[prompt.y, prompt.x])
    box = bounding_box(ground_truth, prompt.target)
    return box is not None and box_iou(prompt, box) >= FIRST_BOX_IOU


def _measures(case: Case, episode: Episode) -> dict[str, float]:
    """All measures of one episode but its time."""
    row = {"turns": float(len(episode.turns)), "clicks": float(episode.clicks)}
    row["parse_failures"] = float(sum(turn.reply.problem is not None for turn in episode.turns))
    tokens = [turn.completion.tokens for turn in episode.turns]
    if all(count is not None for count in tokens):
        row["tokens"] = float(sum(count for count in tokens if count is not None))
    if case.targets:
        row |= mask_measures(matched(episode.answer_masks, case), case.image.spacing_mm)
        ious = [agreement(masks, case)[0] for masks in (episode.start, *(turn.after for turn in episode.turns))]
        row["stop_gap"] = max(0.0, max(ious[1:], default=ious[0]) - row["iou"])
        row["redundant_clicks"] = float(
            sum(
                isinstance(action, Click | Box)
                for (before, after), turn in zip(pairwise(ious), episode.turns, strict=True)
                for action in turn.reply.actions
                if after <= before
            )
        )
        corrections = [
            after > before
            for (before, after), turn in zip(pairwise(ious[1:]), episode.turns[1:], strict=True)
            if any(not isinstance(action, Stop) for action in turn.reply.actions)
        ]
        if corrections:
            row["raising_corrections"] = float(np.mean(corrections))
    elif case.answer is not None:
        row["answer_correct"] = answer_score(episode, case, {})
    hit = first_action_hits(episode, case)
    if hit is not None:
        row["first_hit"] = float(hit)
    return row


def _result(case: Case, episode: Episode, measures: Mapping[str, float]) -> CaseResult:
    pairs = matched(episode.answer_masks, case) if case.targets else []
    return CaseResult(
        case.id,
        case.meta.get("object", ", ".join(case.targets or {})),
        case.meta.get("modality", ""),
        case.meta.get("dataset", ""),
        case.patient or case.image.sha256,
        episode.stop,
        measures,
        sum((overlap(*pair) for pair in pairs), Overlap(0, 0, 0)) if pairs else None,
        size_of([ground_truth for _, ground_truth in pairs]),
        tuple(agreement(turn.after, case)[0] for turn in episode.turns) if pairs else (),
        episode.answer_score,
    )


def size_of(ground_truths: Sequence[Mask]) -> Size:
    """The size class of the union of `ground_truths`; "absent" if it is empty, "" if there are none."""
    if not ground_truths:
        return ""
    area = float(np.logical_or.reduce(ground_truths).mean())
    return metrics.size_class(area) if area else "absent"
