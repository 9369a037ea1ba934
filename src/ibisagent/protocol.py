"""Everything that a policy reads and writes as text: prompts, images with the masks on them, and three grammars.

The only home of model-facing text, and the only place where coordinates are not integer pixels: in text they are
fractions of the image's width and height, in [0, 1]. Points are pixel centres, corners of boxes are pixel edges.
What a policy writes never raises: `parse` turns what it cannot read into a `Reply` that says why.

| dialect  | who speaks it                         | one action                                                        |
|----------|---------------------------------------|-------------------------------------------------------------------|
| paper    | the paper (figures 3 and 12)          | {"Target":"liver","Attribute":"1","Coordinate 2d":"[0.45, 0.42]"} |
| released | the public weights `qwen2_5vl-7b-RL`  | Positive Point (0.4512, 0.4238)                                   |
| ibis     | our own weights                       | click + (0.4512, 0.4238) liver                                    |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import PIL.Image

from ibisagent.domain import (
    MAX_NAME_CHARS,
    MAX_TARGETS,
    OUR_RULES,
    QUERY_PLACE,
    Action,
    Box,
    Click,
    Image,
    LoopRules,
    Masks,
    Observation,
    Reply,
    Stop,
    Turn,
    Undo,
    Wording,
)
from ibisagent.errors import ConfigError, DataError

History = Literal["none", "actions", "full"]
OverlayStyle = Literal["colour", "alpha"]
Message: TypeAlias = dict[str, Any]
Size: TypeAlias = tuple[int, int]

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "green": (34, 139, 34),  # the only one that the released weights know
        "orange": (255, 140, 0),
        "blue": (30, 100, 255),
        "magenta": (230, 0, 200),
        "yellow": (255, 235, 0),
        "cyan": (0, 220, 230),
        "red": (215, 20, 40),
        "violet": (120, 40, 190),
    }
)
OPACITY = 0.4
ALPHA_STEP = 16  # in style "alpha" the first target is 255 and each further one this much less

MAX_REPLY_CHARS = 100_000
MAX_ACTIONS = 32
MAX_UNDO = 999
MIN_DECIMALS = 4
MAX_RECALLED_CHARS = 500  # of an unreadable reply, in a full history


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of writing replies. history and style: what the models that speak it were trained with.

    system: the system prompt. boxes, undo, multiple, names: whether a reply can hold a Box, an Undo, more than one
    action, the name of each target. block: line breaks around a tag's content and between actions. image_first: in
    user turns. absent: how the sentence in the answer begins that lists absent objects; empty where the action lists
    them. read, phrase: the grammar of actions. first: the request without a mask. refine: the request once there is
    one; empty where the query stays. "{query}" stands for the query in both. rules: how an episode goes.
    """

    name: str
    system: str
    history: History
    style: OverlayStyle
    boxes: bool
    undo: bool
    multiple: bool
    names: bool
    block: bool
    image_first: bool
    absent: str
    read: Callable[[str, Size], list[Action]]
    phrase: Callable[[Action, Size], str]
    first: str = QUERY_PLACE
    refine: str = ""
    rules: LoopRules = OUR_RULES


class _UnreadableError(Exception):
    """A reply breaks the grammar; the message becomes `Reply.problem`."""


# ---------------------------------------------------------------------------------------------------------- reading


