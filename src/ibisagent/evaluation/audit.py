"""Label QA: which masks of a data set disagree with their image or their name, worst first.

Every mask is held against the other masks of its name in the same data (never of the same patient), against a
segmenter that is prompted from it, and against its own image. Signals, 0 where nothing is wrong, growing with the
disagreement:

| signal | what |
|---|---|
| form | how much farther place, size and form are from the nearest masks of that name than is usual among those |
| look | the same for brightness, colour, texture and contrast |
| other form, other look | how much nearer they are to a mask of another name of the same data set |
| holes, gaps | share of the filled mask that is holes, and their number, beyond three quarters of those masks |
| border, edges | how much less its outline follows edges than theirs, against its surroundings and the whole image |
| segmenter | 1 - IoU with what the segmenter draws, given its box and two clicks of an expert who believes in it |
| twin | IoU with a mask of another name in the same image, from TWIN up |

`suspicion` is their weighted sum through a sigmoid. The weights come from benchmarks/audit.py: masks of training
patients that the segmenter never saw, against corrupted copies. It sorts, it is no probability: look at the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np

from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.domain import Click, Image, Mask, Prompt
from ibisagent.errors import DataError, SegmenterError
from ibisagent.files import csv_text, html_page, write_json, write_whole
from ibisagent.imaging.clicks import bounding_box, next_click
from ibisagent.imaging.images import write_png
from ibisagent.imaging.masks import iou
from ibisagent.segmenters import Segmenter

NEIGHBOURS = 3
MOST_REFERENCES = 40  # per name: enough for the nearest ones, and bounded work
TWIN = 0.9
CLICKS = 2
SHOWN_SIDE = 448  # pixels
IMAGE_NAME = "images/{:03d}.png"
MASK_COLOUR, LEAK_COLOUR, MISSED_COLOUR = (255, 220, 0), (255, 60, 60), (60, 140, 255)
_LOG_FLOOR = 0.03
_PRIOR = 4.0  # so many made-up neighbours of usual distance, so that a name with few masks is not trusted blindly

BIAS = -3.21
WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "form": 0.37,
        "look": 0.65,
        "other form": 2.26,
        "other look": 1.65,
        "holes": 9.44,
        "gaps": 1.53,
        "border": 2.51,
        "edges": 1.54,
        "segmenter": 2.28,
        "twin": 4.0,  # by hand: none of the corrupted copies were beside their twins
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Description:
    """What is measured of a mask on its image.

    form (9,): centre, logarithms of sides and area relative to the image, filling of its box and of its hull,
    roughness, number of parts. look (8,): colour inside against the image and against a ring around it, and textures.
    holes: share of the filled mask, and their number. border (2,): log of the mean gradient on the outline against that
    near it, and against that of the whole image.
    """

    form: np.ndarray
    look: np.ndarray
    holes: tuple[float, int]
    border: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """One mask. leaks, missed: pixels that only it, or only the segmenter's outline has; suggestion: that outline."""

    case_id: str
    object: str
    dataset: str
    suspicion: float
    reasons: tuple[str, ...]
    signals: Mapping[str, float]
    pixels: int
    leaks: int
    missed: int
    row: CaseRow
    suggestion: Mask

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the suggestion."""
        row = self.row
        return {
            "case_id": self.case_id,
            "object": self.object,
            "dataset": self.dataset,
            "suspicion": round(self.suspicion, 4),
            "reasons": list(self.reasons),
            "pixels": self.pixels,
            "leaks": self.leaks,
            "missed": self.missed,
            "image": str(row.image),
            "mask": str(row.mask),
            "signals": {name: round(value, 4) for name, value in self.signals.items()},
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """findings: worst first. failures: masks that could not be looked at, {case id: why}; that is a finding, too."""

    findings: tuple[Finding, ...]
    failures: Mapping[str, str]


def describe(pixels: np.ndarray, mask: Mask) -> Description:
    """Measure `mask` (H, W), not empty, on `pixels` (H, W, 3) uint8."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, dtype=np.uint8)
    cv2.drawContours(filled, contours, -1, 1, -1)
    holes = int(filled.sum()) - int(mask.sum())
    count = cv2.connectedComponents((filled.astype(bool) & ~mask).astype(np.uint8))[0] - 1
    return Description(
        _form(mask, contours, int(filled.sum())),
        _look(pixels, mask),
        (holes / int(filled.sum()), count),
        _border(pixels, mask),
    )


