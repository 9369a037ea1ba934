"""What a session consists of: rounds of steps, and how far they are; as they lie in its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ibisagent.domain import Episode, Image, Mask, Masks, StopReason, Turn, check_query
from ibisagent.environment import PromptState
from ibisagent.files import reading
from ibisagent.imaging.masks import decode_rle
from ibisagent.store import plain_masks, plain_turn, read_plain_masks, read_turn

Author = Literal["agent", "user"]
State = Literal["new", "agent", "corrected", "accepted"]
"""How far a session is: nobody has acted, the agent alone has, a user has corrected it, a user has accepted it."""
SESSION_FILE = "session.json"


class CodedMasks(Mapping[str, Mask]):
    """Masks that are held as run-length codes, a few hundred bytes in place of all pixels; each look decodes one."""

    def __init__(self, coded: bytes, names: Iterable[str], part: str = "masks") -> None:
        """coded: JSON with what `plain_masks` gives for masks of these names under the key `part`."""
        self._coded, self._names, self._part = coded, tuple(names), part

    @classmethod
    def of(cls, plain: Sequence[Mapping[str, Any]]) -> CodedMasks:
        """plain: as `plain_masks` gives them."""
        return cls(json.dumps({"masks": plain}).encode("ascii"), (one["name"] for one in plain))

    def __getitem__(self, name: str) -> Mask:
        if name not in self._names:
            raise KeyError(name)
        return decode_rle(next(one["rle"] for one in json.loads(self._coded)[self._part] if one["name"] == name))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class Step:
    """One turn of a session, and whose it was. A user's turn is written in the dialect "ibis".

    coded: the step as the session's file has it, in JSON: all that is kept of its masks, as sessions have hundreds of
    steps, and servers many sessions.
    """

    turn: Turn
    by: Author
    coded: bytes

    @property
    def plain_masks(self) -> list[dict[str, Any]]:
        """The masks after it, as `store.plain_masks` gives them."""
        masks: list[dict[str, Any]] = json.loads(self.coded)["masks"]
        return masks


@dataclass(frozen=True, eq=False)
class Round:
    """What happened about one request: the masks that it began with, and its steps.

    prompt_state: the masks with all that made them, megabytes; None where the round was read from a file or is over,
    until somebody acts again. edit: what a user did to the masks by hand that the round begins with, as text; "" where
    it begins with a request.
    """

    query: str
    start: Masks
    steps: tuple[Step, ...] = ()
    prompt_state: PromptState | None = None
    edit: str = ""

    @property
    def masks(self) -> Masks:
        """The masks as they stand."""
        return self._left if self.prompt_state is None else self.prompt_state.masks

    @property
    def _left(self) -> Masks:
        """The same, as the steps hold them."""
        return self.steps[-1].turn.after if self.steps else self.start

    def extended(self, turn: Turn, by: Author, prompt_state: PromptState | None = None) -> Round:
        """The round with one more step."""
        coded = json.dumps({"by": by, **plain_turn(turn)}).encode("ascii")
        drafts = CodedMasks(coded, turn.completion.drafts, "drafts")
        held = Turn(
            replace(turn.completion, drafts=drafts),
            turn.reply,
            self._left,
            CodedMasks(coded, turn.after),
            turn.segmenter_score,
        )
        return replace(self, steps=(*self.steps, Step(held, by, coded)), prompt_state=prompt_state)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the steps."""
        return tuple(step.turn for step in self.steps)

    def episode(self, session_id: str, image: Image, provenance: Mapping[str, str]) -> Episode:
        """The round as a record; its `provenance` says as well which turns (from 1) a user took."""
        users = [str(number) for number, step in enumerate(self.steps, 1) if step.by == "user"]
        stop: StopReason = "stopped" if self.steps and self.turns[-1].reply.stop else "open"
        facts = {**provenance, "people_turns": " ".join(users)}
        if self.edit:
            facts["people_edit"] = self.edit
        return Episode(
            session_id, self.query, image.size, image.sha256, image.source, self.start, self.turns, stop, facts
        )

    @cached_property
    def plain_start(self) -> list[dict[str, Any]]:
        """The masks that it began with, as `store.plain_masks` gives them."""
        return plain_masks(self.start)

    @property
    def coded(self) -> bytes:
        """The round as the session's file has it, in JSON."""
        head = json.dumps({"query": self.query, "edit": self.edit, "start": self.plain_start}).encode("ascii")
        return head.removesuffix(b"}") + b', "steps": [' + b", ".join(step.coded for step in self.steps) + b"]}"


def read_round(plain: Mapping[str, Any], size: tuple[int, int], where: str) -> Round:
    """A round of a session's file, of an image of `size` (H, W). DataError, KeyError, ... where it is damaged."""
    start = read_plain_masks(plain["start"], size, where)
    read = Round(check_query(plain["query"]), start, edit=str(plain.get("edit", "")))
    for one in plain["steps"]:
        if one["by"] not in ("agent", "user"):
            raise ValueError(f"a turn is by '{one['by']}'")
        read = read.extended(read_turn(one, read.masks, size, where), one["by"])
    return read


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What a list of sessions says of one, read without its image. objects: names of those with a mask."""

    source: str
    query: str
    state: State
    turns: int
    objects: tuple[str, ...]


def summary_of(folder: Path) -> SessionSummary:
    """The session that keeps itself in `folder`, in short. DataError where the folder holds none."""
    path = folder / SESSION_FILE
    with reading(path, "give a folder that holds a session"):
        plain = json.loads(path.read_bytes())
        rounds = plain["rounds"]
        last = rounds[-1]
        by = [(one["by"], any(action["kind"] == "stop" for action in one["actions"])) for one in last["steps"]]
        everyone = [one["by"] for each in rounds for one in each["steps"]]
        masks = last["steps"][-1]["masks"] if last["steps"] else last["start"]
        edits = [str(each.get("edit", "")) for each in rounds]
        state = state_of(by, everyone, edits)
        return SessionSummary(
            str(plain["source"]), str(last["query"]), state, len(everyone), tuple(str(one["name"]) for one in masks)
        )


def state_of(last: Sequence[tuple[str, bool]], everyone: Sequence[str], edits: Sequence[str]) -> State:
    """last: of the last round's turns, whose each was and whether it stopped. everyone, edits: of all rounds."""
    if last and last[-1] == ("user", True):
        return "accepted"
    if "user" in everyone or any(edits):
        return "corrected"
    return "agent" if everyone else "new"
