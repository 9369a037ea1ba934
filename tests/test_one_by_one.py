"""A policy with a vocabulary: one object after another, by the learned name and told by the user's, absent where such
images cannot show it; masks that were brought are begun anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ibisagent.domain import Case, Click, Completion, Episode, Image, Observation
from ibisagent.environment import SegmentationEnv, rollout, turn_limit
from ibisagent.errors import ConfigError
from ibisagent.imaging.masks import iou
from ibisagent.inference.image import asked_facts, asked_objects, run_case
from ibisagent.inference.session import Session
from ibisagent.policies.one_by_one import answering, refinements, sentence_for, understood
from ibisagent.policies.vocabulary import Asked, Look, Presence, Vocabulary
from ibisagent.segmenters import load_segmenter

SIZE = 64
ROW, COLUMN = np.mgrid[:SIZE, :SIZE]
DISC = (ROW - 20) ** 2 + (COLUMN - 20) ** 2 < 8**2
CUP = (ROW - 46) ** 2 + (COLUMN - 46) ** 2 < 7**2
THINGS = {"optic disc": DISC, "optic cup": CUP}
VOCABULARY = Vocabulary(
    kinds=(("fundus", "retinal"), ("CT", "abdomen")),
    learned={"optic disc": (0,), "optic cup": (0,), "soft exudate": (0,), "liver": (1,)},
    possible={"optic disc": (0,), "optic cup": (0,), "soft exudate": (0,), "liver": (1,)},
    weights=np.zeros((2, 1), np.float32),
    biases=np.array([8.0, 0.0], np.float32),
    usual=Presence(slope=1.0, shift=0.0, absent_below=0.2),
)


def phantom() -> Image:
    """A dark field with a bright disc and a bright cup."""
    pixels = np.full((SIZE, SIZE, 3), 40, np.uint8)
    pixels[DISC | CUP] = 220
    return Image(pixels)


class Nano:
    """A model that clicks into the object that it is asked for, then stops; it calls everything by a wrong name."""

    name, dialect, max_turns = "nano", "ibis", 3
    vocabulary = VOCABULARY

    def __init__(self) -> None:
        self.queries: list[str] = []

    def look(self, image: Image, query: str) -> Look:
        """Objects of `THINGS` are there, those of other names are not; a word that is no name may be anything."""
        named = [name for name in VOCABULARY.learned if name in query]
        there = np.full((SIZE, SIZE), 4.0) if not named else np.where(THINGS.get(named[0], False), 4.0, -4.0)
        return Look(VOCABULARY.kinds_of(np.zeros(1, np.float32)), there)

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """As `MllmPolicy`."""
        return [self.run(answering(one, VOCABULARY, self.look, "ibis", self.max_turns)) for one in observations]

    def refine(self, observation: Observation) -> list[Completion]:
        """As `MllmPolicy`."""
        found = refinements(observation, VOCABULARY, self.look, "ibis")
        return [] if found is None else [found[0], self.run(found[1])]

    def about(self, image: Image, query: str) -> tuple[Asked, ...]:
        """As `MllmPolicy`."""
        asked = understood(image, query, VOCABULARY, self.look)
        return tuple(VOCABULARY.asked(one, self.look(image, sentence_for(one))) for one in asked)

    def run(self, answer) -> Completion:
        """Let the model answer until there is a reply."""
        try:
            asked = next(answer)
            while True:
                asked = answer.send(self.write(asked))
        except StopIteration as end:
            return end.value

    def write(self, asked: Observation) -> Completion:
        """The model itself."""
        self.queries.append(asked.query)
        if any(mask.any() for mask in asked.masks.values()):
            stop = "<think>Fine.</think><action>stop</action><answer>The liver is segmented.</answer>"
            return Completion(stop)
        x, y = (46, 46) if "cup" in asked.query else (20, 20)
        place, first, last = (f"({(x + d) / SIZE:.4f}, {(y + d) / SIZE:.4f})" for d in (0.5, -9, 10))
        return Completion(f"<think>I look for the liver.</think><action>click + {place}; box {first} {last}</action>")


def ask(query: str, **more: object) -> Episode:
    return run_case(Case("x", phantom(), query, **more), Nano(), load_segmenter("region"))  # type: ignore[arg-type]


def words_of(episode: Episode) -> str:
    return " ".join([episode.answer.answer, *(turn.reply.thought for turn in episode.turns)])


@pytest.mark.parametrize("query", ["OPTIC DISC", "papilla", "Outline the optic nerve head.", "Segment the optic disc."])
def test_the_model_is_asked_by_the_learned_name_and_the_user_answered_by_their_own(query: str) -> None:
    policy = Nano()
    episode = run_case(Case("x", phantom(), query), policy, load_segmenter("region"))
    [name] = [one["name"] for one in asked_objects(episode)]
    assert set(policy.queries) == {"Segment the optic disc."}
    assert list(episode.answer_masks) == [name]
    assert iou(episode.answer_masks[name], DISC) > 0.6
    assert episode.answer.answer == f"The {name} is segmented."
    assert "liver" not in words_of(episode)


def test_each_of_multiple_objects_gets_a_mask_of_its_own() -> None:
    episode = ask("Segment the optic disc and the optic cup.")
    assert {name: iou(mask, THINGS[name]) > 0.6 for name, mask in episode.answer_masks.items()} == {
        "optic disc": True,
        "optic cup": True,
    }
    assert episode.answer.answer == "The optic disc is segmented. The optic cup is segmented."
    assert episode.stop == "stopped"


def test_of_multiple_objects_those_that_are_not_there_are_called_absent() -> None:
    episode = ask("the optic disc, the liver and the soft exudate")
    assert episode.answer.absent == ("liver", "soft exudate")
    assert {name: bool(mask.any()) for name, mask in episode.answer_masks.items()} == {
        "optic disc": True,
        "liver": False,
        "soft exudate": False,
    }


def test_everything_is_what_that_kind_of_image_taught() -> None:
    episode = ask("Segment everything.")
    assert [one["name"] for one in asked_objects(episode)] == ["optic disc", "optic cup", "soft exudate"]
    assert episode.answer.absent == ("soft exudate",)


def test_an_object_that_such_an_image_cannot_show_is_absent_without_asking_the_model() -> None:
    policy = Nano()
    episode = run_case(Case("x", phantom(), "Is there a liver? If so, segment it."), policy, load_segmenter("region"))
    assert not policy.queries
    assert episode.answer.absent == ("liver",)
    assert asked_objects(episode)[0]["presence"] < 0.01


def test_a_name_that_was_never_learned_is_said_to_be_so_in_the_record() -> None:
    [misspelt] = asked_objects(ask("Segment the optc disc."))
    assert (misspelt["known"], misspelt["nearest"]) == (False, "optic disc")
    assert ask("Segment the optc disc.").answer.answer == "The optc disc is segmented."
    [other] = asked_objects(ask("fovea"))
    assert (other["known"], other["nearest"]) == (False, None)


def test_a_policy_without_a_vocabulary_makes_no_claim() -> None:
    from ibisagent.policies import load_policy

    policy = load_policy("centre-click")
    assert asked_facts(policy, phantom(), "Segment the optc disc.") == {}
    assert turn_limit(policy, "the liver and the spleen") == turn_limit(policy)


def test_what_is_not_clear_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="one object or"):
        ask("breast and ovarian cancer")


@pytest.mark.parametrize("change", ["moved", "elsewhere", "eroded", "leaked"])
def test_a_brought_mask_comes_nearer_to_the_object(change: str) -> None:
    brought = {
        "moved": np.roll(DISC, 6, axis=1),
        "elsewhere": np.roll(DISC, 36, axis=1),
        "eroded": (ROW - 20) ** 2 + (COLUMN - 20) ** 2 < 4**2,
        "leaked": DISC | ((ROW > 15) & (ROW < 30) & (COLUMN > 20) & (COLUMN < 45)),
    }[change]
    before = iou(brought, DISC)
    episode = ask("Segment the optic disc.", start={"optic disc": brought})
    assert iou(episode.answer_masks["optic disc"], DISC) > before + 0.1
    session = Session(
        Case("x", phantom(), "optic disc", start={"optic disc": brought}), load_segmenter("region"), Nano()
    )
    session.run()
    assert iou(session.masks["optic disc"], DISC) > before + 0.1


def test_masks_that_are_likely_right_may_be_left_to_the_model() -> None:
    policy = Nano()
    case = Case("x", phantom(), "optic disc", start={"optic disc": np.roll(DISC, 1, axis=0)})
    env = SegmentationEnv(case, load_segmenter("region"), dialect="ibis")
    [episode] = rollout(policy, [env], refine=False)
    assert not any(isinstance(action, Click) for turn in episode.turns for action in turn.reply.actions)
