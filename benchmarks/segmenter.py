"""The default segmenter on a CPU: milliseconds a click, torch against OpenVINO, memory of a huge image.

    IBIS_DATA=DATA python benchmarks/segmenter.py [--limit 50] [--json]

DATA: a labelled data set as `ibisagent eval run` reads it; its split "val" is used, all of it for the agreement of the
runtimes, `--limit` cases for the times. Run it on an idle machine. Accuracy is what `ibisagent eval ceiling` measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Click, Image
from ibisagent.imaging.clicks import next_click
from ibisagent.imaging.masks import iou
from ibisagent.segmenters import Segmenter, load_segmenter

CLICKS = 5
HUGE = 10_000  # pixels a side
LIMITS = {
    "click_ms_median": ("<=", 40.0),
    "click_ms_p95": ("<=", 60.0),
    "first_click_ms_median": ("<=", 40.0),
    "first_click_ms_p95": ("<=", 60.0),
    "runtimes_mean_iou": (">=", 0.99),
}
"""What the results should be on a CPU of 2 cores."""


def click_times(cases: CaseSource, segmenter: Segmenter) -> dict[str, float]:
    """Milliseconds a click; the first includes opening the image."""
    first, all_clicks = list[float](), list[float]()
    for case in cases:
        [(name, ground_truth), *_] = (case.targets or {}).items()
        current, past, prior, session = np.zeros_like(ground_truth), list[Click](), None, None
        for number in range(CLICKS):
            click = next_click(ground_truth, current, name, past)
            if click is None:
                break
            past.append(click)
            started = time.perf_counter()
            session = session or segmenter.open(case.image)
            prediction = session.predict(past, prior)
            milliseconds = 1000 * (time.perf_counter() - started)
            current, prior = prediction.mask, prediction.logits
            all_clicks.append(milliseconds)
            if number == 0:
                first.append(milliseconds)
    named = {"click_ms": all_clicks, "first_click_ms": first}
    return {f"{name}_median": float(np.median(times)) for name, times in named.items()} | {
        f"{name}_p95": float(np.percentile(times, 95)) for name, times in named.items()
    }


def agreement(cases: CaseSource) -> dict[str, float]:
    """IoU of the masks that the two runtimes give for the same clicks and the same mask to refine."""
    one, other = (load_segmenter("ibis-click", device="cpu", runtime=runtime) for runtime in ("openvino", "torch"))
    agreed: list[float] = []
    for case in cases:
        for name, ground_truth in (case.targets or {}).items():
            current, past, prior = np.zeros_like(ground_truth), list[Click](), None
            sessions = one.open(case.image), other.open(case.image)
            for _ in range(CLICKS):
                click = next_click(ground_truth, current, name, past)
                if click is None:
                    break
                past.append(click)
                predictions = [session.predict(past, prior) for session in sessions]
                agreed.append(iou(predictions[0].mask, predictions[1].mask))
                current, prior = predictions[0].mask, predictions[0].logits
    return {"runtimes_mean_iou": float(np.mean(agreed)), "runtimes_worst_iou": min(agreed), "masks": len(agreed)}


def huge_image(segmenter: Segmenter) -> dict[str, float]:
    """Seconds and peak memory for two clicks on an image of HUGE x HUGE pixels, which is itself 0.3 GB."""
    pixels = np.zeros((HUGE, HUGE, 3), dtype=np.uint8)
    pixels[4000:4600, 7000:7500] = 200
    image = Image(pixels)
    started = time.perf_counter()
    session = segmenter.open(image)
    prediction = session.predict([Click(7250, 4300, True, "block")])
    session.predict([Click(7250, 4300, True, "block"), Click(9000, 9000, False, "block")], prediction.logits)
    seconds = time.perf_counter() - started
    return {"huge_seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a result is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=50, help="cases for the times")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with a split 'val'")
    cases = read_cases(os.environ["IBIS_DATA"], split="val")
    step = max(1, len(cases) // options.limit)
    segmenter = load_segmenter("ibis-click", device="cpu")
    results: dict[str, Any] = click_times(CaseSource(cases.rows[::step], cases.where), segmenter)
    results |= huge_image(segmenter) | agreement(cases)
    missed = [
        name
        for name, (sign, limit) in LIMITS.items()
        if (results[name] > limit if sign == "<=" else results[name] < limit)
    ]
    results |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", **segmenter.describe()}
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        for name, result in results.items():
            shown = f"{result:.4g}" if isinstance(result, float) else result
            sign, limit = LIMITS.get(name, ("", 0.0))
            wanted = f"  (should be {sign} {limit:g})" if sign else ""
            print(f"{name:24} {shown}{wanted}{'  MISSED' if name in missed else ''}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
