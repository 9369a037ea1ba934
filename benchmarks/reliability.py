"""Can the score of a mask be trusted? Measured on split "val", fitted as users do it: on a few cases of the same kind.

    IBIS_DATA=DATA python benchmarks/reliability.py [--fit 20] [--draws 100] [--limit 430] [--samples 0] [-o FILE]

So often, `--fit` cases of "val" are drawn by patient, the calibration is fitted on them and measured on the cases of
all other patients; printed are the means over the draws and the standard deviation of the error. Beside them: a
calibration from training patients that the models never saw, which are easier cases; the plain mean of the signals;
each signal alone. The figures: what dropping the worst 20% adds to the mean IoU, and the expected calibration error.
One case takes an episode and three replays: a second on a CPU.
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


def drawn(tested: Sequence[dict[str, float]], patients: Sequence[str], count: int, draws: int) -> dict[str, float]:
    """Mean figures of calibrations fitted on `count` cases of some patients, measured on those of all others."""
    found = []
    for seed in range(draws):
        order = {
            patient: place
            for place, patient in enumerate(np.random.default_rng(seed).permutation(sorted(set(patients))))
        }
        cases = sorted(range(len(tested)), key=lambda number: order[patients[number]])
        known = {patients[number] for number in cases[:count]}
        inside = [tested[number] for number in cases[:count]]
        outside = [one for one, patient in zip(tested, patients, strict=True) if patient not in known]
        fitted = fit([signals_of(one) for one in inside], [one["iou"] for one in inside])
        found.append(figures([fitted.score(one) for one in outside], [one["iou"] for one in outside]))
    means = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
    return {**means, "error_deviation": round(float(np.std([one["error"] for one in found])), 4)}


def signals_of(measured: dict[str, float]) -> dict[str, float]:
    """Without the IoU."""
    return {name: value for name, value in measured.items() if name != "iou"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if the calibrated score misses what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=20, help="cases to fit on")
    parser.add_argument("--draws", type=int, default=100, help="calibrations to average over")
    parser.add_argument("--limit", type=int, default=430, help="cases of split val")
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
    val = data.filter(lambda row: row.split == "val").spread(options.limit)
    tested = measured(val, reviewer)
    names = list(signals_of(learned[0]))
    fitted = fit([signals_of(one) for one in learned], [one["iou"] for one in learned])
    ious = [one["iou"] for one in tested]
    calibrated = drawn(tested, [row.patient or str(row.image) for row in val.rows], options.fit, options.draws)
    result = {
        "cases": {"fit": len(learned), "val": len(tested)},
        "mean IoU": {"fit": float(np.mean([one["iou"] for one in learned])), "val": float(np.mean(ious))},
        "calibrated": calibrated,
        "calibrated on training patients": figures([fitted.score(one) for one in tested], ious),
        "plain mean": figures([Reliability.plain(names).score(one) for one in tested], ious),
        **{name: figures([one[name] for one in tested], ious) for name in names},
        "weights": {**fitted.weights, "bias": fitted.bias},
    }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        content = {"fit": learned, "val": tested, **result}
        write_whole((json.dumps(content, indent=1) + "\n").encode(), options.output)
    return 0 if calibrated["gain"] >= WANTED_GAIN and calibrated["error"] <= WANTED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
