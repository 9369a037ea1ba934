"""A user and an agent on one image: turns, undo, rounds, forks, what is saved and what is exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibisagent.datasets import read_cases
from ibisagent.domain import Action, Case, Click, Completion, Image, Masks, Observation, Prompt, Reply, Stop, Undo
from ibisagent.environment import PromptState
from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.imaging.images import write_png
from ibisagent.imaging.masks import decode_rle
from ibisagent.inference.image import describe_actions
from ibisagent.inference.replay import replay, replay_record
from ibisagent.inference.rounds import summary_of
from ibisagent.inference.session import Session
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import parse, write
from ibisagent.segmenters import Prediction
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.store import EpisodeStore, read_record

SIZE = (61, 83)
BOX = (slice(10, 30), slice(12, 40))
DISC = (slice(38, 54), slice(50, 74))


def make_image() -> Image:
    pixels = np.full((*SIZE, 3), 30, dtype=np.uint8)
    pixels[BOX] = 200
    pixels[DISC] = 120
    return Image(pixels, spacing_mm=(0.5, 0.25), source="phantom.png")


def said(x: int, y: int, sign: str = "+", name: str = "bright box") -> str:
    where = f"({(x + 0.5) / SIZE[1]:.4f}, {(y + 0.5) / SIZE[0]:.4f})"
    return f"<think>I look.</think><action>click {sign} {where} {name}</action>"


STOP = "<think>It fits.</think><action>stop</action><answer>Done.</answer>"


def session(replies: Sequence[str] = (), folder: Path | None = None, start: Masks | None = None) -> Session:
    case = Case("s1", make_image(), "Segment the bright box.", start=start or {})
    return Session(case, RegionSegmenter(), ScriptedPolicy(list(replies)), folder=folder)


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class WaitingPolicy:
    """Answers when it is told to."""

    name, dialect = "waiting", "ibis"

    def __init__(self, text: str) -> None:
        self.text, self.asked, self.go = text, threading.Event(), threading.Event()

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        self.asked.set()
        assert self.go.wait(10)
        return [Completion(self.text) for _ in observations]


def test_agent_and_user_take_turns() -> None:
    it = session([said(20, 15), "", said(30, 20, "-"), STOP])
    seen = []
    step = it.ask()
    assert step is not None
    assert step.by == "agent"
    assert it.masks["bright box"][15, 20]
    click = it.click(60, 45)
    assert click.by == "user"
    assert click.turn.completion.text == f"<think></think>{said(60, 45).partition('</think>')[2]}"
    assert it.masks["bright box"][45, 60]
    assert it.target == "bright box"
    assert it.run(on_step=lambda step: seen.append(step.by)) == "stopped"
    assert seen == ["agent", "agent"]
    assert [step.by for step in it.steps] == ["agent", "user", "agent", "agent"]
    [episode] = it.episodes()
    assert (episode.stop, episode.provenance["people_turns"], episode.provenance["policy"]) == (
        "stopped",
        "2",
        "scripted",
    )
    assert same(replay(episode, it.image, RegionSegmenter()), it.observation.masks)


class Listening(RegionSegmenter):
    """Keeps what each prediction was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[list[Prompt], np.ndarray | None]] = []

    def open(self, image: Image) -> Any:
        return _Heard(super().open(image), self.asked)


class _Heard:
    def __init__(self, session: Any, asked: list[tuple[list[Prompt], np.ndarray | None]]) -> None:
        self._session, self._asked = session, asked

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        self._asked.append((list(prompts), prior))
        return self._session.predict(prompts, prior)


