"""What a segmenter can reach on labelled data when an expert who sees the ground truth prompts it: the bound of its
agents.

Measures of a case (IoU in [0, 1] unless said otherwise):

| name | what |
|---|---|
| click_1 ... click_20 | after that many of the expert's clicks (`clicks.next_click`), from nothing |
| box | after the true bounding box alone |
| box_click_1, _2, _3, _5 | after the box and that many clicks |
| box_off_10, box_off_20 | after the box alone, each edge moved at random by at most 10% or 20% of the box's side |
| ellipse | the ellipse inside the true box: no segmenter at all |
| noc_80, _85, _90 | number of clicks to that IoU (in %); the most clicks allowed where it is never reached |
| nof_80, _85, _90 | 1 where it is never reached, else 0 |
| last, best, best_scored | of the masks after each click: the last, the best, the one the segmenter scored highest |

An expert who finds no wrong pixel to click ends early; what was reached then stands for all later clicks. NoC and NoF
are those of Sofiiuk et al. (Reviving Iterative Training with Mask Guidance, ICIP 2022). A case whose files or segmenter
fail is listed and counts nowhere; one whose image does not show the object has nothing to click and is counted apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ibisagent.datasets import CaseSource
from ibisagent.domain import Case, Image, Prompt, union
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation import OracleCurve, ellipse_iou, oracle_curves
from ibisagent.evaluation.calibration import Calibration, calibration
from ibisagent.evaluation.metrics import GOALS, SMALL, SizeClass, clicks_to, size_class
from ibisagent.evaluation.statistics import patient_interval
from ibisagent.files import reading, write_json, write_whole
from ibisagent.inference.cases import Failure, judge_cases
from ibisagent.policies.oracle import BOX_JITTER
from ibisagent.protocol import DIALECTS
from ibisagent.segmenters import Prediction, Segmenter, SegmenterSession

CAN_DRAW = find_spec("matplotlib") is not None
MAX_CLICKS = 20
CLICKS = (1, 2, 3, 5, 10, 20)
BOX_CLICKS = (1, 2, 3, 5)
BOXES_OFF = (0.1, 0.2)
NOT_SMALL = "area >= 0.5%"


@dataclass(frozen=True, slots=True)
class CeilingCase:
    """One case: who it is, what was reached (see the module's text), and how long that took.

    area: share of the image that the object covers. clicks, box_first: every prompt of the expert who only clicks,
    and of the one who begins with the box. open_ms, first_click_ms: opening the image and the first click on it; None
    if it had been opened for an earlier case. click_ms: all later clicks.
    """

    case_id: str
    object: str
    modality: str
    dataset: str
    patient: str
    area: float
    size: SizeClass
    measures: Mapping[str, float]
    clicks: OracleCurve
    box_first: OracleCurve
    open_ms: float | None
    first_click_ms: float | None
    click_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Some cases together.

    means, intervals: of every measure; 95%, patients resampled, None for fewer than two patients. curve: mean IoU after
    each of the clicks. calibration: of the segmenter's own estimates after all clicks that were given.
    """

    cases: int
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float] | None]
    curve: tuple[float, ...]
    calibration: Calibration

    @property
    def falls(self) -> tuple[int, ...]:
        """The clicks (the first is 1) after which the mean IoU is lower than before."""
        pairs = enumerate(pairwise(self.curve), start=2)
        return tuple(number for number, (before, after) in pairs if after < before)


