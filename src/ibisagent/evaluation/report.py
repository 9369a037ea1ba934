"""A run as one HTML page that needs nothing else: tables, plots, and the best, median and worst cases turn by turn.

Plots are SVG drawn by the template: two kinds of line need no plotting library, and the page stays small and sharp.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np

from ibisagent.datasets.members import read_image_at
from ibisagent.domain import Box, Click, Episode, Image, Masks, same_masks
from ibisagent.errors import DataError
from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule
from ibisagent.evaluation.results import CaseResult, Evaluation, GroupBy, summarise
from ibisagent.evaluation.runs import Run
from ibisagent.evaluation.tables import HEADINGS, MAIN, interval_text, ordered
from ibisagent.files import html_page, write_whole
from ibisagent.inference.image import describe_actions
from ibisagent.protocol import overlay

SIDE = 320  # pixels of an image's longer side
QUALITY = 82
COLOURS = ("#111111", "#1d4ed8", "#d97706", "#15803d", "#be185d", "#7c3aed", "#0e7490", "#b91c1c", "#4d7c0f", "#6b7280")
POSITIVE, NEGATIVE, BOX = (34, 197, 94), (239, 68, 68), (34, 211, 238)
MASK, GROUND_TRUTH = (59, 130, 246), (250, 204, 21)
Rank = Literal["best", "median", "worst"]


def write_report(folder: Path, page: Path, *, cases: int = 6, empty: EmptyRule = EMPTY_RULE) -> list[str]:
    """Write the page about the run in `folder`: the cases whose image is not there any more, or has changed.

    cases: so many best, median and worst by IoU over all cases; each modality adds a third as many, which are shown
    when the page is filtered. DataError if the folder holds no run, or no case of it was judged.
    """
    run = Run(folder)
    if not run.evaluation.results:
        raise DataError(f"{folder}: no case was judged, so there is nothing to show; see its failures")
    sections = _sections(run, _picks(run.evaluation, cases))
    write_whole(_page(run, sections, empty), page)
    return [card.result.case_id for cards in sections.values() for card in cards if not card.figures]


def coverage_curve(quality: Sequence[float], dice: Sequence[float]) -> list[tuple[float, float]]:
    """(share of the cases kept, their mean Dice), keeping those of highest `quality` first; from one case to all.

    Equal estimates keep their order. The risk-coverage curve of El-Yaniv and Wiener (JMLR 2010), with Dice as 1 - risk.
    """
    order = np.argsort(-np.asarray(quality, dtype=float), kind="stable")
    means = np.cumsum(np.asarray(dice, dtype=float)[order]) / np.arange(1, len(order) + 1)
    return [((number + 1) / len(order), float(mean)) for number, mean in enumerate(means)]


def iou_by_turn(results: Sequence[CaseResult], turns: int) -> list[tuple[float, float]]:
    """(turn, mean IoU after it) from 1 to `turns`; an episode that ended keeps its last IoU. [] without episodes."""
    curves = [one.ious for one in results if one.ious]
    at = range(turns if curves else 0)
    return [(turn + 1, float(np.mean([curve[min(turn, len(curve) - 1)] for curve in curves]))) for turn in at]


# ---------------------------------------------------------------------------------------------------------- the page


def _page(run: Run, sections: Mapping[Rank, Sequence[_Card]], empty: EmptyRule) -> bytes:
    evaluation = run.evaluation
    provenance, results = evaluation.provenance, evaluation.results
    overall = summarise(results, empty=empty)
    judged = len(results) + len(evaluation.failures)
    unfinished = "" if judged == run.cases else f" The run is unfinished: {judged} of {run.cases} cases."
    names = ordered(list(overall.means))
    shown = [name for name in (*MAIN, "stop_gap", "seconds") if name in overall.means]
    return html_page(
        "evaluation/report.html",
        title=f"{provenance.get('policy', '')} with {provenance.get('segmenter', '')}",
        facts=", ".join(f"{name} {value}" for name, value in provenance.items() if value),
        counts=f"{overall.cases} cases of {overall.patients} patients; {overall.positives} show their object (pos.)."
        f" {len(evaluation.failures)} failed and count nowhere. Two empty masks count as: {empty}."
        f" Intervals: 95%, patients resampled.{unfinished}",
        failures=evaluation.failures,
        metrics=[
            (HEADINGS.get(name, name), _number(overall.means[name]), interval_text(overall, name)) for name in names
        ],
        groups={by: _group_table(evaluation, by, shown, empty) for by in get_args(GroupBy)},
        plots=_plots(evaluation),
        modalities=evaluation.groups("modality"),
        objects=evaluation.groups("object"),
        sizes=evaluation.groups("size"),
        sections=sections,
        columns=("case", "object", "modality", "size", "IoU", "Dice", "turns", "stop gap", "predicted", "ended"),
        cases=[(one, _cells(one)) for one in results],
    )


def _cells(one: CaseResult) -> list[str]:
    numbers = [one.measures.get(name) for name in ("iou", "dice", "turns", "stop_gap")]
    return [one.case_id, one.object, one.modality, one.size, *map(_number, (*numbers, one.quality)), one.stop or ""]


def _group_table(evaluation: Evaluation, by: GroupBy, shown: Sequence[str], empty: EmptyRule) -> list[list[str]]:
    rows = [[by, "cases", *(HEADINGS[name] for name in shown), "IoU, 95%"]]
    for name, cases in evaluation.groups(by).items():
        summary = summarise(cases, empty=empty)
        values = [_number(summary.means.get(metric)) for metric in shown]
        rows.append([name, str(summary.cases), *values, interval_text(summary, "iou")])
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.5
    dashes: str = ""


@dataclass(frozen=True, slots=True)
class _Plot:
    """Lines whose y goes from 0 to 1. across, up: what the axes are."""

    title: str
    across: str
    up: str
    lines: Sequence[_Line]

    @property
    def _range(self) -> tuple[float, float]:
        numbers = [x for line in self.lines for x, _ in line.points]
        low, high = min(numbers), max(numbers)
        return (low - 0.5, high + 0.5) if low == high else (low, high)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where on the x axis, from 0 to 1, stands which number."""
        low, high = self._range
        if high - low >= 2:
            numbers = np.arange(np.ceil(low), high + 1e-9, max(1, round((high - low) / 10)))
        else:
            numbers = np.linspace(low, high, 5)
        return [((x - low) / (high - low), f"{x:.0f}" if high - low >= 2 else f"{x:.2g}") for x in numbers]

    def placed(self, line: _Line) -> list[tuple[float, float]]:
        """The points of a line, both axes from 0 to 1."""
        low, high = self._range
        return [((x - low) / (high - low), y) for x, y in line.points]


