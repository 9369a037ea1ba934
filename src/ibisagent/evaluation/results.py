"""What an evaluation found: one result per case, metrics of groups of them, two runs compared.

Metrics beside the means of the measures of `evaluation` (each with its definition in `metrics`):

| name | what |
|---|---|
| ciou | cumulative IoU |
| precision_50 ... precision_90 | share of the cases with at least that IoU |
| presence_f1, match_f1 | F1 of "it is there", and of masks with IoU >= 0.5 |
| dice_median | median of the Dice, as BiomedParse reports it; without an interval |
| positive_iou, positive_dice, positive_ciou | iou, dice and ciou over the cases that show their object |

`iou`, `dice`, `nsd_*`, `hd95_*` and precision follow the rule for two empty masks (`metrics.EmptyRule`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from ibisagent.domain import StopReason, check_choice
from ibisagent.errors import DataError
from ibisagent.evaluation import metrics
from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule, SizeClass
from ibisagent.evaluation.statistics import Difference, Interval, Row, differences, intervals
from ibisagent.imaging.masks import Overlap
from ibisagent.inference.cases import Failure

GroupBy = Literal["modality", "object", "size", "dataset"]
Size = SizeClass | Literal["absent", ""]
"""How much of its image an object covers; "" if that is not known."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: who it is, how its episode ended, and its measures by name (see `evaluation`).

    stop: None if the mask is of no episode. overlap: of the mask handed out, its targets counted together; None where
    there are none. size: class of the targets' area. ious: after each turn.
    quality: the segmenter's own estimate of the IoU of the mask handed out, in [0, 1], None if it gave none.
    """

    case_id: str
    object: str
    modality: str
    dataset: str
    patient: str
    stop: StopReason | None
    measures: Mapping[str, float]
    overlap: Overlap | None = None
    size: Size = ""
    ious: tuple[float, ...] = ()
    quality: float | None = None

    @property
    def subject(self) -> str:
        """The patient, by a name that no other data set has: the unit of all intervals."""
        return f"{self.dataset}/{self.patient}"

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> CaseResult:
        """The result that `asdict` made plain; KeyError and TypeError if it is no such thing."""
        overlap = None if plain["overlap"] is None else Overlap(**plain["overlap"])
        return cls(**{**plain, "overlap": overlap, "ious": tuple(plain["ious"])})


@dataclass(frozen=True, slots=True)
class Summary:
    """Metrics of one group of cases, each over the cases that have a part in it.

    positives: cases that show their object. means: every metric, most of them means. intervals: 95%, patients resampled
    (images where no patient is known), None for fewer than two of them.
    """

    cases: int
    positives: int
    patients: int
    means: Mapping[str, float]
    intervals: Mapping[str, Interval | None]
    stops: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All results of one run, in the order of the cases."""

    provenance: Mapping[str, str]
    results: tuple[CaseResult, ...]
    failures: tuple[Failure, ...]

    def groups(self, by: GroupBy) -> dict[str, list[CaseResult]]:
        """The cases of every value of `by`, by name; where it is not known: "unknown"."""
        groups: dict[str, list[CaseResult]] = {}
        for result in self.results:
            groups.setdefault(getattr(result, by) or "unknown", []).append(result)
        order = [*get_args(SizeClass), "absent"] if by == "size" else sorted(groups, key=str.casefold)
        return {name: groups[name] for name in (*order, *(groups.keys() - set(order))) if name in groups}

    def summaries(self, by: GroupBy = "modality", empty: EmptyRule = EMPTY_RULE) -> dict[str, Summary]:
        """{"all": over every case, then one Summary per value of `by`}."""
        groups = {name: summarise(group, empty=empty) for name, group in self.groups(by).items()}
        return {"all": summarise(self.results, empty=empty), **groups}

    def to_json(self, empty: EmptyRule = EMPTY_RULE) -> dict[str, Any]:
        """Everything as plain JSON values: provenance, rule, summaries of all and by each GroupBy, failures, all
        cases."""
        summaries: dict[str, Any] = {"all": asdict(summarise(self.results, empty=empty))}
        for by in get_args(GroupBy):
            summaries[by] = {name: asdict(summarise(group, empty=empty)) for name, group in self.groups(by).items()}
        return {
            "made_by": dict(self.provenance),
            "two_empty_masks_count_as": empty,
            "summaries": summaries,
            "failures": [asdict(failure) for failure in self.failures],
            "cases": [asdict(result) for result in self.results],
        }


def check_group(by: str) -> GroupBy:
    """`by` as a GroupBy; ConfigError for anything else."""
    chosen: GroupBy = check_choice(by, GroupBy, "cannot group by")
    return chosen


