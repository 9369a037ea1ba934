"""A policy that reads its replies from a list: the fake for tests, demonstrations and recorded sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ibisagent import protocol
from ibisagent.domain import Completion, Observation
from ibisagent.errors import DataError, PolicyError


class ScriptedPolicy:
    """Answers turn t (0-based) with reply t of its list, for every case the same or by case id."""

    def __init__(
        self, replies: Sequence[str] | Mapping[str, Sequence[str]], *, dialect: str = "ibis", name: str = "scripted"
    ) -> None:
        """replies: texts in `dialect`, in turn order; or such lists by case id. ConfigError for an unknown dialect."""
        self.name = name
        self.dialect = protocol.dialect_of(dialect).name
        self._replies = replies

    @classmethod
    def from_file(cls, path: str | Path, *, dialect: str = "ibis") -> ScriptedPolicy:
        """Read a JSON file: a list of texts, or an object of such lists by case id. DataError if it is none."""
        try:
            loaded = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSON file of replies") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON in UTF-8 ({error}); write a list of replies") from error
        lists = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
        if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
            raise DataError(f"{path}: expected a list of texts, or an object of such lists by case id")
        return cls(loaded, dialect=dialect, name=f"scripted:{path}")

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """The next reply of every observation. PolicyError where the list has ended or the case has none."""
        return [Completion(self._reply(observation)) for observation in observations]

    def _reply(self, observation: Observation) -> str:
        replies = self._replies
        texts = replies.get(observation.case_id, ()) if isinstance(replies, Mapping) else replies
        turn = len(observation.turns)
        if turn >= len(texts):
            raise PolicyError(
                f"{self.name}: has {len(texts)} replies for case {observation.case_id}, turn {turn + 1} was asked;"
                " end the list with a stop"
            )
        return texts[turn]
