"""A user and an agent on one image by turns: the object behind every face of the package."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from ibisagent.domain import (
    Action,
    Box,
    Case,
    Click,
    Completion,
    Episode,
    Mask,
    Masks,
    Observation,
    Reply,
    Stop,
    Turn,
    Undo,
    check_masks,
    check_query,
    same_masks,
    standing,
    standing_by_turn,
)
from ibisagent.environment import PromptState, package_version, read_reply, stop_reason, turn_limit
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import make_folder, png_bytes, reading, write_whole
from ibisagent.imaging.images import read_image
from ibisagent.imaging.masks import encode_rle
from ibisagent.inference.corrections import add_to_data_set, to_learn_from
from ibisagent.inference.image import Outputs, asked_facts, export, provenance_of
from ibisagent.inference.rounds import SESSION_FILE, Author, Round, State, Step, read_round, state_of
from ibisagent.inference.session_report import session_report
from ibisagent.policies.base import Knowing, Policy, Proposal, proposals
from ibisagent.protocol import write
from ibisagent.query import target_of
from ibisagent.segmenters import Segmenter
from ibisagent.store import EpisodeStore, write_record

MAX_STEPS = 400
"""Most turns of one session, a user's and the agent's together."""


# ------------------------------------------------------------------------------------------ a user and an agent

RunEnd = Literal["stopped", "max_turns", "malformed", "repeated", "interrupted"]
IMAGE_FILE = "image.png"
SESSION_FORMAT, SESSION_VERSION = "ibisagent session", 2


class BusyError(ConfigError):
    """Somebody else is at work in a session: the agent, or a user where none was expected."""


class Session:
    """One user, one agent, one image: ask, click, undo, hand over, export.

    - A session goes through rounds, one for each request; the agent sees the turns of its round alone. A new
      round begins with the masks that were the answer to the last one, as masks to refine. What a user does to the
      masks by hand (a brush, another name for an object, none of it any more) begins a round as well: no clicks lead
      there, and whoever goes on, user or agent, resumes from those masks.
    - Whoever acts, agent or user, acts through the same turns. A user's undo is a turn as well, so that what was
      wrong and what put it right both stay for training; `redo` takes it away again.
    - With a folder, every change is on disk before it is seen: a process that is killed loses no finished turn.

    Safe to use from multiple threads. The policy is asked outside the lock, so a user can act while it thinks; its
    reply is then dropped, as it was about masks that are no more, and a run ends ("interrupted").
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
        with reading(path, "give a folder that holds a session"):
            plain = json.loads(path.read_bytes())
            if plain["format"] != SESSION_FORMAT or plain["version"] != SESSION_VERSION:
                raise ValueError("it is of another format or version")
            image = replace(read_image(folder / IMAGE_FILE), source=str(plain["source"]))
            rounds = tuple(read_round(one, image.size, str(path)) for one in plain["rounds"])
            case = Case(str(plain["id"]), image, rounds[0].query)
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
    def answer_codes(self) -> Mapping[str, Mapping[str, Any]]:
        """The run lengths (`masks.encode_rle`) of `masks`, as the steps hold them: nothing is decoded."""
        last = self._rounds[-1]
        answer = last.episode(self.id, self.image, {})
        codes = {
            name: one["rle"]
            for name, turn in answer.answer_turns.items()
            for one in (last.plain_start if turn is None else last.steps[turn].plain_masks)
            if one["name"] == name
        }
        empty = {
            name: encode_rle(np.zeros(self.image.size, bool)) for name in answer.answer.absent if name not in codes
        }
        return {**empty, **codes}

    @property
    def state(self) -> State:
        """How far it is."""
        last = self._rounds[-1]
        by = [(step.by, step.turn.reply.stop is not None) for step in last.steps]
        return state_of(by, [step.by for step in self.steps], [one.edit for one in self._rounds])

    @property
    def edits(self) -> list[tuple[int, str]]:
        """What a user did to the masks by hand, oldest first: after how many turns, and what."""
        counts = np.cumsum([0, *(len(one.steps) for one in self._rounds)]).tolist()
        return [(before, one.edit) for before, one in zip(counts, self._rounds, strict=False) if one.edit]

    @property
    def png(self) -> bytes:
        """The image as a PNG file."""
        return png_bytes(self.image.pixels) if self.folder is None else (self.folder / IMAGE_FILE).read_bytes()

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
    def in_use(self) -> bool:
        """Whether the agent or a user acts in it just now: whoever read it from its folder then would lose the act."""
        if self._running or not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

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
        """One turn of the agent; None where a user acted meanwhile. query: a new request, see `request`.

        Raises ConfigError without a policy, while it is at work already, or where the session is full; PolicyError and
        SegmenterError when machinery fails, and then nothing has changed.
        """
        with self._at_work(query) as policy:
            asked = self._ask(policy)
        return asked[0] if asked else None

    def run(
        self,
        query: str | None = None,
        *,
        max_turns: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        expected: State | None = None,
    ) -> RunEnd:
        """Turns of the agent until it stops, has had `max_turns`, gets stuck, or a user takes over. As `ask`.

        max_turns: default the policy's own limit. on_step: called after every turn, from this thread. expected: how far
        the session is for who asks; BusyError where it is not, and nothing has changed.
        """
        turns: list[Turn] = []
        with self._at_work(query, expected) as policy:
            limit = turn_limit(policy, self.query) if max_turns is None else max_turns
            while len(turns) < limit:
                asked = self._ask(policy)
                if asked is None:
                    return "interrupted"
                step, is_new = asked
                turns.append(step.turn)
                if on_step is not None:
                    on_step(step)
                reason = stop_reason(turns, is_new, policy.dialect)
                if reason is not None:
                    return reason  # type: ignore[return-value]  # never "open"
        return "max_turns"

    def interrupt(self) -> None:
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
            last = replace(self._rounds[-1], prompt_state=None)
            if query == last.query:
                return
            earlier = (*self._rounds[:-1], last) if last.steps or last.edit else self._rounds[:-1]
            answer = self.masks
            self._undone.clear()
            self._commit((*earlier, Round(query, {name: answer[name] for name in last.masks})))

    # The user.

    def click(self, x: int, y: int, *, positive: bool = True, target: str | None = None) -> Step:
        """A user's click on pixel column `x`, row `y`: it belongs to `target`, or does not.

        target: default `self.target`. Raises ConfigError for a place outside the image, a click that stands already, or
        a ninth target; SegmenterError when the segmenter fails. Nothing has changed then.
        """
        return self._act(Click(x, y, positive, self._named(target)))

    def box(self, x0: int, y0: int, x1: int, y1: int, *, target: str | None = None) -> Step:
        """A user's box, half-open: x0 <= x < x1 and y0 <= y < y1, in pixels. Otherwise as `click`."""
        return self._act(Box(x0, y0, x1, y1, self._named(target)))

    def preview(self, x: int, y: int, *, positive: bool = True, target: str | None = None) -> Mask:
        """The mask that `click` would give, and nothing changes. Raises as `click`."""
        click = Click(x, y, positive, self._named(target))
        reply = Reply("", (click,))
        text = write(reply, self.image.size, dialect="ibis")
        with self._lock:
            prompt_state = self._prompt_state()
            self._rounds = (
                *self._rounds[:-1],
                replace(self._rounds[-1], prompt_state=prompt_state),
            )  # open now: the next is fast
        trial = prompt_state.copy()
        trial.apply_reply(Completion(text, drafts=self._corrected(click)), reply)
        if click.target not in trial.masks:
            raise ConfigError(f"'{click.target}' would be a ninth object: use one of those that there are")
        return trial.masks[click.target]

    def brush(
        self, points: Sequence[tuple[float, float]], radius: float, *, add: bool = True, target: str | None = None
    ) -> None:
        """A stroke with a round brush, which adds what it goes over to the mask of `target`, or takes it away.

        points: where it went, (x, y) in pixels, one or more; the middle of the first pixel is (0.5, 0.5). radius: in
        pixels; 0 is a single pixel. Raises ConfigError for no point, one far outside, a ninth target, or a stroke that
        changes nothing.
        """
        name = self._named(target)
        stroke = _stroke(points, radius, self.image.size)
        with self._lock:
            masks = dict(self.masks)
            before = masks.get(name, np.zeros(self.image.size, bool))
            masks[name] = before | stroke if add else before & ~stroke
            if np.array_equal(masks[name], before):
                raise ConfigError("the stroke changes nothing: it is all inside already, or all outside")
            self.edit(masks, f"{'brush' if add else 'eraser'}: {name}")

    def rename(self, target: str, name: str) -> None:
        """Call an object otherwise. ConfigError where there is none of that name, or one of the new one."""
        name = self._named(name)
        with self._lock:
            if target not in self.masks or name in self.masks:
                missing = target not in self.masks
                raise ConfigError(
                    f"there is {'no' if missing else 'already an'} object '{target if missing else name}'"
                )
            masks = {name if one == target else one: mask for one, mask in self.masks.items()}
            self.edit(masks, f"rename {target}: {name}")

    def remove(self, target: str) -> None:
        """Drop an object with its mask. ConfigError where there is none of that name."""
        with self._lock:
            if target not in self.masks:
                raise ConfigError(f"there is no object '{target}'")
            self.edit({one: mask for one, mask in self.masks.items() if one != target}, f"remove: {target}")

    def edit(self, masks: Masks, what: str) -> None:
        """Begin a round with masks that a user made by hand, each (H, W) bool; `undo` takes it back.

        what: what the user did, as text, for the record. DataError for masks that do not fit the image.
        """
        check_masks(masks, self.image.size, f"session {self.id}")
        with self._lock:
            self._check_room()
            last = replace(self._rounds[-1], prompt_state=None)
            self._commit((*self._rounds[:-1], last, Round(last.query, dict(masks), edit=what)))
            self._undone.clear()

    def accept(self, answer: str = "", absent: Sequence[str] = ()) -> Step:
        """A user says that the masks are right. absent: objects that were asked for and are not in the image."""
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

    def reset(self, *, expected: State | None = None) -> None:
        """Back to the beginning, with the latest request: no turns, and the masks that the session was opened with.

        expected: as `run` has it.
        """
        with self._lock:
            self._check_state(expected)
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
            rounds.append(one if whole else replace(one, steps=one.steps[:left], prompt_state=None))
            left -= len(one.steps)
            if left <= 0 and turn < len(self.steps):
                break
        case = Case(id or uuid.uuid4().hex, self.image, rounds[0].query)
        return Session(case, self.segmenter, self.policy, folder=folder, _rounds=tuple(rounds))

    # What comes of it.

    def episodes(self) -> list[Episode]:
        """One episode for each round; `provenance["people_turns"]` lists the turns (from 1) that a user took."""
        provenance = {"dialect": "ibis", **self.segmenter.describe(), "segmenter": self.segmenter.name}
        if self.policy is not None:
            provenance |= {"policy": self.policy.name, **provenance_of(self.policy, self.segmenter)}
        provenance["ibisagent"] = package_version()
        return [one.episode(self.id, self.image, {**provenance, **self._asked_facts(one)}) for one in self._rounds]

    def export(self, folder: str | Path, name: str) -> Outputs:
        """Masks, overlay and record of the session, as the function `export` writes them; a record for each round."""
        *earlier, last = self.episodes()
        folder = Path(folder)
        make_folder(folder)
        for number, episode in enumerate(earlier, 1):
            write_record(episode, folder / f"{name}_record-{number}.json")
        return export(last, self.image, folder, name)

    def corrections(self) -> list[Episode]:
        """The rounds that a user had a hand in, as episodes to learn from, all in the dialect "ibis".

        They end with a stop at the masks that the session shows (`Episode.answer_masks`). What was wrong and taken back
        stays, with the Undo (training masks it, see `Episode.undone_turns`). Left out are turns that could not be read
        or changed nothing, stops that a user did not leave it at, and what the agent did to an object after its answer.
        """
        return [
            to_learn_from(episode, one.steps)
            for episode, one in zip(self.episodes(), self._rounds, strict=True)
            if any(step.by == "user" for step in one.steps) or (one.edit and one is self._rounds[-1])
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
        image = add_to_data_set(folder, self.image, self.masks, self.query)
        users = [episode.provenance["people_turns"] for episode in episodes]
        EpisodeStore(folder / "episodes").append(
            [replace(episode, case_id=f"{image}#{self.target}", image_source=image) for episode in episodes],
            notes={"session": self.id, "people_turns": users},
        )
        return len(episodes)

    def report(self) -> str:
        """The session as one HTML page without scripts or outside parts: image, masks, areas, every turn."""
        return session_report(self)

    # Inside.

    @contextmanager
    def _at_work(self, query: str | None, expected: State | None = None) -> Iterator[Policy]:
        """Marks the session as asked, one at a time."""
        with self._lock:
            if self._running:
                raise BusyError("the agent is at work in this session: wait, or take over first")
            if self.policy is None:
                raise ConfigError("this session has no policy: it cannot be asked")
            self._check_state(expected)
            if query is not None:
                self.request(query)
            self._running = True
        try:
            yield self.policy
        finally:
            self._running = False

    def _check_state(self, expected: State | None) -> None:
        if expected is not None and self.state != expected:
            raise BusyError(f"this session is '{self.state}' by now, not '{expected}': somebody has worked in it")

    def _asked_facts(self, one: Round) -> dict[str, str]:
        """What the policy says of the objects of a round in which it had a turn."""
        if self.policy is None or all(step.by == "user" for step in one.steps):
            return {}
        return asked_facts(self.policy, self.image, one.query)

    def _ask(self, policy: Policy) -> tuple[Step, bool] | None:
        with self._lock:
            self._check_room()
            seen, changes = self.observation, self._changes
        completions = policy.refine(seen) if isinstance(policy, Knowing) and not seen.turns else []
        proposal = Proposal(completions) if completions else proposals(policy, [seen])[0]
        with self._lock:
            if changes != self._changes:
                return None
            target = target_of(seen.query)
            prompt_state = self._prompt_state()
            turn, is_new = prompt_state.take_best(
                proposal, lambda one: read_reply(one, self.image.size, policy.dialect, target)
            )
            return self._extend(turn, "agent", prompt_state), is_new

    def _act(self, action: Action) -> Step:
        """A user's turn."""
        with self._lock:
            self._check_room()
            reply = Reply("", (action,))
            text = write(reply, self.image.size, dialect="ibis")  # checks the action as well
            prompt_state = self._prompt_state()
            turn, is_new = prompt_state.apply_reply(Completion(text, drafts=self._corrected(action)), reply)
            if turn.reply.problem is not None:
                raise ConfigError(f"the click {turn.reply.problem}: use one of those that there are")
            if not is_new:
                raise ConfigError("this very click or box stands already: choose another place, or undo it")
            return self._extend(turn, "user", prompt_state)

    def _corrected(self, action: Action) -> Masks:
        """What a user's click or box begins from: the mask that they see of its object, where the agent prompted last.

        Then a correction counts, and not what the agent clicked before: its ten clicks would outweigh it.
        """
        if not isinstance(action, Click | Box):
            return {}
        last = self._rounds[-1]
        turns = [turn for turn, prompt in standing_by_turn(last.turns) if prompt.target == action.target]
        if not turns or last.steps[turns[-1]].by == "user":
            return {}
        mask = self.masks.get(action.target)  # decodes masks, and a preview asks at every move of the mouse
        return {} if mask is None else {action.target: mask}

    def _extend(self, turn: Turn, by: Author, prompt_state: PromptState) -> Step:
        last = self._rounds[-1].extended(turn, by, prompt_state)
        self._commit((*self._rounds[:-1], last))
        self._undone.clear()
        return last.steps[-1]

    def _prompt_state(self) -> PromptState:
        """A prompt state of its own, as the last round stands; made again from the recorded actions where need be."""
        last = self._rounds[-1]
        if last.prompt_state is not None:
            return last.prompt_state.copy()
        prompt_state = PromptState(self.image, self.segmenter, last.start)
        for turn in last.turns:
            prompt_state.apply(turn.reply.actions, turn.completion.drafts)
        if not same_masks(prompt_state.masks, last.masks):
            raise DataError(
                f"session {self.id}: its segmenter is not what it was, the clicks give other masks now;"
                " export it, and go on in a new session"
            )
        return prompt_state

    def _check_room(self) -> None:
        if len(self.steps) + len(self.edits) >= MAX_STEPS:
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
        facts = {"format": SESSION_FORMAT, "version": SESSION_VERSION, "id": self.id, "source": self.image.source}
        head = json.dumps(facts).encode("ascii").removesuffix(b"}") + b', "rounds": ['
        write_whole(head + b", ".join(one.coded for one in rounds) + b"]}", self.folder / SESSION_FILE)


def _stroke(points: Sequence[tuple[float, float]], radius: float, size: tuple[int, int]) -> Mask:
    """The pixels (H, W) that a round brush goes over."""
    height, width = size
    places = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if not len(places) or not (np.isfinite(places).all() and 0 <= radius <= max(size)):
        raise ConfigError("a stroke needs one or more points, and a radius from 0 to the image's longer side")
    if places.min() < -radius - 1 or (places > np.array([width, height]) + radius + 1).any():
        raise ConfigError(f"the stroke leaves the image of {width} x {height} pixels")
    drawn = np.zeros(size, np.uint8)
    pixels = np.floor(places).astype(np.int32)
    cv2.polylines(drawn, [pixels.reshape(-1, 1, 2)], False, 1, max(1, round(2 * radius)))
    for x, y in pixels.tolist():
        cv2.circle(drawn, (x, y), int(radius), 1, -1)
    stroke: Mask = drawn.astype(bool)
    return stroke
