"""Teachers: grounded thoughts, checks that can fail, and an endpoint that loses nothing whatever the server does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibisagent.datasets import CaseRow
from ibisagent.domain import Click, Image, Reply, Stop, Undo
from ibisagent.errors import PolicyError
from ibisagent.generation.config import EndpointConfig
from ibisagent.generation.teacher.base import Refusal
from ibisagent.generation.teacher.checks import disagreement, leak
from ibisagent.generation.teacher.endpoint import EndpointTeacher
from ibisagent.generation.teacher.phrasings import Absences
from ibisagent.generation.teacher.rules import RulesTeacher
from ibisagent.generation.teacher.visual_facts import TeacherContext, error_facts, first_facts, place_of, side_of

SIZE = (60, 90)
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]
GROUND_TRUTH = (COLUMNS >= 30) & (COLUMNS < 60) & (ROWS >= 20) & (ROWS < 40)
IMAGE = Image(np.repeat((60 + 120 * GROUND_TRUTH)[..., None], 3, axis=2).astype(np.uint8))


def context(number: int, *, left: bool = True) -> TeacherContext:
    current = GROUND_TRUTH & ((COLUMNS >= 40) if left else (COLUMNS < 50))
    click = Click(34 if left else 55, 30, True, "left kidney")
    visual = error_facts("left kidney", IMAGE, GROUND_TRUTH, current, click)
    return TeacherContext(
        f"s{number}", "Segment it.", "referring", Reply("", (click,)), (visual,), IMAGE, {"left kidney": current}
    )


def test_words_come_from_what_was_measured() -> None:
    assert side_of(33, 30, GROUND_TRUTH) == "on the left"
    assert side_of(57, 38, GROUND_TRUTH) == "at the lower right"
    assert place_of(5, 55, SIZE) == "in the lower left of the picture"
    first = first_facts("x", IMAGE, GROUND_TRUTH, Click(45, 30, True, "x"))
    assert (first.tone, first.place) == ("brighter", "in the middle of the picture")
    leaking = error_facts("x", IMAGE, GROUND_TRUTH, GROUND_TRUTH | (COLUMNS >= 80), Click(85, 30, False, "x"))
    assert (leaking.turn_kind, leaking.shape, leaking.contrast) == ("leaked", "detached", "darker")


def test_rule_thoughts_vary_agree_and_do_not_leak() -> None:
    thoughts = RulesTeacher(1).think([context(number) for number in range(200)])
    assert len(set(thoughts)) > 60
    assert thoughts == RulesTeacher(1).think([context(number) for number in range(200)])
    for thought in thoughts:
        assert isinstance(thought, str)
        assert "on the left" in thought
        assert leak(thought) is None
        assert disagreement(thought, context(0).reply, context(0).masks, SIZE, {"left kidney": GROUND_TRUTH}) is None


@pytest.mark.parametrize(
    ("thought", "kind"),
    [
        ("The ground truth shows more on the left.", "ground truth"),
        ("The IoU is low, so I click.", "measure"),
        ("This is a false negative.", "measure"),
        ("I click at (0.41, 0.22).", "number"),
        ("The mask covers 80% of it.", "number"),
        ("As the correct next action says, I click.", "instruction"),
        ("The L5 vertebra is still missing on the left.", None),
    ],
)
def test_leaks_are_found(thought: str, kind: str | None) -> None:
    assert leak(thought) == kind


@pytest.mark.parametrize(
    ("thought", "reply", "fault"),
    [
        ("The mask misses a part on the left.", Reply("", (Click(34, 30, True, "a"),)), None),
        ("The mask misses a part on the right.", Reply("", (Click(34, 30, True, "a"),)), "place"),
        ("The mask misses a part on the left.", Reply("", (Click(34, 30, False, "a"),)), "sign"),
        ("The mask leaks at the top.", Reply("", (Click(45, 22, True, "a"),)), "sign"),
        ("The mask leaks at the bottom.", Reply("", (Click(45, 22, False, "a"),)), "place"),
        ("Much is missing on the left.", Reply("", (Stop("done"),)), "stop"),
        ("This is good enough.", Reply("", (Click(34, 30, True, "a"),)), "stop"),
        ("That leaked, I undo it.", Reply("", (Undo(1),)), None),
        ("I look again.", Reply("", (Undo(1),)), "undo"),
        ("I undo it.", Reply("", (Click(34, 30, True, "a"),)), "undo"),
        ("Some of the left lung is left out.", Reply("", (Click(58, 30, True, "left lung"),)), None),
    ],
)
def test_contradictions_are_found(thought: str, reply: Reply, fault: str | None) -> None:
    assert disagreement(thought, reply, {"a": GROUND_TRUTH}, SIZE, {"a": GROUND_TRUTH}) == fault


def test_absent_names_never_cover_what_is_there() -> None:
    def row(name: str, modality: str = "CT", site: str = "chest", data: str = "A") -> CaseRow:
        return CaseRow(
            f"{name}{data}", Path(f"{name}{data}"), None, name, "q", modality=modality, site=site, dataset=data
        )

    rows = [row("left lung"), row("lung"), row("right lung"), row("heart"), row("optic disc", "fundus", "retinal", "B")]
    absences = Absences(rows)
    assert absences.near(rows[0], ["left lung"]) == ["heart", "right lung"]
    assert absences.near(rows[1], ["lung"]) == ["heart"]
    assert absences.far(rows[0], ["left lung"]) == ["optic disc"]


# ---------------------------------------------------------------------------------------------------------- endpoint


class _Server:
    """A chat server whose answers are scripted: each a status, or the text of a reply, or seconds to stall."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.requests, self.times = answers, [], []  # type: ignore[var-annotated]
        self.lock = threading.Lock()