def _form(mask: Mask, contours: Sequence[np.ndarray], filled: int) -> np.ndarray:
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    _, _, across, down = cv2.boundingRect(mask.astype(np.uint8))
    hull = sum(cv2.contourArea(cv2.convexHull(contour)) for contour in contours) + 1
    length = sum(cv2.arcLength(contour, True) for contour in contours) + 1
    return np.array(
        [
            (columns.mean() + 0.5) / width,
            (rows.mean() + 0.5) / height,
            math.log(across / width),
            math.log(down / height),
            math.log(rows.size / mask.size),
            rows.size / (across * down),
            filled / hull,
            math.log(length / math.sqrt(rows.size)),
            math.log(len(contours)),
        ]
    )


def _look(pixels: np.ndarray, mask: Mask) -> np.ndarray:
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).astype(np.float32)
    mean, spread = lab.reshape(-1, 3).mean(axis=0), float(lab[..., 0].std()) + 4
    reach = max(3, int(0.15 * math.sqrt(mask.sum())))
    ring = (cv2.dilate(mask.astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)) > 0) & ~mask
    inside, around = lab[mask], lab[ring] if ring.any() else lab.reshape(-1, 3)
    own = inside.mean(axis=0)
    textures = [float(inside[:, 0].std()), float(around[:, 0].std())]
    return np.concatenate([(own - mean) / spread, (own - around.mean(axis=0)) / spread, np.array(textures) / spread])


def _border(pixels: np.ndarray, mask: Mask) -> np.ndarray:
    grey = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (0, 0), 1.0).astype(np.float32)
    gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    outline = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    outline[[0, -1]] = outline[:, [0, -1]] = 0  # where the image ends there is no edge to follow
    if not outline.any():
        return np.zeros(2)
    side = 2 * max(3, int(0.12 * math.sqrt(mask.sum()))) + 1
    near = cv2.dilate(outline, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))) > 0
    near &= cv2.dilate(outline, np.ones((5, 5), np.uint8)) == 0
    on, whole = float(gradient[outline > 0].mean()) + 2, float(gradient.mean()) + 2
    by = float(gradient[near].mean()) + 2 if near.any() else whole
    return np.array([math.log(on / by), math.log(on / whole)])


class References:
    """Descriptions of masks to hold others against, by name, data set and patient."""

    def __init__(self, known: Iterable[tuple[CaseRow, Description]]) -> None:
        """known: at least one."""
        listed = list(known)
        if not listed:
            raise DataError("audit: there is no mask to hold others against; give more data")
        self._names = np.array([row.object for row, _ in listed])
        self._datasets = np.array([row.dataset for row, _ in listed])
        self._units = np.array([unit_of(row) for row, _ in listed])
        self._spaces = {
            "form": _scaled(np.stack([one.form for _, one in listed])),
            "look": _scaled(np.stack([one.look for _, one in listed])),
        }
        self._holes = np.array([one.holes for _, one in listed], dtype=float)
        self._border = np.stack([one.border for _, one in listed])
        self._usual = {space: self._usual_distances(points) for space, (points, _) in self._spaces.items()}

    def signals(self, row: CaseRow, one: Description) -> dict[str, float]:
        """What this mask has against it among the masks of its name: all signals but those that need other masks."""
        others = self._units != unit_of(row)
        same = others & (self._names == row.object)
        rival = others & (self._names != row.object) & (self._datasets == row.dataset)
        found: dict[str, float] = {}
        for space, values in (("form", one.form), ("look", one.look)):
            points, scale = self._spaces[space]
            distance = _distance(values / scale, points[same], NEIGHBOURS)
            rivals = _distance(values / scale, points[rival], 1)
            usual, overall = self._usual[space]
            found[space] = 0.0 if distance is None else distance - usual.get(row.object, overall)
            nearer = 0.0 if distance is None or rivals is None else distance - rivals
            found[f"other {space}"] = min(1.5, max(0.0, nearer))
        usual_holes = np.quantile(self._holes[same], 0.75, axis=0) if same.any() else np.zeros(2)
        share, count = one.holes
        found["holes"] = max(0.0, math.sqrt(share) - math.sqrt(usual_holes[0]))
        found["gaps"] = max(0.0, math.log1p(count) - math.log1p(usual_holes[1]))
        border = (self._border[same].sum(axis=0) + 3 * self._border.mean(axis=0)) / (same.sum() + 3)
        found["border"], found["edges"] = (float(value) for value in border - one.border)
        return found

    def nearest_name(self, row: CaseRow, one: Description) -> str:
        """The other name in the data set whose masks are most like this one; "" where there is none."""
        rival = (self._units != unit_of(row)) & (self._names != row.object) & (self._datasets == row.dataset)
        if not rival.any():
            return ""
        points, scale = self._spaces["form"]
        away = ((points[rival] - one.form / scale) ** 2).sum(axis=1)
        return str(self._names[rival][int(away.argmin())])

    def _usual_distances(self, points: np.ndarray) -> tuple[dict[str, float], float]:
        """(by name how far a mask usually is from the nearest of other patients, the median over all)."""
        found: dict[str, list[float]] = {}
        for index, name in enumerate(self._names):
            same = (self._names == name) & (self._units != self._units[index])
            distance = _distance(points[index], points[same], NEIGHBOURS)
            if distance is not None:
                found.setdefault(str(name), []).append(distance)
        overall = float(np.median([value for values in found.values() for value in values])) if found else 0.0
        return {
            name: (sum(values) + _PRIOR * overall) / (len(values) + _PRIOR) for name, values in found.items()
        }, overall