def shares(result: CaseResult, empty: EmptyRule = EMPTY_RULE) -> dict[str, tuple[float, float]]:
    """One case's (numerator, denominator) of every metric that it has a part in.

    iou: gIoU, the mean over the cases of their IoU (Lai et al., LISA, CVPR 2024; "mIoU" in BiomedParse and the paper),
    not the generalised IoU of boxes that has the same name. dice: the mean of their Dice coefficients (Dice 1945; DSC).
    precision_50, ...: the share of the cases whose IoU is at least that (Mao et al., CVPR 2016: P@0.5). positive_...:
    over the cases whose target has a pixel. The others: see `metrics`.
    """
    found: dict[str, metrics.Share] = {name: (value, 1.0) for name, value in result.measures.items()}
    overlap = result.overlap
    if overlap is not None and "iou" in result.measures:
        reached, dice = result.measures["iou"], result.measures["dice"]
        for name in found:
            if name in ("iou", "dice") or name.startswith("nsd_"):
                found[name] = metrics.mean_share(overlap, result.measures[name], empty)
            elif name.startswith("hd95_") and not overlap.union and empty != "one":
                found[name] = None  # no distance stands for "wrong" where there is nothing to measure from
        for threshold in metrics.THRESHOLDS:
            hit = float(reached >= threshold)
            found[f"precision_{threshold * 100:.0f}"] = metrics.mean_share(overlap, hit, empty)
        found["ciou"] = metrics.ciou_share(overlap)
        found["presence_f1"] = metrics.presence_share(overlap)
        found["match_f1"] = metrics.match_share(overlap)
        if overlap.target:
            found |= {"positive_iou": (reached, 1.0), "positive_dice": (dice, 1.0), "positive_ciou": found["ciou"]}
    return {name: share for name, share in found.items() if share is not None}


def summarise(results: Sequence[CaseResult], *, empty: EmptyRule = EMPTY_RULE) -> Summary:
    """The metrics of `results`; an empty sequence has none."""
    rows: list[Row] = [(one.subject, shares(one, empty)) for one in results]
    means = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        found = metrics.quotient(row.get(name) for _, row in rows)
        if found is not None:
            means[name] = found
    if dice := [row["dice"][0] for _, row in rows if "dice" in row]:
        means["dice_median"] = float(np.median(dice))
    spread = intervals([(who, {name: row[name] for name in row if name in means}) for who, row in rows])
    stops = Counter(one.stop for one in results if one.stop is not None)
    positives = sum(one.overlap is not None and one.overlap.target > 0 for one in results)
    subjects = len({one.subject for one in results})
    return Summary(len(results), positives, subjects, means, spread, dict(stops.most_common()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Run B less run A on the cases that both have judged; only_a, only_b: cases that one of them lacks, left out."""

    a: Mapping[str, str]
    b: Mapping[str, str]
    cases: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    metrics: Mapping[str, Difference]
    groups: Mapping[str, Mapping[str, Difference]]


def compare(a: Evaluation, b: Evaluation, *, empty: EmptyRule = EMPTY_RULE, seed: int = 0) -> Comparison:
    """Compare two runs case by case; see `statistics.differences`. groups: the IoU by modality, size and object.

    DataError if they have no case in common, or a case shows different targets in the two.
    """
    theirs = {one.case_id: one for one in b.results}
    pairs = [(one, theirs[one.case_id]) for one in a.results if one.case_id in theirs]
    if not pairs:
        raise DataError("the two runs have no case in common; evaluate both on the same data and split")
    for one, other in pairs:
        if one.overlap and other.overlap and one.overlap.target != other.overlap.target:
            raise DataError(
                f"case {one.case_id}: its target has {one.overlap.target} pixels in one run and"
                f" {other.overlap.target} in the other; evaluate both on the same data"
            )

    def rows(chosen: Callable[[CaseResult], bool], only: str | None = None) -> list[list[Row]]:
        return [
            [
                (
                    pair[0].subject,
                    {name: share for name, share in shares(pair[side], empty).items() if only in (None, name)},
                )
                for pair in pairs
                if chosen(pair[0])
            ]
            for side in (0, 1)
        ]

    found: dict[str, dict[str, Difference]] = {}
    for by in ("modality", "size", "object"):
        for name in Evaluation({}, tuple(pair[0] for pair in pairs), ()).groups(by):

            def chosen(one: CaseResult, by: str = by, name: str = name) -> bool:
                return (getattr(one, by) or "unknown") == name

            group = differences(*rows(chosen, "iou"), seed=seed, permutations=2_000)
            if "iou" in group:
                found.setdefault(by, {})[name] = group["iou"]
    ours = {one.case_id for one in a.results}
    return Comparison(
        a.provenance,
        b.provenance,
        len(pairs),
        tuple(sorted(ours - theirs.keys())),
        tuple(sorted(theirs.keys() - ours)),
        differences(*rows(lambda _: True), seed=seed),
        found,
    )