@contextmanager
def serving(answers: list[Any]) -> Iterator[tuple[_Server, str]]:
    """`answers` in turn, the last one for ever; a real server on loopback."""
    state = _Server(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
                state.requests.append(body)
                state.times.append(time.monotonic())
            if isinstance(answer, float):
                time.sleep(answer)
                answer = "{}"
            status = answer if isinstance(answer, int) else 200
            said = {
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]
            }
            usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
            content = json.dumps({**head, **said, "usage": usage} if status == 200 else {"error": {"message": "no"}})
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content.encode())
            except OSError:
                return  # the client did not wait

        def log_message(self, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def teacher(url: str, cache: Path, **settings: Any) -> EndpointTeacher:
    plain = {"pause_seconds": 0.01, "concurrency": 1, "retries": 2, "price_in": 1.0, "price_out": 10.0}
    return EndpointTeacher(EndpointConfig(url=url, model="m", **{**plain, **settings}), cache)


GOOD = '{"thought": "A part on the left is missing, I add it."}'


def test_endpoint_sends_image_and_schema_but_no_coordinates(tmp_path: Path) -> None:
    with serving([GOOD]) as (server, url):
        asked = teacher(url, tmp_path)
        assert asked.think([context(0)]) == ["A part on the left is missing, I add it."]
    request = server.requests[0]
    assert request["response_format"]["type"] == "json_schema"
    text, image = request["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert "positive click for the left kidney" in text["text"]
    assert "on the left" in text["text"]
    assert leak(text["text"]) is None
    assert asked.spent == pytest.approx((1000 * 1 + 100 * 10) / 1e6)


def test_replies_are_kept_and_never_paid_twice(tmp_path: Path) -> None:
    with serving([GOOD]) as (server, url):
        first = teacher(url, tmp_path).think([context(0), context(1)])
        again = teacher(url, tmp_path)
        assert again.think([context(0), context(1)]) == first
        assert len(server.requests) == 2
        assert again.counts == {"cached": 2}
        assert again.spent == pytest.approx(2 * 0.002)


@pytest.mark.parametrize("trouble", [429, 500, 503, "no JSON", '{"thought": 3}', '{"thought": ""}'])
def test_passing_trouble_is_tried_again(tmp_path: Path, trouble: Any) -> None:
    with serving([trouble, trouble, GOOD]) as (_, url):
        asked = teacher(url, tmp_path)
        assert isinstance(asked.think([context(0)])[0], str)
        assert asked.counts == {"asked": 3, "retried": 2}


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(429, "rate limit"), (500, "server error"), ("no JSON", "malformed reply"), (400, "refused")],
)
def test_lasting_trouble_is_a_counted_refusal(tmp_path: Path, trouble: Any, reason: str) -> None:
    with serving([trouble]) as (_, url):
        asked = teacher(url, tmp_path)
        thoughts = asked.think([context(0), context(1)])
    assert all(isinstance(thought, Refusal) and thought.reason == reason for thought in thoughts)
    assert asked.counts[reason] == 2
    assert asked.counts["asked"] == (2 if trouble == 400 else 6)


def test_timeouts_are_tried_again(tmp_path: Path) -> None:
    with serving([0.5, GOOD]) as (_, url):
        asked = teacher(url, tmp_path, timeout_seconds=0.15)
        assert isinstance(asked.think([context(0)])[0], str)
        assert asked.counts["retried"] == 1


def test_a_budget_stops_before_it_is_exceeded_and_can_be_raised(tmp_path: Path) -> None:
    contexts = [context(number) for number in range(4)]
    with serving([GOOD]) as (server, url):
        asked = teacher(url, tmp_path, budget=0.0062)
        with pytest.raises(PolicyError, match=r"budget of 0\.0062 is used up"):
            asked.think(contexts)
        paid = len(server.requests)
        assert 0 < paid < 4
        assert asked.spent <= 0.0062
        richer = teacher(url, tmp_path, budget=1.0)
        assert all(isinstance(thought, str) for thought in richer.think(contexts))
        assert len(server.requests) == 4
        assert richer.counts["cached"] == paid


def test_the_rate_is_kept(tmp_path: Path) -> None:
    with serving([GOOD]) as (server, url):
        teacher(url, tmp_path, requests_per_minute=300, concurrency=4).think([context(number) for number in range(4)])
    gaps = np.diff(sorted(server.times))
    assert gaps.sum() >= 0.56  # of 0.6: the first request may arrive late on a busy machine


def test_a_wrong_key_ends_the_run(tmp_path: Path) -> None:
    with serving([401]) as (_, url), pytest.raises(PolicyError, match="check key, model and URL"):
        teacher(url, tmp_path).think([context(0)])