@dataclass(frozen=True, slots=True)
class Milliseconds:
    """Wall time of one kind of call."""

    count: int
    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Agent:
    """What an evaluation measured of a policy: the IoU that it reached and the prompts that it gave, by case.

    boxes: whether its dialect has boxes.
    """

    policy: str
    ious: Mapping[str, float]
    prompts: Mapping[str, int]
    boxes: bool = True


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why an agent does not reach an IoU of 1, over the cases that it shares with a ceiling.

    reachable: mean IoU of an expert with as many prompts on each case as the agent gave (at least one), with the same
    segmenter: clicks alone, or, where the agent's dialect has boxes, a box first (then at most max(BOX_CLICKS) clicks),
    whichever is better on the whole.
    policy_share, segmenter_share: what is missing from the agent to the expert, and from the expert to 1. interval: of
    their difference, policy less segmenter, 95%, patients resampled. bottleneck: the larger share, "both" where the
    interval holds 0 or there is none.
    """

    policy: str
    cases: int
    agent_iou: float
    reachable: float
    policy_share: float
    segmenter_share: float
    interval: tuple[float, float] | None
    bottleneck: Literal["policy", "segmenter", "both"]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """All results of one run, in the order of the cases.

    absent: how many cases have no mask, as their image shows no object. peak_memory_bytes: the most that this process
    ever held, None where the system does not say; the memory of a GPU or of another machine is not in it.
    """

    provenance: Mapping[str, str]
    max_clicks: int
    results: tuple[CeilingCase, ...]
    failures: tuple[Failure, ...]
    absent: int
    peak_memory_bytes: int | None

    def groups(self) -> dict[str, Group]:
        """{"all": ..., then one per size class that occurs, NOT_SMALL, and one per modality}."""
        members: dict[str, list[CeilingCase]] = {"all": list(self.results)}
        members |= {size: [one for one in self.results if one.size == size] for size in get_args(SizeClass)}
        members[NOT_SMALL] = [one for one in self.results if one.area >= SMALL]
        for modality in sorted({one.modality or "unknown" for one in self.results}, key=str.casefold):
            members[modality] = [one for one in self.results if (one.modality or "unknown") == modality]
        return {name: _group(cases, self.max_clicks) for name, cases in members.items() if cases}

    def milliseconds(self) -> dict[str, Milliseconds]:
        """{"open": ..., "first click": ..., "later clicks": ...}; a kind that never occurred is left out."""
        times = {
            "open": [one.open_ms for one in self.results if one.open_ms is not None],
            "first click": [one.first_click_ms for one in self.results if one.first_click_ms is not None],
            "later clicks": [each for one in self.results for each in one.click_ms],
        }
        return {
            name: Milliseconds(len(values), float(np.median(values)), float(np.percentile(values, 95)))
            for name, values in times.items()
            if values
        }

    def shortfall(self, agent: Agent) -> Shortfall | None:
        """Compare with what a policy reached on the same cases; None if no case was judged in both."""
        shared = [one for one in self.results if one.case_id in agent.ious]
        if not shared:
            return None
        reached = np.array([agent.ious[one.case_id] for one in shared])
        prompts = [max(1, agent.prompts[one.case_id]) for one in shared]
        ways = [[one.clicks for one in shared]] + [[one.box_first for one in shared]] * agent.boxes
        experts = [np.array([curve.after(number) for curve, number in zip(way, prompts, strict=True)]) for way in ways]
        expert = max(experts, key=lambda ious: float(ious.mean()))
        differences = (expert - reached) - (1 - expert)
        interval = patient_interval(zip((_patient(one) for one in shared), differences.tolist(), strict=True))
        clear = interval is not None and not interval[0] <= 0 <= interval[1]
        larger: Literal["policy", "segmenter"] = "policy" if differences.mean() > 0 else "segmenter"
        return Shortfall(
            agent.policy,
            len(shared),
            float(reached.mean()),
            float(expert.mean()),
            float((expert - reached).mean()),
            float((1 - expert).mean()),
            interval,
            larger if clear else "both",
        )

    def verdict(self, agent: Agent | None = None) -> str:
        """In plain words, from the numbers alone: where the bound is, and with `agent` who keeps it from 1."""
        if not self.results:
            return "No case could be judged."
        overall = _group(self.results, self.max_clicks)
        missed = sum(one.measures["nof_80"] for one in self.results)
        count = _counted(overall.cases, "case")
        more = "" if self.max_clicks == 1 else f", {self.max_clicks} clicks {overall.means['last']:.3f}"
        bound = (
            f"With {self.provenance['segmenter']} one click of an expert gives a mean IoU of"
            f" {overall.means['click_1']:.3f}{more}; the true box gives {overall.means['box']:.3f}, the ellipse"
            f" inside it {overall.means['ellipse']:.3f}. {missed:.0f} of {count} never reach 0.80."
        )
        if agent is None:
            return (
                f"{bound} A policy that only prompts this segmenter can hardly do better. Whether yours comes near:"
                " ibisagent eval run DATA -o RUN, then --agent RUN here."
            )
        found = self.shortfall(agent)
        if found is None:
            return f"{bound} No case was judged both here and with {agent.policy}, so there is nothing to compare."
        judgement = {
            "policy": "the policy is the bottleneck",
            "segmenter": "the segmenter is the bottleneck",
            "both": "neither is clearly the bottleneck",
        }[found.bottleneck]
        sure = "" if found.interval is None else f" (95% {found.interval[0]:+.3f} to {found.interval[1]:+.3f})"
        return (
            f"{bound} On {_counted(found.cases, 'case')} {found.policy} reaches {found.agent_iou:.3f}, an expert with"
            f" as many prompts (at most {self.max_clicks}) {found.reachable:.3f}. So {found.policy_share:.3f} is"
            f" missing through the policy and {found.segmenter_share:.3f} through the segmenter, a difference of"
            f" {found.policy_share - found.segmenter_share:+.3f}{sure}: {judgement}."
        )

    def to_json(self, agent: Agent | None = None) -> dict[str, Any]:
        """Everything as plain JSON values: provenance, groups, times, memory, verdict, failures, one row per case."""
        shortfall = None if agent is None else self.shortfall(agent)
        return {
            "made_by": dict(self.provenance),
            "max_clicks": self.max_clicks,
            "verdict": self.verdict(agent),
            "agent": None if shortfall is None else asdict(shortfall),
            "groups": {name: asdict(group) for name, group in self.groups().items()},
            "milliseconds": {name: asdict(times) for name, times in self.milliseconds().items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "absent": self.absent,
            "failures": [asdict(failure) for failure in self.failures],
            "cases": [asdict(result) for result in self.results],
        }

    def write(self, folder: Path, agent: Agent | None = None) -> None:
        """Write ceiling.json and, where it can be drawn, ceiling.png into `folder`."""
        write_json(self.to_json(agent), folder / "ceiling.json")
        if CAN_DRAW and self.results:
            write_whole(_drawn(self), folder / "ceiling.png")


def measure_ceiling(
    cases: CaseSource,
    segmenter: Segmenter,
    *,
    max_clicks: int = MAX_CLICKS,
    seed: int = 0,
    provenance: Mapping[str, str] | None = None,
    on_case: Callable[[], None] | None = None,
) -> Ceiling:
    """Prompt `segmenter` on every case as an expert who sees the ground truth would.

    max_clicks: of the expert who only clicks, and the cap of NoC. seed: of the moved boxes. on_case: called after each
    case. Cases that fail are listed; broken machinery ends it (`judge_cases`).
    Raises DataError if no case has a mask, ConfigError for max_clicks < 1.
    """
    if max_clicks < 1:
        raise ConfigError(f"{max_clicks} clicks: give 1 or more")
    if not any(row.mask for row in cases.rows):
        raise DataError(f"{cases.where}: no row has a mask, so there is no object to click on; give masks")
    timed = _Stopwatch(segmenter)
    results, failures = judge_cases(
        cases.filter(lambda row: row.mask is not None),
        lambda batch: [_judge(case, timed, max_clicks, seed) for case in batch],
        on_case=None if on_case is None else lambda _: on_case(),
    )
    facts = {"segmenter": segmenter.name, "max_clicks": str(max_clicks), "seed": str(seed), **(provenance or {})}
    absent = len(cases) - len(results) - len(failures)
    return Ceiling(facts, max_clicks, tuple(results), tuple(failures), absent, peak_memory_bytes())


def read_agent(path: Path, segmenter: Segmenter, cases: CaseSource) -> Agent:
    """The policy whose evaluation `ibisagent eval run -o` wrote: the folder, or the evaluation.json in it.

    DataError if `path` is no such evaluation, ConfigError if it was made with another segmenter or on other cases.
    """
    path = path / "evaluation.json" if path.is_dir() else path
    with reading(path, "give what 'ibisagent eval run -o' wrote"):
        loaded = json.loads(path.read_bytes())
        provenance, rows = loaded["made_by"], loaded["cases"]
        found = {row["case_id"]: row["measures"] for row in rows if "iou" in row["measures"]}
        agent = Agent(
            str(provenance["policy"]),
            {name: float(measures["iou"]) for name, measures in found.items()},
            {name: int(measures["clicks"]) for name, measures in found.items()},
            "dialect" not in provenance or DIALECTS[provenance["dialect"]].boxes,
        )
        theirs = str(provenance["segmenter"])
    if theirs != segmenter.name:
        raise ConfigError(f"{path}: was made with segmenter {theirs}, this run has {segmenter.name}; use the same one")
    ours = segmenter.describe().get("weights_sha256", "")
    if provenance.get("weights_sha256", ours) != ours:
        raise ConfigError(f"{path}: was made with other weights of {theirs}; evaluate again with these")
    if not any(row.id in agent.ious for row in cases.rows if row.mask is not None):
        raise ConfigError(f"{path}: has no case in common with {cases.where}; evaluate on the same data and split")
    return agent


def peak_memory_bytes() -> int | None:
    """The most resident memory that this process ever held; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage this does not count what the parent held when it started this process
        lines = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(lines[0][1]) * 1024 if lines else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _drawn(ceiling: Ceiling) -> bytes:
    """A PNG: IoU by clicks over all and by size class, by modality, and estimated against measured IoU."""
    from matplotlib.figure import Figure

    groups = ceiling.groups()
    modalities = {name: one for name, one in groups.items() if name != "all" and not name.startswith("area ")}
    figure = Figure(figsize=(15, 5), layout="constrained")
    sizes_axes, modality_axes, trust_axes = figure.subplots(1, 3)
    overall = groups["all"]
    clicks, numbers = range(1, ceiling.max_clicks + 1), _click_numbers(ceiling.max_clicks)
    intervals = [overall.intervals[f"click_{number}"] for number in numbers]
    if all(interval is not None for interval in intervals):
        low, high = zip(*(interval for interval in intervals if interval is not None), strict=True)
        sizes_axes.fill_between(numbers, low, high, alpha=0.2, color="black", linewidth=0)
    for axes, shown in (
        (sizes_axes, {"all": overall, **{name: groups[name] for name in get_args(SizeClass) if name in groups}}),
        (modality_axes, modalities),
    ):
        for name, group in shown.items():
            colour, width = ("black", 2.5) if name == "all" else (None, 1.5)
            axes.plot(clicks, group.curve, marker=".", color=colour, linewidth=width, label=f"{name} ({group.cases})")
        axes.set(xlabel="an expert's clicks", ylabel="mean IoU", ylim=(0, 1), xticks=numbers)
    for name, label, dashes in (("box", "true box", "--"), ("ellipse", "ellipse in it", ":")):
        sizes_axes.axhline(overall.means[name], linestyle=dashes, color="black", label=label)
    estimated = [one for one in overall.calibration.bins if one.count]
    trust_axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    trust_axes.plot([one.mean_score for one in estimated], [one.mean_iou for one in estimated], marker="o")
    trust_axes.set(xlabel="IoU estimated by the segmenter", ylabel="IoU measured", xlim=(0, 1), ylim=(0, 1))
    trust_axes.set_title(f"expected calibration error {overall.calibration.expected_error:.3f}")
    sizes_axes.set_title(f"{ceiling.provenance['segmenter']}, {overall.cases} cases"[-60:])
    modality_axes.set_title("by modality")
    sizes_axes.legend(fontsize="small")
    modality_axes.legend(fontsize="small")
    png = BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


