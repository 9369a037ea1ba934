"""A user and an agent on one image by turns: the object behind every face of the package."""

from __future__ import annotations

import csv
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ibisagent.domain import (
    Action,
    Box,
    Case,
    Click,
    Completion,
    Episode,
    Image,
    Mask,
    Masks,
    Observation,
    Reply,
    Standing,
    Stop,
    StopReason,
    Turn,
    Undo,
    check_query,
    stand_after,
    standing,
    standing_by_turn,
)
from ibisagent.environment import Board, package_version, read_reply, stop_reason, turn_limit
from ibisagent.errors import ConfigError, DataError, IbisError, PolicyError
from ibisagent.files import csv_text, make_folder, plain_cell, png_bytes, safe_name, write_whole
from ibisagent.imaging.images import read_image, write_mask_png
from ibisagent.imaging.masks import decode_rle
from ibisagent.inference.image import Outputs, export, provenance
from ibisagent.inference.session_report import session_report
from ibisagent.policies.base import Policy
from ibisagent.protocol import target_of, write
from ibisagent.segmenters import Segmenter
from ibisagent.store import (
    EpisodeStore,
    plain_masks,
    plain_turn,
    read_plain_masks,
    read_turn,
    write_record,
)

MAX_STEPS = 400
"""Most turns of one session, a person's and the agent's together."""


# ------------------------------------------------------------------------------------------ a person and an agent

Author = Literal["agent", "person"]
RunEnd = Literal["stopped", "max_turns", "malformed", "repeated", "taken_over"]
SESSION_FILE, IMAGE_FILE = "session.json", "image.png"
SESSION_FORMAT, SESSION_VERSION = "ibisagent session", 1
MANIFEST_NAME = "manifest.csv"
_MANIFEST_COLUMNS = ("image", "mask", "object", "query")


class BusyError(ConfigError):
    """The agent is at work in a session, and was asked once more."""