def parse(text: str, size: Size, *, dialect: str, default_target: str = "") -> Reply:
    """What a policy's `text` means on an image of `size` (H, W). Takes time linear in the text's length.

    Wanted is <think>...</think><action>...</action>, after a stop also <answer>...</answer>, in this order and each
    once; text around them is ignored, and without <think> the text before <action> is the thought. All dialects read
    "Terminate", "Termination" and "stop", in any case, and any number of decimals. A point becomes the pixel
    min(int(u * W), W - 1), a box edge round(u * W); a box keeps at least one pixel. `default_target` stands where the
    text names no object.

    Whatever the text is, nothing is raised: the reply's `problem` says in a few words what is wrong, and its actions
    are empty. ConfigError for an unknown dialect only.
    """
    speech = dialect_of(dialect)
    if len(text) > MAX_REPLY_CHARS:
        return Reply(problem=f"it is longer than {MAX_REPLY_CHARS} characters")
    thought = ""
    try:
        thought, action, answer = _sections(text)
        actions = speech.read(action.strip(), size)
        actions = [_finish(item, answer, speech, default_target) for item in actions]
        if answer is not None and not any(isinstance(item, Stop) for item in actions):
            raise _UnreadableError("an <answer> needs the action that stops")
        if fault := _fault(actions, speech):
            raise _UnreadableError(fault)
    except _UnreadableError as error:
        return Reply(thought, problem=str(error))
    return Reply(thought, tuple(actions))


_TAG = re.compile(r"</?(?:think|action|answer)>")
_TAG_ORDERS = {
    think + "<action></action>" + answer for think in ("", "<think></think>") for answer in ("", "<answer></answer>")
}


def _sections(text: str) -> tuple[str, str, str | None]:
    """Thought, action and answer of a reply; the answer is None where there is no such tag."""
    tags = list(_TAG.finditer(text))
    order = "".join(tag.group() for tag in tags)
    if "<action>" not in order:
        raise _UnreadableError("there is no <action>")
    if order not in _TAG_ORDERS:
        raise _UnreadableError(f"its tags are out of order: {_shown(order, 80)}")
    content = {start.group(): text[start.end() : end.start()] for start, end in zip(tags[::2], tags[1::2], strict=True)}
    thought = content.get("<think>", text[: tags[0].start()])
    return _plain(thought), content["<action>"], content.get("<answer>")


def _finish(action: Action, answer: str | None, speech: Dialect, default_target: str) -> Action:
    """Add what the action's own text leaves open: the default target, the answer, absent objects in the answer."""
    if isinstance(action, Click | Box):
        return action if action.target else replace(action, target=default_target)
    if isinstance(action, Undo):
        return action
    names = [name or default_target for name in action.absent]
    if speech.absent and answer is not None:
        answer, sentence, listed = answer.partition(speech.absent)
        items = _SEPARATOR.split(listed.strip().removesuffix(".")) if sentence else []
        names += [name for name in map(_plain, items) if name]
    return Stop(_plain(answer or ""), tuple(names))


def _fault(actions: Sequence[Action], speech: Dialect) -> str | None:
    """Why these actions are no reply of the dialect, in a few words; None if they are one."""
    if not actions:
        return "the action is empty"
    if len(actions) > (MAX_ACTIONS if speech.multiple else 1):
        return f"it holds more than {MAX_ACTIONS if speech.multiple else 1} actions"
    if any(isinstance(action, Stop) for action in actions[:-1]):
        return "an action follows the stop"
    for action in actions:
        if isinstance(action, Box) and not speech.boxes:
            return f"dialect {speech.name} has no Box"
        if isinstance(action, Undo) and not speech.undo:
            return f"dialect {speech.name} has no Undo"
        if isinstance(action, Undo) and action.steps > MAX_UNDO:
            return f"an Undo goes back {MAX_UNDO} steps at most"
    named = {action.target for action in actions if isinstance(action, Click | Box)}
    absent = [name for action in actions if isinstance(action, Stop) for name in action.absent]
    if max(len(named), len(absent)) > MAX_TARGETS:
        return f"it names more than {MAX_TARGETS} objects"
    if "" in absent:
        return "an absent object has no name"
    if any(len(name) > MAX_NAME_CHARS for name in (*named, *absent)):
        return f"an object's name is longer than {MAX_NAME_CHARS} characters"
    return None


