"""Can the score of a mask be trusted? Fitted on training patients that the models never saw, measured on split "val".

    IBIS_DATA=DATA python benchmarks/reliability.py [--fit 20] [--limit 60] [--samples 0] [-o FILE]

Prints for the calibration, for the plain mean of the signals and for each signal alone: what dropping the worst 20%
adds to the mean IoU, and the expected calibration error. One case takes an episode and three replays: seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ibisagent import evaluation, session
from ibisagent.calibration import calibration
from ibisagent.datasets import CaseSource, read_cases
from ibisagent.images import write_whole
from ibisagent.policies import load_policy
from ibisagent.reliability import Reliability, Reviewer, fit, gain_of_dropping
from ibisagent.segmenters import load_segmenter
from ibisagent.training.click_states import is_development

WANTED_GAIN, WANTED_ERROR = 0.06, 0.08


def measured(cases: CaseSource, reviewer: Reviewer) -> list[dict[str, float]]:
    """The signals and the IoU of every case."""
    found = []
    for number, case in enumerate(cases, start=1):
        episode = session.segment(case, reviewer.policy, reviewer.segmenter, max_turns=reviewer.max_turns)
        reached = evaluation.agreement(episode.kept(reviewer.keep), case)[0]
        found.append({**reviewer.signals(episode, case), "iou": reached})
        print(f"{number} of {len(cases)}", file=sys.stderr, flush=True)
    return found


def figures(scores: Sequence[float], ious: Sequence[float]) -> dict[str, float]:
    """What the scores are worth."""
    return {
        "gain": round(gain_of_dropping(scores, ious), 4),
        "error": round(calibration(scores, ious).expected_error, 4),
        "correlation": round(float(np.corrcoef(scores, ious)[0, 1]), 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if the calibrated score misses what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=20, help="cases to fit on")
    parser.add_argument("--limit", type=int, default=60, help="cases of split val")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("-o", "--output", type=Path, help="write signals and IoU of every case here")
    options = parser.parse_args(arguments)
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with the splits 'train' and 'val'")
    data = read_cases(os.environ["IBIS_DATA"]).filter(lambda row: row.mask is not None)
    held_out = data.filter(lambda row: row.split == "train" and is_development(row.patient))
    policy, segmenter = load_policy(options.policy, device="cpu"), load_segmenter(options.segmenter, device="cpu")
    reviewer = Reviewer(policy, segmenter, samples=options.samples, max_turns=session.DEFAULT_TURNS)
    learned = measured(held_out.spread(options.fit), reviewer)
    tested = measured(data.filter(lambda row: row.split == "val").spread(options.limit), reviewer)
    names = [name for name in learned[0] if name != "iou"]
    fitted = fit([{name: one[name] for name in names} for one in learned], [one["iou"] for one in learned])
    ious = [one["iou"] for one in tested]
    result = {
        "cases": {"fit": len(learned), "val": len(tested)},
        "mean IoU": {"fit": float(np.mean([one["iou"] for one in learned])), "val": float(np.mean(ious))},
        "calibrated": figures([fitted.score(one) for one in tested], ious),
        "plain mean": figures([Reliability.plain(names).score(one) for one in tested], ious),
        **{name: figures([one[name] for one in tested], ious) for name in names},
        "weights": {**fitted.weights, "bias": fitted.bias},
    }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        content = {"fit": learned, "val": tested, **result}
        write_whole((json.dumps(content, indent=1) + "\n").encode(), options.output)
    reached = figures([fitted.score(one) for one in tested], ious)
    return 0 if reached["gain"] >= WANTED_GAIN and reached["error"] <= WANTED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