class _Stopwatch:
    """A segmenter that notes how long its calls take, and keeps the image opened last open for the next case."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.name = segmenter.name
        self.open_ms: float | None = None
        self.predict_ms: list[float] = []
        self._segmenter = segmenter
        self._seen: set[str] = set()
        self._last: tuple[str, _StopwatchSession] | None = None

    def open(self, image: Image) -> SegmenterSession:
        key = image.sha256
        if self._last is None or self._last[0] != key:
            started = time.perf_counter()
            session = self._segmenter.open(image)
            elapsed = _milliseconds_since(started)
            if key not in self._seen:  # the segmenter may keep what it knows of an image: only the first time is true
                self.open_ms = elapsed
                self._seen.add(key)
            self._last = key, _StopwatchSession(session, self.predict_ms)
        return self._last[1]

    def describe(self) -> dict[str, str]:
        return self._segmenter.describe()

    def restart(self) -> None:
        self.open_ms = None
        self.predict_ms.clear()


class _StopwatchSession:
    """A session that appends the milliseconds of every call to `times`."""

    def __init__(self, session: SegmenterSession, times: list[float]) -> None:
        self._session = session
        self._times = times

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        started = time.perf_counter()
        prediction = self._session.predict(prompts, prior)
        self._times.append(_milliseconds_since(started))
        return prediction


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)


def _judge(case: Case, segmenter: _Stopwatch, max_clicks: int, seed: int) -> CeilingCase:
    """One case with an object in it. Raises SegmenterError."""
    targets = case.targets or {}
    area = float(union(targets, list(targets), case.image.size).mean())
    segmenter.restart()
    [clicks] = oracle_curves([case], segmenter, prompts=max_clicks)
    open_ms, click_ms = segmenter.open_ms, tuple(segmenter.predict_ms)
    [box_first] = oracle_curves([case], segmenter, prompts=1 + max(BOX_CLICKS), box_first=True)
    measures = {f"click_{number}": clicks.after(number) for number in _click_numbers(max_clicks)}
    measures["box"] = box_first.after(1)
    measures |= {f"box_click_{number}": box_first.after(1 + number) for number in BOX_CLICKS}
    for off in BOXES_OFF:
        [curve] = oracle_curves([case], segmenter, prompts=1, box_first=True, jitter=off / BOX_JITTER, seed=seed)
        measures[f"box_off_{off * 100:.0f}"] = curve.after(1)
    measures["ellipse"] = ellipse_iou(case)
    measures |= _clicks_to_goals(clicks.ious, max_clicks)
    measures |= {
        "last": clicks.ious[-1],
        "best": max(clicks.ious),
        "best_scored": max(zip(clicks.scores, range(len(clicks.ious)), clicks.ious, strict=True))[2],
    }
    return CeilingCase(
        case.id,
        case.meta.get("object", ", ".join(targets)),
        case.meta.get("modality", ""),
        case.meta.get("dataset", ""),
        case.patient or case.image.sha256,
        area,
        size_class(area),
        measures,
        clicks,
        box_first,
        open_ms,
        None if open_ms is None else click_ms[0],
        click_ms[1:],
    )


def _clicks_to_goals(ious: Sequence[float], max_clicks: int) -> dict[str, float]:
    """noc_* and nof_* of one episode."""
    measures = {}
    for goal in GOALS:
        number, never = clicks_to(goal, ious, max_clicks)
        measures[f"noc_{goal * 100:.0f}"] = float(number)
        measures[f"nof_{goal * 100:.0f}"] = float(never)
    return measures


def _click_numbers(max_clicks: int) -> list[int]:
    return sorted({number for number in CLICKS if number <= max_clicks} | {max_clicks})


def _patient(case: CeilingCase) -> str:
    return f"{case.dataset}/{case.patient}"


def _group(cases: Sequence[CeilingCase], max_clicks: int) -> Group:
    names = list(cases[0].measures)
    curves = [one.clicks for one in cases]
    return Group(
        len(cases),
        {name: float(np.mean([one.measures[name] for one in cases])) for name in names},
        {name: patient_interval((_patient(one), one.measures[name]) for one in cases) for name in names},
        tuple(float(np.mean([curve.after(number) for curve in curves])) for number in range(1, max_clicks + 1)),
        calibration(
            [score for curve in curves for score in curve.scores],
            [reached for curve in curves for reached in curve.ious],
        ),
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
