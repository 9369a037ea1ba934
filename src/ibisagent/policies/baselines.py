"""Baselines: policies that do not look at the image, and one that stops a policy after its first action.

The oracle's clicks and boxes are in `oracle`, the ellipse in the box is a segmenter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import cv2
import numpy as np

from ibisagent import protocol
from ibisagent.domain import Click, Completion, Mask, Observation, Reply, Stop
from ibisagent.errors import DataError
from ibisagent.policies.base import Policy, random_of
from ibisagent.query import target_of

GRID = 64  # side of the normalised square on which places are averaged


class _BlindPolicy:
    """`clicks` positive clicks, one a turn, at places that do not depend on the pixels, then stop."""

    name = ""
    clicks = 1

    def __init__(self, dialect: str) -> None:
        self.dialect = protocol.dialect_of(dialect).name

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        """(x, y) in pixels."""
        raise NotImplementedError

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """A click in each of the first `clicks` turns, a stop in every later one."""
        return [Completion(self._write(observation)) for observation in observations]

    def _write(self, observation: Observation) -> str:
        target = target_of(observation.query)
        if len(observation.turns) >= self.clicks:
            reply = Reply("I give no more clicks.", (Stop(f"The {target} is segmented."),))
        else:
            x, y = self._place(observation, target)
            reply = Reply(f"I look for the {target}.", (Click(x, y, True, target),))
        return protocol.write(reply, observation.image.size, dialect=self.dialect)


class CentreClickPolicy(_BlindPolicy):
    """Clicks the middle of the image once, then stops."""

    name = "centre-click"

    def __init__(self, *, dialect: str = "ibis") -> None:
        """ConfigError for an unknown dialect."""
        super().__init__(dialect)

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        height, width = observation.image.size
        return width // 2, height // 2


class RandomClicksPolicy(_BlindPolicy):
    """Clicks anywhere in the image, every pixel equally likely, three times, then stops: the floor of every table."""

    name = "random-clicks"
    clicks = 3

    def __init__(self, *, dialect: str = "ibis", seed: int = 0) -> None:
        """seed: the places depend on it, the case's id and the turn only. ConfigError for an unknown dialect."""
        super().__init__(dialect)
        self._seed = seed

    def _place(self, observation: Observation, target: str) -> tuple[int, int]:
        random = random_of(self._seed, observation.case_id, len(observation.turns))
        height, width = observation.image.size
        return int(random.integers(width)), int(random.integers(height))


class LocationPriorPolicy(_BlindPolicy):
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


class OneShotPolicy:
    """Another policy's first action, then stop: what its corrections are worth is the difference to it."""

    def __init__(self, policy: Policy) -> None:
        self.name = f"one-shot:{policy.name}"
        self.dialect = policy.dialect
        self._policy = policy

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """The policy's own first turn, cut to its first action; a stop in every later one. Raises what it raises."""
        fresh = [observation for observation in observations if not observation.turns]
        first = iter(self._policy.respond(fresh)) if fresh else iter(())
        return [
            Completion(self._stop(observation)) if observation.turns else self._truncated(next(first), observation)
            for observation in observations
        ]

    def _stop(self, observation: Observation) -> str:
        target = target_of(observation.query)
        reply = Reply("I act once.", (Stop(f"The {target} is segmented."),))
        return protocol.write(reply, observation.image.size, dialect=self.dialect)

    def _truncated(self, completion: Completion, observation: Observation) -> Completion:
        """As it is, unless it has multiple actions; a reply that cannot be read stays what it is."""
        size, target = observation.image.size, target_of(observation.query)
        reply = protocol.parse(completion.text, size, dialect=self.dialect, default_target=target)
        if len(reply.actions) < 2:
            return completion
        text = protocol.write(replace(reply, actions=reply.actions[:1]), size, dialect=self.dialect)
        return replace(completion, text=text)


def _keys(thing: str, modality: str) -> list[tuple[str | None, str | None]]:
    """Where to look a place up, best first; None stands for any."""
    thing, modality = thing.casefold(), modality.casefold()
    return [(thing, modality), (thing, None), (None, modality), (None, None)]


def _peak(total: np.ndarray) -> tuple[float, float]:
    """(x, y) of the largest cell's centre, in [0, 1); the first in reading order."""
    row, column = np.unravel_index(int(total.argmax()), total.shape)
    return (int(column) + 0.5) / GRID, (int(row) + 0.5) / GRID
