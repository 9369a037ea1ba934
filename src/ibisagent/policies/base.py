"""What a policy is: something that looks at observations and writes text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ibisagent.domain import Completion, Image, Observation
from ibisagent.policies.vocabulary import Asked, Vocabulary

MAX_NEW_TOKENS = 512
"""Longest reply, where neither the caller nor the model says otherwise."""

PUBLIC_WEIGHTS = ("manglu3935/IBIS", "qwen2_5vl-7b-RL")
"""Repository and subfolder of the paper authors' own weights; they speak the dialect "released"."""


def is_public(source: str) -> bool:
    """Whether a folder, hub id or name on a server is that of the paper authors' own weights."""
    return any(part in source for part in PUBLIC_WEIGHTS)


def random_of(*what: object) -> np.random.Generator:
    """Draws that depend on `what` alone, such as a seed, a case and a turn."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little"))


class Policy(Protocol):
    """Anything that answers observations with text in a dialect of `protocol`.

    It may have an attribute `max_turns`, the most turns that an episode of it needs (see `environment.turn_limit`),
    and a method `describe`, facts such as hashes and seeds for the record of what it makes. One that is also a
    `Proposer` has several first turns tried, one that is `Knowing` tells what it was never taught.
    """

    @property
    def name(self) -> str:
        """The spec that loads this policy again, for records."""
        ...

    @property
    def dialect(self) -> str:
        """Name of the `protocol` dialect that this policy writes."""
        ...

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """One completion per observation, in order. Raises PolicyError when the machinery (not the text) fails."""
        ...


@runtime_checkable
class Knowing(Protocol):
    """A policy that may know which names of objects it learned, and says so before it acts."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What it learned; None: it makes no claim."""
        ...

    def about(self, image: Image, query: str) -> tuple[Asked, ...]:
        """What it can say of the objects that a query asks for; none where it makes no claim or none is named.

        Raises ConfigError for a query that does not settle what is asked for.
        """
        ...

    def refine(self, observation: Observation) -> list[Completion]:
        """First turns to try where a mask was brought; none where `respond` is to begin."""
        ...


@runtime_checkable
class Proposer(Protocol):
    """A policy that can offer several replies to one observation; `environment.rollout` keeps the best first turn."""

    @property
    def candidates(self) -> int:
        """How many replies `propose` gives for each observation; 1: there is nothing to choose from."""
        ...

    def propose(self, observations: Sequence[Observation]) -> list[list[Completion]]:
        """`candidates` completions per observation, in order, that of `respond` first. Raises as `respond` does."""
        ...
