"""What an expert does earns full marks: no reward term is out of reach, none needs a model to check it."""

from __future__ import annotations

from functools import partial

import numpy as np
import phantoms
import pytest

from ibisagent.domain import Case, Episode, Image
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.protocol import DIALECTS
from ibisagent.rewards import Score, score
from ibisagent.segmenters import load_segmenter

SIZE = (121, 163)
disc = partial(phantoms.disc, size=SIZE)

SPLEEN, LIVER, NONE = disc(36, 62, 26), disc(114, 56, 34), np.zeros(SIZE, dtype=bool)
PIXELS = np.full((*SIZE, 3), 30, dtype=np.uint8)
PIXELS[SPLEEN], PIXELS[LIVER] = 120, 220
IMAGE = Image(PIXELS)

CASES = {
    "one": Case("one", IMAGE, "Segment the spleen.", {"spleen": SPLEEN}),
    "multiple": Case("multiple", IMAGE, "Segment spleen and liver.", {"spleen": SPLEEN, "liver": LIVER}),
    "absent": Case("absent", IMAGE, "Segment the kidney.", {"kidney": NONE}),
    "mixed": Case("mixed", IMAGE, "Segment liver and kidney.", {"liver": LIVER, "kidney": NONE}),
    "refine": Case("refine", IMAGE, "Segment the liver.", {"liver": LIVER}, start={"liver": disc(104, 56, 14)}),
}


def expert(case: Case, dialect: str, **options: float) -> tuple[Episode, Score]:
    oracle = OraclePolicy([case], dialect=dialect, **options)
    env = SegmentationEnv(case, load_segmenter("region"), dialect=dialect, max_turns=oracle.max_turns)
    (episode,) = rollout(oracle, [env])
    return episode, score(episode, case)


@pytest.mark.parametrize("dialect", ["ibis", "paper"])
@pytest.mark.parametrize("name", CASES)
def test_a_converged_expert_earns_the_maximum(name: str, dialect: str) -> None:
    episode, result = expert(CASES[name], dialect)
    assert episode.stop == "stopped"
    assert (result.answer, result.format, result.click, result.progress, result.length) == (3, 1, 1, 1, 1)
    assert result.total == pytest.approx(1.4)


def test_so_does_one_who_begins_with_a_box() -> None:
    assert DIALECTS["ibis"].boxes
    episode, result = expert(CASES["one"], "ibis", box_first=1.0)
    assert "box" in episode.turns[0].completion.text
    assert result.total == pytest.approx(1.4)


def test_and_one_who_speaks_as_the_released_weights() -> None:
    assert expert(CASES["one"], "released")[1].total == pytest.approx(1.4)


def test_a_closed_question_earns_its_own_maximum() -> None:
    case = Case("vqa", IMAGE, "Which is brighter, spleen or liver?", answer="liver")
    result = expert(case, "ibis")[1]
    assert (result.answer, result.total) == (1, pytest.approx(1.0))


def test_planned_mistakes_are_taken_back_and_cost_only_what_they_must() -> None:
    episode, result = expert(CASES["one"], "ibis", mistakes=0.9)
    assert any("undo" in turn.completion.text for turn in episode.turns)
    assert (result.answer, result.format) == (3, 1)
    assert result.click < 1
