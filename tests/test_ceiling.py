"""Results of a ceiling, checked against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import ibisagent
from phantoms import box_mask
from typer.testing import Result

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Click, Image, Mask, Prompt
from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.evaluation import OracleCurve, ceiling
from ibisagent.evaluation.calibration import calibration
from ibisagent.evaluation.ceiling import Agent, Ceiling, measure_ceiling
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.segmenters import Prediction
from ibisagent.segmenters.region import RegionSegmenter

PIXELS = 61 * 83


LARGE = box_mask(30, 20, 60, 40)  # 600 of 5063 pixels
MEDIUM = box_mask(10, 10, 20, 15)  # 50
SMALL = box_mask(70, 50, 73, 53)  # 9


def write_rows(folder: Path, rows: Mapping[str, tuple[Mask, Mapping[str, str]]]) -> Path:
    """A manifest of one image and one mask per row; an image named in the facts is shared with that row."""
    lines = []
    for name, (mask, facts) in rows.items():
        write_png(np.where(mask, 220, 20).astype(np.uint8)[..., None].repeat(3, axis=2), folder / f"{name}.png")
        write_mask_png(mask, folder / f"{name}_mask.png")
        row = {"image": f"{name}.png", "mask": f"{name}_mask.png", "object": name, **facts}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path,
        {
            "large": (LARGE, {"modality": "CT", "patient": "a"}),
            "medium": (MEDIUM, {"modality": "MRI", "patient": "b", "image": "large.png"}),
            "small": (SMALL, {"modality": "MRI", "patient": "c"}),
            "absent": (SMALL, {"modality": "MRI", "patient": "c", "mask": ""}),
        },
    )


@pytest.fixture
def cases(data: Path) -> CaseSource:
    return read_cases(data)


class Clicker:
    """A segmenter whose mask and score are `reply` of the prompts; opening takes 20 ms at least, a first prompt 5."""

    name = "clicker"

    def __init__(self, reply: Callable[[Sequence[Prompt]], tuple[Mask, float]]) -> None:
        self._reply = reply
        self.opened = 0

    def open(self, image: Image) -> Clicker:
        self.opened += 1
        time.sleep(0.02)
        return self

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        if len(prompts) == 1:
            time.sleep(0.005)
        mask, score = self._reply(prompts)
        return Prediction(mask, score, np.zeros(1))

    def describe(self) -> dict[str, str]:
        return {"segmenter": self.name, "runtime": "", "weights_sha256": "", "licence": ""}


def rows_of(count: int) -> Mask:
    """The first rows of LARGE: `count` of its 20, so that its IoU with LARGE is count / 20."""
    return box_mask(30, 20, 60, 20 + count)


def measured(result: Ceiling, name: str) -> Mapping[str, float]:
    return next(one.measures for one in result.results if one.object == name)


def test_metrics_by_hand(tmp_path: Path) -> None:
    """IoU 0.5, 0.8, 0.85, 0.6, and from then on 0.75; the segmenter is proudest of its second mask."""
    reached = [10, 16, 17, 12]
    scores = [0.55, 0.95, 0.25, 0.65]

    def reply(prompts: Sequence[Prompt]) -> tuple[Mask, float]:
        turn = len(prompts) - 1
        return rows_of(reached[turn] if turn < 4 else 15), scores[turn] if turn < 4 else 0.05

    cases = read_cases(write_rows(tmp_path, {"large": (LARGE, {})}))
    result = measure_ceiling(cases, Clicker(reply), max_clicks=6)
    found = measured(result, "large")
    assert [found[f"click_{number}"] for number in (1, 2, 3, 5, 6)] == [0.5, 0.8, 0.85, 0.75, 0.75]
    assert "click_10" not in found
    assert (found["box"], found["box_click_1"], found["box_click_3"], found["box_click_5"]) == (0.5, 0.8, 0.6, 0.75)
    assert (found["noc_80"], found["noc_85"], found["noc_90"]) == (2, 3, 6)
    assert (found["nof_80"], found["nof_85"], found["nof_90"]) == (0, 0, 1)
    assert (found["last"], found["best"], found["best_scored"]) == (0.75, 0.85, 0.8)
    assert found["ellipse"] == pytest.approx(np.pi / 4, abs=0.01)
    group = result.groups()["all"]
    assert group.curve == (0.5, 0.8, 0.85, 0.6, 0.75, 0.75)
    assert group.falls == (4,)
    gaps = [0.05, 0.15, 0.6, 0.05, 0.7, 0.7]  # each score but 0.05 is alone in its bin
    assert group.calibration.expected_error == pytest.approx(sum(gaps) / 6)
    assert group.intervals["click_1"] is None  # of one patient


def test_perfect_mask_ends_early_and_stays(tmp_path: Path) -> None:
    cases = read_cases(write_rows(tmp_path, {"large": (LARGE, {})}))
    [found] = measure_ceiling(cases, Clicker(lambda prompts: (rows_of(19 + (len(prompts) > 1)), 0.5))).results
    assert found.clicks.ious == (0.95, 1.0)
    assert (found.measures["click_1"], found.measures["click_2"], found.measures["click_20"]) == (0.95, 1, 1)
    assert len(found.click_ms) == 1


def test_groups_sizes_and_what_is_not_there(cases: CaseSource) -> None:
    told: list[None] = []
    result = measure_ceiling(cases, RegionSegmenter(), max_clicks=3, on_case=lambda: told.append(None))
    assert [one.object for one in result.results] == ["large", "medium", "small"]
    assert [one.area for one in result.results] == [600 / PIXELS, 50 / PIXELS, 9 / PIXELS]
    assert result.absent == 1
    assert len(told) == 3  # "absent" is not even opened
    counts = {name: group.cases for name, group in result.groups().items()}
    sizes = {"area < 0.5%": 1, "area 0.5% to 5%": 1, "area > 5%": 1, "area >= 0.5%": 2}
    assert counts == {"all": 3, **sizes, "CT": 1, "MRI": 2}
    overall = result.groups()["all"]
    assert overall.means["click_1"] == pytest.approx(np.mean([one.measures["click_1"] for one in result.results]))
    low, high = overall.intervals["click_1"] or (1, 0)
    assert low < overall.means["click_1"] < high
    json.dumps(result.to_json())


def test_jittered_boxes_depend_on_the_seed_alone(cases: CaseSource) -> None:
    def boxes(prompts: Sequence[Prompt]) -> tuple[Mask, float]:
        [first, *_] = prompts
        if isinstance(first, Click):
            return SMALL, 0.5
        return box_mask(first.x0, first.y0, first.x1, first.y1), 0.5

    runs = [measure_ceiling(cases, Clicker(boxes), max_clicks=1, seed=seed).results for seed in (0, 0, 1)]
    moved = [[(one.measures["box_off_10"], one.measures["box_off_20"]) for one in results] for results in runs]
    assert moved[0] == moved[1] != moved[2]
    large = runs[0][0].measures
    assert large["box"] == 1
    assert 0.8**2 < large["box_off_10"] < 1
    assert large["box_off_20"] < large["box_off_10"]  # the same draw, twice as far


def test_times_tell_the_first_click_on_an_image_apart(cases: CaseSource) -> None:
    segmenter = Clicker(lambda _: (LARGE & False, 0.0))
    result = measure_ceiling(cases, segmenter, max_clicks=3)
    assert segmenter.opened == 2  # "medium" lies in the image of "large"
    large, medium, small = result.results
    assert large.open_ms is not None
    assert large.open_ms >= 20
    assert large.first_click_ms is not None
    assert large.first_click_ms >= 5
    assert min(large.click_ms) < 5
    assert (medium.open_ms, medium.first_click_ms) == (None, None)
    assert small.open_ms is not None
    times = result.milliseconds()
    assert {name: one.count for name, one in times.items()} == {"open": 2, "first click": 2, "later clicks": 6}
    assert 20 <= times["open"].median <= times["open"].p95


def test_failures_are_listed_never_averaged(data: Path, cases: CaseSource) -> None:
    def reply(prompts: Sequence[Prompt]) -> tuple[Mask, float]:
        if prompts[0].target == "medium":
            raise SegmenterError("segmenter clicker: out of memory")
        return LARGE, 0.5

    data.with_name("small.png").write_bytes(b"no image")
    result = measure_ceiling(cases, Clicker(reply), max_clicks=2)
    assert [failure.case_id for failure in result.failures] == ["large.png#medium", "small.png#small"]
    assert "out of memory" in result.failures[0].error
    assert [one.object for one in result.results] == ["large"]
    assert result.groups()["all"].means["click_1"] == 1


def test_nothing_to_click(tmp_path: Path) -> None:
    cases = read_cases(write_rows(tmp_path, {"absent": (SMALL, {"mask": ""})}))
    with pytest.raises(DataError, match="no row has a mask"):
        measure_ceiling(cases, RegionSegmenter())
    with pytest.raises(ConfigError, match="0 clicks"):
        measure_ceiling(cases, RegionSegmenter(), max_clicks=0)


def test_memory_is_known_here() -> None:
    peak = ceiling.peak_memory_bytes()
    assert peak is not None
    ballast = np.ones(2 * peak // 8)
    assert (ceiling.peak_memory_bytes() or 0) >= ballast.nbytes


# ------------------------------------------------------------------------------------------ segmenter or policy?


def run_of(ious: Sequence[float]) -> Ceiling:
    """Many patients whose expert reaches `ious` by clicks, and less with a box."""
    cases = []
    for number in range(12):
        curve, lower = OracleCurve(tuple(ious), (0.5,) * len(ious)), OracleCurve((0.01,), (0.5,))
        measures = {"click_1": ious[0], "last": ious[-1], "box": 0.01, "ellipse": 0.7, "nof_80": 0.0}
        facts = (str(number), "box", "CT", "set", f"patient{number}", 0.1, "area > 5%")
        cases.append(ceiling.CeilingCase(*facts, measures, curve, lower, None, None, ()))
    return Ceiling({"segmenter": "clicker"}, len(ious), tuple(cases), (), 0, None)


def agent_of(iou: float, prompts: int) -> Agent:
    names = [str(number) for number in range(12)]
    return Agent("nano", dict.fromkeys(names, iou), dict.fromkeys(names, prompts))


@pytest.mark.parametrize(
    ("iou", "prompts", "reachable", "bottleneck", "words"),
    [
        (0.4, 3, 0.9, "policy", "the policy is the bottleneck"),
        (0.4, 1, 0.5, "segmenter", "the segmenter is the bottleneck"),
        (0.4, 0, 0.5, "segmenter", "the segmenter is the bottleneck"),  # no prompt at all: one is compared
        (0.5, 2, 0.75, "both", "neither"),
        (0.8, 99, 0.9, "both", "neither"),
    ],
)
def test_who_is_the_bottleneck(iou: float, prompts: int, reachable: float, bottleneck: str, words: str) -> None:
    run, agent = run_of([0.5, 0.75, 0.9]), agent_of(iou, prompts)
    found = run.shortfall(agent)
    assert found is not None
    assert (found.cases, found.agent_iou, found.reachable) == pytest.approx((12, iou, reachable))
    assert found.policy_share == pytest.approx(reachable - iou)
    assert found.segmenter_share == pytest.approx(1 - reachable)
    assert found.bottleneck == bottleneck
    assert words in run.verdict(agent)
    assert f"{reachable:.3f}" in run.verdict(agent)
    assert "bottleneck" not in run.verdict()


def test_uncertain_differences_are_called_so() -> None:
    run, names = run_of([0.5, 0.75, 0.9]), [str(number) for number in range(12)]
    wide = Agent(
        "nano", {name: 0.1 if index % 2 else 0.75 for index, name in enumerate(names)}, dict.fromkeys(names, 2)
    )
    found = run.shortfall(wide)
    assert found is not None
    assert found.policy_share > found.segmenter_share
    assert found.bottleneck == "both"


def test_no_case_in_common_costs_no_run() -> None:
    run, agent = run_of([0.5, 0.75, 0.9]), Agent("nano", {"other": 1.0}, {"other": 1})
    assert run.shortfall(agent) is None
    assert run.to_json(agent)["agent"] is None
    assert "nothing to compare" in run.verdict(agent)


# ------------------------------------------------------------------------------------------------------ calibration


def test_calibration_by_hand() -> None:
    found = calibration([0.05, 0.15, 0.15, 1.0], [0.05, 0.5, 0.3, 0.6])
    assert found.expected_error == pytest.approx((0 + 2 * 0.25 + 0.4) / 4)
    assert [one.count for one in found.bins] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert (found.bins[1].low, found.bins[1].high) == (0.1, 0.2)
    assert (found.bins[1].mean_score, found.bins[1].mean_iou) == pytest.approx((0.15, 0.4))
    assert found.bins[2].mean_iou is None


@pytest.mark.parametrize(
    ("scores", "ious"), [([], []), ([0.5], [0.5, 0.5]), ([1.5], [0.5]), ([float("nan")], [0.5]), ([0.5], [-0.1])]
)
def test_calibration_refuses(scores: list[float], ious: list[float]) -> None:
    with pytest.raises(DataError, match="calibration"):
        calibration(scores, ious)


# ------------------------------------------------------------------------------------------------------ the command


def run_ceiling(*arguments: object) -> Result:
    return ibisagent("eval", "ceiling", *arguments, "--segmenter", "region")


def test_the_command_shows_and_writes_the_ceiling(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    shown = run_ceiling(data, "-o", out, "--clicks", 4)
    assert shown.exit_code == 0, shown.output
    assert "95% at 4" in shown.stdout
    assert "NoF80" in shown.stdout
    assert "\u2588" in shown.stdout  # the bars
    assert "one click of an expert gives" in shown.stdout.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["ceiling.json", "ceiling.png"]
    plain = json.loads((out / "ceiling.json").read_text())
    assert [len(row["clicks"]["ious"]) for row in plain["cases"]] == [4, 4, 4]
    assert plain["made_by"]["segmenter"] == "region"
    assert PIL.Image.open(io.BytesIO((out / "ceiling.png").read_bytes())).size == (1500, 500)
    timed = {"milliseconds", "peak_memory_bytes", "cases"}
    again = json.loads(run_ceiling(data, "--clicks", 4, "--json").stdout)
    assert {name: again[name] for name in again.keys() - timed} == {name: plain[name] for name in plain.keys() - timed}


def test_command_compares_with_an_evaluation(data: Path, tmp_path: Path) -> None:
    arguments = ["eval", "run", data, "-p", "centre-click", "-s", "region", "--no-baselines", "-o", tmp_path / "agent"]
    made = ibisagent(*arguments)
    assert made.exit_code == 0, made.output
    evaluated = json.loads((tmp_path / "agent" / "evaluation.json").read_text())
    for dialect, best in {"ibis": "box", "paper": "click_1"}.items():  # the second one has no boxes
        evaluated["made_by"]["dialect"] = dialect
        (tmp_path / "agent" / "evaluation.json").write_text(json.dumps(evaluated))
        result = run_ceiling(data, "--agent", tmp_path / "agent", "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["agent"]["policy"], found["agent"]["cases"]) == ("centre-click", 3)
        assert found["agent"]["reachable"] == pytest.approx(found["groups"]["all"]["means"][best])
        assert "centre-click reaches" in found["verdict"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        ("no json", "something else"),
        ("[]", "something else"),
        ('{"made_by": {}, "cases": []}', "something else"),
        ('{"made_by": {"policy": "p", "segmenter": "ibis-click"}, "cases": []}', "segmenter ibis-click"),
        ('{"made_by": {"policy": "p", "segmenter": "region", "weights_sha256": "ab"}, "cases": []}', "other weights"),
        ('{"made_by": {"policy": "p", "segmenter": "region"}, "cases": []}', "no case in common"),
    ],
)
def test_evaluations_that_do_not_fit(content: str | None, part: str, data: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "agent.json").write_text(content)
    result = run_ceiling(data, "--agent", tmp_path / "agent.json")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "agent.json" in line
    assert part in line


def test_command_lists_failures(data: Path, tmp_path: Path) -> None:
    data.with_name("small.png").write_bytes(b"no image")
    result = run_ceiling(data, "--clicks", 1)
    assert result.exit_code == 2
    assert "failed, left out: small.png#small" in result.stderr
    data.with_name("large.png").write_bytes(b"no image")
    result = run_ceiling(data, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout.splitlines()[-1] == "No case could be judged."
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ceiling.json"]


def test_output_is_a_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = run_ceiling(data, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert str(tmp_path / "out") in result.stderr