def test_a_correction_goes_on_from_the_mask_that_is_seen_without_the_prompts_of_the_agent(tmp_path: Path) -> None:
    segmenter = Listening()
    case = Case("s1", make_image(), "Segment the bright box.")
    it = Session(case, segmenter, ScriptedPolicy([said(20, 15), said(30, 20), STOP]), folder=tmp_path / "s1")
    it.run()
    seen = it.masks["bright box"]
    previewed = it.preview(60, 45)
    first = it.click(60, 45).turn
    assert np.array_equal(it.masks["bright box"], previewed)
    [prompts, prior] = segmenter.asked[-1]
    assert prompts == list(first.reply.prompts)
    assert prior is not None
    assert np.array_equal(prior, seen)
    second = it.click(30, 24, positive=False).turn  # and of the user's own all
    assert segmenter.asked[-1][0] == [*first.reply.prompts, *second.reply.prompts]
    left = it.observation.masks
    again = Session.load(tmp_path / "s1", RegionSegmenter())
    assert same(again.observation.masks, left)
    assert same(replay(again.episodes()[-1], again.image, RegionSegmenter()), left)
    for one in (it, again):
        one.undo()
        one.undo()
        assert np.array_equal(one.masks["bright box"], seen)


def test_a_box_of_the_user_says_anew_where_the_object_is() -> None:
    segmenter = Listening()
    it = Session(Case("s1", make_image(), "Segment the bright box."), segmenter, ScriptedPolicy([said(60, 45), STOP]))
    it.run()
    box = it.box(12, 10, 40, 30).turn
    assert segmenter.asked[-1] == (list(box.reply.prompts), None)
    assert not it.masks["bright box"][DISC].any()


def test_multiple_targets_and_boxes() -> None:
    it = session()
    it.click(20, 15)
    it.box(48, 36, 76, 56, target=" grey\tdisc ")
    assert list(it.masks) == ["bright box", "grey disc"]
    assert it.target == "grey disc"
    it.click(21, 16)
    assert it.prompts[-1].target == "grey disc"
    for number in range(6):
        it.click(2 * number, 2, target=f"extra {number}")
    with pytest.raises(ConfigError, match="more than 8 objects"):
        it.click(50, 3, target="one too many")
    assert len(it.masks) == 8


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda it: it.click(83, 0), "outside"),
        (lambda it: it.click(0, -1), "outside"),
        (lambda it: it.box(5, 5, 5, 9), "no area"),
        (lambda it: it.box(5, 5, 90, 9), "outside"),
        (lambda it: it.click(20, 15, target=" "), "name"),
        (lambda it: it.click(20, 15, target="x" * 201), "longer"),
        (lambda it: it.undo(), "nothing to undo"),
        (lambda it: it.redo(), "nothing to redo"),
        (lambda it: it.request(" "), "empty"),
        (lambda it: it.fork(1), "turn 1"),
    ],
)
def test_what_cannot_be_done_changes_nothing(act, message: str) -> None:  # type: ignore[no-untyped-def]
    it = session()
    with pytest.raises(ConfigError, match=message):
        act(it)
    assert not it.steps
    assert it.changes == 0


def test_a_click_that_stands_is_refused() -> None:
    it = session()
    it.click(20, 15)
    with pytest.raises(ConfigError, match="stands already"):
        it.click(20, 15)
    assert len(it.steps) == 1


def test_undo_redo_reset() -> None:
    start = np.zeros(SIZE, dtype=bool)
    start[0:3, 0:5] = True
    it = session([said(20, 15) + "", STOP], start={"bright box": start})
    states = [it.masks]
    it.ask()
    states.append(it.masks)
    it.click(60, 45)
    states.append(it.masks)
    it.undo()
    assert same(it.masks, states[1])
    it.undo()
    assert same(it.masks, states[0])
    assert not it.can_undo
    it.redo()
    it.redo()
    assert same(it.masks, states[2])
    assert not it.can_redo
    assert len(it.steps) == 2
    it.undo()
    it.click(2, 50)
    assert not it.can_redo  # something new was done
    before = it.masks
    it.reset()
    assert same(it.masks, states[0])
    assert not it.steps
    it.redo()
    assert same(it.masks, before)


def test_undo_takes_back_a_whole_turn_of_the_agent() -> None:
    it = session([f"<action>click + (0.25, 0.25) a; click + (0.75, 0.75) b; click - ({1}, {0}) a</action>"])
    it.ask()
    it.undo()
    assert it.steps[-1].turn.reply.actions == (Undo(3),)
    assert it.masks == {}


