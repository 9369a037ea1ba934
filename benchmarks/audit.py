"""Does `ibisagent audit` find spoiled masks? Of 100 masks 20 are spoiled; how many of them are in the worst 25.

    IBIS_DATA=DATA python benchmarks/audit.py [--seed 0] [--scattered]
    IBIS_DATA=DATA python benchmarks/audit.py --fit      # settings, on training patients that ibis-click never saw

The 100 are all masks of whole pictures of split "val", drawn at random (`--scattered`: single masks, so that twins are
seldom among them). Spoiled, in turn, by
- wrong object: another object's mask, of the same picture where one has IoU < 0.5 with it, else of another picture;
- shifted: moved in a random direction by 20% to 50% of its box, until the IoU with the true one is below 0.75;
- holes: discs cut out of its inside, about 10% to 30% of its area.
All others of the data, training split included, are what masks are held against.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from ibisagent import audit
from ibisagent.clicks import interior_depth
from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.domain import Mask
from ibisagent.images import write_mask_png
from ibisagent.masks import iou
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter
from ibisagent.training.click_states import is_development

MASKS, SPOILED, WORST = 100, 20, 25
WANTED = 0.8
KINDS = ("wrong object", "shifted", "holes")


def spoil(kind: str, index: int, rows: Sequence[CaseRow], masks: Sequence[Mask], random: np.random.Generator) -> Mask:
    """Another mask in place of number `index`."""
    truth = masks[index]
    if kind == "wrong object":
        return _other(index, rows, masks, random)
    return _shifted(truth, random) if kind == "shifted" else _with_holes(truth, random)


def _other(index: int, rows: Sequence[CaseRow], masks: Sequence[Mask], random: np.random.Generator) -> Mask:
    row, truth = rows[index], masks[index]
    beside = [
        mask
        for other, mask in zip(rows, masks, strict=True)
        if other.image == row.image and other.object != row.object and iou(mask, truth) < 0.5
    ]
    if beside:
        return beside[int(random.integers(len(beside)))]
    while True:
        number = int(random.integers(len(rows)))
        if rows[number].object != row.object:
            size = truth.shape[::-1]
            mask: Mask = cv2.resize(masks[number].astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            if mask.any() and iou(mask, truth) < 0.5:
                return mask


def _shifted(truth: Mask, random: np.random.Generator) -> Mask:
    height, width = truth.shape
    _, _, across, down = cv2.boundingRect(truth.astype(np.uint8))
    rows, columns = np.nonzero(truth)
    moved = truth
    for _ in range(100):
        angle, share = random.uniform(0, 2 * math.pi), random.uniform(0.2, 0.5)
        y, x = rows + round(math.sin(angle) * share * down), columns + round(math.cos(angle) * share * across)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        moved = np.zeros_like(truth)
        moved[y[inside], x[inside]] = True
        if moved.any() and iou(moved, truth) < 0.75:
            break
    return moved


def _with_holes(truth: Mask, random: np.random.Generator) -> Mask:
    holed, goal = truth.copy(), random.uniform(0.1, 0.3) * truth.sum()
    y, x = np.ogrid[: truth.shape[0], : truth.shape[1]]
    for _ in range(100):
        depth = interior_depth(holed)
        rows, columns = np.nonzero(depth >= 0.5 * depth.max())
        chosen = int(random.integers(rows.size))
        radius = max(1.0, random.uniform(0.4, 0.8) * float(depth[rows[chosen], columns[chosen]]))
        cut = holed & ((y - rows[chosen]) ** 2 + (x - columns[chosen]) ** 2 > radius**2)
        if not cut.any():
            break
        holed = cut
        if truth.sum() - holed.sum() >= goal:
            break
    return holed


def drawn(rows: Sequence[CaseRow], random: np.random.Generator, *, scattered: bool) -> list[CaseRow]:
    """MASKS rows: of whole pictures (the last one perhaps in part), or single ones."""
    by_image: dict[str, list[CaseRow]] = {}
    for row in rows:
        by_image.setdefault(row.id if scattered else str(row.image), []).append(row)
    groups = list(by_image.values())
    order = random.permutation(len(groups))
    return [row for number in order for row in groups[int(number)]][:MASKS]


def measure(data: CaseSource, seed: int, *, scattered: bool) -> dict[str, object]:
    """Share of the spoiled masks in the worst WORST, in all and by kind."""
    random = np.random.default_rng(seed)
    rows = drawn([row for row in data.rows if row.split == "val" and row.mask is not None], random, scattered=scattered)
    masks = [mask for _, mask in CaseSource(rows, data.where).truths()]
    numbers = random.choice(len(rows), SPOILED, replace=False)
    kinds = {rows[int(number)].id: KINDS[turn % len(KINDS)] for turn, number in enumerate(numbers)}
    with tempfile.TemporaryDirectory() as folder:
        shown = []
        for index, row in enumerate(rows):
            if row.id in kinds:
                path = Path(folder) / f"{index}.png"
                write_mask_png(spoil(kinds[row.id], index, rows, masks, random), path)
                row = replace(row, mask=path, label=None)
            shown.append(row)
        own = {row.id for row in shown}
        among = [*(row for row in data.rows if row.split != "val"), *shown]
        cases = CaseSource(shown, data.where)
        segmenter, policy = load_segmenter("ibis-click", device="cpu"), load_policy("ibis-nano", device="cpu")
        found = audit.audit(cases, segmenter, policy, among=CaseSource(among, data.where))
    assert own == {finding.case_id for finding in found.findings}, found.failures  # noqa: S101
    worst = {finding.case_id for finding in found.findings[:WORST]}
    return {
        "seed": seed,
        "scattered": scattered,
        "found": sum(case_id in worst for case_id in kinds) / SPOILED,
        **{
            kind: f"{sum(one == kind and case_id in worst for case_id, one in kinds.items())}"
            f" of {sum(one == kind for one in kinds.values())}"
            for kind in KINDS
        },
        "missed": {
            finding.case_id: f"{kinds[finding.case_id]}, place {place}, {finding.suspicion:.2f}"
            for place, finding in enumerate(found.findings, start=1)
            if finding.case_id in kinds and finding.case_id not in worst
        },
    }


def fit(data: CaseSource, seed: int) -> dict[str, object]:
    """Weights from held-out training patients, and how well they find spoiled ones of patients left out of the fit."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    random = np.random.default_rng(seed)
    train = [row for row in data.rows if row.split == "train" and row.mask is not None]
    rows = [row for row in train if is_development(row.patient)]
    source = CaseSource(rows, data.where)
    masks = [mask for _, mask in source.truths()]
    segmenter, policy = load_segmenter("ibis-click", device="cpu"), load_policy("ibis-nano", device="cpu")
    names = {row.object for row in rows} | {row.object for row in train if row.dataset in {r.dataset for r in rows}}
    listed = CaseSource(audit.reference_rows(train, names), data.where)
    known = [
        (row, audit.describe(case.image.pixels, next(iter((case.targets or {}).values()))))
        for row, case in zip(listed.rows, listed, strict=True)
    ]
    references = audit.References(known)
    examples: list[dict[str, float]] = []
    kinds: list[str] = []
    for index, (row, case) in enumerate(zip(rows, source, strict=True)):
        kind = KINDS[index % len(KINDS)]
        agent = audit.asked(case.image, row.object, policy, segmenter)
        for mask, name in ((masks[index], ""), (spoil(kind, index, rows, masks, random), kind)):
            signals = references.signals(row, audit.describe(case.image.pixels, mask))
            redrawn = audit.redraw(case.image, mask, segmenter)
            examples.append({**signals, "segmenter": 1 - iou(mask, redrawn), "agent": 1 - iou(mask, agent)})
            kinds.append(name)
    columns = [name for name in audit.WEIGHTS if name != "twin"]
    values = np.array([[one[name] for name in columns] for one in examples])
    spoiled = np.array([bool(kind) for kind in kinds])
    spread = values.std(axis=0) + 1e-9
    patients = [row.patient for row in rows for _ in range(2)]
    chances = np.zeros(len(values))
    model = LogisticRegression(C=0.3, class_weight="balanced")
    for inside, outside in GroupKFold(8).split(values, spoiled, patients):
        chances[outside] = model.fit(values[inside] / spread, spoiled[inside]).predict_proba(values[outside] / spread)[
            :, 1
        ]
    model.fit(values / spread, spoiled)
    weights = dict(zip(columns, (model.coef_[0] / spread).round(2).tolist(), strict=True))
    return {"weights": weights, "bias": round(float(model.intercept_[0]), 2), **_found(chances, kinds, random)}


