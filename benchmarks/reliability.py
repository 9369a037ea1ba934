"""Can the score of a mask be trusted? Measured on split "val", fitted as users do it: on a few cases of the same kind.

    IBIS_DATA=DATA python benchmarks/reliability.py [--fit 20] [--draws 100] [--limit 430] [--samples 4] [--kept FILE]

So often, `--fit` cases of "val" are drawn by patient, the calibration is fitted on them and measured on the cases of
all other patients; printed are the means over the draws and the standard deviation of the error. Beside them: the same
on training patients that the models never saw ("development": settings are chosen by these results); the calibration
from all of these, measured on "val"; the score without any calibration; each signal alone. The results: what dropping
the worst 20% adds to the mean IoU, and the expected calibration error. With `--samples` all is told without them, too.

One case takes an episode and three replays, a second on a CPU, and four samples take as much again. `--kept` keeps the
signals of all cases in a file, and takes them from there where models, settings and cases are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.evaluation.calibration import calibration
from ibisagent.evaluation.reliability import Reliability, Reviewer, fit, gain_of_dropping
from ibisagent.files import write_whole
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter
from ibisagent.training.click.states import is_development

WANTED_GAIN, WANTED_ERROR = 0.06, 0.08


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a case: its signals and its IoU."""

    patient: str
    signals: Mapping[str, float]
    iou: float


def measured(cases: CaseSource, reviewer: Reviewer) -> list[Measured]:
    """All cases, in their order."""
    found = []
    for number, (row, case) in enumerate(zip(cases.rows, cases, strict=True), start=1):
        found.append(Measured(row.patient or str(row.image), *reviewer.measured(case)))
        print(f"{number} of {len(cases)}", file=sys.stderr, flush=True)
    return found


def kept(cases: Mapping[str, CaseSource], reviewer: Reviewer, file: Path | None) -> dict[str, list[Measured]]:
    """`measured` for each of multiple sources, from `file` if that holds the same, else made and written there."""
    settings = {"samples": reviewer.samples, "max_turns": reviewer.max_turns, "seed": reviewer.seed}
    ids = {name: [row.id for row in source.rows] for name, source in cases.items()}
    provenance = {"models": reviewer.identity, "settings": settings, "cases": ids}
    if file is not None and file.exists():
        content = json.loads(file.read_bytes())
        if content["made_by"] == provenance:
            return {name: [Measured(**one) for one in found] for name, found in content["measured"].items()}
    found = {name: measured(source, reviewer) for name, source in cases.items()}
    if file is not None:
        plain = {name: [asdict(one) for one in cases] for name, cases in found.items()}
        write_whole((json.dumps({"made_by": provenance, "measured": plain}) + "\n").encode(), file)
    return found


def results(scores: Sequence[float], ious: Sequence[float]) -> dict[str, float]:
    """What the scores are worth."""
    return {
        "gain": round(gain_of_dropping(scores, ious), 4),
        "error": round(calibration(scores, ious).expected_error, 4),
        "correlation": round(float(np.corrcoef(scores, ious)[0, 1]), 4),
    }


def drawn(tested: Sequence[Measured], names: Sequence[str], count: int, draws: int) -> dict[str, float]:
    """Mean results of calibrations fitted on `count` cases of some patients, measured on those of all others."""
    patients = [one.patient for one in tested]
    found = []
    for seed in range(draws):
        order = {
            patient: place
            for place, patient in enumerate(np.random.default_rng(seed).permutation(sorted(set(patients))))
        }
        cases = sorted(tested, key=lambda one: order[one.patient])
        inside, known = cases[:count], {one.patient for one in cases[:count]}
        outside = [one for one in tested if one.patient not in known]
        fitted = fit([some(one, names) for one in inside], [one.iou for one in inside])
        found.append(results([fitted.score(some(one, names)) for one in outside], [one.iou for one in outside]))
    means = {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}
    errors = np.array([one["error"] for one in found])
    held = {f"draws with an error of at most {WANTED_ERROR}": round(float((errors <= WANTED_ERROR).mean()), 2)}
    return {**means, "error_deviation": round(float(errors.std()), 4), **held}


def some(measured: Measured, names: Sequence[str]) -> dict[str, float]:
    """These signals of it."""
    return {name: measured.signals[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if the calibrated score misses what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=20, help="cases to fit on")
    parser.add_argument("--draws", type=int, default=100, help="calibrations to average over")
    parser.add_argument("--limit", type=int, default=430, help="cases of split val")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--policy", default="ibis-nano")
    parser.add_argument("--segmenter", default="ibis-click")
    parser.add_argument("--kept", type=Path, help="keep signals and IoU of every case here")
    options = parser.parse_args(arguments)
    if "IBIS_DATA" not in os.environ:
        parser.error("set IBIS_DATA to a labelled data set with the splits 'train' and 'val'")
    data = read_cases(os.environ["IBIS_DATA"]).filter(lambda row: row.mask is not None)
    policy, segmenter = load_policy(options.policy, device="cpu"), load_segmenter(options.segmenter, device="cpu")
    reviewer = Reviewer(policy, segmenter, samples=options.samples)
    cases = {
        "development": data.filter(lambda row: row.split == "train" and is_development(row.patient)),
        "val": data.filter(lambda row: row.split == "val").spread(options.limit),
    }
    found = kept(cases, reviewer, options.kept)
    learned, tested = found["development"], found["val"]
    ious = [one.iou for one in tested]
    signals = list(tested[0].signals)
    result: dict[str, Any] = {
        "cases": {name: len(multiple) for name, multiple in found.items()},
        "mean IoU": {name: round(float(np.mean([one.iou for one in cases])), 4) for name, cases in found.items()},
    }
    for label, names in {
        "with samples": signals,
        "without samples": [one for one in signals if one != "agreement"],
    }.items():
        if "agreement" in names or label == "without samples":
            elsewhere = fit([some(one, names) for one in learned], [one.iou for one in learned])
            result[label] = {
                "calibrated": drawn(tested, names, options.fit, options.draws),
                "development": drawn(learned, names, options.fit, options.draws),
                "calibrated on development": results([elsewhere.score(one.signals) for one in tested], ious),
                "not calibrated": results([Reliability.plain(names).score(one.signals) for one in tested], ious),
            }
    result |= {name: results([one.signals[name] for one in tested], ious) for name in signals}
    print(json.dumps(result, indent=1))
    best = result["with samples" if options.samples else "without samples"]["calibrated"]
    return 0 if best["gain"] >= WANTED_GAIN and best["error"] <= WANTED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