def test_requests_are_rounds() -> None:
    it = session([said(20, 15)])
    it.ask()
    it.request("Segment the bright box.")  # the same again
    it.policy = ScriptedPolicy([said(60, 45, name="grey disc")])  # counts the turns of the round
    it.ask("Now the grey disc")
    assert list(it.masks) == ["bright box", "grey disc"]
    assert it.observation.turns == it.episodes()[1].turns
    first, second = it.episodes()
    assert (first.query, second.query) == ("Segment the bright box.", "Now the grey disc")
    assert same(second.start, first.masks)
    it.undo()
    it.undo()  # the empty round
    assert it.query == "Segment the bright box."
    it.redo()
    it.redo()
    assert list(it.masks) == ["bright box", "grey disc"]


def test_a_round_goes_on_after_an_undone_request() -> None:
    it, straight = session(), session()
    for one in (it, straight):
        one.click(20, 15)
        one.click(60, 45)
    it.request("grey disc")
    it.undo()
    for one in (it, straight):
        one.click(3, 3, positive=False)
    assert same(it.masks, straight.masks)


def test_turns_know_their_masks() -> None:
    it, seen = session(), list[Masks]([{}])
    for act in (lambda: it.click(20, 15), lambda: it.click(60, 45, target="disc"), it.undo, lambda: it.click(3, 3)):
        act()
        seen.append(it.masks)
    for step, before, after in zip(it.steps, seen, seen[1:], strict=False):
        assert same(step.turn.before, before)
        assert same(step.turn.after, after)
        assert all(mask.dtype == np.bool_ and mask.shape == SIZE for mask in step.turn.after.values())


def test_a_turn_takes_little_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (480, 640, 3), dtype=np.uint8)
    pixels[100:300, 200:500] += 150
    it = Session(Case("s", Image(pixels), "bright box"), RegionSegmenter())

    def traced(column: int) -> int:
        it.click(210 + column, 200)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        held = [traced(column) for column in range(40)]
    finally:
        tracemalloc.stop()
    assert (held[-1] - held[9]) / 30 < 480 * 640 / 10  # the first fill the prompt state


def test_the_user_takes_over_while_the_agent_thinks() -> None:
    policy = WaitingPolicy(said(20, 15))
    it = Session(Case("s", make_image(), "bright box"), RegionSegmenter(), policy)
    ended: list[str] = []
    thread = threading.Thread(target=lambda: ended.append(it.run()))
    thread.start()
    assert policy.asked.wait(10)
    assert it.running
    with pytest.raises(ConfigError, match="at work"):
        it.ask()
    it.click(60, 45)
    policy.go.set()
    thread.join(10)
    assert ended == ["interrupted"]
    assert [step.by for step in it.steps] == ["user"]
    assert not it.running
    assert it.run(max_turns=1) == "max_turns"  # handed back
    policy.go.clear()
    policy.asked.clear()
    thread = threading.Thread(target=lambda: ended.append(it.run()))
    thread.start()
    assert policy.asked.wait(10)
    it.interrupt()
    policy.go.set()
    thread.join(10)
    assert ended == ["interrupted"] * 2


def test_a_fork_has_the_turns_before_it() -> None:
    it = session([said(20, 15), said(30, 20)])
    it.ask()
    it.click(60, 45)
    it.request("grey disc")
    it.click(55, 41)
    for turn, steps in ((0, 0), (1, 1), (2, 2), (3, 3)):
        assert it.fork(turn).steps == it.steps[:steps]
    other = it.fork(1)
    assert other.id != it.id
    assert same(other.masks, it.steps[0].turn.after)
    other.click(3, 3)
    assert len(it.steps) == 3
    assert same(it.fork(3).masks, it.masks)


