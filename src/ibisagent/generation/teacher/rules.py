"""The offline teacher: sentences put together from what was measured, never from what only the ground truth tells."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from ibisagent.domain import Undo
from ibisagent.generation.teacher.base import Thought
from ibisagent.generation.teacher.phrasings import with_article
from ibisagent.generation.teacher.visual_facts import TeacherContext, VisualFacts


class RulesTeacher:
    """Needs no model and no network. The draws depend on `seed` and the context's key only."""

    name = "rules"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def think(self, contexts: Sequence[TeacherContext]) -> list[Thought]:
        """One thought for each context; there is always one."""
        return [self._thought(context) for context in contexts]

    def _thought(self, context: TeacherContext) -> str:
        digest = hashlib.sha256(f"{self._seed}:{context.key}".encode()).digest()
        draw = random.Random(int.from_bytes(digest[:8], "little"))
        visuals = context.visuals
        if not visuals:
            return _words(context, draw)
        done = [visual for visual in visuals if visual.turn_kind == "done"]
        sentences = [_done(done, draw)] if done else []
        sentences += [_SAY[visual.turn_kind](visual, context, draw) for visual in visuals if visual.turn_kind != "done"]
        return " ".join(sentence for sentence in sentences if sentence)


def _pick(draw: random.Random, *texts: str) -> str:
    return draw.choice(texts)


def _look(visual: VisualFacts) -> str:
    """What an object looks like: "a small, roundish area that is brighter than its surroundings"; "" if unknown."""
    words = ", ".join(word for word in (visual.extent, visual.shape) if word)
    tone = f" that is {visual.tone} than its surroundings" if visual.tone else ""
    if not words and not tone:
        return ""
    article = "an" if words[:1] in "aeiou" and words else "a"
    return f"{article} {words} area{tone}" if words else f"an area{tone}"


