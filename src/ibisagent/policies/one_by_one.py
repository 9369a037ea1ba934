"""How a policy with a vocabulary answers: one object after another, each by the name that it learned, told by the
user's own.

The policy itself is only ever asked for one object that it learned by name, or for one that it never heard of. What it
writes is told again in the sentences that it was taught, with the name that the user wrote: no answer names an object
that was not asked for. All of this follows from the observation alone, so it holds no state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import cv2
import numpy as np

from ibisagent.domain import Box, Click, Completion, Image, Mask, Observation, Reply, Stop, Undo, standing
from ibisagent.imaging.clicks import bounding_box, next_click
from ibisagent.policies.base import Proposal
from ibisagent.policies.vocabulary import Asked, Look, Vocabulary
from ibisagent.protocol import parse, write
from ibisagent.query import Request, target_of

FIRST_THOUGHT = "I look for the {}."
MISSED = "A part of the {} is missing."
LEAKED = "The mask goes beyond the {}."
DONE = "The mask fits the {}."
NOT_THERE = "I see no {} here."
TEXT_ONLY = "No pixels are needed."
TAKEN_BACK = "That was wrong."
SEGMENTED = "The {} is segmented."
ABSENT_HERE = "There is no {} here."

MAX_TURNS_OF_ONE = 5  # for each of multiple objects, where the policy states no limit

INSIDE = 0.5  # probability: what of a map is a draft
_NOTHING = np.zeros((1, 1), dtype=bool)

Answering = Generator[Observation, Completion, Completion]
"""Yields what to ask the model, is sent what it wrote, returns the completion for the observation."""
Looking = Callable[[Image, str], Look]
"""What the model sees in an image of the object that a query asks for."""


class OneByOne:
    """A policy that is asked for one object after another, where it has a vocabulary. A subclass writes and looks."""

    dialect: str
    batch_size: int
    max_turns: int | None
    vocabulary: Vocabulary | None

    def write(self, observations: Sequence[Observation]) -> list[Completion]:
        """What the model writes of each observation, whose query is as `sentence_for` or the user's own."""
        raise NotImplementedError

    def look(self, image: Image, query: str) -> Look:
        """What the model sees of one object, without any mask; where there is a vocabulary."""
        raise NotImplementedError

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """One completion per observation, in order.

        ConfigError for a query that does not settle what is asked for, PolicyError when the model fails.
        """
        vocabulary, limit = self.vocabulary, self.max_turns or MAX_TURNS_OF_ONE
        if vocabulary is None:
            return self.write(observations)
        answers = [answering(one, vocabulary, self.look, self.dialect, limit) for one in observations]
        size = self.batch_size  # what is looked at is written about while the model still has its reading
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        return [completion for batch in batches for completion in self._answered(batch)]

    def refine(self, observation: Observation) -> list[Completion]:
        """First turns to try where a mask was brought, see `refinements`; none where there is no choice.

        Raises as `respond`.
        """
        if self.vocabulary is None:
            return []
        found = refinements(observation, self.vocabulary, self.look, self.dialect)
        return [] if found is None else [found[0], *self._answered([found[1]])]

    def about(self, image: Image, query: str) -> tuple[Asked, ...]:
        """What is known of the objects that a query asks for, before any turn; none where no object is named, or the
        model declares no names. ConfigError as `respond`."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            return ()
        requests = understood(image, query, vocabulary, self.look)
        return tuple(vocabulary.asked(one, self.look(image, sentence_for(one))) for one in requests)

    def believe(self, image: Image, query: str) -> dict[str, np.ndarray]:
        """Where each object that a query asks for seems to be, by its name, see `Proposal.belief`; none where no object
        is named, or the model declares no names. ConfigError as `respond`."""
        return {} if self.vocabulary is None else beliefs(image, query, self.vocabulary, self.look)

    def propose(self, observations: Sequence[Observation]) -> list[Proposal]:
        """What `respond` gives for each observation, and where an object is begun one reply more, see `proposed`."""
        said, vocabulary = self.respond(observations), self.vocabulary
        if vocabulary is None:
            return [Proposal([completion]) for completion in said]
        return [
            proposed(observation, completion, vocabulary, self.look, self.dialect)
            for observation, completion in zip(observations, said, strict=True)
        ]

    def _answered(self, answers: Sequence[Answering]) -> list[Completion]:
        """Run them to their ends, asking the model for all that wait at once."""
        done: dict[int, Completion] = {}
        waiting: dict[int, Observation] = {}
        said: dict[int, Completion | None] = dict.fromkeys(range(len(answers)))
        while said:
            for number, completion in said.items():
                try:
                    answer = answers[number]
                    waiting[number] = next(answer) if completion is None else answer.send(completion)
                except StopIteration as end:
                    done[number] = end.value
            said = dict(zip(waiting, self.write(list(waiting.values())), strict=True)) if waiting else {}
            waiting = {}
        return [done[number] for number in range(len(answers))]


def answering(observation: Observation, vocabulary: Vocabulary, look: Looking, dialect: str, limit: int) -> Answering:
    """The policy's next reply. limit: most turns for each object where there is more than one.

    Raises ConfigError where a query does not settle what is asked for.
    """
    asked = understood(observation.image, observation.query, vocabulary, look)
    if not asked:
        return (yield observation)
    size = observation.image.size
    begun = _begun(observation, asked)
    for number, request in enumerate(asked[begun:], begun):
        own, target = _about(observation, asked, request, begun == number)
        first = not own.turns and not any(mask.any() for mask in own.masks.values())
        if first and vocabulary.refuses(request, look(own.image, own.query)):
            continue
        if len(asked) > 1 and len(own.turns) >= limit:
            continue
        completion = yield own
        reply = parse(completion.text, size, dialect=dialect, default_target=target)
        if reply.problem is not None:
            return completion
        said = _within(_told(reply, request.name, target, own), own, target)
        if len(asked) > 1 and said.stop is not None and said.prompts:  # it ends this object's part, not the episode
            said = replace(said, actions=said.actions[:-1])
        if len(asked) > 1 and (said.stop is not None or _says_nothing_new(said, observation)):
            continue
        if said == reply and target == target_of(observation.query):
            return completion
        return replace(completion, text=write(said, size, dialect=dialect))
    return Completion(write(_end(observation, asked), size, dialect=dialect))


def beliefs(image: Image, query: str, vocabulary: Vocabulary, look: Looking) -> dict[str, np.ndarray]:
    """Of each object that a query asks for, by its name, where the model believes it to be, see `Proposal.belief`."""
    asked = understood(image, query, vocabulary, look)
    return {one.name: 1 / (1 + np.exp(-look(image, sentence_for(one)).region)) for one in asked}


def proposed(
    observation: Observation, said: Completion, vocabulary: Vocabulary, look: Looking, dialect: str
) -> Proposal:
    """What `answering` gave, and where that begins an object another way to begin it; with what the policy believes of
    the object that it prompts for.

    The other way: the clicks alone, on what the policy's map of the object shows, as a draft. A click and a box say
    little of vessels, membranes or twenty nuclei; the map shows them (docs/experiments).
    """
    size = observation.image.size
    reply = parse(said.text, size, dialect=dialect, default_target=target_of(observation.query))
    targets = {prompt.target for prompt in reply.prompts}
    believed = beliefs(observation.image, observation.query, vocabulary, look)
    if len(targets) != 1 or not believed:
        return Proposal([said])
    [target] = targets
    belief = believed.get(target, next(iter(believed.values())))  # a mask that was brought has a name of its own
    prompted = any(prompt.target == target for prompt in standing(observation.turns))
    if prompted or reply.prompts != reply.actions or observation.masks.get(target, _NOTHING).any():
        return Proposal([said], belief)

    clicks = tuple(action for action in reply.actions if isinstance(action, Click))
    inside = cv2.resize(belief.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) > INSIDE
    if not clicks or not inside.any():
        return Proposal([said], belief)
    drafted = write(replace(reply, actions=clicks), size, dialect=dialect)
    return Proposal([said, Completion(drafted, drafts={target: inside})], belief)


def refinements(
    observation: Observation, vocabulary: Vocabulary, look: Looking, dialect: str
) -> tuple[Completion, Answering] | None:
    """Two first turns where a mask was brought for the one object that is asked for; None where there is none.

    The first one trusts the mask's place and not its outline, the second one looks for the object afresh.
    """
    asked = understood(observation.image, observation.query, vocabulary, look)
    if len(asked) != 1 or observation.turns or not any(mask.any() for mask in observation.masks.values()):
        return None
    own, target = _about(observation, asked, asked[0], True)
    if not own.masks:
        return None
    from_mask = _from_start_mask(own, asked[0].name, target, look)
    afresh = _afresh(replace(own, masks={}), asked[0].name, target, dialect)
    return Completion(write(from_mask, own.image.size, dialect=dialect)), afresh


def _afresh(own: Observation, name: str, target: str, dialect: str) -> Answering:
    completion = yield own
    reply = parse(completion.text, own.image.size, dialect=dialect, default_target=target)
    if reply.problem is not None:
        return completion
    return replace(completion, text=write(_told(reply, name, target, own), own.image.size, dialect=dialect))


def understood(image: Image, query: str, vocabulary: Vocabulary, look: Looking) -> tuple[Request, ...]:
    """The objects that a query asks for in an image."""
    return vocabulary.requests(query, lambda: look(image, query).kinds)


def _begun(observation: Observation, asked: tuple[Request, ...]) -> int:
    """Which of the objects the policy is at: the last that was prompted, else the first."""
    prompted = [prompt.target for turn in observation.turns for prompt in turn.reply.prompts]
    numbers = [number for number, request in enumerate(asked) if request.name in prompted]
    return max(numbers, default=0)


def _about(
    observation: Observation, asked: tuple[Request, ...], request: Request, at_it: bool
) -> tuple[Observation, str]:
    """What the model is to see for one object, and the target that it is: the masks and turns about it, and a query
    with the name that the model learned."""
    query, masks = sentence_for(request), observation.masks
    names = (request.name, target_of(observation.query))  # the second is what a brought mask is called
    target = next((name for name in names if name in masks), request.name)
    turns = observation.turns
    if len(asked) > 1:
        about = [any(prompt.target == target for prompt in turn.reply.prompts) for turn in turns]
        turns = turns[about.index(True) :] if at_it and any(about) else ()
    own = {target: masks[target]} if target in masks else {}
    return replace(observation, query=query, masks=own, turns=turns), target


def sentence_for(request: Request) -> str:
    """What the model is asked for one object: in the words that it was taught most, so that a bare name, a question and
    another language ask for the same."""
    return f"Segment the {request.asked}."


def _told(reply: Reply, name: str, target: str, seen: Observation) -> Reply:
    """A reply in the sentences that the policy was taught, about the object of this name, and for this target."""
    actions = [replace(one, target=target) if isinstance(one, Click | Box) else one for one in reply.actions]
    stop, prompts = reply.stop, reply.prompts
    if stop is not None and stop.absent:
        return Reply(NOT_THERE.format(name), (*actions[:-1], Stop(ABSENT_HERE.format(name), (name,))))
    if stop is not None:
        return Reply(DONE.format(name), (*actions[:-1], Stop(SEGMENTED.format(name))))
    if not prompts:
        return Reply(TAKEN_BACK, tuple(actions))
    started = any(mask.any() for mask in seen.masks.values())
    first = prompts[0]
    thought = FIRST_THOUGHT if not started else LEAKED if isinstance(first, Click) and not first.positive else MISSED
    return Reply(thought.format(name), tuple(actions))


def _within(reply: Reply, own: Observation, target: str) -> Reply:
    """The reply without what an Undo would take back of other objects."""
    given = sum(prompt.target == target for prompt in standing(own.turns))
    actions = [Undo(min(one.steps, max(given, 1))) if isinstance(one, Undo) else one for one in reply.actions]
    return replace(reply, actions=tuple(actions))


def _says_nothing_new(reply: Reply, observation: Observation) -> bool:
    stand = standing(observation.turns)
    return bool(reply.prompts) and all(prompt in stand for prompt in reply.prompts)


def _end(observation: Observation, asked: tuple[Request, ...]) -> Reply:
    """The stop after the last object."""
    there = [request.name for request in asked if observation.masks.get(request.name, _NOTHING).any()]
    absent = tuple(request.name for request in asked if request.name not in there)
    sentences = [(SEGMENTED if request.name in there else ABSENT_HERE).format(request.name) for request in asked]
    thoughts = [*(DONE.format(name) for name in there), *(NOT_THERE.format(name) for name in absent)]
    return Reply(" ".join(thoughts), (Stop(" ".join(sentences), absent),))


def _from_start_mask(own: Observation, name: str, target: str, look: Looking) -> Reply:
    """Begin where a mask that was brought and the policy's own map of the object agree, in the box around the mask."""
    brought: Mask = own.masks[target]
    height, width = own.image.size
    region = cv2.resize(look(own.image, own.query).region, (width, height), interpolation=cv2.INTER_LINEAR)
    agreed = brought & (region > 0)
    nothing = np.zeros_like(brought)
    click = next_click(agreed if agreed.any() else brought, nothing, target)
    box = bounding_box(brought, target)
    assert click is not None  # noqa: S101 - the mask is not empty
    assert box is not None  # noqa: S101
    return Reply(FIRST_THOUGHT.format(name), (click, box))
