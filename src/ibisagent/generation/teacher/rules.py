"""The offline teacher: sentences put together from what was measured, never from what only the truth tells."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from ibisagent.domain import Undo
from ibisagent.generation.teacher.base import Thought
from ibisagent.generation.teacher.phrasings import with_article
from ibisagent.generation.teacher.visual_facts import Scene, Sight


class RulesTeacher:
    """Needs no model and no network. The draws depend on `seed` and the scene's key only."""

    name = "rules"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def think(self, scenes: Sequence[Scene]) -> list[Thought]:
        """One thought for each scene; there is always one."""
        return [self._thought(scene) for scene in scenes]

    def _thought(self, scene: Scene) -> str:
        digest = hashlib.sha256(f"{self._seed}:{scene.key}".encode()).digest()
        draw = random.Random(int.from_bytes(digest[:8], "little"))
        sights = scene.sights
        if not sights:
            return _words(scene, draw)
        done = [sight for sight in sights if sight.moment == "done"]
        sentences = [_done(done, draw)] if done else []
        sentences += [_SAY[sight.moment](sight, scene, draw) for sight in sights if sight.moment != "done"]
        return " ".join(sentence for sentence in sentences if sentence)


def _pick(draw: random.Random, *texts: str) -> str:
    return draw.choice(texts)


def _look(sight: Sight) -> str:
    """What an object looks like: "a small, roundish area that is brighter than its surroundings"; "" if unknown."""
    words = ", ".join(word for word in (sight.extent, sight.shape) if word)
    tone = f" that is {sight.tone} than its surroundings" if sight.tone else ""
    if not words and not tone:
        return ""
    article = "an" if words[:1] in "aeiou" and words else "a"
    return f"{article} {words} area{tone}" if words else f"an area{tone}"


