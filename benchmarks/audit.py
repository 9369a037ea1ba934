"""Does `ibisagent data audit` find corrupted masks? Of 100 masks 20 are corrupted; how many of them are in the worst
25.

    IBIS_DATA=DATA python benchmarks/audit.py [--seeds 5] [--scattered]
    IBIS_DATA=DATA python benchmarks/audit.py --fit      # weights, on training patients that the models never saw

The 100 are all masks of whole images of split "val", drawn at random (`--scattered`: single masks, so that twins are
seldom among them). Corrupted, in turn, by
- wrong object: another object's mask, of the same image where one has IoU < 0.5 with it, else of another image;
- shifted: moved in a random direction by 20% to 50% of its box, until the IoU with the true one is below 0.75;
- holes: discs cut out of its inside, about 10% to 30% of its area.
All others of the data, training split included, are what masks are held against. One draw has 20 corrupted masks, so a
share of 0.8 is known to within 0.09: multiple draws, one for each seed, say more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.domain import Mask
from ibisagent.evaluation import audit
from ibisagent.imaging.clicks import interior_depth
from ibisagent.imaging.images import write_mask_png
from ibisagent.imaging.masks import iou
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.training.click.states import is_development

MASKS, CORRUPTED, WORST = 100, 20, 25
WANTED = 0.8
KINDS = ("wrong object", "shifted", "holes")
ROUNDS = 4  # of corrupting every mask, for the fit


@dataclass(frozen=True, slots=True)
class Draw:
    """An audit of MASKS. corrupted: {case id: kind}."""

    findings: Sequence[audit.Finding]
    corrupted: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """A mask to fit weights on. corrupted: its kind; "" for a true one."""

    signals: Mapping[str, float]
    corrupted: str
    patient: str


def corrupt(kind: str, index: int, rows: Sequence[CaseRow], masks: Sequence[Mask], random: np.random.Generator) -> Mask:
    """Another mask in place of number `index`."""
    ground_truth = masks[index]
    if kind == "wrong object":
        return _other(index, rows, masks, random)
    return _shifted(ground_truth, random) if kind == "shifted" else _with_holes(ground_truth, random)


def _other(index: int, rows: Sequence[CaseRow], masks: Sequence[Mask], random: np.random.Generator) -> Mask:
    row, ground_truth = rows[index], masks[index]
    beside = [
        mask
        for other, mask in zip(rows, masks, strict=True)
        if other.image == row.image and other.object != row.object and iou(mask, ground_truth) < 0.5
    ]
    if beside:
        return beside[int(random.integers(len(beside)))]
    while True:
        number = int(random.integers(len(rows)))
        if rows[number].object != row.object:
            size = ground_truth.shape[::-1]
            mask: Mask = cv2.resize(masks[number].astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            if mask.any() and iou(mask, ground_truth) < 0.5:
                return mask


def _shifted(ground_truth: Mask, random: np.random.Generator) -> Mask:
    height, width = ground_truth.shape
    _, _, across, down = cv2.boundingRect(ground_truth.astype(np.uint8))
    rows, columns = np.nonzero(ground_truth)
    moved = ground_truth
    for _ in range(100):
        angle, share = random.uniform(0, 2 * math.pi), random.uniform(0.2, 0.5)
        y, x = rows + round(math.sin(angle) * share * down), columns + round(math.cos(angle) * share * across)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        moved = np.zeros_like(ground_truth)
        moved[y[inside], x[inside]] = True
        if moved.any() and iou(moved, ground_truth) < 0.75:
            break
    return moved


def _with_holes(ground_truth: Mask, random: np.random.Generator) -> Mask:
    holed, goal = ground_truth.copy(), random.uniform(0.1, 0.3) * ground_truth.sum()
    y, x = np.ogrid[: ground_truth.shape[0], : ground_truth.shape[1]]
    for _ in range(100):
        depth = interior_depth(holed)
        rows, columns = np.nonzero(depth >= 0.5 * depth.max())
        chosen = int(random.integers(rows.size))
        radius = max(1.0, random.uniform(0.4, 0.8) * float(depth[rows[chosen], columns[chosen]]))
        cut = holed & ((y - rows[chosen]) ** 2 + (x - columns[chosen]) ** 2 > radius**2)
        if not cut.any():
            break
        holed = cut
        if ground_truth.sum() - holed.sum() >= goal:
            break
    return holed


def drawn(rows: Sequence[CaseRow], random: np.random.Generator, *, scattered: bool) -> list[CaseRow]:
    """MASKS rows: of whole images (the last one perhaps in part), or single ones."""
    by_image: dict[str, list[CaseRow]] = {}
    for row in rows:
        by_image.setdefault(row.id if scattered else str(row.image), []).append(row)
    groups = list(by_image.values())
    order = random.permutation(len(groups))
    return [row for number in order for row in groups[int(number)]][:MASKS]


def measure(data: CaseSource, seed: int, segmenter: Segmenter, *, scattered: bool) -> Draw:
    """Audit one draw of MASKS with CORRUPTED among them."""
    random = np.random.default_rng(seed)
    rows = drawn([row for row in data.rows if row.split == "val" and row.mask is not None], random, scattered=scattered)
    masks = [mask for _, mask in CaseSource(rows, data.where).ground_truths()]
    numbers = random.choice(len(rows), CORRUPTED, replace=False)
    kinds = {rows[int(number)].id: KINDS[turn % len(KINDS)] for turn, number in enumerate(numbers)}
    with tempfile.TemporaryDirectory() as folder:
        shown = []
        for index, row in enumerate(rows):
            if row.id in kinds:
                path = Path(folder) / f"{index}.png"
                write_mask_png(corrupt(kinds[row.id], index, rows, masks, random), path)
                row = replace(row, mask=path, label=None)
            shown.append(row)
        own = {row.id for row in shown}
        among = [*(row for row in data.rows if row.split != "val"), *shown]
        found = audit.audit(CaseSource(shown, data.where), segmenter, among=CaseSource(among, data.where))
    assert own == {finding.case_id for finding in found.findings}, found.failures  # noqa: S101
    return Draw(found.findings, kinds)


def judged(draws: Sequence[Draw]) -> dict[str, Any]:
    """Shares of the corrupted masks in the worst WORST."""
    by_draw: list[float] = []
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    missed: list[str] = []
    for draw in draws:
        places = enumerate(draw.findings, start=1)
        hits = {one.case_id: place <= WORST for place, one in places if one.case_id in draw.corrupted}
        by_draw.append(sum(hits.values()) / CORRUPTED)
        for case_id, hit in hits.items():
            by_kind[draw.corrupted[case_id]].append(hit)
        missed += [f"{case_id}: {draw.corrupted[case_id]}" for case_id, hit in hits.items() if not hit]
    return {
        "found": round(float(np.mean(by_draw)), 3),
        "by draw": by_draw,
        **{kind: f"{sum(hits)} of {len(hits)}" for kind, hits in by_kind.items()},
        "missed": missed,
    }


def fit(data: CaseSource) -> dict[str, object]:
    """Weights from held-out training patients, and how well they find corrupted masks.

    Every mask is corrupted in each of the KINDS, ROUNDS times over. What is found is told of patients that were left
    out of the fit, fold by fold.
    """
    train = [row for row in data.rows if row.split == "train" and row.mask is not None]
    rows = [row for row in train if is_development(row.patient)]
    source = CaseSource(rows, data.where)
    masks = [mask for _, mask in source.ground_truths()]
    segmenter = load_segmenter("ibis-click", device="cpu")
    names = {row.object for row in rows} | {row.object for row in train if row.dataset in {r.dataset for r in rows}}
    listed = CaseSource(audit.reference_rows(train, names), data.where)
    known = [
        (row, audit.describe(case.image.pixels, next(iter((case.targets or {}).values()))))
        for row, case in zip(listed.rows, listed, strict=True)
    ]
    references = audit.References(known)
    rounds = [np.random.default_rng(number) for number in range(1, ROUNDS + 1)]
    examples: list[Example] = []
    for index, (row, case) in enumerate(zip(rows, source, strict=True)):
        corrupted = [(kind, corrupt(kind, index, rows, masks, random)) for random in rounds for kind in KINDS]
        for kind, mask in (("", masks[index]), *corrupted):
            signals = references.signals(row, audit.describe(case.image.pixels, mask))
            signals["segmenter"] = 1 - iou(mask, audit.redraw(case.image, mask, segmenter))
            examples.append(Example(signals, kind, row.patient))
        print(f"{index + 1} of {len(rows)}", file=sys.stderr, flush=True)
    return regressed(examples, [name for name in audit.WEIGHTS if name != "twin"])


def regressed(examples: Sequence[Example], columns: Sequence[str]) -> dict[str, object]:
    """Weights of these signals by logistic regression, and the share found of patients left out of it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    values = np.array([[one.signals[name] for name in columns] for one in examples])
    spread = values.std(axis=0) + 1e-9
    kinds = [one.corrupted for one in examples]
    corrupted = np.array([bool(kind) for kind in kinds])
    chances = np.zeros(len(values))
    model = LogisticRegression(C=0.3, class_weight="balanced", max_iter=1000)
    for inside, outside in GroupKFold(8).split(values, corrupted, [one.patient for one in examples]):
        model.fit(values[inside] / spread, corrupted[inside])
        chances[outside] = model.predict_proba(values[outside] / spread)[:, 1]
    model.fit(values / spread, corrupted)
    weights = dict(zip(columns, (model.coef_[0] / spread).round(2).tolist(), strict=True))
    return {"weights": weights, "bias": round(float(model.intercept_[0]), 2), **_found(chances, kinds)}


