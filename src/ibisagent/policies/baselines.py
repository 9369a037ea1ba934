"""Blind policies: what can be reached without looking at the picture. Every result is printed beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import cv2
import numpy as np

from ibisagent import protocol
from ibisagent.domain import Click, Completion, Mask, Observation, Reply, Stop
from ibisagent.errors import ConfigError, DataError

GRID = 64  # side of the normalised square on which places are averaged


class _OneClickPolicy:
    """One positive click at a place that does not depend on the pixels, then stop."""

    name = ""

    def __init__(self, dialect: str) -> None:
        if dialect not in protocol.DIALECTS:
            raise ConfigError(f"unknown dialect '{dialect}'; there are: {', '.join(protocol.DIALECTS)}")
        self.dialect = dialect

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        """(x, y) in pixels."""
        raise NotImplementedError

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """A click in the first turn, a stop in every later one."""
        return [Completion(self._write(observation)) for observation in observations]

    def _write(self, observation: Observation) -> str:
        target = protocol.target_of(observation.query)
        if observation.turns:
            reply = Reply("One click is all I give.", (Stop(f"The {target} is segmented."),))
        else:
            x, y = self._place(observation, target)
            reply = Reply(f"I look for the {target}.", (Click(x, y, True, target),))
        return protocol.write(reply, observation.image.size, dialect=self.dialect)


class CentreClickPolicy(_OneClickPolicy):
    """Clicks the middle of the picture once, then stops."""

    name = "centre-click"

    def __init__(self, *, dialect: str = "ibis") -> None:
        """ConfigError for an unknown dialect."""
        super().__init__(dialect)

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        height, width = observation.image.size
        return width // 2, height // 2


class LocationPriorPolicy(_OneClickPolicy):
    """Clicks once where an object of that name in that modality most often is, then stops.

    The place is the maximum of the mean of all training masks, each resampled to a GRID x GRID square. A name that was
    not seen in that modality is looked up in all modalities, an unknown name in the modality, else in everything.
    """

    name = "location-prior"

    def __init__(
        self,
        examples: Iterable[tuple[str, str, Mask]],
        modalities: Mapping[str, str] = MappingProxyType({}),
        *,
        dialect: str = "ibis",
    ) -> None:
        """examples: (object, modality, mask) of the training data; "" where a modality is not known.

        modalities: modality by id of the cases that will be asked; no observation tells it. Raises DataError without
        examples, ConfigError for an unknown dialect.
        """
        super().__init__(dialect)
        totals: dict[tuple[str | None, str | None], np.ndarray] = {}
        for thing, modality, mask in examples:
            small = cv2.resize(mask.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA)
            for key in _keys(thing, modality):
                totals[key] = totals.get(key, 0) + small
        if not totals:
            raise DataError("location-prior: there are no masks to learn places from; give training cases")
        self._places = {key: _peak(total) for key, total in totals.items()}
        self._modalities = modalities

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        keys = _keys(target, self._modalities.get(observation.case_id, ""))
        x_norm, y_norm = next(self._places[key] for key in keys if key in self._places)
        height, width = observation.image.size
        return int(x_norm * width), int(y_norm * height)


def _keys(thing: str, modality: str) -> list[tuple[str | None, str | None]]:
    """Where to look a place up, best first; None stands for any."""
    thing, modality = thing.casefold(), modality.casefold()
    return [(thing, modality), (thing, None), (None, modality), (None, None)]


def _peak(total: np.ndarray) -> tuple[float, float]:
    """(x, y) of the largest cell's centre, in [0, 1); the first in reading order."""
    row, column = np.unravel_index(int(total.argmax()), total.shape)
    return (int(column) + 0.5) / GRID, (int(row) + 0.5) / GRID