def _first(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name, look, place = sight.name, _look(sight), sight.place
    appearance = f", {look}" if look else ""
    if scene.kind == "reasoning":
        opening = _pick(
            draw,
            f"That must be the {name}",
            f"The description fits the {name}",
            f"What is asked for is the {name}",
            f"I take this to mean the {name}",
            f"The question points to the {name}",
        )
    elif scene.kind == "existence":
        opening = _pick(
            draw,
            f"Yes, I can see the {name}",
            f"The {name} is there",
            f"I do find {with_article(name)} here",
            f"There is indeed a {name}",
        )
    elif scene.kind == "abnormality":
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
    if sight.boxed:
        plan = _pick(
            draw,
            "A box around all of it is a good start.",
            "I draw a box around it.",
            "I enclose it with a box.",
            "I start with a box that holds the whole of it.",
            "A box should be enough to begin with.",
        )
    else:
        middle = sight.side == "in its middle"
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


def _missed(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name, side = sight.name, _at(sight)
    if sight.boxed:
        return f"I draw a box around the {name}."
    amount = draw.choice({"a little": _A_LITTLE, "a part": _PART, "much": _MUCH}.get(sight.extent, _PART))
    inside = f"{amount[0].lower()}{amount[1:]}"
    facts = (
        f"{amount} of the {name}{side} is still missing from the mask.",
        f"The mask misses {inside} of the {name}{side}.",
        f"{amount} of the {name}{side} is not covered yet.",
        f"Looking at the outline, I find {inside} of the {name}{side} left out.",
        f"{amount} of the {name}{side} has not been included.",
    )
    reasons: tuple[str, ...] = ()
    if sight.contrast == "alike":
        reasons = (
            " It is as bright as the marked part.",
            " Its brightness is that of the rest.",
            " It looks just like what is marked already.",
            "",
        )
    elif sight.contrast:
        reasons = (
            f" It is {sight.contrast} than the rest, yet belongs to it.",
            f" There the {name} is {sight.contrast}.",
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


def _leaked(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name, side = sight.name, _at(sight)
    amount = {"a little": "slightly ", "much": "far "}.get(sight.extent, "")
    facts: tuple[str, ...] = (
        f"The mask goes {amount}beyond the {name}{side}.",
        f"The mask leaks out of the {name}{side}.",
        f"The mask spills over the edge of the {name}{side}.",
        f"What is marked{side} is no longer the {name}.",
        f"The mask is too large{side}; that is not the {name}.",
    )
    if sight.shape == "detached":
        facts = (
            f"A separate area{side} is marked that is not the {name}.",
            f"The mask also covers a separate spot{side} that is not part of the {name}.",
            f"Something{side} apart from the {name} is marked as well.",
        )
    reasons: tuple[str, ...] = ()
    if sight.contrast in ("brighter", "darker"):
        reasons = (f" The tissue there is {sight.contrast}.", f" It is {sight.contrast} than the {name}.", "")
        if scene.modality in ("endoscope", "dermoscopy"):
            reasons = (f" It is {sight.contrast} there.",)
    plans = (
        " I put a negative click there.",
        " A negative click should take it away.",
        " I exclude it with a negative click.",
        " So I click negatively there.",
        " I tell the tool that this spot does not belong to it.",
    )
    return _one_of_each(draw, facts, reasons, plans)


def _at(sight: Sight) -> str:
    return f" {sight.side}" if sight.side else ""


def _one_of_each(draw: random.Random, *choices: Sequence[str]) -> str:
    """Fact, reason and plan in one text; nothing is drawn where there is no choice."""
    return "".join(draw.choice(texts) if len(texts) > 1 else "".join(texts) for texts in choices)


def _wrong(sight: Sight, scene: Scene, draw: random.Random) -> str:
    """Before a deliberately wrong action: what one may believe. Never trained on."""
    name = sight.name
    if sight.boxed:
        return _pick(
            draw, f"The {name} should be about here; I draw a box.", f"I think that the {name} lies in this box."
        )
    if sight.extent == "cut":
        return _pick(draw, f"I think that this spot is not the {name}.", "The mask seems to reach too far here.")
    return _pick(
        draw,
        f"I think that the {name} is here, so I click on it.",
        f"This spot looks like the {name} to me.",
        f"The {name} seems to reach as far as this.",
        f"I try a click here for the {name}.",
    )


def _undo(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name, side = sight.name, _at(sight)
    if sight.extent == "lost":
        effect = _pick(
            draw,
            f"That click was wrong: the mask has lost a part of the {name}{side}.",
            f"Now a part of the {name}{side} is gone that was right before.",
            f"My last action cut away some of the {name}{side}.",
        )
    elif sight.extent == "beside":
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
    steps = max([action.steps for action in scene.reply.actions if isinstance(action, Undo)], default=1)
    plan = _pick(
        draw,
        " I take it back.",
        " I undo it and look again.",
        " Undo, then another way.",
        " I go back a step." if steps == 1 else " I go back.",
        " It is better to undo this.",
    )
    return effect + plan


def _done(sights: Sequence[Sight], draw: random.Random) -> str:
    names = [sight.name for sight in sights]
    listed, are = " and the ".join(names), "is" if len(names) == 1 else "are"
    fits = "fits" if len(names) == 1 else "fit"
    masks = "mask" if len(names) == 1 else "masks"
    if any(sight.extent for sight in sights):
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


def _absent(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name = sight.name
    return _pick(
        draw,
        f"I see no {name} here.",
        f"I find no {name} in this image.",
        f"Nothing here looks like {with_article(name)}.",
        f"I looked for {with_article(name)}, but this image does not show one.",
        f"There is no {name} to be seen, so I click nowhere for it.",
        f"No structure in this picture is {with_article(name)}.",
    )


def _foreign(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name = sight.name
    place = f" {sight.place}" if sight.place else ""
    return _pick(
        draw,
        f"The mask that I was given does not show the {name}; it marks something else. I discard it with a negative "
        f"click and begin again on the {name}{place}.",
        f"What is marked here is not the {name}. I remove it with a negative click and click on the {name}{place}.",
        f"This start mask is of another area than the {name}. I take it away and mark the {name}{place} instead.",
        f"The given mask and the request do not go together: the {name} lies elsewhere{',' if place else ''}{place}. "
        "I drop the mask and segment again.",
    )


def _claim(sight: Sight, scene: Scene, draw: random.Random) -> str:
    name, boxed = sight.name, "I draw a box around it" if sight.boxed else "I click on it there"
    return _pick(
        draw,
        f"I was told that the {name} is {scene.claim}, but I see it {sight.place}. {boxed}.",
        f"The {name} is not {scene.claim}; it lies {sight.place}. {boxed}.",
        f"The request says {scene.claim}, which does not match what I see: the {name} is {sight.place}. {boxed}.",
    )


def _words(scene: Scene, draw: random.Random) -> str:
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
    "foreign": _foreign,
    "claim": _claim,
}