def _scaled(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values over their robust spread, that spread)."""
    spread = 1.48 * np.median(np.abs(values - np.median(values, axis=0)), axis=0) + 1e-3
    return values / spread, spread


def _distance(value: np.ndarray, points: np.ndarray, nearest: int) -> float | None:
    """Logarithm of the mean distance to the `nearest` of `points`; None where there is none."""
    if not len(points):
        return None
    distances = np.sort(np.sqrt(((points - value) ** 2).mean(axis=1)))[:nearest]
    return math.log(float(distances.mean()) + _LOG_FLOOR)


def unit_of(row: CaseRow) -> str:
    """Who is shown: the patient, or where that is not known the image."""
    return f"{row.dataset}/{row.patient}" if row.patient else str(row.image)


def reference_rows(rows: Sequence[CaseRow], names: set[str]) -> list[CaseRow]:
    """At most MOST_REFERENCES rows of each of `names`, spread over the data, in the order of `rows`."""
    by_name: dict[str, list[CaseRow]] = {}
    for row in rows:
        if row.mask is not None and row.object in names:
            by_name.setdefault(row.object, []).append(row)
    chosen = set()
    for found in by_name.values():
        count = min(MOST_REFERENCES, len(found))
        chosen |= {found[int(index * len(found) / count)].id for index in range(count)}
    return [row for row in rows if row.id in chosen]


def audit(
    cases: CaseSource,
    segmenter: Segmenter,
    *,
    among: CaseSource | None = None,
    on_mask: Callable[[], None] | None = None,
) -> Audit:
    """Look at every mask of `cases`. among: the data whose masks they are held against; default: themselves.

    on_mask: called after each mask that was looked at; describing the others comes before. Masks that cannot be read,
    or on which the segmenter fails, are failures. Raises DataError if there is no mask.
    """
    rows = [row for row in cases.rows if row.mask is not None]
    if not rows:
        raise DataError(f"{cases.where}: no row has a mask to look at")
    names = {row.object for row in rows}
    failures: dict[str, str] = {}
    known: list[tuple[CaseRow, Description]] = []
    source = among or cases
    for row in reference_rows(source.rows, names | _rival_names(source.rows, rows)):
        try:
            case = source.decode(row)
            known.append((row, describe(case.image.pixels, next(iter((case.targets or {}).values())))))
        except DataError:
            continue  # the masks to be looked at are told below, others are not asked about
    references = References(known)
    by_image: dict[Path, list[CaseRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    findings: list[Finding] = []
    for together in by_image.values():
        masks: dict[str, Mask] = {}
        image: Image | None = None
        for row in together:
            try:
                case = cases.decode(row)
                image, masks[row.id] = case.image, next(iter((case.targets or {}).values()))
            except DataError as error:
                failures[row.id] = str(error)
        for row in together:
            if row.id in masks and image is not None:
                try:
                    findings.append(_look_at(row, image, masks, together, segmenter, references))
                except (DataError, SegmenterError) as error:
                    failures[row.id] = str(error)
            if on_mask is not None:
                on_mask()
    findings.sort(key=lambda finding: (-finding.suspicion, finding.case_id))
    return Audit(tuple(findings), failures)


def _rival_names(known: Sequence[CaseRow], rows: Sequence[CaseRow]) -> set[str]:
    """Names that the data sets of `rows` have elsewhere: a mask may be one of theirs."""
    datasets = {row.dataset for row in rows}
    return {row.object for row in known if row.dataset in datasets}


def _look_at(
    row: CaseRow,
    image: Image,
    masks: Mapping[str, Mask],
    together: Sequence[CaseRow],
    segmenter: Segmenter,
    references: References,
) -> Finding:
    mask = masks[row.id]
    one = describe(image.pixels, mask)
    signals = references.signals(row, one)
    suggestion = redraw(image, mask, segmenter)
    signals["segmenter"] = 1 - iou(mask, suggestion)
    twins = {
        other.object: iou(mask, masks[other.id])
        for other in together
        if other.object != row.object and other.id in masks
    }
    twin = max(twins, key=lambda name: twins[name], default="")
    signals["twin"] = twins[twin] if twin and twins[twin] >= TWIN else 0.0
    return Finding(
        row.id,
        row.object,
        row.dataset,
        suspicion(signals),
        _reasons(signals, one, twin, references.nearest_name(row, one), row.object),
        signals,
        int(mask.sum()),
        int((mask & ~suggestion).sum()),
        int((suggestion & ~mask).sum()),
        row,
        suggestion,
    )


def suspicion(signals: Mapping[str, float]) -> float:
    """The signals in one number in (0, 1)."""
    return 1 / (1 + math.exp(-BIAS - sum(weight * signals[name] for name, weight in WEIGHTS.items())))


def redraw(image: Image, mask: Mask, segmenter: Segmenter) -> Mask:
    """What the segmenter draws when an expert who believes in `mask` gives its box and CLICKS clicks."""
    box = bounding_box(mask, "object")
    if box is None:
        raise DataError("audit: a mask without any pixel")
    session = segmenter.open(image)
    prompts: list[Prompt] = [box]
    prediction = session.predict(prompts)
    for _ in range(CLICKS):
        past = [prompt for prompt in prompts if isinstance(prompt, Click)]
        click = next_click(mask, prediction.mask, "object", past)
        if click is None:
            break
        prompts.append(click)
        prediction = session.predict(prompts, prediction.logits)
    return prediction.mask


def _reasons(signals: Mapping[str, float], one: Description, twin: str, nearest: str, name: str) -> tuple[str, ...]:
    """What weighs most, as text, heaviest first."""
    words = {
        "form": f"place, size or form is unlike other masks called '{name}'",
        "look": f"what it covers looks unlike other masks called '{name}'",
        "other form": f"place, size and form are more like '{nearest}'",
        "other look": "what it covers looks more like another object",
        "holes": f"holes make up {one.holes[0]:.0%} of it",
        "gaps": f"it has {one.holes[1]} holes",
        "border": "its outline follows no edges",
        "edges": "its outline lies where the image is flat",
        "segmenter": f"the segmenter draws another outline (IoU {1 - signals['segmenter']:.2f})",
        "twin": f"it is the mask of '{twin}'",
    }
    weights = {signal: WEIGHTS[signal] * signals[signal] for signal in words}
    heavy = sorted((signal for signal in words if weights[signal] >= 0.4), key=lambda signal: -weights[signal])
    return tuple(words[signal] for signal in heavy[:4])


def write_report(found: Audit, cases: CaseSource, folder: Path, *, images: int = 50) -> Path:
    """Write findings.csv, findings.json and index.html with an image of each of the worst `images`; the page's path.

    `folder` must exist. In the images: the mask's outline, what leaks beyond the segmenter's outline, what it misses.
    """
    rows = [finding.to_json() for finding in found.findings]
    columns = ["case_id", "object", "dataset", "suspicion", "reasons", "pixels", "leaks", "missed", "image", "mask"]
    told = ({**row, "reasons": "; ".join(row["reasons"])} for row in rows)
    table = csv_text([columns, *([row[column] for column in columns] for row in told)])
    write_whole(table.encode(), folder / "findings.csv")
    content = {"findings": rows, "failures": dict(found.failures)}
    write_json(content, folder / "findings.json")
    (folder / "images").mkdir(exist_ok=True)
    for number, finding in enumerate(found.findings[:images], start=1):
        case = cases.decode(finding.row)
        drawn = draw(case.image, next(iter((case.targets or {}).values())), finding.suggestion)
        write_png(drawn, folder / IMAGE_NAME.format(number))
    page = folder / "index.html"
    legend = {"mask": MASK_COLOUR, "leaks": LEAK_COLOUR, "missed": MISSED_COLOUR}
    write_whole(html_page("evaluation/audit.html", found=found, shown=images, name=IMAGE_NAME, legend=legend), page)
    return page


def draw(image: Image, mask: Mask, suggestion: Mask) -> np.ndarray:
    """(h, 2 w, 3) uint8, sides at most SHOWN_SIDE each: the image, and on it outline, leaks and missed pixels."""
    tinted = image.pixels.astype(np.float32)
    for wrong, colour in ((mask & ~suggestion, LEAK_COLOUR), (suggestion & ~mask, MISSED_COLOUR)):
        tinted[wrong] = 0.5 * tinted[wrong] + 0.5 * np.array(colour)
    scale = SHOWN_SIDE / max(image.size)
    sides = tuple(max(1, round(side * scale)) for side in image.size[::-1])
    plain, marked = (
        np.ascontiguousarray(cv2.resize(one, sides, interpolation=cv2.INTER_AREA))
        for one in (image.pixels, tinted.astype(np.uint8))
    )
    outline = cv2.resize(mask.astype(np.uint8), sides, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(outline, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(marked, contours, -1, MASK_COLOUR, 1)
    return np.concatenate([plain, marked], axis=1)
