"""How much a file may cost: what its headers claim is held against these limits before anything is decoded.

A file of a few kilobytes can claim, or unpack to, any size, so every reader asks here first and refuses with a
DataError of one line. What no header states (the end of a gzip stream) is counted while it is unpacked.

| limit | default | raised by the environment variable | a file that needs it |
|---|---|---|---|
| `pixels` | 2^26, 8192 x 8192 | `IBIS_MAX_PIXELS` | a photograph of 30,000 x 30,000 |
| `voxels` | 2^30, 1024 x 1024 x 1024 | `IBIS_MAX_VOXELS` | a micro-CT of 2000 x 2000 x 2000 |
| `frames` | 2^14 slices of one volume | `IBIS_MAX_FRAMES` | a cine loop of an hour |

Servers set their own, lower ones with `at_most`, which holds for all that is read inside its block.
"""

from __future__ import annotations

import contextvars
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from ibisagent.domain import MAX_PIXELS
from ibisagent.errors import ConfigError, TooLargeError

BYTES_PER_PIXEL = 8
BYTES_PER_VOXEL = 4
_MOST = 2**40
"""Above every limit that can be asked for; products of that many bytes still fit 64 bits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may hold.

    pixels: of an image or mask, each of BYTES_PER_PIXEL bytes with all its channels. voxels: of one volume, or of all
    masks of one record, each of BYTES_PER_VOXEL bytes; also bounds what is unpacked to get at them. frames: slices,
    frames and time points that one volume is chosen from.
    """

    pixels: int = MAX_PIXELS
    voxels: int = 2**30
    frames: int = 2**14

    @property
    def volume_bytes(self) -> int:
        """What a volume may unpack to."""
        return self.voxels * BYTES_PER_VOXEL


def current() -> Limits:
    """The limits that hold here: those of the innermost `at_most`, else the environment's, else the defaults.

    Raises ConfigError for an environment variable that is no whole number above 0.
    """
    return _in_force.get() or _from_environment()


@contextmanager
def at_most(*, pixels: int | None = None, voxels: int | None = None, frames: int | None = None) -> Iterator[None]:
    """Within the block (and its thread), these limits in place of those around it; None: as they are."""
    given = {"pixels": pixels, "voxels": voxels, "frames": frames}
    around = current()
    kept = {name: getattr(around, name) if value is None else value for name, value in given.items()}
    token = _in_force.set(Limits(**kept))
    try:
        yield
    finally:
        _in_force.reset(token)


def check_pixels(height: int, width: int, where: object, *, bytes_each: int = 1) -> None:
    """TooLargeError unless an image or mask of that size, with so many bytes in each pixel, is within the limits."""
    most = current().pixels
    if height * width > most:
        raise TooLargeError(
            f"{where}: {width} x {height} pixels, at most {most} are read; crop or shrink it{or_raise('pixels')}"
        )
    if height * width * bytes_each > most * BYTES_PER_PIXEL:
        raise TooLargeError(
            f"{where}: {width} x {height} pixels of {bytes_each} bytes, at most {most * BYTES_PER_PIXEL} bytes are"
            f" read; save the channels that are needed, as 8 or 16 bits{or_raise('pixels')}"
        )


def check_voxels(shape: Sequence[int], where: object, *, bytes_each: int = 1) -> int:
    """How many voxels that `shape` has; TooLargeError unless they, and their bytes, are within the limits."""
    limits = current()
    count = math.prod(shape)
    sides = " x ".join(map(str, shape))
    if count > limits.voxels:
        raise TooLargeError(
            f"{where}: {sides} voxels, at most {limits.voxels} are read; crop or resample it{or_raise('voxels')}"
        )
    check_unpacked(count * bytes_each, where)
    return count


def check_unpacked(size: int, where: object) -> None:
    """TooLargeError unless a volume of that many bytes is within the limits."""
    most = current().volume_bytes
    if size > most:
        raise TooLargeError(
            f"{where}: unpacks to {size} bytes or more, at most {most} are read; crop it, or save it with smaller"
            f" values{or_raise('voxels')}"
        )


def check_frames(count: int, where: object) -> None:
    """TooLargeError unless a volume of that many slices, frames or time points is within the limits."""
    most = current().frames
    if count > most:
        raise TooLargeError(f"{where}: {count} frames, at most {most} are read; divide it{or_raise('frames')}")


def or_raise(name: str) -> str:
    """What to do instead on one's own machine; nothing inside `at_most`, where the environment does not count."""
    return "" if _in_force.get() else f", or set {_variable(name)}"


def _variable(name: str) -> str:
    return f"IBIS_MAX_{name.upper()}"


def _from_environment() -> Limits:
    given = {
        field.name: os.environ[_variable(field.name)] for field in fields(Limits) if _variable(field.name) in os.environ
    }
    for name, text in given.items():
        if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= _MOST):
            raise ConfigError(f"{_variable(name)} is '{text[:40]}': give a whole number from 1 to {_MOST}")
    return Limits(**{name: int(text) for name, text in given.items()})


_in_force: contextvars.ContextVar[Limits | None] = contextvars.ContextVar("limits", default=None)
