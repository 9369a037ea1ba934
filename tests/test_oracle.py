"""The expert: what it clicks, what it draws, and that it depends on nothing but the case and the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from phantoms import SIZE, disc

from ibisagent.domain import (
    Box,
    Case,
    Click,
    Completion,
    Episode,
    Image,
    Observation,
    Reply,
    Stop,
    Turn,
    Undo,
    standing,
)
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.rewards import click_score, progress_score
from ibisagent.segmenters import load_segmenter


def make_case(number: int) -> Case:
    """A blotchy disc on a noisy ground, which no single click gets right."""
    random = np.random.default_rng(number)
    ground_truth = disc(*random.integers((20, 15), (60, 45)), int(random.integers(8, 15)))
    pixels = random.integers(0, 110, (*SIZE, 3)) + ground_truth[..., None] * 90
    return Case(f"case {number}", Image(pixels.astype(np.uint8)), "Segment the polyp.", {"polyp": ground_truth})


CASES = [make_case(number) for number in range(12)]


def play(policy: OraclePolicy, cases: list[Case] = CASES) -> list[Episode]:
    region = load_segmenter("region")
    envs = [SegmentationEnv(case, region, dialect=policy.dialect, max_turns=policy.max_turns) for case in cases]
    return rollout(policy, envs)


def texts(episodes: list[Episode]) -> list[list[str]]:
    return [[turn.completion.text for turn in episode.turns] for episode in episodes]


def ground_truth_of(episode: Episode) -> Mapping[str, np.ndarray]:
    (case,) = (case for case in CASES if case.id == episode.case_id)
    assert case.targets is not None
    return case.targets


def first_view(case: Case) -> Observation:
    return Observation(case.id, case.image, case.query)


OPTIONS = {"mistakes": 0.3, "jitter": 0.7, "box_first": 0.5}


def test_batch_and_order_do_not_matter() -> None:
    together = texts(play(OraclePolicy(CASES, **OPTIONS)))
    alone = [texts(play(OraclePolicy([case], **OPTIONS), [case]))[0] for case in CASES]
    backwards = texts(play(OraclePolicy(CASES[::-1], **OPTIONS), CASES[::-1]))[::-1]
    assert together == alone == backwards
    assert together != texts(play(OraclePolicy(CASES, **OPTIONS, seed=1)))


def test_every_click_corrects_an_error_wherever_jitter_moves_it() -> None:
    for jitter in (0.0, 0.4, 1.0):
        for episode in play(OraclePolicy(CASES, jitter=jitter)):
            for turn in episode.turns:
                for prompt in standing([turn]):
                    assert click_score(prompt, turn.before, ground_truth_of(episode), {"polyp": "polyp"}) == 1


def test_jitter_moves_clicks() -> None:
    still = [OraclePolicy(CASES).reply(first_view(case)).actions for case in CASES]
    moved = [OraclePolicy(CASES, jitter=1.0).reply(first_view(case)).actions for case in CASES]
    assert sum(a != b for a, b in zip(still, moved, strict=True)) >= 10


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_box_first_share(share: float) -> None:
    cases = [Case(f"{number}", CASES[0].image, "polyp", CASES[0].targets) for number in range(200)]
    policy = OraclePolicy(cases, box_first=share)
    boxes = sum(isinstance(policy.reply(first_view(case)).actions[0], Box) for case in cases)
    assert boxes / len(cases) == pytest.approx(share, abs=0.1)


def test_box_without_jitter_is_tight_and_with_jitter_stays_inside() -> None:
    for case in CASES:
        assert case.targets is not None
        (box,) = OraclePolicy([case], box_first=1.0).reply(first_view(case)).actions
        assert isinstance(box, Box)
        inside = np.zeros(SIZE, dtype=bool)
        inside[box.y0 : box.y1, box.x0 : box.x1] = True
        assert not (case.targets["polyp"] & ~inside).any()
        assert (box.x1 - box.x0) == np.count_nonzero(case.targets["polyp"].any(axis=0))
    corner = Case("corner", CASES[0].image, "polyp", {"polyp": disc(0, 60, 3)})
    for seed in range(30):
        (box,) = OraclePolicy([corner], box_first=1.0, jitter=1.0, seed=seed).reply(first_view(corner)).actions
        assert isinstance(box, Box)
        assert 0 <= box.x0 < box.x1 <= SIZE[1]
        assert 0 <= box.y0 < box.y1 <= SIZE[0]


def test_mistakes_are_wrong_and_taken_back_at_once() -> None:
    mistakes = 0
    for episode in play(OraclePolicy(CASES, mistakes=0.4)):
        ground_truth = ground_truth_of(episode)
        for index, turn in enumerate(episode.turns):
            scores = [click_score(prompt, turn.before, ground_truth, {"polyp": "polyp"}) for prompt in standing([turn])]
            follower = episode.turns[index + 1] if index + 1 < len(episode.turns) else None
            taken_back = follower is not None and isinstance(follower.reply.actions[0], Undo)
            assert taken_back == (-1 in scores)
            if follower is not None and taken_back:
                mistakes += 1
                assert progress_score(turn, ground_truth, {"polyp": "polyp"}) == 0
                assert all(np.array_equal(follower.after[name], turn.before[name]) for name in turn.before)
        assert isinstance(episode.turns[-1].reply.actions[-1], Stop)
    assert mistakes >= 10


def test_it_stops_at_the_threshold_or_when_its_clicks_are_spent() -> None:
    for episode in play(OraclePolicy(CASES, iou_threshold=1.0, max_clicks=3)):
        assert episode.clicks <= 3
        assert episode.stop == "stopped"
    easy = play(OraclePolicy(CASES, iou_threshold=0.01))
    assert all(len(episode.turns) == 2 for episode in easy)


def test_absent_objects_and_questions() -> None:
    none = np.zeros(SIZE, dtype=bool)
    absent = Case("absent", CASES[0].image, "Segment spleen and liver.", {"spleen": none, "liver": none})
    asked = Case("asked", CASES[0].image, "Is there a polyp?", answer="yes")
    policy = OraclePolicy([absent, asked])
    assert policy.reply(first_view(absent)).actions == (Stop("No spleen and no liver here.", ("spleen", "liver")),)
    assert policy.reply(first_view(asked)).actions == (Stop("yes"),)


def test_lazy_cases_are_looked_up_once() -> None:
    class Lazy(Mapping[str, Case]):
        looked_up = 0

        def __getitem__(self, case_id: str) -> Case:
            self.looked_up += 1
            return CASES[int(case_id.split()[1])]

        def __iter__(self) -> Iterator[str]:
            return iter(())

        def __len__(self) -> int:
            return 0

    lazy = Lazy()
    play(OraclePolicy(lazy, max_clicks=4))
    assert lazy.looked_up == len(CASES)


def test_cases_without_ground_truth() -> None:
    blank = Case("blank", CASES[0].image, "polyp")
    with pytest.raises(PolicyError, match="has no ground truth"):
        OraclePolicy([blank]).respond([first_view(blank)])
    with pytest.raises(PolicyError, match="knows no case 'blank'"):
        OraclePolicy([]).respond([first_view(blank)])


@pytest.mark.parametrize(
    "options",
    [
        {"iou_threshold": 0.0},
        {"iou_threshold": float("nan")},
        {"max_clicks": 0},
        {"box_first": 1.1},
        {"jitter": -0.1},
        {"mistakes": 1.0},
        {"dialect": "klingon"},
        {"dialect": "released", "mistakes": 0.1},
        {"dialect": "paper", "box_first": 0.1},
    ],
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        OraclePolicy([], **options)


def test_a_finished_mistake_budget_still_stops() -> None:
    """The last click of the budget may be a mistake: it is taken back, then the episode stops."""
    policy = OraclePolicy(CASES, mistakes=0.95, max_clicks=2, iou_threshold=1.0)
    for episode in play(policy):
        assert episode.stop == "stopped"
        assert len(episode.turns) <= policy.max_turns


def test_undo_counts_all_prompts_of_the_wrong_turn() -> None:
    both = Case("two", CASES[0].image, "polyp and disc", {"polyp": disc(20, 20, 9), "disc": disc(60, 40, 9)})
    policy = OraclePolicy([both], mistakes=0.999)
    look = first_view(both)
    reply = policy.reply(look)
    assert len(reply.actions) == 2
    assert all(isinstance(action, Click) for action in reply.actions)
    turn = Turn(Completion(""), reply, {}, {"polyp": disc(50, 10, 3), "disc": disc(10, 50, 3)})
    assert policy.reply(Observation(look.case_id, look.image, look.query, turn.after, (turn,))) == Reply(
        "My last action was wrong; I take it back.", (Undo(2),)
    )