def _shown(text: str, length: int = 40) -> str:
    """The beginning of a policy's text, fit for a one-line message."""
    short = " ".join(text[: 4 * length].split())
    short = short if len(short) <= length else short[:length] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # false for NaN as well
        raise _UnreadableError(f"coordinate '{_shown(text)}' is not a number from 0 to 1")
    return value


def _pixel(x: str, y: str, size: Size) -> tuple[int, int]:
    """(x, y) of the pixel that a written point lies in."""
    height, width = size
    return min(int(_fraction(x) * width), width - 1), min(int(_fraction(y) * height), height - 1)


# --------------------------------------------------------------------------------------------------- the three grammars

_POINT = r"\(\s*([^\s,()]+)\s*,\s*([^\s,()]+)\s*\)"
_STOP = re.compile(r"(?:stop|terminat(?:e|ion))\b\.?", re.IGNORECASE)
_UNDO = re.compile(r"undo(?:\s+([0-9]{1,3}))?\b(?!\s*[0-9])\.?", re.IGNORECASE)
_SEPARATOR = re.compile(r"(?<!&amp)(?<!&lt)(?<!&gt)(?<!&lpar)(?<!&semi)(?<!&colon);")  # a ";" that ends no entity
_IBIS_CLICK = re.compile(rf"click\s*([+-])\s*{_POINT}(.*)", re.IGNORECASE | re.DOTALL)
_IBIS_BOX = re.compile(rf"box\s*{_POINT}\s*{_POINT}(.*)", re.IGNORECASE | re.DOTALL)
_IBIS_ABSENT = re.compile(r"absent\b(.*)", re.IGNORECASE | re.DOTALL)
_RELEASED_CLICK = re.compile(rf"(positive|negative)\s+point\s*:?\s*{_POINT}", re.IGNORECASE)
_PAPER_POINT = re.compile(r"[\[(]?\s*([^\s,()\[\]]+)\s*,\s*([^\s,()\[\]]+)\s*[\])]?")
_PAPER_START = re.compile(r"[^\s,;]")
_PAPER_JSON = json.JSONDecoder(parse_int=float, strict=False)  # float: Python refuses integers of 4,300 digits and more


def _undo(match: re.Match[str]) -> Undo:
    steps = int(match[1] or 1)
    if steps < 1:
        raise _UnreadableError("an Undo of 0 steps")
    return Undo(steps)


def _read_ibis(text: str, size: Size) -> list[Action]:
    actions: list[Action] = []
    for item in map(str.strip, _SEPARATOR.split(text)):
        if match := _IBIS_CLICK.fullmatch(item):
            x, y = _pixel(match[2], match[3], size)
            actions.append(Click(x, y, match[1] == "+", _plain(match[4])))
        elif match := _IBIS_BOX.fullmatch(item):
            actions.append(_box(match, size))
        elif match := _UNDO.fullmatch(item):
            actions.append(_undo(match))
        elif _STOP.fullmatch(item):
            actions.append(Stop())
        elif match := _IBIS_ABSENT.fullmatch(item):
            if not (actions and isinstance(actions[-1], Stop)):
                raise _UnreadableError("'absent' comes before the stop")
            actions[-1] = Stop(absent=(*actions[-1].absent, _plain(match[1])))
        elif item:
            raise _UnreadableError(f"'{_shown(item)}' is no action")
        if len(actions) > MAX_ACTIONS or (actions and len(getattr(actions[-1], "absent", ())) > MAX_ACTIONS):
            break  # too many to be a reply, `_fault` says so
    return actions


def _box(match: re.Match[str], size: Size) -> Box:
    height, width = size
    left, top, right, bottom = (_fraction(text) for text in match.group(1, 2, 3, 4))
    if left > right or top > bottom:
        raise _UnreadableError("the box has its corners exchanged")
    x0, y0 = min(round(left * width), width - 1), min(round(top * height), height - 1)
    x1, y1 = max(round(right * width), x0 + 1), max(round(bottom * height), y0 + 1)
    return Box(x0, y0, x1, y1, _plain(match[5]))


