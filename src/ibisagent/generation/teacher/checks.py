"""What refuses a thought: words that only someone who knows the ground truth could have, and words against the
action."""

from __future__ import annotations

import re

from ibisagent.domain import Box, Click, Mask, Masks, Reply, union
from ibisagent.imaging.clicks import bounding_box

MAX_THOUGHT_CHARS = 1200

_LEAKS = {
    "ground truth": r"ground[- ]?truth|\bgt\b|gold standard|reference (?:mask|segmentation)|true mask|annotat"
    r"|\blabels?\b|\boracle\b|expert mask|according to the mask of",
    "measure": r"\biou\b|\bdice\b|\bdsc\b|intersection over union|\b(?:fp|fn|tp)s?\b|false (?:positive|negative)|"
    r"true positive",
    "number": r"\d*\.\d+|\d+ ?%|\bper ?cent\b|\d+ ?(?:px\b|pixels?)|[(\[]\s*\d+\s*,\s*\d+\s*[)\]]",
    "instruction": r"correct next action|i (?:was|am) given the (?:action|answer)|as an ai|the teacher|"
    r"next action is|\bstudent\b",
}
_LEAK = {reason: re.compile(pattern, re.IGNORECASE) for reason, pattern in _LEAKS.items()}


def leak(thought: str) -> str | None:
    """Which kind of ground truth the thought gives away: "ground truth", "measure", "number", "instruction"; None if
    none."""
    return next((reason for reason, pattern in _LEAK.items() if pattern.search(thought)), None)


_MISSED = re.compile(
    r"\bmiss(?:es|ed|ing)?\b|not (?:yet )?(?:been )?(?:covered|included|marked)|left out|uncovered|\bincomplete\b|"
    r"\bpositive(?:ly)?\b|\bbring it in\b|\bto include\b|spot belongs",
    re.IGNORECASE,
)
_LEAKED = re.compile(
    r"\bleak|\bspill|\bbeyond\b|too (?:large|far)|\boutside\b|\bexclude|does not belong|\bnegative(?:ly)?\b|"
    r"over-?segment",
    re.IGNORECASE,
)
_FINISHED = re.compile(
    r"no more clicks|nothing (?:more|left) to correct|\bgood enough\b|\bi stop\b|(?:mask|outline) now fits",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\bundo\b|take it back|\bgo back\b|\broll(?:ed|ing)? back\b|take (?:that|this) back", re.IGNORECASE
)
_WAYS = {
    "left": re.compile(r"\bleft\b(?! out)", re.IGNORECASE),
    "right": re.compile(r"\b(?:at|on|to|of|in) (?:the |its )?(?:(?:upper|lower|far) )?right\b|"
        r"\bright (?:side|edge|end|part|border)\b",
        re.IGNORECASE,
    ),
    "up": re.compile(r"\b(?:upper|top|above)\b", re.IGNORECASE),
    "down": re.compile(r"\b(?:lower|bottom|below)\b", re.IGNORECASE),
}  # fmt: skip
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
_TOLERANCE = 0.1  # of half the extent: so far past the middle a word may still be meant loosely


def disagreement(
    thought: str, reply: Reply, masks: Masks, size: tuple[int, int], ground_truth: Masks | None = None
) -> str | None:
    """How a thought contradicts the action it goes with, in a word; None if it does not.

    masks: before the action. ground_truth: widens what "left" and "right" are measured against; without it only what is
    marked and the image count. "sign": it speaks of missed parts only and all clicks are negative, or the reverse.
    "place": it names a side, and every click lies on the opposite one, in the image and in the object. "stop": it
    says that all is done and goes on, or it stops while it speaks of errors only. "undo": it undoes without saying so,
    or says so without doing it.
    """
    names = sorted(
        {*masks, *(ground_truth or {}), *(a.target for a in reply.actions if isinstance(a, Click | Box))}, key=len
    )
    for name in reversed(names):
        thought = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "it", thought, flags=re.IGNORECASE)
    clicks = [action for action in reply.actions if isinstance(action, Click)]
    prompts = [action for action in reply.actions if isinstance(action, Click | Box)]
    undoes = not prompts and reply.stop is None
    if bool(_TAKEN_BACK.search(thought)) is not undoes:
        return "undo"
    missed, leaked = bool(_MISSED.search(thought)), bool(_LEAKED.search(thought))
    if reply.stop is not None:
        return "stop" if (missed or leaked) and not _FINISHED.search(thought) else None
    if prompts and _FINISHED.search(thought):
        return "stop"
    if clicks and missed is not leaked and all(click.positive is leaked for click in clicks):
        return "sign"
    named = [way for way, pattern in _WAYS.items() if pattern.search(thought)]
    if len(prompts) == 1 and clicks:
        object_ = union(masks, [clicks[0].target], size) | union(ground_truth or {}, [clicks[0].target], size)
        for way in named:
            if _OPPOSITE[way] not in named and not _lies(clicks[0], way, object_, size):
                return "place"
    return None


def _lies(click: Click, way: str, around: Mask, size: tuple[int, int]) -> bool:
    """Whether the click is on that side, of the image or of the extent of `around`, give or take."""
    box = bounding_box(around, "") or Box(0, 0, size[1], size[0], "")
    for frame in (box, Box(0, 0, size[1], size[0], "")):
        across = (click.x + 0.5 - (frame.x0 + frame.x1) / 2) / ((frame.x1 - frame.x0) / 2)
        down = (click.y + 0.5 - (frame.y0 + frame.y1) / 2) / ((frame.y1 - frame.y0) / 2)
        if {"left": -across, "right": across, "up": -down, "down": down}[way] > -_TOLERANCE:
            return True
    return False