def _plots(evaluation: Evaluation) -> list[_Plot]:
    plots = []
    modalities = evaluation.groups("modality")
    longest = max((len(one.ious) for one in evaluation.results), default=0)
    turns = [_Line("all", iou_by_turn(evaluation.results, longest), COLOURS[0], 3)]
    turns += [
        _Line(name, iou_by_turn(cases, longest), COLOURS[1 + number % (len(COLOURS) - 1)])
        for number, (name, cases) in enumerate(modalities.items())
        if len(modalities) > 1
    ]
    if turns[0].points:
        plots.append(_Plot("Mean IoU by turn", "turn", "mean IoU", [line for line in turns if line.points]))
    scored = [one for one in evaluation.results if one.quality is not None and "dice" in one.measures]
    if scored:
        dice = [one.measures["dice"] for one in scored]
        mean = float(np.mean(dice))
        lines = [
            _Line(
                "by predicted quality", coverage_curve([one.quality or 0.0 for one in scored], dice), COLOURS[1], 2.5
            ),
            _Line("by true Dice (ideal)", coverage_curve(dice, dice), COLOURS[3], 1.5, "6 4"),
            _Line("in any order", [(0.0, mean), (1.0, mean)], COLOURS[9], 1.5, "2 4"),
        ]
        left = len(evaluation.results) - len(scored)
        note = f"Coverage against Dice ({len(scored)} cases; {left} have no predicted quality)"
        plots.append(_Plot(note, "share of the masks kept, best predicted first", "mean Dice of those", lines))
    return plots


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class _Pick:
    """A case to show. overall: it is one of all cases' extremes; else one of its modality's."""

    result: CaseResult
    rank: Rank
    overall: bool


@dataclass(frozen=True, slots=True)
class _Figure:
    """An image of at most SIDE pixels a side, as a data URL."""

    caption: str
    thought: str
    width: int
    height: int
    url: str


@dataclass(frozen=True, slots=True)
class _Card:
    """A case as it is shown; no figures where its image is not there. words: what is said of it."""

    result: CaseResult
    overall: bool
    words: str
    figures: Sequence[_Figure]


