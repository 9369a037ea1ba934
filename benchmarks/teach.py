"""What a few labelled images teach: IoU before and after on data sets that the packaged weights never saw.

    IBIS_DATA=DATA python benchmarks/teach.py OUT [--sets GlaS,KiTS19] [--images 10] [--draws 3] [--no-check]
    IBIS_DATA=DATA python benchmarks/teach.py OUT --table     # of what is there, and the plot OUT/teach.png

The sets are those of DATA whose licence class is nc or unknown: the packaged weights learned from neither. All splits
of a set are pooled. A draw takes K images, of as many patients as can be, two thirds of all at most; the test is made
of the other patients, at most 60 images. A set that has no K images to teach from has no cell of K. Every cell is a
file in OUT, so cells can be run one by one, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.datasets import CaseRow, CaseSource, read_cases
from ibisagent.files import write_whole
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter
from ibisagent.training.teach import teach
from ibisagent.training.teach.part import measured

TESTS = 60  # images
COUNTS = (3, 5, 10, 20)


def main() -> None:
    """Run the cells that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the cells")
    parser.add_argument("--sets", default="", help="names with commas; default all")
    parser.add_argument("--images", default=",".join(map(str, COUNTS)), help="how many to teach from, with commas")
    parser.add_argument("--draws", type=int, default=3, help="draws of each cell")
    parser.add_argument("--first-draw", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--no-check", action="store_true", help="teach without the self-check")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    if options.table:
        print_table(options.out)
        return
    source = read_cases(os.environ["IBIS_DATA"])
    sets: dict[str, list[CaseRow]] = defaultdict(list)
    for row in source.rows:
        if row.licence_class in ("nc", "unknown"):
            sets[row.dataset].append(row)
    chosen = options.sets.split(",") if options.sets else sorted(sets)
    draws = range(options.first_draw, options.first_draw + options.draws)
    for draw, count, name in product(draws, map(int, options.images.split(",")), chosen):
        taught, test = drawn(sets[name], count, draw)
        if len({row.image for row in taught}) == count:
            run_cell(options.out, name, count, draw, taught, test, check=not options.no_check)


def drawn(rows: Sequence[CaseRow], count: int, seed: int) -> tuple[list[CaseRow], list[CaseRow]]:
    """Rows to teach from, of `count` images where there are so many, and rows to test on, of other patients."""
    random = np.random.default_rng(seed)
    images: dict[str, list[Path]] = defaultdict(list)
    for row in rows:
        if row.image not in images[row.patient or row.image.name]:
            images[row.patient or row.image.name].append(row.image)
    patients = [sorted(images)[number] for number in random.permutation(len(images))]
    teachers = patients[: min(count, max(1, len(patients) * 2 // 3))]
    left = [[images[patient][number] for number in random.permutation(len(images[patient]))] for patient in teachers]
    taught: set[Path] = set()
    while len(taught) < count and any(left):
        taught |= {one.pop() for one in left[: count - len(taught)] if one}
        left = [one for one in left if one]
    rest = sorted(image for patient in patients[len(teachers) :] for image in images[patient])
    tested = {rest[number * len(rest) // min(TESTS, len(rest))] for number in range(min(TESTS, len(rest)))}
    return [row for row in rows if row.image in taught], [row for row in rows if row.image in tested]


def run_cell(
    out: Path, name: str, count: int, draw: int, taught: Sequence[CaseRow], test: Sequence[CaseRow], *, check: bool
) -> None:
    """Teach, judge, and write the cell's file, unless it is there."""
    cell = out / f"{name}-{count}-{draw}.json"
    if cell.exists():
        return
    folder = out / f"{name}-{count}-{draw}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "data.csv"
    with manifest.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "mask", "object", "modality", "site", "dataset", "patient"])
        for row in taught:
            files = [os.path.relpath(path, folder) for path in (row.image, row.mask) if path is not None]
            table.writerow([*files, row.object, row.modality, row.site, row.dataset, row.patient])
    started = time.perf_counter()
    found = teach([manifest], folder / "agent", check=check, seed=draw)
    seconds = time.perf_counter() - started
    cases, segmenter = CaseSource(test, name), load_segmenter("ibis-click")
    before, after = (measured(load_policy(policy), segmenter, cases) for policy in ("ibis-nano", str(folder / "agent")))
    said: dict[str, Any] = {
        "set": name,
        "images": count,
        "draw": draw,
        "checked": check,
        "seconds": seconds,
        "largest_process_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "objects": [asdict(one) for one in found.objects],
        "cases": {one: [*before[one], *after[one]] for one in before if one in after},
    }
    write_whole(json.dumps(said, indent=1).encode(), cell)
    shutil.rmtree(folder)
    print(line_of(said), flush=True)


def line_of(cell: dict[str, Any]) -> str:
    """A cell in one line: mean IoU and turns before and after."""
    iou, turns, iou_after, turns_after = np.mean(list(cell["cases"].values()), axis=0)
    kept = sum(one["kept"] for one in cell["objects"])
    return (
        f"| {cell['set']} | {cell['images']} | {cell['draw']} | {len(cell['cases'])} | {iou:.3f} | {iou_after:.3f} |"
        f" {iou_after - iou:+.3f} | {turns:.1f} | {turns_after:.1f} | {kept} of {len(cell['objects'])} |"
        f" {cell['seconds']:.0f} |"
    )


def print_table(out: Path) -> None:
    """All cells, then the means over the sets, each set the mean of its draws; and the plot."""
    cells = [json.loads(path.read_bytes()) for path in sorted(out.glob("*.json"))]
    print("| set | images | draw | cases | before | after | gain | turns before | after | objects taught | seconds |")
    print("|" + "---|" * 11)
    for cell in sorted(cells, key=lambda one: (one["images"], one["set"], one["draw"])):
        print(line_of(cell))
    print("\n| images | sets | before | after | gain | worst set |\n|---|---|---|---|---|---|")
    means: dict[int, dict[str, np.ndarray]] = {}
    for count in sorted({cell["images"] for cell in cells}):
        of_set: dict[str, list[np.ndarray]] = defaultdict(list)
        for cell in cells:
            if cell["images"] == count:
                of_set[cell["set"]].append(np.mean(list(cell["cases"].values()), axis=0)[[0, 2]])
        means[count] = {name: np.mean(values, axis=0) for name, values in of_set.items()}
        before, after = np.mean(list(means[count].values()), axis=0)
        worst, (low, high) = min(means[count].items(), key=lambda one: one[1][1] - one[1][0])
        print(
            f"| {count} | {len(of_set)} | {before:.3f} | {after:.3f} | {after - before:+.3f} |"
            f" {worst} {high - low:+.3f} |"
        )
    draw_plot(means, out / "teach.png")


def draw_plot(means: dict[int, dict[str, np.ndarray]], path: Path) -> None:
    """IoU before (at 0 images) and after, a line a set, and their mean."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    ends = {}
    for name in sorted({name for of_set in means.values() for name in of_set}):
        counts = [count for count in means if name in means[count]]
        values = [means[counts[0]][name][0], *(means[count][name][1] for count in counts)]
        axis.plot([0, *counts], values, color="0.7", linewidth=0.9)
        ends[name] = values[-1]
    level = 1.0
    for name, end in sorted(ends.items(), key=lambda one: -one[1]):
        level = min(end, level - 0.04)  # below the name above
        axis.annotate(name, (1.01, level), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    overall = {count: np.mean(list(of_set.values()), axis=0) for count, of_set in means.items()}
    first = next(iter(overall.values()))[0]
    axis.plot([0, *overall], [first, *(after for _, after in overall.values())], color="C0", linewidth=2.5)
    axis.set(xlabel="images taught from", ylabel="mean IoU on other patients", ylim=(0, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
