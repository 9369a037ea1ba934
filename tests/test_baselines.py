"""Blind policies and the scripted one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ibisagent.domain import Case, Click, Completion, Image, Observation, Reply, Stop, Turn
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.imaging.masks import iou
from ibisagent.policies import load_policy
from ibisagent.policies.baselines import CentreClickPolicy, LocationPriorPolicy, OneShotPolicy, RandomClicksPolicy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import parse, write
from ibisagent.segmenters import load_segmenter

SIZE = (61, 83)
IMAGE = Image(np.zeros((*SIZE, 3), dtype=np.uint8))


def blob(x_norm: float, y_norm: float, size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((columns + 0.5) / size[1] - x_norm) ** 2 + ((rows + 0.5) / size[0] - y_norm) ** 2 < 0.01


EXAMPLES = [
    ("Spleen", "CT", blob(0.2, 0.3, (90, 120))),
    ("spleen", "CT", blob(0.2, 0.3, (200, 77))),
    ("spleen", "MRI", blob(0.8, 0.3, (50, 50))),
    *[("liver", "MRI", blob(0.5, 0.9, (64, 64)))] * 4,
]


def asked(query: str, case_id: str = "x", *turns: Turn) -> Observation:
    return Observation(case_id, IMAGE, query, {}, turns)


def place(policy: LocationPriorPolicy, query: str, case_id: str) -> tuple[float, float]:
    (click,) = parse(policy.respond([asked(query, case_id)])[0].text, SIZE, dialect="ibis").actions
    assert isinstance(click, Click)
    assert click.positive
    return (click.x + 0.5) / SIZE[1], (click.y + 0.5) / SIZE[0]


@pytest.mark.parametrize(
    ("query", "case_id", "near"),
    [
        ("Segment the spleen.", "ct", (0.2, 0.3)),  # that object in that modality
        ("Segment the spleen.", "mri", (0.8, 0.3)),
        ("Segment the spleen.", "nowhere", (0.2, 0.3)),  # that object in any modality: two of three are here
        ("Segment the kidney.", "ct", (0.2, 0.3)),  # any object in that modality
        ("Segment the kidney.", "nowhere", (0.5, 0.9)),  # anything
    ],
)
def test_location_prior_and_what_it_falls_back_to(query: str, case_id: str, near: tuple[float, float]) -> None:
    policy = LocationPriorPolicy(EXAMPLES, {"ct": "CT", "mri": "MRI"})
    assert np.hypot(*np.subtract(place(policy, query, case_id), near)) < 0.1


def test_location_prior_needs_examples() -> None:
    with pytest.raises(DataError, match="no masks"):
        LocationPriorPolicy([])


def test_one_click_then_stop() -> None:
    policy = CentreClickPolicy()
    first = parse(policy.respond([asked("Segment the spleen.")])[0].text, SIZE, dialect="ibis")
    assert first.actions == (Click(41, 30, True, "spleen"),)
    turn = Turn(Completion(""), first, {}, {})
    second = parse(policy.respond([asked("Segment the spleen.", "x", turn)])[0].text, SIZE, dialect="ibis")
    assert isinstance(second.actions[0], Stop)


def test_scripted_replies_by_turn_and_by_case(tmp_path: Path) -> None:
    turn = Turn(Completion(""), Reply(), {}, {})
    policy = ScriptedPolicy(["one", "two"])
    assert [completion.text for completion in policy.respond([asked("?"), asked("?", "x", turn)])] == ["one", "two"]
    (tmp_path / "script.json").write_text(json.dumps({"a": ["for a"], "b": ["for b"]}))
    policy = ScriptedPolicy.from_file(tmp_path / "script.json", dialect="paper")
    assert policy.dialect == "paper"
    assert str(tmp_path) in policy.name
    assert [completion.text for completion in policy.respond([asked("?", "b"), asked("?", "a")])] == ["for b", "for a"]
    with pytest.raises(PolicyError, match="0 replies for case c, turn 1 was asked"):
        policy.respond([asked("?", "c")])
    with pytest.raises(PolicyError, match="turn 2 was asked"):
        policy.respond([asked("?", "a", turn)])


@pytest.mark.parametrize("text", ["", "{", "7", '["a", 7]', '{"a": "b"}', "[" * 100_000])
def test_scripts_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"script\.json"):
        ScriptedPolicy.from_file(path)
    with pytest.raises(DataError, match="cannot be read"):
        ScriptedPolicy.from_file(tmp_path / "nowhere.json")


def test_unknown_dialects() -> None:
    for make in (lambda: CentreClickPolicy(dialect="x"), lambda: ScriptedPolicy([], dialect="x")):
        with pytest.raises(ConfigError, match="unknown dialect"):
            make()


def test_random_clicks_are_anywhere_and_the_same_again() -> None:
    policy = RandomClicksPolicy(seed=1)

    def click(case_id: str, turns: int) -> Click:
        observation = asked("Segment the spleen.", case_id, *[Turn(Completion(""), Reply(), {}, {})] * turns)
        (action,) = parse(policy.respond([observation])[0].text, SIZE, dialect="ibis").actions
        assert isinstance(action, Click)
        return action

    places = [(click(str(number), turns).x, click(str(number), turns).y) for number in range(40) for turns in range(3)]
    assert len(set(places)) > 100
    assert min(x for x, _ in places) < 10 < 70 < max(x for x, _ in places)
    last = asked("Segment the spleen.", "x", *[Turn(Completion(""), Reply(), {}, {})] * 3)
    assert parse(policy.respond([last])[0].text, SIZE, dialect="ibis").stop is not None


def test_one_shot_takes_the_first_action_only() -> None:
    turn = Turn(Completion(""), Reply(), {}, {})
    both = write(Reply("Two.", (Click(5, 6, True, "a"), Click(50, 40, True, "b"))), SIZE, dialect="ibis")
    policy = OneShotPolicy(ScriptedPolicy([both, "never asked"]))
    assert policy.name == "one-shot:scripted"
    first, later = policy.respond([asked("Segment a and b."), asked("Segment a and b.", "x", turn)])
    assert parse(first.text, SIZE, dialect="ibis").actions == (Click(5, 6, True, "a"),)
    assert parse(later.text, SIZE, dialect="ibis").stop is not None
    assert OneShotPolicy(ScriptedPolicy(["no reply"])).respond([asked("?")])[0].text == "no reply"


def test_the_true_box_with_an_ellipse_in_it() -> None:
    mask = blob(0.5, 0.4, SIZE)
    case = Case("x", IMAGE, "Segment the spleen.", {"spleen": mask})
    policy = load_policy("oracle-box", cases=[case])
    (episode,) = rollout(policy, [SegmentationEnv(case, load_segmenter("ellipse"), dialect=policy.dialect)])
    assert (policy.name, episode.stop, episode.clicks) == ("oracle-box", "stopped", 1)
    assert iou(episode.masks["spleen"], mask) > 0.9