def _picks(evaluation: Evaluation, cases: int) -> list[_Pick]:
    """Best, median and worst by IoU; a case appears once, in the first of these that it is in."""
    chosen: dict[str, _Pick] = {}
    groups = [(list(evaluation.results), cases, True)]
    groups += [(group, -(-cases // 3), False) for group in evaluation.groups("modality").values()]
    for group, count, overall in groups:
        order = sorted((one for one in group if "iou" in one.measures), key=lambda one: -one.measures["iou"])
        count = min(count, max(1, len(order) // 3))
        middle = max(0, (len(order) - count) // 2)
        ranks: dict[Rank, list[CaseResult]] = {
            "best": order[:count],
            "worst": order[::-1][:count],
            "median": order[middle : middle + count],
        }
        for rank, members in ranks.items():
            for one in members:
                chosen.setdefault(one.case_id, _Pick(one, rank, overall))
    return list(chosen.values())


def _sections(run: Run, picks: Sequence[_Pick]) -> dict[Rank, list[_Card]]:
    sections: dict[Rank, list[_Card]] = {}
    for rank in get_args(Rank):
        members = sorted((pick for pick in picks if pick.rank == rank), key=lambda pick: -pick.result.measures["iou"])
        sections[rank] = [_card(run, pick) for pick in (members[::-1] if rank == "worst" else members)]
    return sections


def _card(run: Run, pick: _Pick) -> _Card:
    one = pick.result
    facts = [one.object, one.modality, one.size, f"ended: {one.stop}" if one.stop else ""]
    episode, masks, targets = run.masks(one.case_id)
    image = _image(run.image(one.case_id), episode)
    figures = []
    if image is not None:
        figures.append(_figure(image, {}, targets, (), "ground truth"))
        for number, turn in enumerate(episode.turns if episode else (), start=1):
            iou = f", IoU {one.ious[number - 1]:.3f}" if number <= len(one.ious) else ""
            caption = f"turn {number}: {turn.reply.problem or describe_actions(turn.reply.actions)}{iou}"
            figures.append(_figure(image, turn.after, targets, turn.reply.prompts, caption, turn.reply.thought))
        answer = episode.answer_masks if episode else masks
        if episode is None or not same_masks(answer, episode.masks):
            figures.append(_figure(image, answer, targets, (), f"handed out: IoU {one.measures['iou']:.3f}"))
    return _Card(one, pick.overall, ", ".join(fact for fact in facts if fact), figures)


def _image(source: str, episode: Episode | None) -> Image | None:
    """The image that was judged; None if it cannot be read, or is another one now."""
    try:
        image = read_image_at(Path(source))
    except DataError:
        return None
    return image if episode is None or image.sha256 == episode.image_sha256 else None


def _figure(
    image: Image, masks: Masks, targets: Masks, prompts: Sequence[Click | Box], caption: str, thought: str = ""
) -> _Figure:
    pixels = _drawn(image, masks, targets, prompts)
    done, coded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise DataError(f"{image.source}: its image cannot be drawn")
    url = f"data:image/jpeg;base64,{base64.b64encode(coded.tobytes()).decode()}"
    return _Figure(caption, thought, pixels.shape[1], pixels.shape[0], url)


def _drawn(image: Image, masks: Masks, targets: Masks, prompts: Sequence[Click | Box]) -> np.ndarray:
    """(h, w, 3) uint8: the image at most SIDE long, with masks, outlines of the ground truth, and prompts."""
    scale = SIDE / max(image.size)
    size = max(1, round(image.size[1] * scale)), max(1, round(image.size[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST

    def resized(mask: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT))

    small = Image(np.ascontiguousarray(cv2.resize(image.pixels, size, interpolation=how)))
    shown = {name: resized(mask) > 0 for name, mask in masks.items()}
    pixels = np.array(overlay(small, shown, colours=(MASK,)))
    for ground_truth in targets.values():
        outlines, _ = cv2.findContours(resized(ground_truth), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, GROUND_TRUTH, 1)
    for prompt in prompts:
        if isinstance(prompt, Click):
            centre = (int((prompt.x + 0.5) * scale), int((prompt.y + 0.5) * scale))
            cv2.circle(pixels, centre, 6, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(pixels, centre, 4, POSITIVE if prompt.positive else NEGATIVE, -1, cv2.LINE_AA)
        else:
            corners = [int(value * scale) for value in (prompt.x0, prompt.y0, prompt.x1 - 1, prompt.y1 - 1)]
            cv2.rectangle(pixels, (corners[0], corners[1]), (corners[2], corners[3]), BOX, 2)
    return pixels
