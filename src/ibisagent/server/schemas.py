"""Bodies of requests and views of sessions, as the description of the HTTP API has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ibisagent.domain import MAX_NAME_CHARS, MAX_QUERY_CHARS, Completion, Reply, Turn
from ibisagent.imaging.masks import rle_area
from ibisagent.inference.rounds import State, Step
from ibisagent.inference.session import Session
from ibisagent.store import plain_turn

MAX_COORDINATE = 2**20


Coordinate = Annotated[int, Field(ge=0, le=MAX_COORDINATE, strict=True)]


class StrictBody(BaseModel):
    """Unknown fields are refused: a setting that would be ignored must not look as if it had worked."""

    model_config = ConfigDict(extra="forbid")


TargetName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


QueryText = Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)]


class AskRequest(StrictBody):
    """A turn of the agent. query: a new request, which begins a new round; left out, the last one stands."""

    query: QueryText | None = None


class RunRequest(AskRequest):
    """Turns of the agent until it stops, at most `max_turns`, by default the policy's own limit.

    expected: the state that the session has for who asks; where it has another one by now, the answer is 409 and
    nothing has changed.
    """

    max_turns: Annotated[int, Field(ge=1, le=1000)] | None = None
    expected: State | None = None


class ResetRequest(StrictBody):
    """Back to the beginning. expected: as for a run."""

    expected: State | None = None


class ClickRequest(StrictBody):
    """A user's click on a pixel; `target` left out means the object clicked last."""

    x: Coordinate
    y: Coordinate
    positive: bool = True
    target: TargetName | None = None


class BoxRequest(StrictBody):
    """A user's box, half-open, in pixels."""

    x0: Coordinate
    y0: Coordinate
    x1: Coordinate
    y1: Coordinate
    target: TargetName | None = None


class AcceptRequest(StrictBody):
    """A user says that the masks are right; `absent` names objects that the image does not show."""

    answer: Annotated[str, Field(max_length=MAX_QUERY_CHARS)] = ""
    absent: Annotated[list[TargetName], Field(max_length=8)] = []


class ForkRequest(StrictBody):
    """A new session from the first `turn` turns of this one."""

    turn: Annotated[int, Field(ge=0, le=100_000)]


class TurnView(BaseModel):
    """One turn. by: "agent" or "user". actions: as in records. problem: why a reply could not be read."""

    number: int
    by: str
    thought: str
    actions: list[dict[str, Any]]
    problem: str | None
    predicted_quality: float | None
    seconds: float


class TargetView(BaseModel):
    """One object as it stands. pixels: how many its mask has. mask: COCO run lengths."""

    name: str
    pixels: int
    mask: dict[str, Any]


class EditView(BaseModel):
    """What a user did to the masks by hand (brush, rename, ...), after `after` turns."""

    after: int
    what: str


class SessionView(BaseModel):
    """A session as it stands; images have addresses of their own below it.

    state: "new", "agent" (nobody else has acted), "corrected" or "accepted" by a user. prompts: the clicks and boxes
    that stand.
    """

    id: str
    query: str
    state: str
    image: str
    width: int
    height: int
    target: str
    targets: list[TargetView]
    prompts: list[dict[str, Any]]
    turns: list[TurnView]
    edits: list[EditView]
    running: bool
    can_undo: bool
    can_redo: bool


class StepView(BaseModel):
    """What an action changed. ended: why a run ended; null after a single turn."""

    ended: str | None = None
    session: SessionView


class SegmentView(BaseModel):
    """What one run made of one image. masks: COCO run lengths by target.

    objects: of each that was asked for its name, whether the policy learned it (known), else the nearest name that it
    learned, and how likely the image shows it (presence, 0 to 1); empty where the policy makes no claim.
    """

    ended: str
    answer: str
    absent: list[str]
    objects: list[dict[str, Any]]
    masks: dict[str, dict[str, Any]]
    turns: list[TurnView]


class ErrorView(BaseModel):
    """What was wrong, where, and what to do, in one line."""

    detail: str


def turn_view(number: int, step: Step) -> TurnView:
    """A step, for clients."""
    turn = step.turn
    return TurnView(
        number=number,
        by=step.by,
        thought=turn.reply.thought,
        actions=plain_actions(turn.reply),
        problem=turn.reply.problem,
        predicted_quality=turn.segmenter_score,
        seconds=turn.completion.seconds,
    )


def plain_actions(reply: Reply) -> list[dict[str, Any]]:
    """The actions of a reply, as in records."""
    actions: list[dict[str, Any]] = plain_turn(Turn(Completion(""), reply, {}, {}))["actions"]
    return actions


def session_view(session: Session) -> SessionView:
    """A session, for clients."""
    height, width = session.image.size
    return SessionView(
        id=session.id,
        query=session.query,
        state=session.state,
        image=session.image.source,
        width=width,
        height=height,
        target=session.target,
        targets=[
            TargetView(name=name, pixels=rle_area(code), mask=dict(code)) for name, code in session.answer_codes.items()
        ],
        prompts=plain_actions(Reply("", tuple(session.prompts))),
        turns=[turn_view(number, step) for number, step in enumerate(session.steps, 1)],
        edits=[EditView(after=after, what=what) for after, what in session.edits],
        running=session.running,
        can_undo=session.can_undo,
        can_redo=session.can_redo,
    )
