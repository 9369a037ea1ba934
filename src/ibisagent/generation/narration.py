"""Episodes with thoughts: an expert's episode, retold for one question by a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibisagent.domain import Box, Case, Click, Completion, Episode, Image, Mask, Reply, Stop, Turn, Undo
from ibisagent.generation.config import Question
from ibisagent.generation.questions import final_answer
from ibisagent.generation.teacher.base import Refusal, Teacher
from ibisagent.generation.teacher.visual_facts import Scene, Sight, error_sight, first_sight, look, side_of, stop_sights
from ibisagent.protocol import write


@dataclass(frozen=True, slots=True)
class Untold:
    """A question without an episode, and why."""

    question: str
    reason: str
    detail: str = ""


class Teller:
    """Retells episodes of one picture. What is seen at each turn is measured once for all questions that share it."""

    def __init__(self, teacher: Teacher, dialect: str, cases: Mapping[str, Case], raws: Mapping[str, Episode]) -> None:
        """cases: of one picture, by id. raws: their expert's episodes, by id."""
        self._teacher, self._dialect, self._cases, self._raws = teacher, dialect, cases, raws
        self._seen: dict[str, list[tuple[Sight, ...]]] = {}

    def tell(self, questions: Sequence[Question], made_by: Mapping[str, str]) -> list[Episode | Untold]:
        """An episode for each question, in order, or why there is none. PolicyError if the teacher gives up."""
        prepared = [self._scenes(question) for question in questions]
        scenes = [scene for found in prepared if not isinstance(found, Untold) for scene in found[1]]
        thoughts = iter(self._teacher.think(scenes))
        told: list[Episode | Untold] = []
        for question, found in zip(questions, prepared, strict=True):
            if isinstance(found, Untold):
                told.append(found)
                continue
            raw, own = found
            said = [next(thoughts) for _ in own]
            refused = next((thought for thought in said if isinstance(thought, Refusal)), None)
            if refused is not None:
                told.append(Untold(question.id, f"teacher: {refused.reason}", refused.detail))
            else:
                texts = [thought for thought in said if isinstance(thought, str)]
                told.append(self._retold(question, raw, own, texts, made_by))
        return told

    def _scenes(self, question: Question) -> tuple[Episode, list[Scene]] | Untold:
        case = self._cases[question.rows[0]]
        if not question.raw:
            raw = self._in_words(question, case)
        elif question.raw in self._raws:
            raw = self._raws[question.raw]
        else:
            return Untold(question.id, "no trajectory", question.raw)
        scenes = []
        for number, (turn, sights) in enumerate(zip(raw.turns, self._sights(question, raw, case.image), strict=True)):
            reply = self._answered(turn.reply, question, case)
            scenes.append(
                Scene(
                    f"{question.id}#{number}",
                    question.query,
                    question.kind,
                    reply,
                    sights,
                    case.image,
                    turn.before,
                    question.claim,
                    question.modality,
                )
            )
        return raw, scenes

    def _in_words(self, question: Question, case: Case) -> Episode:
        """The episode of a question that needs no click."""
        image = case.image
        stop = Stop(question.answer, tuple(question.absent))
        turn = Turn(Completion(""), Reply("", (stop,)), {}, {})
        return Episode(
            question.id,
            question.query,
            image.size,
            image.sha256,
            image.source,
            {},
            (turn,),
            "stopped",
            {"policy": "oracle"},
        )

    def _answered(self, reply: Reply, question: Question, case: Case) -> Reply:
        """`reply` with the answer that fits the question."""
        if reply.stop is None:
            return reply
        truth = self._truth(question.targets[0]) if question.targets else None
        place = look(question.targets[0], case.image, truth).get("place", "") if truth is not None else ""
        return Reply("", (Stop(final_answer(question, place or "elsewhere"), reply.stop.absent),))

    def _truth(self, name: str) -> Mask:
        return next(truth for case in self._cases.values() for n, truth in (case.targets or {}).items() if n == name)

    def _sights(self, question: Question, raw: Episode, image: Image) -> list[tuple[Sight, ...]]:
        if not question.raw:
            stop = raw.turns[0].reply.stop
            return [stop_sights(stop, {}, {}) if stop is not None else ()]
        if question.raw not in self._seen:
            wrong = raw.undone_turns
            self._seen[question.raw] = [
                self._turn_sights(raw, number, number in wrong, image) for number in range(len(raw.turns))
            ]
        sights = self._seen[question.raw]
        if question.family != "inconsistency":
            return sights
        place = look(question.targets[0], image, self._truth(question.targets[0])).get("place", "")
        moment = replace(sights[0][0], moment="claim" if question.claim else "foreign", place=place)
        return [(moment,), *sights[1:]]

    def _turn_sights(self, raw: Episode, number: int, wrong: bool, image: Image) -> tuple[Sight, ...]:
        turn = raw.turns[number]
        stop = turn.reply.stop
        if stop is not None:
            return stop_sights(stop, turn.before, {name: self._truth(name) for name in turn.before})
        if any(isinstance(action, Undo) for action in turn.reply.actions):
            return (self._harm(raw.turns[number - 1]),)
        sights: list[Sight] = []
        for action in turn.reply.actions:
            if not isinstance(action, Click | Box):
                continue
            truth = self._truth(action.target)
            current = turn.before.get(action.target, truth & False)
            if wrong:
                cut = isinstance(action, Click) and not action.positive
                sights.append(Sight(action.target, "wrong", extent="cut" if cut else "", boxed=isinstance(action, Box)))
            elif not current.any():
                sights.append(first_sight(action.target, image, truth, action))
            else:
                sights.append(error_sight(action.target, image, truth, current, action))
        return tuple(sights)

    def _harm(self, turn: Turn) -> Sight:
        """What the mistake of `turn` did, as it can be seen."""
        name = next(action.target for action in turn.reply.actions if isinstance(action, Click | Box))
        truth = self._truth(name)
        before, after = turn.before.get(name, truth & False), turn.after.get(name, truth & False)
        lost, spread = before & ~after & truth, after & ~before & ~truth
        worse = lost if np.count_nonzero(lost) > np.count_nonzero(spread) else spread
        if not before.any() or not (after & truth).any():
            return Sight(name, "undo", extent="beside" if worse is spread else "lost")
        rows, columns = np.nonzero(worse)
        box_like = truth | before | after
        side = side_of(float(columns.mean()), float(rows.mean()), box_like) if rows.size else ""
        side = "" if side == "in the middle" else side
        return Sight(name, "undo", side=side, extent="lost" if worse is lost else "spread")

    def _retold(
        self,
        question: Question,
        raw: Episode,
        scenes: Sequence[Scene],
        thoughts: Sequence[str],
        made_by: Mapping[str, str],
    ) -> Episode:
        turns = []
        for turn, scene, thought in zip(raw.turns, scenes, thoughts, strict=True):
            reply = replace(scene.reply, thought=thought.strip())
            text = write(reply, raw.size, dialect=self._dialect)
            turns.append(replace(turn, completion=Completion(text), reply=reply))
        facts = {**raw.made_by, **made_by, "dialect": self._dialect, "teacher": self._teacher.name}
        return replace(raw, case_id=question.id, query=question.query, turns=tuple(turns), made_by=facts)
