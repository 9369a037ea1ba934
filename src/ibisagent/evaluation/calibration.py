"""How far a segmenter's own estimate of its quality can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ibisagent.errors import DataError

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """The estimates that fall into [low, high) (the last bin: [low, high]); the means are None where there are none."""

    low: float
    high: float
    count: int
    mean_score: float | None
    mean_iou: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Estimates against what was measured. expected_error: in [0, 1], 0 is perfect; see `calibration`."""

    expected_error: float
    bins: tuple[Bin, ...]


def calibration(scores: Sequence[float], ious: Sequence[float], bins: int = BINS) -> Calibration:
    """The expected calibration error of estimated IoUs `scores` against the measured `ious`, both (N,) in [0, 1].

    The estimates are sorted into `bins` of equal width; the error is the mean over the bins of |mean estimate - mean
    measurement|, weighted by their counts (Naeini, Cooper, Hauskrecht: Obtaining Well Calibrated Probabilities Using
    Bayesian Binning, AAAI 2015, with the IoU in place of the share of right answers). Raises DataError for lengths that
    differ, nothing to compare, or values out of range.
    """
    estimated, measured = np.asarray(scores, dtype=float), np.asarray(ious, dtype=float)
    if estimated.ndim != 1 or estimated.shape != measured.shape or not estimated.size:
        raise DataError(
            f"calibration: {estimated.size} scores for {measured.size} IoUs; give one of each, at least one"
        )
    if not all(((values >= 0) & (values <= 1)).all() for values in (estimated, measured)):
        raise DataError("calibration: scores and IoUs lie in [0, 1]; check what was handed over")
    home = np.minimum((estimated * bins).astype(int), bins - 1)
    found = []
    error = 0.0
    for index in range(bins):
        inside = home == index
        count = int(inside.sum())
        means = (float(estimated[inside].mean()), float(measured[inside].mean())) if count else (None, None)
        if means[0] is not None and means[1] is not None:
            error += count / estimated.size * abs(means[0] - means[1])
        found.append(Bin(index / bins, (index + 1) / bins, count, *means))
    return Calibration(error, tuple(found))
