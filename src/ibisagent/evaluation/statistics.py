"""Intervals and tests for metrics that are quotients of sums over cases, with patients as the unit.

Images of one patient are no independent evidence, so patients are drawn, not images. What is drawn depends on the seed
and the number of patients alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

RESAMPLES = 2_000
PERMUTATIONS = 10_000
LEVEL = (2.5, 97.5)

Interval: TypeAlias = tuple[float, float]
Row: TypeAlias = tuple[str, Mapping[str, tuple[float, float]]]
"""One case: its patient, and its (numerator, denominator) of every metric that it has a part in."""


def intervals(rows: Sequence[Row], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval | None]:
    """95% interval of every metric of `rows`; None for a metric that fewer than two patients have a part in.

    Percentile bootstrap over patients (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), with the same
    draws for every metric.
    """
    names, above, below = _by_patient(rows)
    found: dict[str, Interval | None] = {}
    groups: dict[bytes, list[int]] = {}
    for column in range(len(names)):  # metrics that the same patients have share their draws
        groups.setdefault((below[:, column] > 0).tobytes(), []).append(column)
    for columns in groups.values():
        there = below[:, columns[0]] > 0
        if there.sum() < 2:
            found |= {names[column]: None for column in columns}
            continue
        counts = _drawn(int(there.sum()), resamples, seed)
        metrics = (counts @ above[there][:, columns]) / (counts @ below[there][:, columns])
        low, high = np.percentile(metrics, LEVEL, axis=0)
        found |= {names[column]: (float(low[i]), float(high[i])) for i, column in enumerate(columns)}
    return {name: found[name] for name in names}


def patient_interval(values: Iterable[tuple[str, float]]) -> Interval | None:
    """95% interval of the mean of `values`, pairs of (patient, value); None for fewer than two patients."""
    rows = [(patient, {"mean": (value, 1.0)}) for patient, value in values]
    return intervals(rows).get("mean")


def patient_sureness(values: Iterable[tuple[str, float]]) -> float:
    """Share of the resamplings of the patients in which the mean of `values`, pairs of (patient, value), is above 0;
    one in which it is 0 counts half."""
    _, above, below = _by_patient([(patient, {"mean": (value, 1.0)}) for patient, value in sorted(values)])
    counts = _drawn(len(above), RESAMPLES, 0)
    means = (counts @ above) / (counts @ below)
    return float((means > 0).mean() + 0.5 * (means == 0).mean())


@dataclass(frozen=True, slots=True)
class Difference:
    """Run B less run A in one metric, over the cases that both have. cases: those with a part in it.

    interval: 95%, patients resampled in pairs; None for fewer than two patients. p: two-sided; see `differences`.
    """

    cases: int
    a: float
    b: float
    difference: float
    interval: Interval | None
    p: float


def differences(
    a: Sequence[Row], b: Sequence[Row], *, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, Difference]:
    """Compare two runs, case for case: `a[i]` and `b[i]` are the same case of the same patient.

    A metric that one run has of a case and the other has not is compared on the cases that both have it of.
    p: paired permutation test; for every patient by itself the runs change places with chance 1/2, and p is the share
    of the permutations, counting the data as one more, in which the difference is at least as large, whatever its sign
    (Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005; the added one: Phipson and Smyth 2010). It
    answers "could the runs be the same?"; the interval says how large the difference is.
    """
    result: dict[str, Difference] = {}
    for name in dict.fromkeys(name for _, metrics in a for name in metrics):
        pairs = [(one, other) for one, other in zip(a, b, strict=True) if name in one[1] and name in other[1]]
        _, above_a, below_a = _by_patient([(one[0], {name: one[1][name]}) for one, _ in pairs])
        _, above_b, below_b = _by_patient([(one[0], {name: other[1][name]}) for one, other in pairs])
        if not pairs or not below_a.sum() or not below_b.sum():
            continue
        sums = np.hstack([above_a, below_a, above_b, below_b])
        metric_a, metric_b = float(above_a.sum() / below_a.sum()), float(above_b.sum() / below_b.sum())
        difference = metric_b - metric_a
        interval = None
        if len(sums) >= 2:
            with np.errstate(invalid="ignore", divide="ignore"):  # a draw may have no part in a metric
                drawn = _drawn(len(sums), RESAMPLES, seed) @ sums
                spread = drawn[:, 2] / drawn[:, 3] - drawn[:, 0] / drawn[:, 1]
            low, high = np.nanpercentile(spread, LEVEL)
            interval = (float(low), float(high))
        swap = np.random.default_rng([seed, 1]).integers(2, size=(permutations, len(sums))).astype(float)
        turned = swap @ sums[:, [2, 3, 0, 1]] + (1 - swap) @ sums
        with np.errstate(invalid="ignore", divide="ignore"):
            permuted = np.abs(turned[:, 2] / turned[:, 3] - turned[:, 0] / turned[:, 1])
        extreme = int(np.count_nonzero(permuted >= abs(difference) - 1e-12))
        result[name] = Difference(
            len(pairs), metric_a, metric_b, difference, interval, (extreme + 1) / (permutations + 1)
        )
    return result


def _by_patient(rows: Sequence[Row]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names of the metrics, sums of their numerators, of their denominators), both (patients, metrics)."""
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    place = {name: column for column, name in enumerate(names)}
    patients: dict[str, int] = {}
    for patient, _ in rows:
        patients.setdefault(patient, len(patients))
    sums = np.zeros((2, len(patients), len(names)))
    for patient, metrics in rows:
        for name, (above, below) in metrics.items():
            sums[:, patients[patient], place[name]] += above, below
    return names, sums[0], sums[1]


def _drawn(patients: int, resamples: int, seed: int) -> np.ndarray:
    """How often each patient is drawn, (resamples, patients)."""
    drawn = np.random.default_rng(seed).integers(patients, size=(resamples, patients))
    places = (np.arange(resamples)[:, None] * patients + drawn).ravel()
    return np.bincount(places, minlength=resamples * patients).reshape(resamples, patients).astype(float)
