"""A taught agent as a policy, see `agents`: each reply is that of the one who answers for the object asked for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import Completion, Image, Observation
from ibisagent.errors import ConfigError
from ibisagent.policies import source_of
from ibisagent.policies.agents import CALIBRATION, Agent
from ibisagent.policies.following import follow
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.policies.one_by_one import OneByOne, sentence_for, understood
from ibisagent.policies.vocabulary import Look, Vocabulary
from ibisagent.protocol import write
from ibisagent.query import Request, target_of


class TaughtPolicy(OneByOne):
    """An agent with experts. Safe to call from multiple threads; raises as `MllmPolicy`."""

    def __init__(self, name: str, base: MllmPolicy, experts: Sequence[tuple[MllmPolicy, Sequence[str]]]) -> None:
        """name: how `load_policy` was asked for it. experts: each with the names that it answers for, which no other
        one does. ConfigError for a base without a vocabulary."""
        if base.vocabulary is None:
            raise ConfigError(f"{base.name}: declares no names (objects.json), so nothing can be taught beside them")
        self.name, self.dialect, self.max_turns, self.candidates = name, base.dialect, base.max_turns, base.candidates
        self.base, self.batch_size = base, base.batch_size
        self.vocabulary: Vocabulary = base.vocabulary
        self._experts = {taught: expert for expert, names in experts for taught in names}
        for expert, names in experts:
            assert expert.vocabulary is not None  # noqa: S101 - `training.teach` writes one
            self.vocabulary = self.vocabulary.with_taught(expert.vocabulary, names)
        self._by_sentence = {sentence_for(Request(name, name, True)): one for name, one in self._experts.items()}

    def write(self, observations: Sequence[Observation]) -> list[Completion]:
        """What the one that answers for each observation's object writes."""
        experts = [self._expert_for(one.query) for one in observations]
        others = iter(self.base.write([one for one, expert in zip(observations, experts, strict=True) if not expert]))
        return [
            _followed(one, expert, self.dialect) if expert else next(others)
            for one, expert in zip(observations, experts, strict=True)
        ]

    def look(self, image: Image, query: str) -> Look:
        """What the one that answers for the object sees of it."""
        return (self._expert_for(query) or self.base).look(image, query)

    def features(self, image: Image) -> np.ndarray | None:
        """As `MllmPolicy.features`, of the base."""
        return self.base.features(image)

    def calibration(self, image: Image, query: str) -> Path | None:
        """See `policies.base.Calibrated`: that of the expert that answers for all objects of a query."""
        asked = understood(image, query, self.vocabulary, self.look)
        names = [self.vocabulary.meant(one) for one in asked]
        experts = {self._experts.get(name) if name is not None else None for name in names}
        expert = experts.pop() if len(experts) == 1 else None
        path = None if expert is None else expert.folder / CALIBRATION
        return path if path is not None and path.is_file() else None

    def describe(self) -> dict[str, str]:
        """As `MllmPolicy.describe`, of the base; the hash is that of all weights, and the taught names are told."""
        facts = self.base.describe()
        models = [self.base, *dict.fromkeys(self._experts.values())]
        hashes = "".join(f"{model.describe()['policy_weights_sha256']}\n" for model in models)
        return facts | {
            "policy": self.name,
            "policy_base": self.base.name,
            "policy_taught": ", ".join(sorted(self._experts)),
            "policy_weights_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        }

    def _expert_for(self, query: str) -> MllmPolicy | None:
        """The expert that knows what a sentence of `sentence_for`, or a user's, is about; None: the base answers."""
        if (expert := self._by_sentence.get(query)) is not None:
            return expert
        asked = self.vocabulary.named(query)
        name = self.vocabulary.meant(asked) if asked is not None else None
        return self._experts.get(name) if name is not None else None


def _followed(seen: Observation, expert: MllmPolicy, dialect: str) -> Completion:
    started = time.perf_counter()
    reply = follow(seen, expert.look(seen.image, seen.query).region, target_of(seen.query))
    return Completion(write(reply, seen.image.size, dialect=dialect), None, time.perf_counter() - started)


def load_agent(folder: Path, name: str, *, adapter: str | Path | None, **options: Any) -> MllmPolicy | TaughtPolicy:
    """The agent in `folder`. options: as for `MllmPolicy`. ConfigError for another adapter, PolicyError as `Agent`."""
    agent = Agent.read(folder)
    if adapter is not None:
        raise ConfigError(f"{folder}: is a taught agent, which takes no adapter; give the adapter to its base")
    if not agent.experts:
        return MllmPolicy(source_of(agent.base), name=name, adapter=agent.adapter, **options)
    base = MllmPolicy(source_of(agent.base), name=agent.base, **options)
    experts = [(MllmPolicy(one.folder, **options), one.names) for one in agent.experts]
    return TaughtPolicy(name, base, experts)