class _CodedMasks(Mapping[str, Mask]):
    """Masks that are held as run-length codes, a few hundred bytes in place of all pixels; each look decodes one."""

    def __init__(self, plain: Sequence[Mapping[str, Any]]) -> None:
        """plain: as `plain_masks` gives them."""
        self._codes = {one["name"]: one["rle"] for one in plain}

    def __getitem__(self, name: str) -> Mask:
        return decode_rle(self._codes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._codes

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


@dataclass(frozen=True, eq=False)
class Step:
    """One turn of a session, and whose it was. A person's turn is written in the dialect "ibis".

    plain: the step for the session's file; its codes are what `turn` holds as masks.
    """

    turn: Turn
    by: Author
    plain: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Round:
    """What happened about one request: the masks that it began with, and its steps.

    board: the masks with all that made them, megabytes; None where the round was read from a file or is over, until
    somebody acts again.
    """

    query: str
    start: Masks
    steps: tuple[Step, ...] = ()
    board: Board | None = None

    @property
    def masks(self) -> Masks:
        """The masks as they stand."""
        return self._left if self.board is None else self.board.masks

    @property
    def _left(self) -> Masks:
        """The same, as the steps hold them."""
        return self.steps[-1].turn.after if self.steps else self.start

    def extended(self, turn: Turn, by: Author, board: Board | None = None) -> Round:
        """The round with one more step. A session has hundreds of turns: their masks are held coded."""
        plain = {"by": by, **plain_turn(turn)}
        coded = replace(turn, before=self._left, after=_CodedMasks(plain["masks"]))
        return Round(self.query, self.start, (*self.steps, Step(coded, by, plain)), board)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the steps."""
        return tuple(step.turn for step in self.steps)

    def episode(self, session_id: str, image: Image, made_by: Mapping[str, str]) -> Episode:
        """The round as a record; its `made_by` says as well which turns (from 1) a user took."""
        users = [str(number) for number, step in enumerate(self.steps, 1) if step.by == "person"]
        stop: StopReason = "stopped" if self.steps and self.turns[-1].reply.stop else "open"
        facts = {**made_by, "people_turns": " ".join(users)}
        return Episode(
            session_id, self.query, image.size, image.sha256, image.source, self.start, self.turns, stop, facts
        )

    @cached_property
    def plain_start(self) -> list[dict[str, Any]]:
        """For the session's file."""
        return plain_masks(self.start)


class Session:
    """One person, one agent, one image: ask, click, undo, hand over, export.

    - A session goes through rounds, one for each request in words; the agent sees the turns of its round alone. A new
      round begins with the masks that were the answer to the last one, as masks to refine.
    - Whoever acts, agent or person, acts through the same turns. A person's undo is a turn as well, so that what was
      wrong and what put it right both stay for training; `redo` takes it away again.
    - With a folder, every change is on disk before it is seen: a process that is killed loses no finished turn.

    Safe to use from several threads. The policy is asked outside the lock, so a person can act while it thinks; its
    reply is then dropped, as it was about masks that are no more, and a run ends ("taken_over").
    """

    def __init__(
        self,
        case: Case,
        segmenter: Segmenter,
        policy: Policy | None = None,
        *,
        folder: str | Path | None = None,
        _rounds: tuple[Round, ...] = (),
    ) -> None:
        """case: its id names the session. policy: None where only people act. folder: where the session keeps itself.

        Raises DataError when the folder cannot be written.
        """
        self.id, self.image = case.id, case.image
        self.segmenter, self.policy = segmenter, policy
        self.folder = None if folder is None else Path(folder)
        self._rounds = _rounds or (Round(check_query(case.query), dict(case.start)),)
        self._undone: list[tuple[Round, ...]] = []
        self._changes = 0
        self._running = False
        self._lock = threading.RLock()
        if self.folder is not None and not (self.folder / SESSION_FILE).exists():
            make_folder(self.folder)
            write_whole(png_bytes(self.image.pixels), self.folder / IMAGE_FILE)
            self._save(self._rounds)

    @classmethod
    def load(cls, folder: str | Path, segmenter: Segmenter, policy: Policy | None = None) -> Session:
        """The session that keeps itself in `folder`, as it was after its last change (without what could be redone).

        Raises DataError where the folder holds no whole session.
        """
        folder = Path(folder)
        path = folder / SESSION_FILE
        try:
            plain = json.loads(path.read_bytes())
            if plain["format"] != SESSION_FORMAT or plain["version"] != SESSION_VERSION:
                raise ValueError("it is of another format or version")
            image = replace(read_image(folder / IMAGE_FILE), source=str(plain["source"]))
            rounds = tuple(_read_round(one, image.size, str(path)) for one in plain["rounds"])
            case = Case(str(plain["id"]), image, rounds[0].query)
        except IbisError:
            raise
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a folder that holds a session") from error
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            raise DataError(f"{path}: is no session, or is damaged ({error})") from error
        return cls(case, segmenter, policy, folder=folder, _rounds=rounds)

    # What there is to see.

    @property
    def query(self) -> str:
        """The request of this round."""
        return self._rounds[-1].query

    @property
    def target(self) -> str:
        """The object that a click means when it names none: the last one that was clicked, else what is asked for."""
        prompts = self.prompts
        return prompts[-1].target if prompts else target_of(self.query)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of all rounds, oldest first."""
        return tuple(step for one in self._rounds for step in one.steps)

    @property
    def masks(self) -> Masks:
        """The masks that are the answer to the latest request (`Episode.answer_masks`), by target: of what the agent
        made and nobody took back the best, and never one without a user's corrections."""
        return self._rounds[-1].episode(self.id, self.image, {}).answer_masks

    @property
    def prompts(self) -> list[Click | Box]:
        """The clicks and boxes of this round that stand, oldest first."""
        return standing(self._rounds[-1].turns)

    @property
    def can_undo(self) -> bool:
        """Whether `undo` has something to take back."""
        return len(self._rounds) > 1 or bool(self.prompts)

    @property
    def can_redo(self) -> bool:
        """Whether `redo` has something to bring back."""
        return bool(self._undone)

    @property
    def running(self) -> bool:
        """Whether the agent is at work."""
        return self._running

    @property
    def changes(self) -> int:
        """Grows with every change: who remembers it knows whether there is something new."""
        return self._changes

    @property
    def observation(self) -> Observation:
        """What the agent would see now."""
        last = self._rounds[-1]
        return Observation(self.id, self.image, last.query, last.masks, last.turns)

    # The agent.

    def ask(self, query: str | None = None) -> Step | None:
        """One turn of the agent; None where a person acted meanwhile. query: a new request, see `request`.

        Raises ConfigError without a policy, while it is at work already, or where the session is full; PolicyError and
        SegmenterError when machinery fails, and then nothing has changed.
        """
        with self._at_work(query):
            asked = self._ask()
        return asked[0] if asked else None

    def run(
        self,
        query: str | None = None,
        *,
        max_turns: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> RunEnd:
        """Turns of the agent until it stops, has had `max_turns`, gets stuck, or a person takes over. As `ask`.

        max_turns: default the policy's own limit. on_step: called after every turn, from this thread.
        """
        turns: list[Turn] = []
        with self._at_work(query) as policy:
            limit = turn_limit(policy) if max_turns is None else max_turns
            while len(turns) < limit:
                asked = self._ask()
                if asked is None:
                    return "taken_over"
                step, fresh = asked
                turns.append(step.turn)
                if on_step is not None:
                    on_step(step)
                reason = stop_reason(turns, fresh, policy.dialect)
                if reason is not None:
                    return reason  # type: ignore[return-value]  # never "open"
        return "max_turns"

    def take_over(self) -> None:
        """End the agent's run; a reply that it is still writing is dropped. To hand back, `ask` or `run` again."""
        with self._lock:
            self._changes += 1

    def discard(self) -> None:
        """End the agent's run and save no more: the folder is about to go. The session itself can still be seen."""
        with self._lock:
            self._changes += 1
            self.folder = None

    def request(self, query: str) -> None:
        """Begin a new round with another request. The same one again changes nothing. ConfigError for an empty one."""
        query = check_query(query)
        with self._lock:
            last = replace(self._rounds[-1], board=None)
            if query == last.query:
                return
            earlier = (*self._rounds[:-1], last) if last.steps else self._rounds[:-1]
            answer = self.masks
            self._undone.clear()
            self._commit((*earlier, Round(query, {name: answer[name] for name in last.masks})))

    # The person.

    def click(self, x: int, y: int, *, positive: bool = True, target: str | None = None) -> Step:
        """A person's click on pixel column `x`, row `y`: it belongs to `target`, or does not.

        target: default `self.target`. Raises ConfigError for a place outside the image, a click that stands already, or
        a ninth target; SegmenterError when the segmenter fails. Nothing has changed then.
        """
        return self._act(Click(x, y, positive, self._named(target)))

    def box(self, x0: int, y0: int, x1: int, y1: int, *, target: str | None = None) -> Step:
        """A person's box, half-open: x0 <= x < x1 and y0 <= y < y1, in pixels. Otherwise as `click`."""
        return self._act(Box(x0, y0, x1, y1, self._named(target)))

    def accept(self, answer: str = "", absent: Sequence[str] = ()) -> Step:
        """A person says that the masks are right. absent: objects that were asked for and are not in the image."""
        return self._act(Stop(answer, tuple(absent)))

    def undo(self) -> None:
        """Take back the clicks and boxes of the newest turn that has any, whoever gave them; or an empty round.

        Raises ConfigError where there is nothing to take back.
        """
        with self._lock:
            before = self._rounds
            turns = [turn for turn, _ in standing_by_turn(before[-1].turns)]
            undone = [*self._undone, before]
            if turns:
                self._act(Undo(turns.count(turns[-1])))
            elif len(before) > 1:
                self._commit(before[:-1])
            else:
                raise ConfigError("there is nothing to undo: no click stands")
            self._undone = undone

    def redo(self) -> None:
        """Bring back what the last `undo` or `reset` took away. ConfigError where there is nothing."""
        with self._lock:
            if not self._undone:
                raise ConfigError("there is nothing to redo")
            self._commit(self._undone[-1])
            self._undone.pop()

    def reset(self) -> None:
        """Back to the beginning, with the latest request: no turns, and the masks that the session was opened with."""
        with self._lock:
            before = self._rounds
            self._commit((Round(before[-1].query, before[0].start),))
            self._undone.append(before)

    def fork(self, turn: int, *, id: str | None = None, folder: str | Path | None = None) -> Session:  # noqa: A002
        """A new session on the same image that begins with the first `turn` turns of this one (0: with none).

        id: default one drawn at random. ConfigError for a turn that there is not.
        """
        rounds, left = list[Round](), turn
        everything = self._rounds
        if not 0 <= turn <= sum(len(one.steps) for one in everything):
            raise ConfigError(f"turn {turn} cannot be forked from: the session has {len(self.steps)}")
        for one in everything:
            whole = left >= len(one.steps)
            rounds.append(one if whole else Round(one.query, one.start, one.steps[:left]))
            left -= len(one.steps)
            if left <= 0:
                break
        case = Case(id or uuid.uuid4().hex, self.image, rounds[0].query)
        return Session(case, self.segmenter, self.policy, folder=folder, _rounds=tuple(rounds))

    # What comes of it.

    def episodes(self) -> list[Episode]:
        """One episode for each round; `made_by["people_turns"]` lists the turns (from 1) that a person took."""
        made_by = {"dialect": "ibis", **self.segmenter.describe(), "segmenter": self.segmenter.name}
        if self.policy is not None:
            made_by |= {"policy": self.policy.name, **provenance(self.policy, self.segmenter)}
        made_by["ibisagent"] = package_version()
        return [one.episode(self.id, self.image, made_by) for one in self._rounds]

    def export(self, folder: str | Path, name: str) -> Outputs:
        """Masks, overlay and record of the session, as the function `export` writes them; a record for each round."""
        *earlier, last = self.episodes()
        folder = Path(folder)
        make_folder(folder)
        for number, episode in enumerate(earlier, 1):
            write_record(episode, folder / f"{name}_record-{number}.json")
        return export(last, self.image, folder, name)

    def corrections(self) -> list[Episode]:
        """The rounds that a person had a hand in, as episodes to learn from, all in the dialect "ibis".

        They end with a stop at the masks that the session shows (`Episode.answer_masks`). What was wrong and taken back
        stays, with the Undo (training masks it, see `Episode.undone_turns`). Left out are turns that could not be read
        or changed nothing, stops that a user did not leave it at, and what the agent did to an object after its answer.
        """
        return [
            _to_learn_from(episode, one.steps)
            for episode, one in zip(self.episodes(), self._rounds, strict=True)
            if any(step.by == "person" for step in one.steps)
        ]

    def export_training(self, folder: str | Path) -> int:
        """Add the `corrections` to a training folder; how many there were. The session counts as accepted as it stands.

        The folder then holds the image and the final masks as a data set that `datasets.read_cases` reads (a manifest,
        for RL), and the episodes in `episodes/`, an `EpisodeStore` (for SFT), with its `image_source` inside the
        folder. One process at a time may write to it. Raises DataError when it cannot be written.
        """
        episodes = self.corrections()
        if not episodes:
            return 0
        folder = Path(folder)
        for part in ("images", "masks"):
            make_folder(folder / part)
        stem = self.image.sha256[:16]
        picture = f"images/{stem}.png"
        write_whole(png_bytes(self.image.pixels), folder / picture)
        rows = []
        for target, mask in self.masks.items():
            mask_file = ""
            if mask.any():
                mask_file = f"masks/{stem}_{safe_name(target, set())}_{_short_hash(target)}.png"
                write_mask_png(mask, folder / mask_file)
            rows.append((picture, mask_file, target, self.query))
        _add_rows(folder / MANIFEST_NAME, rows)
        people = [episode.made_by["people_turns"] for episode in episodes]
        EpisodeStore(folder / "episodes").append(
            [replace(episode, case_id=f"{picture}#{self.target}", image_source=picture) for episode in episodes],
            notes={"session": self.id, "people_turns": people},
        )
        return len(episodes)

    def report(self) -> str:
        """The session as one HTML page without scripts or outside parts: picture, masks, areas, every turn."""
        return session_report(self)

    # Inside.

    def _at_work(self, query: str | None) -> _AtWork:
        return _AtWork(self, query)

    def _ask(self) -> tuple[Step, bool] | None:
        policy = self.policy
        if policy is None:
            raise ConfigError("this session has no policy: it cannot be asked")
        with self._lock:
            self._check_room()
            seen, changes = self.observation, self._changes
        completions = policy.respond([seen])
        if len(completions) != 1:
            raise PolicyError(f"policy {policy.name}: gave {len(completions)} completions for 1 observation")
        with self._lock:
            if changes != self._changes:
                return None
            target = target_of(seen.query)
            completion, reply = read_reply(completions[0], self.image.size, policy.dialect, target)
            board = self._board()
            turn, fresh = board.take(completion, reply)
            return self._extend(turn, "agent", board), fresh

    def _act(self, action: Action) -> Step:
        """A person's turn."""
        with self._lock:
            self._check_room()
            reply = Reply("", (action,))
            text = write(reply, self.image.size, dialect="ibis")  # checks the action as well
            board = self._board()
            turn, fresh = board.take(Completion(text), reply)
            if turn.reply.problem is not None:
                raise ConfigError(f"the click {turn.reply.problem}: use one of those that there are")
            if not fresh:
                raise ConfigError("this very click or box stands already: choose another place, or undo it")
            return self._extend(turn, "person", board)

    def _extend(self, turn: Turn, by: Author, board: Board) -> Step:
        last = self._rounds[-1].extended(turn, by, board)
        self._commit((*self._rounds[:-1], last))
        self._undone.clear()
        return last.steps[-1]

    def _board(self) -> Board:
        """A board of its own, as the last round stands; made again from the recorded actions where need be."""
        last = self._rounds[-1]
        if last.board is not None:
            return last.board.copy()
        board = Board(self.image, self.segmenter, last.start)
        for turn in last.turns:
            board.apply(turn.reply.actions)
        if not _same(board.masks, last.masks):
            raise DataError(
                f"session {self.id}: its segmenter is not what it was, the clicks give other masks now;"
                " export it, and go on in a new session"
            )
        return board

    def _check_room(self) -> None:
        if len(self.steps) >= MAX_STEPS:
            raise ConfigError(f"the session is full, it has {MAX_STEPS} turns: export it, and fork or open a new one")

    def _named(self, target: str | None) -> str:
        name = self.target if target is None else " ".join(target.split())
        if not name or not name.isprintable():
            raise ConfigError("the target needs a name in one line, such as 'optic disc'")
        return name

    def _commit(self, rounds: tuple[Round, ...]) -> None:
        """Save first: what others see is on disk."""
        self._save(rounds)
        self._rounds = rounds
        self._changes += 1

    def _save(self, rounds: tuple[Round, ...]) -> None:
        if self.folder is None:
            return
        plain = {
            "format": SESSION_FORMAT,
            "version": SESSION_VERSION,
            "id": self.id,
            "source": self.image.source,
            "rounds": [
                {"query": one.query, "start": one.plain_start, "steps": [step.plain for step in one.steps]}
                for one in rounds
            ],
        }
        write_whole(json.dumps(plain).encode("ascii"), self.folder / SESSION_FILE)


class _AtWork:
    """Marks a session as asked, one at a time."""

    def __init__(self, session: Session, query: str | None) -> None:
        self._session, self._query = session, query

    def __enter__(self) -> Policy:
        session = self._session
        with session._lock:
            if session._running:
                raise BusyError("the agent is at work in this session: wait, or take over first")
            if session.policy is None:
                raise ConfigError("this session has no policy: it cannot be asked")
            if self._query is not None:
                session.request(self._query)
            session._running = True
            return session.policy

    def __exit__(self, *_: object) -> None:
        self._session._running = False


def _read_round(plain: Mapping[str, Any], size: tuple[int, int], where: str) -> Round:
    read = Round(check_query(plain["query"]), read_plain_masks(plain["start"], size, where))
    for one in plain["steps"]:
        if one["by"] not in ("agent", "person"):
            raise ValueError(f"a turn is by '{one['by']}'")
        read = read.extended(read_turn(one, read.masks, size, where), one["by"])
    return read


def _to_learn_from(episode: Episode, steps: Sequence[Step]) -> Episode:
    """The turns that led to the answer, and a stop. Its last masks are the answer: what the user saw and left it at.

    Of each target, what was given after its answer was made has no part in it and goes, and so do the steps of an Undo
    that took that back. A target's mask is made of its own prompts alone, so the masks of all others stay as they were.
    """
    made = {name: number for name, number in episode.answer_turns.items() if number is not None}
    answer = {one["name"]: one for name, at in made.items() for one in steps[at].plain["masks"] if one["name"] == name}
    stand: Standing = ()
    turns: list[Turn] = []
    users: list[int] = []
    for number, step in enumerate(steps):
        reply, before = step.turn.reply, stand
        stand = stand_after(before, number, reply.actions)
        actions = [] if stand is before else _that_count(reply.actions, number, before, made)
        if reply.stop is not None and step is steps[-1]:
            actions.append(reply.stop)
        if actions:
            reply = replace(reply, actions=tuple(actions))
            masks = [
                answer[one["name"]] if number > made.get(one["name"], number) else one for one in step.plain["masks"]
            ]
            completion = replace(step.turn.completion, text=write(reply, episode.size, dialect="ibis"))
            left = turns[-1].after if turns else episode.start
            turns.append(replace(step.turn, completion=completion, reply=reply, before=left, after=_CodedMasks(masks)))
            if step.by == "person":
                users.append(len(turns))
    if not turns or turns[-1].reply.stop is None:
        stop = Reply("", (Stop(),))
        left = turns[-1].after if turns else episode.start
        turns.append(Turn(Completion(write(stop, episode.size, dialect="ibis")), stop, left, left))
        users.append(len(turns))
    facts = {**episode.made_by, "dialect": "ibis", "people_turns": " ".join(map(str, users))}
    return replace(episode, turns=tuple(turns), stop="stopped", made_by=facts, mask_selection="last")


def _that_count(actions: Sequence[Action], number: int, stand: Standing, made: Mapping[str, int]) -> list[Action]:
    """The actions of turn `number`, up to a Stop, without prompts after the turns that `made` names for their targets.

    stand: what stood before. An Undo takes back as many fewer as there are such prompts among those that it took.
    """
    counted: list[Action] = []
    for action in actions:
        if isinstance(action, Stop):
            break
        if isinstance(action, Undo):
            taken = stand[max(0, len(stand) - action.steps) :]
            steps = sum(given <= made.get(prompt.target, given) for given, prompt in taken)
            if steps:
                counted.append(action if steps == len(taken) else Undo(steps))
        elif number <= made.get(action.target, number):
            counted.append(action)
        stand = stand_after(stand, number, (action,))
    return counted


def _add_rows(manifest: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Add rows to a manifest, in place of those about the same image and object."""
    new = {(row[0], row[2]): row for row in rows}
    kept: list[tuple[str, ...]] = []
    if manifest.exists():
        with manifest.open(newline="", encoding="utf-8") as file:
            for old in csv.DictReader(file):
                row = tuple(plain_cell(old.get(column) or "") for column in _MANIFEST_COLUMNS)
                if (row[0], row[2]) not in new:
                    kept.append(row)
    write_whole(csv_text([_MANIFEST_COLUMNS, *kept, *new.values()]).encode(), manifest)


def _short_hash(text: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, text).hex[:8]


def _same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(mask, b[name]) for name, mask in a.items())