def _phrase_ibis(action: Action, size: Size) -> str:
    match action:
        case Click():
            sign = "+" if action.positive else "-"
            return f"click {sign} {_point(action, size)} {_escape_name(action.target)}".rstrip()
        case Box():
            height, width = size
            corners = [
                f"({_decimal(x / width, width)}, {_decimal(y / height, height)})"
                for x, y in ((action.x0, action.y0), (action.x1, action.y1))
            ]
            return f"box {' '.join(corners)} {_escape_name(action.target)}".rstrip()
        case Undo():
            return f"undo {action.steps}" if action.steps > 1 else "undo"
        case Stop():
            return "; ".join(["stop", *(f"absent {_escape_name(name)}" for name in action.absent)])


def _read_released(text: str, size: Size) -> list[Action]:
    """As the public code reads: wherever it stands in the action, the stop word counts first, then the first point."""
    if _STOP.fullmatch(text) or "terminat" in text.lower():
        return [Stop()]
    if match := _RELEASED_CLICK.search(text):
        x, y = _pixel(match[2], match[3], size)
        return [Click(x, y, match[1].lower() == "positive", "")]
    raise _UnreadableError(f"'{_shown(text)}' is no action" if text else "the action is empty")


def _phrase_released(action: Action, size: Size) -> str:
    if isinstance(action, Click):
        return f"{'Positive' if action.positive else 'Negative'} Point {_point(action, size)}"
    return "Terminate" if isinstance(action, Stop) else _phrase_ibis(action, size)


def _read_paper(text: str, size: Size) -> list[Action]:
    actions: list[Action] = []
    position = 0
    while len(actions) <= MAX_ACTIONS and (start := _PAPER_START.search(text, position)):
        position = start.start()
        if start.group() in "{[":
            try:
                value, position = _PAPER_JSON.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                raise _UnreadableError("the action is not valid JSON") from error
            actions += [_triple(item, size) for item in (value if isinstance(value, list) else [value])]
        elif match := _UNDO.match(text, position):
            actions.append(_undo(match))
            position = match.end()
        elif match := _STOP.match(text, position):
            actions.append(Stop())
            position = match.end()
        else:
            raise _UnreadableError(f"'{_shown(text[position : position + 200])}' is no action")
    return actions


def _triple(value: object, size: Size) -> Click:
    """A click from {"Target": name, "Attribute": 1 or -1, "Coordinate 2d": [x, y]}; the last two may be text."""
    if not isinstance(value, dict):
        raise _UnreadableError("an action in JSON is not an object")
    fields = {key.lower(): item for key, item in value.items()}
    name, sign, point = fields.get("target", ""), fields.get("attribute"), fields.get("coordinate 2d")
    if not isinstance(name, str):
        raise _UnreadableError("'Target' is not a text")
    signs = {"1": True, "+1": True, "-1": False}
    positive = signs.get(sign.strip()) if isinstance(sign, str) else {1.0: True, -1.0: False}.get(_number(sign))
    if positive is None:
        raise _UnreadableError("'Attribute' is neither 1 nor -1")
    if isinstance(point, list):
        point = ",".join(str(_number(item)) for item in point[:3])
    match = _PAPER_POINT.fullmatch(point.strip()) if isinstance(point, str) else None
    if match is None:
        raise _UnreadableError("'Coordinate 2d' is not [x, y]")
    x, y = _pixel(match[1], match[2], size)
    return Click(x, y, positive, _plain(name))


def _number(value: object) -> float:
    """A JSON number, NaN for everything else (also true, which Python takes for 1)."""
    return value if isinstance(value, float) else float("nan")