def test_a_failing_segmenter_changes_nothing() -> None:
    class Failing(RegionSegmenter):
        fail = False

        def open(self, image: Image):  # type: ignore[no-untyped-def]
            inner = super().open(image)
            outer = self

            class Opened:
                def predict(self, prompts, prior=None) -> Prediction:  # type: ignore[no-untyped-def]
                    if outer.fail:
                        raise SegmenterError("region: broken; mend it")
                    return inner.predict(prompts, prior)

            return Opened()

    segmenter = Failing()
    it = Session(Case("s", make_image(), "bright box"), segmenter)
    it.click(20, 15)
    before = it.masks
    segmenter.fail = True
    with pytest.raises(SegmenterError):
        it.click(60, 45)
    assert same(it.masks, before)
    with pytest.raises(ConfigError, match="no policy"):
        it.ask()


# ----------------------------------------------------------------------------------------------------- saved


def test_saved_and_loaded(tmp_path: Path) -> None:
    it = session(["<think>broken", said(20, 15)], tmp_path / "s1")
    it.ask()
    it.ask()
    it.click(60, 45, positive=True, target="Müller's disc")
    it.request("grey disc")
    it.box(48, 36, 76, 56)
    it.undo()
    back = Session.load(tmp_path / "s1", RegionSegmenter(), ScriptedPolicy([STOP]))
    assert (back.id, back.query, back.image.sha256) == (it.id, it.query, it.image.sha256)
    assert same(back.masks, it.masks)
    assert [step.by for step in back.steps] == [step.by for step in it.steps]
    assert [step.turn.reply for step in back.steps] == [step.turn.reply for step in it.steps]
    it.click(10, 10)
    back.click(10, 10)
    assert same(back.masks, it.masks)