def _found(chances: np.ndarray, kinds: Sequence[str]) -> Mapping[str, float]:
    """Mean share found over 500 draws of MASKS with CORRUPTED among them."""
    random = np.random.default_rng(0)
    bad = np.flatnonzero([bool(kind) for kind in kinds])
    good = np.flatnonzero([not kind for kind in kinds])
    shares: dict[str, list[float]] = {}
    for _ in range(500):
        chosen = random.choice(bad, CORRUPTED, replace=False)
        among = np.concatenate([chosen, random.choice(good, MASKS - CORRUPTED, replace=False)])
        worst = set(among[np.argsort(-chances[among])[:WORST]].tolist())
        shares.setdefault("found", []).append(float(np.mean([index in worst for index in chosen])))
        for kind in KINDS:
            shares.setdefault(kind, []).extend(float(index in worst) for index in chosen if kinds[index] == kind)
    return {name: round(float(np.mean(values)), 3) for name, values in shares.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if too few were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="draws, of the seeds 0, 1, ...")
    parser.add_argument("--scattered", action="store_true", help="single masks rather than whole images")
    parser.add_argument("--fit", action="store_true", help="weights, from training patients; needs scikit-learn")
    options = parser.parse_args(arguments)
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with the splits 'train' and 'val'")
    data = read_cases(os.environ["IBIS_DATA"])
    if options.fit:
        print(json.dumps(fit(data), indent=1))
        return 0
    segmenter = load_segmenter("ibis-click", device="cpu")
    draws = []
    for seed in range(options.seeds):
        draws.append(measure(data, seed, segmenter, scattered=options.scattered))
        print(f"{seed + 1} of {options.seeds} draws", file=sys.stderr, flush=True)
    results = judged(draws)
    print(json.dumps({"scattered": options.scattered, **results}, indent=1))
    return 0 if results["found"] >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
