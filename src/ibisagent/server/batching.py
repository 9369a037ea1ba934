"""One model for many sessions: whoever waits while it works is answered together, where it gains from that."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from ibisagent.domain import Completion, Image, Observation
from ibisagent.environment import turn_limit
from ibisagent.errors import PolicyError
from ibisagent.policies.base import Calibrated, Knowing, Policy, Proposal, Proposer, Seeing, proposals
from ibisagent.policies.vocabulary import Asked, Vocabulary

MAX_BATCH = 16
PATIENCE = 0.03
"""Seconds that a batch waits for one more turn, where more came together last time: sessions that were answered
together come back one after the other, as the segmenter draws their masks, and a turn costs least in company."""


class SharedPolicy:
    """A policy that batches the turns of different threads, first come, first served.

    One that gains nothing from company (its `batch_size` is 1) answers one turn after another: the segmenter draws the
    masks of one session while it works for the next. Every session waits with one turn at a time, so nobody gets two
    turns while another waits for one. A session that has the model to itself never waits; others wait for each other,
    see PATIENCE. If a batch fails, its turns are tried one by one, so that only those fail that are at fault.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch: int = MAX_BATCH,
        max_turns: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        """max_batch, max_turns: bound the policy's own. on_batch: called with the size of every batch."""
        self._most_turns, self._most_together, self._on_batch = max_turns, max_batch, on_batch
        self.switch(policy)
        self._waiting: deque[tuple[Observation, Future[Proposal]]] = deque()
        self._arrived = threading.Condition()
        self._company = 1  # turns of the last batch, and those that came meanwhile
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="policy", daemon=True)
        self._thread.start()

    def switch(self, policy: Policy, name: str = "") -> None:
        """Let another policy answer from the next batch on; what waits goes to it, and nobody is refused.

        name: what it is called in records; default its own.
        """
        self.inner, self.name, self.dialect = policy, name or policy.name, policy.dialect
        self.max_turns = min(turn_limit(policy), self._most_turns or turn_limit(policy))
        self._max_batch = min(self._most_together, getattr(policy, "batch_size", self._most_together))

    @property
    def waiting(self) -> int:
        """Turns that wait for the model."""
        return len(self._waiting)

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """As the policy itself; blocks until all are answered. PolicyError also after `close`."""
        return [proposal.completions[0] for proposal in self.propose(observations)]

    @property
    def candidates(self) -> int:
        """As the policy itself; 1 where it proposes nothing."""
        return self.inner.candidates if isinstance(self.inner, Proposer) else 1

    def propose(self, observations: Sequence[Observation]) -> list[Proposal]:
        """As `policies.base.proposals` of the policy itself; blocks as `respond`, and raises as that."""
        futures = [Future[Proposal]() for _ in observations]
        with self._arrived:
            if self._closed:
                raise PolicyError("the server is stopping: ask again when it is back")
            self._waiting.extend(zip(observations, futures, strict=True))
            self._arrived.notify()
        return [future.result() for future in futures]

    @property
    def vocabulary(self) -> Vocabulary | None:
        """As the policy itself; None where it makes no claim."""
        return self.inner.vocabulary if isinstance(self.inner, Knowing) else None

    def about(self, image: Image, query: str) -> tuple[Asked, ...]:
        """As the policy itself, apart from the batches."""
        return self.inner.about(image, query) if isinstance(self.inner, Knowing) else ()

    def believe(self, image: Image, query: str) -> Mapping[str, np.ndarray]:
        """As the policy itself, apart from the batches."""
        return self.inner.believe(image, query) if isinstance(self.inner, Knowing) else {}

    def refine(self, observation: Observation) -> list[Completion]:
        """As the policy itself, apart from the batches."""
        return self.inner.refine(observation) if isinstance(self.inner, Knowing) else []

    def features(self, image: Image) -> np.ndarray | None:
        """As the policy itself, apart from the batches; None where it shows none."""
        return self.inner.features(image) if isinstance(self.inner, Seeing) else None

    def calibration(self, image: Image, query: str) -> Path | None:
        """As the policy itself, apart from the batches; None where it brings none."""
        return self.inner.calibration(image, query) if isinstance(self.inner, Calibrated) else None

    def describe(self) -> dict[str, str]:
        """As the policy itself, under the name that it has here."""
        facts: dict[str, str] = getattr(self.inner, "describe", dict)()
        return facts | {"policy": self.name} if "policy" in facts else facts

    def close(self) -> None:
        """Refuse whatever waits, and end the thread after the batch under way."""
        with self._arrived:
            self._closed = True
            while self._waiting:
                self._waiting.popleft()[1].set_exception(PolicyError("the server is stopping"))
            self._arrived.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._arrived:
                while not self._waiting and not self._closed:
                    self._arrived.wait()
                self._gather()
                if self._closed:
                    return
                batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            if self._on_batch is not None:
                self._on_batch(len(batch))
            self._answer(batch)
            self._company = len(batch) + len(self._waiting)

    def _gather(self) -> None:
        """Wait for as many turns as were last together, while they keep coming."""
        while not self._closed and len(self._waiting) < min(self._company, self._max_batch):
            if not self._arrived.wait(PATIENCE):
                return

    def _answer(self, batch: Sequence[tuple[Observation, Future[Proposal]]]) -> None:
        try:
            offered = proposals(self.inner, [observation for observation, _ in batch])
        except Exception as error:  # noqa: BLE001 - whoever waits must be told, whatever it was
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        for (_, future), proposal in zip(batch, offered, strict=True):
            future.set_result(proposal)
