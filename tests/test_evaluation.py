"""Results of an evaluation, checked against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from phantoms import SIZE, box_mask
from replies import text

from ibisagent import evaluation
from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Action, Box, Case, Click, Completion, Episode, Image, Mask, Reply, Stop, Turn, Undo
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.evaluation import metrics, results
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.inference.cases import MAX_FAILURES
from ibisagent.policies.baselines import CentreClickPolicy
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter

# `region` blurs the image and then leaves out the outermost pixel of a sharp bright box: of 20 x 30 pixels 18 x 28.
REGION_IOU = 18 * 28 / (20 * 30)
REGION_DICE = 2 * 18 * 28 / (18 * 28 + 20 * 30)


MIDDLE = box_mask(30, 20, 60, 40)  # 30 wide, 20 high
CORNER = box_mask(50, 40, 80, 60)  # as large


def image(mask: Mask) -> Image:
    return Image(np.where(mask, 220, 20).astype(np.uint8)[..., None].repeat(3, axis=2))


def write_rows(folder: Path, rows: Mapping[str, tuple[Mask, Mapping[str, str]]]) -> Path:
    """A manifest of one image and one mask per row; a row with mask "" in its facts is of an absent object."""
    lines = []
    for name, (mask, facts) in rows.items():
        write_png(image(mask).pixels, folder / f"{name}.png")
        write_mask_png(mask, folder / f"{name}_mask.png")
        row = {"image": f"{name}.png", "mask": f"{name}_mask.png", "object": "box", "split": "val", **facts}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


STOP = text(Stop("Done."))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path,
        {
            "hit": (MIDDLE, {"modality": "CT", "patient": "a"}),
            "idle": (CORNER, {"modality": "MRI", "patient": "b"}),
            "absent": (MIDDLE, {"modality": "MRI", "patient": "c", "object": "spleen", "mask": ""}),
            "train": (box_mask(40, 25, 50, 35), {"modality": "CT", "split": "train"}),
        },
    )


@pytest.fixture
def cases(data: Path) -> CaseSource:
    return read_cases(data, split="val")


SCRIPT = {
    "hit.png#box": [text(Click(45, 30, True, "box")), STOP],
    "idle.png#box": [STOP],
    "absent.png#spleen": [text(Stop("None.", ("spleen",)))],
}


def test_metrics_by_hand(cases: CaseSource) -> None:
    result = evaluation.evaluate(cases, ScriptedPolicy(SCRIPT), RegionSegmenter(), oracle=False)
    assert not result.failures
    hit, idle, absent = (one.measures for one in result.results)
    assert hit["iou"] == pytest.approx(REGION_IOU)
    assert hit["dice"] == pytest.approx(REGION_DICE)
    assert (hit["turns"], hit["clicks"], hit["first_hit"]) == (2, 1, 1)
    assert (idle["iou"], idle["dice"], idle["turns"], idle["first_hit"]) == (0, 0, 1, 0)
    assert (absent["iou"], absent["dice"]) == (1, 1)
    assert "first_hit" not in absent
    rim = {"hd95_px": 1, "nsd_2px": 1, "extra_components": 0, "speck_share": 0}
    assert {name: hit[name] for name in rim} == rim
    diagonal = math.hypot(*SIZE)
    assert (idle["hd95_px"], idle["nsd_2px"]) == (pytest.approx(diagonal), 0)
    assert (absent["hd95_px"], absent["nsd_2px"]) == (0, 1)
    assert [one.size for one in result.results] == ["area > 5%", "area > 5%", "absent"]
    assert [one.ious for one in result.results] == [(hit["iou"],) * 2, (0.0,), (1.0,)]
    assert (result.results[0].quality or 0) > 0
    assert result.results[1].quality is None

    summaries = result.summaries()
    assert list(summaries) == ["all", "CT", "MRI"]
    assert summaries["all"].means["iou"] == pytest.approx((REGION_IOU + 0 + 1) / 3)
    assert summaries["all"].means["turns"] == pytest.approx(4 / 3)
    assert summaries["all"].means["first_hit"] == 0.5  # over the two cases that have an object
    assert summaries["all"].stops == {"stopped": 3}
    assert summaries["MRI"].means["iou"] == 0.5
    assert list(result.summaries("object")) == ["all", "box", "spleen"]
    assert list(result.summaries("size")) == ["all", "area > 5%", "absent"]
    assert (summaries["all"].cases, summaries["all"].positives, summaries["all"].patients) == (3, 2, 3)


@pytest.mark.parametrize(("rule", "worth"), [("one", [1]), ("zero", [0]), ("skip", [])])
def test_rule_for_two_empty_masks(cases: CaseSource, rule: metrics.EmptyRule, worth: list[float]) -> None:
    result = evaluation.evaluate(cases, ScriptedPolicy(SCRIPT), RegionSegmenter(), oracle=False)
    means = result.summaries(empty=rule)["all"].means
    values = [REGION_IOU, 0, *worth]
    assert means["iou"] == pytest.approx(sum(values) / len(values))
    assert means["precision_80"] == pytest.approx(sum(value >= 0.8 for value in values) / len(values))
    assert means["precision_90"] == pytest.approx(sum(value >= 0.9 for value in values) / len(values))
    assert means["positive_iou"] == pytest.approx(REGION_IOU / 2)
    assert means["ciou"] == means["positive_ciou"] == pytest.approx(504 / 1200)
    assert means["presence_f1"] == means["match_f1"] == pytest.approx(2 / 3)
    assert means["hd95_px"] == pytest.approx(np.mean([1, math.hypot(*SIZE), *([0] if rule == "one" else [])]))


def test_measures_of_an_agent(cases: CaseSource) -> None:
    away = text(Click(2, 2, True, "box"))  # the dark ground, which is larger than the box
    script = {"hit.png#box": [text(Click(45, 30, True, "box")), "nonsense", away, text(Undo(1)), STOP]}
    one_case = cases.filter(lambda row: row.id == "hit.png#box")
    [last, best] = (
        evaluation.evaluate(
            one_case, ScriptedPolicy(script), RegionSegmenter(), oracle=False, mask_selection=keep
        ).results[0]
        for keep in ("last", "best")
    )
    assert last.measures["iou"] == pytest.approx(REGION_IOU)
    assert (last.measures["turns"], last.measures["clicks"], last.measures["parse_failures"]) == (5, 2, 1)
    assert last.measures["redundant_clicks"] == 1
    assert last.measures["stop_gap"] == 0
    assert last.measures["raising_corrections"] == 0.5  # the undo, not the click before it
    assert "tokens" not in last.measures  # a script does not count them
    assert len(last.ious) == 5
    assert last.ious[2] < last.ious[3] == last.ious[0]
    assert best.measures["stop_gap"] == pytest.approx(max(best.ious) - best.measures["iou"])


def test_baselines_by_hand(data: Path, cases: CaseSource) -> None:
    prior = evaluation.location_prior(read_cases(data), cases)
    assert prior is not None
    result = evaluation.evaluate(
        cases, ScriptedPolicy(SCRIPT), RegionSegmenter(), prior=prior, centre=CentreClickPolicy(), batch_size=2
    )
    hit, idle, absent = (one.measures for one in result.results)
    # the training box lies inside that of "hit", which also holds the image's centre (41, 30); CORNER holds neither
    assert (hit["prior_hit"], hit["centre_hit"]) == (1, 1)
    assert (idle["prior_hit"], idle["centre_hit"]) == (0, 0)
    assert hit["prior_iou"] == pytest.approx(REGION_IOU)
    assert hit["ellipse_iou"] == pytest.approx(math.pi / 4, abs=0.01)
    for measures in (hit, idle):
        assert measures["oracle_iou_1"] == pytest.approx(REGION_IOU)
        assert measures["oracle_iou_10"] > measures["oracle_iou_2"] > measures["oracle_iou_1"]  # the rim joins
    assert not [name for name in absent if name.startswith(("prior", "centre", "ellipse", "oracle"))]


def test_location_prior_needs_train_rows(cases: CaseSource) -> None:
    assert evaluation.location_prior(cases, cases) is None


def test_oracle_is_the_ceiling(cases: CaseSource) -> None:
    policy = OraclePolicy(cases.by_id, iou_threshold=0.8)
    result = evaluation.evaluate(cases, policy, RegionSegmenter())
    assert [one.measures["iou"] for one in result.results] == pytest.approx([REGION_IOU, REGION_IOU, 1])


def test_failures_are_listed_never_scored(cases: CaseSource, tmp_path: Path) -> None:
    (tmp_path / "absent.png").write_bytes(b"no image")
    told: list[str] = []
    result = evaluation.evaluate(
        cases,
        ScriptedPolicy({"hit.png#box": SCRIPT["hit.png#box"]}),  # knows nothing of "idle"
        RegionSegmenter(),
        oracle=False,
        on_case=lambda outcome: told.append(outcome.case_id),
    )
    assert [failure.case_id for failure in result.failures] == ["idle.png#box", "absent.png#spleen"]
    assert "absent.png" in result.failures[1].error
    assert result.summaries()["all"].cases == 1
    assert result.summaries()["all"].means["iou"] == pytest.approx(REGION_IOU)
    assert told == ["hit.png#box", "idle.png#box", "absent.png#spleen"]
    json.dumps(result.to_json())


def test_gives_up_when_everything_fails(tmp_path: Path) -> None:
    rows = {f"case{number}": (MIDDLE, {}) for number in range(MAX_FAILURES + 5)}
    cases = read_cases(write_rows(tmp_path, rows))
    with pytest.raises(PolicyError, match="in a row"):
        evaluation.evaluate(cases, ScriptedPolicy([]), RegionSegmenter(), oracle=False)


def test_wrong_dialect_is_no_failure_of_a_case(cases: CaseSource) -> None:
    with pytest.raises(ConfigError, match="max_turns"):
        evaluation.evaluate(cases, ScriptedPolicy(SCRIPT), RegionSegmenter(), max_turns=0)


def test_batches_change_nothing(cases: CaseSource) -> None:
    runs = [
        evaluation.evaluate(cases, ScriptedPolicy(SCRIPT), RegionSegmenter(), batch_size=size).results
        for size in (1, 2, 16)
    ]

    def untimed(results: Sequence[evaluation.CaseResult]) -> list[evaluation.CaseResult]:
        return [replace(one, measures={**one.measures, "seconds": 0}) for one in results]

    assert untimed(runs[0]) == untimed(runs[1]) == untimed(runs[2])


def test_closed_question(tmp_path: Path) -> None:
    question = {"mask": "", "object": "", "query": "Is a box to be seen?", "answer": "yes"}
    cases = read_cases(write_rows(tmp_path, {"right": (MIDDLE, question), "wrong": (CORNER, question)}))
    script = {case.id: [text(Stop(answer))] for case, answer in zip(cases, ("Yes.", "No."), strict=True)}
    result = evaluation.evaluate(cases, ScriptedPolicy(script), RegionSegmenter())
    assert [one.measures["answer_correct"] for one in result.results] == [1, 0]
    assert "iou" not in result.summaries()["all"].means
    assert result.summaries()["all"].intervals.get("iou") is None


def episode(*turns: tuple[Action, ...]) -> Episode:
    made = [Turn(Completion(""), Reply("", actions), {}, {}) for actions in turns]
    return Episode("case", "Segment it.", SIZE, "", "", {}, tuple(made), "stopped", {})


def case(**targets: Mask) -> Case:
    return Case("case", image(MIDDLE), "Segment it.", targets)


TRUE_BOX = Box(30, 20, 60, 40, "box")


@pytest.mark.parametrize(
    ("turns", "hits"),
    [
        ([(Click(30, 20, True, "box"),)], True),  # the object's first pixel
        ([(Click(29, 20, True, "box"),)], False),
        ([(Click(45, 30, False, "box"),)], False),  # a negative click is no find
        ([(TRUE_BOX,)], True),
        ([(Box(30, 20, 60, 30, "box"),)], True),  # half of it: IoU exactly 0.5
        ([(Box(30, 20, 60, 29, "box"),)], False),  # 9 of 20 rows
        ([(Box(0, 0, 83, 61, "box"),)], False),
        ([(Click(0, 0, True, "box"), TRUE_BOX)], False),  # the first prompt counts
        ([(Undo(1),), (TRUE_BOX,)], True),  # ... of the whole episode
        ([(Click(45, 30, True, "Box."),)], True),
        ([(Stop(),)], False),
        ([], False),
    ],
)
def test_first_action(turns: list[tuple[Action, ...]], hits: bool) -> None:
    assert evaluation.first_action_hits(episode(*turns), case(box=MIDDLE)) is hits


def test_first_action_meets_the_object_it_names() -> None:
    two = case(left=CORNER, middle=MIDDLE)
    assert evaluation.first_action_hits(episode((Click(45, 30, True, "middle"),)), two) is True
    assert evaluation.first_action_hits(episode((Click(45, 30, True, "left"),)), two) is False
    assert evaluation.first_action_hits(episode((Click(45, 30, True, "other"),)), two) is False


def test_first_action_has_nothing_to_meet() -> None:
    assert evaluation.first_action_hits(episode((TRUE_BOX,)), case(box=np.zeros(SIZE, dtype=bool))) is None


def test_agreement_is_the_mean_over_targets() -> None:
    two = case(left=CORNER, middle=MIDDLE)
    assert evaluation.agreement({"left": CORNER}, two) == (0.5, 0.5)
    assert evaluation.agreement({"Left": CORNER, "middle ": MIDDLE}, two) == (1, 1)
    with pytest.raises(DataError, match="no target"):
        evaluation.agreement({}, replace(two, targets=None, answer="yes"))


def test_interval_resamples_patients_not_images() -> None:
    def result(patient: str, iou: float) -> evaluation.CaseResult:
        return evaluation.CaseResult(f"{patient}{iou}", "box", "CT", "set", patient, "stopped", {"iou": iou})

    one_patient = [result("a", value) for value in (0.1, 0.2, 0.9)]
    assert results.summarise(one_patient).intervals.get("iou") is None
    two = [result("a", 0.2) for _ in range(10)] + [result("b", 0.8) for _ in range(10)]
    # either both, or one of them twice, is drawn: the interval is as wide as can be, however many images there are
    assert results.summarise(two).intervals["iou"] == pytest.approx((0.2, 0.8))
    many = [result(str(number), 0.2 + 0.6 * (number % 2)) for number in range(200)]
    low, high = results.summarise(many).intervals["iou"] or (0, 0)
    assert 0.4 < low < 0.5 < high < 0.6
    assert results.summarise(many) == results.summarise(many)