def _first(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name, look, place = visual.name, _look(visual), visual.place
    appearance = f", {look}" if look else ""
    if context.kind == "reasoning":
        opening = _pick(
            draw,
            f"That must be the {name}",
            f"The description fits the {name}",
            f"What is asked for is the {name}",
            f"I take this to mean the {name}",
            f"The question points to the {name}",
        )
    elif context.kind == "existence":
        opening = _pick(
            draw,
            f"Yes, I can see the {name}",
            f"The {name} is there",
            f"I do find {with_article(name)} here",
            f"There is indeed a {name}",
        )
    elif context.kind == "abnormality":
        opening = _pick(
            draw,
            f"I notice something abnormal, which looks like {with_article(name)}",
            f"There is a finding: the {name}",
            f"This is not normal; I take it for {with_article(name)}",
            f"One area stands out, probably {with_article(name)}",
        )
    else:
        opening = _pick(
            draw,
            f"I look for the {name}",
            f"The {name} is what I need",
            f"First I find the {name}",
            f"I search the image for the {name}",
            f"The task is to mark the {name}",
            f"Let me find the {name}",
            f"I begin with the {name}",
        )
    if place:
        where = _pick(
            draw, f"I see it {place}{appearance}", f"It lies {place}{appearance}", f"It is {place}{appearance}"
        )
    elif look:
        where = _pick(draw, f"I see it as {look}", f"It shows as {look}", f"It appears as {look}")
    else:
        where = _pick(draw, "I see where it runs", "Its outline can be followed", "I can make it out")
    if visual.boxed:
        plan = _pick(
            draw,
            "A box around all of it is a good start.",
            "I draw a box around it.",
            "I enclose it with a box.",
            "I start with a box that holds the whole of it.",
            "A box should be enough to begin with.",
        )
    else:
        middle = visual.side == "in its middle"
        plan = _pick(
            draw,
            f"I click {'into its middle' if middle else 'well inside it'}.",
            "A positive click inside it is the first step.",
            "I start with a positive click on it.",
            "One click deep inside should show the tool what I mean.",
            "I place a first positive click there.",
        )
    return f"{opening}. {where}. {plan}"


_A_LITTLE = ("A little", "A small piece", "A thin strip", "A small bit")
_PART = ("A part", "Some", "A piece", "A portion")
_MUCH = ("Much", "A good deal", "A large part", "A large piece")


def _missed(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name, side = visual.name, _at(visual)
    if visual.boxed:
        return f"I draw a box around the {name}."
    amount = draw.choice({"a little": _A_LITTLE, "a part": _PART, "much": _MUCH}.get(visual.extent, _PART))
    inside = f"{amount[0].lower()}{amount[1:]}"
    facts = (
        f"{amount} of the {name}{side} is still missing from the mask.",
        f"The mask misses {inside} of the {name}{side}.",
        f"{amount} of the {name}{side} is not covered yet.",
        f"Looking at the outline, I find {inside} of the {name}{side} left out.",
        f"{amount} of the {name}{side} has not been included.",
    )
    reasons: tuple[str, ...] = ()
    if visual.contrast == "alike":
        reasons = (
            " It is as bright as the marked part.",
            " Its brightness is that of the rest.",
            " It looks just like what is marked already.",
            "",
        )
    elif visual.contrast:
        reasons = (
            f" It is {visual.contrast} than the rest, yet belongs to it.",
            f" There the {name} is {visual.contrast}.",
            "",
        )
    plans = (
        " I add a positive click there.",
        " A positive click should bring it in.",
        " I click on it to include it.",
        " So I click positively there.",
        " One more positive click will help.",
        " I tell the tool that this spot belongs to it.",
    )
    return _one_of_each(draw, facts, reasons, plans)


def _leaked(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name, side = visual.name, _at(visual)
    amount = {"a little": "slightly ", "much": "far "}.get(visual.extent, "")
    facts: tuple[str, ...] = (
        f"The mask goes {amount}beyond the {name}{side}.",
        f"The mask leaks out of the {name}{side}.",
        f"The mask spills over the edge of the {name}{side}.",
        f"What is marked{side} is no longer the {name}.",
        f"The mask is too large{side}; that is not the {name}.",
    )
    if visual.shape == "detached":
        facts = (
            f"A separate area{side} is marked that is not the {name}.",
            f"The mask also covers a separate spot{side} that is not part of the {name}.",
            f"Something{side} apart from the {name} is marked as well.",
        )
    reasons: tuple[str, ...] = ()
    if visual.contrast in ("brighter", "darker"):
        reasons = (f" The tissue there is {visual.contrast}.", f" It is {visual.contrast} than the {name}.", "")
        if context.modality in ("endoscope", "dermoscopy"):
            reasons = (f" It is {visual.contrast} there.",)
    plans = (
        " I put a negative click there.",
        " A negative click should take it away.",
        " I exclude it with a negative click.",
        " So I click negatively there.",
        " I tell the tool that this spot does not belong to it.",
    )
    return _one_of_each(draw, facts, reasons, plans)


def _at(visual: VisualFacts) -> str:
    return f" {visual.side}" if visual.side else ""


def _one_of_each(draw: random.Random, *choices: Sequence[str]) -> str:
    """Fact, reason and plan in one text; nothing is drawn where there is no choice."""
    return "".join(draw.choice(texts) if len(texts) > 1 else "".join(texts) for texts in choices)


def _wrong(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    """Before a deliberately wrong action: what one may believe. Never trained on."""
    name = visual.name
    if visual.boxed:
        return _pick(
            draw, f"The {name} should be about here; I draw a box.", f"I think that the {name} lies in this box."
        )
    if visual.extent == "cut":
        return _pick(draw, f"I think that this spot is not the {name}.", "The mask seems to reach too far here.")
    return _pick(
        draw,
        f"I think that the {name} is here, so I click on it.",
        f"This spot looks like the {name} to me.",
        f"The {name} seems to reach as far as this.",
        f"I try a click here for the {name}.",
    )


def _undo(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name, side = visual.name, _at(visual)
    if visual.extent == "lost":
        effect = _pick(
            draw,
            f"That click was wrong: the mask has lost a part of the {name}{side}.",
            f"Now a part of the {name}{side} is gone that was right before.",
            f"My last action cut away some of the {name}{side}.",
        )
    elif visual.extent == "beside":
        effect = _pick(
            draw,
            f"That was a mistake: what is marked now is not the {name}.",
            f"The mask covers something beside the {name}.",
            f"I hit the wrong spot; the marked area is not the {name}.",
        )
    else:
        effect = _pick(
            draw,
            f"That leaked into what is not the {name}{side}.",
            f"The mask has spread beyond the {name}{side} through my last action.",
            f"My last action was wrong: the mask now runs out of the {name}{side}.",
            f"Now the mask covers more than the {name}{side}.",
        )
    steps = max([action.steps for action in context.reply.actions if isinstance(action, Undo)], default=1)
    plan = _pick(
        draw,
        " I take it back.",
        " I undo it and look again.",
        " Undo, then another way.",
        " I go back a step." if steps == 1 else " I go back.",
        " It is better to undo this.",
    )
    return effect + plan


def _done(visuals: Sequence[VisualFacts], draw: random.Random) -> str:
    names = [visual.name for visual in visuals]
    listed, are = " and the ".join(names), "is" if len(names) == 1 else "are"
    fits = "fits" if len(names) == 1 else "fit"
    masks = "mask" if len(names) == 1 else "masks"
    if any(visual.extent for visual in visuals):
        return _pick(
            draw,
            f"The {listed} {are} covered for the most part; more clicks would change little.",
            f"This is good enough for the {listed}, though not perfect.",
            f"Small flaws remain at the edge of the {listed}, but I stop here.",
            f"I am content with the {masks} of the {listed}.",
            f"More clicks would hardly improve the {masks} of the {listed}, so I stop.",
        )
    return _pick(
        draw,
        f"The {masks} now {fits} the {listed}.",
        f"The {listed} {are} covered well, and little else is marked.",
        f"The outline follows the edge of the {listed}; I stop.",
        f"I see nothing more to correct at the {listed}.",
        f"The {masks} of the {listed} {'looks' if len(names) == 1 else 'look'} right.",
        f"This is good enough for the {listed}.",
        f"The border of the {listed} is matched; no more clicks are needed.",
    )


def _absent(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name = visual.name
    return _pick(
        draw,
        f"I see no {name} here.",
        f"I find no {name} in this image.",
        f"Nothing here looks like {with_article(name)}.",
        f"I looked for {with_article(name)}, but this image does not show one.",
        f"There is no {name} to be seen, so I click nowhere for it.",
        f"No structure in this picture is {with_article(name)}.",
    )


def _unrelated(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name = visual.name
    place = f" {visual.place}" if visual.place else ""
    return _pick(
        draw,
        f"The mask that I was given does not show the {name}; it marks something else. I discard it with a negative "
        f"click and begin again on the {name}{place}.",
        f"What is marked here is not the {name}. I remove it with a negative click and click on the {name}{place}.",
        f"This start mask is of another area than the {name}. I take it away and mark the {name}{place} instead.",
        f"The given mask and the request do not go together: the {name} lies elsewhere{',' if place else ''}{place}. "
        "I drop the mask and segment again.",
    )


def _claim(visual: VisualFacts, context: TeacherContext, draw: random.Random) -> str:
    name, boxed = visual.name, "I draw a box around it" if visual.boxed else "I click on it there"
    return _pick(
        draw,
        f"I was told that the {name} is {context.claim}, but I see it {visual.place}. {boxed}.",
        f"The {name} is not {context.claim}; it lies {visual.place}. {boxed}.",
        f"The request says {context.claim}, which does not match what I see: the {name} is {visual.place}. {boxed}.",
    )


def _words(context: TeacherContext, draw: random.Random) -> str:
    return _pick(
        draw,
        "This can be answered in words; no pixels are needed.",
        "No mask is asked for, so I only look and answer.",
        "The question needs no segmentation.",
        "I can answer this from the picture without a click.",
        "Here a look is enough.",
        "I answer in words.",
    )


_SAY = {
    "first": _first,
    "missed": _missed,
    "leaked": _leaked,
    "wrong": _wrong,
    "undo": _undo,
    "absent": _absent,
    "unrelated": _unrelated,
    "claim": _claim,
}
