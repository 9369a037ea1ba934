"""Windows: which values of a volume are black, which white."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ibisagent.errors import ConfigError

HOUNSFIELD: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "lung": (-600.0, 1500.0),
        "bone": (400.0, 1800.0),
        "soft tissue": (40.0, 400.0),
        "mediastinum": (50.0, 350.0),
        "liver": (70.0, 150.0),
        "brain": (40.0, 80.0),
        "subdural": (75.0, 215.0),
        "vessels": (300.0, 600.0),
    }
)
"""Named windows of computed tomography: (level, width) in Hounsfield units."""

PERCENTILES = (0.5, 99.5)
_BELOW_AIR, _LUNG_END, _DENSEST = -1100.0, -300.0, 20_000.0  # Hounsfield units
_WIDEST = 4000.0  # Hounsfield units: the inner ear is read at so many
_FEWEST_LEVELS = 64
_NUMBER = r"([+-]?\d+(?:\.\d+)?)"
_LEVEL_WIDTH = re.compile(rf"{_NUMBER}\s*/\s*{_NUMBER}")
_PERCENTILES = re.compile(rf"{_NUMBER}\s*%?\s*-\s*{_NUMBER}\s*%")
_SIGMOID_STEPS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Values at `low` and below are black, at `high` and above white, linear between; or as `table` says.

    table: (N,) display values of `low`, ..., `high` in N equal steps, of any range, for windows that are not linear.
    """

    low: float
    high: float
    table: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ConfigError(f"window from {self.low:g} to {self.high:g} shows nothing: the second must be larger")

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values of any shape as uint8; NaN is black."""
        finite = np.nan_to_num(values, nan=self.low, posinf=self.high, neginf=self.low)
        share = (finite.clip(self.low, self.high) - self.low) / (self.high - self.low)
        if self.table is not None:
            shown = self.table[np.rint(share * (len(self.table) - 1)).astype(np.intp)].astype(np.float64)
            share = (shown - self.table.min()) / max(float(np.ptp(self.table)), 1e-9)
        windowed: np.ndarray = np.rint(share * 255).astype(np.uint8)
        return windowed

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def level_width(level: float, width: float) -> Window:
    """The window of that centre and full width; ConfigError unless the width is above 0."""
    return Window(level - width / 2, level + width / 2)


def sigmoid(level: float, width: float) -> Window:
    """DICOM's VOI LUT function SIGMOID (PS3.3, C.11.2.1.3), over three widths around the centre."""
    steps = np.linspace(-1.5, 1.5, _SIGMOID_STEPS)
    return Window(level - 1.5 * width, level + 1.5 * width, 1 / (1 + np.exp(-4 * steps)))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The window from one percentile of the volume's values to another; two numbers in [0, 100]."""

    low: float
    high: float


def parse_window(text: str) -> Window | Percentiles | str | None:
    """What a user means: a name of HOUNSFIELD (as that name), "LEVEL/WIDTH", "LOW-HIGH%", or None for "auto".

    Raises ConfigError for anything else.
    """
    plain = " ".join(text.replace("-", " ").replace("_", " ").split()).casefold()
    if plain == "auto":
        return None
    if plain in HOUNSFIELD:
        return plain
    if match := _LEVEL_WIDTH.fullmatch(text.strip()):
        return level_width(float(match[1]), float(match[2]))
    if match := _PERCENTILES.fullmatch(text.strip()):
        low, high = float(match[1]), float(match[2])
        if 0 <= low < high <= 100:
            return Percentiles(low, high)
    names = ", ".join(HOUNSFIELD)
    raise ConfigError(f"unknown window '{text[:40]}': give {names}, LEVEL/WIDTH such as 40/400, or 1-99%")


def looks_like_hounsfield(values: np.ndarray) -> bool:
    """Whether real values (N,) are most likely those of computed tomography, whole numbers or resampled ones.

    What lies below air is padding and does not count. Told by air beside soft tissue, or in a tight crop by fat beside
    soft tissue and something denser; no other modality has its background, or so much of its values, below 0.
    """
    scanned = values[values >= _BELOW_AIR]
    if scanned.size < values.size * 0.02 or not scanned.size:
        return False

    def share(low: float, high: float, of: np.ndarray = scanned) -> float:
        return float(((of >= low) & (of <= high)).mean()) if of.size else 0.0

    dense = scanned[scanned > _LUNG_END]
    if share(_BELOW_AIR, -800) >= 0.01:
        return share(-200, 300, dense) >= 0.4 and share(_DENSEST, np.inf) < 0.001
    zeros = share(-0.5, 0.5)
    return (
        share(-150, -30) >= 0.03 and share(0, 120) >= 0.2 and zeros < 0.2 and 60 <= np.percentile(scanned, 99.5) < 3000
    )


def shows(window: Window, values: np.ndarray, *, hounsfield: bool) -> bool:
    """Whether a window that a file proposes is fit to see its real values (N,) by.

    It is not where all but one in a hundred of them fall within a quarter of its grey levels, or, for Hounsfield units,
    where it is wider than any that is read by.
    """
    if hounsfield:
        return window.high - window.low <= _WIDEST
    low, high = np.percentile(window.apply(values), PERCENTILES)
    return bool(high - low >= _FEWEST_LEVELS)


def percentiles(values: np.ndarray, share: Percentiles) -> tuple[float, float]:
    """The values at two percentiles, (low, high) with low < high; the smallest does not count where it is padding.

    It is where it lies further below all others than those are apart.
    """
    scanned = values[values > values.min()]
    if scanned.size:
        next_low, top = (float(value) for value in np.percentile(scanned, (0, 99.5)))
        if next_low - float(values.min()) > top - next_low > 0:
            values = scanned
    low, high = (float(value) for value in np.percentile(values, (share.low, share.high)))
    if low >= high:
        low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1