def test_a_session_of_another_segmenter_is_refused_new_clicks(tmp_path: Path) -> None:
    it = session(folder=tmp_path)
    it.click(20, 15)
    plain = json.loads((tmp_path / "session.json").read_text())
    plain["rounds"][0]["steps"][0]["masks"][0]["rle"] = {"size": [61, 83], "counts": "PW4"}
    (tmp_path / "session.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="damaged"):
        Session.load(tmp_path, RegionSegmenter())
    it.reset()
    it.click(21, 15)
    other = session()
    other.click(60, 45)
    plain = json.loads((tmp_path / "session.json").read_text())
    plain["rounds"][0]["steps"][0]["masks"] = other.steps[0].plain_masks
    (tmp_path / "session.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="not what it was"):
        Session.load(tmp_path, RegionSegmenter()).click(1, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "ibisagent session", "version": 9}', "[" * 99999])
def test_damaged_session_files(content: str, tmp_path: Path) -> None:
    session(folder=tmp_path)
    (tmp_path / "session.json").write_text(content)
    with pytest.raises(DataError, match=r"session\.json"):
        Session.load(tmp_path, RegionSegmenter())
    with pytest.raises(DataError, match="cannot be read"):
        Session.load(tmp_path / "none", RegionSegmenter())


def test_killed_while_it_works(tmp_path: Path) -> None:
    """kill -9 in the middle of clicks: what was finished is there, whole."""
    code = textwrap.dedent(
        """
        import sys
        import numpy as np
        from ibisagent.domain import Case, Image
        from ibisagent.segmenters.region import RegionSegmenter
        from ibisagent.inference.session import Session
        pixels = np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8)
        it = Session(Case("s", Image(pixels), "thing"), RegionSegmenter(), folder=sys.argv[1])
        for turn in range(300):
            it.click(turn % 83, turn // 83)
            print(int(it.masks["thing"].sum()), flush=True)
        """
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        areas = [int(process.stdout.readline()) for _ in range(10)]
        os.kill(process.pid, signal.SIGKILL)
        areas += [int(line) for line in process.stdout.read().split()]
    back = Session.load(tmp_path / "s", RegionSegmenter())
    assert len(areas) <= len(back.steps) <= len(areas) + 1
    assert [int(step.turn.after["thing"].sum()) for step in back.steps][: len(areas)] == areas


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used as a folder"):
        session(folder=tmp_path / "file" / "s")


def test_a_click_that_cannot_be_saved_is_not_done(tmp_path: Path) -> None:
    it = session(folder=tmp_path / "s")
    it.click(20, 15)
    for file in (tmp_path / "s").iterdir():
        file.unlink()
    (tmp_path / "s").rmdir()
    with pytest.raises(DataError, match="cannot be written"):
        it.click(60, 45)
    assert len(it.steps) == 1


# ----------------------------------------------------------------------------------------------------- exported


def test_export_writes_masks_overlay_and_records(tmp_path: Path) -> None:
    it = session([said(20, 15)])
    it.ask()
    it.request("grey disc")
    it.click(60, 45)
    outputs = it.export(tmp_path, "eye")
    assert sorted(outputs.masks) == ["bright box", "grey disc"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "eye_mask_bright_box.png",
        "eye_mask_grey_disc.png",
        "eye_overlay.png",
        "eye_record.json",
        "eye_record-1.json",
    }
    assert read_record(outputs.record).stop == "open"
    from ibisagent.imaging.images import write_png

    write_png(it.image.pixels, tmp_path / "phantom.png")
    episode, _ = replay_record(outputs.record)
    assert same(episode.masks, it.masks)


def test_corrections_become_training_data(tmp_path: Path) -> None:
    it = session([said(60, 45), "nonsense", STOP])
    it.ask()  # wrong
    it.ask()
    it.ask()  # stops too early
    it.undo()
    it.click(20, 15)
    assert it.export_training(tmp_path) == 1
    [episode] = EpisodeStore(tmp_path / "episodes").read()
    assert [type(turn.reply.actions[-1]).__name__ for turn in episode.turns] == ["Click", "Undo", "Click", "Stop"]
    assert episode.undone_turns == {0}
    assert episode.provenance["people_turns"] == "2 3 4"
    assert same(replay(episode, it.image, RegionSegmenter()), it.observation.masks)
    [case] = read_cases(tmp_path / "manifest.csv")
    assert (case.id, case.query) == (episode.case_id, "Segment the bright box.")
    assert case.targets is not None
    assert np.array_equal(case.targets["bright box"], it.masks["bright box"])
    assert case.image.sha256 == episode.image_sha256
    it.click(3, 3, positive=False)
    it.accept(absent=["spleen"])
    it.export_training(tmp_path)
    cases = list(read_cases(tmp_path / "manifest.csv"))
    assert [list(case.targets or {}) for case in cases] == [["spleen"], ["bright box"]]
    assert session([said(20, 15)]).export_training(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()


class Fickle:
    """Another mask and another score for every sequence of prompts, and for every mask to go on from."""

    name = "fickle"

    def open(self, image: Image) -> Fickle:
        return self

    def describe(self) -> dict[str, str]:
        return {"segmenter": self.name}

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        seed = zlib.crc32(repr(prompts).encode() + (b"" if prior is None else prior.tobytes()))
        draw = np.random.default_rng(seed)
        mask = np.zeros(SIZE, dtype=bool)
        mask[:, : int(draw.integers(1, SIZE[1]))] = True
        return Prediction(mask, float(draw.random()), draw.random(3))


def any_action(draw: np.random.Generator) -> Action:
    """Few places, so that some stand already, and undos of more than there is."""
    if draw.random() < 0.25:
        return Undo(int(draw.integers(1, 4)))
    return Click(int(draw.integers(0, 12)), 3, True, ("bright box", "disc")[int(draw.integers(2))])


def any_session(draw: np.random.Generator) -> Session:
    """Turns of an agent with one or two actions each, stops among them, and of a user in between."""
    replies = []
    for _ in range(30):
        actions = [any_action(draw) for _ in range(int(draw.integers(1, 3)))]
        stop = [Stop("Done.", ("spleen",))] if draw.random() < 0.15 else []
        replies.append(
            "nonsense" if draw.random() < 0.1 else write(Reply("I look.", (*actions, *stop)), SIZE, dialect="ibis")
        )
    start = {"disc": np.ones(SIZE, dtype=bool)} if draw.random() < 0.3 else {}
    case = Case("s1", make_image(), "Segment the bright box.", start=start)
    it = Session(case, Fickle(), ScriptedPolicy(replies))
    for number in range(int(draw.integers(2, 12))):
        kind = draw.random()
        if kind < 0.7:
            it.ask()
        elif kind < 0.8 and it.can_undo:
            it.undo()
        else:
            it.click(20 + number, 3, target=("bright box", "disc")[int(draw.integers(2))])
    if draw.random() < 0.5:
        it.accept()
    return it


@pytest.mark.parametrize("seed", range(100))
def test_corrections_end_with_what_the_user_saw(tmp_path: Path, seed: int) -> None:
    it = any_session(np.random.default_rng(seed))
    for example in it.corrections():
        masks = {name: mask for name, mask in it.masks.items() if name in it.observation.masks}
        assert same(example.masks, masks)
        assert same({name: mask for name, mask in example.answer_masks.items() if name in masks}, masks)
        assert example.turns[-1].reply.stop is not None
        prompt_state = PromptState(it.image, Fickle(), example.start)
        for turn in example.turns:  # every mask is what its actions give
            assert same(turn.before, prompt_state.masks)
            assert parse(turn.completion.text, SIZE, dialect="ibis", default_target="") == turn.reply
            prompt_state.apply(turn.reply.actions, turn.completion.drafts)
            assert same(turn.after, prompt_state.masks)
        assert all(example.turns[number].reply.thought == "" for number in example.human_turns)


def test_random_sessions_have_what_corrections_leave_out() -> None:
    """Or the test above could not fail."""
    sessions = [any_session(np.random.default_rng(seed)) for seed in range(100)]
    assert sum(not same(it.masks, it.observation.masks) for it in sessions if it.corrections()) > 10
    assert sum(len(one.turns) < len(it.steps) for it in sessions for one in it.corrections()) > 10


def test_a_worse_click_of_the_agent_is_no_correction(tmp_path: Path) -> None:
    class Doubting(RegionSegmenter):
        """Sure of one click, less of more."""

        def open(self, image: Image) -> Any:
            return _Doubting(super().open(image))

    class _Doubting:
        def __init__(self, session: Any) -> None:
            self._session = session

        def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
            return replace(self._session.predict(prompts, prior), score=1 / (1 + len(prompts)))

    replies = [said(20, 15), said(60, 45), "<think>More.</think><action>click + (0.1, 0.1) bright box; stop</action>"]
    it = Session(Case("s1", make_image(), "Segment the bright box."), Doubting(), ScriptedPolicy(replies))
    it.run()
    assert not same(it.masks, it.observation.masks)
    it.accept()
    assert it.export_training(tmp_path) == 1
    [example] = EpisodeStore(tmp_path / "episodes").read()
    assert [describe_actions(turn.reply.actions) for turn in example.turns] == ["click + (20, 15) bright box", "stop"]
    [case] = read_cases(tmp_path / "manifest.csv")
    assert np.array_equal((case.targets or {})["bright box"], example.masks["bright box"])
    assert np.array_equal(example.masks["bright box"], it.masks["bright box"])


def test_a_click_that_came_with_a_stop_is_kept(tmp_path: Path) -> None:
    it = session([STOP.replace("stop<", f"click + ({20.5 / SIZE[1]:.4f}, {15.5 / SIZE[0]:.4f}) bright box; stop<")])
    it.ask()
    it.click(25, 17)
    [example] = it.corrections()
    assert [describe_actions(turn.reply.actions) for turn in example.turns] == [
        "click + (20, 15) bright box",
        "click + (25, 17) bright box",
        "stop",
    ]
    assert same(replay(example, it.image, RegionSegmenter()), it.masks)


def test_a_target_that_looks_like_a_formula_stays_itself_in_the_manifest(tmp_path: Path) -> None:
    case = Case("s1", make_image(), "Segment the =cmd.")
    it = Session(case, RegionSegmenter(), ScriptedPolicy([said(60, 45).replace("bright box", "=cmd")]))
    it.ask()
    it.click(20, 15)
    for _ in range(2):  # the second time what was written is read again
        it.export_training(tmp_path)
        assert ",'=cmd," in (tmp_path / "manifest.csv").read_text()
        [case] = read_cases(tmp_path / "manifest.csv")
        assert list(case.targets or {}) == ["=cmd"]


def test_accept_is_a_stop_of_the_user() -> None:
    it = session([said(20, 15)])
    it.ask()
    step = it.accept("It is right.", absent=["spleen"])
    assert step.turn.reply.stop == Stop("It is right.", ("spleen",))
    assert not it.masks["spleen"].any()
    assert it.episodes()[0].stop == "stopped"


def test_report_is_one_page_and_harmless() -> None:
    it = session([said(20, 15, name="&lt;script&gt;alert(1)&lt;/script&gt;")])
    it.ask()
    page = it.report()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "mm²" in page
    assert "data:image/png;base64," in page


def test_threads_do_not_lose_each_others_clicks() -> None:
    it = session()
    errors: list[ConfigError] = []

    def click(row: int) -> None:
        try:
            for column in range(5):
                it.click(column, row)
        except ConfigError as error:
            errors.append(error)

    started = time.perf_counter()
    threads = [threading.Thread(target=click, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(it.prompts) == 20
    assert time.perf_counter() - started < 20


def test_what_a_hand_does_begins_a_round(tmp_path: Path) -> None:
    """Brush, eraser, another name, nothing any more: undone, saved, recorded and replayed like clicks."""
    it = session([said(20, 20), STOP], tmp_path)
    assert it.state == "new"
    it.run()
    assert it.state == "agent"
    drawn = it.masks["bright box"]
    it.brush([(60.5, 45.5), (70.5, 45.5)], 2, target="bright box")
    painted = it.masks["bright box"]
    assert it.state == "corrected"
    assert painted[45, 60:71].all()
    assert not painted[50].any()
    assert np.array_equal(painted & drawn, drawn)
    it.brush([(60.5, 45.5)], 0, add=False, target="bright box")
    assert painted.sum() - it.masks["bright box"].sum() == 1
    it.undo()
    assert np.array_equal(it.masks["bright box"], painted)
    it.redo()
    it.rename("bright box", "plate")
    it.click(60, 45, positive=True, target="disc")
    it.remove("plate")
    assert list(it.masks) == ["disc"]
    it.undo()
    assert list(it.masks) == ["plate", "disc"]
    it.accept()
    assert it.state == "accepted"
    back = Session.load(tmp_path, RegionSegmenter(), ScriptedPolicy([]))
    assert same(back.masks, it.masks)
    assert back.state == summary_of(tmp_path).state == "accepted"
    assert [what for _, what in back.edits] == ["brush: bright box", "eraser: bright box", "rename bright box: plate"]
    assert same({name: decode_rle(code) for name, code in back.answer_codes.items()}, back.masks)
    back.export(tmp_path / "out", "phantom")
    write_png(make_image().pixels, tmp_path / "out" / "phantom.png")
    episode, _ = replay_record(tmp_path / "out" / "phantom_record.json")
    assert same(episode.masks, back.masks)
    assert episode.provenance["people_edit"] == "rename bright box: plate"


@pytest.mark.parametrize(
    ("points", "radius", "said"),
    [
        ([], 1, "one or more points"),
        ([(1, 1)], -1, "a radius"),
        ([(500, 1)], 1, "leaves the image"),
        ([(4, 4)], 1, "nothing"),
    ],
)
def test_strokes_that_are_refused(points: list[tuple[float, float]], radius: float, said: str) -> None:
    it = session()
    it.brush([(3, 3), (6, 6)], 4, target="box")
    before = it.masks["box"]
    with pytest.raises(ConfigError, match=said):
        it.brush(points, radius, target="box")
    with pytest.raises(ConfigError, match="no object 'other'"):
        it.rename("other", "box")
    with pytest.raises(ConfigError, match="already an object 'box'"):
        it.rename("box", "box")
    assert np.array_equal(it.masks["box"], before)


def test_a_preview_is_the_click_and_changes_nothing() -> None:
    it = session()
    given = it.preview(20, 20, target="box")
    assert not it.steps
    assert not it.masks
    assert np.array_equal(it.click(20, 20, target="box").turn.after["box"], given)