def _found(chances: np.ndarray, kinds: Sequence[str], random: np.random.Generator) -> Mapping[str, float]:
    """Mean share found over 200 draws of MASKS with SPOILED among them."""
    bad = np.flatnonzero([bool(kind) for kind in kinds])
    good = np.flatnonzero([not kind for kind in kinds])
    shares: dict[str, list[float]] = {}
    for _ in range(200):
        chosen = random.choice(bad, SPOILED, replace=False)
        among = np.concatenate([chosen, random.choice(good, MASKS - SPOILED, replace=False)])
        worst = set(among[np.argsort(-chances[among])[:WORST]].tolist())
        shares.setdefault("found", []).append(float(np.mean([index in worst for index in chosen])))
        for kind in KINDS:
            shares.setdefault(kind, []).extend(float(index in worst) for index in chosen if kinds[index] == kind)
    return {name: round(float(np.mean(values)), 3) for name, values in shares.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if too few were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scattered", action="store_true", help="single masks rather than whole pictures")
    parser.add_argument("--fit", action="store_true", help="weights, from training patients; needs scikit-learn")
    options = parser.parse_args(arguments)
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with the splits 'train' and 'val'")
    data = read_cases(os.environ["IBIS_DATA"])
    figures = fit(data, options.seed) if options.fit else measure(data, options.seed, scattered=options.scattered)
    print(json.dumps(figures, indent=1))
    found = figures["found"]
    return 0 if options.fit or (isinstance(found, float) and found >= WANTED) else 1


if __name__ == "__main__":
    sys.exit(main())
