"""A taught agent: experts that answer for the names that they were taught, and a base policy for everything else.

Its folder, which `training.teach` writes:

    agent.json    what taught it, which names each expert answers for, and which policy is the base
    README.md     the same for people
    experts/N/    the weights of an expert, a normal ibis-nano; with reliability.json where enough was checked: how sure
                  its masks are (`evaluation.reliability`)
    base/         the base policy, where it was a folder of an ibis-nano; the packaged one is named only
    adapter/      of a large model, a PEFT adapter for the base in place of experts

So what the base knew it still knows: for a name that no expert answers for, every reply is the base's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibisagent.errors import PolicyError
from ibisagent.files import one_line, reading
from ibisagent.policies.vocabulary import Vocabulary

AGENT_FILE, EXPERTS, BASE, ADAPTER = "agent.json", "experts", "base", "adapter"
CALIBRATION = "reliability.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Expert:
    """Weights of an agent, in `folder`, and the names that they answer for."""

    folder: Path
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agent:
    """What `agent.json` says. base: the policy that answers for every other name, as `load_policy` takes it; adapter: a
    PEFT folder for it. records: what taught the agent, oldest first, as `training.teach` records it."""

    base: str
    experts: tuple[Expert, ...]
    adapter: Path | None
    records: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, folder: Path) -> Agent:
        """The agent in `folder`. PolicyError for a damaged or incomplete one, and for one of another version."""
        path = folder / AGENT_FILE
        with reading(path, "copy the folder again, or teach anew", PolicyError):
            said = json.loads(path.read_bytes())
            if said["schema"] != SCHEMA:
                raise PolicyError(f"{path}: has schema {said['schema']!r}, this version reads {SCHEMA}: teach it again")
            return cls(
                str(folder / BASE) if said["base"] == BASE else str(said["base"]),
                tuple(_expert(folder, one["folder"], one["names"]) for one in said["experts"]),
                folder / said["adapter"] if said["adapter"] else None,
                tuple(dict(one) for one in said["records"]),
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All that its experts answer for."""
        return tuple(name for expert in self.experts for name in expert.names)


def _expert(folder: Path, place: str, names: Sequence[str]) -> Expert:
    """An expert of the agent in `folder`. ValueError where it is not there, or never learned what it is to answer for:
    the copy is incomplete, or of two agents."""
    vocabulary = Vocabulary.read(folder / place)
    unknown = [name for name in names if vocabulary is None or name not in vocabulary.learned]
    if unknown:
        raise ValueError(f"{place} never learned '{one_line(unknown[0])}'" if vocabulary else f"{place} holds no names")
    return Expert(folder / place, tuple(names))