def _phrase_paper(action: Action, size: Size) -> str:
    if isinstance(action, Click):
        point = f"[{_point(action, size)[1:-1]}]"
        triple = {
            "Target": escape(action.target.strip()),
            "Attribute": "1" if action.positive else "-1",
            "Coordinate 2d": point,
        }
        return json.dumps(triple, ensure_ascii=False, separators=(",", ":"))
    if isinstance(action, Undo):
        return _phrase_ibis(action, size).capitalize()
    return "Termination" if isinstance(action, Stop) else _phrase_ibis(action, size)


# ---------------------------------------------------------------------------------------------------------- writing


def write(reply: Reply, size: Size, *, dialect: str) -> str:
    """The text of a reply about an image of `size` (H, W): parse(write(reply, ...), ...) == reply.

    So for every reply that the dialect can express, up to blanks around thought, answer and names, and, where
    `Dialect.names` is False or a name is empty, with the name given to `parse` as default_target. Free text may hold
    anything, tags included.

    Raises ConfigError, naming the action, for a reply that the dialect cannot express: a Box in "paper" or "released",
    an Undo or a second action in "released", a point outside the image, a `problem`, no action at all.
    """
    speech = dialect_of(dialect)
    if reply.problem is not None:
        raise ConfigError(f"a reply that could not be read cannot be written ({reply.problem}); give its actions")
    actions = [_stripped(action) for action in reply.actions]
    if fault := _fault(actions, speech):
        raise ConfigError(f"cannot be written in dialect {speech.name}: {fault}; use another dialect or other actions")
    for action in actions:
        _check_inside(action, size)
    stop = reply.stop
    parts = [
        ("think", escape(reply.thought.strip())),
        ("action", ("\n" if speech.block else "; ").join(speech.phrase(action, size) for action in actions)),
        ("answer", _answer(stop, speech) if stop else ""),
    ]
    edge = "\n" if speech.block else ""
    text = edge.join(f"<{tag}>{edge}{part}{edge}</{tag}>" for tag, part in parts if part or tag != "answer")
    if len(text) > MAX_REPLY_CHARS:
        raise ConfigError(f"a reply of {len(text)} characters is too long, {MAX_REPLY_CHARS} are read: shorten it")
    return text


def _stripped(action: Action) -> Action:
    if isinstance(action, Click | Box):
        return replace(action, target=action.target.strip())
    if isinstance(action, Stop):
        return Stop(action.answer.strip(), tuple(name.strip() for name in action.absent))
    return action


def _check_inside(action: Action, size: Size) -> None:
    height, width = size
    if isinstance(action, Click):
        inside = 0 <= action.x < width and 0 <= action.y < height
    elif isinstance(action, Box):
        inside = action.x0 >= 0 and action.y0 >= 0 and action.x1 <= width and action.y1 <= height
    else:
        return
    if not inside:
        raise ConfigError(f"{action} lies outside the picture of {width} x {height} pixels")


def _answer(stop: Stop, speech: Dialect) -> str:
    answer = escape(stop.answer.strip())
    if not speech.absent:
        return answer
    answer = answer.replace(speech.absent, speech.absent[:-1] + "&colon;")  # the sentence is ours alone
    names = "; ".join(_escape_name(name) for name in stop.absent)
    return f"{answer}\n{speech.absent} {names}.".lstrip() if names else answer


def _point(click: Click, size: Size) -> str:
    """(x, y) of the pixel's centre."""
    height, width = size
    return f"({_decimal((click.x + 0.5) / width, width)}, {_decimal((click.y + 0.5) / height, height)})"


def _decimal(fraction: float, side: int) -> str:
    """A fraction of `side` pixels with enough decimals that rounding moves it by less than half a pixel."""
    return f"{fraction:.{max(MIN_DECIMALS, len(str(side)))}f}"


