"""Episodes with thoughts: an expert's episode, retold for one question by a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ibisagent.domain import Box, Case, Click, Completion, Episode, Image, Mask, Reply, Stop, Turn, Undo
from ibisagent.generation.config import Question
from ibisagent.generation.questions import final_answer
from ibisagent.generation.teacher.base import Refusal, Teacher
from ibisagent.generation.teacher.visual_facts import (
    TeacherContext,
    VisualFacts,
    error_facts,
    first_facts,
    object_facts,
    side_of,
    stop_facts,
)
from ibisagent.protocol import write


@dataclass(frozen=True, slots=True)
class Rejected:
    """A question without an episode, and why."""

    question: str
    reason: str
    detail: str = ""


class Narrator:
    """Retells episodes of one image. What is seen at each turn is measured once for all questions that share it."""

    def __init__(
        self, teacher: Teacher, dialect: str, cases: Mapping[str, Case], experts: Mapping[str, Episode]
    ) -> None:
        """cases: of one image, by id. experts: their expert's episodes, by id."""
        self._teacher, self._dialect, self._cases, self._experts = teacher, dialect, cases, experts
        self._seen: dict[str, list[tuple[VisualFacts, ...]]] = {}

    def narrate(self, questions: Sequence[Question], provenance: Mapping[str, str]) -> list[Episode | Rejected]:
        """An episode for each question, in order, or why there is none. PolicyError if the teacher gives up."""
        prepared = [self._contexts(question) for question in questions]
        contexts = [context for found in prepared if not isinstance(found, Rejected) for context in found[1]]
        thoughts = iter(self._teacher.think(contexts))
        narrated: list[Episode | Rejected] = []
        for question, found in zip(questions, prepared, strict=True):
            if isinstance(found, Rejected):
                narrated.append(found)
                continue
            expert, own = found
            said = [next(thoughts) for _ in own]
            refused = next((thought for thought in said if isinstance(thought, Refusal)), None)
            if refused is not None:
                narrated.append(Rejected(question.id, f"teacher: {refused.reason}", refused.detail))
            else:
                texts = [thought for thought in said if isinstance(thought, str)]
                narrated.append(self._retold(question, expert, own, texts, provenance))
        return narrated

    def _contexts(self, question: Question) -> tuple[Episode, list[TeacherContext]] | Rejected:
        case = self._cases[question.rows[0]]
        if not question.expert:
            expert = self._text_only(question, case)
        elif question.expert in self._experts:
            expert = self._experts[question.expert]
        else:
            return Rejected(question.id, "no trajectory", question.expert)
        contexts = []
        for number, (turn, visuals) in enumerate(
            zip(expert.turns, self._visuals(question, expert, case.image), strict=True)
        ):
            reply = self._answered(turn.reply, question, case)
            contexts.append(
                TeacherContext(
                    f"{question.id}#{number}",
                    question.query,
                    question.kind,
                    reply,
                    visuals,
                    case.image,
                    turn.before,
                    question.claim,
                    question.modality,
                )
            )
        return expert, contexts

    def _text_only(self, question: Question, case: Case) -> Episode:
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
        ground_truth = self._ground_truth(question.targets[0]) if question.targets else None
        place = (
            object_facts(question.targets[0], case.image, ground_truth).get("place", "")
            if ground_truth is not None
            else ""
        )
        return Reply("", (Stop(final_answer(question, place or "elsewhere"), reply.stop.absent),))

    def _ground_truth(self, name: str) -> Mask:
        return next(
            ground_truth
            for case in self._cases.values()
            for n, ground_truth in (case.targets or {}).items()
            if n == name
        )

    def _visuals(self, question: Question, expert: Episode, image: Image) -> list[tuple[VisualFacts, ...]]:
        if not question.expert:
            stop = expert.turns[0].reply.stop
            return [stop_facts(stop, {}, {}) if stop is not None else ()]
        if question.expert not in self._seen:
            wrong = expert.undone_turns
            self._seen[question.expert] = [
                self._turn_visuals(expert, number, number in wrong, image) for number in range(len(expert.turns))
            ]
        visuals = self._seen[question.expert]
        if question.family != "inconsistency":
            return visuals
        place = object_facts(question.targets[0], image, self._ground_truth(question.targets[0])).get("place", "")
        turn_kind = replace(visuals[0][0], turn_kind="claim" if question.claim else "unrelated", place=place)
        return [(turn_kind,), *visuals[1:]]

    def _turn_visuals(self, expert: Episode, number: int, wrong: bool, image: Image) -> tuple[VisualFacts, ...]:
        turn = expert.turns[number]
        stop = turn.reply.stop
        if stop is not None:
            return stop_facts(stop, turn.before, {name: self._ground_truth(name) for name in turn.before})
        if any(isinstance(action, Undo) for action in turn.reply.actions):
            return (self._harm(expert.turns[number - 1]),)
        visuals: list[VisualFacts] = []
        for action in turn.reply.actions:
            if not isinstance(action, Click | Box):
                continue
            ground_truth = self._ground_truth(action.target)
            current = turn.before.get(action.target, ground_truth & False)
            if wrong:
                cut = isinstance(action, Click) and not action.positive
                visuals.append(
                    VisualFacts(action.target, "wrong", extent="cut" if cut else "", boxed=isinstance(action, Box))
                )
            elif not current.any():
                visuals.append(first_facts(action.target, image, ground_truth, action))
            else:
                visuals.append(error_facts(action.target, image, ground_truth, current, action))
        return tuple(visuals)

    def _harm(self, turn: Turn) -> VisualFacts:
        """What the mistake of `turn` did, as it can be seen."""
        name = next(action.target for action in turn.reply.actions if isinstance(action, Click | Box))
        ground_truth = self._ground_truth(name)
        before, after = turn.before.get(name, ground_truth & False), turn.after.get(name, ground_truth & False)
        lost, spread = before & ~after & ground_truth, after & ~before & ~ground_truth
        worse = lost if np.count_nonzero(lost) > np.count_nonzero(spread) else spread
        if not before.any() or not (after & ground_truth).any():
            return VisualFacts(name, "undo", extent="beside" if worse is spread else "lost")
        rows, columns = np.nonzero(worse)
        box_like = ground_truth | before | after
        side = side_of(float(columns.mean()), float(rows.mean()), box_like) if rows.size else ""
        side = "" if side == "in the middle" else side
        return VisualFacts(name, "undo", side=side, extent="lost" if worse is lost else "spread")

    def _retold(
        self,
        question: Question,
        expert: Episode,
        contexts: Sequence[TeacherContext],
        thoughts: Sequence[str],
        provenance: Mapping[str, str],
    ) -> Episode:
        turns = []
        for turn, context, thought in zip(expert.turns, contexts, thoughts, strict=True):
            reply = replace(context.reply, thought=thought.strip())
            text = write(reply, expert.size, dialect=self._dialect)
            turns.append(replace(turn, completion=Completion(text), reply=reply))
        facts = {**expert.provenance, **provenance, "dialect": self._dialect, "teacher": self._teacher.name}
        return replace(expert, case_id=question.id, query=question.query, turns=tuple(turns), provenance=facts)
