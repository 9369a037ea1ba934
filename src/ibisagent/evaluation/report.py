"""A run as one HTML page that needs nothing else: tables, plots, and the best, median and worst cases turn by turn.

Plots are SVG drawn here: two kinds of line need no plotting library, and the page stays small and sharp.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal, get_args

import cv2
import numpy as np

from ibisagent.datasets.members import read_image_at
from ibisagent.domain import Box, Click, Episode, Image, Masks, Turn
from ibisagent.errors import DataError
from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule
from ibisagent.evaluation.results import CaseResult, Evaluation, GroupBy, summarise
from ibisagent.evaluation.runs import Run
from ibisagent.evaluation.tables import HEADINGS, MAIN, interval_text, ordered
from ibisagent.files import write_whole
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
    picks = _picks(run.evaluation, cases)
    missing: list[str] = []
    cards = _cards(run, picks, missing)
    write_whole(_page(run, cards, empty).encode(), page)
    return missing


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


def _page(run: Run, cards: str, empty: EmptyRule) -> str:
    evaluation = run.evaluation
    provenance, results = evaluation.provenance, evaluation.results
    overall = summarise(results, empty=empty)
    judged = len(results) + len(evaluation.failures)
    unfinished = "" if judged == run.cases else f" The run is unfinished: {judged} of {run.cases} cases."
    names = ordered(list(overall.means))
    metrics = "".join(
        f"<tr>{_cells([HEADINGS.get(name, name), f'{overall.means[name]:.3f}', interval_text(overall, name)])}</tr>"
        for name in names
    )
    shown = [name for name in (*MAIN, "stop_gap", "seconds") if name in overall.means]
    template = Template(files("ibisagent.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"{provenance.get('policy', '')} with {provenance.get('segmenter', '')}"),
        facts=html.escape(", ".join(f"{name} {value}" for name, value in provenance.items() if value)),
        counts=html.escape(
            f"{overall.cases} cases of {overall.patients} patients; {overall.positives} show their object (pos.)."
            f" {len(evaluation.failures)} failed and count nowhere. Two empty masks count as: {empty}."
            f" Intervals: 95%, patients resampled.{unfinished}"
        ),
        failures=_failures(evaluation),
        metrics=metrics,
        kinds=_options(get_args(GroupBy)),
        groups="".join(_group_table(evaluation, by, shown, empty) for by in get_args(GroupBy)),
        plots=_plots(evaluation),
        modalities=_options(evaluation.groups("modality")),
        objects=_options(evaluation.groups("object")),
        sizes=_options(evaluation.groups("size")),
        cards=cards,
        columns="".join(f'<th><button class="sort" type="button">{name}</button>' for name in _COLUMNS),
        rows="".join(_row(one) for one in results),
    )


_COLUMNS = ("case", "object", "modality", "size", "IoU", "Dice", "turns", "stop gap", "predicted", "ended")


def _row(one: CaseResult) -> str:
    numbers = [one.measures.get(name) for name in ("iou", "dice", "turns", "stop_gap")]
    cells = [one.case_id, one.object, one.modality, one.size, *map(_number, (*numbers, one.quality)), one.stop or ""]
    return f"<tr {_data(one)}>{_cells(cells)}</tr>"


def _failures(evaluation: Evaluation) -> str:
    if not evaluation.failures:
        return ""
    items = "".join(
        f"<li><b>{html.escape(one.case_id)}</b>: {html.escape(one.error)}</li>" for one in evaluation.failures
    )
    heading = f"{len(evaluation.failures)} cases failed and were left out"
    return f"<details><summary>{heading}</summary><ul>{items}</ul></details>"


def _group_table(evaluation: Evaluation, by: GroupBy, shown: Sequence[str], empty: EmptyRule) -> str:
    head = _cells([by, "cases", *(HEADINGS[name] for name in shown), "IoU, 95%"], "th")
    rows = []
    for name, cases in evaluation.groups(by).items():
        summary = summarise(cases, empty=empty)
        values = [_number(summary.means.get(name)) for name in shown]
        rows.append(f"<tr>{_cells([name, str(summary.cases), *values, interval_text(summary, 'iou')])}</tr>")
    return f'<table data-by="{by}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _options(values: Iterable[str]) -> str:
    return "".join(f'<option value="{html.escape(value)}">{html.escape(value)}</option>' for value in values)


def _cells(cells: Iterable[str], kind: str = "td") -> str:
    return "".join(f"<{kind}>{html.escape(cell)}" for cell in cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _data(one: CaseResult) -> str:
    facts = {"id": one.case_id, **{name: getattr(one, name) or "unknown" for name in ("modality", "object", "size")}}
    return " ".join(f'data-{name}="{html.escape(value)}"' for name, value in facts.items())


# ------------------------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.5
    dashes: str = ""


def _plots(evaluation: Evaluation) -> str:
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
        plots.append(_plot("Mean IoU by turn", "turn", "mean IoU", [line for line in turns if line.points]))
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
        plots.append(_plot(note, "share of the masks kept, best predicted first", "mean Dice of those", lines))
    return "".join(plots)


def _plot(title: str, across: str, up: str, lines: Sequence[_Line]) -> str:
    """A line plot with y from 0 to 1 as SVG in a figure."""
    left, top, width, height = 46, 12, 380, 250
    low = min(x for line in lines for x, _ in line.points)
    high = max(x for line in lines for x, _ in line.points)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)

    def place(x: float, y: float) -> str:
        return f"{left + (x - low) / (high - low) * width:.1f},{top + (1 - y) * height:.1f}"

    parts = []
    for tick in range(6):
        y = top + height - tick / 5 * height
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:.1f}</text>')
    whole = high - low >= 2
    ticks = (
        np.arange(np.ceil(low), high + 1e-9, max(1, round((high - low) / 10))) if whole else np.linspace(low, high, 5)
    )
    for tick_x in ticks:
        x = left + (tick_x - low) / (high - low) * width
        label = f"{tick_x:.0f}" if whole else f"{tick_x:.2g}"
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{label}</text>')
    for number, line in enumerate(lines):
        points = " ".join(place(*point) for point in line.points)
        style = f'stroke="{line.colour}" stroke-width="{line.width}" stroke-dasharray="{line.dashes}"'
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
        if len(line.points) == 1:
            across_px, up_px = place(*line.points[0]).split(",")
            parts.append(f'<circle cx="{across_px}" cy="{up_px}" r="3.5" fill="{line.colour}"/>')
        y_legend = top + 10 + number * 18
        parts.append(
            f'<line x1="{left + width + 14}" x2="{left + width + 36}" y1="{y_legend}" y2="{y_legend}" {style}/>'
        )
        name = html.escape(line.name if len(line.name) <= 24 else f"{line.name[:23]}…")
        parts.append(f'<text x="{left + width + 42}" y="{y_legend + 4}">{name}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">{html.escape(across)}</text>'
    )
    middle = top + height / 2
    parts.append(
        f'<text transform="rotate(-90 12 {middle})" x="12" y="{middle}" text-anchor="middle">{html.escape(up)}</text>'
    )
    label, inner = html.escape(title), "".join(parts)
    return (
        f"<figure><figcaption><b>{label}</b></figcaption>"
        f'<svg viewBox="0 0 {left + width + 200} {max(top + height + 44, top + 18 * len(lines) + 20)}" role="img"'
        f' aria-label="{label}" font-size="12" font-family="system-ui, sans-serif" fill="#333">{inner}</svg></figure>'
    )


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class _Pick:
    """A case to show. overall: it is one of all cases' extremes; else one of its modality's."""

    result: CaseResult
    rank: Rank
    overall: bool


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


def _cards(run: Run, picks: Sequence[_Pick], missing: list[str]) -> str:
    sections = []
    for rank in get_args(Rank):
        members = sorted((pick for pick in picks if pick.rank == rank), key=lambda pick: -pick.result.measures["iou"])
        members = members[::-1] if rank == "worst" else members
        cards = "".join(_card(run, pick, missing) for pick in members)
        sections.append(f"<section><h3>{rank.capitalize()}</h3>{cards}</section>")
    return "".join(sections)


def _card(run: Run, pick: _Pick, missing: list[str]) -> str:
    one = pick.result
    episode, masks, targets = run.masks(one.case_id)
    image = _image(run.image(one.case_id), episode)
    if image is None:
        missing.append(one.case_id)
    figures = []
    if image is not None:
        figures.append(_figure(image, {}, targets, (), "ground truth", ""))
        for number, turn in enumerate(episode.turns if episode else (), start=1):
            iou = f", IoU {one.ious[number - 1]:.3f}" if number <= len(one.ious) else ""
            said = turn.reply.problem or describe_actions(turn.reply.actions)
            figures.append(
                _figure(image, turn.after, targets, _prompts(turn), f"turn {number}: {said}{iou}", turn.reply.thought)
            )
        answer = episode.answer_masks if episode else masks
        if episode is None or not _same(answer, episode.masks):
            figures.append(_figure(image, answer, targets, (), f"handed out: IoU {one.measures['iou']:.3f}", ""))
    facts = [one.object, one.modality, one.size, *([f"ended: {one.stop}"] if one.stop else [])]
    words = html.escape(", ".join(fact for fact in facts if fact))
    note = "" if image is not None else '<p class="quiet">Its image is not there any more, or has changed.</p>'
    return (
        f'<article class="card" data-overall="{int(pick.overall)}" {_data(one)}>'
        f"<h4><b>IoU {one.measures['iou']:.3f}</b> {html.escape(one.case_id)} <span class=quiet>{words}</span></h4>"
        f'{note}<div class="turns">{"".join(figures)}</div></article>'
    )


def _image(source: str, episode: Episode | None) -> Image | None:
    """The image that was judged; None if it cannot be read, or is another one now."""
    try:
        image = read_image_at(Path(source))
    except DataError:
        return None
    return image if episode is None or image.sha256 == episode.image_sha256 else None


def _prompts(turn: Turn) -> tuple[Click | Box, ...]:
    return tuple(action for action in turn.reply.actions if isinstance(action, Click | Box))


def _same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(mask, b[name]) for name, mask in a.items())


def _figure(
    image: Image, masks: Masks, targets: Masks, prompts: Sequence[Click | Box], caption: str, thought: str
) -> str:
    pixels = _drawn(image, masks, targets, prompts)
    done, coded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise DataError(f"{image.source}: its image cannot be drawn")
    height, width = pixels.shape[:2]
    said = f'<div class="thought">{html.escape(thought)}</div>' if thought else ""
    return (
        f'<figure><img alt="{html.escape(caption)}" width="{width}" height="{height}" loading="lazy"'
        f' src="data:image/jpeg;base64,{base64.b64encode(coded.tobytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}{said}</figcaption></figure>"
    )


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