_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&lpar;": "(", "&semi;": ";", "&colon;": ":"}
_ENTITY = re.compile("|".join(_ENTITIES))
_PLACE_IN_TEXT = re.compile(r"\((?=\s*[\d.]+\s*,\s*[\d.]+\s*\))")


def escape(text: str) -> str:
    """Free text of users and models without anything that reads as a tag, ours or a chat template's, or as a place.

    A place such as "(0.5, 0.25)" is one token of some models, and stands in actions alone.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _PLACE_IN_TEXT.sub("&lpar;", text)


def _escape_name(name: str) -> str:
    """A name for a list that ";" separates."""
    return re.sub(r"(?<!&amp)(?<!&lt)(?<!&gt)(?<!&lpar);", "&semi;", escape(name.strip()))


def _plain(text: str) -> str:
    """Undo `escape`, and strip."""
    return _ENTITY.sub(lambda match: _ENTITIES[match.group()], text.strip())


# ---------------------------------------------------------------------------------------------------------- showing


def overlay(
    image: Image,
    masks: Masks,
    style: OverlayStyle = "colour",
    *,
    colours: Sequence[tuple[int, int, int]] = tuple(COLOURS.values()),
    opacity: float = OPACITY,
) -> PIL.Image.Image:
    """The image with the current masks on it, as a policy sees it; pixels outside all masks stay as they are.

    style "colour": RGB; each mask is laid over the image in its colour at `opacity` in [0, 1], in the order of
    `masks`. Eight targets are told apart, then colours repeat.
    style "alpha": RGBA; the colour planes are the untouched image, alpha is 255 - 16 k for the k-th target (from 0,
    the first wins where masks overlap) and 0 where there is none. `colours` and `opacity` do not matter.

    Raises DataError for a mask of another size than the image, ConfigError for an unknown style.
    """
    for name, mask in masks.items():
        if mask.shape != image.size:
            raise DataError(f"{image.source or 'image'}: mask '{name}' is {mask.shape}, expected {image.size}")
    if style == "alpha":
        alpha = np.zeros(image.size, dtype=np.uint8)
        for rank, mask in reversed(list(enumerate(masks.values()))):
            alpha[mask] = max(255 - ALPHA_STEP * rank, 1)
        return PIL.Image.fromarray(np.dstack([image.pixels, alpha]))
    if style != "colour":
        raise ConfigError(f"unknown overlay style '{style}'; there are: {', '.join(get_args(OverlayStyle))}")
    pixels = image.pixels.copy()
    for rank, mask in enumerate(masks.values()):
        tint = np.asarray(colours[rank % len(colours)], dtype=np.float32) * opacity
        pixels[mask] = (pixels[mask] * np.float32(1 - opacity) + tint).astype(np.uint8)
    return PIL.Image.fromarray(pixels)


def render(
    observation: Observation,
    *,
    dialect: str,
    history: History | None = None,
    style: OverlayStyle | None = None,
    paint: Callable[[Image, Masks, OverlayStyle], Any] | None = None,
    wording: Wording | None = None,
) -> list[Message]:
    """The conversation that asks a policy for its next reply: [system], earlier turns, the current user turn.

    A message is {"role": "system" | "user" | "assistant", "content": [part, ...]}, a part {"type": "text", "text": str}
    or {"type": "image", "image": PIL image}; every user turn has one image, made by `overlay`. history None: as the
    dialect prefers. "none": the current turn alone. "actions": the same, with the actions so far as text. "full": every
    earlier image and reply, as they were. style None: as the dialect prefers; "alpha" has no system prompt, as only
    models trained for it can read such images. paint: makes what stands for an image in the messages, in place of
    `overlay`; for writers that have the same image already. wording: what the policy is told in place of the dialect's
    own words.

    The query and names are escaped as in replies, so that they cannot pass for tags. Raises ConfigError for an unknown
    dialect, history or style.
    """
    speech = dialect_of(dialect)
    if wording is not None:
        speech = replace(speech, system=wording.system, first=wording.first, refine=wording.refine)
    history = history or speech.history
    style = style or speech.style
    if history not in get_args(History):
        raise ConfigError(f"unknown history '{history}'; there are: {', '.join(get_args(History))}")
    messages: list[Message] = []
    if style != "alpha":
        messages.append({"role": "system", "content": [{"type": "text", "text": speech.system}]})
    turns = observation.turns
    for number, turn in enumerate(turns if history == "full" else ()):
        earlier = replace(observation, masks=turn.before, turns=turns[:number])
        messages.append(_user(earlier, speech, history, style, paint))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": _said(turn)}]})
    messages.append(_user(observation, speech, history, style, paint))
    return messages


START_LINE = "A mask to refine is already shown."
PROBLEM_LINE = "Your last reply could not be read: {problem}. Nothing was changed."
NEXT_LINE = "This is the picture after your last reply."


def _user(
    observation: Observation,
    speech: Dialect,
    history: History,
    style: OverlayStyle,
    paint: Callable[[Image, Masks, OverlayStyle], Any] | None,
) -> Message:
    """The user turn that shows the masks of `observation`, the reply after `observation.turns` being asked for."""
    turns, masks = observation.turns, observation.masks
    shown = any(mask.any() for mask in masks.values())
    refining = shown or any(turn.reply.problem is None for turn in turns)
    query = escape(observation.query)
    if speech.refine and refining:
        lines = [speech.refine.replace(QUERY_PLACE, query)]
    else:
        lines = [NEXT_LINE if history == "full" and turns else speech.first.replace(QUERY_PLACE, query)]
    if shown and not turns:
        lines.append(START_LINE)
    if history == "actions" and turns:
        lines.append(recap([turn.reply for turn in turns], observation.image.size, dialect=speech.name))
    if len(masks) > 1 and style == "colour" and speech.names:
        names = list(COLOURS)
        legend = (f"{_escape_name(name)}: {names[rank % len(names)]}" for rank, name in enumerate(masks))
        lines.append(f"Colours of the masks: {'; '.join(legend)}.")
    if turns and turns[-1].reply.problem is not None:
        lines.append(PROBLEM_LINE.format(problem=escape(turns[-1].reply.problem)))
    text = {"type": "text", "text": "\n".join(lines)}
    image = {"type": "image", "image": (paint or overlay)(observation.image, masks, style)}
    return {"role": "user", "content": [image, text] if speech.image_first else [text, image]}


def recap(replies: Sequence[Reply], size: Size, *, dialect: str) -> str:
    """Earlier replies as text, a line each, as `render` adds them to the query for history "actions".

    What people added beyond the dialect is told in the words of "ibis".
    """
    phrase = dialect_of(dialect).phrase
    told = (
        "; ".join(phrase(a, size) for a in r.actions) if r.problem is None else "could not be read" for r in replies
    )
    return "\n".join(["Your replies so far:", *(f"- {line}" for line in told)])


_STRAY = re.compile(r"<(?!/?(?:think|action|answer)>)")


def _said(turn: Turn) -> str:
    """A past reply as it was written, but with nothing in it that a chat template reads as one of its own marks."""
    text = turn.completion.text
    return _STRAY.sub("&lt;", text if turn.reply.problem is None else text[:MAX_RECALLED_CHARS])


# ----------------------------------------------------------------------------------------------------- the dialects

_TASK = (
    "You segment objects in biomedical images together with a segmentation tool. You see an image and a request. You "
    "tell the tool where to click; it answers with a mask, which you see laid over the image in a transparent colour, "
    "one colour for each object. A positive click says that a spot belongs to the object: place it where the mask "
    "misses part of the object, at first in the middle of the object. A negative click says that a spot does not "
    "belong to it: place it where the mask has leaked. Coordinates are (x, y), x from the left edge (0) to the right "
    "edge (1), y from the top (0) to the bottom (1), with four decimals.\n"
    "Stop when the mask fits, when the image does not show the object, or at once when the question can be answered "
    "in words alone. If a mask that you were given shows something else than what was asked for, place clicks that "
    "correct it.\n"
)

_PAPER = Dialect(
    name="paper",
    system=_TASK
    + "In every turn write first what you think between <think> and </think>, then what you do between <action> and "
    "</action>. An action is one line for each click, in JSON:\n"
    '{"Target":"name of the object","Attribute":"1","Coordinate 2d":"[0.4512, 0.4238]"}\n'
    'where Attribute is "1" for a positive and "-1" for a negative click. Or it is the line Undo, which takes back the '
    "last click, or Undo 3 for the last three. Or it is the line Termination, to stop; then write your final answer "
    'between <answer> and </answer>. Objects that the image does not show are listed at its end: "Not in this image: '
    'spleen; liver."',
    history="full",
    style="colour",
    boxes=False,
    undo=True,
    multiple=True,
    names=True,
    block=True,
    image_first=True,
    absent="Not in this image:",
    read=_read_paper,
    phrase=_phrase_paper,
)

_RELEASED = Dialect(
    name="released",
    system="You are an expert in medical image segmentation. You outline one object in a medical image by placing one "
    "point after another. You get an image and an instruction; look at the image closely. Without a mask on it, this "
    "is the first step: place a Positive Point on a clear and typical part of the object. With a semi-transparent "
    "green mask on it, this is a refinement step: place a Positive Point where the mask misses part of the object, or "
    "a Negative Point where it covers something else.\n"
    "Always answer in this form: your detailed reasoning in <think> tags, then one action in <action> tags. The only "
    "actions are Positive Point (x, y), Negative Point (x, y) and Terminate. Coordinates are fractions of width and "
    "height from 0.0 to 1.0 with four decimals, as in Positive Point (0.5000, 0.2500). Use Terminate only when the "
    "mask fits the object's outline; then add a short final summary in an <answer> tag.",
    history="none",
    style="colour",
    boxes=False,
    undo=False,
    multiple=False,
    names=False,
    block=True,
    image_first=True,
    absent="Not in this image:",
    read=_read_released,
    phrase=_phrase_released,
    refine='This is a refinement step. The user asked: "{query}". Does the semi-transparent green mask still need '
    "another point? If so, answer with a point action, otherwise with Terminate.",
    rules=LoopRules(repeats=3, unreadable=1, mask_selection="last", multimask=True, max_pixels=512 * 512),
)

_IBIS = Dialect(
    name="ibis",
    system=_TASK + "In every turn write first what you think, then what you do, in exactly this form:\n"
    "<think>The disc is the bright oval.</think><action>click + (0.5156, 0.2422) optic disc</action>\n"
    "Between <action> and </action> stand one or more of these, with a semicolon between two:\n"
    "click + (x, y) name: a positive click; click - (x, y) name: a negative click;\n"
    "box (left, top) (right, bottom) name: a box around the whole object, a good first action;\n"
    "undo: take back the last click or box, undo 3: the last three;\n"
    "stop: the work is done. Then write the final answer:\n"
    "<think>The mask fits.</think><action>stop</action><answer>The optic disc is segmented.</answer>\n"
    "Name objects that the image does not show after the stop: "
    "<action>stop; absent spleen; absent liver</action><answer>There is no spleen and no liver.</answer>",
    history="none",
    style="colour",
    boxes=True,
    undo=True,
    multiple=True,
    names=True,
    block=False,
    image_first=False,
    absent="",
    read=_read_ibis,
    phrase=_phrase_ibis,
)

DIALECTS: Mapping[str, Dialect] = MappingProxyType({speech.name: speech for speech in (_PAPER, _RELEASED, _IBIS)})


def dialect_of(name: str) -> Dialect:
    """The dialect of that name. ConfigError for an unknown one."""
    if name not in DIALECTS:
        raise ConfigError(f"unknown dialect '{_shown(str(name))}'; there are: {', '.join(DIALECTS)}")
    return DIALECTS[name]
