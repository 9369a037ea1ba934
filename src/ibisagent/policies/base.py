"""What a policy is: something that looks at observations and writes text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ibisagent.domain import Completion, Image, Observation
from ibisagent.errors import PolicyError
from ibisagent.policies.vocabulary import Asked, Vocabulary
from ibisagent.protocol import Message

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
    an attribute `batch_size`, the most observations that it gains from answering together, and a method `describe`,
    facts such as hashes and seeds for the record of what it makes. One that is also a `Proposer` has multiple first
    turns tried, one that is `Knowing` tells what it was never taught, one that is `Calibrated` brings what scores of
    its masks are made with.
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

    def believe(self, image: Image, query: str) -> Mapping[str, np.ndarray]:
        """Where it believes each object that a query asks for, by its name, to be: as `Proposal.belief`; none where it
        makes no claim or none is named. ConfigError as `about`."""
        ...

    def refine(self, observation: Observation) -> list[Completion]:
        """First turns to try where a mask was brought; none where `respond` is to begin."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A policy that may bring its own calibration, see `evaluation.reliability`."""

    def calibration(self, image: Image, query: str) -> Path | None:
        """File of the calibration that holds for masks of what a query asks for; None where there is none.
        ConfigError as `Knowing.about`."""
        ...


@dataclass(frozen=True, eq=False)
class Proposal:
    """Replies to one observation, of which the best is to be taken: that of `respond` first, at least that one.

    belief: (L, L) probabilities that the places of the image, squashed to a square, belong to the object that these
    replies are about, as the policy sees it without any mask; None where it cannot say.
    """

    completions: Sequence[Completion]
    belief: np.ndarray | None = None


@runtime_checkable
class Seeing(Protocol):
    """A policy that may tell how it sees an image, so that images can be compared."""

    def features(self, image: Image) -> np.ndarray | None:
        """Mean features (F,) float32 of an image, whatever is asked of it; None where the model shows none."""
        ...


@runtime_checkable
class Proposer(Protocol):
    """A policy that can offer multiple replies to one observation; whoever asks takes the best (`proposals`)."""

    @property
    def candidates(self) -> int:
        """How many replies `propose` gives at most; 1: there is nothing to choose from."""
        ...

    def propose(self, observations: Sequence[Observation]) -> list[Proposal]:
        """One proposal per observation, in order; with multiple replies where an object is begun. Raises as
        `respond`."""
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote after one conversation.

    tokens: new tokens, the end token included. prompt_tokens: those of the conversation, image tokens included.
    finished: the model ended by itself, rather than at the limit of new tokens.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool


class LanguageModel(Protocol):
    """What runs a multimodal language model; `mllm` asks it.

    Conversations are messages as `protocol.render` makes them, each with a list of parts, in which images have the mode
    that the model reads. Raises PolicyError when it fails.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """What the model says of itself (dialect, history, ...)."""
        ...

    @property
    def parts(self) -> tuple[Any, Any]:
        """The torch model, in evaluation mode, and its processor. ConfigError where there are none."""
        ...

    @property
    def at_once(self) -> int | None:
        """The most conversations that it reads at once; None: as many as it is given."""
        ...

    def bound_images(self, least: int | None, most: int | None, usual: int | None) -> None:
        """Bound the area, in pixels, that an image is resized to. usual: the upper bound where none is given, for
        models that take any size. ConfigError for a bound that the model cannot keep."""
        ...

    def keep_readable(self) -> None:
        """Write from now on, where the model can, only what dialect "ibis" reads."""
        ...

    def write(
        self, conversations: Sequence[Sequence[Message]], limit: int, temperature: float, seed: int, draws: int
    ) -> list[Generation]:
        """`draws` replies to each conversation, of at most `limit` tokens; more than one are proposals, which a
        model may draw in its own way. temperature 0: the likeliest reply."""
        ...

    def see(self, conversation: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Of a conversation with one image: see `mllm.MllmPolicy.see`."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for records: device, numbers, versions."""
        ...


def proposals(policy: Policy, observations: Sequence[Observation]) -> list[Proposal]:
    """What `policy` offers for each of `observations`, in order. Raises as `Policy.respond`, and PolicyError where
    their numbers differ."""
    if isinstance(policy, Proposer) and policy.candidates > 1:
        found = policy.propose(observations)
    else:
        found = [Proposal([completion]) for completion in policy.respond(observations)]
    if len(found) != len(observations):
        raise PolicyError(f"policy {policy.name}: gave {len(found)} completions for {len(observations)} observations")
    return found
