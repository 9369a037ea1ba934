"""What a teacher is: someone who says as text what a student could have thought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ibisagent.generation.teacher.visual_facts import TeacherContext


@dataclass(frozen=True, slots=True)
class Refusal:
    """No thought could be had; `reason` is one of few words that are counted, `detail` is for people."""

    reason: str
    detail: str = ""


Thought: TypeAlias = "str | Refusal"


class Teacher(Protocol):
    """Writes thoughts. Same context, same thought."""

    @property
    def name(self) -> str:
        """For records."""
        ...

    def think(self, contexts: Sequence[TeacherContext]) -> list[Thought]:
        """One thought, or why there is none, for each context, in order. PolicyError if no more can be had at all."""
        ...
